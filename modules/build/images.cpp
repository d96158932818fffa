module;
#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import cobuild.http;
import cobuild.json;
import :parts;

namespace cobuild::build {

void describe_image(const exporter::exported& image, const std::vector<std::string>& names, std::map<std::string, std::string>& response) {
    response["containerimage.digest"] = image.top.digest.str();
    if (!image.is_index()) response["containerimage.config.digest"] = image.images.front().config.digest.str();
    response["containerimage.descriptor"] = base64_encode(json::serialize(oci::to_json(image.top)));
    std::string joined;
    for (const auto& n : names) joined += cat(joined.empty() ? "" : ",", n);
    if (!joined.empty()) response["image.name"] = joined;
}

async::task<void> keep_image(parts& p, exporter::exported image, built what, std::vector<std::string> names) {
    const auto descriptor = json::serialize(oci::to_json(image.top));
    co_await p.runtime.pool().run([&] {
        content::image i{.target = image.top.digest, .descriptor = descriptor};
        i.created = std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now());
        snapshot::chain all;
        for (std::size_t n = 0; n < image.images.size(); ++n) {
            const auto& chain = what.list.at(n).in.root;
            all.layers.insert(all.layers.end(), chain.layers.begin(), chain.layers.end());
            if (image.is_index()) i.labels[source::chain_label_of(image.images[n].manifest.digest)] = source::chain_text(chain);
        }
        i.labels[std::string(source::chain_label)] = source::chain_text(all);
        i.labels["size"] = cat(image.size);
        i.labels["config"] = (image.is_index() ? image.top : image.images.front().config).digest.str();
        for (const auto& name : names) {
            i.name = name;
            p.content->put_image(i);
        }
    });
}

namespace {

async::task<void> push_blob(parts& p, registry::client& to, oci::reference ref, oci::descriptor blob, std::shared_ptr<const registry::login> who,
                            progress::writer progress) {
    auto line = std::make_shared<progress::line>(progress.begin(cat("pushing ", blob.digest.str()), static_cast<std::int64_t>(blob.size)));
    auto sent = std::make_shared<std::int64_t>(0);
    registry::push_options options;
    options.call.who = std::move(who);
    options.call.progress = [line, sent](std::uint64_t n) { line->update(*sent += static_cast<std::int64_t>(n)); };
    const auto open = [&p, blob]() -> async::task<http::body_source> {
        auto file = std::make_shared<unique_fd>(co_await p.runtime.pool().run([&p, blob] { return p.content->open(blob.digest); }));
        auto body = http::file_body(file->get(), 0, blob.size, p.runtime.pool());
        body.read = [file, read = std::move(body.read)](std::uint64_t offset, std::size_t max) { return read(offset, max); };
        co_return body;
    };
    co_await to.push_blob(ref, blob, open, options);
    line->done();
}

async::task<void> push_to(parts& p, registry::client& to, exporter::exported image, std::vector<std::string> names, push_manner how,
                          progress::writer progress) {
    for (const auto& name : names) {
        const auto parsed = oci::reference::parse(name);
        const auto ref = how.by_digest ? parsed.name_only() : parsed.with_default_tag();
        auto layers = progress.begin("pushing layers");
        std::vector<async::task<void>> work;
        for (const auto& [d, blob] : image.blobs())
            if (!oci::is_nondistributable(blob.media_type)) work.push_back(push_blob(p, to, ref, blob, how.who, progress));
        co_await async::when_all(std::move(work));
        layers.done();
        // What an index names must be there before it; an attestation's subject before the attestation.
        if (image.is_index())
            for (const auto* list : {&image.images, &image.attestations})
                for (const auto& i : *list) co_await to.push_manifest(ref.name_only(), i.manifest.media_type, i.manifest_bytes, {.who = how.who});
        auto manifest = progress.begin(cat("pushing manifest for ", ref.str(), "@", image.top.digest.str()));
        co_await to.push_manifest(ref, image.top.media_type, image.top_bytes, {.who = how.who});
        manifest.done();
    }
}

/// registry.insecure=true: hosts of their own, without mirrors and what the configuration says; https unverified, else http.
registry::options insecure_options(parts& p) {
    registry::options o;
    o.executor = p.runtime.get_executor();
    o.pool = &p.runtime.pool();
    o.who.credentials = registry::docker_credentials(p.runtime.pool(), p.docker_config, registry::run_helpers_with(*p.programs));
    o.limits.transfers = static_cast<std::size_t>(p.settings.system.max_registry_concurrency);
    o.hosts = [](std::string_view domain) {
        auto hosts = registry::default_hosts(domain);
        for (auto& h : hosts) h.plain_http = h.insecure = h.try_https_first = true;
        return hosts;
    };
    return o;
}

async::task<void> push_insecurely(parts& p, exporter::exported image, std::vector<std::string> names, push_manner how, progress::writer progress) {
    registry::client to(insecure_options(p));
    std::exception_ptr failed;
    try {
        co_await push_to(p, to, std::move(image), std::move(names), how, progress);
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::linked(async::cancel_token{}, to.close());
    if (failed) std::rethrow_exception(failed);
}

}  // namespace

async::task<void> push_image(parts& p, exporter::exported image, std::vector<std::string> names, push_manner how, progress::writer progress) {
    // A tag would say where the image is to be found; by digest nothing does but the digest.
    for (const auto& name : names)
        if (how.by_digest && oci::reference::parse(name).tag() != "latest")
            throw error{errc::invalid,
                        cat("push-by-digest=true and the tag of ", quoted(oci::reference::parse(name).familiar()), " do not go together")};
    return how.insecure ? push_insecurely(p, std::move(image), std::move(names), how, progress)
                        : push_to(p, *p.registry, std::move(image), std::move(names), how, progress);
}

namespace {
async::task<void> pipe_into_docker(parts& p, exporter::exported image, std::vector<std::string> names, progress::writer progress) {
    if (!process::find_program("docker")) throw error{errc::not_found, "--load needs the docker command line program, which is not in PATH"};
    std::array<int, 2> ends{};
    if (::pipe2(ends.data(), O_CLOEXEC) != 0) throw_errno("making a pipe");
    unique_fd reading{ends[0]};
    unique_fd writing{ends[1]};
    process::command c{.args = {"docker", "load"}};
    c.in = process::stdio::given(reading.get());
    c.err = process::stdio::pipe();
    c.out = process::stdio::pipe();
    auto child = co_await p.programs->spawn(std::move(c));
    reading.reset();
    auto said = std::make_shared<std::string>();
    const auto collect = [said](std::span<const std::byte> data) -> async::task<void> {
        if (said->size() < 65536) said->append(text_of(data));
        co_return;
    };
    async::task_group group(co_await async::current_executor, true);
    group.spawn(process::read_all(child.take_stdout(), [](std::span<const std::byte>) -> async::task<void> { co_return; }));
    group.spawn(process::read_all(child.take_stderr(), collect));
    std::exception_ptr failed;
    try {
        co_await exporter::write_archive(p.stores(), exporter::archive_kind::docker, image, names, {.fd = writing.get()}, progress);
    } catch (...) {
        failed = std::current_exception();
    }
    writing.reset();
    if (failed) child.signal(15);
    co_await async::no_cancel;
    const auto status = co_await child.wait();
    co_await group.join();
    if (!status.ok()) throw error{errc::unavailable, cat("docker load failed (", status.str(), "): ", trim(*said))};
    if (failed) std::rethrow_exception(failed);
}
}  // namespace

async::task<void> load_into_docker(parts& p, exporter::exported image, std::vector<std::string> names, progress::writer progress) {
    // A chain of its own: what it shields from cancellation while it cleans up ends with it.
    co_await async::linked(async::cancel_token{}, pipe_into_docker(p, std::move(image), std::move(names), std::move(progress)));
}

std::vector<digest> children_of(const content::store& content, const digest& d) {
    std::vector<digest> out;
    // Only manifests and indexes point at anything, and they are small.
    const auto size = content.find(d);
    if (!size || *size > (std::uint64_t{4} << 20)) return out;
    const auto text = content.read_all(d);
    if (!text.starts_with('{')) return out;
    const auto kind = oci::sniff_media_type(text);
    if (oci::is_index(kind)) {
        for (const auto& m : oci::parse_index(text).manifests) out.push_back(m.digest);
    } else if (oci::is_manifest(kind)) {
        const auto manifest = oci::parse_manifest(text);
        out.push_back(manifest.config.digest);
        if (manifest.subject) out.push_back(manifest.subject->digest);
        for (const auto& l : manifest.layers) out.push_back(l.digest);
    }
    return out;
}

}  // namespace cobuild::build

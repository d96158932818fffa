module;
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.registry;

import :internal;

namespace cobuild::registry {

namespace {

constexpr std::size_t max_documents = 10'000;
constexpr std::size_t copies_at_once = 4;

struct copying {
    client& c;
    async::blocking_pool& pool;
    oci::reference from, to;
    copy_options o;
    async::semaphore turns{copies_at_once};
    std::vector<manifest_content> documents;  ///< what refers comes before what it refers to
    std::map<digest, oci::descriptor> blobs;
};

void write_all(int fd, std::span<const std::byte> data) {
    while (!data.empty()) {
        const auto n = ::write(fd, data.data(), data.size());
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw_errno("writing a temporary file");
        data = data.subspan(static_cast<std::size_t>(n));
    }
}

unique_fd nameless_file() {
    const auto dir = std::filesystem::temp_directory_path().string();
    unique_fd fd(::open(dir.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
    if (!fd) throw_errno(cat("making a temporary file in ", dir));
    return fd;
}

/// The blob, fetched into a file of no name that lives as long as the source does.
async::task<http::body_source> fetched(copying* job, oci::descriptor blob, std::shared_ptr<unique_fd> file) {
    *file = co_await job->pool.run(nameless_file);
    const blob_sink sink = [job, file](async::chunk data) {
        return [](copying* j, std::shared_ptr<unique_fd> into, async::chunk bytes) -> async::task<void> {
            co_await j->pool.run([fd = into->get(), &bytes] { write_all(fd, bytes); });
        }(job, file, std::move(data));
    };
    co_await job->c.fetch_blob(job->from, blob, sink, {.call = job->o.call});
    co_return http::file_body(file->get(), 0, blob.size, job->pool);
}

async::task<void> copy_blob(copying* job, oci::descriptor blob) {
    const auto turn = co_await job->turns.acquire();
    const auto file = std::make_shared<unique_fd>();
    push_options push{.call = job->o.call};
    push.call.progress = {};  // bytes are counted once, as they come
    if (job->from.domain() == job->to.domain()) push.mount_from = {job->from.path()};
    const auto outcome = co_await job->c.push_blob(job->to, blob, [job, blob, file] { return fetched(job, blob, file); }, push);
    if (job->o.done) job->o.done(blob, outcome);
}

/// Reads the manifests below `root`, in breadth.
async::task<void> collect(copying* job, oci::descriptor root) {
    std::set<digest> seen{root.digest};
    std::vector<oci::descriptor> queue{std::move(root)};
    for (std::size_t i = 0; i < queue.size(); ++i) {
        if (i == max_documents) throw error{errc::corrupt, cat(job->from.familiar(), " has more than ", max_documents, " manifests")};
        const auto next = queue[i];
        auto m = co_await job->c.fetch_manifest(job->from, next, job->o.call);
        if (oci::is_index(m.media_type)) {
            auto index = oci::parse_index(m.bytes);
            for (auto& d : index.manifests)
                if (seen.insert(d.digest).second) queue.push_back(std::move(d));
        } else {
            auto parsed = oci::parse_manifest(m.bytes);
            job->blobs.emplace(parsed.config.digest, std::move(parsed.config));
            for (auto& l : parsed.layers)
                if (!oci::is_nondistributable(l.media_type)) job->blobs.emplace(l.digest, std::move(l));
        }
        job->documents.push_back(std::move(m));
    }
}

async::task<oci::descriptor> only(copying* job, oci::descriptor root, oci::platform wanted) {
    const auto m = co_await job->c.fetch_manifest(job->from, root, job->o.call);
    if (!oci::is_index(m.media_type)) co_return m.target;
    const auto choice = oci::select(oci::parse_index(m.bytes), wanted);
    if (choice.empty()) throw error{errc::not_found, cat(job->from.familiar(), " has no image for ", oci::format(wanted))};
    co_return choice.front();
}

async::task<void> copy_blobs(copying* job) {
    std::vector<async::task<void>> all;
    for (const auto& [id, blob] : job->blobs) all.push_back(copy_blob(job, blob));
    co_await async::when_all(std::move(all));
}

}  // namespace

async::task<oci::descriptor> do_copy(client& c, async::blocking_pool& pool, oci::reference from, oci::reference to, copy_options o) {
    const auto job = std::make_unique<copying>(
        copying{.c = c, .pool = pool, .from = from.with_default_tag(), .to = to.digest() ? to : to.with_default_tag(), .o = std::move(o)});
    auto root = (co_await c.resolve(job->from, job->o.call)).target;
    if (job->o.platform) root = co_await only(job.get(), root, *job->o.platform);
    co_await collect(job.get(), root);
    co_await copy_blobs(job.get());
    const auto repository = oci::reference::parse(cat(job->to.domain(), '/', job->to.path()));
    for (auto m = job->documents.rbegin(); m != job->documents.rend(); ++m) {
        const bool is_root = std::next(m) == job->documents.rend();
        co_await c.push_manifest(is_root ? job->to : repository, m->media_type, m->bytes, job->o.call);
        if (job->o.done) job->o.done(m->target, push_outcome::uploaded);
    }
    co_return job->documents.front().target;
}

}  // namespace cobuild::registry

module;
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.registry;

import :internal;

namespace cobuild::registry {

namespace {

// Manifests live under manifests/, all else under blobs/.
std::string path_of(const oci::reference& ref, const oci::descriptor& d) {
    const bool manifest = oci::is_manifest(d.media_type) || oci::is_index(d.media_type);
    return cat('/', ref.path(), manifest ? "/manifests/" : "/blobs/", d.digest.str());
}

async::task<bool> is_there(std::shared_ptr<registry_state> r, host_state& h, socket_pool::lease& slot, oci::reference ref, oci::descriptor what,
                           std::string scope, call_options call) {
    ask q{.method = "HEAD", .path = path_of(ref, what), .scopes = {std::move(scope)}, .digest = what.digest.str()};
    q.headers.set("Accept", cat(what.media_type.empty() ? "application/octet-stream" : what.media_type, ", */*"));
    auto a = co_await perform(*r, h, slot, std::move(q), call);
    if (a.head.ok()) {
        const auto claimed = digest::try_parse(a.head.headers.get("docker-content-digest").value_or(""));
        co_return !claimed || *claimed == what.digest;
    }
    if (a.head.status != 404) co_await refuse(*r, h, a, {});
    co_return false;
}

/// True when the registry took the blob over from the other repository.
async::task<bool> mount(std::shared_ptr<registry_state> r, host_state& h, socket_pool::lease& slot, oci::reference ref, oci::descriptor blob,
                        std::string from, call_options call) {
    ask q{.method = "POST",
          .path = cat('/', ref.path(), "/blobs/uploads/"),
          .query = {{"mount", blob.digest.str()}, {"from", from}},
          .scopes = {push_scope(ref), cat("repository:", from, ":pull")},
          .digest = blob.digest.str()};
    std::exception_ptr refused;
    try {
        auto a = co_await perform(*r, h, slot, std::move(q), call);
        co_await a.from->discard();
        if (a.head.status == 202) {
            // It began an upload instead; we begin our own when the bytes are here, and let that one lapse.
            co_return false;
        }
        co_return a.head.status == 201;
    } catch (const error& e) {
        // No login for the other repository is no reason to fail: the bytes can be sent.
        if (e.kind() != errc::unauthorized) throw;
    }
    co_return false;
}

async::task<void> upload(std::shared_ptr<registry_state> r, host_state& h, socket_pool::lease& slot, oci::reference ref, oci::descriptor blob,
                         http::body_source bytes, call_options call) {
    ask begin{.method = "POST", .path = cat('/', ref.path(), "/blobs/uploads/"), .scopes = {push_scope(ref)}, .digest = blob.digest.str()};
    auto started = co_await perform(*r, h, slot, std::move(begin), call);
    if (started.head.status == 201) co_return;
    if (started.head.status != 202) co_await refuse(*r, h, started, "to the start of an upload");
    const auto location = started.head.headers.get("location");
    if (!location) throw host_error{error{errc::corrupt, cat(h.name(), " began an upload and did not say where (no Location)")}};
    auto target = started.asked.resolve(*location);
    co_await started.from->discard();
    started.far.reset();
    target.target.append(target.target.find('?') == std::string::npos ? "?" : "&").append("digest=").append(http::percent_encode(blob.digest.str()));
    ask put{.method = "PUT", .scopes = {push_scope(ref)}, .body = std::move(bytes), .absolute = std::move(target), .digest = blob.digest.str()};
    put.headers.set("Content-Type", oci::media::octet_stream);
    auto a = co_await perform(*r, h, slot, std::move(put), call);
    if (!a.head.ok()) co_await refuse(*r, h, a, cat("to the upload of ", blob.digest.str(), " (", blob.size, " bytes)"));
    co_await a.from->discard();
}

http::body_source reporting(http::body_source bytes, std::function<void(std::uint64_t)> progress) {
    if (!progress) return bytes;
    auto inner = std::make_shared<http::body_source>(std::move(bytes));
    return {.length = inner->length, .read = [inner, progress = std::move(progress)](std::uint64_t offset, std::size_t max) {
                return [](std::shared_ptr<http::body_source> source, std::function<void(std::uint64_t)> report, std::uint64_t at,
                          std::size_t most) -> async::task<async::chunk> {
                    auto data = co_await source->read(at, most);
                    report(data.size());
                    co_return data;
                }(inner, progress, offset, max);
            }};
}

std::size_t common_prefix(std::string_view a, std::string_view b) {
    return static_cast<std::size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
}

attempt_plan plan_for(const oci::reference& ref, std::string doing, bool transfer, const std::string& d) {
    return {.doing = std::move(doing), .repository = ref.path(), .transfer = transfer, .push = true, .digest = d};
}

}  // namespace

std::vector<std::string> mount_sources(const registry_state& r, const oci::reference& ref, const digest& blob, std::vector<std::string> named) {
    constexpr std::size_t most = 3;
    if (const auto seen = r.seen_in.find(blob); seen != r.seen_in.end()) {
        std::vector<std::string> more(seen->second.begin(), seen->second.end());
        std::sort(more.begin(), more.end(), [&](const auto& a, const auto& b) {
            const auto left = common_prefix(a, ref.path());
            const auto right = common_prefix(b, ref.path());
            return left != right ? left > right : a < b;
        });
        for (auto& m : more)
            if (std::find(named.begin(), named.end(), m) == named.end()) named.push_back(std::move(m));
    }
    std::erase(named, ref.path());
    if (named.size() > most) named.resize(most);
    return named;
}

async::task<bool> do_exists(std::shared_ptr<registry_state> r, oci::reference ref, oci::descriptor what, call_options call) {
    bool out = false;
    const auto op = [&](host_state& h, socket_pool::lease& slot) -> async::task<void> {
        out = co_await is_there(r, h, slot, ref, what, pull_scope(ref), call);
    };
    co_await try_hosts(*r, plan_for(ref, cat("looking for ", what.digest.str(), " in ", ref.familiar_name()), false, what.digest.str()), call, op);
    co_return out;
}

async::task<push_outcome> do_push_blob(std::shared_ptr<registry_state> r, oci::reference ref, oci::descriptor blob,
                                       std::function<async::task<http::body_source>()> open, push_options o) {
    const auto plan = plan_for(ref, cat("pushing ", blob.digest.str(), " to ", ref.familiar_name()), true, blob.digest.str());
    auto outcome = push_outcome::uploaded;
    const auto look = [&](host_state& h, socket_pool::lease& slot) -> async::task<void> {
        outcome = push_outcome::uploaded;
        if (co_await is_there(r, h, slot, ref, blob, push_scope(ref), o.call)) {
            outcome = push_outcome::existed;
            co_return;
        }
        for (const auto& from : mount_sources(*r, ref, blob.digest, o.mount_from)) {
            if (co_await mount(r, h, slot, ref, blob, from, o.call)) {
                outcome = push_outcome::mounted;
                co_return;
            }
        }
    };
    co_await try_hosts(*r, plan, o.call, look);
    if (outcome != push_outcome::uploaded) co_return outcome;
    auto bytes = co_await open();  // no slot is held here
    if (bytes.length != blob.size) throw error{errc::corrupt, cat(plan.doing, ": ", blob.size, " bytes were declared, ", bytes.length, " are there")};
    const auto source = reporting(std::move(bytes), o.call.progress);
    const auto send = [&](host_state& h, socket_pool::lease& slot) { return upload(r, h, slot, ref, blob, source, o.call); };
    co_await try_hosts(*r, plan, o.call, send);
    co_return outcome;
}

async::task<digest> do_push_manifest(std::shared_ptr<registry_state> r, oci::reference ref, std::string media_type, std::string bytes,
                                     call_options call) {
    const auto id = digest::of(bytes);
    if (ref.digest() && *ref.digest() != id) throw error{errc::invalid, cat("pushing ", ref.familiar(), ": the manifest's digest is ", id.str())};
    const auto body = http::memory_body(std::move(bytes));
    const auto name = ref.tag().empty() ? id.str() : ref.tag();
    const auto op = [&](host_state& h, socket_pool::lease& slot) -> async::task<void> {
        ask q{.method = "PUT", .path = cat('/', ref.path(), "/manifests/", name), .scopes = {push_scope(ref)}, .body = body, .digest = id.str()};
        q.headers.set("Content-Type", media_type);
        auto a = co_await perform(*r, h, slot, std::move(q), call);
        if (!a.head.ok()) co_await refuse(*r, h, a, "to the manifest");
        co_await a.from->discard();
        const auto stored = digest::try_parse(a.head.headers.get("docker-content-digest").value_or(""));
        if (stored && *stored != id)
            throw host_error{error{errc::corrupt, cat(h.name(), " stored the manifest as ", stored->str(), ", not as ", id.str())}};
    };
    co_await try_hosts(*r, plan_for(ref, cat("pushing ", ref.familiar()), false, id.str()), call, op);
    co_return id;
}

}  // namespace cobuild::registry

module;
#include <charconv>
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

/// The bytes from `offset` on.
http::body_source rest_of(const http::body_source& all, std::uint64_t offset) {
    return {.length = all.length - offset, .read = [read = all.read, offset](std::uint64_t at, std::size_t max) { return read(offset + at, max); }};
}

/// One blob on its way up, over as many attempts as it takes.
struct upload {
    std::shared_ptr<registry_state> r;
    oci::reference ref;
    oci::descriptor blob;
    http::body_source bytes;
    call_options call;
    std::optional<http::url> session = std::nullopt;  ///< of an attempt that broke: the server may have its bytes
    std::uint64_t had = 0;                            ///< at the last look

    async::task<void> attempt(host_state& h, socket_pool::lease& slot) {
        const auto have = session ? co_await ask_how_far(h, slot) : 0;
        const bool further = have > std::exchange(had, have);
        std::exception_ptr broken;
        try {
            if (have > 0) {
                if (have < blob.size) co_await patch(h, slot, have);
                co_await put(h, slot, http::memory_body({}));
            } else if (co_await begin(h, slot)) {
                co_await put(h, slot, bytes);
            }
        } catch (const host_error&) {
            session.reset();
            throw;
        } catch (const error& e) {
            if (e.kind() != errc::unavailable && e.kind() != errc::timed_out) throw;
            broken = std::current_exception();
        }
        if (!broken) co_return;
        host_error e{describe(broken)};
        const auto* c = slot.current();
        e.reached = c == nullptr || c->reached();
        e.progress = further;
        throw host_error{std::move(e)};
    }

    ask step(std::string method) const {
        return {.method = std::move(method), .scopes = {push_scope(ref)}, .absolute = session, .digest = blob.digest.str()};
    }

    void follow(const host_state& h, const answer& a) {
        const auto location = a.head.headers.get("location");
        if (!location) throw host_error{error{errc::corrupt, cat(h.name(), " began an upload and did not say where (no Location)")}};
        session = a.asked.resolve(*location);
    }

    /// False when the registry needs no bytes after all.
    async::task<bool> begin(host_state& h, socket_pool::lease& slot) {
        auto q = step("POST");
        q.path = cat('/', ref.path(), "/blobs/uploads/");
        auto a = co_await perform(*r, h, slot, std::move(q), call);
        if (a.head.status == 201) co_return false;
        if (a.head.status != 202) co_await refuse(*r, h, a, "to the start of an upload");
        follow(h, a);
        co_await a.from->discard();
        co_return true;
    }

    /// The bytes of the broken attempt that the server has; 0, and no session, when it is to begin anew.
    async::task<std::uint64_t> ask_how_far(host_state& h, socket_pool::lease& slot) {
        auto a = co_await perform(*r, h, slot, step("GET"), call);
        co_await a.from->discard();
        std::uint64_t last = 0;
        auto range = a.head.headers.get("range").value_or("");
        if (range.starts_with("bytes=")) range.remove_prefix(6);
        const auto text = range.starts_with("0-") ? range.substr(2) : std::string_view();
        const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), last);
        const bool told = ec == std::errc{} && end == text.data() + text.size();
        // "0-0" is also how nothing is told.
        if (!a.head.ok() || !told || last == 0 || last >= blob.size) {
            session.reset();
            co_return 0;
        }
        if (a.head.headers.get("location")) follow(h, a);
        co_return last + 1;
    }

    async::task<void> patch(host_state& h, socket_pool::lease& slot, std::uint64_t have) {
        auto q = step("PATCH");
        q.headers.set("Content-Type", oci::media::octet_stream);
        q.headers.set("Content-Range", cat(have, '-', blob.size - 1));
        q.body = rest_of(bytes, have);
        auto a = co_await perform(*r, h, slot, std::move(q), call);
        if (!a.head.ok()) co_await refuse(*r, h, a, cat("to the rest of ", blob.digest.str(), " from byte ", have));
        if (a.head.headers.get("location")) follow(h, a);
        co_await a.from->discard();
    }

    async::task<void> put(host_state& h, socket_pool::lease& slot, http::body_source body) {
        auto q = step("PUT");
        auto& target = q.absolute->target;
        target.append(target.find('?') == std::string::npos ? "?" : "&").append("digest=").append(http::percent_encode(blob.digest.str()));
        q.headers.set("Content-Type", oci::media::octet_stream);
        q.body = std::move(body);
        auto a = co_await perform(*r, h, slot, std::move(q), call);
        if (!a.head.ok()) co_await refuse(*r, h, a, cat("to the upload of ", blob.digest.str(), " (", blob.size, " bytes)"));
        co_await a.from->discard();
    }
};

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
    upload u{.r = r, .ref = ref, .blob = blob, .bytes = reporting(std::move(bytes), o.call.progress), .call = o.call};
    co_await try_hosts(*r, plan, o.call, [&u](host_state& h, socket_pool::lease& slot) { return u.attempt(h, slot); });
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

module;
#include <algorithm>
#include <chrono>
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

constexpr std::size_t max_manifest = std::size_t{4} << 20;
constexpr std::size_t max_small = std::size_t{16} << 20;
constexpr std::string_view accept_manifests =
    "application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json, "
    "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, */*";

std::string media_type_of(const http::response& a) {
    const auto text = a.headers.get("content-type").value_or("");
    return to_lower(trim(text.substr(0, text.find(';'))));
}

ask manifest_ask(const oci::reference& ref, std::string method, std::string_view what) {
    ask a{.method = std::move(method), .path = cat('/', ref.path(), "/manifests/", what), .scopes = {pull_scope(ref)}};
    a.headers.set("Accept", accept_manifests);
    return a;
}

void refuse_schema1(const oci::reference& ref, std::string_view type) {
    if (type == "application/vnd.docker.distribution.manifest.v1+prettyjws" || type == "application/vnd.docker.distribution.manifest.v1+json" ||
        type == "text/plain")
        throw error{errc::unsupported,
                    cat(ref.familiar(), " is a manifest of schema 1, which was given up by registries: push the image anew with a current tool")};
}

/// What a HEAD must tell for us to need no GET.
std::optional<oci::descriptor> from_head(const http::response& a) {
    const auto d = digest::try_parse(a.headers.get("docker-content-digest").value_or(""));
    if (!d || !a.content_length || media_type_of(a).empty()) return std::nullopt;
    const auto type = media_type_of(a);
    if (!oci::is_manifest(type) && !oci::is_index(type)) return std::nullopt;
    return oci::descriptor{.media_type = type, .digest = *d, .size = *a.content_length};
}

std::string type_of_body(const http::response& a, std::string_view body) {
    const auto type = media_type_of(a);
    if (oci::is_manifest(type) || oci::is_index(type)) return type;
    return oci::sniff_media_type(body);
}

/// HEAD where it says enough, else GET and hash.
async::task<void> resolve_on(std::shared_ptr<registry_state> r, host_state& h, socket_pool::lease& slot, oci::reference ref, call_options call,
                             resolved* out) {
    auto a = co_await perform(*r, h, slot, manifest_ask(ref, "HEAD", ref.tag()), call);
    if (a.head.ok()) {
        refuse_schema1(ref, media_type_of(a.head));
        if (auto d = from_head(a.head)) {
            *out = {std::move(*d), h.name()};
            co_return;
        }
    } else if (a.head.status != 405 && a.head.status != 400 && a.head.status != 501) {
        co_await refuse(*r, h, a, {});
    }
    a.far.reset();
    auto g = co_await perform(*r, h, slot, manifest_ask(ref, "GET", ref.tag()), call);
    if (!g.head.ok()) co_await refuse(*r, h, g, {});
    refuse_schema1(ref, media_type_of(g.head));
    const auto body = co_await g.from->read_all(max_manifest);
    auto type = type_of_body(g.head, body);
    if (type.empty())
        throw host_error{error{errc::corrupt, cat(h.name(), " answered with something that is no manifest (", quoted(media_type_of(g.head)), ')')}};
    const auto real = digest::of(body);
    if (const auto claimed = digest::try_parse(g.head.headers.get("docker-content-digest").value_or("")); claimed && *claimed != real)
        throw host_error{error{errc::corrupt, cat(h.name(), " sent a manifest of digest ", real.str(), " and called it ", claimed->str())}};
    *out = {oci::descriptor{.media_type = std::move(type), .digest = real, .size = body.size()}, h.name()};
}

void check_content(const host_state& h, const oci::descriptor& target, std::string_view body, std::string_view what) {
    if (target.size != 0 && body.size() != target.size)
        throw host_error{error{errc::corrupt, cat(what, ' ', target.digest.str(), " from ", h.name(), ": ", target.size, " bytes were declared, ",
                                                  body.size(), " came")}};
    if (const auto real = digest::of(body); real != target.digest)
        throw host_error{error{errc::corrupt, cat(what, ' ', target.digest.str(), " from ", h.name(), " has other bytes, of digest ", real.str())}};
}

attempt_plan plan_for(const oci::reference& ref, std::string doing, const oci::descriptor& d, bool transfer = false) {
    return {.doing = std::move(doing),
            .repository = ref.path(),
            .transfer = transfer,
            .by_digest = true,
            .digest = d.digest.str(),
            .media_type = d.media_type,
            .size = d.size};
}

}  // namespace

async::task<resolved> do_resolve(std::shared_ptr<registry_state> r, oci::reference ref, call_options call) {
    resolved out;
    auto* slot_for_result = &out;
    const auto op = [&r, &ref, &call, slot_for_result](host_state& h, socket_pool::lease& slot) {
        return resolve_on(r, h, slot, ref, call, slot_for_result);
    };
    co_await try_hosts(*r, {.doing = cat("resolving ", ref.familiar()), .repository = ref.path()}, call, op);
    co_return out;
}

async::task<manifest_content> do_fetch_manifest(std::shared_ptr<registry_state> r, oci::reference ref, oci::descriptor target, call_options call) {
    manifest_content out;
    const auto op = [&](host_state& h, socket_pool::lease& slot) -> async::task<void> {
        auto q = manifest_ask(ref, "GET", target.digest.str());
        if (!target.media_type.empty()) q.headers.set("Accept", cat(target.media_type, ", */*"));
        q.digest = target.digest.str();
        auto a = co_await perform(*r, h, slot, std::move(q), call);
        if (!a.head.ok()) co_await refuse(*r, h, a, {});
        if (media_type_of(a.head) != "text/plain") refuse_schema1(ref, media_type_of(a.head));  // some servers call every document so
        refuse_encoding(a, cat("manifest ", target.digest.str(), " from ", h.name()));
        out.bytes = co_await a.from->read_all(max_manifest);
        check_content(h, target, out.bytes, "manifest");
        out.media_type = !target.media_type.empty() ? target.media_type : type_of_body(a.head, out.bytes);
        out.host = h.name();
    };
    co_await try_hosts(*r, plan_for(ref, cat("fetching the manifest of ", ref.familiar()), target), call, op);
    if (out.media_type.empty()) throw error{errc::corrupt, cat(target.digest.str(), " of ", ref.familiar(), " is neither a manifest nor an index")};
    out.target = std::move(target);
    out.target.media_type = out.media_type;
    out.target.size = out.bytes.size();
    co_return out;
}

async::task<std::string> do_fetch_small(std::shared_ptr<registry_state> r, oci::reference ref, oci::descriptor target, call_options call) {
    std::string out;
    const auto op = [&](host_state& h, socket_pool::lease& slot) -> async::task<void> {
        ask q{.path = cat('/', ref.path(), "/blobs/", target.digest.str()), .scopes = {pull_scope(ref)}, .digest = target.digest.str()};
        q.headers.set("Accept", cat(target.media_type.empty() ? "application/octet-stream" : target.media_type, ", */*"));
        auto a = co_await perform(*r, h, slot, std::move(q), call);
        if (!a.head.ok()) co_await refuse(*r, h, a, {});
        refuse_encoding(a, cat("blob ", target.digest.str(), " from ", h.name()));
        out = co_await a.from->read_all(max_small);
        check_content(h, target, out, "blob");
    };
    co_await try_hosts(*r, plan_for(ref, cat("fetching ", target.digest.str(), " of ", ref.familiar()), target), call, op);
    co_return out;
}

}  // namespace cobuild::registry

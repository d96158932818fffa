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

import cobuild.json;
import :internal;

namespace cobuild::registry {

namespace {

constexpr std::size_t max_tags = 100'000;
constexpr std::size_t max_page = std::size_t{8} << 20;
constexpr unsigned max_pages = 1000;

std::string trust_text(const host_state& h) {
    if (!h.endpoint.tls) return "none: plain http";
    const auto& s = h.settings;
    if (s.insecure) return "not verified (insecure = true)";
    std::string out = "the system's authorities";
    for (const auto& file : s.ca) out.append(", ").append(file);
    for (const auto& dir : s.tls_dirs) out.append(", ").append(dir).append("/*.crt");
    return out;
}

async::task<void> ask_about(std::shared_ptr<registry_state> r, host_state& h, socket_pool::lease& slot, oci::reference ref, call_options call,
                            host_report* out) {
    auto a = co_await perform(*r, h, slot, {.path = "/", .scopes = {pull_scope(ref)}}, call);
    out->api = a.head.status_text();
    out->login = a.login;
    co_await a.from->discard();
    a.far.reset();
    const auto what = ref.digest() ? ref.digest()->str() : ref.tag();
    ask q{.method = "HEAD", .path = cat('/', ref.path(), "/manifests/", what), .scopes = {pull_scope(ref)}};
    q.headers.set("Accept", cat(oci::media::docker_manifest, ", ", oci::media::docker_list, ", ", oci::media::oci_manifest, ", ",
                                oci::media::oci_index, ", */*"));
    auto m = co_await perform(*r, h, slot, std::move(q), call);
    out->manifest = m.head.status_text();
    out->login = m.login;
    if (m.head.ok()) out->digest = std::string(m.head.headers.get("docker-content-digest").value_or(""));
}

async::task<host_report> check_one(std::shared_ptr<registry_state> r, host_state& h, oci::reference ref, call_options call) {
    host_report out{.host = h.name(), .section = h.settings.section, .configured = h.settings.configured, .mirror = h.settings.mirror};
    auto slot = co_await r->pool->acquire(false);
    if (log_enabled(log_level::debug)) slot.trace = random_id();
    const auto start = clock::now();
    std::exception_ptr failed;
    try {
        co_await ask_about(r, h, slot, ref, call, &out);
    } catch (...) {
        failed = std::current_exception();
    }
    out.took = clock::now() - start;
    out.url = cat(h.endpoint.origin(), h.settings.path_prefix);
    out.trust = trust_text(h);
    if (const auto* c = slot.current()) {
        out.address = c->peer();
        out.certificates = c->certificates();
    }
    if (failed) {
        const auto e = describe(failed);
        if (e.kind() == errc::canceled) std::rethrow_exception(failed);
        out.failure = e.what();
    }
    co_return out;
}

// The target of `<...>; rel="next"` (RFC 8288).
std::optional<std::string> next_page(const http::response& a) {
    const auto text = a.headers.get("link").value_or("");
    const auto from = text.find('<');
    const auto to = text.find('>', from == std::string_view::npos ? 0 : from);
    if (from == std::string_view::npos || to == std::string_view::npos) return std::nullopt;
    const auto rest = to_lower(text.substr(to));
    if (rest.find("rel=\"next\"") == std::string::npos && rest.find("rel=next") == std::string::npos) return std::nullopt;
    return std::string(text.substr(from + 1, to - from - 1));
}

async::task<void> list_on(std::shared_ptr<registry_state> r, host_state& h, socket_pool::lease& slot, oci::reference ref, call_options call,
                          std::set<std::string>* out) {
    out->clear();
    ask q{.path = cat('/', ref.path(), "/tags/list"), .query = {{"n", "1000"}}, .scopes = {pull_scope(ref)}};
    for (unsigned page = 0; page < max_pages && out->size() <= max_tags; ++page) {
        auto a = co_await perform(*r, h, slot, q, call);
        if (!a.head.ok()) co_await refuse(*r, h, a, {});
        const auto text = co_await a.from->read_all(max_page);
        try {
            const auto v = json::parse(text);
            for (auto& tag : json::strings_at(v.as_object(), "tags")) out->insert(std::move(tag));
        } catch (error& e) {
            throw host_error{std::move(e).with(cat("the list of tags of ", h.name()))};
        }
        const auto next = next_page(a.head);
        if (!next) co_return;
        auto url = a.asked.resolve(*next);
        if (url.server != a.asked.server) throw host_error{error{errc::corrupt, cat(h.name(), " continues its list of tags at another server")}};
        q.absolute = std::move(url);
    }
    throw host_error{error{errc::corrupt, cat(h.name(), " lists more tags than the ", max_tags, " allowed here")}};
}

}  // namespace

async::task<std::vector<host_report>> do_check(std::shared_ptr<registry_state> r, oci::reference ref, call_options call) {
    ref = ref.with_default_tag();
    std::vector<host_report> out;
    for (const auto& h : r->hosts) out.push_back(co_await check_one(r, *h, ref, call));
    co_return out;
}

async::task<void> do_ping(std::shared_ptr<registry_state> r, call_options call) {
    const auto op = [&](host_state& h, socket_pool::lease& slot) -> async::task<void> {
        auto a = co_await perform(*r, h, slot, {.path = "/"}, call);
        if (!a.head.ok()) co_await refuse(*r, h, a, {});
        co_await a.from->discard();
    };
    co_await try_hosts(*r, {.doing = cat("logging in to ", r->domain), .push = true}, call, op);
}

async::task<std::vector<std::string>> do_tags(std::shared_ptr<registry_state> r, oci::reference ref, call_options call) {
    std::set<std::string> all;
    const auto op = [&](host_state& h, socket_pool::lease& slot) { return list_on(r, h, slot, ref, call, &all); };
    co_await try_hosts(*r, {.doing = cat("listing the tags of ", ref.familiar_name()), .repository = ref.path()}, call, op);
    co_return std::vector<std::string>(all.begin(), all.end());
}

}  // namespace cobuild::registry

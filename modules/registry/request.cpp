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

constexpr unsigned max_redirects = 10;
constexpr std::size_t max_error_body = std::size_t{64} << 10;

http::tls_options trust_of(const host_settings& s, bool with_keys) {
    http::tls_options out{.ca = s.ca, .dirs = s.tls_dirs, .insecure = s.insecure};
    if (with_keys) out.key_pairs = s.key_pairs;
    return out;
}

http::connection_options connection_options(const registry_state& r, const host_state& h, const http::endpoint& e) {
    return {.tls = e == h.endpoint ? *h.tls : *h.far_tls, .timeouts = r.opts->timeouts, .proxy = r.opts->proxy, .trust_hint = h.settings.section};
}

bool is_redirect(unsigned status, const std::string& method) {
    if (status == 307 || status == 308) return true;
    return (status == 301 || status == 302 || status == 303) && (method == "GET" || method == "HEAD");
}

// Preferred: bearer, then basic; other schemes are not spoken.
std::optional<challenge> choose(const http::response& a) {
    std::optional<challenge> basic;
    for (const auto header : a.headers.all("www-authenticate")) {
        for (auto& c : parse_challenges(header)) {
            if (c.scheme == "bearer" && !c.get("realm").empty()) return std::move(c);
            if (c.scheme == "basic") basic = std::move(c);
        }
    }
    return basic;
}

http::url url_of(const host_state& h, const registry_state& r, const ask& what) {
    if (what.absolute) return *what.absolute;
    std::string target = cat(h.settings.path_prefix, what.path);
    char separator = '?';
    const auto add = [&](std::string_view key, std::string_view value) {
        target.append(cat(std::exchange(separator, '&'), key, '=', http::percent_encode(value)));
    };
    for (const auto& [k, v] : what.query) add(k, v);
    if (h.settings.mirror) add("ns", r.domain);
    return {.server = h.endpoint, .target = std::move(target)};
}

/// Sends to the host itself, deciding between https and http where both are allowed.
async::task<http::response> send_deciding(registry_state& r, host_state& h, socket_pool::lease& slot, http::request q) {
    std::exception_ptr failed;
    auto& first = slot.at(h.endpoint, connection_options(r, h, h.endpoint));
    try {
        auto out = co_await first.send(q);
        h.https_tried = true;
        co_return out;
    } catch (const error&) {
        failed = std::current_exception();
    }
    const bool undecided = h.settings.try_https_first && h.endpoint.tls && !h.https_tried;
    const bool fall_back = undecided && (first.peer_is_not_tls() || !first.reached() || describe(failed).kind() == errc::timed_out);
    if (!fall_back) std::rethrow_exception(failed);
    h.https_tried = true;
    h.endpoint = http::parse_endpoint(h.settings.host, false);
    co_return co_await slot.at(h.endpoint, connection_options(r, h, h.endpoint)).send(std::move(q));
}

}  // namespace

async::task<void> prepare(registry_state& r, host_state& h) {
    const auto& own = h.settings;
    const bool has_files = !own.ca.empty() || !own.tls_dirs.empty() || !own.key_pairs.empty();
    if (h.tls && !has_files) co_return;
    if (!has_files && !own.insecure && !h.endpoint.tls) {
        h.tls.emplace();
        h.far_tls.emplace();
        co_return;
    }
    // Two tasks may both load; the results are the same.
    struct {
        http::tls_context near, far;
        std::string files;
        bool changed = false;
    } got;
    const auto load = [settings = own, known = h.tls ? std::optional(h.files) : std::nullopt, &got] {
        got.files = http::file_state(trust_of(settings, true));
        if (known && *known == got.files) return;
        got.changed = true;
        got.near = http::tls_context::load(trust_of(settings, true));
        got.far = settings.key_pairs.empty() && settings.tls_dirs.empty() ? got.near : http::tls_context::load(trust_of(settings, false));
    };
    std::optional<error> failed;
    try {
        if (r.opts->pool != nullptr) {
            co_await r.opts->pool->run(load);
        } else {
            load();
        }
    } catch (const error& e) {
        failed = e;
    }
    const bool again = h.tls.has_value();
    if (failed && (!again || failed->kind() == errc::canceled)) throw std::move(*failed).with(own.section.empty() ? h.name() : own.section);
    if (!got.changed) co_return;
    h.files = std::move(got.files);
    if (failed) {
        // Half written, perhaps: a key comes after its certificate. What was good a moment ago serves until the next change.
        log(log_level::warning, "certificates changed and cannot be used; the old ones serve on", {{"host", h.name()}, {"error", failed->what()}});
        co_return;
    }
    h.tls = got.near;
    h.far_tls = got.far;
    if (!again) co_return;
    log(log_level::info, "certificates changed and were read again", {{"host", h.name()}});
    r.pool->close_idle();
    for (const auto& [origin, pool] : r.far_pools) pool->close_idle();
}

async::task<answer> perform(registry_state& r, host_state& h, socket_pool::lease& slot, ask what, call_options call) {
    co_await prepare(r, h);
    const auto& who = who_asks(r, call);
    auto proof = co_await authorize(r, h, slot, what.scopes, who, {});
    answer out;
    out.login = proof.login;
    out.asked = url_of(h, r, what);
    bool challenged = false;
    for (unsigned hops = 0;;) {
        const bool at_host = out.asked.server == h.endpoint;
        http::request q{.method = what.method, .target = out.asked.target, .headers = what.headers, .body = what.body};
        q.headers.set("User-Agent", r.opts->user_agent);
        if (at_host && !proof.header.empty()) q.headers.set("Authorization", proof.header);
        const auto ids = next_span(slot.trace);
        log_request(out.asked, q, what.digest, ids);
        if (at_host) {
            out.far.reset();
            out.head = co_await send_deciding(r, h, slot, std::move(q));
            out.asked.server = h.endpoint;
            out.from = slot.current();
        } else if (r.owns(out.asked.server)) {
            out.far.reset();
            out.from = &slot.at(out.asked.server, connection_options(r, h, out.asked.server));
            out.head = co_await out.from->send(std::move(q));
        } else {
            out.far.reset();  // nobody waits for one far slot while holding another
            out.far.emplace(co_await r.far_pool(out.asked.server.origin())->acquire(true));
            out.from = &out.far->at(out.asked.server, connection_options(r, h, out.asked.server));
            out.head = co_await out.from->send(std::move(q));
        }
        log_response(out.asked, out.head, what.digest, ids);
        if (out.head.status == 401 && at_host && !challenged && !what.challenged_once) {
            challenged = true;
            auto wants = choose(out.head);
            if (!wants) co_return out;
            // What the challenge says of scopes is about this request; the rest holds for the host.
            const auto demanded = wants->get("scope");
            for (const auto word : split(demanded, ' '))
                if (!word.empty()) what.scopes.emplace_back(word);
            std::erase_if(wants->parameters, [](const auto& p) { return p.first == "scope"; });
            h.wants = std::move(wants);
            co_await out.from->discard();
            auto next = co_await authorize(r, h, slot, what.scopes, who, proof.header);
            if (next.header.empty() || (next.header == proof.header && next.login.empty()))
                throw host_error{error{errc::unauthorized, cat(h.name(), " answered 401 Unauthorized and there is no login for it")}, 401};
            if (next.header == proof.header)
                throw host_error{error{errc::unauthorized, cat(h.name(), " answered 401 Unauthorized: it refused ", next.login)}, 401};
            proof = std::move(next);
            out.login = proof.login;
            continue;
        }
        const auto location = out.head.headers.get("location");
        if (!is_redirect(out.head.status, what.method) || !location) co_return out;
        if (++hops > max_redirects) throw host_error{error{errc::corrupt, cat(h.name(), " redirects more than ", max_redirects, " times")}};
        auto target = out.asked.resolve(*location);
        co_await out.from->discard();
        // Never back to the host with its login after another origin has had a say.
        if (target.server != out.asked.server) proof.header.clear();
        out.asked = std::move(target);
    }
}

async::task<void> refuse(registry_state& r, host_state& h, answer& a, std::string doing) {
    std::string detail;
    try {
        const auto body = co_await a.from->read_all(max_error_body);
        if (a.head.status == 400 && !a.asked.server.tls && body.find("HTTP request to an HTTPS server") != std::string::npos)
            detail = cat("it speaks TLS", h.settings.section.empty() ? "" : cat("; set http = false in ", h.settings.section));
        const auto v = json::parse(body);
        if (const auto* list = v.find("errors"); list != nullptr && list->is_array() && !list->as_array().empty()) {
            const auto& first = list->as_array().front();
            for (const auto* key : {"code", "message"})
                if (const auto* text = first.find(key); text != nullptr && text->is_string() && !text->as_string().empty())
                    detail.append(detail.empty() ? "" : ": ").append(text->as_string().substr(0, 300));
        }
    } catch (const error&) {
        // Whatever the body was, the status is what counts.
    }
    for (auto& c : detail)
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
    const auto status = a.head.status;
    const auto kind = status == 401 || status == 403                    ? errc::unauthorized
                      : status == 404                                   ? errc::not_found
                      : status >= 500 || status == 429 || status == 408 ? errc::unavailable
                                                                        : errc::invalid;
    if (kind == errc::unauthorized) doing.append(a.login.empty() ? "; there is no login for it" : cat("; ", a.login, " was tried"));
    const auto who = a.far ? cat(h.name(), " (sent on to ", a.asked.server.authority(), ')') : h.name();
    host_error e{error{kind, cat(who, " answered ", a.head.status_text(), detail.empty() ? "" : cat(" (", detail, ')'),
                                 doing.empty() || doing.starts_with(';') ? doing : cat(' ', doing))},
                 status};
    e.rest = status >= 500;
    if (const auto after = a.head.headers.get("retry-after")) e.retry_after = parse_retry_after(*after);
    (void)r;
    throw host_error{std::move(e)};
}

void refuse_encoding(const answer& a, std::string_view what) {
    const auto coding = to_lower(trim(a.head.headers.get("content-encoding").value_or("")));
    if (coding.empty() || coding == "identity") return;
    throw host_error{error{errc::corrupt, cat(what, " comes with Content-Encoding ", quoted(coding), ", which nobody asked for")}};
}

}  // namespace cobuild::registry

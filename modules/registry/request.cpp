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

// The query goes into no log: redirect targets carry signatures there.
std::string without_query(const http::url& u) {
    const auto text = u.str();
    return text.substr(0, text.find('?'));
}

bool secret(std::string_view name) {
    const auto n = to_lower(name);
    return n == "authorization" || n == "www-authenticate" || n == "set-cookie" || n == "location" || n == "cookie";
}

void log_request(const http::url& u, const http::request& q, const ask& what) {
    if (!log_enabled(log_level::debug)) return;
    log(log_level::debug, "do request",
        {{"digest", what.digest},
         {"host", u.server.authority()},
         {"request.header.accept", std::string(q.headers.get("accept").value_or(""))},
         {"request.header.user-agent", std::string(q.headers.get("user-agent").value_or(""))},
         {"request.method", q.method},
         {"url", without_query(u)}});
}

void log_response(const http::url& u, const http::response& a, const ask& what) {
    if (!log_enabled(log_level::debug)) return;
    std::vector<std::pair<std::string, std::string>> names;
    for (const auto& h : a.headers)
        if (!secret(h.name)) names.emplace_back(cat("response.header.", to_lower(h.name)), h.value);
    std::vector<log_field> fields{
        {"digest", what.digest}, {"host", u.server.authority()}, {"response.status", a.status_text()}, {"url", without_query(u)}};
    for (auto& [name, value] : names) fields.push_back({name, value});
    log(log_level::debug, "fetch response received", fields);
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
    if (h.tls) co_return;
    // Two tasks may both load; the results are the same.
    http::tls_context near;
    http::tls_context far;
    const auto& own = h.settings;
    if (own.ca.empty() && own.tls_dirs.empty() && own.key_pairs.empty() && !own.insecure && !h.endpoint.tls) {
        h.tls = near;
        h.far_tls = far;
        co_return;
    }
    const auto load = [settings = h.settings, &near, &far] {
        near = http::tls_context::load(trust_of(settings, true));
        far = settings.key_pairs.empty() ? near : http::tls_context::load(trust_of(settings, false));
    };
    try {
        if (r.opts->pool != nullptr) {
            co_await r.opts->pool->run(load);
        } else {
            load();
        }
    } catch (error& e) {
        throw std::move(e).with(h.settings.section.empty() ? h.name() : h.settings.section);
    }
    h.tls = near;
    h.far_tls = far;
}

async::task<answer> perform(registry_state& r, host_state& h, socket_pool::lease& slot, ask what, call_options call) {
    co_await prepare(r, h);
    const auto& who = who_asks(r, call);
    auto authorization = co_await authorize(r, h, slot, what.scopes, who, {});
    answer out;
    out.asked = url_of(h, r, what);
    bool challenged = false;
    for (unsigned hops = 0;;) {
        const bool at_host = out.asked.server == h.endpoint;
        http::request q{.method = what.method, .target = out.asked.target, .headers = what.headers, .body = what.body};
        q.headers.set("User-Agent", r.opts->user_agent);
        if (at_host && !authorization.empty()) q.headers.set("Authorization", authorization);
        log_request(out.asked, q, what);
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
        log_response(out.asked, out.head, what);
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
            auto next = co_await authorize(r, h, slot, what.scopes, who, authorization);
            if (next.empty())
                throw host_error{error{errc::unauthorized, cat(h.name(), " answered 401 Unauthorized and there is no login for it")}, 401};
            if (next == authorization)
                throw host_error{error{errc::unauthorized, cat(h.name(), " answered 401 Unauthorized: it refused the login")}, 401};
            authorization = std::move(next);
            continue;
        }
        const auto location = out.head.headers.get("location");
        if (!is_redirect(out.head.status, what.method) || !location) co_return out;
        if (++hops > max_redirects) throw host_error{error{errc::corrupt, cat(h.name(), " redirects more than ", max_redirects, " times")}};
        auto target = out.asked.resolve(*location);
        co_await out.from->discard();
        // Never back to the host with its login after another origin has had a say.
        if (target.server != out.asked.server) authorization.clear();
        out.asked = std::move(target);
    }
}

async::task<void> refuse(registry_state& r, host_state& h, answer& a, std::string doing) {
    std::string detail;
    try {
        const auto body = co_await a.from->read_all(max_error_body);
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
    const auto who = a.far ? cat(h.name(), " (sent on to ", a.asked.server.authority(), ')') : h.name();
    host_error e{
        error{kind, cat(who, " answered ", a.head.status_text(), detail.empty() ? "" : cat(" (", detail, ')'), doing.empty() ? "" : cat(' ', doing))},
        status};
    e.rest = status >= 500;
    if (const auto after = a.head.headers.get("retry-after")) e.retry_after = parse_retry_after(*after);
    (void)r;
    throw host_error{std::move(e)};
}

}  // namespace cobuild::registry

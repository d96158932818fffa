module;
#include <algorithm>
#include <chrono>
#include <cstdint>
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

constexpr std::size_t max_token_answer = std::size_t{1} << 20;
constexpr std::string_view client_id = "cobuild";
constexpr auto basic_life = std::chrono::minutes(5);

std::string joined(const std::vector<std::string>& words) {
    std::string out;
    for (const auto& w : words) out.append(out.empty() ? "" : " ").append(w);
    return out;
}

std::vector<std::string> each_once(std::vector<std::string> asked) {
    std::sort(asked.begin(), asked.end());
    asked.erase(std::unique(asked.begin(), asked.end()), asked.end());
    return asked;
}

std::string form(const std::vector<std::pair<std::string, std::string>>& fields) {
    std::string out;
    for (const auto& [k, v] : fields) out.append(out.empty() ? "" : "&").append(k).append("=").append(http::percent_encode(v));
    return out;
}

token read_token(std::string_view body, const std::string& server) {
    try {
        const auto v = json::parse(body);
        const auto& o = v.as_object();
        auto value = json::optional_string(o, "access_token").value_or("");
        if (value.empty()) value = json::optional_string(o, "token").value_or("");
        if (value.empty()) throw error{errc::corrupt, "no token in it"};
        if (value.find_first_of("\r\n") != std::string::npos) throw error{errc::corrupt, "the token has line breaks"};
        const auto life = std::clamp<std::int64_t>(json::optional_int(o, "expires_in").value_or(60), 1, 86400);
        return {cat("Bearer ", value), clock::now() + std::chrono::milliseconds(life * 900)};
    } catch (error& e) {
        throw std::move(e).with(cat("the answer of the token server ", server));
    }
}

std::string describe_login(const credential& c) {
    return cat(!c.username.empty()         ? cat("the login of ", quoted(c.username))
               : !c.registry_token.empty() ? std::string("the registry token")
                                           : std::string("the identity token"),
               c.origin.empty() ? "" : cat(" from ", c.origin));
}

struct token_call {
    registry_state& r;
    host_state& h;
    socket_pool::lease& slot;
    http::url realm;
};

struct token_reply {
    http::response head;
    std::string body;
};

async::task<token_reply> ask_token_server(token_call c, http::request q) {
    const auto& server = c.realm.server;
    std::optional<socket_pool::lease> far;
    http::connection_options options{.timeouts = c.r.opts->timeouts, .proxy = c.r.opts->proxy, .trust_hint = c.h.settings.section};
    http::connection* connection = nullptr;
    if (server == c.h.endpoint) {
        options.tls = *c.h.tls;
        connection = &c.slot.at(server, options);
    } else {
        options.tls = *c.h.far_tls;
        far.emplace(co_await c.r.far_pool(server.origin())->acquire(false));
        connection = &far->at(server, options);
    }
    q.headers.set("User-Agent", c.r.opts->user_agent);
    q.headers.set("Accept", "application/json");
    const http::url asked{.server = server, .target = q.target};
    const auto ids = next_span(c.slot.trace);
    log_request(asked, q, {}, ids);
    token_reply out;
    out.head = co_await connection->send(std::move(q));
    out.body = co_await connection->read_all(max_token_answer);
    log_response(asked, out.head, {}, ids);
    co_return out;
}

async::task<token> fetch_token(token_call c, std::string service, std::vector<std::string> scopes, std::optional<credential> account) {
    const auto origin = c.realm.server.host_port();
    const bool safe = c.realm.server.tls || !c.h.endpoint.tls || http::is_loopback(c.realm.server.host);
    if (account && !safe) throw error{errc::unauthorized, cat(c.h.name(), " sends logins to the token server ", origin, " over plain http: refused")};
    const bool refresh = account && account->username.empty();
    token_reply reply;
    if (!refresh) {
        std::vector<std::pair<std::string, std::string>> query;
        if (!service.empty()) query.emplace_back("service", service);
        for (const auto& s : scopes) query.emplace_back("scope", s);
        if (account) query.emplace_back("client_id", std::string(client_id));
        http::request q{.target = cat(c.realm.target, c.realm.target.find('?') == std::string::npos ? '?' : '&', form(query))};
        if (account) q.headers.set("Authorization", cat("Basic ", base64_encode(cat(account->username, ':', account->secret))));
        reply = co_await ask_token_server(c, std::move(q));
    }
    const auto status = reply.head.status;
    if (refresh || (account && (status == 401 || status == 404 || status == 405))) {
        std::vector<std::pair<std::string, std::string>> fields{{"grant_type", refresh ? "refresh_token" : "password"},
                                                                {"service", service},
                                                                {"client_id", std::string(client_id)},
                                                                {"scope", joined(scopes)}};
        if (refresh) {
            fields.emplace_back("refresh_token", account->secret);
        } else {
            fields.emplace_back("username", account->username);
            fields.emplace_back("password", account->secret);
        }
        http::request q{.method = "POST", .target = c.realm.target, .body = http::memory_body(form(fields))};
        q.headers.set("Content-Type", "application/x-www-form-urlencoded");
        reply = co_await ask_token_server(c, std::move(q));
    }
    if (!reply.head.ok()) {
        const bool login_refused = reply.head.status == 401 || reply.head.status == 403;
        throw host_error{error{login_refused ? errc::unauthorized : errc::unavailable,
                               cat("the token server ", origin, " of ", c.h.name(), " answered ", reply.head.status_text(),
                                   !login_refused ? ""
                                   : account      ? cat("; ", describe_login(*account), " was tried")
                                                  : "; there is no login for it")},
                         reply.head.status};
    }
    co_return read_token(reply.body, origin);
}

}  // namespace

const login& who_asks(const registry_state& r, const call_options& call) { return call.who ? *call.who : r.opts->who; }

async::task<authorization> authorize(registry_state& r, host_state& h, socket_pool::lease& slot, std::vector<std::string> scopes, const login& who,
                                     std::string rejected) {
    if (!h.wants) co_return authorization{};
    const auto wants = *h.wants;
    const bool basic = wants.scheme == "basic";
    scopes = each_once(std::move(scopes));
    const auto service = wants.get("service");
    const auto key = basic ? cat(who.identity, "\nbasic") : cat(who.identity, '\n', wants.get("realm"), '\n', service, '\n', joined(scopes));
    if (h.token_locks.size() > 1000) std::erase_if(h.token_locks, [](const auto& l) { return l.second.use_count() == 1; });
    auto& lock = h.token_locks[key];
    if (!lock) lock = std::make_shared<async::semaphore>(1);
    const auto guard = lock;
    const auto turn = co_await guard->acquire();
    // Another request may have renewed it while we waited.
    if (const auto found = h.tokens.find(key); found != h.tokens.end()) {
        if (found->second.expires > clock::now() && found->second.header != rejected)
            co_return authorization{found->second.header, found->second.login};
        h.tokens.erase(found);
    }
    std::optional<credential> account;
    if (who.credentials) account = co_await who.credentials(h.name());
    const auto login_text = account ? describe_login(*account) : std::string();
    token fresh;
    if (basic) {
        if (!account || account->username.empty()) co_return authorization{};
        // Kept for a while, so that a helper program is not started for every request; a 401 asks it anew.
        fresh = {cat("Basic ", base64_encode(cat(account->username, ':', account->secret))), clock::now() + basic_life};
    } else if (account && !account->registry_token.empty()) {
        co_return authorization{cat("Bearer ", account->registry_token), login_text};
    } else {
        fresh = co_await fetch_token({r, h, slot, http::url::parse(wants.get("realm"))}, service, scopes, std::move(account));
    }
    fresh.login = login_text;
    authorization out{fresh.header, fresh.login};
    if (h.tokens.size() > 1000) h.tokens.clear();
    h.tokens.insert_or_assign(key, std::move(fresh));
    co_return out;
}

}  // namespace cobuild::registry

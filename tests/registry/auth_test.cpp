#include "support/support.hpp"

#include "registry/fixture.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.http;
import cobuild.oci;
import cobuild.registry;

#include "support/failure.hpp"

using namespace cobuild;
using namespace cobuild::async;
using namespace std::chrono_literals;
using test::failure;
using test::fake_registry;
using test::fake_request;
using test::fake_response;
using test::says;

namespace {

const auto name = oci::reference::parse("registry.test/a:1");

registry::host_settings host_of(const fake_registry& r, bool mirror = false) { return {.host = r.host(), .plain_http = true, .mirror = mirror}; }

registry::options options_for(runtime& rt, std::vector<registry::host_settings> hosts, registry::credential_provider who = {}) {
    return {.executor = rt.get_executor(),
            .pool = &rt.pool(),
            .hosts = [hosts](std::string_view) { return hosts; },
            .who = {.credentials = std::move(who)},
            .retry = {.attempts = 2, .first_wait = 1ms, .longest_wait = 2ms}};
}

registry::credential_provider logins(std::map<std::string, registry::credential> all) {
    return [all](std::string host) -> task<std::optional<registry::credential>> {
        const auto found = all.find(host);
        co_return found != all.end() ? std::optional(found->second) : std::nullopt;
    };
}

std::string basic(std::string_view user, std::string_view password) { return cat("Basic ", base64_encode(cat(user, ':', password))); }

fake_registry::handler wants_basic(std::string header) {
    return [header](const fake_request& q) -> std::optional<fake_response> {
        const auto found = q.headers.find("authorization");
        if (found != q.headers.end() && found->second == header) return std::nullopt;
        return fake_response{.status = 401, .headers = {{"WWW-Authenticate", "Basic realm=\"x\""}}};
    };
}

/// A registry that wants bearer tokens of `server`; `valid` is the token it takes.
fake_registry::handler wants_bearer(const fake_registry& server, const std::string& valid, const std::string& scheme = "http") {
    return [&valid, realm = cat(scheme, "://", server.host(), "/token")](const fake_request& q) -> std::optional<fake_response> {
        const auto found = q.headers.find("authorization");
        if (found != q.headers.end() && found->second == cat("Bearer ", valid)) return std::nullopt;
        return fake_response{
            .status = 401,
            .headers = {{"WWW-Authenticate", cat("Bearer realm=\"", realm, "\",service=\"the service\",scope=\"repository:a:pull\"")}}};
    };
}

bool never_sent(const fake_registry& r, const std::string& header) {
    for (const auto& q : r.requests())
        if (q.headers.contains("authorization") && q.headers.at("authorization") == header) return false;
    return true;
}

}  // namespace

// O-RG-06
CO_TEST_CASE(each_host_gets_its_own_login) {
    fake_registry mirror, origin;
    mirror.add_image("a", "1", {});
    origin.add_image("a", "1", {});
    const auto for_mirror = basic("m", "mp");
    const auto for_origin = basic("o", "op");
    mirror.on_request(wants_basic(for_mirror));
    origin.on_request(wants_basic(for_origin));
    {
        registry::client c(
            options_for(rt, {host_of(mirror, true), host_of(origin)}, logins({{mirror.host(), {"m", "mp", ""}}, {origin.host(), {"o", "op", ""}}})));
        BOOST_TEST((co_await c.resolve(name)).host == mirror.host());
        BOOST_TEST(origin.requests().empty());
        BOOST_TEST(mirror.requests().size() == 2U);
        co_await c.resolve(name);
        BOOST_TEST(mirror.requests().size() == 3U);  // the login goes along from now on
        co_await c.close();
    }
    {
        registry::client c(options_for(rt, {host_of(mirror, true), host_of(origin)}, logins({{origin.host(), {"o", "op", ""}}})));
        BOOST_TEST((co_await c.resolve(name)).host == origin.host());
        co_await c.close();
    }
    BOOST_TEST(never_sent(mirror, for_origin));
    BOOST_TEST(never_sent(origin, for_mirror));
}

CO_TEST_CASE(a_refused_login_is_said_once) {
    fake_registry r;
    r.on_request(wants_basic("never"));
    registry::client c(options_for(rt, {host_of(r)}, logins({{r.host(), {"u", "secret", ""}}})));
    const auto e = co_await failure(c.resolve(name));
    BOOST_TEST((e.kind() == errc::unauthorized));
    BOOST_TEST(says(e, "401"));
    BOOST_TEST(!says(e, "secret"));
    BOOST_TEST(r.requests().size() == 2U);
    registry::client anonymous(options_for(rt, {host_of(r)}));
    BOOST_TEST(says(co_await failure(anonymous.resolve(name)), "there is no login for it"));
    co_await c.close();
    co_await anonymous.close();
}

CO_TEST_CASE(a_token_is_fetched_once_and_shared) {
    fake_registry r, tokens;
    const std::string valid = "T1";
    const auto image = r.add_image("a", "1", {"x"});
    r.on_request(wants_bearer(tokens, valid));
    tokens.on_request([&](const fake_request&) { return fake_response{.body = R"({"token":"T1","expires_in":300})"}; });
    registry::client c(options_for(rt, {host_of(r)}, logins({{r.host(), {"u", "p", ""}}})));
    co_await c.fetch_image(name, oci::parse_platform("linux/amd64"));
    BOOST_TEST_REQUIRE(tokens.requests().size() == 1U);
    const auto q = tokens.requests()[0];
    BOOST_TEST(q.path == "/token");
    BOOST_TEST(q.query.at("service") == "the service");
    BOOST_TEST(q.query.at("scope") == "repository:a:pull");
    BOOST_TEST(q.headers.at("authorization") == basic("u", "p"));
    BOOST_TEST(r.requests().size() == 4U);  // one 401, then HEAD, manifest, config
    co_await c.close();
}

CO_TEST_CASE(a_token_is_asked_for_the_repository_at_hand_only) {
    fake_registry r, tokens;
    const std::string valid = "T1";
    for (const auto* repository : {"a", "b"}) r.add_image(repository, "1", {});
    r.on_request(wants_bearer(tokens, valid));
    tokens.on_request([&](const fake_request&) { return fake_response{.body = R"({"token":"T1"})"}; });
    registry::client c(options_for(rt, {host_of(r)}));
    co_await c.resolve(name);
    co_await c.resolve(oci::reference::parse("registry.test/b:1"));
    BOOST_TEST_REQUIRE(tokens.requests().size() == 2U);
    BOOST_TEST(tokens.requests()[1].query.at("scope") == "repository:b:pull");
    BOOST_TEST(r.requests().size() == 3U);
    co_await c.close();
}

// O-RG-10
CO_TEST_CASE(a_token_that_ran_out_is_renewed_at_the_first_401) {
    fake_registry r, tokens;
    std::string valid = "T1";
    r.add_image("a", "1", {});
    r.on_request(wants_bearer(tokens, valid));
    tokens.on_request([&](const fake_request&) { return fake_response{.body = cat(R"({"access_token":")", valid, R"("})")}; });
    registry::client c(options_for(rt, {host_of(r)}));
    co_await c.resolve(name);
    valid = "T2";
    co_await c.resolve(name);
    BOOST_TEST(tokens.requests().size() == 2U);
    BOOST_TEST(r.requests().size() == 4U);
    co_await c.resolve(name);
    BOOST_TEST(tokens.requests().size() == 2U);
    co_await c.close();
}

CO_TEST_CASE(a_short_lived_token_is_renewed_before_it_ends) {
    fake_registry r, tokens;
    const std::string valid = "T";
    r.add_image("a", "1", {});
    r.on_request(wants_bearer(tokens, valid));
    tokens.on_request([&](const fake_request&) { return fake_response{.body = R"({"token":"T","expires_in":1})"}; });
    registry::client c(options_for(rt, {host_of(r)}));
    co_await c.resolve(name);
    co_await sleep_for(950ms);  // nine tenths of its life: the unit under test is this clock
    co_await c.resolve(name);
    BOOST_TEST(tokens.requests().size() == 2U);
    BOOST_TEST(r.requests().size() == 3U);
    co_await c.close();
}

CO_TEST_CASE(an_identity_token_is_posted) {
    fake_registry r, tokens;
    const std::string valid = "T";
    r.add_image("a", "1", {});
    r.on_request(wants_bearer(tokens, valid));
    tokens.on_request(
        [&](const fake_request& q) { return q.method == "POST" ? fake_response{.body = R"({"access_token":"T"})"} : fake_response{.status = 405}; });
    registry::client c(options_for(rt, {host_of(r)}, logins({{r.host(), {"", "identity+token", ""}}})));
    co_await c.resolve(name);
    BOOST_TEST_REQUIRE(tokens.requests().size() == 1U);
    BOOST_TEST(tokens.requests()[0].body ==
               "grant_type=refresh_token&service=the%20service&client_id=cobuild&scope=repository%3Aa%3Apull&refresh_token=identity%2Btoken");
    // With a password: GET first, then POST where that is refused.
    registry::client d(options_for(rt, {host_of(r)}, logins({{r.host(), {"u", "p", ""}}})));
    co_await d.resolve(name);
    BOOST_TEST(tokens.requests().size() == 3U);
    BOOST_TEST(tokens.requests()[2].body.find("grant_type=password") == 0U);
    co_await c.close();
    co_await d.close();
}

CO_TEST_CASE(a_token_server_in_trouble_is_named) {
    fake_registry r, tokens;
    const std::string valid = "T";
    r.on_request(wants_bearer(tokens, valid));
    tokens.on_request([&](const fake_request&) { return fake_response{.status = 403}; });
    registry::client c(options_for(rt, {host_of(r)}));
    const auto e = co_await failure(c.resolve(name));
    BOOST_TEST((e.kind() == errc::unauthorized));
    BOOST_TEST(says(e, cat("the token server ", tokens.host(), " of ", r.host(), " answered 403")));
    tokens.on_request([&](const fake_request&) { return fake_response{.body = "<html>"}; });
    BOOST_TEST(says(co_await failure(c.resolve(name)), "the answer of the token server"));
    co_await c.close();
}

CO_TEST_CASE(docker_config_file) {
    test::scratch_dir dir;
    test::write_file(dir / "config.json",
                     cat(R"({"auths":{"https://index.docker.io/v1/":{"auth":")", base64_encode("hub:hp"),
                         R"("},"https://r.example/v2/":{"username":"u","password":"p"},)", R"("id.example":{"auth":")", base64_encode("x:y"),
                         R"(","identitytoken":"it"},"empty.example":{}},"credHelpers":{"h.example":"thing"}})"));
    std::vector<std::string> asked;
    auto helper = [&](std::string program, std::string verb, std::string input) -> task<std::string> {
        asked.push_back(cat(program, ' ', verb, ' ', input));
        co_return R"({"Username":"<token>","Secret":"s"})";
    };
    const auto p = registry::docker_credentials(rt.pool(), dir.path().string(), helper);
    const auto hub = co_await p("registry-1.docker.io");
    BOOST_TEST(hub.value().username == "hub");
    BOOST_TEST(hub.value().secret == "hp");
    BOOST_TEST((co_await p("r.example")).value().username == "u");
    BOOST_TEST((co_await p("id.example")).value().username.empty());
    BOOST_TEST((co_await p("id.example")).value().secret == "it");
    BOOST_TEST(!(co_await p("empty.example")).has_value());
    BOOST_TEST(!(co_await p("other.example")).has_value());
    BOOST_TEST((co_await p("h.example")).value().secret == "s");
    BOOST_TEST(asked.at(0) == "docker-credential-thing get h.example");
    const auto without = registry::docker_credentials(rt.pool(), dir.path().string());
    BOOST_TEST(says(co_await failure(without("h.example")), "docker-credential-thing"));
    const auto absent = registry::docker_credentials(rt.pool(), (dir / "gone").string());
    BOOST_TEST(!(co_await absent("r.example")).has_value());
    test::write_file(dir / "config.json", "{");
    BOOST_TEST(((co_await failure(without("r.example"))).kind() == errc::invalid));
}

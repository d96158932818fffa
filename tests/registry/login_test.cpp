// Docker's config.json and its helpers, proxies, and certificates that change.
#include "support/support.hpp"

#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <atomic>
#include <cstdlib>
#include <thread>

#include "registry/fixture.hpp"
#include "support/certs.hpp"
#include "support/relay.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.config;
import cobuild.http;
import cobuild.json;
import cobuild.oci;
import cobuild.process;
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

registry::options options_for(runtime& rt, registry::host_settings host, registry::credential_provider who = {}) {
    return {.executor = rt.get_executor(),
            .pool = &rt.pool(),
            .hosts = [host](std::string_view) { return std::vector<registry::host_settings>{host}; },
            .who = {.credentials = std::move(who)},
            .retry = {.attempts = 1, .first_wait = 1ms, .longest_wait = 2ms}};
}

std::string basic(std::string_view user, std::string_view password) { return cat("Basic ", base64_encode(cat(user, ':', password))); }

/// An environment variable for the length of a test.
class variable {
public:
    variable(std::string n, const std::string& value) : name_(std::move(n)) {
        if (const auto* old = std::getenv(name_.c_str())) old_ = old;
        ::setenv(name_.c_str(), value.c_str(), 1);
    }
    ~variable() {
        if (old_) {
            ::setenv(name_.c_str(), old_->c_str(), 1);
        } else {
            ::unsetenv(name_.c_str());
        }
    }
    variable(const variable&) = delete;
    variable& operator=(const variable&) = delete;

private:
    std::string name_;
    std::optional<std::string> old_;
};

/// docker-credential-<name> in `dir`, which is put on PATH: keeps one login per server in files, counts its `get`s.
void make_helper(const test::scratch_dir& dir, const std::string& helper) {
    const auto file = dir / cat("docker-credential-", helper);
    test::write_file(file, cat("#!/bin/sh\nd='", dir.path().string(), R"('
case "$1" in
  store) cat > "$d/stored" ;;
  get) read -r server; echo "$server" >> "$d/gets"
       [ -f "$d/stored" ] || { echo "credentials not found in native keychain"; exit 1; }
       cat "$d/stored" ;;
  erase) [ -f "$d/stored" ] || { echo "credentials not found in native keychain"; exit 1; }; rm "$d/stored" ;;
  *) echo "no such verb"; exit 2 ;;
esac
)"));
    BOOST_TEST_REQUIRE(::chmod(file.c_str(), 0755) == 0);
}

}  // namespace

CO_TEST_CASE(logins_are_kept_in_the_file_and_removed) {
    test::scratch_dir dir;
    test::write_file(dir / "config.json", R"({"auths":{"https://old.example/v1/":{"auth":"eDp5"}},"HttpHeaders":{"A":"b"}})");
    const auto home = dir.path().string();
    const auto where = co_await registry::store_login(rt.pool(), "r.example:5000", {.username = "u", .secret = "p:w"}, home);
    BOOST_TEST(where == cat(home, "/config.json"));
    co_await registry::store_login(rt.pool(), "docker.io", {.username = "hub", .secret = "h"}, home);
    const auto text = test::read_file(dir / "config.json");
    const auto v = json::parse(text);
    BOOST_TEST(json::string_at(v.find("auths")->find("r.example:5000")->as_object(), "auth") == base64_encode("u:p:w"));
    BOOST_TEST(v.find("auths")->find("https://index.docker.io/v1/") != nullptr);
    BOOST_TEST(json::string_at(v.find("HttpHeaders")->as_object(), "A") == "b");
    struct stat s{};
    BOOST_TEST(::stat((dir / "config.json").c_str(), &s) == 0);
    BOOST_TEST((s.st_mode & 0777) == 0600U);
    const auto p = registry::docker_credentials(rt.pool(), home);
    const auto found = co_await p("r.example:5000");
    BOOST_TEST(found.value().secret == "p:w");
    BOOST_TEST(found.value().origin == where);
    BOOST_TEST((co_await p("registry-1.docker.io")).value().username == "hub");
    BOOST_TEST(co_await registry::forget_login(rt.pool(), "docker.io", home));
    BOOST_TEST(co_await registry::forget_login(rt.pool(), "old.example", home));
    BOOST_TEST(!co_await registry::forget_login(rt.pool(), "old.example", home));
    BOOST_TEST(!(co_await p("registry-1.docker.io")).has_value());
}

CO_TEST_CASE(a_helper_keeps_gives_and_forgets) {
    test::scratch_dir dir;
    make_helper(dir, "store");
    const variable path("PATH", cat(dir.path().string(), ':', std::getenv("PATH")));
    test::write_file(dir / "config.json", R"({"credsStore":"store"})");
    const auto home = dir.path().string();
    process::spawner programs;
    const auto run = registry::run_helpers_with(programs);
    const auto p = registry::docker_credentials(rt.pool(), home, run);
    BOOST_TEST(!(co_await p("r.example")).has_value());
    BOOST_TEST(co_await registry::store_login(rt.pool(), "r.example", {.username = "u", .secret = "hidden"}, home, run) == "docker-credential-store");
    BOOST_TEST(test::read_file(dir / "config.json").find("hidden") == std::string::npos);
    const auto found = co_await p("r.example");
    BOOST_TEST(found.value().secret == "hidden");
    BOOST_TEST(found.value().origin == "docker-credential-store");
    BOOST_TEST(co_await registry::forget_login(rt.pool(), "r.example", home, run));
    BOOST_TEST(!(co_await p("r.example")).has_value());
    test::write_file(dir / "config.json", R"({"credHelpers":{"r.example":"absent"}})");
    BOOST_TEST(says(co_await failure(p("r.example")), "docker-credential-absent"));
}

// O-RG-09
CO_TEST_CASE(a_helper_is_asked_again_when_its_login_died) {
    test::scratch_dir dir;
    make_helper(dir, "short");
    const variable path("PATH", cat(dir.path().string(), ':', std::getenv("PATH")));
    fake_registry r;
    r.add_image("a", "1", {});
    std::string valid = basic("u", "one");
    r.on_request([&valid](const fake_request& q) -> std::optional<fake_response> {
        const auto sent = q.headers.find("authorization");
        if (sent != q.headers.end() && sent->second == valid) return std::nullopt;
        return fake_response{.status = 401, .headers = {{"WWW-Authenticate", "Basic realm=\"x\""}}};
    });
    test::write_file(dir / "config.json", cat(R"({"credHelpers":{")", r.host(), R"(":"short"}})"));
    test::write_file(dir / "stored", R"({"Username":"u","Secret":"one"})");
    process::spawner programs;
    registry::client c(options_for(rt, {.host = r.host(), .plain_http = true},
                                   registry::docker_credentials(rt.pool(), dir.path().string(), registry::run_helpers_with(programs))));
    co_await c.fetch_image(name, oci::parse_platform("linux/amd64"));
    BOOST_TEST(test::read_file(dir / "gets") == cat(r.host(), '\n'));  // one start of the helper for three requests
    valid = basic("u", "two");
    test::write_file(dir / "stored", R"({"Username":"u","Secret":"two"})");
    co_await c.push_manifest(oci::reference::parse("registry.test/a:2"), std::string(oci::media::oci_manifest), "{}");
    BOOST_TEST(test::read_file(dir / "gets") == cat(r.host(), '\n', r.host(), '\n'));
    co_await c.close();
}

CO_TEST_CASE(a_refused_login_says_whose_and_from_where) {
    test::scratch_dir dir;
    fake_registry r, tokens;
    test::write_file(dir / "config.json", cat(R"({"auths":{")", r.host(), R"(":{"auth":")", base64_encode("ann:sesame"), R"("}}})"));
    const auto file = (dir / "config.json").string();
    const auto who = registry::docker_credentials(rt.pool(), dir.path().string());
    r.on_request([](const fake_request&) { return fake_response{.status = 401, .headers = {{"WWW-Authenticate", "Basic realm=\"x\""}}}; });
    registry::client c(options_for(rt, {.host = r.host(), .plain_http = true}, who));
    const auto e = co_await failure(c.ping("registry.test"));
    BOOST_TEST((e.kind() == errc::unauthorized));
    BOOST_TEST(says(e, cat(r.host(), " answered 401 Scripted; the login of \"ann\" from ", file, " was tried")));
    BOOST_TEST(!says(e, "sesame"));
    r.on_request([&](const fake_request&) {
        return fake_response{.status = 401, .headers = {{"WWW-Authenticate", cat("Bearer realm=\"http://", tokens.host(), "/t\"")}}};
    });
    tokens.on_request([](const fake_request&) { return fake_response{.status = 401}; });
    registry::client d(options_for(rt, {.host = r.host(), .plain_http = true}, who));
    BOOST_TEST(says(co_await failure(d.ping("registry.test")), cat("the token server ", tokens.host(), " of ", r.host(),
                                                                   " answered 401 Scripted; the login of \"ann\" from ", file, " was tried")));
    co_await c.close();
    co_await d.close();
}

CO_TEST_CASE(docker_auth_config_comes_first) {
    test::scratch_dir dir;
    test::write_file(dir / "config.json",
                     R"({"auths":{"a.example":{"username":"file","password":"f"},"b.example":{"username":"file","password":"f"}}})");
    const variable text("DOCKER_AUTH_CONFIG", R"({"auths":{"a.example":{"username":"env","password":"e"}}})");
    const auto p = registry::docker_credentials(rt.pool(), dir.path().string());
    BOOST_TEST((co_await p("a.example")).value().username == "env");
    BOOST_TEST((co_await p("a.example")).value().origin == "DOCKER_AUTH_CONFIG");
    BOOST_TEST((co_await p("b.example")).value().username == "file");
}

// ---------------------------------------------------------------- proxies

CO_TEST_CASE(a_proxy_is_asked_to_connect) {
    test::scratch_dir dir;
    const test::authority ours(dir.path(), "Ours");
    const auto server = ours.issue("server", "DNS:far.test");
    fake_registry r({.tls_cert = server.cert, .tls_key = server.key});
    r.add_image("a", "1", {});
    test::relay proxy(r.port(), {.proxy = true});
    auto o = options_for(rt, {.host = "far.test:4443", .ca = {ours.cert()}});
    o.proxy = {.https = cat("http://me:secret@127.0.0.1:", proxy.port())};
    registry::client c(o);
    BOOST_TEST((co_await c.resolve(name)).host == "far.test:4443");
    BOOST_TEST(proxy.head().starts_with("CONNECT far.test:4443 HTTP/1.1\r\nHost: far.test:4443\r\n"));
    BOOST_TEST(proxy.head().find(cat("Proxy-Authorization: ", basic("me", "secret"))) != std::string::npos);
    co_await c.close();
    test::relay closed(r.port(), {.proxy = true, .status = 403});
    o.proxy = {.https = cat("http://127.0.0.1:", closed.port())};
    registry::client d(o);
    BOOST_TEST(says(co_await failure(d.resolve(name)), "the proxy did not open a way to far.test:4443: 403"));
    co_await d.close();
}

BOOST_AUTO_TEST_CASE(all_proxy_fills_what_is_not_set) {
    const variable all("ALL_PROXY", "http://all.example:1");
    const variable https("HTTPS_PROXY", "http://tls.example:2");
    const variable exceptions("NO_PROXY", ".internal");
    const auto p = http::proxy_settings::from_environment();
    BOOST_TEST(p.proxy_for(http::parse_endpoint("a.example", false)).value() == "http://all.example:1");
    BOOST_TEST(p.proxy_for(http::parse_endpoint("a.example", true)).value() == "http://tls.example:2");
    BOOST_TEST(!p.proxy_for(http::parse_endpoint("a.internal", true)).has_value());
}

// ---------------------------------------------------------------- certificates

CO_TEST_CASE(certificates_are_read_again_when_they_change) {
    test::scratch_dir dir;
    const test::authority ours(dir.path(), "Ours");
    const test::authority other(dir.path(), "Other");
    const auto server = ours.issue("server", "IP:127.0.0.1");
    fake_registry r({.tls_cert = server.cert, .tls_key = server.key});
    r.add_image("a", "1", {});
    const auto ca = dir / "ca.pem";
    test::write_file(ca, test::read_file(other.cert()));
    registry::client c(options_for(rt, {.host = r.host(), .ca = {ca.string()}}));
    const auto e = co_await failure(c.resolve(name));
    BOOST_TEST((e.kind() == errc::unauthorized));
    BOOST_TEST(says(e, "is signed by an unknown authority (issuer CN = Ours)"));
    test::write_file(ca, test::read_file(ours.cert()));
    BOOST_TEST((co_await c.resolve(name)).host == r.host());
    // Half a file is not taken; what was good a moment ago serves on.
    test::write_file(ca, "-----BEGIN CERTIFICATE-----\n");
    BOOST_TEST((co_await c.resolve(name)).host == r.host());
    test::write_file(ca, test::read_file(other.cert()));
    BOOST_TEST(says(co_await failure(c.resolve(name)), "unknown authority"));
    co_await c.close();
}

// O-RG-08: no entry in any file, no root; the directory is named after the host.
CO_TEST_CASE(certificates_of_a_host_are_found_in_the_users_configuration) {
    test::scratch_dir dir;
    const test::authority ours(dir.path(), "Ours");
    const auto server = ours.issue("server", "IP:127.0.0.1");
    fake_registry r({.tls_cert = server.cert, .tls_key = server.key});
    r.add_image("a", "1", {});
    const variable home("XDG_CONFIG_HOME", dir.path().string());
    std::filesystem::create_directories(dir / cat("buildkit/certs/", r.host()));
    std::filesystem::copy(ours.cert(), dir / cat("buildkit/certs/", r.host(), "/ca.crt"));
    config::configuration settings;
    settings.registries[r.host()].http = false;
    registry::client c({.executor = rt.get_executor(), .pool = &rt.pool(), .hosts = registry::configured_hosts(settings)});
    BOOST_TEST((co_await c.resolve(oci::reference::parse(cat(r.host(), "/a:1")))).host == r.host());
    co_await c.close();
}

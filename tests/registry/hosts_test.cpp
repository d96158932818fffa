// Mirrors, what the log tells of them, and what `cobuild registry check` is made of.
#include "support/support.hpp"

#include <span>

#include "registry/fixture.hpp"
#include "support/certs.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.config;
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

registry::host_settings host_of(const fake_registry& r, bool mirror = false) {
    return {
        .host = r.host(), .plain_http = true, .mirror = mirror, .section = cat("[registry.", cobuild::quoted(r.host()), ']'), .configured = !mirror};
}

registry::options options_for(runtime& rt, std::vector<registry::host_settings> hosts) {
    return {.executor = rt.get_executor(),
            .pool = &rt.pool(),
            .hosts = [hosts](std::string_view) { return hosts; },
            .retry = {.attempts = 2, .first_wait = 1ms, .longest_wait = 2ms}};
}

const auto name = oci::reference::parse("registry.test/a:1");

fake_registry::handler always(int status) {
    return [status](const fake_request&) { return fake_response{.status = status, .body = "{}"}; };
}

int closed_port() {
    const fake_registry gone;
    return gone.port();
}

/// Log lines as one text while it lives.
class captured_log {
public:
    captured_log() {
        configure_log({.level = log_level::debug, .sink = [this](log_level, std::string_view message, std::span<const log_field> fields) {
                           const std::lock_guard lock(guard_);
                           std::map<std::string, std::string> line{{"msg", std::string(message)}};
                           for (const auto& f : fields) line[std::string(f.key)] = f.value;
                           lines_.push_back(std::move(line));
                       }});
    }
    ~captured_log() { configure_log({}); }
    std::vector<std::map<std::string, std::string>> all(std::string_view message) const {
        const std::lock_guard lock(guard_);
        std::vector<std::map<std::string, std::string>> out;
        for (const auto& l : lines_)
            if (l.at("msg") == message) out.push_back(l);
        return out;
    }
    bool mentions(std::string_view text) const {
        const std::lock_guard lock(guard_);
        for (const auto& l : lines_)
            for (const auto& [key, value] : l)
                if (value.find(text) != std::string::npos) return true;
        return false;
    }

private:
    mutable std::mutex guard_;
    std::vector<std::map<std::string, std::string>> lines_;
};

}  // namespace

// Each way a mirror may fail sends us on, asked once, with one warning; a 404 is no failure and warns nobody.
CO_TEST_CASE(every_failure_goes_on_to_the_next_host) {
    for (const int status : {401, 403, 404, 429, 500, 502, 503, 504}) {
        fake_registry mirror, origin;
        const auto image = origin.add_image("a", "1", {});
        mirror.on_request([status](const fake_request&) {
            return fake_response{.status = status, .headers = {{"Retry-After", "3600"}, {"WWW-Authenticate", "Basic realm=\"x\""}}};
        });
        registry::client c(options_for(rt, {host_of(mirror, true), host_of(origin)}));
        std::vector<std::string> warnings;
        registry::call_options call{.warn = [&](const std::string& w) { warnings.push_back(w); }};
        BOOST_TEST((co_await c.resolve(name, call)).target.digest.str() == image.manifest_digest);
        BOOST_TEST(mirror.requests().size() == 1U);
        BOOST_TEST(warnings.size() == (status == 404 ? 0U : 1U));
        co_await c.close();
    }
}

CO_TEST_CASE(a_pull_warns_once_of_a_host) {
    fake_registry mirror, origin;
    origin.add_image("a", "1", {});
    mirror.on_request(always(403));
    registry::client c(options_for(rt, {host_of(mirror, true), host_of(origin)}));
    std::vector<std::string> warnings;
    registry::call_options call{.warn = [&](const std::string& w) { warnings.push_back(w); }};
    co_await c.fetch_image(name, oci::parse_platform("linux/amd64"), {}, call);
    BOOST_TEST(mirror.requests().size() == 3U);  // tag, manifest, config
    BOOST_TEST(warnings.size() == 1U);
    co_await c.close();
}

CO_TEST_CASE(hosts_without_a_name_a_listener_or_tls_are_passed_over) {
    fake_registry origin, plain;
    origin.add_image("a", "1", {});
    plain.on_request([](const fake_request&) { return fake_response{.no_answer = true}; });
    auto tls = host_of(plain, true);
    tls.plain_http = false;
    const registry::host_settings nobody{.host = cat("127.0.0.1:", closed_port()), .plain_http = true, .mirror = true};
    const registry::host_settings unknown{.host = "no-such-host.invalid", .plain_http = true, .mirror = true};
    auto o = options_for(rt, {nobody, unknown, tls, host_of(plain, true), host_of(origin)});
    o.timeouts.handshake = 50ms;
    registry::client c(std::move(o));
    std::vector<std::string> warnings;
    registry::call_options call{.warn = [&](const std::string& w) { warnings.push_back(w); }};
    BOOST_TEST((co_await c.resolve(name, call)).host == origin.host());
    BOOST_TEST(warnings.size() == 4U);
    co_await c.close();
}

// O-RG-04: the listing names each host, its answer, and the entry that governs it or is missing.
CO_TEST_CASE(when_all_fail_one_error_lists_each) {
    fake_registry one, two, origin;
    one.on_request(always(503));
    two.on_request(always(403));
    origin.on_request(always(404));
    registry::client c(options_for(rt, {host_of(one, true), host_of(two, true), host_of(origin)}));
    const auto e = co_await failure(c.resolve(name));
    BOOST_TEST((e.kind() == errc::not_found));
    BOOST_TEST(says(e, "resolving registry.test/a:1: every host failed"));
    BOOST_TEST(says(e, cat(one.host(), " (mirror, no [registry.\"", one.host(), "\"] in the configuration): ", one.host(), " answered 503")));
    BOOST_TEST(says(e, cat(two.host(), " (mirror, no [registry.\"", two.host(), "\"] in the configuration): ", two.host(), " answered 403")));
    BOOST_TEST(says(e, cat(origin.host(), " ([registry.\"", origin.host(), "\"]): ", origin.host(), " answered 404")));
    co_await c.close();
}

// O-RG-11: only the last host is waited for.
CO_TEST_CASE(a_busy_mirror_is_not_waited_for_but_the_origin_is) {
    fake_registry mirror, origin;
    origin.add_image("a", "1", {});
    mirror.on_request([](const fake_request&) { return fake_response{.status = 429, .headers = {{"Retry-After", "3600"}}}; });
    int busy = 1;
    origin.on_request([&busy](const fake_request&) -> std::optional<fake_response> {
        if (busy-- > 0) return fake_response{.status = 429, .headers = {{"Retry-After", "0"}}};
        return std::nullopt;
    });
    registry::client c(options_for(rt, {host_of(mirror, true), host_of(origin)}));
    BOOST_TEST((co_await c.resolve(name)).host == origin.host());
    BOOST_TEST(mirror.requests().size() == 1U);
    BOOST_TEST(origin.requests().size() == 2U);
    co_await c.close();
}

CO_TEST_CASE(a_mirror_found_down_rests_and_is_probed_again) {
    fake_registry mirror, origin;
    for (auto* r : {&mirror, &origin}) r->add_image("a", "1", {});
    bool down = true;
    mirror.on_request(
        [&down](const fake_request&) -> std::optional<fake_response> { return down ? std::optional(fake_response{.status = 503}) : std::nullopt; });
    auto o = options_for(rt, {host_of(mirror, true), host_of(origin)});
    o.host_rest = 1h;
    registry::client c(o);
    co_await c.resolve(name);
    co_await c.resolve(name);
    BOOST_TEST(mirror.requests().size() == 1U);
    down = false;
    o.host_rest = 0ns;
    down = true;
    registry::client d(o);
    co_await d.resolve(name);
    down = false;
    BOOST_TEST((co_await d.resolve(name)).host == mirror.host());
    co_await c.close();
    co_await d.close();
}

// O-RG-05 and the reference's 1.6: what the file says becomes hosts.
BOOST_AUTO_TEST_CASE(hosts_of_the_configuration) {
    config::configuration settings;
    settings.registries["docker.io"].mirrors = {"https://mirror.example.com", "127.0.0.1:5000/a/b/c"};
    settings.registries["docker.io"].ca = {"/hub.pem"};
    settings.registries["mirror.example.com"].ca = {"/mirror.pem"};
    const auto hosts = registry::configured_hosts(settings)("docker.io");
    BOOST_TEST_REQUIRE(hosts.size() == 3U);
    BOOST_TEST(hosts[0].host == "mirror.example.com");
    BOOST_TEST((hosts[0].ca == std::vector<std::string>{"/mirror.pem"}));
    BOOST_TEST(hosts[0].mirror);
    BOOST_TEST(hosts[0].configured);
    BOOST_TEST(hosts[1].host == "127.0.0.1:5000");
    BOOST_TEST(hosts[1].path_prefix == "/v2/a/b/c");
    BOOST_TEST(hosts[1].plain_http);
    BOOST_TEST(!hosts[1].configured);
    BOOST_TEST(hosts[1].section == "[registry.\"127.0.0.1:5000\"]");
    BOOST_TEST(hosts[2].host == "registry-1.docker.io");
    BOOST_TEST((hosts[2].ca == std::vector<std::string>{"/hub.pem"}));
    BOOST_TEST(hosts[2].section == "[registry.\"docker.io\"]");
}

// ---------------------------------------------------------------- log

CO_TEST_CASE(the_log_shows_who_answered_and_no_secret) {
    fake_registry mirror, store, tokens;
    const std::string layer = "layer bytes";
    mirror.add_image("a", "1", {layer});
    store.on_request([&](const fake_request&) { return fake_response{.body = layer}; });
    tokens.on_request([](const fake_request&) { return fake_response{.headers = {{"Set-Cookie", "c00kie"}}, .body = R"({"token":"s3cretToken"})"}; });
    mirror.on_request([&](const fake_request& q) -> std::optional<fake_response> {
        if (!q.headers.contains("authorization"))
            return fake_response{.status = 401,
                                 .headers = {{"WWW-Authenticate", cat("Bearer realm=\"http://", tokens.host(), "/t\",service=\"s\"")}}};
        if (q.path.find("/blobs/") != std::string::npos)
            return fake_response{
                .status = 307,
                .headers = {{"Location", cat("http://", store.host(), "/x?X-Amz-Signature=s1gnature")}, {"X-Goog-Hash", "crc32c=n03baw=="}}};
        return std::nullopt;
    });
    const captured_log log;
    auto o = options_for(rt, {host_of(mirror, true)});
    o.who.credentials = [](std::string) -> task<std::optional<registry::credential>> {
        co_return registry::credential{.username = "u", .secret = "passw0rd"};
    };
    registry::client c(std::move(o));
    const auto target = (co_await c.resolve(name)).target;
    const oci::descriptor blob{.media_type = std::string(oci::media::oci_layer), .digest = digest::of(layer), .size = layer.size()};
    co_await c.fetch_blob(name, blob, [](chunk) -> task<void> { co_return; });
    co_await c.close();
    const auto asked = log.all("do request");
    const auto answered = log.all("fetch response received");
    BOOST_TEST_REQUIRE(asked.size() == 5U);  // 401, token, HEAD; the blob, and where it was sent on
    BOOST_TEST(answered.size() == asked.size());
    const auto& head = asked[0];
    BOOST_TEST(head.at("host") == mirror.host());
    BOOST_TEST(head.at("url") == cat("http://", mirror.host(), "/v2/a/manifests/1?ns=registry.test"));
    BOOST_TEST(head.at("request.method") == "HEAD");
    BOOST_TEST(head.at("request.header.user-agent") == cat("cobuild/", version()));
    BOOST_TEST(head.at("request.header.accept").find("application/vnd.oci.image.index.v1+json") != std::string::npos);
    BOOST_TEST(answered[0].at("response.status") == "401 Scripted");
    BOOST_TEST(answered[2].at("response.status") == "200 Scripted");
    BOOST_TEST(answered[2].at("response.header.docker-content-digest") == target.digest.str());
    // The lines of one operation share a trace, those of one request a span.
    BOOST_TEST(asked[0].at("traceID") == asked[2].at("traceID"));
    BOOST_TEST(asked[0].at("traceID") != asked[3].at("traceID"));
    BOOST_TEST(asked[0].at("spanID") == answered[0].at("spanID"));
    BOOST_TEST(asked[0].at("spanID") != asked[2].at("spanID"));
    const auto fetches = log.all("fetch");
    BOOST_TEST_REQUIRE(fetches.size() == 1U);
    BOOST_TEST(fetches[0].at("digest") == blob.digest.str());
    BOOST_TEST(fetches[0].at("mediatype") == blob.media_type);
    bool recognised = false;
    for (const auto& a : answered) recognised = recognised || (a.contains("response.header.x-goog-hash") && a.at("digest") == blob.digest.str());
    BOOST_TEST(recognised);
    for (const auto* secret : {"passw0rd", "s3cretToken", "s1gnature", "c00kie"}) BOOST_TEST(!log.mentions(secret), secret);
}

// ---------------------------------------------------------------- check, tags

CO_TEST_CASE(check_tells_host_by_host) {
    test::scratch_dir dir;
    const test::authority ours(dir.path(), "Ours");
    const auto server = ours.issue("server", "IP:127.0.0.1");
    fake_registry trusted({.tls_cert = server.cert, .tls_key = server.key}), stranger({.tls_cert = server.cert, .tls_key = server.key}), origin;
    const auto image = trusted.add_image("a", "1", {});
    auto first = host_of(trusted, true);
    first.plain_http = false;
    first.ca = {ours.cert()};
    first.configured = true;
    auto second = host_of(stranger, true);
    second.plain_http = false;
    registry::client c(options_for(rt, {first, second, host_of(origin)}));
    const auto all = co_await c.check(name);
    BOOST_TEST_REQUIRE(all.size() == 3U);
    BOOST_TEST(all[0].failure == "");
    BOOST_TEST(all[0].url == cat("https://", trusted.host(), "/v2"));
    BOOST_TEST(all[0].address == trusted.host());
    BOOST_TEST(all[0].trust == cat("the system's authorities, ", ours.cert()));
    BOOST_TEST_REQUIRE(!all[0].certificates.empty());
    BOOST_TEST(all[0].certificates[0].find("issued by CN = Ours") != std::string::npos);
    BOOST_TEST(all[0].api == "200 Scripted");
    BOOST_TEST(all[0].manifest == "200 Scripted");
    BOOST_TEST(all[0].digest == image.manifest_digest);
    BOOST_TEST(all[1].failure.find("is signed by an unknown authority (issuer CN = Ours)") != std::string::npos);
    BOOST_TEST(!all[1].certificates.empty());
    BOOST_TEST(!all[1].configured);
    BOOST_TEST(all[2].manifest == "404 Scripted");
    BOOST_TEST(all[2].trust == "none: plain http");
    co_await c.close();
}

CO_TEST_CASE(tags_come_page_by_page) {
    fake_registry r;
    r.on_request([](const fake_request& q) {
        const bool second = q.query.contains("last");
        return fake_response{
            .headers = second ? std::vector<std::pair<std::string, std::string>>{}
                              : std::vector<std::pair<std::string, std::string>>{{"Link", "</v2/a/tags/list?last=b&n=1000>; rel=\"next\""}},
            .body = second ? R"({"name":"a","tags":["c"]})" : R"({"name":"a","tags":["b","a"]})"};
    });
    registry::client c(options_for(rt, {host_of(r)}));
    BOOST_TEST((co_await c.tags(name) == std::vector<std::string>{"a", "b", "c"}));
    BOOST_TEST(r.requests().size() == 2U);
    r.on_request(
        [](const fake_request&) { return fake_response{.headers = {{"Link", "<http://127.0.0.1:1/x>; rel=\"next\""}}, .body = "{\"tags\":null}"}; });
    BOOST_TEST(says(co_await failure(c.tags(name)), "at another server"));
    co_await c.close();
}

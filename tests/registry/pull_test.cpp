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

constexpr std::string_view domain = "registry.test";

registry::host_settings host_of(const fake_registry& r, bool mirror = false) {
    return {.host = r.host(), .plain_http = true, .mirror = mirror, .section = cat("[registry.", cobuild::quoted(r.host()), ']')};
}

registry::options options_for(runtime& rt, std::vector<registry::host_settings> hosts) {
    return {.executor = rt.get_executor(),
            .pool = &rt.pool(),
            .hosts = [hosts](std::string_view) { return hosts; },
            .retry = {.attempts = 3, .first_wait = 1ms, .longest_wait = 2ms, .longest_retry_after = 3s}};
}

oci::reference image_ref(std::string_view rest) { return oci::reference::parse(cat(domain, '/', rest)); }

fake_registry::handler always(int status) {
    return [status](const fake_request&) { return fake_response{.status = status, .body = "{}"}; };
}

}  // namespace

CO_TEST_CASE(a_tag_is_one_head_and_a_digest_asks_nobody) {
    fake_registry r;
    const auto image = r.add_image("a", "1", {"layer"});
    registry::client c(options_for(rt, {host_of(r)}));
    const auto found = co_await c.resolve(image_ref("a:1"));
    BOOST_TEST(found.target.digest.str() == image.manifest_digest);
    BOOST_TEST(found.target.size == image.manifest.size());
    BOOST_TEST(found.host == r.host());
    BOOST_TEST_REQUIRE(r.requests().size() == 1U);
    const auto q = r.requests()[0];
    BOOST_TEST(q.method == "HEAD");
    BOOST_TEST(q.headers.at("user-agent") == cat("cobuild/", version()));
    BOOST_TEST(q.headers.at("accept").find("application/vnd.oci.image.index.v1+json") != std::string::npos);
    BOOST_TEST(q.query.empty());
    const auto pinned = co_await c.resolve(image_ref(cat("a:1@", image.manifest_digest)));
    BOOST_TEST(pinned.target.digest.str() == image.manifest_digest);
    BOOST_TEST(r.requests().size() == 1U);
    co_await c.close();
}

CO_TEST_CASE(get_where_head_says_too_little) {
    fake_registry r;
    const auto image = r.add_image("a", "1", {});
    for (const int variant : {405, 200}) {
        r.forget_requests();
        r.on_request([variant](const fake_request& q) -> std::optional<fake_response> {
            if (q.method == "HEAD") return fake_response{.status = variant};
            return std::nullopt;
        });
        registry::client c(options_for(rt, {host_of(r)}));
        BOOST_TEST((co_await c.resolve(image_ref("a:1"))).target.digest.str() == image.manifest_digest);
        BOOST_TEST(r.count("HEAD") == 1U);
        BOOST_TEST(r.count("GET") == 1U);
        co_await c.close();
    }
}

CO_TEST_CASE(an_image_with_its_config) {
    fake_registry r;
    const auto amd = r.add_image("a", "", {"one", "two"});
    const auto index = cat(
        R"({"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":")",
        amd.manifest_digest, R"(","size":)", amd.manifest.size(), R"(,"platform":{"os":"linux","architecture":"amd64"}}]})");
    r.add_manifest("a", "latest", std::string(oci::media::oci_index), index);
    registry::client c(options_for(rt, {host_of(r)}));
    const auto image = co_await c.fetch_image(image_ref("a"), oci::parse_platform("linux/amd64"));
    BOOST_TEST(image.index.value().bytes == index);
    BOOST_TEST(image.manifest.target.digest.str() == amd.manifest_digest);
    BOOST_TEST(image.parsed.layers.size() == 2U);
    BOOST_TEST((image.config.config.env == std::vector<std::string>{"A=b"}));
    BOOST_TEST(r.requests().size() == 4U);  // HEAD, index, manifest, config
    const auto none = co_await failure(c.fetch_image(image_ref("a"), oci::parse_platform("linux/s390x")));
    BOOST_TEST((none.kind() == errc::not_found));
    BOOST_TEST(says(none, "has no image for linux/s390x; it has: linux/amd64"));
    co_await c.close();
}

// O-RG-01
CO_TEST_CASE(a_mirror_in_trouble_does_not_stop_a_pull) {
    for (const int status : {500, 502, 503, 504}) {
        fake_registry mirror, origin;
        const auto image = origin.add_image("a", "1", {"layer"});
        mirror.on_request(always(status));
        registry::client c(options_for(rt, {host_of(mirror, true), host_of(origin)}));
        std::vector<std::string> warnings;
        registry::call_options call{.warn = [&](const std::string& w) { warnings.push_back(w); }};
        const auto got = co_await c.fetch_image(image_ref("a:1"), oci::parse_platform("linux/amd64"), {}, call);
        BOOST_TEST(got.manifest.target.digest.str() == image.manifest_digest);
        BOOST_TEST(warnings.size() == 1U);
        BOOST_TEST(mirror.requests().size() == 1U);
        co_await c.close();
    }
}

// O-RG-02, O-RG-05
CO_TEST_CASE(mirrors_in_order_then_the_origin_each_once) {
    fake_registry first, second, origin;
    second.add_image("a", "1", {});
    registry::client c(options_for(rt, {host_of(first, true), host_of(second, true), host_of(origin)}));
    BOOST_TEST((co_await c.resolve(image_ref("a:1"))).host == second.host());
    BOOST_TEST(first.requests().size() == 1U);
    BOOST_TEST(first.requests()[0].query.at("ns") == domain);
    BOOST_TEST(second.requests().size() == 1U);
    BOOST_TEST(origin.requests().empty());
    const auto gone = co_await failure(c.resolve(image_ref("b:1")));
    BOOST_TEST((gone.kind() == errc::not_found));
    for (const auto* r : {&first, &second, &origin}) BOOST_TEST(says(gone, cat(r->host(), " answered 404")));
    BOOST_TEST(origin.requests().size() == 1U);
    BOOST_TEST(origin.requests()[0].query.empty());
    co_await c.close();
}

// O-RG-05
CO_TEST_CASE(a_mirror_under_a_path) {
    fake_registry mirror, origin;
    mirror.on_request(always(502));
    origin.add_image("library/alpine", "latest", {});
    auto under = host_of(mirror, true);
    under.path_prefix = "/v2/one/two/three";
    registry::client c(options_for(rt, {under, host_of(origin)}));
    BOOST_TEST((co_await c.resolve(oci::reference::parse("alpine"))).host == origin.host());
    BOOST_TEST(mirror.requests().at(0).path == "/v2/one/two/three/library/alpine/manifests/latest");
    BOOST_TEST(mirror.requests().at(0).query.at("ns") == "docker.io");
    co_await c.close();
}

CO_TEST_CASE(an_unreachable_mirror_is_named_once) {
    fake_registry origin;
    origin.add_image("a", "1", {});
    int dead_port = 0;
    {
        const fake_registry dead;
        dead_port = dead.port();
    }
    registry::client c(options_for(rt, {{.host = cat("127.0.0.1:", dead_port), .plain_http = true, .mirror = true}, host_of(origin)}));
    std::vector<std::string> warnings;
    registry::call_options call{.warn = [&](const std::string& w) { warnings.push_back(w); }};
    co_await c.fetch_image(image_ref("a:1"), oci::parse_platform("linux/amd64"), {}, call);
    BOOST_TEST_REQUIRE(warnings.size() == 1U);
    BOOST_TEST(warnings[0].find(cat("cannot connect to 127.0.0.1:", dead_port, ": Connection refused")) != std::string::npos);
    co_await c.close();
}

// O-RG-11
CO_TEST_CASE(too_many_requests_are_waited_out) {
    fake_registry r;
    r.add_image("a", "1", {});
    int refusals = 2;
    std::string after = "0";
    r.on_request([&](const fake_request&) -> std::optional<fake_response> {
        if (refusals-- > 0) return fake_response{.status = 429, .headers = {{"Retry-After", after}}};
        return std::nullopt;
    });
    registry::client c(options_for(rt, {host_of(r)}));
    co_await c.resolve(image_ref("a:1"));
    BOOST_TEST(r.requests().size() == 3U);
    refusals = 1;
    after = "3600";
    const auto e = co_await failure(c.resolve(image_ref("a:1")));
    BOOST_TEST(says(e, "wants us to wait 1h0m0s"));
    BOOST_TEST(r.requests().size() == 4U);
    refusals = 1;
    after = "Wed, 21 Oct 2015 07:28:00 GMT";  // past: at once
    co_await c.resolve(image_ref("a:1"));
    co_await c.close();
}

CO_TEST_CASE(lies_about_a_manifest_are_found) {
    fake_registry r;
    const auto image = r.add_image("a", "1", {});
    r.on_request([](const fake_request& q) -> std::optional<fake_response> {
        if (q.method == "GET")
            return fake_response{.headers = {{"Content-Type", std::string(oci::media::oci_manifest)}}, .body = "{\"schemaVersion\":2}"};
        return std::nullopt;
    });
    registry::client c(options_for(rt, {host_of(r)}));
    const auto target = (co_await c.resolve(image_ref("a:1"))).target;
    const auto e = co_await failure(c.fetch_manifest(image_ref("a:1"), target));
    BOOST_TEST((e.kind() == errc::corrupt));
    BOOST_TEST(says(e, cat(image.manifest.size(), " bytes were declared, 19 came")));
    auto unsized_target = target;
    unsized_target.size = 0;
    BOOST_TEST(says(co_await failure(c.fetch_manifest(image_ref("a:1"), unsized_target)), "has other bytes"));
    co_await c.close();
}

CO_TEST_CASE(what_is_no_http_is_said) {
    fake_registry r;
    registry::client c(options_for(rt, {host_of(r)}));
    r.on_request([](const fake_request&) { return fake_response{.raw = "SSH-2.0-x\r\n\r\n"}; });
    BOOST_TEST(says(co_await failure(c.resolve(image_ref("a:1"))), "is not HTTP"));
    r.on_request([](const fake_request&) { return fake_response{.raw = cat("HTTP/1.1 200 OK\r\nX: ", std::string(100000, 'x'), "\r\n\r\n")}; });
    BOOST_TEST(says(co_await failure(c.resolve(image_ref("a:1"))), "longer than 65536 bytes"));
    r.on_request([](const fake_request&) { return fake_response{.no_answer = true}; });
    BOOST_TEST(says(co_await failure(c.resolve(image_ref("a:1"))), "closed the connection without an answer"));
    co_await c.close();
}

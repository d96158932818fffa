#include "support/support.hpp"

#include <algorithm>
#include <set>

#include "registry/fixture.hpp"
#include "support/certs.hpp"
#include "support/relay.hpp"
#include "support/token_server.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.http;
import cobuild.oci;
import cobuild.registry;

#include "support/failure.hpp"

using namespace cobuild;
using namespace cobuild::async;
using namespace std::chrono_literals;
using test::docker_registry;
using test::failure;
using test::fake_registry;
using test::fake_request;
using test::fake_response;
using test::says;

namespace {

registry::options options_for(runtime& rt, registry::host_settings host, std::string user = {}, std::string password = {}) {
    host.section = "[registry.\"registry.test\"]";
    registry::options o{.executor = rt.get_executor(),
                        .pool = &rt.pool(),
                        .hosts = [host](std::string_view) { return std::vector{host}; },
                        .retry = {.attempts = 2, .first_wait = 1ms, .longest_wait = 2ms}};
    if (!user.empty())
        o.who.credentials = [user, password](std::string) -> task<std::optional<registry::credential>> {
            co_return registry::credential{.username = user, .secret = password};
        };
    return o;
}

const auto name = oci::reference::parse("registry.test/dir/image:1");

oci::descriptor describe_blob(std::string_view type, std::string_view bytes) {
    return {.media_type = std::string(type), .digest = digest::of(bytes), .size = bytes.size()};
}

/// Pushes an image with one layer of `size` bytes and pulls it again.
task<void> there_and_back(registry::options o, std::size_t size) {
    registry::client c(std::move(o));
    std::string layer(size, 'l');
    for (std::size_t i = 0; i < layer.size(); i += 97) layer[i] = static_cast<char>(i >> 8);
    const auto config = cat(R"({"architecture":"amd64","os":"linux","comment":")", size, R"(","rootfs":{"type":"layers","diff_ids":[]}})");
    oci::manifest m{.media_type = std::string(oci::media::oci_manifest),
                    .config = describe_blob(oci::media::oci_config, config),
                    .layers = {describe_blob(oci::media::oci_layer, layer)}};
    const auto holding = [](std::string bytes) { return [bytes]() -> task<http::body_source> { co_return http::memory_body(bytes); }; };
    BOOST_TEST((co_await c.push_blob(name, m.config, holding(config)) == registry::push_outcome::uploaded));
    BOOST_TEST((co_await c.push_blob(name, m.layers[0], holding(layer)) == registry::push_outcome::uploaded));
    BOOST_TEST((co_await c.push_blob(name, m.layers[0], holding(layer)) == registry::push_outcome::existed));
    BOOST_TEST((co_await c.push_blob(oci::reference::parse("registry.test/second"), m.layers[0], holding(layer), {.mount_from = {"dir/image"}}) ==
                registry::push_outcome::mounted));
    const auto id = co_await c.push_manifest(name, m.media_type, oci::encode(m));
    const auto got = co_await c.fetch_image(name, oci::parse_platform("linux/amd64"));
    BOOST_TEST((got.manifest.target.digest == id));
    BOOST_TEST(got.config_bytes == config);
    std::string bytes;
    auto* out = &bytes;
    co_await c.fetch_blob(name, got.parsed.layers.at(0), [out](chunk part) -> task<void> {
        out->append(text_of(part));
        co_return;
    });
    BOOST_TEST((bytes == layer));
    co_await c.close();
}

}  // namespace

CO_TEST_CASE(real_registry_plain) {
    if (!docker_registry::available()) co_return;
    test::scratch_dir dir;
    const docker_registry r(dir / "r", {});
    co_await there_and_back(options_for(rt, {.host = r.host(), .plain_http = true}), 5'000'000);
    // Asked over https it says so, and the entry to change is named (O-RG-04).
    registry::client c(options_for(rt, {.host = r.host()}));
    const auto e = co_await failure(c.resolve(name));
    BOOST_TEST(says(e, cat(r.host(), " does not speak TLS; if it serves plain http, set http = true in [registry.\"registry.test\"]")));
    co_await c.close();
    // insecure and loopback: https first, then http.
    co_await there_and_back(options_for(rt, {.host = r.host(), .plain_http = true, .insecure = true, .try_https_first = true}), 1000);
}

CO_TEST_CASE(real_registry_tls_client_certificate_and_login) {
    if (!docker_registry::available()) co_return;
    test::scratch_dir dir;
    const test::authority ours(dir.path(), "Ours");
    const auto server = ours.issue("server", "IP:127.0.0.1");
    const auto client = ours.issue("client", "DNS:client");
    const docker_registry r(dir / "r", {.tls_cert = server.cert, .tls_key = server.key, .client_ca = ours.cert(), .user = "u", .password = "p"});
    const registry::host_settings host{.host = r.host(), .ca = {ours.cert()}, .key_pairs = {{client.cert, client.key}}};
    co_await there_and_back(options_for(rt, host, "u", "p"), 3'000'000);
    registry::client wrong(options_for(rt, host, "u", "wrong"));
    BOOST_TEST(((co_await failure(wrong.resolve(name))).kind() == errc::unauthorized));
    registry::client bare(options_for(rt, {.host = r.host(), .ca = {ours.cert()}}));
    const auto e = co_await failure(bare.resolve(name));
    BOOST_TEST((e.kind() == errc::unauthorized));
    BOOST_TEST(says(e, cat(r.host(), " wants a client certificate and none is configured")));
    BOOST_TEST(says(e, "add a keypair to [registry.\"registry.test\"]"));
    // One of another authority is refused, and named; of several the one that fits is shown.
    const test::authority strangers(dir.path(), "Strangers");
    const auto strange = strangers.issue("strange", "DNS:strange");
    registry::client stranger(options_for(rt, {.host = r.host(), .ca = {ours.cert()}, .key_pairs = {{strange.cert, strange.key}}}));
    BOOST_TEST(says(co_await failure(stranger.resolve(name)), cat(r.host(), " refused the client certificate ", quoted(strange.cert))));
    co_await stranger.close();
    co_await there_and_back(
        options_for(rt, {.host = r.host(), .ca = {ours.cert()}, .key_pairs = {{strange.cert, strange.key}, {client.cert, client.key}}}, "u", "p"),
        1000);
    co_await wrong.close();
    co_await bare.close();
}

CO_TEST_CASE(real_registry_with_bearer_tokens) {
    if (!docker_registry::available()) co_return;
    test::scratch_dir dir;
    const test::authority ours(dir.path(), "Ours");
    const test::token_server tokens({.signer = ours.issue("signer", "DNS:signer"), .user = "u", .password = "p"});
    const docker_registry r(dir / "r", {.token_realm = tokens.realm(), .token_ca = ours.cert()});
    const registry::host_settings host{.host = r.host(), .plain_http = true};
    co_await there_and_back(options_for(rt, host, "u", "p"), 3'000'000);
    const auto asked = tokens.asked();
    // A token for each set of scopes, and none asked for twice: pushes, the mount's two repositories, nothing else.
    BOOST_TEST((std::set<std::string>(asked.begin(), asked.end()).size() == asked.size()));
    BOOST_TEST((std::find(asked.begin(), asked.end(), "repository:dir/image:pull,push") != asked.end()));
    // Who does not log in may pull.
    registry::client guest(options_for(rt, host));
    BOOST_TEST((co_await guest.resolve(name)).host == r.host());
    const std::string bytes = "not for guests";
    const auto holding = [&]() -> task<http::body_source> { co_return http::memory_body(bytes); };
    auto e = co_await failure(guest.push_blob(name, describe_blob(oci::media::oci_layer, bytes), holding));
    BOOST_TEST((e.kind() == errc::unauthorized));
    BOOST_TEST(says(e, r.host()));
    registry::client wrong(options_for(rt, host, "u", "wrong"));
    e = co_await failure(wrong.resolve(name));
    BOOST_TEST((e.kind() == errc::unauthorized));
    co_await guest.close();
    co_await wrong.close();
}

// Whether it takes up a broken upload or has lost it, the blob arrives.
CO_TEST_CASE(real_registry_over_a_link_that_breaks) {
    if (!docker_registry::available()) co_return;
    test::scratch_dir dir;
    const docker_registry r(dir / "r", {});
    const int port = std::stoi(r.host().substr(r.host().find(':') + 1));
    test::relay link(port, {.cut_after_upload = 2'000'000, .cuts = 1});
    co_await there_and_back(options_for(rt, {.host = cat("127.0.0.1:", link.port()), .plain_http = true}), 5'000'000);
    test::relay back(port, {.cut_after = 2'000'000, .cuts = 2});
    registry::client c(options_for(rt, {.host = cat("127.0.0.1:", back.port()), .plain_http = true}));
    const auto image = co_await c.fetch_image(name, oci::parse_platform("linux/amd64"));
    std::uint64_t came = 0;
    co_await c.fetch_blob(name, image.parsed.layers.at(0), [&came](chunk part) -> task<void> {
        came += part.size();
        co_return;
    });
    BOOST_TEST(came == 5'000'000U);
    co_await c.close();
}

// O-RG-07
CO_TEST_CASE(the_token_server_is_trusted_as_the_registry_is) {
    test::scratch_dir dir;
    const test::authority ours(dir.path(), "Ours");
    const auto server = ours.issue("server", "IP:127.0.0.1");
    fake_registry tokens({.tls_cert = server.cert, .tls_key = server.key});
    fake_registry r({.tls_cert = server.cert, .tls_key = server.key});
    r.add_image("dir/image", "1", {});
    tokens.on_request([](const fake_request&) { return fake_response{.body = R"({"token":"T"})"}; });
    r.on_request([&](const fake_request& q) -> std::optional<fake_response> {
        if (q.headers.contains("authorization")) return std::nullopt;
        return fake_response{.status = 401, .headers = {{"WWW-Authenticate", cat("Bearer realm=\"https://", tokens.host(), "/t\"")}}};
    });
    registry::client c(options_for(rt, {.host = r.host(), .ca = {ours.cert()}}));
    BOOST_TEST((co_await c.resolve(name)).host == r.host());
    registry::client loose(options_for(rt, {.host = r.host(), .insecure = true}));
    BOOST_TEST((co_await loose.resolve(name)).host == r.host());
    registry::client strict(options_for(rt, {.host = r.host()}));
    const auto e = co_await failure(strict.resolve(name));
    BOOST_TEST(says(e, "unknown authority (issuer CN = Ours); add its CA file to \"ca\" in [registry.\"registry.test\"]"));
    for (auto* each : {&c, &loose, &strict}) co_await each->close();
}

// Counted connections: how many sockets there are, and that none is lost.
#include "support/support.hpp"

#include <random>

#include "registry/fixture.hpp"
#include "support/relay.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.http;
import cobuild.oci;
import cobuild.registry;

using namespace cobuild;
using namespace cobuild::async;
using namespace std::chrono_literals;
using test::fake_registry;
using test::fake_request;
using test::fake_response;

namespace {

registry::options options_for(runtime& rt, const fake_registry& r, std::size_t transfers = 4) {
    return {.executor = rt.get_executor(),
            .pool = &rt.pool(),
            .hosts = [host = r.host()](std::string_view) { return std::vector<registry::host_settings>{{.host = host, .plain_http = true}}; },
            .limits = {.transfers = transfers},
            .retry = {.attempts = 2, .first_wait = 1ms, .longest_wait = 2ms}};
}

oci::reference image_ref(std::string_view rest) { return oci::reference::parse(cat("registry.test/", rest)); }

oci::descriptor describe_blob(std::string_view bytes) {
    return {.media_type = std::string(oci::media::oci_layer), .digest = digest::of(bytes), .size = bytes.size()};
}

std::string sample(std::size_t size, unsigned seed) {
    std::string out(size, '\0');
    std::minstd_rand x(seed + 1);
    for (auto& c : out) c = static_cast<char>(x() >> 8);
    return out;
}

task<void> drop(chunk) { co_return; }

task<void> pull(registry::client& c, oci::reference ref) {
    const auto image = co_await c.fetch_image(ref, oci::parse_platform("linux/amd64"));
    std::vector<task<void>> all;
    const auto one = [](registry::client& from, oci::reference r, oci::descriptor d) -> task<void> { co_await from.fetch_blob(r, d, drop); };
    for (const auto& layer : image.parsed.layers) all.push_back(one(c, ref, layer));
    co_await when_all(std::move(all));
}

/// Until the server has seen all sockets go, or for ten seconds.
task<bool> all_gone(runtime& rt, const fake_registry& r) {
    for (int i = 0; i < 1000 && r.open_sockets() != 0; ++i) co_await sleep_for(10ms);
    (void)rt;
    co_return r.open_sockets() == 0;
}

}  // namespace

// O-RG-17: 12 layers on each of 3 images at once.
CO_TEST_CASE(three_images_of_twelve_layers) {
    fake_registry r;
    for (unsigned i = 0; i < 3; ++i) {
        std::vector<std::string> layers;
        for (unsigned l = 0; l < 12; ++l) layers.push_back(sample(30'000 + l, i * 100 + l));
        r.add_image(cat("image", i), "1", layers);
    }
    r.add_image("late", "1", {});
    registry::client c(options_for(rt, r));
    r.hold_blobs(false);
    std::vector<task<void>> pulls;
    for (int i = 0; i < 3; ++i) pulls.push_back(pull(c, image_ref(cat("image", i, ":1"))));
    co_await when_all(std::move(pulls));
    BOOST_TEST(r.peak_sockets() <= 5U);
    BOOST_TEST(c.peak_sockets("registry.test") <= 5U);
    BOOST_TEST(r.count("GET", "/blobs/") == 3U * 13U);
    // Metadata never waits behind layers: all transfers stand still, a tag is answered all the same.
    r.hold_blobs(true);
    task_group group(co_await current_executor);
    const auto first = co_await c.fetch_manifest(image_ref("image0:1"), (co_await c.resolve(image_ref("image0:1"))).target);
    for (const auto& layer : oci::parse_manifest(first.bytes).layers) {
        const auto one = [](registry::client& from, oci::descriptor d) -> task<void> { co_await from.fetch_blob(image_ref("image0:1"), d, drop); };
        group.spawn(one(c, layer));
    }
    co_await rt.pool().run([&] { r.wait_for_blob_transfers(4); });
    BOOST_TEST((co_await c.resolve(image_ref("late:1"))).host == r.host());
    BOOST_TEST(c.open_sockets("registry.test") == 5U);
    r.hold_blobs(false);
    co_await group.join();
    BOOST_TEST(r.peak_sockets() <= 5U);
    co_await c.close();
    BOOST_TEST(c.open_sockets("registry.test") == 0U);
    BOOST_TEST(co_await all_gone(rt, r));
}

// O-RG-18: the limit holds for pull and push alike.
CO_TEST_CASE(a_limit_of_two_holds_on_every_path) {
    fake_registry r;
    std::vector<std::string> layers;
    for (unsigned l = 0; l < 8; ++l) layers.push_back(sample(20'000, l));
    r.add_image("a", "1", layers);
    registry::client c(options_for(rt, r, 2));
    co_await pull(c, image_ref("a:1"));
    std::vector<task<void>> pushes;
    const auto push = [](registry::client& to, std::string bytes) -> task<void> {
        const auto d = describe_blob(bytes);
        const auto open = [bytes]() { return [](std::string b) -> task<http::body_source> { co_return http::memory_body(std::move(b)); }(bytes); };
        co_await to.push_blob(image_ref("b:1"), d, open);
    };
    for (unsigned l = 100; l < 108; ++l) pushes.push_back(push(c, sample(20'000, l)));
    co_await when_all(std::move(pushes));
    BOOST_TEST(r.peak_sockets() <= 3U);  // two, and the one for metadata
    BOOST_TEST(c.peak_sockets("registry.test") <= 3U);
    co_await c.close();
}

// O-RG-16: a copy has to fetch while it pushes, on one connection.
CO_TEST_CASE(a_copy_within_one_registry_and_a_limit_of_one) {
    for (const std::size_t limit : {1U, 4U}) {
        fake_registry r;
        std::vector<std::string> layers;
        for (unsigned l = 0; l < 6; ++l) layers.push_back(sample(50'000, l));
        const auto image = r.add_image("a", "1", layers);
        r.on_request([](const fake_request& q) -> std::optional<fake_response> {
            if (q.query.contains("mount")) return fake_response{.status = 401, .headers = {{"WWW-Authenticate", "Basic realm=\"x\""}}};
            if (q.method == "HEAD" && q.path.find("/b/blobs/") != std::string::npos) return fake_response{.status = 404};
            return std::nullopt;
        });
        auto o = options_for(rt, r, limit);
        registry::client c(std::move(o));
        std::size_t uploaded = 0;
        registry::copy_options copying;
        copying.done = [&](const oci::descriptor&, registry::push_outcome how) { uploaded += how == registry::push_outcome::uploaded ? 1 : 0; };
        const auto root = co_await c.copy(image_ref("a:1"), image_ref("b:2"), copying);
        BOOST_TEST(root.digest.str() == image.manifest_digest);
        BOOST_TEST(uploaded == 8U);  // six layers, config, manifest
        BOOST_TEST((co_await c.resolve(image_ref("b:2"))).target.digest.str() == image.manifest_digest);
        BOOST_TEST(c.peak_sockets("registry.test") <= limit + 1);
        co_await c.close();
    }
}

// Cancelled anywhere, nothing is lost: afterwards the whole limit is there and no socket is left.
CO_TEST_CASE(a_thousand_random_cancellations) {
    fake_registry r;
    std::vector<std::string> layers;
    for (unsigned l = 0; l < 3; ++l) layers.push_back(sample(40'000, l));
    r.add_image("a", "1", layers);
    registry::client c(options_for(rt, r));
    std::minstd_rand random(20261125);
    const auto cut = [](cancel_source source, nanoseconds after) -> task<void> {
        co_await sleep_for(after);
        source.cancel(error{errc::canceled, "enough"});
    };
    const auto tolerant = [](registry::client& from, cancel_token token) -> task<void> {
        try {
            co_await linked(token, pull(from, image_ref("a:1")));
        } catch (const error& e) {
            if (e.kind() != errc::canceled) throw;
        }
    };
    for (int round = 0; round < 250; ++round) {
        std::vector<task<void>> all;
        for (int i = 0; i < 4; ++i) {
            cancel_source source;
            all.push_back(tolerant(c, source.token()));
            all.push_back(cut(source, std::chrono::microseconds(random() % 4000)));
        }
        co_await when_all(std::move(all));
    }
    BOOST_TEST(c.peak_sockets("registry.test") <= 5U);
    // All four transfers and the metadata connection are still to be had.
    r.hold_blobs(true);
    task_group group(co_await current_executor);
    const auto one = [](registry::client& from, oci::descriptor d) -> task<void> { co_await from.fetch_blob(image_ref("a:1"), d, drop); };
    for (int i = 0; i < 4; ++i) group.spawn(one(c, describe_blob(layers[static_cast<std::size_t>(i) % layers.size()])));
    co_await rt.pool().run([&] { r.wait_for_blob_transfers(4); });
    co_await c.resolve(image_ref("a:1"));
    r.hold_blobs(false);
    co_await group.join();
    co_await c.close();
    BOOST_TEST(c.open_sockets("registry.test") == 0U);
    BOOST_TEST(co_await all_gone(rt, r));
}

// O-RG-13 over a link that delays every piece and cuts every connection: each layer is taken up where it broke.
CO_TEST_CASE(a_pull_over_a_link_that_cuts_connections) {
    fake_registry r;
    std::vector<std::string> layers;
    for (unsigned l = 0; l < 6; ++l) layers.push_back(sample(1'500'000, l));
    r.add_image("a", "1", layers);
    test::relay link(r.port(), {.cut_after = 600'000, .delay = 1ms});
    auto o = options_for(rt, r);
    o.hosts = [port = link.port()](std::string_view) {
        return std::vector<registry::host_settings>{{.host = cat("127.0.0.1:", port), .plain_http = true}};
    };
    registry::client c(std::move(o));
    std::vector<std::string> got(layers.size());
    std::vector<task<void>> all;
    const auto one = [](registry::client& from, oci::descriptor d, std::string* into) -> task<void> {
        co_await from.fetch_blob(image_ref("a:1"), d, [into](chunk part) -> task<void> {
            into->append(text_of(part));
            co_return;
        });
    };
    for (std::size_t i = 0; i < layers.size(); ++i) all.push_back(one(c, describe_blob(layers[i]), &got[i]));
    co_await when_all(std::move(all));
    BOOST_TEST((got == layers));
    std::size_t resumed = 0;
    for (const auto& q : r.requests()) resumed += q.headers.contains("range") ? 1 : 0;
    BOOST_TEST(resumed >= layers.size());
    BOOST_TEST(c.peak_sockets("registry.test") <= 5U);
    co_await c.close();
}

CO_TEST_CASE(new_hosts_are_asked_after_a_reload_and_sockets_are_counted_on) {
    fake_registry before, after;
    const auto slow = sample(1 << 20, 1);
    const auto image = before.add_image("a", "1", {slow});
    after.add_image("a", "1", {sample(1000, 2)});
    registry::client c(options_for(rt, before));
    const auto old = (co_await c.resolve(image_ref("a:1"))).target.digest;
    BOOST_TEST(old.str() == image.manifest_digest);
    // A transfer under way ends where it began.
    before.hold_blobs(true);
    std::string host;
    task_group group(co_await current_executor);
    const auto fetch = [](registry::client& from, oci::descriptor what, std::string* served) -> task<void> {
        *served = co_await from.fetch_blob(image_ref("a:1"), what, drop);
    };
    group.spawn(fetch(c, describe_blob(slow), &host));
    co_await rt.pool().run([&] { before.wait_for_blob_transfers(1); });
    co_await c.reload([to = after.host()](std::string_view) { return std::vector<registry::host_settings>{{.host = to, .plain_http = true}}; });
    const auto fresh = co_await c.resolve(image_ref("a:1"));
    BOOST_TEST(fresh.host == after.host());
    BOOST_TEST((fresh.target.digest != old));
    BOOST_TEST(c.open_sockets("registry.test") == 2U);  // the one of the transfer too
    before.hold_blobs(false);
    co_await group.join();
    BOOST_TEST(host == before.host());
    co_await c.close();
}

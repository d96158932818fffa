#include "support/support.hpp"

#include <cstdint>
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

registry::options options_for(runtime& rt, const fake_registry& r) {
    return {.executor = rt.get_executor(),
            .pool = &rt.pool(),
            .hosts = [host = r.host()](std::string_view) { return std::vector<registry::host_settings>{{.host = host, .plain_http = true}}; },
            .retry = {.attempts = 3, .first_wait = 1ms, .longest_wait = 2ms}};
}

const auto name = oci::reference::parse("registry.test/a:1");

oci::descriptor describe_blob(std::string_view bytes) {
    return {.media_type = std::string(oci::media::oci_layer), .digest = digest::of(bytes), .size = bytes.size()};
}

std::string sample(std::size_t size) {
    std::string out(size, '\0');
    unsigned x = 1;
    for (auto& c : out) c = static_cast<char>((x = x * 1664525 + 1013904223) >> 24);
    return out;
}

registry::blob_sink into(std::string& out) {
    return [&out](chunk c) -> task<void> {
        out.append(text_of(c));
        co_return;
    };
}

}  // namespace

CO_TEST_CASE(a_blob_arrives_whole) {
    fake_registry r;
    const auto bytes = sample(3'000'001);
    r.add_blob(bytes);
    for (const bool chunked : {false, true}) {
        r.on_request([&](const fake_request& q) -> std::optional<fake_response> {
            if (chunked && q.path.find("/blobs/") != std::string::npos) return fake_response{.body = bytes, .chunked = true};
            return std::nullopt;
        });
        registry::client c(options_for(rt, r));
        std::string got;
        std::uint64_t told = 0;
        registry::fetch_options o{.call = {.progress = [&](std::uint64_t n) { told += n; }}};
        BOOST_TEST((co_await c.fetch_blob(name, describe_blob(bytes), into(got), o)) == r.host());
        BOOST_TEST((got == bytes));
        BOOST_TEST(told == bytes.size());
        BOOST_TEST(c.open_sockets("registry.test") == 1U);  // kept for the next one
        co_await c.close();
        BOOST_TEST(c.open_sockets("registry.test") == 0U);
    }
}

// O-RG-13
CO_TEST_CASE(a_broken_body_is_taken_up_where_it_broke) {
    for (const bool ranges : {true, false}) {
        fake_registry r({.ranges = ranges});
        const auto bytes = sample(1'000'000);
        r.add_blob(bytes);
        int breaks = 2;
        r.on_request([&](const fake_request& q) -> std::optional<fake_response> {
            if (q.path.find("/blobs/") == std::string::npos || breaks-- <= 0) return std::nullopt;
            std::size_t from = 0;
            fake_response a;
            if (const auto range = q.headers.find("range"); ranges && range != q.headers.end()) {
                from = std::stoull(range->second.substr(6));
                a.status = 206;
                a.headers.emplace_back("Content-Range", cat("bytes ", from, "-999999/1000000"));
            }
            a.body = bytes.substr(from);
            a.cut_after = a.body.size() * 6 / 10;
            return a;
        });
        registry::client c(options_for(rt, r));
        std::string got;
        co_await c.fetch_blob(name, describe_blob(bytes), into(got));
        BOOST_TEST((got == bytes));
        BOOST_TEST(r.count("GET") == 3U);
        if (ranges) BOOST_TEST(r.requests().at(1).headers.contains("range"));
        co_await c.close();
    }
}

CO_TEST_CASE(tries_are_limited) {
    fake_registry r;
    const auto bytes = sample(1000);
    r.on_request([&](const fake_request&) { return fake_response{.body = bytes, .cut_after = 0}; });
    registry::client c(options_for(rt, r));
    std::string got;
    const auto e = co_await failure(c.fetch_blob(name, describe_blob(bytes), into(got)));
    BOOST_TEST((e.kind() == errc::unavailable));
    BOOST_TEST(says(e, "closed the connection after 0 of 1000 bytes"));
    BOOST_TEST(r.count("GET") == 3U);
    co_await c.close();
}

// O-RG-14
CO_TEST_CASE(a_wrong_declared_size_is_explained) {
    fake_registry r;
    const auto bytes = sample(1000);
    r.add_blob(bytes);
    auto wrong = describe_blob(bytes);
    wrong.size = 1001;
    registry::client c(options_for(rt, r));
    std::string got;
    const auto e = co_await failure(c.fetch_blob(name, wrong, into(got)));
    BOOST_TEST((e.kind() == errc::corrupt));
    BOOST_TEST(says(e, cat("blob ", wrong.digest.str(), " from ", r.host(), ": 1001 bytes were declared in the manifest, 1000 came")));
    r.on_request([&](const fake_request&) { return fake_response{.body = sample(5000), .chunked = true}; });
    BOOST_TEST(says(co_await failure(c.fetch_blob(name, wrong, into(got))), "1001 bytes were declared"));
    co_await c.close();
}

CO_TEST_CASE(wrong_bytes_are_found) {
    fake_registry r;
    auto bytes = sample(1000);
    const auto wanted = describe_blob(bytes);
    bytes[500] ^= 1;
    r.on_request([&](const fake_request&) { return fake_response{.body = bytes}; });
    registry::client c(options_for(rt, r));
    std::string got;
    const auto e = co_await failure(c.fetch_blob(name, wanted, into(got)));
    BOOST_TEST((e.kind() == errc::corrupt));
    BOOST_TEST(says(e, digest::of(bytes).str()));
    // The receiver checks: then it is its business.
    got.clear();
    co_await c.fetch_blob(name, wanted, into(got), {.verify = false});
    BOOST_TEST((got == bytes));
    co_await c.close();
}

// O-RG-12
CO_TEST_CASE(a_login_does_not_follow_a_redirect_to_another_origin) {
    fake_registry r, storage;
    const auto bytes = sample(1000);
    r.add_blob(bytes);
    storage.on_request(
        [&](const fake_request& q) { return q.headers.contains("authorization") ? fake_response{.status = 400} : fake_response{.body = bytes}; });
    std::string to = cat("http://", storage.host(), "/signed?x=y");
    r.on_request([&](const fake_request& q) -> std::optional<fake_response> {
        if (!q.headers.contains("authorization")) return fake_response{.status = 401, .headers = {{"WWW-Authenticate", "Basic realm=\"r\""}}};
        if (q.path.find("/blobs/") != std::string::npos) return fake_response{.status = 307, .headers = {{"Location", to}}};
        return std::nullopt;
    });
    auto o = options_for(rt, r);
    o.who.credentials = [](std::string) -> task<std::optional<registry::credential>> {
        co_return registry::credential{.username = "u", .secret = "p"};
    };
    registry::client c(o);
    std::string got;
    co_await c.fetch_blob(name, describe_blob(bytes), into(got));
    BOOST_TEST((got == bytes));
    BOOST_TEST(storage.requests().at(0).path == "/signed");
    BOOST_TEST(!storage.requests().at(0).headers.contains("authorization"));
    // Within one origin it stays.
    r.forget_requests();
    to = "/elsewhere";
    r.on_request([&](const fake_request& q) -> std::optional<fake_response> {
        if (!q.headers.contains("authorization")) return fake_response{.status = 401, .headers = {{"WWW-Authenticate", "Basic realm=\"r\""}}};
        if (q.path.find("/blobs/") != std::string::npos) return fake_response{.status = 307, .headers = {{"Location", to}}};
        return fake_response{.body = bytes};
    });
    got.clear();
    co_await c.fetch_blob(name, describe_blob(bytes), into(got));
    BOOST_TEST(r.requests().back().path == "/elsewhere");
    co_await c.close();
}

CO_TEST_CASE(redirects_without_end) {
    fake_registry r;
    r.on_request([](const fake_request& q) { return fake_response{.status = 302, .headers = {{"Location", q.path}}}; });
    registry::client c(options_for(rt, r));
    std::string got;
    BOOST_TEST(says(co_await failure(c.fetch_blob(name, describe_blob("x"), into(got))), "redirects more than 10 times"));
    co_await c.close();
}

// O-RG-17
CO_TEST_CASE(never_more_sockets_than_allowed) {
    fake_registry r;
    std::vector<std::string> layers;
    for (int i = 0; i < 20; ++i) layers.push_back(sample(20'000 + static_cast<std::size_t>(i)));
    for (const auto& l : layers) r.add_blob(l);
    for (int i = 0; i < 20; ++i) r.add_image(cat("image", i), "1", {layers[static_cast<std::size_t>(i)]});
    registry::client c(options_for(rt, r));
    r.hold_blobs(true);
    task_group group(co_await current_executor);
    std::vector<std::string> got(layers.size());
    const auto pull = [&](std::size_t i) -> task<void> {
        const auto image = oci::reference::parse(cat("registry.test/image", i, ":1"));
        const auto content = co_await c.fetch_image(image, oci::parse_platform("linux/amd64"));
        co_await c.fetch_blob(image, content.parsed.layers.at(0), into(got[i]));
    };
    for (std::size_t i = 0; i < layers.size(); ++i) group.spawn(pull(i));
    co_await rt.pool().run([&] { r.wait_for_blob_transfers(1); });
    r.hold_blobs(false);
    co_await group.join();
    BOOST_TEST((got == layers));
    BOOST_TEST(r.peak_sockets() <= 5U);
    BOOST_TEST(c.peak_sockets("registry.test") <= 5U);
    BOOST_TEST(r.peak_blob_transfers() <= 5U);  // four layers, and a config on the metadata connection
    co_await c.close();
}

CO_TEST_CASE(metadata_passes_busy_transfers_and_a_cancelled_one_gives_its_slot_back) {
    fake_registry r;
    const auto bytes = sample(100'000);
    r.add_blob(bytes);
    r.add_image("a", "1", {});
    registry::client c(options_for(rt, r));
    r.hold_blobs(true);
    {
        task_group group(co_await current_executor);
        std::vector<std::string> got(6);
        const auto pull = [&](std::size_t i) -> task<void> { co_await c.fetch_blob(name, describe_blob(bytes), into(got[i])); };
        for (std::size_t i = 0; i < got.size(); ++i) group.spawn(pull(i));
        co_await rt.pool().run([&] { r.wait_for_blob_transfers(4); });
        BOOST_TEST((co_await c.resolve(name)).host == r.host());
        group.cancel();
        std::exception_ptr ignored;
        try {
            co_await group.join();
        } catch (...) {
            ignored = std::current_exception();
        }
    }
    r.hold_blobs(false);
    std::string got;
    co_await c.fetch_blob(name, describe_blob(bytes), into(got));
    BOOST_TEST((got == bytes));
    BOOST_TEST(c.peak_sockets("registry.test") <= 5U);
    co_await c.close();
}

CO_TEST_CASE(what_the_receiver_throws_comes_through) {
    fake_registry r;
    const auto bytes = sample(1000);
    r.add_blob(bytes);
    registry::client c(options_for(rt, r));
    const auto full = [](chunk) -> task<void> {
        throw error{errc::no_space, "the disk is full"};
        co_return;
    };
    const auto e = co_await failure(c.fetch_blob(name, describe_blob(bytes), full));
    BOOST_TEST((e.kind() == errc::no_space));
    BOOST_TEST(r.count("GET") == 1U);
    co_await c.close();
}

CO_TEST_CASE(a_kept_socket_the_server_closed_is_opened_anew) {
    fake_registry r;
    const auto bytes = sample(1000);
    r.add_blob(bytes);
    registry::client c(options_for(rt, r));
    std::string got;
    unsigned answered_on = 0;
    r.on_request([&](const fake_request& q) -> std::optional<fake_response> {
        if (answered_on == q.connection) return fake_response{.no_answer = true};  // one request a socket
        answered_on = q.connection;
        return std::nullopt;
    });
    for (int i = 0; i < 3; ++i) {
        got.clear();
        co_await c.fetch_blob(name, describe_blob(bytes), into(got));
        BOOST_TEST((got == bytes));
    }
    co_await c.close();
}

// A byte now and then keeps within every limit on idleness; it is given up all the same, a bounded number of times.
CO_TEST_CASE(a_body_that_trickles_is_given_up) {
    fake_registry r;
    const auto bytes = sample(200'000);
    r.add_blob(bytes);
    r.hold_blobs(true);  // the first byte, then nothing
    auto o = options_for(rt, r);
    o.retry.slow_window = 0ns;
    registry::client c(std::move(o));
    std::string got;
    const auto e = co_await failure(c.fetch_blob(name, describe_blob(bytes), into(got)));
    r.hold_blobs(false);
    BOOST_TEST((e.kind() == errc::timed_out));
    BOOST_TEST(says(e, cat("blob ", digest::of(bytes).str(), " from ", r.host(), " comes too slowly")));
    BOOST_TEST(r.count("GET") == 3U);
    co_await c.close();
}

CO_TEST_CASE(a_coding_nobody_asked_for_is_named) {
    fake_registry r;
    const auto bytes = sample(100);
    r.on_request([&](const fake_request&) { return fake_response{.headers = {{"Content-Encoding", "gzip"}}, .body = bytes}; });
    registry::client c(options_for(rt, r));
    std::string got;
    const auto e = co_await failure(c.fetch_blob(name, describe_blob(bytes), into(got)));
    BOOST_TEST((e.kind() == errc::corrupt));
    BOOST_TEST(says(e, "comes with Content-Encoding \"gzip\", which nobody asked for"));
    BOOST_TEST(got.empty());
    co_await c.close();
}

CO_TEST_CASE(an_endless_body_ends_at_the_declared_size) {
    fake_registry r;
    const auto bytes = sample(1000);
    const std::string endless(5'000'000, 'e');
    r.on_request([&](const fake_request&) { return fake_response{.body = endless, .chunked = true}; });
    registry::client c(options_for(rt, r));
    std::string got;
    const auto e = co_await failure(c.fetch_blob(name, describe_blob(bytes), into(got)));
    BOOST_TEST((e.kind() == errc::corrupt));
    BOOST_TEST(says(e, "1000 bytes were declared in the manifest, 1001 came"));
    BOOST_TEST(got.size() <= bytes.size());
    co_await c.close();
}

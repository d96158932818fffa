// A large blob in parts over several connections.
#include "support/support.hpp"

#include <atomic>
#include <set>

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

constexpr std::uint64_t part = 64 << 10;

/// Splits as soon as it may, however fast the network is.
registry::options options_for(runtime& rt, const fake_registry& r) {
    return {.executor = rt.get_executor(),
            .pool = &rt.pool(),
            .hosts = [host = r.host()](std::string_view) { return std::vector<registry::host_settings>{{.host = host, .plain_http = true}}; },
            .retry = {.attempts = 3, .first_wait = 1ms, .longest_wait = 2ms},
            .split = {.part = part, .waiting_percent = 0}};
}

const auto name = oci::reference::parse("registry.test/a:1");

oci::descriptor describe_blob(std::string_view bytes) {
    return {.media_type = std::string(oci::media::oci_layer), .digest = digest::of(bytes), .size = bytes.size()};
}

std::string sample(std::size_t size, unsigned x = 1) {
    std::string out(size, '\0');
    for (auto& c : out) c = static_cast<char>((x = x * 1664525 + 1013904223) >> 24);
    return out;
}

registry::blob_sink into(std::string& out) {
    return [&out](chunk c) -> task<void> {
        out.append(text_of(c));
        co_return;
    };
}

registry::fetch_options in_small_pieces() { return {.chunk_size = 16 << 10}; }

std::size_t ranges_asked(const fake_registry& r) {
    std::size_t n = 0;
    for (const auto& q : r.requests()) n += q.headers.contains("range") ? 1 : 0;
    return n;
}

}  // namespace

CO_TEST_CASE(the_rest_comes_in_parts_and_in_order) {
    fake_registry r;
    const auto bytes = sample(20 * part + 777);
    r.add_blob(bytes);
    registry::client c(options_for(rt, r));
    std::string got;
    std::uint64_t told = 0;
    auto o = in_small_pieces();
    o.call.progress = [&](std::uint64_t n) { told += n; };
    BOOST_TEST((co_await c.fetch_blob(name, describe_blob(bytes), into(got), o)) == r.host());
    BOOST_TEST((got == bytes));
    BOOST_TEST(told == bytes.size());
    BOOST_TEST(ranges_asked(r) >= 19U);
    std::set<unsigned> connections;
    for (const auto& q : r.requests()) connections.insert(q.connection);
    BOOST_TEST(connections.size() == 5U);  // the one that was stopped in the middle, and four
    BOOST_TEST(c.peak_sockets("registry.test") <= 4U);
    co_await c.close();
    BOOST_TEST(c.open_sockets("registry.test") == 0U);
}

CO_TEST_CASE(in_one_piece_where_the_server_or_the_size_is_not_for_parts) {
    for (const bool ranges : {true, false}) {
        fake_registry r({.ranges = ranges});
        const auto bytes = sample(ranges ? 3 * part : 20 * part);
        r.add_blob(bytes);
        registry::client c(options_for(rt, r));
        std::string got;
        co_await c.fetch_blob(name, describe_blob(bytes), into(got), in_small_pieces());
        BOOST_TEST((got == bytes));
        BOOST_TEST(r.count("GET") == 1U);
        co_await c.close();
    }
}

// A receiver that is slower than the network gains nothing.
CO_TEST_CASE(in_one_piece_for_a_slow_receiver) {
    fake_registry r;
    const auto bytes = sample(20 * part);
    r.add_blob(bytes);
    auto o = options_for(rt, r);
    o.split.waiting_percent = 101;
    registry::client c(std::move(o));
    std::string got;
    co_await c.fetch_blob(name, describe_blob(bytes), into(got), in_small_pieces());
    BOOST_TEST((got == bytes));
    BOOST_TEST(r.count("GET") == 1U);
    co_await c.close();
}

CO_TEST_CASE(a_part_that_fails_leaves_the_blob_to_one_connection) {
    enum class fault { cut, refused, another_range, whole };
    for (const auto kind : {fault::cut, fault::refused, fault::another_range, fault::whole}) {
        fake_registry r;
        const auto bytes = sample(20 * part);
        r.add_blob(bytes);
        std::atomic<int> parts = 0;
        r.on_request([&](const fake_request& q) -> std::optional<fake_response> {
            const auto range = q.headers.find("range");
            if (range == q.headers.end() || range->second.ends_with("-") || ++parts < 5) return std::nullopt;
            switch (kind) {
                case fault::cut: {
                    const auto first = std::stoull(range->second.substr(6));
                    return fake_response{.status = 206,
                                         .headers = {{"Content-Range", cat("bytes ", first, '-', first + part - 1, '/', bytes.size())}},
                                         .body = bytes.substr(first, part),
                                         .cut_after = 1000};
                }
                case fault::refused: return fake_response{.status = 416};
                case fault::another_range:
                    return fake_response{.status = 206, .headers = {{"Content-Range", cat("bytes 0-9/", bytes.size())}}, .body = bytes.substr(0, 10)};
                case fault::whole: return fake_response{.body = bytes};
            }
            return std::nullopt;
        });
        registry::client c(options_for(rt, r));
        std::string got;
        co_await c.fetch_blob(name, describe_blob(bytes), into(got), in_small_pieces());
        BOOST_TEST((got == bytes), static_cast<int>(kind));
        BOOST_TEST(parts >= 5);
        BOOST_TEST(c.peak_sockets("registry.test") <= 5U);
        co_await c.close();
        BOOST_TEST(c.open_sockets("registry.test") == 0U);
    }
}

CO_TEST_CASE(what_the_receiver_throws_ends_it) {
    fake_registry r;
    const auto bytes = sample(20 * part);
    r.add_blob(bytes);
    registry::client c(options_for(rt, r));
    std::uint64_t came = 0;
    const auto full = [&](chunk data) -> task<void> {
        if ((came += data.size()) > 4 * part) throw error{errc::no_space, "the disk is full"};
        co_return;
    };
    const auto e = co_await failure(c.fetch_blob(name, describe_blob(bytes), full, in_small_pieces()));
    BOOST_TEST((e.kind() == errc::no_space));
    BOOST_TEST(came < 6 * part);
    co_await c.close();
    BOOST_TEST(c.open_sockets("registry.test") == 0U);
}

// O-RG-17 holds for parts too, and blobs that wait their turn get it.
CO_TEST_CASE(parts_leave_connections_to_others) {
    fake_registry r;
    std::vector<std::string> blobs, got(9);
    for (unsigned i = 0; i < got.size(); ++i) blobs.push_back(sample(12 * part, i + 1));
    for (const auto& b : blobs) r.add_blob(b);
    registry::client c(options_for(rt, r));
    std::vector<task<void>> all;
    const auto one = [](registry::client& from, oci::descriptor what, std::string* to) -> task<void> {
        co_await from.fetch_blob(name, what, into(*to), in_small_pieces());
    };
    for (std::size_t i = 0; i < got.size(); ++i) all.push_back(one(c, describe_blob(blobs[i]), &got[i]));
    co_await when_all(std::move(all));
    BOOST_TEST((got == blobs));
    BOOST_TEST(c.peak_sockets("registry.test") <= 5U);
    BOOST_TEST(r.peak_sockets() <= 5U);
    co_await c.close();
}

CO_TEST_CASE(cancelled_parts_leave_nothing) {
    fake_registry r;
    const auto bytes = sample(40 * part);
    r.add_blob(bytes);
    registry::client c(options_for(rt, r));
    for (int i = 0; i < 20; ++i) {
        task_group group(co_await current_executor);
        std::uint64_t came = 0;
        const auto count = [&](chunk data) -> task<void> {
            came += data.size();
            if (came > part * (2 + static_cast<unsigned>(i))) group.cancel();
            co_return;
        };
        const auto run = [](registry::client& from, oci::descriptor what, registry::blob_sink to) -> task<void> {
            co_await from.fetch_blob(name, what, std::move(to), in_small_pieces());
        };
        group.spawn(run(c, describe_blob(bytes), count));
        const auto e = co_await failure(group.join());
        BOOST_TEST((e.kind() == errc::canceled));
    }
    std::string got;
    co_await c.fetch_blob(name, describe_blob(bytes), into(got), in_small_pieces());
    BOOST_TEST((got == bytes));
    co_await c.close();
    BOOST_TEST(c.open_sockets("registry.test") == 0U);
}

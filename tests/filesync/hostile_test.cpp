// Peers that break the protocol, files that change, and being cancelled.
#include "support/support.hpp"

#include <unistd.h>

#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import cobuild.filesync;

#include "rig.hpp"
#include "support/failure.hpp"

using namespace cobuild;
using namespace cobuild::test;
using namespace cobuild::filesync;
namespace stdfs = std::filesystem;

namespace {
using list = std::vector<std::string>;

packet file(std::string path, std::int64_t size = 0) { return {.stat = file_stat{.path = std::move(path), .mode = 0644, .size = size}}; }
packet dir(std::string path) { return {.stat = file_stat{.path = std::move(path), .mode = go_mode::dir | 0755}}; }
packet hard_link(std::string path, std::string to) { return {.stat = file_stat{.path = std::move(path), .mode = 0644, .link = std::move(to)}}; }
packet sym_link(std::string path, std::string to) {
    return {.stat = file_stat{.path = std::move(path), .mode = go_mode::symlink | 0777, .link = std::move(to)}};
}
packet data(std::uint32_t id, std::string_view bytes) { return {.type = packet_type::data, .id = id, .data = bytes}; }

/// Writes the packets whatever comes back.
async::task<void> say(std::shared_ptr<memory_stream> s, std::vector<packet> packets) {
    for (const auto& p : packets) co_await s->write(encode(p));
    s->close();
}
async::task<void> hear(std::shared_ptr<memory_stream> s, list* out) {
    for (;;) {
        const auto m = co_await s->read();
        if (!m) co_return;
        const packet p = decode(*m);
        if (p.type == packet_type::failure) {
            out->emplace_back(p.data);
            co_return;
        }
    }
}

struct told {
    error failed{errc::internal, ""};
    list heard;  ///< by the peer
};
async::task<void> fail_into(async::task<received> t, std::shared_ptr<memory_stream> s, error* out) {
    *out = co_await failure(std::move(t));
    s->close();
}
async::task<told> receive_from(async::blocking_pool& pool, std::vector<packet> packets, std::shared_ptr<const fs::root> to, receive_options o = {}) {
    const auto [peer, ours] = connection();
    told out;
    std::vector<async::task<void>> all;
    all.push_back(say(peer, std::move(packets)));
    all.push_back(hear(peer, &out.heard));
    all.push_back(fail_into(receive(ours, pool, std::move(to), std::move(o)), ours, &out.failed));
    co_await async::when_all(std::move(all));
    co_return out;
}
async::task<error> send_to(async::blocking_pool& pool, std::vector<packet> packets, std::shared_ptr<const fs::root> from) {
    const auto [ours, peer] = connection();
    list heard;
    std::vector<async::task<void>> all;
    std::vector<tree> trees{{.root = std::move(from)}};
    co_await say(peer, std::move(packets));
    async::task_group hearing(co_await async::current_executor);
    hearing.spawn(hear(peer, &heard));
    const error e = co_await failure(send(ours, pool, std::move(trees)));
    ours->close();
    co_await hearing.join();
    co_return e;
}
}  // namespace

CO_TEST_CASE(senders_that_break_the_rules) {
    const packet end{};
    const packet set{.stat = file_stat{.path = "d", .mode = go_mode::dir | go_mode::symlink}};
    const packet negative = file("f", -1);
    const struct {
        std::vector<packet> packets;
        std::string_view says;
    } cases[] = {
        {{file("")}, "an empty path"},
        {{file("/etc")}, "absolute"},
        {{file("..")}, "leads out"},
        {{dir("a"), file("a/../../x")}, "leads out"},
        {{dir("a"), file("a/./x")}, "not a clean path"},
        {{dir("a/")}, "not a clean path"},
        {{file("a\0b" + std::string(1, '\0'))}, "NUL"},
        {{file(std::string(256, 'n'))}, "more than 255"},
        {{file(std::string(5000, 'p'))}, "more than 4095"},
        {{file("b"), file("a")}, "out of order"},
        {{file("a"), file("a")}, "out of order"},
        {{file("x/y")}, "whose directory"},
        {{file("x"), file("x/y")}, "whose directory"},
        {{sym_link("x", "/etc"), file("x/y")}, "whose directory"},
        {{dir("a"), file("a/f"), file("b"), file("a/g")}, "whose directory"},
        {{dir("foo"), file("foo-bar"), file("foo/x")}, "whose directory"},
        {{hard_link("b", "a")}, "hard link"},
        {{sym_link("a", "/etc/passwd"), hard_link("b", "a")}, "hard link"},
        {{hard_link("b", "../x")}, "hard link"},
        {{sym_link("a", "")}, "link to nothing"},
        {{set}, "unknown type"},
        {{negative}, "negative"},
        {{file("a", 3), end, data(0, "abc"), data(7, "x")}, "not asked for"},
        {{file("a"), end, data(0, "x")}, "after it was told"},
        {{file("a", 3), data(0, "abc")}, "not asked for"},
        {{end, file("a")}, "after it was told"},
        {{file("a", 1), end, file("b")}, "after the last"},
        {{file("a", 1), {.type = packet_type::fin}}, "only a receiver"},
        {{{.type = packet_type::request, .id = 0}}, "only a receiver"},
        {{{.type = packet_type::failure, .data = "disk on fire"}}, "disk on fire"},
        {{file("a")}, "in the middle"},
        {{}, "in the middle"},
    };
    for (const auto& c : cases) {
        scratch_dir d;
        const auto to = root_of(d / "to");
        const auto t = co_await receive_from(rt.pool(), c.packets, to);
        BOOST_TEST(says(t.failed, c.says), c.says << ": " << t.failed.what());
        BOOST_TEST((t.failed.kind() == errc::corrupt || t.failed.kind() == errc::unavailable || t.failed.kind() == errc::io));
        if (c.says != "disk on fire") BOOST_TEST(t.heard == list{t.failed.what()}, boost::test_tools::per_element());
        BOOST_TEST(names(*root_of(d.path())).front() == "to");
        for (const auto& n : names(*to)) BOOST_TEST(n.find(".cobuild-") == std::string::npos, n);
    }
}

CO_TEST_CASE(limits_are_kept) {
    scratch_dir d;
    const auto to = root_of(d / "to");
    const packet end{};
    BOOST_TEST(
        says((co_await receive_from(rt.pool(), {file("a"), file("b"), file("c"), end}, to, {.max = {.entries = 2}})).failed, "one more than the 2"));
    BOOST_TEST(says((co_await receive_from(rt.pool(), {file("a", 10), end}, to, {.max = {.bytes = 9}})).failed, "more than 9 bytes"));
    BOOST_TEST(says((co_await receive_from(rt.pool(), {file("abc"), file("abd"), end}, to, {.max = {.all_paths = 5}})).failed, "over 5 bytes"));
    BOOST_TEST(says((co_await receive_from(rt.pool(), {file(std::string(200, 'x'))}, to, {.max = {.packet_bytes = 100}})).failed, "more than 100"));
    const auto e = (co_await receive_from(rt.pool(), {end}, to, {.metadata_only = true})).failed;
    BOOST_TEST((e.kind() == errc::unsupported));
}

CO_TEST_CASE(receivers_that_break_the_rules) {
    scratch_dir d;
    const auto from = root_of(d / "from");
    write_file(d / "from/dir/f", "x");
    const packet dir_wanted{.type = packet_type::request, .id = 0};
    BOOST_TEST(says(co_await send_to(rt.pool(), {{.type = packet_type::request, .id = 9}}, from), "number 9"));
    BOOST_TEST(says(co_await send_to(rt.pool(), {dir_wanted}, from), "number 0"));
    BOOST_TEST(says(co_await send_to(rt.pool(), {data(1, "x")}, from), "only a sender"));
    BOOST_TEST(says(co_await send_to(rt.pool(), {}, from), "before it had all"));
    const auto e = co_await send_to(rt.pool(), {{.type = packet_type::failure, .data = "no space left"}}, from);
    BOOST_TEST(says(e, "no space left"));
    BOOST_TEST((e.kind() == errc::io));
}

// What is announced and what can be read differ: the map runs between the two.
CO_TEST_CASE(files_that_change_while_they_are_sent) {
    for (const auto& [how, words] :
         std::map<std::string, std::string>{{"grow", "grew"}, {"shrink", "shrank"}, {"vanish", "gone"}, {"link", "link"}}) {
        scratch_dir d;
        const auto from = root_of(d / "from");
        const auto to = root_of(d / "to");
        const auto path = d / "from/f";
        write_file(path, "content");
        send_options s;
        s.map = [&path, &act = how](file_stat&) {
            if (act == "grow") write_file(path, "content and more");
            if (act == "shrink") write_file(path, "c");
            if (act == "vanish" || act == "link") stdfs::remove(path);
            if (act == "link") stdfs::create_symlink("/etc/passwd", path);
            return true;
        };
        std::vector<tree> trees{{.root = from}};
        const auto e = co_await failure(transfer(rt.pool(), std::move(trees), to, {}, s));
        BOOST_TEST(says(e, "\"f\""));
        BOOST_TEST(says(e, words));
        BOOST_TEST(names(*to).empty());
    }
}

namespace {
async::task<void> cancel_when_half(std::shared_ptr<memory_stream> peer, async::cancel_source stop) {
    const packet first = file("large", 1000);
    const packet end{};
    co_await peer->write(encode(first));
    co_await peer->write(encode(end));
    const auto asked = co_await peer->read();
    BOOST_TEST((asked == encode({.type = packet_type::request})));
    co_await peer->write(encode(data(0, "some of it")));
    stop.cancel(error{errc::canceled, "enough"});
    const auto why = co_await peer->read();
    BOOST_TEST((decode(*why).type == packet_type::failure));
}
}  // namespace

CO_TEST_CASE(cancelled_in_the_middle) {
    scratch_dir d;
    const auto to = root_of(d / "to");
    const auto [peer, ours] = connection();
    const async::cancel_source stop;
    async::task_group group(co_await async::current_executor);
    group.spawn(cancel_when_half(peer, stop));
    const auto e = co_await failure(async::linked(stop.token(), receive(ours, rt.pool(), to)));
    co_await group.join();
    BOOST_TEST((e.kind() == errc::canceled));
    BOOST_TEST(names(*to).empty());
}

#include "support/support.hpp"

#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fsutil.pb.h"

import cobuild.base;
import cobuild.async;
import cobuild.rpc;
import cobuild.client;

#include "daemon.hpp"
#include "support/failure.hpp"

using namespace cobuild;
using namespace cobuild::test;
using namespace std::chrono_literals;
namespace stdfs = std::filesystem;
using fsutil::types::Packet;
using wire_stat = fsutil::types::Stat;

namespace {

constexpr std::uint32_t go_dir = 1U << 31, go_link = 1U << 27;

Packet packet(Packet::PacketType type, std::uint32_t id = 0, std::string data = {}) {
    Packet p;
    p.set_type(type);
    p.set_id(id);
    p.set_data(std::move(data));
    return p;
}

Packet entry(const std::string& path, std::uint32_t mode, const std::string& link = {}, std::int64_t size = 0) {
    wire_stat st;
    st.set_path(path);
    st.set_mode(mode);
    st.set_linkname(link);
    st.set_size(size);
    st.set_modtime(1'700'000'000'123'456'789);
    Packet p;
    *p.mutable_stat() = st;
    return p;
}

async::task<std::optional<Packet>> next(std::shared_ptr<rpc::stream> s) {
    const auto m = co_await s->read();
    if (!m) co_return std::nullopt;
    Packet p;
    BOOST_REQUIRE(p.ParseFromString(*m));
    co_return p;
}

struct taken {
    std::vector<wire_stat> entries;
    std::map<std::string, std::string> contents;
    rpc::status end;
};

/// What a daemon does: takes the list, asks for every regular file, says when it has all.
async::task<taken> take(std::shared_ptr<rpc::channel> daemon, rpc::metadata headers) {
    taken out;
    auto s = daemon->open("/moby.filesync.v1.FileSync/DiffCopy", std::move(headers));
    std::size_t wanted = 0, had = 0;
    bool all = false, told = false;
    while (auto p = co_await next(s)) {
        if (p->type() == Packet::PACKET_STAT && p->has_stat()) {
            const auto& st = p->stat();
            out.entries.push_back(st);
            if ((st.mode() & (go_dir | go_link)) == 0 && st.linkname().empty()) {
                ++wanted;
                co_await s->write(packet(Packet::PACKET_REQ, static_cast<std::uint32_t>(out.entries.size() - 1)).SerializeAsString());
            }
        } else if (p->type() == Packet::PACKET_STAT) {
            all = true;
        } else if (p->type() == Packet::PACKET_DATA && p->data().empty()) {
            ++had;
        } else if (p->type() == Packet::PACKET_DATA) {
            out.contents[out.entries.at(p->id()).path()] += p->data();
        } else if (p->type() == Packet::PACKET_FIN) {
            co_await s->writes_done();
        }
        if (all && had == wanted && !std::exchange(told, true)) co_await s->write(packet(Packet::PACKET_FIN).SerializeAsString());
    }
    out.end = co_await s->finish();
    co_return out;
}

std::vector<std::string> paths(const taken& t) {
    std::vector<std::string> out;
    for (const auto& e : t.entries) out.push_back(e.path());
    return out;
}

using strings = std::vector<std::string>;

}  // namespace

CO_TEST_CASE(a_directory_is_sent_in_the_protocols_order) {
    scratch_dir dir;
    stdfs::create_directories(dir / "a/sub");
    write_file(dir / "a/sub/f", std::string(600'000, 'f'));
    write_file(dir / "a.b", "");
    write_file(dir / "a/two", "two");
    stdfs::create_symlink("a/two", dir / "link");
    stdfs::create_hard_link(dir / "a/two", dir / "z");
    ::chmod((dir / "a/two").c_str(), 04750);
    lent_session s(rt, {.directories = {{"context", dir.path()}}});
    const auto t = co_await take(s.daemon, {{"dir-name", "context"}});
    BOOST_TEST(t.end.ok());
    // "/" sorts lowest: what is below "a" comes before "a.b".
    BOOST_TEST(paths(t) == (strings{"a", "a/sub", "a/sub/f", "a/two", "a.b", "link", "z"}), boost::test_tools::per_element());
    BOOST_REQUIRE(t.entries.size() == 7U);
    BOOST_TEST((t.entries[0].mode() & go_dir) != 0U);
    BOOST_TEST(t.entries[3].mode() == ((1U << 23) | 0750U));  // setuid in Go's bits
    BOOST_TEST(t.entries[5].linkname() == "a/two");
    BOOST_TEST(t.entries[6].linkname() == "a/two");
    for (const auto& e : t.entries) BOOST_TEST(e.uid() == 0U);
    BOOST_TEST((t.contents.at("a/sub/f") == std::string(600'000, 'f')));
    BOOST_TEST(t.contents.at("a/two") == "two");
    co_await s.server.stop(1s);
}

CO_TEST_CASE(patterns_and_followed_paths_choose) {
    scratch_dir dir;
    stdfs::create_directories(dir / "src/deep");
    stdfs::create_directories(dir / "real");
    for (const auto* f : {"src/deep/keep", "src/deep/drop", "src/x", "real/file", "other"}) write_file(dir / f, "x");
    stdfs::create_symlink("real", dir / "way");
    lent_session s(rt, {.directories = {{"c", dir.path()}}});
    auto t = co_await take(s.daemon,
                           {{"dir-name", "c"}, {"exclude-patterns", "src"}, {"exclude-patterns", "!src/deep/keep"}, {"include-patterns", "src"}});
    BOOST_TEST(paths(t) == (strings{"src", "src/deep", "src/deep/keep"}), boost::test_tools::per_element());
    t = co_await take(s.daemon, {{"dir-name", "c"}, {"followpaths", "way/file"}});
    BOOST_TEST(paths(t) == (strings{"real", "real/file", "way"}), boost::test_tools::per_element());
    t = co_await take(s.daemon, {{"dir-name", "c"}, {"followpaths", "src/*"}, {"exclude-patterns", "src/deep"}});
    BOOST_TEST(paths(t) == (strings{"src", "src/x"}), boost::test_tools::per_element());
    t = co_await take(s.daemon, {{"dir-name", "c"}, {"followpaths", "."}, {"exclude-patterns", "**/*"}, {"exclude-patterns", "!other"}});
    BOOST_TEST(paths(t) == (strings{"other"}), boost::test_tools::per_element());
    t = co_await take(s.daemon, {{"dir-name", "c"}, {"include-patterns", "%6fther"}, {"include-patterns-encoded", "1"}});
    BOOST_TEST(paths(t) == (strings{"other"}), boost::test_tools::per_element());
    co_await s.server.stop(1s);
}

CO_TEST_CASE(a_directory_that_was_not_lent_is_refused) {
    lent_session s(rt, {.directories = {{"context", "/"}}});
    const auto t = co_await take(s.daemon, {{"dir-name", "home"}});
    BOOST_TEST((t.end.code == rpc::code::not_found));
    BOOST_TEST(says(rpc::to_error(t.end), "no access allowed to dir \"home\""));
    co_await s.server.stop(1s);
}

namespace {

/// Sends entries and the contents asked for, as a daemon exports; returns how the client took it.
async::task<rpc::status> give(std::shared_ptr<rpc::channel> daemon, std::vector<Packet> entries, std::map<std::uint32_t, std::string> contents,
                              rpc::metadata headers = {}) {
    auto s = daemon->open("/moby.filesync.v1.FileSend/DiffCopy", std::move(headers));
    for (auto& e : entries)
        if (!co_await s->write(e.SerializeAsString())) break;
    co_await s->write(packet(Packet::PACKET_STAT).SerializeAsString());
    while (auto p = co_await next(s)) {
        if (p->type() == Packet::PACKET_REQ) {
            co_await s->write(packet(Packet::PACKET_DATA, p->id(), contents[p->id()]).SerializeAsString());
            co_await s->write(packet(Packet::PACKET_DATA, p->id()).SerializeAsString());
        } else if (p->type() == Packet::PACKET_FIN) {
            co_await s->write(packet(Packet::PACKET_FIN).SerializeAsString());
            co_await s->writes_done();
        }
    }
    co_return co_await s->finish();
}

}  // namespace

CO_TEST_CASE(a_result_is_merged_into_a_directory) {
    scratch_dir dir;
    write_file(dir / "kept", "mine");
    write_file(dir / "old", "longer than what comes");
    client::target t;
    t.directory = dir.path();
    lent_session s(rt, {.targets = {{0, t}}});
    const auto end = co_await give(s.daemon,
                                   {entry("d", go_dir | 0700), entry("d/f", 0640, {}, 3), entry("l", go_link | 0777, "d/f"),
                                    entry("old", 0600, {}, 3), entry("same", 0640, "d/f")},
                                   {{1, "one"}, {3, "new"}});
    BOOST_TEST(end.ok(), end.message);
    BOOST_TEST(read_file(dir / "kept") == "mine");
    BOOST_TEST(read_file(dir / "old") == "new");
    BOOST_TEST(read_file(dir / "d/f") == "one");
    BOOST_TEST(stdfs::read_symlink(dir / "l") == "d/f");
    BOOST_TEST(stdfs::hard_link_count(dir / "same") == 2U);
    struct stat info{};
    BOOST_REQUIRE(::stat((dir / "d/f").c_str(), &info) == 0);
    BOOST_TEST((info.st_mode & 07777) == 0640U);
    BOOST_TEST(info.st_mtim.tv_sec == 1'700'000'000);
    BOOST_TEST(info.st_mtim.tv_nsec == 123'456'789);
    BOOST_REQUIRE(::stat((dir / "d").c_str(), &info) == 0);
    BOOST_TEST(info.st_mtim.tv_sec == 1'700'000'000);
    co_await s.server.stop(1s);
}

CO_TEST_CASE(mode_delete_mirrors) {
    scratch_dir dir;
    stdfs::create_directories(dir / "gone");
    write_file(dir / "gone/f", "x");
    client::target t;
    t.directory = dir.path();
    t.mirror = true;
    lent_session s(rt, {.targets = {{0, t}}});
    const auto old = co_await give(s.daemon, {entry("f", 0644)}, {});
    BOOST_TEST(says(rpc::to_error(old), "mode=delete"));
    BOOST_TEST(stdfs::exists(dir / "gone/f"));
    const auto end = co_await give(s.daemon, {entry("f", 0644, {}, 1)}, {{0, "1"}}, {{"buildkit-exporter-multi-platform", "1"}});
    BOOST_TEST(end.ok(), end.message);
    BOOST_TEST(!stdfs::exists(dir / "gone"));
    BOOST_TEST(read_file(dir / "f") == "1");
    co_await s.server.stop(1s);
}

CO_TEST_CASE(a_hostile_daemon_writes_nothing_outside) {
    scratch_dir dir;
    stdfs::create_directories(dir / "out");
    stdfs::create_directories(dir / "secret");
    client::target t;
    t.directory = dir / "out";
    lent_session s(rt, {.targets = {{0, t}}});
    const std::vector<std::vector<Packet>> cases{
        {entry("../x", 0644)},
        {entry("/x", 0644)},
        {entry("a/../../x", 0644)},
        {entry("b", 0644), entry("a", 0644)},
        {entry("d/x", 0644)},
        {entry("l", go_link | 0777, "../secret"), entry("l/x", 0644)},
        {entry("h", 0644, "../secret/x")},
        {packet(Packet::PACKET_DATA, 3, "x")},
        {packet(Packet::PACKET_FIN)},
    };
    for (std::size_t i = 0; i < cases.size(); ++i) {
        const auto end = co_await give(s.daemon, cases[i], {});
        BOOST_TEST(!end.ok(), "case " << i);
    }
    const auto gave_up = co_await give(s.daemon, {packet(Packet::PACKET_ERR, 0, "no more of this")}, {});
    BOOST_TEST(says(rpc::to_error(gave_up), "no more of this"));
    BOOST_TEST(stdfs::is_empty(dir / "secret"));
    BOOST_TEST(!stdfs::exists(dir / "x"));
    co_await s.server.stop(1s);
}

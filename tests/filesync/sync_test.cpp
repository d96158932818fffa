// Sender against receiver, over a connection in memory.
#include "support/support.hpp"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
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

void make_rich_tree(const stdfs::path& d) {
    write_file(d / "bin/tool", "x");
    stdfs::create_hard_link(d / "bin/tool", d / "bin/tool2");
    stdfs::create_hard_link(d / "bin/tool", d / "a-first");
    stdfs::create_symlink("tool", d / "bin/ln");
    stdfs::create_symlink("/nowhere", d / "dangling");
    write_file(d / "empty", "");
    write_file(d / "name\xff\n", "not UTF-8");
    write_file(d / "foo/x", "below foo");
    write_file(d / "foo-bar", "sorts after foo/x here");
    write_file(d / "large", std::string(3 << 20, 'l') + "end");
    write_file(d / "sparse", "");
    BOOST_REQUIRE(::truncate((d / "sparse").c_str(), 8 << 20) == 0);
    BOOST_REQUIRE(::chown((d / "bin/tool").c_str(), 12, 34) == 0);
    BOOST_REQUIRE(::chmod((d / "bin/tool").c_str(), 06755) == 0);
    BOOST_REQUIRE(::lchown((d / "dangling").c_str(), 5, 6) == 0);
    stdfs::create_directories(d / "tmp/closed");
    BOOST_REQUIRE(::chmod((d / "tmp").c_str(), 01777) == 0);
    BOOST_REQUIRE(::chmod((d / "tmp/closed").c_str(), 0) == 0);
    BOOST_REQUIRE(::mkfifo((d / "fifo").c_str(), 0620) == 0);
    const fs::root root{d.string()};
    fs::set_xattr(root.fd(), "empty", "user.note", "hello");
    fs::set_xattr(root.fd(), "tmp", "user.dir", "d");
    for (const auto& [path, time] : std::map<std::string, fs::file_time>{
             {"bin/tool", {100, 7}}, {"bin", {200, 8}}, {"dangling", {300, 999'999'999}}, {"empty", {-5, 250}}, {"tmp", {1, 0}}})
        root.set_mtime(path, time);
}
}  // namespace

CO_TEST_CASE(a_rich_tree_arrives_as_it_is) {
    scratch_dir d;
    const auto from = root_of(d / "from");
    const auto to = root_of(d / "to");
    make_rich_tree(d / "from");
    const int s = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const unique_fd socket{s};
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::snprintf(address.sun_path, sizeof address.sun_path, "%s", (d / "from/sock").c_str());
    BOOST_REQUIRE(::bind(s, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
    const auto done = co_await transfer(rt.pool(), {{.root = from}}, to);
    stdfs::remove(d / "from/sock");  // a socket stays behind
    fs::root{(d / "from").string()}.set_mtime("tmp", {1, 0});
    const auto want = described(*from);
    const auto have = described(*to);
    BOOST_TEST(have == want, boost::test_tools::per_element());
    BOOST_TEST(done.sent.entries == want.size());
    BOOST_TEST(done.got.transferred.bytes == done.sent.bytes);
    BOOST_TEST(done.got.changes.size() == want.size());
    BOOST_TEST(to->stat("sparse")->blocks == 0U);
    BOOST_TEST(to->stat("bin/tool")->nlink == 3U);
}

CO_TEST_CASE(a_second_transfer_moves_only_what_changed) {
    scratch_dir d;
    const auto from = root_of(d / "from");
    const auto to = root_of(d / "to");
    make_rich_tree(d / "from");
    co_await transfer(rt.pool(), {{.root = from}}, to);
    const auto again = co_await transfer(rt.pool(), {{.root = from}}, to);
    BOOST_TEST(again.got.transferred.files == 0U);
    BOOST_TEST(again.got.changes.empty());
    write_file(d / "from/foo/x", "another");
    stdfs::remove_all(d / "from/tmp");
    stdfs::remove(d / "from/large");
    stdfs::create_directory(d / "from/large");
    write_file(d / "from/large/inside", "i");
    stdfs::remove_all(d / "from/bin");
    write_file(d / "from/bin", "a file now");
    const auto third = co_await transfer(rt.pool(), {{.root = from}}, to);
    BOOST_TEST(third.got.transferred.files == 3U);
    BOOST_TEST(described(*to) == described(*from), boost::test_tools::per_element());
    BOOST_TEST(std::ranges::count(third.got.changes, change{change_kind::removed, "tmp"}) == 1);
    BOOST_TEST(std::ranges::count(third.got.changes, change{change_kind::modified, "foo/x"}) == 1);
    BOOST_TEST(std::ranges::count(third.got.changes, change{change_kind::added, "large/inside"}) == 1);
    const auto all = co_await transfer(rt.pool(), {{.root = from}}, to, {.compare = differ::none});
    BOOST_TEST(all.got.transferred.files == all.sent.files + 1);  // "empty" is made without being asked for
    BOOST_TEST(all.got.unchanged > 0U);                           // the directories
    BOOST_TEST(described(*to) == described(*from), boost::test_tools::per_element());
}

// Two files that were one at the last transfer are two afterwards.
CO_TEST_CASE(a_hard_link_is_parted) {
    scratch_dir d;
    const auto from = root_of(d / "from");
    const auto to = root_of(d / "to");
    write_file(d / "from/a", "same");
    stdfs::create_hard_link(d / "from/a", d / "from/b");
    co_await transfer(rt.pool(), {{.root = from}}, to);
    stdfs::remove(d / "from/b");
    write_file(d / "from/b", "same");
    fs::root{(d / "from").string()}.set_mtime("b", from->stat("a")->mtime);
    co_await transfer(rt.pool(), {{.root = from}}, to);
    BOOST_TEST(described(*to) == described(*from), boost::test_tools::per_element());
}

CO_TEST_CASE(copying_keeps_what_else_is_there_and_follows_no_link) {
    scratch_dir d;
    const auto from = root_of(d / "from");
    const auto to = root_of(d / "to");
    write_file(d / "from/sub/f", "new");
    write_file(d / "from/out", "new");
    write_file(d / "outside/f", "mine");
    write_file(d / "to/kept", "mine");
    stdfs::create_symlink(d / "outside", d / "to/sub");
    stdfs::create_symlink(d / "outside/f", d / "to/out");
    const auto before = stdfs::last_write_time(d / "outside");
    co_await transfer(rt.pool(), {{.root = from}}, to, {.how = into::copy});
    BOOST_TEST(read_file(d / "outside/f") == "mine");
    BOOST_TEST((stdfs::last_write_time(d / "outside") == before));
    BOOST_TEST(read_file(d / "to/sub/f") == "new");
    BOOST_TEST(read_file(d / "to/out") == "new");
    BOOST_TEST(!stdfs::is_symlink(d / "to/out"));
    BOOST_TEST(names(*to) == (list{"kept", "out", "sub", "sub/f"}), boost::test_tools::per_element());
    // The same size and time say nothing here: a build with a fixed time has them always.
    write_file(d / "from/out", "NEW");
    fs::root{(d / "from").string()}.set_mtime("out", to->stat("out")->mtime);
    co_await transfer(rt.pool(), {{.root = from}}, to, {.how = into::copy});
    BOOST_TEST(read_file(d / "to/out") == "NEW");
}

CO_TEST_CASE(twenty_thousand_files) {
    scratch_dir d;
    const auto from = root_of(d / "from");
    const auto to = root_of(d / "to");
    for (int dir = 0; dir < 200; ++dir) {
        const auto at = d / cat("from/", dir);
        stdfs::create_directories(at);
        for (int f = 0; f < 100; ++f) write_file(at / cat("f", f), cat("content ", dir, " ", f));
    }
    const auto start = std::chrono::steady_clock::now();
    const auto done = co_await transfer(rt.pool(), {{.root = from}}, to);
    const auto took = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start).count();
    BOOST_TEST_MESSAGE("20,000 files in " << took << " ms");
    BOOST_TEST(done.got.transferred.files == 20'000U);
    BOOST_TEST(described(*to) == described(*from));
    const auto again = co_await transfer(rt.pool(), {{.root = from}}, to);
    BOOST_TEST(again.got.transferred.files == 0U);
    BOOST_TEST(again.got.unchanged == 20'200U);
}

CO_TEST_CASE(a_large_file_in_frames_of_any_size) {
    scratch_dir d;
    const auto from = root_of(d / "from");
    const char* mib = std::getenv("FILESYNC_MIB");
    const std::size_t size = (mib != nullptr ? std::stoul(mib) : 8) << 20;
    std::string block(1 << 20, '\0');
    for (std::size_t i = 0; i < block.size(); ++i) block[i] = static_cast<char>(i * 2654435761U >> 13);
    {
        stdfs::create_directories(d / "from");
        std::ofstream out(d / "from/large", std::ios::binary);
        for (std::size_t i = 0; i < size; i += block.size()) out << block;
        out << "tail";
    }
    for (const std::size_t frame : {std::size_t{32} << 10, std::size_t{256} << 10, std::size_t{1} << 20}) {
        const auto to = root_of(d / cat("to", frame));
        const auto start = std::chrono::steady_clock::now();
        co_await transfer(rt.pool(), {{.root = from}}, to, {}, {.frame_bytes = frame});
        const auto took = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start).count();
        BOOST_TEST_MESSAGE(size << " bytes in frames of " << frame << " in " << took << " ms");
        const unique_fd a = from->open("large", 0);
        const unique_fd b = to->open("large", 0);
        hasher ha;
        hasher hb;
        fs::hash_file(a.get(), ha);
        fs::hash_file(b.get(), hb);
        BOOST_TEST((ha.finish() == hb.finish()));
        stdfs::remove_all(d / cat("to", frame));
    }
}

CO_TEST_CASE(maps_of_both_ends) {
    scratch_dir d;
    const auto from = root_of(d / "from");
    const auto to = root_of(d / "to");
    write_file(d / "from/dir/f", "x");
    write_file(d / "from/secret/f", "x");
    write_file(d / "from/z", "x");
    write_file(d / "to/z", "stays");
    send_options s;
    s.map = [](file_stat& st) {
        st.uid = st.gid = 0;
        st.mtime = 1'000'000'001;
        return st.path != "secret";
    };
    receive_options r;
    r.map = [](file_stat& st) {
        st.uid = 7;
        return st.path != "z";
    };
    co_await transfer(rt.pool(), {{.root = from}}, to, r, s);
    BOOST_TEST(names(*to) == (list{"dir", "dir/f", "z"}), boost::test_tools::per_element());
    BOOST_TEST(to->stat("dir/f")->uid == 7U);
    BOOST_TEST((to->stat("dir")->mtime == fs::file_time{1, 1}));
    BOOST_TEST(read_file(d / "to/z") == "stays");
}

CO_TEST_CASE(several_trees_under_names) {
    scratch_dir d;
    const auto one = root_of(d / "one");
    const auto two = root_of(d / "two");
    const auto to = root_of(d / "to");
    write_file(d / "one/f", "1");
    write_file(d / "two/f", "2");
    stdfs::create_hard_link(d / "two/f", d / "two/g");
    stdfs::create_symlink("/f", d / "two/h");
    co_await transfer(rt.pool(), {{.root = two, .name = "linux_arm64"}, {.root = one, .name = "linux_amd64"}}, to);
    BOOST_TEST(names(*to) == (list{"linux_amd64", "linux_amd64/f", "linux_arm64", "linux_arm64/f", "linux_arm64/g", "linux_arm64/h"}),
               boost::test_tools::per_element());
    BOOST_TEST(read_file(d / "to/linux_arm64/f") == "2");
    BOOST_TEST(to->stat("linux_arm64/g")->nlink == 2U);
    BOOST_TEST(to->read_link("linux_arm64/h") == "/linux_arm64/f");  // as fsutil's SubDirFS
    BOOST_TEST(to->stat("linux_amd64")->permissions() == 0755U);
    const auto e = co_await failure(transfer(rt.pool(), {{.root = one, .name = "a"}, {.root = two, .name = "a"}}, root_of(d / "both")));
    BOOST_TEST(says(e, "two trees to send have a file \"a/f\""));
}

// An attestation beside a result, results of several platforms in one directory.
CO_TEST_CASE(trees_of_one_name_are_one) {
    scratch_dir d;
    const auto one = root_of(d / "one");
    const auto two = root_of(d / "two");
    for (const auto* f : {"one/b", "one/dir/m", "one/dir/z", "one/dir.x", "two/a", "two/dir/a", "two/dir/n/x", "two/z"}) write_file(d.path() / f, f);
    for (const std::string name : {"", "both"}) {
        const auto to = root_of(d / cat("to-", name));
        co_await transfer(rt.pool(), {{.root = one, .name = name}, {.root = two, .name = name}}, to);
        std::vector<std::string> expected;
        if (!name.empty()) expected.push_back(name);
        for (const auto* f : {"a", "b", "dir", "dir/a", "dir/m", "dir/n", "dir/n/x", "dir/z", "dir.x", "z"})
            expected.push_back(name.empty() ? f : cat(name, "/", f));
        BOOST_TEST(names(*to) == expected, boost::test_tools::per_element());
        const auto at = name.empty() ? std::string() : cat(name, "/");
        BOOST_TEST(to->read_file(cat(at, "dir/m"), 64) == "one/dir/m");
        BOOST_TEST(to->read_file(cat(at, "dir/n/x"), 64) == "two/dir/n/x");
    }
}

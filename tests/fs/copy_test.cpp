#include "support/support.hpp"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

import cobuild.base;
import cobuild.fs;

using namespace cobuild;
using namespace cobuild::test;
namespace stdfs = std::filesystem;

namespace {
unique_fd open_dir(const stdfs::path& p) { return unique_fd{::open(p.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)}; }

struct pair_of_trees {
    scratch_dir d;
    unique_fd dir = open_dir(d.path());
    void copy(const fs::copy_options& o = {}) { fs::copy_tree(dir.get(), "from", dir.get(), "to", o); }
    std::optional<fs::file_info> to(std::string_view path) { return fs::stat_at(dir.get(), "to/" + std::string(path)); }
};
}  // namespace

BOOST_AUTO_TEST_SUITE(copying)

BOOST_AUTO_TEST_CASE(holes_stay_holes_and_are_hashed_as_zeros) {
    scratch_dir d;
    const unique_fd from{::open((d / "a").c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0644)};
    BOOST_REQUIRE(::ftruncate(from.get(), 64 << 20) == 0);
    BOOST_REQUIRE(::pwrite(from.get(), "data", 4, 32 << 20) == 4);
    for (const bool hashing : {false, true}) {
        const unique_fd to{::open((d / "b").c_str(), O_CREAT | O_TRUNC | O_RDWR | O_CLOEXEC, 0644)};
        hasher h;
        const auto done = fs::copy_file(from.get(), to.get(), hashing ? &h : nullptr);
        BOOST_TEST(done.bytes == std::uint64_t{64} << 20);
        BOOST_TEST(fs::stat_at(to.get(), "")->blocks < 1024U);
        const std::string content = read_file(d / "b");
        BOOST_TEST((content == read_file(d / "a")));
        if (hashing) BOOST_TEST((h.finish() == digest::of(content)));
    }
}

// O-FS-01, O-FS-07, O-FS-03.
BOOST_AUTO_TEST_CASE(attributes_and_hard_links) {
    if (!needs_root()) return;
    pair_of_trees t;
    write_file(t.d / "from/bin/tool", "x");
    stdfs::create_hard_link(t.d / "from/bin/tool", t.d / "from/bin/tool2");
    stdfs::create_symlink("tool", t.d / "from/bin/ln");
    ::chown((t.d / "from/bin/tool").c_str(), 12, 34);
    ::chmod((t.d / "from/bin/tool").c_str(), 04755);
    ::chmod((t.d / "from/bin").c_str(), 01777);
    const std::string capability("\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 20);
    BOOST_REQUIRE(fs::set_xattr(t.dir.get(), "from/bin/tool", "security.capability", capability));
    fs::root{t.d.path().string()}.set_mtime("from/bin/tool", {100, 7});
    fs::root{t.d.path().string()}.set_mtime("from/bin", {200, 8});
    const int s = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const unique_fd socket{s};
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::snprintf(address.sun_path, sizeof address.sun_path, "%s", (t.d / "from/sock").c_str());
    BOOST_REQUIRE(::bind(s, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
    BOOST_REQUIRE(::mkfifo((t.d / "from/fifo").c_str(), 0600) == 0);
    std::map<std::string, std::pair<std::string, bool>> told;
    fs::copy_options o;
    o.hash = true;
    o.done = [&](const fs::copied_entry& e) {
        told[std::string(e.path)] = {e.content != nullptr ? e.content->str() : std::string(e.link), !e.hard_link.empty()};
    };
    t.copy(o);
    const auto tool = t.to("bin/tool");
    BOOST_TEST(tool->permissions() == 04755U);
    BOOST_TEST(tool->uid == 12U);
    BOOST_TEST(tool->gid == 34U);
    BOOST_TEST(tool->nlink == 2U);
    BOOST_TEST((tool->mtime == fs::file_time{100, 7}));
    BOOST_TEST((t.to("bin")->mtime == fs::file_time{200, 8}));
    BOOST_TEST(t.to("bin")->permissions() == 01777U);
    BOOST_TEST((fs::get_xattr(t.dir.get(), "to/bin/tool", "security.capability") == capability));
    BOOST_TEST(!t.to("sock").has_value());
    BOOST_TEST(S_ISFIFO(t.to("fifo")->mode));
    BOOST_TEST(told["bin/tool"].first == digest::of(std::string_view("x")).str());
    BOOST_TEST(told["bin/tool2"].second);
    BOOST_TEST(told["bin/ln"].first == "tool");
    BOOST_TEST(told.contains(""));
}

BOOST_AUTO_TEST_CASE(overrides) {
    if (!needs_root()) return;
    pair_of_trees t;
    write_file(t.d / "from/a/f", "x");
    fs::copy_options o;
    o.who = fs::owner{7, 8};
    o.mode = [](const fs::file_info& i) { return i.is_dir() ? 0750U : 04555U; };
    o.mtime = fs::file_time{1, 0};
    t.copy(o);
    BOOST_TEST(t.to("a/f")->permissions() == 04555U);  // O-FS-08
    BOOST_TEST(t.to("a/f")->uid == 7U);
    BOOST_TEST(t.to("a")->permissions() == 0750U);
    BOOST_TEST(t.to("a")->mtime.seconds == 1);
    BOOST_TEST(t.to("")->gid == 8U);
}

// O-SL-01: a link is never replaced by a directory, nor a directory by a file.
BOOST_AUTO_TEST_CASE(what_merges_and_what_does_not) {
    pair_of_trees t;
    write_file(t.d / "from/bin/tool", "new");
    write_file(t.d / "to/bin/tool", "old and longer");
    write_file(t.d / "to/bin/other", "stays");
    ::chmod((t.d / "to").c_str(), 0700);
    t.copy();
    BOOST_TEST(read_file(t.d / "to/bin/tool") == "new");
    BOOST_TEST(read_file(t.d / "to/bin/other") == "stays");
    BOOST_TEST(t.to("")->permissions() == 0700U);
    stdfs::remove_all(t.d / "to");
    write_file(t.d / "to/usr/bin/x", "");
    stdfs::create_symlink("usr/bin", t.d / "to/bin");
    BOOST_CHECK_EXCEPTION(t.copy(), error, [](const error& e) { return e.kind() == errc::invalid; });
    BOOST_TEST(t.to("bin")->is_link());
    stdfs::remove_all(t.d / "to");
    stdfs::create_directories(t.d / "to/bin/tool");
    BOOST_CHECK_THROW(t.copy(), error);
    // A link at the target is replaced, not written through.
    stdfs::remove_all(t.d / "to");
    write_file(t.d / "victim", "safe");
    stdfs::create_directories(t.d / "to/bin");
    stdfs::create_symlink(t.d / "victim", t.d / "to/bin/tool");
    t.copy();
    BOOST_TEST(read_file(t.d / "victim") == "safe");
    BOOST_TEST(read_file(t.d / "to/bin/tool") == "new");
}

BOOST_AUTO_TEST_CASE(filters_make_only_the_parents_that_are_needed) {
    pair_of_trees t;
    write_file(t.d / "from/a/b/x.txt", "x");
    write_file(t.d / "from/a/c/y.bin", "y");
    write_file(t.d / "from/d/z.txt", "z");
    fs::copy_options o;
    o.filter = [](std::string_view path, const fs::file_info& info) {
        if (path == "d") return fs::copy_verdict::skip;
        if (info.is_dir()) return fs::copy_verdict::descend;
        return path.ends_with(".txt") ? fs::copy_verdict::take : fs::copy_verdict::skip;
    };
    t.copy(o);
    BOOST_TEST(stdfs::exists(t.d / "to/a/b/x.txt"));
    BOOST_TEST(!stdfs::exists(t.d / "to/a/c"));
    BOOST_TEST(!stdfs::exists(t.d / "to/d"));
}

// O-SL-08, O-CP-06, O-CP-04.
BOOST_AUTO_TEST_CASE(odd_names_and_loops) {
    pair_of_trees t;
    stdfs::create_directories(t.d / "from");
    stdfs::create_symlink("b", t.d / "from/a");
    stdfs::create_symlink("a", t.d / "from/b");
    write_file(t.d / "from/\xe9", "latin");
    write_file(t.d / "from/new\nline", "n");
    t.copy();
    BOOST_TEST(t.to("a")->is_link());
    BOOST_TEST(read_file(t.d / "to/\xe9") == "latin");
    BOOST_TEST(read_file(t.d / "to/new\nline") == "n");
    BOOST_CHECK_EXCEPTION(fs::copy_tree(t.dir.get(), "none", t.dir.get(), "to", {}), error,
                          [](const error& e) { return e.kind() == errc::not_found; });
    fs::copy_tree(t.dir.get(), "from/\xe9", t.dir.get(), "single", {});
    BOOST_TEST(read_file(t.d / "single") == "latin");
}

BOOST_AUTO_TEST_SUITE_END()

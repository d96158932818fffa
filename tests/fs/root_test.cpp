#include "support/support.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <algorithm>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

import cobuild.base;
import cobuild.fs;

using namespace cobuild;
using namespace cobuild::test;
using fs::links;
namespace stdfs = std::filesystem;

namespace {
unique_fd open_dir(const stdfs::path& p) { return unique_fd{::open(p.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)}; }
const fs::owner me{::geteuid(), ::getegid()};
}  // namespace

BOOST_AUTO_TEST_SUITE(rooted)

// O-SL-02: absolute links resolve inside the root, never on the host.
BOOST_AUTO_TEST_CASE(links_stay_inside) {
    scratch_dir d;
    write_file(d / "r/usr/lib/x", "inside");
    write_file(d / "secret", "outside");
    stdfs::create_symlink("/usr/lib", d / "r/lib");
    stdfs::create_symlink("/lib", d / "r/lib64");
    stdfs::create_symlink("../../../../secret", d / "r/up");
    stdfs::create_symlink("loop", d / "r/loop");
    const fs::root r{(d / "r").string()};
    BOOST_TEST(r.read_file("/lib64/x", 100) == "inside");
    BOOST_TEST(r.read_file("../../lib/../lib/x", 100) == "inside");
    BOOST_TEST(!r.stat("up", links::follow).has_value());
    BOOST_TEST(r.stat("up")->is_link());
    BOOST_TEST(r.read_link("lib64") == "/lib");
    BOOST_CHECK_THROW((void)r.stat("lib/x", links::refuse), error);
    BOOST_CHECK_EXCEPTION((void)r.open("loop", O_RDONLY), error, [](const error& e) { return e.kind() == errc::invalid; });
    BOOST_CHECK_EXCEPTION((void)r.open("none", O_RDONLY), error, [](const error& e) { return e.kind() == errc::not_found; });
    BOOST_TEST(r.resolve("lib64/x") == "usr/lib/x");
    BOOST_TEST(r.resolve("lib64/no/such") == "usr/lib/no/such");
    BOOST_TEST(r.resolve("up") == "secret");
    BOOST_TEST(r.resolve("lib64", links::keep) == "lib64");
    BOOST_TEST(r.resolve("/../..") == "");
    BOOST_CHECK_THROW((void)r.resolve("loop/x"), error);
    BOOST_TEST(r.list("/lib64") == (std::vector<std::string>{"x"}), boost::test_tools::per_element());
}

// O-SL-05: a link to a directory that is not there yet.
BOOST_AUTO_TEST_CASE(directories_through_a_dangling_link) {
    scratch_dir d;
    stdfs::create_directories(d / "r");
    stdfs::create_symlink("/opt/target", d / "r/link");
    const fs::root r{(d / "r").string()};
    const auto made = r.make_dirs("/link/a", 01777, me, fs::file_time{5, 0});
    BOOST_TEST(made == (std::vector<std::string>{"opt", "opt/target", "opt/target/a"}), boost::test_tools::per_element());
    const auto info = r.stat("opt/target/a");
    BOOST_TEST(info->permissions() == 01777U);
    BOOST_TEST(info->mtime.seconds == 5);
    BOOST_TEST(r.stat("opt")->mtime.seconds == 5);
    BOOST_TEST(r.make_dirs("link/a", 0700, me).empty());
    write_file(d / "r/file", "x");
    BOOST_CHECK_THROW(r.make_dirs("file/x", 0755, me), error);
}

BOOST_AUTO_TEST_CASE(last_components_are_not_followed) {
    scratch_dir d;
    write_file(d / "outside", "x");
    stdfs::create_directories(d / "r");
    stdfs::create_symlink((d / "outside").string(), d / "r/l");
    const fs::root r{(d / "r").string()};
    r.set_mtime("l", {7, 0});
    BOOST_TEST(r.stat("l")->mtime.seconds == 7);
    BOOST_TEST(stdfs::file_size(d / "outside") == 1U);
    BOOST_CHECK_THROW(r.chmod("l", 0600), error);
    BOOST_TEST(r.remove_all("l"));
    BOOST_TEST(!r.remove_all("l"));
    BOOST_TEST(stdfs::exists(d / "outside"));
    BOOST_CHECK_THROW(r.remove_all("/"), error);
    BOOST_CHECK_THROW(r.remove_all("a/.."), error);
    const auto f = r.create_file("new", 04711, me);
    BOOST_TEST(r.stat("new")->permissions() == 04711U);
    BOOST_CHECK_EXCEPTION((void)r.create_file("new", 0600, me), error, [](const error& e) { return e.kind() == errc::exists; });
    BOOST_TEST(r.set_xattr("new", "user.k", std::string_view("a\0b", 3)));
    BOOST_TEST(*r.get_xattr("new", "user.k") == std::string("a\0b", 3));
    BOOST_TEST(r.list_xattrs("new").size() == 1U);
    BOOST_TEST(!r.get_xattr("new", "user.none").has_value());
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(trees)

BOOST_AUTO_TEST_CASE(order_has_the_slash_lowest) {
    scratch_dir d;
    for (const char* f : {"a/x", "a-b", "a.c", "b/c/d", "A"}) write_file(d / "t" / f, "");
    const auto dir = open_dir(d / "t");
    std::vector<std::string> seen;
    fs::walk(dir.get(), [&](const fs::walk_entry& e) {
        seen.emplace_back(e.path);
        return e.path == "b/c" ? fs::walk_step::skip_dir : fs::walk_step::go_on;
    });
    const std::vector<std::string> expected{"A", "a", "a/x", "a-b", "a.c", "b", "b/c"};
    BOOST_TEST(seen == expected, boost::test_tools::per_element());
    BOOST_TEST(std::ranges::is_sorted(seen, [](const auto& a, const auto& b) { return fs::path_less(a, b); }));
    BOOST_TEST(fs::path_less("a/z", "a-b"));
    BOOST_TEST(!fs::path_less("a", "a"));
}

// Deeper than PATH_MAX and than descriptors are kept open.
BOOST_AUTO_TEST_CASE(very_deep_trees) {
    scratch_dir d;
    auto dir = open_dir(d.path());
    ::mkdirat(dir.get(), "t", 0755);
    const std::string name(100, 'n');
    auto at = open_dir(d / "t");
    for (int i = 0; i < 200; ++i) {
        BOOST_REQUIRE(::mkdirat(at.get(), name.c_str(), 0755) == 0);
        unique_fd{::openat(at.get(), "file", O_CREAT | O_WRONLY | O_CLOEXEC, 0644)}.reset();
        at = unique_fd{::openat(at.get(), name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
    }
    const auto t = open_dir(d / "t");
    int count = 0;
    int left = 0;
    fs::walk(t.get(), fs::walk_hooks{[&](const fs::walk_entry&) { return ++count, fs::walk_step::go_on; }, [&](auto, int) { ++left; }});
    BOOST_TEST(count == 400);
    BOOST_TEST(left == 201);
    BOOST_TEST(fs::remove_tree(dir.get(), "t"));
    BOOST_TEST(!stdfs::exists(d / "t"));
}

BOOST_AUTO_TEST_CASE(removal_does_not_follow_links) {
    scratch_dir d;
    write_file(d / "keep/file", "x");
    write_file(d / "t/a/b", "x");
    stdfs::create_directory_symlink(d / "keep", d / "t/a/link");
    const auto dir = open_dir(d.path());
    BOOST_TEST(fs::remove_tree(dir.get(), "t"));
    BOOST_TEST(!fs::remove_tree(dir.get(), "t"));
    BOOST_TEST(stdfs::exists(d / "keep/file"));
}

BOOST_AUTO_TEST_CASE(writing_and_locks) {
    scratch_dir d;
    const auto dir = open_dir(d.path());
    fs::atomic_write(dir.get(), "f", "one", 0640, true);
    fs::atomic_write(dir.get(), "f", "two", 0600, false);
    BOOST_TEST(read_file(d / "f") == "two");
    BOOST_TEST(fs::stat_at(dir.get(), "f")->permissions() == 0600U);
    BOOST_TEST(fs::list_dir(dir.get()).size() == 1U);
    auto lock = fs::file_lock::try_acquire(dir.get(), "lock", fs::file_lock::kind::exclusive);
    BOOST_TEST(lock.has_value());
    BOOST_TEST(!fs::file_lock::try_acquire(dir.get(), "lock", fs::file_lock::kind::shared).has_value());
    lock.reset();
    BOOST_TEST(fs::file_lock::try_acquire(dir.get(), "lock", fs::file_lock::kind::shared).has_value());
    BOOST_TEST(fs::disk_space(d.path().string()).total > 0U);
}

BOOST_AUTO_TEST_SUITE_END()

#include "support/support.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <ctime>
#include <filesystem>
#include <functional>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

import cobuild.base;
import cobuild.async;
import cobuild.cache;
import cobuild.fs;

using namespace cobuild;
using cache::selector;
namespace stdfs = std::filesystem;

namespace {

struct tree {
    test::scratch_dir dir;
    stdfs::path root = dir / "root";
    unique_fd fd;

    tree() {
        stdfs::create_directories(root / "a/b");
        test::write_file(root / "a/one.txt", "one");
        test::write_file(root / "a/two.txt", "two");
        test::write_file(root / "a/b/three.log", "three");
        test::write_file(root / "top", "top");
        stdfs::create_symlink("a/one.txt", root / "link");
        stdfs::create_symlink("/a", root / "abs");
        test::write_file(dir / "outside", "secret");
        stdfs::create_symlink("../outside", root / "escape");
        stdfs::create_symlink(dir / "outside", root / "escape2");
        fd = unique_fd(::open(root.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    }
    digest hash(const selector& s = {}, const cache::hash_options& o = {}) const { return cache::hash_tree(fd.get(), s, o); }
};

bool not_found(const std::function<void()>& f) {
    try {
        f();
    } catch (const error& e) {
        return e.kind() == errc::not_found;
    }
    return false;
}

void set_mtime(const stdfs::path& file) {
    const std::array<timeval, 2> times{{{1, 0}, {1, 0}}};
    BOOST_REQUIRE(::lutimes(file.c_str(), times.data()) == 0);
}

}  // namespace

BOOST_AUTO_TEST_CASE(times_do_not_count_everything_else_does) {
    const tree t;
    const auto before = t.hash();
    for (const auto* path : {"a/one.txt", "a", "link", ""}) set_mtime(t.root / path);
    BOOST_TEST((t.hash() == before));

    std::set<digest> seen{before};
    const auto differs = [&](const char* what) { BOOST_TEST(seen.insert(t.hash()).second, what); };
    test::write_file(t.root / "a/one.txt", "One");
    differs("content");
    stdfs::permissions(t.root / "a/one.txt", stdfs::perms::owner_all);
    differs("mode");
    stdfs::permissions(t.root / "a/b", stdfs::perms::owner_all);
    differs("a directory's mode");
    stdfs::rename(t.root / "a/one.txt", t.root / "a/uno.txt");
    differs("a name");
    stdfs::rename(t.root / "a/uno.txt", t.root / "uno.txt");
    differs("a place");
    stdfs::create_directory(t.root / "empty");
    differs("an empty directory");
    stdfs::remove(t.root / "link");
    stdfs::create_symlink("a/two.txt", t.root / "link");
    differs("a link's target");
    BOOST_REQUIRE(::mkfifo((t.root / "fifo").c_str(), 0600) == 0);
    differs("a fifo");
    if (::setxattr((t.root / "top").c_str(), "user.x", "1", 1, 0) == 0) differs("an attribute");
    if (::geteuid() == 0) {
        BOOST_REQUIRE(::lchown((t.root / "top").c_str(), 1000, 0) == 0);
        differs("the owner");
        const auto as_root = t.hash({}, {.owned_by = fs::owner{0, 0}});
        BOOST_REQUIRE(::lchown((t.root / "top").c_str(), 0, 0) == 0);
        BOOST_TEST((t.hash({}, {.owned_by = fs::owner{0, 0}}) == as_root));
    }
}

BOOST_AUTO_TEST_CASE(equal_trees_are_equal_wherever_they_are) {
    const tree one;
    const tree two;
    stdfs::remove(one.root / "escape2");
    stdfs::remove(two.root / "escape2");
    BOOST_TEST((one.hash() == two.hash()));
    BOOST_TEST((one.hash({.path = "/a"}) == two.hash({.path = "a/"})));
}

BOOST_AUTO_TEST_CASE(a_path_selects_and_its_name_does_not_count) {
    const tree t;
    const auto one = t.hash({.path = "/a/one.txt"});
    BOOST_TEST((one != t.hash({.path = "/a/two.txt"})));
    stdfs::copy(t.root / "a/one.txt", t.root / "copy");
    BOOST_TEST((t.hash({.path = "copy"}) == one));
    test::write_file(t.root / "a/two.txt", "changed");
    BOOST_TEST((t.hash({.path = "/a/one.txt"}) == one));
    BOOST_TEST((t.hash({.path = "/abs/one.txt"}) == one));  // links on the way are followed inside the root
    BOOST_TEST((t.hash({.path = "/../../a/../a/one.txt"}) == one));
    BOOST_TEST(not_found([&] { (void)t.hash({.path = "/nothing"}); }));
    BOOST_TEST(not_found([&] { (void)t.hash({.path = "/top/below"}); }));
}

BOOST_AUTO_TEST_CASE(links_are_followed_when_asked_and_never_out_of_the_root) {
    const tree t;
    BOOST_TEST((t.hash({.path = "/link"}) != t.hash({.path = "/a/one.txt"})));
    BOOST_TEST((t.hash({.path = "/link", .follow_links = true}) == t.hash({.path = "/a/one.txt"})));
    BOOST_TEST((t.hash({.path = "/abs", .follow_links = true}) == t.hash({.path = "/a"})));
    // "../outside" is "/outside" in here, which is not there; the file beside the root is never seen.
    for (const auto* path : {"/escape", "/escape2"}) BOOST_TEST(not_found([&] { (void)t.hash({.path = path, .follow_links = true}); }));
    test::write_file(t.root / "outside", "inside");
    BOOST_TEST((t.hash({.path = "/escape", .follow_links = true}) == t.hash({.path = "/outside"})));
    stdfs::create_symlink("loop", t.root / "loop");
    BOOST_CHECK_THROW((void)t.hash({.path = "/loop", .follow_links = true}), error);
}

BOOST_AUTO_TEST_CASE(wildcards_match_as_gos_filepath_does) {
    const tree t;
    const selector texts{.path = "/a/*.txt", .wildcard = true};
    const auto before = t.hash(texts);
    test::write_file(t.root / "a/b/four.txt", "not matched: * stops at /");
    test::write_file(t.root / "a/x.log", "nor this");
    BOOST_TEST((t.hash(texts) == before));
    BOOST_TEST((t.hash({.path = "/a/?[nw]?.txt", .wildcard = true}) == before));
    BOOST_TEST((t.hash({.path = "/abs/*.txt", .wildcard = true}) == before));
    stdfs::rename(t.root / "a/two.txt", t.root / "a/zwo.txt");
    BOOST_TEST((t.hash(texts) != before));  // here names do count: they are what is selected
    const auto nothing = t.hash({.path = "/a/*.nope", .wildcard = true});
    BOOST_TEST((nothing == t.hash({.path = "/q*/z", .wildcard = true})));
    BOOST_TEST((nothing == t.hash({.path = "/absent", .wildcard = true})));
    BOOST_TEST((t.hash({.path = "/*/b", .wildcard = true}) != nothing));
    BOOST_TEST((t.hash({.path = "/*", .wildcard = true}) != t.hash({.path = "/a*", .wildcard = true})));
}

BOOST_AUTO_TEST_CASE(patterns_select_below_the_path) {
    const tree t;
    const selector logs{.path = "/a", .include = {"**/*.log"}};
    const selector no_text{.path = "/a", .exclude = {"**/*.txt"}};
    const auto with_logs = t.hash(logs);
    const auto without_text = t.hash(no_text);
    test::write_file(t.root / "a/one.txt", "changed");
    test::write_file(t.root / "a/b/new.txt", "new");
    BOOST_TEST((t.hash(logs) == with_logs));
    BOOST_TEST((t.hash(no_text) == without_text));
    test::write_file(t.root / "a/b/three.log", "changed");
    BOOST_TEST((t.hash(logs) != with_logs));
    BOOST_TEST((t.hash(no_text) != without_text));
    const selector all_but{.path = "/a", .exclude = {"*", "!two.txt"}};
    const auto only_two = t.hash(all_but);
    test::write_file(t.root / "a/one.txt", "again");
    BOOST_TEST((t.hash(all_but) == only_two));
    test::write_file(t.root / "a/two.txt", "again");
    BOOST_TEST((t.hash(all_but) != only_two));
}

// O-CA-03: every source of a COPY counts.
BOOST_AUTO_TEST_CASE(several_selectors_all_count_and_in_order) {
    const tree t;
    const std::vector<selector> both{{.path = "/a/one.txt"}, {.path = "/a/two.txt"}};
    const std::vector<selector> swapped{both[1], both[0]};
    const auto before = cache::hash_tree(t.fd.get(), both);
    BOOST_TEST((before != cache::hash_tree(t.fd.get(), swapped)));
    test::write_file(t.root / "a/two.txt", "changed");
    BOOST_TEST((before != cache::hash_tree(t.fd.get(), both)));
    BOOST_TEST((cache::hash_tree(t.fd.get(), std::span(both).first(1)) == t.hash(both[0])));
    BOOST_TEST((::fcntl(t.fd.get(), F_GETFD) >= 0));
}

BOOST_AUTO_TEST_CASE(a_copier_gets_the_digest_that_the_copy_will_have) {
    const tree t;
    struct stat s{};
    BOOST_REQUIRE(::stat((t.root / "a/one.txt").c_str(), &s) == 0);
    const cache::file_header header{.mode = s.st_mode, .uid = s.st_uid, .gid = s.st_gid, .size = 3};
    BOOST_TEST((cache::file_digest(header, digest::of("one")) == t.hash({.path = "/a/one.txt"})));
    stdfs::create_directory(t.root / "d");
    stdfs::rename(t.root / "a/one.txt", t.root / "d/one.txt");
    BOOST_REQUIRE(::stat((t.root / "d").c_str(), &s) == 0);
    cache::directory_hasher d(cache::file_digest({.type = cache::file_type::directory, .mode = s.st_mode, .uid = s.st_uid, .gid = s.st_gid}, {}));
    d.child("one.txt", cache::file_digest(header, digest::of("one")));
    BOOST_TEST((d.finish() == t.hash({.path = "/d"})));
}

BOOST_AUTO_TEST_CASE(attributes_of_the_machine_do_not_count) {
    using list = std::vector<std::pair<std::string, std::string>>;
    BOOST_TEST(cache::xattrs_digest(list{}).empty());
    BOOST_TEST(cache::xattrs_digest(list{{"security.selinux", "x"}, {"system.posix_acl_access", "y"}}).empty());
    const auto capability = cache::xattrs_digest(list{{"security.capability", "c"}});
    BOOST_TEST(!capability.empty());
    BOOST_TEST((cache::xattrs_digest(list{{"security.ima", "z"}, {"security.capability", "c"}}) == capability));
    BOOST_TEST((cache::xattrs_digest(list{{"user.a", "1"}, {"user.b", "2"}}) == cache::xattrs_digest(list{{"user.b", "2"}, {"user.a", "1"}})));
    BOOST_TEST((cache::xattrs_digest(list{{"user.a", "12"}}) != cache::xattrs_digest(list{{"user.a1", "2"}})));
}

BOOST_AUTO_TEST_CASE(threads_and_the_memo_change_nothing_but_the_time) {
    const test::scratch_dir dir;
    const auto root = dir / "many";
    constexpr int folders = 20;
    constexpr int files = 200;
    for (int f = 0; f < folders; ++f) {
        const auto folder = root / cat("d", f);
        stdfs::create_directories(folder);
        for (int i = 0; i < files; ++i) {
            const unique_fd fd(::open((folder / cat("f", i)).c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0644));
            const auto text = cat("content ", f, ' ', i);
            BOOST_REQUIRE(::write(fd.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size()));
        }
    }
    const unique_fd fd(::open(root.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    const auto timed = [&](const cache::hash_options& o) {
        const auto from = std::clock();
        const auto out = cache::hash_tree(fd.get(), selector{}, o);
        return std::pair(out, static_cast<double>(std::clock() - from) * 1000 / CLOCKS_PER_SEC);
    };
    cache::stat_memo memo;
    const auto [plain, took_one] = timed({});
    const auto [threaded, took_two] = timed({.threads = 2});
    BOOST_TEST((plain == threaded));
    // Files just written are not remembered; a memo that knows them all is made from their stats as they are.
    BOOST_TEST((cache::hash_tree(fd.get(), selector{}, {.memo = &memo}) == plain));
    const auto fs_id = cache::file_system_of(fd.get());
    const auto today = std::chrono::floor<std::chrono::days>(std::chrono::system_clock::now()).time_since_epoch().count();
    std::vector<cache::memo_entry> known;
    for (int f = 0; f < folders; ++f)
        for (int i = 0; i < files; ++i) {
            const unique_fd file(::openat(fd.get(), cat("d", f, "/f", i).c_str(), O_RDONLY | O_CLOEXEC));
            known.push_back({cache::key_of(fs_id, fs::stat_at(file.get(), "").value()), {digest::of(cat("content ", f, ' ', i)), {}}, today});
        }
    cache::stat_memo full;
    full.load(known);
    const auto [remembered, took_memo] = timed({.memo = &full});
    BOOST_TEST((remembered == plain));
    BOOST_TEST_MESSAGE(folders * files << " files: read by one thread " << took_one << " ms, by two " << took_two << " ms, unchanged " << took_memo
                                       << " ms of processor time");

    // The memo is believed, so a changed file is seen by its stat alone.
    test::write_file(root / "d0/f0", "changed content of another size");
    BOOST_TEST((cache::hash_tree(fd.get(), selector{}, {.memo = &full}) != plain));
}

BOOST_AUTO_TEST_CASE(hashing_stops_when_cancelled) {
    const tree t;
    async::cancel_source stop;
    stop.cancel(error{errc::canceled, "enough"});
    BOOST_CHECK_THROW((void)t.hash({}, {.cancelled = stop.token()}), error);
}

// O-CA-02: content changed in place with size and mtime kept is noticed by the change time; a touch alone stays a hit.
BOOST_AUTO_TEST_CASE(a_change_that_keeps_size_and_mtime_is_noticed) {
    const tree t;
    cache::stat_memo memo;
    const auto key = [&] {
        const unique_fd fd(::open((t.root / "top").c_str(), O_RDONLY | O_CLOEXEC));
        return cache::key_of(cache::file_system_of(fd.get()), fs::stat_at(fd.get(), "").value());
    };
    set_mtime(t.root / "top");
    memo.load({{key(), {digest::of("top"), {}}, 0}});
    const auto before = t.hash({.path = "/top"}, {.memo = &memo});
    const auto old = key();
    do {
        test::write_file(t.root / "top", "pot");
        set_mtime(t.root / "top");
    } while (key().ctime == old.ctime);  // the clock of the file system has ticked
    BOOST_TEST(key().mtime == old.mtime);
    BOOST_TEST(key().size == old.size);
    BOOST_TEST((t.hash({.path = "/top"}, {.memo = &memo}) != before));
    do {
        test::write_file(t.root / "top", "top");
    } while (key().ctime == old.ctime);
    BOOST_TEST((t.hash({.path = "/top"}, {.memo = &memo}) == before));
}

BOOST_AUTO_TEST_CASE(a_deep_tree_costs_no_stack) {
    const test::scratch_dir dir;
    unique_fd at(::open(dir.path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    const unique_fd top(::fcntl(at.get(), F_DUPFD_CLOEXEC, 0));
    for (int i = 0; i < 2'000; ++i) {  // a path of 6,000 bytes
        BOOST_REQUIRE(::mkdirat(at.get(), "dd", 0755) == 0);
        at = unique_fd(::openat(at.get(), "dd", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
        BOOST_REQUIRE(static_cast<bool>(at));
    }
    const unique_fd file(::openat(at.get(), "file", O_CREAT | O_WRONLY | O_CLOEXEC, 0644));
    const auto before = cache::hash_tree(top.get(), selector{});
    BOOST_REQUIRE(::write(file.get(), "x", 1) == 1);
    BOOST_TEST((cache::hash_tree(top.get(), selector{}) != before));
    fs::remove_tree(top.get(), "dd");
}

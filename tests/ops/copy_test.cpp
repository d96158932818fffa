#include "ops/world.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import cobuild.state;
import cobuild.content;
import cobuild.snapshot;
import cobuild.cache;
import cobuild.solver;
import cobuild.session;
import cobuild.registry;
import cobuild.source;
import cobuild.llb;
import cobuild.ops;

#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>
#include <array>
#include <cstdint>
#include <cstring>
#include "ops/world_body.hpp"

BOOST_AUTO_TEST_SUITE(copying)

WORLD_CASE(where_a_file_lands) {
    write_file(w.context() / "f", "text");
    const auto from = co_await open_context(w);
    const auto base = co_await chain_of(w, [](const stdfs::path& p) { stdfs::create_directories(p / "dir"); });
    BOOST_TEST((co_await copy(w, from, copy_of("/f", "/new"), base)).now->text("new") == "text");
    const auto slash = co_await copy(w, from, copy_of("/f", "/a/b/"), base);
    BOOST_TEST(slash.now->text("a/b/f") == "text");
    BOOST_TEST(slash.now->mode("a/b") == "0755");
    BOOST_TEST(slash.now->owner("a") == "0:0");
    BOOST_TEST((co_await copy(w, from, copy_of("/f", "/x/y"), base)).now->text("x/y") == "text");
    BOOST_TEST((co_await copy(w, from, copy_of("/f", "/dir"), base)).now->text("dir/f") == "text");
    BOOST_TEST((co_await copy(w, from, copy_of("/f", "/"))).now->text("f") == "text");
    BOOST_TEST((co_await copy(w, from, copy_of("/f", "/dir/."), base)).now->text("dir/f") == "text");
    auto no_parents = copy_of("/f", "/none/f");
    no_parents.create_dest_path = false;
    BOOST_TEST(says(co_await failure(copy(w, from, no_parents, base)), errc::not_found, "/none"));
}

// A directory's contents land, not the directory: what it goes into is made plainly, with a trailing slash or without.
WORLD_CASE(the_contents_of_a_directory) {
    write_file(w.context() / "src/sub/f", "text");
    stdfs::permissions(w.context() / "src", stdfs::perms(0700));
    stdfs::permissions(w.context() / "src/sub", stdfs::perms(0750));
    const auto from = co_await open_context(w);
    const auto base = co_await chain_of(w, [](const stdfs::path& p) {
        write_file(p / "there/old", "old");
        stdfs::permissions(p / "there", stdfs::perms(0711));
    });
    for (const auto* dest : {"/new", "/new/"}) {
        const auto c = co_await copy(w, from, copy_of("/src", dest), base);
        BOOST_TEST(c.now->text("new/sub/f") == "text");
        BOOST_TEST(c.now->mode("new") == "0755");
        BOOST_TEST(c.now->mode("new/sub") == "0750");
        BOOST_TEST(c.now->owner("new/sub") == "0:0");
    }
    auto owned = copy_of("/src", "/new");
    owned.owner = llb::chown_opt{.user = llb::user_opt{std::uint32_t{5}}, .group = llb::user_opt{std::uint32_t{6}}};
    BOOST_TEST((co_await copy(w, from, owned, base)).now->owner("new") == "5:6");
    const auto merged = co_await copy(w, from, copy_of("/src", "/there"), base);
    BOOST_TEST(merged.now->text("there/old") == "old");
    BOOST_TEST(merged.now->text("there/sub/f") == "text");
    BOOST_TEST(merged.now->mode("there") == "0711");
    auto whole = copy_of("/src", "/there");
    whole.dir_copy_contents = false;
    BOOST_TEST((co_await copy(w, from, whole, base)).now->mode("there/src") == "0700");
    // The mode of the context's own directory differs between checkouts; it lands nowhere and counts for nothing.
    const auto before = co_await copy(w, from, copy_of("/src", "/new"));
    stdfs::permissions(w.context() / "src", stdfs::perms(0755));
    const auto after = co_await copy(w, from, copy_of("/src", "/new"));
    BOOST_TEST((before.landed == after.landed));
}

WORLD_CASE(a_file_and_a_directory_do_not_replace_each_other) {
    write_file(w.context() / "src/name", "file");
    write_file(w.context() / "other/name/x", "in a directory");
    const auto from = co_await open_context(w);
    const auto base = co_await chain_of(w, [](const stdfs::path& p) {
        write_file(p / "d/name/keep", "keep");
        write_file(p / "f/name", "plain");
        write_file(p / "plain", "plain");
    });
    BOOST_TEST(says(co_await failure(copy(w, from, copy_of("/src", "/d"), base)), errc::invalid, "directory"));
    BOOST_TEST(says(co_await failure(copy(w, from, copy_of("/other", "/f"), base)), errc::invalid, "directory"));
    BOOST_TEST((co_await failure(copy(w, from, copy_of("/src", "/plain"), base))).has_value());
    BOOST_TEST((co_await copy(w, from, copy_of("/src/name", "/f/name"), base)).now->text("f/name") == "file");
}

// O-SL-01, O-SL-03, O-SL-05
WORLD_CASE(links_at_the_destination) {
    write_file(w.context() / "rootfs/bin/tool", "tool");
    write_file(w.context() / "f", "text");
    const auto from = co_await open_context(w);
    const auto base = co_await chain_of(w, [](const stdfs::path& p) {
        stdfs::create_directories(p / "usr/bin");
        stdfs::create_symlink("usr/bin", p / "bin");
        stdfs::create_directories(p / "opt/origin");
        stdfs::create_symlink("/opt/origin", p / "opt/link");
        stdfs::create_symlink("/nowhere/yet", p / "dangling");
        stdfs::create_directories(p / "dir");
        stdfs::create_symlink("/opt/origin", p / "dir/f");
        write_file(p / "victim", "safe");
        stdfs::create_symlink("/victim", p / "dir/bin");
    });
    const auto through = co_await copy(w, from, copy_of("/f", "/opt/link/dir1/dir2/"), base);
    BOOST_TEST(through.now->text("opt/origin/dir1/dir2/f") == "text");
    BOOST_TEST(through.now->stat("opt/link")->is_link());
    const auto made = co_await copy(w, from, copy_of("/f", "/dangling/"), base);
    BOOST_TEST(made.now->text("nowhere/yet/f") == "text");
    BOOST_TEST(made.now->stat("dangling")->is_link());
    const auto contents = co_await copy(w, from, copy_of("/rootfs", "/dangling"), base);
    BOOST_TEST(contents.now->text("nowhere/yet/bin/tool") == "tool");
    const auto into = co_await copy(w, from, copy_of("/rootfs/bin", "/bin"), base);
    BOOST_TEST(into.now->text("usr/bin/tool") == "tool");
    BOOST_TEST(into.now->stat("bin")->is_link());
    // The tree under "/" has a directory where the base has a link: neither may win silently.
    BOOST_TEST(says(co_await failure(copy(w, from, copy_of("/rootfs", "/"), base)), errc::invalid, "symbolic link"));
    // In a directory a file takes a link's place, be it one to a directory, and never writes through it.
    const auto placed = co_await copy(w, from, copy_of("/f", "/dir/"), base);
    BOOST_TEST(placed.now->stat("dir/f")->is_file());
    // A link that is the destination itself is followed, dangling or not (BuildKit resolves the whole path), inside the root.
    const auto behind = co_await copy(w, from, copy_of("/f", "/dir/bin"), base);
    BOOST_TEST(behind.now->text("victim") == "text");
    BOOST_TEST(behind.now->stat("dir/bin")->is_link());
    const auto nowhere = co_await copy(w, from, copy_of("/f", "/dangling"), base);
    BOOST_TEST(nowhere.now->text("nowhere/yet") == "text");
    BOOST_TEST(nowhere.now->stat("dangling")->is_link());
}

// The LLB flag alwaysReplaceExistingDestPaths: BuildKit's rule, two directories still merge.
WORLD_CASE(a_copy_may_replace_whatever_is_there) {
    write_file(w.context() / "src/bin/tool", "tool");
    write_file(w.context() / "src/name", "file");
    write_file(w.context() / "src/both/new", "new");
    const auto from = co_await open_context(w);
    const auto base = co_await chain_of(w, [](const stdfs::path& p) {
        write_file(p / "usr/bin/kept", "kept");
        stdfs::create_symlink("usr/bin", p / "bin");
        write_file(p / "name/in/side", "gone");
        write_file(p / "both/old", "old");
        write_file(p / "plain", "plain");
    });
    auto a = copy_of("/src", "/");
    BOOST_TEST((co_await failure(copy(w, from, a, base))).has_value());
    a.always_replace_existing = true;
    const auto got = co_await copy(w, from, a, base);
    BOOST_TEST(got.now->stat("bin")->is_dir());
    BOOST_TEST(got.now->text("bin/tool") == "tool");
    BOOST_TEST(got.now->text("usr/bin/kept") == "kept");
    BOOST_TEST(!got.now->has("usr/bin/tool"));
    BOOST_TEST(got.now->text("name") == "file");
    BOOST_TEST(got.now->root->list("both") == (std::vector<std::string>{"new", "old"}), boost::test_tools::per_element());
    a.dest = "/plain";
    BOOST_TEST((co_await copy(w, from, a, base)).now->text("plain/bin/tool") == "tool");
}

// COPY --chmod with an octal number is for the directories above as well (BuildKit's testCopyChmod), but not its special bits.
WORLD_CASE(modes_of_the_directories_above) {
    write_file(w.context() / "f", "x");
    const auto from = co_await open_context(w);
    const auto mode = [&](std::int32_t octal, std::string symbolic) -> task<std::string> {
        auto a = copy_of("/f", "/new/sub/f");
        a.mode = octal;
        a.mode_str = std::move(symbolic);
        const auto got = co_await copy(w, from, a);
        co_return cat(got.now->mode("new"), " ", got.now->mode("new/sub"), " ", got.now->mode("new/sub/f"));
    };
    BOOST_TEST((co_await mode(-1, "")) == "0755 0755 0644");
    BOOST_TEST((co_await mode(0770, "")) == "0770 0770 0770");
    BOOST_TEST((co_await mode(04711, "")) == "0711 0711 4711");
    BOOST_TEST((co_await mode(-1, "u+x,go=")) == "0755 0755 0700");
}

// COPY --parents: what has to be made gets the source's attributes, what was there keeps its owner and gets the mode (BuildKit).
WORLD_CASE(directories_on_the_way) {
    write_file(w.context() / "a/b/f", "x");
    stdfs::permissions(w.context() / "a", stdfs::perms(0751));
    stdfs::permissions(w.context() / "a/b", stdfs::perms(0711));
    const auto from = co_await open_context(w);
    const auto base = co_await chain_of(w, [](const stdfs::path& p) {
        stdfs::create_directories(p / "a");
        ::chown((p / "a").c_str(), 5, 6);
        ::chmod((p / "a").c_str(), 0700);
    });
    auto a = copy_of("/", "/");
    a.include_patterns = {"a/b/f"};
    const auto got = co_await copy(w, from, a, base);
    BOOST_TEST(got.now->owner("a") == "5:6");
    BOOST_TEST(got.now->mode("a") == "0751");
    BOOST_TEST(got.now->owner("a/b") == "0:0");
    BOOST_TEST(got.now->mode("a/b") == "0711");
    // What it lands on does not count for its content.
    BOOST_TEST(((co_await copy(w, from, a)).landed == got.landed));
}

// Behind the first wildcard no link is entered; a name with a backslash in it is that name first.
WORLD_CASE(wildcards_and_links) {
    write_file(w.context() / "real/x.txt", "x");
    stdfs::create_symlink("real", w.context() / "rlink");
    write_file(w.context() / "back\\slash", "backslash");
    write_file(w.context() / "backslash", "plain");
    const auto from = co_await open_context(w);
    BOOST_TEST((co_await copy(w, from, copy_of("/rlink/*.txt", "/d/"))).now->text("d/x.txt") == "x");
    BOOST_TEST(!(co_await copy(w, from, copy_of("/rl*/x.txt", "/d/"))).now->has("d/x.txt"));
    BOOST_TEST((co_await copy(w, from, copy_of("/r*/x.txt", "/d/"))).now->text("d/x.txt") == "x");
    BOOST_TEST((co_await copy(w, from, copy_of("/back\\slash", "/f"))).now->text("f") == "backslash");
}

// O-FS-12 (the copy's half): a socket is left out, a FIFO is kept.
WORLD_CASE(sockets_and_pipes) {
    const filler fill = [](const stdfs::path& p) {
        stdfs::create_directories(p / "run");
        BOOST_REQUIRE(::mknod((p / "run/sock").c_str(), S_IFSOCK | 0600, 0) == 0);
        BOOST_REQUIRE(::mkfifo((p / "run/fifo").c_str(), 0640) == 0);
    };
    fill(w.context());
    const auto live = co_await open_context(w);
    const auto stage = co_await chain_of(w, fill);
    for (const auto& from : {live, solver::result(stage)}) {
        const auto got = co_await copy(w, from, copy_of("/run", "/r"));
        BOOST_TEST(got.now->root->list("r") == (std::vector<std::string>{"fifo"}), boost::test_tools::per_element());
        BOOST_TEST((got.now->stat("r/fifo")->mode & S_IFMT) == static_cast<unsigned>(S_IFIFO));
        BOOST_TEST(!(co_await copy(w, from, copy_of("/run/s*", "/r/"))).now->has("r/sock"));
    }
    BOOST_TEST(says(co_await failure(copy(w, live, copy_of("/run/sock", "/r"))), errc::not_found, "socket"));
}

// O-IG-05: of a tree that cannot match no directory is opened.
WORLD_CASE(what_cannot_match_is_not_walked) {
    write_file(w.context() / "foo/requirements.txt", "x");
    write_file(w.context() / "foo/other", "x");
    const unique_fd watch{::inotify_init1(IN_NONBLOCK | IN_CLOEXEC)};
    const auto observe = [&](const stdfs::path& p) { return ::inotify_add_watch(watch.get(), p.c_str(), IN_OPEN | IN_ONLYDIR); };
    for (int i = 0; i < 40; ++i) {
        const auto dir = w.context() / cat("huge", i % 4) / cat("d", i);
        write_file(dir / "deep/f", "x");
        for (const auto& d : {dir.parent_path(), dir, dir / "deep"}) BOOST_REQUIRE(observe(d) >= 0);
    }
    const int foo = observe(w.context() / "foo");
    const auto from = co_await open_context(w, {{"local.excludepatterns", R"(["*","!foo/requirements.txt"])"}});
    const auto got = co_await copy(w, from, copy_of("/", "/"));
    BOOST_TEST(got.now->root->list("") == (std::vector<std::string>{"foo"}), boost::test_tools::per_element());
    BOOST_TEST(got.now->root->list("foo") == (std::vector<std::string>{"requirements.txt"}), boost::test_tools::per_element());
    std::array<char, 65536> buffer{};
    bool entered = false;
    for (ssize_t n = 0; (n = ::read(watch.get(), buffer.data(), buffer.size())) > 0;)
        for (ssize_t at = 0; at < n;) {
            inotify_event e{};
            std::memcpy(&e, buffer.data() + at, sizeof e);
            at += static_cast<ssize_t>(sizeof e + e.len);
            BOOST_TEST(e.wd == foo);
            entered = entered || e.wd == foo;
        }
    BOOST_TEST(entered);
}

// O-SL-02, O-SL-08
WORLD_CASE(links_at_the_source) {
    const auto from = co_await chain_of(w, [](const stdfs::path& p) {
        write_file(p / "usr/lib64/l", "lib");
        stdfs::create_symlink("/usr/lib64", p / "lib64");
        stdfs::create_symlink("lib64", p / "one");
        stdfs::create_symlink("/one", p / "two");
        stdfs::create_symlink("b", p / "usr/a");
        stdfs::create_symlink("a", p / "usr/b");
        stdfs::create_symlink("../../../../etc/hostname", p / "escape");
    });
    BOOST_TEST((co_await copy(w, from, copy_of("/two/l", "/got"))).now->text("got") == "lib");
    BOOST_TEST((co_await copy(w, from, copy_of("/lib64", "/d"))).now->text("d/l") == "lib");
    auto kept = copy_of("/lib64", "/d");
    kept.follow_symlink = false;
    BOOST_TEST((co_await copy(w, from, kept)).now->root->read_link("d") == "/usr/lib64");
    const auto loops = co_await copy(w, from, copy_of("/usr", "/u"));
    BOOST_TEST(loops.now->root->read_link("u/a") == "b");
    BOOST_TEST(loops.now->root->read_link("u/b") == "a");
    BOOST_TEST(says(co_await failure(copy(w, from, copy_of("/escape", "/e"))), errc::not_found, "/escape"));
    write_file(w.context() / "real", "text");
    stdfs::create_symlink("real", w.context() / "link");
    const auto live = co_await open_context(w);
    // The name is that of the link, the content what it leads to.
    BOOST_TEST((co_await copy(w, live, copy_of("/link", "/d/"))).now->text("d/link") == "text");
}

// O-CP-01, O-CP-03, O-CP-04, O-CP-06
WORLD_CASE(wildcards) {
    for (const auto* name : {"a.txt", "b.txt", "c.md", "file[0].txt", "star*", "new\nline.txt", "\xe9", "d/x.txt", "e/x.txt", "d/y.md"})
        write_file(w.context() / name, name);
    const auto from = co_await open_context(w);
    const auto two = co_await copy(w, from, copy_of("/[ab].txt", "/d/"));
    BOOST_TEST(two.now->root->list("d") == (std::vector<std::string>{"a.txt", "b.txt"}), boost::test_tools::per_element());
    // More than one source, so the destination is a directory whatever its spelling.
    BOOST_TEST((co_await copy(w, from, copy_of("/[ab].txt", "/d"))).now->text("d/b.txt") == "b.txt");
    BOOST_TEST((co_await copy(w, from, copy_of("/c.*", "/out"))).now->text("out") == "c.md");
    for (const auto* pattern : {"/file[[]0].txt", "/file\\[0\\].txt"})
        BOOST_TEST((co_await copy(w, from, copy_of(pattern, "/d/"))).now->text("d/file[0].txt") == "file[0].txt");
    BOOST_TEST((co_await copy(w, from, copy_of("/star\\*", "/d/"))).now->root->list("d").size() == 1U);
    BOOST_TEST((co_await copy(w, from, copy_of("/new\nline.txt", "/d/"))).now->text("d/new\nline.txt") == "new\nline.txt");
    BOOST_TEST((co_await copy(w, from, copy_of("/\xe9", "/d/"))).now->text("d/\xe9") == "\xe9");
    const auto deep = co_await copy(w, from, copy_of("/[de]/*.md", "/out/"));
    BOOST_TEST(deep.now->root->list("out") == (std::vector<std::string>{"y.md"}), boost::test_tools::per_element());
    // Directories among what matches have their contents copied, one over the other.
    BOOST_TEST((co_await copy(w, from, copy_of("/[de]", "/out/"))).now->root->list("out").size() == 2U);
    const auto none = co_await copy(w, from, {copy_of("/*.none", "/d/"), copy_of("/a.txt", "/d/")});
    BOOST_TEST(none.now->root->list("d").size() == 1U);
    auto strict = copy_of("/*.none", "/d/");
    strict.allow_empty_wildcard = false;
    BOOST_TEST(says(co_await failure(copy(w, from, strict)), errc::not_found, "*.none"));
    BOOST_TEST(says(co_await failure(copy(w, from, copy_of("/[a", "/d/"))), errc::invalid, "[a"));
    BOOST_TEST(says(co_await failure(copy(w, from, copy_of("/missing", "/d/"))), errc::not_found, "/missing"));
}

WORLD_CASE(what_the_action_excludes_and_includes) {
    for (const auto* name : {"home.txt", "home.md", "src/a.c", "src/a.o", "src/deep/b.c", "src/deep/b.o", "src/tmp/c.c"})
        write_file(w.context() / name, name);
    stdfs::create_symlink("home.md", w.context() / "home.link");
    const auto from = co_await open_context(w);
    auto top = copy_of("/hom*", "/d/");
    top.exclude_patterns = {"*.md"};
    const auto picked = co_await copy(w, from, top);
    BOOST_TEST(picked.now->root->list("d") == (std::vector<std::string>{"home.link", "home.txt"}), boost::test_tools::per_element());
    auto single = copy_of("/home.md", "/d/");
    single.exclude_patterns = {"*.md"};
    BOOST_TEST(!(co_await copy(w, from, single)).now->has("d/home.md"));
    auto tree = copy_of("/src", "/d");
    tree.exclude_patterns = {"**/*.o", "tmp", "!tmp/c.c"};
    const auto left = co_await copy(w, from, tree);
    BOOST_TEST(left.now->has("d/a.c"));
    BOOST_TEST(left.now->has("d/deep/b.c"));
    BOOST_TEST(!left.now->has("d/a.o"));
    BOOST_TEST(!left.now->has("d/deep/b.o"));
    BOOST_TEST(left.now->has("d/tmp/c.c"));
    // COPY --parents src/deep/*.c /d/, and with the pivot src/./deep
    auto parents = copy_of("/", "/d/");
    parents.include_patterns = {"src/deep/*.c"};
    const auto kept = co_await copy(w, from, parents);
    BOOST_TEST(kept.now->has("d/src/deep/b.c"));
    BOOST_TEST(!kept.now->has("d/src/a.c"));
    BOOST_TEST(!kept.now->has("d/src/tmp"));
    auto pivot = copy_of("/src", "/d/");
    pivot.include_patterns = {"deep/b.c"};
    pivot.required_paths = {"/src/deep/b.c"};
    BOOST_TEST((co_await copy(w, from, pivot)).now->has("d/deep/b.c"));
    pivot.required_paths = {"/src/deep/none"};
    BOOST_TEST(says(co_await failure(copy(w, from, pivot)), errc::not_found, "/src/deep/none"));
}

// O-IG: what the client's rules hide is not there, whichever way it is asked for.
WORLD_CASE(ignored_files_are_invisible) {
    for (const auto* name : {"keep", "secret", "data/one", "data/two", "node_modules/a/b", "x/deep/more.py", "x/deep/x.txt"})
        write_file(w.context() / name, name);
    stdfs::create_symlink("secret", w.context() / "to-secret");
    stdfs::create_symlink("keep", w.context() / "hidden-link");
    const auto from =
        co_await open_context(w, {{"local.excludepatterns", R"(["secret","hidden-link","data/one","node_modules","x/**","!**/*.py"])"}});
    const auto all = co_await copy(w, from, copy_of("/", "/all/"));
    for (const auto* there : {"all/keep", "all/data/two", "all/x/deep/more.py", "all/to-secret"}) BOOST_TEST(all.now->has(there), there);
    for (const auto* gone : {"all/secret", "all/data/one", "all/node_modules", "all/x/deep/x.txt", "all/hidden-link"})
        BOOST_TEST(!all.now->has(gone), gone);
    for (const auto* path : {"/secret", "/data/one", "/node_modules", "/node_modules/a", "/hidden-link"})
        BOOST_TEST(says(co_await failure(copy(w, from, copy_of(path, "/d/"))), errc::not_found, "the ignore file excludes it"), path);
    BOOST_TEST((co_await failure(copy(w, from, copy_of("/to-secret", "/d/")))).has_value());
    BOOST_TEST((co_await copy(w, from, copy_of("/s*", "/d/"))).now->has("d") == false);
    auto required = copy_of("/", "/d/");
    required.include_patterns = {"secret"};
    required.required_paths = {"/secret"};
    BOOST_TEST(says(co_await failure(copy(w, from, required)), errc::not_found, "/secret"));
    // A hidden file may change without a new key.
    write_file(w.context() / "secret", "changed");
    write_file(w.context() / "node_modules/new", "new");
    BOOST_TEST(((co_await copy(w, from, copy_of("/", "/all/"))).landed == all.landed));
    const auto some = co_await open_context(w, {{"local.includepattern", R"(["data","x/deep/*.py"])"}});
    const auto part = co_await copy(w, some, copy_of("/", "/"));
    BOOST_TEST(part.now->has("data/one"));
    BOOST_TEST(part.now->has("x/deep/more.py"));
    BOOST_TEST(!part.now->has("keep"));
    BOOST_TEST(!part.now->has("x/deep/x.txt"));
}

BOOST_AUTO_TEST_SUITE_END()

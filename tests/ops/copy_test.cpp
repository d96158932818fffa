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

#include <cstdint>
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
    // A file takes a link's place, be it one to a directory, and never writes through it.
    const auto placed = co_await copy(w, from, copy_of("/f", "/dir/"), base);
    BOOST_TEST(placed.now->stat("dir/f")->is_file());
    auto named = copy_of("/f", "/dir/bin");
    BOOST_TEST((co_await copy(w, from, named, base)).now->text("victim") == "safe");
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

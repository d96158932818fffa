#include "snapshot/world.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.state;
import cobuild.content;
import cobuild.snapshot;

#include <cstdint>
#include "snapshot/world_body.hpp"

BOTH(a_layer_is_written_committed_and_seen) {
    BOOST_TEST(s->name() == (kind == "native" ? "native" : "overlayfs"));
    const auto a = co_await add(*s, {}, [](int root) { put(root, "a", "one"); }, {.kind = "source.local", .description = "first"});
    const auto view = co_await s->view({{a.id}});
    BOOST_TEST(get(view.fd(), "a") == "one");
    BOOST_TEST(get(s->layer_dir(a.id).get(), "a") == "one");
    BOOST_TEST(::mkdirat(view.fd(), "b", 0755) != 0);
    BOOST_TEST(errno == EROFS);
    struct stat st{};
    BOOST_REQUIRE(::fstat(view.fd(), &st) == 0);
    BOOST_TEST((st.st_mode & 07777) == 0755u);
    BOOST_TEST((names_in(dir / "layers" / std::to_string(a.id.value)) == std::set<std::string>{"fs", "self"}));
    BOOST_TEST(names_in(dir / "active").empty());
    const auto nothing = co_await s->view({});
    BOOST_TEST(absent(nothing.fd(), "a"));
    BOOST_TEST(::mkdirat(nothing.fd(), "b", 0755) != 0);
}

BOTH(a_layer_holds_just_what_changed) {
    const auto a = co_await add(*s, {}, [](int root) {
        for (const auto* name : {"same", "changed", "gone", "mode", "linked"}) put(root, name, name);
        for (const auto* name : {"tree", "replaced", "kept", "moved", "meta"}) BOOST_REQUIRE(::mkdirat(root, name, 0755) == 0);
        for (const auto* name : {"tree/x", "replaced/old", "kept/quiet", "kept/loud", "moved/inside"}) put(root, name, name);
        BOOST_REQUIRE(::symlinkat("same", root, "link") == 0);
        BOOST_REQUIRE(::fchmodat(root, ".", 01777, 0) == 0);
    });
    const chain below{{a.id}};
    auto w = co_await s->begin(below);
    BOOST_TEST((w.lower() == below));
    {
        const auto m = co_await w.mount();
        const int root = m.get();
        BOOST_TEST(get(root, "tree/x") == "tree/x");
        struct stat st{};
        BOOST_REQUIRE(::fstat(root, &st) == 0);
        BOOST_TEST((st.st_mode & 07777) == 01777u);
        put(root, "changed", "new text");
        put(root, "kept/loud", "louder");
        put(root, "new", "new");
        BOOST_REQUIRE(::unlinkat(root, "gone", 0) == 0);
        BOOST_REQUIRE(::fchmodat(root, "mode", 0600, 0) == 0);
        BOOST_REQUIRE(::unlinkat(root, "tree/x", 0) == 0 && ::unlinkat(root, "tree", AT_REMOVEDIR) == 0);
        BOOST_REQUIRE(::unlinkat(root, "replaced/old", 0) == 0 && ::unlinkat(root, "replaced", AT_REMOVEDIR) == 0);
        BOOST_REQUIRE(::mkdirat(root, "replaced", 0700) == 0);
        put(root, "replaced/young", "y");
        BOOST_REQUIRE(::mkdirat(root, "elsewhere", 0755) == 0);
        BOOST_REQUIRE(::renameat(root, "moved/inside", root, "elsewhere/inside") == 0 && ::unlinkat(root, "moved", AT_REMOVEDIR) == 0);
        BOOST_REQUIRE(::linkat(root, "new", root, "new2", 0) == 0);
        BOOST_REQUIRE(::fchmodat(root, "meta", 0711, 0) == 0);
    }
    const auto b = co_await s->commit(std::move(w), {});
    const auto layer_fd = s->layer_dir(b.id);
    const int top = layer_fd.get();
    for (const auto* name : {"gone", "tree", "moved"}) BOOST_TEST(is_whiteout(top, name), name);
    for (const auto* name : {"same", "link", "kept/quiet", "linked"}) BOOST_TEST(absent(top, name), name);
    BOOST_TEST(get(top, "changed") == "new text");
    BOOST_TEST(get(top, "kept/loud") == "louder");
    BOOST_TEST(get(top, "mode") == "mode");
    BOOST_TEST(get(top, "elsewhere/inside") == "moved/inside");
    char opaque = 0;
    const unique_fd replaced(::openat(top, "replaced", O_RDONLY | O_DIRECTORY));
    // either says that what was in it is gone; an inode number used again makes the copying store take the longer way
    if (!is_whiteout(replaced.get(), "old")) {
        BOOST_TEST(::fgetxattr(replaced.get(), "trusted.overlay.opaque", &opaque, 1) == 1);
        BOOST_TEST(opaque == 'y');
    }
    struct stat st{};
    BOOST_REQUIRE(::fstatat(top, "meta", &st, 0) == 0);
    BOOST_TEST((st.st_mode & 07777) == 0711u);

    const auto view = co_await s->view(on(below, b));
    const int root = view.fd();
    BOOST_TEST(get(root, "same") == "same");
    BOOST_TEST(get(root, "link") == "same");
    BOOST_TEST(get(root, "kept/quiet") == "kept/quiet");
    BOOST_TEST(get(root, "replaced/young") == "y");
    for (const auto* name : {"gone", "tree", "moved", "replaced/old"}) BOOST_TEST(absent(root, name), name);
    BOOST_REQUIRE(::fstatat(root, "new", &st, 0) == 0);
    BOOST_TEST(st.st_nlink == 2u);
    // a suffix of a chain looks like a tree of its own: no whiteouts shine through
    const auto alone = co_await s->view({{b.id}});
    BOOST_TEST(absent(alone.fd(), "gone"));
    BOOST_TEST(get(alone.fd(), "changed") == "new text");
}

BOTH(what_is_not_committed_goes_away) {
    {
        auto w = co_await s->begin({});
        const auto m = co_await w.mount();
        put(m.get(), "x", "x");
        auto u = co_await s->begin_unpack();
        put(u.fd(), "y", "y");
        BOOST_TEST(names_in(dir / "active").size() == 2u);
    }
    BOOST_TEST(names_in(dir / "active").empty());
    co_await d->empty_trash();
    BOOST_TEST(names_in(dir / "trash").empty());
    BOOST_TEST((co_await s->du()).empty());
}

// Steps that changed nothing are one empty layer, and a chain may have a layer with content twice as well (O-CA-08).
BOTH(a_layer_may_stand_twice_in_a_chain) {
    const auto a = co_await add(*s, {}, [](int root) { put(root, "a", "below"); });
    const auto b = co_await add(*s, {{a.id}}, [](int root) { put(root, "a", "above"); });
    const chain twice{{a.id, b.id, a.id}};
    const auto view = co_await s->view(twice);
    BOOST_TEST(get(view.fd(), "a") == "below");
    const auto same = co_await s->view({{a.id, a.id}});
    BOOST_TEST(get(same.fd(), "a") == "below");
    auto w = co_await s->begin(twice);
    const auto m = co_await w.mount();
    BOOST_TEST(get(m.get(), "a") == "below");
}

BOTH(a_writable_may_be_mounted_again) {
    const auto a = co_await add(*s, {}, [](int root) { put(root, "a", "a"); });
    auto w = co_await s->begin({{a.id}});
    for (const auto* name : {"first", "second"}) {
        const auto m = co_await w.mount();
        put(m.get(), name, name);
    }
    const auto b = co_await s->commit(std::move(w), {});
    const auto view = co_await s->view({{a.id, b.id}});
    BOOST_TEST(get(view.fd(), "first") + get(view.fd(), "second") == "firstsecond");
}

BOTH(a_pulled_layer_is_found_and_adopted) {
    const auto diff = digest::of("diff");
    const snapshot::layer_blob blob{.variant = "pulled",
                                    .blob = digest::of("blob"),
                                    .size = 7,
                                    .media_type = "application/x",
                                    .diff_id = diff,
                                    .annotations = {{"k\n", "v\t\\"}}};
    BOOST_TEST(!(co_await s->find_by_diff_id(diff)).has_value());
    auto u = co_await s->begin_unpack();
    put(u.fd(), "f", "pulled");
    auto twin = co_await s->begin_unpack();
    put(twin.fd(), "f", "pulled");
    const auto a = co_await s->commit(std::move(u), {.diff_id = diff, .blob = blob, .whiteouts = false});
    auto other = blob;
    other.variant = "zstd";
    other.blob = digest::of("other");
    const auto b = co_await s->commit(std::move(twin), {.diff_id = diff, .blob = other});
    BOOST_TEST((a.id == b.id));
    BOOST_TEST(names_in(dir / "active").empty());
    const auto found = co_await s->find_by_diff_id(diff);
    BOOST_REQUIRE(found.has_value());
    BOOST_TEST((found->id == a.id));
    const auto blobs = co_await s->blobs(a.id);
    BOOST_REQUIRE(blobs.size() == 2u);
    BOOST_TEST((blobs[0] == blob));
    BOOST_TEST((blobs[1] == other));
    BOOST_TEST((co_await s->all_blobs()).size() == 2u);

    const auto id = digest::of("chain");
    auto leaning = co_await s->begin_unpack();
    const auto c = co_await s->commit(std::move(leaning), {.diff_id = digest::of("leaning"), .chain_id = id});
    BOOST_TEST(!(co_await s->find_by_diff_id(digest::of("leaning"))).has_value());
    const auto by_chain = co_await s->find_by_chain_id(id);
    BOOST_REQUIRE(by_chain.has_value());
    BOOST_TEST((by_chain->id == c.id));
    BOOST_TEST(((co_await failing(s->set_blob(layer_id{9999}, blob))) == errc::not_found));
}

BOTH(removal_waits_for_users_and_numbers_are_not_used_again) {
    auto a = co_await add(*s, {}, [](int root) { put(root, "a", "a"); });
    auto b = co_await add(*s, {{a.id}}, [](int root) { put(root, "b", "b"); });
    const auto ids = chain{{a.id, b.id}};
    BOOST_TEST(!co_await s->remove(a.id));
    {
        const auto view = co_await s->view(ids);
        a.keep = {};
        b.keep = {};
        BOOST_TEST(!co_await s->remove(a.id));
        BOOST_TEST((co_await s->du())[0].in_use);
    }
    const auto pin = co_await s->hold(ids);
    BOOST_REQUIRE(pin.has_value());
    BOOST_TEST(!co_await s->remove(b.id));
    auto w = std::make_optional(co_await s->begin({{a.id}}));
    const_cast<std::optional<state::pin>&>(pin).reset();
    BOOST_TEST(!co_await s->remove(a.id));
    BOOST_TEST(co_await s->remove(b.id));
    BOOST_TEST(!co_await s->remove(b.id));
    w.reset();
    BOOST_TEST(co_await s->remove(a.id));
    BOOST_TEST(!(co_await s->hold(ids)).has_value());
    BOOST_TEST(((co_await failing(s->view(ids))) == errc::not_found));
    BOOST_TEST(((co_await failing(s->begin(ids))) == errc::not_found));
    BOOST_TEST((co_await s->du()).empty());
    const auto c = co_await add(*s, {}, [](int) {});
    BOOST_TEST(c.id.value > b.id.value);
}

// O-EN-08
BOTH(usage_tells_what_the_disk_holds) {
    const auto a =
        co_await add(*s, {}, [](int root) { put(root, "big", std::string(60'000, 'x')); }, {.kind = "source.local", .description = "local\nfiles"});
    const auto b = co_await add(*s, {{a.id}}, [](int root) {
        put(root, "other", std::string(40'000, 'y'));
        BOOST_REQUIRE(::linkat(root, "other", root, "again", 0) == 0);
    });
    (void)co_await s->hold({{a.id}});
    const auto lines = co_await s->du();
    BOOST_REQUIRE(lines.size() == 2u);
    BOOST_TEST(lines[0].kind == "source.local");
    BOOST_TEST(lines[0].description == "local\nfiles");
    BOOST_TEST(lines[0].use_count == 1u);
    BOOST_TEST(lines[0].last_used.has_value());
    BOOST_TEST((lines[1].parents == std::vector<layer_id>{a.id}));
    BOOST_TEST(lines[0].size >= 60'000u);
    BOOST_TEST(lines[0].size <= 60'000u + 3 * 4096u);
    BOOST_TEST(lines[1].size >= 40'000u);
    BOOST_TEST(lines[1].size <= 40'000u + 3 * 4096u);
    BOOST_TEST((co_await s->du())[1].size == lines[1].size);
}

BOTH(long_chains_are_copied_together_and_look_the_same) {
    const auto small = open_kind(kind, d, {.max_chain = 4});
    chain all;
    std::vector<layer> kept;
    for (int i = 0; i < 11; ++i) {
        kept.push_back(co_await add(*small, all, [&](int root) {
            put(root, cat("file", i), cat(i));
            put(root, "latest", cat(i));
            if (i >= 2) BOOST_REQUIRE(::unlinkat(root, cat("file", i - 2).c_str(), 0) == 0);
        }));
        all = on(all, kept.back());
    }
    const auto view = co_await small->view(all);
    BOOST_TEST(get(view.fd(), "latest") == "10");
    for (int i = 0; i < 11; ++i) BOOST_TEST(get(view.fd(), cat("file", i)) == (i < 9 ? "<absent>" : cat(i)));
    if (kind == "native") co_return;
    std::size_t copies = 0;
    for (const auto& u : co_await small->du()) copies += u.kind == "internal";
    const auto again = co_await small->view(all);
    std::size_t after = 0;
    for (const auto& u : co_await small->du()) after += u.kind == "internal";
    BOOST_TEST(copies >= 1u);
    BOOST_TEST(after == copies);
}

BOTH(records_are_rebuilt_from_the_layers) {
    const snapshot::layer_blob blob{.variant = "gzip", .blob = digest::of("b"), .size = 5, .media_type = "m", .diff_id = digest::of("d")};
    auto u = co_await s->begin_unpack();
    put(u.fd(), "f", "pulled");
    const auto a = co_await s->commit(std::move(u), {.diff_id = digest::of("d"), .size = 123, .whiteouts = false});
    co_await s->set_blob(a.id, blob);
    auto b = co_await add(*s, {{a.id}}, [](int) {}, {.description = "two\nlines \\ tab\t"});
    const auto before = co_await s->du();
    b.keep = {};
    const auto pool = &d->pool();
    s.reset();
    const_cast<layer&>(a).keep = {};
    d.reset();
    std::ofstream(dir / "state.db", std::ios::trunc) << "damaged beyond all recognition, but long enough to have a header of some kind or other";
    d = directory::open(dir.path().string(), *pool);
    BOOST_TEST(d->rebuilt());
    s = open_kind(kind, d);
    const auto after = co_await s->du();
    BOOST_REQUIRE(after.size() == 2u);
    BOOST_TEST((after[0].id == before[0].id));
    BOOST_TEST(after[0].size == 123u);
    BOOST_TEST(after[1].description == "two\nlines \\ tab\t");
    BOOST_TEST((after[1].created == before[1].created));
    BOOST_TEST((after[1].parents == before[1].parents));
    BOOST_TEST((co_await s->find_by_diff_id(digest::of("d"))).has_value());
    BOOST_TEST(((co_await s->blobs(a.id)) == std::vector<snapshot::layer_blob>{blob}));
    const auto c = co_await add(*s, {{b.id}}, [](int) {});
    BOOST_TEST(c.id.value > b.id.value);
}

BOTH(many_tasks_work_at_once) {
    const auto base = co_await add(*s, {}, [](int root) { put(root, "base", "base"); });
    std::vector<task<void>> all;
    std::set<std::uint64_t> ids;
    const auto one = [](store& st, layer_id below, int i, std::set<std::uint64_t>& out) -> task<void> {
        const auto l = co_await add(st, {{below}}, [&](int root) { put(root, "mine", cat(i)); });
        const auto v = co_await st.view({{below, l.id}});
        BOOST_TEST(get(v.fd(), "mine") == cat(i));
        out.insert(l.id.value);
    };
    for (int i = 0; i < 20; ++i) all.push_back(one(*s, base.id, i, ids));
    co_await when_all(std::move(all));
    BOOST_TEST(ids.size() == 20u);
}

#include "snapshot/world.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.state;
import cobuild.content;
import cobuild.snapshot;

#include <cstdint>
#include "snapshot/world_body.hpp"

namespace {

constexpr std::array<const char*, 2> kinds{"overlay", "native"};

struct opened {
    runtime rt;
    std::shared_ptr<directory> d;
    std::shared_ptr<store> s;
    opened(const fs::path& root, const std::string& kind, const std::string& boot = {})
        : d(directory::open(root.string(), rt.pool(), {.boot_id = boot})), s(open_kind(kind, d)) {}
    void recover() {
        (void)rt.block_on(d->recover());
        rt.block_on(d->empty_trash());
    }
    layer commit(const chain& below, std::string_view text) {
        return rt.block_on(add(*s, below, [&](int root) { put(root, "f", text); }));
    }
    std::size_t records() { return rt.block_on(s->du()).size(); }
};

std::size_t layer_dirs(const fs::path& root) {
    std::size_t n = 0;
    for (const auto& name : names_in(root / "layers")) n += name.find_first_not_of("0123456789") == std::string::npos;
    return n;
}

}  // namespace

BOOST_AUTO_TEST_CASE(death_at_any_point_leaves_a_directory_that_works) {
    if (!test::needs_root()) return;
    struct expectation {
        const char* point;
        bool committed_stays;
    };
    for (const auto* kind : kinds) {
        for (const auto* point : {"layer-described", "layer-placed", "layer-removed"}) {
            const test::scratch_dir dir;
            child killed([&] {
                opened o(dir.path(), kind);
                {
                    auto first = o.commit({}, "first");
                    ::setenv("COBUILD_CRASH_AT", point, 1);
                    if (std::string_view(point) != "layer-removed") (void)o.commit({{first.id}}, "second");
                    first.keep = {};
                    (void)o.rt.block_on(o.s->remove(first.id));
                }
                return 0;
            });
            BOOST_TEST(killed.wait() == -SIGKILL);
            const bool removed = std::string_view(point) == "layer-removed";
            opened o(dir.path(), kind);
            o.recover();
            BOOST_TEST(names_in(dir / "active").empty(), point);
            BOOST_TEST(o.records() == (removed ? 0u : 1u), point);
            const auto next = o.commit({}, "next");
            BOOST_TEST(get(o.s->layer_dir(next.id).get(), "f") == "next");
            BOOST_TEST(o.records() == (removed ? 1u : 2u), point);
            BOOST_TEST(layer_dirs(dir.path()) == o.records(), point);
            BOOST_TEST(names_in(dir / "trash").size() <= 2u);
            o.recover();
            BOOST_TEST(names_in(dir / "trash").empty());
        }
    }
}

BOOST_AUTO_TEST_CASE(a_killed_step_leaves_neither_mount_nor_directory) {
    if (!test::needs_root()) return;
    for (const auto* kind : kinds) {
        const test::scratch_dir dir;
        const auto mounts = mount_table();
        child killed([&] {
            opened o(dir.path(), kind);
            const auto base = o.commit({}, "base");
            o.rt.block_on([](store& s, layer_id below) -> task<void> {
                auto w = co_await s.begin({{below}});
                const auto m = co_await w.mount();
                put(m.get(), "half", "done");
                const auto v = co_await s.view({{below}});
                child::reached();
            }(*o.s, base.id));
            return 0;
        });
        BOOST_REQUIRE(killed.wait_reached());
        opened o(dir.path(), kind);
        o.recover();
        BOOST_TEST(!o.rt.block_on(o.s->remove(layer_id{1})));  // pinned by the other
        BOOST_TEST(names_in(dir / "active").size() >= 1u);
        (void)killed.kill();
        o.recover();
        BOOST_TEST(names_in(dir / "active").empty());
        BOOST_TEST(o.records() == 1u);
        BOOST_TEST(o.rt.block_on(o.s->remove(layer_id{1})));
        BOOST_TEST(mount_table() == mounts);
    }
}

BOOST_AUTO_TEST_CASE(after_a_reboot_only_what_was_synced_remains) {
    if (!test::needs_root()) return;
    for (const auto* kind : kinds) {
        const test::scratch_dir dir;
        layer_id synced, lost, fresh;
        {
            opened o(dir.path(), kind, "boot-1");
            synced = o.commit({}, "synced").id;
            o.rt.block_on(o.s->sync());
            lost = o.commit({}, "lost").id;
        }
        {
            opened o(dir.path(), kind, "boot-1");  // the machine did not stop: both are there
            BOOST_TEST(o.records() == 2u);
        }
        {
            opened o(dir.path(), kind, "boot-2");
            BOOST_TEST(o.rt.block_on(o.s->hold({{synced}})).has_value());
            BOOST_TEST(!o.rt.block_on(o.s->hold({{lost}})).has_value());
            fresh = o.commit({}, "fresh").id;
            BOOST_TEST(fresh.value > lost.value);
        }
        // and the same when the records are gone as well
        std::ofstream(dir / "state.db", std::ios::trunc) << "damaged, and it is long enough to be looked at as if it were a database's first page";
        opened o(dir.path(), kind, "boot-3");
        BOOST_TEST(o.rt.block_on(o.s->hold({{synced}})).has_value());
        BOOST_TEST(!o.rt.block_on(o.s->hold({{fresh}})).has_value());
        BOOST_TEST(o.commit({}, "newer").id.value > fresh.value);
    }
}

BOOST_AUTO_TEST_CASE(records_lost_with_the_power_do_not_give_their_numbers_to_others) {
    if (!test::needs_root()) return;
    const test::scratch_dir dir;
    std::uint64_t last = 0;
    {
        opened o(dir.path(), "overlay", "boot-1");
        (void)o.commit({}, "1");
        o.d->database().checkpoint();
        fs::copy_file(dir / "state.db", dir / "old");
        for (int i = 0; i < 5; ++i) last = o.commit({}, "x").id.value;
    }
    fs::rename(dir / "old", dir / "state.db");  // as if the last writes had not reached the disk
    opened o(dir.path(), "overlay", "boot-2");
    BOOST_TEST(o.commit({}, "y").id.value > last);
    BOOST_TEST(layer_dirs(dir.path()) == 1u);
}

BOOST_AUTO_TEST_CASE(two_processes_share_one_root) {
    if (!test::needs_root()) return;
    for (const auto* kind : kinds) {
        const test::scratch_dir dir;
        const auto work = [&](std::vector<std::uint64_t>& ids) {
            opened o(dir.path(), kind);
            o.rt.block_on([](store& s, std::vector<std::uint64_t>& out) -> task<void> {
                for (int i = 0; i < 15; ++i) {
                    auto u = co_await s.begin_unpack();
                    put(u.fd(), "f", cat(i));
                    const auto base = co_await s.commit(std::move(u), {.diff_id = digest::of(cat(i))});
                    const auto l = co_await add(s, {{base.id}}, [&](int root) { put(root, "g", get(root, "f")); });
                    const auto v = co_await s.view({{base.id, l.id}});
                    if (get(v.fd(), "g") != cat(i)) throw error{errc::corrupt, "wrong bytes"};
                    out.push_back(base.id.value);
                }
                co_await s.sync();
            }(*o.s, ids));
        };
        std::vector<std::uint64_t> ours;
        child other([&] {
            std::vector<std::uint64_t> theirs;
            work(theirs);
            std::ofstream out(dir / "theirs");
            for (const auto id : theirs) out << id << '\n';
            return 0;
        });
        work(ours);
        BOOST_TEST(other.wait() == 0);
        std::ifstream in(dir / "theirs");
        const std::vector<std::uint64_t> theirs{std::istream_iterator<std::uint64_t>(in), {}};
        BOOST_TEST(theirs == ours, boost::test_tools::per_element());  // one of two equal layers won, for both
        opened o(dir.path(), kind);
        BOOST_TEST(o.records() == 45u);
    }
}

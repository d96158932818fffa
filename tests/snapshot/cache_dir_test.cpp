#include "snapshot/world.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.state;
import cobuild.content;
import cobuild.snapshot;

#include <cstdint>
#include "snapshot/world_body.hpp"

using snapshot::cache_dir;
using snapshot::cache_request;
using snapshot::sharing;

namespace {

task<void> take_turn(store& s, std::string id, int& inside, int& most, int& done, event& gate) {
    const auto c = co_await s.acquire_cache({.id = std::move(id), .sharing = sharing::locked});
    most = std::max(most, ++inside);
    co_await gate.wait();
    --inside;
    ++done;
}

struct stat look(int dir) {
    struct stat st{};
    BOOST_REQUIRE(::fstat(dir, &st) == 0);
    return st;
}

}  // namespace

BOTH(a_cache_directory_outlives_its_users) {
    layer_id id;
    {
        const auto c = co_await s->acquire_cache({.id = "pip", .uid = 12, .gid = 13, .mode = 0750, .description = "cached mount /pip"});
        id = c.id();
        const auto m = c.mount();
        put(m.get(), "wheel", "w");
        const auto st = look(m.get());
        BOOST_TEST(st.st_uid == 12u);
        BOOST_TEST(st.st_gid == 13u);
        BOOST_TEST((st.st_mode & 07777) == 0750u);
        BOOST_TEST(!co_await s->remove(id));
    }
    const auto lines = co_await s->du();
    BOOST_REQUIRE(lines.size() == 1u);
    BOOST_TEST(lines[0].kind == "exec.cachemount");
    BOOST_TEST(lines[0].changeable);
    BOOST_TEST(!lines[0].in_use);
    {
        const auto c = co_await s->acquire_cache({.id = "pip", .sharing = sharing::locked, .uid = 12, .gid = 13, .mode = 0750});
        BOOST_TEST((c.id() == id));
        BOOST_TEST(get(c.mount().get(), "wheel") == "w");
    }
    BOOST_TEST(co_await s->remove(id));
    const auto c = co_await s->acquire_cache({.id = "pip", .uid = 12, .gid = 13, .mode = 0750});
    BOOST_TEST(get(c.mount().get(), "wheel") == "<absent>");
}

// O-CA-06, O-CA-05
BOTH(owners_and_seeds_make_directories_of_their_own) {
    const auto root = co_await s->acquire_cache({.id = "c"});
    const auto user = co_await s->acquire_cache({.id = "c", .uid = 1000});
    BOOST_TEST((root.id() != user.id()));
    const auto seed = co_await add(*s, {}, [](int r) {
        put(r, "seeded", "s");
        BOOST_REQUIRE(::fchmodat(r, ".", 0711, 0) == 0);
    });
    const auto seeded = co_await s->acquire_cache({.id = "c", .seed = {{seed.id}}});
    BOOST_TEST((seeded.id() != root.id()));
    const auto m = seeded.mount();
    BOOST_TEST(get(m.get(), "seeded") == "s");
    BOOST_TEST((look(m.get()).st_mode & 07777) == 0711u);
    put(m.get(), "seeded", "changed");
    BOOST_TEST(get(s->layer_dir(seed.id).get(), "seeded") == "s");

    std::set<std::uint64_t> ids;
    std::vector<task<void>> all;
    const auto one = [](store& st, std::set<std::uint64_t>& out) -> task<void> {
        const auto c = co_await st.acquire_cache({.id = "first", .uid = 7});
        BOOST_TEST(look(c.mount().get()).st_uid == 7u);
        out.insert(c.id().value);
    };
    for (int i = 0; i < 10; ++i) all.push_back(one(*s, ids));
    co_await when_all(std::move(all));
    BOOST_TEST(ids.size() == 1u);
}

BOTH(shared_is_one_and_private_is_another_when_busy) {
    const auto a = co_await s->acquire_cache({.id = "x"});
    const auto b = co_await s->acquire_cache({.id = "x"});
    BOOST_TEST((a.id() == b.id()));
    layer_id second;
    {
        const auto c = co_await s->acquire_cache({.id = "x", .sharing = sharing::exclusive});
        second = c.id();
        BOOST_TEST((second != a.id()));
        const auto e = co_await s->acquire_cache({.id = "x", .sharing = sharing::exclusive});
        BOOST_TEST((e.id() != second));
        BOOST_TEST((e.id() != a.id()));
    }
    const auto again = co_await s->acquire_cache({.id = "x", .sharing = sharing::exclusive});
    BOOST_TEST((again.id() == second));
    const auto more = co_await s->acquire_cache({.id = "x"});
    BOOST_TEST((more.id() == a.id()));
}

// O-CA-07
BOTH(locked_users_run_one_after_another_and_a_cancelled_one_leaves_the_queue) {
    int inside = 0, most = 0, done = 0;
    event gate;
    task_group group(co_await current_executor);
    for (int i = 0; i < 6; ++i) group.spawn(take_turn(*s, "l", inside, most, done, gate));
    while (inside == 0) co_await sleep_for(nanoseconds(0));
    cancel_source stop;
    {
        task_group waiting(co_await current_executor, true);
        waiting.spawn([](store& st, cancel_token t) -> task<void> {
            (void)co_await linked(t, st.acquire_cache({.id = "l", .sharing = sharing::locked}));
        }(*s, stop.token()));
        co_await sleep_for(nanoseconds(0));
        stop.cancel(error{errc::canceled, "not needed"});
        BOOST_TEST(((co_await failing([](task_group& g) -> task<int> {
                        co_await g.join();
                        co_return 0;
                    }(waiting))) == errc::canceled));
    }
    BOOST_TEST(inside == 1);
    gate.set();
    co_await group.join();
    BOOST_TEST(most == 1);
    BOOST_TEST(done == 6);
}

BOTH(other_processes_take_part) {
    const auto root = dir.path().string();
    s.reset();
    d.reset();
    child other([&] {
        runtime theirs;
        const auto st = open_kind(kind, directory::open(root, theirs.pool()));
        return theirs.block_on([](store& st2) -> task<int> {
            auto held = std::make_optional(co_await st2.acquire_cache({.id = "p", .sharing = sharing::locked}));
            put(held->mount().get(), "from", "child");
            child::reached();
            held.reset();
            co_return 0;
        }(*st));
    });
    BOOST_REQUIRE(other.wait_reached());
    d = directory::open(root, rt.pool());
    s = open_kind(kind, d);
    const auto apart = co_await s->acquire_cache({.id = "p", .sharing = sharing::exclusive});
    BOOST_TEST(get(apart.mount().get(), "from") == "<absent>");
    BOOST_TEST((co_await s->du())[0].in_use);
    BOOST_TEST(!co_await s->remove(layer_id{1}));
    const auto busy = (co_await s->du())[0].id;
    BOOST_TEST((busy != apart.id()));
    int got = 0;
    task_group group(co_await current_executor);
    const auto second = co_await s->acquire_cache({.id = "p", .sharing = sharing::exclusive});  // so that locked must wait for the child's
    BOOST_TEST((second.id() != busy));
    group.spawn([](store& st, int& out) -> task<void> {
        const auto c = co_await st.acquire_cache({.id = "p", .sharing = sharing::locked});
        out = get(c.mount().get(), "from") == "child" ? 1 : 2;
    }(*s, got));
    co_await sleep_for(nanoseconds(0));
    BOOST_TEST(got == 0);
    other.go();
    co_await group.join();
    BOOST_TEST(got == 1);
    BOOST_TEST(other.wait() == 0);
}

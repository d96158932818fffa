#include "support/support.hpp"

#include <algorithm>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

import cobuild.base;
import cobuild.async;
import cobuild.cache;
import cobuild.progress;
import cobuild.solver;
import cobuild.test.solver_fakes;

using namespace cobuild;
using test::graph_maker;
using test::plan;
using test::watcher;
using test::world;

namespace {

/// A build in the background that can be cancelled; its end is waited for by join().
struct background {
    graph_maker graph;
    watcher seen;
    async::cancel_source cancel;
    std::optional<std::string> made;
    std::optional<error> failed;
    async::event ended;

    async::task<void> run(world& w, std::size_t target) {
        try {
            made = co_await async::linked(cancel.token(), w.solve(graph, target, seen.sink));
        } catch (...) {
            failed = describe(std::current_exception());
        }
        ended.set();
    }
};

/// An op that says when it runs and goes on when it may.
struct gate {
    async::event entered;
    async::event open;
    async::task<void> pass() {
        entered.set();
        co_await open.wait();
    }
};

}  // namespace

CO_TEST_CASE(the_same_key_in_two_builds_runs_once) {
    world w;
    co_await w.open(rt);
    gate g;
    background a, b;
    const auto shared = [&](background& to) {
        const auto base = to.graph.add(plan{.name = "shared", .during = [&](solver::context ctx) -> async::task<void> {
                                                ctx.progress.output(progress::stream::out, "early");
                                                co_await g.pass();
                                                ctx.progress.output(progress::stream::out, "late");
                                            }});
        return to.graph.add(&to == &a ? "top a" : "top b", {base});
    };
    const auto ta = shared(a);
    const auto tb = shared(b);
    async::task_group group(rt.get_executor());
    group.spawn(a.run(w, ta));
    co_await g.entered.wait();
    group.spawn(b.run(w, tb));
    while (b.seen.started["shared"] == 0) co_await async::sleep_for(std::chrono::milliseconds(1));
    const auto dump = w.solver->debug_dump();
    BOOST_TEST(dump.find("\"shared\": is running, shared by 2") != std::string::npos);
    BOOST_TEST(dump.find("\"top a\": waits for the results of 1 input, of them \"shared\" (running)") != std::string::npos);
    g.open.set();
    co_await group.join();
    BOOST_TEST(a.graph.runs("shared") + b.graph.runs("shared") == 1);
    BOOST_TEST(a.made.value() == "top a(shared(),)");
    BOOST_TEST(b.made.value() == "top b(shared(),)");
    for (auto* one : {&a, &b}) {
        std::string log;
        for (const auto& e : one->seen.events)
            if (const auto* l = std::get_if<progress::log>(&e)) log += l->data + ";";
        BOOST_TEST(log == "early;late;");  // whoever comes late is told what was said
    }
    co_await w.close();
}

CO_TEST_CASE(cancelling_one_of_two_builds_leaves_the_shared_run_alone) {
    world w;
    co_await w.open(rt);
    gate g;
    background a, b;
    for (auto* one : {&a, &b}) one->graph.add(plan{.name = "shared", .during = [&](solver::context) { return g.pass(); }});
    async::task_group group(rt.get_executor());
    group.spawn(a.run(w, 0));
    co_await g.entered.wait();
    group.spawn(b.run(w, 0));
    while (b.seen.started["shared"] == 0) co_await async::sleep_for(std::chrono::milliseconds(1));
    a.cancel.cancel(error{errc::canceled, "the client has gone"});
    co_await a.ended.wait();
    BOOST_TEST((a.failed && a.failed->kind() == errc::canceled));
    BOOST_TEST(a.failed->what() == std::string("the client has gone"));
    BOOST_TEST(a.seen.last["shared"].canceled);
    BOOST_TEST(a.graph.ops.at("shared")->canceled == 0);
    g.open.set();
    co_await group.join();
    BOOST_TEST(b.made.value() == "shared()");
    BOOST_TEST(a.graph.runs("shared") == 1);
    BOOST_TEST(b.graph.runs("shared") == 0);
    co_await w.close();
}

CO_TEST_CASE(the_last_build_to_go_ends_the_run) {
    world w;
    co_await w.open(rt);
    gate g;
    background a, b;
    for (auto* one : {&a, &b}) one->graph.add(plan{.name = "shared", .during = [&](solver::context) { return g.pass(); }});
    async::task_group group(rt.get_executor());
    group.spawn(a.run(w, 0));
    co_await g.entered.wait();
    group.spawn(b.run(w, 0));
    while (b.seen.started["shared"] == 0) co_await async::sleep_for(std::chrono::milliseconds(1));
    a.cancel.cancel(error{errc::canceled, "one"});
    co_await a.ended.wait();
    b.cancel.cancel(error{errc::canceled, "two"});
    co_await group.join();
    BOOST_TEST(a.graph.ops.at("shared")->canceled == 1);  // and had ended before solve() returned
    BOOST_TEST(b.failed->what() == std::string("two"));
    BOOST_TEST(w.solver->debug_dump() == "");

    graph_maker again;
    again.add("shared");
    BOOST_TEST(co_await w.solve(again, 0) == "shared()");
    BOOST_TEST(again.runs("shared") == 1);
    co_await w.close();
}

CO_TEST_CASE(a_run_that_fails_after_its_build_has_gone_is_run_again_by_the_other) {
    world w;
    co_await w.open(rt);
    gate g;
    background a, b;
    a.graph.add(plan{.name = "shared", .during = [&](solver::context) -> async::task<void> {
                         co_await g.pass();
                         throw error{errc::unavailable, "the session has gone"};
                     }});
    b.graph.add("shared");
    async::task_group group(rt.get_executor());
    group.spawn(a.run(w, 0));
    co_await g.entered.wait();
    group.spawn(b.run(w, 0));
    while (b.seen.started["shared"] == 0) co_await async::sleep_for(std::chrono::milliseconds(1));
    a.cancel.cancel(error{errc::canceled, "gone"});
    co_await a.ended.wait();
    g.open.set();
    co_await group.join();
    BOOST_TEST(b.made.value() == "shared()");
    BOOST_TEST(b.graph.runs("shared") == 1);
    co_await w.close();
}

CO_TEST_CASE(equal_vertices_and_equal_keys_of_one_build_are_one_run) {
    world w;
    co_await w.open(rt);
    graph_maker g;
    const auto one = g.add("same");
    const auto two = g.add("same");  // same digest
    const auto three = g.add("same");
    g.graph[three].id = digest::of("same op, other metadata");
    const auto first_op = std::static_pointer_cast<test::fake_op>(g.graph[one].op);
    const auto third_op = std::static_pointer_cast<test::fake_op>(g.graph[three].op);
    const auto top = g.add("top", {one, two, three});
    BOOST_TEST(co_await w.solve(g, top) == "top(same(),same(),same(),)");
    BOOST_TEST(first_op->runs + third_op->runs == 1);
    co_await w.close();
}

CO_TEST_CASE(at_most_so_many_counted_ops_run_at_once_over_all_builds) {
    for (const std::size_t limit : {std::size_t{1}, std::size_t{3}}) {
        world w;
        co_await w.open(rt, limit);
        std::size_t running = 0;
        std::size_t most = 0;
        std::size_t uncounted = 0;
        const auto work = [&](solver::context) -> async::task<void> {
            most = std::max(most, ++running);
            co_await async::sleep_for(std::chrono::milliseconds(2));
            --running;
        };
        background a, b;
        for (auto* one : {&a, &b}) {
            std::vector<std::size_t> all;
            for (int i = 0; i < 8; ++i) all.push_back(one->graph.add(plan{.name = cat(one == &a ? "a" : "b", i), .during = work}));
            for (int i = 0; i < 4; ++i)
                all.push_back(one->graph.add(
                    plan{.name = cat(one == &a ? "ua" : "ub", i), .counted = false, .during = [&](solver::context) -> async::task<void> {
                             ++uncounted;
                             co_return;
                         }}));
            one->graph.add(plan{.name = one == &a ? "top a" : "top b"}, all);
        }
        async::task_group group(rt.get_executor());
        group.spawn(a.run(w, 12));
        group.spawn(b.run(w, 12));
        co_await group.join();
        BOOST_TEST(a.made.has_value());
        BOOST_TEST(b.made.has_value());
        BOOST_TEST(most == limit);
        BOOST_TEST(uncounted == 8u);
        co_await w.close();
    }
}

// O-EN-01: the lock is taken before the slot, so its holder can finish although there is one slot only.
CO_TEST_CASE(no_slot_is_held_while_waiting_for_a_lock) {
    world w;
    co_await w.open(rt, 1);
    async::event locked_elsewhere;
    background a, b;
    a.graph.add(plan{.name = "waits for a lock", .preparing = [&] { return locked_elsewhere.wait(); }});
    b.graph.add(plan{.name = "holds it", .during = [&](solver::context) -> async::task<void> {
                         locked_elsewhere.set();
                         co_return;
                     }});
    async::task_group group(rt.get_executor());
    group.spawn(a.run(w, 0));
    while (w.solver->debug_dump().find("waits for locks of its own") == std::string::npos) co_await async::sleep_for(std::chrono::milliseconds(1));
    BOOST_TEST(a.seen.started["waits for a lock"] == 0);
    group.spawn(b.run(w, 0));
    co_await group.join();
    BOOST_TEST(a.made.has_value());
    BOOST_TEST(b.made.has_value());
    co_await w.close();
}

// O-EN-01, the nested form: an op that solves while it runs is not counted, what it solves is.
CO_TEST_CASE(an_op_may_solve_a_graph_of_its_own_with_one_slot) {
    world w;
    co_await w.open(rt, 1);
    graph_maker inner;
    inner.add("inner");
    graph_maker outer;
    const auto top = outer.add(plan{.name = "outer", .counted = false, .during = [&](solver::context) -> async::task<void> {
                                        BOOST_TEST(co_await w.solve(inner, 0) == "inner()");
                                    }});
    BOOST_TEST(co_await w.solve(outer, top) == "outer()");
    co_await w.close();
}

CO_TEST_CASE(a_queued_vertex_is_not_started_and_cancels_cleanly) {
    world w;
    co_await w.open(rt, 1);
    gate g;
    background a, b;
    a.graph.add(plan{.name = "holder", .during = [&](solver::context) { return g.pass(); }});
    b.graph.add("queued");
    async::task_group group(rt.get_executor());
    group.spawn(a.run(w, 0));
    co_await g.entered.wait();
    group.spawn(b.run(w, 0));
    while (w.solver->debug_dump().find("\"queued\": waits for a slot: 1 in use, 1 waiting") == std::string::npos)
        co_await async::sleep_for(std::chrono::milliseconds(1));
    BOOST_TEST(!b.seen.last["queued"].started.has_value());
    b.cancel.cancel(error{errc::canceled, "enough"});
    co_await b.ended.wait();
    BOOST_TEST(b.graph.runs("queued") == 0);
    g.open.set();
    co_await group.join();
    BOOST_TEST(a.made.has_value());
    co_await w.close();
}

CO_TEST_CASE(descriptions_may_show_as_work) {
    world w;
    co_await w.open(rt);
    graph_maker g;
    g.add(plan{.name = "resolve", .shows_describe = true});
    watcher seen;
    co_await w.solve(g, 0, seen.sink);
    BOOST_TEST(seen.started["resolve"] == 2);
    BOOST_TEST(seen.last["resolve"].completed.has_value());
    co_await w.close();
}

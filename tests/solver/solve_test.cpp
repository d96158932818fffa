#include "support/support.hpp"

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

import cobuild.base;
import cobuild.async;
import cobuild.cache;
import cobuild.db;
import cobuild.progress;
import cobuild.solver;
import cobuild.test.solver_fakes;

using namespace cobuild;
using test::graph_maker;
using test::plan;
using test::watcher;
using test::world;

CO_TEST_CASE(each_vertex_runs_once_and_not_at_all_the_second_time) {
    world w;
    co_await w.open(rt);
    graph_maker first;
    const auto base = first.add("base");
    const auto left = first.add("left", {base});
    const auto right = first.add("right", {base});
    const auto top = first.add("top", {left, right});
    watcher seen;
    BOOST_TEST(co_await w.solve(first, top, seen.sink) == "top(left(base(),),right(base(),),)");
    BOOST_TEST(first.all_runs() == 4);
    for (const auto* name : {"base", "left", "right", "top"}) {
        BOOST_TEST(first.runs(name) == 1);
        BOOST_TEST(seen.started[name] == 1);
        BOOST_TEST(seen.last[name].completed.has_value());
        BOOST_TEST(!seen.last[name].cached);
    }
    w.store->loads = 0;

    graph_maker second;
    const auto b2 = second.add("base");
    const auto t2 = second.add("top", {second.add("left", {b2}), second.add("right", {b2})});
    watcher again;
    BOOST_TEST(co_await w.solve(second, t2, again.sink) == "top(left(base(),),right(base(),),)");
    BOOST_TEST(second.all_runs() == 0);
    BOOST_TEST(again.last["base"].cached);
    BOOST_TEST(again.last["top"].cached);
    BOOST_TEST(w.store->loads == 1u);  // the target alone
    co_await w.close();
}

/// Two stages whose results are copied, one after the other, into a third: the shape of every multi-stage Dockerfile.
struct two_stages {
    graph_maker g;
    std::size_t top = 0;
    two_stages(plan a, plan b) {
        const auto base = g.add("base");
        const auto left = g.add(std::move(a), {base});
        const auto right = g.add(std::move(b), {base});
        const auto first = g.add(plan{.name = "copy a", .content_of = {1}}, {base, left});
        top = g.add(plan{.name = "copy b", .content_of = {1}}, {first, right});
    }
};

CO_TEST_CASE(stages_run_at_the_same_time) {
    world w;
    co_await w.open(rt);
    async::event left, right;
    const auto meet = [](async::event& mine, async::event& other) -> async::task<void> {
        mine.set();
        return async::with_deadline(std::chrono::seconds(20), "the other stage", other.wait());
    };
    two_stages s({.name = "a", .during = [&](solver::context) { return meet(left, right); }},
                 {.name = "b", .during = [&](solver::context) { return meet(right, left); }});
    co_await w.solve(s.g, s.top);
    BOOST_TEST(s.g.all_runs() == 5);
    co_await w.close();
}

CO_TEST_CASE(a_run_that_turns_out_to_be_unneeded_is_ended) {
    world w;
    co_await w.open(rt);
    two_stages s({.name = "a", .make = [](auto&) { return "same"; }}, {.name = "b"});
    const auto made = co_await w.solve(s.g, s.top);
    for (const auto& r : co_await w.index->all())
        if (r.result.find("b(") == 0 || r.result.find(":b(") != std::string::npos) w.index->remove(r.canonical);

    // "a" is new but brings the same: what stands above is found by content, and "b", begun meanwhile, is not needed.
    async::event begun;
    two_stages again({.name = "a", .salt = "2", .during = [&](solver::context) { return begun.wait(); }, .make = [](auto&) { return "same"; }},
                     {.name = "b", .during = [&](solver::context) -> async::task<void> {
                          begun.set();
                          return async::sleep_for(std::chrono::hours(1));
                      }});
    watcher seen;
    BOOST_TEST(co_await w.solve(again.g, again.top, seen.sink) == made);
    BOOST_TEST(again.g.runs("b") == 1);
    BOOST_TEST(again.g.ops.at("b")->canceled == 1);
    BOOST_TEST(seen.last["b"].completed.has_value());
    BOOST_TEST(again.g.runs("copy b") == 0);
    co_await w.close();
}

CO_TEST_CASE(only_what_targets_need_is_touched) {
    world w;
    co_await w.open(rt);
    graph_maker g;
    const auto base = g.add("base");
    g.add("unneeded", {base});
    watcher seen;
    co_await w.solve(g, base, seen.sink);
    BOOST_TEST(g.ops.at("unneeded")->described == 0);
    BOOST_TEST(!seen.last.contains("unneeded"));
    co_await w.close();
}

CO_TEST_CASE(changing_a_vertex_reruns_it_and_what_depends_on_it) {
    world w;
    co_await w.open(rt);
    for (const auto* salt : {"1", "2"}) {
        graph_maker g;
        const auto base = g.add("base");
        const auto changed = g.add(plan{.name = "changed", .salt = salt}, {base});
        const auto other = g.add("other", {base});
        const auto top = g.add("top", {changed, other});
        co_await w.solve(g, top);
        const int expected = salt == std::string("1") ? 1 : 0;
        BOOST_TEST(g.runs("base") == expected);
        BOOST_TEST(g.runs("other") == expected);
        BOOST_TEST(g.runs("changed") == 1);
        BOOST_TEST(g.runs("top") == 1);
    }
    co_await w.close();
}

static async::task<void> restart(async::runtime& rt, std::function<std::shared_ptr<cache::storage>()> storage) {
    world w;
    const auto reopen = [&]() -> async::task<void> {
        w.storage = storage();
        co_await w.open(rt);
    };
    const auto make = [](graph_maker& g) { return g.add("top", {g.add("middle", {g.add("base")})}); };
    co_await reopen();
    graph_maker first;
    const auto made = co_await w.solve(first, make(first));
    co_await w.close();

    co_await reopen();
    graph_maker warm;
    BOOST_TEST(co_await w.solve(warm, make(warm)) == made);
    BOOST_TEST(warm.all_runs() == 0);

    // The store lost what nobody needs: nothing happens.
    w.store->saved.erase("base()");
    graph_maker still;
    co_await w.solve(still, make(still));
    BOOST_TEST(still.all_runs() == 0);

    // It lost the top and the base: the top runs again on the middle that is there; the base is not needed.
    w.store->saved.erase(made);
    w.store->saved.erase("base()");
    co_await w.close();
    co_await reopen();
    graph_maker rerun;
    watcher seen;
    BOOST_TEST(co_await w.solve(rerun, make(rerun), seen.sink) == made);
    BOOST_TEST(rerun.runs("top") == 1);
    BOOST_TEST(rerun.runs("middle") == 0);
    BOOST_TEST(rerun.runs("base") == 0);
    BOOST_TEST(!seen.last["top"].cached);
    BOOST_TEST(seen.started["top"] == 1);  // a second interval after the hit

    graph_maker after;
    co_await w.solve(after, make(after));
    BOOST_TEST(after.all_runs() == 0);
    co_await w.close();

    // A record whose text is damaged, and one that cannot be loaded at all, are as good as lost.
    co_await reopen();
    for (const auto* text : {"broken", "999:x"}) {
        for (auto& r : co_await w.index->all()) w.index->save(r.canonical, text, {});
        graph_maker damaged;
        BOOST_TEST(co_await w.solve(damaged, make(damaged)) == made);
        BOOST_TEST(damaged.all_runs() == 3);
    }
    co_await w.close();
}

CO_TEST_CASE(results_survive_a_restart_and_a_lost_one_is_made_again) {
    const auto memory = cache::make_memory_storage();
    co_await restart(rt, [memory] { return memory; });
}

CO_TEST_CASE(results_survive_a_restart_in_sqlite) {
    const test::scratch_dir dir;
    const auto file = (dir / "cache.db").string();
    co_await restart(rt, [file] { return cache::make_storage(std::make_shared<db::database>(file)); });
}

CO_TEST_CASE(a_content_hit_makes_everything_above_a_hit) {
    world w;
    co_await w.open(rt);
    // The base's key changes, what "reader" reads from it does not.
    for (const auto* salt : {"1", "2", "2"}) {
        graph_maker g;
        const std::string tail = salt;
        const auto base = g.add(plan{.name = "base", .salt = salt, .make = [tail](const auto&) { return "same|" + tail; }});
        const auto reader = g.add(plan{.name = "reader", .content_of = {0}}, {base});
        const auto top = g.add("top", {reader});
        BOOST_TEST(co_await w.solve(g, top) == "top(reader(same,),)");
        BOOST_TEST(g.runs("reader") == (tail == "1" ? 1 : 0));
        BOOST_TEST(g.runs("top") == (tail == "1" ? 1 : 0));
    }
    graph_maker third;  // the second build linked the new fast key: the content is not asked again
    const auto base = third.add(plan{.name = "base", .salt = "2"});
    const auto top = third.add("top", {third.add(plan{.name = "reader", .content_of = {0}}, {base})});
    co_await w.solve(third, top);
    BOOST_TEST(third.ops.at("reader")->hashed == 0);
    BOOST_TEST(third.all_runs() == 0);

    graph_maker changed;
    const auto other = changed.add(plan{.name = "base", .salt = "3", .make = [](const auto&) { return std::string("other|"); }});
    const auto top2 = changed.add("top", {changed.add(plan{.name = "reader", .content_of = {0}}, {other})});
    BOOST_TEST(co_await w.solve(changed, top2) == "top(reader(other,),)");
    BOOST_TEST(changed.runs("reader") == 1);
    BOOST_TEST(changed.runs("top") == 1);
    co_await w.close();
}

namespace {

/// A local directory and a COPY from it whose bytes are known only after copying.
std::size_t local_copy(graph_maker& g, const std::string& content, const std::string& session) {
    const auto local = g.add(plan{.name = "local", .salt = session, .ephemeral = true, .make = [=](const auto&) { return content + "|" + session; }});
    const auto copy = g.add(plan{.name = "copy", .late = {1}}, {g.add("base"), local});
    return g.add("top", {copy});
}

}  // namespace

CO_TEST_CASE(a_late_content_key_adopts_what_is_there) {
    world w;
    co_await w.open(rt);
    graph_maker a;
    const auto first = co_await w.solve(a, local_copy(a, "files", "s1"));
    BOOST_TEST(first == "top(copy(base(),files,),)");
    BOOST_TEST(a.all_runs() == 4);
    BOOST_TEST(!w.store->saved.contains("files|s1"));  // means something in its build only

    graph_maker b;
    BOOST_TEST(co_await w.solve(b, local_copy(b, "files", "s2")) == first);
    BOOST_TEST(b.runs("copy") == 1);
    BOOST_TEST(b.runs("top") == 0);
    BOOST_TEST(b.runs("base") == 0);

    graph_maker c;
    BOOST_TEST(co_await w.solve(c, local_copy(c, "changed", "s3")) == "top(copy(base(),changed,),)");
    BOOST_TEST(c.runs("top") == 1);

    // The record is there, its result is not: the new one takes its place and what stands on it still holds.
    w.store->saved.erase("copy(base(),files,)");
    graph_maker d;
    BOOST_TEST(co_await w.solve(d, local_copy(d, "files", "s4")) == first);
    BOOST_TEST(d.runs("top") == 0);
    BOOST_TEST(w.store->saved.contains("copy(base(),files,)"));
    co_await w.close();
}

CO_TEST_CASE(ignoring_the_cache_renews_everything_above) {
    world w;
    co_await w.open(rt);
    int round = 0;
    const auto make = [&round](graph_maker& g, bool ignore) {
        const auto base = g.add(plan{.name = "base", .pinned = true});
        const auto clock = g.add(plan{.name = "clock", .make = [&round](const auto&) { return cat("time", round); }}, {base}, ignore);
        return g.add("top", {clock});
    };
    round = 1;
    graph_maker a;
    BOOST_TEST(co_await w.solve(a, make(a, false)) == "top(time1,)");
    round = 2;
    graph_maker b;
    BOOST_TEST(co_await w.solve(b, make(b, true)) == "top(time2,)");
    BOOST_TEST(b.runs("base") == 0);
    round = 3;
    graph_maker c;  // the newest counts from then on
    BOOST_TEST(co_await w.solve(c, make(c, false)) == "top(time2,)");
    BOOST_TEST(c.all_runs() == 0);
    graph_maker d;
    BOOST_TEST(co_await w.solve(d, make(d, false), nullptr, true) == "top(time3,)");
    BOOST_TEST(d.runs("base") == 0);  // pinned
    BOOST_TEST(d.runs("top") == 1);
    co_await w.close();
}

CO_TEST_CASE(a_source_is_found_by_its_other_digests) {
    world w;
    co_await w.open(rt);
    graph_maker a;
    co_await w.solve(a, a.add("top", {a.add(plan{.name = "image", .salt = "manifest1", .also = {"chain"}})}));
    graph_maker b;
    co_await w.solve(b, b.add("top", {b.add(plan{.name = "image", .salt = "manifest2", .also = {"chain"}})}));
    BOOST_TEST(b.all_runs() == 0);
    co_await w.close();
}

CO_TEST_CASE(the_first_failure_cancels_the_rest_and_names_its_vertex) {
    world w;
    co_await w.open(rt);
    graph_maker g;
    async::event never;
    const auto slow = g.add(plan{.name = "slow", .during = [&](solver::context) { return never.wait(); }});
    const auto bad = g.add(plan{.name = "[2/3] RUN false", .during = [](solver::context) -> async::task<void> {
                                    throw error{errc::step_failed, "process \"false\" did not complete successfully: exit code: 1"};
                                    co_return;
                                }});
    const auto top = g.add("top", {slow, bad});
    watcher seen;
    std::optional<error> got;
    try {
        co_await w.solve(g, top, seen.sink);
    } catch (const error& e) {
        got = e;
    }
    BOOST_REQUIRE(got.has_value());
    BOOST_TEST(got->what() == std::string("[2/3] RUN false: process \"false\" did not complete successfully: exit code: 1"));
    BOOST_TEST((got->kind() == errc::step_failed));
    BOOST_TEST(g.ops.at("slow")->canceled == 1);
    BOOST_TEST(g.runs("top") == 0);
    BOOST_TEST(seen.last["slow"].canceled);
    BOOST_TEST(seen.last["slow"].error == "canceled because another step failed: [2/3] RUN false");
    BOOST_TEST(seen.last["[2/3] RUN false"].error == "process \"false\" did not complete successfully: exit code: 1");
    BOOST_TEST(!seen.last["[2/3] RUN false"].canceled);
    BOOST_TEST(!seen.last["top"].started.has_value());
    BOOST_TEST(w.solver->debug_dump() == "");
    co_await w.close();
}

CO_TEST_CASE(a_graph_that_is_none_is_refused) {
    world w;
    co_await w.open(rt);
    graph_maker g;
    g.add("a");
    g.graph[0].inputs.push_back({0, 0});
    std::optional<error> got;
    try {
        co_await w.solve(g, 0);
    } catch (const error& e) {
        got = e;
    }
    BOOST_REQUIRE(got.has_value());
    BOOST_TEST((got->kind() == errc::invalid));
    graph_maker empty;
    BOOST_TEST((co_await w.solver->solve(empty.graph, {}, nullptr)).empty());
    co_await w.close();
}

CO_TEST_CASE(what_an_op_says_reaches_the_sink_under_its_vertex) {
    world w;
    co_await w.open(rt);
    graph_maker g;
    const auto v = g.add(plan{.name = "talker", .during = [](solver::context ctx) -> async::task<void> {
                                  ctx.progress.output(progress::stream::out, "hello");
                                  ctx.progress.begin("extracting", 3).done();
                                  co_return;
                              }});
    watcher seen;
    co_await w.solve(g, v, seen.sink);
    std::size_t logs = 0;
    std::size_t lines = 0;
    for (const auto& e : seen.events) {
        if (const auto* l = std::get_if<progress::log>(&e)) logs += l->vertex == g.graph[v].id && l->data == "hello";
        if (const auto* s = std::get_if<progress::status>(&e)) lines += s->vertex == g.graph[v].id;
    }
    BOOST_TEST(logs == 1u);
    BOOST_TEST(lines == 2u);
    co_await w.close();
}

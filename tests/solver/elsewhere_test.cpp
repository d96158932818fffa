// Caches of other machines: what one solver reports, another one finds, though their canonical keys differ.
#include "support/support.hpp"

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

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

/// What a report says, as an export would keep it.
class exported final : public solver::remote_cache {
public:
    std::map<digest, digest> keys;
    std::map<digest, std::string> texts;  ///< by canonical key
    std::set<std::string> broken;
    std::size_t loads = 0;
    std::uint64_t outputs = 1;

    [[nodiscard]] std::optional<found> find(const digest& key) const override {
        const auto at = keys.find(key);
        if (at == keys.end()) return std::nullopt;
        return found{at->second, texts.contains(at->second), outputs};
    }
    async::task<std::vector<solver::result>> load(digest canonical, progress::writer) override {
        ++loads;
        const auto text = texts.at(canonical);
        if (broken.contains(text)) throw error{errc::corrupt, "the layer is damaged"};
        std::vector<solver::result> out{std::make_shared<test::text_value>(text)};
        co_return out;
    }
};

struct outcome {
    std::string text;
    std::shared_ptr<exported> cache = std::make_shared<exported>();
};

/// Solves; the outcome has everything, or the results of the vertices named alone.
async::task<outcome> solve(world& w, const graph_maker& g, std::size_t target, std::vector<std::shared_ptr<exported>> from = {},
                           std::optional<std::set<std::string>> results = {}, std::shared_ptr<progress::sink> sink = nullptr, bool no_cache = false) {
    solver::solve_options options{.no_cache = no_cache, .caches = {from.begin(), from.end()}};
    options.report = std::make_shared<std::vector<solver::solved>>();
    const auto report = options.report;
    std::vector<solver::edge> targets{{target, 0}};
    const auto made = co_await w.solver->solve(g.graph, std::move(targets), std::move(sink), std::move(options));
    outcome out;
    out.text = test::text_of_result(made.at(0));
    for (const auto& s : *report) {
        out.cache->keys.emplace(s.canonical, s.canonical);
        for (const auto& k : s.keys) out.cache->keys.emplace(k, s.canonical);
        std::string name;
        for (const auto& v : g.graph)
            if (v.id == s.id) name = v.name;
        if (results && !results->contains(name)) continue;
        const auto outputs = co_await s.outputs();
        if (!outputs.empty()) out.cache->texts[s.canonical] = test::text_of_result(outputs.front());
    }
    co_return out;
}

/// context -> copy onto base -> run, and a second stage whose result is copied.
struct stages {
    graph_maker g;
    std::size_t top;
    explicit stages(const std::string& content = "1", const std::string& salt = "") {
        const auto base = g.add("base");
        plan context{.name = "context", .ephemeral = true};
        context.make = [content](const auto&) { return "context" + content; };
        const auto files = g.add(context);
        const auto copy = g.add(plan{.name = "copy", .content_of = {1}}, {base, files});
        plan tool{.name = "tool", .salt = salt};
        tool.make = [](const auto&) { return std::string("tool|"); };
        const auto made = g.add(tool, {base});
        const auto from = g.add(plan{.name = "from", .content_of = {1}}, {copy, made});
        top = g.add("top", {from});
    }
};

}  // namespace

CO_TEST_CASE(an_empty_solver_finds_every_step_elsewhere_and_loads_the_target_alone) {
    world a, b;
    co_await a.open(rt);
    co_await b.open(rt);
    stages first;
    const auto made = co_await solve(a, first.g, first.top);
    stages second;
    watcher seen;
    const auto again = co_await solve(b, second.g, second.top, {made.cache}, std::set<std::string>{}, seen.sink);
    BOOST_TEST(again.text == made.text);
    for (const auto* name : {"base", "copy", "tool", "from", "top"}) {
        BOOST_TEST(second.g.runs(name) == 0, name);
        BOOST_TEST(seen.last[name].cached, name);
    }
    BOOST_TEST(made.cache->loads == 1u);

    // It is remembered: the next build needs no cache elsewhere.
    stages third;
    const auto local = co_await solve(b, third.g, third.top, {}, std::set<std::string>{});
    BOOST_TEST(local.text == made.text);
    BOOST_TEST(third.g.runs("top") == 0);
    co_await a.close();
    co_await b.close();
}

// A cache may hold some outputs of a step alone: those that its image was made of.
CO_TEST_CASE(an_output_that_is_not_elsewhere_is_made) {
    world a, b;
    co_await a.open(rt);
    co_await b.open(rt);
    stages first;
    const auto made = co_await solve(a, first.g, first.top);
    made.cache->outputs = 0b10;
    stages second;
    const auto again = co_await solve(b, second.g, second.top, {made.cache}, std::set<std::string>{});
    BOOST_TEST(again.text == made.text);
    BOOST_TEST(made.cache->loads == 0u);
    for (const auto* name : {"base", "copy", "tool", "from", "top"}) BOOST_TEST(second.g.runs(name) == 1, name);
    co_await a.close();
    co_await b.close();
}

CO_TEST_CASE(results_left_out_are_found_by_key_and_run_when_they_are_needed) {
    world a, b;
    co_await a.open(rt);
    co_await b.open(rt);
    stages first;
    const auto made = co_await solve(a, first.g, first.top, {}, std::set<std::string>{"from"});
    BOOST_TEST(made.cache->texts.size() == 1u);
    stages second;
    const auto again = co_await solve(b, second.g, second.top, {made.cache}, std::set<std::string>{});
    BOOST_TEST(again.text == made.text);
    BOOST_TEST(second.g.runs("top") == 1);
    BOOST_TEST(second.g.runs("from") == 0);
    BOOST_TEST(second.g.runs("tool") == 0);
    BOOST_TEST(second.g.runs("base") == 0);
    co_await a.close();
    co_await b.close();
}

// Of a stage that another stage copied from, nothing is left but keys: the last stage is found all the same.
CO_TEST_CASE(a_key_without_a_result_leads_on_without_running_what_is_below) {
    world a, b;
    co_await a.open(rt);
    co_await b.open(rt);
    const auto make = [](graph_maker& g) {
        const auto base = g.add("base");
        const auto one = g.add("one", {base});
        const auto two = g.add(plan{.name = "two", .content_of = {1}}, {base, one});
        return g.add(plan{.name = "three", .content_of = {1}}, {base, two});
    };
    graph_maker first, second;
    const auto top = make(first);
    const auto made = co_await solve(a, first, top, {}, std::set<std::string>{"base", "three"});
    BOOST_TEST(make(second) == top);
    const auto again = co_await solve(b, second, top, {made.cache}, std::set<std::string>{});
    BOOST_TEST(again.text == made.text);
    BOOST_TEST(second.all_runs() == 0);
    co_await a.close();
    co_await b.close();
}

CO_TEST_CASE(other_contents_are_not_taken) {
    world a, b;
    co_await a.open(rt);
    co_await b.open(rt);
    stages first("1");
    const auto made = co_await solve(a, first.g, first.top);
    stages second("2");
    const auto other = co_await solve(b, second.g, second.top, {made.cache});
    BOOST_TEST(other.text != made.text);
    BOOST_TEST(second.g.runs("copy") == 1);
    BOOST_TEST(second.g.runs("top") == 1);
    BOOST_TEST(second.g.runs("base") == 0);
    co_await a.close();
    co_await b.close();
}

CO_TEST_CASE(a_changed_stage_with_the_same_result_is_found_by_content) {
    world a, b;
    co_await a.open(rt);
    co_await b.open(rt);
    stages first("1", "old");
    const auto made = co_await solve(a, first.g, first.top);
    stages second("1", "new");
    const auto again = co_await solve(b, second.g, second.top, {made.cache});
    BOOST_TEST(again.text == made.text);
    BOOST_TEST(second.g.runs("tool") == 1);
    BOOST_TEST(second.g.runs("from") == 0);
    BOOST_TEST(second.g.runs("top") == 0);
    co_await a.close();
    co_await b.close();
}

// A build without cache has keys of its own, which no one else can compute: they are followed all the same.
CO_TEST_CASE(what_was_made_without_cache_is_found_through_its_own_keys) {
    world a, b;
    co_await a.open(rt);
    co_await b.open(rt);
    stages first;
    const auto made = co_await solve(a, first.g, first.top, {}, {}, nullptr, true);
    // And the other machine knows the base by another key already.
    graph_maker known;
    const auto base = known.add("base");
    (void)co_await b.solve(known, base);
    stages second;
    const auto again = co_await solve(b, second.g, second.top, {made.cache});
    BOOST_TEST(again.text == made.text);
    BOOST_TEST(second.g.runs("top") == 0);
    BOOST_TEST(second.g.runs("copy") == 0);
    // Who builds without cache takes nothing from there either.
    stages third;
    (void)co_await solve(b, third.g, third.top, {made.cache}, {}, nullptr, true);
    BOOST_TEST(third.g.runs("top") == 1);
    BOOST_TEST(third.g.runs("copy") == 1);
    co_await a.close();
    co_await b.close();
}

CO_TEST_CASE(what_cannot_be_loaded_is_taken_from_the_next_cache_or_run) {
    world a, b, c;
    co_await a.open(rt);
    co_await b.open(rt);
    co_await c.open(rt);
    stages first;
    const auto made = co_await solve(a, first.g, first.top);
    const auto damaged = std::make_shared<exported>(*made.cache);
    damaged->broken.insert(made.text);
    stages second;
    watcher seen;
    const auto again = co_await solve(b, second.g, second.top, {damaged}, {}, seen.sink);
    BOOST_TEST(again.text == made.text);
    BOOST_TEST(second.g.runs("top") == 1);
    BOOST_TEST(second.g.runs("from") == 0);
    bool warned = false;
    for (const auto& e : seen.events)
        if (const auto* w = std::get_if<progress::warning>(&e)) warned |= w->message.find("the layer is damaged") != std::string::npos;
    BOOST_TEST(warned);

    stages third;
    const auto intact = co_await solve(c, third.g, third.top, {damaged, made.cache});
    BOOST_TEST(intact.text == made.text);
    BOOST_TEST(third.g.runs("top") == 0);
    co_await a.close();
    co_await b.close();
    co_await c.close();
}

CO_TEST_CASE(a_result_that_is_gone_here_is_loaded_from_elsewhere) {
    world a, b;
    co_await a.open(rt);
    co_await b.open(rt);
    stages first;
    const auto made = co_await solve(a, first.g, first.top);
    stages own;
    (void)co_await b.solve(own.g, own.top);
    b.store->saved.clear();
    // Nothing holds them any more: the next process.
    co_await b.close();
    co_await b.open(rt);
    stages second;
    const auto again = co_await solve(b, second.g, second.top, {made.cache});
    BOOST_TEST(again.text == made.text);
    BOOST_TEST(second.g.runs("top") == 0);
    BOOST_TEST(second.g.all_runs() == 1);  // the context, which is no one else's
    co_await a.close();
    co_await b.close();
}

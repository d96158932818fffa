#include "support/support.hpp"

#include <cstddef>
#include <ctime>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
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
using test::world;

namespace {

std::size_t chain(graph_maker& g, std::size_t length) {
    std::size_t last = g.add("v0");
    for (std::size_t i = 1; i < length; ++i) last = g.add(cat("v", i), {last});
    return last;
}

std::size_t wide(graph_maker& g, std::size_t width) {
    const auto base = g.add("base");
    std::vector<std::size_t> all;
    for (std::size_t i = 0; i < width; ++i) all.push_back(g.add(cat("w", i), {base}));
    return g.add("top", all);
}

async::task<void> solve_twice(async::runtime& rt, std::string what, std::size_t (*make)(graph_maker&, std::size_t), std::size_t size) {
    world w;
    co_await w.open(rt, 4);
    graph_maker cold;
    const auto target = make(cold, size);
    auto from = std::clock();
    const auto made = co_await w.solve(cold, target);
    const auto took_cold = std::clock() - from;
    BOOST_TEST(cold.all_runs() == static_cast<int>(cold.graph.size()));

    graph_maker warm;
    make(warm, size);
    from = std::clock();
    BOOST_TEST(co_await w.solve(warm, target) == made);
    const auto took_warm = std::clock() - from;
    BOOST_TEST(warm.all_runs() == 0);
    const auto ms = [](std::clock_t t) { return static_cast<double>(t) * 1000 / CLOCKS_PER_SEC; };
    BOOST_TEST_MESSAGE(what << " of " << size << ": run in " << ms(took_cold) << " ms, cached in " << ms(took_warm) << " ms of processor time");
    co_await w.close();
}

}  // namespace

CO_TEST_CASE(a_thousand_vertices_in_a_chain) { co_await solve_twice(rt, "chain", chain, 1'000); }
CO_TEST_CASE(a_thousand_vertices_side_by_side) { co_await solve_twice(rt, "fan", wide, 1'000); }
CO_TEST_CASE(depth_costs_no_stack) { co_await solve_twice(rt, "chain", chain, 10'000); }

namespace {

/// What the graph means, by the plainest evaluation there is.
std::string naive(const std::vector<std::pair<std::string, std::vector<std::size_t>>>& g, const std::vector<bool>& by_content, std::size_t i,
                  std::map<std::size_t, std::string>& memo) {
    if (const auto known = memo.find(i); known != memo.end()) return known->second;
    std::string out = g[i].first + "(";
    for (const auto in : g[i].second) {
        auto text = naive(g, by_content, in, memo);
        out += (by_content[i] ? text.substr(0, text.find('|')) : text) + ",";
    }
    out = digest::of(out).hex().substr(0, 12) + "|" + g[i].first;
    return memo[i] = out;
}

}  // namespace

static async::task<void> random_graphs(async::runtime& rt, std::shared_ptr<cache::storage> storage) {
    std::mt19937 random(20240611);
    const auto pick = [&random](std::size_t below) { return std::uniform_int_distribution<std::size_t>(0, below - 1)(random); };
    world w;
    w.storage = std::move(storage);
    co_await w.open(rt, 2);
    for (int round = 0; round < 150; ++round) {
        // Few names, so that rounds share keys; some results get lost; some ops read by content, early or late.
        const auto size = 1 + pick(14);
        std::vector<std::pair<std::string, std::vector<std::size_t>>> shape;
        std::vector<bool> by_content;
        graph_maker g;
        for (std::size_t i = 0; i < size; ++i) {
            const auto kind = pick(4);
            std::vector<std::size_t> inputs;
            for (std::size_t n = i == 0 ? 0 : pick(3); n > 0; --n) inputs.push_back(pick(i));
            const auto name = cat("op", pick(6), "k", kind);
            plan p{.name = name};
            const bool content = kind >= 2 && !inputs.empty();
            for (std::size_t slot = 0; content && slot < inputs.size(); ++slot) (kind == 2 ? p.content_of : p.late).insert(slot);
            p.make = [name](const std::vector<std::string>& in) {
                std::string out = name + "(";
                for (const auto& text : in) out += text + ",";
                return digest::of(out).hex().substr(0, 12) + "|" + name;
            };
            g.add(std::move(p), inputs);
            shape.emplace_back(name, inputs);
            by_content.push_back(content);
        }
        const auto target = pick(size);
        std::map<std::size_t, std::string> memo;
        const auto expected = naive(shape, by_content, target, memo);
        BOOST_TEST(co_await w.solve(g, target) == expected);
        for (const auto& [name, op] : g.ops) BOOST_TEST(op->runs <= 1);
        if (pick(4) == 0 && !w.store->saved.empty()) w.store->saved.erase(w.store->saved.begin());
        if (pick(10) == 0) {
            co_await w.close();
            co_await w.open(rt, 2);
        }
    }
    co_await w.close();
}

CO_TEST_CASE(random_graphs_mean_what_a_plain_evaluation_says) { co_await random_graphs(rt, cache::make_memory_storage()); }

CO_TEST_CASE(random_graphs_in_sqlite) {
    const test::scratch_dir dir;
    co_await random_graphs(rt, cache::make_storage(std::make_shared<db::database>((dir / "cache.db").string())));
}

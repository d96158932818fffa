module;
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.solver;

import cobuild.solver.internal;

namespace cobuild::solver {

async::task<std::optional<digest>> op::content_key(std::size_t, result, context) { co_return std::nullopt; }
async::task<std::shared_ptr<void>> op::prepare(context) { co_return nullptr; }

struct solver::state {
    std::shared_ptr<engine> all;
};

solver::solver(async::executor ex, std::shared_ptr<cache::index> index, std::shared_ptr<result_store> store, solver_options options)
    : state_(std::make_shared<state>(state{std::make_shared<engine>(std::move(ex), std::move(index), std::move(store), options)})) {}
solver::~solver() = default;

async::task<std::vector<result>> solver::solve(graph g, std::vector<edge> targets, std::shared_ptr<progress::sink> sink, solve_options options) {
    const auto keep = state_;
    auto b = std::make_shared<build>(keep->all, std::move(g), std::move(targets), std::move(sink), options);
    co_await b->run();
    co_return b->results();
}

std::string solver::debug_dump() const {
    std::string out;
    for (const auto& [_, b] : state_->all->builds) b->dump(out);
    return out;
}

async::task<void> solver::close() {
    const auto keep = state_;
    co_await keep->all->group.join();
}

}  // namespace cobuild::solver

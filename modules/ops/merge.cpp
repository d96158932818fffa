module;
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.ops;

import :bodies;

namespace cobuild::ops {

namespace {

digest plain_key(std::string_view kind, llb::op what) {
    for (auto& in : what.inputs) in.vertex = digest{};
    what.constraints.reset();
    return key_of(kind, what);
}

/// Layers of later inputs lie on top: a chain is a list, so nothing is written.
class merge_op final : public solver::op {
public:
    merge_op(const llb::op& what, environment& env) : env_(env), merge_(std::get<llb::merge_op>(what.what)), key_(plain_key("merge.v0", what)) {}

    async::task<solver::cache_info> describe(solver::context) override { co_return solver::cache_info{.op_digest = key_}; }

    async::task<solver::run_result> run(std::vector<solver::result> values, solver::context) override {
        auto out = std::make_shared<chain_value>();
        for (const auto index : merge_.inputs) {
            const auto in = co_await as_chain(env_, values.at(static_cast<std::size_t>(index)), "");
            // A layer that is there already shows nothing new on top of itself, unless something lies between.
            for (const auto id : in->chain.layers)
                if (out->chain.layers.empty() || out->chain.layers.back() != id) out->chain.layers.push_back(id);
            out->keep += in->keep;
        }
        co_return solver::run_result{.outputs = {std::move(out)}};
    }
    [[nodiscard]] bool counted() const noexcept override { return false; }

private:
    environment& env_;
    llb::merge_op merge_;
    digest key_;
};

/// What upper has on top of lower; chains that do not share their bottom are not compared yet.
class diff_op final : public solver::op {
public:
    diff_op(const llb::op& what, environment& env) : env_(env), diff_(std::get<llb::diff_op>(what.what)), key_(plain_key("diff.v0", what)) {}

    async::task<solver::cache_info> describe(solver::context) override { co_return solver::cache_info{.op_digest = key_}; }

    async::task<solver::run_result> run(std::vector<solver::result> values, solver::context) override {
        const auto input = [&](std::int64_t index) { return index < 0 ? solver::result{} : values.at(static_cast<std::size_t>(index)); };
        const auto lower = co_await as_chain(env_, input(diff_.lower), "");
        const auto upper = co_await as_chain(env_, input(diff_.upper), "");
        const auto& low = lower->chain.layers;
        const auto& high = upper->chain.layers;
        auto out = std::make_shared<chain_value>();
        if (low.size() > high.size() || !std::equal(low.begin(), low.end(), high.begin())) {
            if (low == high) co_return solver::run_result{.outputs = {std::move(out)}};
            throw error{errc::unsupported, "a diff of two roots that do not stand on each other is not supported yet"};
        }
        out->chain.layers.assign(high.begin() + static_cast<std::ptrdiff_t>(low.size()), high.end());
        out->keep = upper->keep;
        co_return solver::run_result{.outputs = {std::move(out)}};
    }
    [[nodiscard]] bool counted() const noexcept override { return false; }

private:
    environment& env_;
    llb::diff_op diff_;
    digest key_;
};

}  // namespace

std::shared_ptr<solver::op> make_merge_op(const llb::op& what, environment& env) { return std::make_shared<merge_op>(what, env); }
std::shared_ptr<solver::op> make_diff_op(const llb::op& what, environment& env) { return std::make_shared<diff_op>(what, env); }

}  // namespace cobuild::ops

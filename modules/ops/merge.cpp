module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.ops;

import cobuild.archive;
import :bodies;

namespace cobuild::ops {

namespace {

digest plain_key(std::string_view kind, llb::op what) {
    for (auto& in : what.inputs) in.vertex = digest{};
    what.constraints.reset();
    return key_of(kind, what);
}

/// The merged content of layers, with what keeps their directories open.
struct open_layers {
    std::vector<unique_fd> dirs;
    archive::lower_chain lower;
    open_layers(const snapshot::store& snapshots, const snapshot::chain& c) : dirs(snapshots.layer_dirs(c)) {
        std::vector<int> fds;
        for (const auto& d : dirs) fds.push_back(d.get());
        lower = archive::lower_chain(std::move(fds));
    }
};

/// What the directory `upper` changes of `lower`, as a layer that means the same on any other.
async::task<snapshot::layer> changes_of(environment& env, snapshot::chain lower, int upper, bool whole) {
    auto made = co_await env.snapshots.begin({});
    co_await env.pool.run([&] {
        open_layers below(env.snapshots, lower);
        archive::diff_directory(upper, below.lower, made.upper(), whole);
    });
    co_return co_await env.snapshots.commit(std::move(made), {.description = "diff", .whiteouts = true});
}

/// Puts the layers of `from` from number `first` on onto `out`, each as what it changes of those below it.
async::task<void> add_changes(environment& env, const chain_value& from, std::size_t first, chain_value& out) {
    for (std::size_t i = first; i < from.chain.layers.size(); ++i) {
        auto id = from.chain.layers[i];
        snapshot::chain below{.layers = {from.chain.layers.begin(), from.chain.layers.begin() + static_cast<std::ptrdiff_t>(i)}};
        const auto dir = env.snapshots.layer_dir(id);
        const bool clean = co_await env.pool.run([&] {
            open_layers lower(env.snapshots, below);
            return archive::tells_changes_only(dir.get(), lower.lower);
        });
        if (!clean) {
            const auto made = co_await changes_of(env, std::move(below), dir.get(), false);
            id = made.id;
            out.keep += made.keep;
        }
        // A layer that is there already shows nothing new on top of itself, unless something lies between.
        if (out.chain.layers.empty() || out.chain.layers.back() != id) out.chain.layers.push_back(id);
    }
    out.keep += from.keep;
}

/// Layers of later inputs lie on top: a chain is a list, so hardly anything is written.
class merge_op final : public solver::op {
public:
    merge_op(const llb::op& what, environment& env) : env_(env), merge_(std::get<llb::merge_op>(what.what)), key_(plain_key("merge.v0", what)) {}

    async::task<solver::cache_info> describe(solver::context) override { co_return solver::cache_info{.op_digest = key_}; }

    async::task<solver::run_result> run(std::vector<solver::result> values, solver::context) override {
        auto out = std::make_shared<chain_value>();
        for (const auto index : merge_.inputs) {
            const auto in = co_await as_chain(env_, values.at(static_cast<std::size_t>(index)), "");
            if (out->chain.layers.empty())
                *out = *in;
            else
                co_await add_changes(env_, *in, 0, *out);
        }
        co_return solver::run_result{.outputs = {std::move(out)}};
    }
    [[nodiscard]] bool counted() const noexcept override { return false; }

private:
    environment& env_;
    llb::merge_op merge_;
    digest key_;
};

/// What upper has on top of lower: the layers by which it is longer, else what a comparison of the two trees finds.
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
        if (low.empty()) {
            *out = *upper;
        } else if (low.size() <= high.size() && std::equal(low.begin(), low.end(), high.begin())) {
            co_await add_changes(env_, *upper, low.size(), *out);
        } else {
            const auto tree = co_await env_.snapshots.view(upper->chain);
            const auto made = co_await changes_of(env_, lower->chain, tree.fd(), true);
            out->chain.layers.push_back(made.id);
            out->keep = made.keep;
        }
        co_return solver::run_result{.outputs = {std::move(out)}};
    }
    [[nodiscard]] bool counted() const noexcept override { return false; }

private:
    environment& env_;
    llb::diff_op diff_;
    digest key_;
};

/// Gives inputs on as its outputs; the others are brought about before.
class passthrough_op final : public solver::op {
public:
    explicit passthrough_op(const llb::op& what) : pass_(std::get<llb::passthrough_op>(what.what)), key_(plain_key("passthrough.v0", what)) {}

    async::task<solver::cache_info> describe(solver::context) override { co_return solver::cache_info{.op_digest = key_}; }

    async::task<solver::run_result> run(std::vector<solver::result> values, solver::context) override {
        solver::run_result out;
        for (const auto index : pass_.outputs) out.outputs.push_back(values.at(static_cast<std::size_t>(index)));
        co_return out;
    }
    [[nodiscard]] bool counted() const noexcept override { return false; }
    [[nodiscard]] std::optional<std::size_t> changed_input(std::size_t output) const noexcept override {
        if (output >= pass_.outputs.size()) return std::nullopt;
        return static_cast<std::size_t>(pass_.outputs[output]);
    }

private:
    llb::passthrough_op pass_;
    digest key_;
};

}  // namespace

std::shared_ptr<solver::op> make_passthrough_op(const llb::op& what) { return std::make_shared<passthrough_op>(what); }
std::shared_ptr<solver::op> make_merge_op(const llb::op& what, environment& env) { return std::make_shared<merge_op>(what, env); }
std::shared_ptr<solver::op> make_diff_op(const llb::op& what, environment& env) { return std::make_shared<diff_op>(what, env); }

}  // namespace cobuild::ops

module;
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.solver.internal;

namespace cobuild::solver {

namespace {
/// A cache elsewhere cannot tell of outputs with higher numbers, nor has it them.
std::uint64_t output_bit(std::size_t number) { return std::uint64_t{1} << std::min<std::size_t>(number, 63); }
}  // namespace

build::build(std::shared_ptr<engine> e, graph g, std::vector<edge> targets, std::shared_ptr<progress::sink> sink, solve_options options)
    : engine_(std::move(e)),
      graph_(std::move(g)),
      targets_(std::move(targets)),
      sink_(sink ? std::move(sink) : progress::null_sink()),
      options_(options),
      id_(engine_->next_build++),
      group_(engine_->ex, true) {
    load_graph();
    engine_->builds.emplace(id_, this);
}

build::~build() { engine_->builds.erase(id_); }

void build::load_graph() {
    nodes_.resize(graph_.size());
    std::unordered_map<digest, std::size_t> first;
    std::vector<std::size_t> same(graph_.size());
    const auto resolve = [&](edge e, std::size_t below) {
        if (e.vertex >= below) throw error{errc::invalid, cat("the build graph names vertex ", e.vertex, " before it is defined")};
        return edge{same[e.vertex], e.output};
    };
    for (std::size_t i = 0; i < graph_.size(); ++i) {
        const auto& v = graph_[i];
        if (!v.op) throw error{errc::invalid, cat("vertex ", v.id.str(), " of the build graph has no op")};
        same[i] = first.try_emplace(v.id, i).first->second;
        auto& n = nodes_[i];
        n.v = &v;
        n.elsewhere.resize(options_.caches.size());
        n.inputs.reserve(v.inputs.size());
        for (const auto in : v.inputs) n.inputs.push_back(resolve(in, i));
    }
    std::vector<bool> needed(graph_.size());
    for (auto& t : targets_) {
        t = resolve(t, graph_.size());
        needed[t.vertex] = true;
    }
    for (std::size_t i = graph_.size(); i-- > 0;)
        if (needed[i])
            for (const auto in : nodes_[i].inputs) needed[in.vertex] = true;

    for (std::size_t i = 0; i < graph_.size(); ++i) {
        if (!needed[i]) continue;
        auto& n = nodes_[i];
        std::vector<digest> inputs;
        for (std::size_t slot = 0; slot < n.inputs.size(); ++slot) {
            nodes_[n.inputs[slot].vertex].users.push_back({i, slot});
            nodes_[n.inputs[slot].vertex].used_outputs |= output_bit(n.inputs[slot].output);
            inputs.push_back(nodes_[n.inputs[slot].vertex].v->id);
        }
        n.missing = n.inputs.size();
        n.progress = progress::writer(sink_, {.id = n.v->id, .name = n.v->name, .inputs = std::move(inputs), .progress_group = n.v->progress_group});
    }
    for (const auto t : targets_) nodes_[t.vertex].used_outputs |= output_bit(t.output);
    for (const auto t : targets_)
        if (!std::exchange(nodes_[t.vertex].target, true)) ++targets_missing_;
    for (auto& n : nodes_) n.wanted = n.target;
}

async::task<void> build::run() {
    for (auto& n : nodes_)
        if (n.progress.out()) n.progress.announce();
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
        if (!nodes_[i].progress.out()) continue;
        move(i, vertex_state::describing);
        group_.spawn(describe(i));
    }
    if (targets_missing_ == 0) wake_.set();
    std::exception_ptr interrupted;
    try {
        co_await wake_.wait();
    } catch (...) {
        interrupted = std::current_exception();
    }
    if (interrupted || failure_) {
        if (interrupted) stop(cobuild::describe(interrupted));
        co_await async::no_cancel;
        try {
            co_await group_.join();
        } catch (...) {
            interrupted = interrupted ? interrupted : std::current_exception();
        }
        for (const auto& f : ending_) co_await f->ended.wait();
        if (interrupted) std::rethrow_exception(interrupted);
        throw *failure_;
    }
    // What nobody needed in the end stays as it is; what was only looked up counts as found.
    over_ = true;
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
        auto& n = nodes_[i];
        if (n.flight) abandon(i, error{errc::canceled, "nothing needs this step any more"});
        if (n.state == vertex_state::keyed && !n.record && !n.progress.about().completed) n.progress.cached();
    }
    group_.cancel();
    std::exception_ptr leftover;
    try {
        co_await group_.join();
    } catch (...) {
        leftover = std::current_exception();
    }
    co_await async::no_cancel;
    for (const auto& f : ending_) co_await f->ended.wait();
    if (leftover && cobuild::describe(leftover).kind() != errc::canceled) std::rethrow_exception(leftover);
    if (options_.report) report();
}

std::vector<result> build::results() const {
    std::vector<result> out;
    for (const auto t : targets_) {
        const auto& made = nodes_[t.vertex].outputs;
        out.push_back(t.output < made.size() ? made[t.output] : nullptr);
    }
    return out;
}

/// The one place where a vertex changes state.
void build::move(std::size_t i, vertex_state next) {
    auto& n = nodes_[i];
    if (!may_follow(n.state, next))
        throw error{errc::internal, cat("the solver moved \"", n.v->name, "\" from ", to_string(n.state), " to ", to_string(next))};
    n.state = next;
    n.since = std::chrono::steady_clock::now();
}

void build::push(std::size_t i) {
    if (std::exchange(nodes_[i].in_queue, true)) return;
    queue_.push_back(i);
}

void build::pump() {
    if (std::exchange(pumping_, true)) return;
    const scope_exit done([this] { pumping_ = false; });
    while (!queue_.empty() && !over_) {
        const auto i = queue_.front();
        queue_.pop_front();
        nodes_[i].in_queue = false;
        try {
            step(i);
        } catch (...) {
            broken(i, std::current_exception());
        }
    }
    if (over_) queue_.clear();
}

/// A vertex that is not waiting for a task or a run, or no longer has to, goes on from here.
void build::step(std::size_t i) {
    auto& n = nodes_[i];
    switch (n.state) {
        case vertex_state::waiting_keys:
            if (n.missing == 0) compute_fast(i);
            break;
        case vertex_state::waiting_content:
            if (n.missing == 0) {
                move(i, vertex_state::hashing);
                group_.spawn(hash(i));
            }
            break;
        case vertex_state::keyed:
            if (!n.wanted) break;
            if (n.record) {
                move(i, vertex_state::loading);
                group_.spawn(load(i));
            } else if (found_elsewhere(n)) {
                move(i, vertex_state::loading);
                group_.spawn(load_elsewhere(i));
            } else {
                collect(i);
            }
            break;
        case vertex_state::waiting_inputs:
            if (n.missing == 0) take_off(i);
            break;
        default: break;
    }
}

void build::want(std::size_t i) {
    if (std::exchange(nodes_[i].wanted, true)) return;
    push(i);
}

/// The key of `i`, and so those of all above it, waits for runs below. What was found nowhere and these will read is brought
/// about meanwhile: a key that was never seen leads to no hit above it, or only where records were pruned, and then a
/// run too many costs less than stages one after the other.
void build::block(std::size_t i) {
    std::vector<std::size_t> todo{i};
    while (!todo.empty()) {
        const auto at = todo.back();
        todo.pop_back();
        auto& n = nodes_[at];
        if (std::exchange(n.blocked, true)) continue;
        for (const auto in : n.inputs)
            if (const auto& below = nodes_[in.vertex]; below.state == vertex_state::keyed && !below.record && !known_elsewhere(below))
                want(in.vertex);
        for (const auto u : n.users)
            if (!nodes_[u.node].has_key) todo.push_back(u.node);
    }
}

/// Found nowhere, by a key that is known.
void build::settled(std::size_t i) {
    if (known_elsewhere(nodes_[i])) return;
    for (const auto u : nodes_[i].users)
        if (nodes_[u.node].blocked) return want(i);
}

void build::key_known(std::size_t i, key k) {
    auto& n = nodes_[i];
    if (std::exchange(n.has_key, true)) return;
    n.canonical = k;
    settle_elsewhere(i);
    for (const auto u : n.users) {
        auto& above = nodes_[u.node];
        if (above.state != vertex_state::unused && above.state != vertex_state::describing && above.state != vertex_state::waiting_keys) continue;
        if (--above.missing == 0) push(u.node);
    }
}

void build::finish(std::size_t i, std::vector<result> outputs) {
    auto& n = nodes_[i];
    move(i, vertex_state::done);
    n.outputs = std::move(outputs);
    n.has_result = true;
    for (const auto u : n.users) {
        auto& above = nodes_[u.node];
        const bool waits =
            above.state == vertex_state::waiting_inputs || (above.state == vertex_state::waiting_content && input(above, u.slot).content_of);
        if (waits && --above.missing == 0) push(u.node);
    }
    if (n.target && --targets_missing_ == 0) wake_.set();
}

void build::broken(std::size_t i, const std::exception_ptr& why) {
    auto& n = nodes_[i];
    if (over_ || is_final(n.state)) return;
    auto what = cobuild::describe(why);
    move(i, vertex_state::failed);
    n.progress.failed(what);
    failure_ = n.v->name.empty() ? what : std::move(what).with(n.v->name);
    stop(error{errc::canceled, cat("canceled because another step failed: ", n.v->name.empty() ? n.v->id.str() : n.v->name)});
}

void build::abandon(std::size_t i, const error& cause) {
    auto& n = nodes_[i];
    if (auto f = std::exchange(n.flight, nullptr))
        if (engine_->leave(f, {this, i}, cause)) ending_.push_back(std::move(f));
    move(i, vertex_state::canceled);
    if (const auto& shown = n.progress.about(); shown.started && !shown.completed) n.progress.failed(error{errc::canceled, cause.what()});
}

void build::stop(const error& cause) {
    if (std::exchange(over_, true)) return;
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
        const auto& n = nodes_[i];
        if (!is_final(n.state) && n.state != vertex_state::unused) abandon(i, cause);
    }
    cancel_.cancel(cause);
    group_.cancel();
    wake_.set();
}

}  // namespace cobuild::solver

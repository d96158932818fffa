// What a build has to do with caches of other machines, and what it tells for an export to one.
module;
#include <algorithm>
#include <cstddef>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.solver.internal;

namespace cobuild::solver {

// ---------------------------------------------------------------- look-up

/// With the keys known so far. Each cache has keys of its own: see remote_cache.
void build::look_elsewhere(std::size_t i) {
    auto& n = nodes_[i];
    for (std::size_t c = 0; c < n.elsewhere.size(); ++c) {
        auto& there = n.elsewhere[c];
        if (there.fast.empty()) {
            const auto inputs = parts(i, false, c);
            there.fast.push_back(fast_key(n.info.op_digest, n.info.ephemeral, inputs));
            for (const auto& other : n.info.also) there.fast.push_back(fast_key(other, n.info.ephemeral, inputs));
        }
        if (n.content && !there.content) there.content = content_key(n.info.op_digest, n.info.ephemeral, parts(i, true, c));
        if (n.fresh) continue;
        auto keys = there.fast;
        if (there.content) keys.push_back(*there.content);
        for (const auto& k : keys) {
            if (k.ephemeral || (there.found && there.found->loadable)) continue;
            if (auto found = options_.caches[c]->find(k.value)) there.found = std::move(found);
        }
    }
}

/// The key that those above count with in each cache.
void build::settle_elsewhere(std::size_t i) {
    auto& n = nodes_[i];
    for (auto& there : n.elsewhere) {
        if (n.fresh)
            there.canonical = *n.fresh_key;
        else if (there.found)
            there.canonical = {there.found->canonical, false};
        else if (there.fast.front().ephemeral && there.content && !there.content->ephemeral)
            there.canonical = *there.content;
        else
            there.canonical = there.fast.front();
    }
}

/// Whether a cache has its key, with a result or without.
bool build::known_elsewhere(const node& n) {
    return std::any_of(n.elsewhere.begin(), n.elsewhere.end(), [](const auto& there) { return there.found.has_value(); });
}

/// Under which other builds can find it.
static std::vector<digest> storable_keys(const node& n) {
    std::vector<digest> keys;
    for (const auto& k : n.fast)
        if (!k.ephemeral) keys.push_back(k.value);
    if (n.content && !n.content->ephemeral) keys.push_back(n.content->value);
    return keys;
}

/// The first cache that has its result.
std::optional<std::size_t> build::found_elsewhere(const node& n) const {
    for (std::size_t c = 0; c < n.elsewhere.size(); ++c)
        if (const auto& there = n.elsewhere[c];
            there.found && there.found->loadable && (n.used_outputs & ~there.found->outputs) == 0 && !there.failed)
            return c;
    return std::nullopt;
}

// ---------------------------------------------------------------- result

async::task<std::vector<result>> build::try_elsewhere(std::size_t i, std::size_t cache) {
    auto& n = nodes_[i];
    std::exception_ptr failed;
    std::vector<result> outputs;
    try {
        outputs = co_await options_.caches[cache]->load(n.elsewhere[cache].found->canonical, context_of(i).progress);
    } catch (...) {
        failed = std::current_exception();
    }
    if (!failed || over_) co_return outputs;
    const auto why = cobuild::describe(failed);
    log(log_level::warning, "cannot use a result of an imported cache", {{"vertex", n.v->name}, {"error", why.what()}});
    context_of(i).progress.warn({.message = cat("the imported cache is of no use here: ", why.what())});
    n.elsewhere[cache].failed = true;
    co_return std::vector<result>{};
}

async::task<void> build::load_elsewhere(std::size_t i) {
    std::vector<result> outputs;
    while (outputs.empty() && !over_) {
        const auto cache = found_elsewhere(nodes_[i]);
        if (!cache) break;
        outputs = co_await try_elsewhere(i, *cache);
        if (outputs.empty()) nodes_[i].elsewhere[*cache].failed = true;
    }
    if (over_) co_return;
    std::exception_ptr failed;
    try {
        if (!outputs.empty()) co_await remember(i, outputs);
    } catch (...) {
        failed = std::current_exception();
    }
    go_on(i, failed, [&] {
        if (outputs.empty())
            collect(i);
        else
            finish(i, std::move(outputs));
    });
}

/// The next build finds it here, unless that might want an output that was not to be had.
async::task<void> build::remember(std::size_t i, std::vector<result> outputs) {
    const auto& n = nodes_[i];
    const auto keys = storable_keys(n);
    if (keys.empty() || n.canonical.ephemeral || std::find(outputs.begin(), outputs.end(), nullptr) != outputs.end()) co_return;
    std::vector<std::string> texts;
    for (const auto& one : outputs) {
        texts.push_back(one ? co_await engine_->store->save(one) : std::string());
        if (one) engine_->remember_live(texts.back(), one);
    }
    engine_->index->save(n.canonical.value, encode_texts(texts), keys);
}

// ---------------------------------------------------------------- report

namespace {

/// More keys than that have come together over many builds, and the oldest are of no use.
constexpr std::size_t max_reported_keys = 32;

async::task<std::vector<result>> ready(std::vector<result> outputs) { co_return outputs; }

async::task<std::vector<result>> from_record(std::shared_ptr<engine> e, cache::record r) {
    std::vector<result> out;
    const auto texts = decode_texts(r.result);
    if (!texts) co_return out;
    for (const auto& text : *texts) {
        auto one = text.empty() ? std::optional<result>(result{}) : co_await e->load(text);
        if (!one) co_return std::vector<result>{};
        out.push_back(std::move(*one));
    }
    co_return out;
}

/// What is remembered may be gone, as nobody needed it; then it is had from where it was found as well.
async::task<std::vector<result>> stored(std::shared_ptr<engine> e, std::optional<cache::record> r, std::shared_ptr<remote_cache> from, digest key) {
    std::vector<result> out;
    if (r) out = co_await from_record(std::move(e), std::move(*r));
    if (out.empty() && from) out = co_await from->load(key, {});
    co_return out;
}

}  // namespace

void build::report() const {
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
        const auto& n = nodes_[i];
        if (!n.has_key || n.canonical.ephemeral) continue;
        solved out{.id = n.v->id, .canonical = n.canonical.value, .keys = storable_keys(n), .outputs = {}};
        for (const auto& k : engine_->index->keys(out.canonical))
            if (out.keys.size() < max_reported_keys && std::find(out.keys.begin(), out.keys.end(), k) == out.keys.end()) out.keys.push_back(k);
        if (n.has_result) {
            out.outputs = [made = n.outputs] { return ready(made); };
            out.loaded = true;
        } else if (const auto cache = found_elsewhere(n); n.record || cache) {
            const auto from = cache ? options_.caches[*cache] : nullptr;
            const auto key = cache ? n.elsewhere[*cache].found->canonical : digest{};
            out.outputs = [e = engine_, r = n.record, from, key] { return stored(e, r, from, key); };
        } else {
            out.outputs = [] { return ready({}); };
        }
        options_.report->push_back(std::move(out));
    }
}

}  // namespace cobuild::solver

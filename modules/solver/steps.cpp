module;
#include <cstddef>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.solver.internal;

namespace cobuild::solver {

input_info build::input(const node& n, std::size_t slot) const { return slot < n.info.inputs.size() ? n.info.inputs[slot] : input_info{}; }

context build::context_of(std::size_t i) const { return {progress::writer(sink_, nodes_[i].progress.about()), cancel_.token()}; }

std::vector<key_part> build::parts(std::size_t i, bool with_content, std::optional<std::size_t> cache) const {
    const auto& n = nodes_[i];
    std::vector<key_part> out;
    out.reserve(n.inputs.size());
    for (std::size_t slot = 0; slot < n.inputs.size(); ++slot) {
        if (with_content && slot < n.contents.size() && n.contents[slot]) {
            out.push_back({.from = {*n.contents[slot], false}, .content = true});
            continue;
        }
        const auto in = n.inputs[slot];
        const auto& below = nodes_[in.vertex];
        out.push_back(
            {.from = cache ? below.elsewhere.at(*cache).canonical : below.canonical, .output = in.output, .selector = input(n, slot).selector});
    }
    return out;
}

// ---------------------------------------------------------------- describe, fast key

async::task<void> build::describe(std::size_t i) {
    if (over_) co_return;
    auto& n = nodes_[i];
    const bool shown = n.v->op->describe_is_work();
    if (shown) n.progress.started();
    std::exception_ptr failed;
    cache_info info;
    try {
        info = co_await n.v->op->describe(context_of(i));
    } catch (...) {
        failed = std::current_exception();
    }
    go_on(i, failed, [&] {
        if (shown) n.progress.completed();
        described(i, std::move(info));
    });
}

void build::described(std::size_t i, cache_info info) {
    auto& n = nodes_[i];
    n.info = std::move(info);
    n.fresh = !n.info.pinned && (n.info.no_cache || n.v->ignore_cache || options_.no_cache);
    move(i, vertex_state::waiting_keys);
    push(i);
}

void build::compute_fast(std::size_t i) {
    auto& n = nodes_[i];
    const auto inputs = parts(i, false);
    n.fast.push_back(fast_key(n.info.op_digest, n.info.ephemeral, inputs));
    for (const auto& other : n.info.also) n.fast.push_back(fast_key(other, n.info.ephemeral, inputs));
    if (n.fresh && !n.fast.front().ephemeral && options_.runs) {
        const auto known = options_.runs->fresh.find(n.fast.front().value);
        if (known != options_.runs->fresh.end()) {
            // It ran for this build already: what came out then is what it takes now.
            n.fresh = false;
            n.fast = {{known->second, false}};
        }
    }
    if (n.fresh) {
        n.fresh_key = fresh_key(n.fast.front());
        if (options_.runs) options_.runs->fresh.emplace(n.fast.front().value, n.fresh_key->value);
    }
    look_elsewhere(i);
    look_up(i, n.fast, false);
}

// ---------------------------------------------------------------- look-up

void build::look_up(std::size_t i, std::vector<key> keys, bool by_content) {
    move(i, vertex_state::looking_up);
    std::erase_if(keys, [](const key& k) { return k.ephemeral; });
    if (nodes_[i].fresh || keys.empty()) return looked_up(i, std::nullopt, by_content);
    for (const auto& k : keys)
        if (auto found = engine_->index->peek(k.value)) return looked_up(i, std::move(found), by_content);
    if (!engine_->index->may_have_more()) return looked_up(i, std::nullopt, by_content);
    group_.spawn(look_up_stored(i, std::move(keys), by_content));
}

async::task<void> build::look_up_stored(std::size_t i, std::vector<key> keys, bool by_content) {
    if (over_) co_return;
    std::optional<cache::record> found;
    std::exception_ptr failed;
    try {
        for (std::size_t k = 0; k < keys.size() && !found; ++k) found = co_await engine_->index->find(keys[k].value);
    } catch (...) {
        failed = std::current_exception();
    }
    go_on(i, failed, [&] { looked_up(i, std::move(found), by_content); });
}

void build::looked_up(std::size_t i, std::optional<cache::record> found, bool by_content) {
    auto& n = nodes_[i];
    if (!found && found_elsewhere(n)) {
        n.progress.cached();
        return settle(i);
    }
    if (!found) return by_content ? settle(i) : after_fast_miss(i);
    for (const auto& k : n.fast)
        if (!k.ephemeral) engine_->index->link(k.value, found->canonical);
    engine_->index->touch(found->canonical);
    n.record = std::move(found);
    n.progress.cached();
    move(i, vertex_state::keyed);
    key_known(i, {n.record->canonical, false});
    push(i);
}

void build::after_fast_miss(std::size_t i) {
    auto& n = nodes_[i];
    // Elsewhere its key led on to what stands above: nothing has to run to learn another one.
    if (known_elsewhere(n)) return settle(i);
    std::size_t missing = 0;
    bool any = false;
    for (std::size_t slot = 0; slot < n.inputs.size(); ++slot) {
        if (!input(n, slot).content_of) continue;
        any = true;
        const auto below = n.inputs[slot].vertex;
        want(below);
        if (!nodes_[below].has_result) ++missing;
    }
    if (!any) return settle(i);
    move(i, vertex_state::waiting_content);
    n.missing = missing;
    if (missing > 0) block(i);
    push(i);
}

// ---------------------------------------------------------------- content key

async::task<void> build::hash(std::size_t i) {
    if (over_) co_return;
    auto& n = nodes_[i];
    std::exception_ptr failed;
    try {
        n.contents.resize(n.inputs.size());
        for (std::size_t slot = 0; slot < n.inputs.size(); ++slot) {
            if (!input(n, slot).content_of) continue;
            const auto in = n.inputs[slot];
            const auto& made = nodes_[in.vertex].outputs;
            if (in.output < made.size() && made[in.output]) n.contents[slot] = co_await n.v->op->content_key(slot, made[in.output], context_of(i));
        }
    } catch (...) {
        failed = std::current_exception();
    }
    go_on(i, failed, [&] { hashed(i); });
}

void build::hashed(std::size_t i) {
    auto& n = nodes_[i];
    bool any = false;
    for (const auto& c : n.contents) any |= c.has_value();
    if (any) n.content = content_key(n.info.op_digest, n.info.ephemeral, parts(i, true));
    std::vector<key> keys;
    if (n.content) keys.push_back(*n.content);
    look_elsewhere(i);
    look_up(i, std::move(keys), true);
}

/// Found nowhere: it gets the key under which it will be stored, unless only the run can tell that.
void build::settle(std::size_t i) {
    auto& n = nodes_[i];
    bool late = false;
    const bool known = known_elsewhere(n);
    for (const auto& in : n.info.inputs) late |= in.late && !known;
    // What it reads of an input that means nothing elsewhere is not known before it ran: then only the run can tell its key.
    for (std::size_t slot = 0; slot < n.inputs.size(); ++slot)
        late |= !known && input(n, slot).content_of && !(slot < n.contents.size() && n.contents[slot]) &&
                nodes_[n.inputs[slot].vertex].canonical.ephemeral;
    if (late) {
        n.wanted = true;
        block(i);
        return collect(i);
    }
    move(i, vertex_state::keyed);
    key k = n.fast.front();
    // What it read is known, so others can find what it came to.
    if (n.fresh && n.content && !n.content->ephemeral) n.fresh_key->ephemeral = false;
    if (n.fresh)
        k = *n.fresh_key;
    else if (k.ephemeral && n.content && !n.content->ephemeral)
        k = *n.content;
    key_known(i, k);
    settled(i);
    push(i);
}

// ---------------------------------------------------------------- result

async::task<void> build::load(std::size_t i) {
    if (over_) co_return;
    auto& n = nodes_[i];
    std::vector<result> outputs;
    const auto texts = decode_texts(n.record->result);
    bool dead = !texts;
    std::exception_ptr failed;
    try {
        for (std::size_t t = 0; !dead && t < texts->size(); ++t) {
            if ((*texts)[t].empty()) {
                outputs.push_back(nullptr);
                continue;
            }
            auto loaded = co_await engine_->load((*texts)[t]);
            dead = !loaded;
            if (loaded) outputs.push_back(std::move(*loaded));
        }
    } catch (...) {
        failed = std::current_exception();
    }
    if (failed && !over_) {
        // What cannot be loaded can be made again.
        log(log_level::warning, "cannot load a result from the build cache, running it again",
            {{"vertex", n.v->name}, {"error", cobuild::describe(failed).what()}});
        dead = true;
    }
    go_on(i, nullptr, [&] {
        if (dead) {
            n.dead = std::exchange(n.record, std::nullopt);
            if (found_elsewhere(n))
                group_.spawn(load_elsewhere(i));
            else
                collect(i);
        } else {
            finish(i, std::move(outputs));
        }
    });
}

void build::collect(std::size_t i) {
    move(i, vertex_state::waiting_inputs);
    auto& n = nodes_[i];
    n.missing = 0;
    for (const auto in : n.inputs) {
        want(in.vertex);
        if (!nodes_[in.vertex].has_result) ++n.missing;
    }
    push(i);
}

void build::take_off(std::size_t i) {
    auto& n = nodes_[i];
    std::vector<digest> keys;
    const auto add = [&keys](const key& k) { keys.push_back(k.value); };
    if (n.fresh) {
        add(*n.fresh_key);
    } else {
        for (const auto& k : n.fast) add(k);
        if (n.content) add(*n.content);
        // Another build may have finished it since we looked.
        for (const auto& k : keys) {
            auto found = engine_->index->peek(k);
            if (!found || (n.dead && *n.dead == *found) || (n.dead && n.dead->result == found->result)) continue;
            n.record = std::move(found);
            if (!n.progress.about().started) n.progress.cached();
            key_known(i, {n.record->canonical, false});
            move(i, vertex_state::loading);
            group_.spawn(load(i));
            return;
        }
    }
    auto f = engine_->find_flight(keys);
    const bool mine = !f;
    if (mine) {
        f = std::make_shared<flight>();
        f->op = n.v->op;
        f->name = n.v->name;
        for (const auto in : n.inputs) {
            const auto& made = nodes_[in.vertex].outputs;
            f->inputs.push_back(in.output < made.size() ? made[in.output] : nullptr);
        }
        f->op_digest = n.info.op_digest;
        f->op_ephemeral = n.info.ephemeral;
        f->parts = parts(i, true);
        f->fast = n.fast;
        f->content = n.content;
        if (n.has_key) f->canonical = n.canonical;
        f->dead = n.dead;
        f->fresh = n.fresh_key;
        f->registered = std::move(keys);
        f->owner = this;
    }
    n.flight = f;
    engine_->join(f, {this, i});
    if (mine) engine_->launch(std::move(f));
}

void build::flight_at(std::size_t i, vertex_state stage) {
    auto& n = nodes_[i];
    if (over_ || n.state == stage) return;
    const bool starts = stage == vertex_state::running || (stage == vertex_state::saving && n.state != vertex_state::running);
    move(i, stage);
    if (starts) n.progress.started();
}

void build::landed(std::size_t i, const flight& f, const outcome& out) {
    if (over_) return;
    auto& n = nodes_[i];
    n.flight = nullptr;
    const bool again = out.failed && f.owner == nullptr;  // in the name of a build that has gone; our own op may fare better
    go_on(i, again ? nullptr : out.failed, [&] {
        if (again) {
            move(i, vertex_state::waiting_inputs);
            push(i);
            return;
        }
        // Only the run could tell what it read: those above may be found elsewhere by that.
        if (!n.has_key && f.parts.size() == n.inputs.size()) {
            n.contents.resize(n.inputs.size());
            for (std::size_t slot = 0; slot < f.parts.size(); ++slot)
                if (f.parts[slot].content) n.contents[slot] = f.parts[slot].from.value;
            if (f.content) n.content = content_key(n.info.op_digest, n.info.ephemeral, parts(i, true));
            look_elsewhere(i);
        }
        key_known(i, out.canonical);
        n.progress.completed();
        if (!out.adopted) return finish(i, out.outputs);
        n.record = out.adopted;
        move(i, vertex_state::keyed);
        push(i);
    });
}

}  // namespace cobuild::solver

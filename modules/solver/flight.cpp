module;
#include <algorithm>
#include <cstddef>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.solver.internal;

namespace cobuild::solver {

// ---------------------------------------------------------------- saying it to everybody

namespace {

constexpr std::size_t max_replayed_log = std::size_t{256} << 10;
constexpr std::size_t max_replayed_events = 10'000;

progress::event as_of(progress::event what, const digest& id) {
    std::visit(
        [&](auto& e) {
            if constexpr (requires { e.vertex; })
                e.vertex = id;
            else
                e.id = id;
        },
        what);
    return what;
}

}  // namespace

void broadcast::on_event(const progress::event& what) {
    if (std::holds_alternative<progress::vertex>(what)) return;
    remember(what);
    const auto to = to_;
    for (const auto& [sink, id] : to) sink->on_event(as_of(what, id));
}

void broadcast::remember(const progress::event& what) {
    if (const auto* line = std::get_if<progress::status>(&what))
        if (const auto known = lines_.find(line->id); known != lines_.end()) {
            said_[known->second] = what;
            return;
        }
    if (said_.size() >= max_replayed_events) return;
    if (const auto* text = std::get_if<progress::log>(&what)) {
        log_bytes_ += text->data.size();
        if (log_bytes_ > max_replayed_log) return;
    } else if (const auto* line = std::get_if<progress::status>(&what)) {
        lines_.emplace(line->id, said_.size());
    }
    said_.push_back(what);
}

void broadcast::add(std::shared_ptr<progress::sink> to, digest as) {
    for (const auto& e : said_) to->on_event(as_of(e, as));
    to_.emplace_back(std::move(to), as);
}

void broadcast::drop(const digest& as, const progress::sink* to) {
    std::erase_if(to_, [&](const auto& t) { return t.second == as && t.first.get() == to; });
}

// ---------------------------------------------------------------- results by text

engine::engine(async::executor e, std::shared_ptr<cache::index> i, std::shared_ptr<result_store> s, solver_options o)
    : ex(e), index(std::move(i)), store(std::move(s)), options(o), slots(o.max_parallelism), group(e, true) {}

void engine::remember_live(const std::string& text, const result& r) {
    if (live.size() >= live_limit) {
        std::erase_if(live, [](const auto& l) { return l.second.expired(); });
        live_limit = std::max<std::size_t>(1024, live.size() * 2);
    }
    live.insert_or_assign(text, r);
}

async::task<std::optional<result>> engine::load(std::string text) {
    if (const auto known = live.find(text); known != live.end())
        if (auto r = known->second.lock()) co_return r;
    auto r = co_await store->load(text);
    if (r && *r) remember_live(text, *r);
    co_return r;
}

async::task<bool> engine::alive(std::string texts) {
    auto decoded = decode_texts(texts);
    if (!decoded) co_return false;
    for (auto& text : *decoded)
        if (!text.empty() && !co_await store->alive(std::move(text))) co_return false;
    co_return true;
}

// ---------------------------------------------------------------- who waits for it

std::shared_ptr<flight> engine::find_flight(const std::vector<digest>& keys) {
    for (const auto& k : keys)
        if (const auto f = flights.find(k); f != flights.end()) return f->second;
    return nullptr;
}

void engine::unregister(const std::shared_ptr<flight>& f) {
    for (const auto& k : f->registered)
        if (const auto at = flights.find(k); at != flights.end() && at->second == f) flights.erase(at);
}

void engine::join(const std::shared_ptr<flight>& f, subscriber s) {
    f->subscribers.push_back(s);
    s.build->flight_at(s.node, f->stage);
    f->out->add(s.build->sink(), s.build->id_of(s.node));
}

bool engine::leave(const std::shared_ptr<flight>& f, subscriber s, const error& cause) {
    if (is_final(f->stage)) return false;
    std::erase(f->subscribers, s);
    f->out->drop(s.build->id_of(s.node), s.build->sink().get());
    const bool others = std::any_of(f->subscribers.begin(), f->subscribers.end(), [&](const auto& o) { return o.build == s.build; });
    if (!others && f->owner == s.build) f->owner = nullptr;
    if (!f->subscribers.empty()) return false;
    unregister(f);  // who needs it from now on starts anew, not with a run that is being stopped
    f->cancel.cancel(cause);
    return true;
}

void engine::launch(std::shared_ptr<flight> f) {
    for (const auto& k : f->registered) flights.try_emplace(k, f);
    group.spawn(fly(std::move(f)));
}

void engine::set_stage(const std::shared_ptr<flight>& f, vertex_state stage) {
    f->stage = stage;
    const auto all = f->subscribers;
    for (const auto& s : all) s.build->flight_at(s.node, stage);
}

// ---------------------------------------------------------------- the run

async::task<void> engine::fly(std::shared_ptr<flight> f) {
    auto out = std::make_shared<outcome>();
    try {
        co_await async::linked(f->cancel.token(), work(f, out));
    } catch (...) {
        out->failed = std::current_exception();
    }
    unregister(f);
    f->stage = out->failed ? vertex_state::failed : vertex_state::done;
    f->inputs.clear();
    f->op.reset();
    const auto all = std::exchange(f->subscribers, {});
    for (const auto& s : all) s.build->landed(s.node, *f, *out);
    f->ended.set();
}

async::task<void> engine::work(std::shared_ptr<flight> f, std::shared_ptr<outcome> out) {
    const context ctx{progress::writer(f->out, {.id = f->fast.front().value, .name = f->name}), f->cancel.token()};
    run_result made;
    {
        const auto locks = co_await f->op->prepare({ctx.progress, ctx.cancelled, f->inputs});
        async::semaphore::permit slot;
        if (f->op->counted()) {
            set_stage(f, vertex_state::queued);
            slot = co_await slots.acquire();
        }
        set_stage(f, vertex_state::running);
        made = co_await f->op->run(f->inputs, ctx);
    }
    set_stage(f, vertex_state::saving);
    co_await store_outcome(f, std::move(made), out);
}

async::task<void> engine::store_outcome(std::shared_ptr<flight> f, run_result r, std::shared_ptr<outcome> out) {
    for (std::size_t slot = 0; slot < r.content.size() && slot < f->parts.size(); ++slot)
        if (r.content[slot]) {
            f->parts[slot] = {.from = {*r.content[slot], false}, .content = true};
            f->content = content_key(f->op_digest, f->op_ephemeral, f->parts);
        }
    std::vector<digest> keys;
    for (const auto& k : f->fast)
        if (!k.ephemeral) keys.push_back(k.value);
    std::optional<cache::record> known;
    if (f->content && !f->content->ephemeral) {
        keys.push_back(f->content->value);
        if (!f->fresh) known = co_await index->find(f->content->value);
    }
    if (known && !(f->dead && f->dead->result == known->result) && co_await alive(known->result)) {
        for (const auto& k : keys) index->link(k, known->canonical);
        index->touch(known->canonical);
        out->canonical = {known->canonical, false};
        out->adopted = std::move(known);
        co_return;
    }
    out->outputs = std::move(r.outputs);
    if (keys.empty()) {
        out->canonical = f->canonical ? *f->canonical : f->fresh ? *f->fresh : f->fast.front();
        co_return;
    }
    out->canonical = f->canonical && !f->canonical->ephemeral ? *f->canonical
                     : f->dead                                ? key{f->dead->canonical}
                     : known                                  ? key{known->canonical}
                     : f->fresh && !f->fresh->ephemeral       ? *f->fresh
                                                              : key{keys.front()};
    std::vector<std::string> texts;
    for (const auto& one : out->outputs) {
        texts.push_back(one ? co_await store->save(one) : std::string());
        if (one) remember_live(texts.back(), one);
    }
    index->save(out->canonical.value, encode_texts(texts), keys);
}

}  // namespace cobuild::solver

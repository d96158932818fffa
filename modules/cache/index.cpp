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
#include <unordered_set>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/cancellation_type.hpp>
#include <boost/asio/this_coro.hpp>

module cobuild.cache;

namespace cobuild::cache {

namespace {

constexpr nanoseconds touch_every = std::chrono::minutes(1);
constexpr std::size_t full_batch = 5'000;
constexpr std::int64_t memo_days = 30;

time_point now() { return std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now()); }

void warn(std::string_view what, const std::exception_ptr& why) { log(log_level::warning, what, {{"error", describe(why).what()}}); }

}  // namespace

struct index::state {
    struct entry {
        record rec;
        std::vector<digest> keys;  ///< those known here
    };

    async::executor ex;
    async::blocking_pool& pool;
    std::shared_ptr<storage> store;
    index_options options;
    async::task_group group;
    async::semaphore writing{1};

    std::unordered_map<digest, entry> records;
    std::unordered_map<digest, digest> links;
    bool complete = true;

    // Not yet written; what to write is taken from above when it is.
    std::unordered_set<digest> put;
    std::unordered_set<digest> touched;
    std::unordered_set<digest> linked;
    std::unordered_set<digest> removed;
    std::unordered_set<digest> being_removed;  ///< of the batch under way
    bool timer = false;
    bool closed = false;

    std::shared_ptr<stat_memo> memo;
    std::optional<async::event> memo_loaded;

    state(async::executor e, async::blocking_pool& p, std::shared_ptr<storage> s, index_options o)
        : ex(e), pool(p), store(std::move(s)), options(o), group(e, true) {}

    void add(const record& r, const digest& key) {
        auto& e = records.try_emplace(r.canonical, entry{r, {}}).first->second;
        if (links.try_emplace(key, r.canonical).second) e.keys.push_back(key);
    }

    void point(const digest& key, entry& to) {
        const auto [at, fresh] = links.try_emplace(key, to.rec.canonical);
        if (!fresh) {
            if (at->second == to.rec.canonical) return;
            if (const auto old = records.find(at->second); old != records.end()) {
                std::erase(old->second.keys, key);
                if (old->second.keys.empty()) forget(old);
            }
            at->second = to.rec.canonical;
        }
        to.keys.push_back(key);
        linked.insert(key);
    }

    void forget(std::unordered_map<digest, entry>::iterator at) {
        for (const auto& key : at->second.keys) {
            links.erase(key);
            linked.erase(key);
        }
        put.erase(at->first);
        touched.erase(at->first);
        records.erase(at);
    }

    [[nodiscard]] bool dirty() const { return !put.empty() || !linked.empty() || !touched.empty() || !removed.empty(); }

    changes take() {
        changes out;
        out.removed.assign(removed.begin(), removed.end());
        for (const auto& c : put)
            if (const auto r = records.find(c); r != records.end()) out.put.push_back(r->second.rec);
        for (const auto& key : linked)
            if (const auto l = links.find(key); l != links.end()) out.links.push_back({key, l->second});
        for (const auto& c : touched)
            if (const auto r = records.find(c); r != records.end()) out.touched.emplace_back(c, r->second.rec.last_used);
        if (memo) out.memos = memo->take_new();
        being_removed = std::exchange(removed, {});
        put.clear();
        linked.clear();
        touched.clear();
        return out;
    }

    /// Keeps memory bounded: the longest unused go, once everything is written.
    void trim() {
        if (dirty() || records.size() <= options.max_records + options.max_records / 4) return;
        std::vector<std::pair<time_point, digest>> by_age;
        by_age.reserve(records.size());
        for (const auto& [c, e] : records) by_age.emplace_back(e.rec.last_used, c);
        const auto surplus = by_age.begin() + static_cast<std::ptrdiff_t>(records.size() - options.max_records);
        std::nth_element(by_age.begin(), surplus, by_age.end());
        for (auto at = by_age.begin(); at != surplus; ++at) forget(records.find(at->second));
        complete = false;
    }
};

namespace {

/// Templates and lambdas cannot name index::state outside its members; these few go through shared pointers of it.
template<class State>
async::task<void> write_out(std::shared_ptr<State> s) {
    const auto turn = co_await s->writing.acquire();
    // From here to the pool nothing suspends: a batch once taken is written also when we are cancelled.
    if ((co_await boost::asio::this_coro::cancellation_state).cancelled() != boost::asio::cancellation_type::none)
        throw error{errc::canceled, "writing the build cache was interrupted"};
    auto batch = s->take();
    if (batch.empty()) co_return;
    std::exception_ptr failed;
    try {
        co_await s->pool.run([store = s->store, batch = std::move(batch)] { store->apply(batch); });
    } catch (...) {
        failed = std::current_exception();
    }
    s->being_removed.clear();
    if (failed) warn("cannot write the build cache; what is new is lost", failed);
    s->trim();
}

template<class State>
async::task<void> write_later(std::shared_ptr<State> s) {
    co_await async::sleep_for(s->options.flush_after);
    s->timer = false;
    co_await write_out(s);
}

template<class State>
void mark(const std::shared_ptr<State>& s) {
    if (s->closed || !s->dirty()) return;
    if (s->put.size() + s->linked.size() >= full_batch && s->writing.in_use() == 0)
        s->group.spawn(write_out(s));
    else if (!s->timer) {
        s->timer = true;
        s->group.spawn(write_later(s));
    }
}

}  // namespace

index::index(std::shared_ptr<state> s) : state_(std::move(s)) {}
index::~index() = default;

async::task<std::shared_ptr<index>> index::open(async::blocking_pool& pool, std::shared_ptr<storage> store, index_options options) {
    auto s = std::make_shared<state>(co_await async::current_executor, pool, std::move(store), options);
    contents all;
    try {
        all = co_await pool.run([store = s->store, options] { return store->load(options.max_records); });
    } catch (const error&) {
        warn("cannot read the build cache; going on without", std::current_exception());
    }
    s->complete = all.complete;
    s->records.reserve(all.records.size());
    s->links.reserve(all.links.size());
    for (auto& r : all.records) {
        const auto canonical = r.canonical;
        s->records.try_emplace(canonical, state::entry{std::move(r), {}});
    }
    for (const auto& l : all.links)
        if (const auto r = s->records.find(l.canonical); r != s->records.end() && s->links.try_emplace(l.key, l.canonical).second)
            r->second.keys.push_back(l.key);
    co_return std::shared_ptr<index>(new index(std::move(s)));
}

std::optional<record> index::peek(const digest& key) const {
    const auto l = state_->links.find(key);
    if (l == state_->links.end()) return std::nullopt;
    const auto r = state_->records.find(l->second);
    if (r == state_->records.end()) return std::nullopt;
    return r->second.rec;
}

bool index::may_have_more() const noexcept { return !state_->complete || state_->store->shared(); }

async::task<std::optional<record>> index::find(digest key) {
    if (auto known = peek(key); known || !may_have_more()) co_return known;
    auto s = state_;
    std::optional<record> stored;
    try {
        stored = co_await s->pool.run([store = s->store, key] { return store->find(key); });
    } catch (const error&) {
        warn("cannot look into the build cache", std::current_exception());
    }
    // Meanwhile it may have been stored or removed here, and that counts.
    if (auto known = peek(key)) co_return known;
    if (stored && !s->removed.contains(stored->canonical) && !s->being_removed.contains(stored->canonical)) {
        s->add(*stored, key);
        co_return s->records.at(stored->canonical).rec;
    }
    co_return std::nullopt;
}

record index::save(digest canonical, std::string result, const std::vector<digest>& keys) {
    auto& s = *state_;
    const auto when = now();
    auto& e = s.records.try_emplace(canonical, state::entry{record{.canonical = canonical, .result = {}, .created = when}, {}}).first->second;
    e.rec.result = std::move(result);
    e.rec.last_used = when;
    s.removed.erase(canonical);
    s.put.insert(canonical);
    s.point(canonical, e);
    for (const auto& key : keys) s.point(key, e);
    mark(state_);
    return e.rec;
}

void index::link(digest key, digest canonical) {
    const auto r = state_->records.find(canonical);
    if (r == state_->records.end()) return;
    state_->point(key, r->second);
    mark(state_);
}

void index::remove(digest canonical) {
    if (const auto r = state_->records.find(canonical); r != state_->records.end()) state_->forget(r);
    state_->removed.insert(canonical);
    mark(state_);
}

void index::touch(digest canonical) {
    const auto r = state_->records.find(canonical);
    if (r == state_->records.end()) return;
    const auto when = now();
    if (when - r->second.rec.last_used < touch_every) return;
    r->second.rec.last_used = when;
    state_->touched.insert(canonical);
    mark(state_);
}

std::vector<digest> index::keys(const digest& canonical) const {
    const auto r = state_->records.find(canonical);
    return r == state_->records.end() ? std::vector<digest>() : r->second.keys;
}

async::task<std::vector<record>> index::all() {
    co_await flush();
    auto s = state_;
    auto everything = co_await s->pool.run([store = s->store] { return store->load(static_cast<std::size_t>(-1)); });
    co_return std::move(everything.records);
}

async::task<std::shared_ptr<stat_memo>> index::memo() {
    auto s = state_;
    if (!s->memo) {
        s->memo = std::make_shared<stat_memo>();
        s->memo_loaded.emplace();
        const scope_exit loaded([s] { s->memo_loaded->set(); });
        const auto oldest = std::chrono::floor<std::chrono::days>(now()).time_since_epoch().count() - memo_days;
        try {
            co_await s->pool.run([store = s->store, memo = s->memo, oldest] { memo->load(store->load_memos(oldest)); });
        } catch (const error&) {
            warn("cannot read the digests of known files", std::current_exception());
        }
    } else {
        co_await s->memo_loaded->wait();
    }
    co_return s->memo;
}

async::task<void> index::flush() { co_await write_out(state_); }

async::task<void> index::close() {
    auto s = state_;
    if (s->closed) co_return;
    s->closed = true;
    s->group.cancel();
    try {
        co_await s->group.join();
    } catch (const std::exception&) {
        // the late write was cancelled; the one below takes over
    }
    co_await write_out(s);
}

}  // namespace cobuild::cache

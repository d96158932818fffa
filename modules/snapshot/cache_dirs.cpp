module;
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.snapshot;

import cobuild.base;
import cobuild.async;
import cobuild.db;
import cobuild.state;
import :internal;

// Who has a cache directory holds an flock on layers/<n>/lock: shared or exclusive. Choosing and making happen under
// layers/choosing, so that looking at a lock by taking it disturbs nobody and two first users make one directory.
namespace cobuild::snapshot {
namespace {

constexpr std::string_view kind = "exec.cachemount";

std::string key_of(const cache_request& r) {
    std::string out = cat(r.id, "\n");
    for (const auto id : r.seed.layers) out += cat(id.value, " ");
    if (r.seed.layers.empty()) out += cat(r.uid, ":", r.gid, ":", r.mode);
    return out;
}

bool try_lock(int fd, int how) { return ::flock(fd, how | LOCK_NB) == 0; }

struct candidate {
    layer_id id;
    state::pin keep;
    unique_fd lock;
};

std::vector<candidate> candidates_of(store::common& c, const std::string& key) {
    std::vector<layer_id> ids;
    c.dir->database().read([&](db::connection& d) {
        for (auto rows = d.query("SELECT id FROM layers WHERE cache_key=? ORDER BY id", key); rows.next();)
            ids.push_back({static_cast<std::uint64_t>(rows.integer(0))});
    });
    std::vector<candidate> out;
    for (const auto id : ids) {
        auto keep = c.hold({id}, false);
        if (!keep) continue;
        unique_fd lock(::openat(c.layers.get(), cat(id.value, "/lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
        if (!lock) throw_errno(cat("cannot open the lock of the cache directory ", id.value));
        out.push_back({id, std::move(*keep), std::move(lock)});
    }
    return out;
}

/// Those of this key are found no more; who has one keeps it until then.
void forget(store::common& c, const std::string& key) {
    c.dir->database().write([&](db::connection& d) { d.run("UPDATE layers SET cache_key=NULL WHERE cache_key=?", key); });
}

/// The one to use now, locked; empty when there is none free.
std::optional<candidate> choose(std::vector<candidate>& all, sharing how) {
    candidate* idle = nullptr;
    for (auto& one : all) {
        if (try_lock(one.lock.get(), LOCK_EX)) {
            if (how != sharing::shared) return std::move(one);
            if (idle == nullptr)
                idle = &one;
            else
                ::flock(one.lock.get(), LOCK_UN);
        } else if (how == sharing::shared && try_lock(one.lock.get(), LOCK_SH)) {
            return std::move(one);  // the one that others share
        }
    }
    if (idle == nullptr) return std::nullopt;
    ::flock(idle->lock.get(), LOCK_SH);
    return std::move(*idle);
}

candidate make(const std::shared_ptr<store::common>& c, const cache_request& r, const std::string& key) {
    const auto keep_seed = c->must_hold(r.seed);
    unfinished work(c, r.mode & 07777);
    if (!r.seed.layers.empty())
        merge_layers(*c, r.seed, work.fs.get());
    else if (::fchown(work.fs.get(), r.uid, r.gid) != 0 || ::fchmod(work.fs.get(), r.mode & 07777) != 0)
        throw_errno(cat("cannot make a cache directory below ", c->where()));
    unique_fd lock(::openat(work.dir.get(), "lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    if (!lock || !try_lock(lock.get(), r.sharing == sharing::shared ? LOCK_SH : LOCK_EX))
        throw_errno(cat("cannot make a cache directory below ", c->where()));
    auto made = work.publish({.kind = std::string(kind), .description = r.description, .cache_key = key}).first;
    return {made.id, std::move(made.keep), std::move(lock)};
}

std::optional<candidate> try_acquire(const std::shared_ptr<store::common>& c, const cache_request& r, const std::string& key) {
    const unique_fd choosing(::openat(c->layers.get(), "choosing", O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    if (!choosing) throw_errno(cat("cannot open the lock of the cache directories below ", c->where()));
    while (::flock(choosing.get(), LOCK_EX) != 0) {
        if (errno != EINTR) throw_errno("cannot lock the cache directories");
    }
    if (r.fresh) forget(*c, key);
    auto all = candidates_of(*c, key);
    auto out = choose(all, r.sharing);
    if (!out && (r.sharing != sharing::locked || all.empty())) out = make(c, r, key);
    if (!out) return std::nullopt;
    const std::lock_guard lock(c->busy);
    auto& use = c->uses[out->id];
    ++use.count;
    use.last = now();
    return out;
}

std::shared_ptr<async::semaphore> turn_of(store::common& c, const std::string& key) {
    const std::lock_guard lock(c.busy);
    auto& slot = c.turns[key];
    if (!slot) slot = std::make_shared<async::semaphore>(1);
    return slot;
}

}  // namespace

async::task<cache_dir> store::acquire_cache(cache_request r) {
    auto c = common_;
    const auto key = key_of(r);
    async::semaphore::permit turn;
    if (r.sharing == sharing::locked) turn = co_await turn_of(*c, key)->acquire();
    // behind other kinds of users and other processes nobody wakes us: ask again, soon at first
    for (auto pause = std::chrono::milliseconds(2);; pause = std::min(pause * 2, std::chrono::milliseconds(50))) {
        auto got = co_await c->dir->pool().run([&] { return try_acquire(c, r, key); });
        if (got) {
            auto s = std::make_shared<cache_dir::state>();
            s->owner = c;
            s->id = got->id;
            s->keep = std::move(got->keep);
            s->turn = std::move(turn);
            s->lock = std::move(got->lock);
            co_return access::make(std::move(s));
        }
        co_await async::sleep_for(pause);
    }
}

cache_dir::cache_dir(std::shared_ptr<state> s) noexcept : state_(std::move(s)) {}
cache_dir::cache_dir(cache_dir&&) noexcept = default;
cache_dir& cache_dir::operator=(cache_dir&&) noexcept = default;
cache_dir::~cache_dir() = default;
layer_id cache_dir::id() const noexcept { return state_->id; }
unique_fd cache_dir::mount() const { return bind_mount(state_->owner->fs_of(state_->id).get(), false); }

}  // namespace cobuild::snapshot

module;
#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/steady_timer.hpp>

module cobuild.registry;

import :internal;

namespace cobuild::registry {

struct socket_pool::timer {
    explicit timer(const async::executor& ex) : clock(ex) {}
    boost::asio::steady_timer clock;
    bool running = false;
};

socket_pool::socket_pool(async::executor strand, limits l, nanoseconds idle_close)
    : cap_(l.transfers + l.metadata),
      most_transfers_(l.transfers),
      transfers_(l.transfers),
      total_(cap_),
      idle_close_(idle_close),
      strand_(std::move(strand)),
      timer_(std::make_unique<timer>(strand_)) {}

socket_pool::~socket_pool() = default;

async::task<socket_pool::lease> socket_pool::acquire(bool transfer) {
    const auto self = shared_from_this();
    lease out;
    // Always in this order: who holds only a total slot never waits for a transfer slot.
    if (transfer) out.transfer_ = co_await transfers_.acquire();
    out.total_ = co_await total_.acquire();
    out.pool_ = self;
    co_return out;
}

std::size_t socket_pool::spare() const noexcept {
    const auto used = transfers_.in_use();
    return transfers_.waiting() > 0 || used >= most_transfers_ ? 0 : most_transfers_ - used;
}

http::connection& socket_pool::lease::at(const http::endpoint& e, const http::connection_options& options) {
    if (connection_ && connection_->server() == e) return *connection_;
    put_back();
    auto& idle = pool_->idle_;
    for (auto it = idle.rbegin(); it != idle.rend(); ++it) {
        if (it->connection->server() != e) continue;
        connection_ = std::move(it->connection);
        idle.erase(std::next(it).base());
        ++pool_->busy_;
        return *connection_;
    }
    while (!idle.empty() && idle.size() + pool_->busy_ + 1 > pool_->cap_) idle.erase(idle.begin());
    auto counted = options;
    counted.on_socket = [count = pool_->count_](int change) {
        count->now += static_cast<std::size_t>(change);
        count->peak = std::max(count->peak, count->now);
    };
    connection_ = std::make_unique<http::connection>(pool_->strand_, e, std::move(counted));
    ++pool_->busy_;
    return *connection_;
}

void socket_pool::lease::put_back() {
    if (!connection_) return;
    --pool_->busy_;
    auto c = std::move(connection_);
    if (c->reusable()) {
        pool_->idle_.push_back({std::move(c), clock::now()});
        pool_->schedule();
    }
}

socket_pool::lease::~lease() {
    if (pool_) put_back();
}

void socket_pool::close_idle() { idle_.clear(); }

void socket_pool::schedule() {
    if (std::exchange(timer_->running, true)) return;
    timer_->clock.expires_at(idle_.front().since + idle_close_);
    timer_->clock.async_wait([weak = weak_from_this()](boost::system::error_code ec) {
        if (const auto self = weak.lock(); self && !ec) self->sweep();
    });
}

void socket_pool::sweep() {
    timer_->running = false;
    const auto now = clock::now();
    std::erase_if(idle_, [&](const idle& i) { return i.since + idle_close_ <= now; });
    if (!idle_.empty()) schedule();
}

std::shared_ptr<socket_pool> registry_state::far_pool(const std::string& origin) {
    auto& found = far_pools[origin];
    if (!found) found = std::make_shared<socket_pool>(strand, opts->limits, opts->idle_close);
    return found;
}

bool registry_state::owns(const http::endpoint& e) const {
    return std::any_of(hosts.begin(), hosts.end(), [&](const auto& h) { return h->endpoint == e; });
}

}  // namespace cobuild::registry

module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.cni;

import cobuild.json;

#include "parts.hpp"

namespace cobuild::cni {
namespace {

using clock = std::chrono::steady_clock;

class pool final : public provider {
public:
    pool(async::runtime& rt, std::unique_ptr<provider> inner, std::size_t size, nanoseconds idle_limit)
        : inner_(std::move(inner)), size_(size), idle_limit_(idle_limit), work_(rt.get_executor(), true) {
        work_.spawn(fill());
    }

    async::task<attachment> attach(std::string id, attach_args args) override {
        const bool plain = args.hostname.empty() && args.capabilities.empty();
        if (plain && !ready_.empty()) {
            auto out = std::move(ready_.back().what);
            ready_.pop_back();
            co_return out;
        }
        co_return co_await inner_->attach(std::move(id), std::move(args));
    }

    async::task<void> detach(attachment a) override {
        if (closing_ || a.get() == nullptr || !a.get()->poolable) {
            co_await inner_->detach(std::move(a));
            co_return;
        }
        ready_.push_back({std::move(a), clock::now()});
        if (ready_.size() > size_ && !sweeping_) {
            sweeping_ = true;
            work_.spawn(sweep());
        }
    }

    async::task<void> close() override { return apart(close_now()); }

    [[nodiscard]] cni::kind kind() const noexcept override { return inner_->kind(); }

private:
    async::task<void> close_now() {
        closing_ = true;
        work_.cancel();
        co_await async::no_cancel;
        co_await work_.join();
        while (!ready_.empty()) {
            auto last = std::move(ready_.back().what);
            ready_.pop_back();
            co_await inner_->detach(std::move(last));
        }
        co_await inner_->close();
    }

    struct idle {
        attachment what;
        clock::time_point since;
    };

    async::task<void> fill() {
        while (ready_.size() < size_) {
            std::exception_ptr failed;
            try {
                auto fresh = co_await inner_->attach("pool-" + random_id().substr(0, 16), {});
                ready_.insert(ready_.begin(), {std::move(fresh), clock::now()});
            } catch (...) {
                failed = std::current_exception();
            }
            if (!failed) continue;
            if (!closing_) log(log_level::warning, cat("no network is kept ready: ", describe(failed).what()));
            co_return;  // the steps themselves will say what is wrong
        }
    }

    /// Gives back what nobody used for long, the longest idle first, down to the size that is kept.
    async::task<void> sweep() {
        const scope_exit done([this] { sweeping_ = false; });
        while (ready_.size() > size_) {
            const auto due = ready_.front().since + idle_limit_;
            if (const auto now = clock::now(); now < due) {
                co_await async::sleep_for(due - now);
                continue;
            }
            auto oldest = std::move(ready_.front().what);
            ready_.erase(ready_.begin());
            co_await inner_->detach(std::move(oldest));
        }
    }

    std::unique_ptr<provider> inner_;
    std::size_t size_;
    nanoseconds idle_limit_;
    std::vector<idle> ready_;  // the last used at the end
    bool sweeping_ = false;
    bool closing_ = false;
    async::task_group work_;
};

}  // namespace

std::unique_ptr<provider> make_pool(async::runtime& rt, std::unique_ptr<provider> inner, std::size_t size, nanoseconds idle_limit) {
    return std::make_unique<pool>(rt, std::move(inner), size, idle_limit);
}

}  // namespace cobuild::cni

module;
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>

#include <boost/asio/any_completion_handler.hpp>
#include <boost/asio/associated_cancellation_slot.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/use_awaitable.hpp>

module cobuild.async;

namespace cobuild::async {

namespace asio = boost::asio;

namespace detail {

/// A FIFO of suspended coroutines with a count of what they wait for: free slots of a semaphore, or an event's "set".
struct wait_list : std::enable_shared_from_this<wait_list> {
    struct waiter {
        asio::any_completion_handler<void(boost::system::error_code)> handler;
        executor ex;
        asio::cancellation_slot slot;
    };

    mutable std::mutex guard;
    std::deque<std::shared_ptr<waiter>> waiters;
    std::size_t slots = 0;
    std::size_t used = 0;
    bool unlimited = false;

    // The slot is cleared and the coroutine resumed on its own executor: a cancellation may be emitted there meanwhile.
    static void resume(std::shared_ptr<waiter> w, boost::system::error_code ec) {
        auto ex = w->ex;
        asio::post(ex, [w = std::move(w), ec]() mutable {
            if (w->slot.is_connected()) w->slot.clear();
            auto handler = std::move(w->handler);
            handler(ec);
        });
    }

    bool try_take() {
        if (!unlimited && (used >= slots || !waiters.empty())) return false;
        ++used;
        return true;
    }

    void give_back() {
        std::shared_ptr<waiter> next;
        {
            const std::lock_guard lock(guard);
            if (waiters.empty()) {
                --used;
                return;
            }
            next = std::move(waiters.front());  // the slot goes straight to the first in line
            waiters.pop_front();
        }
        resume(std::move(next), {});
    }

    bool remove(const std::shared_ptr<waiter>& w) {
        const std::lock_guard lock(guard);
        return std::erase(waiters, w) != 0;
    }

    /// Suspends until resumed; `ready` is asked under the lock and may make the wait unnecessary.
    template<class Ready>
    task<void> suspend(Ready ready) {
        auto ex = co_await current_executor;
        co_await asio::async_initiate<const asio::use_awaitable_t<>, void(boost::system::error_code)>(
            [self = this->shared_from_this(), ex, &ready](auto handler) {
                auto w = std::make_shared<waiter>();
                w->ex = ex;
                w->slot = asio::get_associated_cancellation_slot(handler);
                w->handler = std::move(handler);
                {
                    const std::lock_guard lock(self->guard);
                    if (!ready()) {
                        self->waiters.push_back(w);
                        if (w->slot.is_connected())
                            w->slot.assign([self, weak = std::weak_ptr(w)](asio::cancellation_type) {
                                if (auto live = weak.lock(); live && self->remove(live)) resume(std::move(live), asio::error::operation_aborted);
                            });
                        return;
                    }
                }
                resume(std::move(w), {});
            },
            use_task);
    }
};

}  // namespace detail

event::event() : list_(std::make_shared<detail::wait_list>()) {}
event::~event() = default;
event::event(event&&) noexcept = default;

void event::set() {
    std::deque<std::shared_ptr<detail::wait_list::waiter>> all;
    {
        const std::lock_guard lock(list_->guard);
        list_->slots = 1;
        all.swap(list_->waiters);
    }
    for (auto& w : all) detail::wait_list::resume(std::move(w), {});
}

bool event::is_set() const noexcept {
    const std::lock_guard lock(list_->guard);
    return list_->slots != 0;
}

task<void> event::wait() {
    auto list = list_;
    co_await list->suspend([raw = list.get()] { return raw->slots != 0; });
}

semaphore::semaphore(std::size_t slots) : list_(std::make_shared<detail::wait_list>()) {
    list_->slots = slots;
    list_->unlimited = slots == 0;
}

task<semaphore::permit> semaphore::acquire() {
    auto list = list_;
    bool taken = false;
    {
        const std::lock_guard lock(list->guard);
        taken = list->try_take();
    }
    if (!taken) co_await list->suspend([raw = list.get()] { return raw->try_take(); });
    permit p;
    p.list_ = std::move(list);
    co_return p;
}

std::size_t semaphore::in_use() const noexcept {
    const std::lock_guard lock(list_->guard);
    return list_->used;
}

std::size_t semaphore::waiting() const noexcept {
    const std::lock_guard lock(list_->guard);
    return list_->waiters.size();
}

semaphore::permit& semaphore::permit::operator=(permit&& other) noexcept {
    if (this != &other) {
        release();
        list_ = std::move(other.list_);
    }
    return *this;
}

semaphore::permit::~permit() { release(); }

void semaphore::permit::release() noexcept {
    if (auto list = std::move(list_)) list->give_back();
}

}  // namespace cobuild::async

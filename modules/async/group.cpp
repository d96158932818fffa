module;
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <list>
#include <memory>
#include <vector>

#include <boost/asio/any_completion_handler.hpp>
#include <boost/asio/associated_cancellation_slot.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/post.hpp>

module cobuild.async;

namespace cobuild::async {

namespace asio = boost::asio;

struct task_group::state : std::enable_shared_from_this<task_group::state> {
    executor ex;
    bool keep_going = false;
    bool cancelled = false;
    std::list<asio::cancellation_signal> signals;
    std::exception_ptr first_failure;
    asio::any_completion_handler<void()> joiner;

    void cancel_all() {
        cancelled = true;
        // Emitting may complete a child and unlink its signal, hence by post and not while walking the list.
        for (auto& s : signals) asio::post(ex, [self = this->shared_from_this(), p = &s] { self->emit(p); });
    }

    void emit(asio::cancellation_signal* wanted) {
        for (auto& s : signals)
            if (&s == wanted) {
                s.emit(asio::cancellation_type::terminal);
                return;
            }
    }

    void ended(std::list<asio::cancellation_signal>::iterator signal, std::exception_ptr failed) {
        signals.erase(signal);
        if (failed && !first_failure) {
            first_failure = failed;
            if (!keep_going) cancel_all();
        }
        if (signals.empty() && joiner) asio::post(ex, std::move(joiner));
    }
};

task_group::task_group(executor ex, bool keep_going) : state_(std::make_shared<state>()) {
    state_->ex = std::move(ex);
    state_->keep_going = keep_going;
}

task_group::~task_group() {
    if (!state_->signals.empty()) {
        std::fputs("cobuild: a task group died with children still running\n", stderr);
        std::abort();
    }
}

void task_group::spawn(task<void> child) {
    auto signal = state_->signals.emplace(state_->signals.end());
    asio::co_spawn(state_->ex, std::move(child),
                   asio::bind_cancellation_slot(signal->slot(), [s = state_, signal](std::exception_ptr failed) { s->ended(signal, failed); }));
    if (state_->cancelled) asio::post(state_->ex, [s = state_, p = &*signal] { s->emit(p); });
}

void task_group::cancel() { state_->cancel_all(); }
std::size_t task_group::running() const noexcept { return state_->signals.size(); }

task<void> task_group::join() {
    auto s = state_;
    if (!s->signals.empty()) {
        co_await asio::async_initiate<const asio::use_awaitable_t<>, void()>(
            [s](auto handler) {
                auto slot = asio::get_associated_cancellation_slot(handler);
                if (slot.is_connected()) slot.assign([s](asio::cancellation_type) { s->cancel_all(); });
                s->joiner = [handler = std::move(handler), slot]() mutable {
                    if (slot.is_connected()) slot.clear();
                    std::move(handler)();
                };
            },
            use_task);
    }
    if (auto failed = std::exchange(s->first_failure, nullptr)) std::rethrow_exception(failed);
}

task<void> when_all(std::vector<task<void>> tasks) {
    task_group group(co_await current_executor);
    for (auto& t : tasks) group.spawn(std::move(t));
    co_await group.join();
}

namespace detail {

struct shared_job::state {
    executor ex;
    asio::cancellation_signal signal;
    event done;
    std::exception_ptr failed;
    bool finished = false;
    std::size_t waiters = 0;
};

shared_job::shared_job(executor ex, task<void> t) : state_(std::make_shared<state>()) {
    state_->ex = ex;
    asio::co_spawn(ex, std::move(t), asio::bind_cancellation_slot(state_->signal.slot(), [s = state_](std::exception_ptr failed) {
                       s->failed = failed;
                       s->finished = true;
                       s->done.set();
                   }));
}

bool shared_job::finished() const noexcept { return state_->finished; }

task<void> shared_job::wait() {
    auto s = state_;
    ++s->waiters;
    std::exception_ptr interrupted;
    try {
        co_await s->done.wait();
    } catch (...) {
        interrupted = std::current_exception();
    }
    if (--s->waiters == 0 && interrupted && !s->finished) {
        // The last one interested: stop the work and see it end, so that nothing outlives its owner.
        co_await no_cancel;
        asio::post(s->ex, [s] { s->signal.emit(asio::cancellation_type::terminal); });
        co_await s->done.wait();
    }
    if (interrupted) std::rethrow_exception(interrupted);
    if (s->failed) std::rethrow_exception(s->failed);
}

}  // namespace detail

}  // namespace cobuild::async

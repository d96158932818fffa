/// Partition of cobuild.async: the vocabulary, cancellation with a cause, limits on time. Its rules stand in async.ixx.
module;
#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/cancellation_state.hpp>
#include <boost/asio/this_coro.hpp>
#include <boost/asio/use_awaitable.hpp>

export module cobuild.async:task;

import cobuild.base;

export namespace cobuild::async {

template<class T = void>
using task = boost::asio::awaitable<T>;
using executor = boost::asio::any_io_executor;

/// Completion token for Asio operations inside a task: `co_await socket.async_connect(ep, use_task)`.
inline constexpr boost::asio::use_awaitable_t<> use_task{};
/// `co_await no_cancel;`: from here on this chain of coroutines can wait again although it was cancelled.
inline constexpr boost::asio::this_coro::reset_cancellation_state_1_t<boost::asio::disable_cancellation> no_cancel{
    boost::asio::disable_cancellation{}};
/// `co_await current_executor` is the executor this coroutine runs on.
inline constexpr boost::asio::this_coro::executor_t current_executor{};

// ---------------------------------------------------------------- cancellation with a cause

/// Tells that somebody asked to stop, and why. Cheap to copy, thread-safe; a default-made token is never cancelled.
class cancel_token {
public:
    cancel_token() = default;
    [[nodiscard]] bool cancelled() const noexcept;
    [[nodiscard]] std::optional<error> cause() const;
    void throw_if_cancelled() const;

    /// Calls `f` once on cancellation (at once when it already happened), on the cancelling thread, until destroyed.
    /// Destruction waits for a call under way on another thread; so `f` is short and waits for nothing.
    class registration {
    public:
        registration() = default;
        registration(registration&&) noexcept = default;
        registration& operator=(registration&&) noexcept;
        ~registration();

    private:
        friend class cancel_token;
        struct entry;
        std::shared_ptr<entry> entry_;
    };
    [[nodiscard]] registration on_cancel(std::function<void()> f) const;

private:
    friend class cancel_source;
    struct state;
    std::shared_ptr<state> state_;
};

class cancel_source {
public:
    cancel_source();
    [[nodiscard]] cancel_token token() const;
    /// The first call counts. Thread-safe; not for signal handlers.
    void cancel(error cause);

private:
    std::shared_ptr<cancel_token::state> state_;
};

namespace detail {
task<void> linked_void(cancel_token token, task<void> t);
template<class T>
task<void> store_into(task<T> t, std::shared_ptr<std::optional<T>> out) {
    out->emplace(co_await std::move(t));
}
}  // namespace detail

/// Runs `t` so that the token cancels it; what the caller sees then is the token's cause. The caller's own cancellation
/// reaches `t` too. Returns only when `t` has ended.
template<class T>
task<T> linked(cancel_token token, task<T> t) {
    if constexpr (std::is_void_v<T>) {
        co_await detail::linked_void(std::move(token), std::move(t));
    } else {
        auto out = std::make_shared<std::optional<T>>();
        co_await detail::linked_void(std::move(token), detail::store_into<T>(std::move(t), out));
        co_return std::move(**out);
    }
}

/// Like linked, with a limit on time: throws errc::timed_out "<what> took longer than <limit>".
namespace detail {
task<void> deadline_void(nanoseconds limit, std::string what, task<void> t);
}
template<class T>
task<T> with_deadline(nanoseconds limit, std::string what, task<T> t) {
    if constexpr (std::is_void_v<T>) {
        co_await detail::deadline_void(limit, std::move(what), std::move(t));
    } else {
        auto out = std::make_shared<std::optional<T>>();
        co_await detail::deadline_void(limit, std::move(what), detail::store_into<T>(std::move(t), out));
        co_return std::move(**out);
    }
}

task<void> sleep_for(nanoseconds d);

/// Runs `t` on another executor and resumes the caller on its own; the caller's cancellation is posted over there.
namespace detail {
task<void> on_void(executor ex, task<void> t);
}
template<class T>
task<T> on(executor ex, task<T> t) {
    if constexpr (std::is_void_v<T>) {
        co_await detail::on_void(std::move(ex), std::move(t));
    } else {
        auto out = std::make_shared<std::optional<T>>();
        co_await detail::on_void(std::move(ex), detail::store_into<T>(std::move(t), out));
        co_return std::move(**out);
    }
}

}  // namespace cobuild::async

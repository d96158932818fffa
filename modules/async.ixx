/// cobuild.async: coroutines and the few ways to wait. The one interface that names Asio.
///
/// Words. A `task<T>` is Asio's awaitable: lazy, started by co_await or by one of the spawning calls here. A `runtime`
/// owns one io thread, on which every coroutine of an engine runs, and a pool of blocking threads for system calls,
/// hashing and compression. Code on the io thread never blocks; code on the pool never touches engine state.
///
/// Cancellation. Cancelling a task makes its current wait throw (boost::system::system_error, operation_aborted; shown
/// through cobuild::describe as errc::canceled) and every later co_await as well. Clean-up that must wait begins with
/// `co_await no_cancel;` and stands after, never inside, a catch block:
///     std::exception_ptr failed;
///     try { co_await work(); } catch (...) { failed = std::current_exception(); }
///     co_await no_cancel;
///     co_await clean_up();
///     if (failed) std::rethrow_exception(failed);
/// A file with a coroutine body includes <boost/asio/awaitable.hpp> (or any Asio header) before its imports.
module;
#include <chrono>
#include <cstddef>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/cancellation_state.hpp>
#include <boost/asio/this_coro.hpp>
#include <boost/asio/use_awaitable.hpp>

export module cobuild.async;

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

// ---------------------------------------------------------------- threads

/// Threads for calls that block. Grows on demand up to its limit; work beyond that queues in order. Thread-safe.
class blocking_pool {
public:
    explicit blocking_pool(unsigned max_threads);
    ~blocking_pool();  ///< runs what is queued, then joins
    blocking_pool(const blocking_pool&) = delete;
    blocking_pool& operator=(const blocking_pool&) = delete;

    /// Runs `f` on a pool thread and resumes the caller on its own executor; exceptions come through. A cancelled caller
    /// still waits for `f`: what runs long looks at a cancel_token by itself.
    template<class F>
    task<std::invoke_result_t<F&>> run(F f) {
        using result = std::invoke_result_t<F&>;
        if constexpr (std::is_void_v<result>) {
            co_await run_erased(std::move(f));
        } else {
            auto slot = std::make_shared<std::optional<result>>();
            co_await run_erased([slot, g = std::make_shared<F>(std::move(f))] { slot->emplace((*g)()); });
            co_return std::move(**slot);
        }
    }
    /// Queues `f` and returns at once; `f` must not throw.
    void post(std::function<void()> f);

private:
    task<void> run_erased(std::function<void()> f);
    template<class F>
        requires(!std::is_copy_constructible_v<F>)
    task<void> run_erased(F f) {
        return run_erased(std::function<void()>([g = std::make_shared<F>(std::move(f))] { (*g)(); }));
    }
    struct state;
    std::shared_ptr<state> state_;
};

struct runtime_options {
    unsigned max_blocking_threads = 64;
};

/// One io thread and one blocking pool. Destroy it only after everything spawned on it was awaited.
class runtime {
public:
    explicit runtime(runtime_options options = {});
    ~runtime();
    runtime(const runtime&) = delete;
    runtime& operator=(const runtime&) = delete;
    [[nodiscard]] executor get_executor() const;
    [[nodiscard]] blocking_pool& pool() const noexcept;
    /// True on the io thread.
    [[nodiscard]] bool on_io_thread() const noexcept;

    /// Runs a task to its end from a thread outside the runtime, which blocks: for main() and tests.
    template<class T>
    T block_on(task<T> t) {
        if constexpr (std::is_void_v<T>) {
            block_on_void(std::move(t));
        } else {
            std::optional<T> out;
            block_on_void(store(std::move(t), out));
            return std::move(*out);
        }
    }

private:
    template<class T>
    static task<void> store(task<T> t, std::optional<T>& out) {
        out.emplace(co_await std::move(t));
    }
    void block_on_void(task<void> t);
    struct state;
    std::unique_ptr<state> state_;
};

// ---------------------------------------------------------------- cancellation with a cause

/// Tells that somebody asked to stop, and why. Cheap to copy, thread-safe; a default-made token is never cancelled.
class cancel_token {
public:
    cancel_token() = default;
    [[nodiscard]] bool cancelled() const noexcept;
    [[nodiscard]] std::optional<error> cause() const;
    void throw_if_cancelled() const;

    /// Calls `f` once on cancellation (at once when it already happened), on the cancelling thread, until destroyed.
    /// Destruction does not wait for a call under way.
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

// ---------------------------------------------------------------- waiting for others

namespace detail {
struct wait_list;
}

/// A flag that tasks wait for; once set it stays set. Thread-safe.
class event {
public:
    event();
    ~event();
    event(event&&) noexcept;
    void set();
    [[nodiscard]] bool is_set() const noexcept;
    task<void> wait();

private:
    std::shared_ptr<detail::wait_list> list_;
};

/// A counting semaphore, first come first served. Waiters are resumed by post, never inline. Thread-safe.
class semaphore {
public:
    /// One slot, given back on destruction.
    class permit {
    public:
        permit() = default;
        permit(permit&& other) noexcept = default;
        permit& operator=(permit&& other) noexcept;
        ~permit();
        void release() noexcept;
        explicit operator bool() const noexcept { return list_ != nullptr; }

    private:
        friend class semaphore;
        std::shared_ptr<detail::wait_list> list_;
    };

    /// 0 means unlimited.
    explicit semaphore(std::size_t slots);
    /// A cancelled waiter leaves the queue and takes no slot.
    task<permit> acquire();
    [[nodiscard]] std::size_t in_use() const noexcept;
    [[nodiscard]] std::size_t waiting() const noexcept;

private:
    std::shared_ptr<detail::wait_list> list_;
};

/// Children that are awaited before their owner dies. The first failure cancels the rest; join() rethrows it.
///
/// Use from one executor only. Every group is joined, also on failure: `co_await no_cancel; co_await group.join();`.
/// Destroying a group with children still running is a programming error and ends the process with a message.
class task_group {
public:
    /// `keep_going`: a failure does not cancel the other children.
    explicit task_group(executor ex, bool keep_going = false);
    ~task_group();
    task_group(const task_group&) = delete;
    task_group& operator=(const task_group&) = delete;
    void spawn(task<void> child);
    void cancel();
    /// Waits for all children. When the caller is cancelled the children are, and are still waited for.
    task<void> join();
    [[nodiscard]] std::size_t running() const noexcept;

private:
    struct state;
    std::shared_ptr<state> state_;
};

/// Runs all, waits for all, rethrows the first failure (which cancels the others).
task<void> when_all(std::vector<task<void>> tasks);

/// One computation that several tasks wait for. It runs on its own; it is cancelled when the last waiter goes away.
namespace detail {
class shared_job {
public:
    shared_job(executor ex, task<void> t);
    task<void> wait();
    [[nodiscard]] bool finished() const noexcept;

private:
    struct state;
    std::shared_ptr<state> state_;
};
}  // namespace detail

/// Per key at most one computation at a time; late-comers get the running one's result or exception. Use from one executor.
template<class Key, class T>
class single_flight {
public:
    task<T> run(Key key, std::function<task<T>()> compute) {
        auto& flights = *flights_;
        auto found = flights.find(key);
        if (found == flights.end() || found->second->job.finished()) {
            auto out = std::make_shared<std::optional<T>>();
            auto fresh = std::make_shared<flight>(flight{detail::shared_job{co_await current_executor, detail::store_into<T>(compute(), out)}, out});
            found = flights.insert_or_assign(key, std::move(fresh)).first;
        }
        auto mine = found->second;
        std::exception_ptr failed;
        try {
            co_await mine->job.wait();
        } catch (...) {
            failed = std::current_exception();
        }
        if (const auto again = flights.find(key); again != flights.end() && again->second == mine && mine->job.finished()) flights.erase(again);
        if (failed) std::rethrow_exception(failed);
        co_return **mine->out;
    }

private:
    struct flight {
        detail::shared_job job;
        std::shared_ptr<std::optional<T>> out;
    };
    using map = std::map<Key, std::shared_ptr<flight>>;
    std::shared_ptr<map> flights_ = std::make_shared<map>();
};

// ---------------------------------------------------------------- bytes between threads

using chunk = std::vector<std::byte>;

/// A bounded queue of byte chunks between a coroutine and a blocking thread, in either direction. One writer, one reader.
///
/// Either end may stop: close() is the end of the data, fail() makes the other end throw. Thread-safe; the blocking calls
/// are for pool threads only.
class byte_pipe {
public:
    explicit byte_pipe(std::size_t max_bytes = std::size_t{4} << 20);
    /// Waits while the queue is full; throws what the other end failed with.
    task<void> write(chunk data);
    void write_blocking(chunk data);
    /// Empty at the end of the data.
    task<std::optional<chunk>> read();
    std::optional<chunk> read_blocking();
    void close();
    void fail(std::exception_ptr why);

private:
    struct state;
    std::shared_ptr<state> state_;
};

}  // namespace cobuild::async

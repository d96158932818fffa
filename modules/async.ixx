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
#include <functional>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>

#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/awaitable.hpp>

export module cobuild.async;

import cobuild.base;
export import :task;
export import :sync;

export namespace cobuild::async {

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

}  // namespace cobuild::async

/// Partition of cobuild.async: waiting for others, and bytes between threads. Its rules stand in async.ixx.
module;
#include <cstddef>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/awaitable.hpp>

export module cobuild.async:sync;

import cobuild.base;
import :task;

export namespace cobuild::async {

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
/// Either end may stop: close() is the end of the data, fail() makes the other end throw, a reader after what was written
/// before. Thread-safe; the blocking calls are for pool threads only.
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

module;
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <boost/asio/any_completion_handler.hpp>
#include <boost/asio/associated_executor.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>

module cobuild.async;

namespace cobuild::async {

namespace asio = boost::asio;

struct blocking_pool::state {
    std::mutex guard;
    std::condition_variable wake;
    std::deque<std::function<void()>> queue;
    std::vector<std::thread> threads;
    unsigned max_threads = 1;
    unsigned idle = 0;
    bool closing = false;

    void serve() {
        std::unique_lock lock(guard);
        for (;;) {
            ++idle;
            wake.wait(lock, [this] { return closing || !queue.empty(); });
            --idle;
            if (queue.empty()) return;
            auto job = std::move(queue.front());
            queue.pop_front();
            lock.unlock();
            job();
            job = nullptr;
            lock.lock();
        }
    }

    void push(std::function<void()> job) {
        const std::lock_guard lock(guard);
        queue.push_back(std::move(job));
        if (queue.size() > idle && threads.size() < max_threads) threads.emplace_back([this] { serve(); });
        wake.notify_one();
    }
};

blocking_pool::blocking_pool(unsigned max_threads) : state_(std::make_shared<state>()) { state_->max_threads = max_threads == 0 ? 1 : max_threads; }

blocking_pool::~blocking_pool() {
    {
        const std::lock_guard lock(state_->guard);
        state_->closing = true;
    }
    state_->wake.notify_all();
    for (auto& t : state_->threads) t.join();
}

void blocking_pool::post(std::function<void()> f) { state_->push(std::move(f)); }

task<void> blocking_pool::run_erased(std::function<void()> f) {
    auto ex = co_await current_executor;
    co_await asio::async_initiate<const asio::use_awaitable_t<>, void(std::exception_ptr)>(
        [this, ex, &f](auto handler) {
            // The pool may be the last to hold the work; the guard keeps the caller's executor alive until it was resumed.
            auto work = asio::make_work_guard(ex);
            auto shared = std::make_shared<decltype(handler)>(std::move(handler));
            state_->push([f = std::move(f), ex, work = std::move(work), shared]() mutable {
                std::exception_ptr failed;
                try {
                    f();
                } catch (...) {
                    failed = std::current_exception();
                }
                f = nullptr;  // captured owners die before the caller goes on
                asio::post(ex, [shared = std::move(shared), failed]() mutable {
                    auto h = std::move(*shared);
                    h(failed);
                });
                work.reset();
            });
        },
        use_task);
}

struct runtime::state {
    asio::io_context io{1};
    asio::executor_work_guard<asio::io_context::executor_type> work{io.get_executor()};
    blocking_pool pool;
    std::thread thread;
    explicit state(const runtime_options& options) : pool(options.max_blocking_threads), thread([this] { io.run(); }) {}
    ~state() {
        work.reset();
        thread.join();
    }
};

runtime::runtime(runtime_options options) : state_(std::make_unique<state>(options)) {}
runtime::~runtime() = default;
executor runtime::get_executor() const { return state_->io.get_executor(); }
blocking_pool& runtime::pool() const noexcept { return state_->pool; }
bool runtime::on_io_thread() const noexcept { return state_->thread.get_id() == std::this_thread::get_id(); }

void runtime::block_on_void(task<void> t) {
    std::promise<void> done;
    asio::co_spawn(state_->io, std::move(t), [&done](std::exception_ptr failed) {
        if (failed)
            done.set_exception(failed);
        else
            done.set_value();
    });
    done.get_future().get();
}

}  // namespace cobuild::async

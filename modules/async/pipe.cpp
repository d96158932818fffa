module;
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>

#include <boost/asio/awaitable.hpp>

module cobuild.async;

namespace cobuild::async {

struct byte_pipe::state {
    std::mutex guard;
    std::condition_variable changed;
    std::deque<chunk> queue;
    std::size_t queued = 0;
    std::size_t limit = 0;
    bool closed = false;
    std::exception_ptr failed;
    std::shared_ptr<event> moved;  // what a coroutine at either end waits for; made anew for each wait

    // A chunk larger than the limit is taken when the queue is empty, else it could never pass.
    [[nodiscard]] bool has_room(std::size_t size) const { return queue.empty() || queued + size <= limit; }
    [[nodiscard]] bool readable() const { return !queue.empty() || closed; }

    void notify() {
        changed.notify_all();
        if (auto e = std::exchange(moved, nullptr)) e->set();
    }
    void push(chunk data) {
        queued += data.size();
        queue.push_back(std::move(data));
        notify();
    }
    std::optional<chunk> pop() {
        if (queue.empty()) return std::nullopt;
        chunk out = std::move(queue.front());
        queue.pop_front();
        queued -= out.size();
        notify();
        return out;
    }
};

byte_pipe::byte_pipe(std::size_t max_bytes) : state_(std::make_shared<state>()) { state_->limit = max_bytes; }

task<void> byte_pipe::write(chunk data) {
    auto s = state_;
    for (;;) {
        std::shared_ptr<event> wait_for;
        {
            const std::lock_guard lock(s->guard);
            if (s->failed) std::rethrow_exception(s->failed);
            if (s->has_room(data.size())) {
                s->push(std::move(data));
                co_return;
            }
            if (!s->moved) s->moved = std::make_shared<event>();
            wait_for = s->moved;
        }
        co_await wait_for->wait();
    }
}

void byte_pipe::write_blocking(chunk data) {
    std::unique_lock lock(state_->guard);
    state_->changed.wait(lock, [&] { return state_->failed || state_->has_room(data.size()); });
    if (state_->failed) std::rethrow_exception(state_->failed);
    state_->push(std::move(data));
}

task<std::optional<chunk>> byte_pipe::read() {
    auto s = state_;
    for (;;) {
        std::shared_ptr<event> wait_for;
        {
            const std::lock_guard lock(s->guard);
            if (s->failed && s->queue.empty()) std::rethrow_exception(s->failed);
            if (s->readable()) co_return s->pop();
            if (!s->moved) s->moved = std::make_shared<event>();
            wait_for = s->moved;
        }
        co_await wait_for->wait();
    }
}

std::optional<chunk> byte_pipe::read_blocking() {
    std::unique_lock lock(state_->guard);
    state_->changed.wait(lock, [&] { return state_->failed || state_->readable(); });
    if (state_->failed && state_->queue.empty()) std::rethrow_exception(state_->failed);
    return state_->pop();
}

void byte_pipe::close() {
    const std::lock_guard lock(state_->guard);
    state_->closed = true;
    state_->notify();
}

void byte_pipe::fail(std::exception_ptr why) {
    const std::lock_guard lock(state_->guard);
    if (state_->failed) return;
    state_->failed = std::move(why);
    state_->notify();
}

}  // namespace cobuild::async

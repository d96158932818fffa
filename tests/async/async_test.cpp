#include "support/support.hpp"

#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

import cobuild.base;
import cobuild.async;

using namespace cobuild;
using namespace cobuild::async;
using namespace std::chrono_literals;

namespace {
std::span<const std::byte> raw(const chunk& c) { return c; }
chunk chunk_of(std::string_view text) {
    const auto b = bytes_of(text);
    return {b.begin(), b.end()};
}
task<void> fail_with(errc kind) {
    co_await sleep_for(0ns);
    throw error{kind, "planned"};
}
task<void> forever(std::shared_ptr<int> ended) {
    std::exception_ptr failed;
    event never;
    try {
        co_await never.wait();
    } catch (...) {
        failed = std::current_exception();
    }
    co_await no_cancel;
    co_await sleep_for(1ms);  // clean-up can wait again
    ++*ended;
    std::rethrow_exception(failed);
}
errc kind_of(const std::exception_ptr& e) { return e ? describe(e).kind() : errc::internal; }
template<class T>
task<std::exception_ptr> failure(task<T> t) {
    std::exception_ptr out;
    try {
        co_await std::move(t);
    } catch (...) {
        out = std::current_exception();
    }
    co_return out;
}
}  // namespace

CO_TEST_CASE(pool_runs_apart_and_comes_back) {
    const auto value = co_await rt.pool().run([&] { return rt.on_io_thread() ? 0 : 42; });
    BOOST_TEST(value == 42);
    BOOST_TEST(rt.on_io_thread());
    auto owned = std::make_unique<int>(7);
    BOOST_TEST(co_await rt.pool().run([p = std::move(owned)] { return *p; }) == 7);
    const auto failed = co_await failure(rt.pool().run([] { throw error{errc::no_space, "full"}; }));
    BOOST_TEST((kind_of(failed) == errc::no_space));
}

CO_TEST_CASE(semaphore_serves_in_order_and_gives_slots_back) {
    semaphore slots(1);
    auto first = co_await slots.acquire();
    std::vector<int> order;
    task_group group(co_await current_executor);
    const auto taker = [&](int n) -> task<void> {
        auto p = co_await slots.acquire();
        order.push_back(n);
        co_await sleep_for(0ns);
    };
    for (int i = 0; i < 3; ++i) group.spawn(taker(i));
    co_await sleep_for(1ms);
    BOOST_TEST(slots.waiting() == 3U);
    BOOST_TEST(order.empty());
    first.release();
    co_await group.join();
    BOOST_TEST((order == std::vector<int>{0, 1, 2}));
    BOOST_TEST(slots.in_use() == 0U);
}

CO_TEST_CASE(cancelled_waiter_leaves_the_queue) {
    semaphore slots(1);
    auto held = co_await slots.acquire();
    cancel_source source;
    source.cancel(error{errc::canceled, "the user pressed Ctrl-C"});
    const auto failed = co_await failure(linked(source.token(), slots.acquire()));
    BOOST_TEST(describe(failed).what() == std::string("the user pressed Ctrl-C"));
    BOOST_TEST(slots.waiting() == 0U);
    held.release();
    BOOST_TEST(slots.in_use() == 0U);
}

CO_TEST_CASE(first_failure_cancels_the_group_and_all_are_awaited) {
    auto ended = std::make_shared<int>(0);
    task_group group(co_await current_executor);
    for (int i = 0; i < 3; ++i) group.spawn(forever(ended));
    group.spawn(fail_with(errc::corrupt));
    const auto failed = co_await failure(group.join());
    BOOST_TEST((kind_of(failed) == errc::corrupt));
    BOOST_TEST(*ended == 3);
}

CO_TEST_CASE(deadline_names_what_took_too_long) {
    auto ended = std::make_shared<int>(0);
    const auto failed = co_await failure(with_deadline(5ms, "the answer", forever(ended)));
    BOOST_TEST((kind_of(failed) == errc::timed_out));
    BOOST_TEST(describe(failed).what() == std::string("the answer took longer than 5ms"));
    BOOST_TEST(*ended == 1);
}

CO_TEST_CASE(single_flight_computes_once) {
    single_flight<std::string, int> flights;
    int computed = 0;
    int sum = 0;
    auto gate = std::make_shared<event>();
    const auto asker = [&]() -> task<void> {
        sum += co_await flights.run("k", [&]() -> task<int> {
            ++computed;
            co_await gate->wait();
            co_return 21;
        });
    };
    task_group group(co_await current_executor);
    group.spawn(asker());
    group.spawn(asker());
    co_await sleep_for(1ms);
    gate->set();
    co_await group.join();
    BOOST_TEST(computed == 1);
    BOOST_TEST(sum == 42);
}

CO_TEST_CASE(shared_work_ends_with_its_last_waiter) {
    single_flight<int, int> flights;
    auto ended = std::make_shared<int>(0);
    const auto compute = [ended]() -> task<int> {
        co_await forever(ended);
        co_return 1;
    };
    cancel_source one;
    cancel_source two;
    task_group group(co_await current_executor, true);
    const auto asker = [&](cancel_token token) -> task<void> { (void)co_await failure(linked(token, flights.run(1, compute))); };
    group.spawn(asker(one.token()));
    group.spawn(asker(two.token()));
    co_await sleep_for(1ms);
    one.cancel(error{errc::canceled, "first"});
    co_await sleep_for(3ms);
    BOOST_TEST(*ended == 0);
    two.cancel(error{errc::canceled, "second"});
    co_await group.join();
    BOOST_TEST(*ended == 1);
}

CO_TEST_CASE(pipe_is_bounded_and_keeps_order) {
    byte_pipe pipe(8);
    auto reader = std::make_shared<std::string>();
    task_group group(co_await current_executor);
    group.spawn(rt.pool().run([pipe, reader]() mutable {
        while (auto c = pipe.read_blocking()) *reader += text_of(raw(*c));
    }));
    for (const auto* word : {"hello ", "wide ", "world, longer than the limit"}) co_await pipe.write(chunk_of(word));
    pipe.close();
    co_await group.join();
    BOOST_TEST(*reader == "hello wide world, longer than the limit");
}

CO_TEST_CASE(what_was_written_before_a_pipe_failed_is_read_first) {
    byte_pipe pipe(100);
    co_await pipe.write(chunk_of("one"));
    co_await pipe.write(chunk_of("two"));
    pipe.fail(std::make_exception_ptr(error{errc::unavailable, "cut"}));
    BOOST_TEST((co_await pipe.read() == chunk_of("one")));
    BOOST_TEST((pipe.read_blocking() == chunk_of("two")));
    BOOST_TEST((kind_of(co_await failure(pipe.read())) == errc::unavailable));
}

CO_TEST_CASE(pipe_failure_reaches_the_other_end) {
    byte_pipe pipe(8);
    pipe.fail(std::make_exception_ptr(error{errc::corrupt, "bad digest"}));
    const auto failed = co_await failure(pipe.write(chunk_of("x")));
    BOOST_TEST((kind_of(failed) == errc::corrupt));
}

CO_TEST_CASE(other_executor_and_back) {
    runtime other;
    const auto where = [&]() -> task<bool> { co_return other.on_io_thread(); };
    BOOST_TEST(co_await on(other.get_executor(), where()));
    BOOST_TEST(rt.on_io_thread());
}

BOOST_AUTO_TEST_CASE(tokens_fire_once_across_threads) {
    cancel_source source;
    std::atomic<int> calls = 0;
    const auto kept = source.token().on_cancel([&] { ++calls; });
    {
        const auto dropped = source.token().on_cancel([&] { calls += 100; });
    }
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) threads.emplace_back([&] { source.cancel(error{errc::canceled, "stop"}); });
    for (auto& t : threads) t.join();
    const auto late = source.token().on_cancel([&] { ++calls; });
    BOOST_TEST(calls == 2);
}

// A token is cancelled by another thread while what it would cancel ends, and its executor with it.
BOOST_AUTO_TEST_CASE(a_token_may_outlive_the_executor_it_reached) {
    for (int i = 0; i < 200; ++i) {
        cancel_source source;
        std::atomic<bool> go = false;
        std::thread other([&] {
            while (!go) std::this_thread::yield();
            source.cancel(error{errc::canceled, "stop"});
        });
        {
            runtime rt;
            const auto quick = [&]() -> task<int> {
                go = true;
                co_return 1;
            };
            std::exception_ptr failed;
            try {
                rt.block_on(linked(source.token(), quick()));
            } catch (...) {
                failed = std::current_exception();
            }
            BOOST_TEST((!failed || kind_of(failed) == errc::canceled));
        }
        other.join();
    }
}

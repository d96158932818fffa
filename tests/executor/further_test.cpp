// Steps that are reached from outside while they run: input, terminals, signals, further processes.
#include "executor/tree.hpp"
#include "support/support.hpp"

#include <chrono>
#include <csignal>
#include <cstddef>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <unistd.h>

import cobuild.base;
import cobuild.async;
import cobuild.process;
import cobuild.executor;

#include "support/failure.hpp"

using namespace cobuild;
using namespace std::chrono_literals;
namespace fs = std::filesystem;
using async::task;
using cobuild::test::failure;
using cobuild::test::says;

namespace {

/// Output as it comes; a word in it can be waited for.
struct heard {
    std::string text;
    std::shared_ptr<async::event> more = std::make_shared<async::event>();
    executor::sink sink() {
        return [this](std::span<const std::byte> piece) -> task<void> {
            text += text_of(piece);
            std::exchange(more, std::make_shared<async::event>())->set();
            co_return;
        };
    }
    task<void> until(std::string word) {
        while (text.find(word) == std::string::npos) {
            const auto next = more;
            co_await async::with_deadline(20s, cat("waiting for ", word, " after ", text), next->wait());
        }
    }
};

struct piped {
    unique_fd read, write;
    piped() {
        int ends[2];
        BOOST_REQUIRE(::pipe2(ends, O_CLOEXEC) == 0);
        read = unique_fd(ends[0]);
        write = unique_fd(ends[1]);
    }
    void say(std::string_view text) const { BOOST_TEST(::write(write.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size())); }
};

/// A runner, and a root to run on.
struct bench {
    explicit bench(async::runtime& runtime) : rt(runtime), group(runtime.get_executor(), true) {
        test::busybox_tree(dir / "base");
        fs::create_directory(dir / "work");
        runner = executor::open_oci_runner(rt, programs, {.work_dir = dir / "work", .owner = "further-test"});
        root = unique_fd(test::overlay_root(dir.path(), 0));
    }
    /// Starts the step and returns once it runs.
    task<void> start(std::vector<std::string> args, executor::streams io, bool terminal = false) {
        executor::step s{.id = "first", .args = std::move(args), .root = root.get(), .terminal = terminal};
        reach = std::make_shared<executor::control>();
        group.spawn(keep(runner.get(), std::move(s), std::move(io), reach, &end, &wrong, &over));
        co_await reach->started.wait();
    }
    static task<void> keep(executor::runner* runner, executor::step s, executor::streams io, std::shared_ptr<executor::control> reach,
                           std::optional<executor::exit>* end, std::exception_ptr* wrong, async::event* over) {
        try {
            *end = co_await runner->run(std::move(s), std::move(io), reach);
        } catch (...) {
            *wrong = std::current_exception();
        }
        over->set();
    }
    /// Runs a further process to its end.
    task<executor::exit> further(std::vector<std::string> args, heard& out, unique_fd in = {}) {
        co_return co_await runner->exec("first", {.args = std::move(args)}, {.out = out.sink(), .err = out.sink(), .in = std::move(in)}, nullptr);
    }
    task<void> close() {
        group.cancel();
        co_await group.join();
        co_await runner->close();
    }

    test::scratch_dir dir;
    async::runtime& rt;
    process::spawner programs;
    std::unique_ptr<executor::runner> runner;
    unique_fd root;
    std::shared_ptr<executor::control> reach;
    std::optional<executor::exit> end;
    std::exception_ptr wrong;
    async::event over;
    async::task_group group;
};

}  // namespace

CO_TEST_CASE(a_further_process_sees_what_the_step_sees) {
    if (!test::needs_root()) co_return;
    bench b(rt);
    piped held;
    co_await b.start({"/bin/sh", "-c", "echo here > /tmp/note; cat"}, {.in = std::move(held.read)});
    heard out;
    piped in;
    in.say("typed\n");
    in.write.reset();
    auto r = co_await b.further({"sh", "-c", "cat /tmp/note; cat; busybox tr '\\0' ' ' < /proc/1/cmdline; exit 5"}, out, std::move(in.read));
    BOOST_TEST(r.code == 5);
    BOOST_TEST(!r.accepted);
    BOOST_TEST(out.text.starts_with("here\ntyped\n"));
    BOOST_TEST(says(error{errc::internal, out.text}, "cat"));  // the step's own process is the first there as well
    const auto missing = co_await failure(b.further({"/bin/nothing"}, out));
    BOOST_TEST((missing.kind() == errc::not_found));
    BOOST_TEST(says(missing, "/bin/nothing"));
    held.write.reset();  // the end of its input ends the step
    co_await b.over.wait();
    BOOST_REQUIRE(b.end.has_value());
    BOOST_TEST(b.end->accepted);
    BOOST_TEST(((co_await failure(b.further({"true"}, out))).kind() == errc::not_found));
    co_await b.close();
    BOOST_TEST(fs::is_empty(b.dir / "work"));
}

CO_TEST_CASE(signals_reach_the_process_they_are_meant_for) {
    if (!test::needs_root()) co_return;
    bench b(rt);
    heard first, second;
    co_await b.start({"/bin/sh", "-c", "trap 'exit 99' HUP; echo ready; while true; do sleep 0.05; done"}, {.out = first.sink()});
    co_await first.until("ready");
    const auto reach = std::make_shared<executor::control>();
    async::task_group group(rt.get_executor(), true);
    std::optional<executor::exit> end;
    async::event over;
    const auto keep = [](executor::runner* runner, heard* out, std::shared_ptr<executor::control> c, std::optional<executor::exit>* to,
                         async::event* done) -> task<void> {
        *to = co_await runner->exec("first", {.args = {"sh", "-c", "trap 'exit 111' INT; echo ready; while true; do sleep 0.05; done"}},
                                    {.out = out->sink()}, c);
        done->set();
    };
    group.spawn(keep(b.runner.get(), &second, reach, &end, &over));
    co_await second.until("ready");
    co_await reach->started.wait();
    co_await reach->signal(SIGINT);
    co_await over.wait();
    co_await group.join();
    BOOST_REQUIRE(end.has_value());
    BOOST_TEST(end->code == 111);
    BOOST_TEST(!b.over.is_set());
    co_await b.reach->signal(SIGHUP);
    co_await b.over.wait();
    BOOST_REQUIRE(b.end.has_value());
    BOOST_TEST(b.end->code == 99);
    co_await b.close();
}

CO_TEST_CASE(the_end_of_the_step_is_the_end_of_its_further_processes) {
    if (!test::needs_root()) co_return;
    bench b(rt);
    co_await b.start({"sleep", "1000"}, {});
    heard out;
    const auto killer = [](bench* all, heard* listens) -> task<void> {
        co_await listens->until("ready");
        co_await all->reach->signal(SIGKILL);
    };
    async::task_group group(rt.get_executor());
    group.spawn(killer(&b, &out));
    const auto r = co_await b.further({"sh", "-c", "echo ready; sleep 1000; echo late"}, out);
    BOOST_TEST(r.code == 137);  // 128 + SIGKILL
    BOOST_TEST(out.text == "ready\n");
    co_await group.join();
    co_await b.over.wait();
    BOOST_REQUIRE(b.end.has_value());
    BOOST_TEST(b.end->code == 137);
    co_await b.close();
}

CO_TEST_CASE(terminals_have_a_size_and_echo) {
    if (!test::needs_root()) co_return;
    bench b(rt);
    heard first;
    piped keys;
    co_await b.start({"sh"}, {.out = first.sink(), .in = std::move(keys.read)}, true);
    b.reach->resize(40, 80);
    keys.say("test -t 0 && echo term''inal; busybox stty size\n");
    co_await first.until("terminal\r\n");  // a terminal ends lines so
    co_await first.until("40 80");
    b.reach->resize(60, 100);
    keys.say("busybox stty size\n");
    co_await first.until("60 100");
    // A second terminal in the same step.
    heard second;
    piped other;
    const auto reach = std::make_shared<executor::control>();
    const auto typing = [](piped* into, heard* from, std::shared_ptr<executor::control> c) -> task<void> {
        co_await c->started.wait();
        c->resize(10, 20);
        into->say("busybox stty size\n");
        co_await from->until("10 20");
        into->say("exit 4\n");
    };
    async::task_group group(rt.get_executor());
    group.spawn(typing(&other, &second, reach));
    const auto r = co_await b.runner->exec("first", {.args = {"sh"}, .terminal = true}, {.out = second.sink(), .in = std::move(other.read)}, reach);
    co_await group.join();
    BOOST_TEST(r.code == 4);
    keys.say("exit 3\n");
    co_await b.over.wait();
    BOOST_REQUIRE(b.end.has_value());
    BOOST_TEST(b.end->code == 3);
    co_await b.close();
}

CO_TEST_CASE(a_cancelled_further_process_is_gone_and_the_step_stays) {
    if (!test::needs_root()) co_return;
    bench b(rt);
    co_await b.start({"sleep", "1000"}, {});
    heard out;
    async::cancel_source stop;
    const auto stopper = [](heard* from, async::cancel_source s) -> task<void> {
        co_await from->until("ready");
        s.cancel(error{errc::canceled, "enough"});
    };
    async::task_group group(rt.get_executor());
    group.spawn(stopper(&out, stop));
    const auto e = co_await failure(async::linked(stop.token(), b.further({"sh", "-c", "trap '' TERM; echo ready; sleep 777"}, out)));
    co_await group.join();
    BOOST_TEST((e.kind() == errc::canceled));
    heard list;
    (void)co_await b.further({"sh", "-c", "ps | busybox grep -c '[e]cho ready' || true"}, list);
    BOOST_TEST(list.text == "0\n");
    BOOST_TEST(!b.over.is_set());
    co_await b.close();
    BOOST_TEST(fs::is_empty(b.dir / "work"));
}

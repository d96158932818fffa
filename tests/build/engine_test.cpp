// The engine as an embedder uses it: from executors of its own, several at once, cancelled, closed or forgotten.
#include "support/support.hpp"

#include <sys/stat.h>
#include <sys/wait.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include <boost/asio/co_spawn.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/use_future.hpp>

import cobuild.base;
import cobuild.async;
import cobuild.progress;
import cobuild.build;
import cobuild.config;

using namespace cobuild;
using namespace std::chrono_literals;

namespace {

/// A state directory and a context whose image needs no registry: the host's static busybox in an empty root.
struct place {
    test::scratch_dir dir;
    std::filesystem::path context = dir / "context";

    explicit place(std::string_view dockerfile) {
        test::write_file(context / "Dockerfile", dockerfile);
        test::write_file(context / "hello", "hello\n");
        for (const auto* candidate : {"/bin/busybox", "/usr/bin/busybox"})
            if (std::filesystem::exists(candidate)) std::filesystem::copy_file(candidate, context / "busybox", std::filesystem::copy_options::overwrite_existing);
    }
    [[nodiscard]] build::engine_options options() const {
        build::engine_options o;
        o.root = dir / "root";
        o.settings.oci.network = config::network_mode::none;
        return o;
    }
    [[nodiscard]] build::build_request request() const { return {.context = context}; }
};

constexpr std::string_view only_files = "FROM scratch\nCOPY hello /hello\n";
/// Ignores the polite signal, so that only the kill ends it.
constexpr std::string_view stubborn =
    "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"sh\", \"-c\", \"trap '' TERM; echo ready; while true; do /bin/busybox sleep 1; done\"]\n";

/// Cancels a token when the step has printed its word.
std::shared_ptr<progress::sink> cancel_when_ready(async::cancel_source source) {
    return progress::make_sink([source](const progress::event& e) mutable {
        const auto* l = std::get_if<progress::log>(&e);
        if (l != nullptr && l->data.find("ready") != std::string::npos) source.cancel(error{errc::canceled, "the embedder changed its mind"});
    });
}

errc kind_of(const std::exception_ptr& e) { return e ? describe(e).kind() : errc::internal; }

async::task<std::exception_ptr> failure(async::task<build::build_result> t) {
    std::exception_ptr out;
    try {
        co_await std::move(t);
    } catch (...) {
        out = std::current_exception();
    }
    co_return out;
}

std::size_t threads_of_process() {
    std::size_t n = 0;
    for ([[maybe_unused]] const auto& t : std::filesystem::directory_iterator("/proc/self/task")) ++n;
    return n;
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_build_resumes_on_the_executor_that_awaited_it) {
    if (!test::needs_root()) return;
    const place p(only_files);
    boost::asio::thread_pool pool(2);
    const auto strand = boost::asio::make_strand(pool);
    const auto work = [&]() -> async::task<std::string> {
        const auto engine = co_await build::engine::open(p.options());
        const auto result = co_await engine->build(p.request());
        BOOST_TEST(strand.running_in_this_thread());
        co_await engine->close();
        BOOST_TEST(strand.running_in_this_thread());
        co_return result.image_digest;
    };
    const auto digest = boost::asio::co_spawn(strand, work(), boost::asio::use_future).get();
    BOOST_TEST(digest::try_parse(digest).has_value());
    pool.join();
}

BOOST_AUTO_TEST_CASE(cancelling_from_a_two_thread_pool_ends_a_running_step) {
    if (!test::needs_root()) return;
    const place p(stubborn);
    boost::asio::thread_pool pool(2);
    async::cancel_source stop;
    const auto work = [&]() -> async::task<std::exception_ptr> {
        const auto engine = co_await build::engine::open(p.options());
        const auto failed = co_await failure(engine->build(p.request(), cancel_when_ready(stop), stop.token()));
        co_await engine->close();
        co_return failed;
    };
    const auto failed = boost::asio::co_spawn(pool, work(), boost::asio::use_future).get();
    pool.join();
    BOOST_TEST((kind_of(failed) == errc::canceled));
    BOOST_TEST(std::string(describe(failed).what()).find("the embedder changed its mind") != std::string::npos);
    BOOST_TEST(::waitpid(-1, nullptr, WNOHANG) == -1);  // no child is left, not even an ended one
}

BOOST_AUTO_TEST_CASE(two_engines_share_a_state_directory) {
    if (!test::needs_root()) return;
    const place p(only_files);
    async::runtime rt;
    const auto work = [&]() -> async::task<void> {
        const auto one = co_await build::engine::open(p.options());
        const auto two = co_await build::engine::open(p.options());
        std::vector<std::string> digests(2);
        const auto build_with = [&](std::shared_ptr<build::engine> e, std::string& out) -> async::task<void> {
            auto r = p.request();
            r.source_date_epoch = 1700000000;
            out = (co_await e->build(std::move(r))).image_digest;
        };
        async::task_group both(co_await async::current_executor);
        both.spawn(build_with(one, digests[0]));
        both.spawn(build_with(two, digests[1]));
        co_await both.join();
        BOOST_TEST(digests[0] == digests[1]);
        co_await one->close();
        co_await two->close();
    };
    rt.block_on(work());
}

BOOST_AUTO_TEST_CASE(an_engine_that_was_not_closed_ends_with_its_last_owner) {
    if (!test::needs_root()) return;
    const place p(only_files);
    const auto before = threads_of_process();
    {
        async::runtime rt;
        const auto work = [&]() -> async::task<std::shared_ptr<build::engine>> {
            auto engine = co_await build::engine::open(p.options());
            co_await engine->build(p.request());
            co_return engine;
        };
        auto engine = rt.block_on(work());
        engine.reset();
    }
    BOOST_TEST(threads_of_process() == before);
}

BOOST_AUTO_TEST_CASE(closing_cancels_what_runs_and_later_calls_are_refused) {
    if (!test::needs_root()) return;
    const place p(stubborn);
    async::runtime rt;
    const auto work = [&]() -> async::task<void> {
        const auto engine = co_await build::engine::open(p.options());
        async::event ready;
        const auto sink = progress::make_sink([&](const progress::event& e) {
            const auto* l = std::get_if<progress::log>(&e);
            if (l != nullptr && l->data.find("ready") != std::string::npos) ready.set();
        });
        std::exception_ptr failed;
        async::task_group group(co_await async::current_executor);
        const auto run = [&]() -> async::task<void> { failed = co_await failure(engine->build(p.request(), sink)); };
        group.spawn(run());
        co_await ready.wait();
        co_await engine->close();
        co_await group.join();
        BOOST_TEST((kind_of(failed) == errc::canceled));
        BOOST_TEST((kind_of(co_await failure(engine->build(p.request()))) == errc::canceled));
    };
    rt.block_on(work());
}

BOOST_AUTO_TEST_CASE(the_host_program_keeps_its_signals_umask_and_children) {
    if (!test::needs_root()) return;
    const place p("FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"true\"]\n");
    const auto old_mask = ::umask(027);
    struct sigaction before {};
    ::sigaction(SIGCHLD, nullptr, &before);
    const pid_t own = ::fork();
    if (own == 0) ::_exit(7);
    async::runtime rt;
    const auto work = [&]() -> async::task<void> {
        const auto engine = co_await build::engine::open(p.options());
        co_await engine->build(p.request());
        co_await engine->close();
    };
    rt.block_on(work());
    int status = 0;
    BOOST_TEST(::waitpid(own, &status, 0) == own);
    BOOST_TEST(WEXITSTATUS(status) == 7);
    struct sigaction after {};
    ::sigaction(SIGCHLD, nullptr, &after);
    BOOST_TEST((before.sa_handler == after.sa_handler));
    BOOST_TEST(::umask(old_mask) == 027U);
}

// The engine as an embedder uses it: from executors of its own, several at once, cancelled, closed or forgotten.
#include "support/support.hpp"

#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <exception>
#include <filesystem>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <ostream>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/post.hpp>
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
            if (std::filesystem::exists(candidate))
                std::filesystem::copy_file(candidate, context / "busybox", std::filesystem::copy_options::overwrite_existing);
    }
    [[nodiscard]] build::engine_options options() const {
        build::engine_options o;
        o.root = dir / "root";
        o.settings.oci.network = config::network_mode::none;
        return o;
    }
    [[nodiscard]] build::build_request request() const { return {.context = context}; }
};

constexpr std::string_view one_step = "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"echo\", \"here\"]\n";
constexpr std::string_view only_files = "FROM scratch\nCOPY hello /hello\n";
/// Ignores the polite signal, so that only the kill ends it.
constexpr std::string_view stubborn =
    "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"sh\", \"-c\", \"trap '' TERM; echo ready; while true; do /bin/busybox sleep "
    "1; done\"]\n";

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

/// What a library may leave behind in its host.
struct belongings {
    std::vector<std::string> descriptors;
    std::size_t threads = 0;
    bool children = false;
    bool operator==(const belongings&) const = default;
    friend std::ostream& operator<<(std::ostream& out, const belongings& b) {
        out << b.threads << " threads, " << (b.children ? "children, " : "no child, ") << b.descriptors.size() << " descriptors:";
        for (const auto& d : b.descriptors) out << ' ' << d;
        return out;
    }
};

belongings look_around() {
    belongings out;
    std::error_code gone;
    for (const auto& fd : std::filesystem::directory_iterator("/proc/self/fd")) {
        auto target = std::filesystem::read_symlink(fd.path(), gone).string();
        if (target.find("/fd") == std::string::npos || !target.starts_with("/proc/"))
            out.descriptors.push_back(fd.path().filename().string() + "=" + target);
    }
    std::sort(out.descriptors.begin(), out.descriptors.end());
    for ([[maybe_unused]] const auto& t : std::filesystem::directory_iterator("/proc/self/task")) ++out.threads;
    siginfo_t info{};
    out.children = ::waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) == 0;
    return out;
}

/// A thread that was joined may be listed for a moment longer.
belongings look_around_until(const belongings& expected) {
    auto out = look_around();
    for (int i = 0; i < 2000 && out != expected; ++i) {
        ::usleep(1000);
        out = look_around();
    }
    return out;
}

/// The engine opened and closed once, so that what libraries keep for good is there.
belongings warm(const place& p) {
    auto out = look_around();
    std::optional<async::runtime> rt(std::in_place);
    const auto work = [&]() -> async::task<void> {
        const auto engine = co_await build::engine::open(p.options());
        co_await engine->build(p.request());
        co_await engine->close();
    };
    rt->block_on(work());
    rt.reset();
    const auto threads = std::exchange(out, look_around_until(out)).threads;
    BOOST_TEST(out.threads == threads);
    return out;
}

/// Collects events and the threads they came on.
struct listener {
    std::mutex guard;
    std::vector<progress::event> events;
    std::set<std::thread::id> threads;
    std::shared_ptr<progress::sink> sink() {
        return progress::make_sink([this](const progress::event& e) {
            const std::lock_guard lock(guard);
            events.push_back(e);
            threads.insert(std::this_thread::get_id());
        });
    }
};

std::array<struct sigaction, 65> handlers() {
    std::array<struct sigaction, 65> out{};
    for (int n = 1; n < 65; ++n) ::sigaction(n, nullptr, &out[static_cast<std::size_t>(n)]);
    return out;
}

}  // namespace

BOOST_AUTO_TEST_CASE(no_directory_is_shared_with_buildkit) {
    build::engine_options options;
    BOOST_TEST(build::state_directory(options) == "/var/lib/cobuild");
    options.settings.root = "/srv/state";
    BOOST_TEST(build::state_directory(options) == "/srv/state");
    options.root = "/var/lib/buildkit";  // whoever names it by flag means it
    BOOST_TEST(build::state_directory(options) == "/var/lib/buildkit");
}

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
    BOOST_TEST(!look_around().children);  // not even an ended one
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
    const auto before = warm(p);
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
    BOOST_TEST(look_around_until(before) == before);
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
    const place p(one_step);
    const auto old_mask = ::umask(027);
    const auto before = handlers();
    sigset_t mask_before;
    ::pthread_sigmask(SIG_SETMASK, nullptr, &mask_before);
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
    const auto after = handlers();
    for (std::size_t n = 1; n < after.size(); ++n) BOOST_TEST((before[n].sa_handler == after[n].sa_handler), "signal " << n);
    sigset_t mask_after;
    ::pthread_sigmask(SIG_SETMASK, nullptr, &mask_after);
    for (int n = 1; n < 65; ++n) BOOST_TEST(::sigismember(&mask_before, n) == ::sigismember(&mask_after, n), "signal " << n);
    BOOST_TEST(::umask(old_mask) == 027U);
}

BOOST_AUTO_TEST_CASE(nothing_is_left_after_close) {
    if (!test::needs_root()) return;
    const place p(one_step);
    const auto before = warm(p);
    const place q(stubborn);
    {
        async::runtime rt;
        const auto work = [&]() -> async::task<void> {
            const auto engine = co_await build::engine::open(q.options());
            auto steps = q.request();
            steps.dockerfile_text = std::string(one_step);
            co_await engine->build(steps);
            async::cancel_source stop;
            const auto failed = co_await failure(engine->build(q.request(), cancel_when_ready(stop), stop.token()));
            BOOST_TEST((kind_of(failed) == errc::canceled));
            co_await engine->close();
        };
        rt.block_on(work());
    }
    BOOST_TEST(look_around_until(before) == before);
}

BOOST_AUTO_TEST_CASE(an_engine_that_cannot_open_leaves_nothing) {
    if (!test::needs_root()) return;
    const place p(only_files);
    const auto before = warm(p);
    test::write_file(p.dir / "file", "");
    {
        async::runtime rt;
        const auto work = [&]() -> async::task<std::exception_ptr> {
            auto o = p.options();
            o.root = p.dir / "file/root";
            std::exception_ptr failed;
            try {
                co_await build::engine::open(std::move(o));
            } catch (...) {
                failed = std::current_exception();
            }
            co_return failed;
        };
        BOOST_TEST((rt.block_on(work()) != nullptr));
    }
    BOOST_TEST(look_around_until(before) == before);
}

BOOST_AUTO_TEST_CASE(two_engines_on_two_state_directories) {
    if (!test::needs_root()) return;
    const place p(one_step), q(one_step);
    async::runtime rt;
    const auto work = [&]() -> async::task<void> {
        const auto one = co_await build::engine::open(p.options());
        const auto two = co_await build::engine::open(q.options());
        std::map<std::string, std::string> digests;
        const auto build_with = [&](std::shared_ptr<build::engine> e, build::build_request r, std::string tag) -> async::task<void> {
            r.source_date_epoch = 1700000000;
            r.tags = {tag};
            digests[tag] = (co_await e->build(std::move(r))).config_digest;
        };
        async::task_group both(co_await async::current_executor);
        both.spawn(build_with(one, p.request(), "one:1"));
        both.spawn(build_with(two, q.request(), "two:1"));
        co_await both.join();
        BOOST_TEST(!digests["one:1"].empty());
        const auto of_one = co_await one->images();
        const auto of_two = co_await two->images();
        BOOST_REQUIRE(of_one.size() == 1U);
        BOOST_REQUIRE(of_two.size() == 1U);
        BOOST_TEST(of_one.front().name == "one:1");
        BOOST_TEST(of_two.front().name == "two:1");
        co_await one->close();
        co_await two->close();
    };
    rt.block_on(work());
}

BOOST_AUTO_TEST_CASE(one_engine_serves_many_threads) {
    if (!test::needs_root()) return;
    const place p(only_files);
    boost::asio::thread_pool pool(2);
    const auto engine = boost::asio::co_spawn(pool, build::engine::open(p.options()), boost::asio::use_future).get();
    std::vector<std::future<build::build_result>> results;
    std::vector<std::future<std::vector<build::usage_info>>> tables;
    for (int i = 0; i < 6; ++i) {
        auto r = p.request();
        r.dockerfile_text = "FROM scratch\nCOPY hello /hello" + std::to_string(i / 2) + "\n";
        results.push_back(boost::asio::co_spawn(pool, engine->build(std::move(r)), boost::asio::use_future));
        tables.push_back(boost::asio::co_spawn(pool, engine->usage(), boost::asio::use_future));
    }
    std::set<std::string> different;
    for (auto& r : results) different.insert(r.get().config_digest);
    for (auto& t : tables) t.get();
    BOOST_TEST(different.size() >= 3U);
    boost::asio::co_spawn(pool, engine->close(), boost::asio::use_future).get();
    pool.join();
}

BOOST_AUTO_TEST_CASE(cancelling_the_awaiting_coroutine_ends_the_build) {
    if (!test::needs_root()) return;
    const place p(stubborn);
    boost::asio::thread_pool pool(2);
    const auto strand = boost::asio::make_strand(pool);
    boost::asio::cancellation_signal signal;
    const auto sink = progress::make_sink([&](const progress::event& e) {
        const auto* l = std::get_if<progress::log>(&e);
        if (l != nullptr && l->data.find("ready") != std::string::npos)
            boost::asio::post(strand, [&] { signal.emit(boost::asio::cancellation_type::terminal); });
    });
    const auto engine = boost::asio::co_spawn(pool, build::engine::open(p.options()), boost::asio::use_future).get();
    auto done =
        boost::asio::co_spawn(strand, engine->build(p.request(), sink), boost::asio::bind_cancellation_slot(signal.slot(), boost::asio::use_future));
    std::exception_ptr failed;
    try {
        done.get();
    } catch (...) {
        failed = std::current_exception();
    }
    BOOST_TEST((kind_of(failed) == errc::canceled));
    boost::asio::co_spawn(pool, engine->close(), boost::asio::use_future).get();
    BOOST_TEST(!look_around().children);
    pool.join();
}

// The token is used up to the last moment of the engine, and the moment after.
BOOST_AUTO_TEST_CASE(a_cancel_may_meet_the_end_of_the_build) {
    if (!test::needs_root()) return;
    const place p(only_files);
    warm(p);
    for (int i = 0; i < 12; ++i) {
        async::cancel_source stop;
        std::thread other([&] {
            ::usleep(static_cast<useconds_t>(i) * 4000);
            stop.cancel(error{errc::canceled, "now"});
        });
        async::runtime rt;
        const auto work = [&]() -> async::task<void> {
            const auto engine = co_await build::engine::open(p.options());
            const auto failed = co_await failure(engine->build(p.request(), {}, stop.token()));
            BOOST_TEST((!failed || kind_of(failed) == errc::canceled));
            co_await engine->close();
        };
        rt.block_on(work());
        other.join();
    }
}

BOOST_AUTO_TEST_CASE(closing_from_two_threads_amid_calls) {
    if (!test::needs_root()) return;
    const place p(only_files);
    const auto before = warm(p);
    {
        boost::asio::thread_pool pool(2);
        for (int round = 0; round < 4; ++round) {
            auto engine = boost::asio::co_spawn(pool, build::engine::open(p.options()), boost::asio::use_future).get();
            std::vector<std::future<std::exception_ptr>> calls;
            for (int i = 0; i < 4; ++i) calls.push_back(boost::asio::co_spawn(pool, failure(engine->build(p.request())), boost::asio::use_future));
            auto one = boost::asio::co_spawn(pool, engine->close(), boost::asio::use_future);
            for (int i = 0; i < 4; ++i) calls.push_back(boost::asio::co_spawn(pool, failure(engine->build(p.request())), boost::asio::use_future));
            auto two = boost::asio::co_spawn(pool, engine->close(), boost::asio::use_future);
            one.get();
            two.get();
            for (auto& c : calls) {
                const auto failed = c.get();
                BOOST_TEST((!failed || kind_of(failed) == errc::canceled));
            }
            BOOST_TEST((kind_of(boost::asio::co_spawn(pool, failure(engine->build(p.request())), boost::asio::use_future).get()) == errc::canceled));
        }
        pool.join();
    }
    BOOST_TEST(look_around_until(before) == before);
}

BOOST_AUTO_TEST_CASE(an_engine_given_up_during_a_build_lives_until_its_end) {
    if (!test::needs_root()) return;
    const place p(one_step);
    const auto before = warm(p);
    {
        boost::asio::thread_pool pool(2);
        auto engine = boost::asio::co_spawn(pool, build::engine::open(p.options()), boost::asio::use_future).get();
        auto r = p.request();
        r.no_cache = true;
        auto done = boost::asio::co_spawn(pool, engine->build(std::move(r)), boost::asio::use_future);
        engine.reset();
        BOOST_TEST(!done.get().image_digest.empty());
        pool.join();
    }
    BOOST_TEST(look_around_until(before) == before);
}

BOOST_AUTO_TEST_CASE(progress_comes_in_order_and_from_one_thread) {
    if (!test::needs_root()) return;
    const place p(one_step);
    listener heard;
    async::runtime rt;
    std::size_t at_return = 0;
    const auto work = [&]() -> async::task<void> {
        const auto engine = co_await build::engine::open(p.options());
        co_await engine->build(p.request(), heard.sink());
        at_return = heard.events.size();
        co_await engine->close();
    };
    rt.block_on(work());
    BOOST_TEST(heard.events.size() == at_return);
    BOOST_TEST(heard.threads.size() == 1U);
    BOOST_TEST(!heard.threads.contains(std::this_thread::get_id()));
    std::map<digest, progress::vertex> now;
    bool said = false;
    for (const auto& e : heard.events) {
        if (const auto* v = std::get_if<progress::vertex>(&e)) {
            const auto known = now.find(v->id);
            if (known != now.end() && known->second.started) BOOST_TEST(v->started.has_value(), v->name);
            if (known != now.end() && known->second.completed) BOOST_TEST(v->completed.has_value(), v->name);
            if (v->started && (known == now.end() || !known->second.started))
                for (const auto& in : v->inputs) BOOST_TEST(now.at(in).completed.has_value(), v->name);
            if (v->completed) BOOST_TEST((v->started && *v->started <= *v->completed), v->name);
            now.insert_or_assign(v->id, *v);
        } else if (const auto* l = std::get_if<progress::log>(&e)) {
            const auto& of = now.at(l->vertex);
            BOOST_TEST((of.started && !of.completed), of.name);
            said = said || l->data.find("here") != std::string::npos;
        } else if (const auto* line = std::get_if<progress::status>(&e)) {
            BOOST_TEST(now.contains(line->vertex), line->id);
        }
    }
    BOOST_TEST(said);
    for (const auto& [id, v] : now) BOOST_TEST(v.completed.has_value(), v.name);
}

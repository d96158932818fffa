#include "executor/contract.hpp"
#include "executor/tree.hpp"
#include "support/support.hpp"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <sys/resource.h>
#include <sys/wait.h>

import cobuild.base;
import cobuild.async;
import cobuild.process;
import cobuild.executor;

using namespace cobuild;
using namespace std::chrono_literals;
namespace fs = std::filesystem;
using async::task;

namespace {

test::make_runner runner_of(std::string binary) {
    return [binary](void* rt, void* programs, const std::string& work_dir) -> void* {
        try {
            return executor::open_oci_runner(*static_cast<async::runtime*>(rt), *static_cast<process::spawner*>(programs),
                                             {.binary = binary, .work_dir = work_dir, .owner = "contract-test"})
                .release();
        } catch (const error& e) {
            BOOST_TEST_MESSAGE(e.what());
            return nullptr;
        }
    };
}

[[maybe_unused]] const bool registered = [] {
    test::register_executor_contract("runc", runner_of("runc"));
    test::register_executor_contract("crun", runner_of("crun"));
    return true;
}();

struct written_ledger final : executor::ledger {
    std::vector<std::string> lines;
    task<void> record(std::string text) override {
        lines.push_back("+" + text);
        co_return;
    }
    task<void> forget(std::string text) override {
        lines.push_back("-" + text);
        co_return;
    }
};

bool cgroup_exists(const std::string& path) {
    std::error_code ec;
    if (fs::exists("/sys/fs/cgroup" + path, ec)) return true;
    for (const auto& h : fs::directory_iterator("/sys/fs/cgroup", ec))
        if (fs::exists(h.path().string() + path, ec)) return true;
    return false;
}

bool runs(int pid) {
    std::error_code ec;
    return !fs::read_symlink("/proc/" + std::to_string(pid) + "/exe", ec).empty();  // a zombie has none
}

executor::step small_step(std::string id, int root, std::vector<std::string> args) {
    return {.id = std::move(id), .args = std::move(args), .root = root};
}

}  // namespace

CO_TEST_CASE(cgroups_are_noted_once_before_and_forgotten_after) {
    if (!test::needs_root()) co_return;
    test::scratch_dir dir;
    test::busybox_tree(dir / "base");
    fs::create_directory(dir / "work");
    process::spawner programs;
    written_ledger ledger;
    const auto runner = executor::open_oci_runner(rt, programs, {.work_dir = dir / "work", .owner = "ledger-test", .ledger = &ledger});
    const unique_fd root(test::overlay_root(dir.path(), 0));
    co_await runner->run(small_step("a", root.get(), {"true"}), {});
    co_await runner->run(small_step("b", root.get(), {"true"}), {});
    auto other = small_step("c", root.get(), {"true"});
    other.cgroup_parent = "builds/mine";
    co_await runner->run(other, {});
    BOOST_TEST(ledger.lines == (std::vector<std::string>{"+cgroup /cobuild/ledger-test", "+cgroup /builds/mine/cobuild/ledger-test"}),
               boost::test_tools::per_element());
    BOOST_TEST(cgroup_exists("/cobuild/ledger-test"));
    co_await runner->close();
    BOOST_TEST(ledger.lines.size() == 4U);
    BOOST_TEST(!cgroup_exists("/cobuild/ledger-test"));
    BOOST_TEST(!cgroup_exists("/builds/mine/cobuild/ledger-test"));
    std::error_code ec;
    for (const auto* made : {"/builds/mine/cobuild", "/builds/mine", "/builds"}) {  // the parent was the user's to name: it stays with us
        for (const auto& h : fs::directory_iterator("/sys/fs/cgroup", ec)) ::rmdir((h.path().string() + made).c_str());
        ::rmdir((std::string("/sys/fs/cgroup") + made).c_str());
    }
}

CO_TEST_CASE(what_is_not_there_is_said_by_name) {
    if (!test::needs_root()) co_return;
    test::scratch_dir dir;
    test::busybox_tree(dir / "base");
    process::spawner programs;
    const auto runner = executor::open_oci_runner(rt, programs, {.work_dir = dir.path(), .owner = "x"});
    const unique_fd root(test::overlay_root(dir.path(), 0));
    const auto why = [&](executor::step s) -> task<std::string> {
        try {
            co_await runner->run(std::move(s), {});
        } catch (const error& e) {
            co_return cat(to_string(e.kind()), ": ", e.what());
        }
        co_return "";
    };
    auto s = small_step("a", root.get(), {"true"});
    s.cgroup_parent = "system.slice:";
    BOOST_TEST((co_await why(s)).starts_with("unsupported: cgroup parents of systemd (\"system.slice:\") are not supported"));
    BOOST_TEST(co_await why(small_step("../x", root.get(), {"true"})) == "invalid: not a step's id: \"../x\"");
    BOOST_TEST(co_await why(small_step("a", root.get(), {})) == "invalid: the step has no command");
    BOOST_CHECK_EXCEPTION(executor::find_runtime("no-such-runtime"), error, [](const error& e) {
        return e.kind() == errc::not_found && std::string_view(e.what()).find("install runc or crun") != std::string_view::npos;
    });
}

// A program of our own is killed in the middle of a step, as by kill -9.
BOOST_AUTO_TEST_CASE(nothing_survives_a_killed_engine) {
    if (!test::needs_root()) return;
    test::scratch_dir dir;
    test::busybox_tree(dir / "base");
    fs::create_directory(dir / "work");
    const auto word = "8" + std::to_string(::getpid()) + "1";
    int ends[2];
    BOOST_REQUIRE(::pipe(ends) == 0);
    const int engine = ::fork();
    if (engine == 0) {
        async::runtime rt;
        process::spawner programs;
        const auto runner = executor::open_oci_runner(rt, programs, {.work_dir = dir / "work", .owner = "killed-test"});
        const unique_fd root(test::overlay_root(dir.path(), 0));
        const auto tell = [&](std::span<const std::byte> piece) -> task<void> {
            if (::write(ends[1], piece.data(), 1) != 1) ::_exit(1);
            co_return;
        };
        auto s = small_step("victim", root.get(), {"sh", "-c", "trap '' TERM; (sleep " + word + ") & echo begun; sleep " + word});
        rt.block_on(runner->run(s, {.out = tell}));
        ::_exit(0);
    }
    char begun = 0;
    BOOST_REQUIRE(::read(ends[0], &begun, 1) == 1);
    for (int i = 0; i < 2000 && test::pids_with(word).size() < 2; ++i) ::usleep(1000);
    const auto before = test::pids_with(word);
    BOOST_TEST(before.size() >= 2U);
    ::kill(engine, SIGKILL);
    ::waitpid(engine, nullptr, 0);
    const auto any = [&] { return std::any_of(before.begin(), before.end(), runs) || !test::pids_with(word).empty(); };
    for (int i = 0; i < 3000 && any(); ++i) ::usleep(1000);
    BOOST_TEST(!any());
    BOOST_TEST(fs::is_empty(dir / "work"));
    BOOST_TEST(cgroup_exists("/cobuild/killed-test"));  // what the ledger is for
    async::runtime rt;
    rt.block_on(executor::clean_cgroups(rt.pool(), "cgroup /cobuild/killed-test"));
    BOOST_TEST(!cgroup_exists("/cobuild/killed-test"));
    rt.block_on(executor::clean_cgroups(rt.pool(), "cgroup /cobuild/killed-test"));  // again: nothing to do
    BOOST_CHECK_THROW(rt.block_on(executor::clean_cgroups(rt.pool(), "cgroup /system")), error);
    BOOST_CHECK_THROW(rt.block_on(executor::clean_cgroups(rt.pool(), "cgroup /cobuild/../x/cobuild/y")), error);
    ::close(ends[0]);
    ::close(ends[1]);
}

// Not part of a normal run: `test_executor --run_test=overhead_over_the_runtime_alone`.
BOOST_AUTO_TEST_CASE(overhead_over_the_runtime_alone, *boost::unit_test::disabled()) {
    if (!test::needs_root()) return;
    test::scratch_dir dir;
    test::busybox_tree(dir / "base");
    fs::create_directory(dir / "work");
    async::runtime rt;
    process::spawner programs;
    const auto runner = executor::open_oci_runner(rt, programs, {.work_dir = dir / "work", .owner = "bench"});
    const unique_fd root(test::overlay_root(dir.path(), 0));
    // The bare run: the same configuration, without our namespaces, from a bundle on disk.
    test::busybox_tree(dir / "bundle/rootfs");
    test::write_file(dir / "bundle/config.json", test::read_file(std::getenv("BENCH_CONFIG") != nullptr ? std::getenv("BENCH_CONFIG") : "/dev/null"));
    const auto median = [](std::vector<double> all) {
        std::sort(all.begin(), all.end());
        return all[all.size() / 2];
    };
    const auto cpu = [] {
        double ms = 0;
        for (const int who : {RUSAGE_SELF, RUSAGE_CHILDREN}) {
            rusage u{};
            ::getrusage(who, &u);
            ms +=
                static_cast<double>(u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1e3 + static_cast<double>(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e3;
        }
        return ms;
    };
    double cpu_ours = 0;
    double cpu_bare = 0;
    const auto timed = [&](double& used, const auto& f) {
        const auto begin = std::chrono::steady_clock::now();
        used -= cpu();
        f();
        used += cpu();
        return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
    };
    std::vector<double> ours;
    std::vector<double> bare;
    for (int i = 0; i < 60; ++i) {
        ours.push_back(timed(cpu_ours, [&] { rt.block_on(runner->run(small_step("s" + std::to_string(i), root.get(), {"/bin/true"}), {})); }));
        if (std::getenv("BENCH_CONFIG") != nullptr)
            bare.push_back(timed(cpu_bare, [&] {
                const auto r = rt.block_on(programs.capture({.args = {"runc", "run", "--bundle", dir / "bundle", "bench" + std::to_string(i)}}));
                BOOST_REQUIRE_MESSAGE(r.status.ok(), r.err);
            }));
    }
    BOOST_TEST_MESSAGE("a step: " << median(ours) << " ms, " << cpu_ours / 60 << " ms of processor time");
    if (!bare.empty()) BOOST_TEST_MESSAGE("runc alone: " << median(bare) << " ms, " << cpu_bare / 60 << " ms of processor time");
    rt.block_on(runner->close());
}

#include "support/support.hpp"

#include <cerrno>
#include <chrono>
#include <csignal>
#include <exception>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <fcntl.h>
#include <poll.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/wait.h>

import cobuild.base;
import cobuild.async;
import cobuild.process;

using namespace cobuild;
using namespace cobuild::async;
using namespace cobuild::process;
using namespace std::chrono_literals;

namespace {
command sh(std::string script) { return {.args = {"/bin/sh", "-c", std::move(script)}}; }
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
std::string message(const std::exception_ptr& e) { return e ? describe(e).what() : ""; }
bool alive(int pid) { return ::kill(pid, 0) == 0; }
/// Not ended: what waits for init to collect it does not run any more.
bool running(int pid) {
    std::ifstream stat("/proc/" + std::to_string(pid) + "/stat");
    const std::string text{std::istreambuf_iterator<char>(stat), {}};
    const auto name_end = text.rfind(')');
    return name_end != std::string::npos && text.compare(name_end, 3, ") Z") != 0;
}
}  // namespace

CO_TEST_CASE(captures_streams_and_exit_code) {
    spawner programs;
    const auto r = co_await programs.capture(sh("cat; echo oops >&2; exit 3"), {.input = "given\n"});
    BOOST_TEST(r.out == "given\n");
    BOOST_TEST(r.err == "oops\n");
    BOOST_TEST(r.status.code == 3);
    BOOST_TEST(r.status.str() == "exit code 3");
    const auto killed = co_await programs.capture(sh("kill -TERM $$"));
    BOOST_TEST(killed.status.signal == SIGTERM);
    BOOST_TEST(killed.status.code == 143);
}

CO_TEST_CASE(environment_and_directory_are_as_told) {
    spawner programs;
    auto c = sh("echo $A; pwd; echo ${HOME-none}; umask");
    c.env = {"A=b c"};
    c.cwd = "/usr";
    c.setup.umask = 027;
    BOOST_TEST((co_await programs.capture(c)).out == "b c\n/usr\nnone\n0027\n");
}

CO_TEST_CASE(failure_to_start_names_program_call_and_reason) {
    spawner programs;
    auto failed = co_await failure(programs.spawn({.args = {"no-such-program-here"}}));
    BOOST_TEST(message(failed) == "cannot start \"no-such-program-here\": no such program in PATH");
    BOOST_TEST((describe(failed).kind() == errc::not_found));
    failed = co_await failure(programs.spawn({.args = {"/etc/passwd"}}));
    BOOST_TEST(message(failed) == "cannot start \"/etc/passwd\": execve: Permission denied");
    auto c = sh("true");
    c.cwd = "/nowhere";
    failed = co_await failure(programs.spawn(c));
    BOOST_TEST(message(failed) == "cannot start \"/bin/sh\": chdir \"/nowhere\": No such file or directory");
    siginfo_t info{};
    BOOST_TEST(::waitid(P_ALL, 0, &info, WEXITED | WNOHANG) == -1);  // no zombie of ours
    BOOST_TEST(errno == ECHILD);
}

CO_TEST_CASE(only_named_descriptors_are_passed) {
    spawner programs;
    const int stray = ::open("/etc/passwd", O_RDONLY);  // deliberately without O_CLOEXEC
    const int a = ::open("/etc", O_RDONLY | O_CLOEXEC | O_DIRECTORY);
    const int b = ::open("/usr", O_RDONLY | O_CLOEXEC | O_DIRECTORY);
    auto c = sh("readlink /proc/self/fd/5 /proc/self/fd/3; ls /proc/self/fd | wc -l");
    c.fds = {{a, 5}, {b, 3}};
    BOOST_TEST((co_await programs.capture(c)).out == "/etc\n/usr\n6\n");  // 0 1 2 3 5 and ls' own
    c = sh("readlink /proc/self/fd/7 /proc/self/fd/8");
    const int low = ::fcntl(a, F_DUPFD_CLOEXEC, 7);
    const int high = ::fcntl(b, F_DUPFD_CLOEXEC, 8);
    c.fds = {{low, 8}, {high, 7}};  // sources and targets overlap
    BOOST_TEST((co_await programs.capture(c)).out == "/usr\n/etc\n");
    for (const int fd : {stray, a, b, low, high}) ::close(fd);
}

CO_TEST_CASE(output_is_bounded_and_input_may_be_ignored) {
    spawner programs;
    const auto r = co_await programs.capture(sh("head -c 300000 /dev/zero"), {.input = std::string(1 << 20, 'x'), .max_output = 1000});
    BOOST_TEST(r.status.ok());
    BOOST_TEST(r.out.size() == 1000U);
    BOOST_TEST(r.truncated);
}

CO_TEST_CASE(time_limit_kills_the_whole_group) {
    spawner programs;
    test::scratch_dir dir;
    auto c = sh("sleep 1000 & echo $! > pid; wait");
    c.cwd = dir.path();
    const auto begin = std::chrono::steady_clock::now();
    const auto failed = co_await failure(programs.capture(c, {.time_limit = 200ms}));
    BOOST_TEST((describe(failed).kind() == errc::timed_out));
    BOOST_TEST(message(failed) == "/bin/sh took longer than 200ms");
    BOOST_TEST((std::chrono::steady_clock::now() - begin < 900ms));
    const int grandchild = std::stoi(test::read_file(dir / "pid"));
    for (int i = 0; i < 1000 && running(grandchild); ++i) co_await sleep_for(1ms);
    BOOST_TEST(!running(grandchild));
}

CO_TEST_CASE(cancelling_capture_kills_and_collects) {
    spawner programs;
    cancel_source stop;
    task_group group(co_await current_executor);
    std::exception_ptr failed;
    const auto work = [&]() -> task<void> { failed = co_await failure(linked(stop.token(), programs.capture(sh("sleep 1000")))); };
    group.spawn(work());
    co_await sleep_for(20ms);
    stop.cancel(error{errc::canceled, "asked to stop"});
    co_await group.join();
    BOOST_TEST(message(failed) == "asked to stop");
    siginfo_t info{};
    BOOST_TEST(::waitid(P_ALL, 0, &info, WEXITED | WNOHANG) == -1);
}

CO_TEST_CASE(what_follows_a_capture_can_be_cancelled) {
    spawner programs;
    cancel_source stop;
    task_group group(co_await current_executor);
    event captured;
    std::exception_ptr failed;
    const auto chain = [](spawner& p, event& reached) -> task<void> {
        (void)co_await p.capture(sh("true"));
        reached.set();
        co_await sleep_for(1h);
    };
    const auto work = [&]() -> task<void> { failed = co_await failure(linked(stop.token(), chain(programs, captured))); };
    group.spawn(work());
    co_await captured.wait();
    stop.cancel(error{errc::canceled, "asked to stop"});
    co_await group.join();
    BOOST_TEST(message(failed) == "asked to stop");
}

CO_TEST_CASE(destroyed_child_is_killed_and_collected) {
    int pid = 0;
    {
        spawner programs;
        {
            auto c = co_await programs.spawn(sh("sleep 1000"));
            pid = c.pid();
            BOOST_TEST(alive(pid));
        }
    }
    BOOST_TEST(!alive(pid));  // neither running nor a zombie
}

CO_TEST_CASE(pipes_carry_data_both_ways) {
    spawner programs;
    auto c = command{.args = {"cat"}, .in = stdio::pipe(), .out = stdio::pipe()};
    auto cat_ = co_await programs.spawn(c);
    std::string got;
    task_group group(co_await current_executor);
    const std::string text(500000, 'y');
    group.spawn(write_all(cat_.take_stdin(), text));
    const auto keep = [&](std::span<const std::byte> piece) -> task<void> {
        got += text_of(piece);
        co_return;
    };
    group.spawn(read_all(cat_.take_stdout(), keep));
    co_await group.join();
    BOOST_TEST((co_await cat_.wait()).ok());
    BOOST_TEST((got == text));
    auto deaf = co_await programs.spawn({.args = {"true"}, .in = stdio::pipe()});
    auto in = deaf.take_stdin();
    co_await deaf.wait();
    co_await write_all(std::move(in), text);  // no SIGPIPE
}

CO_TEST_CASE(own_namespaces_and_mounts) {
    if (!test::needs_root()) co_return;
    spawner programs;
    test::scratch_dir dir;
    for (const auto* name : {"t", "m", "b"}) std::filesystem::create_directory(dir / name);
    test::write_file(dir / "tree/sub/file", "inside");
    std::filesystem::create_symlink("/sub", dir / "tree/link");
    unique_fd tree(::open((dir / "tree").c_str(), O_PATH | O_CLOEXEC));
    const auto mount = clone_mount(tree.get());
    auto c =
        sh("echo $$; ls /proc | grep -c '^[0-9]'; cat m/sub/file b/file; touch t/x && stat -f -c %T t; stat -c %a t; ps x >/dev/null; wc -l < "
           "/proc/net/dev");
    c.cwd = dir.path();
    c.setup = {.die_with_parent = true, .new_pid_namespace = true, .new_mount_namespace = true};
    c.setup.mounts = {attach_mount{mount.get(), dir / "m"}, bind_mount{dir / "m", "link/../link", dir / "b"}, fresh_tmpfs{dir / "t", 65536, 0700},
                      fresh_proc{}};
    const auto r = co_await programs.capture(c);
    BOOST_TEST(r.err == "");
    BOOST_TEST(r.out.starts_with("1\n"));
    BOOST_TEST(r.out.find("insideinsidetmpfs\n700\n") != std::string::npos);
    BOOST_TEST(test::read_file("/proc/self/mountinfo").find(dir.path().string()) == std::string::npos);
    BOOST_TEST(!std::filesystem::exists(dir / "t/x"));
    c.setup.mounts = {bind_mount{dir / "tree", "../../../../etc/passwd", dir / "b"}};
    BOOST_TEST(message(co_await failure(programs.spawn(c))).ends_with("open \"../../../../etc/passwd\": No such file or directory"));
}

CO_TEST_CASE(a_child_joins_the_namespaces_of_another) {
    if (!test::needs_root()) co_return;
    test::scratch_dir dir;
    std::filesystem::create_directory(dir / "t");
    spawner programs;
    auto first = sh("touch t/inside; echo ready; exec sleep 1000");
    first.cwd = dir.path();
    first.out = stdio::pipe();
    first.setup = {.die_with_parent = true, .new_pid_namespace = true, .new_mount_namespace = true};
    first.setup.mounts = {fresh_tmpfs{dir / "t", 65536, 0700}, fresh_proc{}};
    auto running = co_await programs.spawn(first);
    auto out = running.take_stdout();
    char begun = 0;
    pollfd ready{out.get(), POLLIN, 0};
    BOOST_REQUIRE(::poll(&ready, 1, 20000) == 1);
    BOOST_REQUIRE(::read(out.get(), &begun, 1) == 1);
    const unique_fd pids(::open(cat("/proc/", running.pid(), "/ns/pid").c_str(), O_RDONLY | O_CLOEXEC));
    const unique_fd mounts(::open(cat("/proc/", running.pid(), "/ns/mnt").c_str(), O_RDONLY | O_CLOEXEC));
    auto second = sh(cat("echo $$; ls ", (dir / "t").string(), "; tr '\\0' ' ' < /proc/1/cmdline"));
    second.setup.pid_namespace = pids.get();
    second.setup.mount_namespace = mounts.get();
    const auto r = co_await programs.capture(second);
    BOOST_TEST(r.err == "");
    BOOST_TEST(r.out != "1\n");
    BOOST_TEST(r.out.ends_with("\ninside\nsleep 1000 "));
    // The spawner's thread is where it was.
    BOOST_TEST((co_await programs.capture(sh("test -e /proc/$$/exe && readlink /proc/self/ns/pid"))).out ==
               cat(std::filesystem::read_symlink("/proc/self/ns/pid").string(), "\n"));
    BOOST_TEST(std::filesystem::is_empty(dir / "t"));
    running.signal(SIGKILL);
    (void)co_await running.wait();
}

// Forks a program that starts a child with die_with_parent from its spawner, then is killed as by kill -9.
BOOST_AUTO_TEST_CASE(child_dies_with_its_parent) {
    int ends[2];
    BOOST_REQUIRE(::pipe(ends) == 0);
    const int middle = ::fork();
    if (middle == 0) {
        {
            spawner programs;
            auto c = command{.args = {"sleep", "1000"}};
            c.setup.die_with_parent = true;
            c.setup.new_pid_namespace = ::geteuid() == 0;
            auto running = programs.spawn_blocking(c);
            const int pid = running.pid();
            if (::write(ends[1], &pid, sizeof pid) != sizeof pid) ::_exit(1);
            for (;;) ::pause();
        }
    }
    int grandchild = 0;
    BOOST_REQUIRE(::read(ends[0], &grandchild, sizeof grandchild) == sizeof grandchild);
    BOOST_TEST(alive(grandchild));
    ::kill(middle, SIGKILL);
    ::waitpid(middle, nullptr, 0);
    // It is collected by init; a zombie counts as ended.
    const auto ended = [&] {
        std::error_code ec;
        return !std::filesystem::exists("/proc/" + std::to_string(grandchild) + "/exe", ec) ||
               std::filesystem::read_symlink("/proc/" + std::to_string(grandchild) + "/exe", ec).empty();
    };
    for (int i = 0; i < 2000 && !ended(); ++i) ::usleep(1000);
    BOOST_TEST(ended());
    ::close(ends[0]);
    ::close(ends[1]);
}

CO_TEST_CASE(many_at_once) {
    spawner programs;
    std::vector<task<void>> all;
    const auto one = [&](int n) -> task<void> {
        const auto r = co_await programs.capture(sh("exit " + std::to_string(n % 7)));
        BOOST_TEST(r.status.code == n % 7);
    };
    for (int i = 0; i < 60; ++i) all.push_back(one(i));
    co_await when_all(std::move(all));
}

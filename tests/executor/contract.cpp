#include "executor/contract.hpp"
#include "executor/tree.hpp"
#include "support/support.hpp"

#include <algorithm>
#include <chrono>
#include <exception>
#include <functional>
#include <iterator>
#include <memory>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

import cobuild.base;
import cobuild.async;
import cobuild.process;
import cobuild.executor;

namespace cobuild::test {

using namespace cobuild::executor;
using namespace std::chrono_literals;
namespace fs = std::filesystem;
using async::task;

namespace {

struct outcome {
    executor::exit end;
    std::string out;
    std::string err;
};

/// A busybox root as the lower layer, a runner, and what must be gone afterwards.
class bench {
public:
    bench(async::runtime& runtime, const make_runner& make) : rt(runtime) {
        fs::create_directories(dir / "work");
        busybox_tree(base());
        runner.reset(static_cast<executor::runner*>(make(&runtime, &programs, (dir / "work").string())));
    }
    [[nodiscard]] fs::path base() const { return dir / "base"; }

    /// A fresh writable root; its layer is upper(n).
    unique_fd root() { return unique_fd(overlay_root(dir.path(), roots_++)); }
    [[nodiscard]] fs::path upper(int n) const { return dir / ("upper" + std::to_string(n)); }

    step sh(std::string script, int root) {
        step s{.id = "s" + std::to_string(count_++) + "-" + random_id().substr(0, 8), .args = {"/bin/sh", "-c", std::move(script)}, .root = root};
        return s;
    }
    task<outcome> run(step s) {
        auto result = std::make_shared<outcome>();
        const auto keep = [](std::string& into) {
            return [&into](std::span<const std::byte> piece) -> task<void> {
                into += text_of(piece);
                co_return;
            };
        };
        result->end = co_await runner->run(std::move(s), {.out = keep(result->out), .err = keep(result->err)});
        co_return *result;
    }
    task<outcome> run(std::string script) {
        const auto r = root();
        co_return co_await run(sh(std::move(script), r.get()));
    }

    scratch_dir dir;
    async::runtime& rt;
    process::spawner programs;
    std::unique_ptr<executor::runner> runner;

private:
    int roots_ = 0;
    int count_ = 0;
};

std::vector<std::string> cgroups_of_ours() {
    std::vector<std::string> out;
    std::error_code ec;
    for (const auto& h : fs::directory_iterator("/sys/fs/cgroup", ec))
        for (const auto& owner : fs::directory_iterator(h.path() / "cobuild" / "contract-test", ec))
            if (owner.is_directory()) out.push_back(owner.path());
    for (const auto& owner : fs::directory_iterator("/sys/fs/cgroup/cobuild/contract-test", ec))
        if (owner.is_directory()) out.push_back(owner.path());
    return out;
}

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
std::string message(const std::exception_ptr& e) { return e ? describe(e).what() : "(nothing was thrown)"; }

struct contract_case {
    const char* name;
    task<void> (*body)(bench& b);
};

std::vector<std::string> lines(const std::string& text) {
    std::vector<std::string> out;
    std::istringstream in(text);
    for (std::string line; std::getline(in, line);) out.push_back(line);
    return out;
}

// ---------------------------------------------------------------- output and ends

task<void> streams_and_exit_codes(bench& b) {
    auto r = co_await b.run("echo out; echo err >&2; exit 7");
    BOOST_TEST(r.out == "out\n");
    BOOST_TEST(r.err == "err\n");
    BOOST_TEST(r.end.code == 7);
    BOOST_TEST(!r.end.accepted);
    r = co_await b.run("true");
    BOOST_TEST(r.end.accepted);
    const auto root = b.root();
    auto s = b.sh("exit 3", root.get());
    s.valid_exit_codes = {3, 4};
    BOOST_TEST((co_await b.run(s)).end.accepted);
    s = b.sh("sh -c 'kill -9 $$'; exit $?", root.get());
    BOOST_TEST((co_await b.run(s)).end.code == 137);
    s = b.sh("head -c 3000000 /dev/zero", root.get());
    BOOST_TEST((co_await b.run(s)).out.size() == 3000000U);
}

task<void> command_that_is_not_there(bench& b) {
    const auto root = b.root();
    auto s = b.sh("", root.get());
    s.args = {"foo"};
    auto failed = co_await failure(b.run(s));
    BOOST_TEST(message(failed) == "exec: \"foo\": executable file not found in $PATH");
    BOOST_TEST((describe(failed).kind() == errc::not_found));
    s = b.sh("", root.get());
    s.args = {"/etc/passwd"};
    failed = co_await failure(b.run(s));
    BOOST_TEST(message(failed) == "exec: \"/etc/passwd\": permission denied");
    BOOST_TEST((describe(failed).kind() == errc::permission));
    BOOST_TEST(cgroups_of_ours().empty());
}

task<void> sink_that_throws_ends_the_step(bench& b) {
    const auto root = b.root();
    const auto bad = [](std::span<const std::byte>) -> task<void> {
        throw error{errc::no_space, "the log is full"};
        co_return;
    };
    const auto failed = co_await failure(b.runner->run(b.sh("echo x; sleep 777", root.get()), {.out = bad}));
    BOOST_TEST(message(failed) == "the log is full");
    BOOST_TEST(pids_with("777").empty());
}

// ---------------------------------------------------------------- what a step sees

task<void> environment(bench& b) {
    const auto root = b.root();
    auto s = b.sh("env | sort", root.get());
    s.env = {"A=1", "A=two words", "B="};
    s.proxies.http = "http://p:1";
    const auto r = co_await b.run(s);
    const auto all = lines(r.out);
    const auto has = [&](const char* line) { return std::find(all.begin(), all.end(), line) != all.end(); };
    BOOST_TEST(has("A=two words"));
    BOOST_TEST(!has("A=1"));
    BOOST_TEST(has("B="));
    BOOST_TEST(has("HOME=/root"));
    BOOST_TEST(has("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"));
    BOOST_TEST(has("HTTP_PROXY=http://p:1"));
    BOOST_TEST(has("http_proxy=http://p:1"));
}

task<void> users(bench& b) {
    const auto root = b.root();
    const auto id = [&](std::string user) -> task<std::string> {
        auto s = b.sh("echo $(id -u) $(id -g) $(id -G) $HOME", root.get());
        s.user = std::move(user);
        co_return (co_await b.run(s)).out;
    };
    BOOST_TEST(co_await id("") == "0 0 0 10 /root\n");
    BOOST_TEST(co_await id("joe") == "1000 1001 1001 10 2000 /home/joe\n");
    BOOST_TEST(co_await id("1000") == "1000 1001 1001 10 2000 /home/joe\n");
    BOOST_TEST(co_await id("5:6") == "5 6 6 /\n");
    BOOST_TEST(co_await id("joe:extra") == "1000 2000 2000 /home/joe\n");
    BOOST_TEST(co_await id("4242") == "4242 0 0 /\n");
    BOOST_TEST(message(co_await failure(id("nobody-here"))) == "unable to find user nobody-here: no matching entry in the step's /etc/passwd");
    BOOST_TEST(message(co_await failure(id("joe:none"))) == "unable to find group none: no matching entry in the step's /etc/group");
}

task<void> working_directory(bench& b) {
    const auto root = b.root();
    auto s = b.sh("pwd; stat -c '%a %u %g' . ..", root.get());
    s.cwd = "/new/dir";
    s.user = "joe";
    BOOST_TEST((co_await b.run(s)).out == "/new/dir\n755 1000 1001\n755 1000 1001\n");
    fs::create_directory_symlink("/tmp/elsewhere", b.upper(0) / "link");
    s = b.sh("pwd", root.get());
    s.cwd = "/link/x";
    BOOST_TEST(message(co_await failure(b.run(s))).find("is a link that leads nowhere") != std::string::npos);
}

task<void> names_of_hosts(bench& b) {
    const auto root = b.root();
    auto s = b.sh("hostname; cat /etc/hosts /etc/resolv.conf; echo x >> /etc/hosts", root.get());
    s.hostname = "builder";
    s.extra_hosts = {{"registry.test", "10.1.2.3"}};
    s.resolv_conf = "nameserver 10.9.9.9\n";
    auto r = co_await b.run(s);
    BOOST_TEST(r.out ==
               "builder\n127.0.0.1\tlocalhost builder\n::1\tlocalhost ip6-localhost ip6-loopback\n10.1.2.3\tregistry.test\nnameserver 10.9.9.9\n");
    BOOST_TEST(r.end.code != 0);
    BOOST_TEST(r.err.find("Read-only file system") != std::string::npos);
    BOOST_TEST((co_await b.run(b.sh("hostname", root.get()))).out == "buildkitsandbox\n");
}

task<void> isolation(bench& b) {
    const auto root = b.root();
    auto r =
        co_await b.run(b.sh("echo $$; ls /proc | grep -c '^[0-9]'; grep CapEff /proc/self/status; grep Seccomp: /proc/self/status; ls /dev | wc -l;"
                            "touch /sys/x 2>/dev/null || echo ro; echo 1 2>/dev/null > /proc/sys/vm/drop_caches || echo ro; cat /proc/kcore | wc -c",
                            root.get()));
    const auto all = lines(r.out);
    BOOST_TEST_REQUIRE(all.size() == 8U);
    BOOST_TEST(all[0] == "1");
    BOOST_TEST(all[2] == "CapEff:\t00000000a80425fb");
    BOOST_TEST(all[3] == "Seccomp:\t2");
    BOOST_TEST(all[5] == "ro");
    BOOST_TEST(all[6] == "ro");
    BOOST_TEST(all[7] == "0");
    r = co_await b.run(b.sh("mount -t tmpfs x /tmp; unshare -U true; echo end", root.get()));
    BOOST_TEST(r.out == "end\n");
    BOOST_TEST(lines(r.err).size() == 2U);  // both refused
    auto s = b.sh("grep CapEff /proc/self/status", root.get());
    s.user = "joe";
    BOOST_TEST((co_await b.run(s)).out == "CapEff:\t0000000000000000\n");
}

task<void> insecure_steps_have_what_we_have(bench& b) {
    const auto root = b.root();
    auto s = b.sh(
        "grep -E 'CapEff|CapAmb' /proc/self/status | sort -r; grep Seccomp: /proc/self/status; mount -t tmpfs x /tmp && echo mounted; test -e "
        "/dev/kmsg && echo kmsg",
        root.get());
    s.security = security::insecure;
    const auto r = co_await b.run(s);
    const auto all = lines(r.out);
    BOOST_TEST_REQUIRE(all.size() >= 4U);
    const auto own = read_file("/proc/self/status");
    const auto caps = own.substr(own.find("CapEff:") + 8, 16);
    BOOST_TEST(all[0] == "CapEff:\t" + caps);
    BOOST_TEST(all[1] == "CapAmb:\t" + caps);
    BOOST_TEST(all[2] == "Seccomp:\t0");
    BOOST_TEST(all[3] == "mounted");
    BOOST_TEST((r.out.find("kmsg") != std::string::npos) == fs::exists("/dev/kmsg"));
}

task<void> limits(bench& b) {
    const auto root = b.root();
    auto s = b.sh("ulimit -n; ulimit -Hn; stat -f -c %S:%b /dev/shm", root.get());
    s.ulimits = {{"nofile", 100, 200}};
    s.shm_size = 8 << 20;
    BOOST_TEST((co_await b.run(s)).out == "100\n200\n4096:2048\n");
    s.id += "x";
    s.ulimits = {{"nofiles", 1, 1}};
    BOOST_TEST(message(co_await failure(b.run(s))) == "unknown ulimit \"nofiles\"");
}

task<void> network(bench& b) {
    const auto root = b.root();
    // An empty namespace, made by a thread that then ends.
    unique_fd ns;
    std::thread([&] {
        if (::unshare(CLONE_NEWNET) == 0) ns.reset(::open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC));
    }).join();
    BOOST_REQUIRE(ns.get() >= 0);
    auto s = b.sh("grep -c : /proc/net/dev", root.get());
    s.network_namespace = ns.get();
    BOOST_TEST((co_await b.run(s)).out == "1\n");  // lo alone
    std::ifstream in("/proc/net/dev");
    const std::string host{std::istreambuf_iterator<char>(in), {}};
    BOOST_TEST((co_await b.run(b.sh("grep -c : /proc/net/dev", root.get()))).out == std::to_string(std::count(host.begin(), host.end(), ':')) + "\n");
}

// ---------------------------------------------------------------- mounts

task<void> bind_mounts(bench& b) {
    write_file(b.dir / "src/a/file", "hello");
    fs::create_symlink("/a", b.dir / "src/inside");
    fs::create_symlink("../../../../../etc", b.dir / "src/out");
    const unique_fd plain(::open((b.dir / "src").c_str(), O_PATH | O_CLOEXEC));
    const auto detached = process::clone_mount(plain.get());
    const auto root = b.root();
    for (const int source : {plain.get(), detached.get()}) {
        auto s = b.sh("cat /m/a/file /x/y/file single; echo more > /m/a/new; echo z > /x/y/z || echo refused", root.get());
        s.cwd = "/home";
        s.mounts = {{.target = "/nowhere", .source = source},
                    {.target = "/m", .source = source},
                    {.target = "/x/y", .source = source, .selector = "inside", .readonly = true},
                    {.target = "single", .source = source, .selector = "/inside/../a/file", .readonly = true}};
        const auto r = co_await b.run(s);
        BOOST_TEST(r.out == "hellohellohellorefused\n");
        BOOST_TEST(r.end.code == 0);
        BOOST_TEST(read_file(b.dir / "src/a/new") == "more\n");
        s = b.sh("ls /m", root.get());
        s.mounts = {{.target = "/m", .source = source, .selector = "out/passwd"}};
        BOOST_TEST(message(co_await failure(b.run(s))) == "mount at \"/m\": there is no \"out/passwd\" in its source");
    }
    std::vector<std::string> left;
    for (const auto& e : fs::recursive_directory_iterator(b.upper(0))) left.push_back(e.path().lexically_relative(b.upper(0)));
    std::sort(left.begin(), left.end());
    // The directory above /x/y stays (as with BuildKit, unless recursively asked), home was copied up for `single`.
    BOOST_TEST(left == (std::vector<std::string>{"etc", "home", "x"}), boost::test_tools::per_element());
}

task<void> stubs_leave_no_trace(bench& b) {
    const auto root = b.root();
    const auto old = fs::file_time_type::clock::now() - 1000h;
    fs::last_write_time(b.base() / "etc", old);
    fs::last_write_time(b.base() / "home", old);
    auto s = b.sh("cat /home/joe/deep/er/s", root.get());
    s.resolv_conf = "";
    s.remove_stubs_recursively = true;
    s.mounts = {{.what = mount::kind::secret, .target = "/home/joe/deep/er/s", .data = "x"}};
    BOOST_TEST((co_await b.run(s)).out == "x");
    BOOST_TEST(!fs::exists(b.upper(0) / "home/joe/deep"));
    BOOST_TEST(!fs::exists(b.upper(0) / "proc"));
    BOOST_TEST(!fs::exists(b.upper(0) / "etc/hosts"));
    BOOST_TEST((fs::last_write_time(b.upper(0) / "etc") == old));
    // What the step itself changed keeps the step's time.
    s = b.sh("touch /etc/mine && touch -d '2001-01-01 00:00:00' /etc", root.get());
    s.resolv_conf = "";
    co_await b.run(s);
    struct stat info{};
    BOOST_REQUIRE(::stat((b.upper(0) / "etc").c_str(), &info) == 0);
    BOOST_TEST(info.st_mtim.tv_sec == 978307200);
    BOOST_TEST(!fs::exists(b.upper(0) / "etc/hosts"));
}

task<void> memory_mounts(bench& b) {
    const auto root = b.root();
    auto s = b.sh("stat -f -c '%T %b' /t; echo x > /t/f; dd if=/dev/zero of=/t/big bs=1M count=2 2>/dev/null || echo full", root.get());
    s.mounts = {{.what = mount::kind::tmpfs, .target = "/t", .size = 1 << 20}};
    BOOST_TEST((co_await b.run(s)).out == "tmpfs 256\nfull\n");
    BOOST_TEST(!fs::exists(b.upper(0) / "t"));
}

task<void> secrets(bench& b) {
    const auto root = b.root();
    const std::string word = "hush-" + random_id();
    auto s = b.sh("cat /run/secrets/token; stat -c '%a %u %g' /run/secrets/token; echo x > /run/secrets/token; echo y", root.get());
    s.mounts = {{.what = mount::kind::secret, .target = "/run/secrets/token", .data = word, .uid = 1000, .gid = 1001, .mode = 0440}};
    const auto r = co_await b.run(s);
    BOOST_TEST(r.out == word + "440 1000 1001\ny\n");
    for (const auto& e : fs::recursive_directory_iterator(b.dir.path())) {
        if (e.is_regular_file() && e.file_size() < 4096) BOOST_TEST(read_file(e.path()).find(word) == std::string::npos);
        BOOST_TEST(e.path().filename() != "token");
    }
    BOOST_TEST(fs::is_empty(b.dir / "work"));
}

task<void> sockets(bench& b) {
    const auto root = b.root();
    const auto where = b.dir / "agent.sock";
    const unique_fd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un name{.sun_family = AF_UNIX};
    where.string().copy(name.sun_path, sizeof name.sun_path - 1);
    BOOST_REQUIRE(::bind(listener.get(), reinterpret_cast<const sockaddr*>(&name), sizeof name) == 0);
    const unique_fd source(::open(where.c_str(), O_PATH | O_CLOEXEC));
    auto s = b.sh("test -S /run/agent && echo socket", root.get());
    s.mounts = {{.what = mount::kind::ssh, .target = "/run/agent", .source = source.get()}};
    BOOST_TEST((co_await b.run(s)).out == "socket\n");
}

task<void> read_only_root(bench& b) {
    const auto root = b.root();
    auto s = b.sh("touch /x || echo refused", root.get());
    s.root_readonly = true;
    BOOST_TEST((co_await b.run(s)).out == "refused\n");
    BOOST_TEST((co_await b.run(b.sh("touch /x && echo written", root.get()))).out == "written\n");
    BOOST_TEST(fs::exists(b.upper(0) / "x"));
}

// ---------------------------------------------------------------- ends that are not the step's own

struct ended {
    std::chrono::milliseconds took{};
    std::string why;
};
task<ended> cancel_when_it_says(bench& b, step s, const std::string& word, async::cancel_source* force = nullptr) {
    async::cancel_source stop;
    std::exception_ptr failed;
    async::event ready;
    std::string seen;
    const auto watch = [&](std::span<const std::byte> piece) -> task<void> {
        seen += text_of(piece);
        if (seen.find(word) != std::string::npos) ready.set();
        co_return;
    };
    async::task_group group(co_await async::current_executor);
    const auto work = [&]() -> task<void> { failed = co_await failure(async::linked(stop.token(), b.runner->run(std::move(s), {.out = watch}))); };
    group.spawn(work());
    co_await async::with_deadline(20s, "the step's first word", ready.wait());
    const auto begin = std::chrono::steady_clock::now();
    stop.cancel(error{errc::canceled, "asked to stop"});
    if (force != nullptr) force->cancel(error{errc::canceled, "asked twice"});
    co_await group.join();
    co_return ended{std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - begin), message(failed)};
}

void nothing_left(bench& b, const std::string& word) {
    BOOST_TEST(pids_with(word).empty());
    BOOST_TEST(cgroups_of_ours().empty());
    BOOST_TEST(read_file("/proc/self/mountinfo").find(b.dir.path().string()) == std::string::npos);
    BOOST_TEST(fs::is_empty(b.dir / "work"));
}

task<void> deaf_step_is_killed_in_time(bench& b) {
    const auto root = b.root();
    const auto r = co_await cancel_when_it_says(
        b, b.sh("trap '' TERM; (trap '' TERM; sleep 7771) & echo begun; while :; do sleep 7772; done", root.get()), "begun");
    BOOST_TEST(r.why == "asked to stop");
    BOOST_TEST(r.took.count() >= 450);
    BOOST_TEST(r.took.count() < 1000);
    nothing_left(b, "777");
}

task<void> handler_runs_before_the_end(bench& b) {
    const auto root = b.root();
    write_file(b.dir / "cache/half", "x");
    const unique_fd cache(::open((b.dir / "cache").c_str(), O_PATH | O_CLOEXEC));
    auto s = b.sh("trap 'rm /cache/half; exit 1' TERM; echo begun; sleep 7773; touch /cache/went-on", root.get());
    s.mounts = {{.target = "/cache", .source = cache.get()}};
    auto r = co_await cancel_when_it_says(b, s, "begun");
    BOOST_TEST(r.took.count() < 450);
    BOOST_TEST(!fs::exists(b.dir / "cache/half"));
    BOOST_TEST(!fs::exists(b.dir / "cache/went-on"));
    // A shell that does not catch the signal must not go on to its next command when the running one ends of it.
    s = b.sh("sh -c 'trap \"touch /cache/cleaned; exit 1\" TERM; echo begun; sleep 7774'; touch /cache/went-on", root.get());
    s.mounts = {{.target = "/cache", .source = cache.get()}};
    r = co_await cancel_when_it_says(b, s, "begun");
    BOOST_TEST(r.took.count() < 450);
    BOOST_TEST(fs::exists(b.dir / "cache/cleaned"));
    BOOST_TEST(!fs::exists(b.dir / "cache/went-on"));
    nothing_left(b, "777");
}

task<void> second_request_kills_at_once(bench& b) {
    const auto root = b.root();
    async::cancel_source force;
    auto s = b.sh("trap '' TERM; echo begun; while :; do sleep 7775; done", root.get());
    s.force = force.token();
    const auto r = co_await cancel_when_it_says(b, s, "begun", &force);
    BOOST_TEST(r.took.count() < 450);
    nothing_left(b, "7775");
}

task<void> slow_sink_slows_the_step(bench& b) {
    const auto root = b.root();
    std::size_t taken = 0;
    async::event go;
    const auto slow = [&](std::span<const std::byte> piece) -> task<void> {
        co_await go.wait();
        taken += piece.size();
    };
    async::task_group group(co_await async::current_executor);
    const auto work = [&]() -> task<void> {
        co_await b.runner->run(b.sh("head -c 1000000 /dev/zero; echo done > /finished", root.get()), {.out = slow});
    };
    group.spawn(work());
    co_await async::sleep_for(150ms);
    BOOST_TEST(!fs::exists(b.upper(0) / "finished"));
    go.set();
    co_await group.join();
    BOOST_TEST(taken == 1000000U);
    BOOST_TEST(fs::exists(b.upper(0) / "finished"));
}

task<void> many_in_parallel(bench& b) {
    std::vector<unique_fd> roots;
    std::vector<task<void>> all;
    const auto one = [&](int n, int root) -> task<void> {
        const auto r = co_await b.run(b.sh("echo " + std::to_string(n) + " > /n; cat /n; exit " + std::to_string(n % 5), root));
        BOOST_TEST(r.out == std::to_string(n) + "\n");
        BOOST_TEST(r.end.code == n % 5);
    };
    for (int i = 0; i < 30; ++i) {
        roots.push_back(b.root());
        all.push_back(one(i, roots.back().get()));
    }
    co_await async::when_all(std::move(all));
    BOOST_TEST(cgroups_of_ours().empty());
}

constexpr contract_case cases[] = {
    {"streams_and_exit_codes", streams_and_exit_codes},
    {"command_that_is_not_there", command_that_is_not_there},
    {"sink_that_throws_ends_the_step", sink_that_throws_ends_the_step},
    {"environment", environment},
    {"users", users},
    {"working_directory", working_directory},
    {"names_of_hosts", names_of_hosts},
    {"isolation", isolation},
    {"insecure_steps_have_what_we_have", insecure_steps_have_what_we_have},
    {"limits", limits},
    {"network", network},
    {"bind_mounts", bind_mounts},
    {"stubs_leave_no_trace", stubs_leave_no_trace},
    {"memory_mounts", memory_mounts},
    {"secrets", secrets},
    {"sockets", sockets},
    {"read_only_root", read_only_root},
    {"deaf_step_is_killed_in_time", deaf_step_is_killed_in_time},
    {"handler_runs_before_the_end", handler_runs_before_the_end},
    {"second_request_kills_at_once", second_request_kills_at_once},
    {"slow_sink_slows_the_step", slow_sink_slows_the_step},
    {"many_in_parallel", many_in_parallel},
};

task<void> with_bench(async::runtime& rt, make_runner make, task<void> (*body)(bench&)) {
    bench b(rt, make);
    if (!b.runner) {
        BOOST_TEST_MESSAGE("skipped: not usable on this machine");
        co_return;
    }
    co_await body(b);
    co_await b.runner->close();
}

}  // namespace

void register_executor_contract(const std::string& name, make_runner make) {
    namespace ut = boost::unit_test;
    auto* suite = BOOST_TEST_SUITE(name);
    for (const auto& c : cases)
        suite->add(ut::make_test_case(
            [make, body = c.body] {
                if (!needs_root()) return;
                async::runtime rt;
                rt.block_on(with_bench(rt, make, body));
            },
            c.name, __FILE__, __LINE__));
    ut::framework::master_test_suite().add(suite);
}

}  // namespace cobuild::test

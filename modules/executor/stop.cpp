module;
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <exception>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <sys/syscall.h>
#include <unistd.h>

#include <boost/asio/awaitable.hpp>

module cobuild.executor;

#include "parts.hpp"

namespace cobuild::executor {

using namespace std::chrono_literals;

namespace {

/// A process of a step, held by a pidfd, so that its number cannot come to mean another one.
struct member {
    unique_fd pidfd;
    bool first = false;    ///< of its PID namespace: ignores every signal it does not catch
    bool catches = false;  ///< SIGTERM
    void signal(int number) const { ::syscall(SYS_pidfd_send_signal, pidfd.get(), number, nullptr, 0U); }
};

std::optional<member> look_at(int pid) {
    member out{.pidfd = unique_fd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0U)))};
    if (!out.pidfd) return std::nullopt;
    std::ifstream in(cat("/proc/", pid, "/status"));
    const std::string text{std::istreambuf_iterator<char>(in), {}};
    for (const auto line : split(text, '\n')) {
        if (line.starts_with("NSpid:")) {
            out.first = line.substr(line.find_last_of('\t') + 1) == "1";
        } else if (line.starts_with("SigCgt:")) {
            std::uint64_t mask = 0;
            const auto digits = trim(line.substr(7));
            std::from_chars(digits.data(), digits.data() + digits.size(), mask, 16);
            out.catches = (mask >> (SIGTERM - 1) & 1U) != 0;
        }
    }
    return out;
}

/// Sends SIGTERM round. True when there is something to wait for.
bool ask_to_end(const std::vector<int>& pids, bool& first_is_stopped) {
    std::vector<member> members;
    const member* first = nullptr;
    for (const int pid : pids)
        if (auto m = look_at(pid)) members.push_back(std::move(*m));
    for (const auto& m : members)
        if (m.first) first = &m;
    first_is_stopped = first != nullptr && !first->catches;
    if (members.empty() || (first_is_stopped && members.size() == 1)) return false;
    if (first_is_stopped) first->signal(SIGSTOP);
    for (const auto& m : members)
        if (&m != first || !first_is_stopped) m.signal(SIGTERM);
    return true;
}

async::task<void> until_one_is_left(async::blocking_pool& pool, std::vector<std::string> hierarchies, std::string cgroup) {
    for (;;) {
        const auto left = co_await pool.run([&] { return cgroup_processes(hierarchies, cgroup).size(); });
        if (left <= 1) co_return;
        co_await async::sleep_for(5ms);
    }
}

async::task<void> until_ended(process::child& runtime) { co_await runtime.wait(); }

}  // namespace

async::task<void> stop_step(async::blocking_pool& pool, process::child& runtime, std::vector<std::string> hierarchies, std::string cgroup,
                            nanoseconds grace, async::cancel_token force) {
    bool waits = false;
    bool first_is_stopped = false;
    if (!force.cancelled() && grace > 0ns)
        waits = co_await pool.run([&] { return ask_to_end(cgroup_processes(hierarchies, cgroup), first_is_stopped); });
    std::exception_ptr too_late;
    if (waits) {
        try {
            auto end = first_is_stopped ? until_one_is_left(pool, hierarchies, cgroup) : until_ended(runtime);
            co_await async::linked(force, async::with_deadline(grace, "the step", std::move(end)));
        } catch (...) {
            too_late = std::current_exception();
        }
    }
    runtime.signal(SIGKILL);  // first process of the namespace that all others live in
    co_await runtime.wait();
}

}  // namespace cobuild::executor

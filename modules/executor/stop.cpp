module;
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <exception>
#include <functional>
#include <map>
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
    int pid = -1;
    unique_fd pidfd{};
    std::string program{};  ///< its command line
    bool first = false;     ///< of its PID namespace: ignores every signal it does not catch
    bool catches = false;   ///< SIGTERM
    void signal(int number) const { ::syscall(SYS_pidfd_send_signal, pidfd.get(), number, nullptr, 0U); }
};

std::string proc_text(int pid, const char* name) { return read_kernel_file(cat("/proc/", pid, '/', name)); }

/// The number of a process in the PID namespace below ours; -1 where there is none.
int inner_number(int pid) {
    const auto text = proc_text(pid, "status");
    for (const auto line : split(text, '\n')) {
        if (!line.starts_with("NSpid:")) continue;
        std::vector<std::string_view> numbers;
        for (const auto part : split(line.substr(6), '\t'))
            if (!trim(part).empty()) numbers.push_back(trim(part));
        int out = -1;
        if (numbers.size() > 1) std::from_chars(numbers[1].data(), numbers[1].data() + numbers[1].size(), out);
        return out;
    }
    return -1;
}

std::optional<member> look_at(int pid) {
    member out{.pid = pid, .pidfd = unique_fd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0U))), .program = proc_text(pid, "cmdline")};
    if (!out.pidfd) return std::nullopt;
    const auto text = proc_text(pid, "status");
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

/// Sends SIGTERM round, once to each process and program: a shell's child takes the signal for the shell's own handler until
/// it has executed its command, and then knows nothing of it.
class request_to_end {
public:
    /// Also to those that were just being started when it was last called. False when nobody is left to wait for.
    bool send(const std::vector<int>& pids) {
        std::vector<const member*> fresh;
        for (const int pid : pids) {
            auto& known = asked_[pid];
            if (known && known->program == proc_text(pid, "cmdline")) continue;
            known = look_at(pid);
            if (known) fresh.push_back(&*known);
        }
        for (const auto* m : fresh)
            if (m->first && !m->catches) {
                deaf_first_ = m->pid;
                if (pids.size() > 1) m->signal(SIGSTOP);
            }
        for (const auto* m : fresh)
            if (m->pid != deaf_first_) m->signal(SIGTERM);
        return !pids.empty() && (pids.size() > 1 || pids.front() != deaf_first_);
    }

private:
    std::map<int, std::optional<member>> asked_;
    int deaf_first_ = -1;
};

async::task<void> until_asked_and_gone(async::blocking_pool& pool, std::vector<std::string> hierarchies, std::string cgroup) {
    request_to_end request;
    while (co_await pool.run([&] { return request.send(cgroup_processes(hierarchies, cgroup)); })) co_await async::sleep_for(5ms);
}

}  // namespace

async::task<void> signal_process(async::blocking_pool& pool, std::vector<std::string> hierarchies, std::string cgroup, int inner, int number) {
    co_await pool.run([&] {
        for (const int pid : cgroup_processes(hierarchies, cgroup)) {
            const unique_fd held(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0U)));
            // Held first: the number cannot come to mean another one after it was looked at.
            if (held && inner_number(pid) == inner) ::syscall(SYS_pidfd_send_signal, held.get(), number, nullptr, 0U);
        }
    });
}

async::task<void> stop_step(async::blocking_pool& pool, process::child& runtime, std::vector<std::string> hierarchies, std::string cgroup,
                            nanoseconds grace, async::cancel_token force) {
    std::exception_ptr too_late;
    if (!force.cancelled() && grace > 0ns) {
        try {
            co_await async::linked(force, async::with_deadline(grace, "the step", until_asked_and_gone(pool, hierarchies, cgroup)));
        } catch (...) {
            too_late = std::current_exception();
        }
    }
    runtime.signal(SIGKILL);  // first process of the namespace that all others live in
    co_await runtime.wait();
}

}  // namespace cobuild::executor

module;
#include <cerrno>
#include <csignal>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/use_awaitable.hpp>

module cobuild.process;

#include "state.hpp"

namespace cobuild::process {

namespace asio = boost::asio;

std::string status::str() const {
    if (signal == 0) return cat("exit code ", code);
    return cat("signal ", signal, " (", ::strsignal(signal), ')');
}

child::child(std::unique_ptr<state> s) noexcept : state_(std::move(s)) {}
child::child(child&&) noexcept = default;

child& child::operator=(child&& other) noexcept {
    child old(std::move(other));
    state_.swap(old.state_);
    return *this;
}

child::~child() {
    if (!state_ || state_->ended) return;
    signal_group(SIGKILL);
    signal(SIGKILL);
    state_->owner->adopt(std::move(state_->pidfd));
}

int child::pid() const noexcept { return state_->pid; }
int child::pidfd() const noexcept { return state_->pidfd.get(); }
unique_fd child::take_stdin() noexcept { return std::move(state_->in); }
unique_fd child::take_stdout() noexcept { return std::move(state_->out); }
unique_fd child::take_stderr() noexcept { return std::move(state_->err); }

bool child::signal(int number) noexcept {
    if (state_->ended) return false;
    return ::syscall(SYS_pidfd_send_signal, state_->pidfd.get(), number, nullptr, 0U) == 0;
}

bool child::signal_group(int number) noexcept {
    if (state_->ended) return false;
    if (!state_->group) return signal(number);
    // Not collected yet, so the number is still its own.
    return ::kill(-state_->pid, number) == 0;
}

async::task<void> child::state::until_ended() {
    if (ended) co_return;
    asio::posix::stream_descriptor watched(co_await async::current_executor, pidfd.get());
    const scope_exit give_back([&] { watched.release(); });
    co_await watched.async_wait(asio::posix::descriptor_base::wait_read, async::use_task);
}

void child::state::collect() {
    if (ended) return;
    siginfo_t info{};
    while (::waitid(static_cast<idtype_t>(P_PIDFD), static_cast<id_t>(pidfd.get()), &info, WEXITED) < 0) {
        if (errno == EINTR) continue;
        if (errno == ECHILD) {
            ended = status{.code = 255};  // the host program waits for any child, or ignores SIGCHLD
            throw error{errc::internal, cat("the exit code of process ", pid, " was collected by another part of this program")};
        }
        throw_errno("waitid");
    }
    if (info.si_code == CLD_EXITED)
        ended = status{.code = info.si_status};
    else
        ended = status{.code = 128 + info.si_status, .signal = info.si_status};
}

async::task<status> child::wait() {
    auto* s = state_.get();
    co_await s->until_ended();
    s->collect();
    co_return *s->ended;
}

}  // namespace cobuild::process

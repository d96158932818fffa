module;
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include <fcntl.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/write.hpp>

module cobuild.executor;

#include "parts.hpp"

namespace cobuild::executor {

namespace {

struct terminal {
    unique_fd ours;
    unique_fd theirs;
};

/// A pair that passes bytes on as they are: the terminal inside the step, which the runtime makes, does the editing and echoing.
terminal open_terminal() {
    terminal out;
    out.ours = unique_fd(::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC));
    if (!out.ours) throw_errno("opening a terminal");
    if (::unlockpt(out.ours.get()) < 0) throw_errno("opening a terminal");
    // By the pair itself: its name may mean nothing, or another one, in our mount namespace.
    out.theirs = unique_fd(::ioctl(out.ours.get(), TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC));
    if (!out.theirs) throw_errno("opening a terminal");
    struct termios mode{};
    if (::tcgetattr(out.theirs.get(), &mode) < 0) throw_errno("setting up a terminal");
    ::cfmakeraw(&mode);
    if (::tcsetattr(out.theirs.get(), TCSANOW, &mode) < 0) throw_errno("setting up a terminal");
    return out;
}

/// Hands a pipe's bytes on; what the sink throws is kept, and the program that fills the pipe is killed.
async::task<void> pump(unique_fd from, sink to, process::child& program, std::exception_ptr& failed) {
    bool sinking = false;
    try {
        co_await process::read_all(std::move(from), [&](std::span<const std::byte> piece) -> async::task<void> {
            sinking = true;
            if (to) co_await to(piece);
            sinking = false;
        });
    } catch (const boost::system::system_error& e) {
        // A terminal whose other end was closed says so by EIO.
        if (!sinking && e.code() == boost::system::errc::io_error) co_return;
        if (!failed) failed = std::current_exception();
        program.signal(SIGKILL);
    } catch (...) {
        if (!failed) failed = std::current_exception();
        program.signal(SIGKILL);
    }
}

/// What is typed at a terminal. Either end may go away first.
async::task<void> type(unique_fd from, unique_fd to) {
    const auto ex = co_await async::current_executor;
    boost::asio::posix::stream_descriptor source(ex, from.release()), target(ex, to.release());
    std::string buffer(4096, '\0');
    boost::system::error_code ended;
    while (!ended) {
        const auto n = co_await source.async_read_some(boost::asio::buffer(buffer), boost::asio::redirect_error(async::use_task, ended));
        if (!ended)
            co_await boost::asio::async_write(target, boost::asio::buffer(buffer.data(), n), boost::asio::redirect_error(async::use_task, ended));
    }
}

}  // namespace

struct talk::state {
    streams io;
    std::optional<terminal> tty;
    std::optional<async::task_group> output, input;
    std::exception_ptr sink_failed;
};

talk::talk(streams io, bool terminal) : state_(std::make_unique<state>()) {
    state_->io = std::move(io);
    if (terminal) state_->tty = open_terminal();
}

talk::~talk() = default;

void talk::plug(process::command& c) {
    auto& s = *state_;
    if (s.tty) {
        c.in = c.out = c.err = process::stdio::given(s.tty->theirs.get());
        return;
    }
    if (s.io.in) c.in = process::stdio::given(s.io.in.get());
    c.out = s.io.direct_out ? process::stdio::given(s.io.direct_out.get()) : process::stdio::pipe();
    c.err = process::stdio::pipe();
}

void talk::begin(async::executor ex, process::child& program) {
    auto& s = *state_;
    s.output.emplace(ex, true);
    s.input.emplace(ex, true);
    if (s.tty) {
        s.tty->theirs.reset();
        s.output->spawn(pump(s.tty->ours.duplicate(), std::move(s.io.out), program, s.sink_failed));
        if (s.io.in) s.input->spawn(type(std::move(s.io.in), s.tty->ours.duplicate()));
        return;
    }
    s.io.in.reset();
    s.io.direct_out.reset();
    if (auto out = program.take_stdout()) s.output->spawn(pump(std::move(out), std::move(s.io.out), program, s.sink_failed));
    s.output->spawn(pump(program.take_stderr(), std::move(s.io.err), program, s.sink_failed));
}

async::task<void> talk::end() {
    if (state_->output) co_await state_->output->join();
    if (state_->sink_failed) std::rethrow_exception(state_->sink_failed);
}

async::task<void> talk::drop() {
    co_await async::no_cancel;
    for (auto* group : {&state_->output, &state_->input}) {
        if (!*group) continue;
        (*group)->cancel();
        try {
            co_await (*group)->join();
        } catch (const std::exception&) {
            // Cancelled, that is all.
        }
    }
}

void talk::resize(unsigned rows, unsigned columns) noexcept {
    if (!state_->tty) return;
    struct winsize size{};
    size.ws_row = static_cast<unsigned short>(rows);
    size.ws_col = static_cast<unsigned short>(columns);
    ::ioctl(state_->tty->ours.get(), TIOCSWINSZ, &size);
}

async::task<void> until_written(int dir, std::string name) {
    const int watch = ::inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    if (watch < 0) throw_errno("watching the step's bundle");
    boost::asio::posix::stream_descriptor changes(co_await async::current_executor, watch);
    if (::inotify_add_watch(watch, cat("/proc/self/fd/", dir).c_str(), IN_MOVED_TO | IN_CLOSE_WRITE) < 0) throw_errno("watching the step's bundle");
    std::string buffer(4096, '\0');
    while (read_file(dir, name.c_str()).empty()) (void)co_await changes.async_read_some(boost::asio::buffer(buffer), async::use_task);
}

}  // namespace cobuild::executor

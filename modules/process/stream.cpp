module;
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <ctime>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/use_awaitable.hpp>

module cobuild.process;

import cobuild.base;
import cobuild.async;

namespace cobuild::process {

namespace asio = boost::asio;

async::task<void> read_all(unique_fd fd, std::function<async::task<void>(std::span<const std::byte>)> sink) {
    asio::posix::stream_descriptor stream(co_await async::current_executor, fd.release());
    std::vector<std::byte> buffer(std::size_t{32} << 10);
    for (;;) {
        boost::system::error_code ec;
        const auto n = co_await stream.async_read_some(asio::buffer(buffer), asio::redirect_error(async::use_task, ec));
        if (n > 0) co_await sink(std::span<const std::byte>(buffer).first(n));
        if (ec == asio::error::eof) co_return;
        if (ec) throw boost::system::system_error(ec);
    }
}

namespace {

/// write(2) that answers EPIPE and raises nothing: the signal is kept from this thread and taken off again.
ssize_t quiet_write(int fd, std::string_view data) {
    sigset_t pipe_only;
    sigset_t before;
    sigset_t pending;
    sigemptyset(&pipe_only);
    sigaddset(&pipe_only, SIGPIPE);
    sigpending(&pending);
    const bool was_pending = sigismember(&pending, SIGPIPE) != 0;
    ::pthread_sigmask(SIG_BLOCK, &pipe_only, &before);
    const auto n = ::write(fd, data.data(), data.size());
    const int reason = errno;
    if (n < 0 && reason == EPIPE && !was_pending) {
        const timespec now{};
        while (::sigtimedwait(&pipe_only, nullptr, &now) < 0 && errno == EINTR) {
        }
    }
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    errno = reason;
    return n;
}

}  // namespace

async::task<void> write_all(unique_fd fd, std::string data) {
    const int flags = ::fcntl(fd.get(), F_GETFL);
    if (flags < 0 || ::fcntl(fd.get(), F_SETFL, flags | O_NONBLOCK) < 0) throw_errno("fcntl");
    asio::posix::stream_descriptor stream(co_await async::current_executor, fd.release());
    std::string_view rest = data;
    while (!rest.empty()) {
        const auto n = quiet_write(stream.native_handle(), rest);
        if (n >= 0) {
            rest.remove_prefix(static_cast<std::size_t>(n));
        } else if (errno == EAGAIN) {
            co_await stream.async_wait(asio::posix::descriptor_base::wait_write, async::use_task);
        } else if (errno == EPIPE) {
            co_return;
        } else if (errno != EINTR) {
            throw_errno("write to a pipe");
        }
    }
}

unique_fd clone_mount(int fd) {
    constexpr unsigned clone = 1;           // OPEN_TREE_CLONE
    constexpr unsigned recursive = 0x8000;  // AT_RECURSIVE
    const auto tree = ::syscall(SYS_open_tree, fd, "", clone | recursive | O_CLOEXEC | 0x1000U /* AT_EMPTY_PATH */);
    if (tree < 0) throw_errno("open_tree");
    return unique_fd(static_cast<int>(tree));
}

}  // namespace cobuild::process

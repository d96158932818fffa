module;
#include <sys/socket.h>

#include <cerrno>
#include <chrono>
#include <cstddef>
#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/write.hpp>

module cobuild.daemon;

import :internal;

namespace cobuild::daemon {

namespace {

constexpr std::size_t most_head = std::size_t{16} << 10;
constexpr std::size_t most_clients = 32;
constexpr auto patience = std::chrono::seconds{10};

using socket = boost::asio::generic::stream_protocol::socket;

std::string_view reason(int status) {
    switch (status) {
        case 200: return "OK";
        case 400: return "Bad Request";
        case 404: return "Not Found";
        case 405: return "Method Not Allowed";
        default: return "Not Implemented";
    }
}

/// Method and path of an HTTP request's first line; empty when it is none.
std::pair<std::string, std::string> first_line(std::string_view head) {
    const auto line = head.substr(0, head.find("\r\n"));
    const auto one = line.find(' ');
    const auto two = line.rfind(' ');
    if (one == std::string_view::npos || two == one || !line.substr(two + 1).starts_with("HTTP/1.")) return {};
    return {std::string(line.substr(0, one)), std::string(line.substr(one + 1, two - one - 1))};
}

debug_answer answer(world& w, const calls_under_way& calls, std::string_view head) {
    const auto [method, path] = first_line(head);
    if (method.empty()) return {.status = 400, .body = "this listener speaks HTTP\n"};
    if (method != "GET" && method != "HEAD") return {.status = 405, .body = "GET is expected\n"};
    auto out = debug_page(w, calls(), path);
    return out;
}

/// One request a connection: who asks every 15 seconds needs no more.
async::task<void> exchange(std::shared_ptr<world> w, calls_under_way calls, std::shared_ptr<socket> s) {
    std::string head;
    while (head.find("\r\n\r\n") == std::string::npos && head.size() < most_head) {
        char piece[2048];
        const auto n = co_await s->async_read_some(boost::asio::buffer(piece), async::use_task);
        head.append(piece, n);
    }
    const auto a = answer(*w, calls, head);
    const auto text = cat("HTTP/1.1 ", a.status, " ", reason(a.status), "\r\nContent-Type: ", a.type, "\r\nContent-Length: ", a.body.size(),
                          "\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n", head.starts_with("HEAD ") ? "" : a.body);
    co_await boost::asio::async_write(*s, boost::asio::buffer(text), async::use_task);
}

async::task<void> serve_one(std::shared_ptr<world> w, calls_under_way calls, unique_fd connection) {
    sockaddr_storage at{};
    socklen_t size = sizeof at;
    if (::getsockname(connection.get(), reinterpret_cast<sockaddr*>(&at), &size) != 0) co_return;
    auto s = std::make_shared<socket>(w->ex);
    s->assign(boost::asio::generic::stream_protocol(at.ss_family, 0), connection.get());
    (void)connection.release();
    try {
        co_await async::with_deadline(patience, "a request of the debug listener", exchange(w, std::move(calls), s));
    } catch (const std::exception& e) {
        log(log_level::debug, "a request of the debug listener failed", {{"error", describe(std::current_exception()).what()}});
    }
}

async::task<void> accept_debug(std::shared_ptr<world> w, calls_under_way calls, std::shared_ptr<boost::asio::posix::stream_descriptor> listening,
                               async::task_group& group) {
    for (;;) {
        co_await listening->async_wait(boost::asio::posix::stream_descriptor::wait_read, async::use_task);
        for (;;) {
            unique_fd connection{::accept4(listening->native_handle(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)};
            if (!connection) {
                if (errno != EAGAIN && errno != EWOULDBLOCK) co_await async::sleep_for(std::chrono::milliseconds{100});
                break;
            }
            // More than these is nobody's monitoring: they are closed.
            if (group.running() <= most_clients) group.spawn(serve_one(w, calls, std::move(connection)));
        }
    }
}

}  // namespace

async::task<void> serve_debug(std::shared_ptr<world> w, calls_under_way calls, unique_fd listening) {
    auto descriptor = std::make_shared<boost::asio::posix::stream_descriptor>(w->ex, listening.get());
    (void)listening.release();
    async::task_group group(w->ex, true);
    std::exception_ptr failed;
    try {
        co_await accept_debug(w, std::move(calls), descriptor, group);
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::no_cancel;
    group.cancel();
    try {
        co_await group.join();
    } catch (const std::exception&) {
        // Requests that were cut off.
    }
    if (failed) std::rethrow_exception(failed);
}

}  // namespace cobuild::daemon

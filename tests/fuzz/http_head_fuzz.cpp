// A hostile server: every byte it sends over a real socket ends in a body or in a cobuild::error.
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <boost/asio/awaitable.hpp>

import cobuild.base;
import cobuild.async;
import cobuild.http;

namespace {

using namespace cobuild;

int listener() {
    const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (::bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 || ::listen(fd, 16) != 0) std::abort();
    return fd;
}

std::uint16_t port_of(int fd) {
    sockaddr_in address{};
    socklen_t size = sizeof address;
    ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
    return ntohs(address.sin_port);
}

async::task<void> exchange(async::runtime& rt, std::uint16_t port) {
    http::connection c(rt.get_executor(), {.tls = false, .host = "127.0.0.1", .port = port}, {});
    try {
        co_await c.send({});
        co_await c.read_all(100'000);
    } catch (const error&) {
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static async::runtime rt;
    static const int fd = listener();
    std::thread server([&] {
        const int peer = ::accept(fd, nullptr, nullptr);
        char request[1024];
        (void)!::recv(peer, request, sizeof request, 0);
        (void)!::send(peer, data, size, MSG_NOSIGNAL);
        ::shutdown(peer, SHUT_WR);
        while (::recv(peer, request, sizeof request, 0) > 0) {
        }
        ::close(peer);
    });
    rt.block_on(exchange(rt, port_of(fd)));
    server.join();
    return 0;
}

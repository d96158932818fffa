module;
#include <sys/socket.h>

#include <cerrno>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>

#include <boost/asio/awaitable.hpp>

module cobuild.http;

import :internal;

namespace cobuild::http {

namespace {

class plain_wire final : public wire {
public:
    explicit plain_wire(int fd) : fd_(fd) {}

    io_step handshake() override { return {}; }

    io_step read(std::span<std::byte> into) override {
        const auto n = ::recv(fd_, into.data(), into.size(), MSG_DONTWAIT);
        if (n == 0) return {.eof = true};
        return result(n, readiness::readable);
    }

    io_step write(std::span<const std::byte> from) override {
        return result(::send(fd_, from.data(), from.size(), MSG_DONTWAIT | MSG_NOSIGNAL), readiness::writable);
    }

    bool encrypted() const override { return false; }

private:
    static io_step result(ssize_t n, readiness need) {
        if (n >= 0) return {.bytes = static_cast<std::size_t>(n)};
        if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) return {.need = need};
        return {.errnum = errno};
    }
    int fd_;
};

}  // namespace

std::unique_ptr<wire> make_plain_wire(int fd) { return std::make_unique<plain_wire>(fd); }

}  // namespace cobuild::http

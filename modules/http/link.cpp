module;
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/deferred.hpp>
#include <boost/asio/experimental/parallel_group.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/system/system_error.hpp>

module cobuild.http;

import :internal;
import :link;

namespace cobuild::http {

namespace asio = boost::asio;
using asio::ip::tcp;

struct link::sockets {
    explicit sockets(const async::executor& ex) : socket(ex), resolver(ex), timer(ex) {}
    tcp::socket socket;
    tcp::resolver resolver;
    asio::steady_timer timer;
};

link::link(async::executor ex, endpoint s, connection_options o)
    : server(std::move(s)), options(std::move(o)), sockets_(std::make_unique<sockets>(ex)) {}
link::~link() { close(); }

void link::close() noexcept {
    io_.reset();
    boost::system::error_code ignored;
    sockets_->socket.close(ignored);
    deadline_.reset();
    if (std::exchange(counted_, false) && options.on_socket) options.on_socket(-1);
}

bool link::peer_closed() const noexcept {
    char byte = 0;
    const auto n = ::recv(sockets_->socket.native_handle(), &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    if (n == 0) return true;
    if (n < 0) return errno != EAGAIN && errno != EWOULDBLOCK;
    return !io_->encrypted();  // plain bytes nobody asked for; TLS may have a session ticket there
}

// ---------------------------------------------------------------- deadline

void link::arm(nanoseconds limit, std::string_view doing) {
    const auto at = std::chrono::steady_clock::now() + limit;
    const bool sooner = watching_ && sockets_->timer.expiry() > at;
    deadline_ = at;
    limit_ = limit;
    expired_ = false;
    doing_ = doing;
    if (!watching_ || sooner) watch();
}

void link::disarm() noexcept { deadline_.reset(); }

// One timer that looks at the deadline when it fires, so that moving the deadline costs nothing.
void link::watch() {
    watching_ = true;
    sockets_->timer.expires_at(*deadline_);
    sockets_->timer.async_wait([weak = weak_from_this()](boost::system::error_code ec) {
        if (ec) return;
        if (const auto self = weak.lock()) self->on_timer();
    });
}

void link::on_timer() {
    watching_ = false;
    if (!deadline_) return;
    if (std::chrono::steady_clock::now() < *deadline_) return watch();
    deadline_.reset();
    expired_ = true;
    boost::system::error_code ignored;
    sockets_->socket.cancel(ignored);
    sockets_->resolver.cancel();
}

void link::check_expired() const {
    if (expired_) throw error{errc::timed_out, cat(doing_, server.host_port(), " took longer than ", format_duration(limit_))};
}

async::task<void> link::wait(readiness need) {
    check_expired();
    try {
        co_await sockets_->socket.async_wait(need == readiness::readable ? tcp::socket::wait_read : tcp::socket::wait_write, async::use_task);
    } catch (const boost::system::system_error&) {
        check_expired();
        throw;
    }
}

async::task<void> link::wait_either() {
    check_expired();
    auto& s = sockets_->socket;
    co_await asio::experimental::make_parallel_group(s.async_wait(tcp::socket::wait_read, asio::deferred),
                                                     s.async_wait(tcp::socket::wait_write, asio::deferred))
        .async_wait(asio::experimental::wait_for_one(), async::use_task);
    check_expired();
}

void link::fail(const io_step& step, std::string_view doing) {
    if (step.failure) throw error{*step.failure};
    if (step.errnum != 0) throw error{errc::unavailable, cat(doing, server.host_port(), ": ", std::generic_category().message(step.errnum))};
    throw error{errc::unavailable, cat(server.host_port(), " closed the connection")};
}

// ---------------------------------------------------------------- opening

async::task<void> link::dial(endpoint to) {
    arm(options.timeouts.connect, "connecting to ");
    boost::system::error_code ec;
    std::vector<tcp::endpoint> addresses;
    if (const auto address = asio::ip::make_address(to.host, ec); !ec) {
        addresses.emplace_back(address, to.port);
    } else {
        try {
            for (const auto& entry :
                 co_await sockets_->resolver.async_resolve(to.host, cat(to.port), tcp::resolver::numeric_service, async::use_task))
                addresses.push_back(entry.endpoint());
        } catch (const boost::system::system_error& e) {
            check_expired();
            if (e.code() == asio::error::operation_aborted) throw;
            throw error{errc::unavailable, cat("cannot find the host ", to.host, ": ", e.code().message())};
        }
    }
    auto& s = sockets_->socket;
    std::string refusal = "it has no address";
    counted_ = true;
    if (options.on_socket) options.on_socket(+1);
    for (const auto& address : addresses) {
        s.close(ec);
        try {
            co_await s.async_connect(address, async::use_task);
            s.non_blocking(true);
            s.set_option(tcp::no_delay(true));
            s.set_option(tcp::socket::keep_alive(true));
            reached_ = true;
            peer_ = address.address().is_v6() ? cat('[', address.address().to_string(), "]:", address.port())
                                              : cat(address.address().to_string(), ':', address.port());
            const int seconds = 60;
            ::setsockopt(s.native_handle(), IPPROTO_TCP, TCP_KEEPIDLE, &seconds, sizeof seconds);
            co_return;
        } catch (const boost::system::system_error& e) {
            check_expired();
            if (e.code() == asio::error::operation_aborted) throw;
            refusal = e.code().message();
        }
    }
    throw error{errc::unavailable, cat("cannot connect to ", to.host_port(), ": ", refusal)};
}

async::task<void> link::tunnel() {
    const auto text = cat("CONNECT ", server.host_port(), " HTTP/1.1\r\nHost: ", server.host_port(), "\r\n",
                          authorization_.empty() ? "" : cat("Proxy-Authorization: ", authorization_, "\r\n"), "\r\n");
    co_await write(bytes_of(text));
    std::string in;
    while (in.find("\r\n\r\n") == std::string::npos) {
        // One byte at a time near the end would be TLS's: a proxy says nothing before we do.
        std::byte piece[512];
        const auto n = co_await read(piece);
        if (n == 0 || in.size() > options.max_head) throw error{errc::unavailable, cat("the proxy did not open a way to ", server.host_port())};
        in.append(reinterpret_cast<const char*>(piece), n);
    }
    std::size_t consumed = 0;
    const auto h = parse_head(in, options.max_head, consumed);
    if (!h || h->answer.status != 200)
        throw error{errc::unavailable, cat("the proxy did not open a way to ", server.host_port(), ": ", h ? h->answer.status_text() : "no answer")};
}

async::task<void> link::secure() {
    arm(options.timeouts.handshake, "the TLS handshake with ");
    io_ = make_tls_wire(sockets_->socket.native_handle(), options.tls, server, options.trust_hint);
    for (;;) {
        const auto step = io_->handshake();
        if (step.need != readiness::none) {
            co_await wait(step.need);
        } else if (step.failure || step.errnum != 0 || step.eof) {
            not_tls_ = io_->not_tls();
            certificates_ = io_->certificates();
            if (step.eof) throw error{errc::unavailable, cat(server.host_port(), " closed the connection during the TLS handshake")};
            fail(step, "the TLS handshake with ");
        } else {
            certificates_ = io_->certificates();
            co_return;
        }
    }
}

async::task<void> link::open() {
    const auto self = shared_from_this();
    close();
    abrupt_ = not_tls_ = expired_ = reached_ = false;
    peer_.clear();
    certificates_.clear();
    std::exception_ptr failed;
    try {
        const auto through = options.proxy.proxy_for(server);
        absolute_ = through && !server.tls;
        authorization_.clear();
        if (through) {
            auto proxy = parse_proxy(*through);
            authorization_ = proxy.authorization;
            try {
                co_await dial(std::move(proxy.server));
            } catch (error& e) {
                throw std::move(e).with("proxy");
            }
        } else {
            co_await dial(server);
        }
        io_ = make_plain_wire(sockets_->socket.native_handle());
        if (through && server.tls) co_await tunnel();
        if (server.tls) co_await secure();
        disarm();
    } catch (...) {
        failed = std::current_exception();
    }
    if (failed) {
        close();
        std::rethrow_exception(failed);
    }
}

// ---------------------------------------------------------------- moving bytes

async::task<std::size_t> link::read(std::span<std::byte> into) {
    bool waited = false;
    for (;;) {
        const auto step = io_->read(into);
        if (step.eof) {
            abrupt_ = step.abrupt;
            co_return 0;
        }
        if (step.need == readiness::none) {
            if (step.failure || step.errnum != 0) fail(step, "reading from ");
            // A peer that is never behind must not keep the thread from everything else.
            if (!waited) co_await asio::post(sockets_->socket.get_executor(), async::use_task);
            co_return step.bytes;
        }
        co_await wait(step.need);
        waited = true;
        if (!io_) throw error{errc::canceled, "the connection was closed"};
    }
}

async::task<void> link::write(std::span<const std::byte> from) {
    while (!from.empty()) {
        const auto step = io_->write(from);
        if (step.need != readiness::none) {
            co_await wait(step.need);
            if (!io_) throw error{errc::canceled, "the connection was closed"};
        } else if (step.failure || step.errnum != 0 || step.eof) {
            fail(step, "writing to ");
        } else {
            from = from.subspan(step.bytes);
        }
    }
}

void link::poll(std::string& early) {
    std::byte piece[4096];
    const auto step = io_->read(piece);
    if (step.need != readiness::none) return;
    if (step.bytes == 0) fail(step, "reading from ");
    early.append(reinterpret_cast<const char*>(piece), step.bytes);
}

async::task<bool> link::write_watching(std::span<const std::byte> from, std::string& early) {
    while (!from.empty()) {
        poll(early);
        if (!early.empty()) co_return false;
        const auto step = io_->write(from);
        if (step.need != readiness::none) {
            co_await wait_either();
            if (!io_) throw error{errc::canceled, "the connection was closed"};
        } else if (step.failure || step.errnum != 0 || step.eof) {
            fail(step, "writing to ");
        } else {
            from = from.subspan(step.bytes);
            arm(options.timeouts.idle, "sending to ");
        }
    }
    co_return true;
}

}  // namespace cobuild::http

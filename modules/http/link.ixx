/// A socket with a deadline and a wire on it: what a connection waits with. Not installed.
module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

module cobuild.http:link;

import cobuild.base;
import cobuild.async;
import cobuild.http;
import :internal;

namespace cobuild::http {

/// All waiting of a connection. Owned by a shared pointer; its executor's strand only.
class link : public std::enable_shared_from_this<link> {
public:
    link(async::executor ex, endpoint server, connection_options options);
    ~link();

    /// Name look-up, TCP, proxy, TLS.
    async::task<void> open();
    void close() noexcept;
    [[nodiscard]] bool is_open() const noexcept { return io_ != nullptr; }
    [[nodiscard]] bool peer_closed() const noexcept;
    [[nodiscard]] bool reached() const noexcept { return reached_; }
    [[nodiscard]] bool not_tls() const noexcept { return not_tls_; }

    void arm(nanoseconds limit, std::string_view doing);
    void disarm() noexcept;

    /// At least one byte, or 0 at the end of the stream (`abrupt` then says whether TLS was cut).
    async::task<std::size_t> read(std::span<std::byte> into);
    async::task<void> write(std::span<const std::byte> from);
    /// Like write, but stops early and returns false when the peer sends something; it stands in `early` then.
    async::task<bool> write_watching(std::span<const std::byte> from, std::string& early);
    /// What has arrived already, without waiting; throws when the peer has closed.
    void poll(std::string& early);

    /// What goes to a plain-http proxy has absolute targets.
    [[nodiscard]] bool absolute_targets() const noexcept { return absolute_; }
    [[nodiscard]] const std::string& proxy_authorization() const noexcept { return authorization_; }
    [[nodiscard]] const std::string& peer() const noexcept { return peer_; }
    [[nodiscard]] const std::vector<std::string>& certificates() const noexcept { return certificates_; }
    [[nodiscard]] bool abrupt() const noexcept { return abrupt_; }

    const endpoint server;
    const connection_options options;

private:
    struct sockets;
    async::task<void> dial(endpoint to);
    async::task<void> tunnel();
    async::task<void> secure();
    async::task<void> wait(readiness need);
    async::task<void> wait_either();
    void watch();
    void on_timer();
    void check_expired() const;
    [[noreturn]] void fail(const io_step& step, std::string_view doing);

    std::unique_ptr<sockets> sockets_;
    std::unique_ptr<wire> io_;
    std::optional<std::chrono::steady_clock::time_point> deadline_;
    std::string doing_;
    nanoseconds limit_{};
    bool watching_ = false;
    bool expired_ = false;
    bool counted_ = false;
    bool abrupt_ = false;
    bool not_tls_ = false;
    bool reached_ = false;
    bool absolute_ = false;
    std::string authorization_;
    std::string peer_;
    std::vector<std::string> certificates_;
};

}  // namespace cobuild::http

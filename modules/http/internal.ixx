/// What the bodies of cobuild.http share. Not installed.
module;
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

module cobuild.http:internal;

import cobuild.base;
import cobuild.http;

namespace cobuild::http {

enum class readiness { none, readable, writable };

/// The outcome of one attempt on a non-blocking socket. When `need` is not none, nothing moved and the caller waits for it.
struct io_step {
    std::size_t bytes = 0;
    bool eof = false;
    bool abrupt = false;  ///< an end without TLS's closing alert: a body that ends with the connection may be cut
    readiness need = readiness::none;
    int errnum = 0;                ///< a socket error
    std::optional<error> failure;  ///< any other
};

/// A connected socket as a stream of plain bytes. Never waits; does not own the descriptor.
class wire {
public:
    virtual ~wire() = default;
    virtual io_step handshake() = 0;
    virtual io_step read(std::span<std::byte> into) = 0;
    virtual io_step write(std::span<const std::byte> from) = 0;
    /// True when bytes may wait that read() would deliver without the socket being readable.
    [[nodiscard]] virtual bool encrypted() const = 0;
    /// After a failed handshake: the peer answered in plain text.
    [[nodiscard]] virtual bool not_tls() const { return false; }
    [[nodiscard]] virtual std::vector<std::string> certificates() const { return {}; }
};

std::unique_ptr<wire> make_plain_wire(int fd);
std::unique_ptr<wire> make_tls_wire(int fd, const tls_context& context, const endpoint& server, std::string_view trust_hint);

/// The head of a message as Beast read it.
struct head {
    response answer;
    bool keep_alive = false;
    bool chunked = false;
};
/// Parses a head from the front of `bytes`; empty when more is needed. `consumed` is its length. Throws errc::corrupt.
std::optional<head> parse_head(std::string_view bytes, std::size_t max_head, std::size_t& consumed);

/// The request line and fields.
std::string format_head(const request& r, const endpoint& server, bool absolute_target, const std::string& proxy_authorization);

/// A proxy as its url says: where, and the value of Proxy-Authorization.
struct proxy_target {
    endpoint server;
    std::string authorization;
};
proxy_target parse_proxy(std::string_view url);

}  // namespace cobuild::http

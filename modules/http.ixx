/// cobuild.http: an HTTP/1.1 client connection, plain or TLS. The one module that sees Beast and TLS sockets.
///
/// Words. An *endpoint* is scheme, host and port. A *connection* is at most one socket to one endpoint and carries one
/// exchange at a time: send() a request, read the body to its end, send the next. No HTTP/2, no redirects, no retries, no
/// compression of bodies: those are the caller's.
///
/// The peer is treated as hostile: heads, chunk lines and trailers have limits, bodies go only where the caller lets them.
/// Errors are cobuild::error and name host:port. unavailable: no name, refused, reset, closed too early. timed_out: a limit
/// of `timeouts`. unauthorized: the certificate is not trusted, expired or of another name, or a client certificate is missing
/// or refused (says which, and what to configure). corrupt: no HTTP, no TLS. A status is never an error here.
/// Thread safety: a connection belongs to one executor (a strand, or a single thread). Cancelling a task closes the socket.
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

export module cobuild.http;

import cobuild.base;
import cobuild.async;

export namespace cobuild::http {

// ---------------------------------------------------------------- names

struct endpoint {
    bool tls = true;
    std::string host;  ///< name or address, IPv6 without brackets
    std::uint16_t port = 443;
    auto operator<=>(const endpoint&) const = default;
    /// "host:port", the port left out when it is the scheme's own.
    [[nodiscard]] std::string authority() const;
    [[nodiscard]] std::string host_port() const;  ///< always with port
    [[nodiscard]] std::string origin() const;     ///< "https://host[:port]"
};

struct url {
    endpoint server;
    std::string target = "/";  ///< path and query, as they go into the request line; begins with '/'
    /// http and https only. Throws errc::invalid; refuses user names, control characters and spaces.
    static url parse(std::string_view text);
    /// `location` against this url, as RFC 3986 5.2 (absolute, scheme-relative, absolute and relative paths).
    [[nodiscard]] url resolve(std::string_view location) const;
    [[nodiscard]] std::string str() const;
};

/// "host", "host:port", "[v6]:port" with the scheme's port by default. Throws errc::invalid.
endpoint parse_endpoint(std::string_view authority, bool tls);
/// localhost, 127.0.0.0/8, ::1
bool is_loopback(std::string_view host);
std::string percent_encode(std::string_view text);  ///< all but RFC 3986 unreserved

struct header {
    std::string name;
    std::string value;
};

/// In order of arrival; names compare without case.
class headers {
public:
    headers() = default;
    headers(std::initializer_list<header> all) : all_(all) {}
    void add(std::string_view name, std::string_view value);
    void set(std::string_view name, std::string_view value);  ///< replaces all of that name
    void remove(std::string_view name);
    [[nodiscard]] std::optional<std::string_view> get(std::string_view name) const;
    [[nodiscard]] std::vector<std::string_view> all(std::string_view name) const;
    [[nodiscard]] auto begin() const { return all_.begin(); }
    [[nodiscard]] auto end() const { return all_.end(); }

private:
    std::vector<header> all_;
};

// ---------------------------------------------------------------- trust

struct key_pair {
    std::string cert;  ///< PEM files
    std::string key;
};

struct tls_options {
    std::vector<std::string> ca;      ///< PEM files, added to the system's authorities; unreadable is an error
    std::vector<key_pair> key_pairs;  ///< of several the one whose issuer the server asks for, else the first
    /// Directories: each *.crt is an authority, X.cert pairs with X.key; a missing or forbidden directory is no error.
    std::vector<std::string> dirs;
    bool insecure = false;  ///< no verification at all
    bool use_system_trust = true;
};

/// What tells one state of all these files from another: names, sizes, times of change. Blocks; never throws.
std::string file_state(const tls_options& options);

/// What TLS connections verify and present. Immutable, cheap to copy, thread-safe. Empty: system trust.
class tls_context {
public:
    tls_context() = default;
    /// Reads the files (blocks): throws errc::invalid naming the file.
    static tls_context load(const tls_options& options);
    struct state;

private:
    friend struct tls_access;
    std::shared_ptr<state> state_;
};

// ---------------------------------------------------------------- bodies

/// Bytes to upload. `read(offset, max)` gives the next bytes, never none before `length`; called in order, from 0 again on a
/// retry. It is kept alive until send() returns.
struct body_source {
    std::uint64_t length = 0;
    std::function<async::task<async::chunk>(std::uint64_t offset, std::size_t max)> read;
};
body_source memory_body(std::string bytes);
/// `length` bytes of `fd` from `offset`, by pread on the pool. The descriptor must outlive the request.
body_source file_body(int fd, std::uint64_t offset, std::uint64_t length, async::blocking_pool& pool);

// ---------------------------------------------------------------- exchanges

struct request {
    std::string method = "GET";
    std::string target = "/";
    http::headers headers;  ///< Host, Content-Length and Connection are added
    std::optional<body_source> body;
};

struct response {
    unsigned status = 0;
    std::string reason;
    http::headers headers;
    std::optional<std::uint64_t> content_length;  ///< empty when chunked or until the end of the connection
    [[nodiscard]] bool ok() const noexcept { return status >= 200 && status < 300; }
    /// "404 Not Found"
    [[nodiscard]] std::string status_text() const;
};

struct timeouts {
    nanoseconds connect = std::chrono::seconds{30};  ///< name look-up and TCP, all addresses together
    nanoseconds handshake = std::chrono::seconds{10};
    nanoseconds head = std::chrono::seconds{120};  ///< from the last byte of the request to the response's head
    nanoseconds idle = std::chrono::seconds{60};   ///< between two bytes of a body, either way
};

/// How to reach endpoints that lie behind a proxy.
struct proxy_settings {
    std::string http;      ///< "http://[user:password@]host:port"; empty: none
    std::string https;     ///< used with CONNECT
    std::string no_proxy;  ///< as in Go: names, .suffixes, addresses, CIDR blocks, "*"
    /// HTTP_PROXY (not in CGI), HTTPS_PROXY, NO_PROXY, lower case preferred, as Go reads them; ALL_PROXY where one is not set.
    static proxy_settings from_environment();
    /// Loopback is never proxied.
    [[nodiscard]] std::optional<std::string> proxy_for(const endpoint& e) const;
};

struct connection_options {
    tls_context tls;
    http::timeouts timeouts;
    proxy_settings proxy;
    std::size_t max_head = std::size_t{64} << 10;
    /// Called when a socket is opened and when it is closed: +1, -1.
    std::function<void(int)> on_socket;
    /// Appended to the sentence about an untrusted certificate: what to configure.
    std::string trust_hint;
};

class connection {
public:
    connection(async::executor ex, endpoint server, connection_options options);
    ~connection();  ///< closes
    connection(const connection&) = delete;
    connection& operator=(const connection&) = delete;

    [[nodiscard]] const endpoint& server() const noexcept;
    /// Connects where needed, sends, and reads the head of the answer; interim 1xx answers are skipped. An answer that
    /// arrives during an upload ends the upload. A kept connection that the server had closed meanwhile is opened anew
    /// once, if no byte of an answer had come. The previous body must have been read to its end or discarded by close().
    async::task<response> send(request r);
    /// The next bytes of the body, 0 at its end; a body cut short throws errc::unavailable.
    async::task<std::size_t> read_some(std::span<std::byte> into);
    /// The rest of the body; errc::corrupt above `limit`.
    async::task<std::string> read_all(std::size_t limit);
    /// Reads at most `limit` bytes of a body nobody wants so that the connection stays usable; closes it otherwise.
    async::task<void> discard(std::size_t limit = std::size_t{64} << 10);

    [[nodiscard]] bool is_open() const noexcept;
    /// Open, the last body read to its end, and both sides agree to keep it; also looks whether the peer has closed.
    [[nodiscard]] bool reusable() const noexcept;
    /// After a failed send() over TLS: the peer answered in plain text.
    [[nodiscard]] bool peer_is_not_tls() const noexcept;
    /// The last send() got as far as a connected socket.
    [[nodiscard]] bool reached() const noexcept;
    /// What the last socket was connected to ("10.1.2.3:443", a proxy where there is one); empty when nothing was reached.
    [[nodiscard]] std::string peer() const;
    /// Over TLS: the certificates the peer showed, its own first, a line each; also after a refused handshake.
    [[nodiscard]] std::vector<std::string> certificates() const;
    void close() noexcept;

private:
    struct state;
    std::shared_ptr<state> state_;
};

}  // namespace cobuild::http

/// cobuild.rpc: gRPC calls as coroutines, in both roles, messages as their serialized bytes.
///
/// The one module that sees grpc++. All calls, unary ones too, are streams here: gRPC's wire makes no difference. Methods
/// are named by their path ("/moby.buildkit.v1.Control/Solve"), so who serves them is a matter of one function.
///
/// Threads. gRPC's own threads only post: a handler runs on the executor given to its server, a channel's coroutines on
/// the executor given to the channel, which is one thread's. Everything here is used from that thread alone.
///
/// Limits. A message is at most 16 MiB both ways, as with BuildKit; a connection has at most 1,024 calls at once.
/// Cancellation. A handler is cancelled when its client goes away; a client's call is when its stream is dropped.
/// Errors: a failed call is a `status`; the calls that throw instead throw its error, see to_error().
/// Not its job: what is in a message; addresses, listening, TLS files (the caller gives sockets and PEM texts).
module;
#include <chrono>
#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

export module cobuild.rpc;

import cobuild.base;
import cobuild.async;

export namespace cobuild::rpc {

/// Keys in lower case; values of keys in "-bin" are raw bytes.
using metadata = std::multimap<std::string, std::string>;
/// Every value of a key, in order.
std::vector<std::string> values(const metadata& m, const std::string& key);
/// The first value, or nothing.
std::string value(const metadata& m, const std::string& key);

/// gRPC's status codes.
enum class code {
    ok = 0,
    canceled = 1,
    unknown = 2,
    invalid_argument = 3,
    deadline_exceeded = 4,
    not_found = 5,
    already_exists = 6,
    permission_denied = 7,
    resource_exhausted = 8,
    failed_precondition = 9,
    aborted = 10,
    out_of_range = 11,
    unimplemented = 12,
    internal = 13,
    unavailable = 14,
    data_loss = 15,
    unauthenticated = 16,
};

/// How a call ended. `details` is a serialized google.rpc.Status (grpc-status-details-bin), or empty.
struct status {
    rpc::code code = rpc::code::ok;
    std::string message;
    std::string details;
    [[nodiscard]] bool ok() const noexcept { return code == rpc::code::ok; }
};
status to_status(const error& e);
error to_error(const status& s);

inline constexpr std::size_t max_message = std::size_t{16} << 20;

/// PEM texts. A server with `ca` demands a client certificate signed by it; a client verifies against `ca`, or the system's.
struct tls {
    std::string certificate;
    std::string key;
    std::string ca;
    std::string server_name;  ///< clients: the name expected in the certificate; empty: the host's
};

// ---------------------------------------------------------------- serving

/// One call that a client made. Lives until its handler has returned.
class call {
public:
    virtual ~call() = default;
    [[nodiscard]] virtual const std::string& method() const noexcept = 0;
    [[nodiscard]] virtual const metadata& request() const noexcept = 0;
    /// The next message; empty when the client will send no more. One reader.
    virtual async::task<std::optional<std::string>> read() = 0;
    /// Waits until gRPC took it; throws errc::canceled when the client is gone. One writer.
    virtual async::task<void> write(std::string message) = 0;
    /// Goes out with the first write, or at once where none follows; before any write.
    virtual void set_header(metadata header) = 0;
    virtual async::task<void> send_header() = 0;
};

/// What it returns is the call's status; an exception becomes one by to_status().
using handler = std::function<async::task<status>(std::shared_ptr<call>)>;

/// Reads the one request of a unary call, answers with the one response.
async::task<status> unary(std::shared_ptr<call> c, std::function<async::task<std::string>(std::string)> answer);

class server {
public:
    server(async::executor ex, async::blocking_pool& pool, handler serve, std::optional<tls> security = {});
    /// After stop().
    ~server();
    server(const server&) = delete;
    server& operator=(const server&) = delete;

    /// Serves a connected stream socket.
    void adopt(unique_fd connection);
    /// For connections from now on. Throws errc::invalid for texts that are no certificate and key; the old ones stay then. Only of a
    /// server that was made with TLS.
    void set_security(tls fresh);
    /// A call under way.
    struct open_call {
        std::string method;
        nanoseconds age{};
    };
    /// The oldest first.
    [[nodiscard]] std::vector<open_call> open_calls() const;
    /// Takes no more connections or calls, lets those under way end within `grace`, then cancels them; waits for all.
    async::task<void> stop(nanoseconds grace);
    [[nodiscard]] std::size_t calls() const noexcept;

private:
    struct state;
    std::shared_ptr<state> state_;
};

// ---------------------------------------------------------------- calling

/// One call made. Dropping it cancels it.
class stream {
public:
    virtual ~stream() = default;
    /// The next message; empty at the end, then finish() tells why.
    virtual async::task<std::optional<std::string>> read() = 0;
    /// False when the call has ended; then finish() tells why.
    virtual async::task<bool> write(std::string message) = 0;
    /// This side sends no more.
    virtual async::task<void> writes_done() = 0;
    /// The end of the call, once; waits for it.
    virtual async::task<status> finish() = 0;
    /// What the server sent first; known after the first read, or after finish().
    [[nodiscard]] virtual metadata header() const = 0;
    virtual void cancel() = 0;
};

class channel {
public:
    /// "unix:///path" or "tcp://host:port"; connects when first used.
    static std::shared_ptr<channel> connect(async::executor ex, std::string_view address, std::optional<tls> security = {});
    /// Speaks over a connected socket, without TLS.
    static std::shared_ptr<channel> over(async::executor ex, unique_fd connection);
    virtual ~channel() = default;

    virtual std::shared_ptr<stream> open(std::string method, metadata request = {}) = 0;
    /// One request, one answer; throws the status' error.
    async::task<std::string> unary(std::string method, std::string message, metadata request = {});
};

}  // namespace cobuild::rpc

module;
#include <fcntl.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/server_posix.h>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <boost/asio/write.hpp>

#include "grpc.hpp"

module cobuild.rpc;

import :internal;

namespace cobuild::rpc {

namespace {

/// One call. gRPC's reactor posts what happened to it here; it lives from CreateReactor to OnDone, which comes only after
/// Finish, which only the end of the handler calls.
class server_call final : public call, public std::enable_shared_from_this<server_call> {
public:
    server_call(async::executor ex, grpc::GenericCallbackServerContext* context)
        : ex_(std::move(ex)), context_(context), method_(context->method()), request_(from_grpc(context->client_metadata())) {}

    /// On gRPC's thread.
    grpc::ServerGenericBidiReactor* react() {
        auto made = std::make_unique<reactor>();
        made->self = shared_from_this();
        reactor_ = made.get();
        return made.release();
    }

    [[nodiscard]] const std::string& method() const noexcept override { return method_; }
    [[nodiscard]] const metadata& request() const noexcept override { return request_; }
    [[nodiscard]] async::cancel_token cancelled() const { return gone_.token(); }

    async::task<std::optional<std::string>> read() override {
        if (!reading_) {
            reading_ = true;
            read_.begin();
            reactor_->StartRead(&incoming_);
        }
        const bool got = co_await read_.ended();
        reading_ = !got;  // after the end every read finds the end again
        if (!got) co_return std::nullopt;
        auto out = from_buffer(incoming_);
        incoming_.Clear();
        co_return out;
    }

    void set_header(metadata header) override {
        for (const auto& [key, value] : header) context_->AddInitialMetadata(key, value);
    }

    async::task<void> send_header() override {
        co_await write_.ended();
        write_.begin();
        reactor_->StartSendInitialMetadata();
        check(co_await write_.ended());
    }

    async::task<void> write(std::string message) override {
        co_await write_.ended();  // one whose writer was cancelled
        outgoing_ = to_buffer(message);
        message = {};
        write_.begin();
        reactor_->StartWrite(&outgoing_);
        check(co_await write_.ended());
    }

    /// The handler has ended.
    async::task<void> finish(status s) {
        co_await write_.ended();
        reactor_->Finish(s.ok() ? grpc::Status::OK : grpc::Status(static_cast<grpc::StatusCode>(s.code), s.message, s.details));
    }

private:
    struct reactor final : grpc::ServerGenericBidiReactor {
        std::shared_ptr<server_call> self;
        void OnReadDone(bool ok) override {
            boost::asio::post(self->ex_, [s = self, ok] { s->read_.end(ok); });
        }
        void OnWriteDone(bool ok) override {
            boost::asio::post(self->ex_, [s = self, ok] { s->write_.end(ok); });
        }
        void OnSendInitialMetadataDone(bool ok) override { OnWriteDone(ok); }
        void OnCancel() override {
            boost::asio::post(self->ex_, [s = self] { s->gone_.cancel(error{errc::canceled, "the client went away"}); });
        }
        void OnDone() override {
            auto ex = self->ex_;
            boost::asio::post(ex, [s = std::move(self)] {});
            delete this;
        }
    };

    static void check(bool ok) {
        if (!ok) throw error{errc::canceled, "the client went away"};
    }

    async::executor ex_;
    grpc::GenericCallbackServerContext* context_;
    std::string method_;
    metadata request_;
    reactor* reactor_ = nullptr;
    grpc::ByteBuffer incoming_, outgoing_;
    operation read_, write_;
    bool reading_ = false;
    async::cancel_source gone_;
};

}  // namespace

struct server::state : std::enable_shared_from_this<server::state> {
    struct service final : grpc::CallbackGenericService {
        state* owner = nullptr;
        grpc::ServerGenericBidiReactor* CreateReactor(grpc::GenericCallbackServerContext* context) override {
            auto made = std::make_shared<server_call>(owner->ex, context);
            auto* reactor = made->react();
            boost::asio::post(owner->ex, [self = owner->shared_from_this(), made] { self->running.spawn(run(self, made)); });
            return reactor;
        }
    };

    state(async::executor e, async::blocking_pool& p, handler h) : ex(e), pool(p), serve(std::move(h)), running(e, true) { methods.owner = this; }

    static async::task<void> run(std::shared_ptr<state> self, std::shared_ptr<server_call> c) {
        co_await async::no_cancel;
        status result;
        std::exception_ptr failed;
        self->open[c.get()] = std::chrono::steady_clock::now();
        try {
            result = co_await async::linked(c->cancelled(), self->serve(c));
        } catch (...) {
            failed = std::current_exception();
        }
        if (failed) result = to_status(describe(failed));
        self->open.erase(c.get());
        co_await c->finish(std::move(result));
    }

    /// TLS ends here and gRPC gets the plain bytes: its own refuses clients that offer no ALPN, as buildx does with its driver
    /// "remote".
    static async::task<void> secure(std::shared_ptr<state> self, unique_fd connection);

    async::executor ex;
    async::blocking_pool& pool;
    handler serve;
    service methods;
    std::shared_ptr<boost::asio::ssl::context> security;
    std::map<const server_call*, std::chrono::steady_clock::time_point> open;  ///< calls under way
    std::unique_ptr<grpc::Server> grpc;
    async::task_group secured{ex, true};
    async::task_group running;
    bool stopped = false;
};

namespace {

namespace ssl = boost::asio::ssl;
using plain_socket = boost::asio::local::stream_protocol::socket;
using secure_stream = ssl::stream<boost::asio::generic::stream_protocol::socket>;
constexpr auto handshake_limit = std::chrono::seconds{10};

/// h2 where the client offers protocols; one that offers none speaks it as well.
int choose_h2(SSL*, const unsigned char** out, unsigned char* size, const unsigned char* offered, unsigned length, void*) {
    static constexpr unsigned char h2[] = {2, 'h', '2'};
    unsigned char* chosen = nullptr;
    if (SSL_select_next_proto(&chosen, size, h2, sizeof h2, offered, length) != OPENSSL_NPN_NEGOTIATED) return SSL_TLSEXT_ERR_ALERT_FATAL;
    *out = chosen;
    return SSL_TLSEXT_ERR_OK;
}

std::shared_ptr<ssl::context> make_context(const tls& t) {
    auto out = std::make_shared<ssl::context>(ssl::context::tls_server);
    const auto text = [](const std::string& pem) { return boost::asio::buffer(pem); };
    try {
        out->set_options(ssl::context::no_tlsv1 | ssl::context::no_tlsv1_1);
        out->use_certificate_chain(text(t.certificate));
        out->use_private_key(text(t.key), ssl::context::pem);
        if (!t.ca.empty()) {
            out->add_certificate_authority(text(t.ca));
            out->set_verify_mode(ssl::verify_peer | ssl::verify_fail_if_no_peer_cert);
        }
    } catch (const boost::system::system_error& e) {
        throw error{errc::invalid, cat("the certificate, its key or the clients' authority cannot be used: ", e.code().message())};
    }
    ::SSL_CTX_set_alpn_select_cb(out->native_handle(), choose_h2, nullptr);
    return out;
}

async::task<void> shake_hands(std::shared_ptr<secure_stream> s) { co_await s->async_handshake(ssl::stream_base::server, async::use_task); }

template<class From, class To>
async::task<void> pass_on(std::shared_ptr<From> from, std::shared_ptr<To> to) {
    std::string buffer(std::size_t{64} << 10, '\0');
    for (;;) {
        const auto n = co_await from->async_read_some(boost::asio::buffer(buffer), async::use_task);
        co_await boost::asio::async_write(*to, boost::asio::buffer(buffer.data(), n), async::use_task);
    }
}

}  // namespace

async::task<void> server::state::secure(std::shared_ptr<state> self, unique_fd connection) {
    sockaddr_storage address{};
    socklen_t size = sizeof address;
    if (::getsockname(connection.get(), reinterpret_cast<sockaddr*>(&address), &size) != 0) co_return;
    const auto context = self->security;  // it may be replaced meanwhile
    auto stream = std::make_shared<secure_stream>(self->ex, *context);
    stream->lowest_layer().assign(boost::asio::generic::stream_protocol(address.ss_family, 0), connection.get());
    (void)connection.release();
    try {
        co_await async::with_deadline(handshake_limit, "the TLS handshake", shake_hands(stream));
    } catch (const std::exception& e) {
        log(log_level::debug, "a TLS handshake failed", {{"error", e.what()}});
        co_return;
    }
    std::array<int, 2> ends{};
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends.data()) != 0) co_return;
    auto plain = std::make_shared<plain_socket>(self->ex, boost::asio::local::stream_protocol(), ends[0]);
    grpc::AddInsecureChannelFromFd(self->grpc.get(), ends[1]);
    async::task_group both(self->ex);
    both.spawn(pass_on(stream, plain));
    both.spawn(pass_on(plain, stream));
    try {
        co_await both.join();
    } catch (const std::exception&) {
        // Either side went away.
    }
}

server::server(async::executor ex, async::blocking_pool& pool, handler serve, std::optional<tls> security)
    : state_(std::make_shared<state>(std::move(ex), pool, std::move(serve))) {
    set_up_grpc();
    grpc::ServerBuilder builder;
    builder.RegisterCallbackGenericService(&state_->methods);
    builder.SetMaxReceiveMessageSize(static_cast<int>(max_message));
    builder.SetMaxSendMessageSize(static_cast<int>(max_message));
    builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, 1024);
    // Nobody who speaks this API compresses messages; what is not unpacked cannot grow.
    for (const auto algorithm : {GRPC_COMPRESS_DEFLATE, GRPC_COMPRESS_GZIP}) builder.SetCompressionAlgorithmSupportStatus(algorithm, false);
    // Patterns of files travel as headers.
    builder.AddChannelArgument("grpc.max_metadata_size", 1 << 20);
    builder.AddChannelArgument("grpc.absolute_max_metadata_size", 1 << 20);
    // Go's clients ping as they like, and would be cut off.
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 1000);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    if (security) state_->security = make_context(*security);
    state_->grpc = builder.BuildAndStart();
    if (!state_->grpc) throw error{errc::internal, "the gRPC server did not start"};
}

server::~server() = default;

void server::adopt(unique_fd connection) {
    const int flags = ::fcntl(connection.get(), F_GETFL);
    if (flags < 0 || ::fcntl(connection.get(), F_SETFL, flags | O_NONBLOCK) < 0) throw_errno("taking over a connection");
    if (state_->security)
        state_->secured.spawn(state::secure(state_, std::move(connection)));
    else
        grpc::AddInsecureChannelFromFd(state_->grpc.get(), connection.release());
}

void server::set_security(tls fresh) {
    if (!state_->security) throw error{errc::internal, "a server without TLS was given certificates"};
    state_->security = make_context(fresh);
}

std::vector<server::open_call> server::open_calls() const {
    const auto now = std::chrono::steady_clock::now();
    std::vector<open_call> out;
    for (const auto& [call, since] : state_->open) out.push_back({call->method(), std::chrono::duration_cast<nanoseconds>(now - since)});
    std::sort(out.begin(), out.end(), [](const auto& a, const auto& b) { return a.age > b.age; });
    return out;
}

async::task<void> server::stop(nanoseconds grace) {
    auto s = state_;
    if (std::exchange(s->stopped, true)) co_return;
    co_await async::no_cancel;
    co_await s->pool.run([s, grace] {
        s->grpc->Shutdown(std::chrono::system_clock::now() + std::chrono::duration_cast<std::chrono::microseconds>(grace));
        s->grpc->Wait();
    });
    co_await s->running.join();
    s->secured.cancel();
    try {
        co_await s->secured.join();
    } catch (const std::exception&) {
        // Connections that were cut.
    }
}

std::size_t server::calls() const noexcept { return state_->running.running(); }

}  // namespace cobuild::rpc

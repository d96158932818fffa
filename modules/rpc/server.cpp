module;
#include <fcntl.h>

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/server_posix.h>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/post.hpp>

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
        try {
            result = co_await async::linked(c->cancelled(), self->serve(c));
        } catch (...) {
            failed = std::current_exception();
        }
        if (failed) result = to_status(describe(failed));
        co_await c->finish(std::move(result));
    }

    async::executor ex;
    async::blocking_pool& pool;
    handler serve;
    service methods;
    std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> acceptor;
    std::unique_ptr<grpc::Server> grpc;
    async::task_group running;
    bool stopped = false;
};

server::server(async::executor ex, async::blocking_pool& pool, handler serve, std::optional<tls> security)
    : state_(std::make_shared<state>(std::move(ex), pool, std::move(serve))) {
    set_up_grpc();
    grpc::ServerBuilder builder;
    builder.RegisterCallbackGenericService(&state_->methods);
    builder.SetMaxReceiveMessageSize(static_cast<int>(max_message));
    builder.SetMaxSendMessageSize(static_cast<int>(max_message));
    builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, 1024);
    // Patterns of files travel as headers.
    builder.AddChannelArgument("grpc.max_metadata_size", 1 << 20);
    builder.AddChannelArgument("grpc.absolute_max_metadata_size", 1 << 20);
    // Go's clients ping as they like, and would be cut off.
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 1000);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    if (security) {
        grpc::SslServerCredentialsOptions options(security->ca.empty() ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                                                                       : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
        options.pem_root_certs = security->ca;
        options.pem_key_cert_pairs.push_back({security->key, security->certificate});
        state_->acceptor = builder.experimental().AddExternalConnectionAcceptor(
            grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD, grpc::SslServerCredentials(options));
    }
    state_->grpc = builder.BuildAndStart();
    if (!state_->grpc) throw error{errc::internal, "the gRPC server did not start"};
}

server::~server() = default;

void server::adopt(unique_fd connection) {
    const int flags = ::fcntl(connection.get(), F_GETFL);
    if (flags < 0 || ::fcntl(connection.get(), F_SETFL, flags | O_NONBLOCK) < 0) throw_errno("taking over a connection");
    if (!state_->acceptor) {
        grpc::AddInsecureChannelFromFd(state_->grpc.get(), connection.release());
        return;
    }
    grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters p;
    p.fd = connection.release();
    state_->acceptor->HandleNewConnection(&p);
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
}

std::size_t server::calls() const noexcept { return state_->running.running(); }

}  // namespace cobuild::rpc

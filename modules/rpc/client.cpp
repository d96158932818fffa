module;
#include <fcntl.h>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include <grpcpp/create_channel_posix.h>
#include <grpcpp/generic/generic_stub.h>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/post.hpp>

#include "grpc.hpp"

module cobuild.rpc;

import :internal;

namespace cobuild::rpc {

namespace {

/// What gRPC works with until OnDone, which comes once the hold is gone and nothing is under way. It keeps itself alive.
struct client_call final : grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
    client_call(async::executor e, std::shared_ptr<grpc::Channel> c) : ex(std::move(e)), channel(std::move(c)), stub(channel) {}

    void OnReadDone(bool ok) override {
        boost::asio::post(ex, [s = self, ok] { s->read.end(ok); });
    }
    void OnWriteDone(bool ok) override {
        boost::asio::post(ex, [s = self, ok] { s->write.end(ok); });
    }
    void OnWritesDoneDone(bool ok) override { OnWriteDone(ok); }
    void OnDone(const grpc::Status& status) override {
        boost::asio::post(ex, [s = std::move(self), status] {
            s->result = {static_cast<rpc::code>(status.error_code()), status.error_message(), status.error_details()};
            s->header = from_grpc(s->context.GetServerInitialMetadata());
            s->done.set();
        });
    }

    async::executor ex;
    std::shared_ptr<grpc::Channel> channel;
    grpc::GenericStub stub;
    grpc::ClientContext context;
    std::shared_ptr<client_call> self;
    grpc::ByteBuffer incoming, outgoing;
    operation read, write;
    async::event done;
    status result;
    metadata header;
    bool held = true;

    void let_go() {
        if (std::exchange(held, false)) RemoveHold();
    }
};

class client_stream final : public stream {
public:
    client_stream(async::executor ex, std::shared_ptr<grpc::Channel> channel, const std::string& method, const metadata& request)
        : call_(std::make_shared<client_call>(std::move(ex), std::move(channel))) {
        for (const auto& [key, value] : request) call_->context.AddMetadata(key, value);
        call_->self = call_;
        call_->stub.PrepareBidiStreamingCall(&call_->context, method, {}, call_.get());
        call_->AddHold();
        call_->StartCall();
    }
    ~client_stream() override {
        if (!call_->done.is_set()) call_->context.TryCancel();
        call_->let_go();
    }

    async::task<std::optional<std::string>> read() override {
        const auto c = call_;
        if (!reading_) {
            reading_ = true;
            c->read.begin();
            c->StartRead(&c->incoming);
        }
        const bool got = co_await c->read.ended();
        reading_ = !got;
        if (!got) co_return std::nullopt;
        if (c->header.empty()) c->header = from_grpc(c->context.GetServerInitialMetadata());
        auto out = from_buffer(c->incoming);
        c->incoming.Clear();
        co_return out;
    }

    async::task<bool> write(std::string message) override {
        const auto c = call_;
        if (!co_await c->write.ended()) co_return false;
        c->outgoing = to_buffer(message);
        message = {};
        c->write.begin();
        c->StartWrite(&c->outgoing);
        co_return co_await c->write.ended();
    }

    async::task<void> writes_done() override {
        const auto c = call_;
        if (!co_await c->write.ended()) co_return;
        c->write.begin();
        c->StartWritesDone();
        co_await c->write.ended();
    }

    async::task<status> finish() override {
        const auto c = call_;
        c->let_go();
        co_await c->done.wait();
        co_return c->result;
    }

    [[nodiscard]] metadata header() const override { return call_->header; }
    void cancel() override { call_->context.TryCancel(); }

private:
    std::shared_ptr<client_call> call_;
    bool reading_ = false;
};

class client_channel final : public channel {
public:
    client_channel(async::executor ex, std::shared_ptr<grpc::Channel> channel) : ex_(std::move(ex)), channel_(std::move(channel)) {}
    std::shared_ptr<stream> open(std::string method, metadata request) override {
        return std::make_shared<client_stream>(ex_, channel_, method, request);
    }

private:
    async::executor ex_;
    std::shared_ptr<grpc::Channel> channel_;
};

constexpr int max_headers = 1 << 20;

grpc::ChannelArguments arguments() {
    grpc::ChannelArguments out;
    out.SetMaxReceiveMessageSize(static_cast<int>(max_message));
    out.SetMaxSendMessageSize(static_cast<int>(max_message));
    // A Go server resets a call whose trailers are over our limit, and BuildKit's errors bring their stack traces along.
    out.SetInt("grpc.max_metadata_size", max_headers);
    out.SetInt("grpc.absolute_max_metadata_size", max_headers);
    out.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    out.SetInt(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1);
    return out;
}

}  // namespace

std::shared_ptr<channel> channel::connect(async::executor ex, std::string_view address, std::optional<tls> security) {
    set_up_grpc();
    static constexpr std::string_view unix_scheme = "unix://", tcp_scheme = "tcp://";
    std::string target;
    if (address.starts_with(unix_scheme))
        target = cat("unix:", address.substr(unix_scheme.size()));
    else if (address.starts_with(tcp_scheme))
        target = cat("dns:", address.substr(tcp_scheme.size()));
    else
        throw error{errc::invalid, cat("the address ", quoted(address), " is neither unix:///path nor tcp://host:port")};
    auto args = arguments();
    std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
    if (security) {
        credentials =
            grpc::SslCredentials({.pem_root_certs = security->ca, .pem_private_key = security->key, .pem_cert_chain = security->certificate});
        if (!security->server_name.empty()) args.SetSslTargetNameOverride(security->server_name);
    }
    return std::make_shared<client_channel>(std::move(ex), grpc::CreateCustomChannel(target, credentials, args));
}

std::shared_ptr<channel> channel::over(async::executor ex, unique_fd connection) {
    set_up_grpc();
    const int flags = ::fcntl(connection.get(), F_GETFL);
    if (flags < 0 || ::fcntl(connection.get(), F_SETFL, flags | O_NONBLOCK) < 0) throw_errno("taking over a connection");
    return std::make_shared<client_channel>(std::move(ex), grpc::CreateCustomInsecureChannelFromFd("session", connection.release(), arguments()));
}

async::task<std::string> channel::unary(std::string method, std::string message, metadata request) {
    auto s = open(std::move(method), std::move(request));
    if (co_await s->write(std::move(message))) co_await s->writes_done();
    auto answer = co_await s->read();
    auto end = co_await s->finish();
    if (!end.ok()) throw to_error(end);
    if (!answer) throw error{errc::corrupt, "the peer answered nothing"};
    co_return std::move(*answer);
}

}  // namespace cobuild::rpc

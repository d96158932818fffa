module;
#include <sys/socket.h>

#include <array>
#include <chrono>
#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/write.hpp>

#include "control.pb.h"
#include "session.pb.h"

module cobuild.client;

import cobuild.base;
import cobuild.async;
import cobuild.rpc;
import :internal;

namespace cobuild::client {

namespace {

namespace asio = boost::asio;
using socket_ptr = std::shared_ptr<asio::local::stream_protocol::socket>;

constexpr std::string_view health = "/grpc.health.v1.Health/Check";
constexpr std::string_view get_secret = "/moby.buildkit.secrets.v1.Secrets/GetSecret";
constexpr std::string_view credentials = "/moby.filesync.v1.Auth/Credentials";
constexpr std::string_view check_agent = "/moby.sshforward.v1.SSH/CheckAgent";
constexpr std::string_view forward_agent = "/moby.sshforward.v1.SSH/ForwardAgent";
constexpr std::string_view pull = "/moby.upload.v1.Upload/Pull";
constexpr std::string_view send_files = "/moby.filesync.v1.FileSync/DiffCopy";
constexpr std::string_view take_files = "/moby.filesync.v1.FileSend/DiffCopy";
constexpr std::string_view blob_info = "/containerd.services.content.v1.Content/Info";
constexpr std::string_view blob_write = "/containerd.services.content.v1.Content/Write";
constexpr std::string_view blob_read = "/containerd.services.content.v1.Content/Read";

async::task<std::string> healthy(std::string) {
    moby::session::HealthCheckResponse answer;
    answer.set_status(moby::session::HealthCheckResponse::SERVING);
    co_return answer.SerializeAsString();
}

async::task<rpc::status> serve(lent what, async::blocking_pool& pool, call_ptr c) {
    const auto& m = c->method();
    if (m == health) return rpc::unary(c, healthy);
    if (m == get_secret) return serve_secret(what, pool, c);
    if (m == credentials) return serve_login(what, c);
    if (m == check_agent) return serve_agent_check(what, c);
    if (m == forward_agent) return serve_agent(what, c);
    if (m == pull) return serve_upload(what, c);
    if (m == send_files) return serve_directory(what, pool, c);
    if (m == take_files) return serve_target(what, pool, c);
    if (m == blob_info) return serve_blob_info(what, pool, c);
    if (m == blob_read) return serve_blob(what, pool, c);
    if (m == blob_write) return serve_blob_write(what, pool, c);
    return [](call_ptr unknown) -> async::task<rpc::status> {
        co_return rpc::status{rpc::code::unimplemented, cat("this client does not serve ", unknown->method()), {}};
    }(c);
}

async::task<void> from_socket(socket_ptr s, std::shared_ptr<rpc::stream> to) {
    std::array<char, 32768> buffer;  // what a Go peer takes in one frame
    for (;;) {
        boost::system::error_code ec;
        const auto n = co_await s->async_read_some(asio::buffer(buffer), asio::redirect_error(async::use_task, ec));
        if (ec == asio::error::operation_aborted) throw boost::system::system_error(ec);
        if (ec || n == 0) break;
        moby::buildkit::v1::BytesMessage m;
        m.set_data(buffer.data(), n);
        if (!co_await to->write(m.SerializeAsString())) co_return;
    }
    co_await to->writes_done();
}

async::task<void> to_socket(std::shared_ptr<rpc::stream> from, socket_ptr s) {
    while (auto m = co_await from->read()) {
        const auto data = decode<moby::buildkit::v1::BytesMessage>(*m);
        boost::system::error_code ec;
        co_await asio::async_write(*s, asio::buffer(data.data()), asio::redirect_error(async::use_task, ec));
        if (ec == asio::error::operation_aborted) throw boost::system::system_error(ec);
        if (ec) break;
    }
    const auto end = co_await from->finish();
    if (!end.ok() && end.code != rpc::code::canceled) throw rpc::to_error(end).with("the session with the daemon ended");
}

}  // namespace

session::session(async::executor ex, async::blocking_pool& pool, session_options options)
    : state_(std::make_shared<state>(state{std::move(ex), pool, std::move(options), random_id()})) {}
session::~session() = default;

const std::string& session::id() const noexcept { return state_->id; }

std::vector<std::string> session::methods() const {
    const auto& o = state_->options;
    std::vector<std::string> out{std::string(health), std::string(credentials)};
    if (!o.secrets.empty()) out.emplace_back(get_secret);
    if (!o.ssh_agents.empty()) out.insert(out.end(), {std::string(check_agent), std::string(forward_agent)});
    if (!o.directories.empty()) out.emplace_back(send_files);
    if (!o.targets.empty()) out.emplace_back(take_files);
    if (!o.oci_layouts.empty() || !o.stores.empty()) out.insert(out.end(), {std::string(blob_info), std::string(blob_read)});
    if (!o.stores.empty()) out.emplace_back(blob_write);
    if (!o.uploads.empty()) out.emplace_back(pull);
    return out;
}

rpc::handler session::handler() const {
    return [s = state_](call_ptr c) { return serve(lent(s, &s->options), s->pool, std::move(c)); };
}

async::task<void> session::run(channel_ptr to) {
    const auto s = state_;
    std::array<int, 2> ends{};
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) != 0) throw_errno("opening the session's pipe");
    unique_fd ours{ends[0]}, theirs{ends[1]};
    rpc::server server(s->ex, s->pool, handler());
    const auto pipe = std::make_shared<asio::local::stream_protocol::socket>(s->ex, asio::local::stream_protocol(), theirs.release());
    server.adopt(std::move(ours));
    rpc::metadata headers{{"x-docker-expose-session-uuid", s->id}, {"x-docker-expose-session-name", ""}, {"x-docker-expose-session-sharedkey", ""}};
    for (auto& m : methods()) headers.emplace("x-docker-expose-session-grpc-method", std::move(m));
    auto stream = to->open("/moby.buildkit.v1.Control/Session", std::move(headers));
    std::exception_ptr failed;
    {
        async::task_group pumps(s->ex, true);
        pumps.spawn(from_socket(pipe, stream));
        try {
            co_await to_socket(stream, pipe);
        } catch (...) {
            failed = std::current_exception();
        }
        co_await async::no_cancel;
        boost::system::error_code ignored;
        pipe->close(ignored);
        stream->cancel();
        pumps.cancel();
        try {
            co_await pumps.join();
        } catch (...) {
            // The way out fails when the way in has ended; that one's reason counts.
        }
    }
    co_await server.stop(nanoseconds{0});
    if (failed) std::rethrow_exception(failed);
}

}  // namespace cobuild::client

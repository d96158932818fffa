module;
#include <sys/stat.h>

#include <array>
#include <cstdlib>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fcntl.h>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/write.hpp>

#include "session.pb.h"

module cobuild.client;

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import cobuild.rpc;
import :internal;

namespace cobuild::client {

namespace {

namespace asio = boost::asio;
namespace api = moby::session;
using socket_ptr = std::shared_ptr<asio::local::stream_protocol::socket>;

constexpr std::size_t max_secret = 500 * 1024;

// ---------------------------------------------------------------- secrets

async::task<std::string> give_secret(lent what, async::blocking_pool& pool, std::string request) {
    const auto id = decode<api::GetSecretRequest>(request).id();
    const auto found = what->secrets.find(id);
    if (found == what->secrets.end()) throw error{errc::not_found, cat("secret ", id, ": not found")};
    const auto source = found->second;
    std::string bytes;
    if (source.file.empty()) {
        const char* value = std::getenv(source.environment.c_str());
        if (value == nullptr) throw error{errc::not_found, cat("secret ", id, ": the environment variable ", source.environment, " is not set")};
        bytes = value;
    } else {
        bytes = co_await pool.run([file = source.file.string()] {
            const unique_fd fd{::open(file.c_str(), O_RDONLY | O_CLOEXEC)};
            if (!fd) throw_errno(cat("reading the secret ", file));
            return fs::read_all(fd.get(), max_secret + 1);
        });
    }
    if (bytes.size() > max_secret) throw error{errc::invalid, cat("secret ", id, " is larger than 500 KiB")};
    api::GetSecretResponse answer;
    answer.set_data(std::move(bytes));
    co_return answer.SerializeAsString();
}

// ---------------------------------------------------------------- logins

async::task<std::string> give_login(lent what, std::string request) {
    const auto host = decode<api::CredentialsRequest>(request).host();
    api::CredentialsResponse answer;
    if (what->logins)
        if (const auto found = co_await what->logins(host)) {
            answer.set_username(found->username);
            answer.set_secret(found->secret);
        }
    co_return answer.SerializeAsString();
}

// ---------------------------------------------------------------- ssh agents

std::string agent_of(const session_options& what, std::string id) {
    if (id.empty()) id = "default";
    const auto found = what.ssh_agents.find(id);
    if (found == what.ssh_agents.end()) throw error{errc::not_found, cat("unset ssh forward key ", id)};
    return found->second;
}

async::task<std::string> check(lent what, std::string request) {
    agent_of(*what, decode<api::CheckAgentRequest>(request).id());
    co_return std::string();
}

async::task<void> to_agent(call_ptr c, socket_ptr agent) {
    while (auto m = co_await c->read()) {
        const auto data = decode<api::BytesMessage>(*m);
        co_await asio::async_write(*agent, asio::buffer(data.data()), async::use_task);
    }
    boost::system::error_code ignored;
    agent->shutdown(asio::socket_base::shutdown_send, ignored);
}

async::task<void> from_agent(socket_ptr agent, call_ptr c) {
    std::array<char, 32768> buffer;
    for (;;) {
        boost::system::error_code ec;
        const auto n = co_await agent->async_read_some(asio::buffer(buffer), asio::redirect_error(async::use_task, ec));
        if (ec == asio::error::operation_aborted) throw boost::system::system_error(ec);
        if (ec || n == 0) co_return;
        api::BytesMessage m;
        m.set_data(buffer.data(), n);
        co_await c->write(m.SerializeAsString());
    }
}

}  // namespace

async::task<rpc::status> serve_secret(lent what, async::blocking_pool& pool, call_ptr c) {
    co_return co_await rpc::unary(c, [what, &pool](std::string request) { return give_secret(what, pool, std::move(request)); });
}

async::task<rpc::status> serve_login(lent what, call_ptr c) {
    co_return co_await rpc::unary(c, [what](std::string request) { return give_login(what, std::move(request)); });
}

async::task<rpc::status> serve_agent_check(lent what, call_ptr c) {
    co_return co_await rpc::unary(c, [what](std::string request) { return check(what, std::move(request)); });
}

async::task<rpc::status> serve_agent(lent what, call_ptr c) {
    const auto path = agent_of(*what, rpc::value(c->request(), "buildkit.ssh.id"));
    const auto ex = co_await async::current_executor;
    const auto agent = std::make_shared<asio::local::stream_protocol::socket>(ex);
    boost::system::error_code ec;
    co_await agent->async_connect(asio::local::stream_protocol::endpoint(path), asio::redirect_error(async::use_task, ec));
    if (ec) throw error{errc::unavailable, cat("cannot reach the ssh agent at ", path, ": ", ec.message())};
    async::task_group ways(ex, true);
    ways.spawn(to_agent(c, agent));
    std::exception_ptr failed;
    try {
        co_await from_agent(agent, c);
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::no_cancel;
    // The agent has closed: what the daemon still says has no reader.
    ways.cancel();
    try {
        co_await ways.join();
    } catch (...) {
    }
    if (failed) std::rethrow_exception(failed);
    co_return rpc::status{};
}

async::task<rpc::status> serve_upload(lent what, call_ptr c) {
    const auto path = rpc::value(c->request(), "urlpath");
    const auto found = what->uploads.find(path);
    if (found == what->uploads.end()) throw error{errc::not_found, cat("this client uploads nothing named ", quoted(path))};
    for (std::size_t at = 0; at < found->second.size(); at += std::size_t{1} << 20) {
        api::BytesMessage m;
        m.set_data(found->second.substr(at, std::size_t{1} << 20));
        co_await c->write(m.SerializeAsString());
    }
    co_return rpc::status{};
}

}  // namespace cobuild::client

module;
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/write.hpp>

#include "control.pb.h"
#include "session.pb.h"

module cobuild.daemon;

import :internal;

namespace cobuild::daemon {

namespace {

using namespace std::chrono_literals;
using byte_socket = boost::asio::local::stream_protocol::socket;

constexpr std::string_view header_id = "x-docker-expose-session-uuid", header_name = "x-docker-expose-session-name",
                           header_key = "x-docker-expose-session-sharedkey", header_method = "x-docker-expose-session-grpc-method",
                           header_health = "x-buildkit-session-health-custom-timeout";
constexpr std::size_t frame = std::size_t{32} << 10;

/// What the client sends goes into the tunnel's socket.
async::task<void> pump_in(std::shared_ptr<rpc::call> from, std::shared_ptr<byte_socket> to) {
    while (auto message = co_await from->read()) {
        moby::buildkit::v1::BytesMessage m;
        if (!m.ParseFromString(*message)) throw error{errc::invalid, "a frame of the session is no message"};
        co_await boost::asio::async_write(*to, boost::asio::buffer(m.data()), async::use_task);
    }
    throw error{errc::canceled, "the client closed its session"};
}

async::task<void> pump_out(std::shared_ptr<byte_socket> from, std::shared_ptr<rpc::call> to) {
    std::string buffer(frame, '\0');
    for (;;) {
        const auto n = co_await from->async_read_some(boost::asio::buffer(buffer), async::use_task);
        moby::buildkit::v1::BytesMessage m;
        m.set_data(buffer.data(), n);
        co_await to->write(m.SerializeAsString());
    }
}

async::task<void> check_once(std::shared_ptr<tunnel> t) {
    moby::session::HealthCheckRequest q;
    (void)co_await t->channel->unary("/grpc.health.v1.Health/Check", q.SerializeAsString());
}

/// How a client is asked whether it is still there; it may want to be asked more often, and then has one chance.
struct health {
    nanoseconds every = 5s, limit = 15s;
    int failures = 2;
};
health health_for(const rpc::metadata& request) {
    const auto text = rpc::value(request, std::string(header_health));
    std::int64_t ms = 0;
    const auto [end, bad] = std::from_chars(text.data(), text.data() + text.size(), ms);
    if (bad != std::errc{} || end != text.data() + text.size() || ms <= 0) return {};
    const nanoseconds wanted = std::clamp<nanoseconds>(std::chrono::milliseconds{std::min<std::int64_t>(ms, 60'000)}, 1s, 60s);
    return {.every = wanted, .limit = wanted, .failures = 1};
}

/// Ends, with the reason, when the client does not answer.
async::task<void> watch(std::shared_ptr<tunnel> t, health how) {
    int failures = 0;
    auto limit = how.limit;
    while (failures < how.failures) {
        co_await async::sleep_for(how.every);
        const auto begun = std::chrono::steady_clock::now();
        bool answered = false;
        try {
            co_await async::with_deadline(limit, "the health check", check_once(t));
            answered = true;
        } catch (const std::exception& e) {
            log(log_level::debug, "a session's health check failed", {{"session", t->id}, {"error", e.what()}});
        }
        failures = answered ? 0 : failures + 1;
        limit = std::max(how.limit, nanoseconds{(std::chrono::steady_clock::now() - begun) * 3 / 2});
    }
    throw error{errc::timed_out, "the client of the session does not answer"};
}

}  // namespace

namespace {

class call_packets final : public filesync::packet_stream {
public:
    explicit call_packets(std::shared_ptr<rpc::stream> s) : s_(std::move(s)) {}
    async::task<std::optional<std::string>> read() override { return s_->read(); }
    async::task<void> write(std::string message) override {
        if (co_await s_->write(std::move(message))) co_return;
        const auto end = co_await s_->finish();
        throw end.ok() ? error{errc::canceled, "the client ended the transfer"} : rpc::to_error(end);
    }

private:
    std::shared_ptr<rpc::stream> s_;
};

}  // namespace

std::shared_ptr<filesync::packet_stream> packets_over(std::shared_ptr<rpc::stream> s) { return std::make_shared<call_packets>(std::move(s)); }

bool tunnel::offers(std::string_view method) const { return methods.contains(to_lower(method)); }

async::task<rpc::status> sessions::serve(std::shared_ptr<rpc::call> c) {
    auto t = std::make_shared<tunnel>();
    t->id = rpc::value(c->request(), std::string(header_id));
    t->name = rpc::value(c->request(), std::string(header_name));
    t->shared_key = rpc::value(c->request(), std::string(header_key));
    for (const auto& m : rpc::values(c->request(), std::string(header_method))) t->methods.insert(to_lower(m));
    if (t->id.empty()) throw error{errc::invalid, "the session has no id"};
    if (open_.contains(t->id)) throw error{errc::exists, cat("there is a session ", t->id, " already")};

    std::array<int, 2> ends{};
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends.data()) != 0) throw_errno("making a session's socket");
    unique_fd ours{ends[0]}, grpcs{ends[1]};
    auto socket = std::make_shared<byte_socket>(ex_);
    socket->assign(boost::asio::local::stream_protocol(), ours.get());
    (void)ours.release();
    t->channel = rpc::channel::over(ex_, std::move(grpcs));
    open_[t->id] = t;
    if (const auto waiting = awaited_.extract(t->id); !waiting.empty()) waiting.mapped()->set();

    async::task_group group(ex_);
    group.spawn(pump_in(c, socket));
    group.spawn(pump_out(socket, c));
    group.spawn(watch(t, health_for(c->request())));
    std::exception_ptr failed;
    try {
        co_await c->send_header();
        co_await group.join();
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::no_cancel;
    group.cancel();
    try {
        co_await group.join();
    } catch (const std::exception&) {
        // The first reason counts.
    }
    open_.erase(t->id);
    const auto why = describe(failed);
    t->closed.cancel(error{errc::canceled, cat("the client's session ended: ", why.what())});
    boost::system::error_code ignored;
    socket->close(ignored);
    // The channel stays as long as the tunnel: a build that has not seen yet that it is cancelled may call once more, and fails.
    co_return why.kind() == errc::canceled ? rpc::status{} : rpc::to_status(why);
}

async::task<std::shared_ptr<tunnel>> sessions::get(std::string id, nanoseconds limit) {
    if (const auto colon = id.find(':'); colon != std::string::npos && colon + 1 < id.size()) id = id.substr(colon + 1);
    if (const auto at = open_.find(id); at != open_.end()) co_return at->second;
    auto& event = awaited_[id];
    if (!event) event = std::make_shared<async::event>();
    const auto appears = event;
    bool late = false;
    try {
        co_await async::with_deadline(limit, "waiting for the session", appears->wait());
    } catch (const error& e) {
        if (e.kind() != errc::timed_out) throw;
        late = true;
    }
    const auto at = open_.find(id);
    if (late) awaited_.erase(id);
    if (at == open_.end()) throw error{errc::not_found, cat("no active session for ", id)};
    co_return at->second;
}

}  // namespace cobuild::daemon

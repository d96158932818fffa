// The client's end of a session. Stands after served.hpp and <array>, <sys/socket.h>, Asio's local sockets and write.
#pragma once

namespace cobuild::test {

/// The client's end of a session: what it serves is a handler.
class client_session {
public:
    client_session(served& s, std::string id, std::vector<std::string> methods, rpc::handler serve, rpc::metadata more = {})
        : ex_(s.engine->runtime().get_executor()), socket_(std::make_shared<boost::asio::local::stream_protocol::socket>(ex_)), group_(ex_, true) {
        std::array<int, 2> ends{};
        BOOST_REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends.data()) == 0);
        socket_->assign(boost::asio::local::stream_protocol(), ends[0]);
        server_ = std::make_unique<rpc::server>(ex_, s.engine->runtime().pool(), std::move(serve));
        server_->adopt(unique_fd{ends[1]});
        rpc::metadata m{{"x-docker-expose-session-uuid", std::move(id)}, {"x-docker-expose-session-sharedkey", "key"}};
        m.insert(more.begin(), more.end());
        for (auto& method : methods) m.emplace("x-docker-expose-session-grpc-method", std::move(method));
        stream_ = s.channel->open(cat(control, "Session"), std::move(m));
        group_.spawn(up(socket_, stream_));
        group_.spawn(down(socket_, stream_));
    }
    async::task<void> close() {
        co_await async::no_cancel;
        stream_->cancel();
        group_.cancel();
        try {
            co_await group_.join();
        } catch (const std::exception&) {
        }
        boost::system::error_code ignored;
        socket_->close(ignored);
        co_await server_->stop(std::chrono::seconds(0));
    }

private:
    using socket = boost::asio::local::stream_protocol::socket;
    static async::task<void> up(std::shared_ptr<socket> from, std::shared_ptr<rpc::stream> to) {
        std::string buffer(32768, '\0');
        for (;;) {
            const auto n = co_await from->async_read_some(boost::asio::buffer(buffer), async::use_task);
            wire::BytesMessage m;
            m.set_data(buffer.data(), n);
            if (!co_await to->write(m.SerializeAsString())) co_return;
        }
    }
    static async::task<void> down(std::shared_ptr<socket> to, std::shared_ptr<rpc::stream> from) {
        while (const auto bytes = co_await from->read()) {
            wire::BytesMessage m;
            m.ParseFromString(*bytes);
            co_await boost::asio::async_write(*to, boost::asio::buffer(m.data()), async::use_task);
        }
    }
    async::executor ex_;
    std::shared_ptr<socket> socket_;
    std::shared_ptr<rpc::stream> stream_;
    std::unique_ptr<rpc::server> server_;
    async::task_group group_;
};

}  // namespace cobuild::test

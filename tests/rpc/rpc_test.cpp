#include "support/support.hpp"

#include "support/certs.hpp"

#include <sys/socket.h>

#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/ip/tcp.hpp>

import cobuild.base;
import cobuild.async;
import cobuild.rpc;

#include "support/failure.hpp"

using namespace cobuild;
using cobuild::test::failure;
namespace test = cobuild::test;

using namespace std::chrono_literals;

namespace {

std::pair<unique_fd, unique_fd> socket_pair() {
    int fds[2];
    BOOST_REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
    return {unique_fd{fds[0]}, unique_fd{fds[1]}};
}

/// A server and a channel to it.
struct peers {
    rpc::server server;
    std::shared_ptr<rpc::channel> channel;
    peers(async::runtime& rt, rpc::handler serve) : server(rt.get_executor(), rt.pool(), std::move(serve)) {
        auto [a, b] = socket_pair();
        server.adopt(std::move(a));
        channel = rpc::channel::over(rt.get_executor(), std::move(b));
    }
};

async::task<std::string> shout(std::string text) { co_return text + "!"; }

async::task<rpc::status> echo(std::shared_ptr<rpc::call> c) {
    if (c->method() == "/test/Unary") co_return co_await rpc::unary(c, shout);
    if (c->method() == "/test/Refuse") co_return rpc::status{rpc::code::permission_denied, "not you", "\x08\x07"};
    if (c->method() == "/test/Throw") throw error{errc::not_found, "no such thing"};
    if (c->method() == "/test/Echo") {
        c->set_header({{"greeting", rpc::value(c->request(), "name")}});
        while (auto m = co_await c->read()) co_await c->write(std::move(*m));
        co_return rpc::status{};
    }
    co_return rpc::status{rpc::code::unimplemented, cat(c->method(), " is not known"), {}};
}

}  // namespace

CO_TEST_CASE(a_unary_call_gives_its_answer) {
    peers p(rt, echo);
    BOOST_TEST(co_await p.channel->unary("/test/Unary", "hear") == "hear!");
    BOOST_TEST(co_await p.channel->unary("/test/Unary", "") == "!");
    co_await p.server.stop(1s);
}

CO_TEST_CASE(a_failed_call_says_why) {
    peers p(rt, echo);
    auto s = p.channel->open("/test/Refuse");
    BOOST_TEST(!(co_await s->read()).has_value());
    const auto end = co_await s->finish();
    BOOST_TEST(static_cast<int>(end.code) == 7);
    BOOST_TEST(end.message == "not you");
    BOOST_TEST(end.details == "\x08\x07");
    const auto thrown = co_await failure(p.channel->unary("/test/Throw", "x"));
    BOOST_TEST((thrown.kind() == errc::not_found));
    BOOST_TEST(std::string(thrown.what()) == "no such thing");
    const auto unknown = co_await failure(p.channel->unary("/other/Method", "x"));
    BOOST_TEST((unknown.kind() == errc::unsupported));
    co_await p.server.stop(1s);
}

CO_TEST_CASE(a_stream_carries_metadata_and_large_messages_both_ways) {
    peers p(rt, echo);
    auto s = p.channel->open("/test/Echo", {{"name", "cobuild"}});
    std::string large(std::size_t{15} << 20, 'x');
    for (const std::string& m : {std::string("one"), std::string(), large}) {
        BOOST_TEST(co_await s->write(m));
        const auto back = co_await s->read();
        BOOST_REQUIRE(back.has_value());
        BOOST_TEST((*back == m));
    }
    BOOST_TEST(rpc::value(s->header(), "greeting") == "cobuild");
    co_await s->writes_done();
    BOOST_TEST(!(co_await s->read()).has_value());
    BOOST_TEST((co_await s->finish()).ok());
    co_await p.server.stop(1s);
}

CO_TEST_CASE(a_message_over_the_limit_is_refused) {
    peers p(rt, echo);
    const auto thrown = co_await failure(p.channel->unary("/test/Unary", std::string((std::size_t{16} << 20) + 1, 'x')));
    BOOST_TEST((thrown.kind() == errc::no_space));
    co_await p.server.stop(1s);
}

namespace {
struct watched {
    async::event started, ended;
};
async::task<rpc::status> wait_for_the_end(std::shared_ptr<watched> w, std::shared_ptr<rpc::call> c) {
    w->started.set();
    std::exception_ptr failed;
    try {
        async::event never;
        co_await never.wait();
    } catch (...) {
        failed = std::current_exception();
    }
    w->ended.set();
    if (failed) std::rethrow_exception(failed);
    co_return rpc::status{};
}
}  // namespace

CO_TEST_CASE(dropping_a_stream_cancels_its_handler) {
    auto w = std::make_shared<watched>();
    peers p(rt, [w](std::shared_ptr<rpc::call> c) { return wait_for_the_end(w, std::move(c)); });
    {
        auto s = p.channel->open("/test/Wait");
        co_await w->started.wait();
    }
    co_await w->ended.wait();
    co_await p.server.stop(1s);
}

CO_TEST_CASE(a_vanished_connection_cancels_its_handlers) {
    auto w = std::make_shared<watched>();
    peers p(rt, [w](std::shared_ptr<rpc::call> c) { return wait_for_the_end(w, std::move(c)); });
    auto s = p.channel->open("/test/Wait");
    co_await w->started.wait();
    s.reset();
    p.channel.reset();
    co_await w->ended.wait();
    co_await p.server.stop(1s);
}

CO_TEST_CASE(stopping_ends_calls_after_the_grace) {
    auto w = std::make_shared<watched>();
    peers p(rt, [w](std::shared_ptr<rpc::call> c) { return wait_for_the_end(w, std::move(c)); });
    auto s = p.channel->open("/test/Wait");
    co_await w->started.wait();
    co_await p.server.stop(0s);
    BOOST_TEST(w->ended.is_set());
    BOOST_TEST(p.server.calls() == 0U);
    BOOST_TEST(!(co_await s->finish()).ok());
}

CO_TEST_CASE(many_calls_at_once) {
    peers p(rt, echo);
    std::vector<async::task<void>> all;
    const auto one = [](std::shared_ptr<rpc::channel> c, int n) -> async::task<void> {
        BOOST_TEST(co_await c->unary("/test/Unary", std::to_string(n)) == std::to_string(n) + "!");
    };
    for (int i = 0; i < 500; ++i) all.push_back(one(p.channel, i));
    co_await async::when_all(std::move(all));
    co_await p.server.stop(1s);
}

CO_TEST_CASE(garbage_on_a_connection_harms_nobody_else) {
    peers p(rt, echo);
    auto [a, b] = socket_pair();
    p.server.adopt(std::move(a));
    const std::string junk = "GET / HTTP/1.1\r\nhost: x\r\n\r\n";
    BOOST_TEST(::send(b.get(), junk.data(), junk.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(junk.size()));
    b.reset();
    BOOST_TEST(co_await p.channel->unary("/test/Unary", "still here") == "still here!");
    co_await p.server.stop(1s);
}

// ---------------------------------------------------------------- TLS

namespace {

/// Takes connections of a loopback listener to a server; ends when cancelled.
async::task<void> take_connections(boost::asio::ip::tcp::acceptor& from, rpc::server& to) {
    for (;;) {
        auto socket = co_await from.async_accept(async::use_task);
        to.adopt(unique_fd{socket.release()});
    }
}

rpc::tls client_tls(const std::string& ca, const std::string& cert, const std::string& key) {
    return {.certificate = cert.empty() ? "" : test::read_file(cert),
            .key = key.empty() ? "" : test::read_file(key),
            .ca = ca,
            .server_name = "test.example"};
}

}  // namespace

CO_TEST_CASE(clients_need_a_certificate_of_the_authority) {
    const test::scratch_dir dir;
    const test::authority ca(dir.path(), "ca"), other(dir.path(), "other");
    const auto server_pair = ca.issue("server", "DNS:test.example"), good = ca.issue("client", "DNS:client"),
               bad = other.issue("stranger", "DNS:client");
    const auto ca_text = test::read_file(ca.cert());
    rpc::server server(rt.get_executor(), rt.pool(), echo,
                       rpc::tls{test::read_file(server_pair.cert), test::read_file(server_pair.key), ca_text, {}});
    boost::asio::ip::tcp::acceptor listening(rt.get_executor(), {boost::asio::ip::address_v4::loopback(), 0});
    async::task_group group(rt.get_executor(), true);
    group.spawn(take_connections(listening, server));
    const auto address = cat("tcp://127.0.0.1:", listening.local_endpoint().port());
    {
        const auto known = rpc::channel::connect(rt.get_executor(), address, client_tls(ca_text, good.cert, good.key));
        BOOST_TEST(co_await known->unary("/test/Unary", "hear") == "hear!");
        BOOST_TEST(co_await known->unary("/test/Unary", std::string(std::size_t{2} << 20, 'x')) == std::string(std::size_t{2} << 20, 'x') + "!");
        const auto nobody = rpc::channel::connect(rt.get_executor(), address, client_tls(ca_text, "", ""));
        BOOST_TEST(((co_await failure(nobody->unary("/test/Unary", "x"))).kind() == errc::unavailable));
        const auto stranger = rpc::channel::connect(rt.get_executor(), address, client_tls(ca_text, bad.cert, bad.key));
        BOOST_TEST(((co_await failure(stranger->unary("/test/Unary", "x"))).kind() == errc::unavailable));
    }
    group.cancel();
    try {
        co_await group.join();
    } catch (const std::exception&) {
    }
    co_await server.stop(0s);
}

CO_TEST_CASE(certificates_that_do_not_fit_are_refused) {
    BOOST_CHECK_EXCEPTION(rpc::server(rt.get_executor(), rt.pool(), echo, rpc::tls{"no certificate", "no key", "", {}}), error,
                          [](const error& e) { return e.kind() == errc::invalid; });
    co_return;
}

#include "support/support.hpp"

#include <sys/socket.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <google/protobuf/any.pb.h>

#include "control.pb.h"
#include "gateway.pb.h"
#include "session.pb.h"
#include "status.pb.h"

import cobuild.base;
import cobuild.async;
import cobuild.progress;
import cobuild.rpc;
import cobuild.client;

#include "daemon.hpp"
#include "support/failure.hpp"

using namespace cobuild;
using namespace cobuild::test;
using namespace std::chrono_literals;
namespace api = moby::buildkit::v1;

namespace {

/// A daemon as far as one build sees it. It keeps what it was told.
struct fake_daemon {
    api::SolveRequest control;
    api::frontend::SolveRequest bridge;
    std::optional<api::frontend::ReturnRequest> returned;
    rpc::metadata session, bridge_headers;
    async::event done;
    bool fail = false;
    rpc::status session_answer;
};
using daemon_ptr = std::shared_ptr<fake_daemon>;
using call_ptr = std::shared_ptr<rpc::call>;

/// The daemon's side of Control.Session: the bytes that come are not looked at, so only that it is open counts.
async::task<rpc::status> hold_session(daemon_ptr d, call_ptr c) {
    d->session = c->request();
    while (co_await c->read()) {
    }
    co_return rpc::status{};
}

rpc::status failure_with_source() {
    google::rpc::Status whole;
    whole.set_code(2);
    whole.set_message("process \"false\" did not complete successfully");
    auto* any = whole.add_details();
    any->set_type_url("github.com/moby/buildkit/errdefs.Source+json");
    any->set_value(R"({"info":{"filename":"Dockerfile","data":")" + base64_encode(std::string_view("FROM scratch\nRUN false\n")) +
                   R"("},"ranges":[{"start":{"line":2},"end":{"line":2}}]})");
    return {rpc::code::unknown, whole.message(), whole.SerializeAsString()};
}

async::task<rpc::status> serve(daemon_ptr d, call_ptr c) {
    const auto& m = c->method();
    if (m.ends_with("Control/Session")) co_return co_await hold_session(d, c);
    const auto request = co_await c->read();
    BOOST_REQUIRE(request.has_value());
    if (m.ends_with("Control/Solve")) {
        BOOST_REQUIRE(d->control.ParseFromString(*request));
        if (d->control.frontend().empty()) co_await d->done.wait();
        if (d->fail) co_return failure_with_source();
        api::SolveResponse a;
        (*a.mutable_exporter_response())["containerimage.digest"] = "sha256:1";
        co_await c->write(a.SerializeAsString());
        co_return rpc::status{};
    }
    if (m.ends_with("Control/Status")) {
        api::StatusResponse a;
        auto* v = a.add_vertexes();
        v->set_digest(digest::of(std::string_view("step")).str());
        v->set_name("a step");
        v->mutable_started()->set_seconds(10);
        v->mutable_completed()->set_seconds(12);
        auto* l = a.add_logs();
        l->set_vertex(v->digest());
        l->set_msg("hello\n");
        l->set_stream(2);
        co_await c->write(a.SerializeAsString());
        co_await d->done.wait();
        co_return rpc::status{};
    }
    d->bridge_headers = c->request();
    std::string answer;
    if (m.ends_with("LLBBridge/Solve")) {
        BOOST_REQUIRE(d->bridge.ParseFromString(*request));
        if (d->fail) co_return failure_with_source();
        api::frontend::SolveResponse a;
        a.mutable_result()->mutable_ref()->set_id("r1");
        (*a.mutable_result()->mutable_metadata())["result.txt"] = "an answer";
        answer = a.SerializeAsString();
    }
    if (m.ends_with("LLBBridge/Return")) {
        d->returned.emplace();
        BOOST_REQUIRE(d->returned->ParseFromString(*request));
        d->done.set();
    }
    co_await c->write(answer);
    co_return rpc::status{};
}

struct daemon_side {
    daemon_ptr daemon = std::make_shared<fake_daemon>();
    rpc::server server;
    std::shared_ptr<rpc::channel> channel;
    explicit daemon_side(async::runtime& rt) : server(rt.get_executor(), rt.pool(), [d = daemon](call_ptr c) { return serve(d, std::move(c)); }) {
        auto [a, b] = socket_pair();
        server.adopt(std::move(a));
        channel = rpc::channel::over(rt.get_executor(), std::move(b));
    }
};

}  // namespace

CO_TEST_CASE(a_build_goes_the_gateway_way) {
    daemon_side d(rt);
    std::vector<progress::event> events;
    client::build_request q;
    q.ref = "ref1";
    q.frontend = "dockerfile.v0";
    q.frontend_attrs = {{"target", "x"}};
    q.exporters = {{"image", {{"name", "n"}}}};
    q.entitlements = {"network.host"};
    q.lends.secrets = {{"s", {}}};
    const auto result = co_await client::build(d.channel, rt.pool(), q, progress::make_sink([&](const progress::event& e) { events.push_back(e); }));
    BOOST_TEST(result.exporter_response.at("containerimage.digest") == "sha256:1");
    BOOST_TEST(result.metadata.at("result.txt") == "an answer");

    const auto& c = d.daemon->control;
    BOOST_TEST(c.ref() == "ref1");
    BOOST_TEST(c.frontend() == "");  // the bridge is told
    BOOST_TEST(c.exporters(0).type() == "image");
    BOOST_TEST(c.exporter_deprecated() == "image");
    BOOST_TEST(c.entitlements(0) == "network.host");
    BOOST_TEST(c.frontend_attrs().at("target") == "x");
    BOOST_TEST(d.daemon->bridge.frontend() == "dockerfile.v0");
    BOOST_TEST(d.daemon->bridge.frontend_opt().at("target") == "x");
    BOOST_TEST(d.daemon->bridge.allow_result_return());
    BOOST_TEST(d.daemon->returned->result().ref().id() == "r1");
    BOOST_TEST(rpc::value(d.daemon->bridge_headers, "buildkit-controlapi-buildid") == "ref1");
    BOOST_TEST(rpc::value(d.daemon->session, "x-docker-expose-session-uuid") == c.session());
    const auto methods = rpc::values(d.daemon->session, "x-docker-expose-session-grpc-method");
    BOOST_TEST((std::find(methods.begin(), methods.end(), "/moby.buildkit.secrets.v1.Secrets/GetSecret") != methods.end()));

    // A vertex that came complete is first begun, then speaks, then ends.
    BOOST_REQUIRE(events.size() == 3U);
    BOOST_TEST(!std::get<progress::vertex>(events[0]).completed.has_value());
    BOOST_TEST(std::get<progress::log>(events[1]).data == "hello\n");
    BOOST_TEST((std::get<progress::log>(events[1]).stream == progress::stream::err));
    BOOST_TEST((std::get<progress::vertex>(events[2]).completed == progress::time_point{12s}));
    co_await d.server.stop(1s);
}

CO_TEST_CASE(a_failure_is_returned_and_told_with_its_place) {
    daemon_side d(rt);
    d.daemon->fail = true;
    client::build_request q;
    q.frontend = "dockerfile.v0";
    std::optional<rpc::status> why;
    const auto e = co_await failure(client::build(d.channel, rt.pool(), q, {}, [&why](const rpc::status& s) { why = s; }));
    BOOST_TEST(std::string(e.what()) == "failed to solve: process \"false\" did not complete successfully");
    BOOST_TEST(d.daemon->returned->error().code() == 2);
    BOOST_TEST(d.daemon->returned->error().details_size() == 1);
    BOOST_REQUIRE(why.has_value());
    const auto details = client::details_of(*why);
    BOOST_REQUIRE(details.sources.size() == 1U);
    BOOST_TEST(client::render(details.sources[0]) ==
               "Dockerfile:2\n--------------------\n   1 |     FROM scratch\n   2 | >>> RUN false\n   3 |     \n--------------------\n");
    co_await d.server.stop(1s);
}

CO_TEST_CASE(a_direct_build_asks_no_bridge) {
    daemon_side d(rt);
    d.daemon->done.set();
    client::build_request q;
    q.frontend = "dockerfile.v0";
    q.direct = true;
    const auto result = co_await client::build(d.channel, rt.pool(), q, {});
    BOOST_TEST(d.daemon->control.frontend() == "dockerfile.v0");
    BOOST_TEST(!d.daemon->returned.has_value());
    BOOST_TEST(result.exporter_response.size() == 1U);
    co_await d.server.stop(1s);
}

BOOST_AUTO_TEST_CASE(excerpts_show_two_lines_around) {
    const client::source_excerpt e{"D", "1\n2\n3\n4\n5\n6\n7", {{4, 4}}};
    BOOST_TEST(client::render(e) ==
               "D:4\n--------------------\n   2 |     2\n   3 |     3\n   4 | >>> 4\n   5 |     5\n   6 |     6\n--------------------\n");
    BOOST_TEST(client::render({"D", "1\n2", {{9, 9}}}) == "");
    BOOST_TEST(client::render({"D", "1\n2", {}}) == "");
}

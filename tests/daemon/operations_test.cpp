// What is asked of a daemon besides builds: figures, health, reflection, traces; settings read anew.
#include "support/support.hpp"

#include "support/certs.hpp"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <google/protobuf/descriptor.pb.h>

#include "control.pb.h"
#include "gateway.pb.h"
#include "reflection.pb.h"
#include "session.pb.h"

import cobuild.base;
import cobuild.async;
import cobuild.build;
import cobuild.config;
import cobuild.daemon;
import cobuild.llb;
import cobuild.rpc;

#include "daemon/requests.hpp"
#include "daemon/served.hpp"
#include "support/failure.hpp"

using namespace cobuild;
using namespace std::chrono_literals;
using namespace cobuild::test;
namespace wire = moby::buildkit::v1;
namespace bridge = moby::buildkit::v1::frontend;
namespace reflection = grpc::reflection::v1;

namespace {

/// What 127.0.0.1:PORT answers, until it closes; on a thread that may block.
std::string say(std::uint16_t port, const std::string& text) {
    const unique_fd s{::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(port);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (::connect(s.get(), reinterpret_cast<const sockaddr*>(&to), sizeof to) != 0) throw_errno("connecting");
    if (::send(s.get(), text.data(), text.size(), MSG_NOSIGNAL) < 0) throw_errno("sending");
    std::string out;
    char piece[4096];
    for (;;) {
        const auto n = ::recv(s.get(), piece, sizeof piece, 0);
        if (n <= 0) return out;
        out.append(piece, static_cast<std::size_t>(n));
    }
}

async::task<std::string> ask(served& s, std::string request) {
    const auto address = s.d->debug_address();
    BOOST_REQUIRE(address.starts_with("tcp://127.0.0.1:"));
    const auto port = static_cast<std::uint16_t>(std::stoi(address.substr(address.rfind(':') + 1)));
    co_return co_await s.engine->runtime().pool().run([port, request] { return say(port, request); });
}

async::task<std::string> page(served& s, std::string path) {
    const auto answer = co_await ask(s, cat("GET ", path, " HTTP/1.1\r\nHost: x\r\n\r\n"));
    BOOST_TEST(answer.starts_with("HTTP/1.1 200 OK\r\n"), answer);
    co_return answer.substr(answer.find("\r\n\r\n") + 4);
}

void with_debug(std::function<async::task<void>(served&)> work) {
    with_daemon(std::move(work), [](daemon::options& o) { o.settings.grpc.debug_address = "127.0.0.1:0"; });
}

bool has_line(const std::string& text, const std::string& line) { return cat("\n", text).find(cat("\n", line, "\n")) != std::string::npos; }

}  // namespace

// ---------------------------------------------------------------- the debug listener

BOOST_AUTO_TEST_CASE(figures_come_in_prometheus_form) {
    with_debug([](served& s) -> async::task<void> {
        const auto before = co_await page(s, "/metrics");
        BOOST_TEST(has_line(before, "cobuild_builds_total 0"), before);
        (void)co_await call<wire::SolveResponse>(s, cat(control, "Solve"), hello_request("b1"));
        auto watching = s.channel->open("/grpc.health.v1.Health/Watch");
        BOOST_TEST(co_await watching->write(""));
        BOOST_TEST((co_await watching->read()).has_value());
        const auto after = co_await page(s, "/metrics?x=1");
        BOOST_TEST(has_line(after, "# TYPE cobuild_builds_total counter"), after);
        BOOST_TEST(has_line(after, "cobuild_builds_total 1"), after);
        BOOST_TEST(has_line(after, "cobuild_builds_running 0"), after);
        BOOST_TEST(has_line(after, R"(cobuild_rpc_calls_open{method="/grpc.health.v1.Health/Watch"} 1)"), after);
        BOOST_TEST(has_line(after, cat(R"(cobuild_build_info{version=")", version(), "\"} 1")), after);
        const auto resident = after.find("\nprocess_resident_memory_bytes ");
        BOOST_REQUIRE(resident != std::string::npos);
        BOOST_TEST(std::stoull(after.substr(resident + 31)) > 1'000'000U);
        watching->cancel();
    });
}

BOOST_AUTO_TEST_CASE(the_graph_and_what_waits_can_be_seen) {
    with_debug([](served& s) -> async::task<void> {
        (void)co_await call<wire::SolveResponse>(s, cat(control, "Solve"), hello_request("b1"));
        const auto graph = co_await page(s, "/debug/graph");
        BOOST_TEST(graph.find("build b1 (ended)\n") != std::string::npos, graph);
        BOOST_TEST(graph.find(" done \"mkfile /hello\"\n") != std::string::npos, graph);
        // A client that does not come to drive its build: the wait is named.
        wire::SolveRequest empty;
        empty.set_ref("waits");
        auto solving = s.channel->open(cat(control, "Solve"));
        BOOST_TEST(co_await solving->write(empty.SerializeAsString()));
        co_await solving->writes_done();
        (void)co_await call<bridge::PongResponse>(s, cat(gateway, "Ping"), bridge::PingRequest(), {{"buildkit-controlapi-buildid", "waits"}});
        const auto waits = co_await page(s, "/debug/pprof/goroutine?debug=2");
        BOOST_TEST(waits.find("/moby.buildkit.v1.Control/Solve, for ") != std::string::npos, waits);
        const auto events = co_await page(s, "/debug/events");
        BOOST_TEST(events.starts_with("waits since "), events);
        BOOST_TEST((co_await page(s, "/debug/requests")).find("/moby.buildkit.v1.Control/Solve ") != std::string::npos);
        BOOST_TEST((co_await page(s, "/debug/vars")).find("\"builds_running\":1") != std::string::npos);
        solving->cancel();
    });
}

BOOST_AUTO_TEST_CASE(other_requests_are_refused) {
    with_debug([](served& s) -> async::task<void> {
        BOOST_TEST((co_await ask(s, "GET /nothing HTTP/1.1\r\n\r\n")).starts_with("HTTP/1.1 404 "));
        BOOST_TEST((co_await ask(s, "POST /metrics HTTP/1.1\r\n\r\n")).starts_with("HTTP/1.1 405 "));
        BOOST_TEST((co_await ask(s, "GET /debug/pprof/profile HTTP/1.1\r\n\r\n")).starts_with("HTTP/1.1 501 "));
        BOOST_TEST((co_await ask(s, "\x16\x03\x01 hello\r\n\r\n")).starts_with("HTTP/1.1 400 "));
        BOOST_TEST((co_await ask(s, std::string(1 << 16, 'x'))).find("200 OK") == std::string::npos);
        (void)co_await page(s, "/debug/");  // it goes on
    });
}

// ---------------------------------------------------------------- services every client may ask

BOOST_AUTO_TEST_CASE(traces_are_taken) {
    with_daemon([](served& s) -> async::task<void> {
        BOOST_TEST((co_await s.channel->unary("/opentelemetry.proto.collector.trace.v1.TraceService/Export", std::string("\x0a\x00", 2))).empty());
    });
}

BOOST_AUTO_TEST_CASE(health_is_told_by_service) {
    with_daemon([](served& s) -> async::task<void> {
        moby::session::HealthCheckRequest q;
        q.set_service("moby.buildkit.v1.Control");
        const auto health = co_await call<moby::session::HealthCheckResponse>(s, "/grpc.health.v1.Health/Check", q);
        BOOST_TEST(health.status() == moby::session::HealthCheckResponse::SERVING);
        q.set_service("nothing");
        BOOST_TEST(((co_await failure(call<moby::session::HealthCheckResponse>(s, "/grpc.health.v1.Health/Check", q))).kind() == errc::not_found));
    });
}

namespace {
async::task<reflection::ServerReflectionResponse> reflect(rpc::stream& s, reflection::ServerReflectionRequest q) {
    BOOST_TEST(co_await s.write(q.SerializeAsString()));
    const auto bytes = co_await s.read();
    reflection::ServerReflectionResponse out;
    BOOST_REQUIRE(bytes.has_value());
    BOOST_TEST(out.ParseFromString(*bytes));
    co_return out;
}
}  // namespace

BOOST_AUTO_TEST_CASE(services_describe_themselves) {
    for (const auto* version : {"v1", "v1alpha"})
        with_daemon([version](served& s) -> async::task<void> {
            auto stream = s.channel->open(cat("/grpc.reflection.", version, ".ServerReflection/ServerReflectionInfo"));
            reflection::ServerReflectionRequest q;
            q.set_list_services("");
            std::set<std::string> names;
            const auto listed = co_await reflect(*stream, q);
            for (const auto& service : listed.list_services_response().service()) names.insert(service.name());
            for (const auto* name : {"moby.buildkit.v1.Control", "moby.buildkit.v1.frontend.LLBBridge", "containerd.services.content.v1.Content",
                                     "grpc.health.v1.Health", "opentelemetry.proto.collector.trace.v1.TraceService"})
                BOOST_TEST(names.contains(name), name);
            q.set_file_containing_symbol("moby.buildkit.v1.Control");
            const auto files = (co_await reflect(*stream, q)).file_descriptor_response();
            bool solve = false, timestamp = false;
            for (const auto& bytes : files.file_descriptor_proto()) {
                google::protobuf::FileDescriptorProto file;
                BOOST_TEST(file.ParseFromString(bytes));
                timestamp = timestamp || file.package() == "google.protobuf";  // what it imports comes along
                for (const auto& service : file.service())
                    for (const auto& m : service.method())
                        solve = solve || (service.name() == "Control" && m.name() == "Solve" && m.input_type() == ".moby.buildkit.v1.SolveRequest");
            }
            BOOST_TEST(solve);
            BOOST_TEST(timestamp);
            q.set_file_containing_symbol("no.such.thing");
            BOOST_TEST((co_await reflect(*stream, q)).error_response().error_code() == 5);
            co_await stream->writes_done();
            BOOST_TEST(!(co_await stream->read()).has_value());
            BOOST_TEST((co_await stream->finish()).ok());
        });
}

// ---------------------------------------------------------------- settings read anew

namespace {
async::task<void> info_over(async::executor ex, std::string address, rpc::tls security) {
    const auto channel = rpc::channel::connect(ex, address, std::move(security));
    (void)co_await channel->unary(cat(control, "Info"), "");
}
}  // namespace

BOOST_AUTO_TEST_CASE(certificates_are_read_anew) {
    test::scratch_dir certs;
    const test::authority first(certs.path(), "first"), second(certs.path(), "second");
    const auto one = first.issue("one", "DNS:localhost,IP:127.0.0.1"), two = second.issue("two", "DNS:localhost,IP:127.0.0.1");
    const auto text = [](const std::string& file) { return test::read_file(file); };
    config::tls_table files{.cert = one.cert, .key = one.key, .ca = {}};
    with_daemon(
        [&](served& s) -> async::task<void> {
            const auto ex = s.engine->runtime().get_executor();
            const auto address = s.d->addresses().back();
            co_await info_over(ex, address, {.certificate = {}, .key = {}, .ca = text(first.cert()), .server_name = "localhost"});
            config::configuration fresh;
            fresh.grpc.tls = {.cert = two.cert, .key = two.key, .ca = {}};
            co_await s.d->reload(fresh);
            co_await info_over(ex, address, {.certificate = {}, .key = {}, .ca = text(second.cert()), .server_name = "localhost"});
            // What cannot be read changes nothing.
            fresh.grpc.tls = {.cert = (s.dir / "none.pem").string(), .key = two.key, .ca = {}};
            BOOST_TEST(says(co_await failure(s.d->reload(fresh)), "none.pem"));
            fresh.grpc.tls = {.cert = one.cert, .key = two.key, .ca = {}};
            BOOST_TEST(says(co_await failure(s.d->reload(fresh)), "cannot be used"));
            co_await info_over(ex, address, {.certificate = {}, .key = {}, .ca = text(second.cert()), .server_name = "localhost"});
        },
        [&](daemon::options& o) {
            o.settings.grpc.address.emplace_back("tcp://127.0.0.1:0");
            o.settings.grpc.tls = files;
        });
}

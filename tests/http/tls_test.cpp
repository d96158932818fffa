#include "support/support.hpp"

#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "support/certs.hpp"
#include "support/fake_registry.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.http;

using namespace cobuild;
using namespace cobuild::async;
using namespace std::chrono_literals;
using test::fake_registry;
using test::fake_request;
using test::fake_response;

namespace {

/// What went wrong with one GET, or its body.
task<std::string> get(runtime& rt, std::string host_port, http::tls_options trust, http::timeouts times = {}) {
    http::connection c(rt.get_executor(), http::parse_endpoint(host_port, true),
                       {.tls = http::tls_context::load(trust), .timeouts = times, .trust_hint = "[registry.\"x\"]"});
    std::exception_ptr thrown;
    try {
        co_await c.send({.target = "/v2/"});
        co_return co_await c.read_all(1000);
    } catch (...) {
        thrown = std::current_exception();
    }
    co_return std::string(describe(thrown).what());
}

bool has(const std::string& text, std::string_view part) {
    if (text.find(part) == std::string::npos) BOOST_TEST_MESSAGE("it says: " << text);
    return text.find(part) != std::string::npos;
}

}  // namespace

CO_TEST_CASE(trust) {
    test::scratch_dir dir;
    const test::authority ours(dir.path(), "Ours");
    const test::authority other(dir.path(), "Other");
    const auto good = ours.issue("good", "IP:127.0.0.1,DNS:localhost");
    fake_registry r({.tls_cert = good.cert, .tls_key = good.key});
    BOOST_TEST(co_await get(rt, r.host(), {.ca = {ours.cert()}}) == "{}");
    BOOST_TEST(co_await get(rt, cat("localhost:", r.port()), {.ca = {other.cert(), ours.cert()}}) == "{}");
    BOOST_TEST(co_await get(rt, r.host(), {.insecure = true}) == "{}");
    const auto unknown = co_await get(rt, r.host(), {.ca = {other.cert()}});
    BOOST_TEST(has(unknown, cat("the certificate of ", r.host(),
                                " is signed by an unknown authority (issuer CN = Ours); add its CA file to \"ca\" in [registry.\"x\"]")));
}

CO_TEST_CASE(wrong_name_and_expired) {
    test::scratch_dir dir;
    const test::authority ours(dir.path(), "Ours");
    const auto elsewhere = ours.issue("elsewhere", "DNS:a.example,DNS:b.example,IP:10.0.0.1");
    fake_registry r({.tls_cert = elsewhere.cert, .tls_key = elsewhere.key});
    BOOST_TEST(has(co_await get(rt, r.host(), {.ca = {ours.cert()}}),
                   cat("the certificate of ", r.host(), " is for a.example, b.example, 10.0.0.1, not for 127.0.0.1")));
    const auto old = ours.issue("old", "IP:127.0.0.1", -1);
    fake_registry s({.tls_cert = old.cert, .tls_key = old.key});
    BOOST_TEST(has(co_await get(rt, s.host(), {.ca = {ours.cert()}}), cat("the certificate of ", s.host(), " expired on 20")));
}

CO_TEST_CASE(client_certificates_and_directories) {
    test::scratch_dir dir;
    const test::authority ours(dir.path(), "Ours");
    const auto server = ours.issue("server", "IP:127.0.0.1");
    const auto client = ours.issue("client", "DNS:client");
    fake_registry r({.tls_cert = server.cert, .tls_key = server.key, .client_ca = ours.cert()});
    BOOST_TEST(co_await get(rt, r.host(), {.ca = {ours.cert()}, .key_pairs = {{client.cert, client.key}}}) == "{}");
    const auto none = co_await get(rt, r.host(), {.ca = {ours.cert()}});
    BOOST_TEST(none != "{}");
    std::filesystem::create_directory(dir / "d");
    std::filesystem::copy(ours.cert(), dir / "d/ca.crt");
    std::filesystem::copy(client.cert, dir / "d/client.cert");
    std::filesystem::copy(client.key, dir / "d/client.key");
    BOOST_TEST(co_await get(rt, r.host(), {.dirs = {(dir / "gone").string(), (dir / "d").string()}}) == "{}");
}

BOOST_AUTO_TEST_CASE(unreadable_files_are_named) {
    const auto said = [](const http::tls_options& o) {
        try {
            http::tls_context::load(o);
        } catch (const error& e) {
            return std::string(e.what());
        }
        return std::string();
    };
    test::scratch_dir dir;
    BOOST_TEST(has(said({.ca = {(dir / "no.pem").string()}}), "no.pem\": No such file"));
    test::write_file(dir / "bad.pem", "nothing");
    BOOST_TEST(has(said({.ca = {(dir / "bad.pem").string()}}), "cannot use the CA file"));
    BOOST_TEST(has(said({.key_pairs = {{(dir / "c.cert").string(), (dir / "c.key").string()}}}), "client certificate"));
}

CO_TEST_CASE(plain_where_tls_is_wanted) {
    fake_registry r;
    r.on_request([](const fake_request&) { return fake_response{}; });
    // The fake waits for a head that never ends; a real server answers 400 at once, which is what is_not_tls looks for.
    http::connection c(rt.get_executor(), http::parse_endpoint(r.host(), true), {.timeouts = {.handshake = 50ms}});
    std::exception_ptr thrown;
    try {
        co_await c.send({});
    } catch (...) {
        thrown = std::current_exception();
    }
    BOOST_TEST((describe(thrown).kind() == errc::timed_out));
    BOOST_TEST(has(describe(thrown).what(), cat("the TLS handshake with ", r.host(), " took longer than 50ms")));
}

CO_TEST_CASE(nobody_there) {
    int port = 0;
    {
        const fake_registry r;
        port = r.port();
    }
    BOOST_TEST(co_await get(rt, cat("127.0.0.1:", port), {}) == cat("cannot connect to 127.0.0.1:", port, ": Connection refused"));
    BOOST_TEST(has(co_await get(rt, "name.invalid", {}), "cannot find the host name.invalid: "));
}

CO_TEST_CASE(an_answer_that_never_comes) {
    fake_registry r;
    r.on_request([](const fake_request&) { return fake_response{.raw = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nfive."}; });
    http::connection c(rt.get_executor(), http::parse_endpoint(r.host(), false), {});
    const auto a = co_await c.send({});
    BOOST_TEST(a.status == 200U);
    std::exception_ptr thrown;
    try {
        co_await c.read_all(100);
    } catch (...) {
        thrown = std::current_exception();
    }
    BOOST_TEST(has(describe(thrown).what(), cat(r.host(), " closed the connection after 5 of 10 bytes")));
    BOOST_TEST(!c.is_open());
}

CO_TEST_CASE(bodies_of_all_framings) {
    fake_registry r;
    http::connection c(rt.get_executor(), http::parse_endpoint(r.host(), false), {});
    const auto body_of = [&](std::string raw) -> task<std::string> {
        r.on_request([raw](const fake_request&) { return fake_response{.raw = raw}; });
        std::exception_ptr thrown;
        try {
            co_await c.send({});
            co_return co_await c.read_all(1000);
        } catch (...) {
            thrown = std::current_exception();
        }
        co_return std::string(describe(thrown).what());
    };
    BOOST_TEST(co_await body_of("HTTP/1.1 200 OK\r\n\r\nto the end") == "to the end");
    BOOST_TEST(co_await body_of("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nT: x\r\n\r\n") == "abcde");
    BOOST_TEST(co_await body_of("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok") == "ok");
    BOOST_TEST(has(co_await body_of("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "no sensible head"));
    BOOST_TEST(has(co_await body_of("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcde\r\n"), "wrong length"));
    BOOST_TEST(has(co_await body_of("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc"), "closed the connection after 3 bytes"));
    BOOST_TEST(has(co_await body_of("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nx"), "Transfer-Encoding"));
    BOOST_TEST(has(co_await body_of("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx"), "not HTTP"));
    BOOST_TEST(has(co_await body_of("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nxx"), "not HTTP"));
    BOOST_TEST(has(co_await body_of(cat("HTTP/1.1 200 OK\r\n\r\n", std::string(2000, 'x'))), "longer than the 1000 bytes"));
}

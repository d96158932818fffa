// Files behind URLs: what is asked of a server, what is kept, what is believed.
#include "support/support.hpp"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "support/fake_registry.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import cobuild.state;
import cobuild.snapshot;
import cobuild.progress;
import cobuild.source;

using namespace cobuild;
using namespace cobuild::async;
using namespace std::chrono_literals;
using test::fake_registry;
using test::fake_request;
using test::fake_response;

namespace {

struct world {
    explicit world(runtime& r)
        : rt(r),
          d(state::directory::open((dir / "state").string(), rt.pool())),
          snapshots(snapshot::open_best(d)),
          files(*d, *snapshots, {.attempts = 3, .first_wait = 1ms, .max_bytes = 1 << 20}) {}

    task<source::http_file> fetch(std::string path, std::optional<digest> checksum = {}) {
        source::http_request r{.url = cat("http://", server.host(), path), .checksum = std::move(checksum), .filename = {}};
        co_return co_await files.fetch(r, secrets(), {});
    }
    source::secret_reader secrets() {
        return [this](std::string id) -> task<std::optional<std::string>> {
            const auto found = given.find(id);
            co_return found == given.end() ? std::nullopt : std::optional(found->second);
        };
    }
    task<error> failure(std::string path, std::optional<digest> checksum = {}) {
        std::exception_ptr failed;
        try {
            (void)co_await fetch(std::move(path), std::move(checksum));
        } catch (...) {
            failed = std::current_exception();
        }
        BOOST_REQUIRE(failed != nullptr);
        co_return describe(failed);
    }
    task<std::string> text(source::http_file f) {
        auto view = co_await snapshots->view(f.chain);
        co_return fs::root(view.mount().duplicate()).read_file(f.filename, 1 << 20);
    }

    runtime& rt;
    test::scratch_dir dir;
    fake_registry server;
    std::map<std::string, std::string> given;
    std::shared_ptr<state::directory> d;
    std::shared_ptr<snapshot::store> snapshots;
    source::http_files files;
};

bool says(const error& e, std::string_view part) { return std::string_view(e.what()).find(part) != std::string_view::npos; }

}  // namespace

CO_TEST_CASE(a_file_is_kept_as_the_server_describes_it) {
    world w(rt);
    w.server.on_request([](const fake_request& r) -> std::optional<fake_response> {
        fake_response out{.body = "bytes"};
        out.headers = {{"Last-Modified", "Thu, 02 Jan 2020 03:04:05 GMT"}};
        if (r.path == "/named") out.headers.emplace_back("Content-Disposition", "attachment; filename=\"../../etc/pass wd\"");
        return out;
    });
    const auto plain = co_await w.fetch("/a/b%20c.txt?q=1");
    BOOST_TEST(plain.filename == "b c.txt");
    BOOST_TEST(plain.modified == 1577934245);
    BOOST_TEST(plain.content.str() == digest::of("bytes").str());
    auto view = co_await w.snapshots->view(plain.chain);
    const auto info = *fs::root(view.mount().duplicate()).stat("b c.txt");
    BOOST_TEST(info.permissions() == 0600U);
    BOOST_TEST(info.mtime.seconds == 1577934245);
    // A name is one component, whatever the server says.
    BOOST_TEST((co_await w.fetch("/named")).filename == "pass wd");
    BOOST_TEST((co_await w.fetch("/")).filename == "download");
}

// RFC 9110 5.6.7: all three forms count, and a zone that some servers write out.
CO_TEST_CASE(dates_in_every_form) {
    world w(rt);
    w.server.on_request([](const fake_request& r) -> std::optional<fake_response> {
        static const std::map<std::string, std::string> dates{{"/imf", "Thu, 02 Jan 2020 03:04:05 GMT"},
                                                              {"/rfc850", "Thursday, 02-Jan-20 03:04:05 GMT"},
                                                              {"/utc", "Thursday, 02-Jan-20 03:04:05 UTC"},
                                                              {"/asctime", "Thu Jan  2 03:04:05 2020"}};
        const auto at = dates.find(r.path);
        return fake_response{.headers = {{"Last-Modified", at == dates.end() ? "soon" : at->second}}, .body = "bytes"};
    });
    for (const auto* path : {"/imf", "/rfc850", "/utc", "/asctime"}) BOOST_TEST((co_await w.fetch(path)).modified == 1577934245, path);
    BOOST_TEST((co_await w.fetch("/none")).modified == 0);
}

// What is packed for the transfer alone is kept as it was before; an archive that happens to be gzip stays one.
CO_TEST_CASE(a_body_packed_for_the_transfer_is_unpacked) {
    world w(rt);
    const std::string packed("\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\x03\xcb\x48\xcd\xc9\xc9\x07\x00\x86\xa6\x10\x36\x05\x00\x00\x00", 25);
    w.server.on_request([&packed](const fake_request& r) -> std::optional<fake_response> {
        fake_response out{.body = packed};
        if (r.path == "/packed") out.headers = {{"Content-Encoding", "gzip"}};
        if (r.headers.at("accept-encoding") != "gzip") out.status = 406;
        return out;
    });
    const auto f = co_await w.fetch("/packed");
    BOOST_TEST(co_await w.text(f) == "hello");
    BOOST_TEST(f.size == 5U);
    BOOST_TEST(f.content.str() == digest::of("hello").str());
    BOOST_TEST((co_await w.fetch("/archive")).content.str() == digest::of(packed).str());
}

CO_TEST_CASE(what_has_not_changed_is_not_fetched_again) {
    world w(rt);
    std::string tag = "\"one\"";
    w.server.on_request([&](const fake_request& r) -> std::optional<fake_response> {
        const auto asked = r.headers.find("if-none-match");
        if (asked != r.headers.end() && asked->second.find(tag) != std::string::npos) return fake_response{.status = 304, .headers = {{"ETag", tag}}};
        return fake_response{.headers = {{"ETag", tag}}, .body = cat("body of ", tag)};
    });
    const auto first = co_await w.fetch("/f");
    const auto again = co_await w.fetch("/f");
    BOOST_TEST((again.chain == first.chain));
    BOOST_TEST(w.server.count("GET") == 1U);
    tag = "\"two\"";
    BOOST_TEST(co_await w.text(co_await w.fetch("/f")) == "body of \"two\"");
    // Both answers are remembered: going back costs no transfer.
    tag = "\"one\"";
    BOOST_TEST((co_await w.fetch("/f")).content.str() == first.content.str());
    BOOST_TEST(w.server.count("GET") == 2U);
}

// O-CA-10
CO_TEST_CASE(o_ca_10_a_pruned_record_is_no_obstacle) {
    world w(rt);
    std::string body = "old";
    w.server.on_request(
        [&](const fake_request&) -> std::optional<fake_response> { return fake_response{.headers = {{"ETag", cat('"', body, '"')}}, .body = body}; });
    {
        const auto first = co_await w.fetch("/f");
        BOOST_TEST(co_await w.text(first) == "old");
    }
    for (const auto& u : co_await w.snapshots->du()) (void)co_await w.snapshots->remove(u.id);
    w.server.forget_requests();
    body = "new";
    BOOST_TEST(co_await w.text(co_await w.fetch("/f")) == "new");
    for (const auto& r : w.server.requests()) BOOST_TEST(!r.headers.contains("if-none-match"));
    BOOST_TEST(co_await w.text(co_await w.fetch("/f")) == "new");
}

CO_TEST_CASE(a_checksum_is_verified_and_then_needs_no_server) {
    world w(rt);
    w.server.on_request([](const fake_request&) -> std::optional<fake_response> { return fake_response{.body = "right"}; });
    const auto e = co_await w.failure("/f", digest::of("wrong"));
    BOOST_TEST((e.kind() == errc::corrupt));
    BOOST_TEST(says(e, digest::of("right").str()));
    BOOST_TEST(says(e, digest::of("wrong").str()));
    (void)co_await w.fetch("/f", digest::of("right"));
    w.server.forget_requests();
    (void)co_await w.fetch("/f", digest::of("right"));
    BOOST_TEST(w.server.requests().empty());
}

CO_TEST_CASE(credentials_go_to_their_host_only) {
    world w(rt);
    fake_registry other;
    w.given[cat("HTTP_AUTH_TOKEN_", w.server.host())] = "secret\n";
    w.server.on_request([&](const fake_request& r) -> std::optional<fake_response> {
        if (r.path == "/here") return fake_response{.status = 302, .headers = {{"Location", "/moved"}}};
        if (r.path == "/away") return fake_response{.status = 307, .headers = {{"Location", cat("http://", other.host(), "/file")}}};
        return fake_response{.body = "x"};
    });
    other.on_request([](const fake_request&) -> std::optional<fake_response> { return fake_response{.body = "elsewhere"}; });
    (void)co_await w.fetch("/here");
    for (const auto& r : w.server.requests()) BOOST_TEST(r.headers.at("authorization") == "Bearer secret");
    BOOST_TEST(co_await w.text(co_await w.fetch("/away")) == "elsewhere");
    for (const auto& r : other.requests()) BOOST_TEST(!r.headers.contains("authorization"));
}

CO_TEST_CASE(what_fails_for_a_moment_is_tried_again) {
    world w(rt);
    int calls = 0;
    w.server.on_request([&](const fake_request& r) -> std::optional<fake_response> {
        if (r.path == "/never") return fake_response{.status = 503};
        if (r.path == "/loop") return fake_response{.status = 302, .headers = {{"Location", "/loop"}}};
        if (r.path == "/gone") return fake_response{.status = 404};
        if (r.path == "/private") return fake_response{.status = 403};
        if (r.path == "/huge") return fake_response{.body = "x", .declared_length = std::uint64_t{1} << 40};
        ++calls;
        if (calls == 1) return fake_response{.status = 502};
        if (calls == 2) return fake_response{.body = "whole body", .cut_after = 4};
        return fake_response{.body = "whole body"};
    });
    BOOST_TEST(co_await w.text(co_await w.fetch("/f")) == "whole body");
    BOOST_TEST(calls == 3);
    BOOST_TEST(((co_await w.failure("/never")).kind() == errc::unavailable));
    BOOST_TEST(w.server.count("GET", "/never") == 3U);
    const auto gone = co_await w.failure("/gone");
    BOOST_TEST((gone.kind() == errc::not_found));
    BOOST_TEST(says(gone, "404"));
    BOOST_TEST(w.server.count("GET", "/gone") == 1U);
    BOOST_TEST(says(co_await w.failure("/private"), "HTTP_AUTH_TOKEN_"));
    BOOST_TEST(says(co_await w.failure("/loop"), "redirects"));
    BOOST_TEST(says(co_await w.failure("/huge"), "larger than the limit"));
}

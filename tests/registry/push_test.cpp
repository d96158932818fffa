#include "support/support.hpp"

#include <fcntl.h>

#include <cstdint>
#include "registry/fixture.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.http;
import cobuild.oci;
import cobuild.registry;

#include "support/failure.hpp"

using namespace cobuild;
using namespace cobuild::async;
using namespace std::chrono_literals;
using test::failure;
using test::fake_registry;
using test::fake_request;
using test::fake_response;
using test::says;

namespace {

const auto name = oci::reference::parse("registry.test/a:1");

registry::options options_for(runtime& rt, const fake_registry& r, registry::limits l = {}) {
    return {.executor = rt.get_executor(),
            .pool = &rt.pool(),
            .hosts = [host = r.host()](std::string_view) { return std::vector<registry::host_settings>{{.host = host, .plain_http = true}}; },
            .limits = l,
            .retry = {.attempts = 2, .first_wait = 1ms, .longest_wait = 2ms}};
}

oci::descriptor describe_blob(std::string_view bytes) {
    return {.media_type = std::string(oci::media::oci_layer), .digest = digest::of(bytes), .size = bytes.size()};
}

std::function<task<http::body_source>()> holding(std::string bytes) {
    return [bytes]() -> task<http::body_source> { co_return http::memory_body(bytes); };
}

}  // namespace

CO_TEST_CASE(push_a_blob_and_a_manifest) {
    fake_registry r;
    registry::client c(options_for(rt, r));
    const std::string bytes(3'000'000, 'x');
    std::uint64_t told = 0;
    registry::push_options o{.call = {.progress = [&](std::uint64_t n) { told += n; }}};
    BOOST_TEST((co_await c.push_blob(name, describe_blob(bytes), holding(bytes), o) == registry::push_outcome::uploaded));
    BOOST_TEST(told == bytes.size());
    BOOST_TEST(r.has_blob(digest::of(bytes).str()));
    BOOST_TEST(r.count("PATCH") == 0U);
    BOOST_TEST((co_await c.push_blob(name, describe_blob(bytes), holding(bytes)) == registry::push_outcome::existed));
    const std::string manifest = R"({"schemaVersion":2})";
    BOOST_TEST((co_await c.push_manifest(name, std::string(oci::media::oci_manifest), manifest) == digest::of(manifest)));
    BOOST_TEST((co_await c.resolve(name)).target.digest.str() == digest::of(manifest).str());
    BOOST_TEST(co_await c.exists(name, {.media_type = std::string(oci::media::oci_manifest), .digest = digest::of(manifest)}));
    BOOST_TEST(!co_await c.exists(name, describe_blob("other")));
    co_await c.close();
}

CO_TEST_CASE(push_from_a_file) {
    fake_registry r;
    registry::client c(options_for(rt, r));
    test::scratch_dir dir;
    const std::string bytes(1'500'000, 'y');
    test::write_file(dir / "blob", cat("head", bytes, "tail"));
    std::ifstream keep(dir / "blob");
    const unique_fd fd(::open((dir / "blob").c_str(), O_RDONLY | O_CLOEXEC));
    const auto open = [&]() -> task<http::body_source> { co_return http::file_body(fd.get(), 4, bytes.size(), rt.pool()); };
    BOOST_TEST((co_await c.push_blob(name, describe_blob(bytes), open) == registry::push_outcome::uploaded));
    BOOST_TEST(r.has_blob(digest::of(bytes).str()));
    co_await c.close();
}

CO_TEST_CASE(a_broken_upload_goes_on_where_the_server_has_it) {
    fake_registry r;
    registry::client c(options_for(rt, r));
    const auto methods = [&] {
        std::string out;
        for (const auto& q : r.requests()) out += cat(q.method, ' ');
        return out;
    };
    std::string bytes(3'000'000, 'x');
    for (std::size_t i = 0; i < bytes.size(); i += 1000) bytes[i] = static_cast<char>(i / 1000);
    // More cuts than attempts: each has brought some of it.
    r.cut_uploads(700'000, 4);
    BOOST_TEST((co_await c.push_blob(name, describe_blob(bytes), holding(bytes)) == registry::push_outcome::uploaded));
    BOOST_TEST(r.has_blob(digest::of(bytes).str()));
    BOOST_TEST(methods() == "HEAD POST PUT GET PATCH GET PATCH GET PATCH GET PATCH PUT ");
    BOOST_TEST(r.requests().at(10).headers.at("content-range") == "2800000-2999999");
    // All of it was there, and only the end is to be said.
    r.forget_requests();
    bytes += "more";
    r.cut_uploads(bytes.size(), 1);
    co_await c.push_blob(name, describe_blob(bytes), holding(bytes));
    BOOST_TEST(methods() == "HEAD POST PUT GET PUT ");
    BOOST_TEST(r.has_blob(digest::of(bytes).str()));
    // The server has lost it: from the beginning.
    r.forget_requests();
    bytes += "still more";
    r.cut_uploads(700'000, 1);
    r.on_request([&](const fake_request& q) -> std::optional<fake_response> {
        if (q.method == "GET") r.forget_uploads();
        return std::nullopt;
    });
    co_await c.push_blob(name, describe_blob(bytes), holding(bytes));
    BOOST_TEST(methods() == "HEAD POST PUT GET POST PUT ");
    BOOST_TEST(r.has_blob(digest::of(bytes).str()));
    co_await c.close();
}

CO_TEST_CASE(a_mount_saves_the_upload) {
    fake_registry r;
    registry::client c(options_for(rt, r));
    const std::string bytes = "shared";
    r.on_request([&](const fake_request& q) -> std::optional<fake_response> {
        if (q.method == "HEAD") return fake_response{.status = 404};
        return std::nullopt;
    });
    r.add_blob(bytes);
    BOOST_TEST((co_await c.push_blob(name, describe_blob(bytes), {}, {.mount_from = {"other"}}) == registry::push_outcome::mounted));
    const auto post = r.requests().at(1);
    BOOST_TEST(post.query.at("mount") == digest::of(bytes).str());
    BOOST_TEST(post.query.at("from") == "other");
    co_await c.close();
}

// O-RG-15
CO_TEST_CASE(a_refused_upload_ends_at_once) {
    const std::string bytes(20'000'000, 'z');
    fake_registry r;
    registry::client c(options_for(rt, r));
    const auto refused = [](const fake_request&) -> std::optional<fake_response> {
        return fake_response{.status = 413, .body = R"({"errors":[{"code":"TOO_BIG","message":"no"}]})"};
    };
    r.on_request([&](const fake_request& q) -> std::optional<fake_response> { return q.method == "POST" ? refused(q) : std::nullopt; });
    auto e = co_await failure(c.push_blob(name, describe_blob(bytes), holding(bytes)));
    BOOST_TEST(says(e, "answered 413 Scripted (TOO_BIG: no)"));
    r.on_request([&](const fake_request& q) -> std::optional<fake_response> { return q.method == "PUT" ? refused(q) : std::nullopt; });
    e = co_await failure(c.push_blob(name, describe_blob(bytes), holding(bytes)));
    BOOST_TEST(says(e, "answered 413"));
    // The answer comes before the body is read, and the rest of it never is.
    r.on_request({});
    r.before_body([&](const fake_request& q) -> std::optional<fake_response> { return q.method == "PUT" ? refused(q) : std::nullopt; });
    const auto start = std::chrono::steady_clock::now();
    e = co_await failure(c.push_blob(name, describe_blob(bytes), holding(bytes)));
    BOOST_TEST(says(e, "answered 413"));
    BOOST_TEST((std::chrono::steady_clock::now() - start < 2s));
    co_await c.close();
}

// O-RG-16
CO_TEST_CASE(a_push_that_must_fetch_does_not_wait_for_itself) {
    for (const std::size_t limit : {1U, 4U}) {
        fake_registry r;
        registry::client c(options_for(rt, r, {.transfers = limit, .metadata = 1}));
        const std::string bytes(100'000, 'b');
        const auto from = oci::reference::parse("registry.test/other:1");
        r.on_request([&](const fake_request& q) -> std::optional<fake_response> {
            if (q.path.find("/v2/a/blobs/sha256") == 0) return fake_response{.status = 404};
            if (q.path == "/v2/other/blobs/" + digest::of(bytes).str()) return fake_response{.body = bytes};
            return std::nullopt;
        });
        const auto open = [&]() -> task<http::body_source> {
            std::string got;
            auto* out = &got;
            co_await c.fetch_blob(from, describe_blob(bytes), [out](chunk part) -> task<void> {
                out->append(text_of(part));
                co_return;
            });
            co_return http::memory_body(std::move(got));
        };
        task_group group(co_await current_executor);
        const auto push = [&]() -> task<void> { co_await c.push_blob(name, describe_blob(bytes), open); };
        for (int i = 0; i < 6; ++i) group.spawn(push());
        co_await group.join();
        BOOST_TEST(r.has_blob(digest::of(bytes).str()));
        BOOST_TEST(c.peak_sockets("registry.test") <= limit + 1);
        co_await c.close();
    }
}

// The best source of a mount is the repository of the most similar name among those seen with the blob.
CO_TEST_CASE(a_blob_seen_elsewhere_is_mounted_from_the_nearest) {
    fake_registry r;
    const std::string layer = "a layer of the base";
    for (const auto* repository : {"other/base", "team/base"}) r.add_image(repository, "1", {layer});
    r.on_request([](const fake_request& q) -> std::optional<fake_response> {
        return q.method == "HEAD" && q.path.find("/team/app/") != std::string::npos ? std::optional(fake_response{.status = 404}) : std::nullopt;
    });
    registry::client c(options_for(rt, r));
    for (const auto* repository : {"other/base", "team/base"})
        co_await c.fetch_image(oci::reference::parse(cat("registry.test/", repository, ":1")), oci::parse_platform("linux/amd64"));
    const auto app = oci::reference::parse("registry.test/team/app:1");
    BOOST_TEST((co_await c.push_blob(app, describe_blob(layer), {}) == registry::push_outcome::mounted));
    BOOST_TEST(r.requests().back().query.at("from") == "team/base");
    co_await c.close();
}

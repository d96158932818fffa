// Caches of a registry as an engine uses them: how many connections, which requests, which bytes.
#include "support/fake_registry.hpp"
#include "support/support.hpp"

#include <cstddef>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <utility>

import cobuild.base;
import cobuild.async;
import cobuild.build;
import cobuild.config;

using namespace cobuild;
using test::fake_registry;

namespace {

constexpr int layers = 8;

/// Needs no base and no step: what is tested is what goes over the wire.
struct place {
    test::scratch_dir dir;
    std::filesystem::path context = dir / "context";
    config::configuration settings;

    explicit place(const std::string& dockerfile) {
        test::write_file(context / "Dockerfile", dockerfile);
        for (int i = 0; i < layers; ++i) test::write_file(context / cat("f", i), cat("file ", i, "\n"));
    }
    /// One build on a state directory of its own.
    build::build_result run(const std::string& root, const std::string& from, const std::string& to, const std::string& mode = "max") {
        async::runtime rt;
        return rt.block_on(build_on(root, from, to, mode));
    }

private:
    async::task<build::build_result> build_on(std::string root, std::string from, std::string to, std::string mode) {
        const auto engine = co_await build::engine::open({.settings = settings, .root = dir / root});
        build::build_request r{.context = context};
        r.source_date_epoch = 1700000000;
        if (!from.empty()) r.cache_from.push_back({"registry", {{"ref", from}}});
        if (!to.empty()) r.cache_to.push_back({"registry", {{"ref", to}, {"mode", mode}}});
        auto out = co_await engine->build(std::move(r));
        co_await engine->close();
        co_return out;
    }
};

std::string copies() {
    std::string out = "FROM scratch\n";
    for (int i = 0; i < layers; ++i) out += cat("COPY f", i, " /\n");
    return out;
}

}  // namespace

// O-RG-18: the limit holds for the export and the import of a cache alike.
BOOST_AUTO_TEST_CASE(a_limit_of_two_holds_for_caches) {
    if (!test::needs_root()) return;
    fake_registry r;
    place p(copies());
    p.settings.system.max_registry_concurrency = 2;
    const auto ref = r.host() + "/app/cache:1";
    const auto made = p.run("one", "", ref);
    BOOST_TEST(made.exporter_response.contains("cache.manifest"));
    const auto again = p.run("two", ref, "");
    BOOST_TEST(again.steps == static_cast<std::size_t>(layers));
    BOOST_TEST(again.cached_steps == again.steps);
    BOOST_TEST(again.image_digest == made.image_digest);
    BOOST_TEST(r.peak_sockets() <= 3U);  // two, and the one for metadata
    BOOST_TEST(r.peak_blob_transfers() <= 2U);
}

BOOST_AUTO_TEST_CASE(an_unchanged_cache_uploads_no_blob) {
    if (!test::needs_root()) return;
    fake_registry r;
    place p(copies());
    const auto ref = r.host() + "/app/cache:1";
    p.run("one", "", ref);
    BOOST_TEST(r.count("POST", "/blobs/uploads") == static_cast<std::size_t>(layers) + 1);
    r.forget_requests();
    p.run("one", "", ref);
    // From another machine that has all from the cache, too.
    p.run("two", ref, ref);
    BOOST_TEST(r.count("POST") == 0U);
    BOOST_TEST(r.count("PUT", "/manifests/") == 2U);
}

BOOST_AUTO_TEST_CASE(only_the_layers_of_the_result_are_fetched) {
    if (!test::needs_root()) return;
    fake_registry r;
    std::string text = "FROM scratch AS one\n";
    for (int i = 0; i < layers; ++i) text += cat("COPY f", i, " /\n");
    place p(text + "FROM scratch\nCOPY --from=one /f1 /out\n");
    const auto ref = r.host() + "/app/cache:1";
    const auto made = p.run("one", "", ref);
    r.forget_requests();
    const auto again = p.run("two", ref, "");
    BOOST_TEST(again.image_digest == made.image_digest);
    BOOST_TEST(again.cached_steps == again.steps);
    BOOST_TEST(r.count("GET", "/blobs/") == 2U);  // the cache's config and one layer
}

BOOST_AUTO_TEST_CASE(a_cache_that_cannot_be_pushed_fails_the_build) {
    if (!test::needs_root()) return;
    fake_registry r;
    r.on_request([](const test::fake_request& q) -> std::optional<test::fake_response> {
        if (q.method == "POST") return test::fake_response{.status = 403};
        return std::nullopt;
    });
    place p(copies());
    std::string why;
    try {
        p.run("one", "", r.host() + "/app/cache:1");
    } catch (const error& e) {
        why = e.what();
    }
    BOOST_TEST(why.find("exporting the cache to " + r.host() + "/app/cache:1: ") == 0U, why);
}

// What a client lends and takes as blobs: layouts, caches in directories, images as layouts; uploads.
#include "support/support.hpp"

#include <chrono>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

import cobuild.base;
import cobuild.async;
import cobuild.build;
import cobuild.client;
import cobuild.config;
import cobuild.daemon;
import cobuild.json;
import cobuild.llb;
import cobuild.progress;
import cobuild.rpc;

#include "lending.hpp"
#include "support/failure.hpp"

using namespace cobuild;
using namespace cobuild::test;
namespace stdfs = std::filesystem;

namespace {

/// Names of the steps that ran, and of those that came from a cache.
struct step_sink final : progress::sink {
    std::set<std::string> ran, cached;
    void on_event(const progress::event& e) override {
        const auto* v = std::get_if<progress::vertex>(&e);
        if (v != nullptr && v->completed) (v->cached ? cached : ran).insert(v->name);
    }
};

std::size_t blobs_in(const stdfs::path& layout) {
    std::size_t n = 0;
    for (const auto& e : stdfs::directory_iterator(layout / "blobs/sha256")) n += e.is_regular_file() ? 1 : 0;
    return n;
}

/// Puts an image with /hello into a layout directory at the client; its descriptor.
async::task<json::value> image_in(lending_daemon& s, stdfs::path layout, std::string type = "oci") {
    client::build_request r;
    r.exporters.push_back({.type = std::move(type), .attrs = {{"tar", "false"}}});
    r.lends.stores["export"] = std::move(layout);
    const auto made = co_await s.build(file_definition("/hello", "hi"), std::move(r));
    co_return json::parse(base64_decode(made.exporter_response.at("containerimage.descriptor")).value());
}

}  // namespace

BOOST_AUTO_TEST_CASE(an_image_goes_into_a_layout_of_the_client) {
    with_lending_daemon([](lending_daemon& s) -> async::task<void> {
        const auto layout = s.dir / "layout";
        const auto top = co_await image_in(s, layout);
        const auto id = digest::parse(json::string_at(top.as_object(), "digest"));
        BOOST_TEST(blobs_in(layout) == 3U);  // manifest, config, layer
        const auto manifest = read_file(layout / "blobs/sha256" / id.hex());
        BOOST_TEST(digest::of(manifest).str() == id.str());
        const auto parsed = json::parse(manifest);
        for (const auto& l : json::at(parsed.as_object(), "layers").as_array()) {
            const auto layer = digest::parse(json::string_at(l.as_object(), "digest"));
            BOOST_TEST(digest::of(read_file(layout / "blobs/sha256" / layer.hex())).str() == layer.str());
        }
        // Again: what is there already is not sent, and that is no error.
        (void)co_await image_in(s, layout);
        BOOST_TEST(blobs_in(layout) == 3U);
    });
}

BOOST_AUTO_TEST_CASE(a_layout_of_the_client_is_a_source) {
    with_lending_daemon([](lending_daemon& s) -> async::task<void> {
        const auto layout = s.dir / "layout";
        const auto top = co_await image_in(s, layout);
        const auto id = json::string_at(top.as_object(), "digest");
        // Another daemon has none of it: what is here of the first build is removed.
        (void)co_await client::prune(s.channel, {.all = true}, [](const client::usage&) {});
        auto r = into(s.dir / "out");
        r.lends.oci_layouts["oci:mine"] = layout;
        (void)co_await s.build(source_definition(cat("oci-layout://not/real@", id), {{"oci.store", "mine"}}), std::move(r));
        BOOST_TEST(read_file(s.dir / "out/hello") == "hi");

        auto without = into(s.dir / "none");
        without.lends.oci_layouts["oci:mine"] = layout;
        const auto other = digest::of(std::string_view("no such image")).str();
        BOOST_TEST(says(co_await failure(s.build(source_definition(cat("oci-layout://x@", other), {{"oci.store", "mine"}}), std::move(without))),
                        cat("the client has no blob ", other)));
        BOOST_TEST(says(co_await failure(s.build(source_definition(cat("oci-layout://x@", id), {{"oci.store", "mine"}}), into(s.dir / "none"))),
                        "the client offers no OCI layout named mine"));
    });
}

BOOST_AUTO_TEST_CASE(a_damaged_blob_of_a_layout_is_refused) {
    with_lending_daemon([](lending_daemon& s) -> async::task<void> {
        const auto layout = s.dir / "layout";
        const auto top = co_await image_in(s, layout);
        const auto id = digest::parse(json::string_at(top.as_object(), "digest"));
        (void)co_await client::prune(s.channel, {.all = true}, [](const client::usage&) {});
        auto text = read_file(layout / "blobs/sha256" / id.hex());
        text[text.size() / 2] ^= 1;
        write_file(layout / "blobs/sha256" / id.hex(), text);
        // The daemon may still have the manifest itself; a store that has it not is asked.
        auto r = into(s.dir / "out");
        r.lends.oci_layouts["oci:mine"] = s.dir / "other";
        stdfs::create_directories(s.dir / "other/blobs/sha256");
        const auto wrong = digest::of(std::string_view("what it should be"));
        write_file(s.dir / "other/blobs/sha256" / wrong.hex(), "what it is");
        const auto e = co_await failure(s.build(source_definition(cat("oci-layout://x@", wrong.str()), {{"oci.store", "mine"}}), std::move(r)));
        BOOST_TEST(says(e, wrong.str()));
        BOOST_TEST(!stdfs::exists(s.dir / "out/hello"));
    });
}

BOOST_AUTO_TEST_CASE(a_cache_goes_into_a_directory_of_the_client_and_comes_back) {
    with_lending_daemon([](lending_daemon& s) -> async::task<void> {
        const auto cache = s.dir / "cache";
        client::build_request out;
        out.cache_exports.push_back({.type = "local", .attrs = {{"dest", "where-it-is"}, {"mode", "max"}}});
        out.lends.stores["local:where-it-is"] = cache;
        const auto made = co_await s.build(file_definition("/hello", "hi"), std::move(out));
        const auto manifest = made.exporter_response.at("cache.manifest");
        client::note_in_layout(cache, manifest, {{.name = "latest"}}, false);
        const auto id = json::string_at(json::parse(manifest).as_object(), "digest");
        BOOST_TEST(stdfs::exists(cache / "blobs/sha256" / digest::parse(id).hex()));
        BOOST_TEST(read_file(cache / "index.json").find(id) != std::string::npos);

        (void)co_await client::prune(s.channel, {.all = true}, [](const client::usage&) {});
        auto in = into(s.dir / "out");
        in.cache_imports.push_back({.type = "local", .attrs = {{"src", "where-it-is"}, {"digest", id}}});
        in.lends.oci_layouts["local:where-it-is"] = cache;
        const auto steps = std::make_shared<step_sink>();
        (void)co_await s.build(file_definition("/hello", "hi"), std::move(in), steps);
        BOOST_TEST(read_file(s.dir / "out/hello") == "hi");
        BOOST_TEST(steps->cached.contains("mkfile /hello"));
        BOOST_TEST(!steps->ran.contains("mkfile /hello"));
    });
}

// The daemon's own directories are none of its clients' business.
BOOST_AUTO_TEST_CASE(a_cache_directory_is_never_one_of_the_daemons) {
    with_lending_daemon([](lending_daemon& s) -> async::task<void> {
        client::build_request out;
        out.cache_exports.push_back({.type = "local", .attrs = {{"dest", (s.dir / "here").string()}}});
        BOOST_TEST(says(co_await failure(s.build(file_definition("/a", "a"), std::move(out))), "is in the client's directories"));
        BOOST_TEST(!stdfs::exists(s.dir / "here"));
    });
}

BOOST_AUTO_TEST_CASE(a_reset_cache_directory_keeps_what_is_named) {
    scratch_dir dir;
    stdfs::create_directories(dir / "blobs/sha256");
    const auto add = [&dir](const std::string& text) {
        const auto id = digest::of(text);
        write_file(dir.path() / "blobs/sha256" / id.hex(), text);
        return id;
    };
    const auto describe = [](const digest& id) {
        return cat(R"({"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":")", id.str(), R"(","size":1})");
    };
    const auto layer = add("layer"), config = add("{}");
    const auto manifest = add(cat(R"({"config":{"digest":")", config.str(), R"("},"layers":[{"digest":")", layer.str(), R"("}]})"));
    const auto old = add(R"({"layers":[]})"), stray = add("stray");
    client::note_in_layout(dir.path(), describe(old), {{.name = "latest"}}, false);
    BOOST_TEST(stdfs::exists(dir.path() / "blobs/sha256" / stray.hex()));
    client::note_in_layout(dir.path(), describe(manifest), {{.name = "latest"}}, true);
    for (const auto& id : {layer, config, manifest}) BOOST_TEST(stdfs::exists(dir.path() / "blobs/sha256" / id.hex()));
    for (const auto& id : {old, stray}) BOOST_TEST(!stdfs::exists(dir.path() / "blobs/sha256" / id.hex()));
    client::note_in_layout(dir.path(), describe(manifest), {{.name = "host:5000/x/y:v1", .image = true}}, false);
    const auto index = json::parse(read_file(dir / "index.json"));
    const auto& list = json::at(index.as_object(), "manifests").as_array();
    BOOST_REQUIRE(list.size() == 2U);
    const auto& names = json::at(list[1].as_object(), "annotations").as_object();
    BOOST_TEST(json::string_at(names, "io.containerd.image.name") == "host:5000/x/y:v1");
    BOOST_TEST(json::string_at(names, "org.opencontainers.image.ref.name") == "v1");
}

BOOST_AUTO_TEST_CASE(what_a_client_uploads_is_a_file) {
    with_lending_daemon([](lending_daemon& s) -> async::task<void> {
        const std::string content(3 << 20, 'u');
        auto r = into(s.dir / "out");
        r.lends.uploads["/abc"] = content;
        (void)co_await s.build(source_definition("http://buildkit-session/abc", {{"http.filename", "context"}}), std::move(r));
        BOOST_TEST((read_file(s.dir / "out/context") == content));
        // Another upload of the same name is another file.
        auto again = into(s.dir / "out");
        again.lends.uploads["/abc"] = "short";
        (void)co_await s.build(source_definition("http://buildkit-session/abc", {{"http.filename", "context"}}), std::move(again));
        BOOST_TEST(read_file(s.dir / "out/context") == "short");
        BOOST_TEST(says(co_await failure(s.build(source_definition("http://buildkit-session/abc"), into(s.dir / "out"))),
                        "its session does not serve uploads"));
    });
}

BOOST_AUTO_TEST_CASE(a_layout_needs_a_client_that_takes_blobs) {
    with_lending_daemon([](lending_daemon& s) -> async::task<void> {
        client::build_request r;
        r.exporters.push_back({.type = "oci", .attrs = {{"tar", "false"}}});
        BOOST_TEST(says(co_await failure(s.build(file_definition("/a", "a"), std::move(r))), "a store of the client, which offers none"));
    });
}

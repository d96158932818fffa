#include "support/support.hpp"

#include <fcntl.h>
#include <sys/stat.h>

#include <chrono>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "support/fake_registry.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import cobuild.archive;
import cobuild.state;
import cobuild.content;
import cobuild.snapshot;
import cobuild.oci;
import cobuild.registry;
import cobuild.progress;
import cobuild.source;

using namespace cobuild;
using namespace cobuild::async;
using namespace std::chrono_literals;
using test::fake_registry;
using test::fake_request;
using test::fake_response;

namespace {

using archive::entry_type;

struct made_layer {
    std::string blob;
    std::string diff_id;
    std::string media_type;
};

made_layer pack(archive::compression kind, const std::function<void(archive::tar_writer&)>& fill) {
    made_layer out;
    archive::blob_writer blob([&out](std::span<const std::byte> data) { out.blob += text_of(data); }, {.kind = kind});
    archive::tar_writer tar(blob.sink());
    fill(tar);
    tar.finish();
    out.diff_id = blob.finish().diff_id.str();
    out.media_type = kind == archive::compression::gzip   ? oci::media::oci_layer_gzip
                     : kind == archive::compression::zstd ? oci::media::oci_layer_zstd
                                                          : oci::media::oci_layer;
    return out;
}

void add_file(archive::tar_writer& tar, const std::string& path, std::string_view text) {
    tar.add({.type = entry_type::file, .path = path, .mode = 0644, .size = text.size()}, bytes_of(text));
}
void add_dir(archive::tar_writer& tar, const std::string& path, std::uint32_t mode = 0755, std::uint32_t uid = 0) {
    tar.add({.type = entry_type::directory, .path = path, .mode = mode, .uid = uid});
}

/// A layer of one file of its own.
made_layer plain(const std::string& path, std::string_view text, archive::compression kind = archive::compression::gzip) {
    return pack(kind, [&](archive::tar_writer& tar) { add_file(tar, path, text); });
}

/// Serves the layers as an image; `sizes` and `digests` may lie.
std::string serve(fake_registry& r, const std::string& name, const std::vector<made_layer>& layers, std::int64_t size_off_by = 0) {
    std::string diff_ids, list;
    for (const auto& l : layers) {
        diff_ids += cat(diff_ids.empty() ? "" : ",", '"', l.diff_id, '"');
        list += cat(list.empty() ? "" : ",", R"({"mediaType":")", l.media_type, R"(","digest":")", r.add_blob(l.blob), R"(","size":)",
                    static_cast<std::int64_t>(l.blob.size()) + size_off_by, "}");
    }
    const auto config =
        cat(R"({"architecture":"amd64","os":"linux","config":{"Env":["A=b"]},"rootfs":{"type":"layers","diff_ids":[)", diff_ids, "]}}");
    const auto manifest = cat(R"({"schemaVersion":2,"mediaType":")", oci::media::oci_manifest, R"(","config":{"mediaType":")", oci::media::oci_config,
                              R"(","digest":")", r.add_blob(config), R"(","size":)", config.size(), R"(},"layers":[)", list, "]}");
    return r.add_manifest(name, "1", std::string(oci::media::oci_manifest), manifest);
}

struct world {
    explicit world(runtime& r)
        : rt(r),
          d(state::directory::open((dir / "state").string(), rt.pool())),
          content(d),
          snapshots(snapshot::open_overlay(d)),
          client(
              {.executor = rt.get_executor(),
               .pool = &rt.pool(),
               .hosts = [host = server.host()](std::string_view) { return std::vector<registry::host_settings>{{.host = host, .plain_http = true}}; },
               .retry = {.attempts = 2, .first_wait = 1ms, .longest_wait = 2ms, .longest_retry_after = 1s}}),
          images(rt.pool(), content, *snapshots, client) {}

    task<source::resolved_image> resolve(std::string name, source::freshness how = source::freshness::missing) {
        co_return co_await images.resolve(oci::reference::parse(cat("registry.test/", name, ":1")), oci::parse_platform("linux/amd64"), how, {});
    }
    task<source::pulled_image> pull(std::string name) { co_return co_await images.pull(co_await resolve(std::move(name)), {}); }
    task<std::string> read(snapshot::chain c, std::string path) {
        auto view = co_await snapshots->view(std::move(c));
        const fs::root root(view.mount().duplicate());
        co_return root.stat(path) ? root.read_file(path, 1 << 20) : std::string("<absent>");
    }
    task<std::size_t> layers() { co_return (co_await snapshots->du()).size(); }
    [[nodiscard]] bool has(const std::string& name) const { return content.find(digest::parse(name)).has_value(); }
    [[nodiscard]] std::size_t unfinished() const {
        std::size_t n = 0;
        for (const auto* sub : {"state/content/ingest", "state/active"})
            if (std::filesystem::exists(dir / sub))
                for ([[maybe_unused]] const auto& e : std::filesystem::directory_iterator(dir / sub)) ++n;
        return n;
    }

    runtime& rt;
    test::scratch_dir dir;
    fake_registry server;
    std::shared_ptr<state::directory> d;
    content::store content;
    std::shared_ptr<snapshot::store> snapshots;
    registry::client client;
    source::images images;
};

template<class T>
task<error> failure(task<T> t) {
    std::exception_ptr thrown;
    try {
        (void)co_await std::move(t);
    } catch (...) {
        thrown = std::current_exception();
    }
    const auto e = thrown ? describe(thrown) : error{errc::internal, "no failure"};
    BOOST_TEST_MESSAGE(e.what());
    co_return e;
}

bool says(const error& e, std::string_view part) { return std::string_view(e.what()).find(part) != std::string_view::npos; }

}  // namespace

#define WORLD_CASE(name)                             \
    static task<void> name##_in(world& w);           \
    CO_TEST_CASE(name) {                             \
        if (!cobuild::test::needs_root()) co_return; \
        world w(rt);                                 \
        co_await name##_in(w);                       \
        co_await w.client.close();                   \
    }                                                \
    static task<void> name##_in([[maybe_unused]] world& w)

WORLD_CASE(layers_of_every_kind_in_order_and_only_once) {
    serve(w.server, "a",
          {plain("one", "1"), plain("two", "2", archive::compression::zstd), plain("three", "3", archive::compression::none),
           pack(archive::compression::gzip, [](auto& tar) { tar.whiteout("one"); })});
    const auto got = co_await w.pull("a");
    BOOST_TEST(got.chain.layers.size() == 4U);
    BOOST_TEST((co_await w.read(got.chain, "two")) == "2");
    BOOST_TEST((co_await w.read(got.chain, "three")) == "3");
    BOOST_TEST((co_await w.read(got.chain, "one")) == "<absent>");
    w.server.forget_requests();
    const auto again = co_await w.pull("a");
    BOOST_TEST((again.chain == got.chain));
    BOOST_TEST(w.server.count("GET", "/blobs/") == 0U);
    BOOST_TEST(w.server.requests().size() == 1U);  // the tag's HEAD
    BOOST_TEST(w.unfinished() == 0U);
    const auto blobs = co_await w.snapshots->blobs(got.chain.layers[1]);
    BOOST_REQUIRE(blobs.size() == 1U);
    BOOST_TEST(blobs[0].variant == "pulled");
    BOOST_TEST(blobs[0].media_type == oci::media::oci_layer_zstd);
}

WORLD_CASE(layers_come_in_parallel) {
    serve(w.server, "a", {plain("1", "1"), plain("2", "2"), plain("3", "3"), plain("4", "4"), plain("5", "5")});
    const auto image = co_await w.resolve("a");  // the config is a blob too and must not be held
    w.server.hold_blobs(true);
    task_group group(co_await current_executor);
    source::pulled_image out;
    group.spawn([](world& in, source::resolved_image i, source::pulled_image& to) -> task<void> { to = co_await in.images.pull(std::move(i), {}); }(
                                                                                      w, image, out));
    co_await w.rt.pool().run([&] { w.server.wait_for_blob_transfers(4); });
    w.server.hold_blobs(false);
    co_await group.join();
    BOOST_TEST(out.chain.layers.size() == 5U);
    BOOST_TEST(w.server.peak_blob_transfers() == 4U);
}

WORLD_CASE(a_layer_of_two_images_at_once_is_fetched_once) {
    const auto shared = plain("shared", "s");
    serve(w.server, "a", {shared, plain("a", "a")});
    serve(w.server, "b", {shared, plain("b", "b")});
    const auto a = co_await w.resolve("a"), b = co_await w.resolve("b");
    w.server.forget_requests();
    source::pulled_image got_a, got_b;
    task_group group(co_await current_executor);
    const auto one = [](world& in, source::resolved_image i, source::pulled_image& to) -> task<void> {
        to = co_await in.images.pull(std::move(i), {});
    };
    group.spawn(one(w, a, got_a));
    group.spawn(one(w, b, got_b));
    co_await group.join();
    BOOST_TEST(w.server.count("GET", a.parsed.layers[0].digest.str()) == 1U);
    BOOST_TEST((got_a.chain.layers[0] == got_b.chain.layers[0]));
    BOOST_TEST((co_await w.layers()) == 3U);
    // Once they are here, a third image in another order asks for nothing either.
    serve(w.server, "c", {plain("b", "b"), shared});
    const auto c = co_await w.resolve("c");
    w.server.forget_requests();
    co_await w.images.pull(c, {});
    BOOST_TEST(w.server.requests().empty());
}

// A damaged body, compressed or not, cut or of another length: nothing is kept and the host is named.
WORLD_CASE(damaged_layers) {
    for (const auto kind : {archive::compression::gzip, archive::compression::zstd, archive::compression::none}) {
        const auto layer = plain("f", std::string(200'000, 'x') + "end", kind);
        const auto name = cat("d", archive::to_string(kind));
        serve(w.server, name, {layer});
        const auto image = co_await w.resolve(name);
        const auto wanted = image.parsed.layers[0].digest.str();
        for (const std::size_t at : {std::size_t{3}, layer.blob.size() / 2, layer.blob.size() - 5}) {
            auto bad = layer.blob;
            bad[at] = static_cast<char>(bad[at] ^ 0x55);
            w.server.on_request([&](const fake_request& q) -> std::optional<fake_response> {
                if (q.path.find(wanted) == std::string::npos) return std::nullopt;
                return fake_response{.body = bad};
            });
            // Distrusted hosts are remembered by the client: each attempt has one of its own.
            registry::client client({.executor = w.rt.get_executor(), .pool = &w.rt.pool(), .hosts = [host = w.server.host()](std::string_view) {
                                         return std::vector<registry::host_settings>{{.host = host, .plain_http = true}};
                                     }});
            source::images images(w.rt.pool(), w.content, *w.snapshots, client);
            const auto e = co_await failure(images.pull(image, {}));
            BOOST_TEST((e.kind() == errc::corrupt));
            for (const auto& part : {wanted, w.server.host(), digest::of(bad).str()}) BOOST_TEST(says(e, part), part << " at " << at);
            BOOST_TEST(!w.has(wanted));
            BOOST_TEST(!w.has(digest::of(bad).str()));
            BOOST_TEST((co_await w.layers()) == 0U);
            BOOST_TEST(w.unfinished() == 0U);
            co_await client.close();
        }
        w.server.on_request({});
        BOOST_TEST((co_await w.images.pull(image, {})).chain.layers.size() == 1U);
        for (const auto& u : co_await w.snapshots->du()) BOOST_TEST((co_await w.snapshots->remove(u.id)));
        w.content.remove(digest::parse(wanted));
    }
}

// O-RG-13, over the end of the command: what came before is not asked for again, and is not believed either.
WORLD_CASE(a_pull_that_broke_off_is_taken_up_by_the_next) {
    std::string noise;
    for (std::uint64_t x = 1; noise.size() < (3U << 20); x = x * 6364136223846793005ULL + 1442695040888963407ULL)
        noise.push_back(static_cast<char>(x >> 56));
    const auto layer = plain("noise", noise, archive::compression::none);
    serve(w.server, "a", {layer});
    const auto image = co_await w.resolve("a");
    const auto blob = image.parsed.layers[0].digest;
    const auto pull_again = [](world& in, source::resolved_image what) -> task<source::pulled_image> {
        // As another command would: nothing in memory.
        content::store content(in.d);
        registry::client client({.executor = in.rt.get_executor(), .pool = &in.rt.pool(), .hosts = [host = in.server.host()](std::string_view) {
                                     return std::vector<registry::host_settings>{{.host = host, .plain_http = true}};
                                 }});
        source::images images(in.rt.pool(), content, *in.snapshots, client);
        auto out = co_await images.pull(std::move(what), {});
        co_await client.close();
        co_return out;
    };
    for (const bool damaged : {false, true}) {
        w.server.on_request([&, broke = false](const fake_request& q) mutable -> std::optional<fake_response> {
            if (q.path.find(blob.str()) == std::string::npos) return std::nullopt;
            if (std::exchange(broke, true)) return fake_response{.status = 503};
            return fake_response{.body = layer.blob, .cut_after = 2U << 20};
        });
        BOOST_TEST(((co_await failure(w.images.pull(image, {}))).kind() == errc::unavailable));
        BOOST_TEST(w.unfinished() == 0U);
        const auto left = w.dir / "state/content/partial" / blob.hex();
        BOOST_REQUIRE(std::filesystem::file_size(left) >= 1U << 20);
        if (damaged) {
            std::fstream file(left, std::ios::in | std::ios::out | std::ios::binary);
            file.seekp(1000);
            file << "damaged";
        }
        w.server.on_request({});
        w.server.forget_requests();
        BOOST_TEST((co_await pull_again(w, image)).chain.layers.size() == 1U);
        const auto asked = w.server.requests();
        BOOST_REQUIRE(asked.size() == (damaged ? 2U : 1U));
        BOOST_TEST(asked[0].headers.at("range").starts_with("bytes="));
        if (damaged) BOOST_TEST(!asked[1].headers.contains("range"));
        BOOST_TEST((w.content.read_all(blob) == layer.blob));
        BOOST_TEST(!std::filesystem::exists(left));
        for (const auto& u : co_await w.snapshots->du()) co_await w.snapshots->remove(u.id);
        w.content.remove(blob);
    }
}

WORLD_CASE(sizes_and_ids_that_do_not_agree) {
    serve(w.server, "long", {plain("f", "text")}, +1);
    serve(w.server, "short", {plain("f", "text")}, -1);
    for (const auto* name : {"long", "short"}) {
        const auto e = co_await failure(w.pull(name));
        BOOST_TEST((e.kind() == errc::corrupt));
        BOOST_TEST(says(e, w.server.host()));
        BOOST_TEST((co_await w.layers()) == 0U);
    }
    auto lying = plain("g", "other");
    const auto honest = lying.diff_id;
    lying.diff_id = digest::of(std::string_view("something else")).str();
    serve(w.server, "lie", {lying});
    const auto e = co_await failure(w.pull("lie"));
    BOOST_TEST((e.kind() == errc::corrupt));
    for (const auto& part : {honest, lying.diff_id, std::string("registry.test/lie")}) BOOST_TEST(says(e, part), part);
    BOOST_TEST((co_await w.layers()) == 0U);
    // What is rightly what it says but is no archive.
    made_layer noise{
        .blob = std::string(5000, 'n'), .diff_id = digest::of(std::string(5000, 'n')).str(), .media_type = std::string(oci::media::oci_layer)};
    serve(w.server, "noise", {noise});
    const auto bad = co_await failure(w.pull("noise"));
    BOOST_TEST((bad.kind() == errc::corrupt));
    BOOST_TEST(says(bad, digest::of(noise.blob).str()));
    BOOST_TEST(!says(bad, w.server.host()));  // it gave what was asked for
    BOOST_TEST(w.unfinished() == 0U);
}

WORLD_CASE(layers_of_foreign_types_are_refused_by_name) {
    auto chart = plain("f", "text");
    chart.media_type = "application/vnd.cncf.helm.chart.content.v1.tar+gzip";
    serve(w.server, "chart", {plain("e", "first"), chart});
    const auto image = co_await w.resolve("chart");
    w.server.forget_requests();
    const auto e = co_await failure(w.images.pull(image, {}));
    BOOST_TEST((e.kind() == errc::unsupported));
    BOOST_TEST(says(e, chart.media_type));
    BOOST_TEST(w.server.requests().empty());
}

/// A hard link into the layer below, and a file whose parents only that one lists.
static std::vector<made_layer> leaning() {
    return {pack(archive::compression::gzip,
                 [](auto& tar) {
                     add_dir(tar, "usr/", 0750, 7);
                     add_dir(tar, "usr/bin/", 0711, 8);
                     add_file(tar, "usr/bin/tool", "tool");
                 }),
            pack(archive::compression::gzip,
                 [](auto& tar) {
                     add_file(tar, "usr/bin/new", "new");
                     tar.add({.type = entry_type::hard_link, .path = "linked", .link = "usr/bin/tool"});
                 }),
            plain("top", "top")};
}

WORLD_CASE(layers_that_lean_on_those_below) {
    serve(w.server, "a", leaning());
    const auto got = co_await w.pull("a");
    BOOST_TEST((co_await w.read(got.chain, "linked")) == "tool");
    BOOST_TEST((co_await w.read(got.chain, "usr/bin/new")) == "new");
    auto view = co_await w.snapshots->view(got.chain);
    const fs::root root(view.mount().duplicate());
    BOOST_TEST(root.stat("usr")->permissions() == 0750U);
    BOOST_TEST(root.stat("usr/bin")->uid == 8U);
    BOOST_TEST(root.stat("usr/bin/tool")->permissions() == 0644U);
    // The same bytes on another layer are another layer: the parents look otherwise there.
    auto other = leaning();
    other[0] = pack(archive::compression::gzip, [](auto& tar) {
        add_dir(tar, "usr/", 0700, 1);
        add_dir(tar, "usr/bin/", 0700, 2);
        add_file(tar, "usr/bin/tool", "another");
    });
    serve(w.server, "b", other);
    const auto second = co_await w.pull("b");
    BOOST_TEST((second.chain.layers[1] != got.chain.layers[1]));
    BOOST_TEST((co_await w.read(second.chain, "linked")) == "another");
    w.server.forget_requests();
    BOOST_TEST(((co_await w.pull("b")).chain == second.chain));
    BOOST_TEST(w.server.count("GET", "/blobs/") == 0U);
}

// Two builds wait for one leaning layer; the one that began it goes away and with it whatever it was waiting for.
WORLD_CASE(a_build_that_leaves_does_not_hold_up_another) {
    serve(w.server, "a", leaning());
    const auto image = co_await w.resolve("a");
    w.server.hold_blobs(true);
    source::pulled_image got;
    std::optional<error> left;
    task_group first(co_await current_executor), second(co_await current_executor);
    first.spawn([](world& in, source::resolved_image i) -> task<void> { co_await in.images.pull(std::move(i), {}); }(w, image));
    co_await w.rt.pool().run([&] { w.server.wait_for_blob_transfers(3); });
    second.spawn([](world& in, source::resolved_image i, source::pulled_image& to) -> task<void> { to = co_await in.images.pull(std::move(i), {}); }(
                                                                                       w, image, got));
    co_await w.rt.pool().run([] {});
    first.cancel();
    std::exception_ptr thrown;
    try {
        co_await first.join();
    } catch (...) {
        thrown = std::current_exception();
    }
    w.server.hold_blobs(false);
    co_await second.join();
    BOOST_TEST(got.chain.layers.size() == 3U);
    BOOST_TEST((co_await w.read(got.chain, "linked")) == "tool");
}

WORLD_CASE(a_cancelled_pull_leaves_nothing) {
    serve(w.server, "a", {plain("1", std::string(300'000, '1')), plain("2", "2")});
    const auto image = co_await w.resolve("a");
    const auto before = w.content.list().size();
    w.server.hold_blobs(true);
    task_group group(co_await current_executor);
    group.spawn([](world& in, source::resolved_image i) -> task<void> { co_await in.images.pull(std::move(i), {}); }(w, image));
    co_await w.rt.pool().run([&] { w.server.wait_for_blob_transfers(2); });
    group.cancel();
    std::exception_ptr thrown;
    try {
        co_await group.join();
    } catch (...) {
        thrown = std::current_exception();
    }
    BOOST_TEST((co_await w.layers()) == 0U);
    BOOST_TEST(w.unfinished() == 0U);
    BOOST_TEST(w.content.list().size() == before);
    w.server.hold_blobs(false);
    BOOST_TEST((co_await w.images.pull(image, {})).chain.layers.size() == 2U);
}

WORLD_CASE(a_layer_removed_comes_from_the_content_store_and_a_damaged_blob_anew) {
    serve(w.server, "a", {plain("f", "text")});
    const auto image = co_await w.resolve("a");
    co_await w.images.pull(image, {});
    const auto remove_layers = [&]() -> task<void> {
        for (const auto& u : co_await w.snapshots->du()) BOOST_TEST((co_await w.snapshots->remove(u.id)));
    };
    co_await remove_layers();
    w.server.forget_requests();
    BOOST_TEST((co_await w.read((co_await w.images.pull(image, {})).chain, "f")) == "text");
    BOOST_TEST(w.server.requests().empty());
    co_await remove_layers();
    const auto d = image.parsed.layers[0].digest;
    const auto file = std::filesystem::path(w.content.path()) / "blobs/sha256" / d.hex();
    std::filesystem::permissions(file, std::filesystem::perms(0644));
    test::write_file(file, "damaged");
    BOOST_TEST((co_await w.read((co_await w.images.pull(image, {})).chain, "f")) == "text");
    BOOST_TEST(w.server.count("GET", d.str()) == 1U);
    BOOST_TEST(test::read_file(file) != "damaged");
}

// image-spec layer.md: an opaque whiteout hides all that lower layers have, at the top as in any directory.
WORLD_CASE(a_layer_that_hides_all_below) {
    const auto opaque = pack(archive::compression::gzip, [](auto& tar) {
        add_file(tar, ".wh..wh..opq", "");
        add_file(tar, "new", "new");
    });
    serve(w.server, "a", {plain("old", "old"), opaque, plain("top", "top")});
    for ([[maybe_unused]] const int time : {1, 2}) {
        const auto got = co_await w.pull("a");
        BOOST_TEST((co_await w.read(got.chain, "old")) == "<absent>");
        BOOST_TEST((co_await w.read(got.chain, "new")) == "new");
        BOOST_TEST((co_await w.read(got.chain, "top")) == "top");
    }
}

WORLD_CASE(what_never_and_always_mean) {
    serve(w.server, "a", {plain("f", "text")});
    const auto never = co_await failure(w.resolve("a", source::freshness::never));
    BOOST_TEST((never.kind() == errc::not_found));
    BOOST_TEST(says(never, "--pull=never"));
    BOOST_TEST(w.server.requests().empty());
    const auto image = co_await w.resolve("a");
    const auto got = co_await w.images.pull(image, {});
    BOOST_TEST(source::chain_text(got.chain) == cat(got.chain.layers[0].value));
    // Built here under that name: taken as it is, unless asked otherwise.
    w.content.put_image({.name = "registry.test/a:1",
                         .target = image.manifest.digest,
                         .descriptor = cat(R"({"mediaType":")", oci::media::oci_manifest, R"(","digest":")", image.manifest.digest.str(),
                                           R"(","size":)", image.manifest.size, "}"),
                         .created = {},
                         .labels = {{std::string(source::chain_label), source::chain_text(got.chain)}}});
    w.server.forget_requests();
    const auto here = co_await w.resolve("a");
    BOOST_TEST(here.local);
    BOOST_TEST((here.chain == got.chain));
    BOOST_TEST((here.diff_ids == image.diff_ids));
    BOOST_TEST(((co_await w.images.pull(here, {})).chain == got.chain));
    BOOST_TEST(w.server.requests().empty());
    BOOST_TEST(!(co_await w.resolve("a", source::freshness::always)).local);
    BOOST_TEST(w.server.count("HEAD") == 1U);
}

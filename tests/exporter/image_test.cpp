#include "exporter/world.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import cobuild.archive;
import cobuild.state;
import cobuild.content;
import cobuild.snapshot;
import cobuild.oci;
import cobuild.json;
import cobuild.progress;
import cobuild.exporter;

#include <cstdint>
#include "exporter/world_body.hpp"

namespace {

task<snapshot::chain> two_layers(world& w) {
    auto c = co_await w.layer({}, [](const stdfs::path& p) { write_file(p / "etc/one", "1"); });
    co_return co_await w.layer(c, [](const stdfs::path& p) {
        write_file(p / "two", "2");
        stdfs::remove(p / "etc/one");
    });
}

oci::image config_of(const world& w, const exporter::image& i) { return oci::parse_image(w.content.read_all(i.config.digest)); }

constexpr std::int64_t year_2001 = 978307200;

}  // namespace

BOOST_AUTO_TEST_SUITE(images)

// image-spec manifest.md, config.md, descriptor.md, read without our own reader of them.
WORLD_CASE(an_image_is_one_of_the_specification) {
    const auto root = co_await two_layers(w);
    const auto image =
        co_await exporter::write_image(w.stores(), input_of(root, R"({"os":"linux","architecture":"amd64","config":{"Cmd":["<sh>"]},"x-ours":[1]})"),
                                       {.annotations = {{"k", "v"}}}, {});
    const auto text = w.content.read_all(image.manifest.digest);
    BOOST_TEST(text == image.manifest_bytes);
    BOOST_TEST(image.manifest.size == text.size());
    const auto manifest = json::parse(text).as_object();
    BOOST_TEST(json::int_at(manifest, "schemaVersion") == 2);
    BOOST_TEST(json::string_at(manifest, "mediaType") == "application/vnd.oci.image.manifest.v1+json");
    BOOST_TEST(json::string_map_at(manifest, "annotations").at("k") == "v");
    BOOST_TEST(text.starts_with("{\n  \"schemaVersion\": 2,\n  \"mediaType\""));
    const auto& config_entry = json::object_at(manifest, "config");
    BOOST_TEST(json::string_at(config_entry, "mediaType") == "application/vnd.oci.image.config.v1+json");
    const auto config_text = w.content.read_all(digest::parse(json::string_at(config_entry, "digest")));
    BOOST_TEST(json::uint_at(config_entry, "size") == config_text.size());
    const auto config = json::parse(config_text).as_object();
    BOOST_TEST(json::string_at(config, "os") == "linux");
    BOOST_TEST(json::string_at(config, "architecture") == "amd64");
    BOOST_TEST(config.contains("x-ours"));
    BOOST_TEST(config_text.find("\\u003csh\\u003e") != std::string::npos);
    const auto& rootfs = json::object_at(config, "rootfs");
    BOOST_TEST(json::string_at(rootfs, "type") == "layers");
    const auto diff_ids = json::strings_at(rootfs, "diff_ids");
    const auto& layers = json::array_at(manifest, "layers");
    BOOST_REQUIRE(layers.size() == 2U);
    BOOST_REQUIRE(diff_ids.size() == 2U);
    std::uint64_t size = 0;
    for (std::size_t i = 0; i < layers.size(); ++i) {
        const auto& l = layers[i].as_object();
        BOOST_TEST(json::string_at(l, "mediaType") == "application/vnd.oci.image.layer.v1.tar+gzip");
        BOOST_TEST(!l.contains("annotations"));
        const auto blob = w.content.read_all(digest::parse(json::string_at(l, "digest")));
        BOOST_TEST(json::uint_at(l, "size") == blob.size());
        size += blob.size();
        hasher plain;
        const auto source = archive::decompress(archive::read_from(bytes_of(blob)), archive::compression::gzip);
        std::vector<std::byte> buffer(65536);
        while (const auto n = source(buffer)) plain.update(std::span<const std::byte>(buffer.data(), n));
        BOOST_TEST(plain.finish().str() == diff_ids[i]);
    }
    BOOST_TEST(image.size == size);
    std::size_t with_layer = 0;
    for (const auto& h : json::array_at(config, "history")) with_layer += !json::optional_bool(h.as_object(), "empty_layer").value_or(false);
    BOOST_TEST(with_layer == 2U);
}

WORLD_CASE(dockers_types_and_other_compressions) {
    const auto root = co_await two_layers(w);
    const auto docker = co_await exporter::write_image(w.stores(), input_of(root), {.oci_types = false}, {});
    BOOST_TEST(docker.manifest.media_type == "application/vnd.docker.distribution.manifest.v2+json");
    BOOST_TEST(docker.config.media_type == "application/vnd.docker.container.image.v1+json");
    BOOST_TEST(docker.layers[0].media_type == "application/vnd.docker.image.rootfs.diff.tar.gzip");
    const auto oci = co_await exporter::write_image(w.stores(), input_of(root), {}, {});
    BOOST_TEST((oci.layers[0].digest == docker.layers[0].digest));
    BOOST_TEST((oci.config.digest == docker.config.digest));
    const auto zstd = co_await exporter::write_image(w.stores(), input_of(root), {.compression = archive::compression::zstd}, {});
    BOOST_TEST(zstd.layers[0].media_type == "application/vnd.oci.image.layer.v1.tar+zstd");
    const auto none = co_await exporter::write_image(w.stores(), input_of(root), {.compression = archive::compression::none}, {});
    BOOST_TEST(none.layers[0].media_type == "application/vnd.oci.image.layer.v1.tar");
    BOOST_TEST((config_of(w, none).diff_ids == config_of(w, zstd).diff_ids));
    BOOST_TEST((none.layers[0].digest == config_of(w, none).diff_ids[0]));
}

WORLD_CASE(a_second_export_makes_no_blob) {
    const auto root = co_await two_layers(w);
    const auto first = co_await exporter::write_image(w.stores(), input_of(root), {}, {});
    const auto blobs = w.content.list().size();
    const auto second = co_await exporter::write_image(w.stores(), input_of(root), {}, {});
    BOOST_TEST((first.manifest.digest == second.manifest.digest));
    BOOST_TEST(w.content.list().size() == blobs);
    BOOST_TEST((co_await w.snapshots->blobs(root.layers[0])).size() == 1U);
    // A blob that is gone is made again, with the same bytes.
    const auto lost = first.layers[0].digest;
    auto other = co_await exporter::write_image(w.stores(), input_of(root), {.level = 6}, {});
    BOOST_TEST((other.layers[0].digest != lost));
    BOOST_TEST((co_await w.snapshots->blobs(root.layers[0])).size() == 2U);
}

WORLD_CASE(pulled_layers_keep_their_blobs_unless_forced) {
    const auto base = co_await w.pulled("base", std::string(5000, 'b'), archive::compression::gzip);
    const auto root = co_await w.layer(base, [](const stdfs::path& p) { write_file(p / "own", "own"); });
    const auto pulled = (co_await w.snapshots->blobs(base.layers[0])).at(0);
    const auto plain = co_await exporter::write_image(w.stores(), input_of(root, "", year_2001), {.compression = archive::compression::zstd}, {});
    BOOST_TEST((plain.layers[0].digest == pulled.blob));
    BOOST_TEST(plain.layers[0].media_type == oci::media::oci_layer_gzip);  // a docker type is spelled in the manifest's language
    BOOST_TEST(plain.layers[1].media_type == oci::media::oci_layer_zstd);
    // Forced into another compression the layer is the same one: its diff id, attributes and times stay (O-EX-01).
    const exporter::image_options forced{.compression = archive::compression::zstd, .force_compression = true};
    const auto converted = co_await exporter::write_image(w.stores(), input_of(root, "", year_2001), forced, {});
    BOOST_TEST(converted.layers[0].media_type == oci::media::oci_layer_zstd);
    BOOST_TEST((config_of(w, converted).diff_ids[0] == pulled.diff_id));
    BOOST_TEST((converted.layers[1].digest == plain.layers[1].digest));
    const auto count = w.content.list().size();
    BOOST_TEST(
        ((co_await exporter::write_image(w.stores(), input_of(root, "", year_2001), forced, {})).manifest.digest == converted.manifest.digest));
    BOOST_TEST(w.content.list().size() == count);
    // What is gzip already need not be made gzip, and a forced export leaves later ones alone.
    BOOST_TEST(((co_await exporter::write_image(w.stores(), input_of(root), {.force_compression = true}, {})).layers[0].digest == pulled.blob));
    BOOST_TEST(((co_await exporter::write_image(w.stores(), input_of(root), {.compression = archive::compression::zstd}, {})).layers[0].digest ==
                pulled.blob));
}

// Reference 8.6.
WORLD_CASE(history_is_completed) {
    const auto root = co_await two_layers(w);
    const auto history = [&](const std::string& text, std::optional<std::int64_t> epoch = {}, std::string more = "") -> task<oci::image> {
        const auto config = cat(R"({"os":"linux","architecture":"amd64","history":[)", text, "]", more, "}");
        co_return config_of(w, co_await exporter::write_image(w.stores(), input_of(root, config, epoch), {}, {}));
    };
    // The layers' own times are those of their blobs.
    const auto times = (co_await history(R"({"created_by":"one"},{"created_by":"two"})")).history;
    const auto t1 = times[0].created, t2 = times[1].created;
    BOOST_TEST(parse_time(t1).has_value());
    // Fewer entries than layers, more entries than layers.
    const auto missing = (co_await history(R"({"created_by":"one"})")).history;
    BOOST_REQUIRE(missing.size() == 2U);
    BOOST_TEST(missing[1].comment == "buildkit.exporter.image.v0");
    BOOST_TEST(missing[1].created == t2);
    const auto surplus = (co_await history(R"({"created_by":"one"},{"created_by":"two"},{"created_by":"three"})")).history;
    BOOST_TEST(!surplus[1].empty_layer);
    BOOST_TEST(surplus[2].empty_layer);
    BOOST_TEST(surplus[2].created == t2);
    // Of a base comes the first entry; the one after it has no layer and takes the time of the first layer of our own.
    const std::string base = R"({"created":"2020-01-02T03:04:05Z","created_by":"base","comment":"buildkit.dockerfile.v0"})";
    const auto mixed =
        co_await history(cat(base, R"(,{"created_by":"ENV","empty_layer":true},{"created_by":"RUN"},{"created_by":"CMD","empty_layer":true})"));
    BOOST_TEST(mixed.history[0].created == "2020-01-02T03:04:05Z");
    for (const int i : {1, 2, 3}) BOOST_TEST(mixed.history[static_cast<std::size_t>(i)].created == t2);
    BOOST_TEST(mixed.created == t2);
    // Only metadata: the base's last time.
    const auto only = co_await history(cat(base, R"(,{"created":"2020-01-03T00:00:00Z"},{"created_by":"ENV","empty_layer":true})"));
    BOOST_TEST(only.history[2].created == "2020-01-03T00:00:00Z");
    BOOST_TEST(only.created == "2020-01-03T00:00:00Z");
    // An epoch cuts what is this build's, not the base's, though BuildKit built that too.
    const auto cut = co_await history(cat(base, R"(,{"created_by":"RUN"})"), year_2001);
    BOOST_TEST(cut.history[0].created == "2020-01-02T03:04:05Z");
    BOOST_TEST(cut.history[1].created == "2001-01-01T00:00:00Z");
    BOOST_TEST(cut.created == "2001-01-01T00:00:00Z");
    // A frontend's own time stays, cut to the epoch.
    BOOST_TEST((co_await history(base, {}, R"(,"created":"2019-05-06T00:00:00Z")")).created == "2019-05-06T00:00:00Z");
    BOOST_TEST((co_await history(base, year_2001, R"(,"created":"2019-05-06T00:00:00Z")")).created == "2001-01-01T00:00:00Z");
}

// O-EX-02, O-EX-03: with an epoch the same files give the same image, whenever they were written.
WORLD_CASE(an_epoch_cuts_times_of_our_own_files) {
    std::set<std::string> manifests;
    for (const int time : {1, 2}) {
        auto root = co_await w.layer({}, [&](const stdfs::path& p) {
            write_file(p / "dir/f", "text");
            fs::root(p.string()).set_mtime("dir/f", {1'700'000'000 + time, 0});
            write_file(p / "gone", "x");
            write_file(p / "old", "old");
            fs::root(p.string()).set_mtime("old", {1000, 0});
        });
        root = co_await w.layer(root, [&](const stdfs::path& p) { stdfs::remove(p / "gone"); });
        const auto image = co_await exporter::write_image(w.stores(), input_of(root, "", year_2001), {}, {});
        manifests.insert(image.manifest.digest.str());
    }
    BOOST_TEST(manifests.size() == 1U);
    const auto blob = w.content.read_all(oci::parse_manifest(w.content.read_all(digest::parse(*manifests.begin()))).layers[0].digest);
    archive::tar_reader tar(archive::decompress_auto(archive::read_from(bytes_of(blob))));
    archive::tar_entry e;
    std::map<std::string, std::int64_t> times;
    while (tar.next(e)) times[e.path] = e.mtime.seconds;
    BOOST_TEST(times.at("dir/f") == year_2001);
    BOOST_TEST(times.at("dir/") == year_2001);
    BOOST_TEST(times.at("old") == 1000);
}

BOOST_AUTO_TEST_CASE(attributes) {
    std::map<std::string, std::string> a{{"compression", "zstd"},
                                         {"compression-level", "7"},
                                         {"force-compression", ""},
                                         {"oci-mediatypes", "false"},
                                         {"annotation.a.b", "c"},
                                         {"annotation-manifest.d", "e"},
                                         {"name", "x"}};
    const auto o = exporter::take_image_options(a);
    BOOST_TEST((o.compression == archive::compression::zstd));
    BOOST_TEST(o.level.value() == 7);
    BOOST_TEST(o.force_compression);
    BOOST_TEST(!o.oci_types);
    BOOST_REQUIRE(o.annotations.size() == 2U);
    BOOST_TEST(o.annotations[0].key == "d");
    BOOST_TEST(o.annotations[1].key == "a.b");
    BOOST_TEST(o.annotations[1].value == "c");
    BOOST_TEST(a.size() == 1U);
    const std::map<std::string, std::pair<std::string, errc>> bad{{"compression", {"estargz", errc::unsupported}},
                                                                  {"compression-level", {"fast", errc::invalid}},
                                                                  {"force-compression", {"maybe", errc::invalid}},
                                                                  {"annotation-layer.k", {"v", errc::invalid}},
                                                                  {"annotation-index[linux/amd64].k", {"v", errc::invalid}}};
    for (const auto& [key, value] : bad) {
        std::map<std::string, std::string> one{{key, value.first}};
        BOOST_CHECK_EXCEPTION(exporter::take_image_options(one), error, [&](const error& e) {
            return e.kind() == value.second && std::string_view(e.what()).find(key) != std::string_view::npos;
        });
    }
}

BOOST_AUTO_TEST_SUITE_END()

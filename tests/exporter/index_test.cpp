// Several images, their index, attestations, layouts and trees.
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

#include "exporter/world_body.hpp"

namespace {

exporter::input for_platform(snapshot::chain root, std::string_view platform, std::optional<std::int64_t> epoch = {}) {
    exporter::input in = input_of(std::move(root), "", epoch);
    in.platform = oci::normalize(oci::parse_platform(platform));
    return in;
}

task<std::vector<exporter::input>> two_platforms(world& w) {
    std::vector<exporter::input> out;
    for (const auto* platform : {"linux/amd64", "linux/arm/v7"})
        out.push_back(for_platform(co_await w.layer({}, [&](const stdfs::path& p) { write_file(p / "who", platform); }), platform));
    co_return out;
}

exporter::attestation a_statement(bool inline_only = false) {
    return {.predicate_type = "https://example.org/p", .predicate = R"({"a":1})", .filename = "provenance.json", .inline_only = inline_only};
}

json::object document(const world& w, const digest& d) { return json::parse(w.content.read_all(d)).as_object(); }

constexpr std::int64_t year_2001 = 978307200;

}  // namespace

BOOST_AUTO_TEST_SUITE(indexes)

// image-spec image-index.md; field order and indent of reference 8.6.
WORLD_CASE(one_image_a_platform) {
    const auto in = co_await two_platforms(w);
    const std::vector<exporter::input> one{in[0]};
    const auto out = co_await exporter::write_images(w.stores(), in, true, {}, {}, {});
    BOOST_TEST(out.is_index());
    BOOST_TEST(out.top.media_type == "application/vnd.oci.image.index.v1+json");
    BOOST_TEST(
        out.top_bytes.starts_with("{\n  \"schemaVersion\": 2,\n  \"mediaType\": \"application/vnd.oci.image.index.v1+json\",\n  \"manifests\": ["));
    BOOST_TEST(w.content.read_all(out.top.digest) == out.top_bytes);
    const auto index = json::parse(out.top_bytes).as_object();
    const auto& list = json::array_at(index, "manifests");
    BOOST_REQUIRE(list.size() == 2U);
    const auto& second = json::object_at(list[1].as_object(), "platform");
    BOOST_TEST(json::string_at(second, "architecture") == "arm");
    BOOST_TEST(json::string_at(second, "variant") == "v7");
    for (std::size_t i = 0; i < 2; ++i) BOOST_TEST(json::string_at(list[i].as_object(), "digest") == out.images[i].manifest.digest.str());
    const auto docker = co_await exporter::write_images(w.stores(), in, true, {}, {.oci_types = false}, {});
    BOOST_TEST(docker.top.media_type == "application/vnd.docker.distribution.manifest.list.v2+json");
    // A map of one is an index too; a single result is a bare manifest (O-EX-07).
    BOOST_TEST((co_await exporter::write_images(w.stores(), one, true, {}, {}, {})).is_index());
    const auto bare = co_await exporter::write_images(w.stores(), one, false, {}, {}, {});
    BOOST_TEST(!bare.is_index());
    BOOST_TEST((bare.top.digest == out.images[0].manifest.digest));
}

WORLD_CASE(a_layer_that_platforms_share_is_made_once) {
    const auto root = co_await w.layer({}, [](const stdfs::path& p) { write_file(p / "same", "same"); });
    std::vector<exporter::input> in{for_platform(root, "linux/amd64"), for_platform(root, "linux/arm64")};
    const auto first = co_await exporter::write_images(w.stores(), in, true, {}, {}, {});
    BOOST_TEST(first.size == first.images[0].size);
    BOOST_TEST(first.images[0].created == first.images[1].created);
    BOOST_TEST((co_await w.snapshots->blobs(root.layers[0])).size() == 1U);
    BOOST_TEST(((co_await exporter::write_images(w.stores(), in, true, {}, {}, {})).top.digest == first.top.digest));
}

// Reference 8.8; O-EX-07: a look-up by platform never finds the attestation.
WORLD_CASE(attestations_stand_behind_the_images) {
    auto in = co_await two_platforms(w);
    in.pop_back();
    in[0].attestations = {a_statement()};
    const std::vector<std::string> names{"docker.io/library/app:1"};
    const auto out = co_await exporter::write_images(w.stores(), in, false, names, {}, {});
    const auto index = oci::parse_index(out.top_bytes);
    BOOST_REQUIRE(index.manifests.size() == 2U);
    const auto& entry = index.manifests[1];
    BOOST_TEST(entry.annotations.at("vnd.docker.reference.type") == "attestation-manifest");
    BOOST_TEST(entry.annotations.at("vnd.docker.reference.digest") == out.images[0].manifest.digest.str());
    BOOST_TEST(oci::format(*entry.platform) == "unknown/unknown");
    BOOST_TEST(oci::select(index, oci::parse_platform("linux/amd64")).size() == 1U);
    const auto manifest = document(w, entry.digest);
    BOOST_TEST(json::string_at(manifest, "artifactType") == "application/vnd.docker.attestation.manifest.v1+json");
    BOOST_TEST(json::string_at(json::object_at(manifest, "subject"), "digest") == out.images[0].manifest.digest.str());
    // image-spec manifest.md, "Guidance for an Empty Descriptor".
    const auto& config = json::object_at(manifest, "config");
    BOOST_TEST(json::string_at(config, "mediaType") == "application/vnd.oci.empty.v1+json");
    BOOST_TEST(json::string_at(config, "digest") == "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a");
    BOOST_TEST(json::uint_at(config, "size") == 2U);
    const auto& layer = json::array_at(manifest, "layers").at(0).as_object();
    BOOST_TEST(json::string_at(layer, "mediaType") == "application/vnd.in-toto+json");
    BOOST_TEST(json::string_map_at(layer, "annotations").at("in-toto.io/predicate-type") == "https://example.org/p");
    const auto statement = document(w, digest::parse(json::string_at(layer, "digest")));
    BOOST_TEST(json::string_at(statement, "_type") == "https://in-toto.io/Statement/v1");
    const auto& subject = json::array_at(statement, "subject").at(0).as_object();
    BOOST_TEST(json::string_at(subject, "name") == "pkg:docker/app@1?platform=linux%2Famd64");
    BOOST_TEST(json::string_map_at(subject, "digest").at("sha256") == out.images[0].manifest.digest.hex());
    BOOST_TEST(out.blobs().size() == 4U);  // of the image config and layer, of the attestation the same
    // Not as an artifact: a config with the layers' digests.
    const auto plain = co_await exporter::write_images(w.stores(), in, false, names, {.oci_artifact = false}, {});
    const auto dummy = document(w, plain.attestations.at(0).config.digest);
    BOOST_TEST(json::string_at(dummy, "os") == "unknown");
    BOOST_TEST(json::strings_at(json::object_at(dummy, "rootfs"), "diff_ids").at(0) == json::string_at(layer, "digest"));
    BOOST_TEST(!document(w, plain.attestations.at(0).manifest.digest).contains("subject"));
    // Docker's types hold none: an error, unless nobody asked for it to be there.
    BOOST_TEST((co_await failure(exporter::write_images(w.stores(), in, false, names, {.oci_types = false}, {}))).has_value());
    in[0].attestations = {a_statement(true)};
    BOOST_TEST(!(co_await exporter::write_images(w.stores(), in, false, names, {.oci_types = false}, {})).is_index());
    BOOST_TEST(!(co_await exporter::write_images(w.stores(), in, false, names, {.inline_attestations = false}, {})).is_index());
    BOOST_TEST((co_await exporter::write_images(w.stores(), in, false, names, {}, {})).is_index());
}

WORLD_CASE(annotations_of_every_kind) {
    const auto in = co_await two_platforms(w);
    std::map<std::string, std::string> a{{"annotation.all", "1"},
                                         {"annotation-manifest[linux/arm/v7].one", "2"},
                                         {"annotation[linux/arm].all", "own"},
                                         {"annotation-manifest-descriptor[linux/amd64].d", "3"},
                                         {"annotation-index.i", "4"},
                                         {"annotation-index-descriptor.x", "5"}};
    const auto options = exporter::take_image_options(a);
    BOOST_TEST(a.empty());
    const auto out = co_await exporter::write_images(w.stores(), in, true, {}, options, {});
    const auto index = oci::parse_index(out.top_bytes);
    BOOST_TEST(index.annotations.at("i") == "4");
    BOOST_TEST(out.top.annotations.at("x") == "5");
    BOOST_TEST(index.manifests[0].annotations.at("d") == "3");
    BOOST_TEST(index.manifests[1].annotations.empty());
    const auto first = oci::parse_manifest(out.images[0].manifest_bytes), second = oci::parse_manifest(out.images[1].manifest_bytes);
    BOOST_TEST((first.annotations == std::map<std::string, std::string>{{"all", "1"}}));
    BOOST_TEST((second.annotations == std::map<std::string, std::string>{{"all", "own"}, {"one", "2"}}));
    // No index, nothing to annotate.
    const std::vector<exporter::input> one{in[0]};
    const auto e = co_await failure(exporter::write_images(w.stores(), one, false, {}, options, {}));
    BOOST_REQUIRE(e.has_value());
    BOOST_TEST(std::string(e->what()).find("is for an index") != std::string::npos);
    for (const auto* bad : {"annotation-layer.x", "annotation-index[linux/amd64].x", "annotation[nowhere/at/all/x].x"}) {
        std::map<std::string, std::string> wrong{{bad, "v"}};
        BOOST_CHECK_THROW((void)exporter::take_image_options(wrong), error);
    }
    // What the pattern does not match is no annotation.
    std::map<std::string, std::string> other{{"annotation", "v"}, {"annotation.", "v"}, {"annotation.a b", "v"}, {"annotations.a", "v"}};
    BOOST_TEST(exporter::take_image_options(other).annotations.empty());
    BOOST_TEST(other.size() == 4U);
}

// Reference 8.6 and O-EX-01: base layers keep their digests, other pulled layers are rewritten.
WORLD_CASE(timestamps_are_rewritten_above_the_base) {
    const auto base = co_await w.pulled("base", "b", archive::compression::gzip);
    const auto other = co_await w.pulled("other", "o", archive::compression::gzip);
    auto chain = base;
    chain.layers.push_back(other.layers[0]);
    chain = co_await w.layer(chain, [](const stdfs::path& p) { write_file(p / "own", "own"); });
    auto in = for_platform(chain, "linux/amd64", year_2001);
    const auto base_blob = (co_await w.snapshots->blobs(base.layers[0])).at(0);
    in.base_config = cat(R"({"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[")", base_blob.diff_id.str(), R"("]}})");
    const exporter::image_options options{.rewrite_timestamps = true};
    std::vector<exporter::input> one{in};
    const auto out = co_await exporter::write_images(w.stores(), one, false, {}, options, {});
    const auto& layers = out.images.at(0).layers;
    BOOST_TEST((layers[0].digest == base_blob.blob));
    BOOST_TEST(layers[0].annotations.empty());
    for (const std::size_t i : {1U, 2U}) {
        BOOST_TEST(layers[i].annotations.at("buildkit/rewritten-timestamp") == cat(year_2001));
        const auto blob = w.content.read_all(layers[i].digest);
        archive::tar_reader tar(archive::decompress_auto(archive::read_from(bytes_of(blob))));
        archive::tar_entry e;
        while (tar.next(e)) BOOST_TEST(e.mtime.seconds <= year_2001, e.path);
    }
    const auto again = co_await exporter::write_images(w.stores(), one, false, {}, options, {});
    BOOST_TEST((again.top.digest == out.top.digest));
    one[0].epoch.reset();
    // Without a time there is nothing to cut to.
    const auto uncut = co_await exporter::write_images(w.stores(), one, false, {}, options, {});
    for (const auto& l : uncut.images.at(0).layers) BOOST_TEST(!l.annotations.contains("buildkit/rewritten-timestamp"));
}

// As BuildKit's archives have it: there the time stands beside the name; without an epoch it is the image's own.
WORLD_CASE(an_archive_of_one_image_tells_the_epoch) {
    const auto root = co_await w.layer({}, [](const stdfs::path& p) { write_file(p / "own", "own"); });
    const std::vector<exporter::input> dated{for_platform(root, "linux/amd64", 1700000000)}, plain{for_platform(root, "linux/amd64")};
    const std::string created = "org.opencontainers.image.created";
    const auto with = co_await exporter::write_images(w.stores(), dated, false, {}, {}, {});
    BOOST_TEST(with.layout_annotations.at(created) == "2023-11-14T22:13:20Z");
    const auto without = co_await exporter::write_images(w.stores(), plain, false, {}, {}, {});
    BOOST_TEST(without.layout_annotations.at(created) == without.images.at(0).created);
}

WORLD_CASE(a_layout_that_others_read) {
    auto in = co_await two_platforms(w);
    const auto out = co_await exporter::write_images(w.stores(), in, true, {}, {}, {});
    const auto dir = (w.dir / "deep/layout").string();
    const std::vector<std::string> first{"example.org/a:1"}, second{"example.org/b:2"};
    co_await exporter::write_layout(w.stores(), out, first, dir, {});
    const auto text = read_file(stdfs::path(dir) / "index.json");
    co_await exporter::write_layout(w.stores(), out, first, dir, {});
    BOOST_TEST(read_file(stdfs::path(dir) / "index.json") == text);  // replaced, not added
    co_await exporter::write_layout(w.stores(), exporter::as_exported(out.images[1]), second, dir, {});
    const auto index = oci::parse_index(read_file(stdfs::path(dir) / "index.json"));
    BOOST_REQUIRE(index.manifests.size() == 2U);
    BOOST_TEST((index.manifests[0].digest == out.top.digest));
    BOOST_TEST(index.manifests[0].annotations.contains("org.opencontainers.image.created"));
    BOOST_TEST(index.manifests[1].annotations.at("org.opencontainers.image.ref.name") == "2");
    for (const auto& e : stdfs::directory_iterator(stdfs::path(dir) / "blobs/sha256"))
        BOOST_TEST(digest::of(read_file(e.path())).hex() == e.path().filename().string());
    if (!shell("command -v skopeo")) co_return;
    BOOST_TEST(shell(cat("skopeo --override-arch arm --override-variant v7 --tmpdir ", w.dir.path().string(), " inspect oci:", dir, ":1")));
    BOOST_TEST(shell(cat("skopeo --tmpdir ", w.dir.path().string(), " copy --all oci:", dir, ":1 oci:", dir, "-copy:1")));
}

WORLD_CASE(trees_of_several_platforms) {
    auto in = co_await two_platforms(w);
    in[0].attestations = {a_statement()};
    std::vector<exporter::tree> trees;
    for (auto& i : in) {
        trees.push_back(exporter::as_tree(i));
        trees.back().extra = co_await exporter::attestation_files(w.stores(), i, "x-", "");
    }
    BOOST_REQUIRE(trees[0].extra.size() == 1U);
    BOOST_TEST(trees[0].extra[0].name == "x-provenance.json");
    const auto statement = json::parse(trees[0].extra[0].bytes).as_object();
    const auto& subject = json::array_at(statement, "subject").at(0).as_object();
    BOOST_TEST(json::string_at(subject, "name") == "who");
    BOOST_TEST(json::string_map_at(subject, "digest").at("sha256") == digest::of("linux/amd64").hex());
    BOOST_TEST((co_await exporter::attestation_files(w.stores(), in[0], "", "linux_amd64")).at(0).name == "provenance.linux_amd64.json");
    // Merged, both hold the same file.
    const auto clash = co_await failure(exporter::check_distinct(w.stores(), trees));
    BOOST_REQUIRE(clash.has_value());
    BOOST_TEST(std::string(clash->what()).find("who") != std::string::npos);
    trees[0].name = "linux_amd64";
    trees[1].name = "linux_arm_v7";
    co_await exporter::check_distinct(w.stores(), trees);
    const auto out = w.dir / "out";
    write_file(out / "stale/f", "f");
    write_file(out / "linux_amd64/stale", "f");
    co_await exporter::write_directory(w.stores(), trees, out.string(), false, {});
    BOOST_TEST(stdfs::exists(out / "stale/f"));
    co_await exporter::write_directory(w.stores(), trees, out.string(), true, {});
    BOOST_TEST(!stdfs::exists(out / "stale"));
    BOOST_TEST(!stdfs::exists(out / "linux_amd64/stale"));
    BOOST_TEST(read_file(out / "linux_arm_v7/who") == "linux/arm/v7");
    struct stat there{};
    BOOST_REQUIRE(::stat((out / "linux_amd64/x-provenance.json").c_str(), &there) == 0);
    BOOST_TEST((there.st_mode & 0777U) == 0600U);
    co_await exporter::write_tar(w.stores(), trees, {.path = (w.dir / "all.tar").string()}, {});
    const auto bytes = read_file(w.dir / "all.tar");
    archive::tar_reader tar(archive::read_from(bytes_of(bytes)));
    archive::tar_entry e;
    std::vector<std::string> paths;
    while (tar.next(e)) paths.push_back(e.path);
    const std::vector<std::string> wanted{"linux_amd64/", "linux_amd64/who", "linux_amd64/x-provenance.json", "linux_arm_v7/", "linux_arm_v7/who"};
    BOOST_TEST(paths == wanted, boost::test_tools::per_element());
}

BOOST_AUTO_TEST_SUITE_END()

// The cache config as a document: what is written is read again, what BuildKit writes is read, what is broken is refused.
#include "support/support.hpp"

#include <optional>
#include <string>
#include <vector>

import cobuild.base;
import cobuild.json;
import cobuild.oci;
import cobuild.remotecache;

using namespace cobuild;

namespace {

remotecache::layer make_layer(const std::string& name) {
    remotecache::layer l;
    l.blob.media_type = std::string(oci::media::oci_layer_gzip);
    l.blob.digest = digest::of(name);
    l.blob.size = name.size();
    l.diff_id = digest::of(name + " plain");
    l.created = "2024-05-06T07:08:09Z";
    return l;
}

std::vector<oci::descriptor> blobs_of(const remotecache::document& d) {
    std::vector<oci::descriptor> out;
    for (const auto& l : d.layers) out.push_back(l.blob);
    return out;
}

/// Two stages on one base: base, base+a, base+b; and a vertex known by its key alone.
remotecache::document sample() {
    remotecache::document d;
    d.layers = {make_layer("base"), make_layer("a"), make_layer("b")};
    d.layers[1].variant = "gzip@0";
    d.records = {{.canonical = digest::of("k-base"), .keys = {digest::of("k-chain")}, .chain = {{0}}},
                 {.canonical = digest::of("k-a"), .keys = {digest::of("k-a2"), digest::of("k-a3")}, .chain = {{0, 1}}},
                 {.canonical = digest::of("k-b"), .keys = {}, .chain = {{0, 2}}},
                 {.canonical = digest::of("k-only"), .keys = {digest::of("k-only2")}, .chain = {}}};
    return d;
}

const remotecache::record* record_of(const remotecache::document& d, const std::string& key) {
    for (const auto& r : d.records)
        if (r.canonical == digest::of(key)) return &r;
    return nullptr;
}

std::string failure(const std::string& text) {
    try {
        remotecache::decode(text, {});
    } catch (const error& e) {
        BOOST_TEST((e.kind() == errc::corrupt));
        return e.what();
    }
    return "";
}

}  // namespace

BOOST_AUTO_TEST_CASE(what_is_written_is_read_again) {
    const auto d = sample();
    const auto read = remotecache::decode(remotecache::encode(d), blobs_of(d));
    BOOST_TEST(read.layers.size() == 3u);
    BOOST_TEST(read.records.size() == 4u);
    for (const auto* key : {"k-base", "k-a", "k-b", "k-only"}) {
        const auto* before = record_of(d, key);
        const auto* after = record_of(read, key);
        BOOST_REQUIRE(after != nullptr);
        BOOST_TEST(after->keys.size() == before->keys.size());
        BOOST_REQUIRE(after->chain.has_value() == before->chain.has_value());
        if (!before->chain) continue;
        BOOST_REQUIRE(after->chain->size() == before->chain->size());
        for (std::size_t i = 0; i < before->chain->size(); ++i)
            BOOST_TEST((read.layers.at(after->chain->at(i)) == d.layers.at(before->chain->at(i))));
    }
}

// A step with a mount whose result is wanted, and a root that nobody wants.
BOOST_AUTO_TEST_CASE(further_outputs_are_read_again) {
    auto d = sample();
    d.records.push_back({.canonical = digest::of("k-step"), .keys = {digest::of("k-step2")}, .chain = {}, .others = {{1, {1}}, {3, {0, 2}}}});
    const auto read = remotecache::decode(remotecache::encode(d), blobs_of(d));
    BOOST_TEST(read.records.size() == 5u);
    const auto* r = record_of(read, "k-step");
    BOOST_REQUIRE(r != nullptr);
    BOOST_TEST(!r->chain.has_value());
    BOOST_TEST(r->keys.size() == 1u);
    BOOST_REQUIRE(r->others.size() == 2u);
    BOOST_REQUIRE(r->others.at(1).size() == 1u);
    BOOST_TEST((read.layers.at(r->others.at(1)[0]) == d.layers[1]));
    BOOST_REQUIRE(r->others.at(3).size() == 2u);
    BOOST_TEST((read.layers.at(r->others.at(3)[1]) == d.layers[2]));
    const remotecache::imported cache(read, {});
    const auto found = cache.find(digest::of("k-step2"));
    BOOST_REQUIRE(found.has_value());
    BOOST_TEST(found->loadable);
    BOOST_TEST(found->outputs == 0b1010u);
    BOOST_TEST(cache.find(digest::of("k-a"))->outputs == 1u);
    BOOST_TEST(!cache.find(digest::of("k-only"))->loadable);
}

BOOST_AUTO_TEST_CASE(the_order_of_a_document_does_not_change_its_bytes) {
    const auto d = sample();
    remotecache::document other;
    other.layers = {d.layers[2], d.layers[1], d.layers[0]};
    for (auto at = d.records.rbegin(); at != d.records.rend(); ++at) {
        other.records.push_back(*at);
        if (at->chain)
            for (auto& l : *other.records.back().chain) l = 2 - l;
    }
    BOOST_TEST(remotecache::encode(other) == remotecache::encode(d));
}

BOOST_AUTO_TEST_CASE(its_members_are_those_of_buildkit) {
    const auto d = sample();
    const auto parsed = json::parse(remotecache::encode(d));
    std::size_t roots = 0;
    for (const auto& l : json::array_at(parsed.as_object(), "layers")) {
        const auto& o = l.as_object();
        digest::parse(json::string_at(o, "blob"));
        const auto& about = json::object_at(o, "annotations");
        BOOST_TEST(json::string_at(about, "mediaType") == oci::media::oci_layer_gzip);
        digest::parse(json::string_at(about, "diffID"));
        BOOST_TEST(json::uint_at(about, "size") > 0u);
        BOOST_TEST(json::string_at(about, "createdAt") == "2024-05-06T07:08:09Z");
        if (json::optional_int(o, "parent") == -1) ++roots;
    }
    BOOST_TEST(roots == 1u);
    for (const auto& r : json::array_at(parsed.as_object(), "records")) {
        const auto& o = r.as_object();
        digest::parse(json::string_at(o, "digest"));
        if (const auto* results = json::optional_array(o, "layers"))
            for (const auto& one : *results) BOOST_TEST(json::int_at(one.as_object(), "layer") < 3);
        if (const auto* inputs = json::optional_array(o, "inputs"))
            for (const auto& alternatives : *inputs)
                for (const auto& one : alternatives.as_array()) BOOST_TEST(json::int_at(one.as_object(), "link") < 4);
    }
}

// Go leaves a zero out: a layer without "parent" stands on layer 0 (cache/remotecache/v1/types/spec.go).
BOOST_AUTO_TEST_CASE(a_document_as_buildkit_writes_it) {
    const auto base = make_layer("base"), top = make_layer("top");
    const auto layer = [](const remotecache::layer& l, const std::string& parent) {
        return cat(R"({"blob":")", l.blob.digest.str(), "\"", parent, R"(,"annotations":{"mediaType":"x","diffID":")", l.diff_id.str(),
                   R"(","size":1,"createdAt":"2024-05-06T07:08:09Z"}})");
    };
    const auto text = cat(R"({"layers":[)", layer(base, R"(,"parent":-1)"), ",", layer(top, ""), R"(],"records":[{"layers":[{"layer":1,)",
                          R"("createdAt":"2024-05-06T07:08:09Z"}],"digest":")", digest::of("one").str(), R"("},{"chains":[{"layers":[1,0],)",
                          R"("createdAt":"2024-05-06T07:08:09Z"}],"digest":")", digest::of("two").str(), R"("},{"digest":"random:abc"},{"digest":")",
                          digest::of("three").str(), R"(","inputs":[[{"selector":"/a","link":0}],[{"link":1}]]}]})");
    const auto read = remotecache::decode(text, {base.blob, top.blob});
    BOOST_TEST(read.records.size() == 2u);
    const std::vector<std::size_t> upright{0, 1}, reversed{1, 0};
    BOOST_TEST((record_of(read, "one")->chain == upright));
    BOOST_TEST((record_of(read, "two")->chain == reversed));
    BOOST_TEST(record_of(read, "three") == nullptr);

    // A blob that the manifest does not list cannot be had: then only the key is known.
    const auto without = remotecache::decode(text, {base.blob});
    BOOST_TEST(!record_of(without, "one")->chain.has_value());
    BOOST_TEST(!record_of(without, "two")->chain.has_value());
}

BOOST_AUTO_TEST_CASE(what_is_broken_is_refused) {
    const auto key = digest::of("k").str();
    BOOST_TEST(failure("[]") != "");
    BOOST_TEST(failure("{") != "");
    BOOST_TEST(failure(R"({"layers":[{"blob":"sha256:zz"}]})") != "");
    BOOST_TEST(failure(cat(R"({"records":[{"digest":")", key, R"(","layers":[{"layer":7}]}]})")).find("not listed") != std::string::npos);
    BOOST_TEST(failure(cat(R"({"records":[{"digest":")", key, R"(","chains":[{"layers":[7]}]}]})")).find("not listed") != std::string::npos);
    BOOST_TEST(failure(cat(R"({"records":[{"digest":")", key, R"(","inputs":[[{"selector":"cobuild.key","link":9}]]}]})")) != "");
    // Layers that stand on each other.
    const auto l = make_layer("l"), m = make_layer("m");
    const auto text = cat(R"({"layers":[{"blob":")", l.blob.digest.str(), R"(","parent":1,"annotations":{"diffID":")", l.diff_id.str(),
                          R"("}},{"blob":")", m.blob.digest.str(), R"(","annotations":{"diffID":")", m.diff_id.str(),
                          R"("}}],"records":[{"digest":")", key, R"(","layers":[{"layer":0}]}]})");
    BOOST_CHECK_THROW(remotecache::decode(text, {l.blob, m.blob}), error);
}

BOOST_AUTO_TEST_CASE(an_inline_cache_counts_in_the_images_own_layers) {
    auto d = sample();
    d.records.erase(d.records.begin() + 2);  // what the image does not stand on
    d.layers.clear();
    oci::image config;
    config.platform = {.os = "linux", .architecture = "amd64"};
    config.diff_ids = {digest::of("1"), digest::of("2")};
    config.history = {{.created = "2024-01-01T00:00:00Z"}, {.created_by = "ENV", .empty_layer = true}, {.created = "2024-01-02T00:00:00Z"}};
    oci::manifest manifest;
    manifest.layers = {make_layer("1").blob, make_layer("2").blob};
    BOOST_TEST(!remotecache::decode_inline(oci::encode(config), manifest).has_value());

    config.unknown.set(remotecache::inline_member, remotecache::encode_inline(d));
    const auto read = remotecache::decode_inline(oci::encode(config), manifest);
    BOOST_REQUIRE(read.has_value());
    const std::vector<std::size_t> both{0, 1}, first{0};
    BOOST_TEST((record_of(*read, "k-a")->chain == both));
    BOOST_TEST((record_of(*read, "k-base")->chain == first));
    BOOST_TEST(record_of(*read, "k-only")->keys.size() == 1u);
    BOOST_TEST((read->layers[1].diff_id == digest::of("2")));
    BOOST_TEST(read->layers[1].created == "2024-01-02T00:00:00Z");

    manifest.layers.pop_back();
    BOOST_CHECK_THROW((void)remotecache::decode_inline(oci::encode(config), manifest), error);
}

BOOST_AUTO_TEST_CASE(both_forms_of_manifest_list_config_and_blobs) {
    const auto d = sample();
    oci::descriptor config;
    config.media_type = std::string(remotecache::config_type);
    config.digest = digest::of("config");
    config.size = 6;
    struct form {
        bool image_manifest, oci_types;
        std::string_view media_type;
    };
    for (const auto& f :
         {form{true, true, oci::media::oci_manifest}, form{false, true, oci::media::oci_index}, form{false, false, oci::media::docker_list}}) {
        const auto made = remotecache::make_manifest(config, d.layers, f.image_manifest, f.oci_types);
        BOOST_TEST(made.media_type == f.media_type);
        const auto found = remotecache::find_config(made.media_type, made.bytes);
        BOOST_REQUIRE(found.has_value());
        BOOST_TEST((found->config.digest == config.digest));
        BOOST_REQUIRE(found->blobs.size() == 3u);
        BOOST_TEST(found->blobs[0].media_type == (f.oci_types ? oci::media::oci_layer_gzip : oci::media::docker_layer_gzip));
    }
    oci::manifest image;
    image.media_type = std::string(oci::media::oci_manifest);
    image.config.media_type = std::string(oci::media::oci_config);
    BOOST_TEST(!remotecache::find_config(image.media_type, oci::encode(image)).has_value());
}

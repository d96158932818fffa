#include "support/support.hpp"

#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

import cobuild.base;
import cobuild.json;
import cobuild.oci;

using namespace cobuild;

namespace {
const std::string a64(64, 'a');
const std::string b64(64, 'b');
template<class F>
std::string failure(F f) {
    try {
        f();
    } catch (const error& e) {
        return e.what();
    }
    return "no failure";
}
}  // namespace

BOOST_AUTO_TEST_CASE(manifest_round_trip_is_byte_for_byte) {
    const std::string text = cat(R"({
  "schemaVersion": 2,
  "mediaType": "application/vnd.oci.image.manifest.v1+json",
  "config": {
    "mediaType": "application/vnd.oci.image.config.v1+json",
    "digest": "sha256:)",
                                 a64, R"(",
    "size": 7
  },
  "layers": [
    {
      "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
      "digest": "sha256:)",
                                 b64, R"(",
      "size": 12345678901,
      "annotations": {
        "k": "\u003cv\u003e"
      },
      "x-own": 1
    }
  ],
  "annotations": {
    "a": "b"
  },
  "x-own": [
    true
  ]
})");
    const auto m = oci::parse_manifest(text);
    BOOST_TEST(m.layers.at(0).size == 12345678901U);
    BOOST_TEST(m.layers.at(0).annotations.at("k") == "<v>");
    BOOST_TEST(oci::encode(m) == text);
    BOOST_TEST(oci::sniff_media_type(text) == oci::media::oci_manifest);
    BOOST_TEST(failure([&] { oci::parse_index(text); }).starts_with("index: media type"));
}

BOOST_AUTO_TEST_CASE(documents_refused) {
    BOOST_TEST(failure([] { oci::parse_manifest(R"({"schemaVersion":1})"); }).starts_with("manifest: manifest schema 1"));
    BOOST_TEST(failure([] { oci::parse_manifest(R"({"schemaVersion":2})"); }) == "manifest: config: missing \"config\"");
    BOOST_TEST(failure([] { oci::parse_manifest(R"({"schemaVersion":2,"config":{},"manifests":[]})"); }) ==
               "manifest: it has the members of both a manifest and an index");
    BOOST_TEST(failure([] { oci::parse_manifest(R"({"schemaVersion":2,"config":{"mediaType":"x","digest":"sha256:short","size":1}})"); }) ==
               "manifest: config: \"digest\": \"sha256:short\" is not a sha256 digest");
    BOOST_TEST(failure([] {
                   oci::parse_manifest(cat(R"({"schemaVersion":2,"config":{"mediaType":"x","digest":"sha256:)", a64, R"(","size":-1}})"));
               }) == "manifest: config: \"size\": expected a number of at least 0, found -1");
    BOOST_TEST(failure([] { oci::parse_manifest("[]"); }) == "manifest: expected an object");
}

BOOST_AUTO_TEST_CASE(image_config_keeps_everything) {
    const std::string text = cat(
        R"({"architecture":"arm","author":"me","config":{"User":"1:2","ExposedPorts":{"80/tcp":{}},"Env":["A=b"],"Entrypoint":["e"],"Cmd":["c"],)",
        R"("Volumes":{"/v":{}},"WorkingDir":"/w","Labels":{"l":"m"},"StopSignal":"SIGINT","ArgsEscaped":true,)",
        R"("Healthcheck":{"Test":["CMD","true"],"Interval":1000000000,"Retries":3},"OnBuild":["RUN x"],"Shell":["/bin/sh"],"StopTimeout":3,"Own":{"z":1,"a":2}},)",
        R"("created":"2024-01-01T00:00:00Z","docker_version":"24","history":[{"created":"2024-01-01T00:00:00Z","created_by":"RUN a \u0026 b"},)",
        R"({"comment":"c","empty_layer":true}],"os":"linux","os.features":["f"],"rootfs":{"type":"layers","diff_ids":["sha256:)", a64,
        R"("]},"variant":"v7"})");
    const auto i = oci::parse_image(text);
    BOOST_TEST(i.platform.variant == "v7");
    BOOST_TEST(i.config.healthcheck.value().interval.count() == 1'000'000'000);
    BOOST_TEST(i.config.volumes.contains("/v"));
    BOOST_TEST(i.config.stop_timeout.value() == 3);
    BOOST_TEST(i.history.at(0).created_by == "RUN a & b");
    BOOST_TEST(i.history.at(1).empty_layer);
    BOOST_TEST(oci::encode(i) == text);
}

BOOST_AUTO_TEST_CASE(image_config_nulls_and_old_forms) {
    const auto i = oci::parse_image(
        R"({"os":"linux","architecture":"amd64","config":{"Cmd":null,"Entrypoint":"one","Volumes":null,"Env":null},"rootfs":null,"history":null})");
    BOOST_TEST(i.config.cmd.empty());
    BOOST_TEST((i.config.entrypoint == std::vector<std::string>{"one"}));
    BOOST_TEST(oci::parse_image(R"({"config":null})").config.env.empty());
}

BOOST_AUTO_TEST_CASE(chain_ids_follow_the_specification) {
    const auto x = digest::of("x");
    const auto y = digest::of("y");
    const auto ids = oci::chain_ids(std::vector{x, y});
    BOOST_TEST((ids[0] == x));
    BOOST_TEST((ids[1] == digest::of(cat(x.str(), " ", y.str()))));
}

BOOST_AUTO_TEST_CASE(layer_types) {
    BOOST_TEST((oci::layer_compression(oci::media::docker_layer_gzip) == oci::compression::gzip));
    BOOST_TEST(oci::layer_media_type(oci::compression::zstd, false) == oci::media::oci_layer_zstd);
    BOOST_TEST(oci::is_nondistributable(oci::media::docker_foreign_layer_gzip));
    BOOST_TEST(!oci::is_layer(oci::media::oci_config));
    BOOST_CHECK_THROW(oci::layer_compression("text/plain"), error);
}

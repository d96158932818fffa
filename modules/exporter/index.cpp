module;
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.exporter;

import cobuild.json;

namespace cobuild::exporter {

/// image.cpp
std::map<std::string, std::string> annotations_for(const image_options& options, annotated what, const std::optional<oci::platform>& platform);

/// contents.cpp
async::task<std::vector<attestation>> with_layers(stores s, std::vector<attestation> all, snapshot::chain root, std::vector<oci::descriptor> layers);

std::map<digest, oci::descriptor> exported::blobs() const {
    std::map<digest, oci::descriptor> out;
    for (const auto* list : {&images, &attestations})
        for (const auto& i : *list) {
            out.emplace(i.config.digest, i.config);
            for (const auto& l : i.layers) out.emplace(l.digest, l);
        }
    return out;
}

exported as_exported(image i) {
    exported out;
    out.top = i.manifest;
    out.top_bytes = i.manifest_bytes;
    out.size = i.size;
    out.keep = i.keep;
    out.images.push_back(std::move(i));
    return out;
}

namespace {

constexpr std::string_view created_annotation = "org.opencontainers.image.created";
constexpr std::string_view attestation_type = "application/vnd.docker.attestation.manifest.v1+json";
constexpr std::string_view empty_type = "application/vnd.oci.empty.v1+json";

oci::descriptor describe(std::string_view media_type, const content::stored& what) {
    oci::descriptor out;
    out.media_type = std::string(media_type);
    out.digest = what.digest;
    out.size = what.size;
    return out;
}

std::vector<subject> subjects_of(const image& of, const oci::platform& platform, const std::vector<std::string>& names) {
    std::vector<subject> out;
    for (const auto& name : names) out.push_back({package_url("docker", oci::reference::parse(name), platform), of.manifest.digest.hex()});
    if (out.empty()) out.push_back({"_", of.manifest.digest.hex()});
    return out;
}

/// What stands for a config where the attestation manifest is to look like an image.
std::string dummy_config(const std::vector<oci::descriptor>& layers) {
    oci::image config;
    config.platform = {.os = "unknown", .architecture = "unknown"};
    for (const auto& l : layers) config.diff_ids.push_back(l.digest);
    return oci::encode(config);
}

/// On a pool thread.
image write_attestations(content::store& content, const std::vector<attestation>& all, const image& of, const std::vector<subject>& subjects,
                         bool artifact) {
    image out;
    oci::manifest manifest;
    manifest.media_type = std::string(oci::media::oci_manifest);
    for (const auto& a : all) {
        auto stored = content.put(make_statement(with_layers(a, of.layers), subjects));
        auto layer = describe(oci::media::in_toto, stored);
        layer.annotations["in-toto.io/predicate-type"] = a.predicate_type;
        manifest.layers.push_back(std::move(layer));
        out.keep += std::move(stored.keep);
    }
    auto config = content.put(artifact ? std::string("{}") : dummy_config(manifest.layers));
    manifest.config = describe(artifact ? empty_type : oci::media::oci_config, config);
    if (artifact) {
        manifest.artifact_type = std::string(attestation_type);
        manifest.config.unknown.set("data", json::value("e30="));
        oci::descriptor about;
        about.media_type = of.manifest.media_type;
        about.digest = of.manifest.digest;
        about.size = of.manifest.size;
        manifest.subject = std::move(about);
    }
    out.manifest_bytes = oci::encode(manifest);
    auto stored = content.put(out.manifest_bytes);
    out.manifest = describe(manifest.media_type, stored);
    out.manifest.annotations = {{"vnd.docker.reference.digest", of.manifest.digest.str()}, {"vnd.docker.reference.type", "attestation-manifest"}};
    out.manifest.platform = oci::platform{.os = "unknown", .architecture = "unknown"};
    out.config = manifest.config;
    out.layers = manifest.layers;
    out.keep += std::move(config.keep);
    out.keep += std::move(stored.keep);
    return out;
}

/// What is written into an image: nothing that is not wanted inline, nothing that Docker's types cannot hold.
std::vector<attestation> wanted(const input& in, const image_options& options) {
    std::vector<attestation> out;
    for (const auto& a : in.attestations) {
        if (a.inline_only && (!options.inline_attestations || !options.oci_types)) continue;
        if (!options.oci_types)
            throw error{errc::invalid, "attestations need the media types of OCI: leave out oci-mediatypes=false, or the attestation"};
        out.push_back(a);
    }
    return out;
}

void check_annotations(const image_options& options, bool index) {
    for (const auto& a : options.annotations) {
        const bool of_index = a.what == annotated::index || a.what == annotated::index_descriptor;
        if (of_index && !index)
            throw error{errc::invalid, cat("the annotation ", quoted(a.key),
                                           " is for an index, and one platform without attestations makes none: it can be set on the manifest")};
        if (!options.oci_types && a.what != annotated::manifest)
            throw error{errc::invalid, cat("the annotation ", quoted(a.key), " needs the media types of OCI: leave out oci-mediatypes=false")};
    }
}

/// On a pool thread.
void write_index(content::store& content, exported& out, const image_options& options) {
    oci::index index;
    index.media_type = std::string(options.oci_types ? oci::media::oci_index : oci::media::docker_list);
    if (options.oci_types) index.annotations = annotations_for(options, annotated::index, {});
    for (const auto* list : {&out.images, &out.attestations})
        for (const auto& i : *list) index.manifests.push_back(i.manifest);
    out.top_bytes = oci::encode(index);
    auto stored = content.put(out.top_bytes);
    out.top = describe(index.media_type, stored);
    if (options.oci_types) out.top.annotations = annotations_for(options, annotated::index_descriptor, {});
    out.keep += std::move(stored.keep);
    std::string created;
    for (const auto& i : out.images) created = std::max(created, i.created);
    if (options.oci_types && !created.empty()) out.layout_annotations[std::string(created_annotation)] = created;
}

}  // namespace

async::task<exported> write_images(stores s, std::vector<input> in, bool map, std::vector<std::string> names, image_options options,
                                   progress::writer progress) {
    std::vector<std::vector<attestation>> attested;
    bool index = map || in.size() != 1;
    for (const auto& i : in) index = !attested.emplace_back(wanted(i, options)).empty() || index;
    check_annotations(options, index);
    exported out;
    // One after the other, each with every core: a layer that two platforms share is then made once, and has one time.
    for (const auto& i : in) out.images.push_back(co_await write_image(s, i, options, progress));
    if (!index) {
        auto single = as_exported(std::move(out.images.front()));
        if (const auto& created = single.images.front().created; options.oci_types && !created.empty())
            single.layout_annotations[std::string(created_annotation)] = created;
        co_return single;
    }
    for (std::size_t i = 0; i < in.size(); ++i) {
        out.keep += out.images[i].keep;
        if (attested[i].empty()) continue;
        attested[i] = co_await with_layers(s, std::move(attested[i]), in[i].root, out.images[i].layers);
        const auto subjects = subjects_of(out.images[i], in[i].platform, names);
        out.attestations.push_back(
            co_await s.pool.run([&] { return write_attestations(s.content, attested[i], out.images[i], subjects, options.oci_artifact); }));
        out.keep += out.attestations.back().keep;
        progress.begin(cat("exporting attestation manifest ", out.attestations.back().manifest.digest.str())).done();
    }
    co_await s.pool.run([&] { write_index(s.content, out, options); });
    progress.begin(cat(options.oci_types ? "exporting manifest list " : "exporting docker manifest list ", out.top.digest.str())).done();
    std::map<digest, std::uint64_t> sizes;
    for (const auto& i : out.images)
        for (const auto& l : i.layers) sizes[l.digest] = l.size;
    for (const auto& [d, size] : sizes) out.size += size;
    co_return out;
}

}  // namespace cobuild::exporter

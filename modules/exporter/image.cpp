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

import cobuild.fs;

namespace cobuild::exporter {

namespace {

constexpr std::string_view created_at = "buildkit/createdat";
constexpr std::string_view pulled_variant = "pulled";

struct layer_with_blob {
    snapshot::layer_blob blob;
    state::pin keep;
    bool pulled = false;
};

/// How a blob of ours was made, as the layer remembers it. An epoch changes the bytes, so it is part of the name.
std::string variant_of(const input& in, const image_options& options) {
    std::string out(archive::to_string(options.compression));
    if (options.level) out += cat(":", *options.level);
    if (in.epoch) out += cat("@", *in.epoch);
    return out;
}

/// Diffs and compresses one layer into the content store. On a pool thread.
layer_with_blob compress_layer(const stores& s, const snapshot::chain& below, snapshot::layer_id id, const input& in, const image_options& options,
                               unsigned threads) {
    const auto upper = s.snapshots.layer_dir(id);
    const auto lower_dirs = s.snapshots.layer_dirs(below);
    std::vector<int> lower_fds;
    for (const auto& d : lower_dirs) lower_fds.push_back(d.get());
    archive::lower_chain lower(std::move(lower_fds));
    auto draft = s.content.new_draft();
    archive::blob_writer blob(archive::write_to(draft.fd()), {.kind = options.compression, .level = options.level, .threads = threads});
    archive::tar_writer tar(blob.sink());
    archive::diff_layer(upper.get(), lower, tar, {.clamp_mtime = in.epoch});
    const auto made = blob.finish();
    auto stored = s.content.adopt(std::move(draft), made.digest, made.size);
    layer_with_blob out;
    out.blob.variant = variant_of(in, options);
    out.blob.blob = made.digest;
    out.blob.size = made.size;
    out.blob.diff_id = made.diff_id;
    const auto kind = options.compression == archive::compression::zstd   ? oci::compression::zstd
                      : options.compression == archive::compression::gzip ? oci::compression::gzip
                                                                          : oci::compression::none;
    out.blob.media_type = std::string(oci::layer_media_type(kind, false));
    // When the layer came to be: BuildKit keeps the same under this name. It makes a cached rebuild's config the same.
    out.blob.annotations[std::string(created_at)] = format_time(std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now()));
    out.keep = std::move(stored.keep);
    return out;
}

/// A blob of the layer that serves these options and is still in the content store.
std::optional<layer_with_blob> known_blob(const stores& s, const std::vector<snapshot::layer_blob>& blobs, const input& in, const image_options& options) {
    const std::string wanted = variant_of(in, options);
    for (const bool pulled : {false, true}) {
        if (pulled && options.force_compression) break;
        for (const auto& b : blobs) {
            if ((b.variant == pulled_variant) != pulled || (!pulled && b.variant != wanted)) continue;
            if (auto held = s.content.hold(b.blob)) return layer_with_blob{b, std::move(held->keep), pulled};
        }
    }
    return std::nullopt;
}

async::task<void> provide(stores s, input in, image_options options, std::size_t index, std::shared_ptr<std::vector<layer_with_blob>> out,
                          std::shared_ptr<async::semaphore> cores, unsigned threads) {
    const auto id = in.root.layers[index];
    if (auto known = known_blob(s, co_await s.snapshots.blobs(id), in, options)) {
        (*out)[index] = std::move(*known);
        co_return;
    }
    const auto turn = co_await cores->acquire();
    snapshot::chain below{{in.root.layers.begin(), in.root.layers.begin() + static_cast<std::ptrdiff_t>(index)}};
    (*out)[index] = co_await s.pool.run([s, below = std::move(below), id, in, options, threads] { return compress_layer(s, below, id, in, options, threads); });
    co_await s.snapshots.set_blob(id, (*out)[index].blob);
}

async::task<std::vector<layer_with_blob>> provide_layers(stores s, input in, image_options options) {
    auto out = std::make_shared<std::vector<layer_with_blob>>(in.root.layers.size());
    auto cores = std::make_shared<async::semaphore>(std::max(1U, s.threads));
    std::vector<async::task<void>> work;
    // One big layer uses every core by itself; the compressor's bytes do not depend on the number of threads.
    for (std::size_t i = 0; i < in.root.layers.size(); ++i) work.push_back(provide(s, in, options, i, out, cores, std::max(1U, s.threads)));
    co_await async::when_all(std::move(work));
    co_return std::move(*out);
}

// ---------------------------------------------------------------- config

/// `t`, cut to the epoch where there is one.
std::string clamp(const std::string& t, const std::optional<std::int64_t>& epoch) {
    if (!epoch) return t;
    const std::chrono::sys_time<nanoseconds> limit{std::chrono::seconds{*epoch}};
    const auto parsed = parse_time(t);
    return !parsed || *parsed > limit ? format_time(limit) : t;
}

std::string created_of(const layer_with_blob& l) {
    const auto at = l.blob.annotations.find(std::string(created_at));
    return at == l.blob.annotations.end() ? "" : at->second;
}

/// History and layers made to agree (BuildKit's normalization): a layer without an entry gets one, an entry without a
/// layer becomes empty; times are those of the layers, empty entries take their neighbour's.
void complete_history(oci::image& config, const std::vector<layer_with_blob>& layers, const std::optional<std::int64_t>& epoch) {
    std::size_t next = 0;
    for (auto& entry : config.history) {
        if (entry.empty_layer) continue;
        if (next < layers.size()) {
            if (entry.created.empty()) entry.created = created_of(layers[next]);
            ++next;
        } else {
            entry.empty_layer = true;
        }
    }
    for (; next < layers.size(); ++next)
        config.history.push_back({.created = created_of(layers[next]), .comment = "buildkit.exporter.image.v0"});
    std::string last;
    for (const auto& l : layers)
        if (!l.pulled && last.empty()) last = created_of(l);
    // A build that only changes the config has no time of its own but the epoch.
    if (last.empty()) last = config.created.empty() ? format_time(std::chrono::sys_time<nanoseconds>{}) : config.created;
    bool ours = false;
    for (auto& entry : config.history) {
        const bool was_empty = entry.created.empty();
        if (was_empty) entry.created = last;
        ours = ours || was_empty || entry.comment == "buildkit.dockerfile.v0";
        if (ours) entry.created = clamp(entry.created, epoch);
        last = entry.created;
    }
    config.created = config.history.empty() ? clamp(last, epoch) : config.history.back().created;
}

std::string make_config(const input& in, const std::vector<layer_with_blob>& layers) {
    oci::image config;
    if (in.config.empty()) config.platform = in.platform;
    else config = oci::parse_image(in.config);
    if (config.platform.os.empty()) config.platform = in.platform;
    config.diff_ids.clear();
    for (const auto& l : layers) config.diff_ids.push_back(l.blob.diff_id);
    complete_history(config, layers, in.epoch);
    return oci::encode(config);
}

oci::descriptor layer_descriptor(const layer_with_blob& l, bool oci_types) {
    oci::descriptor d;
    d.media_type = std::string(oci::layer_media_type(oci::layer_compression(l.blob.media_type), !oci_types));
    d.digest = l.blob.blob;
    d.size = l.blob.size;
    return d;
}

}  // namespace

async::task<image> write_image(stores s, input in, image_options options, progress::writer progress) {
    auto exporting = progress.begin("exporting layers");
    const auto layers = co_await provide_layers(s, in, options);
    exporting.done();
    image out;
    oci::manifest manifest;
    manifest.media_type = std::string(options.oci_types ? oci::media::oci_manifest : oci::media::docker_manifest);
    if (options.oci_types) manifest.annotations = options.annotations;
    for (const auto& l : layers) {
        manifest.layers.push_back(layer_descriptor(l, options.oci_types));
        out.size += l.blob.size;
        out.keep += l.keep;
    }
    const std::string config = make_config(in, layers);
    auto stored_config = co_await s.pool.run([&s, &config] { return s.content.put(config); });
    manifest.config.media_type = std::string(options.oci_types ? oci::media::oci_config : oci::media::docker_config);
    manifest.config.digest = stored_config.digest;
    manifest.config.size = stored_config.size;
    progress.begin(cat("exporting config ", stored_config.digest.str())).done();
    out.manifest_bytes = oci::encode(manifest);
    auto stored = co_await s.pool.run([&s, &out] { return s.content.put(out.manifest_bytes); });
    progress.begin(cat("exporting manifest ", stored.digest.str())).done();
    out.keep += stored_config.keep;
    out.keep += stored.keep;
    out.manifest.media_type = manifest.media_type;
    out.manifest.digest = stored.digest;
    out.manifest.size = stored.size;
    out.manifest.platform = in.platform;
    out.config = manifest.config;
    out.layers = manifest.layers;
    co_return out;
}

}  // namespace cobuild::exporter

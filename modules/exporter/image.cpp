module;
#include <algorithm>
#include <chrono>
#include <cstddef>
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

/// index.cpp asks as well.
std::map<std::string, std::string> annotations_for(const image_options& options, annotated what, const std::optional<oci::platform>& platform);

namespace {

constexpr std::string_view created_at = "buildkit/createdat";
constexpr std::string_view pulled_variant = "pulled";

struct layer_with_blob {
    snapshot::layer_blob blob;
    state::pin keep;
    bool pulled = false;
};

/// How a blob of ours was made, as the layer remembers it. An epoch changes the bytes, so it is part of the name.
std::string variant_of(const std::optional<std::int64_t>& epoch, const image_options& options) {
    std::string out(archive::to_string(options.compression));
    if (options.level) out += cat(":", *options.level);
    if (epoch) out += cat("@", *epoch);
    return out;
}

std::string rewritten_variant(std::int64_t epoch, const image_options& options) { return cat("rewritten-", variant_of(epoch, options)); }

oci::compression oci_kind(archive::compression kind) {
    switch (kind) {
        case archive::compression::zstd: return oci::compression::zstd;
        case archive::compression::gzip: return oci::compression::gzip;
        case archive::compression::none: break;
    }
    return oci::compression::none;
}

/// Compresses what `fill` writes into the content store.
template<class F>
layer_with_blob store_blob(const stores& s, std::string variant, const image_options& options, unsigned threads, F fill) {
    auto draft = s.content.new_draft();
    archive::blob_writer blob(archive::write_to(draft.fd()), {.kind = options.compression, .level = options.level, .threads = threads});
    fill(blob);
    const auto made = blob.finish();
    auto stored = s.content.adopt(std::move(draft), made.digest, made.size);
    layer_with_blob out;
    out.blob.variant = std::move(variant);
    out.blob.blob = made.digest;
    out.blob.size = made.size;
    out.blob.diff_id = made.diff_id;
    out.blob.media_type = std::string(oci::layer_media_type(oci_kind(options.compression), false));
    out.keep = std::move(stored.keep);
    return out;
}

/// Diffs and compresses one layer. On a pool thread.
layer_with_blob compress_layer(const stores& s, const snapshot::chain& below, snapshot::layer_id id, const input& in, const image_options& options,
                               unsigned threads) {
    const auto upper = s.snapshots.layer_dir(id);
    const auto lower_dirs = s.snapshots.layer_dirs(below);
    std::vector<int> lower_fds;
    for (const auto& d : lower_dirs) lower_fds.push_back(d.get());
    archive::lower_chain lower(std::move(lower_fds));
    auto out = store_blob(s, variant_of(in.epoch, options), options, threads, [&](archive::blob_writer& blob) {
        archive::tar_writer tar(blob.sink());
        archive::diff_layer(upper.get(), lower, tar, {.clamp_mtime = in.epoch});
    });
    // When the layer came to be: BuildKit keeps the same under this name. It makes a cached rebuild's config the same.
    out.blob.annotations[std::string(created_at)] = format_time(std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now()));
    return out;
}

/// The same layer bytes in another compression: the diff id, which the base's config names, stays. On a pool thread.
layer_with_blob convert_blob(const stores& s, const snapshot::layer_blob& pulled, const image_options& options, unsigned threads) {
    const auto file = s.content.open(pulled.blob);
    auto out = store_blob(s, variant_of({}, options), options, threads, [&](archive::blob_writer& blob) {
        const auto plain = archive::decompress_auto(archive::read_from(file.get()));
        std::vector<std::byte> buffer(std::size_t{1} << 20);
        while (const std::size_t n = plain(buffer)) blob.write({buffer.data(), n});
    });
    if (out.blob.diff_id != pulled.diff_id)
        throw error{errc::corrupt, cat("the blob ", pulled.blob.str(), " in the content store unpacks to ", out.blob.diff_id.str(), ", not to ",
                                       pulled.diff_id.str())};
    out.pulled = true;
    return out;
}

/// A pulled layer that is none of the base's, with its times cut to the epoch. On a pool thread.
layer_with_blob rewrite_blob(const stores& s, const snapshot::layer_blob& pulled, std::int64_t epoch, const image_options& options,
                             unsigned threads) {
    const auto file = s.content.open(pulled.blob);
    auto out = store_blob(s, rewritten_variant(epoch, options), options, threads, [&](archive::blob_writer& blob) {
        archive::tar_reader in(archive::decompress_auto(archive::read_from(file.get())));
        archive::tar_writer tar(blob.sink());
        archive::tar_entry entry;
        while (in.next(entry)) {
            if (entry.mtime.seconds >= epoch) entry.mtime = {epoch, 0};
            tar.add(entry);
            for (auto part = in.data(); !part.empty(); part = in.data()) tar.write(part);
        }
        tar.finish();
    });
    out.pulled = true;
    return out;
}

/// A pulled blob serves as it came, unless another compression is forced.
bool serves(const snapshot::layer_blob& pulled, const image_options& options) {
    if (!options.force_compression) return true;
    return !options.level && oci::layer_compression(pulled.media_type) == oci_kind(options.compression);
}

/// The blob of `variant` that is still in the content store.
std::optional<layer_with_blob> find_blob(const stores& s, const std::vector<snapshot::layer_blob>& blobs, const std::string& variant) {
    for (const auto& b : blobs) {
        if (b.variant != variant) continue;
        if (auto held = s.content.hold(b.blob)) return layer_with_blob{b, std::move(held->keep), variant == pulled_variant};
    }
    return std::nullopt;
}

/// Whether layer `index` is the base image's, as far as its config tells.
bool is_of_base(const input& in, std::size_t index, const digest& diff_id) {
    if (in.base_config.empty()) return false;
    const auto base = oci::parse_image(in.base_config).diff_ids;
    return index < base.size() && base[index] == diff_id;
}

/// The layer's blob for these options; `fresh` tells that it was made now.
layer_with_blob find_or_make(const stores& s, const std::vector<snapshot::layer_blob>& blobs, const snapshot::chain& below, snapshot::layer_id id,
                             const input& in, const image_options& options, unsigned threads, bool& fresh) {
    auto pulled = find_blob(s, blobs, std::string(pulled_variant));
    if (pulled && options.rewrite_timestamps && in.epoch && !is_of_base(in, below.layers.size(), pulled->blob.diff_id)) {
        auto known = find_blob(s, blobs, rewritten_variant(*in.epoch, options));
        if (known) known->pulled = true;
        fresh = !known;
        return known ? std::move(*known) : rewrite_blob(s, pulled->blob, *in.epoch, options, threads);
    }
    if (pulled && serves(pulled->blob, options)) return std::move(*pulled);
    // No file time of a pulled layer is cut to an epoch.
    if (auto known = find_blob(s, blobs, variant_of(pulled ? std::nullopt : in.epoch, options))) {
        known->pulled = pulled.has_value();
        return std::move(*known);
    }
    fresh = true;
    return pulled ? convert_blob(s, pulled->blob, options, threads) : compress_layer(s, below, id, in, options, threads);
}

async::task<void> provide(stores s, input in, image_options options, std::size_t index, std::shared_ptr<std::vector<layer_with_blob>> out,
                          std::shared_ptr<async::semaphore> cores, unsigned threads) {
    const auto id = in.root.layers[index];
    const auto blobs = co_await s.snapshots.blobs(id);
    const auto turn = co_await cores->acquire();
    const snapshot::chain below{{in.root.layers.begin(), in.root.layers.begin() + static_cast<std::ptrdiff_t>(index)}};
    bool fresh = false;
    (*out)[index] = co_await s.pool.run([&] { return find_or_make(s, blobs, below, id, in, options, threads, fresh); });
    if (fresh) co_await s.snapshots.set_blob(id, (*out)[index].blob);
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

/// A layer without an entry gets one, an entry without a layer becomes empty.
void match_layers(oci::image& config, const std::vector<layer_with_blob>& layers) {
    std::size_t next = 0;
    for (auto& entry : config.history) {
        if (entry.empty_layer) continue;
        if (next == layers.size())
            entry.empty_layer = true;
        else
            ++next;
    }
    for (; next < layers.size(); ++next) config.history.push_back({.comment = "buildkit.exporter.image.v0"});
}

/// Entries of this build come without a time; those of a base image keep theirs (BuildKit's normalization). A layer's entry
/// takes the layer's; any other the time of the one before it, and those before the first new layer take that one's.
void complete_history(oci::image& config, const std::vector<layer_with_blob>& layers, const std::optional<std::int64_t>& epoch) {
    match_layers(config, layers);
    std::vector<oci::history_entry*> ours;
    for (auto& entry : config.history)
        if (entry.created.empty()) ours.push_back(&entry);
    std::size_t next = 0;
    for (auto& entry : config.history) {
        if (entry.empty_layer) continue;
        if (entry.created.empty()) entry.created = created_of(layers[next]);
        ++next;
    }
    std::string time;
    bool gap = false;
    for (const auto& entry : config.history) {
        if (entry.created.empty()) {
            gap = true;
            continue;
        }
        time = entry.created;
        if (gap) break;
    }
    // Nothing in the image has a time: only the config was made.
    if (time.empty()) time = format_time(std::chrono::sys_time<nanoseconds>{});
    gap = false;
    for (auto& entry : config.history) {
        if (entry.created.empty()) {
            gap = true;
            entry.created = time;
        } else if (gap) {
            time = entry.created;
        }
    }
    for (auto* entry : ours) entry->created = clamp(entry->created, epoch);
    if (config.created.empty()) config.created = config.history.empty() ? time : config.history.back().created;
    config.created = clamp(config.created, epoch);
}

std::string make_config(const input& in, const std::vector<layer_with_blob>& layers) {
    oci::image config;
    if (in.config.empty())
        config.platform = in.platform;
    else
        config = oci::parse_image(in.config);
    if (config.platform.os.empty()) config.platform = in.platform;
    config.diff_ids.clear();
    for (const auto& l : layers) config.diff_ids.push_back(l.blob.diff_id);
    complete_history(config, layers, in.epoch);
    return oci::encode(config);
}

/// The type of a layer that must not be pushed, in OCI's or Docker's words (Docker has one for gzip only).
std::string nondistributable_type(oci::compression kind, bool oci_types) {
    if (!oci_types && kind == oci::compression::gzip) return std::string(oci::media::docker_foreign_layer_gzip);
    std::string out = "application/vnd.oci.image.layer.nondistributable.v1.tar";
    if (kind != oci::compression::none) out += kind == oci::compression::gzip ? "+gzip" : "+zstd";
    return out;
}

oci::descriptor layer_descriptor(const layer_with_blob& l, const input& in, const image_options& options) {
    oci::descriptor d;
    const auto kind = oci::layer_compression(l.blob.media_type);
    d.media_type = options.keep_nondistributable && oci::is_nondistributable(l.blob.media_type)
                       ? nondistributable_type(kind, options.oci_types)
                       : std::string(oci::layer_media_type(kind, !options.oci_types));
    if (options.rewrite_timestamps && options.oci_types && in.epoch && (!l.pulled || l.blob.variant.starts_with("rewritten-")))
        d.annotations["buildkit/rewritten-timestamp"] = cat(*in.epoch);
    d.digest = l.blob.blob;
    d.size = l.blob.size;
    return d;
}

}  // namespace

std::map<std::string, std::string> annotations_for(const image_options& options, annotated what, const std::optional<oci::platform>& platform) {
    std::map<std::string, std::string> out;
    // Those of one platform stand over those of all.
    for (const bool own : {false, true})
        for (const auto& a : options.annotations)
            if (a.what == what && a.platform.has_value() == own && (!own || (platform && oci::normalize(*platform) == *a.platform)))
                out[a.key] = a.value;
    return out;
}

async::task<image> write_image(stores s, input in, image_options options, progress::writer progress) {
    auto exporting = progress.begin("exporting layers");
    const auto layers = co_await provide_layers(s, in, options);
    exporting.done();
    image out;
    oci::manifest manifest;
    manifest.media_type = std::string(options.oci_types ? oci::media::oci_manifest : oci::media::docker_manifest);
    if (options.oci_types) manifest.annotations = annotations_for(options, annotated::manifest, in.platform);
    for (const auto& l : layers) {
        manifest.layers.push_back(layer_descriptor(l, in, options));
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
    if (options.oci_types) out.manifest.annotations = annotations_for(options, annotated::manifest_descriptor, in.platform);
    out.config = manifest.config;
    out.layers = manifest.layers;
    out.created = oci::parse_image(config).created;
    co_return out;
}

}  // namespace cobuild::exporter

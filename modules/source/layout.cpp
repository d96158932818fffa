module;
#include <fcntl.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.source;

import cobuild.archive;
import cobuild.fs;
import cobuild.json;

namespace cobuild::source {

namespace {

constexpr std::size_t max_document = std::size_t{8} << 20;
constexpr std::string_view tag_annotation = "org.opencontainers.image.ref.name";

std::string blob_path(const digest& d) { return cat("blobs/sha256/", d.hex()); }

std::string read_document(const fs::root& layout, const oci::descriptor& d) {
    if (!layout.stat(blob_path(d.digest), fs::links::follow)) throw error{errc::not_found, cat("the blob ", d.digest.str(), " is missing")};
    auto text = layout.read_file(blob_path(d.digest), max_document);
    if (digest::of(text) != d.digest) throw error{errc::corrupt, cat("the blob ", d.digest.str(), " is not what its name says")};
    return text;
}

/// The one that is named, or the only one there is.
oci::descriptor choose(const oci::index& all, const std::string& tag, const std::optional<digest>& wanted) {
    std::vector<oci::descriptor> fits;
    for (const auto& d : all.manifests) {
        const auto name = d.annotations.find(std::string(tag_annotation));
        const bool named = name != d.annotations.end() && (name->second == tag || name->second.ends_with(":" + tag));
        if (wanted ? d.digest == *wanted : tag.empty() || named) fits.push_back(d);
    }
    // Layouts of one image often bear no name at all.
    if (fits.empty() && !wanted && all.manifests.size() == 1 && tag == "latest") fits = all.manifests;
    if (fits.size() == 1) return fits.front();
    if (fits.empty()) throw error{errc::not_found, wanted ? cat("there is no ", wanted->str()) : cat("there is no image named ", tag)};
    throw error{errc::invalid, "there are several images; name one by :TAG or @DIGEST"};
}

void import_blob(content::store& content, const fs::root& layout, const oci::descriptor& d, state::pin& keep) {
    if (auto held = content.hold(d.digest)) {
        keep += held->keep;
        return;
    }
    const auto file = layout.try_open(blob_path(d.digest), O_RDONLY);
    if (!file) throw error{errc::not_found, cat("the blob ", d.digest.str(), " is missing")};
    auto out = content.ingest(d.size);
    auto in = archive::read_from(file->get());
    std::vector<std::byte> buffer(std::size_t{1} << 20);
    for (std::size_t n = in(buffer); n > 0; n = in(buffer)) out.write(std::span<const std::byte>(buffer).first(n));
    keep += out.commit(d.digest, d.size).keep;
}

imported_layout import_blocking(content::store& content, const std::string& directory, const std::string& tag, const std::optional<digest>& wanted,
                                const oci::platform& platform) {
    const fs::root layout(directory);
    if (!layout.stat("index.json", fs::links::follow)) throw error{errc::not_found, "there is no index.json, so it is no OCI layout"};
    imported_layout out;
    out.top = choose(oci::parse_index(layout.read_file("index.json", max_document)), tag, wanted);
    auto manifest = out.top;
    for (unsigned depth = 0; oci::is_index(manifest.media_type); ++depth) {
        if (depth == 4) throw error{errc::invalid, "indexes are nested too deeply"};
        const auto text = read_document(layout, manifest);
        import_blob(content, layout, manifest, out.keep);
        const auto fits = oci::select(oci::parse_index(text), platform);
        if (fits.empty()) throw error{errc::not_found, cat("there is no image for ", oci::format(platform))};
        manifest = fits.front();
    }
    const auto parsed = oci::parse_manifest(read_document(layout, manifest));
    import_blob(content, layout, manifest, out.keep);
    import_blob(content, layout, parsed.config, out.keep);
    for (const auto& l : parsed.layers) import_blob(content, layout, l, out.keep);
    return out;
}

}  // namespace

async::task<imported_layout> import_layout(async::blocking_pool& pool, content::store& content, std::filesystem::path directory, std::string tag,
                                           std::optional<digest> wanted, oci::platform platform) {
    co_return co_await pool.run([&] {
        try {
            return import_blocking(content, directory.string(), tag, wanted, platform);
        } catch (const error& e) {
            throw error(e).with(cat("the OCI layout ", directory.string()));
        }
    });
}

}  // namespace cobuild::source

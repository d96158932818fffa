module;
#include <algorithm>
#include <charconv>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.exporter;

namespace cobuild::exporter {

std::optional<std::string> take_text(std::map<std::string, std::string>& attributes, const std::string& key) {
    const auto at = attributes.find(key);
    if (at == attributes.end()) return std::nullopt;
    std::string value = std::move(at->second);
    attributes.erase(at);
    return value;
}

std::optional<bool> take_flag(std::map<std::string, std::string>& attributes, const std::string& key) {
    const auto text = take_text(attributes, key);
    if (!text) return std::nullopt;
    const auto value = to_lower(*text);
    if (value.empty() || value == "1" || value == "t" || value == "true") return true;
    if (value == "0" || value == "f" || value == "false") return false;
    throw error{errc::invalid, cat("output attribute ", key, "=", *text, ": true or false is expected")};
}

namespace {

archive::compression parse_compression(const std::string& kind) {
    if (kind == "gzip") return archive::compression::gzip;
    if (kind == "zstd") return archive::compression::zstd;
    if (kind == "uncompressed") return archive::compression::none;
    if (kind == "estargz" || kind == "nydus")
        throw error{errc::unsupported, cat("output attribute compression=", kind, " is not supported yet (gzip, zstd, uncompressed are)")};
    throw error{errc::invalid, cat("output attribute compression=", kind, ": gzip, zstd or uncompressed is expected")};
}

/// "annotation[-TYPE][[PLATFORM]].KEY", as BuildKit's regular expression splits it:
/// ^annotation(?:-([a-z-]+))?(?:\[([A-Za-z0-9_/-]+)\])?\.(\S+)$. Empty for what does not match: then it is no annotation.
std::optional<annotation> parse_annotation(std::string_view name, const std::string& value) {
    constexpr std::string_view prefix = "annotation";
    std::string_view rest = name;
    if (!rest.starts_with(prefix)) return std::nullopt;
    rest.remove_prefix(prefix.size());
    std::string_view type, platform;
    if (rest.starts_with('-')) {
        const auto end = std::find_if(rest.begin() + 1, rest.end(), [](char c) { return (c < 'a' || c > 'z') && c != '-'; });
        type = rest.substr(1, static_cast<std::size_t>(end - rest.begin()) - 1);
        if (type.empty()) return std::nullopt;
        rest.remove_prefix(type.size() + 1);
    }
    const bool has_platform = rest.starts_with('[');
    if (has_platform) {
        const auto close = rest.find(']');
        if (close == std::string_view::npos || close == 1) return std::nullopt;
        platform = rest.substr(1, close - 1);
        rest.remove_prefix(close + 1);
    }
    if (!rest.starts_with('.') || rest.size() < 2) return std::nullopt;
    annotation out{.key = std::string(rest.substr(1)), .value = value};
    if (out.key.find_first_of(" \t\n\r\f\v") != std::string::npos) return std::nullopt;
    if (type == "manifest-descriptor")
        out.what = annotated::manifest_descriptor;
    else if (type == "index")
        out.what = annotated::index;
    else if (type == "index-descriptor")
        out.what = annotated::index_descriptor;
    else if (!type.empty() && type != "manifest")
        throw error{errc::invalid, cat("output attribute ", name, ": unrecognized annotation type ", quoted(type),
                                       " (manifest, index, manifest-descriptor and index-descriptor are known)")};
    if (has_platform) {
        if (out.what == annotated::index || out.what == annotated::index_descriptor)
            throw error{errc::invalid, cat("output attribute ", name, ": an index is of no platform, so its annotations take none")};
        out.platform = oci::normalize(oci::parse_platform(platform));
    }
    return out;
}

}  // namespace

image_options take_image_options(std::map<std::string, std::string>& attributes) {
    image_options out;
    if (const auto kind = take_text(attributes, "compression")) out.compression = parse_compression(*kind);
    if (const auto level = take_text(attributes, "compression-level")) {
        int value = 0;
        const auto [end, ec] = std::from_chars(level->data(), level->data() + level->size(), value);
        if (ec != std::errc{} || end != level->data() + level->size())
            throw error{errc::invalid, cat("output attribute compression-level=", *level, ": a number is expected")};
        out.level = value;
    }
    out.force_compression = take_flag(attributes, "force-compression").value_or(false);
    out.oci_types = take_flag(attributes, "oci-mediatypes").value_or(true);
    out.oci_artifact = take_flag(attributes, "oci-artifact").value_or(true);
    out.keep_nondistributable = take_flag(attributes, "prefer-nondist-layers").value_or(false);
    out.rewrite_timestamps = take_flag(attributes, "rewrite-timestamp").value_or(false);
    out.inline_attestations = take_flag(attributes, "attestation-inline").value_or(true);
    for (auto at = attributes.begin(); at != attributes.end();) {
        auto found = parse_annotation(at->first, at->second);
        if (found) out.annotations.push_back(std::move(*found));
        at = found ? attributes.erase(at) : std::next(at);
    }
    return out;
}

}  // namespace cobuild::exporter

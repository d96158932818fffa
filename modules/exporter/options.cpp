module;
#include <charconv>
#include <map>
#include <optional>
#include <string>
#include <string_view>

module cobuild.exporter;

namespace cobuild::exporter {

namespace {

std::optional<std::string> take(std::map<std::string, std::string>& attributes, const std::string& key) {
    const auto at = attributes.find(key);
    if (at == attributes.end()) return std::nullopt;
    std::string value = std::move(at->second);
    attributes.erase(at);
    return value;
}

/// Go's ParseBool, and "" as true for flag-like keys.
std::optional<bool> take_bool(std::map<std::string, std::string>& attributes, const std::string& key) {
    const auto text = take(attributes, key);
    if (!text) return std::nullopt;
    const auto value = to_lower(*text);
    if (value.empty() || value == "1" || value == "t" || value == "true") return true;
    if (value == "0" || value == "f" || value == "false") return false;
    throw error{errc::invalid, cat("output attribute ", key, "=", *text, ": true or false is expected")};
}

}  // namespace

image_options take_image_options(std::map<std::string, std::string>& attributes) {
    image_options out;
    if (const auto kind = take(attributes, "compression")) {
        if (*kind == "gzip")
            out.compression = archive::compression::gzip;
        else if (*kind == "zstd")
            out.compression = archive::compression::zstd;
        else if (*kind == "uncompressed")
            out.compression = archive::compression::none;
        else if (*kind == "estargz" || *kind == "nydus")
            throw error{errc::unsupported, cat("output attribute compression=", *kind, " is not supported yet (gzip, zstd, uncompressed are)")};
        else
            throw error{errc::invalid, cat("output attribute compression=", *kind, ": gzip, zstd or uncompressed is expected")};
    }
    if (const auto level = take(attributes, "compression-level")) {
        int value = 0;
        const auto [end, ec] = std::from_chars(level->data(), level->data() + level->size(), value);
        if (ec != std::errc{} || end != level->data() + level->size())
            throw error{errc::invalid, cat("output attribute compression-level=", *level, ": a number is expected")};
        out.level = value;
    }
    out.force_compression = take_bool(attributes, "force-compression").value_or(false);
    out.oci_types = take_bool(attributes, "oci-mediatypes").value_or(true);
    for (auto at = attributes.begin(); at != attributes.end();) {
        constexpr std::string_view plain = "annotation.", manifest = "annotation-manifest.";
        const std::string& key = at->first;
        if (key.starts_with(plain))
            out.annotations[key.substr(plain.size())] = at->second;
        else if (key.starts_with(manifest))
            out.annotations[key.substr(manifest.size())] = at->second;
        else if (key.starts_with("annotation"))
            throw error{errc::unsupported, cat("output attribute ", key, ": only annotations of the manifest are supported yet")};
        else {
            ++at;
            continue;
        }
        at = attributes.erase(at);
    }
    return out;
}

}  // namespace cobuild::exporter

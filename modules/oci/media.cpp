module;
#include <algorithm>
#include <array>
#include <string_view>

module cobuild.oci;

namespace cobuild::oci {

namespace {
constexpr std::string_view oci_nondistributable = "application/vnd.oci.image.layer.nondistributable.v1.tar";
constexpr std::string_view docker_foreign_layer = "application/vnd.docker.image.rootfs.foreign.diff.tar";

struct layer_type {
    std::string_view type;
    compression packed;
    bool distributable;
};

constexpr std::array layer_types{
    layer_type{media::oci_layer_gzip, compression::gzip, true},
    layer_type{media::docker_layer_gzip, compression::gzip, true},
    layer_type{media::oci_layer, compression::none, true},
    layer_type{media::oci_layer_zstd, compression::zstd, true},
    layer_type{media::docker_layer, compression::none, true},
    layer_type{media::docker_layer_zstd, compression::zstd, true},
    layer_type{docker_foreign_layer, compression::none, false},
    layer_type{media::docker_foreign_layer_gzip, compression::gzip, false},
    layer_type{oci_nondistributable, compression::none, false},
    layer_type{"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", compression::gzip, false},
    layer_type{"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", compression::zstd, false},
};

const layer_type* find_layer(std::string_view type) noexcept {
    const auto found = std::find_if(layer_types.begin(), layer_types.end(), [&](const layer_type& l) { return l.type == type; });
    return found != layer_types.end() ? &*found : nullptr;
}
}  // namespace

bool is_manifest(std::string_view t) noexcept { return t == media::oci_manifest || t == media::docker_manifest; }
bool is_index(std::string_view t) noexcept { return t == media::oci_index || t == media::docker_list; }
bool is_config(std::string_view t) noexcept { return t == media::oci_config || t == media::docker_config; }
bool is_layer(std::string_view t) noexcept { return find_layer(t) != nullptr; }

bool is_nondistributable(std::string_view t) noexcept {
    const auto* l = find_layer(t);
    return l != nullptr && !l->distributable;
}

compression layer_compression(std::string_view t) {
    if (const auto* l = find_layer(t)) return l->packed;
    throw error{errc::unsupported, cat("layers of media type ", quoted(t), " cannot be unpacked")};
}

std::string_view layer_media_type(compression c, bool docker_types) noexcept {
    switch (c) {
        case compression::gzip: return docker_types ? media::docker_layer_gzip : media::oci_layer_gzip;
        case compression::zstd: return docker_types ? media::docker_layer_zstd : media::oci_layer_zstd;
        case compression::none: break;
    }
    return docker_types ? media::docker_layer : media::oci_layer;
}

}  // namespace cobuild::oci

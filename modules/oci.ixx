/// cobuild.oci: the image specification as plain data, image references, platforms.
///
/// Follows OCI image-spec 1.1 (descriptor, manifest, index, config) with Docker's additions, distribution's reference
/// grammar, and containerd's platform rules. Reading keeps every member it does not know and writing puts it back, after
/// the known ones. All parse functions throw errc::invalid (references, platforms: the user wrote them) or errc::corrupt
/// (documents), naming the member. Pure; distinct objects may be used from distinct threads.
/// Not responsible for: fetching, storing or verifying bytes; the runtime specification.
module;
#include <chrono>
#include <compare>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

export module cobuild.oci;

import cobuild.base;
import cobuild.json;

export namespace cobuild::oci {

// ---------------------------------------------------------------- media types

namespace media {
inline constexpr std::string_view oci_manifest = "application/vnd.oci.image.manifest.v1+json";
inline constexpr std::string_view oci_index = "application/vnd.oci.image.index.v1+json";
inline constexpr std::string_view oci_config = "application/vnd.oci.image.config.v1+json";
inline constexpr std::string_view oci_layer = "application/vnd.oci.image.layer.v1.tar";
inline constexpr std::string_view oci_layer_gzip = "application/vnd.oci.image.layer.v1.tar+gzip";
inline constexpr std::string_view oci_layer_zstd = "application/vnd.oci.image.layer.v1.tar+zstd";
inline constexpr std::string_view docker_manifest = "application/vnd.docker.distribution.manifest.v2+json";
inline constexpr std::string_view docker_list = "application/vnd.docker.distribution.manifest.list.v2+json";
inline constexpr std::string_view docker_config = "application/vnd.docker.container.image.v1+json";
inline constexpr std::string_view docker_layer = "application/vnd.docker.image.rootfs.diff.tar";
inline constexpr std::string_view docker_layer_gzip = "application/vnd.docker.image.rootfs.diff.tar.gzip";
inline constexpr std::string_view docker_layer_zstd = "application/vnd.docker.image.rootfs.diff.tar.zstd";
inline constexpr std::string_view docker_foreign_layer_gzip = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
inline constexpr std::string_view in_toto = "application/vnd.in-toto+json";
inline constexpr std::string_view octet_stream = "application/octet-stream";
}  // namespace media

bool is_manifest(std::string_view media_type) noexcept;
bool is_index(std::string_view media_type) noexcept;
bool is_config(std::string_view media_type) noexcept;
/// One of the layer types that can be unpacked, nondistributable and foreign ones included.
bool is_layer(std::string_view media_type) noexcept;
/// Layers that a push leaves out (foreign, nondistributable).
bool is_nondistributable(std::string_view media_type) noexcept;

enum class compression { none, gzip, zstd };
/// By the media type of a layer; throws errc::unsupported for what is no layer type.
compression layer_compression(std::string_view media_type);
std::string_view layer_media_type(compression c, bool docker_types) noexcept;

// ---------------------------------------------------------------- platforms

struct platform {
    std::string os;
    std::string architecture;
    std::string variant;
    std::string os_version;
    std::vector<std::string> os_features;
    bool operator==(const platform&) const = default;
};

/// "linux/amd64", "linux/arm64/v8", "linux", "arm64"; one word is completed from this machine. Throws errc::invalid.
platform parse_platform(std::string_view text);
/// GOOS and GOARCH spellings ("x86_64" -> amd64, "aarch64" -> arm64), arm64/v8 -> arm64, arm -> arm/v7.
platform normalize(platform p);
/// "os/architecture[/variant]"; "unknown" for an empty one.
std::string format(const platform& p);
/// What steps of this machine can run, normalized: linux/amd64, linux/arm64, linux/arm/v7...
platform host_platform();
/// How well `offered` serves who wants `wanted`: 0 exactly, higher is worse, empty when not at all (platforms.Only).
std::optional<unsigned> match_rank(const platform& wanted, const platform& offered);

// ---------------------------------------------------------------- documents

struct descriptor {
    std::string media_type;
    cobuild::digest digest;
    std::uint64_t size = 0;
    std::vector<std::string> urls;
    std::map<std::string, std::string> annotations;
    std::optional<oci::platform> platform;
    std::string artifact_type;
    json::object unknown;
    bool operator==(const descriptor&) const = default;
};

struct manifest {
    std::string media_type;  ///< empty when the document has none (allowed in OCI)
    std::string artifact_type;
    descriptor config;
    std::vector<descriptor> layers;
    std::optional<descriptor> subject;
    std::map<std::string, std::string> annotations;
    json::object unknown;
};

struct index {
    std::string media_type;
    std::string artifact_type;
    std::vector<descriptor> manifests;
    std::optional<descriptor> subject;
    std::map<std::string, std::string> annotations;
    json::object unknown;
};

/// The entries that serve `wanted`, best first, ties in document order; attestation entries (unknown/unknown) never.
/// An entry without a platform counts as last resort.
std::vector<descriptor> select(const index& i, const platform& wanted);

struct healthcheck {
    std::vector<std::string> test;  ///< {} inherit, {"NONE"}, {"CMD", args...}, {"CMD-SHELL", command}
    nanoseconds interval{};         ///< 0 in all four: inherit
    nanoseconds timeout{};
    nanoseconds start_period{};
    nanoseconds start_interval{};
    std::int64_t retries = 0;
    bool operator==(const healthcheck&) const = default;
};

/// The "config" member of an image config: what a container starts with.
struct run_config {
    std::string user;
    std::set<std::string> exposed_ports;
    std::vector<std::string> env;  ///< "NAME=value", in order
    std::vector<std::string> entrypoint;
    std::vector<std::string> cmd;
    std::set<std::string> volumes;
    std::string working_dir;
    std::map<std::string, std::string> labels;
    std::string stop_signal;
    bool args_escaped = false;
    std::optional<oci::healthcheck> healthcheck;
    std::vector<std::string> on_build;
    std::vector<std::string> shell;
    std::optional<std::int64_t> stop_timeout;
    json::object unknown;
    bool operator==(const run_config&) const = default;
};

struct history_entry {
    std::string created;  ///< RFC 3339, as written
    std::string created_by;
    std::string author;
    std::string comment;
    bool empty_layer = false;
    bool operator==(const history_entry&) const = default;
};

struct image {
    std::string created;
    std::string author;
    oci::platform platform;
    run_config config;
    std::vector<digest> diff_ids;
    std::vector<history_entry> history;
    json::object unknown;  ///< Docker's container_config, docker_version... among them
};

/// Readers of documents. A manifest or index of another media type or of schemaVersion 1 is refused with what it is.
descriptor parse_descriptor(const json::value& v);
manifest parse_manifest(std::string_view bytes);
index parse_index(std::string_view bytes);
image parse_image(std::string_view bytes);
run_config parse_run_config(const json::value& v);
/// The media type of a manifest or index by its "mediaType", else by its members; empty when it is neither.
std::string sniff_media_type(std::string_view bytes);

json::value to_json(const descriptor& d);
json::value to_json(const platform& p);
platform platform_of(const json::value& v);
json::value to_json(const run_config& c);
json::value to_json(const image& i);
/// The bytes an image is pushed with: manifests and indexes indented by two spaces, configs compact with sorted top-level
/// members, all with Go's HTML escapes. Field order of the specification.
std::string encode(const manifest& m);
std::string encode(const index& i);
std::string encode(const image& i);

/// The chain ids of image-spec config.md for these diff ids, one for each prefix.
std::vector<digest> chain_ids(std::span<const digest> diff_ids);

// ---------------------------------------------------------------- references

/// A normalized image name: "docker.io/library/alpine:3.20@sha256:...". Distribution's grammar.
class reference {
public:
    /// As docker does: "alpine" -> docker.io/library/alpine; index.docker.io is docker.io; no tag is added.
    /// Throws errc::invalid `invalid reference "...": why`.
    static reference parse(std::string_view text);

    [[nodiscard]] const std::string& domain() const noexcept { return domain_; }  ///< "docker.io", "localhost:5000"
    [[nodiscard]] const std::string& path() const noexcept { return path_; }      ///< "library/alpine"
    [[nodiscard]] const std::string& tag() const noexcept { return tag_; }        ///< empty when none
    [[nodiscard]] const std::optional<cobuild::digest>& digest() const noexcept { return digest_; }
    /// "docker.io/library/alpine"
    [[nodiscard]] std::string name() const;
    /// With tag and digest.
    [[nodiscard]] std::string str() const;
    /// As docker shows it: "alpine:3.20".
    [[nodiscard]] std::string familiar() const;
    [[nodiscard]] std::string familiar_name() const;

    /// Tag "latest" when there is neither tag nor digest.
    [[nodiscard]] reference with_default_tag() const;
    [[nodiscard]] reference with_tag(std::string_view tag) const;
    [[nodiscard]] reference with_digest(const cobuild::digest& d) const;
    [[nodiscard]] reference name_only() const;
    auto operator<=>(const reference&) const = default;

private:
    std::string domain_;
    std::string path_;
    std::string tag_;
    std::optional<cobuild::digest> digest_;
};

/// [\w][\w.-]{0,127}
bool valid_tag(std::string_view tag) noexcept;

}  // namespace cobuild::oci

/// cobuild.remotecache: the build cache outside the state directory: in a registry, in a directory, in an image's config.
///
/// Its form is BuildKit's cache config ("application/vnd.buildkit.cacheconfig.v0", JSON): layers (blob and parent) and records.
/// A record of ours is a canonical cache key with the chain of layers that is its result, or none; every further key of the
/// same result is a record whose one input links to it by the selector "cobuild.key", and the chain of a further output of
/// the same vertex stands in a record that links to it by "cobuild.output.NUMBER". Keys are cobuild's own: a cache that
/// BuildKit wrote matches nothing here, and ours nothing there; neither is an error.
///
/// Around it stands an OCI image manifest (config = cache config, layers = blobs), or an index whose entries are the blobs
/// and the config. A directory holds an OCI layout with one such document per tag. Inline, the records alone stand in the
/// image's config, and their layers are the image's own.
///
/// Everything read is verified: documents by digest, layers when they are unpacked (by who is given as loader). Thread safety:
/// functions are pure or block (those with a directory: for pool threads); `imported` on the io thread. Errors:
/// errc::invalid for a user's attributes, errc::corrupt for documents. Not its job: registry transfers (build), keys (solver),
/// making layers (exporter), unpacking them (source).
module;
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

export module cobuild.remotecache;

import cobuild.base;
import cobuild.async;
import cobuild.content;
import cobuild.json;
import cobuild.oci;
import cobuild.progress;
import cobuild.solver;
import cobuild.state;

export namespace cobuild::remotecache {

// ---------------------------------------------------------------- what the user asks for

enum class kind { registry, local, inline_ };

using attributes = std::map<std::string, std::string>;

/// --cache-to. Compression attributes are the exporter's to take, see `rest`.
struct export_options {
    remotecache::kind kind = remotecache::kind::registry;
    std::string ref;             ///< registry
    std::string directory;       ///< local: dest=
    std::string tag = "latest";  ///< local
    bool max = false;            ///< every step's result, not only those the exported image is made of
    bool image_manifest = true;  ///< false: an index
    bool oci_types = true;       ///< false: Docker's media types, which have no manifest for this: an index then
    bool insecure = false;       ///< registry.insecure=true
    bool ignore_error = false;   ///< a failing export is a warning
    bool reset = false;          ///< local: blobs that no tag of the directory needs are removed
    attributes rest;             ///< compression, compression-level, force-compression
};
/// Throws errc::invalid for a missing or unknown attribute, errc::unsupported for kinds that are not built (gha, s3, azblob).
export_options parse_export(const std::string& type, attributes a);

/// --cache-from.
struct import_options {
    remotecache::kind kind = remotecache::kind::registry;
    std::string ref;
    std::string directory;  ///< local: src=
    std::string tag = "latest";
    std::optional<cobuild::digest> digest;  ///< local: instead of the tag
    bool insecure = false;
    [[nodiscard]] std::string name() const;  ///< for people: the reference, or "local:DIRECTORY"
};
/// Likewise. A cache of type inline is imported as type=registry.
import_options parse_import(const std::string& type, attributes a);

// ---------------------------------------------------------------- documents

inline constexpr std::string_view config_type = "application/vnd.buildkit.cacheconfig.v0";
/// The member of an image's config that holds an inline cache, base64 of its JSON.
inline constexpr std::string_view inline_member = "moby.buildkit.cache.v0";

/// A layer as a blob, and how it is to be remembered where it is unpacked.
struct layer {
    oci::descriptor blob;
    digest diff_id;
    std::string created;  ///< RFC 3339, or empty
    std::string variant;  ///< snapshot::layer_blob's word; empty: pulled
    bool operator==(const layer&) const = default;
};

inline constexpr std::size_t max_output = 62;  ///< a further output's greatest number
struct record {
    digest canonical;
    std::vector<digest> keys;                       ///< others than the canonical one
    std::optional<std::vector<std::size_t>> chain;  ///< indexes of layers, bottom first; never empty
    /// Likewise of further outputs, by number from 1 to max_output.
    std::map<std::size_t, std::vector<std::size_t>> others{};
    bool operator==(const record&) const = default;
};

struct document {
    std::vector<layer> layers;
    std::vector<record> records;
};

/// The cache config's JSON; the same document gives the same bytes, in whatever order it lists things.
std::string encode(const document& d);
/// `blobs`: what the manifest lists; a layer that is not among them is as if it were not there. Reads BuildKit's own as well.
/// Throws errc::corrupt for a document that is none.
document decode(std::string_view text, const std::vector<oci::descriptor>& blobs);

/// The value of `inline_member`: chains count into the layers of the image. Holds no times and no digests of blobs, so that it
/// changes no image but by what was built.
std::string encode_inline(const document& d);
/// The inline cache of an image, if it has one.
std::optional<document> decode_inline(std::string_view image_config, const oci::manifest& manifest);

/// What stands around a cache config.
struct envelope {
    std::string media_type;
    std::string bytes;
};
envelope make_manifest(const oci::descriptor& config, const std::vector<layer>& layers, bool image_manifest, bool oci_types);
/// The cache config among what a manifest or index lists, with the blobs; empty when it is no cache.
struct listed {
    oci::descriptor config;
    std::vector<oci::descriptor> blobs;
};
std::optional<listed> find_config(std::string_view media_type, std::string_view bytes);

// ---------------------------------------------------------------- caches of a build

/// Makes a result of a chain of layers, verified. Throws when it cannot.
using loader = std::function<async::task<solver::result>(std::vector<layer> chain, progress::writer progress)>;

/// A document as the solver asks it.
class imported final : public solver::remote_cache {
public:
    imported(document d, loader load);
    [[nodiscard]] std::optional<found> find(const digest& key) const override;
    async::task<std::vector<solver::result>> load(digest canonical, progress::writer progress) override;
    [[nodiscard]] std::size_t records() const noexcept { return document_.records.size(); }

private:
    document document_;
    loader load_;
    std::unordered_map<digest, std::size_t> by_key_;
};

// ---------------------------------------------------------------- directories

/// The document that a layout directory has under a tag, or the one of a digest. Throws errc::not_found naming the directory.
oci::descriptor find_document(const std::string& directory, const std::string& tag, const std::optional<digest>& wanted);
/// A blob of a layout as a whole, verified, at most 16 MiB.
std::string read_document(const std::string& directory, const oci::descriptor& d);
/// Takes a blob over into the content store, verified.
state::pin take_blob(content::store& content, const std::string& directory, const oci::descriptor& d);

struct written {
    std::size_t blobs = 0;  ///< that were not there yet
    std::uint64_t bytes = 0;
};
/// Writes blobs of the content store and a manifest into a layout directory, made when absent; what is there already is not
/// written again. The index.json, which names `manifest` by `tag`, appears last, by rename.
written write_layout(const content::store& content, const std::string& directory, const std::string& tag, const oci::descriptor& manifest,
                     std::string_view manifest_bytes, const std::vector<oci::descriptor>& blobs, bool reset);

}  // namespace cobuild::remotecache

/// cobuild.exporter: from built root file systems to something outside: an image or an index of several in the content
/// store, an archive or layout of it, a directory, a tar.
///
/// An image is written once: each layer without a blob is diffed and compressed (in parallel, hashed while written), then
/// config and manifest. Layers that were pulled keep their blobs; forced into another compression they keep their diff ids.
/// Blobs are remembered at their layer, so the next export of the same layer compresses nothing. Follows OCI image-spec 1.1,
/// reference forms of BuildKit's exporters, and its layout of attestations in an index.
///
/// Reproducible: the same chain, config and options give the same bytes. With `epoch` set, times of files in our own layers
/// that are later are cut to it, and so are `created` and the history's.
///
/// Thread safety: calls on the engine's io thread; the work happens on the pool. Errors: errc::no_space and errc::io name
/// the path. Nothing half-written stays: files appear by rename. Not its job: pushing (registry), image names (build), what
/// an attestation says (provenance.ixx makes one kind).
module;
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

export module cobuild.exporter;

import cobuild.base;
import cobuild.async;
import cobuild.archive;
import cobuild.state;
import cobuild.content;
import cobuild.snapshot;
import cobuild.oci;
import cobuild.progress;
export import :provenance;

export namespace cobuild::exporter {

/// What a build came to on one platform. The caller keeps the chain pinned.
struct input {
    snapshot::chain root;
    std::string config;  ///< the frontend's image config (JSON); empty: a bare one for `platform`
    oci::platform platform;
    std::optional<std::int64_t> epoch;  ///< seconds since 1970
    std::string base_config{};          ///< config of the image it was built upon; empty: none is known
    std::vector<attestation> attestations{};
};

// ---------------------------------------------------------------- options

enum class annotated { manifest, manifest_descriptor, index, index_descriptor };
struct annotation {
    std::string key;
    std::string value;
    annotated what = annotated::manifest;
    std::optional<oci::platform> platform{};  ///< empty: of every one
};

struct image_options {
    archive::compression compression = archive::compression::gzip;
    std::optional<int> level;
    bool force_compression = false;      ///< pulled layers are converted as well
    bool oci_types = true;               ///< false: Docker's media types
    bool keep_nondistributable = false;  ///< layers that must not be pushed stay such
    bool rewrite_timestamps = false;     ///< also of pulled layers that are not the base's; needs an epoch
    bool oci_artifact = true;            ///< attestation manifests are artifacts with a subject; false: dummy images
    bool inline_attestations = true;     ///< those made for images only are written as well
    std::vector<annotation> annotations{};
};

/// Attributes of BuildKit's image exporters ("compression", "compression-level", "force-compression", "oci-mediatypes",
/// "oci-artifact", "rewrite-timestamp", "prefer-nondist-layers", "attestation-inline", "annotation[-TYPE][[PLATFORM]].KEY") taken
/// out of `attributes`; throws errc::invalid for a bad value, errc::unsupported for those not built.
image_options take_image_options(std::map<std::string, std::string>& attributes);
/// A flag by Go's rules ("1", "true", ...; "" is true), taken out; empty when it is not there. Throws errc::invalid.
std::optional<bool> take_flag(std::map<std::string, std::string>& attributes, const std::string& key);
std::optional<std::string> take_text(std::map<std::string, std::string>& attributes, const std::string& key);

// ---------------------------------------------------------------- images

/// An image whose every blob is in the content store, and stays there while `keep` lives.
struct image {
    oci::descriptor manifest;
    oci::descriptor config;
    std::vector<oci::descriptor> layers;
    std::string manifest_bytes;
    std::uint64_t size = 0;  ///< of the layers, in bytes as stored
    std::string created{};   ///< as its config says
    state::pin keep;
};

/// One image, or an index over one for each platform and over their attestations: what the image exporters hand on.
struct exported {
    oci::descriptor top;  ///< the index, or the only image's manifest
    std::string top_bytes;
    std::vector<image> images;
    std::vector<image> attestations;                          ///< attestation manifests, as the index lists them behind the images
    std::uint64_t size = 0;                                   ///< of all layers, those of several images counted once
    std::map<std::string, std::string> layout_annotations{};  ///< of the descriptor in an OCI layout
    state::pin keep;
    [[nodiscard]] bool is_index() const { return oci::is_index(top.media_type); }
    /// Every blob below `top`, each once: configs and layers, not the manifests.
    [[nodiscard]] std::map<digest, oci::descriptor> blobs() const;
};

/// Places that exporters write to and read from; all outlive the calls.
struct stores {
    async::blocking_pool& pool;
    content::store& content;
    snapshot::store& snapshots;
    unsigned threads;  ///< for compression, over all layers
};

async::task<image> write_image(stores s, input in, image_options options, progress::writer progress);
/// All of `in`; `names` are the image's, for the subjects of attestations. A bare manifest comes out when `map` is false and
/// there is nothing to attest, else an index. errc::invalid for annotations of an index where there is none.
async::task<exported> write_images(stores s, std::vector<input> in, bool map, std::vector<std::string> names, image_options options,
                                   progress::writer progress);
/// One image as it is.
exported as_exported(image i);

// ---------------------------------------------------------------- archives

enum class archive_kind {
    oci,     ///< an OCI layout in a tar
    docker,  ///< the same plus docker's manifest.json for the first image, as `docker load` wants it
};
/// Where an archive goes: a descriptor of the caller's, or a file that appears when it is whole. Links are followed; a pipe or
/// device of that name is written to.
struct destination {
    int fd = -1;
    std::string path;
};
/// `names` are normalised references; they become index.json's annotations and docker's RepoTags.
async::task<void> write_archive(stores s, archive_kind kind, exported what, std::vector<std::string> names, destination to,
                                progress::writer progress);
/// An OCI layout directory (made when absent). Other images of a layout that is there stay, those of the same names are replaced.
async::task<void> write_layout(stores s, exported what, std::vector<std::string> names, std::string directory, progress::writer progress);

// ---------------------------------------------------------------- files

/// A file beside a result's own: an attestation. Mode 0600.
struct extra_file {
    std::string name;
    std::string bytes;
};
/// The files of one result, below the directory `name` of what is written (empty: at its top).
struct tree {
    std::string name;
    snapshot::chain root;
    std::optional<std::int64_t> epoch;  ///< time of every file
    std::vector<extra_file> extra{};
    std::string platform{};  ///< for people: "linux/amd64"
};
tree as_tree(const input& in);
/// What the attestations of `in` are as files: BuildKit's names with `prefix` before and `suffix` before the extension, the
/// subjects every file of the result. Those made for images only are left out.
async::task<std::vector<extra_file>> attestation_files(stores s, input in, std::string prefix, std::string suffix);

/// errc::invalid when two trees of the same name hold the same file, naming it.
async::task<void> check_distinct(stores s, std::vector<tree> trees);
/// The trees' files into a directory (made with its parents when absent), owned by the calling user. Directories merge, files
/// replace files; errc::invalid names a directory that would replace a file, or the reverse. With `mirror` what is in the
/// directory and not in a tree is removed.
async::task<void> write_directory(stores s, std::vector<tree> trees, std::string directory, bool mirror, progress::writer progress);
/// The trees' files as one tar, owners and modes kept.
async::task<void> write_tar(stores s, std::vector<tree> trees, destination to, progress::writer progress);

}  // namespace cobuild::exporter

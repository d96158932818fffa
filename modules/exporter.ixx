/// cobuild.exporter: from a built root file system to something outside: an image in the content store, an archive of it,
/// a directory, a tar.
///
/// An image is written once: each layer without a blob is diffed and compressed (in parallel, hashed while written), then
/// config and manifest. Layers that were pulled keep their blobs; forced into another compression they keep their diff ids.
/// Blobs are remembered at their layer, so the next export of the same layer compresses nothing. Follows OCI image-spec 1.1 and reference forms of
/// BuildKit's exporters.
///
/// Reproducible: the same chain, config and options give the same bytes. With `epoch` set, times of files in our own layers
/// that are later are cut to it, and so are `created` and the history's.
///
/// Thread safety: calls on the engine's io thread; the work happens on the pool. Errors: errc::no_space and errc::io name
/// the path. Nothing half-written stays: files appear by rename. Not its job: pushing (registry), image names (build).
module;
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
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

export namespace cobuild::exporter {

/// What a build came to. The caller keeps the chain pinned.
struct input {
    snapshot::chain root;
    std::string config;  ///< the frontend's image config (JSON); empty: a bare one for `platform`
    oci::platform platform;
    std::optional<std::int64_t> epoch;  ///< seconds since 1970
};

struct image_options {
    archive::compression compression = archive::compression::gzip;
    std::optional<int> level;
    bool force_compression = false;                  ///< pulled layers are converted as well
    bool oci_types = true;                           ///< false: Docker's media types
    std::map<std::string, std::string> annotations;  ///< of the manifest
};

/// Attributes of BuildKit's image exporters ("compression", "compression-level", "force-compression", "oci-mediatypes",
/// "annotation.*") taken out of `attributes`; throws errc::invalid for a bad value, errc::unsupported for those not built.
image_options take_image_options(std::map<std::string, std::string>& attributes);

/// An image whose every blob is in the content store, and stays there while `keep` lives.
struct image {
    oci::descriptor manifest;
    oci::descriptor config;
    std::vector<oci::descriptor> layers;
    std::string manifest_bytes;
    std::uint64_t size = 0;  ///< of the layers, in bytes as stored
    state::pin keep;
};

/// Places that exporters write to and read from; all outlive the calls.
struct stores {
    async::blocking_pool& pool;
    content::store& content;
    snapshot::store& snapshots;
    unsigned threads;  ///< for compression, over all layers
};

async::task<image> write_image(stores s, input in, image_options options, progress::writer progress);

enum class archive_kind {
    oci,     ///< an OCI layout in a tar
    docker,  ///< the same plus docker's manifest.json, as `docker load` wants it
};
/// Where an archive goes: a descriptor of the caller's, or a file that appears when it is whole. Links are followed; a pipe or
/// device of that name is written to.
struct destination {
    int fd = -1;
    std::string path;
};
/// `names` are normalised references; they become index.json's annotations and docker's RepoTags.
async::task<void> write_archive(stores s, archive_kind kind, image what, std::vector<std::string> names, destination to, progress::writer progress);

/// The root's files into a directory (made with its parents when absent), owned by the calling user. Directories merge, files
/// replace files; errc::invalid names a directory that would replace a file, or the reverse.
async::task<void> write_directory(stores s, input in, std::string directory, progress::writer progress);
/// The root's files as one tar, owners and modes kept.
async::task<void> write_tar(stores s, input in, destination to, progress::writer progress);

}  // namespace cobuild::exporter

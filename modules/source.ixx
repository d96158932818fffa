/// cobuild.source: where root file systems come from: images of a registry or built here, git repositories, files behind
/// URLs, as chains of layers. Git and http stand in their own partitions; this page is about images.
///
/// resolve() finds out what a reference means: an image built here, else the registry's answer to one HEAD a build;
/// manifests and configs come from the content store where it has them. pull() brings the layers: each is fetched, hashed,
/// stored, inflated and unpacked in one pass, several at once, those already unpacked not at all. A layer wanted by several
/// builds is brought once.
///
/// Every digest and size is verified before anything is kept; a layer that is not what its digest says is not stored, and
/// the error names blob, host and both digests. Progress: a line per layer, in bytes.
///
/// Thread safety: calls on the engine's io thread. Not its job: which registry host (registry), a client's directories (ops).
module;
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

export module cobuild.source;

import cobuild.base;
import cobuild.async;
import cobuild.state;
import cobuild.content;
import cobuild.snapshot;
import cobuild.oci;
import cobuild.registry;
import cobuild.progress;
import cobuild.session;
export import :http;
export import :git;

export namespace cobuild::source {

/// Which images may be asked for over the network.
enum class freshness {
    missing,  ///< an image built here is taken as it is; other tags are asked by one HEAD
    always,   ///< the registry is asked, also for names of images built here
    never,    ///< only what is here: images built here and digests in the content store
};

/// How a layer's blob is remembered (snapshot::layer_blob) when it was not a registry's image it came from.
struct blob_origin {
    std::string variant;  ///< empty: as pulled
    std::map<std::string, std::string> annotations;
};

/// What a reference means on one platform.
struct resolved_image {
    oci::reference reference;  ///< normalised, tag or digest
    oci::descriptor target;    ///< what the reference names: an index or manifest
    oci::descriptor manifest;  ///< of the platform
    oci::manifest parsed;
    std::string config;  ///< the image config's bytes
    std::vector<digest> diff_ids;
    oci::platform platform;
    bool local = false;                          ///< built here
    std::optional<snapshot::chain> chain;        ///< its layers, when they are known to be unpacked
    state::pin keep;                             ///< manifest and config stay in the content store
    std::shared_ptr<const registry::login> who;  ///< who asked; none: the engine's own login
    std::vector<blob_origin> origins;            ///< by layer; shorter: the rest is as pulled
};

struct pulled_image {
    snapshot::chain chain;
    state::pin keep;
};

/// One blob of a registry as a file in a root of its own.
struct blob_request {
    oci::reference reference;  ///< by digest
    std::string filename;
    std::uint32_t perm = 0600;
    std::uint32_t uid = 0, gid = 0;
    std::shared_ptr<const registry::login> who;  ///< none: the engine's own login
};

/// The label of a named image (content::image) that holds its chain of layers; an image without one is unpacked again.
inline constexpr std::string_view chain_label = "cobuild.chain";
std::string chain_text(const snapshot::chain& c);
/// Of an index the label above holds all layers, and one for each manifest below it the chain of that image.
std::string chain_label_of(const digest& manifest);

class images {
public:
    images(async::blocking_pool& pool, content::store& content, snapshot::store& snapshots, registry::client& registry);
    ~images();
    images(const images&) = delete;
    images& operator=(const images&) = delete;

    async::task<resolved_image> resolve(oci::reference ref, oci::platform platform, freshness how, progress::writer progress,
                                        std::shared_ptr<const registry::login> who = {});
    async::task<pulled_image> pull(resolved_image image, progress::writer progress);
    /// Always from the registry: who may not read the repository gets no blob of it.
    async::task<pulled_image> blob(blob_request request, progress::writer progress);

private:
    struct state;
    std::shared_ptr<state> state_;
};

/// What was taken over from an OCI layout directory; `top` is now a digest that images::resolve() finds here.
struct imported_layout {
    oci::descriptor top;
    state::pin keep;
};
/// Copies one image of a layout, for one platform, into the content store, every digest verified. It is named by digest, or
/// by tag ("latest" also means the only image of a layout without names). Errors name the directory.
async::task<imported_layout> import_layout(async::blocking_pool& pool, content::store& content, std::filesystem::path directory, std::string tag,
                                           std::optional<digest> wanted, oci::platform platform);

/// The same from the blobs a client lends, but for the layers, which take_layers() brings when the image is to be pulled.
async::task<imported_layout> import_store(async::blocking_pool& pool, content::store& content, std::shared_ptr<session::blob_store> from,
                                          digest wanted, oci::platform platform);
/// Those of an image that are not unpacked yet.
async::task<state::pin> take_layers(async::blocking_pool& pool, content::store& content, snapshot::store& snapshots,
                                    std::shared_ptr<session::blob_store> from, std::vector<oci::descriptor> layers, std::vector<digest> diff_ids);
/// One blob, verified; what is here already is not read. Throws errc::not_found, errc::invalid for one of more bytes than
/// `limit` (default 64 GiB), errc::corrupt.
async::task<state::pin> take_blob(async::blocking_pool& pool, content::store& content, std::shared_ptr<session::blob_store> from, digest which,
                                  std::optional<std::uint64_t> limit = {});

}  // namespace cobuild::source

/// cobuild.snapshot: layers on disk, chains of them as mounts, and the directories that outlive steps (cache mounts).
///
/// Words (docs/architecture.md, "Layers and chains"). A *layer* is one committed directory in overlayfs form; it never
/// changes. A *chain* is a list of layers, bottom first. A *writable* is a layer being written on top of a chain. A *view* is
/// a chain to look at. Mounts are descriptors of detached mounts (O_PATH: use them with openat and the other ...at calls), or
/// move_mount them (once) into a step's namespace; they are gone with their last descriptor.
///
/// Lifetimes. A layer may be removed (prune) by any process unless it is pinned. What this module returns as `layer` is
/// pinned by its `keep`; writables and views pin their chains. Ids read from elsewhere (a cache record) are first held:
/// hold() answers whether all of them are still here. Ids are never used twice in one state directory.
///
/// Crash safety. A layer's record is written after its data; a killed process leaves at most an unfinished directory, which
/// the next recover() removes. After power failure, layers committed after the last sync() are dropped. No fsync a step.
///
/// Thread-safe. Tasks do their work on the directory's pool. Sizes are bytes on disk (allocated blocks), hard links once.
/// Errors: errc::no_space (names the path), errc::not_found (a layer was removed), errc::unsupported.
/// Not its job: which layers to remove and when (cache), layer archives (archive), steps (executor).
module;
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

export module cobuild.snapshot;

import cobuild.base;
import cobuild.async;
import cobuild.state;
import cobuild.content;

export namespace cobuild::snapshot {

using layer_id = strong<std::uint64_t, struct layer_tag>;
using time_point = std::chrono::sys_time<nanoseconds>;

/// Bottom first. Empty: an empty root.
struct chain {
    std::vector<layer_id> layers;
    bool operator==(const chain&) const = default;
};

/// A committed layer that stays while `keep` lives.
struct layer {
    layer_id id;
    state::pin keep;
};

/// A blob that holds a layer's contents. `variant` is the exporter's word for how it was made ("gzip", "zstd:3", "pulled").
struct layer_blob {
    std::string variant;
    digest blob;
    std::uint64_t size = 0;
    std::string media_type;
    digest diff_id;  ///< of the uncompressed bytes
    std::map<std::string, std::string> annotations;
    bool operator==(const layer_blob&) const = default;
};

/// Record kinds are BuildKit's: "regular", "internal", "frontend", "source.local", "source.git.checkout", "exec.cachemount".
struct commit_info {
    std::string kind = "regular";
    std::string description;
    std::optional<std::uint64_t> size;  ///< when known; else measured when somebody asks
    bool whiteouts = false;             ///< there are some though the layer lies on nothing
};

/// A layer from an archive. A layer that leans on those below it (see docs/architecture.md) is keyed by chain_id and not
/// found by its diff_id.
struct pulled_info {
    digest diff_id;
    std::optional<digest> chain_id;
    std::optional<layer_blob> blob;
    std::string kind = "regular";
    std::string description;
    std::optional<std::uint64_t> size;
    bool whiteouts = true;  ///< false when the archive had none: views of this layer alone are then cheaper
};

/// A layer being written. Destroyed without commit it is discarded (moved out of sight, deleted later). Move-only.
class writable {
public:
    writable(writable&&) noexcept;
    writable& operator=(writable&&) noexcept;
    ~writable();
    [[nodiscard]] const chain& lower() const noexcept;
    /// A detached read-write mount of chain and layer. Close every use of it before the next mount() and before commit.
    [[nodiscard]] async::task<unique_fd> mount();
    /// The directory that becomes the layer, in overlayfs form. With an empty chain it is simply the root. The copying store
    /// has it only for empty chains (-1 otherwise).
    [[nodiscard]] int upper() const noexcept;
    class body;

private:
    friend struct access;
    explicit writable(std::unique_ptr<body> b) noexcept;
    std::unique_ptr<body> body_;
};

/// An empty directory for a pulled layer: write the layer in overlayfs form below `fd`. Discarded unless committed.
class unpacking {
public:
    unpacking(unpacking&&) noexcept;
    unpacking& operator=(unpacking&&) noexcept;
    ~unpacking();
    [[nodiscard]] int fd() const noexcept;
    class body;

private:
    friend struct access;
    explicit unpacking(std::unique_ptr<body> b) noexcept;
    std::unique_ptr<body> body_;
};

/// A chain to look at: a detached read-only mount that lives as long as this. `fd` may be duplicated, or moved into a
/// namespace once; keep the view until the step has ended.
class view {
public:
    view() = default;
    [[nodiscard]] int fd() const noexcept { return mount_.get(); }
    [[nodiscard]] unique_fd& mount() noexcept { return mount_; }

private:
    friend struct access;
    unique_fd mount_;
    std::shared_ptr<void> keep_;
};

/// How a second user of a cache directory is served, as `RUN --mount=type=cache,sharing=` says.
enum class sharing {
    shared,     ///< all at once in one directory
    exclusive,  ///< "private": another directory when every one of this id is busy
    locked,     ///< waits for its turn, first come first served within a process
};

/// Requests of one `id` but different seeds, owners or modes get different directories, as in BuildKit (O-CA-06). Prefer owner
/// and mode to a seed made of them: they survive the removal of the seed's layers.
struct cache_request {
    std::string id;
    snapshot::sharing sharing = snapshot::sharing::shared;
    chain seed;                                   ///< copied into a new directory
    std::uint32_t uid = 0, gid = 0, mode = 0755;  ///< of a new directory's root, when there is no seed
    bool fresh = false;                           ///< a new directory, which later requests get instead of the old ones
    std::string description;
};

/// A mutable directory of one's own (or shared) while this lives. Destruction lets the next one in.
class cache_dir {
public:
    cache_dir(cache_dir&&) noexcept;
    cache_dir& operator=(cache_dir&&) noexcept;
    ~cache_dir();
    [[nodiscard]] layer_id id() const noexcept;
    /// A new detached read-write mount of it.
    [[nodiscard]] unique_fd mount() const;
    struct state;

private:
    friend struct access;
    explicit cache_dir(std::shared_ptr<state> s) noexcept;
    std::shared_ptr<state> state_;
};

/// One line of `du`. `parents` is the chain's top layer below it when it was committed (gone ones are left out).
struct usage {
    layer_id id;
    std::string kind;
    std::string description;
    time_point created;
    std::optional<time_point> last_used;
    std::uint64_t use_count = 0;
    std::uint64_t size = 0;
    std::vector<layer_id> parents;
    bool in_use = false;      ///< pinned by somebody, in any process
    bool changeable = false;  ///< a cache directory
    std::optional<digest> diff_id;
};

/// Which system calls make an overlay mount; `automatic` tries them in this order, once.
enum class mount_method { automatic, by_descriptor, by_proc_name, by_short_name };

struct options {
    mount_method method = mount_method::automatic;
    unsigned max_chain = 400;    ///< longer chains have their bottom layers copied together into one (kept and found again)
    bool volatile_upper = true;  ///< fsync inside a step is not carried out: the build's sync() makes results durable
};

class store {
public:
    virtual ~store();
    store(const store&) = delete;
    store& operator=(const store&) = delete;
    [[nodiscard]] virtual std::string_view name() const noexcept = 0;  ///< "overlayfs" or "native"

    /// A new empty layer on top of `lower`. The root directory has the mode and owner of the chain's (0755 root when empty).
    [[nodiscard]] async::task<writable> begin(chain lower);
    [[nodiscard]] async::task<layer> commit(writable w, commit_info info);
    [[nodiscard]] async::task<snapshot::view> view(chain c);

    [[nodiscard]] async::task<unpacking> begin_unpack();
    /// When the same layer (by chain_id, else by diff_id) is here already, by whomever, that one is the result and `u` is
    /// discarded; its blob is added to the record.
    [[nodiscard]] async::task<layer> commit(unpacking u, pulled_info info);
    [[nodiscard]] async::task<std::optional<layer>> find_by_diff_id(digest d);
    [[nodiscard]] async::task<std::optional<layer>> find_by_chain_id(digest d);

    /// Pins all, or says that one is gone. Counts as a use.
    [[nodiscard]] async::task<std::optional<state::pin>> hold(chain c);
    /// The layer's own directory, for diffs and content hashes. Blocks for one openat.
    [[nodiscard]] unique_fd layer_dir(layer_id id) const;
    /// Those of a chain, top first.
    [[nodiscard]] std::vector<unique_fd> layer_dirs(const chain& c) const;

    async::task<void> set_blob(layer_id id, layer_blob blob);  ///< replaces one of the same variant
    [[nodiscard]] async::task<std::vector<layer_blob>> blobs(layer_id id);
    /// Blobs of all layers: roots for content::store::collect.
    [[nodiscard]] async::task<std::vector<digest>> all_blobs();

    /// Waits for its turn where `sharing` says so; cancellation leaves the queue. Take several in the order of their ids.
    [[nodiscard]] async::task<cache_dir> acquire_cache(cache_request r);

    /// Every record, oldest first; sizes that are not known yet, and those of cache directories, are measured.
    [[nodiscard]] async::task<std::vector<usage>> du();
    /// Moves the layer out of sight (state::directory::empty_trash frees the space); false when it is in use or gone.
    [[nodiscard]] async::task<bool> remove(layer_id id);

    /// Makes everything committed so far durable: one syncfs. Once a build, at its end.
    async::task<void> sync();
    /// Writes down use counts; called by sync() and du() too.
    void flush();
    struct common;

protected:
    explicit store(std::shared_ptr<common> c) noexcept;
    [[nodiscard]] virtual std::unique_ptr<writable::body> begin_on(chain lower) = 0;
    [[nodiscard]] virtual snapshot::view view_of(chain c) = 0;
    std::shared_ptr<common> common_;
};

/// Opens the layers of a state directory; registers for its dead owners (call directory::recover() afterwards).
/// errc::unsupported when overlayfs does not work here, with the reason.
std::shared_ptr<store> open_overlay(std::shared_ptr<state::directory> dir, options o = {});
/// Works on any file system: copies the chain for each writable and finds what changed at commit. Same layers on disk.
std::shared_ptr<store> open_native(std::shared_ptr<state::directory> dir, options o = {});
/// The overlay store where it works, else the copying one with a warning.
std::shared_ptr<store> open_best(std::shared_ptr<state::directory> dir, options o = {});

}  // namespace cobuild::snapshot

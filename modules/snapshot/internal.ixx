/// What the bodies of cobuild.snapshot share. Not installed.
module;
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.snapshot:internal;

import cobuild.base;
import cobuild.async;
import cobuild.db;
import cobuild.state;
import cobuild.snapshot;

namespace cobuild::snapshot {

/// A layer's row, and its own description in `self`.
struct record {
    layer_id id;
    std::string kind = "regular";
    std::string description;
    time_point created;
    std::optional<std::uint64_t> size;
    std::optional<layer_id> parent;
    std::optional<digest> diff_id, chain_id;
    bool whiteouts = true;
    std::string boot;
    std::string cache_key;  ///< of a cache directory, else empty
    std::string flat_key;   ///< of bottom layers copied together, else empty
    std::vector<layer_blob> blobs;
};

std::string encode_self(const record& r);
/// Empty when the text is not whole.
std::optional<record> decode_self(std::string_view text);
std::string encode_map(const std::map<std::string, std::string>& m);
std::map<std::string, std::string> decode_map(std::string_view text);
time_point now();

struct store::common : std::enable_shared_from_this<store::common> {
    common(std::shared_ptr<state::directory> d, snapshot::options o);
    ~common();

    std::shared_ptr<state::directory> dir;
    snapshot::options opt;
    unique_fd layers, active, empty;
    state::pin_table pins;
    mount_method method = mount_method::by_descriptor;

    // records.cpp
    void open_records();
    /// The newest row of a key, pinned; empty when there is none whose directory is still here.
    std::optional<layer> find(std::string_view column, const db::argument& key);
    /// Gives the finished directory active/<name> its number and its row; or (true) finds that the same layer is here.
    std::pair<layer, bool> publish(const std::string& name, record r);
    bool remove(layer_id id);
    void set_blob(layer_id id, const layer_blob& b);
    std::vector<layer_blob> blobs_of(layer_id id);
    void sync();

    // usage.cpp
    std::optional<state::pin> hold(const std::vector<layer_id>& ids, bool use);
    /// hold() that throws errc::not_found.
    state::pin must_hold(const chain& c);
    void flush_uses();
    std::vector<usage> du();

    // layers.cpp
    [[nodiscard]] unique_fd fs_of(layer_id id) const;
    [[nodiscard]] std::string where() const { return dir->root(); }
    [[nodiscard]] bool may_have_whiteouts(layer_id id);

    struct pending_use {
        std::uint64_t count = 0;
        time_point last;
    };
    std::mutex busy;  ///< for what follows
    std::map<layer_id, pending_use> uses;
    std::map<std::string, std::shared_ptr<async::semaphore>> turns;  ///< of locked cache directories, by key
    std::map<layer_id, bool> whiteouts;

private:
    void rebuild(db::connection& c);
    void after_boot(db::connection& c, std::int64_t synced);
    void raise_bound(std::uint64_t id);
    void write_mark(std::uint64_t bound, std::uint64_t synced, bool durable);
    std::pair<std::uint64_t, std::uint64_t> read_mark() const;
    layer_id insert(db::connection& c, const record& r);
    record read_record(db::connection& c, layer_id id);
    std::uint64_t bound_ = 0;  ///< under the database's write lock
};

/// An unfinished directory active/<owner>-<n> with a layer's `fs`; discarded unless published.
class unfinished {
public:
    unfinished(std::shared_ptr<store::common> c, unsigned mode = 0755);
    ~unfinished();
    unfinished(const unfinished&) = delete;
    unfinished& operator=(const unfinished&) = delete;
    std::pair<layer, bool> publish(record r);  ///< see common::publish

    std::shared_ptr<store::common> owner;
    std::string name;
    unique_fd dir, fs;

private:
    bool pending_ = true;
};

class writable::body {
public:
    body(std::shared_ptr<store::common> c, chain l, state::pin p) : work(c), lower(std::move(l)), keep(std::move(p)) {}
    virtual ~body() = default;
    virtual unique_fd mount() = 0;
    [[nodiscard]] virtual int upper() const noexcept { return work.fs.get(); }
    /// Brings `fs` into its final form.
    virtual void finish() = 0;
    unfinished work;
    chain lower;
    state::pin keep;
};

class unpacking::body {
public:
    explicit body(std::shared_ptr<store::common> c) : work(std::move(c)) {}
    unfinished work;
};

struct cache_dir::state {
    std::shared_ptr<store::common> owner;
    layer_id id;
    cobuild::state::pin keep;
    async::semaphore::permit turn;
    unique_fd lock;  ///< flock, given up before the turn
};

struct access {
    static writable make(std::unique_ptr<writable::body> b) { return writable(std::move(b)); }
    static unpacking make(std::unique_ptr<unpacking::body> b) { return unpacking(std::move(b)); }
    static cache_dir make(std::shared_ptr<cache_dir::state> s) { return cache_dir(std::move(s)); }
    static view make(unique_fd fd, std::shared_ptr<void> keep) {
        view v;
        v.mount_ = std::move(fd);
        v.keep_ = std::move(keep);
        return v;
    }
    static writable::body& of(writable& w) { return *w.body_; }
    static unpacking::body& of(unpacking& u) { return *u.body_; }
};

// ---------------------------------------------------------------- mounts.cpp

/// A detached mount of the directory itself.
unique_fd bind_mount(int dirfd, bool read_only);
struct overlay_parts {
    int layers = -1;                 ///< directory that the lower names are below
    std::vector<std::string> lower;  ///< "12/fs", top first
    int active = -1;                 ///< directory of the upper one: has fs and `work`
    std::string active_name;         ///< "<owner>-<n>"
    std::string work;                ///< name of an empty directory in it; empty: read-only
    int empty = -1;
    bool volatile_upper = true;
};
unique_fd overlay_mount(const overlay_parts& p, mount_method method);
/// How many lower layers a method can take.
std::size_t most_lowers(mount_method method, const overlay_parts& p);

// ---------------------------------------------------------------- copy.cpp

/// Puts layers (their `fs` directories, bottom first) over each other into an empty directory, without whiteouts.
void merge_layers(store::common& c, const chain& layers, int to);
/// Copies mode, owner, times and extended attributes other than overlayfs' own.
void copy_attributes(int from, int to);
bool is_opaque(int dirfd);
/// Allocated bytes below a directory; hard links once.
std::uint64_t measure(int dirfd);

/// The chain with its bottom layers copied together so that at most `limit` remain, and a pin on it.
std::pair<chain, state::pin> flattened(const std::shared_ptr<store::common>& c, const chain& whole, std::size_t limit);

}  // namespace cobuild::snapshot

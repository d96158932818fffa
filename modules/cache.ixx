/// cobuild.cache: what is remembered between builds: results by cache key, and digests of files by their stat.
///
/// Words. A *key* is a digest the solver made. A *record* is one remembered result; it stands under one or more keys, of
/// which the first is its *canonical* key and its identity. The *memo* remembers what a file contains as long as its stat
/// says that it is the same.
///
/// Everything here may be lost without harm: a missing record costs a run, never a wrong result. Changes are written in
/// batches, at most 50 ms late, so a crash loses the tail. Several processes may use one storage.
/// Thread safety: `index` on the engine's io thread only; `stat_memo` anywhere; `storage` and the
/// hashing functions block and are for pool threads.
/// Not responsible for what keys mean (solver), what results are (result text is opaque), or which are worth keeping.
module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

export module cobuild.cache;

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import cobuild.db;

export namespace cobuild::cache {

using time_point = std::chrono::sys_time<nanoseconds>;

// ---------------------------------------------------------------- what is stored

struct record {
    digest canonical;    ///< its first key, and its identity
    std::string result;  ///< opaque: what the solver's result store wrote
    time_point created{};
    time_point last_used{};
    bool operator==(const record&) const = default;
};

struct link {
    digest key;
    digest canonical;
    auto operator<=>(const link&) const = default;
};

/// One file in one state. `fs` is the file system's own id (statfs), because device numbers are used again.
struct file_key {
    std::uint64_t fs = 0;
    std::uint64_t device = 0;
    std::uint64_t inode = 0;
    std::uint64_t size = 0;
    std::int64_t mtime = 0;  ///< nanoseconds since 1970
    std::int64_t ctime = 0;
    auto operator<=>(const file_key&) const = default;
};

struct file_value {
    digest data;    ///< sha256 of the bytes
    digest xattrs;  ///< see xattrs_digest(); empty when there are none
    bool operator==(const file_value&) const = default;
};

struct memo_entry {
    file_key key;
    file_value value;
    std::int64_t used_day = 0;  ///< days since 1970 when it last served
    bool operator==(const memo_entry&) const = default;
};

/// One transaction: removals first, then the rest. A link whose record does not exist is ignored.
struct changes {
    std::vector<digest> removed;  ///< canonical keys
    std::vector<record> put;      ///< replaces the record of the same canonical key
    std::vector<link> links;      ///< moves a key that pointed elsewhere
    std::vector<std::pair<digest, time_point>> touched;
    std::vector<memo_entry> memos;  ///< replaces an entry of the same fs, device and inode
    [[nodiscard]] bool empty() const noexcept;
    [[nodiscard]] std::size_t size() const noexcept;
};

struct contents {
    std::vector<record> records;
    std::vector<link> links;  ///< of those records, the canonical key's own included
    bool complete = true;     ///< false when the limit cut something off
};

/// Where an index keeps its things. Blocking, thread-safe. A record left without a key is removed.
class storage {
public:
    virtual ~storage() = default;
    /// The `max_records` last used ones.
    virtual contents load(std::size_t max_records) = 0;
    virtual std::optional<record> find(const digest& key) = 0;
    /// Entries used since `oldest_day`; older ones are dropped for good.
    virtual std::vector<memo_entry> load_memos(std::int64_t oldest_day) = 0;
    virtual void apply(const changes& what) = 0;
    /// Whether other processes may write to it, so that what was not found in memory may be there nevertheless.
    [[nodiscard]] virtual bool shared() const noexcept = 0;
};

std::shared_ptr<storage> make_memory_storage();
/// In the tables "cache_*" of a database, which are made or brought up to date. Shared with other processes.
std::shared_ptr<storage> make_storage(std::shared_ptr<db::database> file);

// ---------------------------------------------------------------- memo

file_key key_of(std::uint64_t fs, const fs::file_info& info);
/// The id of the file system that `fd` lies on.
std::uint64_t file_system_of(int fd);

/// Digests of files by their stat. Thread-safe.
class stat_memo {
public:
    stat_memo();
    ~stat_memo();
    stat_memo(const stat_memo&) = delete;
    stat_memo& operator=(const stat_memo&) = delete;
    [[nodiscard]] std::optional<file_value> find(const file_key& key);
    /// For a file stat'ed at `asked`, read, and stat'ed again. False when it changed meanwhile. Remembers only what cannot have
    /// changed unseen: its ctime must lie over 2 s before `asked` (times are coarse: a second write within one tick leaves
    /// no trace).
    bool remember(const file_key& before, time_point asked, const file_key& after, const file_value& value);
    void load(std::vector<memo_entry> entries);
    /// What storage does not have yet; each entry once.
    [[nodiscard]] std::vector<memo_entry> take_new();
    [[nodiscard]] std::size_t size() const;

private:
    struct state;
    std::unique_ptr<state> state_;
};

// ---------------------------------------------------------------- index

struct index_options {
    std::size_t max_records = 50'000;  ///< kept in memory; the rest is looked up in the storage
    nanoseconds flush_after = std::chrono::milliseconds(50);
};

/// Records by key, in memory in front of a storage.
class index {
public:
    /// On the executor it is called from, which is the one it is used on from then on.
    static async::task<std::shared_ptr<index>> open(async::blocking_pool& pool, std::shared_ptr<storage> store, index_options options = {});
    ~index();  ///< after close()
    index(const index&) = delete;
    index& operator=(const index&) = delete;

    /// From memory alone.
    [[nodiscard]] std::optional<record> peek(const digest& key) const;
    /// Whether find() may know more than peek().
    [[nodiscard]] bool may_have_more() const noexcept;
    async::task<std::optional<record>> find(digest key);
    /// Stores a result under `canonical` and `keys`; the record of that canonical key, if there is one, gets the new result
    /// and keeps its other keys. Keys that pointed elsewhere move; a record left without a key is removed.
    record save(digest canonical, std::string result, const std::vector<digest>& keys);
    /// One more key for a record; nothing happens when it was removed meanwhile.
    void link(digest key, digest canonical);
    void remove(digest canonical);
    /// It was used now; written only when the last time lies over a minute back.
    void touch(digest canonical);
    /// The keys a record stands under, as far as memory knows.
    [[nodiscard]] std::vector<digest> keys(const digest& canonical) const;
    /// Everything, from the storage: for prune and reports.
    async::task<std::vector<record>> all();

    /// The memo, read from the storage when first asked for; its news are written with the index' own.
    async::task<std::shared_ptr<stat_memo>> memo();

    /// Writes what is not written yet. A failing storage is a warning in the log, not an error: see above.
    async::task<void> flush();
    async::task<void> close();

private:
    struct state;
    explicit index(std::shared_ptr<state> s);
    std::shared_ptr<state> state_;
};

// ---------------------------------------------------------------- content digests

enum class file_type : char { regular = 'f', directory = 'd', symlink = 'l', character = 'c', block = 'b', fifo = 'p', socket = 's' };

/// What of a file but its bytes and name counts: no time does.
struct file_header {
    file_type type = file_type::regular;
    std::uint32_t mode = 0;  ///< the lower 12 bits
    std::uint32_t uid = 0;
    std::uint32_t gid = 0;
    std::uint64_t size = 0;  ///< of regular files
    std::string link_target;
    std::uint32_t major = 0;  ///< of devices
    std::uint32_t minor = 0;
    digest xattrs;
};
/// The digest of one file. `data` is the sha256 of its bytes, empty for anything but regular files: whoever copies a file
/// hashes the bytes on the way and gets the digest that hash_tree() finds in the copy.
digest file_digest(const file_header& header, const digest& data);

/// The digest of a directory from its own file_digest and its children's names and digests, in byte order of the names.
class directory_hasher {
public:
    explicit directory_hasher(const digest& own);
    void child(std::string_view name, const digest& d);
    digest finish();

private:
    hasher hash_;
};

/// Over the names and values that `fd` has, sorted, without `security.*` (but with security.capability) and `system.*`; empty when none is left.
digest xattrs_digest(int fd);
digest xattrs_digest(std::vector<std::pair<std::string, std::string>> xattrs);

/// What of a tree is meant. `path` is absolute within the root; ".." and absolute links stay inside it.
struct selector {
    std::string path = "/";
    bool wildcard = false;             ///< `path` is a pattern of Go's filepath.Match
    bool follow_links = false;         ///< what a link at the very end points to counts, not the link
    std::vector<std::string> include;  ///< docker ignore language; none means everything
    std::vector<std::string> exclude;
    bool operator==(const selector&) const = default;
};

struct hash_options {
    stat_memo* memo = nullptr;
    unsigned threads = 1;                 ///< for reading files; the calling one included
    std::optional<fs::owner> owned_by{};  ///< counted instead of the files' own owner
    async::cancel_token cancelled{};
};

/// The digest of the selected part (its own name does not count) of the directory tree below descriptor `root`, which is never left. Device and
/// socket files count by their header. Throws errc::not_found naming the path when a selector without wildcard names nothing (a wildcard may match
/// nothing), errc::io for a file that changed while it was read twice.
digest hash_tree(int root, const selector& what, const hash_options& options = {});
/// Several at once: the order counts.
digest hash_tree(int root, std::span<const selector> what, const hash_options& options = {});

struct hashed_file {
    fs::file_info info;  ///< the state in which it was read
    file_value value;
};
/// Bytes and xattrs of the regular file `fd`, from the memo where it counts; read a second time when it changed meanwhile.
hashed_file hash_file(int fd, std::uint64_t fs, std::string_view name, stat_memo* memo, const async::cancel_token& cancelled = {});

}  // namespace cobuild::cache

/// cobuild.fs: files below a directory that acts as "/", and what copying and ignoring them means.
///
/// Every call blocks: run it on async::blocking_pool. Distinct objects may be used from distinct threads; `root`,
/// `ignore_patterns` and the free functions may be shared between threads. Paths are bytes, separated by '/', never
/// interpreted as UTF-8 unless said; a path given to a `root` may begin with '/' or not, "" and "/" are the root itself.
/// Errors are cobuild::error with the path in the sentence. Long work stops when a callback throws: the exception comes
/// through. Not its job: archives, snapshots, mounts, cache keys.
module;
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

export module cobuild.fs;

import cobuild.base;

export namespace cobuild::fs {

// ---------------------------------------------------------------- what a file is

struct owner {
    std::uint32_t uid = 0;
    std::uint32_t gid = 0;
    bool operator==(const owner&) const = default;
};

struct file_time {
    std::int64_t seconds = 0;  ///< since 1970
    std::uint32_t nanoseconds = 0;
    bool operator==(const file_time&) const = default;
};

/// What statx says. `mode` holds the type bits too (S_IFMT).
struct file_info {
    std::uint32_t mode = 0;
    std::uint32_t uid = 0;
    std::uint32_t gid = 0;
    std::uint32_t nlink = 0;
    std::uint64_t size = 0;
    std::uint64_t blocks = 0;  ///< of 512 bytes
    std::uint64_t inode = 0;
    std::uint64_t device = 0;
    std::uint32_t rdev_major = 0;
    std::uint32_t rdev_minor = 0;
    file_time mtime;
    file_time ctime;

    [[nodiscard]] bool is_dir() const noexcept;
    [[nodiscard]] bool is_file() const noexcept;
    [[nodiscard]] bool is_link() const noexcept;
    [[nodiscard]] bool is_socket() const noexcept;
    [[nodiscard]] std::uint32_t permissions() const noexcept { return mode & 07777; }
    /// An overlayfs whiteout: character device 0/0.
    [[nodiscard]] bool is_whiteout() const noexcept;
};

/// statx of `name` in `dirfd`, not following; empty when there is none. An empty name is the descriptor itself.
std::optional<file_info> stat_at(int dirfd, std::string_view name);
std::string read_link_at(int dirfd, std::string_view name);

/// Extended attributes of `name` in `dirfd`, the last component not followed. `name` must have no '/' but may be empty
/// (the descriptor itself, O_PATH too). Absent, or a file system without them: empty.
std::optional<std::string> get_xattr(int dirfd, std::string_view name, std::string_view key);
std::vector<std::string> list_xattrs(int dirfd, std::string_view name);
/// False where the file system (or the file's type) has no such attributes.
bool set_xattr(int dirfd, std::string_view name, std::string_view key, std::string_view value);

// ---------------------------------------------------------------- a directory that acts as "/"

enum class links {
    follow,  ///< a link as the last component is followed, inside the root
    keep,    ///< the last component is taken as it is; links before it are followed inside the root
    refuse,  ///< no component may be a link (errc::invalid)
};

/// Lookups below one directory by openat2 with RESOLVE_IN_ROOT: "..", absolute links and races cannot lead outside.
class root {
public:
    explicit root(const std::string& path);
    explicit root(unique_fd dir);
    [[nodiscard]] int fd() const noexcept { return dir_.get(); }

    /// Throws errc::not_found where there is none. `flags` as for open(2); O_CLOEXEC is added.
    [[nodiscard]] unique_fd open(std::string_view path, int flags, links how = links::follow) const;
    [[nodiscard]] std::optional<unique_fd> try_open(std::string_view path, int flags, links how = links::follow) const;
    [[nodiscard]] std::optional<file_info> stat(std::string_view path, links how = links::keep) const;
    [[nodiscard]] std::string read_link(std::string_view path) const;
    [[nodiscard]] std::string read_file(std::string_view path, std::size_t max_bytes) const;
    /// Names in byte order.
    [[nodiscard]] std::vector<std::string> list(std::string_view path) const;
    /// The path without links, relative to the root ("a/b", "" for the root); what does not exist is kept literally,
    /// also behind a dangling link. errc::invalid for a loop of links.
    [[nodiscard]] std::string resolve(std::string_view path, links last = links::follow) const;

    /// The directory of `path`'s last component (links before it followed inside the root) and that component's name.
    /// For the *at calls. The path must have a last component that is not "." or "..".
    [[nodiscard]] std::pair<unique_fd, std::string> parent(std::string_view path) const;

    /// Makes `path` and its missing parents, through links, also dangling ones. Mode and owner are for the new ones
    /// only, exact whatever the umask. Returns those made, resolved, parents first.
    std::vector<std::string> make_dirs(std::string_view path, std::uint32_t mode, owner who, std::optional<file_time> mtime = std::nullopt) const;
    /// A new file for writing (errc::exists when there is anything of that name), mode and owner exact.
    [[nodiscard]] unique_fd create_file(std::string_view path, std::uint32_t mode, owner who) const;
    void make_link(std::string_view path, std::string_view target, owner who) const;
    /// Removes the last component and all below it, never through a link, never across a mount. Absent: false.
    bool remove_all(std::string_view path) const;

    void chown(std::string_view path, owner who) const;           ///< these three: last component not followed
    void chmod(std::string_view path, std::uint32_t mode) const;  ///< errc::invalid for a link
    void set_mtime(std::string_view path, file_time t) const;     ///< atime as well
    [[nodiscard]] std::optional<std::string> get_xattr(std::string_view path, std::string_view key) const;
    [[nodiscard]] std::vector<std::string> list_xattrs(std::string_view path) const;
    bool set_xattr(std::string_view path, std::string_view key, std::string_view value) const;

private:
    unique_fd dir_;
};

// ---------------------------------------------------------------- walking

struct walk_entry {
    std::string_view path;  ///< relative to the start, "a/b"
    std::string_view name;  ///< last component
    int dir_fd;             ///< the directory it is in
    const file_info& info;
};
enum class walk_step { go_on, skip_dir, stop };

/// Visits all below `dirfd` (not itself), each directory before its content, names in byte order: that is BuildKit's
/// ComparePath, where '/' sorts lowest. Links are visited, never followed. Depth is bounded by memory only. Entries that
/// vanish meanwhile are left out. Returns false when stopped.
bool walk(int dirfd, const std::function<walk_step(const walk_entry&)>& visit);
/// Called after all below a directory was visited; `path` "" is the start.
struct walk_hooks {
    std::function<walk_step(const walk_entry&)> enter;
    std::function<void(std::string_view path, int fd)> leave;
};
bool walk(int dirfd, const walk_hooks& hooks);

/// BuildKit's order of paths: bytes, '/' lowest.
bool path_less(std::string_view a, std::string_view b) noexcept;
/// Names in a directory, byte order.
std::vector<std::string> list_dir(int dirfd);

// ---------------------------------------------------------------- writing, removing, locking

/// Replaces dirfd/name at once. With `sync` the content and the directory are on disk when it returns.
void atomic_write(int dirfd, std::string_view name, std::string_view content, std::uint32_t mode, bool sync);
std::string read_all(int fd, std::size_t max_bytes);
void write_all(int fd, std::span<const std::byte> data);
/// False when absent. Never follows a link, never enters a mount (errc::io). Works with unreadable directories of ours.
bool remove_tree(int dirfd, std::string_view name);

struct copied {
    std::uint64_t bytes = 0;  ///< the file's size
    std::uint64_t data = 0;   ///< of it not holes
};
/// Copies the content of `from` (its size now) to the empty file `to`: reflink, else copy_file_range, else read and
/// write; holes stay holes. With `hash` the content, holes as zeros, is fed to it while it is copied.
copied copy_file(int from, int to, hasher* hash = nullptr);
/// Feeds the content of `from` to `hash`.
void hash_file(int from, hasher& hash);

enum class copy_verdict {
    take,     ///< this entry; of a directory its content is asked for one by one
    skip,     ///< neither it nor anything below it
    descend,  ///< not by itself; made with the source's attributes once something below it is taken
    way,      ///< as descend, but a directory that exists keeps its owner, attributes and time, and only gets the source's mode
};
struct copied_entry {
    std::string_view path;       ///< relative to the start, "" for the start itself
    const file_info& info;       ///< as it stands at the target; of a directory on the `way` as it would stand were it new
    std::string_view link;       ///< a symbolic link's target
    std::string_view hard_link;  ///< path of the entry it is a hard link to, if it became one
    const digest* content;       ///< of a regular file when `hash` was asked for
    std::span<const std::pair<std::string, std::string>> xattrs;
};
struct copy_options {
    std::optional<owner> who;                             ///< instead of the source's
    std::function<std::uint32_t(const file_info&)> mode;  ///< permission bits instead of the source's; not for links
    std::optional<file_time> mtime;                       ///< instead of the source's
    bool hash = false;
    bool keep_hard_links = true;
    /// Which attributes to take; default: all but trusted.overlay.*, user.overlay.* and security.selinux.
    std::function<bool(std::string_view key)> xattr;
    std::function<copy_verdict(std::string_view path, const file_info&)> filter;
    std::function<void(const copied_entry&)> done;  ///< after each entry; directories when they are made
    /// The start, where it is a directory that exists, keeps owner and mode (COPY onto "/" must not touch "/"); it gets the time.
    bool keep_existing_root = true;
    /// What is taken replaces what is there even where only one of the two is a directory; two directories merge.
    bool replace = false;
};
/// Copies from/name to to/to_name. Directories merge (an existing one gets the source's attributes unless it is the
/// start, see above); other things replace what is there. errc::invalid when a directory would replace a non-directory
/// or the reverse; a link is never followed or replaced by a directory. Sockets are left out. A file that changed while
/// it was read is read once more, then errc::io names it. Times of directories are set last.
void copy_tree(int from, std::string_view name, int to, std::string_view to_name, const copy_options& options);

/// An advisory lock on a whole file (flock); released on destruction or when the process ends.
class file_lock {
public:
    enum class kind { shared, exclusive };
    /// Opens or creates the file. Empty when another holds it.
    static std::optional<file_lock> try_acquire(int dirfd, std::string_view name, kind k);
    static file_lock acquire(int dirfd, std::string_view name, kind k);
    [[nodiscard]] int fd() const noexcept { return fd_.get(); }

private:
    explicit file_lock(unique_fd fd) : fd_(std::move(fd)) {}
    unique_fd fd_;
};

struct disk_usage {
    std::uint64_t total = 0;
    std::uint64_t free = 0;       ///< for root
    std::uint64_t available = 0;  ///< for everybody
};
disk_usage disk_space(const std::string& path);

// ---------------------------------------------------------------- patterns

/// The patterns of a .dockerignore: a BOM is dropped, '#' in the first column is a comment, lines are trimmed and cleaned
/// (Go's filepath.Clean), a leading '/' goes, "!" stays in front.
std::vector<std::string> parse_ignore_file(std::string_view text);
/// Go's filepath.Clean (Unix).
std::string clean_path(std::string_view path);

/// moby/patternmatcher: the rules of .dockerignore, COPY --exclude and local sources' include and exclude patterns.
/// `*` and `?` match no '/', `**` any depth, a rule that matches a directory matches all below it, the last match wins.
class ignore_patterns {
public:
    ignore_patterns();
    /// errc::invalid for a malformed pattern, naming it.
    explicit ignore_patterns(std::span<const std::string> patterns);
    ignore_patterns(ignore_patterns&&) noexcept;
    ignore_patterns& operator=(ignore_patterns&&) noexcept;
    ~ignore_patterns();
    [[nodiscard]] bool empty() const noexcept;
    /// Whether the path ("a/b", no leading '/') or one of its parents is matched (MatchesOrParentMatches).
    [[nodiscard]] bool matches(std::string_view path) const;
    /// For a directory that matches(): whether something below it may still not match, because of a later "!" rule. A
    /// walk that leaves out what matches enters the directory only then.
    [[nodiscard]] bool may_reinclude_below(std::string_view dir) const;
    /// For a directory that does not match: whether something below it may match. A walk that takes only what matches
    /// enters the directory only then.
    [[nodiscard]] bool may_match_below(std::string_view dir) const;

private:
    struct state;
    std::unique_ptr<state> state_;
};

/// Go's filepath.Match (Unix): `*`, `?`, `[set]`, `[^set]`, `\\c`; errc::invalid for a malformed pattern.
bool wildcard_match(std::string_view pattern, std::string_view name);
/// Whether filepath.Match would treat it as more than a name (contains one of * ? [ \).
bool has_wildcard(std::string_view pattern) noexcept;

}  // namespace cobuild::fs

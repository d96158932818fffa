/// cobuild.state: the state directory: who lives in it, what must be undone when somebody dies, its databases, its trash.
///
/// Words. An *owner* is one open `directory` (normally one process); it holds an flock on `owners/<id>` for as long as it
/// lives. The *ledger* lists deeds that outlive a process (addresses, cgroups, runtime state): one small fsynced file each,
/// written before the deed. A *dead* owner is one whose lock can be taken; whoever takes it repairs what it left.
/// A *pin* keeps a numbered thing (layer, blob) from being removed, by any process; the kernel drops a dead process's pins.
///
/// Layout: see docs/architecture.md, "State directory". Several processes may have the directory open at once.
/// Thread-safe. Everything that is not a task blocks (pool threads, or before the engine runs).
/// Not its job: what layers and blobs mean (snapshot, content register for dead owners themselves); the daemon's own lock.
module;
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

export module cobuild.state;

import cobuild.base;
import cobuild.async;
import cobuild.db;

export namespace cobuild::state {

// ---------------------------------------------------------------- pins

/// Keeps what it names from being removed while any copy lives. Cheap to copy; an empty pin keeps nothing.
class pin {
public:
    pin() = default;
    explicit operator bool() const noexcept { return !held_.empty(); }
    /// Keeps what both keep.
    pin& operator+=(const pin& other);

private:
    friend class pin_table;
    std::vector<std::shared_ptr<const void>> held_;
};

/// Pins by number, across processes: open-file-description locks on the bytes of one file, so one descriptor serves all.
class pin_table {
public:
    /// `file` below the directory `dirfd`, made when absent.
    pin_table(int dirfd, const std::string& file);
    ~pin_table();
    pin_table(pin_table&&) noexcept;
    /// Empty while somebody is removing that number. Number < 2^62. Look afterwards whether the thing still exists.
    std::optional<pin> hold(std::uint64_t number);
    /// The right to remove: empty when anybody, this process included, pins the number. Held until destroyed.
    class removal {
    public:
        removal(removal&&) noexcept;
        ~removal();

    private:
        friend class pin_table;
        struct state;
        explicit removal(std::unique_ptr<state> s) noexcept;
        std::unique_ptr<state> state_;
    };
    std::optional<removal> try_remove(std::uint64_t number);
    /// True when anybody pins it.
    [[nodiscard]] bool pinned(std::uint64_t number) const;

private:
    struct state;
    std::shared_ptr<state> state_;
};

// ---------------------------------------------------------------- ledger

/// One pending undo.
struct undo {
    std::string owner;  ///< who recorded it
    std::string kind;   ///< whose handler knows the text: "cni", "cgroup", "runc", ...
    std::string text;   ///< up to 64 KiB, any bytes
};

/// A written ledger entry. Dropping it leaves the entry standing: it is then undone after this owner's death.
class ledger_entry {
public:
    ledger_entry() = default;
    /// The deed was undone or needs no undoing. Blocks for one unlink.
    void forget();
    explicit operator bool() const noexcept { return !name_.empty(); }

private:
    friend class directory;
    std::shared_ptr<const unique_fd> dir_;
    std::string name_;
};

/// Undoes one entry. Must succeed when the deed never happened or was undone before. A failure keeps the entry for the next start.
using undo_handler = std::function<async::task<void>(undo)>;

struct recovery {
    std::size_t dead_owners = 0;
    std::size_t undone = 0;
    std::size_t kept = 0;  ///< entries without a handler, or whose handler failed: each is a warning in the log
};

// ---------------------------------------------------------------- the directory

struct options {
    /// For tests: what /proc/sys/kernel/random/boot_id says otherwise.
    std::string boot_id;
};

class directory {
public:
    /// Makes what is missing (root 0700) and becomes an owner. A damaged state.db is set aside with a warning when no other
    /// owner lives, else errc::corrupt says so. Errors: errc::unsupported on a network file system, errc::permission.
    static std::shared_ptr<directory> open(std::string root, async::blocking_pool& pool, options o = {});
    /// Gives up the owner's lock and empties nothing; a directory with pending ledger entries stays listed as dead.
    ~directory();
    directory(const directory&) = delete;
    directory& operator=(const directory&) = delete;

    [[nodiscard]] const std::string& root() const noexcept;
    [[nodiscard]] int fd() const noexcept;
    [[nodiscard]] const std::string& owner() const noexcept;
    [[nodiscard]] const std::string& boot_id() const noexcept;
    [[nodiscard]] async::blocking_pool& pool() const noexcept;
    /// Opens a directory below the root, making it (0700) when absent: "content/ingest".
    [[nodiscard]] unique_fd subdir(const std::string& path) const;
    /// A name that no other call of any owner returns and that tells whose it is: "<owner>-<n>".
    [[nodiscard]] std::string fresh_name();

    /// state.db. Modules make their tables with migrate().
    [[nodiscard]] db::database& database() noexcept;
    /// Opens another database of the directory ("cache.db"). When it is damaged: `replaced` tells that it was set aside, with
    /// a warning, and made anew, which needs that no other owner lives; else errc::corrupt.
    struct opened {
        std::unique_ptr<db::database> database;
        bool replaced = false;
    };
    [[nodiscard]] opened open_database(const std::string& name, db::options o = {});
    /// state.db was made anew by this open over existing data: rebuild it by a scan.
    [[nodiscard]] bool rebuilt() const noexcept;
    /// Tells the directory that a call failed with errc::corrupt: the next open reads state.db whole.
    void suspect() noexcept;

    /// Writes an entry; when this returns it is on disk.
    [[nodiscard]] ledger_entry record(std::string_view kind, std::string_view text);
    void on_undo(std::string kind, undo_handler handler);
    /// `f(owner)` runs on the pool for each dead owner, after its ledger was replayed; must not throw and must be repeatable.
    void on_dead_owner(std::function<void(const std::string&)> f);
    /// Finds the dead, replays their ledgers newest entry first, removes their steps and half-written content. Call once
    /// after every handler was registered; harmless to call again. Failures are logged, not thrown.
    async::task<recovery> recover();
    /// The other living owners, as "pid 4711" (for messages).
    [[nodiscard]] std::vector<std::string> others() const;

    /// Moves `name` below `dirfd` (a tree or a file of this file system) out of sight, at once. Absent is fine.
    void discard(int dirfd, const std::string& name);
    /// Deletes what was discarded, by anybody. Looks at the token between entries. Runs on the pool.
    async::task<void> empty_trash(async::cancel_token token = {});
    void empty_trash_blocking(const async::cancel_token& token = {});

private:
    directory();
    struct state;
    std::unique_ptr<state> state_;
};

/// Deletes a tree by descriptor, following no links, over any depth; absent is fine. Blocks.
void remove_tree(int dirfd, const std::string& name, const async::cancel_token& token = {});

/// For crash tests: when the environment has COBUILD_CRASH_AT=<point>, the process dies there by SIGKILL.
void crash_point(std::string_view point) noexcept;

}  // namespace cobuild::state

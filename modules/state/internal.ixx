/// What the bodies of cobuild.state share: the open directory. Not installed.
module;
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

module cobuild.state:internal;

import cobuild.base;
import cobuild.async;
import cobuild.db;
import cobuild.state;

namespace cobuild::state {

struct directory::state {
    explicit state(async::blocking_pool& p) : pool(p) {}
    std::string root;
    async::blocking_pool& pool;
    unique_fd fd, lock, owner_lock, trash;
    std::string owner, boot;
    bool alone = false;  ///< no other owner lived when this one came
    bool rebuilt = false;
    std::atomic<bool> suspect = false;
    std::atomic<std::uint64_t> names = 0, entries = 0;
    std::unique_ptr<db::database> database;
    std::mutex busy;  ///< for what follows
    std::shared_ptr<const unique_fd> ledger;
    std::map<std::string, undo_handler> handlers;
    std::vector<std::function<void(const std::string&)>> callbacks;

    /// Opens a database; a damaged one is replaced when nobody else lives. Under open.lock.
    std::pair<std::unique_ptr<db::database>, bool> open_database(const std::string& name, db::options o);
    /// Whether no other owner lives; keeps our shared lock. Under open.lock.
    bool exclusive();
    std::shared_ptr<const unique_fd> own_ledger();
};

/// A dead owner whose lock we took: ours to repair.
struct dead_owner {
    std::string id;
    unique_fd lock;
    struct entry {
        std::string name;
        undo what;
    };
    std::vector<entry> entries;  ///< newest first
};

unique_fd open_dir(int dirfd, const std::string& path);
unique_fd make_dir(int dirfd, const std::string& path, unsigned mode);
std::vector<std::string> names_in(int dirfd);
std::string read_small(int dirfd, const std::string& name, std::size_t limit);
/// The directories whose entries are named "<owner>-<n>" and worthless once that owner is gone.
const std::vector<std::string>& scratch_places();
/// Moves scratch entries of gone owners (or of `only`) to the trash.
void sweep_scratch(directory& d, const std::string& only);

}  // namespace cobuild::state

/// Internal to cobuild.filesync: the walk of a sender, the order of a stream of entries, the disk of a receiver. All of
/// it blocks or is pure, and belongs to one pool thread at a time.
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
#include <unordered_set>
#include <utility>
#include <vector>

module cobuild.filesync:parts;

import cobuild.base;
import cobuild.fs;
import cobuild.filesync;

namespace cobuild::filesync {

/// Where the bytes of an entry are.
struct place {
    const fs::root* root = nullptr;
    std::string path;
};
/// Walks the trees in the protocol's order. `emit` gets what is to be said of each entry and where its bytes are.
void list_trees(const std::vector<tree>& trees, const send_options& options, const std::function<void(file_stat&&, place&&)>& emit);

/// Which of the xattrs go along.
std::function<bool(std::string_view)> xattr_filter(std::function<bool(std::string_view)> asked);

fs::file_time to_time(std::int64_t nanoseconds_since_1970) noexcept;
/// Clamped to what 64 bits of nanoseconds hold.
std::int64_t from_time(fs::file_time t) noexcept;

/// Checks each entry of a stream against those before it: the protocol's order, clean paths, known links, limits.
class order {
public:
    explicit order(limits max) : max_(max) {}
    /// Throws errc::corrupt. Afterwards the open directories are those above the entry, and itself if it is one.
    void check(const file_stat& s);

private:
    void check_path(std::string_view path) const;
    void check_content(const file_stat& s) const;
    struct level {
        std::string path;
        std::string last;
    };
    limits max_;
    std::vector<level> open_{1};
    std::unordered_set<std::string> files_;  ///< what hard links may name
    std::uint64_t entries_ = 0;
    std::uint64_t path_bytes_ = 0;
};

/// Makes the entries of a stream in a directory.
class disk {
public:
    disk(std::shared_ptr<const fs::root> to, const receive_options& options);
    ~disk();  ///< removes the temporary files
    disk(const disk&) = delete;
    disk& operator=(const disk&) = delete;

    /// Takes the next entry; true when its bytes are wanted, as `id`.
    bool entry(file_stat s, std::uint32_t id);
    void data(std::uint32_t id, std::string_view bytes);
    /// The file is whole: it gets its attributes and its name.
    void complete(std::uint32_t id);
    /// After all of it: hard links, what is to be removed, the directories' attributes.
    void finish();
    [[nodiscard]] received& result() noexcept { return result_; }

private:
    struct level {
        std::string path;
        std::vector<std::string> names;  ///< seen in it, in order; only when mirroring
        bool fresh = false;
        bool left_out = false;
    };
    struct incoming {
        file_stat stat;
        unique_fd fd;
        std::string temporary;
        std::uint64_t got = 0;
        bool replaces = false;
    };
    struct link {
        std::string path;
        std::string target;
    };
    struct directory {
        file_stat stat;
    };
    int dir_of(std::string_view path);
    level& enter(const file_stat& s);
    void leave();
    bool unchanged(const file_stat& s, const std::optional<fs::file_info>& old, int dir, const std::string& name);
    void make_directory(file_stat s, const std::optional<fs::file_info>& old, int dir, const std::string& name);
    void make_special(const file_stat& s, const std::optional<fs::file_info>& old, int dir, const std::string& name);
    void make_hard_link(const link& l);
    void open_file(incoming& f);
    void put(int dir, const std::string& temporary, const std::string& name, std::string_view path);
    void finish_directory(const file_stat& s);
    void set_xattrs(int dir, const std::string& name, const file_stat& s) const;
    std::string temporary_name();
    void note(change_kind kind, std::string path);

    std::shared_ptr<const fs::root> to_;
    receive_options options_;
    std::function<bool(std::string_view)> xattr_;
    order order_;
    std::string mark_;  ///< what this run's temporary names begin with
    std::uint64_t temporaries_ = 0;
    std::uint64_t announced_ = 0;  ///< bytes
    std::vector<level> open_{1};
    std::unordered_set<std::string> left_out_;  ///< files
    std::map<std::pair<std::uint64_t, std::uint64_t>, std::string> claimed_;
    std::unordered_map<std::uint32_t, incoming> files_;
    std::vector<link> links_;
    std::vector<directory> directories_;
    std::string dir_path_;
    unique_fd dir_;
    received result_;
};

}  // namespace cobuild::filesync

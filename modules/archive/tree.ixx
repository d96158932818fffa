/// Internal to cobuild.archive: makes files below one directory from paths of an archive, with few system calls.
module;
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

module cobuild.archive:tree;

import cobuild.base;
import cobuild.fs;

namespace cobuild::archive {

struct attributes {
    std::uint32_t mode = 0;
    fs::owner who;
    fs::file_time mtime;
    std::span<const std::pair<std::string, std::string>> xattrs;
};

/// A path of an archive as a path below the directory: no leading '/', no "." or "..", "" for the directory itself.
std::string entry_path(std::string_view path);

class tree_writer {
public:
    struct options {
        bool overlay = false;
        bool user_xattr = false;
    };
    tree_writer(int dir, options o);

    void directory(const std::string& path, const attributes& a);
    void symlink(const std::string& path, std::string_view target, const attributes& a);
    /// Device or fifo; `type` is S_IFCHR, S_IFBLK or S_IFIFO. False when this user may not make it.
    bool node(const std::string& path, std::uint32_t type, std::uint32_t major, std::uint32_t minor, const attributes& a);
    /// False when there is no such target.
    bool hard_link(const std::string& path, const std::string& target);
    /// A regular file: begin, the pieces in order, end. Zeros become holes.
    void begin_file(const std::string& path, std::uint64_t size, const attributes& a);
    void piece(std::span<const std::byte> data);
    void end_file(const attributes& a);

    /// Overlay form only.
    void whiteout(const std::string& path);
    void opaque(const std::string& dir);

    /// Sets the times of directories; nothing may follow.
    void finish();
    /// Directories made without having been listed, parents first.
    [[nodiscard]] std::vector<std::string> implied() const;

private:
    struct place {
        int dir;
        std::string name;
    };
    place at(const std::string& path);
    int open_dir(const std::string& path);
    unique_fd make_parents(const std::string& path);
    void through_whiteouts(const std::string& path);
    /// Removes what is in the way; true when it was something else than a whiteout hiding nothing made here.
    void clear(const place& p, const std::string& path);
    void forget();
    void mark_opaque(const place& p);
    void set_xattrs(const place& p, const attributes& a);
    void set_owner(const place& p, const attributes& a);
    [[nodiscard]] bool owner_differs(const attributes& a) const noexcept;
    [[nodiscard]] bool mode_differs(const attributes& a) const noexcept;

    int root_;
    fs::root lookup_;
    options options_;
    std::uint32_t umask_ = 0;
    fs::owner self_;
    bool inherits_ = false;  ///< a set-gid directory or a default ACL may change what we make
    std::unordered_map<std::string, unique_fd> dirs_;
    std::string last_path_;
    int last_fd_ = -1;
    std::map<std::string, fs::file_time> times_;
    std::vector<std::string> implied_;
    std::unordered_set<std::string> not_listed_;
    // The file being written.
    unique_fd file_;
    place file_place_{-1, {}};
    std::uint64_t offset_ = 0;
    std::uint64_t size_ = 0;
    bool hole_last_ = false;
};

}  // namespace cobuild::archive

module;
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

module cobuild.archive;

import cobuild.base;
import cobuild.fs;
import :tree;

namespace cobuild::archive {

namespace {
constexpr std::size_t max_dirs = 96;
constexpr std::size_t hole_unit = std::size_t{64} << 10;

/// The umask without changing it, which would change it for every thread.
std::uint32_t current_umask() {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);)
        if (line.starts_with("Umask:")) return static_cast<std::uint32_t>(std::strtoul(line.c_str() + 6, nullptr, 8));
    return 07777;
}

int open_dir_in(int root, const std::string& path, std::uint64_t resolve) {
    open_how how{};
    how.flags = O_PATH | O_DIRECTORY | O_CLOEXEC;
    how.resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | resolve;
    for (int attempt = 0;; ++attempt) {
        const long fd = ::syscall(SYS_openat2, root, path.c_str(), &how, sizeof how);
        if (fd >= 0 || (errno != EAGAIN && errno != EINTR) || attempt == 100) return static_cast<int>(fd);
    }
}

bool all_zero(std::span<const std::byte> data) {
    const std::size_t first = std::min<std::size_t>(data.size(), 16);
    for (std::size_t i = 0; i < first; ++i)
        if (data[i] != std::byte{0}) return false;
    return data.size() <= 16 || std::memcmp(data.data(), data.data() + 16, data.size() - 16) == 0;
}

std::array<timespec, 2> both(fs::file_time t) {
    const timespec when{t.seconds, static_cast<long>(t.nanoseconds)};
    return {when, when};
}

/// Attributes with a meaning to overlayfs must not come from an archive: they could show files it does not hold.
bool allowed(std::string_view key) { return !key.starts_with("trusted.overlay.") && !key.starts_with("user.overlay."); }
}  // namespace

std::string entry_path(std::string_view path) {
    while (path.starts_with('/') || path.starts_with("./")) path.remove_prefix(1);
    while (path.ends_with('/')) path.remove_suffix(1);
    const bool plain = !path.empty() && path != "." && path != ".." && path.find("//") == std::string_view::npos &&
                       path.find("/.") == std::string_view::npos && !path.starts_with("../");
    return plain ? std::string(path) : fs::clean_path(cat("/", path)).substr(1);
}

tree_writer::tree_writer(int dir, options o)
    : root_(dir),
      lookup_(unique_fd{::openat(dir, ".", O_PATH | O_DIRECTORY | O_CLOEXEC)}),
      options_(o),
      umask_(current_umask()),
      self_{::geteuid(), ::getegid()} {
    if (lookup_.fd() < 0) throw_errno("opening the directory to unpack into");
    root_ = lookup_.fd();
    // What exists already in a target that is not empty may have any attributes.
    inherits_ = !o.overlay || (fs::stat_at(root_, "")->mode & S_ISGID) != 0 || fs::get_xattr(root_, "", "system.posix_acl_default").has_value();
}

bool tree_writer::owner_differs(const attributes& a) const noexcept { return inherits_ || a.who != self_; }
bool tree_writer::mode_differs(const attributes& a) const noexcept { return inherits_ || (a.mode & (umask_ | 07000)) != 0; }

// ---------------------------------------------------------------- finding places

int tree_writer::open_dir(const std::string& path) {
    if (path.empty()) return root_;
    if (last_fd_ >= 0 && path == last_path_) return last_fd_;
    auto found = dirs_.find(path);
    if (found == dirs_.end()) {
        unique_fd fd{open_dir_in(root_, path, 0)};
        if (!fd) fd = make_parents(path);
        if (dirs_.size() >= max_dirs) dirs_.clear();
        found = dirs_.emplace(path, std::move(fd)).first;
    }
    last_path_ = path;
    last_fd_ = found->second.get();
    return last_fd_;
}

unique_fd tree_writer::make_parents(const std::string& path) {
    if (errno == ENOTDIR && options_.overlay)
        through_whiteouts(path);
    else if (errno != ENOENT)
        throw_errno(cat("opening the directory ", quoted(path)));
    // Owner 0 and mode 0755 until finish_layer() knows better.
    for (auto& made : lookup_.make_dirs(path, 0755, fs::owner{}))
        if (not_listed_.insert(made).second) {
            if (options_.overlay) times_.insert_or_assign(made, fs::file_time{});
            implied_.push_back(std::move(made));
        }
    unique_fd fd{open_dir_in(root_, path, 0)};
    if (!fd) throw_errno(cat("opening the directory ", quoted(path)));
    return fd;
}

/// An entry below something that this layer has hidden: the directory is new and hides what was there.
void tree_writer::through_whiteouts(const std::string& path) {
    const std::string real = lookup_.resolve(path);
    for (std::size_t end = real.find('/');; end = real.find('/', end + 1)) {
        const std::string part = real.substr(0, end);
        const auto info = lookup_.stat(part);
        if (info && info->is_whiteout()) {
            lookup_.remove_all(part);
            lookup_.make_dirs(part, 0755, fs::owner{});
            if (not_listed_.insert(part).second) implied_.push_back(part);
            times_.insert_or_assign(part, fs::file_time{});
            const auto [dir, name] = lookup_.parent(part);
            mark_opaque({dir.get(), name});
        } else if (info && !info->is_dir()) {
            throw error{errc::corrupt, cat("the archive has entries below ", quoted(part), ", which is not a directory")};
        }
        if (end == std::string::npos) return;
    }
}

tree_writer::place tree_writer::at(const std::string& path) {
    const auto slash = path.rfind('/');
    if (slash == std::string::npos) return {root_, path};
    return {open_dir(path.substr(0, slash)), path.substr(slash + 1)};
}

void tree_writer::forget() {
    dirs_.clear();
    last_fd_ = -1;
}

void tree_writer::clear(const place& p, const std::string& path) {
    const auto info = fs::stat_at(p.dir, p.name);
    if (!info) return;
    if (!info->is_dir()) {
        if (::unlinkat(p.dir, p.name.c_str(), 0) != 0) throw_errno(cat("replacing ", quoted(path)));
        if (info->is_link()) {
            // Directories opened through the link are no longer at their paths; `p` itself stays usable.
            last_fd_ = -1;
            last_path_.clear();
            std::erase_if(dirs_, [&](const auto& d) { return d.second.get() != p.dir; });
        }
        return;
    }
    fs::remove_tree(p.dir, p.name);
    const std::string below = path + '/';
    const auto gone = [&](const std::string& d) { return d == path || d.starts_with(below); };
    std::erase_if(times_, [&](const auto& t) { return gone(t.first); });
    std::erase_if(implied_, gone);
    std::erase_if(not_listed_, gone);
    last_fd_ = -1;
    last_path_.clear();
    std::erase_if(dirs_, [&](const auto& d) { return d.second.get() != p.dir; });
}

// ---------------------------------------------------------------- attributes

void tree_writer::set_owner(const place& p, const attributes& a) {
    if (owner_differs(a) && ::fchownat(p.dir, p.name.c_str(), a.who.uid, a.who.gid, AT_SYMLINK_NOFOLLOW) != 0)
        throw_errno(cat("setting the owner of ", quoted(p.name)));
}

void tree_writer::set_xattrs(const place& p, const attributes& a) {
    for (const auto& [key, value] : a.xattrs) {
        if (!allowed(key)) continue;
        fs::set_xattr(p.dir, p.name, key, value);
        if (key == "system.posix_acl_default") inherits_ = true;
    }
}

void tree_writer::mark_opaque(const place& p) {
    const std::string_view key = options_.user_xattr ? "user.overlay.opaque" : "trusted.overlay.opaque";
    if (!fs::set_xattr(p.dir, p.name, key, "y"))
        throw error{errc::unsupported, cat("the file system of the layers has no extended attributes (", key, ")")};
}

// ---------------------------------------------------------------- entries

void tree_writer::directory(const std::string& path, const attributes& a) {
    if (path.empty()) {
        if (::fchownat(root_, "", a.who.uid, a.who.gid, AT_EMPTY_PATH) != 0) throw_errno("setting the owner of the top directory");
        if (::chmod(cat("/proc/self/fd/", root_).c_str(), a.mode) != 0) throw_errno("setting the mode of the top directory");
        set_xattrs({root_, ""}, a);
        times_.insert_or_assign("", a.mtime);
        inherits_ = inherits_ || (a.mode & S_ISGID) != 0;
        return;
    }
    const place p = at(path);
    bool hides = false;
    bool merges = false;
    if (::mkdirat(p.dir, p.name.c_str(), a.mode & 0777) != 0) {
        if (errno != EEXIST) throw_errno(cat("making the directory ", quoted(path)));
        const auto there = fs::stat_at(p.dir, p.name);
        if (!there || !there->is_dir()) {
            clear(p, path);
            if (::mkdirat(p.dir, p.name.c_str(), a.mode & 0777) != 0) throw_errno(cat("making the directory ", quoted(path)));
            hides = options_.overlay;
        } else {
            merges = true;
        }
    }
    if ((merges || owner_differs(a)) && ::fchownat(p.dir, p.name.c_str(), a.who.uid, a.who.gid, AT_SYMLINK_NOFOLLOW) != 0)
        throw_errno(cat("setting the owner of ", quoted(path)));
    if ((merges || mode_differs(a)) && ::fchmodat(p.dir, p.name.c_str(), a.mode, 0) != 0) throw_errno(cat("setting the mode of ", quoted(path)));
    set_xattrs(p, a);
    if (hides) mark_opaque(p);
    if ((a.mode & S_ISGID) != 0) inherits_ = true;
    times_.insert_or_assign(path, a.mtime);
    if (!not_listed_.empty() && not_listed_.erase(path) != 0) std::erase(implied_, path);
}

void tree_writer::symlink(const std::string& path, std::string_view target, const attributes& a) {
    const place p = at(path);
    const std::string to{target};
    if (::symlinkat(to.c_str(), p.dir, p.name.c_str()) != 0) {
        if (errno != EEXIST) throw_errno(cat("making the link ", quoted(path)));
        clear(p, path);
        if (::symlinkat(to.c_str(), p.dir, p.name.c_str()) != 0) throw_errno(cat("making the link ", quoted(path)));
    }
    set_owner(p, a);
    set_xattrs(p, a);
    if (::utimensat(p.dir, p.name.c_str(), both(a.mtime).data(), AT_SYMLINK_NOFOLLOW) != 0) throw_errno(cat("setting the time of ", quoted(path)));
}

bool tree_writer::node(const std::string& path, std::uint32_t type, std::uint32_t major, std::uint32_t minor, const attributes& a) {
    const place p = at(path);
    const auto make = [&] { return ::mknodat(p.dir, p.name.c_str(), type | (a.mode & 0777), makedev(major, minor)) == 0; };
    if (!make()) {
        if (errno == EEXIST) {
            clear(p, path);
            if (make()) errno = 0;
        }
        if (errno == EPERM) return false;
        if (errno != 0) throw_errno(cat("making the node ", quoted(path)));
    }
    set_owner(p, a);
    if (mode_differs(a) && ::fchmodat(p.dir, p.name.c_str(), a.mode, 0) != 0) throw_errno(cat("setting the mode of ", quoted(path)));
    set_xattrs(p, a);
    if (::utimensat(p.dir, p.name.c_str(), both(a.mtime).data(), AT_SYMLINK_NOFOLLOW) != 0) throw_errno(cat("setting the time of ", quoted(path)));
    return true;
}

bool tree_writer::hard_link(const std::string& path, const std::string& target) {
    const auto slash = target.rfind('/');
    const std::string name = slash == std::string::npos ? target : target.substr(slash + 1);
    const unique_fd dir{open_dir_in(root_, slash == std::string::npos ? "." : target.substr(0, slash), 0)};
    if (!dir) return errno == ENOENT || errno == ENOTDIR ? false : (throw_errno(cat("looking for ", quoted(target))), false);
    const auto info = fs::stat_at(dir.get(), name);
    if (!info || (options_.overlay && info->is_whiteout())) return false;
    if (info->is_dir()) throw error{errc::corrupt, cat("the archive has a hard link ", quoted(path), " to the directory ", quoted(target))};
    const place p = at(path);
    if (::linkat(dir.get(), name.c_str(), p.dir, p.name.c_str(), 0) == 0) return true;
    if (errno != EEXIST) throw_errno(cat("making the hard link ", quoted(path)));
    if (const auto there = fs::stat_at(p.dir, p.name); there && there->inode == info->inode && there->device == info->device) return true;
    clear(p, path);
    if (::linkat(dir.get(), name.c_str(), p.dir, p.name.c_str(), 0) == 0) return true;
    if (errno == ENOENT) return false;
    throw_errno(cat("making the hard link ", quoted(path)));
}

void tree_writer::begin_file(const std::string& path, std::uint64_t size, const attributes& a) {
    file_place_ = at(path);
    const auto& p = file_place_;
    constexpr int flags = O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC;
    file_ = unique_fd{::openat(p.dir, p.name.c_str(), flags, a.mode & 0777)};
    if (!file_ && errno == EEXIST) {
        clear(p, path);
        file_ = unique_fd{::openat(p.dir, p.name.c_str(), flags, a.mode & 0777)};
    }
    if (!file_) throw_errno(cat("creating ", quoted(path)));
    offset_ = 0;
    size_ = size;
    hole_last_ = false;
}

void tree_writer::piece(std::span<const std::byte> data) {
    while (!data.empty()) {
        // One write for all up to the next unit of zeros, units being aligned in the file.
        std::size_t run = 0;
        std::size_t hole = 0;
        while (run < data.size() && hole == 0) {
            const auto unit = std::min(data.size() - run, hole_unit - static_cast<std::size_t>((offset_ + run) % hole_unit));
            if (size_ >= hole_unit && all_zero(data.subspan(run, unit)))
                hole = unit;
            else
                run += unit;
        }
        for (std::span<const std::byte> left = data.first(run); !left.empty();) {
            const ssize_t n = ::pwrite(file_.get(), left.data(), left.size(), static_cast<off_t>(offset_));
            if (n < 0 && errno != EINTR) throw_errno(cat("writing ", quoted(file_place_.name)));
            if (n <= 0) continue;
            left = left.subspan(static_cast<std::size_t>(n));
            offset_ += static_cast<std::uint64_t>(n);
        }
        offset_ += hole;
        hole_last_ = hole != 0;
        data = data.subspan(run + hole);
    }
}

void tree_writer::end_file(const attributes& a) {
    const int fd = file_.get();
    const std::string& name = file_place_.name;
    if (hole_last_ && ::ftruncate(fd, static_cast<off_t>(offset_)) != 0) throw_errno(cat("setting the size of ", quoted(name)));
    if (owner_differs(a) && ::fchown(fd, a.who.uid, a.who.gid) != 0) throw_errno(cat("setting the owner of ", quoted(name)));
    if (mode_differs(a) && ::fchmod(fd, a.mode) != 0) throw_errno(cat("setting the mode of ", quoted(name)));
    if (!a.xattrs.empty()) set_xattrs({fd, ""}, a);
    if (::futimens(fd, both(a.mtime).data()) != 0) throw_errno(cat("setting the time of ", quoted(name)));
    file_.reset();
}

// ---------------------------------------------------------------- overlay form

void tree_writer::whiteout(const std::string& path) {
    const place p = at(path);
    if (::mknodat(p.dir, p.name.c_str(), S_IFCHR | 0600, 0) == 0) return;
    if (errno != EEXIST) throw_errno(cat("making the whiteout ", quoted(path)));
    // A whiteout hides only what is below the layer: a directory of the layer stays, alone.
    if (fs::stat_at(p.dir, p.name)->is_dir()) mark_opaque(p);
}

void tree_writer::opaque(const std::string& dir) { mark_opaque({open_dir(dir), ""}); }

void tree_writer::finish() {
    for (auto it = times_.rbegin(); it != times_.rend(); ++it) {
        const place p = it->first.empty() ? place{root_, "."} : at(it->first);
        if (::utimensat(p.dir, p.name.c_str(), both(it->second).data(), AT_SYMLINK_NOFOLLOW) != 0)
            throw_errno(cat("setting the time of ", quoted(it->first)));
    }
}

std::vector<std::string> tree_writer::implied() const {
    auto out = implied_;
    std::ranges::sort(out, [](const std::string& a, const std::string& b) { return fs::path_less(a, b); });
    return out;
}

}  // namespace cobuild::archive

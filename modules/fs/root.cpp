module;
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.fs;

import cobuild.base;

namespace cobuild::fs {

namespace {
constexpr int max_links = 255;

std::string relative(std::string_view path) {
    while (path.starts_with('/')) path.remove_prefix(1);
    return path.empty() ? std::string(".") : std::string(path);
}

/// -1 with errno on failure.
int open_in(int dirfd, const std::string& path, int flags, std::uint64_t resolve, std::uint32_t mode = 0) {
    open_how how{};
    how.flags = static_cast<std::uint64_t>(flags | O_CLOEXEC);
    how.mode = mode;
    how.resolve = resolve | RESOLVE_NO_MAGICLINKS;
    for (int attempt = 0;; ++attempt) {
        const long fd = ::syscall(SYS_openat2, dirfd, path.c_str(), &how, sizeof how);
        // EAGAIN: a rename elsewhere raced with "..".
        if (fd >= 0 || (errno != EAGAIN && errno != EINTR) || attempt == 100) return static_cast<int>(fd);
    }
}

[[noreturn]] void throw_lookup(int e, std::string_view what, std::string_view path, links how) {
    if (e == ELOOP)
        throw error{errc::invalid, how == links::follow ? cat(quoted(path), ": too many symbolic links in the path (a loop?)")
                                                        : cat(quoted(path), ": a symbolic link is not allowed here")};
    if (e == ENOTDIR) throw error{errc::invalid, cat(what, " ", quoted(path), ": a part of the path is not a directory")};
    throw os_error(e, cat(what, " ", quoted(path)));
}

void check_name(std::string_view path, std::string_view name) {
    if (name.empty() || name == "." || name == "..") throw error{errc::invalid, cat(quoted(path), " does not end in a name")};
}
}  // namespace

root::root(const std::string& path) : dir_(::open(path.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC)) {
    if (!dir_) throw_errno(cat("opening the directory ", quoted(path)));
}

root::root(unique_fd dir) : dir_(std::move(dir)) {}

std::optional<unique_fd> root::try_open(std::string_view path, int flags, links how) const {
    if (path.find('\0') != std::string_view::npos) throw error{errc::invalid, cat("a NUL byte in the path ", quoted(path))};
    const std::uint64_t resolve = how == links::refuse ? RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS : RESOLVE_IN_ROOT;
    const std::string rel = relative(path);
    const int fd =
        open_in(dir_.get(), rel, how == links::follow || rel == "." ? flags : flags | O_NOFOLLOW, resolve, (flags & O_CREAT) != 0 ? 0600 : 0);
    if (fd >= 0) return unique_fd{fd};
    if (errno == ENOENT || (errno == ENOTDIR && (flags & O_DIRECTORY) == 0)) return std::nullopt;
    throw_lookup(errno, "opening", path, how);
}

unique_fd root::open(std::string_view path, int flags, links how) const {
    if (auto fd = try_open(path, flags, how)) return std::move(*fd);
    throw error{errc::not_found, cat("there is no ", quoted(path))};
}

std::optional<file_info> root::stat(std::string_view path, links how) const {
    const auto fd = try_open(path, O_PATH, how);
    if (!fd) return std::nullopt;
    return stat_at(fd->get(), "");
}

std::string root::read_link(std::string_view path) const { return read_link_at(open(path, O_PATH, links::keep).get(), ""); }

std::string root::read_file(std::string_view path, std::size_t max_bytes) const {
    // O_NONBLOCK: a fifo must not hold us up.
    const auto fd = open(path, O_RDONLY | O_NONBLOCK);
    if (!stat_at(fd.get(), "")->is_file()) throw error{errc::invalid, cat(quoted(path), " is not a regular file")};
    return read_all(fd.get(), max_bytes);
}

std::vector<std::string> root::list(std::string_view path) const { return list_dir(open(path, O_RDONLY | O_DIRECTORY).get()); }

std::string root::resolve(std::string_view path, links last) const {
    std::deque<std::string> todo;
    for (const auto part : split(path, '/')) todo.emplace_back(part);
    std::vector<std::string> done;
    bool missing = false;
    int followed = 0;
    const auto joined = [&](std::string_view more) {
        std::string out;
        for (const auto& d : done) out += d + '/';
        return out.append(more);
    };
    while (!todo.empty()) {
        const std::string part = std::move(todo.front());
        todo.pop_front();
        if (part.empty() || part == ".") continue;
        if (part == "..") {
            if (!done.empty()) done.pop_back();
            missing = false;  // what is above exists or is found missing again
            continue;
        }
        const bool final_part = todo.empty() || (todo.size() == 1 && todo.front().empty());
        if (!missing && !(final_part && last == links::keep)) {
            const std::string here = joined(part);
            const unique_fd fd{open_in(dir_.get(), here, O_PATH | O_NOFOLLOW, RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS)};
            if (!fd) {
                if (errno != ENOENT && errno != ENOTDIR) throw_lookup(errno, "looking up", path, links::follow);
                missing = true;
            } else if (stat_at(fd.get(), "")->is_link()) {
                if (last == links::refuse) throw_lookup(ELOOP, "", path, last);
                if (++followed > max_links) throw_lookup(ELOOP, "", path, links::follow);
                const std::string target = read_link_at(fd.get(), "");
                if (target.starts_with('/')) done.clear();
                const auto parts = split(target, '/');
                for (auto it = parts.rbegin(); it != parts.rend(); ++it) todo.emplace_front(*it);
                continue;
            }
        }
        done.push_back(part);
    }
    std::string out = joined("");
    if (!out.empty()) out.pop_back();
    return out;
}

std::pair<unique_fd, std::string> root::parent(std::string_view path) const {
    while (path.ends_with('/')) path.remove_suffix(1);
    const auto slash = path.rfind('/');
    const std::string name{slash == std::string_view::npos ? path : path.substr(slash + 1)};
    check_name(path, name);
    return {open(slash == std::string_view::npos ? std::string_view{} : path.substr(0, slash), O_PATH | O_DIRECTORY), name};
}

std::vector<std::string> root::make_dirs(std::string_view path, std::uint32_t mode, owner who, std::optional<file_time> mtime) const {
    const std::string target = resolve(path);
    std::vector<std::string> made;
    if (target.empty()) return made;
    unique_fd at = dir_.duplicate();
    std::string so_far;
    for (const auto part : split(target, '/')) {
        const std::string name{part};
        so_far += so_far.empty() ? name : '/' + name;
        bool fresh = false;
        if (::mkdirat(at.get(), name.c_str(), 0700) == 0)
            fresh = true;
        else if (errno != EEXIST)
            throw_errno(cat("making the directory ", quoted(so_far)));
        unique_fd next{open_in(at.get(), name, (fresh ? O_RDONLY : O_PATH) | O_DIRECTORY | O_NOFOLLOW, RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS)};
        if (!next) throw_lookup(errno, "making the directory", so_far, links::refuse);
        if (fresh) {
            if (::fchown(next.get(), who.uid, who.gid) != 0) throw_errno(cat("setting the owner of ", quoted(so_far)));
            if (::fchmod(next.get(), mode) != 0) throw_errno(cat("setting the mode of ", quoted(so_far)));
            made.push_back(so_far);
        }
        at = std::move(next);
    }
    if (mtime)
        for (auto it = made.rbegin(); it != made.rend(); ++it) set_mtime(*it, *mtime);
    return made;
}

unique_fd root::create_file(std::string_view path, std::uint32_t mode, owner who) const {
    const auto [dir, name] = parent(path);
    unique_fd fd{::openat(dir.get(), name.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, 0600)};
    if (!fd) throw_errno(cat("creating ", quoted(path)));
    if (::fchown(fd.get(), who.uid, who.gid) != 0) throw_errno(cat("setting the owner of ", quoted(path)));
    if (::fchmod(fd.get(), mode) != 0) throw_errno(cat("setting the mode of ", quoted(path)));
    return fd;
}

void root::make_link(std::string_view path, std::string_view target, owner who) const {
    const auto [dir, name] = parent(path);
    if (::symlinkat(std::string(target).c_str(), dir.get(), name.c_str()) != 0) throw_errno(cat("making the link ", quoted(path)));
    if (::fchownat(dir.get(), name.c_str(), who.uid, who.gid, AT_SYMLINK_NOFOLLOW) != 0) throw_errno(cat("setting the owner of ", quoted(path)));
}

bool root::remove_all(std::string_view path) const {
    while (path.ends_with('/')) path.remove_suffix(1);
    const auto slash = path.rfind('/');
    const std::string name{slash == std::string_view::npos ? path : path.substr(slash + 1)};
    check_name(path, name);
    const auto dir = try_open(slash == std::string_view::npos ? std::string_view{} : path.substr(0, slash), O_PATH);
    if (!dir || !stat_at(dir->get(), "")->is_dir()) return false;
    return remove_tree(dir->get(), name);
}

void root::chown(std::string_view path, owner who) const {
    const auto fd = open(path, O_PATH, links::keep);
    if (::fchownat(fd.get(), "", who.uid, who.gid, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) != 0) throw_errno(cat("setting the owner of ", quoted(path)));
}

void root::chmod(std::string_view path, std::uint32_t mode) const {
    const auto fd = open(path, O_PATH, links::keep);
    if (stat_at(fd.get(), "")->is_link()) throw error{errc::invalid, cat(quoted(path), " is a symbolic link, which has no mode")};
    if (::chmod(cat("/proc/self/fd/", fd.get()).c_str(), mode) != 0) throw_errno(cat("setting the mode of ", quoted(path)));
}

void root::set_mtime(std::string_view path, file_time t) const {
    const auto fd = open(path, O_PATH, links::keep);
    const timespec when{t.seconds, static_cast<long>(t.nanoseconds)};
    const std::array<timespec, 2> times{when, when};
    if (::utimensat(fd.get(), "", times.data(), AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) != 0 &&
        ::utimensat(AT_FDCWD, cat("/proc/self/fd/", fd.get()).c_str(), times.data(), 0) != 0)
        throw_errno(cat("setting the time of ", quoted(path)));
}

std::optional<std::string> root::get_xattr(std::string_view path, std::string_view key) const {
    return fs::get_xattr(open(path, O_PATH, links::keep).get(), "", key);
}

std::vector<std::string> root::list_xattrs(std::string_view path) const { return fs::list_xattrs(open(path, O_PATH, links::keep).get(), ""); }

bool root::set_xattr(std::string_view path, std::string_view key, std::string_view value) const {
    return fs::set_xattr(open(path, O_PATH, links::keep).get(), "", key, value);
}

}  // namespace cobuild::fs

module;
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

module cobuild.fs;

import cobuild.base;

namespace cobuild::fs {

bool file_info::is_dir() const noexcept { return S_ISDIR(mode); }
bool file_info::is_file() const noexcept { return S_ISREG(mode); }
bool file_info::is_link() const noexcept { return S_ISLNK(mode); }
bool file_info::is_socket() const noexcept { return S_ISSOCK(mode); }
bool file_info::is_whiteout() const noexcept { return S_ISCHR(mode) && rdev_major == 0 && rdev_minor == 0; }

std::optional<file_info> stat_at(int dirfd, std::string_view name) {
    struct statx sx;
    const std::string path{name};
    const unsigned mask = STATX_BASIC_STATS;
    if (::statx(dirfd, path.c_str(), AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH | AT_NO_AUTOMOUNT, mask, &sx) != 0) {
        if (errno == ENOENT || errno == ENOTDIR) return std::nullopt;
        throw_errno(cat("looking at ", quoted(name)));
    }
    return file_info{
        .mode = sx.stx_mode,
        .uid = sx.stx_uid,
        .gid = sx.stx_gid,
        .nlink = sx.stx_nlink,
        .size = sx.stx_size,
        .blocks = sx.stx_blocks,
        .inode = sx.stx_ino,
        .device = makedev(sx.stx_dev_major, sx.stx_dev_minor),
        .rdev_major = sx.stx_rdev_major,
        .rdev_minor = sx.stx_rdev_minor,
        .mtime = {sx.stx_mtime.tv_sec, sx.stx_mtime.tv_nsec},
        .ctime = {sx.stx_ctime.tv_sec, sx.stx_ctime.tv_nsec},
    };
}

std::string read_link_at(int dirfd, std::string_view name) {
    std::string out(256, '\0');
    const std::string path{name};
    for (;;) {
        const ssize_t n = ::readlinkat(dirfd, path.c_str(), out.data(), out.size());
        if (n < 0) throw_errno(cat("reading the link ", quoted(name)));
        if (static_cast<std::size_t>(n) < out.size()) {
            out.resize(static_cast<std::size_t>(n));
            return out;
        }
        out.resize(out.size() * 2);
    }
}

namespace {
// There are no *at calls for attributes before Linux 6.13; the way through /proc does not follow the last component, and
// with an empty name reaches the file behind an O_PATH descriptor.
std::string proc_path(int dirfd, std::string_view name) {
    return name.empty() ? cat("/proc/self/fd/", dirfd) : cat("/proc/self/fd/", dirfd, "/", name);
}
bool no_attributes(int e) { return e == ENOTSUP || e == EOPNOTSUPP; }
}  // namespace

std::optional<std::string> get_xattr(int dirfd, std::string_view name, std::string_view key) {
    const std::string path = proc_path(dirfd, name);
    const std::string attribute{key};
    const auto get = name.empty() ? ::getxattr : ::lgetxattr;
    std::array<char, 256> small;
    ssize_t n = get(path.c_str(), attribute.c_str(), small.data(), small.size());
    if (n >= 0) return std::string(small.data(), static_cast<std::size_t>(n));
    std::string out;
    while (n < 0 && errno == ERANGE) {
        out.resize(std::max<std::size_t>(out.size() * 2, 65536));
        n = get(path.c_str(), attribute.c_str(), out.data(), out.size());
        if (n >= 0) return out.resize(static_cast<std::size_t>(n)), out;
    }
    if (errno == ENODATA || errno == ENOENT || no_attributes(errno)) return std::nullopt;
    throw_errno(cat("reading attribute ", key, " of ", quoted(name)));
}

std::vector<std::string> list_xattrs(int dirfd, std::string_view name) {
    const std::string path = proc_path(dirfd, name);
    const auto list = name.empty() ? ::listxattr : ::llistxattr;
    std::array<char, 1024> small;
    std::string large;
    const char* text = small.data();
    ssize_t n = list(path.c_str(), small.data(), small.size());
    while (n < 0 && errno == ERANGE) {
        large.resize(std::max<std::size_t>(large.size() * 2, 65536));
        n = list(path.c_str(), large.data(), large.size());
        text = large.data();
    }
    if (n < 0) {
        if (errno == ENOENT || no_attributes(errno)) return {};
        throw_errno(cat("listing the attributes of ", quoted(name)));
    }
    std::vector<std::string> out;
    for (const auto part : split(std::string_view(text, static_cast<std::size_t>(n)), '\0'))
        if (!part.empty()) out.emplace_back(part);
    std::ranges::sort(out);
    return out;
}

bool set_xattr(int dirfd, std::string_view name, std::string_view key, std::string_view value) {
    const std::string path = proc_path(dirfd, name);
    const std::string attribute{key};
    const auto set = name.empty() ? ::setxattr : ::lsetxattr;
    if (set(path.c_str(), attribute.c_str(), value.data(), value.size(), 0) == 0) return true;
    // user.* on links and devices is EPERM, which no rights would change.
    if (no_attributes(errno)) return false;
    if (errno == EPERM && key.starts_with("user.")) return false;
    throw_errno(cat("setting attribute ", key, " of ", quoted(name)));
}

}  // namespace cobuild::fs

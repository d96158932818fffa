module;
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.fs;

import cobuild.base;

namespace cobuild::fs {

void write_all(int fd, std::span<const std::byte> data) {
    while (!data.empty()) {
        const ssize_t n = ::write(fd, data.data(), data.size());
        if (n < 0) {
            if (errno == EINTR) continue;
            throw_errno("writing a file");
        }
        data = data.subspan(static_cast<std::size_t>(n));
    }
}

std::string read_all(int fd, std::size_t max_bytes) {
    std::string out;
    for (;;) {
        const std::size_t have = out.size();
        out.resize(std::min(max_bytes + 1, std::max<std::size_t>(have * 2, 16384)));
        const ssize_t n = ::read(fd, out.data() + have, out.size() - have);
        if (n < 0 && errno != EINTR) throw_errno("reading a file");
        out.resize(have + static_cast<std::size_t>(std::max<ssize_t>(n, 0)));
        if (n == 0) return out;
        if (out.size() > max_bytes) throw error{errc::invalid, cat("a file is larger than the ", format_bytes(max_bytes), " allowed here")};
    }
}

void atomic_write(int dirfd, std::string_view name, std::string_view content, std::uint32_t mode, bool sync) {
    const std::string target{name};
    const std::string temporary = cat(".", name.substr(0, 200), ".", random_id().substr(0, 12));
    const unique_fd fd{::openat(dirfd, temporary.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600)};
    if (!fd) throw_errno(cat("creating ", quoted(temporary)));
    scope_exit remove{[&] { ::unlinkat(dirfd, temporary.c_str(), 0); }};
    write_all(fd.get(), bytes_of(content));
    if (::fchmod(fd.get(), mode) != 0) throw_errno(cat("setting the mode of ", quoted(name)));
    if (sync && ::fsync(fd.get()) != 0) throw_errno(cat("writing ", quoted(name), " to disk"));
    if (::renameat(dirfd, temporary.c_str(), dirfd, target.c_str()) != 0) throw_errno(cat("putting ", quoted(name), " in place"));
    remove.dismiss();
    if (!sync) return;
    const unique_fd dir{::openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
    if (!dir || ::fsync(dir.get()) != 0) throw_errno(cat("writing the directory of ", quoted(name), " to disk"));
}

namespace {
unique_fd open_dir_here(int dirfd, const std::string& name) {
    open_how how{};
    how.flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
    how.resolve = RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS;
    for (int attempt = 0;; ++attempt) {
        unique_fd fd{static_cast<int>(::syscall(SYS_openat2, dirfd, name.c_str(), &how, sizeof how))};
        if (fd) return fd;
        if (errno == EXDEV) throw error{errc::io, cat("not removing ", quoted(name), ": something is mounted there")};
        if (errno == EACCES && attempt == 0 && ::fchmodat(dirfd, name.c_str(), 0700, AT_SYMLINK_NOFOLLOW) == 0) continue;
        if (errno == ENOENT || errno == ENOTDIR || errno == ELOOP) return {};
        throw_errno(cat("removing ", quoted(name)));
    }
}

/// Removes a non-directory or an empty directory; false when it is a directory that has content.
bool remove_one(int dirfd, const std::string& name) {
    for (int attempt = 0;; ++attempt) {
        if (::unlinkat(dirfd, name.c_str(), 0) == 0 || errno == ENOENT) return true;
        // ext4 and others say EISDIR, POSIX EPERM.
        if (errno == EISDIR || errno == EPERM) {
            if (::unlinkat(dirfd, name.c_str(), AT_REMOVEDIR) == 0 || errno == ENOENT) return true;
            if (errno == ENOTEMPTY || errno == EEXIST) return false;
        }
        if (errno == EACCES && attempt == 0 && ::fchmod(dirfd, 0700) == 0) continue;
        throw_errno(cat("removing ", quoted(name)));
    }
}

struct removal {
    unique_fd fd;
    std::string name;  ///< in the directory above
    std::vector<std::string> names;
    std::uint64_t inode = 0;
};
}  // namespace

bool remove_tree(int dirfd, std::string_view name) {
    const std::string start{name};
    if (!stat_at(dirfd, start)) return false;
    if (remove_one(dirfd, start)) return true;
    constexpr std::size_t max_open = 48;
    std::vector<removal> stack;
    const auto push = [&](int parent, const std::string& child) {
        removal r{open_dir_here(parent, child), child, {}, 0};
        if (!r.fd) return remove_one(parent, child), void();
        r.names = list_dir(r.fd.get());
        r.inode = stat_at(r.fd.get(), "")->inode;
        stack.push_back(std::move(r));
        if (stack.size() > max_open) stack[stack.size() - max_open].fd.reset();
    };
    push(dirfd, start);
    while (!stack.empty()) {
        removal& top = stack.back();
        if (!top.names.empty()) {
            const std::string child = std::move(top.names.back());
            top.names.pop_back();
            if (!remove_one(top.fd.get(), child)) push(top.fd.get(), child);
            continue;
        }
        removal done = std::move(top);
        stack.pop_back();
        if (!stack.empty() && !stack.back().fd) {
            unique_fd up{::openat(done.fd.get(), "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
            if (!up || stat_at(up.get(), "")->inode != stack.back().inode)
                throw error{errc::io, cat("the directory ", quoted(stack.back().name), " was moved while it was removed")};
            stack.back().fd = std::move(up);
        }
        const int parent = stack.empty() ? dirfd : stack.back().fd.get();
        if (!remove_one(parent, done.name)) throw error{errc::io, cat("somebody writes into ", quoted(done.name), " while it is removed")};
    }
    return true;
}

std::optional<file_lock> file_lock::try_acquire(int dirfd, std::string_view name, kind k) {
    unique_fd fd{::openat(dirfd, std::string(name).c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600)};
    if (!fd) throw_errno(cat("opening the lock file ", quoted(name)));
    while (::flock(fd.get(), (k == kind::shared ? LOCK_SH : LOCK_EX) | LOCK_NB) != 0) {
        if (errno == EWOULDBLOCK) return std::nullopt;
        if (errno != EINTR) throw_errno(cat("locking ", quoted(name)));
    }
    return file_lock{std::move(fd)};
}

file_lock file_lock::acquire(int dirfd, std::string_view name, kind k) {
    unique_fd fd{::openat(dirfd, std::string(name).c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600)};
    if (!fd) throw_errno(cat("opening the lock file ", quoted(name)));
    while (::flock(fd.get(), k == kind::shared ? LOCK_SH : LOCK_EX) != 0)
        if (errno != EINTR) throw_errno(cat("locking ", quoted(name)));
    return file_lock{std::move(fd)};
}

disk_usage disk_space(const std::string& path) {
    struct statvfs s;
    if (::statvfs(path.c_str(), &s) != 0) throw_errno(cat("asking for the free space of ", quoted(path)));
    const std::uint64_t unit = s.f_frsize;
    return {s.f_blocks * unit, s.f_bfree * unit, s.f_bavail * unit};
}

}  // namespace cobuild::fs

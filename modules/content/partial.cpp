module;
#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

module cobuild.content;

import cobuild.base;
import cobuild.state;
import :internal;

namespace cobuild::content {
namespace {

/// With its lock, if it can be had and the name still means this file: the last holder may have moved it to its place.
unique_fd try_lock(int folder, const std::string& name, int flags) {
    unique_fd file(::openat(folder, name.c_str(), flags | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0644));
    if (!file || ::flock(file.get(), LOCK_EX | LOCK_NB) != 0) return {};
    struct stat mine{}, named{};
    if (::fstat(file.get(), &mine) != 0 || ::fstatat(folder, name.c_str(), &named, AT_SYMLINK_NOFOLLOW) != 0) return {};
    return mine.st_ino == named.st_ino && S_ISREG(mine.st_mode) ? std::move(file) : unique_fd();
}

std::vector<std::string> names_in(int folder, const std::string& path) {
    std::vector<std::string> out;
    const int fd = ::openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR* stream = fd >= 0 ? ::fdopendir(fd) : nullptr;
    if (stream == nullptr) throw_errno(cat("cannot list ", path));
    const scope_exit close([&] { ::closedir(stream); });
    while (const auto* e = ::readdir(stream))
        if (e->d_name[0] != '.') out.emplace_back(e->d_name);
    return out;
}

}  // namespace

unique_fd store::impl::lock_partial(const digest& d) const { return try_lock(partials.get(), d.hex(), O_CREAT); }

collected store::impl::drop_partials() {
    collected out;
    for (const auto& name : names_in(partials.get(), path + "/partial")) {
        const auto file = try_lock(partials.get(), name, 0);
        struct stat st{};
        if (!file || ::fstat(file.get(), &st) != 0) continue;
        if (::unlinkat(partials.get(), name.c_str(), 0) != 0) {
            if (errno == ENOENT) continue;
            throw_errno(cat("cannot remove ", path, "/partial/", name));
        }
        ++out.blobs;
        out.bytes += static_cast<std::uint64_t>(st.st_blocks) * 512;
    }
    return out;
}

}  // namespace cobuild::content

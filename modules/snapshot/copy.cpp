module;
#include <dirent.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <linux/fs.h>

module cobuild.snapshot;

import cobuild.base;
import cobuild.state;
import :internal;

namespace cobuild::snapshot {
namespace {

constexpr std::string_view opaque = "trusted.overlay.opaque";

bool dots(const char* name) { return std::strcmp(name, ".") == 0 || std::strcmp(name, "..") == 0; }

DIR* open_stream(int dirfd, const char* name) {
    unique_fd fd(::openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW));
    DIR* out = fd ? ::fdopendir(fd.get()) : nullptr;
    if (out == nullptr) throw_errno(cat("cannot read the directory ", quoted(name), " of a layer"));
    (void)fd.release();
    return out;
}

bool ours(std::string_view name) { return name.starts_with("trusted.overlay.") || name.starts_with("user.overlay."); }

/// `list`, `get`, `set` are the calls for descriptors or for links.
template<class List, class Get, class Set>
void copy_xattrs(List list, Get get, Set set) {
    std::array<char, 4096> small{};
    std::vector<char> names(small.size()), value(1024);
    auto n = list(names.data(), names.size());
    if (n < 0 && errno == ERANGE) {
        names.resize(64 << 10);
        n = list(names.data(), names.size());
    }
    if (n < 0 && (errno == EOPNOTSUPP || errno == EPERM)) return;
    if (n < 0) throw_errno("cannot list extended attributes of a layer");
    for (const auto name : split(std::string_view(names.data(), static_cast<std::size_t>(n)), '\0')) {
        if (name.empty() || ours(name)) continue;
        const std::string key(name);
        auto size = get(key.c_str(), value.data(), value.size());
        if (size < 0 && errno == ERANGE) {
            value.resize(64 << 10);
            size = get(key.c_str(), value.data(), value.size());
        }
        if (size < 0 && errno == ENODATA) continue;
        if (size < 0 || (set(key.c_str(), value.data(), static_cast<std::size_t>(size)) != 0 && errno != EOPNOTSUPP))
            throw_errno(cat("cannot copy the extended attribute ", key, " of a layer"));
    }
}

/// Copies a layer's tree into a directory, level by level, without recursion.
class copier {
public:
    explicit copier(int to) : root_(to) {}
    ~copier() {
        for (auto& l : levels_) ::closedir(l.from);
    }
    void copy(int from) {
        levels_.push_back({open_stream(from, "."), unique_fd(::openat(root_, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)), ""});
        while (!levels_.empty()) {
            auto& l = levels_.back();
            const auto* e = ::readdir(l.from);
            if (e == nullptr) {
                copy_attributes(::dirfd(l.from), l.to.get());
                ::closedir(l.from);
                levels_.pop_back();
            } else if (!dots(e->d_name)) {
                entry(::dirfd(l.from), l.to.get(), e->d_name, l.path);
            }
        }
    }

private:
    struct level {
        DIR* from;
        unique_fd to;
        std::string path;
    };

    void entry(int from, int to, const std::string& name, const std::string& parent) {
        struct stat st{}, there{};
        if (::fstatat(from, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) throw_errno(cat("cannot look at ", quoted(name), " of a layer"));
        const bool exists = ::fstatat(to, name.c_str(), &there, AT_SYMLINK_NOFOLLOW) == 0;
        const bool directory = S_ISDIR(st.st_mode);
        const bool whiteout = S_ISCHR(st.st_mode) && st.st_rdev == 0;
        if (exists && (!directory || !S_ISDIR(there.st_mode) || opaque_at(from, name))) state::remove_tree(to, name);
        if (whiteout) return;
        const auto path = parent.empty() ? name : cat(parent, "/", name);
        if (directory) {
            if (::mkdirat(to, name.c_str(), 0700) != 0 && errno != EEXIST) throw_errno(cat("cannot copy the directory ", quoted(path)));
            unique_fd in(::openat(to, name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW));
            if (!in) throw_errno(cat("cannot copy the directory ", quoted(path)));
            levels_.push_back({open_stream(from, name.c_str()), std::move(in), path});
            return;
        }
        if (st.st_nlink > 1) {
            const auto [seen, first] = links_.emplace(st.st_ino, path);
            if (!first && ::linkat(root_, seen->second.c_str(), to, name.c_str(), 0) == 0) return;
        }
        if (S_ISREG(st.st_mode))
            file(from, to, name, path);
        else
            special(from, to, name, path, st);
    }

    static bool opaque_at(int from, const std::string& name) {
        const unique_fd dir(::openat(from, name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW));
        return dir && is_opaque(dir.get());
    }

    static void file(int from, int to, const std::string& name, const std::string& path) {
        const unique_fd in(::openat(from, name.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
        const unique_fd out(::openat(to, name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
        if (!in || !out) throw_errno(cat("cannot copy the file ", quoted(path)));
        if (::ioctl(out.get(), FICLONE, in.get()) != 0) {
            for (::ssize_t n = 1; n > 0;) {
                n = ::copy_file_range(in.get(), nullptr, out.get(), nullptr, std::size_t{1} << 30, 0);
                if (n < 0 && (errno == EXDEV || errno == EINVAL || errno == EOPNOTSUPP || errno == ENOSYS)) {
                    plain(in.get(), out.get(), path);
                    break;
                }
                if (n < 0) throw_errno(cat("cannot copy the file ", quoted(path)));
            }
        }
        copy_attributes(in.get(), out.get());
    }

    static void plain(int in, int out, const std::string& path) {
        std::vector<char> piece(256 << 10);
        for (::ssize_t n = 0; (n = ::read(in, piece.data(), piece.size())) != 0;) {
            if (n < 0 || ::write(out, piece.data(), static_cast<std::size_t>(n)) != n) throw_errno(cat("cannot copy the file ", quoted(path)));
        }
    }

    static void special(int from, int to, const std::string& name, const std::string& path, const struct stat& st) {
        int done = 0;
        if (S_ISLNK(st.st_mode)) {
            std::string target(static_cast<std::size_t>(st.st_size) + 1, '\0');
            const auto n = ::readlinkat(from, name.c_str(), target.data(), target.size());
            if (n < 0) throw_errno(cat("cannot copy the link ", quoted(path)));
            target.resize(static_cast<std::size_t>(n));
            done = ::symlinkat(target.c_str(), to, name.c_str());
        } else {
            done = ::mknodat(to, name.c_str(), st.st_mode, st.st_rdev);
        }
        if (done != 0 || ::fchownat(to, name.c_str(), st.st_uid, st.st_gid, AT_SYMLINK_NOFOLLOW) != 0) throw_errno(cat("cannot copy ", quoted(path)));
        if (!S_ISLNK(st.st_mode) && ::fchmodat(to, name.c_str(), st.st_mode & 07777, 0) != 0) throw_errno(cat("cannot copy ", quoted(path)));
        const auto source = cat("/proc/self/fd/", from, "/", name), target = cat("/proc/self/fd/", to, "/", name);
        copy_xattrs([&](char* data, std::size_t n) { return ::llistxattr(source.c_str(), data, n); },
                    [&](const char* key, void* data, std::size_t n) { return ::lgetxattr(source.c_str(), key, data, n); },
                    [&](const char* key, const void* data, std::size_t n) { return ::lsetxattr(target.c_str(), key, data, n, 0); });
        const std::array<::timespec, 2> times{st.st_atim, st.st_mtim};
        ::utimensat(to, name.c_str(), times.data(), AT_SYMLINK_NOFOLLOW);
    }

    int root_;
    std::vector<level> levels_;
    std::map<::ino_t, std::string> links_;
};

}  // namespace

void copy_attributes(int from, int to) {
    struct stat st{};
    if (::fstat(from, &st) != 0 || ::fchown(to, st.st_uid, st.st_gid) != 0 || ::fchmod(to, st.st_mode & 07777) != 0)
        throw_errno("cannot copy owner and mode in a layer");
    copy_xattrs([&](char* data, std::size_t n) { return ::flistxattr(from, data, n); },
                [&](const char* key, void* data, std::size_t n) { return ::fgetxattr(from, key, data, n); },
                [&](const char* key, const void* data, std::size_t n) { return ::fsetxattr(to, key, data, n, 0); });
    const std::array<::timespec, 2> times{st.st_atim, st.st_mtim};
    if (::futimens(to, times.data()) != 0) throw_errno("cannot copy times in a layer");
}

bool is_opaque(int dirfd) {
    char value = 0;
    return ::fgetxattr(dirfd, std::string(opaque).c_str(), &value, 1) == 1 && value == 'y';
}

void merge_layers(store::common& c, const chain& layers, int to) {
    for (const auto id : layers.layers) {
        const auto from = c.fs_of(id);
        copier(to).copy(from.get());
    }
}

std::uint64_t measure(int dirfd) {
    std::uint64_t out = 0;
    std::set<::ino_t> seen;
    std::vector<DIR*> levels{open_stream(dirfd, ".")};
    const scope_exit close([&] {
        for (auto* l : levels) ::closedir(l);
    });
    while (!levels.empty()) {
        DIR* top = levels.back();
        const auto* e = ::readdir(top);
        if (e == nullptr) {
            ::closedir(top);
            levels.pop_back();
            continue;
        }
        struct stat st{};
        if (std::strcmp(e->d_name, "..") == 0 || ::fstatat(::dirfd(top), e->d_name, &st, AT_SYMLINK_NOFOLLOW) != 0) continue;
        const bool here = std::strcmp(e->d_name, ".") == 0;
        if (S_ISDIR(st.st_mode) && !here) {
            levels.push_back(open_stream(::dirfd(top), e->d_name));  // counted there, as "."
        } else if (here || st.st_nlink < 2 || seen.insert(st.st_ino).second) {
            out += static_cast<std::uint64_t>(st.st_blocks) * 512;
        }
    }
    return out;
}

std::pair<chain, state::pin> flattened(const std::shared_ptr<store::common>& c, const chain& whole, std::size_t limit) {
    const auto size = whole.layers.size();
    if (size <= limit) return {whole, {}};
    // in steps, so that a chain which grows layer by layer meets the same copy again
    const auto step = std::max<std::size_t>(1, limit / 2);
    const auto count = std::min(size, (size - limit + 1 + step - 1) / step * step);
    const chain bottom{{whole.layers.begin(), whole.layers.begin() + static_cast<std::ptrdiff_t>(count)}};
    std::string key;
    for (const auto id : bottom.layers) key += cat(id.value, " ");
    key = digest::of(key).str();
    auto flat = c->find("flat_key", key);
    if (!flat) {
        unfinished work(c);
        merge_layers(*c, bottom, work.fs.get());
        flat = work.publish({.kind = "internal", .description = cat(count, " layers copied together"), .whiteouts = false, .flat_key = key}).first;
    }
    chain out{{flat->id}};
    out.layers.insert(out.layers.end(), whole.layers.begin() + static_cast<std::ptrdiff_t>(count), whole.layers.end());
    return {std::move(out), std::move(flat->keep)};
}

}  // namespace cobuild::snapshot

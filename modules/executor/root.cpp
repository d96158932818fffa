module;
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

module cobuild.executor;

#include "parts.hpp"

namespace cobuild::executor {

unique_fd open_inside(int root, const std::string& path, int flags) {
    const std::string inside = path.starts_with('/') ? path : cat('/', path);
    open_how how{};
    how.flags = static_cast<std::uint64_t>(flags | O_CLOEXEC);
    how.resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS;
    for (int attempt = 0;; ++attempt) {
        const auto fd = ::syscall(SYS_openat2, root, inside.c_str(), &how, sizeof how);
        if (fd >= 0) return unique_fd(static_cast<int>(fd));
        if (errno == ENOENT) return {};
        if (errno != EAGAIN || attempt == 100) throw_errno(cat("open ", quoted(inside), " in the step's root"));
    }
}

std::string clean_path(std::string_view path, std::string_view base) {
    std::vector<std::string_view> parts;
    const auto add = [&](std::string_view p) {
        for (const auto part : split(p, '/')) {
            if (part.empty() || part == ".") continue;
            if (part == "..") {
                if (!parts.empty()) parts.pop_back();
            } else {
                parts.push_back(part);
            }
        }
    };
    if (!path.starts_with('/')) add(base);
    add(path);
    std::string out;
    for (const auto part : parts) out += cat('/', part);
    return out.empty() ? "/" : out;
}

namespace {

/// Splits "/a/b/c" where only "/a" exists into a descriptor of "/a" and the names {"b", "c"}.
std::pair<unique_fd, std::vector<std::string>> longest_existing(int root, std::string_view path) {
    std::string at = clean_path(path);
    std::vector<std::string> missing;
    for (;;) {
        if (auto fd = open_inside(root, at, O_PATH)) return {std::move(fd), std::move(missing)};
        const auto slash = at.rfind('/');
        missing.insert(missing.begin(), at.substr(slash + 1));
        at = slash == 0 ? "/" : at.substr(0, slash);
    }
}

}  // namespace

void make_directories(int root, std::string_view path, unsigned uid, unsigned gid) {
    auto [at, missing] = longest_existing(root, path);
    struct stat info{};
    if (::fstat(at.get(), &info) < 0) throw_errno("fstat");
    if (!S_ISDIR(info.st_mode)) throw error{errc::invalid, cat("working directory ", quoted(path), " is not a directory")};
    for (const auto& name : missing) {
        if (::mkdirat(at.get(), name.c_str(), 0755) < 0) {
            if (errno == EEXIST)
                throw error{errc::invalid, cat("working directory ", quoted(path), ": ", quoted(name), " is a link that leads nowhere")};
            throw_errno(cat("create working directory ", quoted(path)));
        }
        unique_fd next(::openat(at.get(), name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
        if (!next) throw_errno(cat("open working directory ", quoted(path)));
        if (::fchown(next.get(), uid, gid) < 0 || ::fchmod(next.get(), 0755) < 0) throw_errno(cat("create working directory ", quoted(path)));
        at = std::move(next);
    }
}

mount_stubs::mount_stubs(int root) noexcept : root_(root) {}
mount_stubs::~mount_stubs() { remove(); }

void mount_stubs::make(const std::string& target, bool directory, bool recursive) {
    if (target == "/") return;
    auto [at, missing] = longest_existing(root_, target);
    for (std::size_t i = 0; i < missing.size(); ++i) {
        const bool last = i + 1 == missing.size();
        stub s{.name = missing[i], .removable = last || recursive};
        struct stat info{};
        if (::fstat(at.get(), &info) < 0 || !S_ISDIR(info.st_mode)) return;
        s.before[0] = info.st_atim;
        s.before[1] = info.st_mtim;
        // What fails here the runtime will fail at as well, and say why.
        if (!last || directory) {
            if (::mkdirat(at.get(), s.name.c_str(), 0755) < 0) return;
        } else {
            const unique_fd file(::openat(at.get(), s.name.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, 0644));
            if (!file) return;
        }
        if (::fstat(at.get(), &info) < 0) return;
        s.after = info.st_mtim;
        unique_fd next(::openat(at.get(), s.name.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
        s.parent = std::move(at);
        stubs_.push_back(std::move(s));
        at = std::move(next);
    }
}

namespace {

/// Removes an empty directory, or an empty file, below `parent`.
bool remove_if_empty(int parent, const std::string& name) {
    struct stat info{};
    if (::fstatat(parent, name.c_str(), &info, AT_SYMLINK_NOFOLLOW) < 0) return false;
    if (S_ISDIR(info.st_mode)) return ::unlinkat(parent, name.c_str(), AT_REMOVEDIR) == 0;
    return S_ISREG(info.st_mode) && info.st_size == 0 && ::unlinkat(parent, name.c_str(), 0) == 0;
}

bool same_time(const timespec& a, const timespec& b) { return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec; }

}  // namespace

void mount_stubs::remove() noexcept {
    // The last first: then each parent is found as it was when its stub was made.
    for (auto s = stubs_.rbegin(); s != stubs_.rend(); ++s) {
        struct stat now{};
        if (!s->removable || ::fstat(s->parent.get(), &now) < 0 || !remove_if_empty(s->parent.get(), s->name)) continue;
        const bool untouched = same_time(now.st_mtim, s->after);
        const timespec times[2]{s->before[0], untouched ? s->before[1] : now.st_mtim};
        if (const unique_fd dir{::openat(s->parent.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)}) ::futimens(dir.get(), times);
    }
    stubs_.clear();
}

}  // namespace cobuild::executor

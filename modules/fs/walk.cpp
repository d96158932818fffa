module;
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.fs;

import cobuild.base;

namespace cobuild::fs {

bool path_less(std::string_view a, std::string_view b) noexcept {
    const auto [x, y] = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
    if (y == b.end()) return false;
    if (x == a.end()) return true;
    const auto rank = [](char c) { return c == '/' ? -1 : static_cast<int>(static_cast<unsigned char>(c)); };
    return rank(*x) < rank(*y);
}

std::vector<std::string> list_dir(int dirfd) {
    // "." rather than a duplicate: a descriptor of its own position, and O_PATH descriptors can be listed too.
    const int fd = ::openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) throw_errno("opening a directory");
    struct close_dir {
        void operator()(DIR* d) const noexcept { ::closedir(d); }
    };
    const std::unique_ptr<DIR, close_dir> dir{::fdopendir(fd)};
    if (!dir) {
        unique_fd{fd}.reset();
        throw error{errc::io, "reading a directory: out of memory"};
    }
    std::vector<std::string> names;
    for (;;) {
        errno = 0;
        const dirent* e = ::readdir(dir.get());
        if (e == nullptr) break;
        const std::string_view name = e->d_name;
        if (name != "." && name != "..") names.emplace_back(name);
    }
    if (errno != 0) throw_errno("reading a directory");
    std::ranges::sort(names, [](const std::string& a, const std::string& b) { return a < b; });
    return names;
}

namespace {
// Open descriptors a walk keeps; a directory farther up is opened anew through "..", and must be the one it was.
constexpr std::size_t max_open = 48;

struct frame {
    unique_fd fd;
    std::vector<std::string> names;
    std::size_t next = 0;
    std::size_t path_size = 0;  ///< of this directory's own path
    std::uint64_t inode = 0;
    std::uint64_t device = 0;
};

frame open_frame(int parent, const std::string& name, std::size_t path_size) {
    frame f;
    f.fd = unique_fd{::openat(parent, name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)};
    if (!f.fd) return f;
    const auto info = stat_at(f.fd.get(), "");
    f.inode = info->inode;
    f.device = info->device;
    f.names = list_dir(f.fd.get());
    f.path_size = path_size;
    return f;
}

void reopen(frame& upper, int below, std::string_view path) {
    if (upper.fd) return;
    unique_fd fd{::openat(below, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
    const auto info = fd ? stat_at(fd.get(), "") : std::nullopt;
    if (!info || info->inode != upper.inode || info->device != upper.device)
        throw error{errc::io, cat("the directory ", quoted(path), " was moved while it was read")};
    upper.fd = std::move(fd);
}
}  // namespace

bool walk(int dirfd, const walk_hooks& hooks) {
    std::vector<frame> stack;
    std::string path;
    stack.push_back(open_frame(dirfd, ".", 0));
    if (!stack.back().fd) throw_errno("opening the directory to walk");
    while (!stack.empty()) {
        frame& top = stack.back();
        path.resize(top.path_size);
        if (top.next == top.names.size()) {
            if (hooks.leave) hooks.leave(path, top.fd.get());
            const frame done = std::move(top);
            stack.pop_back();
            if (!stack.empty()) reopen(stack.back(), done.fd.get(), path);
            continue;
        }
        const std::string name = std::move(top.names[top.next++]);
        if (!path.empty()) path += '/';
        path += name;
        const auto info = stat_at(top.fd.get(), name);
        if (!info) continue;
        const walk_step step = hooks.enter(walk_entry{path, std::string_view(path).substr(path.size() - name.size()), top.fd.get(), *info});
        if (step == walk_step::stop) return false;
        if (step == walk_step::skip_dir || !info->is_dir()) continue;
        frame below = open_frame(top.fd.get(), name, path.size());
        if (!below.fd) {
            if (errno == ENOENT || errno == ENOTDIR || errno == ELOOP) continue;
            throw_errno(cat("opening the directory ", quoted(path)));
        }
        stack.push_back(std::move(below));
        if (stack.size() > max_open) stack[stack.size() - max_open].fd.reset();
    }
    return true;
}

bool walk(int dirfd, const std::function<walk_step(const walk_entry&)>& visit) { return walk(dirfd, walk_hooks{visit, {}}); }

}  // namespace cobuild::fs

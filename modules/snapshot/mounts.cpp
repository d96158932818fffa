module;
#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <exception>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <linux/mount.h>

module cobuild.snapshot;

import cobuild.base;
import :internal;

namespace cobuild::snapshot {
namespace {

// By number: glibc 2.36 has these calls, older ones do not.
int sys_fsopen(const char* type) { return static_cast<int>(::syscall(SYS_fsopen, type, FSOPEN_CLOEXEC)); }
int sys_fsmount(int fs, unsigned attributes) { return static_cast<int>(::syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, attributes)); }
int sys_fsconfig(int fs, unsigned command, const char* key, const void* value, int aux) {
    return static_cast<int>(::syscall(SYS_fsconfig, fs, command, key, value, aux));
}
int sys_open_tree(int dirfd, const char* path, unsigned flags) { return static_cast<int>(::syscall(SYS_open_tree, dirfd, path, flags)); }

/// What the kernel wrote about a refused configuration ("e overlay: ..."), for the message.
std::string complaint(int fs) {
    std::array<char, 512> text{};
    const auto n = ::read(fs, text.data(), text.size());
    return n > 2 ? cat(" (", trim(std::string_view(text.data() + 2, static_cast<std::size_t>(n) - 2)), ")") : std::string();
}

class configuration {
public:
    configuration() : fs_(sys_fsopen("overlay")) {
        if (!fs_) throw_errno("the kernel does not offer overlayfs");
    }
    void text(const char* key, const std::string& value) { check(sys_fsconfig(fs_.get(), FSCONFIG_SET_STRING, key, value.c_str(), 0), key); }
    void flag(const char* key) { check(sys_fsconfig(fs_.get(), FSCONFIG_SET_FLAG, key, nullptr, 0), key); }
    void directory(const char* key, int fd, bool by_descriptor) {
        if (by_descriptor)
            check(sys_fsconfig(fs_.get(), FSCONFIG_SET_FD, key, nullptr, fd), key);
        else
            text(key, cat("/proc/self/fd/", fd));
    }
    unique_fd mount(bool read_only) {
        check(sys_fsconfig(fs_.get(), FSCONFIG_CMD_CREATE, nullptr, nullptr, 0), "create");
        unique_fd out(sys_fsmount(fs_.get(), read_only ? MOUNT_ATTR_RDONLY : 0));
        check(out ? 0 : -1, "mount");
        return out;
    }

private:
    void check(int result, const char* key) {
        if (result == 0) return;
        const int reason = errno;
        throw os_error(reason, cat("cannot mount an overlay, at ", key, complaint(fs_.get())));
    }
    unique_fd fs_;
};

constexpr std::array<const char*, 4> switched_off{"redirect_dir", "metacopy", "index", "xino"};

unique_fd must_open(int dirfd, const std::string& name) {
    unique_fd out(::openat(dirfd, name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!out) throw_errno(cat("cannot open ", name, " of an overlay"));
    return out;
}

unique_fd by_configuration(const overlay_parts& p, bool by_descriptor) {
    configuration c;
    c.text("source", "cobuild");
    for (const auto* name : switched_off) c.text(name, "off");
    std::vector<unique_fd> open;  // names in /proc must stay valid until the mount is made
    const auto lower = [&](unique_fd fd) {
        c.directory("lowerdir+", fd.get(), by_descriptor);
        if (!by_descriptor) open.push_back(std::move(fd));
    };
    for (const auto& name : p.lower) lower(must_open(p.layers, name));
    if (p.empty >= 0) lower(must_open(p.empty, "."));
    if (p.work.empty()) return c.mount(true);
    if (p.volatile_upper) c.flag("volatile");
    const auto upper = must_open(p.active, p.active_name + "/fs"), work = must_open(p.active, cat(p.active_name, "/", p.work));
    c.directory("upperdir", upper.get(), by_descriptor);
    c.directory("workdir", work.get(), by_descriptor);
    return c.mount(false);
}

/// Names relative to the layers' directory, in one page: the only way before Linux 6.7. Needs a thread with a working
/// directory and a mount namespace of its own; the mount leaves it as a detached clone.
constexpr std::size_t page = 4000;

std::string names_of(const overlay_parts& p) {
    std::string out = "lowerdir=";
    for (std::size_t i = 0; i < p.lower.size(); ++i) out += cat(i != 0 ? ":" : "", p.lower[i]);
    if (p.empty >= 0) out += ":../empty";
    if (!p.work.empty()) out += cat(",upperdir=../active/", p.active_name, "/fs,workdir=../active/", p.active_name, "/", p.work);
    for (const auto* name : switched_off) out += cat(",", name, "=off");
    if (!p.work.empty() && p.volatile_upper) out += ",volatile";
    return out;
}

unique_fd by_names(const overlay_parts& p) {
    const auto options = names_of(p);
    unique_fd out;
    int reason = 0;
    std::thread([&] {
        constexpr const char* target = "../empty";
        // the working directory first: the new namespace then has it on its own copy of the mount
        const bool made = ::unshare(CLONE_FS) == 0 && ::fchdir(p.layers) == 0 && ::unshare(CLONE_NEWNS) == 0 &&
                          ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
                          ::mount("cobuild", target, "overlay", p.work.empty() ? MS_RDONLY : 0, options.c_str()) == 0;
        if (made) out.reset(sys_open_tree(AT_FDCWD, target, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC));
        if (!out) reason = errno;
        if (made) ::umount2(target, MNT_DETACH);
    }).join();
    if (!out) throw os_error(reason, "cannot mount an overlay by names");
    return out;
}

}  // namespace

unique_fd bind_mount(int dirfd, bool read_only) {
    unique_fd out(sys_open_tree(dirfd, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH));
    if (!out) throw_errno("cannot make a mount of a layer");
    // what the state directory's own mount forbids (nodev, nosuid, noexec) is no matter of an image's
    ::mount_attr a{};
    a.attr_set = read_only ? MOUNT_ATTR_RDONLY : 0;
    a.attr_clr = MOUNT_ATTR_NODEV | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC | (read_only ? 0 : MOUNT_ATTR_RDONLY);
    if (::syscall(SYS_mount_setattr, out.get(), "", AT_EMPTY_PATH, &a, sizeof a) != 0) throw_errno("cannot make a mount of a layer");
    return out;
}

unique_fd overlay_mount(const overlay_parts& p, mount_method method) {
    switch (method) {
        case mount_method::by_proc_name: return by_configuration(p, false);
        case mount_method::by_short_name: return by_names(p);
        default: return by_configuration(p, true);
    }
}

std::size_t most_lowers(mount_method method, const overlay_parts& p) {
    if (method != mount_method::by_short_name) return SIZE_MAX;
    const auto room = names_of(p).size();
    std::size_t longest = 1;
    for (const auto& name : p.lower) longest = std::max(longest, name.size() + 1);
    return room <= page ? SIZE_MAX : std::max<std::size_t>(2, (page - 300) / longest);
}

}  // namespace cobuild::snapshot

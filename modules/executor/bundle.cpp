module;
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

module cobuild.executor;

#include "parts.hpp"

namespace cobuild::executor {

namespace {

void write_all_of(int fd, std::string_view text) {
    while (!text.empty()) {
        const auto n = ::write(fd, text.data(), text.size());
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw_errno("write the step's bundle");
        text.remove_prefix(static_cast<std::size_t>(n));
    }
}

void make_dir(int dir, const std::string& name) {
    if (::mkdirat(dir, name.c_str(), 0755) < 0) throw_errno(cat("create ", name, " in the step's bundle"));
}

/// A tmpfs of its own for one step: secrets must not be swapped out, where the kernel can promise that.
unique_fd make_memory_fs() {
    const auto attempt = [](bool noswap) -> unique_fd {
        const unique_fd context(::fsopen("tmpfs", FSOPEN_CLOEXEC));
        if (!context) throw_errno("fsopen tmpfs");
        if (::fsconfig(context.get(), FSCONFIG_SET_STRING, "mode", "0700", 0) < 0) throw_errno("fsconfig tmpfs");
        if (noswap && ::fsconfig(context.get(), FSCONFIG_SET_FLAG, "noswap", nullptr, 0) < 0) return {};
        if (::fsconfig(context.get(), FSCONFIG_CMD_CREATE, nullptr, nullptr, 0) < 0) {
            if (noswap) return {};
            throw_errno("create a tmpfs");
        }
        unique_fd tree(::fsmount(context.get(), FSMOUNT_CLOEXEC, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV));
        if (!tree) throw_errno("fsmount tmpfs");
        return tree;
    };
    if (auto tree = attempt(true)) return tree;
    return attempt(false);
}

/// A detached copy, or empty where the kernel cannot copy what is detached itself (before Linux 6.15).
unique_fd try_clone(int fd) {
    unique_fd copy(::open_tree(fd, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | AT_RECURSIVE));
    if (!copy && errno != EINVAL) throw_errno("open_tree");
    return copy;
}

bool below(std::string_view path, std::string_view dir) {
    return dir == "/" || (path.starts_with(dir) && path.size() > dir.size() && path[dir.size()] == '/');
}

/// By target, the last of two equal ones; outer ones before inner ones.
std::map<std::string, const mount*> sorted_mounts(const step& s) {
    std::map<std::string, const mount*> out;
    for (const auto& m : s.mounts) {
        if (m.target.empty() || m.target.find('\0') != std::string::npos) throw error{errc::invalid, "a mount of the step has no target"};
        out[clean_path(m.target, s.cwd)] = &m;
    }
    if (out.contains("/")) throw error{errc::invalid, "a mount of the step has the target \"/\""};
    return out;
}

class builder {
public:
    builder(const step& s, std::string dir) : step_(s), dir_(std::move(dir)) {}

    bundle build(const std::string& cgroup) {
        const auto user = find_user(step_.root, step_.user);
        out_.cgroup = cgroup;
        out_.tree = make_memory_fs();
        tree_ = out_.tree.get();
        for (const auto* name : {"rootfs", "m", "t", "state"}) make_dir(tree_, name);
        out_.mounts.push_back(process::attach_mount{tree_, dir_});
        attach(step_.root, cat(dir_, "/rootfs"));
        out_.stubs.emplace(step_.root);

        const auto mounts = sorted_mounts(step_);
        make_cwd(mounts, user);
        for (const auto* standard : {"/proc", "/dev", "/sys"}) stub(standard, true, mounts, true);
        add_text("/etc/resolv.conf", "resolv.conf", step_.resolv_conf, mounts);
        add_text("/etc/hosts", "hosts", step_.hosts ? *step_.hosts : hosts_text(step_.hostname, step_.extra_hosts), mounts);
        for (const auto& [target, m] : mounts) add(target, *m, mounts);
        make_file(tree_, "config.json", oci_config({.step = step_, .user = user, .cgroup = cgroup, .mounts = std::move(oci_)}), 0600);
        return std::move(out_);
    }

private:
    using targets = std::map<std::string, const mount*>;

    void attach(int source, std::string where) {
        auto copy = try_clone(source);
        out_.mounts.push_back(process::attach_mount{copy ? copy.get() : source, std::move(where)});
        if (copy) out_.held.push_back(std::move(copy));
    }

    void make_cwd(const targets& mounts, const identity& user) {
        const auto cwd = clean_path(step_.cwd);
        for (const auto& [target, m] : mounts)
            if (cwd == target || below(cwd, target)) return;  // not in the root itself
        make_directories(step_.root, cwd, user.uid, user.gid);
    }

    /// Makes the mount point, unless another mount covers the place.
    void stub(const std::string& target, bool directory, const targets& mounts, bool recursive) {
        for (const auto& [other, m] : mounts)
            if (below(target, other)) return;
        for (const auto* standard : {"/proc", "/dev", "/sys"})
            if (below(target, standard)) return;
        out_.stubs->make(target, directory, recursive);
    }

    void add_text(const std::string& target, const std::string& name, const std::optional<std::string>& text, const targets& mounts) {
        if (!text || mounts.contains(target)) return;
        make_file(tree_, name, *text, 0644);
        stub(target, false, mounts, true);
        oci_.push_back({target, "bind", cat(dir_, '/', name), {"bind", "ro", "nosuid", "noexec", "nodev"}});
    }

    void add(const std::string& target, const mount& m, const targets& mounts) {
        switch (m.what) {
            case mount::kind::tmpfs: {
                std::vector<std::string> options{"nosuid"};
                if (m.size != 0) options.push_back(cat("size=", m.size));
                if (m.readonly) options.emplace_back("ro");
                stub(target, true, mounts, step_.remove_stubs_recursively);
                oci_.push_back({target, "tmpfs", "tmpfs", std::move(options)});
                return;
            }
            case mount::kind::secret: return add_secret(target, m, mounts);
            case mount::kind::ssh:
            case mount::kind::bind: return add_bind(target, m, mounts);
        }
    }

    void add_secret(const std::string& target, const mount& m, const targets& mounts) {
        const auto name = next_name();
        const auto file = make_file(tree_, name, m.data, 0600);
        if (::fchown(file.get(), m.uid, m.gid) < 0) throw_errno("fchown a secret");
        if (::fchmod(file.get(), m.mode & 07777U) < 0) throw_errno("fchmod a secret");
        std::vector<std::string> options{"bind", "ro", "nosuid", "nodev"};
        if ((m.mode & 0111U) == 0) options.emplace_back("noexec");
        stub(target, false, mounts, step_.remove_stubs_recursively);
        oci_.push_back({target, "bind", cat(dir_, '/', name), std::move(options)});
    }

    void add_bind(const std::string& target, const mount& m, const targets& mounts) {
        unique_fd inside;
        if (m.selector.empty()) {
            inside = unique_fd(::fcntl(m.source, F_DUPFD_CLOEXEC, 3));
            if (!inside) throw_errno(cat("the source of the mount at ", quoted(target)));
        } else {
            inside = open_inside(m.source, m.selector, O_PATH);
            if (!inside) throw error{errc::not_found, cat("mount at ", quoted(target), ": there is no ", quoted(m.selector), " in its source")};
        }
        struct stat info{};
        if (::fstat(inside.get(), &info) < 0) throw_errno("fstat");
        const bool directory = S_ISDIR(info.st_mode);
        const auto name = next_name();
        const auto where = cat(dir_, '/', name);
        if (directory)
            make_dir(tree_, name);
        else
            make_file(tree_, name, {}, 0600);
        if (auto copy = try_clone(inside.get())) {
            out_.mounts.push_back(process::attach_mount{copy.get(), where});
            out_.held.push_back(std::move(copy));
        } else {
            out_.mounts.push_back(process::bind_mount{attached_whole(m.source), m.selector, where});
        }
        std::vector<std::string> options{"rbind", "rprivate"};
        if (m.readonly) options.emplace_back("ro");
        stub(target, directory, mounts, step_.remove_stubs_recursively);
        oci_.push_back({target, "bind", where, std::move(options)});
    }

    /// Where a detached mount that cannot be copied is attached as a whole; several mounts may show parts of it.
    std::string attached_whole(int source) {
        if (const auto known = whole_.find(source); known != whole_.end()) return known->second;
        const auto name = cat("t/", whole_.size());
        make_dir(tree_, name);
        auto where = cat(dir_, '/', name);
        out_.mounts.push_back(process::attach_mount{source, where});
        return whole_[source] = where;
    }

    std::string next_name() { return cat("m/", count_++); }

    const step& step_;
    std::string dir_;
    bundle out_;
    int tree_ = -1;
    unsigned count_ = 0;
    std::map<int, std::string> whole_;
    std::vector<oci_mount> oci_;
};

}  // namespace

unique_fd make_file(int dir, const std::string& name, std::string_view text, unsigned mode) {
    unique_fd fd(::openat(dir, name.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600));
    if (!fd) throw_errno(cat("create ", name, " in the step's bundle"));
    write_all_of(fd.get(), text);
    if (::fchmod(fd.get(), mode) < 0) throw_errno("fchmod");
    return fd;
}

std::string read_file(int dir, const char* name) {
    const unique_fd fd(::openat(dir, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
    std::string out;
    std::array<char, 4096> piece{};
    while (fd && out.size() < (std::size_t{1} << 20)) {
        const auto n = ::read(fd.get(), piece.data(), piece.size());
        if (n <= 0) break;
        out.append(piece.data(), static_cast<std::size_t>(n));
    }
    return out;
}

std::string bundle::read(const char* name) const { return read_file(tree.get(), name); }

bundle make_bundle(const step& s, const std::string& dir, const std::string& cgroup) { return builder(s, dir).build(cgroup); }

}  // namespace cobuild::executor

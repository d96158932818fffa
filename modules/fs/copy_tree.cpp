module;
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.fs;

import cobuild.base;

namespace cobuild::fs {

namespace {
using xattr_list = std::vector<std::pair<std::string, std::string>>;

bool default_xattr(std::string_view key) {
    return !key.starts_with("trusted.overlay.") && !key.starts_with("user.overlay.") && key != "security.selinux";
}

bool same_state(const file_info& a, const file_info& b) { return a.size == b.size && a.mtime == b.mtime && a.ctime == b.ctime && a.inode == b.inode; }

/// One directory on the way from the start to where the walk is; made at the target when something in it is taken.
struct level {
    std::string path;
    std::string name;  ///< at the target
    file_info info;    ///< of the source
    xattr_list xattrs;
    unique_fd target;  ///< once made
    copy_verdict how = copy_verdict::take;
    bool kept = false;  ///< existed and keeps what it has
    unique_fd source;   ///< kept open until made, for its attributes
};

class copier {
public:
    copier(int to, std::string_view to_name, const copy_options& options) : to_(to), to_name_(to_name), o_(options) {}

    void run(int from, std::string_view name) {
        const auto info = stat_at(from, name);
        if (!info) throw error{errc::not_found, cat("there is no ", quoted(name))};
        if (!info->is_dir()) {
            if (verdict("", *info) == copy_verdict::take) copy_one(from, std::string(name), "", *info);
            return;
        }
        unique_fd dir{::openat(from, std::string(name).c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)};
        if (!dir) throw_errno(cat("opening ", quoted(name)));
        const copy_verdict v = verdict("", *info);
        if (v == copy_verdict::skip) return;
        enter_dir("", to_name_, *info, dir.duplicate(), v);
        walk(dir.get(), walk_hooks{[&](const walk_entry& e) { return visit(e); }, [&](std::string_view, int) { leave_dir(); }});
    }

private:
    copy_verdict verdict(std::string_view path, const file_info& info) { return o_.filter ? o_.filter(path, info) : copy_verdict::take; }

    walk_step visit(const walk_entry& e) {
        if (e.info.is_socket()) return walk_step::go_on;
        const copy_verdict v = verdict(e.path, e.info);
        if (v == copy_verdict::skip) return walk_step::skip_dir;
        const std::string name{e.name};
        if (e.info.is_dir()) {
            unique_fd dir{::openat(e.dir_fd, name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)};
            if (!dir) throw_errno(cat("opening ", quoted(e.path)));
            enter_dir(e.path, name, e.info, std::move(dir), v);
        } else if (v == copy_verdict::take) {
            copy_one(e.dir_fd, name, e.path, e.info);
        }
        return walk_step::go_on;
    }

    void enter_dir(std::string_view path, const std::string& name, const file_info& info, unique_fd source, copy_verdict how) {
        levels_.push_back(level{.path = std::string(path), .name = name, .info = info, .how = how, .source = std::move(source)});
        if (how == copy_verdict::take) make_levels();
    }

    /// The directory that the current entry goes into.
    int make_levels() {
        int parent = to_;
        for (level& l : levels_) {
            if (!l.target) make_dir(parent, l);
            parent = l.target.get();
        }
        return parent;
    }

    void make_dir(int parent, level& l) {
        auto there = stat_at(parent, l.name);
        if (there && !there->is_dir() && o_.replace && l.how == copy_verdict::take) {
            remove_tree(parent, l.name);
            there.reset();
        }
        if (there && !there->is_dir())
            throw error{errc::invalid, cat("cannot copy the directory ", quoted(l.path.empty() ? l.name : l.path), " onto ", quoted(l.name),
                                           there->is_link() ? ", which is a symbolic link" : ", which is not a directory")};
        if (!there && ::mkdirat(parent, l.name.c_str(), 0700) != 0) throw_errno(cat("making the directory ", quoted(l.name)));
        const bool on_the_way = there && l.how == copy_verdict::way;
        l.kept = on_the_way || (there && l.path.empty() && o_.keep_existing_root);
        l.target = unique_fd{::openat(parent, l.name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)};
        if (!l.target) throw_errno(cat("opening ", quoted(l.name)));
        if (on_the_way && ::fchmod(l.target.get(), l.info.permissions()) != 0) throw_errno(cat("setting the mode of ", quoted(l.name)));
        l.xattrs = read_xattrs(l.source.get(), "");
        if (!l.kept) finish(l.target.get(), "", l.info, l.xattrs);
        l.source.reset();
        if (o_.done) report(l.path, on_the_way ? as_new(l.info) : *stat_at(l.target.get(), ""), {}, {}, nullptr, l.xattrs);
    }

    file_info as_new(file_info info) const {
        const std::uint32_t mode = o_.mode ? o_.mode(info) : info.permissions();
        info.mode = (info.mode & S_IFMT) | mode;
        if (o_.who) info.uid = o_.who->uid, info.gid = o_.who->gid;
        return info;
    }

    void leave_dir() {
        const level l = std::move(levels_.back());
        levels_.pop_back();
        if (l.target && (!l.kept || l.path.empty())) set_time(l.target.get(), "", o_.mtime.value_or(l.info.mtime));
    }

    xattr_list read_xattrs(int dirfd, std::string_view name) {
        xattr_list out;
        for (auto& key : list_xattrs(dirfd, name)) {
            if (o_.xattr ? !o_.xattr(key) : !default_xattr(key)) continue;
            if (auto value = get_xattr(dirfd, name, key)) out.emplace_back(std::move(key), std::move(*value));
        }
        return out;
    }

    void copy_one(int from, const std::string& name, std::string_view path, const file_info& info) {
        const std::string to_name = levels_.empty() ? to_name_ : name;
        const int to = levels_.empty() ? to_ : make_levels();
        const auto there = stat_at(to, to_name);
        if (there && there->is_dir() && !o_.replace)
            throw error{errc::invalid, cat("cannot replace the directory ", quoted(to_name), " by something that is not one")};
        if (there && there->is_dir()) remove_tree(to, to_name);
        if (there && !there->is_dir() && ::unlinkat(to, to_name.c_str(), 0) != 0) throw_errno(cat("replacing ", quoted(to_name)));
        const bool linked = o_.keep_hard_links && info.nlink > 1 && !path.empty();
        if (linked && link_to_first(to, to_name, path, info)) return;
        const xattr_list xattrs = read_xattrs(from, name);
        std::optional<digest> content;
        std::string link;
        if (info.is_file()) {
            content = copy_content(from, name, to, to_name, path, info);
        } else if (info.is_link()) {
            link = read_link_at(from, name);
            if (::symlinkat(link.c_str(), to, to_name.c_str()) != 0) throw_errno(cat("making the link ", quoted(to_name)));
        } else if (::mknodat(to, to_name.c_str(), (info.mode & S_IFMT) | 0600U, makedev(info.rdev_major, info.rdev_minor)) != 0) {
            throw_errno(cat("making the node ", quoted(to_name)));
        }
        finish(to, to_name, info, xattrs);
        set_time(to, to_name, o_.mtime.value_or(info.mtime));
        if (linked) first_.try_emplace({info.device, info.inode}, first{std::string(path), content});
        if (o_.done) report(path, *stat_at(to, to_name), link, {}, content ? &*content : nullptr, xattrs);
    }

    /// True when the file is a further name of one copied before.
    bool link_to_first(int to, const std::string& to_name, std::string_view path, const file_info& info) {
        const auto found = first_.find({info.device, info.inode});
        if (found == first_.end()) return false;
        const first& f = found->second;
        // All directories on this path were made or checked by us.
        const std::string existing = cat(to_name_, "/", f.path);
        if (::linkat(to_, existing.c_str(), to, to_name.c_str(), 0) != 0) {
            if (errno == EMLINK || errno == ENOENT || errno == ENAMETOOLONG) return false;
            throw_errno(cat("making the hard link ", quoted(to_name)));
        }
        if (o_.done)
            report(path, *stat_at(to, to_name), info.is_link() ? read_link_at(to, to_name) : "", f.path, f.content ? &*f.content : nullptr,
                   read_xattrs(to, to_name));
        return true;
    }

    std::optional<digest> copy_content(int from, const std::string& name, int to, const std::string& to_name, std::string_view path,
                                       const file_info& info) {
        file_info before = info;
        for (int attempt = 0;; ++attempt) {
            const unique_fd in{::openat(from, name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)};
            if (!in) throw_errno(cat("reading ", quoted(path.empty() ? name : path)));
            const unique_fd out{::openat(to, to_name.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, 0600)};
            if (!out) throw_errno(cat("creating ", quoted(to_name)));
            hasher hash;
            bool shrunk = false;
            try {
                copy_file(in.get(), out.get(), o_.hash ? &hash : nullptr);
            } catch (const error& e) {
                const auto now = stat_at(in.get(), "");
                shrunk = now && !same_state(*now, before);
                if (!shrunk || attempt > 0) throw error{e}.with(path.empty() ? name : path);
            }
            const auto after = stat_at(in.get(), "");
            if (!shrunk && same_state(before, *after)) return o_.hash ? std::optional(hash.finish()) : std::nullopt;
            if (attempt > 0) throw error{errc::io, cat(quoted(path.empty() ? name : path), " changes while it is copied")};
            before = *after;
            if (::unlinkat(to, to_name.c_str(), 0) != 0) throw_errno(cat("replacing ", quoted(to_name)));
        }
    }

    /// Owner, then mode and attributes: a change of owner clears set-id bits and capabilities.
    void finish(int dirfd, const std::string& name, const file_info& info, const xattr_list& xattrs) {
        const owner who = o_.who.value_or(owner{info.uid, info.gid});
        const int flags = AT_SYMLINK_NOFOLLOW | (name.empty() ? AT_EMPTY_PATH : 0);
        if (::fchownat(dirfd, name.c_str(), who.uid, who.gid, flags) != 0) throw_errno(cat("setting the owner of ", quoted(name)));
        if (!info.is_link()) {
            const std::uint32_t mode = o_.mode ? o_.mode(info) : info.permissions();
            const int failed = name.empty() ? ::fchmod(dirfd, mode) : ::fchmodat(dirfd, name.c_str(), mode, 0);
            if (failed != 0) throw_errno(cat("setting the mode of ", quoted(name)));
        }
        for (const auto& [key, value] : xattrs) set_xattr(dirfd, name, key, value);
    }

    static void set_time(int dirfd, const std::string& name, file_time t) {
        const timespec when{t.seconds, static_cast<long>(t.nanoseconds)};
        const std::array<timespec, 2> times{when, when};
        const int failed = name.empty() ? ::futimens(dirfd, times.data()) : ::utimensat(dirfd, name.c_str(), times.data(), AT_SYMLINK_NOFOLLOW);
        if (failed != 0) throw_errno(cat("setting the time of ", quoted(name)));
    }

    void report(std::string_view path, const file_info& info, std::string_view link, std::string_view hard_link, const digest* content,
                const xattr_list& xattrs) {
        o_.done(copied_entry{path, info, link, hard_link, content, xattrs});
    }

    struct first {
        std::string path;
        std::optional<digest> content;
    };
    int to_;
    std::string to_name_;
    const copy_options& o_;
    std::vector<level> levels_;
    std::map<std::pair<std::uint64_t, std::uint64_t>, first> first_;
};
}  // namespace

void copy_tree(int from, std::string_view name, int to, std::string_view to_name, const copy_options& options) {
    copier{to, to_name, options}.run(from, name);
}

}  // namespace cobuild::fs

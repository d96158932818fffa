module;
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

module cobuild.filesync;

import cobuild.base;
import cobuild.fs;
import :parts;

namespace cobuild::filesync {

namespace {
std::array<timespec, 2> times_of(const file_stat& s) {
    const auto t = to_time(s.mtime);
    const timespec when{t.seconds, static_cast<long>(t.nanoseconds)};
    return {when, when};
}
std::string last_of(std::string_view path) { return std::string(path.substr(path.rfind('/') + 1)); }
}  // namespace

void disk::set_xattrs(int dir, const std::string& name, const file_stat& s) const {
    for (const auto& [key, value] : s.xattrs) {
        try {
            fs::set_xattr(dir, name, key, value);
        } catch (const error&) {
            // Passed over: a user without rights gets the file all the same.
        }
    }
}

void disk::make_directory(file_stat s, const std::optional<fs::file_info>& old, int dir, const std::string& name) {
    const bool stays = old && old->is_dir();
    if (!stays) {
        if (old) fs::remove_tree(dir, name);
        if (::mkdirat(dir, name.c_str(), 0700) != 0) throw_errno(cat("making the directory ", quoted(s.path)));
        note(old ? change_kind::modified : change_kind::added, s.path);
    } else if (old->mode != from_go_mode(s.mode) || old->uid != s.uid || old->gid != s.gid) {
        note(change_kind::modified, s.path);
    } else {
        ++result_.unchanged;
    }
    // Without these one who is not root could not fill it; the mode that was sent is set in the end.
    if (stays && (old->mode & 0700) != 0700) static_cast<void>(::fchmodat(dir, name.c_str(), (old->mode & 07777) | 0700, 0));
    open_.push_back({.path = s.path, .fresh = !stays});
    directories_.push_back({std::move(s)});
}

void disk::finish_directory(const file_stat& s) {
    const auto fd = to_->open(s.path, O_RDONLY | O_DIRECTORY, fs::links::refuse);
    const auto fail_unless = [&](int result, std::string_view what) {
        if (result != 0) throw_errno(cat(what, " ", quoted(s.path)));
    };
    fail_unless(::fchown(fd.get(), s.uid, s.gid), "setting the owner of");
    fail_unless(::fchmod(fd.get(), from_go_mode(s.mode) & 07777), "setting the mode of");
    set_xattrs(fd.get(), "", s);
    fail_unless(::futimens(fd.get(), times_of(s).data()), "setting the time of");
}

void disk::make_special(const file_stat& s, const std::optional<fs::file_info>& old, int dir, const std::string& name) {
    const std::string temporary = temporary_name();
    const auto fail_unless = [&](int result, std::string_view what) {
        if (result != 0) throw_errno(cat(what, " ", quoted(s.path)));
    };
    const std::uint32_t mode = from_go_mode(s.mode);
    if (s.is_symlink())
        fail_unless(::symlinkat(s.link.c_str(), dir, temporary.c_str()), "making the link");
    else
        fail_unless(::mknodat(dir, temporary.c_str(), mode, makedev(static_cast<unsigned>(s.dev_major), static_cast<unsigned>(s.dev_minor))),
                    "making the device or pipe");
    scope_exit remove([&]() noexcept { ::unlinkat(dir, temporary.c_str(), 0); });
    fail_unless(::fchownat(dir, temporary.c_str(), s.uid, s.gid, AT_SYMLINK_NOFOLLOW), "setting the owner of");
    if (!s.is_symlink()) fail_unless(::fchmodat(dir, temporary.c_str(), mode & 07777, 0), "setting the mode of");
    set_xattrs(dir, temporary, s);
    fail_unless(::utimensat(dir, temporary.c_str(), times_of(s).data(), AT_SYMLINK_NOFOLLOW), "setting the time of");
    put(dir, temporary, name, s.path);
    remove.dismiss();
    note(old ? change_kind::modified : change_kind::added, s.path);
}

void disk::make_hard_link(const link& l) {
    if (left_out_.contains(l.target)) throw error{errc::invalid, cat(quoted(l.path), " is a hard link to ", quoted(l.target), ", which is left out")};
    unique_fd target_dir = to_->open(l.target.substr(0, l.target.find_last_of('/') == std::string::npos ? 0 : l.target.find_last_of('/')),
                                     O_PATH | O_DIRECTORY, fs::links::refuse);
    const std::string target = last_of(l.target);
    const auto from = fs::stat_at(target_dir.get(), target);
    if (!from || !from->is_file())
        throw error{errc::io, cat("linking ", quoted(l.path), ": ", quoted(l.target), " is not the file any more that was received")};
    const int dir = dir_of(l.path);
    const std::string name = last_of(l.path);
    const auto old = fs::stat_at(dir, name);
    // Renaming a file onto itself would do nothing and leave the other name.
    if (old && old->device == from->device && old->inode == from->inode) {
        ++result_.unchanged;
        return;
    }
    const std::string temporary = temporary_name();
    if (::linkat(target_dir.get(), target.c_str(), dir, temporary.c_str(), 0) != 0) throw_errno(cat("linking ", quoted(l.path)));
    scope_exit remove([&]() noexcept { ::unlinkat(dir, temporary.c_str(), 0); });
    put(dir, temporary, name, l.path);
    remove.dismiss();
    note(old ? change_kind::modified : change_kind::added, l.path);
}

}  // namespace cobuild::filesync

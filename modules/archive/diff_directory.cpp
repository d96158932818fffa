module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.archive;

import cobuild.base;
import cobuild.fs;
import :changes;

namespace cobuild::archive {

namespace {

std::string_view last_of(std::string_view path) { return path.substr(path.rfind('/') + 1); }

/// Looks whether a layer tells of nothing but changes.
class looker final : changes {
public:
    looker(int upper, lower_chain& lower) : changes(upper, lower, form::layer) {}
    bool look() {
        run();
        return clean_;
    }

private:
    void directory(level&) override {}
    void entry(const fs::walk_entry&) override {}
    void deleted(const std::string&) override {}
    void left_out() override { clean_ = false; }
    bool clean_ = true;
};

/// Changes as a directory in overlayfs form.
class directory_differ final : changes {
public:
    directory_differ(int upper, lower_chain& lower, int out, bool whole) : changes(upper, lower, whole ? form::whole : form::layer), root_(out) {}
    void write() {
        run();
        const auto top = fs::stat_at(upper(), "").value();
        if (::fchown(root_, top.uid, top.gid) != 0 || ::fchmod(root_, top.permissions()) != 0) throw_errno("setting the owner of a layer");
        set_time(root_, top);
    }

private:
    static void set_time(int fd, const fs::file_info& info) {
        const ::timespec t{info.mtime.seconds, static_cast<long>(info.mtime.nanoseconds)};
        const std::array<::timespec, 2> both{t, t};
        if (::futimens(fd, both.data()) != 0) throw_errno("setting the time of a directory");
    }

    struct open_directory {
        std::string path;
        unique_fd fd;
    };

    [[nodiscard]] int current() const { return open_.empty() ? root_ : open_.back().fd.get(); }

    /// Those of the walk come parents first, so the one above is the last that is open.
    void directory(level& l) override {
        const std::string name(last_of(l.path));
        const unique_fd above = open_above(l.path);
        fs::copy_tree(
            above.get(), name, current(), name,
            {.filter = [](std::string_view path, const fs::file_info&) { return path.empty() ? fs::copy_verdict::take : fs::copy_verdict::skip; },
             .keep_existing_root = false});
        unique_fd made{::openat(current(), name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)};
        if (!made) throw_errno(cat("making the directory ", quoted(l.path)));
        open_.push_back({l.path, std::move(made)});
    }

    void left(const level& l) override {
        if (open_.empty() || l.path.empty()) return;
        set_time(open_.back().fd.get(), l.info);
        open_.pop_back();
    }

    /// Layers never change, so a file may be in two of them; what is seen through a mount must be copied.
    void entry(const fs::walk_entry& e) override {
        const std::string name(e.name);
        if (!whole() && ::linkat(e.dir_fd, name.c_str(), current(), name.c_str(), 0) == 0) return;
        if (e.info.nlink > 1) {
            const auto [first, fresh] = first_names_.try_emplace({e.info.device, e.info.inode}, std::string(e.path));
            if (!fresh && ::linkat(root_, first->second.c_str(), current(), name.c_str(), 0) == 0) return;
        }
        fs::copy_tree(e.dir_fd, name, current(), name, {});
    }

    void deleted(const std::string& path) override {
        if (::mknodat(current(), std::string(last_of(path)).c_str(), S_IFCHR, 0) != 0) throw_errno(cat("making a whiteout for ", quoted(path)));
    }

    /// Of the upper tree. No part of the path is a link: the walk went through it.
    [[nodiscard]] unique_fd open_above(const std::string& path) const {
        const auto slash = path.rfind('/');
        unique_fd fd{::openat(upper(), slash == std::string::npos ? "." : path.substr(0, slash).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
        if (!fd) throw_errno(cat("opening what ", quoted(path), " is in"));
        return fd;
    }

    int root_;
    std::vector<open_directory> open_;
    std::map<std::pair<std::uint64_t, std::uint64_t>, std::string> first_names_;
};

}  // namespace

bool tells_changes_only(int upper, lower_chain& lower) { return looker{upper, lower}.look(); }

void diff_directory(int upper, lower_chain& lower, int out, bool whole) { directory_differ{upper, lower, out, whole}.write(); }

}  // namespace cobuild::archive

module;
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <compare>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

module cobuild.snapshot;

import cobuild.base;
import cobuild.state;
import :internal;

// A writable is a copy of its chain. What it looked like is remembered as inode and change time of every entry; at commit what
// differs is moved into the layer, what is missing becomes a whiteout. Same layers as the overlay store's.
namespace cobuild::snapshot {
namespace {

/// An inode as it is; another change time or inode means that somebody was at it.
struct stamp {
    ::ino_t inode = 0;
    std::int64_t seconds = 0, nanoseconds = 0;
    bool operator==(const stamp&) const = default;
};
stamp stamp_of(const struct stat& st) { return {st.st_ino, st.st_ctim.tv_sec, st.st_ctim.tv_nsec}; }

struct node {
    stamp was;
    std::map<std::string, std::size_t> children;  ///< indices, so that destruction needs no recursion
};

class listing {
public:
    listing(int dirfd, const char* name) {
        unique_fd fd(::openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW));
        stream_ = fd ? ::fdopendir(fd.get()) : nullptr;
        if (stream_ == nullptr) throw_errno(cat("cannot read the directory ", quoted(name), " of a layer"));
        (void)fd.release();
    }
    ~listing() {
        if (stream_ != nullptr) ::closedir(stream_);
    }
    listing(listing&& other) noexcept : stream_(std::exchange(other.stream_, nullptr)) {}
    listing& operator=(listing&&) = delete;
    [[nodiscard]] int fd() const { return ::dirfd(stream_); }
    const char* next() {
        while (const auto* e = ::readdir(stream_)) {
            if (std::strcmp(e->d_name, ".") != 0 && std::strcmp(e->d_name, "..") != 0) return e->d_name;
        }
        return nullptr;
    }

private:
    DIR* stream_;
};

struct stat look(int dirfd, const char* name) {
    struct stat st{};
    if (::fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW) != 0) throw_errno(cat("cannot look at ", quoted(name), " of a layer"));
    return st;
}

/// What a tree looked like.
class baseline {
public:
    explicit baseline(int root) {
        struct level {
            listing dir;
            std::size_t at;
        };
        nodes.push_back({stamp_of(look(root, ".")), {}});
        std::vector<level> levels;
        levels.push_back({listing(root, "."), 0});
        while (!levels.empty()) {
            auto& top = levels.back();
            const char* name = top.dir.next();
            if (name == nullptr) {
                levels.pop_back();
                continue;
            }
            const auto st = look(top.dir.fd(), name);
            const auto index = nodes.size();
            nodes.push_back({stamp_of(st), {}});
            nodes[top.at].children.emplace(name, index);
            if (S_ISDIR(st.st_mode)) {
                listing below(top.dir.fd(), name);
                levels.push_back({std::move(below), index});
            }
        }
        settle();
    }
    std::vector<node> nodes;

private:
    /// Waits until file times have moved on, so that every later change has another time.
    static void settle() {
        ::timespec began{}, now{};
        ::clock_gettime(CLOCK_REALTIME_COARSE, &began);
        do {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
            ::clock_gettime(CLOCK_REALTIME_COARSE, &now);
        } while (now.tv_sec == began.tv_sec && now.tv_nsec == began.tv_nsec);
    }
};

/// Moves the differences between a tree and its baseline into a layer.
class differ {
public:
    differ(const baseline& before, int root, int layer) : before_(before) { enter(root, ".", layer, 0, look(root, ".")); }

    void run() {
        while (!levels_.empty()) {
            auto& top = levels_.back();
            if (const char* name = top.dir.next())
                entry(top, name);
            else
                leave();
        }
    }

private:
    struct level {
        listing dir;
        unique_fd out;
        std::size_t at;
        std::map<std::string, std::size_t> missing;
        bool changed;
        std::string name;
        std::array<::timespec, 2> times;
    };

    void enter(int dirfd, const char* name, int out_parent, std::size_t at, const struct stat& st) {
        listing dir(dirfd, name);
        if (std::strcmp(name, ".") != 0 && ::mkdirat(out_parent, name, 0700) != 0)
            throw_errno(cat("cannot make the directory ", quoted(name), " of a layer"));
        unique_fd out(::openat(out_parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW));
        if (!out) throw_errno(cat("cannot make the directory ", quoted(name), " of a layer"));
        copy_attributes(dir.fd(), out.get());
        const auto& node = before_.nodes[at];
        const bool changed = stamp_of(st) != node.was;
        levels_.push_back({std::move(dir), std::move(out), at, node.children, changed, name, {st.st_atim, st.st_mtim}});
    }

    void entry(level& top, const char* name) {
        const auto st = look(top.dir.fd(), name);
        const auto found = top.missing.find(name);
        const bool had = found != top.missing.end();
        const auto index = had ? found->second : 0;
        if (had) top.missing.erase(found);
        if (had && S_ISDIR(st.st_mode) && before_.nodes[index].was.inode == st.st_ino) {
            enter(top.dir.fd(), name, top.out.get(), index, st);
            return;
        }
        if (had && stamp_of(st) == before_.nodes[index].was) return;
        top.changed = true;
        if (::renameat(top.dir.fd(), name, top.out.get(), name) != 0) throw_errno(cat("cannot move ", quoted(name), " into a layer"));
        if (!had || !S_ISDIR(st.st_mode)) return;
        const unique_fd dir(::openat(top.out.get(), name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW));
        if (!dir || ::fsetxattr(dir.get(), "trusted.overlay.opaque", "y", 1, 0) != 0)
            throw_errno(cat("cannot mark the directory ", quoted(name), " of a layer as opaque"));
    }

    void leave() {
        auto top = std::move(levels_.back());
        levels_.pop_back();
        for (const auto& [name, index] : top.missing) {
            top.changed = true;
            if (::mknodat(top.out.get(), name.c_str(), S_IFCHR, 0) != 0) throw_errno(cat("cannot make a whiteout for ", quoted(name)));
        }
        ::futimens(top.out.get(), top.times.data());
        if (levels_.empty()) return;
        if (top.changed)
            levels_.back().changed = true;
        else
            ::unlinkat(levels_.back().out.get(), top.name.c_str(), AT_REMOVEDIR);
        ::futimens(levels_.back().out.get(), levels_.back().times.data());
    }

    const baseline& before_;
    std::vector<level> levels_;
};

class native_writable final : public writable::body {
public:
    native_writable(std::shared_ptr<store::common> c, chain l, state::pin p) : body(std::move(c), std::move(l), std::move(p)) {
        if (lower.layers.empty()) return;
        if (::mkdirat(work.dir.get(), "root", 0755) != 0) throw_errno(cat("cannot make a layer below ", work.owner->where()));
        root_.reset(::openat(work.dir.get(), "root", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
        if (!root_) throw_errno(cat("cannot make a layer below ", work.owner->where()));
        merge_layers(*work.owner, lower, root_.get());
        before_ = std::make_unique<baseline>(root_.get());
    }
    unique_fd mount() override { return bind_mount(root_ ? root_.get() : work.fs.get(), false); }
    [[nodiscard]] int upper() const noexcept override { return root_ ? -1 : work.fs.get(); }
    void finish() override {
        if (!root_) return;
        differ(*before_, root_.get(), work.fs.get()).run();
        work.owner->dir->discard(work.dir.get(), "root");
    }

private:
    unique_fd root_;
    std::unique_ptr<baseline> before_;
};

class native_store final : public store {
public:
    explicit native_store(std::shared_ptr<common> c) : store(std::move(c)) {}
    [[nodiscard]] std::string_view name() const noexcept override { return "native"; }

    std::unique_ptr<writable::body> begin_on(chain lower) override {
        auto keep = common_->must_hold(lower);
        return std::make_unique<native_writable>(common_, std::move(lower), std::move(keep));
    }

    snapshot::view view_of(chain c) override {
        struct kept {
            state::pin pin;
            std::unique_ptr<unfinished> copy;
        };
        auto keep = std::make_shared<kept>();
        keep->pin = common_->must_hold(c);
        if (c.layers.empty()) return access::make(bind_mount(common_->empty.get(), true), keep);
        if (c.layers.size() == 1 && !common_->may_have_whiteouts(c.layers[0]))
            return access::make(bind_mount(common_->fs_of(c.layers[0]).get(), true), keep);
        keep->copy = std::make_unique<unfinished>(common_);
        merge_layers(*common_, c, keep->copy->fs.get());
        return access::make(bind_mount(keep->copy->fs.get(), true), keep);
    }
};

}  // namespace

std::shared_ptr<store> open_native(std::shared_ptr<state::directory> dir, options o) {
    return std::make_shared<native_store>(std::make_shared<store::common>(std::move(dir), o));
}

}  // namespace cobuild::snapshot

module;
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.state;

import cobuild.base;
import cobuild.async;
import :internal;

namespace cobuild::state {
namespace {

/// Deeper directories are first moved up to the top, so that the open descriptors stay few.
constexpr std::size_t max_depth = 100;

class walker {
public:
    walker(const async::cancel_token& token) : token_(token) {}
    ~walker() {
        for (auto& l : levels_) ::closedir(l.stream);
    }
    /// One pass over the directory; what could not be moved or deleted throws.
    void clear(int dirfd, const std::string& name) {
        if (!enter(dirfd, name)) return;
        while (!levels_.empty()) {
            token_.throw_if_cancelled();
            auto& top = levels_.back();
            errno = 0;
            const auto* e = ::readdir(top.stream);
            if (e == nullptr) {
                leave();
                continue;
            }
            const std::string entry = e->d_name;
            if (entry != "." && entry != "..") remove(::dirfd(top.stream), entry, e->d_type);
        }
    }

private:
    struct level {
        DIR* stream;
        int parent;
        std::string name;
    };

    void remove(int dirfd, const std::string& entry, unsigned char type) {
        if (type != DT_DIR) {
            if (::unlinkat(dirfd, entry.c_str(), 0) == 0 || errno == ENOENT) return;
            if (errno != EISDIR && errno != EPERM) throw_errno(cat("cannot delete ", quoted(entry)));
        }
        if (::unlinkat(dirfd, entry.c_str(), AT_REMOVEDIR) == 0 || errno == ENOENT) return;
        if (levels_.size() < max_depth) {
            enter(dirfd, entry);
            return;
        }
        const auto up = cat("deep-", random_id());
        if (::renameat(dirfd, entry.c_str(), ::dirfd(levels_.front().stream), up.c_str()) != 0 && errno != ENOENT)
            throw_errno(cat("cannot delete ", quoted(entry)));
    }

    bool enter(int dirfd, const std::string& name) {
        constexpr int flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW;
        unique_fd fd(::openat(dirfd, name.c_str(), flags));
        if (!fd && errno == EACCES && ::fchmodat(dirfd, name.c_str(), 0700, 0) == 0) fd.reset(::openat(dirfd, name.c_str(), flags));
        if (!fd) {
            if (errno == ENOENT) return false;
            throw_errno(cat("cannot delete ", quoted(name)));
        }
        DIR* stream = ::fdopendir(fd.get());
        if (stream == nullptr) throw_errno(cat("cannot delete ", quoted(name)));
        (void)fd.release();
        levels_.push_back({stream, dirfd, name});
        return true;
    }

    void leave() {
        auto done = std::move(levels_.back());
        if (::unlinkat(done.parent, done.name.c_str(), AT_REMOVEDIR) != 0) {
            if (errno == ENOTEMPTY) {  // what was moved up meanwhile
                ::rewinddir(done.stream);
                levels_.back() = std::move(done);
                if (++retries_ > 100'000) throw_errno(cat("cannot delete ", quoted(levels_.back().name)));
                return;
            }
            if (errno != ENOENT) {
                levels_.back() = std::move(done);
                throw_errno(cat("cannot delete ", quoted(levels_.back().name)));
            }
        }
        ::closedir(done.stream);
        levels_.pop_back();
    }

    const async::cancel_token& token_;
    std::vector<level> levels_;
    std::size_t retries_ = 0;
};

}  // namespace

void remove_tree(int dirfd, const std::string& name, const async::cancel_token& token) {
    if (::unlinkat(dirfd, name.c_str(), 0) == 0 || errno == ENOENT) return;
    if (errno != EISDIR && errno != EPERM) throw_errno(cat("cannot delete ", quoted(name)));
    walker(token).clear(dirfd, name);
}

void directory::discard(int dirfd, const std::string& name) {
    if (::renameat(dirfd, name.c_str(), state_->trash.get(), fresh_name().c_str()) == 0 || errno == ENOENT) return;
    if (errno != ENOSPC && errno != EXDEV && errno != EDQUOT) throw_errno(cat("cannot move ", quoted(name), " to the trash"));
    remove_tree(dirfd, name);
}

void directory::empty_trash_blocking(const async::cancel_token& token) {
    for (const auto& name : names_in(state_->trash.get())) remove_tree(state_->trash.get(), name, token);
}

async::task<void> directory::empty_trash(async::cancel_token token) {
    co_await state_->pool.run([this, token] { empty_trash_blocking(token); });
}

}  // namespace cobuild::state

module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <ctime>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.content;

import cobuild.base;
import cobuild.async;
import cobuild.db;
import cobuild.state;
import :internal;

namespace cobuild::content {
namespace {

/// The kernel's own idea of now, as file times get it.
time_point file_clock() {
    ::timespec now{};
    ::clock_gettime(CLOCK_REALTIME_COARSE, &now);
    return time_point(std::chrono::seconds(now.tv_sec) + nanoseconds(now.tv_nsec));
}

}  // namespace

std::vector<digest> store::reachable(const std::vector<digest>& roots, const children_of& children) {
    std::set<digest> seen(roots.begin(), roots.end());
    std::vector<digest> out(seen.begin(), seen.end());
    for (std::size_t i = 0; i < out.size(); ++i) {
        for (const auto& child : children(out[i])) {
            if (seen.insert(child).second) out.push_back(child);
        }
    }
    return out;
}

// Who relies on a blob pins it, then makes a root that reaches it, then lets go. So one that is in use was either pinned
// when the list was made, or has its root by the time the roots are read, or was pinned (and touched) after we began.
collected store::collect_blocking(const std::vector<digest>& roots, const children_of& children) {
    // What was used before we began is to look older, and file times move by ticks of a few milliseconds.
    auto began = file_clock();
    for (const auto called = began; began == called; began = file_clock()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const auto candidates = list();
    auto all = roots;
    impl_->dir->database().read([&](db::connection& c) {
        for (auto rows = c.query("SELECT target FROM images UNION SELECT digest FROM roots"); rows.next();) all.push_back(rows.digest(0));
    });
    const auto kept = reachable(all, children);
    const std::set<digest> keep(kept.begin(), kept.end());
    auto out = impl_->drop_partials();
    for (const auto& blob : candidates) {
        if (blob.pinned || keep.contains(blob.digest)) continue;
        const auto right = impl_->pins.try_remove(number_of(blob.digest));
        if (!right) continue;
        struct stat st{};
        const auto name = blob.digest.hex();
        if (::fstatat(impl_->blobs.get(), name.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) continue;
        if (time_point(std::chrono::seconds(st.st_mtim.tv_sec) + nanoseconds(st.st_mtim.tv_nsec)) >= began) continue;
        if (::unlinkat(impl_->blobs.get(), name.c_str(), 0) != 0) {
            if (errno == ENOENT) continue;
            throw_errno(cat("cannot remove ", impl_->file_of(blob.digest)));
        }
        ++out.blobs;
        out.bytes += blob.size;
    }
    return out;
}

async::task<collected> store::collect(std::vector<digest> roots, children_of children) {
    co_return co_await impl_->dir->pool().run([this, r = std::move(roots), c = std::move(children)] { return collect_blocking(r, c); });
}

}  // namespace cobuild::content

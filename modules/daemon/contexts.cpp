module;
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>

#include <boost/asio/awaitable.hpp>

module cobuild.daemon;

import cobuild.fs;
import :internal;

namespace cobuild::daemon {

namespace {

namespace stdfs = std::filesystem;

constexpr int most_of_a_key = 64;

/// "<root>/contexts/<key>/<n>/" holds `tree`, the files, and `rules`, what they were asked by; its lock is the flock of
/// `rules`.
std::optional<unique_fd> lock_place(const stdfs::path& at) {
    unique_fd out{::open((at / "rules").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)};
    if (!out) throw_errno(cat("opening ", (at / "rules").string()));
    if (::flock(out.get(), LOCK_EX | LOCK_NB) != 0) return std::nullopt;
    struct stat opened{}, named{};
    // Somebody may have removed it meanwhile.
    if (::fstat(out.get(), &opened) != 0 || ::stat((at / "rules").c_str(), &named) != 0 || opened.st_ino != named.st_ino) return std::nullopt;
    return out;
}

std::shared_ptr<context_store::place> take_place(const std::string& root, const std::string& key, const std::string& rules) {
    const stdfs::path below = stdfs::path(root) / "contexts" / digest::of(key).hex();
    std::shared_ptr<context_store::place> other;
    for (int n = 0; n < most_of_a_key; ++n) {
        const auto at = below / cat(n);
        const bool fresh = !stdfs::exists(at);
        if (fresh && other) break;  // one that differs little beats an empty one
        stdfs::create_directories(at / "tree");
        auto lock = lock_place(at);
        if (!lock) continue;
        const bool same = fresh || fs::read_all(lock->get(), std::size_t{1} << 20) == rules;
        auto found = std::make_shared<context_store::place>(context_store::place{(at / "tree").string(), std::move(*lock)});
        if (same) {
            other = std::move(found);
            break;
        }
        if (!other) other = std::move(found);
    }
    if (!other) throw error{errc::unavailable, cat("more than ", most_of_a_key, " builds use the same directory of a client at once")};
    if (::ftruncate(other->lock.get(), 0) != 0 || ::pwrite(other->lock.get(), rules.data(), rules.size(), 0) < 0)
        throw_errno("keeping a client's directory");
    return other;
}

std::uint64_t clear_places(const std::string& root) {
    std::uint64_t freed = 0;
    std::error_code ec;
    for (const auto& key : stdfs::directory_iterator(stdfs::path(root) / "contexts", ec)) {
        for (const auto& place : stdfs::directory_iterator(key.path(), ec)) {
            const auto lock = lock_place(place.path());
            if (!lock) continue;
            for (auto i = stdfs::recursive_directory_iterator(place.path(), ec); i != stdfs::recursive_directory_iterator(); i.increment(ec))
                if (i->is_regular_file(ec) && !i->is_symlink(ec)) freed += i->file_size(ec);
            stdfs::remove_all(place.path(), ec);
        }
        stdfs::remove(key.path(), ec);  // when it is empty
    }
    return freed;
}

}  // namespace

async::task<std::shared_ptr<context_store::place>> context_store::take(std::string key, std::string rules) {
    co_return co_await pool_.run([root = root_, key, rules] { return take_place(root, key, rules); });
}

async::task<std::uint64_t> context_store::clear() {
    co_return co_await pool_.run([root = root_] { return clear_places(root); });
}

}  // namespace cobuild::daemon

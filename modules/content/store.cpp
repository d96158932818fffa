module;
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

module cobuild.content;

import cobuild.base;
import cobuild.db;
import cobuild.state;
import :internal;

namespace cobuild::content {
namespace {

constexpr std::array<std::string_view, 1> schema{
    "CREATE TABLE images(name TEXT PRIMARY KEY, target BLOB NOT NULL, descriptor TEXT NOT NULL, created INTEGER NOT NULL, labels BLOB NOT NULL) "
    "WITHOUT ROWID;"
    "CREATE TABLE roots(name TEXT NOT NULL, digest BLOB NOT NULL, PRIMARY KEY(name, digest)) WITHOUT ROWID"};

void write_layout(int dirfd) {
    const unique_fd file(::openat(dirfd, "oci-layout", O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
    constexpr std::string_view text = R"({"imageLayoutVersion":"1.0.0"})";
    if (file) write_all(file.get(), reinterpret_cast<const std::byte*>(text.data()), text.size(), "content/oci-layout");
}

}  // namespace

std::uint64_t number_of(const digest& d) noexcept {
    std::uint64_t out = 0;
    for (std::size_t i = 0; i < 8; ++i) out = out << 8 | static_cast<std::uint64_t>(d.raw()[i]);
    return out >> 2;
}

void write_all(int fd, const std::byte* data, std::size_t n, const std::string& path) {
    while (n > 0) {
        const auto done = ::write(fd, data, n);
        if (done < 0) {
            if (errno == EINTR) continue;
            throw_errno(cat("cannot write ", path));
        }
        data += done;
        n -= static_cast<std::size_t>(done);
    }
}

store::impl::impl(std::shared_ptr<state::directory> d)
    : dir(std::move(d)),
      blobs(dir->subdir("content/blobs/sha256")),
      ingests(dir->subdir("content/ingest")),
      partials(dir->subdir("content/partial")),
      path(dir->root() + "/content"),
      pins(dir->fd(), "content/pins") {
    write_layout(dir->subdir("content").get());
    dir->database().migrate("content", schema);
}

std::string store::impl::file_of(const digest& d) const { return cat(path, "/blobs/sha256/", d.hex()); }

state::pin store::impl::pin(const digest& d) {
    for (int tries = 0; tries < 2000; ++tries) {
        if (auto p = pins.hold(number_of(d))) return std::move(*p);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));  // a removal is two system calls
    }
    throw error{errc::timed_out, cat("the blob ", d.str(), " is kept locked for removal by another process")};
}

std::optional<std::uint64_t> store::impl::size_of(const digest& d) const {
    struct stat st{};
    if (::fstatat(blobs.get(), d.hex().c_str(), &st, AT_SYMLINK_NOFOLLOW) == 0) {
        if (S_ISREG(st.st_mode)) return static_cast<std::uint64_t>(st.st_size);
        return std::nullopt;
    }
    if (errno != ENOENT) throw_errno(cat("cannot look at ", file_of(d)));
    return std::nullopt;
}

void store::impl::touch(const digest& d) const noexcept { ::utimensat(blobs.get(), d.hex().c_str(), nullptr, AT_SYMLINK_NOFOLLOW); }

store::store(std::shared_ptr<state::directory> dir) : impl_(std::make_shared<impl>(std::move(dir))) {}
store::~store() = default;
const std::string& store::path() const noexcept { return impl_->path; }

std::optional<std::uint64_t> store::find(const digest& d) const { return impl_->size_of(d); }

std::optional<stored> store::hold(const digest& d) {
    auto keep = impl_->pin(d);
    const auto size = impl_->size_of(d);
    if (!size) return std::nullopt;
    impl_->touch(d);
    return stored{.digest = d, .size = *size, .keep = std::move(keep)};
}

unique_fd store::open(const digest& d) const {
    unique_fd out(::openat(impl_->blobs.get(), d.hex().c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
    if (!out && errno == ENOENT) throw error{errc::not_found, cat("the content store has no blob ", d.str())};
    if (!out) throw_errno(cat("cannot open ", impl_->file_of(d)));
    return out;
}

std::string store::read_all(const digest& d, std::uint64_t limit) const {
    const auto file = open(d);
    struct stat st{};
    if (::fstat(file.get(), &st) != 0) throw_errno(cat("cannot look at ", impl_->file_of(d)));
    const auto size = static_cast<std::uint64_t>(st.st_size);
    if (size > limit) throw error{errc::invalid, cat("the blob ", d.str(), " has ", size, " bytes where at most ", limit, " are expected")};
    std::string out(size, '\0');
    std::size_t have = 0;
    while (have < out.size()) {
        const auto n = ::read(file.get(), out.data() + have, out.size() - have);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw_errno(cat("cannot read ", impl_->file_of(d)));
        if (n == 0) break;
        have += static_cast<std::size_t>(n);
    }
    out.resize(have);
    if (const auto real = digest::of(out); real != d)
        throw error{errc::corrupt, cat("the stored blob ", d.str(), " is damaged: its bytes are ", real.str(), ": remove ", impl_->file_of(d))};
    return out;
}

bool store::remove(const digest& d) {
    const auto right = impl_->pins.try_remove(number_of(d));
    if (!right) return false;
    if (::unlinkat(impl_->blobs.get(), d.hex().c_str(), 0) == 0) return true;
    if (errno != ENOENT) throw_errno(cat("cannot remove ", impl_->file_of(d)));
    return false;
}

std::vector<blob_info> store::list() const {
    std::vector<blob_info> out;
    const int fd = ::openat(impl_->blobs.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR* stream = fd >= 0 ? ::fdopendir(fd) : nullptr;
    if (stream == nullptr) throw_errno(cat("cannot list ", impl_->path, "/blobs/sha256"));
    const scope_exit close([&] { ::closedir(stream); });
    while (const auto* e = ::readdir(stream)) {
        const auto d = digest::try_parse(cat("sha256:", std::string_view(e->d_name)));
        struct stat st{};
        if (!d || ::fstatat(fd, e->d_name, &st, AT_SYMLINK_NOFOLLOW) != 0) continue;
        const auto since = std::chrono::seconds(st.st_mtim.tv_sec) + nanoseconds(st.st_mtim.tv_nsec);
        out.push_back({.digest = *d,
                       .size = static_cast<std::uint64_t>(st.st_size),
                       .last_used = time_point(since),
                       .pinned = impl_->pins.pinned(number_of(*d))});
    }
    return out;
}

}  // namespace cobuild::content

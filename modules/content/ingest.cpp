module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

module cobuild.content;

import cobuild.base;
import cobuild.state;
import :internal;

namespace cobuild::content {
namespace {

/// Less is as well fetched again.
constexpr std::uint64_t worth_keeping = std::uint64_t{1} << 20;

/// A temporary file below content/ingest, or the beginning of a blob below content/partial, removed unless placed or kept.
struct temporary {
    explicit temporary(std::shared_ptr<store::impl> s) : owner(std::move(s)), name(owner->dir->fresh_name()) {
        file.reset(::openat(owner->ingests.get(), name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
        if (!file) throw_errno(cat("cannot make ", path()));
    }
    temporary(std::shared_ptr<store::impl> s, const digest& d, unique_fd locked)
        : owner(std::move(s)), name(d.hex()), file(std::move(locked)), partial(true) {}
    ~temporary() { drop(); }
    temporary(const temporary&) = delete;
    temporary& operator=(const temporary&) = delete;
    [[nodiscard]] int folder() const noexcept { return (partial ? owner->partials : owner->ingests).get(); }
    void drop() noexcept {
        if (!file) return;
        ::unlinkat(folder(), name.c_str(), 0);
        file.reset();
    }
    [[nodiscard]] std::string path() const { return cat(owner->path, partial ? "/partial/" : "/ingest/", name); }
    stored place(const digest& d, std::uint64_t size) {
        auto out = owner->place(folder(), file.get(), name, d, size);
        file.reset();
        return out;
    }

    std::shared_ptr<store::impl> owner;
    std::string name;
    unique_fd file;
    bool partial = false;
};

}  // namespace

struct writer::state : temporary {
    using temporary::temporary;
    ~state() {
        if (partial && size >= worth_keeping) file.reset();
    }
    std::optional<hasher> sum{std::in_place};  ///< none: the user of resume() hashes
    std::uint64_t size = 0;                    ///< of the file
    std::uint64_t kept = 0;                    ///< what of it was there before
    std::uint64_t replayed = 0;
};
struct draft::state : temporary {
    using temporary::temporary;
};

stored store::impl::place(int from, int fd, const std::string& name, const digest& d, std::uint64_t size) {
    auto keep = pin(d);
    if (size_of(d) == size) {
        touch(d);
        ::unlinkat(from, name.c_str(), 0);
        return {.digest = d, .size = size, .keep = std::move(keep)};
    }
    state::crash_point("ingest-written");
    if (::futimens(fd, nullptr) != 0 || ::fsync(fd) != 0) throw_errno(cat("cannot write ", file_of(d)));
    state::crash_point("ingest-synced");
    if (::renameat(from, name.c_str(), blobs.get(), d.hex().c_str()) != 0) throw_errno(cat("cannot write ", file_of(d)));
    return {.digest = d, .size = size, .keep = std::move(keep)};
}

writer::writer(std::unique_ptr<state> s) noexcept : state_(std::move(s)) {}
writer::writer(writer&&) noexcept = default;
writer& writer::operator=(writer&&) noexcept = default;
writer::~writer() = default;

void writer::write(std::span<const std::byte> data) {
    auto& s = *state_;
    if (s.sum) s.sum->update(data);
    try {
        write_all(s.file.get(), data.data(), data.size(), s.path());
    } catch (...) {
        s.drop();  // a full disk gets it back
        throw;
    }
    s.size += data.size();
}
void writer::write(std::string_view data) { write(bytes_of(data)); }
std::uint64_t writer::written() const noexcept { return state_->size; }
std::uint64_t writer::kept() const noexcept { return state_->kept; }

std::size_t writer::replay(std::span<std::byte> out) {
    auto& s = *state_;
    const auto most = static_cast<std::size_t>(std::min<std::uint64_t>(out.size(), s.kept - s.replayed));
    if (most == 0) return 0;
    const auto n = ::pread(s.file.get(), out.data(), most, static_cast<::off_t>(s.replayed));
    if (n < 0) throw_errno(cat("cannot read ", s.path()));
    if (n == 0) throw error{errc::corrupt, cat("the file ", s.path(), " became shorter while it was read")};
    s.replayed += static_cast<std::uint64_t>(n);
    return static_cast<std::size_t>(n);
}

stored writer::commit(std::optional<digest> expected, std::optional<std::uint64_t> size) {
    auto& s = *state_;
    if (!s.sum && !expected) throw error{errc::internal, "a blob that nobody hashed is to be committed"};
    const auto real = s.sum ? s.sum->finish() : *expected;
    if (size && *size != s.size) {
        throw error{errc::corrupt, cat("a blob", expected ? " " + expected->str() : "", " has ", s.size, " bytes, but ", *size, " were promised")};
    }
    if (expected && *expected != real) throw error{errc::corrupt, cat("a blob promised as ", expected->str(), " has the digest ", real.str())};
    return s.place(real, s.size);
}

void writer::abort() noexcept {
    if (state_) state_->drop();
}

draft::draft(std::unique_ptr<state> s) noexcept : state_(std::move(s)) {}
draft::draft(draft&&) noexcept = default;
draft& draft::operator=(draft&&) noexcept = default;
draft::~draft() = default;
int draft::fd() const noexcept { return state_->file.get(); }

namespace {

/// An early errc::no_space instead of a late one.
void preallocate(const temporary& t, std::uint64_t size) {
    if (size > 0 && ::fallocate(t.file.get(), FALLOC_FL_KEEP_SIZE, 0, static_cast<::off_t>(size)) != 0 && (errno == ENOSPC || errno == EDQUOT))
        throw_errno(cat("cannot write ", t.path()));
}

}  // namespace

writer store::ingest(std::uint64_t size_hint) {
    auto s = std::make_unique<writer::state>(impl_);
    preallocate(*s, size_hint);
    return writer(std::move(s));
}

writer store::resume(const digest& d, std::uint64_t size) {
    auto locked = impl_->lock_partial(d);
    if (!locked) {
        auto plain = ingest(size);
        plain.state_->sum.reset();
        return plain;
    }
    auto s = std::make_unique<writer::state>(impl_, d, std::move(locked));
    s->sum.reset();
    const auto there = ::lseek(s->file.get(), 0, SEEK_END);
    if (there < 0) throw_errno(cat("cannot look at ", s->path()));
    s->kept = static_cast<std::uint64_t>(there);
    if (s->kept > size || s->kept < worth_keeping) {
        if (::ftruncate(s->file.get(), 0) != 0 || ::lseek(s->file.get(), 0, SEEK_SET) != 0) throw_errno(cat("cannot write ", s->path()));
        s->kept = 0;
    }
    s->size = s->kept;
    preallocate(*s, size);
    return writer(std::move(s));
}

stored store::put(std::string_view data) {
    auto w = ingest();
    w.write(data);
    return w.commit();
}

draft store::new_draft() { return draft(std::make_unique<draft::state>(impl_)); }

stored store::adopt(draft file, const digest& d, std::uint64_t size) {
    struct stat st{};
    if (::fstat(file.fd(), &st) != 0) throw_errno(cat("cannot look at ", file.state_->path()));
    if (static_cast<std::uint64_t>(st.st_size) != size) {
        throw error{errc::corrupt, cat("the blob ", d.str(), " has ", static_cast<std::uint64_t>(st.st_size), " bytes, but ", size, " were written")};
    }
    return file.state_->place(d, size);
}

}  // namespace cobuild::content

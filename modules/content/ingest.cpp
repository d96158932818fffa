module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

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

/// A temporary file below content/ingest, removed unless placed.
struct temporary {
    explicit temporary(std::shared_ptr<store::impl> s) : owner(std::move(s)), name(owner->dir->fresh_name()) {
        file.reset(::openat(owner->ingests.get(), name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
        if (!file) throw_errno(cat("cannot make ", path()));
    }
    ~temporary() { drop(); }
    temporary(const temporary&) = delete;
    temporary& operator=(const temporary&) = delete;
    void drop() noexcept {
        if (!file) return;
        ::unlinkat(owner->ingests.get(), name.c_str(), 0);
        file.reset();
    }
    [[nodiscard]] std::string path() const { return cat(owner->path, "/ingest/", name); }
    stored place(const digest& d, std::uint64_t size) {
        auto out = owner->place(file.get(), name, d, size);
        file.reset();
        return out;
    }

    std::shared_ptr<store::impl> owner;
    std::string name;
    unique_fd file;
};

}  // namespace

struct writer::state : temporary {
    using temporary::temporary;
    hasher sum;
    std::uint64_t size = 0;
};
struct draft::state : temporary {
    using temporary::temporary;
};

stored store::impl::place(int fd, const std::string& name, const digest& d, std::uint64_t size) {
    auto keep = pin(d);
    if (size_of(d) == size) {
        touch(d);
        ::unlinkat(ingests.get(), name.c_str(), 0);
        return {.digest = d, .size = size, .keep = std::move(keep)};
    }
    state::crash_point("ingest-written");
    if (::futimens(fd, nullptr) != 0 || ::fsync(fd) != 0) throw_errno(cat("cannot write ", file_of(d)));
    state::crash_point("ingest-synced");
    if (::renameat(ingests.get(), name.c_str(), blobs.get(), d.hex().c_str()) != 0) throw_errno(cat("cannot write ", file_of(d)));
    return {.digest = d, .size = size, .keep = std::move(keep)};
}

writer::writer(std::unique_ptr<state> s) noexcept : state_(std::move(s)) {}
writer::writer(writer&&) noexcept = default;
writer& writer::operator=(writer&&) noexcept = default;
writer::~writer() = default;

void writer::write(std::span<const std::byte> data) {
    state_->sum.update(data);
    write_all(state_->file.get(), data.data(), data.size(), state_->path());
    state_->size += data.size();
}
void writer::write(std::string_view data) { write(bytes_of(data)); }
std::uint64_t writer::written() const noexcept { return state_->size; }

stored writer::commit(std::optional<digest> expected, std::optional<std::uint64_t> size) {
    auto& s = *state_;
    const auto real = s.sum.finish();
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

writer store::ingest(std::uint64_t size_hint) {
    auto s = std::make_unique<writer::state>(impl_);
    if (size_hint > 0 && ::fallocate(s->file.get(), FALLOC_FL_KEEP_SIZE, 0, static_cast<::off_t>(size_hint)) != 0 &&
        (errno == ENOSPC || errno == EDQUOT)) {
        throw_errno(cat("cannot write ", s->path()));
    }
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

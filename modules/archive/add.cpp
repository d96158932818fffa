module;
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <archive.h>

module cobuild.archive;

import cobuild.base;
import cobuild.fs;

namespace cobuild::archive {

namespace {
/// libarchive undoes the compression only; what the tar says is read by our own reader.
class filtered {
public:
    filtered(int fd, decompress_limits limits) : limits_(limits), a_(archive_read_new()) {
        if (!a_) throw error{errc::internal, "no memory for libarchive"};
        archive_read_support_filter_gzip(a_.get());
        archive_read_support_filter_bzip2(a_.get());
        archive_read_support_filter_xz(a_.get());
        archive_read_support_filter_zstd(a_.get());
        archive_read_support_format_raw(a_.get());
        archive_read_support_format_empty(a_.get());
        if (archive_read_open_fd(a_.get(), fd, std::size_t{256} << 10) != ARCHIVE_OK) failed();
        archive_entry* entry = nullptr;
        const int result = archive_read_next_header(a_.get(), &entry);
        ended_ = result == ARCHIVE_EOF;
        if (result < ARCHIVE_WARN) failed();
    }

    std::size_t read(std::span<std::byte> into) {
        if (ended_) return 0;
        const la_ssize_t n = archive_read_data(a_.get(), into.data(), into.size());
        if (n < 0) failed();
        ended_ = n == 0;
        made_ += static_cast<std::uint64_t>(n);
        const auto taken = static_cast<std::uint64_t>(std::max<la_int64_t>(archive_filter_bytes(a_.get(), -1), 1));
        if (made_ > limits_.max_bytes || (made_ > (std::uint64_t{64} << 20) && made_ / taken > limits_.max_ratio))
            throw error{errc::corrupt, cat("the archive expands to more than the limit here (", format_bytes(made_), " so far)")};
        return static_cast<std::size_t>(n);
    }

private:
    [[noreturn]] void failed() {
        const char* why = archive_error_string(a_.get());
        throw error{errc::corrupt, cat("the archive cannot be read: ", why != nullptr ? why : "unknown reason")};
    }
    struct free_archive {
        void operator()(struct archive* a) const noexcept { archive_read_free(a); }
    };
    decompress_limits limits_;
    std::unique_ptr<struct archive, free_archive> a_;
    std::uint64_t made_ = 0;
    bool ended_ = false;
};
}  // namespace

byte_source open_add_archive(int fd, decompress_limits limits) {
    if (::lseek(fd, 0, SEEK_SET) < 0) throw_errno("going to the start of the archive");
    return [f = std::make_shared<filtered>(fd, limits)](std::span<std::byte> into) { return f->read(into); };
}

bool is_add_archive(int fd) {
    const scope_exit rewind{[fd] { ::lseek(fd, 0, SEEK_SET); }};
    try {
        tar_reader reader{open_add_archive(fd)};
        tar_entry entry;
        return reader.next(entry);
    } catch (const error& e) {
        if (e.kind() == errc::unsupported) return true;  // a tar, of a kind that extracting will name
        if (e.kind() != errc::corrupt) throw;
        return false;
    }
}

}  // namespace cobuild::archive

module;
#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <span>
#include <vector>

module cobuild.fs;

import cobuild.base;

namespace cobuild::fs {

namespace {
constexpr std::size_t buffer_size = std::size_t{1} << 20;

std::span<std::byte> thread_buffer() {
    static thread_local std::vector<std::byte> buffer(buffer_size);
    return buffer;
}

void hash_zeros(hasher& hash, std::uint64_t count) {
    static const std::vector<std::byte> zeros(65536);
    while (count > 0) {
        const auto n = std::min<std::uint64_t>(count, zeros.size());
        hash.update(std::span(zeros).first(static_cast<std::size_t>(n)));
        count -= n;
    }
}

std::size_t read_at(int fd, std::span<std::byte> into, std::uint64_t offset) {
    for (;;) {
        const ssize_t n = ::pread(fd, into.data(), into.size(), static_cast<off_t>(offset));
        if (n >= 0) return static_cast<std::size_t>(n);
        if (errno != EINTR) throw_errno("reading a file");
    }
}

void write_at(int fd, std::span<const std::byte> data, std::uint64_t offset) {
    while (!data.empty()) {
        const ssize_t n = ::pwrite(fd, data.data(), data.size(), static_cast<off_t>(offset));
        if (n < 0 && errno != EINTR) throw_errno("writing a file");
        if (n <= 0) continue;
        data = data.subspan(static_cast<std::size_t>(n));
        offset += static_cast<std::uint64_t>(n);
    }
}

struct extent {
    std::uint64_t from = 0;
    std::uint64_t to = 0;
};

/// The next stretch of data at or after `from`; from == size when there is none.
extent next_data(int fd, std::uint64_t from, std::uint64_t size) {
    const off_t data = ::lseek(fd, static_cast<off_t>(from), SEEK_DATA);
    if (data < 0) return errno == ENXIO ? extent{size, size} : extent{from, size};
    const off_t hole = ::lseek(fd, data, SEEK_HOLE);
    return {std::min<std::uint64_t>(size, static_cast<std::uint64_t>(data)),
            hole < 0 ? size : std::min<std::uint64_t>(size, static_cast<std::uint64_t>(hole))};
}

/// One stretch by read and write, hashing if asked. False when the file ended before its size.
bool copy_bytes(int from, int to, extent e, hasher* hash) {
    const auto buffer = thread_buffer();
    while (e.from < e.to) {
        const std::size_t n = read_at(from, buffer.first(static_cast<std::size_t>(std::min<std::uint64_t>(buffer.size(), e.to - e.from))), e.from);
        if (n == 0) return false;
        if (hash != nullptr) hash->update(buffer.first(n));
        if (to >= 0) write_at(to, buffer.first(n), e.from);
        e.from += n;
    }
    return true;
}

/// One stretch inside the kernel; false when it cannot, with what is left in `e`.
bool copy_in_kernel(int from, int to, extent& e) {
    while (e.from < e.to) {
        off_t in = static_cast<off_t>(e.from);
        off_t out = in;
        const ssize_t n = ::copy_file_range(from, &in, to, &out, static_cast<std::size_t>(std::min<std::uint64_t>(e.to - e.from, 1U << 30)), 0);
        if (n <= 0) return false;
        e.from += static_cast<std::uint64_t>(n);
    }
    return true;
}

std::uint64_t size_of(int fd) {
    struct stat s;
    if (::fstat(fd, &s) != 0) throw_errno("looking at a file");
    return static_cast<std::uint64_t>(s.st_size);
}

/// Feeds or copies every stretch; returns the bytes of data.
std::uint64_t copy_stretches(int from, int to, std::uint64_t size, hasher* hash) {
    std::uint64_t data = 0;
    bool kernel = hash == nullptr;
    for (std::uint64_t at = 0; at < size;) {
        extent e = next_data(from, at, size);
        if (hash != nullptr) hash_zeros(*hash, e.from - at);
        data += e.to - e.from;
        at = e.to;
        if (kernel && copy_in_kernel(from, to, e)) continue;
        kernel = false;
        if (!copy_bytes(from, to, e, hash)) throw error{errc::io, "a file became shorter while it was read"};
    }
    return data;
}
}  // namespace

copied copy_file(int from, int to, hasher* hash) {
    const std::uint64_t size = size_of(from);
    if (size == 0) return {};
    if (hash == nullptr && ::ioctl(to, FICLONE, from) == 0) return {size_of(to), size_of(to)};
    const std::uint64_t data = copy_stretches(from, to, size, hash);
    if (::ftruncate(to, static_cast<off_t>(size)) != 0) throw_errno("setting the size of a file");
    return {size, data};
}

void hash_file(int from, hasher& hash) { copy_stretches(from, -1, size_of(from), &hash); }

}  // namespace cobuild::fs

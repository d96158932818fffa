module;
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include <boost/asio/awaitable.hpp>

module cobuild.http;

namespace cobuild::http {

namespace {

async::task<async::chunk> slice(std::shared_ptr<const std::string> bytes, std::uint64_t offset, std::size_t max) {
    const auto part = bytes_of(*bytes).subspan(static_cast<std::size_t>(offset)).first(std::min<std::size_t>(max, bytes->size() - offset));
    co_return async::chunk(part.begin(), part.end());
}

async::chunk read_file(int fd, std::uint64_t offset, std::size_t max) {
    async::chunk out(max);
    std::size_t filled = 0;
    while (filled < max) {
        const auto n = ::pread(fd, out.data() + filled, max - filled, static_cast<off_t>(offset + filled));
        if (n < 0) throw_errno("reading a blob to upload");
        if (n == 0) break;
        filled += static_cast<std::size_t>(n);
    }
    if (filled < max) throw error{errc::corrupt, cat("a file being uploaded ended at byte ", offset + filled, ", before its declared size")};
    return out;
}

async::task<async::chunk> read_apart(int fd, std::uint64_t offset, std::size_t max, async::blocking_pool* pool) {
    co_return co_await pool->run([=] { return read_file(fd, offset, max); });
}

}  // namespace

body_source memory_body(std::string bytes) {
    auto shared = std::make_shared<const std::string>(std::move(bytes));
    return {.length = shared->size(), .read = [shared](std::uint64_t offset, std::size_t max) { return slice(shared, offset, max); }};
}

body_source file_body(int fd, std::uint64_t offset, std::uint64_t length, async::blocking_pool& pool) {
    return {.length = length, .read = [=, p = &pool](std::uint64_t at, std::size_t max) {
                return read_apart(fd, offset + at, static_cast<std::size_t>(std::min<std::uint64_t>(max, length - at)), p);
            }};
}

}  // namespace cobuild::http

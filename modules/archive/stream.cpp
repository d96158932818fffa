module;
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

module cobuild.archive;

import cobuild.base;
import cobuild.fs;

namespace cobuild::archive {

byte_source read_from(int fd) {
    return [fd](std::span<std::byte> into) -> std::size_t {
        for (;;) {
            const ssize_t n = ::read(fd, into.data(), into.size());
            if (n >= 0) return static_cast<std::size_t>(n);
            if (errno != EINTR) throw_errno("reading an archive");
        }
    };
}

byte_source read_from(std::span<const std::byte> data) {
    return [data](std::span<std::byte> into) mutable -> std::size_t {
        const std::size_t n = std::min(into.size(), data.size());
        if (n != 0) std::memcpy(into.data(), data.data(), n);
        data = data.subspan(n);
        return n;
    };
}

byte_sink write_to(int fd) {
    return [fd](std::span<const std::byte> data) { fs::write_all(fd, data); };
}

byte_source hashed(byte_source in, hasher& hash, std::uint64_t* size) {
    return [in = std::move(in), &hash, size](std::span<std::byte> into) -> std::size_t {
        const std::size_t n = in(into);
        hash.update(into.first(n));
        if (size != nullptr) *size += n;
        return n;
    };
}

namespace {
class reader_thread {
public:
    reader_thread(byte_source in, std::size_t chunk_bytes, unsigned chunks)
        : in_(std::move(in)), chunk_bytes_(chunk_bytes), limit_(std::max(chunks, 1U)) {
        thread_ = std::thread([this] { run(); });
    }
    ~reader_thread() {
        {
            const std::scoped_lock lock{mutex_};
            stop_ = true;
        }
        space_.notify_all();
        thread_.join();
    }
    std::size_t read(std::span<std::byte> into) {
        if (at_ == current_.size()) next();
        const std::size_t n = std::min(into.size(), current_.size() - at_);
        if (n != 0) std::memcpy(into.data(), current_.data() + at_, n);
        at_ += n;
        return n;
    }

private:
    using chunk = std::vector<std::byte>;

    void next() {
        std::unique_lock lock{mutex_};
        if (current_.capacity() != 0) spare_.push_back(std::move(current_));
        current_.clear();
        at_ = 0;
        data_.wait(lock, [this] { return !full_.empty() || ended_; });
        if (full_.empty()) {
            if (failed_) std::rethrow_exception(failed_);
            return;
        }
        current_ = std::move(full_.front());
        full_.pop_front();
        space_.notify_all();
    }

    bool fill(chunk& c) {
        c.resize(chunk_bytes_);
        std::size_t have = 0;
        while (have < c.size()) {
            const std::size_t n = in_(std::span(c).subspan(have));
            if (n == 0) break;
            have += n;
        }
        const bool more = have == c.size();
        c.resize(have);
        return more;
    }

    void run() {
        for (bool more = true; more;) {
            chunk c;
            {
                std::unique_lock lock{mutex_};
                space_.wait(lock, [this] { return stop_ || full_.size() < limit_; });
                if (stop_) return;
                if (!spare_.empty()) {
                    c = std::move(spare_.back());
                    spare_.pop_back();
                }
            }
            std::exception_ptr failed;
            try {
                more = fill(c);
            } catch (...) {
                failed = std::current_exception();
                more = false;
            }
            const std::scoped_lock lock{mutex_};
            if (!failed && !c.empty()) full_.push_back(std::move(c));
            failed_ = failed;
            ended_ = !more;
            data_.notify_all();
        }
    }

    byte_source in_;
    std::size_t chunk_bytes_;
    std::size_t limit_;
    std::mutex mutex_;
    std::condition_variable data_, space_;
    std::deque<chunk> full_;
    std::vector<chunk> spare_;
    std::exception_ptr failed_;
    bool ended_ = false;
    bool stop_ = false;
    chunk current_;
    std::size_t at_ = 0;
    std::thread thread_;
};
}  // namespace

byte_source read_ahead(byte_source in, std::size_t chunk_bytes, unsigned chunks) {
    return [r = std::make_shared<reader_thread>(std::move(in), chunk_bytes, chunks)](std::span<std::byte> into) { return r->read(into); };
}

}  // namespace cobuild::archive

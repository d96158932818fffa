module;
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.filesync;

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import :parts;

namespace cobuild::filesync {

namespace {
constexpr std::size_t batch_bytes = std::size_t{64} << 10;  // of stats between the walk and the stream
constexpr std::size_t batch_files = 32;                     // small files read in one visit to the pool
constexpr std::size_t max_frame = std::size_t{2} << 20;

struct wanted {
    std::uint32_t id = 0;
    place where;
    std::uint64_t size = 0;
    std::string name;  ///< as it was sent
    unique_fd fd;
    std::uint64_t sent = 0;
};

/// Appends one message to a batch, its length in front.
void append(async::chunk& batch, std::string_view message) {
    const auto size = static_cast<std::uint32_t>(message.size());
    const std::size_t at = batch.size();
    batch.resize(at + sizeof size + message.size());
    std::memcpy(batch.data() + at, &size, sizeof size);
    std::memcpy(batch.data() + at + sizeof size, message.data(), message.size());
}

class sender : public std::enable_shared_from_this<sender> {
public:
    sender(std::shared_ptr<packet_stream> stream, async::blocking_pool& pool, std::vector<tree> trees, send_options options, async::executor ex)
        : stream_(std::move(stream)), pool_(pool), trees_(std::move(trees)), options_(std::move(options)), group_(std::move(ex)) {}

    async::task<progress> run() {
        group_.spawn(walk());
        group_.spawn(forward());
        group_.spawn(listen());
        co_await group_.join();
        co_return done_;
    }
    /// After a failure: waits for the children, then tells the other end unless it was that which gave up.
    async::task<void> give_up(std::string why) {
        if (told_) co_return;
        co_await stream_->write(encode({.type = packet_type::failure, .stat = {}, .data = why}));
    }

private:
    async::task<void> write(std::string message) {
        const auto turn = co_await writing_.acquire();
        co_await stream_->write(std::move(message));
    }

    // ---------------------------------------------------------------- what there is

    async::task<void> walk() {
        std::exception_ptr failed;
        try {
            co_await pool_.run([self = shared_from_this()] { self->walk_blocking(); });
        } catch (...) {
            failed = std::current_exception();
        }
        if (failed) {
            stats_.fail(failed);
            std::rethrow_exception(failed);
        }
        stats_.close();
    }
    void walk_blocking() {
        async::chunk batch;
        std::uint32_t id = 0;
        list_trees(trees_, options_, [&](file_stat&& s, place&& where) {
            if (id == UINT32_MAX) throw error{errc::invalid, "there are too many files to send"};
            {
                const std::lock_guard lock(guard_);
                if (s.is_file() && s.link.empty())
                    files_.emplace(id,
                                   wanted{.id = id, .where = std::move(where), .size = static_cast<std::uint64_t>(s.size), .name = s.path, .fd = {}});
                ++done_.entries;
            }
            ++id;
            append(batch, encode({.type = packet_type::stat, .stat = std::move(s), .data = {}}));
            if (batch.size() >= batch_bytes) stats_.write_blocking(std::exchange(batch, {}));
        });
        if (!batch.empty()) stats_.write_blocking(std::move(batch));
    }
    async::task<void> forward() {
        std::exception_ptr failed;
        try {
            while (auto batch = co_await stats_.read()) {
                for (std::string_view rest = text_of(*batch); !rest.empty();) {
                    std::uint32_t size = 0;
                    std::memcpy(&size, rest.data(), sizeof size);
                    co_await write(std::string(rest.substr(sizeof size, size)));
                    rest.remove_prefix(sizeof size + size);
                }
                report();
            }
            all_said_ = true;
            co_await write(encode({.type = packet_type::stat, .stat = {}, .data = {}}));
        } catch (...) {
            failed = std::current_exception();
        }
        if (!failed) co_return;
        // The walk must not wait for room for ever.
        stats_.fail(failed);
        std::rethrow_exception(failed);
    }

    // ---------------------------------------------------------------- what is asked

    async::task<void> listen() {
        for (;;) {
            const auto message = co_await stream_->read();
            if (!message) throw error{errc::unavailable, "the other side of the file transfer ended it before it had all files"};
            const packet p = decode(*message);
            switch (p.type) {
                case packet_type::request: ask(p.id); break;
                case packet_type::fin:
                    if (!all_said_ || !queue_.empty() || unfinished_ != 0)
                        throw error{errc::corrupt, "the other side of the file transfer said it had all files before it had"};
                    co_await write(encode({.type = packet_type::fin, .stat = {}, .data = {}}));
                    report();
                    co_return;
                case packet_type::failure: told_ = true; throw error{errc::io, cat("the receiver of the files gave up: ", p.data)};
                default: throw error{errc::corrupt, "the receiver of the files sent a packet that only a sender may send"};
            }
        }
    }
    void ask(std::uint32_t id) {
        {
            const std::lock_guard lock(guard_);
            const auto found = files_.find(id);
            if (found == files_.end())
                throw error{errc::corrupt, cat("the receiver of the files asked for number ", id, ", which is no file, or again")};
            queue_.push_back(std::move(found->second));
            files_.erase(found);
        }
        ++unfinished_;
        if (active_ >= std::max(options_.readers, 1U)) return;
        ++active_;
        group_.spawn(serve());
    }
    /// One of the readers: lives as long as there is something to read.
    async::task<void> serve() {
        while (!queue_.empty()) {
            // A share each, so that the others have something to do as well.
            const std::size_t share = std::clamp<std::size_t>(queue_.size() / std::max(options_.readers, 1U), 1, batch_files);
            auto files = std::make_shared<std::vector<wanted>>();
            std::uint64_t bytes = 0;
            while (files->size() < share && !queue_.empty() && (files->empty() || bytes + queue_.front().size <= frame())) {
                bytes += queue_.front().size;
                files->push_back(std::move(queue_.front()));
                queue_.pop_front();
            }
            auto first = co_await pool_.run([self = shared_from_this(), files] {
                std::vector<std::string> out;
                for (auto& f : *files) out.push_back(self->read_some(f));
                return out;
            });
            for (std::size_t i = 0; i < files->size(); ++i) co_await serve_one(std::move((*files)[i]), std::move(first[i]));
        }
        --active_;
    }
    async::task<void> serve_one(wanted f, std::string piece) {
        auto file = std::make_shared<wanted>(std::move(f));
        while (!piece.empty()) {
            const std::size_t size = piece.size();
            co_await write(encode({.type = packet_type::data, .stat = {}, .id = file->id, .data = piece}));
            {
                const std::lock_guard lock(guard_);
                done_.bytes += size;
            }
            report();
            piece.clear();
            if (file->fd) piece = co_await pool_.run([self = shared_from_this(), file] { return self->read_some(*file); });
        }
        {
            const std::lock_guard lock(guard_);
            ++done_.files;
        }
        // Counted before it is written: the answer may come before this coroutine goes on.
        --unfinished_;
        co_await write(encode({.type = packet_type::data, .stat = {}, .id = file->id, .data = {}}));
    }
    [[nodiscard]] std::size_t frame() const { return std::clamp<std::size_t>(options_.frame_bytes, 1, max_frame); }
    /// The next piece; at the file's end it is closed.
    std::string read_some(wanted& f) const {
        const auto changed = [&](std::string_view how) { return error{errc::io, cat(quoted(f.name), " changed while it was sent: ", how)}; };
        if (!f.fd) {
            // O_NONBLOCK: a pipe that took the file's place must not hold us up.
            auto fd = f.where.root->try_open(f.where.path, O_RDONLY | O_NONBLOCK, fs::links::refuse);
            if (!fd) throw changed("it is gone");
            if (!fs::stat_at(fd->get(), "")->is_file()) throw changed("it is no regular file any more");
            f.fd = std::move(*fd);
        }
        std::string out(std::min<std::uint64_t>(frame(), f.size - f.sent + 1), '\0');
        std::size_t got = 0;
        while (got < out.size()) {
            const ssize_t n = ::read(f.fd.get(), out.data() + got, out.size() - got);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) throw_errno(cat("reading ", quoted(f.name)));
            if (n == 0) break;
            got += static_cast<std::size_t>(n);
        }
        const bool at_end = got < out.size();
        out.resize(got);
        f.sent += got;
        if (f.sent > f.size) throw changed("it grew");
        if (at_end && f.sent < f.size) throw changed("it shrank");
        if (at_end) f.fd.reset();
        return out;
    }
    void report() {
        if (!options_.on_progress) return;
        progress now;
        {
            const std::lock_guard lock(guard_);
            now = done_;
        }
        options_.on_progress(now);
    }

    std::shared_ptr<packet_stream> stream_;
    async::blocking_pool& pool_;
    std::vector<tree> trees_;
    send_options options_;
    async::task_group group_;
    async::semaphore writing_{1};
    async::byte_pipe stats_{batch_bytes * 4};
    std::mutex guard_;  // of the two below, which the walk writes
    std::unordered_map<std::uint32_t, wanted> files_;
    progress done_;
    std::deque<wanted> queue_;
    std::size_t unfinished_ = 0;
    unsigned active_ = 0;
    bool all_said_ = false;
    bool told_ = false;
};

async::task<progress> send_to_end(std::shared_ptr<packet_stream> stream, async::blocking_pool& pool, std::vector<tree> trees, send_options options) {
    const auto s = std::make_shared<sender>(std::move(stream), pool, std::move(trees), std::move(options), co_await async::current_executor);
    std::exception_ptr failed;
    try {
        co_return co_await s->run();
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::no_cancel;
    try {
        co_await async::with_deadline(farewell, "the farewell", s->give_up(describe(failed).what()));
    } catch (...) {
        // The first failure is the one to tell.
    }
    std::rethrow_exception(failed);
}
}  // namespace

async::task<progress> send(std::shared_ptr<packet_stream> stream, async::blocking_pool& pool, std::vector<tree> trees, send_options options) {
    return async::linked(async::cancel_token{}, send_to_end(std::move(stream), pool, std::move(trees), std::move(options)));
}

}  // namespace cobuild::filesync

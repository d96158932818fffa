module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_set>
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
// What is held back to be done in one visit to the pool.
constexpr std::size_t batch_packets = 256;
constexpr std::size_t batch_bytes = std::size_t{1} << 20;
// What a sender may still say between its last packet and its end.
constexpr unsigned max_afterwards = 16;

/// A stat or data packet with the message that `p` looks into; stays where it is made.
struct held {
    std::string message;
    packet p;
    std::uint32_t id = 0;
};

class receiver : public std::enable_shared_from_this<receiver> {
public:
    receiver(std::shared_ptr<packet_stream> stream, async::blocking_pool& pool, std::shared_ptr<const fs::root> to, receive_options options)
        : stream_(std::move(stream)), pool_(pool), options_(std::move(options)), disk_(std::make_unique<disk>(std::move(to), options_)) {
        batch_.reserve(batch_packets);
    }

    async::task<received> run() {
        std::vector<async::task<void>> both;
        both.push_back(listen());
        both.push_back(ask());
        co_await async::when_all(std::move(both));
        co_return std::move(disk_->result());
    }
    async::task<void> give_up(std::string why) {
        co_await pool_.run([self = shared_from_this()] { self->disk_.reset(); });
        if (told_) co_return;
        co_await async::with_deadline(farewell, "the farewell", stream_->write(encode({.type = packet_type::failure, .stat = {}, .data = why})));
    }

private:
    /// Writes apart from the reading: a sender that does not read while its own writes wait would otherwise wait for us.
    async::task<void> ask() {
        while (auto message = co_await requests_.read()) co_await stream_->write(std::string(text_of(*message)));
    }
    async::task<void> say(packet p) {
        const std::string message = encode(p);
        const auto bytes = bytes_of(message);
        co_await requests_.write(async::chunk(bytes.begin(), bytes.end()));
    }

    async::task<void> listen() {
        while (!complete()) {
            auto message = co_await stream_->read();
            // What is held may be why it ended.
            if (!message) co_await flush();
            if (!message) throw error{errc::unavailable, "the sender of the files ended the transfer in the middle"};
            take(std::move(*message));
            if (due()) co_await flush();
            while (!wanted_.empty() && asked_.size() < std::max(options_.window, 1U)) {
                asked_.insert(wanted_.front());
                co_await say({.type = packet_type::request, .stat = {}, .id = wanted_.front(), .data = {}});
                wanted_.pop_front();
            }
        }
        co_await flush();
        co_await pool_.run([self = shared_from_this()] { self->disk_->finish(); });
        report();
        co_await say({.type = packet_type::fin, .stat = {}, .data = {}});
        co_await part();
        requests_.close();
    }
    [[nodiscard]] bool complete() const { return all_said_ && batch_stats_ == 0 && wanted_.empty() && asked_.empty(); }
    /// Also when nothing more may come before what is held is done.
    [[nodiscard]] bool due() const {
        return batch_.size() == batch_packets || batch_held_ >= batch_bytes || (all_said_ && (batch_stats_ != 0 || asked_.empty()));
    }
    void take(std::string message) {
        if (message.size() > options_.max.packet_bytes)
            throw error{errc::corrupt, cat("the sender of the files sent a packet of more than ", options_.max.packet_bytes, " bytes")};
        held& h = batch_.emplace_back();
        h.message = std::move(message);
        h.p = decode(h.message);
        h.id = h.p.id;
        switch (h.p.type) {
            case packet_type::stat: return take_stat(h);
            case packet_type::data:
                if (!asked_.contains(h.id))
                    throw error{errc::corrupt, cat("the sender of the files sent bytes of number ", h.id, ", which were not asked for")};
                batch_held_ += h.message.size();
                if (h.p.data.empty()) asked_.erase(h.id);
                return;
            case packet_type::failure: told_ = true; throw error{errc::io, cat("the sender of the files gave up: ", h.p.data)};
            default: throw error{errc::corrupt, "the sender of the files sent a packet that only a receiver may send"};
        }
    }
    void take_stat(held& h) {
        if (all_said_) throw error{errc::corrupt, "the sender of the files sent an entry after the last"};
        if (!h.p.stat) {
            all_said_ = true;
            batch_.pop_back();
            return;
        }
        if (next_id_ == UINT32_MAX) throw error{errc::corrupt, "the sender of the files sent too many entries"};
        h.id = next_id_++;
        batch_held_ += h.message.size();
        ++batch_stats_;
    }

    async::task<void> flush() {
        if (batch_.empty()) co_return;
        auto fresh = co_await pool_.run([self = shared_from_this()] { return self->work(); });
        wanted_.insert(wanted_.end(), fresh.begin(), fresh.end());
        batch_.clear();
        batch_held_ = 0;
        batch_stats_ = 0;
        report();
    }
    /// On the pool, while the coroutine waits.
    std::vector<std::uint32_t> work() {
        std::vector<std::uint32_t> wanted;
        for (auto& h : batch_) {
            if (h.p.stat) {
                if (disk_->entry(std::move(*h.p.stat), h.id)) wanted.push_back(h.id);
            } else if (h.p.data.empty()) {
                disk_->complete(h.id);
            } else {
                disk_->data(h.id, h.p.data);
            }
        }
        return wanted;
    }
    void report() {
        if (options_.on_progress) options_.on_progress(disk_->result().transferred);
    }

    /// The sender's answer, and the end of its packets where it ends them.
    async::task<void> part() {
        bool answered = false;
        for (unsigned i = 0; i < max_afterwards; ++i) {
            const auto message = co_await stream_->read();
            if (!message && !answered) throw error{errc::unavailable, "the sender of the files ended the transfer without an answer"};
            if (!message) co_return;
            const packet p = decode(*message);
            if (p.type == packet_type::failure) {
                told_ = true;
                throw error{errc::io, cat("the sender of the files gave up: ", p.data)};
            }
            if (p.type != packet_type::fin) break;
            answered = true;
        }
        throw error{errc::corrupt, "the sender of the files goes on after it was told that all is there"};
    }

    std::shared_ptr<packet_stream> stream_;
    async::blocking_pool& pool_;
    receive_options options_;
    std::unique_ptr<disk> disk_;
    async::byte_pipe requests_;
    std::vector<held> batch_;
    std::size_t batch_held_ = 0;
    std::size_t batch_stats_ = 0;
    std::deque<std::uint32_t> wanted_;
    std::unordered_set<std::uint32_t> asked_;
    std::uint32_t next_id_ = 0;
    bool all_said_ = false;
    bool told_ = false;
};

async::task<received> receive_to_end(std::shared_ptr<packet_stream> stream, async::blocking_pool& pool, std::shared_ptr<const fs::root> to,
                                     receive_options options) {
    if (options.metadata_only) throw error{errc::unsupported, "a transfer of metadata only (local.metadatatransfer) is not supported yet"};
    const auto r = std::make_shared<receiver>(std::move(stream), pool, std::move(to), std::move(options));
    std::exception_ptr failed;
    try {
        co_return co_await r->run();
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::no_cancel;
    try {
        co_await r->give_up(describe(failed).what());
    } catch (...) {
        // The first failure is the one to tell.
    }
    std::rethrow_exception(failed);
}
}  // namespace

async::task<received> receive(std::shared_ptr<packet_stream> stream, async::blocking_pool& pool, std::shared_ptr<const fs::root> to,
                              receive_options options) {
    return async::linked(async::cancel_token{}, receive_to_end(std::move(stream), pool, std::move(to), std::move(options)));
}

}  // namespace cobuild::filesync

module;
#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.registry;

import :internal;

namespace cobuild::registry {

std::optional<content_range> parse_content_range(std::string_view text) {
    content_range out;
    const auto number = [&](std::uint64_t& n, char until) {
        const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), n);
        if (ec != std::errc{}) return false;
        text.remove_prefix(static_cast<std::size_t>(end - text.data()));
        if (until == '\0') return text.empty();
        if (!text.starts_with(until)) return false;
        text.remove_prefix(1);
        return true;
    };
    if (!text.starts_with("bytes ")) return std::nullopt;
    text.remove_prefix(6);
    if (!number(out.first, '-') || !number(out.last, '/') || out.last < out.first) return std::nullopt;
    if (text == "*") return out;
    std::uint64_t total = 0;
    if (!number(total, '\0')) return std::nullopt;
    out.total = total;
    return out;
}

namespace {

constexpr std::size_t piece = std::size_t{256} << 10;

/// One blob's parts under way.
struct part_work {
    struct part {
        std::uint64_t first = 0, last = 0;  ///< both included, as ranges are told
        async::byte_pipe bytes;
    };

    registry_state& r;
    host_state& h;
    socket_pool& pool;
    part_fetch job;
    std::uint64_t part_size;
    std::uint64_t next;                       ///< the first byte nobody was sent for
    std::deque<std::shared_ptr<part>> ahead;  ///< in order; the front is being delivered
    std::list<socket_pool::lease> borrowed;
    std::vector<socket_pool::lease*> free;
    std::exception_ptr first_failure;  ///< those after it are cancellations

    [[nodiscard]] std::size_t slots() const { return borrowed.size() + 1; }

    async::task<void> bring(std::shared_ptr<part> p, socket_pool::lease* slot) {
        std::exception_ptr failed;
        try {
            co_await receive(*p, *slot);
            p->bytes.close();
        } catch (...) {
            failed = std::current_exception();
        }
        if (failed) {
            if (!first_failure) first_failure = failed;
            p->bytes.fail(failed);
            std::rethrow_exception(failed);
        }
        give_back(slot);
    }

    async::task<void> receive(part& p, socket_pool::lease& slot) {
        auto q = job.what;
        q.headers.set("Range", cat("bytes=", p.first, '-', p.last));
        auto a = co_await perform(r, h, slot, std::move(q), job.call);
        if (a.head.status != 206) co_await refuse(r, h, a, "to a range of it");
        refuse_encoding(a, job.blob);
        const auto range = parse_content_range(a.head.headers.get("content-range").value_or(""));
        if (!range || range->first != p.first || range->last != p.last || range->total.value_or(job.size) != job.size)
            throw host_error{error{errc::corrupt, cat(job.blob, ": the server sent another range than asked for")}};
        for (auto left = p.last - p.first + 1; left > 0;) {
            async::chunk data(static_cast<std::size_t>(std::min<std::uint64_t>(piece, left)));
            std::size_t filled = 0;
            while (filled < data.size()) {
                const auto n = co_await a.from->read_some(std::span(data).subspan(filled));
                if (n == 0) throw error{errc::unavailable, cat(job.blob, ": a part ended ", left - filled, " bytes early")};
                filled += n;
            }
            left -= filled;
            co_await p.bytes.write(std::move(data));
        }
        co_await a.from->discard();
    }

    void give_back(socket_pool::lease* slot) {
        const auto mine = std::find_if(borrowed.begin(), borrowed.end(), [&](const auto& l) { return &l == slot; });
        if (mine != borrowed.end() && pool.waited_for())
            borrowed.erase(mine);
        else
            free.push_back(slot);
    }

    void send_for_more(async::task_group& group) {
        while (!free.empty() && next < job.size && ahead.size() <= slots()) {
            auto* slot = free.back();
            free.pop_back();
            const auto last = std::min(next + part_size, job.size) - 1;
            auto p = std::make_shared<part>(part{.first = next, .last = last, .bytes = async::byte_pipe(static_cast<std::size_t>(part_size))});
            next = last + 1;
            ahead.push_back(p);
            group.spawn(bring(std::move(p), slot));
        }
    }

    async::task<void> deliver_all(async::task_group& group) {
        for (send_for_more(group); !ahead.empty(); send_for_more(group)) {
            const auto front = ahead.front();
            for (;;) {
                const auto asked = clock::now();
                auto data = co_await front->bytes.read();
                if (!data) break;
                const auto waited = clock::now() - asked;
                co_await job.deliver(std::move(*data), waited);
                send_for_more(group);
            }
            ahead.pop_front();
        }
    }
};

}  // namespace

async::task<void> fetch_parts(registry_state& r, host_state& h, socket_pool::lease& slot, part_fetch job) {
    part_work work{.r = r, .h = h, .pool = *r.pool, .job = std::move(job), .part_size = r.opts->split.part, .next = 0};
    work.next = work.job.from;
    work.free.push_back(&slot);
    const auto parts = (work.job.size - work.job.from + work.part_size - 1) / work.part_size;
    while (work.slots() < parts && r.pool->spare() > 0) {
        work.borrowed.push_back(co_await r.pool->acquire(true));
        work.borrowed.back().trace = slot.trace;
        work.free.push_back(&work.borrowed.back());
    }
    async::task_group group(co_await async::current_executor);
    std::exception_ptr failed;
    try {
        co_await work.deliver_all(group);
    } catch (...) {
        failed = std::current_exception();
    }
    if (!failed) co_return co_await group.join();
    if (!work.first_failure) work.first_failure = failed;
    co_await async::no_cancel;
    group.cancel();
    try {
        co_await group.join();
    } catch (...) {
        // Known already.
    }
    std::rethrow_exception(work.first_failure);
}

}  // namespace cobuild::registry

module;
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
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

namespace {

/// One blob on its way, over as many answers as it takes.
struct transfer {
    std::shared_ptr<registry_state> r;
    oci::reference ref;
    oci::descriptor blob;
    blob_sink sink;
    fetch_options o;
    std::uint64_t offset = 0;  ///< bytes the sink has
    hasher hash;
    std::shared_ptr<bool> fatal = std::make_shared<bool>(false);
    std::string host;
    bool slow = false;     ///< the attempt was given up for that
    bool in_parts = true;  ///< worth a try
    nanoseconds idle{};    ///< of this attempt, spent waiting for bytes
    clock::time_point began{};
    nanoseconds waited{};
    std::uint64_t window_bytes = 0;

    // A peer that sends a byte now and then keeps within every limit on idleness and never ends.
    void count(const host_state& h, nanoseconds took, std::size_t bytes) {
        const auto& policy = r->opts->retry;
        waited += took;
        window_bytes += bytes;
        if (waited < policy.slow_window) return;
        if (window_bytes < policy.slowest) {
            slow = true;
            throw error{errc::timed_out, cat(name(h), " comes too slowly: ", window_bytes, " bytes in ", format_duration(policy.slow_window),
                                             ", at byte ", offset, " of ", blob.size)};
        }
        waited = {};
        window_bytes = 0;
    }

    [[nodiscard]] std::string name(const host_state& h) const { return cat("blob ", blob.digest.str(), " from ", h.name()); }

    error wrong_size(const host_state& h, std::uint64_t got) const {
        return {errc::corrupt, cat(name(h), ": ", blob.size, " bytes were declared in the manifest, ", got, " came")};
    }

    // How many bytes of this answer the sink has already. Checks what the server says against what we know.
    std::uint64_t bytes_to_skip(const host_state& h, const answer& a) const {
        if (a.head.status == 206) {
            const auto range = parse_content_range(a.head.headers.get("content-range").value_or(""));
            if (!range || range->first != offset)
                throw host_error{error{errc::corrupt, cat(name(h), ": the server sent another range than asked for")}};
            if (range->total && blob.size != 0 && *range->total != blob.size) throw host_error{wrong_size(h, *range->total)};
            return 0;
        }
        if (blob.size != 0 && a.head.content_length && *a.head.content_length != blob.size) throw host_error{wrong_size(h, *a.head.content_length)};
        return offset;
    }

    async::task<void> attempt(host_state& h, socket_pool::lease& slot) {
        ask q{.path = cat('/', ref.path(), "/blobs/", blob.digest.str()), .scopes = {pull_scope(ref)}, .digest = blob.digest.str()};
        q.headers.set("Accept", cat(blob.media_type.empty() ? "application/octet-stream" : blob.media_type, ", */*"));
        const auto whole = q;
        if (offset > 0) q.headers.set("Range", cat("bytes=", offset, '-'));
        auto a = co_await perform(*r, h, slot, std::move(q), o.call);
        if (a.head.status != 200 && a.head.status != 206) co_await refuse(*r, h, a, {});
        refuse_encoding(a, name(h));
        const auto before = offset;
        slow = false;
        waited = idle = {};
        window_bytes = 0;
        began = clock::now();
        std::exception_ptr broken;
        bool stopped = false;
        try {
            stopped = !co_await receive(h, a, bytes_to_skip(h, a));
        } catch (const host_error&) {
            throw;
        } catch (const error& e) {
            if (*fatal || (e.kind() != errc::unavailable && e.kind() != errc::timed_out)) throw;
            broken = std::current_exception();
        }
        if (stopped) {
            a.far.reset();
            broken = co_await rest_in_parts(h, slot, whole);
        }
        if (broken) {
            in_parts = false;  // one after the other is the surer way
            host_error e{describe(broken)};
            e.broken_body = true;
            e.progress = offset > before && !slow;
            throw host_error{std::move(e)};
        }
        host = h.name();
    }

    /// What a part failed with; whatever that was, the blob may still come in one piece.
    async::task<std::exception_ptr> rest_in_parts(host_state& h, socket_pool::lease& slot, ask whole) {
        auto taken = [this, &h](async::chunk data, nanoseconds took) -> async::task<void> {
            count(h, took, data.size());
            return deliver(h, std::move(data));
        };
        part_fetch job{.what = std::move(whole), .blob = name(h), .from = offset, .size = blob.size, .call = o.call, .deliver = std::move(taken)};
        try {
            co_await fetch_parts(*r, h, slot, std::move(job));
        } catch (const error& e) {
            if (*fatal || e.kind() == errc::canceled) throw;
            co_return std::current_exception();
        }
        co_return nullptr;
    }

    /// Whether the network is what keeps us, and more connections could help.
    [[nodiscard]] bool better_in_parts(const answer& a, std::uint64_t came) const {
        const auto& policy = r->opts->split;
        if (!in_parts || policy.part == 0 || came < policy.part || blob.size < offset + 3 * policy.part || r->pool->spare() == 0) return false;
        if (a.head.status != 206 && to_lower(a.head.headers.get("accept-ranges").value_or("")) != "bytes") return false;
        return idle * 100 >= (clock::now() - began) * static_cast<int>(policy.waiting_percent);
    }

    /// False when it stopped in the middle, for the rest to come in parts.
    async::task<bool> receive(host_state& h, answer& a, std::uint64_t skip) {
        std::uint64_t came = 0;
        for (;;) {
            async::chunk data(chunk_size());
            std::size_t filled = 0;
            bool end = false;
            std::exception_ptr broken;
            try {
                while (filled < data.size() && !end) {
                    const auto asked = clock::now();
                    const auto n = co_await a.from->read_some(std::span(data).subspan(filled));
                    filled += n;
                    end = n == 0;
                    idle += clock::now() - asked;
                    if (!end) count(h, clock::now() - asked, n);
                }
            } catch (const error&) {
                broken = std::current_exception();  // what came before it counts
            }
            data.resize(filled);
            came += filled;
            if (skip > 0) {
                const auto drop = static_cast<std::size_t>(std::min<std::uint64_t>(skip, data.size()));
                data.erase(data.begin(), data.begin() + static_cast<std::ptrdiff_t>(drop));
                skip -= drop;
            }
            if (!data.empty()) co_await deliver(h, std::move(data));
            if (broken) std::rethrow_exception(broken);
            if (end || (blob.size != 0 && offset == blob.size && !a.head.content_length)) break;
            if (skip == 0 && better_in_parts(a, came)) co_return false;
        }
        if (blob.size != 0 && offset != blob.size) throw host_error{wrong_size(h, offset)};
        co_return true;
    }

    [[nodiscard]] std::size_t chunk_size() const {
        const std::uint64_t most = std::max<std::size_t>(o.chunk_size, 4096);
        // One byte more than is left, so that the end is seen and surplus bytes show.
        return static_cast<std::size_t>(blob.size > offset ? std::min(most, blob.size - offset + 1) : most);
    }

    async::task<void> deliver(host_state& h, async::chunk data) {
        const auto size = data.size();
        if (blob.size != 0 && offset + size > blob.size) throw host_error{wrong_size(h, offset + size)};
        if (o.verify) hash.update(data);
        *fatal = true;  // what the receiver throws no other host can cure
        co_await sink(std::move(data));
        if (o.call.progress) o.call.progress(size);
        *fatal = false;
        offset += size;
    }
};

}  // namespace

async::task<std::string> do_fetch_blob(std::shared_ptr<registry_state> r, oci::reference ref, oci::descriptor blob, blob_sink sink, fetch_options o) {
    if (o.offset != 0 && o.verify) throw error{errc::internal, "a transfer that starts in the middle cannot be verified here"};
    const auto offset = o.offset;
    transfer t{.r = r, .ref = std::move(ref), .blob = std::move(blob), .sink = std::move(sink), .o = std::move(o), .offset = offset};
    attempt_plan plan{.doing = cat("fetching ", t.blob.digest.str(), " of ", t.ref.familiar()),
                      .repository = t.ref.path(),
                      .transfer = true,
                      .by_digest = true,
                      .digest = t.blob.digest.str(),
                      .media_type = t.blob.media_type,
                      .size = t.blob.size};
    co_await try_hosts(*r, std::move(plan), t.o.call, [&t](host_state& h, socket_pool::lease& slot) { return t.attempt(h, slot); }, t.fatal);
    if (t.o.verify) {
        if (const auto real = t.hash.finish(); real != t.blob.digest)
            throw error{errc::corrupt,
                        cat("blob ", t.blob.digest.str(), " from ", t.host, " has other bytes, of digest ", real.str(), " (", t.offset, " bytes)")};
    }
    co_return t.host;
}

}  // namespace cobuild::registry

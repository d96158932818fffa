module;
#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include <boost/asio/awaitable.hpp>

module cobuild.http;

import :internal;
import :link;

namespace cobuild::http {

namespace {
constexpr std::size_t upload_chunk = std::size_t{512} << 10;
constexpr std::uint64_t longest_resent = std::uint64_t{64} << 10;
constexpr std::size_t refill = std::size_t{16} << 10;
constexpr std::size_t max_chunk_line = 1024;
constexpr unsigned max_interim = 16;

enum class framing { none, length, chunked, until_close };
}  // namespace

struct connection::state : std::enable_shared_from_this<connection::state> {
    state(async::executor ex, endpoint server, connection_options options)
        : wire(std::make_shared<link>(std::move(ex), std::move(server), std::move(options))) {}

    std::shared_ptr<link> wire;
    std::string in;  // what came behind a head, or belongs to the next line
    framing frame = framing::none;
    std::uint64_t left = 0;      // of the body, or of the chunk
    std::uint64_t received = 0;  // of the body
    std::uint64_t expected = 0;
    bool first_chunk = true;
    bool keep = false;
    bool in_exchange = false;
    bool answered = false;  // a byte of the answer has come

    [[nodiscard]] std::string who() const { return wire->server.host_port(); }

    void reset() noexcept {
        wire->close();
        in.clear();
        in_exchange = false;
        frame = framing::none;
    }

    async::task<response> exchange(const request& r);
    async::task<bool> send_body(const body_source& body);
    async::task<response> read_head(const request& r);
    async::task<std::size_t> read_body(std::span<std::byte> into);
    async::task<std::size_t> read_chunked(std::span<std::byte> into);
    async::task<std::string> read_line();
    async::task<void> more();
    void begin_body(const request& r, const head& h);
    void end_body();
    std::size_t from_buffer(std::span<std::byte> into);
};

// ---------------------------------------------------------------- sending

async::task<response> connection::state::exchange(const request& r) {
    answered = false;
    in_exchange = true;
    wire->arm(wire->options.timeouts.idle, "sending to ");
    const auto text = format_head(r, wire->server, wire->absolute_targets(), wire->proxy_authorization());
    co_await wire->write(bytes_of(text));
    bool whole = true;
    if (r.body) whole = co_await send_body(*r.body);
    wire->arm(wire->options.timeouts.head, "waiting for the answer of ");
    auto out = co_await read_head(r);
    if (!whole) keep = false;
    wire->disarm();
    co_return out;
}

// False when an answer came before the end: a server that refuses an upload says so early and need not read the rest.
async::task<bool> connection::state::send_body(const body_source& body) {
    for (std::uint64_t offset = 0; offset < body.length;) {
        wire->disarm();
        const auto data = co_await body.read(offset, static_cast<std::size_t>(std::min<std::uint64_t>(upload_chunk, body.length - offset)));
        if (data.empty() || data.size() > body.length - offset)
            throw error{errc::internal, cat("an upload's source gave ", data.size(), " bytes at offset ", offset, " of ", body.length)};
        wire->arm(wire->options.timeouts.idle, "sending to ");
        std::exception_ptr failed;
        bool sent = false;
        try {
            sent = co_await wire->write_watching(data, in);
        } catch (const error& e) {
            if (e.kind() != errc::unavailable) throw;
            failed = std::current_exception();
        }
        if (failed) {
            // A peer may answer and close; what it said can still be there.
            try {
                wire->poll(in);
            } catch (const error&) {
            }
            if (in.empty()) std::rethrow_exception(failed);
        }
        if (!in.empty()) answered = true;
        if (!sent) co_return false;
        offset += data.size();
    }
    co_return true;
}

async::task<response> connection::state::read_head(const request& r) {
    for (unsigned interim = 0; interim < max_interim; ++interim) {
        std::size_t seen = 0;
        for (;;) {
            if (in.find("\r\n\r\n", seen > 3 ? seen - 3 : 0) != std::string::npos) break;
            if (in.size() > wire->options.max_head)
                throw error{errc::corrupt, cat("the head of its answer is longer than ", wire->options.max_head, " bytes")}.with(who());
            seen = in.size();
            co_await more();
            if (in.size() == seen)
                throw error{errc::unavailable,
                            cat(who(), answered ? " closed the connection in the middle of an answer" : " closed the connection without an answer")};
            answered = true;
        }
        std::size_t consumed = 0;
        std::optional<head> h;
        try {
            h = parse_head(in, wire->options.max_head, consumed);
        } catch (error& e) {
            throw std::move(e).with(who());
        }
        if (!h) throw error{errc::corrupt, cat(who(), ": its answer is not HTTP")};
        in.erase(0, consumed);
        if (h->answer.status == 101) throw error{errc::corrupt, cat(who(), " wants to switch protocols, which nobody asked for")};
        if (h->answer.status < 200) continue;
        begin_body(r, *h);
        co_return std::move(h->answer);
    }
    throw error{errc::corrupt, cat(who(), " sends interim answers without end")};
}

void connection::state::begin_body(const request& r, const head& h) {
    keep = h.keep_alive;
    received = expected = left = 0;
    first_chunk = true;
    const bool bodiless = r.method == "HEAD" || h.answer.status == 204 || h.answer.status == 304;
    if (bodiless) {
        frame = framing::none;
    } else if (h.chunked) {
        frame = framing::chunked;
    } else if (h.answer.content_length) {
        frame = framing::length;
        left = expected = *h.answer.content_length;
    } else {
        frame = framing::until_close;
        keep = false;
    }
    if (frame == framing::none || (frame == framing::length && left == 0)) end_body();
}

void connection::state::end_body() {
    frame = framing::none;
    in_exchange = false;
    wire->disarm();
    if (!keep || !in.empty()) reset();
}

// ---------------------------------------------------------------- receiving

async::task<void> connection::state::more() {
    const auto old = in.size();
    in.resize(old + refill);
    std::size_t n = 0;
    std::exception_ptr failed;
    try {
        n = co_await wire->read(std::as_writable_bytes(std::span(in).subspan(old)));
    } catch (...) {
        failed = std::current_exception();
    }
    in.resize(old + n);
    if (failed) std::rethrow_exception(failed);
}

std::size_t connection::state::from_buffer(std::span<std::byte> into) {
    const auto n = std::min(into.size(), in.size());
    std::memcpy(into.data(), in.data(), n);
    in.erase(0, n);
    return n;
}

async::task<std::string> connection::state::read_line() {
    for (;;) {
        if (const auto end = in.find("\r\n"); end != std::string::npos) {
            auto line = in.substr(0, end);
            in.erase(0, end + 2);
            co_return line;
        }
        const auto had = in.size();
        if (had > max_chunk_line) throw error{errc::corrupt, cat(who(), ": a chunk of its answer has no sensible head")};
        co_await more();
        if (in.size() == had) throw error{errc::unavailable, cat(who(), " closed the connection after ", received, " bytes of a body")};
    }
}

async::task<std::size_t> connection::state::read_chunked(std::span<std::byte> into) {
    if (left == 0) {
        if (!std::exchange(first_chunk, false) && !(co_await read_line()).empty())
            throw error{errc::corrupt, cat(who(), ": a chunk of its answer has the wrong length")};
        auto line = co_await read_line();
        line.resize(std::min(line.find(';'), line.size()));
        const auto digits = trim(line);
        const auto [end, ec] = std::from_chars(digits.data(), digits.data() + digits.size(), left, 16);
        if (digits.empty() || ec != std::errc{} || end != digits.data() + digits.size() || left >> 60 != 0)
            throw error{errc::corrupt, cat(who(), ": a chunk of its answer has no sensible head")};
        if (left == 0) {
            // Trailers are read to stay in step and thrown away.
            for (unsigned lines = 0; !(co_await read_line()).empty(); ++lines)
                if (lines > 64) throw error{errc::corrupt, cat(who(), ": its answer has trailers without end")};
            co_return 0;
        }
    }
    into = into.first(static_cast<std::size_t>(std::min<std::uint64_t>(into.size(), left)));
    const auto n = in.empty() ? co_await wire->read(into) : from_buffer(into);
    if (n == 0) throw error{errc::unavailable, cat(who(), " closed the connection after ", received, " bytes of a body")};
    left -= n;
    co_return n;
}

async::task<std::size_t> connection::state::read_body(std::span<std::byte> into) {
    if (frame == framing::none || into.empty()) co_return 0;
    wire->arm(wire->options.timeouts.idle, "waiting for more bytes of ");
    std::size_t n = 0;
    if (frame == framing::chunked) {
        n = co_await read_chunked(into);
    } else {
        if (frame == framing::length) into = into.first(static_cast<std::size_t>(std::min<std::uint64_t>(into.size(), left)));
        n = in.empty() ? co_await wire->read(into) : from_buffer(into);
        if (frame == framing::length) {
            if (n == 0) throw error{errc::unavailable, cat(who(), " closed the connection after ", received, " of ", expected, " bytes")};
            left -= n;
        } else if (n == 0 && wire->abrupt()) {
            throw error{errc::unavailable, cat(who(), " cut the connection after ", received, " bytes")};
        }
    }
    received += n;
    wire->disarm();
    if (n == 0 || (frame == framing::length && left == 0)) end_body();
    co_return n;
}

// ---------------------------------------------------------------- the contract

connection::connection(async::executor ex, endpoint server, connection_options options)
    : state_(std::make_shared<state>(std::move(ex), std::move(server), std::move(options))) {}

connection::~connection() { state_->reset(); }

const endpoint& connection::server() const noexcept { return state_->wire->server; }
bool connection::is_open() const noexcept { return state_->wire->is_open(); }
bool connection::reached() const noexcept { return state_->wire->reached(); }
bool connection::peer_is_not_tls() const noexcept { return state_->wire->not_tls(); }
bool connection::reusable() const noexcept { return is_open() && !state_->in_exchange && !state_->wire->peer_closed(); }
std::string connection::peer() const { return state_->wire->peer(); }
std::vector<std::string> connection::certificates() const { return state_->wire->certificates(); }
void connection::close() noexcept { state_->reset(); }

async::task<response> connection::send(request r) {
    const auto s = state_;
    if (s->in_exchange) s->reset();
    for (;;) {
        const bool fresh = !s->wire->is_open();
        std::exception_ptr failed;
        bool stale = false;
        try {
            if (fresh) co_await s->wire->open();
            co_return co_await s->exchange(r);
        } catch (const error& e) {
            // A long body may have arrived in part: whether to send it again is not ours to say.
            const bool small = !r.body || r.body->length <= longest_resent;
            stale = !fresh && small && !s->answered && e.kind() == errc::unavailable;
            failed = std::current_exception();
        } catch (...) {
            failed = std::current_exception();
        }
        s->reset();
        if (!stale) std::rethrow_exception(failed);
    }
}

async::task<std::size_t> connection::read_some(std::span<std::byte> into) {
    const auto s = state_;
    std::exception_ptr failed;
    try {
        co_return co_await s->read_body(into);
    } catch (...) {
        failed = std::current_exception();
    }
    s->reset();
    std::rethrow_exception(failed);
}

async::task<std::string> connection::read_all(std::size_t limit) {
    std::string out;
    for (;;) {
        const auto old = out.size();
        out.resize(old + refill);
        const auto n = co_await read_some(std::as_writable_bytes(std::span(out).subspan(old)));
        out.resize(old + n);
        if (n == 0) co_return out;
        if (out.size() > limit) {
            close();
            throw error{errc::corrupt, cat("the answer of ", server().host_port(), " is longer than the ", limit, " bytes allowed here")};
        }
    }
}

async::task<void> connection::discard(std::size_t limit) {
    try {
        std::byte scratch[4096];
        for (std::size_t total = 0; state_->in_exchange;) {
            total += co_await read_some(scratch);
            if (total > limit) close();
        }
    } catch (const error&) {
        close();  // nobody wanted it
    }
}

}  // namespace cobuild::http

module;
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <isa-l.h>
#include <zstd.h>

module cobuild.archive;

import cobuild.base;

namespace cobuild::archive {

std::string_view to_string(compression kind) noexcept {
    switch (kind) {
        case compression::gzip: return "gzip";
        case compression::zstd: return "zstd";
        case compression::none: break;
    }
    return "uncompressed";
}

compression detect(std::span<const std::byte> head) noexcept {
    const std::string_view h = text_of(head);
    if (h.starts_with("\x1f\x8b\x08")) return compression::gzip;
    if (h.starts_with("\x28\xb5\x2f\xfd")) return compression::zstd;
    if (h.size() >= 4 && (h[0] & '\xf0') == '\x50' && h.substr(1, 3) == "\x2a\x4d\x18") return compression::zstd;
    return compression::none;
}

namespace {
constexpr std::size_t input_size = std::size_t{256} << 10;
constexpr std::uint64_t ratio_from = std::uint64_t{64} << 20;

/// Compressed input with a buffer, and the limits on what becomes of it.
class input {
public:
    input(byte_source in, decompress_limits limits) : in_(std::move(in)), limits_(limits), buffer_(input_size) {}
    /// What is left of the buffer, filled anew when nothing is; empty at the end.
    std::span<std::byte> get() {
        if (have_.empty() && !ended_) {
            have_ = std::span(buffer_).first(in_(buffer_));
            ended_ = have_.empty();
            consumed_ += have_.size();
        }
        return have_;
    }
    void used(std::size_t n) { have_ = have_.subspan(n); }
    void made(std::size_t n) {
        produced_ += n;
        if (produced_ > limits_.max_bytes)
            throw error{errc::corrupt, cat("the archive expands to more than ", format_bytes(limits_.max_bytes), ", the limit here")};
        if (produced_ > ratio_from && produced_ / std::max<std::uint64_t>(consumed_, 1) > limits_.max_ratio)
            throw error{errc::corrupt, cat("the archive expands more than ", limits_.max_ratio, " times, the limit here")};
    }

private:
    byte_source in_;
    decompress_limits limits_;
    std::vector<std::byte> buffer_;
    std::span<std::byte> have_;
    bool ended_ = false;
    std::uint64_t consumed_ = 0;
    std::uint64_t produced_ = 0;
};

[[noreturn]] void cut_off(std::string_view what) { throw error{errc::corrupt, cat("the ", what, " data ends in the middle")}; }

class gunzip {
public:
    gunzip(byte_source in, decompress_limits limits) : input_(std::move(in), limits), s_(std::make_unique<inflate_state>()) { begin(); }

    std::size_t read(std::span<std::byte> into) {
        std::size_t made = 0;
        while (made == 0 && !into.empty()) {
            if (s_->block_state == ISAL_BLOCK_FINISH && !next_member()) return 0;
            made = step(into);
        }
        input_.made(made);
        return made;
    }

private:
    void begin() {
        isal_inflate_init(s_.get());
        s_->crc_flag = ISAL_GZIP;
    }

    std::size_t step(std::span<std::byte> into) {
        const auto in = input_.get();
        s_->next_in = reinterpret_cast<std::uint8_t*>(in.data());
        s_->avail_in = static_cast<std::uint32_t>(in.size());
        s_->next_out = reinterpret_cast<std::uint8_t*>(into.data());
        s_->avail_out = static_cast<std::uint32_t>(std::min<std::size_t>(into.size(), 1U << 30));
        const std::uint32_t room = s_->avail_out;
        const int result = isal_inflate(s_.get());
        input_.used(in.size() - s_->avail_in);
        const std::size_t made = room - s_->avail_out;
        if (result == ISAL_INCORRECT_CHECKSUM) throw error{errc::corrupt, "the gzip data has a wrong checksum"};
        if (result < 0 && result != ISAL_END_INPUT) throw error{errc::corrupt, cat("the gzip data is damaged (code ", result, ")")};
        if (made == 0 && in.empty() && s_->block_state != ISAL_BLOCK_FINISH) cut_off("gzip");
        return made;
    }

    /// Whether another member follows; padding zeros do not count.
    bool next_member() {
        for (;;) {
            const auto in = input_.get();
            if (in.empty()) return false;
            const auto zeros = std::ranges::find_if(in, [](std::byte b) { return b != std::byte{0}; }) - in.begin();
            input_.used(static_cast<std::size_t>(zeros));
            if (static_cast<std::size_t>(zeros) == in.size()) continue;
            if (input_.get()[0] != std::byte{0x1f}) throw error{errc::corrupt, "something that is not gzip follows the gzip data"};
            begin();
            return true;
        }
    }

    input input_;
    std::unique_ptr<inflate_state> s_;
};

class unzstd {
public:
    unzstd(byte_source in, decompress_limits limits) : input_(std::move(in), limits), s_(ZSTD_createDStream()) {
        if (!s_) throw error{errc::internal, "no memory for zstd"};
    }
    std::size_t read(std::span<std::byte> into) {
        ZSTD_outBuffer out{into.data(), into.size(), 0};
        while (out.pos == 0 && !into.empty()) {
            const auto in = input_.get();
            ZSTD_inBuffer from{in.data(), in.size(), 0};
            const std::size_t result = ZSTD_decompressStream(s_.get(), &out, &from);
            if (ZSTD_isError(result) != 0) throw error{errc::corrupt, cat("the zstd data is damaged (", ZSTD_getErrorName(result), ")")};
            input_.used(from.pos);
            if (in.empty() && out.pos == 0) {
                if (in_frame_) cut_off("zstd");
                return 0;
            }
            // At a frame's end it asks for the next header, which may never come.
            in_frame_ = result != 0;
        }
        input_.made(out.pos);
        return out.pos;
    }

private:
    struct free_stream {
        void operator()(ZSTD_DStream* s) const noexcept { ZSTD_freeDStream(s); }
    };
    input input_;
    std::unique_ptr<ZSTD_DStream, free_stream> s_;
    bool in_frame_ = false;
};
}  // namespace

byte_source decompress(byte_source in, compression kind, decompress_limits limits) {
    switch (kind) {
        case compression::gzip: return [s = std::make_shared<gunzip>(std::move(in), limits)](std::span<std::byte> into) { return s->read(into); };
        case compression::zstd: return [s = std::make_shared<unzstd>(std::move(in), limits)](std::span<std::byte> into) { return s->read(into); };
        case compression::none: break;
    }
    return in;
}

byte_source decompress_auto(byte_source in, compression* kind, decompress_limits limits) {
    std::array<std::byte, 4> head{};
    std::size_t have = 0;
    while (have < head.size()) {
        const std::size_t n = in(std::span(head).subspan(have));
        if (n == 0) break;
        have += n;
    }
    const compression found = detect(std::span(head).first(have));
    if (kind != nullptr) *kind = found;
    auto whole = [in = std::move(in), head, at = std::size_t{0}, have](std::span<std::byte> into) mutable -> std::size_t {
        if (at == have) return in(into);
        const std::size_t n = std::min(into.size(), have - at);
        std::memcpy(into.data(), head.data() + at, n);
        at += n;
        return n;
    };
    return decompress(std::move(whole), found, limits);
}

}  // namespace cobuild::archive

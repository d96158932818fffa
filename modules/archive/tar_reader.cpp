module;
#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

module cobuild.archive;

import cobuild.base;
import cobuild.fs;

namespace cobuild::archive {

namespace {
constexpr std::size_t block = 512;
constexpr std::size_t buffer_size = std::size_t{1} << 20;

[[noreturn]] void damaged(std::string_view why) { throw error{errc::corrupt, cat("the tar archive is damaged: ", why)}; }

std::string_view until_nul(std::string_view field) { return field.substr(0, field.find('\0')); }

std::string_view strip(std::string_view field) {
    constexpr std::string_view blanks{" \0", 2};
    const auto first = field.find_first_not_of(blanks);
    if (first == std::string_view::npos) return {};
    return field.substr(first, field.find_last_not_of(blanks) - first + 1);
}

/// An octal or base-256 number of a header.
std::int64_t number(std::string_view field) {
    const auto first = static_cast<unsigned char>(field[0]);
    if ((first & 0x80) != 0) {
        // Two's complement, the sign in bit 6 of the first byte.
        const bool negative = (first & 0x40) != 0;
        std::uint64_t value = negative ? ~std::uint64_t{0} : 0;
        for (std::size_t i = 0; i < field.size(); ++i) {
            const auto byte = static_cast<unsigned char>(field[i]);
            const std::uint64_t bits = i == 0 ? (negative ? byte | 0x80U : byte & 0x7fU) : byte;
            const std::uint64_t top = value >> 55;
            if (i >= 1 && top != (negative ? 0x1ffU : 0U)) damaged("a number in a header is too large");
            value = value << 8 | (bits & 0xff);
        }
        return static_cast<std::int64_t>(value);
    }
    const std::string_view text = strip(field);
    if (text.empty()) return 0;
    std::int64_t value = 0;
    const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value, 8);
    const std::string_view rest = until_nul(text.substr(static_cast<std::size_t>(end - text.data())));
    if (problem != std::errc{} || !strip(rest).empty() || value < 0) damaged("a number in a header is not octal");
    return value;
}

std::int64_t decimal(std::string_view text, std::string_view key) {
    std::int64_t value = 0;
    const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (problem != std::errc{} || end != text.data() + text.size())
        damaged(cat("the extended header ", key, " is not a number: ", quoted(text.substr(0, 64))));
    return value;
}

/// "<seconds>[.<fraction>]", possibly negative; the fraction is rounded towards the past.
fs::file_time pax_time(std::string_view text) {
    const auto dot = text.find('.');
    fs::file_time t{decimal(text.substr(0, dot), "mtime"), 0};
    if (dot == std::string_view::npos) return t;
    std::string digits{text.substr(dot + 1).substr(0, 9)};
    if (!std::ranges::all_of(digits, [](char c) { return c >= '0' && c <= '9'; })) damaged("a time is not a number");
    digits.resize(9, '0');
    t.nanoseconds = static_cast<std::uint32_t>(decimal(digits, "mtime"));
    if (text.starts_with('-') && t.nanoseconds != 0) t = {t.seconds - 1, 1'000'000'000U - t.nanoseconds};
    return t;
}

std::uint32_t id_of(std::int64_t value, std::string_view what) {
    if (value < 0 || value > std::numeric_limits<std::uint32_t>::max()) damaged(cat("an entry has the ", what, " ", value));
    return static_cast<std::uint32_t>(value);
}

struct header {
    std::array<char, block> raw;
    [[nodiscard]] std::string_view field(std::size_t at, std::size_t size) const { return {raw.data() + at, size}; }
    [[nodiscard]] bool zero() const {
        return std::ranges::all_of(raw, [](char c) { return c == 0; });
    }
    void check_sum() const {
        std::int64_t as_unsigned = 0;
        std::int64_t as_signed = 0;
        for (std::size_t i = 0; i < block; ++i) {
            const char c = i >= 148 && i < 156 ? ' ' : raw[i];
            as_unsigned += static_cast<unsigned char>(c);
            as_signed += static_cast<signed char>(c);
        }
        const std::int64_t stated = number(field(148, 8));
        if (stated != as_unsigned && stated != as_signed) damaged("a header's checksum is wrong");
    }
    [[nodiscard]] std::int64_t size() const {
        const std::int64_t n = number(field(124, 12));
        if (n < 0 || n > (std::int64_t{1} << 62)) damaged("an entry has an impossible size");
        return n;
    }
    [[nodiscard]] char type() const { return raw[156]; }
    [[nodiscard]] std::string path() const {
        const std::string_view name = until_nul(field(0, 100));
        if (field(257, 6) != std::string_view("ustar\0", 6)) return std::string(name);
        const std::string_view prefix = until_nul(field(345, 155));
        return prefix.empty() ? std::string(name) : cat(prefix, "/", name);
    }
};

/// What extended headers before an entry say.
struct extensions {
    std::optional<std::string> path, link;
    std::optional<std::string> gnu_path, gnu_link;
    std::optional<std::int64_t> size, uid, gid;
    std::optional<fs::file_time> mtime;
    std::vector<std::pair<std::string, std::string>> xattrs;
    std::size_t bytes = 0;
};

void take_record(extensions& x, std::string_view key, std::string_view value) {
    constexpr std::string_view xattr = "SCHILY.xattr.";
    const auto text = [&] {
        if (value.find('\0') != std::string_view::npos) damaged("a name holds a NUL byte");
        return std::string(value);
    };
    if (key.starts_with(xattr)) {
        const std::string_view name = key.substr(xattr.size());
        if (!name.empty() && name.find('\0') == std::string_view::npos) x.xattrs.emplace_back(name, value);
    } else if (key.starts_with("GNU.sparse.")) {
        throw error{errc::unsupported, "a sparse entry (GNU.sparse) in a tar archive is not supported: pack it without --sparse"};
    } else if (value.empty()) {
        return;  // an empty value takes back a global one, and those are ignored
    } else if (key == "path")
        x.path = text();
    else if (key == "linkpath")
        x.link = text();
    else if (key == "size")
        x.size = decimal(value, key);
    else if (key == "uid")
        x.uid = decimal(value, key);
    else if (key == "gid")
        x.gid = decimal(value, key);
    else if (key == "mtime")
        x.mtime = pax_time(value);
}

void take_records(extensions& x, std::string_view text) {
    while (!text.empty()) {
        std::size_t size = 0;
        const auto [end, problem] = std::from_chars(text.data(), text.data() + std::min<std::size_t>(text.size(), 20), size);
        const auto digits = static_cast<std::size_t>(end - text.data());
        if (problem != std::errc{} || digits == 0 || size > text.size() || size < digits + 3 || text[digits] != ' ' || text[size - 1] != '\n')
            damaged("an extended header is malformed");
        const std::string_view record = text.substr(digits + 1, size - digits - 2);
        const auto equals = record.find('=');
        if (equals == std::string_view::npos || equals == 0) damaged("an extended header has no key");
        take_record(x, record.substr(0, equals), record.substr(equals + 1));
        text.remove_prefix(size);
    }
}

entry_type type_of(const header& h, std::string_view path) {
    switch (h.type()) {
        case '0':
        case '\0':
        case '7': return path.ends_with('/') && h.type() != '7' ? entry_type::directory : entry_type::file;
        case '1': return entry_type::hard_link;
        case '2': return entry_type::symlink;
        case '3': return entry_type::char_device;
        case '4': return entry_type::block_device;
        case '5': return entry_type::directory;
        case '6': return entry_type::fifo;
        case 'S':
            throw error{errc::unsupported, cat("the sparse entry ", quoted(path), " in a tar archive is not supported: pack it without --sparse")};
        default: break;
    }
    throw error{errc::unsupported, cat("the tar entry ", quoted(path), " has an unknown type ", quoted(std::string_view(&h.raw[156], 1)))};
}
}  // namespace

struct tar_reader::state {
    byte_source in;
    tar_limits limits;
    std::vector<std::byte> buffer = std::vector<std::byte>(buffer_size);
    std::size_t from = 0, to = 0;
    std::uint64_t body = 0;  ///< of the current entry not handed out
    std::size_t padding = 0;
    std::uint64_t entries = 0;
    bool ended = false;

    /// What is buffered, filled anew when nothing is.
    std::span<const std::byte> some() {
        if (from == to) {
            from = 0;
            to = in(buffer);
        }
        return std::span(buffer).subspan(from, to - from);
    }

    /// Copies out `size` bytes; false when the input ended before the first.
    bool take(char* out, std::size_t size) {
        std::size_t have = 0;
        while (have < size) {
            const auto s = some();
            if (s.empty()) {
                if (have == 0) return false;
                damaged("it ends in the middle of a header");
            }
            const std::size_t n = std::min(s.size(), size - have);
            std::memcpy(out + have, s.data(), n);
            have += n;
            from += n;
        }
        return true;
    }

    void skip(std::uint64_t count) {
        while (count > 0) {
            const auto s = some();
            if (s.empty()) damaged("it ends in the middle of an entry");
            const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(s.size(), count));
            from += n;
            count -= n;
        }
    }

    void finish_entry() {
        skip(body);
        body = 0;
        skip(padding);
        padding = 0;
    }

    std::string long_text(const header& h, extensions& x) {
        const auto size = static_cast<std::uint64_t>(h.size());
        if (size > limits.max_header_bytes - x.bytes)
            throw error{errc::corrupt, cat("an entry of the tar archive has more than ", format_bytes(limits.max_header_bytes),
                                           " of extended headers, the limit here")};
        x.bytes += static_cast<std::size_t>(size);
        std::string out(static_cast<std::size_t>(size), '\0');
        if (size != 0 && !take(out.data(), out.size())) damaged("it ends in the middle of a header");
        skip((block - size % block) % block);
        return out;
    }

    bool read_header(header& h) {
        if (!take(h.raw.data(), block)) return false;
        if (!h.zero()) return h.check_sum(), true;
        if (take(h.raw.data(), block) && !h.zero()) damaged("an entry follows an end mark");
        return false;
    }

    void fill(tar_entry& e, const header& h, extensions& x) {
        e.path = x.path ? std::move(*x.path) : x.gnu_path ? std::move(*x.gnu_path) : h.path();
        e.link = x.link ? std::move(*x.link) : x.gnu_link ? std::move(*x.gnu_link) : std::string(until_nul(h.field(157, 100)));
        if (std::max(e.path.size(), e.link.size()) > limits.max_path_bytes)
            throw error{errc::corrupt, "a path in the tar archive is longer than the limit here"};
        e.type = type_of(h, e.path);
        if (e.path.empty()) damaged("an entry has no name");
        e.mode = static_cast<std::uint32_t>(number(h.field(100, 8)) & 07777);
        e.uid = id_of(x.uid ? *x.uid : number(h.field(108, 8)), "owner");
        e.gid = id_of(x.gid ? *x.gid : number(h.field(116, 8)), "group");
        e.mtime = x.mtime ? *x.mtime : fs::file_time{number(h.field(136, 12)), 0};
        e.size = 0;
        if (e.type == entry_type::file) {
            const std::int64_t size = x.size ? *x.size : h.size();
            if (size < 0 || size > (std::int64_t{1} << 62)) damaged("an entry has an impossible size");
            e.size = static_cast<std::uint64_t>(size);
        }
        const bool device = e.type == entry_type::char_device || e.type == entry_type::block_device;
        e.dev_major = device ? id_of(number(h.field(329, 8)), "device number") : 0;
        e.dev_minor = device ? id_of(number(h.field(337, 8)), "device number") : 0;
        e.xattrs = std::move(x.xattrs);
        body = e.size;
        padding = static_cast<std::size_t>((block - e.size % block) % block);
    }
};

tar_reader::tar_reader(byte_source in, tar_limits limits) : state_(std::make_unique<state>(state{std::move(in), limits})) {}
tar_reader::tar_reader(tar_reader&&) noexcept = default;
tar_reader::~tar_reader() = default;

bool tar_reader::next(tar_entry& entry) {
    state& s = *state_;
    if (s.ended) return false;
    s.finish_entry();
    extensions x;
    header h;
    while (s.read_header(h)) {
        if (++s.entries > s.limits.max_entries)
            throw error{errc::corrupt, cat("the tar archive has more than ", s.limits.max_entries, " entries, the limit here")};
        switch (h.type()) {
            case 'x': take_records(x, s.long_text(h, x)); continue;
            case 'g': s.long_text(h, x); continue;
            case 'L': x.gnu_path = until_nul(s.long_text(h, x)); continue;
            case 'K': x.gnu_link = until_nul(s.long_text(h, x)); continue;
            default: break;
        }
        s.fill(entry, h, x);
        return true;
    }
    if (x.bytes != 0 && (x.path || x.gnu_path || x.size)) damaged("it ends after an extended header");
    s.ended = true;
    return false;
}

std::span<const std::byte> tar_reader::data() {
    state& s = *state_;
    if (s.body == 0) return {};
    auto piece = s.some();
    if (piece.empty()) damaged("it ends in the middle of an entry");
    piece = piece.first(static_cast<std::size_t>(std::min<std::uint64_t>(piece.size(), s.body)));
    s.from += piece.size();
    s.body -= piece.size();
    return piece;
}

void tar_reader::drain() {
    while (!state_->some().empty()) state_->from = state_->to;
}

}  // namespace cobuild::archive

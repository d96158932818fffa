module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

module cobuild.dockerfile;

import cobuild.base;
import :detail;

// A pattern is pieces between stars. Pieces have a fixed length, so the shortest match takes each piece at its leftmost place
// and the longest the last piece at its rightmost: no backtracking. A piece is searched bit-parallel (Shift-And), one bit for
// each of its characters, so even a piece as long as half of a 64 KiB file stays cheap.

namespace cobuild::dockerfile::detail {

namespace {

using text32 = std::u32string;
using view32 = std::u32string_view;

// Bytes that are not UTF-8 keep a value of their own, above Unicode.
constexpr char32_t raw_byte = 0x110000;
constexpr char32_t any_one = 0xFFFFFFFF;

text32 widen(std::string_view text) {
    text32 out;
    out.reserve(text.size());
    for (std::size_t at = 0; at < text.size();) {
        const code_point p = decode(text, at);
        out += p.valid ? p.value : raw_byte + p.value;
        at += p.size;
    }
    return out;
}

std::string narrow(view32 text) {
    std::string out;
    out.reserve(text.size());
    for (const char32_t c : text) {
        if (c >= raw_byte)
            out += static_cast<char>(c - raw_byte);
        else
            append_utf8(out, c);
    }
    return out;
}

/// Searches one piece; `any_one` in it fits every character.
class piece {
public:
    explicit piece(text32 text) : text_(std::move(text)), words_((text_.size() + 63) / 64), any_(words_) {
        for (std::size_t i = 0; i < text_.size(); ++i) {
            const std::uint64_t bit = std::uint64_t{1} << i % 64;
            if (text_[i] == any_one) {
                any_[i / 64] |= bit;
            } else {
                auto& mask = masks_[text_[i]];
                if (mask.empty()) mask.resize(words_);
                mask[i / 64] |= bit;
            }
        }
        for (auto& [c, mask] : masks_)
            for (std::size_t w = 0; w < words_; ++w) mask[w] |= any_[w];
    }

    [[nodiscard]] std::size_t size() const { return text_.size(); }

    [[nodiscard]] bool fits_at(view32 value, std::size_t at) const {
        if (value.size() - at < text_.size()) return false;
        return std::equal(text_.begin(), text_.end(), value.begin() + static_cast<std::ptrdiff_t>(at),
                          [](char32_t p, char32_t v) { return p == any_one || p == v; });
    }

    /// Where it fits first (or last) at or after `from`.
    [[nodiscard]] std::optional<std::size_t> find(view32 value, std::size_t from, bool last) const {
        if (text_.empty()) return last ? value.size() : from;
        std::vector<std::uint64_t> state(words_);
        const std::uint64_t done = std::uint64_t{1} << (text_.size() - 1) % 64;
        std::optional<std::size_t> found;
        for (std::size_t i = from; i < value.size(); ++i) {
            const auto entry = masks_.find(value[i]);
            const auto& mask = entry == masks_.end() ? any_ : entry->second;
            std::uint64_t carry = 1;
            for (std::size_t w = 0; w < words_; ++w) {
                const std::uint64_t next = state[w] >> 63;
                state[w] = (state[w] << 1 | carry) & mask[w];
                carry = next;
            }
            if ((state.back() & done) == 0) continue;
            found = i + 1 - text_.size();
            if (!last) return found;
        }
        return found;
    }

private:
    text32 text_;
    std::size_t words_;
    std::vector<std::uint64_t> any_;
    std::unordered_map<char32_t, std::vector<std::uint64_t>> masks_;
};

class pattern {
public:
    pattern(std::string_view text, bool reversed) {
        std::vector<text32> pieces(1);
        const text32 wide = widen(text);
        for (std::size_t i = 0; i < wide.size(); ++i) {
            char32_t c = wide[i];
            if (c == U'*') {
                pieces.emplace_back();
                continue;
            }
            if (c == U'?') {
                c = any_one;
            } else if (c == U'\\') {
                c = escaped(text, wide, ++i);
            }
            pieces.back() += c;
        }
        if (reversed) {
            std::reverse(pieces.begin(), pieces.end());
            for (auto& p : pieces) std::reverse(p.begin(), p.end());
        }
        // Several stars in a row are one.
        for (std::size_t i = 0; i < pieces.size(); ++i)
            if (i == 0 || i + 1 == pieces.size() || !pieces[i].empty()) pieces_.emplace_back(std::move(pieces[i]));
    }

    [[nodiscard]] bool empty() const { return pieces_.size() == 1 && pieces_.front().size() == 0; }

    /// The end of the match that begins at `at`.
    [[nodiscard]] std::optional<std::size_t> match_at(view32 value, std::size_t at, bool longest) const {
        if (!pieces_.front().fits_at(value, at)) return std::nullopt;
        return match_rest(value, at + pieces_.front().size(), longest);
    }

    struct match {
        std::size_t begin, end;
    };
    /// The first, longest match at or after `from`. When the pieces behind the first do not fit after its leftmost place,
    /// they do not fit after any other.
    [[nodiscard]] std::optional<match> find(view32 value, std::size_t from) const {
        const auto begin = pieces_.front().find(value, from, false);
        if (!begin) return std::nullopt;
        const auto end = match_rest(value, *begin + pieces_.front().size(), true);
        return end ? std::optional(match{*begin, *end}) : std::nullopt;
    }

private:
    static char32_t escaped(std::string_view text, view32 wide, std::size_t i) {
        if (i < wide.size() && view32(U"}/*?\\").find(wide[i]) != view32::npos) return wide[i];
        throw error{errc::invalid,
                    cat("invalid pattern (", text, ") in substitution: invalid escape '\\", narrow(wide.substr(std::min(i, wide.size()), 1)), "'")};
    }

    [[nodiscard]] std::optional<std::size_t> match_rest(view32 value, std::size_t at, bool longest) const {
        for (std::size_t i = 1; i < pieces_.size(); ++i) {
            const auto place = pieces_[i].find(value, at, longest && i + 1 == pieces_.size());
            if (!place) return std::nullopt;
            at = *place + pieces_[i].size();
        }
        return at;
    }

    std::vector<piece> pieces_;
};

void append(std::string& out, std::string_view text) {
    if (out.size() + text.size() > max_expansion)
        throw error{errc::invalid, cat("the result of a substitution is longer than ", max_expansion, " bytes")};
    out += text;
}

}  // namespace

std::string trim_pattern(std::string_view value, std::string_view text, bool from_end, bool longest) {
    const pattern p(text, from_end);
    text32 wide = widen(value);
    if (from_end) std::reverse(wide.begin(), wide.end());
    const auto end = p.match_at(wide, 0, longest);
    if (!end) return std::string(value);
    wide.erase(0, *end);
    if (from_end) std::reverse(wide.begin(), wide.end());
    return narrow(wide);
}

std::string replace_pattern(std::string_view value, std::string_view text, std::string_view replacement, bool all) {
    const pattern p(text, false);
    const text32 wide = widen(value);
    const view32 view = wide;
    std::string out;
    std::size_t at = 0;
    for (std::optional<pattern::match> m = p.find(view, 0); m; m = p.find(view, at)) {
        append(out, narrow(view.substr(at, m->begin - at)));
        append(out, replacement);
        at = m->end;
        if (!all || at >= view.size()) break;
        if (m->end == m->begin) append(out, narrow(view.substr(at++, 1)));  // an empty match: on to the next character
    }
    append(out, narrow(view.substr(std::min(at, view.size()))));
    return out;
}

}  // namespace cobuild::dockerfile::detail

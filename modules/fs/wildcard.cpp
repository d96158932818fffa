module;
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

module cobuild.fs;

import cobuild.base;

namespace cobuild::fs {

// Takes one code point off the front; a byte that is not UTF-8 counts as U+FFFD, as in Go.
char32_t take_rune(std::string_view& s, bool* bad = nullptr) {
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(s[i]); };
    const unsigned first = byte(0);
    std::size_t size = first < 0x80                    ? 1
                       : first >= 0xc2 && first < 0xe0 ? 2
                       : first >= 0xe0 && first < 0xf0 ? 3
                       : first >= 0xf0 && first < 0xf5 ? 4
                                                       : 0;
    char32_t rune = first < 0x80 ? first : first & (0xffU >> (size + 1));
    for (std::size_t i = 1; i < size; ++i) {
        if (i >= s.size() || (byte(i) & 0xc0) != 0x80) {
            size = 0;
            break;
        }
        rune = rune << 6 | (byte(i) & 0x3f);
    }
    const bool overlong = (size == 3 && rune < 0x800) || (size == 4 && rune < 0x10000);
    if (size == 0 || overlong || rune > 0x10ffff || (rune >= 0xd800 && rune < 0xe000)) {
        if (bad != nullptr) *bad = true;
        s.remove_prefix(1);
        return 0xfffd;
    }
    s.remove_prefix(size);
    return rune;
}

std::string clean_path(std::string_view path) {
    const bool rooted = path.starts_with('/');
    std::vector<std::string_view> parts;
    for (const auto part : split(path, '/')) {
        if (part.empty() || part == ".") continue;
        if (part != "..")
            parts.push_back(part);
        else if (!parts.empty() && parts.back() != "..")
            parts.pop_back();
        else if (!rooted)
            parts.push_back(part);
    }
    std::string out = rooted ? "/" : "";
    for (std::size_t i = 0; i < parts.size(); ++i) out.append(i == 0 ? "" : "/").append(parts[i]);
    return out.empty() ? "." : out;
}

namespace {
struct malformed {};

char32_t class_member(std::string_view& chunk) {
    if (chunk.empty() || chunk[0] == '-' || chunk[0] == ']') throw malformed{};
    if (chunk[0] == '\\') chunk.remove_prefix(1);
    if (chunk.empty()) throw malformed{};
    bool bad = false;
    const char32_t rune = take_rune(chunk, &bad);
    if (bad || chunk.empty()) throw malformed{};
    return rune;
}

/// Parses the set at the front of `chunk`, after its '['.
bool in_class(std::string_view& chunk, char32_t rune) {
    bool negated = false;
    if (chunk.starts_with('^')) {
        negated = true;
        chunk.remove_prefix(1);
    }
    bool match = false;
    for (int ranges = 0;; ++ranges) {
        if (ranges > 0 && chunk.starts_with(']')) break;
        const char32_t low = class_member(chunk);
        char32_t high = low;
        if (chunk[0] == '-') {
            chunk.remove_prefix(1);
            high = class_member(chunk);
        }
        if (low <= rune && rune <= high) match = true;
    }
    chunk.remove_prefix(1);
    return match != negated;
}

/// The rest of `s` after the chunk, or empty. Goes on after a failure to find malformed patterns.
std::optional<std::string_view> match_chunk(std::string_view chunk, std::string_view s) {
    bool failed = false;
    while (!chunk.empty()) {
        if (s.empty()) failed = true;
        char c = chunk[0];
        chunk.remove_prefix(1);
        if (c == '[') {
            const char32_t rune = failed ? 0 : take_rune(s);
            if (!in_class(chunk, rune)) failed = true;
            continue;
        }
        if (c == '?') {
            if (failed) continue;
            if (s[0] == '/') failed = true;
            take_rune(s);
            continue;
        }
        if (c == '\\') {
            if (chunk.empty()) throw malformed{};
            c = chunk[0];
            chunk.remove_prefix(1);
        }
        if (failed) continue;
        if (c != s[0]) failed = true;
        s.remove_prefix(1);
    }
    if (failed) return std::nullopt;
    return s;
}

struct chunk_of_pattern {
    bool star = false;
    std::string_view text;
};

chunk_of_pattern take_chunk(std::string_view& pattern) {
    chunk_of_pattern out;
    while (pattern.starts_with('*')) {
        out.star = true;
        pattern.remove_prefix(1);
    }
    bool in_range = false;
    std::size_t i = 0;
    for (; i < pattern.size(); ++i) {
        if (pattern[i] == '\\') {
            if (i + 1 < pattern.size()) ++i;
        } else if (pattern[i] == '[')
            in_range = true;
        else if (pattern[i] == ']')
            in_range = false;
        else if (pattern[i] == '*' && !in_range)
            break;
    }
    out.text = pattern.substr(0, i);
    pattern.remove_prefix(i);
    return out;
}

std::optional<std::string_view> after_chunk(const chunk_of_pattern& chunk, std::string_view name, bool last) {
    const auto here = match_chunk(chunk.text, name);
    if (here && (here->empty() || !last)) return here;
    if (!chunk.star) return std::nullopt;
    for (std::size_t i = 0; i < name.size() && name[i] != '/'; ++i) {
        const auto there = match_chunk(chunk.text, name.substr(i + 1));
        if (there && (there->empty() || !last)) return there;
    }
    return std::nullopt;
}

bool match(std::string_view pattern, std::string_view name) {
    while (!pattern.empty()) {
        const chunk_of_pattern chunk = take_chunk(pattern);
        if (chunk.star && chunk.text.empty()) return name.find('/') == std::string_view::npos;
        const auto rest = after_chunk(chunk, name, pattern.empty());
        if (!rest) {
            while (!pattern.empty()) match_chunk(take_chunk(pattern).text, "");
            return false;
        }
        name = *rest;
    }
    return name.empty();
}
}  // namespace

bool wildcard_match(std::string_view pattern, std::string_view name) {
    try {
        return match(pattern, name);
    } catch (const malformed&) {
        throw error{errc::invalid, cat("malformed pattern ", quoted(pattern), " (an open [ or a \\ at the end?)")};
    }
}

bool has_wildcard(std::string_view pattern) noexcept { return pattern.find_first_of("*?[\\") != std::string_view::npos; }

}  // namespace cobuild::fs

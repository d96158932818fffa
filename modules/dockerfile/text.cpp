module;
#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

module cobuild.dockerfile;

import cobuild.base;
import :detail;

namespace cobuild::dockerfile::detail {

namespace {

struct span_of_points {
    char32_t first, last;
};

// Of what lies above ASCII. Not the whole of Unicode's tables: symbols and punctuation of the blocks that occur in text.
constexpr std::array<span_of_points, 20> not_letters{{
    {0x80, 0xA9},     {0xAB, 0xB4},     {0xB6, 0xB9},     {0xBB, 0xBF},     {0xD7, 0xD7},     {0xF7, 0xF7},       {0x300, 0x36F},
    {0x2000, 0x2070}, {0x2074, 0x207E}, {0x2080, 0x208F}, {0x20A0, 0x20FF}, {0x2150, 0x2182}, {0x2185, 0x2BFF},   {0x2E00, 0x2E7F},
    {0x3000, 0x3004}, {0x3007, 0x3030}, {0xD800, 0xF8FF}, {0xFE00, 0xFE6F}, {0xFF00, 0xFF20}, {0x1F000, 0x1FAFF},
}};
// Go prints these as escapes: controls, blanks other than U+0020, format characters, private use, noncharacters.
constexpr std::array<span_of_points, 21> not_printable{{
    {0x0, 0x1F},      {0x7F, 0xA0},     {0xAD, 0xAD},     {0x378, 0x379},   {0x600, 0x605},     {0x61C, 0x61C},     {0x6DD, 0x6DD},
    {0x70F, 0x70F},   {0x1680, 0x1680}, {0x180E, 0x180E}, {0x2000, 0x200F}, {0x2028, 0x202F},   {0x205F, 0x206F},   {0x3000, 0x3000},
    {0xD800, 0xF8FF}, {0xFEFF, 0xFEFF}, {0xFFF0, 0xFFFB}, {0xFFFE, 0xFFFF}, {0x110BD, 0x110BD}, {0x1D173, 0x1D17A}, {0xE0000, 0x10FFFF},
}};

template<std::size_t N>
bool within(const std::array<span_of_points, N>& spans, char32_t c) {
    return std::any_of(spans.begin(), spans.end(), [c](const span_of_points& s) { return c >= s.first && c <= s.last; });
}

}  // namespace

code_point decode(std::string_view text, std::size_t at) {
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[at + i]); };
    const unsigned char lead = byte(0);
    if (lead < 0x80) return {lead, 1, true};
    const std::size_t size = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    const code_point broken{lead, 1, false};
    if (lead < 0xC2 || lead > 0xF4 || text.size() - at < size) return broken;
    char32_t value = lead & (0x7FU >> size);
    for (std::size_t i = 1; i < size; ++i) {
        if ((byte(i) & 0xC0U) != 0x80U) return broken;
        value = value << 6 | (byte(i) & 0x3FU);
    }
    static constexpr std::array<char32_t, 5> least{0, 0, 0x80, 0x800, 0x10000};
    if (value < least[size] || value > 0x10FFFF || (value >= 0xD800 && value < 0xE000)) return broken;
    return {value, size, true};
}

void append_utf8(std::string& out, char32_t c) {
    const auto put = [&](char32_t v) { out += static_cast<char>(v); };
    if (c < 0x80) {
        put(c);
    } else if (c < 0x800) {
        put(0xC0 | c >> 6);
        put(0x80 | (c & 0x3F));
    } else if (c < 0x10000) {
        put(0xE0 | c >> 12);
        put(0x80 | (c >> 6 & 0x3F));
        put(0x80 | (c & 0x3F));
    } else {
        put(0xF0 | c >> 18);
        put(0x80 | (c >> 12 & 0x3F));
        put(0x80 | (c >> 6 & 0x3F));
        put(0x80 | (c & 0x3F));
    }
}

bool is_letter(char32_t c) {
    if (c < 0x80) return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    return !within(not_letters, c);
}

bool is_printable(char32_t c) { return !within(not_printable, c); }

std::string to_upper(std::string_view text) {
    std::string out(text);
    std::transform(out.begin(), out.end(), out.begin(), [](char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c; });
    return out;
}

std::string_view trim_left(std::string_view text) {
    const auto* const first = std::find_if_not(text.begin(), text.end(), is_blank);
    return text.substr(static_cast<std::size_t>(first - text.begin()));
}

std::string join(const std::vector<std::string>& list, std::string_view separator) {
    std::string out;
    for (std::size_t i = 0; i < list.size(); ++i) {
        if (i > 0) out += separator;
        out += list[i];
    }
    return out;
}

std::vector<std::string> csv_fields(std::string_view text) {
    std::vector<std::string> out;
    std::size_t at = 0;
    for (;;) {
        std::string field;
        if (at < text.size() && text[at] == '"') {
            for (++at;; ++at) {
                if (at >= text.size()) throw error{errc::invalid, cat("a quote is not closed in ", quoted(text))};
                if (text[at] == '"' && (at + 1 >= text.size() || text[at + 1] != '"')) break;
                if (text[at] == '"') ++at;
                field += text[at];
            }
            ++at;
        } else {
            const std::size_t end = std::min(text.find(',', at), text.size());
            field = text.substr(at, end - at);
            if (field.find('"') != std::string::npos)
                throw error{errc::invalid, cat("a quote stands inside of a field in ", quoted(text), ": put the whole field into quotes")};
            at = end;
        }
        out.push_back(field);
        if (at >= text.size()) return out;
        if (text[at] != ',') throw error{errc::invalid, cat("text follows a closing quote in ", quoted(text))};
        ++at;
    }
}

std::optional<bool> parse_bool(std::string_view text) {
    static constexpr std::array<std::string_view, 6> yes{"1", "t", "T", "TRUE", "true", "True"}, no{"0", "f", "F", "FALSE", "false", "False"};
    if (std::find(yes.begin(), yes.end(), text) != yes.end()) return true;
    if (std::find(no.begin(), no.end(), text) != no.end()) return false;
    return std::nullopt;
}

}  // namespace cobuild::dockerfile::detail

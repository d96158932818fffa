module;
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

module cobuild.dockerfile;

import cobuild.base;
import :detail;

namespace cobuild::dockerfile {

using namespace detail;

namespace {

void append_hex(std::string& out, char32_t value, int digits) {
    for (int shift = (digits - 1) * 4; shift >= 0; shift -= 4) out += "0123456789abcdef"[value >> shift & 15U];
}

void append_quoted(std::string& out, const code_point& p, std::string_view bytes) {
    static constexpr std::string_view named = "\a\b\f\n\r\t\v\\\"", letters = "abfnrtv\\\"";
    if (!p.valid || (p.value < 0x80 && (p.value < 0x20 || p.value == 0x7F || p.value == '"' || p.value == '\\'))) {
        const std::size_t i = p.valid ? named.find(static_cast<char>(p.value)) : std::string_view::npos;
        out += '\\';
        if (i != std::string_view::npos) {
            out += letters[i];
        } else {
            out += 'x';
            append_hex(out, p.value, 2);
        }
    } else if (is_printable(p.value)) {
        out += bytes;
    } else {
        out += p.value < 0x10000 ? "\\u" : "\\U";
        append_hex(out, p.value, p.value < 0x10000 ? 4 : 8);
    }
}

}  // namespace

std::string go_quote(std::string_view text) {
    std::string out = "\"";
    for (std::size_t at = 0; at < text.size();) {
        const code_point p = decode(text, at);
        append_quoted(out, p, text.substr(at, p.size));
        at += p.size;
    }
    return out + '"';
}

std::string go_quote_list(const std::vector<std::string>& list) {
    std::vector<std::string> quoted;
    for (const auto& item : list) quoted.push_back(go_quote(item));
    return cat('[', join(quoted, " "), ']');
}

std::string go_list(const std::vector<std::string>& list) { return cat('[', join(list, " "), ']'); }

}  // namespace cobuild::dockerfile

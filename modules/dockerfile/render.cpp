module;
#include <algorithm>
#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

module cobuild.dockerfile;

import cobuild.base;
import :detail;

namespace cobuild::dockerfile {

using namespace detail;

namespace {

constexpr std::string_view rule_line = "--------------------\n";
constexpr std::size_t errors_shown = 20;

std::string dump_flags(const node& n) {
    if (n.flags.empty()) return {};
    std::string out = " [";
    for (const auto& flag : n.flags) out += cat(out.size() > 2 ? " " : "", go_quote(flag));
    return out + "]";
}

std::string padded(unsigned number) {
    const std::string digits = cat(number);
    return std::string(digits.size() < 3 ? 3 - digits.size() : 0, ' ') + digits;
}

/// A line of the user's file as it may be shown: tabs stay, other control characters do not reach the terminal.
std::string shown(std::string_view line) {
    std::string out;
    for (const char c : line) {
        const auto u = static_cast<unsigned char>(c);
        if ((u < 0x20 && c != '\t') || u == 0x7f) {
            const std::string escaped = go_quote(std::string_view(&c, 1));
            out += std::string_view(escaped).substr(1, escaped.size() - 2);
        } else {
            out += c;
        }
    }
    return out;
}

/// Columns of a terminal, as far as one code point is one.
std::size_t width_of(std::string_view text) {
    return std::max<std::size_t>(
        1, static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0U) != 0x80; })));
}

/// As wide as `text`: its tabs, and a blank for everything else.
std::string blanks_for(std::string_view text) {
    std::string out;
    for (const char c : text)
        if ((static_cast<unsigned char>(c) & 0xc0U) != 0x80) out += c == '\t' ? '\t' : ' ';
    return out;
}

struct window {
    unsigned first, last;
};

/// Up to four lines around a single one, up to two around several, evenly on both sides as far as the file reaches.
window around(line_range lines, unsigned count) {
    window w{lines.first, std::min(std::max(lines.first, lines.last), count)};
    const int wanted = w.first == w.last ? 4 : 2;
    for (int shown = 0; shown < wanted; ++shown) {
        if (w.first > 1) {
            --w.first;
            ++shown;
        }
        if (w.last != count) {
            ++w.last;
            ++shown;
        }
    }
    return w;
}

}  // namespace

std::string dump(const node& n) {
    std::string out = n.keyword;
    std::transform(out.begin(), out.end(), out.begin(), [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; });
    out += dump_flags(n);
    for (const auto& arg : n.args) out += cat(' ', go_quote(arg));
    for (const auto& inner : n.trigger) out += cat(" (", dump(inner), ')');
    return out;
}

std::string dump(const file& f) {
    std::string out;
    for (const auto& n : f.nodes) out += cat('(', dump(n), ")\n");
    return out;
}

namespace detail {

std::string draw_source(std::string_view name, std::string_view text, line_range lines, const std::optional<caret>& mark) {
    const auto count = static_cast<unsigned>(std::count(text.begin(), text.end(), '\n')) + 1;
    if (lines.first == 0 || lines.first > count) return {};
    const window w = around(lines, count);
    std::string out = cat(name, ':', lines.first, '\n', rule_line);
    std::size_t at = 0;
    for (unsigned number = 1; number <= w.last; ++number) {
        const std::size_t end = std::min(text.find('\n', at), text.size());
        if (number >= w.first) {
            std::string_view line = text.substr(at, end - at);
            if (line.ends_with('\r')) line.remove_suffix(1);
            const bool named = number >= lines.first && number <= std::max(lines.first, lines.last);
            out += cat(' ', padded(number), " | ", named ? ">>>" : "   ", ' ', shown(line), '\n');
            if (mark && mark->line == number)
                out += cat(' ', std::string(padded(number).size(), ' '), " |     ", blanks_for(shown(line.substr(0, mark->column))),
                           std::string(width_of(shown(line.substr(mark->column, mark->length))), '^'), '\n');
        }
        at = std::min(end + 1, text.size());
    }
    return out + std::string(rule_line);
}

}  // namespace detail

std::string render_source(std::string_view name, std::string_view text, line_range lines) { return draw_source(name, text, lines, {}); }

std::string render_source(const file& f, line_range lines) { return render_source(f.name, f.text, lines); }

error to_error(const file& f, std::span<const diagnostic> errors) {
    std::string message = errors.front().message;
    for (std::size_t i = 1; i < errors.size() && i <= errors_shown; ++i) message += cat("; line ", errors[i].lines.first, ": ", errors[i].message);
    if (errors.size() > errors_shown + 1) message += cat("; and ", errors.size() - errors_shown - 1, " more errors");
    return error{errc::invalid, message}.at({f.name, errors.front().lines.first});
}

}  // namespace cobuild::dockerfile

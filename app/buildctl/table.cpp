#include <algorithm>
#include <functional>
#include <iostream>
#include <string>
#include <string_view>
#include <vector>

#include "buildctl.hpp"

namespace cobuild::buildctl {

namespace {

/// Characters, not bytes.
std::size_t width_of(std::string_view text) {
    return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0U) != 0x80U; }));
}

}  // namespace

void table::line(std::string_view text) {
    std::vector<std::string> cells;
    for (const auto cell : split(text, '\t')) cells.emplace_back(cell);
    lines_.push_back(std::move(cells));
}

void table::print(std::string& out, std::size_t line, const std::vector<std::size_t>& widths) const {
    const auto& cells = lines_[line];
    for (std::size_t i = 0; i < cells.size(); ++i) {
        out += cells[i];
        if (i + 1 == cells.size() || i >= widths.size()) continue;
        const auto have = width_of(cells[i]);
        if (!tab_) {
            out.append(widths[i] - have, ' ');
            continue;
        }
        const auto full = (widths[i] + 7) / 8 * 8;
        out.append((full - have + 7) / 8, '\t');
    }
    out += '\n';
}

void table::format(std::string& out, std::size_t from, std::size_t to, std::vector<std::size_t>& widths) const {
    const auto column = widths.size();
    for (std::size_t at = from; at < to; ++at) {
        if (column + 1 >= lines_[at].size()) continue;
        for (; from < at; ++from) print(out, from, widths);
        std::size_t width = 1;
        for (; at < to && column + 1 < lines_[at].size(); ++at) width = std::max(width, width_of(lines_[at][column]) + 1);
        widths.push_back(width);
        format(out, from, at, widths);
        widths.pop_back();
        from = at--;
    }
    for (; from < to; ++from) print(out, from, widths);
}

std::string table::text() const {
    std::string out;
    std::vector<std::size_t> widths;
    format(out, 0, lines_.size(), widths);
    return out;
}

bool wants_json(const std::string& format) {
    if (format.empty()) return false;
    std::string plain;
    for (const char c : format)
        if (c != ' ') plain += c;
    if (plain == "json" || plain == "{{json.}}") return true;
    throw error{errc::unsupported, cat("--format ", quoted(format), ": other templates than '{{json .}}' are not supported yet")};
}

void print_json(const json::value& v) { std::cout << json::serialize(v, {.indent = false, .escape_html = false, .sorted = false}) << "\n"; }

std::string go_time(progress::time_point t) {
    auto text = format_time(t);
    std::replace(text.begin(), text.end(), 'T', ' ');
    if (text.ends_with('Z')) text.replace(text.size() - 1, 1, " +0000 UTC");
    return text;
}

}  // namespace cobuild::buildctl

module;
#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

module cobuild.dockerfile;

import cobuild.base;
import :detail;

namespace cobuild::dockerfile {

using namespace detail;

namespace detail {

std::optional<directive> match_directive(std::string_view line, std::string_view comment_mark) {
    static constexpr std::array<std::string_view, 3> known{"syntax", "escape", "check"};
    if (!line.starts_with(comment_mark)) return std::nullopt;
    line = trim(line.substr(comment_mark.size()));
    const std::size_t equals = line.find('=');
    if (equals == std::string_view::npos) return std::nullopt;
    std::string name = to_lower(trim(line.substr(0, equals)));
    const std::string_view value = trim(line.substr(equals + 1));
    if (value.empty() || std::find(known.begin(), known.end(), name) == known.end()) return std::nullopt;
    return directive{std::move(name), std::string(value), 0};
}

}  // namespace detail

namespace {

std::string_view take_line(std::string_view& text) {
    const std::size_t end = text.find('\n');
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    return line;
}

std::optional<syntax_request> find_in_comments(std::string_view name, std::string_view text, unsigned line, std::string_view mark) {
    while (!text.empty()) {
        ++line;
        const auto found = match_directive(trim_left(take_line(text)), mark);
        if (!found) return std::nullopt;
        if (found->name == name) return syntax_request{found->value.substr(0, found->value.find(' ')), found->value, line};
    }
    return std::nullopt;
}

/// The string member `name` of the JSON object that the text is, read without building a tree: the object's own members
/// stand at depth one, and a key is a string before a colon.
std::optional<std::string> json_member(std::string_view name, std::string_view text) {
    text = trim(text);
    if (text.size() < 2 || text.front() != '{' || text.back() != '}') return std::nullopt;
    std::size_t depth = 0;
    const std::string key = cat('"', name, '"');
    for (std::size_t at = 0; at < text.size(); ++at) {
        const char c = text[at];
        if (c == '{' || c == '[') ++depth;
        if (c == '}' || c == ']') --depth;
        if (c != '"') continue;
        std::size_t end = at + 1;
        while (end < text.size() && text[end] != '"') end += text[end] == '\\' ? 2 : 1;
        if (end >= text.size()) return std::nullopt;
        const bool ours = depth == 1 && text.substr(at, end + 1 - at) == key;
        at = end;
        if (!ours) continue;
        std::string_view rest = trim_left(text.substr(end + 1));
        if (!rest.starts_with(':')) continue;
        rest = trim_left(rest.substr(1));
        if (!rest.starts_with('"')) return std::nullopt;
        std::size_t close = 1;
        while (close < rest.size() && rest[close] != '"') close += rest[close] == '\\' ? 2 : 1;
        if (close >= rest.size()) return std::nullopt;
        const auto value = parse_json_list(cat('[', rest.substr(0, close + 1), ']'));
        return value.list && value.list->size() == 1 ? std::optional(value.list->front()) : std::nullopt;
    }
    return std::nullopt;
}

std::optional<syntax_request> detect(std::string_view name, std::string_view text, bool any_form) {
    if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);
    unsigned line = 0;
    if (text.starts_with("#!")) {
        take_line(text);
        ++line;
    }
    if (auto found = find_in_comments(name, text, line, "#")) return found;
    if (!any_form) return std::nullopt;
    if (auto found = find_in_comments(name, text, line, "//")) return found;
    if (auto value = json_member(name, text)) return syntax_request{*value, *value, line};
    return std::nullopt;
}

}  // namespace

std::optional<syntax_request> detect_syntax(std::string_view text) { return detect("syntax", text, true); }
std::optional<syntax_request> detect_directive(std::string_view name, std::string_view text) { return detect(name, text, false); }

}  // namespace cobuild::dockerfile

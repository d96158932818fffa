module;
#include <algorithm>
#include <charconv>
#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

module cobuild.dockerfile;

import cobuild.base;
import :detail;

namespace cobuild::dockerfile {

using namespace detail;

namespace {

constexpr std::string_view next_error = "; line ";
constexpr unsigned longest_instruction = 200;  ///< lines that are searched for the place
constexpr std::size_t most_candidates = 64;

bool is_word(char c) { return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }

/// What stands between two marks of one kind, in order.
void add_quoted(std::vector<std::string_view>& out, std::string_view message, char mark) {
    for (std::size_t at = 0; (at = message.find(mark, at)) != std::string_view::npos;) {
        // An apostrophe within a word ("can't") opens nothing.
        if (mark == '\'' && at > 0 && is_word(message[at - 1])) {
            ++at;
            continue;
        }
        const auto end = message.find(mark, at + 1);
        if (end == std::string_view::npos) return;
        if (end > at + 1) out.push_back(message.substr(at + 1, end - at - 1));
        at = end + 1;
    }
}

/// What a message may mean, the likeliest first: what it quotes, what stands behind its colons, its flags and words.
std::vector<std::string_view> candidates(std::string_view message) {
    std::vector<std::string_view> out;
    if (const auto hint = message.find(" (did you mean "); hint != std::string_view::npos) message = message.substr(0, hint);
    add_quoted(out, message, '"');
    add_quoted(out, message, '\'');
    for (std::size_t at = message.size(); at > 0 && (at = message.rfind(": ", at - 1)) != std::string_view::npos;) {
        const auto rest = message.substr(at + 2);
        out.push_back(rest);
        out.push_back(rest.substr(0, rest.find_first_of(" ;,")));
        if (out.size() > most_candidates) break;
    }
    std::vector<std::string_view> words;
    for (const auto word : split(message, ' '))
        if (word.find_first_not_of(",:;") != std::string_view::npos) words.push_back(word.substr(0, word.find_last_not_of(",:;") + 1));
    for (const auto word : words)
        if (word.starts_with("--") || word.find('$') != std::string_view::npos) out.push_back(word);
    for (const auto word : words)
        if (word.size() > 1 && word == to_upper(word)) out.push_back(word);
    for (const auto word : words)
        if (word.find_first_not_of("0123456789") == std::string_view::npos) out.push_back(word);
    if (out.size() > most_candidates) out.resize(most_candidates);
    return out;
}

/// As a whole word of the line.
std::optional<std::size_t> find_word(std::string_view line, std::string_view word) {
    for (std::size_t at = 0; (at = line.find(word, at)) != std::string_view::npos; ++at) {
        const bool left = at == 0 || !is_word(word.front()) || !is_word(line[at - 1]);
        const auto end = at + word.size();
        const bool right = end == line.size() || !is_word(word.back()) || !is_word(line[end]);
        if (left && right) return at;
    }
    return std::nullopt;
}

bool continues(std::string_view line) {
    const auto last = line.find_last_not_of(" \t\r");
    return last != std::string_view::npos && (line[last] == '\\' || line[last] == '`');
}

/// The lines of the place, to the end of the instruction when only its first is known.
std::vector<std::string_view> lines_at(std::string_view text, line_range lines) {
    std::vector<std::string_view> out;
    std::size_t at = 0;
    for (unsigned number = 1; at <= text.size(); ++number) {
        const auto end = std::min(text.find('\n', at), text.size());
        if (number >= lines.first) {
            auto line = text.substr(at, end - at);
            if (line.ends_with('\r')) line.remove_suffix(1);
            out.push_back(line);
            const bool more = number < lines.last || (lines.last <= lines.first && continues(line));
            if (!more || out.size() >= longest_instruction) break;
        }
        at = end + 1;
    }
    return out;
}

std::optional<caret> find_place(std::string_view text, line_range lines, std::string_view message) {
    const auto shown = lines_at(text, lines);
    if (shown.empty()) return std::nullopt;
    for (const auto word : candidates(message)) {
        if (word.empty()) continue;
        for (std::size_t i = 0; i < shown.size(); ++i)
            if (const auto at = find_word(shown[i], word)) return caret{lines.first + static_cast<unsigned>(i), *at, word.size()};
    }
    const auto first = shown.front().find_first_not_of(" \t");
    if (first == std::string_view::npos) return std::nullopt;
    const auto end = std::min(shown.front().find_first_of(" \t", first), shown.front().size());
    return caret{lines.first, first, end - first};
}

}  // namespace

std::string_view likely_word(std::string_view word, std::span<const std::string_view> candidates) { return likely(word, candidates); }

std::string render_error(std::string_view name, std::string_view text, line_range lines, std::string_view message) {
    const auto mark = find_place(text, lines, message);
    if (mark && mark->line > std::max(lines.first, lines.last)) lines.last = mark->line;
    return draw_source(name, text, lines, mark);
}

std::vector<diagnostic> split_error(const error& e) {
    std::vector<diagnostic> out;
    std::string_view rest = e.what();
    unsigned line = e.where() ? e.where()->line : 0;
    for (;;) {
        std::size_t at = 0;
        unsigned next = 0;
        const char* end = nullptr;
        while ((at = rest.find(next_error, at)) != std::string_view::npos) {
            const auto digits = rest.substr(at + next_error.size());
            const auto [stop, failed] = std::from_chars(digits.data(), digits.data() + digits.size(), next);
            end = stop;
            if (failed == std::errc{} && std::string_view(stop, static_cast<std::size_t>(rest.data() + rest.size() - stop)).starts_with(": ")) break;
            ++at;
        }
        out.push_back({std::string(rest.substr(0, at)), {line, line}});
        if (at == std::string_view::npos) return out;
        line = next;
        rest = std::string_view(end + 2, static_cast<std::size_t>(rest.data() + rest.size() - end) - 2);
    }
}

}  // namespace cobuild::dockerfile

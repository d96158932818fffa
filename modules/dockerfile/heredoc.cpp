module;
#include <algorithm>
#include <cstddef>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.dockerfile;

import cobuild.base;
import :detail;

namespace cobuild::dockerfile {

using namespace detail;

namespace {

// The escape character of words that name here-documents is the shell's, whatever the file's directive says.
constexpr char shell_escape = '\\';

/// Moves `at` behind "<<" or "<<-" and the blanks after it, when a here-document word may begin there.
bool skip_marker(std::string_view text, std::size_t& at, std::string& word) {
    if (text.substr(at, 2) != "<<" || text.substr(at, 3) == "<<<") return false;
    word += "<<";
    at += 2;
    if (at < text.size() && text[at] == '-') {
        word += '-';
        ++at;
    }
    while (at < text.size() && (text[at] == ' ' || text[at] == '\t')) ++at;
    return true;
}

bool only_digits(std::string_view text) { return std::all_of(text.begin(), text.end(), is_digit); }

}  // namespace

std::optional<heredoc> parse_heredoc_word(std::string_view word) {
    const std::size_t marker = word.find("<<");
    if (marker == std::string_view::npos || !only_digits(word.substr(0, marker))) return std::nullopt;
    heredoc out;
    for (const char c : word.substr(0, marker))
        if (out.fd <= (std::numeric_limits<unsigned>::max() - 9) / 10) out.fd = out.fd * 10 + static_cast<unsigned>(c - '0');
    std::string_view rest = word.substr(marker + 2);
    if (rest.starts_with('-')) {
        out.chomp = true;
        rest.remove_prefix(1);
    }
    rest = trim_left(rest);
    if (rest.empty() || rest.find('<') != std::string_view::npos) return std::nullopt;
    char quote = 0;
    for (std::size_t i = 0; i < rest.size(); ++i) {
        const char c = rest[i];
        if (quote == 0 && is_blank(c)) {
            if (!trim(rest.substr(i)).empty()) return std::nullopt;
            break;
        }
        if (quote == 0 && (c == '\'' || c == '"')) {
            quote = c;
            out.expand = false;
        } else if (quote != 0 && c == quote) {
            quote = 0;
        } else if (c == shell_escape && quote != '\'' && i + 1 < rest.size() && (quote == 0 || rest[i + 1] == '"' || rest[i + 1] == shell_escape)) {
            out.name += rest[++i];
        } else {
            out.name += c;
        }
    }
    if (quote != 0 || out.name.empty()) return std::nullopt;
    return out;
}

namespace detail {

std::vector<std::string> heredoc_aware_words(std::string_view line) {
    std::vector<std::string> out;
    std::string word;
    bool in_word = false;
    bool digits = true;       // the word so far is a file descriptor's number
    unsigned arithmetic = 0;  // open "((": there "<<" is a shift
    const auto finish = [&] {
        if (in_word) out.push_back(std::exchange(word, {}));
        in_word = false;
        digits = true;
    };
    for (std::size_t at = 0; at < line.size();) {
        const char c = line[at];
        if (is_blank(c)) {
            finish();
            ++at;
            continue;
        }
        in_word = true;
        if (c == '<' && digits && arithmetic == 0 && skip_marker(line, at, word)) {
            digits = false;
            continue;
        }
        digits = digits && is_digit(c);
        if (c == '<') {  // "<<<", or "<<" inside of a word
            const std::size_t end = std::min(line.find_first_not_of('<', at), line.size());
            word += line.substr(at, end - at);
            at = end;
        } else if (c == shell_escape) {
            word += line.substr(at, 2);
            at += 2;
        } else if (c == '\'' || c == '"') {
            std::size_t end = at + 1;
            while (end < line.size() && line[end] != c) end += c == '"' && line[end] == shell_escape ? 2 : 1;
            if (end >= line.size()) return {};  // an open quote: the shell would not see a here-document either
            word += line.substr(at, end + 1 - at);
            at = end + 1;
        } else {
            const std::string_view two = line.substr(at, 2);
            const bool pair = two == "((" || (two == "))" && arithmetic > 0);
            if (pair) arithmetic += c == '(' ? 1U : -1U;
            word += pair ? two : two.substr(0, 1);
            at += pair ? 2 : 1;
        }
    }
    finish();
    return out;
}

bool takes_heredocs(const node& n) {
    const node& inner = n.trigger.empty() ? n : n.trigger.front();
    const std::string keyword = to_lower(inner.keyword);
    return !inner.json && (keyword == "run" || keyword == "copy" || keyword == "add");
}

}  // namespace detail

}  // namespace cobuild::dockerfile

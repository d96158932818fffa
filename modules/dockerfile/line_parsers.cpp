module;
#include <algorithm>
#include <array>
#include <cstddef>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.dockerfile;

import cobuild.base;
import :detail;

namespace cobuild::dockerfile::detail {

namespace {

/// How the arguments of an instruction are split; the order is that of `forms`.
enum class form { words, json_or_one, json_or_list, list, one, pairs, health, trigger };

struct keyword_form {
    std::string_view keyword;
    form how;
};
constexpr std::array<keyword_form, 18> forms{{
    {"add", form::json_or_list},
    {"arg", form::words},
    {"cmd", form::json_or_one},
    {"copy", form::json_or_list},
    {"entrypoint", form::json_or_one},
    {"env", form::pairs},
    {"expose", form::list},
    {"from", form::list},
    {"healthcheck", form::health},
    {"label", form::pairs},
    {"maintainer", form::one},
    {"onbuild", form::trigger},
    {"run", form::json_or_one},
    {"shell", form::json_or_one},
    {"stopsignal", form::one},
    {"user", form::one},
    {"volume", form::json_or_list},
    {"workdir", form::one},
}};

std::size_t first_blank(std::string_view text) {
    return std::min(static_cast<std::size_t>(std::find_if(text.begin(), text.end(), is_blank) - text.begin()), text.size());
}

/// A scanner of words with quotes and escapes, for flags (which lose both) and for arguments (which keep them).
class word_scanner {
public:
    word_scanner(std::string_view text, char escape, bool keep) : text_(text), escape_(escape), keep_(keep) {}

    void skip_blanks() {
        while (at_ < text_.size() && is_blank(text_[at_])) ++at_;
    }
    [[nodiscard]] std::string_view rest() const { return text_.substr(at_); }

    /// The word at the current place; nothing when it is empty without having been quoted.
    std::optional<std::string> word() {
        std::string out;
        bool quoted_empty = false;
        char quote = 0;
        for (; at_ < text_.size(); ++at_) {
            const char c = text_[at_];
            if (quote == 0 && is_blank(c)) break;
            if (c == escape_ && !(keep_ && quote == '\'')) {
                if (at_ + 1 == text_.size()) continue;  // an escape at the end is dropped
                if (keep_) out += c;
                out += text_[++at_];
                continue;
            }
            if (quote == 0 && (c == '\'' || c == '"')) {
                quote = c;
                quoted_empty = true;
                if (keep_) out += c;
                continue;
            }
            if (quote != 0 && c == quote) {
                quote = 0;
                if (keep_) out += c;
                continue;
            }
            out += c;
        }
        if (out.empty() && !quoted_empty) return std::nullopt;
        return out;
    }

private:
    std::string_view text_;
    char escape_;
    bool keep_;
    std::size_t at_ = 0;
};

/// Takes `--flag` words from the front of `text`; `--` alone ends them.
std::vector<std::string> take_flags(std::string_view& text, char escape) {
    std::vector<std::string> flags;
    word_scanner in(text, escape, false);
    for (;;) {
        in.skip_blanks();
        if (!in.rest().starts_with("--")) break;
        auto word = in.word();
        if (word == "--") break;
        if (word) flags.push_back(*std::move(word));
    }
    text = trim(in.rest());
    return flags;
}

std::vector<std::string> split_list(std::string_view text) {
    std::vector<std::string> out;
    for (text = trim(text); !text.empty(); text = trim_left(text)) {
        const std::size_t end = first_blank(text);
        out.emplace_back(text.substr(0, end));
        text.remove_prefix(end);
    }
    return out;
}

void parse_pairs(node& n, std::string_view rest, char escape) {
    const std::string name = to_upper(n.keyword);
    const auto words = split_words(rest, escape);
    if (words.empty()) return;
    if (words.front().find('=') == std::string::npos) {
        const std::size_t end = first_blank(rest);
        if (end == rest.size()) {
            n.problem = cat(name, " must have two arguments");
            return;
        }
        n.args = {std::string(rest.substr(0, end)), std::string(trim_left(rest.substr(end))), ""};
        return;
    }
    for (const auto& word : words) {
        const std::size_t equals = word.find('=');
        if (equals == std::string::npos) {
            n.problem = cat("Syntax error - can't find = in ", quoted(word), ". Must be of the form: name=value");
            return;
        }
        n.args.push_back(word.substr(0, equals));
        n.args.push_back(word.substr(equals + 1));
        n.args.emplace_back("=");
    }
}

/// JSON array into the arguments; false when the text is none.
bool take_json(node& n, std::string_view rest) {
    auto found = parse_json_list(rest);
    if (!found.list) return false;
    n.json = true;
    std::move(found.list->begin(), found.list->end(), std::back_inserter(n.args));
    return true;
}

void parse_health(node& n, std::string_view rest) {
    if (rest.empty()) return;
    const std::size_t end = first_blank(rest);
    n.args.emplace_back(rest.substr(0, end));
    const std::string_view command = trim_left(rest.substr(end));
    if (!command.empty() && !take_json(n, command)) n.args.emplace_back(command);
}

void parse_trigger(node& n, std::string_view rest, char escape) {
    if (rest.empty()) return;
    const std::string keyword = to_lower(rest.substr(0, first_blank(rest)));
    if (keyword == "onbuild") {  // not followed: a chain could be as long as the file
        n.problem = "Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed";
        return;
    }
    node inner = parse_logical_line(std::string(rest), escape);
    n.problem = inner.problem;
    n.trigger.push_back(std::move(inner));
}

/// COPY, ADD and VOLUME: at every blank, but a here-document's marker and quoted name stay together.
std::vector<std::string> split_paths(const node& n, std::string_view rest) {
    if (rest.find("<<") != std::string_view::npos && to_lower(n.keyword) != "volume")
        if (auto words = heredoc_aware_words(rest); !words.empty()) return words;
    return split_list(rest);
}

void parse_arguments(node& n, form how, std::string_view rest, char escape) {
    switch (how) {
        case form::words: n.args = split_words(rest, escape); break;
        case form::json_or_one:
            if (!rest.empty() && !take_json(n, rest)) n.args.emplace_back(rest);
            break;
        case form::json_or_list:
            if (!rest.empty() && !take_json(n, rest)) n.args = split_paths(n, rest);
            break;
        case form::list: n.args = split_list(rest); break;
        case form::one:
            if (!rest.empty()) n.args.emplace_back(rest);
            break;
        case form::pairs: parse_pairs(n, rest, escape); break;
        case form::health: parse_health(n, rest); break;
        case form::trigger: parse_trigger(n, rest, escape); break;
    }
}

}  // namespace

std::vector<std::string> split_words(std::string_view text, char escape) {
    std::vector<std::string> out;
    word_scanner in(text, escape, true);
    for (in.skip_blanks(); !in.rest().empty(); in.skip_blanks())
        if (auto word = in.word()) out.push_back(*std::move(word));
    return out;
}

node parse_logical_line(std::string line, char escape) {
    node n;
    n.original = std::move(line);
    std::string_view rest = trim(n.original);
    const std::size_t end = first_blank(rest);
    n.keyword = rest.substr(0, end);
    rest.remove_prefix(end);
    n.flags = take_flags(rest, escape);
    const std::string lower = to_lower(n.keyword);
    const auto* const known = std::find_if(forms.begin(), forms.end(), [&](const keyword_form& f) { return f.keyword == lower; });
    if (known == forms.end()) return n;
    try {
        parse_arguments(n, known->how, rest, escape);
    } catch (const error& e) {
        n.problem = e.what();
    }
    return n;
}

}  // namespace cobuild::dockerfile::detail

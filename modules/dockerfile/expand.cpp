module;
#include <algorithm>
#include <cstddef>
#include <functional>
#include <iterator>
#include <optional>
#include <set>
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

struct settings {
    char escape = '\\';
    bool quotes = true;  ///< quotes have a meaning
    bool keep_quotes = false;
    bool keep_unset = false;  ///< an unset variable stays as written
    bool words = false;       ///< split at blanks
};

constexpr char end_of_text = '\0';

class expander_run {
public:
    expander_run(std::string_view text, const lookup& variables, settings s) : text_(text), variables_(variables), settings_(s) {}

    std::string run() {
        std::string out = until(end_of_text, false, 0);
        finish_word();
        return out;
    }

    std::vector<std::string> words() { return std::move(words_); }
    [[nodiscard]] std::vector<std::string> matched() const { return {matched_.begin(), matched_.end()}; }
    [[nodiscard]] std::vector<std::string> unmatched() const { return {unmatched_.begin(), unmatched_.end()}; }

private:
    [[noreturn]] static void fail(std::string message) { throw error{errc::invalid, std::move(message)}; }
    [[nodiscard]] bool at_end() const { return at_ >= text_.size(); }
    [[nodiscard]] char peek() const { return text_[at_]; }

    void append(std::string& out, std::string_view text) {
        written_ += text.size();
        if (written_ > max_expansion) fail(cat("the result of the expansion is longer than ", max_expansion, " bytes"));
        out += text;
    }

    // Words are made at the outermost level only.
    void plain(std::string_view text, std::size_t depth) {
        if (!settings_.words || depth > 0) return;
        for (const char c : text) {
            if (is_blank(c))
                finish_word();
            else
                word_ += c, in_word_ = true;
        }
    }
    void literal(std::string_view text, std::size_t depth) {
        if (!settings_.words || depth > 0) return;
        word_ += text;
        in_word_ = true;
    }
    void finish_word() {
        if (in_word_ && !word_.empty()) words_.push_back(std::exchange(word_, {}));
        in_word_ = false;
    }

    /// Expands up to `stop`, which is taken. `raw`: escapes stay in the result, for a pattern reads them.
    std::string until(char stop, bool raw, std::size_t depth) {
        if (depth > max_nesting) fail(cat("substitutions are nested deeper than ", max_nesting));
        std::string out;
        while (!at_end()) {
            const char c = peek();
            if (stop != end_of_text && c == stop) {
                ++at_;
                return out;
            }
            if (c == '$') {
                const std::string value = dollar(depth);
                append(out, value);
                plain(value, depth);
            } else if (settings_.quotes && (c == '\'' || c == '"')) {
                const std::string value = c == '\'' ? single_quotes() : double_quotes(raw, depth);
                append(out, value);
                literal(value, depth);
            } else if (c == settings_.escape) {
                ++at_;
                std::string_view kept = text_.substr(at_ - (raw ? 1 : 0), raw ? 2 : 1);
                if (raw && at_end()) kept = text_.substr(at_ - 1, 1);
                append(out, kept);
                literal(kept, depth);
                at_ = std::min(at_ + 1, text_.size());
            } else {
                const std::size_t end = plain_end(stop);
                append(out, text_.substr(at_, end - at_));
                plain(text_.substr(at_, end - at_), depth);
                at_ = end;
            }
        }
        if (stop == '/') fail("syntax error: missing '/' in ${}");
        if (stop == '}') fail("syntax error: missing '}'");
        return out;
    }

    [[nodiscard]] std::size_t plain_end(char stop) const {
        std::size_t end = at_ + 1;
        for (; end < text_.size(); ++end) {
            const char c = text_[end];
            if (c == '$' || c == settings_.escape || (stop != end_of_text && c == stop) || (settings_.quotes && (c == '\'' || c == '"'))) break;
        }
        return end;
    }

    std::string single_quotes() {
        const std::size_t end = text_.find('\'', at_ + 1);
        if (end == std::string_view::npos) fail("unexpected end of statement while looking for matching single-quote");
        std::string out(text_.substr(at_ + 1, end - at_ - 1));
        at_ = end + 1;
        return settings_.keep_quotes ? cat('\'', out, '\'') : out;
    }

    std::string double_quotes(bool raw, std::size_t depth) {
        std::string out;
        ++at_;
        if (settings_.keep_quotes) out += '"';
        for (;;) {
            if (at_end()) fail("unexpected end of statement while looking for matching double-quote");
            const char c = peek();
            if (c == '$') {
                append(out, dollar(depth));
                continue;
            }
            ++at_;
            if (c == '"') {
                if (settings_.keep_quotes) out += '"';
                return out;
            }
            if (c == settings_.escape && !at_end()) {
                // In quotes only these are escaped; in a pattern any other escape character stands for itself.
                const char next = peek();
                if (raw) out += c;
                if (next == '"' || next == '$' || next == settings_.escape) {
                    out += next;
                    ++at_;
                } else {
                    out += c;
                }
                continue;
            }
            out += c;
        }
    }

    std::string dollar(std::size_t depth) {
        ++at_;
        if (at_end()) return "$";
        if (peek() != '{') {
            const std::string_view name = take_name();
            if (name.empty()) return "$";
            auto value = get(name);
            if (!value && settings_.keep_unset) return cat('$', name);
            return std::move(value).value_or("");
        }
        ++at_;
        if (at_end()) fail("syntax error: missing '}'");
        if (const char c = peek(); c == '{' || c == '}' || c == ':') fail("syntax error: bad substitution");
        return braces(depth);
    }

    std::string braces(std::size_t depth) {
        const std::string_view name = take_name();
        if (at_end()) fail("syntax error: missing '}'");
        std::string_view modifier = text_.substr(at_, code_point_size());
        if (name.empty())
            fail(std::string_view("+-?#%/=").find(modifier.front()) != std::string_view::npos ? std::string("syntax error: bad substitution")
                                                                                              : unsupported(modifier));
        at_ += modifier.size();
        if (modifier == "}") {
            auto value = get(name);
            if (!value && settings_.keep_unset) return cat("${", name, '}');
            return std::move(value).value_or("");
        }
        if (modifier == "/") return replacement(name, depth);
        const bool colon = modifier == ":";
        if (colon) {
            if (at_end()) fail("syntax error: missing '}'");
            const std::size_t size = code_point_size();
            modifier = text_.substr(at_ - 1, size + 1);
            at_ += size;
        }
        const char kind = modifier.back();
        const bool known = modifier.size() == (colon ? 2U : 1U) && std::string_view(colon ? "+-?" : "+-?#%").find(kind) != std::string_view::npos;
        if (!known) fail(unsupported(modifier));
        const std::string word = until('}', kind == '#' || kind == '%', depth + 1);
        auto value = get(name);
        if (!value && settings_.keep_unset) return cat("${", name, modifier, word, '}');
        return apply(name, kind, colon, word, std::move(value));
    }

    static std::string unsupported(std::string_view modifier) { return cat("unsupported modifier (", modifier, ") in substitution"); }

    static std::string apply(std::string_view name, char kind, bool colon, std::string_view word, std::optional<std::string> value) {
        const bool missing = !value || (colon && value->empty());
        switch (kind) {
            case '-': return missing ? std::string(word) : *std::move(value);
            case '+': return missing ? std::string() : std::string(word);
            case '?':
                if (!missing) return *std::move(value);
                fail(cat(name, ": ", !word.empty() ? word : std::string_view(value ? "is not allowed to be empty" : "is not allowed to be unset")));
            default: break;
        }
        const bool longest = word.starts_with(kind);
        return trim_pattern(value.value_or(""), word.substr(longest ? 1 : 0), kind == '%', longest);
    }

    std::string replacement(std::string_view name, std::size_t depth) {
        const bool all = !at_end() && peek() == '/';
        if (all) ++at_;
        const std::string pattern = until('/', true, depth + 1);
        const std::string with = until('}', true, depth + 1);
        const auto value = get(name);
        if (!value && settings_.keep_unset) return cat("${", name, '/', pattern, '/', with, '}');
        return replace_pattern(value.value_or(""), pattern, with, all);
    }

    [[nodiscard]] std::size_t code_point_size() const { return decode(text_, at_).size; }

    /// Letters, digits and "_"; a number and each special parameter are names of their own.
    std::string_view take_name() {
        const std::size_t start = at_;
        if (is_digit(peek())) {
            while (!at_end() && is_digit(peek())) ++at_;
        } else if (std::string_view("@*#?-$!").find(peek()) != std::string_view::npos) {
            ++at_;
        } else {
            while (!at_end()) {
                const code_point p = decode(text_, at_);
                if (!p.valid || (p.value != U'_' && !is_letter(p.value) && !is_digit(peek()))) break;
                at_ += p.size;
            }
        }
        return text_.substr(start, at_ - start);
    }

    std::optional<std::string> get(std::string_view name) {
        auto value = variables_ ? variables_(name) : std::nullopt;
        (value ? matched_ : unmatched_).emplace(name);
        return value;
    }

    std::string_view text_;
    const lookup& variables_;
    settings settings_;
    std::size_t at_ = 0;
    std::size_t written_ = 0;
    std::vector<std::string> words_;
    std::string word_;
    bool in_word_ = false;
    std::set<std::string> matched_, unmatched_;
};

template<class F>
auto with_context(std::string_view word, F f) {
    try {
        return f();
    } catch (error& e) {
        constexpr std::size_t shown = 200;
        throw std::move(e).with(cat("failed to process ", quoted(word.size() > shown ? cat(word.substr(0, shown), "...") : std::string(word))));
    }
}

}  // namespace

expansion expand_word(std::string_view word, const lookup& variables, char escape) {
    return with_context(word, [&] {
        expander_run run(word, variables, {.escape = escape});
        std::string text = run.run();
        return expansion{std::move(text), run.matched(), run.unmatched()};
    });
}

expansion_words expand_words(std::string_view word, const lookup& variables, char escape) {
    return with_context(word, [&] {
        expander_run run(word, variables, {.escape = escape, .words = true});
        run.run();
        return expansion_words{run.words(), run.matched(), run.unmatched()};
    });
}

expansion expand_heredoc(std::string_view content, const lookup& variables) {
    return with_context(content, [&] {
        expander_run run(content, variables, {.quotes = false});
        std::string text = run.run();
        return expansion{std::move(text), run.matched(), run.unmatched()};
    });
}

std::string expand_for_display(std::string_view text, const lookup& variables, char escape) {
    try {
        return expander_run(text, variables, {.escape = escape, .keep_quotes = true, .keep_unset = true}).run();
    } catch (const error&) {
        return std::string(text);
    }
}

}  // namespace cobuild::dockerfile

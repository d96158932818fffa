module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.fs;

import cobuild.base;

namespace cobuild::fs {

char32_t take_rune(std::string_view& s, bool* bad);  // wildcard.cpp

namespace {
// moby/patternmatcher turns a pattern into a Go regular expression, text by text; what `[`, `\` and `^` mean there, not
// what they mean to filepath.Match, decides what matches. So the same text is made here and then parsed.
struct translated {
    enum class kind { exact, prefix, suffix, regex } how = kind::exact;
    std::string regex;
};

void put_rune(std::string& out, std::string_view& s) {
    const std::string_view before = s;
    bool bad = false;
    take_rune(s, &bad);
    out += bad ? std::string_view("\xef\xbf\xbd") : before.substr(0, before.size() - s.size());
}

translated translate(std::string_view p) {
    using kind = translated::kind;
    translated t;
    for (int i = 0; !p.empty(); ++i) {
        const char c = p[0];
        if (c == '*' && p.starts_with("**")) {
            p.remove_prefix(2);
            if (p.starts_with('/')) p.remove_prefix(1);
            if (!p.empty()) {
                t.regex += "(.*/)?";
                t.how = kind::regex;
            } else if (t.how == kind::exact) {
                t.how = kind::prefix;
            } else {
                t.regex += ".*";
                t.how = kind::regex;
            }
            if (i == 0) t.how = kind::suffix;
            continue;
        }
        if (c == '*' || c == '?') {
            t.regex += c == '*' ? "[^/]*" : "[^/]";
            t.how = kind::regex;
            p.remove_prefix(1);
        } else if (std::string_view(".+()|{}$").find(c) != std::string_view::npos) {
            t.regex += '\\';
            t.regex += c;
            p.remove_prefix(1);
        } else if (c == '\\') {
            p.remove_prefix(1);
            t.regex += '\\';
            if (p.empty()) continue;
            put_rune(t.regex, p);
            t.how = kind::regex;
        } else {
            if (c == '[' || c == ']') t.how = kind::regex;
            put_rune(t.regex, p);
        }
    }
    return t;
}

struct malformed {};

/// A set of code points.
struct rune_set {
    std::vector<std::pair<char32_t, char32_t>> ranges;
    bool negated = false;
    void add(char32_t low, char32_t high) { ranges.emplace_back(low, high); }
    [[nodiscard]] bool has(char32_t r) const {
        return std::ranges::any_of(ranges, [r](const auto& p) { return p.first <= r && r <= p.second; }) != negated;
    }
};

void add_named(rune_set& set, std::string_view name) {
    if (name == "d" || name == "digit") return set.add('0', '9');
    if (name == "upper") return set.add('A', 'Z');
    if (name == "lower") return set.add('a', 'z');
    if (name == "blank") return set.add(' ', ' '), set.add('\t', '\t');
    if (name == "cntrl") return set.add(0, 0x1f), set.add(0x7f, 0x7f);
    if (name == "graph") return set.add('!', '~');
    if (name == "print") return set.add(' ', '~');
    if (name == "ascii") return set.add(0, 0x7f);
    if (name == "s") return set.add('\t', '\n'), set.add('\f', '\r'), set.add(' ', ' ');
    if (name == "space") return set.add('\t', '\r'), set.add(' ', ' ');
    if (name == "punct") return set.add('!', '/'), set.add(':', '@'), set.add('[', '`'), set.add('{', '~');
    if (name == "xdigit") return set.add('0', '9'), set.add('A', 'F'), set.add('a', 'f');
    if (name != "w" && name != "word" && name != "alpha" && name != "alnum") throw malformed{};
    set.add('A', 'Z');
    set.add('a', 'z');
    if (name != "alpha") set.add('0', '9');
    if (name == "w" || name == "word") set.add('_', '_');
}

/// What stands after a backslash: one code point, or (then empty) a class added to `set`.
std::optional<char32_t> escape(std::string_view& re, rune_set& set) {
    if (re.empty()) throw malformed{};
    const char32_t c = take_rune(re, nullptr);
    if (c == 'd' || c == 's' || c == 'w') return add_named(set, std::string(1, static_cast<char>(c))), std::nullopt;
    const std::string_view letters = "afnrtv";
    const std::string_view meanings = "\a\f\n\r\t\v";
    const bool ascii = c < 0x80;
    if (const auto i = letters.find(static_cast<char>(c)); ascii && i != std::string_view::npos) return static_cast<char32_t>(meanings[i]);
    const bool word = ascii && ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'));
    if (word || !ascii) throw malformed{};
    return c;
}

/// The class at the front of `re`, after its '['.
rune_set parse_class(std::string_view& re) {
    rune_set set;
    if (re.starts_with('^')) {
        set.negated = true;
        re.remove_prefix(1);
    }
    for (bool first = true; first || !re.starts_with(']'); first = false) {
        if (re.empty()) throw malformed{};
        if (re.starts_with("[:")) {
            if (const auto end = re.find(":]"); end != std::string_view::npos) {
                add_named(set, re.substr(2, end - 2));
                re.remove_prefix(end + 2);
                continue;
            }
        }
        const auto member = [&]() -> std::optional<char32_t> {
            if (re.empty()) throw malformed{};
            if (!re.starts_with('\\')) return take_rune(re, nullptr);
            re.remove_prefix(1);
            return escape(re, set);
        };
        const auto low = member();
        if (!low) continue;
        auto high = low;
        if (re.size() >= 2 && re[0] == '-' && re[1] != ']') {
            re.remove_prefix(1);
            high = member();
            if (!high || *high < *low) throw malformed{};
        }
        set.add(*low, *high);
    }
    re.remove_prefix(1);
    return set;
}

struct item {
    enum class kind { one, star, optional, deep, begin } what = kind::one;
    rune_set set;
};

std::vector<item> parse_regex(std::string_view re) {
    std::vector<item> out;
    while (!re.empty()) {
        item it;
        if (re.starts_with("(.*/)?")) {
            it.what = item::kind::deep;
            re.remove_prefix(6);
        } else if (re[0] == '^') {
            it.what = item::kind::begin;
            re.remove_prefix(1);
        } else if (re[0] == '[') {
            re.remove_prefix(1);
            it.set = parse_class(re);
        } else if (re[0] == '.') {
            it.set.negated = true;
            it.set.add('\n', '\n');
            re.remove_prefix(1);
        } else if (re[0] == '\\') {
            re.remove_prefix(1);
            if (const auto c = escape(re, it.set)) it.set.add(*c, *c);
        } else {
            if (re[0] == '*' || re[0] == '?' || re[0] == '(' || re[0] == ')') throw malformed{};
            const char32_t c = take_rune(re, nullptr);
            it.set.add(c, c);
        }
        if (it.what == item::kind::one && !re.empty() && (re[0] == '*' || re[0] == '?')) {
            it.what = re[0] == '*' ? item::kind::star : item::kind::optional;
            re.remove_prefix(1);
        }
        out.push_back(std::move(it));
    }
    return out;
}

/// Steps through a path with all states at once: time is bounded by pattern times path, whatever the pattern.
class machine {
public:
    explicit machine(const std::vector<item>& items) : items_(items), now_(2 * items.size() + 1), next_(now_.size()) { enter(now_, 0, true); }
    void feed(char32_t r) {
        next_.assign(next_.size(), false);
        for (std::size_t i = 0; i < items_.size(); ++i) {
            const item& it = items_[i];
            if (now_[2 * i + 1]) {
                if (r != '\n') next_[2 * i + 1] = true;
                if (r == '/') enter(next_, i + 1, false);
            }
            if (!now_[2 * i] || it.what == item::kind::deep || it.what == item::kind::begin || !it.set.has(r)) continue;
            enter(next_, it.what == item::kind::star ? i : i + 1, false);
        }
        std::swap(now_, next_);
    }
    [[nodiscard]] bool accepted() const { return now_.back(); }
    [[nodiscard]] bool alive() const { return std::ranges::find(now_, true) != now_.end(); }
    /// Whether anything but the end has been kept open.
    [[nodiscard]] bool can_go_on() const { return std::find(now_.begin(), now_.end() - 1, true) != now_.end() - 1; }

private:
    // States: 2i before item i, 2i+1 inside the group of a deep item, 2n the end.
    void enter(std::vector<bool>& states, std::size_t i, bool at_begin) {
        for (; i < items_.size(); ++i) {
            states[2 * i] = true;
            const auto what = items_[i].what;
            if (what == item::kind::deep) states[2 * i + 1] = true;
            if (what == item::kind::one || (what == item::kind::begin && !at_begin)) return;
        }
        states[2 * items_.size()] = true;
    }
    const std::vector<item>& items_;
    std::vector<bool> now_;
    std::vector<bool> next_;
};

struct rule {
    bool exception = false;
    std::string text;
    translated::kind how = translated::kind::exact;
    std::vector<item> items;

    /// Whether the rule matches the path or one of its parents.
    [[nodiscard]] bool covers(std::string_view path) const {
        using kind = translated::kind;
        if (how == kind::exact) return path.starts_with(text) && (path.size() == text.size() || path[text.size()] == '/');
        if (how == kind::prefix) return path.starts_with(std::string_view(text).substr(0, text.size() - 2));
        if (how == kind::suffix) return covers_suffix(path);
        machine m{items};
        while (!path.empty()) {
            if (path[0] == '/' && m.accepted()) return true;
            m.feed(take_rune(path, nullptr));
            if (!m.alive()) return false;
        }
        return m.accepted();
    }
    [[nodiscard]] bool covers_suffix(std::string_view path) const {
        const std::string_view suffix = std::string_view(text).substr(2);
        for (std::size_t end = path.find('/');; end = path.find('/', end + 1)) {
            const std::string_view part = path.substr(0, end);
            if (part.ends_with(suffix) || (suffix.starts_with('/') && part == suffix.substr(1))) return true;
            if (end == std::string_view::npos) return false;
        }
    }
    /// Whether the rule may match something below the directory.
    [[nodiscard]] bool reaches_below(std::string_view dir) const {
        using kind = translated::kind;
        if (how == kind::suffix || covers(dir)) return true;
        const std::string below = cat(dir, "/");
        if (how == kind::exact) return text.starts_with(below);
        if (how == kind::prefix) {
            const std::string_view stem = std::string_view(text).substr(0, text.size() - 2);
            return stem.starts_with(below) || std::string_view(below).starts_with(stem);
        }
        machine m{items};
        for (std::string_view left = below; !left.empty() && m.alive();) m.feed(take_rune(left, nullptr));
        return m.can_go_on();
    }
};

rule compile(std::string_view pattern) {
    rule r;
    std::string text = clean_path(pattern);
    if (text[0] == '!') {
        if (text.size() == 1) throw error{errc::invalid, "illegal exclusion pattern: \"!\""};
        r.exception = true;
        text.erase(0, 1);
    }
    wildcard_match(text, ".");
    const translated t = translate(text);
    r.how = t.how;
    r.text = std::move(text);
    if (t.how == translated::kind::regex) {
        try {
            r.items = parse_regex(t.regex);
        } catch (const malformed&) {
            throw error{errc::invalid, cat("malformed pattern ", quoted(pattern))};
        }
    }
    return r;
}
}  // namespace

struct ignore_patterns::state {
    std::vector<rule> rules;
    /// Whether a rule of the kind may decide about something below `dir`, no later rule of the other kind covering it all.
    [[nodiscard]] bool may_decide_below(std::string_view dir, bool exception) const {
        for (auto it = rules.rbegin(); it != rules.rend(); ++it) {
            if (it->exception == exception) {
                if (it->reaches_below(dir)) return true;
            } else if (it->covers(dir)) {
                return false;
            }
        }
        return false;
    }
};

ignore_patterns::ignore_patterns() : state_(std::make_unique<state>()) {}
ignore_patterns::ignore_patterns(std::span<const std::string> patterns) : ignore_patterns() {
    for (const auto& p : patterns)
        if (const auto trimmed = trim(p); !trimmed.empty()) state_->rules.push_back(compile(trimmed));
}
ignore_patterns::ignore_patterns(ignore_patterns&&) noexcept = default;
ignore_patterns& ignore_patterns::operator=(ignore_patterns&&) noexcept = default;
ignore_patterns::~ignore_patterns() = default;

bool ignore_patterns::empty() const noexcept { return state_->rules.empty(); }

bool ignore_patterns::matches(std::string_view path) const {
    bool matched = false;
    for (const auto& r : state_->rules)
        if (r.exception == matched && r.covers(path)) matched = !r.exception;
    return matched;
}

bool ignore_patterns::may_reinclude_below(std::string_view dir) const { return state_->may_decide_below(dir, true); }
bool ignore_patterns::may_match_below(std::string_view dir) const { return state_->may_decide_below(dir, false); }

std::vector<std::string> parse_ignore_file(std::string_view text) {
    std::vector<std::string> out;
    if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
    for (std::string_view line : split(text, '\n')) {
        if (line.starts_with('#')) continue;
        line = trim(line);
        if (line.empty()) continue;
        const bool invert = line[0] == '!';
        if (invert) line = trim(line.substr(1));
        std::string pattern;
        if (!line.empty()) pattern = clean_path(line);
        if (pattern.size() > 1 && pattern[0] == '/') pattern.erase(0, 1);
        out.push_back(invert ? '!' + pattern : pattern);
    }
    return out;
}

}  // namespace cobuild::fs

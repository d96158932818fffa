module;
#include <cstddef>
#include <cstdint>
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

constexpr std::size_t deepest = 1000;

/// RFC 8259, without recursion: what is not JSON at all is the shell form, what is JSON but no array of strings an error.
class json_reader {
public:
    explicit json_reader(std::string_view text) : text_(text) {}

    json_list read() {
        blanks();
        if (!take('[')) return {};
        std::vector<std::string> list;
        bool only_strings = true;
        blanks();
        if (!take(']')) {
            do {
                blanks();
                if (peek() == '"') {
                    auto s = string();
                    if (!s) return {};
                    list.push_back(*std::move(s));
                } else {
                    only_strings = false;
                    if (!skip_value()) return {};
                }
                blanks();
            } while (take(','));
            if (!take(']')) return {};
        }
        blanks();
        if (at_ != text_.size()) return {};
        if (!only_strings) throw error{errc::invalid, "when using JSON array syntax, arrays must be comprised of strings only"};
        return {std::move(list)};
    }

private:
    [[nodiscard]] char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
    bool take(char c) {
        if (at_ >= text_.size() || text_[at_] != c) return false;
        ++at_;
        return true;
    }
    void blanks() {
        while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r')) ++at_;
    }

    std::optional<std::uint32_t> hex4() {
        if (text_.size() - at_ < 4) return std::nullopt;
        std::uint32_t value = 0;
        for (int i = 0; i < 4; ++i) {
            const char c = text_[at_++];
            std::uint32_t d = 0;
            if (is_digit(c))
                d = static_cast<std::uint32_t>(c - '0');
            else if (c >= 'a' && c <= 'f')
                d = static_cast<std::uint32_t>(c - 'a' + 10);
            else if (c >= 'A' && c <= 'F')
                d = static_cast<std::uint32_t>(c - 'A' + 10);
            else
                return std::nullopt;
            value = value << 4 | d;
        }
        return value;
    }

    /// After "\u". A lone surrogate becomes U+FFFD.
    bool unicode_escape(std::string& out) {
        const auto first = hex4();
        if (!first) return false;
        char32_t c = *first;
        if (c >= 0xD800 && c < 0xE000) {
            const std::size_t here = at_;
            std::optional<std::uint32_t> second;
            if (c < 0xDC00 && text_.substr(at_, 2) == "\\u") {
                at_ += 2;
                second = hex4();
                if (!second) return false;
            }
            if (second && *second >= 0xDC00 && *second < 0xE000) {
                c = 0x10000 + ((c - 0xD800) << 10) + (*second - 0xDC00);
            } else {
                c = 0xFFFD;
                at_ = here;
            }
        }
        append_utf8(out, c);
        return true;
    }

    bool escape(std::string& out) {
        static constexpr std::string_view names = "\"\\/bfnrt", values = "\"\\/\b\f\n\r\t";
        const char c = peek();
        ++at_;
        if (c == 'u') return unicode_escape(out);
        const std::size_t i = c == '\0' ? std::string_view::npos : names.find(c);
        if (i == std::string_view::npos) return false;
        out += values[i];
        return true;
    }

    std::optional<std::string> string() {
        std::string out;
        ++at_;
        while (at_ < text_.size()) {
            const char c = text_[at_];
            if (c == '"') {
                ++at_;
                return out;
            }
            if (static_cast<unsigned char>(c) < 0x20) return std::nullopt;
            if (c == '\\') {
                ++at_;
                if (!escape(out)) return std::nullopt;
                continue;
            }
            const code_point point = decode(text_, at_);
            append_utf8(out, point.valid ? point.value : 0xFFFD);
            at_ += point.size;
        }
        return std::nullopt;
    }

    bool digits() {
        const std::size_t start = at_;
        while (is_digit(peek())) ++at_;
        return at_ > start;
    }

    bool number() {
        take('-');
        if (!take('0') && !digits()) return false;
        if (take('.') && !digits()) return false;
        if (peek() == 'e' || peek() == 'E') {
            ++at_;
            if (!take('+')) take('-');
            if (!digits()) return false;
        }
        return true;
    }

    bool scalar() {
        for (const std::string_view word : {"true", "false", "null"})
            if (text_.substr(at_, word.size()) == word) {
                at_ += word.size();
                return true;
            }
        return peek() == '"' ? string().has_value() : number();
    }

    bool member_name() {
        blanks();
        if (peek() != '"' || !string()) return false;
        blanks();
        return take(':');
    }

    /// Any value; `open` holds the closing brackets that are still to come.
    bool skip_value() {
        std::string open;
        for (;;) {
            blanks();
            if (peek() == '[' || peek() == '{') {
                const bool object = peek() == '{';
                ++at_;
                open += object ? '}' : ']';
                if (open.size() > deepest) return false;
                blanks();
                if (peek() != open.back()) {
                    if (object && !member_name()) return false;
                    continue;
                }
            } else if (!scalar()) {
                return false;
            }
            // A value ended: close what can be closed, then go on behind a comma.
            for (blanks(); !open.empty() && take(open.back()); blanks()) open.pop_back();
            if (open.empty()) return true;
            if (!take(',')) return false;
            if (open.back() == '}' && !member_name()) return false;
        }
    }

    std::string_view text_;
    std::size_t at_ = 0;
};

}  // namespace

json_list parse_json_list(std::string_view text) { return json_reader(trim(text)).read(); }

}  // namespace cobuild::dockerfile::detail

module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>
#include <utility>

module cobuild.config;

import cobuild.base;
import :schema;

namespace cobuild::config {

namespace {

bool is_ascii(char c) { return static_cast<unsigned char>(c) < 0x80; }

/// The code point at the front of `text` and its length in bytes; length 0 where the bytes are not UTF-8.
struct decoded {
    std::uint32_t point = 0;
    std::size_t length = 0;
};
decoded decode(std::string_view text) {
    const auto first = static_cast<unsigned char>(text[0]);
    const std::size_t length = first < 0x80                    ? 1
                               : first >= 0xF0 && first < 0xF5 ? 4
                               : first >= 0xE0 && first < 0xF0 ? 3
                               : first >= 0xC2 && first < 0xE0 ? 2
                                                               : 0;
    if (length == 0 || text.size() < length) return {};
    if (length == 1) return {first, 1};
    std::uint32_t point = first & (0x7FU >> length);
    for (std::size_t i = 1; i < length; ++i) {
        const auto next = static_cast<unsigned char>(text[i]);
        if ((next & 0xC0U) != 0x80U) return {};
        point = point << 6U | (next & 0x3FU);
    }
    const bool overlong = (length == 3 && point < 0x800) || (length == 4 && point < 0x10000);
    if (overlong || point > 0x10FFFF || (point >= 0xD800 && point < 0xE000)) return {};
    return {point, length};
}

/// A walk over TOML text that knows only what a comment and the four kinds of string are.
class transcription {
public:
    explicit transcription(std::string_view text) : text_(text) {}

    std::string run() {
        if (text_.starts_with("\xEF\xBB\xBF")) at_ = 3;
        while (at_ < text_.size()) {
            const char c = text_[at_];
            if (c == '#')
                comment();
            else if (c == '"' || c == '\'')
                string(c);
            else if (is_ascii(c))
                take();
            else
                throw refused("only quoted text and comments may hold other characters than ASCII");
        }
        return std::move(out_);
    }

private:
    void take() {
        if (text_[at_] == '\n') ++line_;
        out_ += text_[at_++];
    }

    void comment() {
        while (at_ < text_.size() && text_[at_] != '\n') {
            if (is_ascii(text_[at_]))
                take();
            else
                at_ += next().length;
        }
    }

    void string(char quote) {
        const std::string_view triple = quote == '"' ? R"(""")" : "'''";
        const bool lines = text_.substr(at_).starts_with(triple);
        const auto closing = lines ? triple : triple.substr(0, 1);
        // A literal string has no escapes: with such a character in it, it is written as a basic string.
        const auto from = at_ + closing.size();
        const bool rewritten = quote == '\'' && !is_ascii_until(from, closing);
        const std::string mark(closing.size(), rewritten ? '"' : quote);
        out_ += mark;
        at_ = from;
        while (at_ < text_.size()) {
            const char c = text_[at_];
            if (text_.substr(at_).starts_with(closing)) {
                at_ += closing.size();
                out_ += mark;
                return;
            }
            if (c == '\n' && !lines) return;  // never closed: the parser says so
            if (!is_ascii(c))
                escaped();
            else if (quote == '"' && c == '\\' && at_ + 1 < text_.size() && is_ascii(text_[at_ + 1]))
                take(), take();
            else if (rewritten && (c == '"' || c == '\\'))
                out_ += '\\', take();
            else
                take();
        }
    }

    bool is_ascii_until(std::size_t from, std::string_view closing) const {
        auto end = text_.find(closing, from);
        if (closing.size() == 1) end = std::min(end, text_.find('\n', from));
        for (const char c : text_.substr(from, end == std::string_view::npos ? end : end - from))
            if (!is_ascii(c)) return false;
        return true;
    }

    void escaped() {
        const auto d = next();
        char text[16];
        std::snprintf(text, sizeof text, "\\U%08X", static_cast<unsigned>(d.point));
        out_ += text;
        at_ += d.length;
    }

    decoded next() const {
        const auto d = decode(text_.substr(at_));
        if (d.length == 0) throw refused("the file is not UTF-8 here");
        return d;
    }

    error refused(std::string_view why) const { return error{errc::invalid, std::string(why)}.at({"", line_}); }

    std::string_view text_;
    std::string out_;
    std::size_t at_ = 0;
    unsigned line_ = 1;
};

}  // namespace

std::string in_ascii(std::string_view text) {
    for (const char c : text)
        if (!is_ascii(c)) return transcription(text).run();
    return std::string(text);
}

}  // namespace cobuild::config

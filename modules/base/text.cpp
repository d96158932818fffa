module;
#include <algorithm>
#include <charconv>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

module cobuild.base;

namespace cobuild {

namespace detail {
namespace {
template<class T>
std::size_t digits_of(std::array<char, 24>& out, T value) {
    return static_cast<std::size_t>(std::to_chars(out.data(), out.data() + out.size(), value).ptr - out.data());
}
}  // namespace

piece::piece(int v) : size(digits_of(digits, v)) {}
piece::piece(unsigned v) : size(digits_of(digits, v)) {}
piece::piece(long v) : size(digits_of(digits, v)) {}
piece::piece(unsigned long v) : size(digits_of(digits, v)) {}
piece::piece(long long v) : size(digits_of(digits, v)) {}
piece::piece(unsigned long long v) : size(digits_of(digits, v)) {}

std::string join_pieces(std::initializer_list<piece> pieces) {
    std::size_t total = 0;
    for (const auto& p : pieces) total += p.view().size();
    std::string out;
    out.reserve(total);
    for (const auto& p : pieces) out += p.view();
    return out;
}
}  // namespace detail

std::string quoted(std::string_view text) {
    static constexpr char hex[] = "0123456789abcdef";
    std::string out = "\"";
    for (const char c : text) {
        const auto u = static_cast<unsigned char>(c);
        switch (c) {
            case '"': out += "\\\""; break;
            case '\\': out += "\\\\"; break;
            case '\n': out += "\\n"; break;
            case '\r': out += "\\r"; break;
            case '\t': out += "\\t"; break;
            default:
                if (u < 0x20 || u == 0x7f) {
                    out += "\\x";
                    out += hex[u >> 4];
                    out += hex[u & 15];
                } else {
                    out += c;
                }
        }
    }
    out += '"';
    return out;
}

namespace {
std::size_t edit_distance(std::string_view a, std::string_view b) {
    std::vector<std::size_t> row(b.size() + 1);
    for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
    for (std::size_t i = 1; i <= a.size(); ++i) {
        std::size_t diagonal = row[0];
        row[0] = i;
        for (std::size_t j = 1; j <= b.size(); ++j) {
            const std::size_t above = row[j];
            row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0 : 1)});
            diagonal = above;
        }
    }
    return row[b.size()];
}
}  // namespace

std::string_view nearest(std::string_view word, std::span<const std::string_view> candidates) {
    constexpr std::size_t longest = 64;  // keeps the quadratic distance cheap on hostile input
    std::string_view best;
    std::size_t best_distance = 4;
    if (word.size() > longest) return best;
    const std::string lower = to_lower(word);
    for (const auto candidate : candidates) {
        if (candidate.size() > longest) continue;
        const std::size_t distance = edit_distance(lower, to_lower(candidate));
        const std::size_t limit = std::max<std::size_t>(1, std::max(word.size(), candidate.size()) / 3);
        if (distance < best_distance && distance <= limit) {
            best = candidate;
            best_distance = distance;
        }
    }
    return best;
}

std::vector<std::string_view> split(std::string_view text, char separator) {
    std::vector<std::string_view> parts;
    for (;;) {
        const auto at = text.find(separator);
        parts.push_back(text.substr(0, at));
        if (at == std::string_view::npos) return parts;
        text.remove_prefix(at + 1);
    }
}

std::string_view trim(std::string_view text) {
    constexpr std::string_view blanks = " \t\r\n\v\f";
    const auto first = text.find_first_not_of(blanks);
    if (first == std::string_view::npos) return {};
    return text.substr(first, text.find_last_not_of(blanks) - first + 1);
}

std::string to_lower(std::string_view text) {
    std::string out(text);
    for (char& c : out)
        if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    return out;
}

}  // namespace cobuild

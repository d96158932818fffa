// What the bodies of cobuild.dockerfile share among themselves.
module;
#include <cstddef>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.dockerfile:detail;

import :syntax;
import :expansion;
import :instructions;
import :checks;

namespace cobuild::dockerfile::detail {

// ---------------------------------------------------------------- characters
constexpr bool is_blank(char c) { return c == ' ' || c == '\t' || c == '\v' || c == '\f' || c == '\r' || c == '\n'; }
constexpr bool is_digit(char c) { return c >= '0' && c <= '9'; }

/// One code point and the bytes it takes; a byte that is not UTF-8 is one code point of itself, with `valid` false.
struct code_point {
    char32_t value = 0;
    std::size_t size = 0;
    bool valid = true;
};
code_point decode(std::string_view text, std::size_t at);
void append_utf8(std::string& out, char32_t value);
bool is_letter(char32_t c);
bool is_printable(char32_t c);

std::string to_upper(std::string_view text);
std::string_view trim_left(std::string_view text);
std::string join(const std::vector<std::string>& list, std::string_view separator);

// ---------------------------------------------------------------- parsing
/// A JSON array of strings. `list` empty: not a JSON array at all. Throws when it is one with something else in it.
struct json_list {
    std::optional<std::vector<std::string>> list;
};
json_list parse_json_list(std::string_view text);

/// Splits one logical line into keyword, flags and arguments. Problems go to node::problem.
node parse_logical_line(std::string line, char escape);
/// Words at blanks outside of quotes, quotes and escapes kept.
std::vector<std::string> split_words(std::string_view text, char escape);

/// Raw here-document words of a logical line, in order; a blank between marker and name is part of the word.
std::vector<std::string> heredoc_aware_words(std::string_view line);
bool takes_heredocs(const node& n);

std::optional<directive> match_directive(std::string_view line, std::string_view comment_mark);

/// The fields of one line of CSV (RFC 4180 quotes). Throws for a quote in the wrong place.
std::vector<std::string> csv_fields(std::string_view text);
std::optional<bool> parse_bool(std::string_view text);

// ---------------------------------------------------------------- instructions
/// The candidate that `word` is a likely slip of the pen for, or nothing. As base's nearest, but two letters swapped are one
/// slip (FORM for FROM), and cheap enough to be asked for every line of a file.
std::string_view likely(std::string_view word, std::span<const std::string_view> candidates);
/// `message`, with the likely slip of the pen behind it.
std::string suggest(std::string message, std::string_view word, std::span<const std::string_view> candidates);

enum class flag_kind { text, boolean, list };
struct flag_spec {
    std::string_view name;
    flag_kind kind;
};
class flag_values {
public:
    /// Throws for unknown and doubled flags, and for missing or unfit values.
    flag_values(const node& n, std::span<const flag_spec> known);
    [[nodiscard]] std::string text(std::string_view name) const;
    [[nodiscard]] std::vector<std::string> list(std::string_view name) const;
    [[nodiscard]] std::optional<bool> boolean(std::string_view name) const;

private:
    std::vector<std::pair<std::string_view, std::string>> values_;
};

instruction_body parse_from(const node& n);
instruction_body parse_run(const node& n, char escape);
instruction_body parse_copy(const node& n);
instruction_body parse_add(const node& n);
instruction_body parse_healthcheck(const node& n);
instruction_body parse_stopsignal(const node& n, char escape);
/// parse_port without the list, which a range makes long.
exposed_ports check_port(std::string_view word);
device parse_device(std::string_view csv);
mount_text check_mount(std::string_view csv, char escape);

/// The checks of FROM and its arguments.
void check_from_arguments(const parsed& p, char escape, const lookup& automatic, const std::function<void(const stage&, warning)>& report);

// ---------------------------------------------------------------- errors
/// A part of a line of the file: `column` and `length` in bytes.
struct caret {
    unsigned line = 0;
    std::size_t column = 0;
    std::size_t length = 1;
};
std::string draw_source(std::string_view name, std::string_view text, line_range lines, const std::optional<caret>& mark);

// ---------------------------------------------------------------- patterns
/// ${v#p} and ${v##p}; from_end: ${v%p} and ${v%%p}.
std::string trim_pattern(std::string_view value, std::string_view pattern, bool from_end, bool longest);
/// ${v/p/r} and ${v//p/r}.
std::string replace_pattern(std::string_view value, std::string_view pattern, std::string_view replacement, bool all);

}  // namespace cobuild::dockerfile::detail

/// Variable expansion: quotes, escapes, `$name` and the forms of `${...}`.
///
/// Forms: $v ${v} ${v:-w} ${v-w} ${v:+w} ${v+w} ${v:?m} ${v?m} ${v#p} ${v##p} ${v%p} ${v%%p} ${v/p/r} ${v//p/r}, nested at
/// will. Patterns: `*`, `?`, backslash escapes. Positional and special parameters are never set. An unset variable is "".
/// Throws errc::invalid: "bad substitution", "unsupported modifier", a missing quote or brace, `${v:?message}`.
module;
#include <cstddef>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

export module cobuild.dockerfile:expansion;

export namespace cobuild::dockerfile {

/// The value of a variable; nothing when it is not set. Called once or more for each name that is met.
using lookup = std::function<std::optional<std::string>(std::string_view name)>;

/// Names are sorted and unique. Both branches of `${v:-w}` count, whichever is taken.
struct expansion {
    std::string text;
    std::vector<std::string> matched;
    std::vector<std::string> unmatched;
};

struct expansion_words {
    std::vector<std::string> words;
    std::vector<std::string> matched;
    std::vector<std::string> unmatched;
};

/// Deepest nesting of `${...}`, and the longest result in bytes; beyond either the expansion is an error.
inline constexpr std::size_t max_nesting = 200;
inline constexpr std::size_t max_expansion = 16UL * 1024 * 1024;

/// One word: quotes and escapes removed, blanks kept.
expansion expand_word(std::string_view word, const lookup& variables, char escape = '\\');
/// EXPOSE: as expand_word, but split at blanks outside of quotes, also at those out of a variable.
expansion_words expand_words(std::string_view word, const lookup& variables, char escape = '\\');
/// The body of a here-document: quotes are text; a backslash is removed and protects the character after it, as docker does.
expansion expand_heredoc(std::string_view content, const lookup& variables);
/// For step names: as expand_word, but unset variables and quotes stay as written; text that is in error comes back unchanged.
std::string expand_for_display(std::string_view text, const lookup& variables, char escape = '\\');

}  // namespace cobuild::dockerfile

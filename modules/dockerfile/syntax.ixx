/// Lines, continuations, directives, here-documents: the tree of a Dockerfile before anything in it has a meaning.
module;
#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

export module cobuild.dockerfile:syntax;

import cobuild.base;

export namespace cobuild::dockerfile {

/// Lines of the file as written, both ends included; 0 means "the whole file".
struct line_range {
    unsigned first = 0;
    unsigned last = 0;
    bool operator==(const line_range&) const = default;
};

/// One error that belongs to lines of the file. `message` is a sentence as in `cobuild::error`.
struct diagnostic {
    std::string message;
    line_range lines;
    bool operator==(const diagnostic&) const = default;
};

/// A `# name=value` line at the top of the file; `name` is lower case: "syntax", "escape" or "check".
struct directive {
    std::string name;
    std::string value;
    unsigned line = 0;
};

/// `[fd]<<[-]NAME` and the lines that belong to it.
struct heredoc {
    std::string name;     ///< without quotes
    std::string content;  ///< as written, every line with its line end; see `text()`
    bool expand = true;   ///< false when any part of NAME was quoted
    bool chomp = false;   ///< `<<-`
    unsigned fd = 0;
    bool operator==(const heredoc&) const = default;

    /// The content; with `chomp` without the leading tabs of its lines.
    [[nodiscard]] std::string text() const;
};

/// Reads `[fd]<<[-]NAME` when `word` is that (content empty), else nothing.
std::optional<heredoc> parse_heredoc_word(std::string_view word);

/// One instruction of the file.
struct node {
    std::string keyword;             ///< as written; unknown ones are kept, with no arguments
    std::vector<std::string> flags;  ///< "--name=value" in order, quotes and escapes removed
    /// Before expansion, quotes and escapes kept. ENV and LABEL: triples key, value, "=" (or "" in the form "ENV key value").
    /// Shell forms, USER, WORKDIR and the like: one. HEALTHCHECK: type, then command. ONBUILD: none, see `trigger`.
    std::vector<std::string> args;
    bool json = false;  ///< the arguments were a JSON array
    std::vector<heredoc> heredocs;
    std::string original;                ///< the logical line: continuations joined, comments dropped, no here-documents
    line_range lines;                    ///< here-documents included
    std::vector<std::string> comments;   ///< the comment lines directly above, without "#", a bare "#" clears them
    std::vector<node> trigger;           ///< ONBUILD: its one instruction, without comments
    unsigned empty_continuation = 0;     ///< last line of the logical line, when blank lines stood inside it, else 0
    std::optional<std::string> problem;  ///< what is wrong with its form; `parse_instructions` reports it
};

/// A parsed Dockerfile. Owns its text, so that errors can show it.
struct file {
    std::string name;
    std::string text;
    char escape = '\\';
    std::vector<directive> directives;
    std::vector<node> nodes;

    [[nodiscard]] const directive* find(std::string_view directive_name) const;
};

/// Longest line that is accepted, its line end included.
inline constexpr std::size_t max_line = 64UL * 1024 - 1;

/// Parses a Dockerfile. UTF-8 byte order mark and CRLF are accepted. What is wrong with a single instruction is kept in
/// `node::problem`; throws only for what makes the rest unreadable: no instructions, a line over `max_line`, a bad or
/// repeated directive, an unterminated here-document.
file parse(std::string_view text, std::string_view name = "Dockerfile");

/// Parses one instruction that stands alone, such as an ONBUILD trigger out of an image's config (here-documents included).
node parse_line(std::string_view text, char escape = '\\');

/// The frontend a file asks for: `# syntax=`, `// syntax=`, or the member "syntax" of a JSON object; a first line `#!` is
/// skipped. `image` is the first word of `value`. Never throws.
struct syntax_request {
    std::string image;
    std::string value;
    unsigned line = 0;
};
std::optional<syntax_request> detect_syntax(std::string_view text);
/// The same for any directive of a Dockerfile, in `#` form only ("check" before the file is known to parse).
std::optional<syntax_request> detect_directive(std::string_view name, std::string_view text);

/// The node as an S-expression without outer parentheses: `copy ["--from=a"] "src" "dst"`.
std::string dump(const node& n);
/// All nodes, each in parentheses on a line of its own.
std::string dump(const file& f);

/// The source around `lines` as BuildKit prints it: "Dockerfile:3", a rule, numbered lines with `>>>` before those named
/// and two or four lines around them, a rule. Empty when `lines` is outside of the text. Control characters are escaped.
std::string render_source(std::string_view name, std::string_view text, line_range lines);
std::string render_source(const file& f, line_range lines);

/// One exception for the errors of a file: the first one's sentence and place, the others after it, each with its line.
/// Undefined for an empty list.
error to_error(const file& f, std::span<const diagnostic> errors);
/// The errors that to_error made one of, each with the line it names.
std::vector<diagnostic> split_error(const error& e);

/// The candidate that `word` is a likely slip of the pen for, or nothing: as base's nearest, but two letters swapped are one
/// slip (biuld for build).
std::string_view likely_word(std::string_view word, std::span<const std::string_view> candidates);

/// The source around a place as render_source shows it, with a caret line below the part of the line that `message` speaks
/// of: the longest text it quotes or names that stands there, else the first word. Continuations are searched down to the
/// last line of `lines`; where `lines` is one line, to the end of its instruction.
std::string render_error(std::string_view name, std::string_view text, line_range lines, std::string_view message);

}  // namespace cobuild::dockerfile

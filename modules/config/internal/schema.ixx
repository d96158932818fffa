/// cobuild.config:schema: every key once, bound to the member it fills. Reading, writing, the flags, the list of what is
/// not built and the reference page all walk this one table.
module;
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

module cobuild.config:schema;

import cobuild.base;
import :tables;

namespace cobuild::config {

struct field;
using fields = std::vector<field>;

/// A value of few words: `set` returns a complaint or nothing, `get` the word, or nothing when it is unset.
struct word {
    std::function<std::string(std::string_view)> set;
    std::function<std::optional<std::string>()> get;
};
/// A table whose keys are nobody's business but the feature's own; values are kept as TOML text.
struct free_table {
    std::map<std::string, std::string>* values;
};
struct sub_table {
    std::shared_ptr<fields> members;
};
/// A table of tables by name, or an array of tables.
struct family {
    bool keyed;
    std::function<fields(const std::string& name)> add;
    std::function<std::vector<std::pair<std::string, fields>>()> all;
    std::function<std::string(std::string_view name)> name_rule;  ///< a warning about a name, or nothing
};
using folded_bool = std::function<void(bool)>;
using folded_space = std::function<void(disk_space)>;

using slot = std::variant<bool*, std::optional<bool>*, std::int64_t*, std::optional<std::int64_t>*, std::string*, std::optional<std::string>*,
                          std::vector<std::string>*, std::map<std::string, std::string>*, disk_space*, nanoseconds*, word, free_table, sub_table,
                          family, folded_bool, folded_space>;

struct field {
    std::string key;
    slot where;
    std::string flag{};
    std::function<std::string(std::string_view)> rule{};  ///< of a text or each list element: a complaint or nothing
    std::optional<std::int64_t> least{};                  ///< of an integer (a duration: in nanoseconds)
    std::string instead{};                                ///< deprecated: what to write instead
};

/// The whole file, bound to `c`; valid as long as `c` stays where it is.
fields schema(configuration& c);

// What a value may look like: a complaint, or an empty string.
std::string entitlement_rule(std::string_view text);
std::string address_rule(std::string_view text);
std::string mirror_rule(std::string_view text);
std::string nameserver_rule(std::string_view text);
std::string subnet_rule(std::string_view text);
std::string platform_rule(std::string_view text);
std::string filter_rule(std::string_view text);
std::string registry_name_rule(std::string_view name);
nanoseconds parse_time_span(std::string_view text);
std::string_view level_name(log_level level);

/// One value as it came from a flag or a TOML node that is text; returns a complaint or nothing.
std::string assign_text(const field& f, std::string_view text);
std::string assign_integer(const field& f, std::int64_t value);
std::string assign_list(const field& f, std::vector<std::string> values);
std::string type_of(const slot& s);

/// A key path as TOML writes it: parts that are not bare are quoted.
std::string join_key(std::string_view prefix, std::string_view key);
std::string toml_text(std::string_view text);
/// The value of a plain field as TOML; nothing when it is unset or not a plain value.
std::optional<std::string> value_text(const slot& s);
/// Every plain value that is set, by path.
std::map<std::string, std::string> flatten(const fields& all);

struct unbuilt {
    std::string_view path;        ///< this key and all below it
    bool restricts = false;       ///< refused instead of ignored
    std::string_view value = {};  ///< only this value, as TOML; empty: whatever differs from the default
};
/// The line of the table that speaks of this key and value, or null.
const unbuilt* find_unbuilt(std::string_view path, std::string_view value);
/// The line that speaks of this key, whatever its value.
const unbuilt* find_unbuilt(std::string_view path);

/// One reading: the configuration, what was found, and where each key stands.
struct reading {
    std::string file;
    configuration config;
    std::vector<diagnostic> findings;
    std::map<std::string, unsigned> lines;     ///< by path
    std::map<std::string, std::string> flags;  ///< by path: the flag that set it
    void report(severity level, errc kind, std::string message, std::optional<unsigned> line);
};
/// The same TOML in ASCII, line by line: strings with escapes in place of other characters, comments without them. toml++ up
/// to 3.4 asks a table that ends in __builtin_unreachable() about most other letters. Throws errc::invalid with the line
/// where the text is not UTF-8 or such a character stands outside of strings and comments.
std::string in_ascii(std::string_view text);
void read_toml(reading& r, std::string_view text);
void apply_flags(reading& r, const overrides& flags);
/// What only the whole can tell: keys not built, pairs, platforms, workers. Sorts the findings.
void judge(reading& r);

}  // namespace cobuild::config

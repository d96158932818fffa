module;
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

// toml++ states with assertions what hostile input breaks ("[=" at a line's start): in a debug build that ends the process,
// in a release build it is a promise to the optimiser. Here it is a failure like any other, in every build.
#undef NDEBUG
#define TOML_ASSERT(expr) (static_cast<bool>(expr) ? void() : throw std::logic_error("toml"))
#include <toml++/toml.h>

module cobuild.config;

import cobuild.base;
import :schema;

namespace cobuild::config {
namespace {

constexpr std::size_t most_findings = 200;

std::string shown(const toml::node& n) {
    switch (n.type()) {
        case toml::node_type::string: return cat("the string ", quoted(n.as_string()->get().substr(0, 60)));
        case toml::node_type::integer: return cat("the integer ", n.as_integer()->get());
        case toml::node_type::boolean: return n.as_boolean()->get() ? "true" : "false";
        case toml::node_type::floating_point: return "a decimal number";
        case toml::node_type::table: return "a table";
        case toml::node_type::array: return "a list";
        default: return "a date or time";
    }
}

/// A node as TOML on one line. The parser limits the depth.
std::string raw_text(const toml::node& n) {
    if (const auto* s = n.as_string()) return toml_text(s->get());
    if (const auto* a = n.as_array()) {
        std::string out = "[";
        for (const auto& item : *a) out += (out.size() > 1 ? ", " : "") + raw_text(item);
        return out + "]";
    }
    if (const auto* t = n.as_table()) {
        if (t->empty()) return "{}";
        std::string out = "{";
        for (const auto& [key, value] : *t) out += cat(out.size() > 1 ? ", " : " ", join_key("", key.str()), " = ", raw_text(value));
        return out + " }";
    }
    std::ostringstream out;
    n.visit([&](const auto& value) {
        if constexpr (toml::is_value<decltype(value)>) out << value;
    });
    return out.str();
}

class reader {
public:
    explicit reader(reading& r) : r_(r) {}

    void table(const toml::table& t, const std::string& prefix, const fields& members) {
        std::map<const toml::node*, bool> used;
        for (const auto& f : members) {
            const auto* node = find(t, f.key);
            if (node == nullptr) continue;
            used[node] = true;
            value(*node, join_key(prefix, f.key), f);
        }
        for (const auto& [key, node] : t)
            if (!used.contains(&node)) unknown(key, prefix, members);
    }

private:
    void wrong(const toml::node& at, const std::string& path, std::string_view complaint) {
        r_.report(severity::error, errc::invalid, cat(path, ": ", complaint), at.source().begin.line);
    }
    void wrong_type(const toml::node& at, const std::string& path, std::string_view expected) {
        wrong(at, path, cat("expected ", expected, ", not ", shown(at)));
    }

    /// As go-toml: the exact spelling, else any letter case.
    static const toml::node* find(const toml::table& t, const std::string& key) {
        if (const auto* exact = t.get(key)) return exact;
        const std::string lower = to_lower(key);
        for (const auto& [name, node] : t)
            if (to_lower(name.str()) == lower) return &node;
        return nullptr;
    }

    void unknown(const toml::key& key, const std::string& prefix, const fields& members) {
        std::vector<std::string_view> names;
        bool twice = false;
        for (const auto& f : members) {
            names.push_back(f.key);
            twice = twice || to_lower(f.key) == to_lower(key.str());
        }
        const auto near = nearest(key.str(), names);
        const std::string path = join_key(prefix, key.str());
        std::string message =
            twice ? cat(path, ": ignored, the key stands here twice in different letter case") : cat(path, ": unknown key, ignored");
        if (!twice && prefix.empty() && key.str() == "ghacache")
            message += "; the table is called cache.gha";
        else if (!twice && !near.empty())
            message += cat("; perhaps ", join_key(prefix, near), " is meant");
        r_.report(severity::warning, errc::invalid, std::move(message), key.source().begin.line);
    }

    void value(const toml::node& node, const std::string& path, const field& f) {
        if (!std::holds_alternative<sub_table>(f.where)) r_.lines[path] = node.source().begin.line;
        if (!f.instead.empty()) r_.report(severity::warning, errc::invalid, cat(path, ": deprecated, write ", f.instead), node.source().begin.line);
        if (const auto* sub = std::get_if<sub_table>(&f.where)) {
            const auto* t = node.as_table();
            if (t == nullptr) return wrong_type(node, path, "a table");
            return table(*t, path, *sub->members);
        }
        if (const auto* many = std::get_if<family>(&f.where)) return many->keyed ? named_tables(node, path, *many) : listed_tables(node, path, *many);
        if (const auto* list = std::get_if<std::vector<std::string>*>(&f.where)) return list_value(node, path, f, **list);
        if (const auto* map = std::get_if<std::map<std::string, std::string>*>(&f.where)) return map_value(node, path, **map);
        if (const auto* open = std::get_if<free_table>(&f.where)) return open_value(node, path, *open->values);
        plain_value(node, path, f);
    }

    void named_tables(const toml::node& node, const std::string& path, const family& many) {
        const auto* t = node.as_table();
        if (t == nullptr) return wrong_type(node, path, "a table");
        for (const auto& [key, item] : *t) {
            const std::string name(key.str());
            const std::string below = join_key(path, name);
            const auto* members = item.as_table();
            if (members == nullptr) {
                wrong_type(item, below, "a table");
                continue;
            }
            r_.lines[below] = key.source().begin.line;
            if (const auto warning = many.name_rule(name); !warning.empty())
                r_.report(severity::warning, errc::invalid, cat(below, ": ", warning), key.source().begin.line);
            table(*members, below, many.add(name));
        }
    }

    void listed_tables(const toml::node& node, const std::string& path, const family& many) {
        const auto* list = node.as_array();
        if (list == nullptr) return wrong_type(node, path, cat("tables, written [[", path, "]]"));
        std::size_t index = 0;
        for (const auto& item : *list) {
            const std::string below = cat(path, "[", index++, "]");
            const auto* members = item.as_table();
            if (members == nullptr) {
                wrong_type(item, below, cat("a table, written [[", path, "]]"));
                continue;
            }
            r_.lines[below] = item.source().begin.line;
            table(*members, below, many.add(below));
        }
    }

    void list_value(const toml::node& node, const std::string& path, const field& f, std::vector<std::string>& out) {
        const auto* list = node.as_array();
        if (list == nullptr) return wrong_type(node, path, "a list of strings");
        std::vector<std::string> items;
        std::size_t index = 0;
        for (const auto& item : *list) {
            const std::string here = cat(path, "[", index++, "]");
            const auto* text = item.as_string();
            if (text == nullptr) {
                wrong_type(item, here, "a string");
                continue;
            }
            const std::string complaint = f.rule ? f.rule(text->get()) : std::string();
            if (!complaint.empty()) wrong(item, here, cat(quoted(text->get()), " ", complaint));
            items.push_back(text->get());
        }
        out = std::move(items);
    }

    void map_value(const toml::node& node, const std::string& path, std::map<std::string, std::string>& out) {
        const auto* t = node.as_table();
        if (t == nullptr) return wrong_type(node, path, "a table of strings");
        for (const auto& [key, item] : *t) {
            if (const auto* text = item.as_string())
                out[std::string(key.str())] = text->get();
            else
                wrong_type(item, join_key(path, key.str()), "a string");
        }
    }

    void open_value(const toml::node& node, const std::string& path, std::map<std::string, std::string>& out) {
        const auto* t = node.as_table();
        if (t == nullptr) return wrong_type(node, path, "a table");
        for (const auto& [key, item] : *t) out[std::string(key.str())] = raw_text(item);
    }

    void plain_value(const toml::node& node, const std::string& path, const field& f) {
        std::string complaint;
        if (const auto* text = node.as_string(); text != nullptr && takes_text(f.where))
            complaint = assign_text(f, text->get());
        else if (const auto* number = node.as_integer(); number != nullptr && takes_integer(f.where))
            complaint = assign_integer(f, number->get());
        else if (const auto* truth = node.as_boolean(); truth != nullptr && takes_truth(f.where))
            complaint = assign_text(f, truth->get() ? "true" : "false");
        else
            return wrong_type(node, path, type_of(f.where));
        if (!complaint.empty()) wrong(node, path, cat(shown(node), ": ", complaint));
    }

    static bool takes_truth(const slot& s) {
        return std::holds_alternative<bool*>(s) || std::holds_alternative<std::optional<bool>*>(s) || std::holds_alternative<folded_bool>(s);
    }
    static bool takes_sized(const slot& s) {
        return std::holds_alternative<disk_space*>(s) || std::holds_alternative<folded_space>(s) || std::holds_alternative<nanoseconds*>(s);
    }
    static bool takes_integer(const slot& s) {
        return takes_sized(s) || std::holds_alternative<std::int64_t*>(s) || std::holds_alternative<std::optional<std::int64_t>*>(s);
    }
    static bool takes_text(const slot& s) {
        return takes_sized(s) || std::holds_alternative<std::string*>(s) || std::holds_alternative<std::optional<std::string>*>(s) ||
               std::holds_alternative<word>(s);
    }

    reading& r_;
};

}  // namespace

void reading::report(severity level, errc kind, std::string message, std::optional<unsigned> line) {
    if (findings.size() >= most_findings && level == severity::warning) return;
    if (findings.size() >= 2 * most_findings) return;
    std::optional<source_location> where;
    if (line) where = source_location{file, *line};
    findings.push_back({level, kind, std::move(message), std::move(where)});
}

namespace {

bool breaks(std::string_view text) {
    try {
        (void)toml::parse(text);
    } catch (const std::logic_error&) {
        return true;
    } catch (const toml::parse_error&) {
    }
    return false;
}

/// The line at which the parser gives up without saying where: the first that breaks it when the text ends there.
unsigned breaking_line(std::string_view text) {
    std::vector<std::size_t> ends;
    for (std::size_t at = 0; at < text.size(); ++at)
        if (text[at] == '\n') ends.push_back(at + 1);
    ends.push_back(text.size());
    std::size_t low = 0;
    std::size_t high = ends.size() - 1;
    while (low < high) {
        const auto middle = low + (high - low) / 2;
        if (breaks(text.substr(0, ends[middle])))
            high = middle;
        else
            low = middle + 1;
    }
    return static_cast<unsigned>(low + 1);
}

}  // namespace

void read_toml(reading& r, std::string_view given) {
    std::string text;
    try {
        text = in_ascii(given);
    } catch (const error& e) {
        r.report(severity::error, errc::invalid, cat("not TOML: ", e.what()), e.where()->line);
        return;
    }
    try {
        const toml::table t = toml::parse(text, r.file);
        reader(r).table(t, "", schema(r.config));
    } catch (const toml::parse_error& e) {
        r.report(severity::error, errc::invalid, cat("not TOML: ", e.description()), e.source().begin.line);
    } catch (const std::logic_error&) {
        r.report(severity::error, errc::invalid, "not TOML: this line cannot be read", breaking_line(text));
    }
}

}  // namespace cobuild::config

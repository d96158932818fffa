module;
#include <array>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

module cobuild.config;

import cobuild.base;
import :schema;

namespace cobuild::config {
namespace {

template<class... F>
struct overloaded : F... {
    using F::operator()...;
};

std::string list_text(const std::vector<std::string>& items) {
    std::string out = "[";
    for (const auto& item : items) out += (out.size() > 1 ? ", " : "") + toml_text(item);
    return out + "]";
}

std::string map_text(const std::map<std::string, std::string>& items, bool raw) {
    if (items.empty()) return "{}";
    std::string out = "{";
    for (const auto& [key, value] : items) out += cat(out.size() > 1 ? ", " : " ", join_key("", key), " = ", raw ? value : toml_text(value));
    return out + " }";
}

void flatten_into(std::map<std::string, std::string>& out, const std::string& prefix, const fields& all) {
    for (const auto& f : all) {
        const std::string path = join_key(prefix, f.key);
        if (const auto* sub = std::get_if<sub_table>(&f.where)) {
            flatten_into(out, path, *sub->members);
        } else if (const auto* many = std::get_if<family>(&f.where)) {
            for (const auto& [name, members] : many->all()) {
                const std::string below = many->keyed ? join_key(path, name) : path + name;
                out.emplace(below, "");
                flatten_into(out, below, members);
            }
        } else if (auto text = value_text(f.where)) {
            out.emplace(path, std::move(*text));
        }
    }
}

using values = std::map<std::string, std::string>;

/// What is not built yet is written only where it says something: reading it back warns.
bool worth_writing(const std::string& path, const std::string& value, const values& defaults) {
    if (find_unbuilt(path) == nullptr) return true;
    const auto found = defaults.find(path);
    return found == defaults.end() || found->second != value;
}

void write_table(std::string& out, const std::string& prefix, const std::string& header, const fields& all, const values& defaults) {
    std::string body;
    for (const auto& f : all)
        if (const auto text = value_text(f.where); text && worth_writing(join_key(prefix, f.key), *text, defaults))
            body += cat(join_key("", f.key), " = ", *text, "\n");
    if (!body.empty() || header.starts_with("[[")) out += cat(out.empty() ? "" : "\n", header, header.empty() ? "" : "\n", body);
    for (const auto& f : all) {
        const std::string path = join_key(prefix, f.key);
        if (const auto* sub = std::get_if<sub_table>(&f.where)) {
            write_table(out, path, cat("[", path, "]"), *sub->members, defaults);
        } else if (const auto* many = std::get_if<family>(&f.where)) {
            for (const auto& [name, members] : many->all()) {
                const std::string below = many->keyed ? join_key(path, name) : path;
                const std::string title = many->keyed ? cat("[", below, "]") : cat("[[", below, "]]");
                const std::size_t before = out.size();
                write_table(out, below, title, members, defaults);
                if (out.size() == before) out += cat("\n", title, "\n");  // an empty section still counts
            }
        }
    }
}

void describe_into(std::vector<key_description>& out, const std::string& prefix, const fields& all) {
    using state = key_description::state;
    for (const auto& f : all) {
        const std::string path = join_key(prefix, f.key);
        if (const auto* sub = std::get_if<sub_table>(&f.where)) {
            describe_into(out, path, *sub->members);
        } else if (const auto* many = std::get_if<family>(&f.where)) {
            describe_into(out, many->keyed ? path + ".<name>" : path + "[]", many->add("<name>"));
        } else {
            const auto* line = find_unbuilt(path);
            const bool whole_key = line != nullptr && line->value.empty();
            const state s = !f.instead.empty() ? state::deprecated : !whole_key ? state::built : line->restricts ? state::refused : state::warned;
            out.push_back({path, type_of(f.where), value_text(f.where).value_or(""), f.flag, s});
        }
    }
}

}  // namespace

std::string toml_text(std::string_view text) {
    std::string out = "\"";
    for (const char c : text) {
        const auto u = static_cast<unsigned char>(c);
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if (u < 0x20 || u == 0x7f) {
            std::array<char, 8> escaped;
            out.append(escaped.data(), static_cast<std::size_t>(std::snprintf(escaped.data(), escaped.size(), "\\u%04X", u)));
        } else {
            out += c;
        }
    }
    return out + '"';
}

std::string join_key(std::string_view prefix, std::string_view key) {
    bool bare = !key.empty();
    for (const char c : key) bare = bare && ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_');
    return cat(prefix, prefix.empty() ? "" : ".", bare ? std::string(key) : toml_text(key));
}

std::optional<std::string> value_text(const slot& s) {
    using result = std::optional<std::string>;
    const auto truth = [](bool b) { return std::string(b ? "true" : "false"); };
    return std::visit(overloaded{
                          [&](bool* p) -> result { return truth(*p); },
                          [&](std::optional<bool>* p) -> result { return *p ? result(truth(**p)) : result(); },
                          [](std::int64_t* p) -> result { return cat(*p); },
                          [](std::optional<std::int64_t>* p) -> result { return *p ? result(cat(**p)) : result(); },
                          [](std::string* p) -> result { return toml_text(*p); },
                          [](std::optional<std::string>* p) -> result { return *p ? result(toml_text(**p)) : result(); },
                          [](std::vector<std::string>* p) -> result { return list_text(*p); },
                          [](std::map<std::string, std::string>* p) -> result { return map_text(*p, false); },
                          [](disk_space* p) -> result {
                              if (p->empty()) return std::nullopt;
                              return p->percent != 0 ? cat("\"", p->percent, "%\"") : cat(p->bytes);
                          },
                          [](nanoseconds* p) -> result { return toml_text(format_duration(*p)); },
                          [](const word& w) -> result {
                              const auto text = w.get();
                              return text ? result(toml_text(*text)) : result();
                          },
                          [](const free_table& t) -> result { return map_text(*t.values, true); },
                          [](const auto&) -> result { return std::nullopt; },
                      },
                      s);
}

std::map<std::string, std::string> flatten(const fields& all) {
    std::map<std::string, std::string> out;
    flatten_into(out, "", all);
    return out;
}

std::string to_toml(const configuration& config) {
    configuration copy = config;
    configuration plain;
    std::string out;
    write_table(out, "", "", schema(copy), flatten(schema(plain)));
    return out;
}

std::vector<key_description> describe_keys() {
    configuration plain;
    std::vector<key_description> out;
    describe_into(out, "", schema(plain));
    return out;
}

}  // namespace cobuild::config

module;
#include <cstddef>
#include <iterator>
#include <map>
#include <optional>
#include <regex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.policy;

import cobuild.fs;

namespace cobuild::policy {

namespace {

constexpr std::size_t max_pattern = 4096, max_identifier = 8192;
constexpr unsigned max_changes = 20;

/// libstdc++'s own flag: no backtracking, so that a hostile pattern takes no time without end.
std::regex compile(const std::string& pattern) {
    if (pattern.size() > max_pattern)
        throw error{errc::invalid, cat("a regular expression of a source policy has more than ", max_pattern, " letters")};
    try {
        return std::regex(pattern, std::regex_constants::ECMAScript | std::regex_constants::__polynomial);
    } catch (const std::regex_error&) {
        throw error{errc::invalid, cat("error matching source policy: invalid regex ", quoted(pattern))};
    }
}

/// "*" stands for anything, all else for itself.
std::regex compile_wildcard(const std::string& text) {
    if (text.find("**") != std::string::npos)
        throw error{errc::invalid, cat("error matching source policy: invalid wildcard: \"**\" in ", quoted(text))};
    std::string pattern;
    for (const char c : text) {
        if (c == '*')
            pattern += "([\\s\\S]*)";
        else if (std::string_view("\\.+?()[]{}^$|").find(c) != std::string_view::npos)
            pattern.append({'\\', c});
        else
            pattern += c;
    }
    return compile(pattern);
}

/// Go's templates: "$1", "${1}", "$$"; a name that is no number, or no group, is nothing.
std::string expand(const std::string& format, const std::smatch& m) {
    const auto is_name = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; };
    std::string out;
    for (std::size_t i = 0; i < format.size(); ++i) {
        if (format[i] != '$' || i + 1 == format.size()) {
            out += format[i];
            continue;
        }
        if (format[i + 1] == '$') {
            out += '$';
            ++i;
            continue;
        }
        const bool braced = format[i + 1] == '{';
        auto end = i + (braced ? 2 : 1);
        const auto begin = end;
        while (end < format.size() && is_name(format[end])) ++end;
        if (end == begin || (braced && (end == format.size() || format[end] != '}'))) {
            out += '$';
            continue;
        }
        const auto name = std::string_view(format).substr(begin, end - begin);
        std::size_t group = 0;
        bool number = name.size() < 4;
        for (const char c : name) {
            number = number && c >= '0' && c <= '9';
            group = group * 10 + static_cast<std::size_t>(c - '0');
        }
        if (number && group < m.size()) out += m[group].str();
        i = braced ? end : end - 1;
    }
    return out;
}

std::string attribute(const llb::source_op& source, const std::string& key) {
    const auto at = source.attrs.find(key);
    return at == source.attrs.end() ? std::string() : at->second;
}

bool holds(const constraint& c, const llb::source_op& source) {
    const auto value = attribute(source, c.key);
    switch (c.condition) {
        case condition::equal: return value == c.value;
        case condition::not_equal: return value != c.value;
        case condition::matches: return value.size() <= max_identifier && std::regex_search(value, compile(c.value));
    }
    throw error{errc::invalid, cat("error matching source policy: unknown attr condition ", static_cast<std::int32_t>(c.condition))};
}

bool selects(const selector& s, const llb::source_op& source) {
    for (const auto& c : s.constraints)
        if (!holds(c, source)) return false;
    if (s.identifier == source.identifier) return true;
    switch (s.type) {
        case match_type::exact: return false;
        case match_type::regex: return std::regex_search(source.identifier, compile(s.identifier));
        case match_type::wildcard: return std::regex_match(source.identifier, compile_wildcard(s.identifier));
    }
    throw error{errc::invalid, cat("error matching source policy: unknown match type ", static_cast<std::int32_t>(s.type))};
}

/// The identifier a CONVERT gives.
std::string destination(const rule& r, const std::string& identifier) {
    const auto& format = r.updates->identifier.empty() ? r.selector.identifier : r.updates->identifier;
    if (r.selector.type == match_type::exact) return format;
    std::smatch m;
    if (r.selector.type == match_type::wildcard) {
        const auto pattern = compile_wildcard(r.selector.identifier);
        return std::regex_match(identifier, m, pattern) ? expand(format, m) : identifier;
    }
    const auto pattern = compile(r.selector.identifier);
    std::string out;
    auto from = identifier.cbegin();
    for (auto i = std::sregex_iterator(identifier.begin(), identifier.end(), pattern); i != std::sregex_iterator(); ++i) {
        out.append(from, (*i)[0].first);
        out += expand(format, *i);
        from = (*i)[0].second;
    }
    return out.append(from, identifier.cend());
}

bool convert(const rule& r, llb::source_op& source) {
    if (!r.updates) throw error{errc::invalid, "error mutating source policy: missing destination for convert rule"};
    bool changed = false;
    if (auto to = destination(r, source.identifier); !to.empty() && to != source.identifier) {
        source.identifier = std::move(to);
        changed = true;
    }
    for (const auto& [key, value] : r.updates->attrs) {
        if (attribute(source, key) == value) continue;
        source.attrs[key] = value;
        changed = true;
    }
    return changed;
}

/// True when a rule changed it; what comes after that rule is asked in the next round.
bool ask(const policy& p, llb::source_op& source) {
    bool denied = false;
    for (const auto& r : p.rules) {
        if (!selects(r.selector, source)) continue;
        switch (r.action) {
            case action::allow: denied = false; continue;
            case action::deny: denied = true; continue;
            case action::convert:
                if (convert(r, source)) return true;
                continue;
        }
        throw error{errc::invalid, cat("source policy: rule ", static_cast<std::int32_t>(r.action), " ", r.selector.identifier, ": unknown type ",
                                       quoted(source.identifier))};
    }
    if (denied) throw error{errc::permission, cat("source ", quoted(source.identifier), " denied by policy: source denied by policy")};
    return false;
}

}  // namespace

std::string normalized(std::string_view identifier) {
    static constexpr std::string_view image = "docker-image://", git = "git://";
    if (identifier.starts_with(image)) {
        try {
            return cat(image, oci::reference::parse(identifier.substr(image.size())).with_default_tag().str());
        } catch (const error&) {
            return std::string(identifier);  // who loads it tells what is wrong with it
        }
    }
    const auto hash = identifier.find('#');
    if (!identifier.starts_with(git) || hash == std::string_view::npos) return std::string(identifier);
    const auto colon = identifier.find(':', hash);
    if (colon == std::string_view::npos) return std::string(identifier);
    const auto directory = fs::clean_path(cat("/", identifier.substr(colon + 1))).substr(1);
    return cat(identifier.substr(0, colon), directory.empty() ? "" : ":", directory);
}

bool apply(const std::vector<policy>& policies, llb::source_op& source) {
    if (policies.empty()) return false;
    bool changed = false;
    source.identifier = normalized(source.identifier);
    for (unsigned round = 0;; ++round) {
        if (round > max_changes)
            throw error{errc::invalid, cat("too many mutations on a single source: ", quoted(source.identifier), ": too many operations")};
        if (source.identifier.size() > max_identifier)
            throw error{errc::invalid, cat("a source has an identifier of more than ", max_identifier, " letters")};
        bool again = false;
        for (const auto& p : policies) {
            again = ask(p, source);
            if (again) break;
        }
        if (!again) return changed;
        changed = true;
    }
}

}  // namespace cobuild::policy

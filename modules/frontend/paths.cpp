module;
#include <algorithm>
#include <charconv>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <variant>
#include <vector>

module cobuild.frontend;

import :state;

namespace cobuild::frontend {

std::string join_path(std::string_view base, std::string_view p) { return fs::clean_path(cat("/", base, "/", p)); }

std::string path_in(std::string_view dir, std::string_view p) {
    if (p.empty() || p == ".") p = "./";
    std::string out = p.starts_with('/') ? fs::clean_path(p) : join_path(dir, p);
    if (p.ends_with('/') && !out.ends_with('/')) {
        out += '/';
    } else if (p.ends_with("/.")) {
        out += out == "/" ? "." : "/.";
    }
    return out;
}

namespace {

std::optional<llb::user_opt> owner_part(std::string_view text, std::int64_t base) {
    if (text.empty() || text == "root") return llb::user_opt{std::uint32_t{0}};
    // BuildKit reads 31 bits and takes a larger number for a name; ids have 32, and the last one means "no id".
    constexpr std::uint32_t no_id = 0xffffffff;
    std::uint32_t id = 0;
    const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), id);
    if (failed == std::errc{} && end == text.data() + text.size() && id != no_id) return llb::user_opt{id};
    return llb::user_opt{llb::named_user{std::string(text), base}};
}

}  // namespace

llb::chown_opt parse_owner(std::string_view text, std::int64_t base) {
    const auto colon = text.find(':');
    llb::chown_opt out{.user = owner_part(text.substr(0, colon), base), .group = {}};
    if (colon != std::string_view::npos) out.group = owner_part(text.substr(colon + 1), base);
    return out;
}

bool has_wildcards(std::string_view path) {
    for (std::size_t i = 0; i < path.size(); ++i) {
        if (path[i] == '*' || path[i] == '?' || path[i] == '[') return true;
        if (path[i] == '\\') ++i;
    }
    return false;
}

bool is_symbolic_mode(std::string_view text) {
    if (text.empty()) return false;
    for (auto clause : split(text, ',')) {
        clause.remove_prefix(std::min(clause.find_first_not_of("ugoa"), clause.size()));
        if (clause.empty()) return false;
        while (!clause.empty()) {
            if (std::string_view("+-=").find(clause.front()) == std::string_view::npos) return false;
            clause.remove_prefix(1);
            // One copied class ("g=u") or any permissions, before the next operator.
            if (!clause.empty() && std::string_view("ugo").find(clause.front()) != std::string_view::npos) {
                clause.remove_prefix(1);
            } else {
                clause.remove_prefix(std::min(clause.find_first_not_of("rwxXst"), clause.size()));
            }
        }
    }
    return true;
}

std::string did_you_mean(std::string_view word, const std::vector<std::string_view>& candidates) {
    const auto found = df::likely_word(word, candidates);
    return found.empty() || found == word ? std::string() : cat(" (did you mean ", found, "?)");
}

std::vector<llb::range> ranges_of(df::line_range lines) {
    std::vector<llb::range> out;
    for (auto line = static_cast<std::int32_t>(lines.first); line <= static_cast<std::int32_t>(std::max(lines.first, lines.last)); ++line)
        out.push_back({{line, 0}, {line, 0}});
    return out;
}

}  // namespace cobuild::frontend

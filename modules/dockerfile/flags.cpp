module;
#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.dockerfile;

import cobuild.base;
import :detail;

namespace cobuild::dockerfile::detail {

namespace {

/// Insertions, deletions, replacements and swaps of neighbours (optimal string alignment), in words of at most `longest`.
constexpr std::size_t longest = 32;
std::size_t slips(std::string_view a, std::string_view b) {
    std::array<std::array<std::size_t, longest + 1>, 3> rows{};
    for (std::size_t j = 0; j <= b.size(); ++j) rows[0][j] = j;
    for (std::size_t i = 1; i <= a.size(); ++i) {
        auto& row = rows[i % 3];
        const auto &above = rows[(i + 2) % 3], &before = rows[(i + 1) % 3];
        row[0] = i;
        for (std::size_t j = 1; j <= b.size(); ++j) {
            row[j] = std::min({above[j] + 1, row[j - 1] + 1, above[j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)});
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) row[j] = std::min(row[j], before[j - 2] + 1);
        }
    }
    return rows[a.size() % 3][b.size()];
}

}  // namespace

std::string_view likely(std::string_view word, std::span<const std::string_view> candidates) {
    std::string_view best;
    if (word.empty() || word.size() > longest) return best;
    const std::string lower = to_lower(word);
    std::size_t best_distance = longest;
    for (const auto candidate : candidates) {
        const std::size_t length = std::max(word.size(), candidate.size());
        std::size_t limit = std::min<std::size_t>(3, std::max<std::size_t>(1, length / 3));
        // What was left unfinished ("tmp" for "tmpfs") is meant more often than what differs as much elsewhere.
        if (word.size() > 2 && to_lower(candidate).starts_with(lower)) limit = std::max<std::size_t>(limit, 2);
        if (candidate.size() > longest || length - std::min(word.size(), candidate.size()) > limit) continue;
        const std::size_t distance = slips(lower, to_lower(candidate));
        if (distance > limit || distance >= best_distance) continue;
        best = candidate;
        best_distance = distance;
    }
    return best;
}

std::string suggest(std::string message, std::string_view word, std::span<const std::string_view> candidates) {
    const std::string_view close = likely(word, candidates);
    if (close.empty() || close == word) return message;
    return cat(message, " (did you mean ", close, "?)");
}

flag_values::flag_values(const node& n, std::span<const flag_spec> known) {
    for (const std::string& flag : n.flags) {
        const std::string_view all = flag;
        const std::size_t equals = all.find('=');
        const std::string_view dashed = all.substr(0, equals);
        const std::string_view name = dashed.substr(2);
        const auto spec = std::find_if(known.begin(), known.end(), [&](const flag_spec& s) { return s.name == name; });
        if (spec == known.end()) {
            std::vector<std::string_view> names;
            for (const auto& s : known) names.push_back(s.name);
            throw error{errc::invalid, suggest(cat("unknown flag: ", dashed), name, names)};
        }
        const bool seen = std::any_of(values_.begin(), values_.end(), [&](const auto& v) { return v.first == spec->name; });
        if (seen && spec->kind != flag_kind::list) throw error{errc::invalid, cat("duplicate flag specified: ", dashed)};
        std::string value(equals == std::string_view::npos ? std::string_view{} : all.substr(equals + 1));
        if (spec->kind == flag_kind::boolean ? equals != std::string_view::npos && value.empty() : equals == std::string_view::npos)
            throw error{errc::invalid, cat("missing a value on flag: ", dashed)};
        if (spec->kind == flag_kind::boolean) {
            value = value.empty() ? "true" : to_lower(value);
            if (value != "true" && value != "false")
                throw error{errc::invalid, cat("expecting boolean value for flag ", dashed, ", not: ", all.substr(equals + 1))};
        }
        values_.emplace_back(spec->name, std::move(value));
    }
}

std::string flag_values::text(std::string_view name) const {
    for (const auto& [key, value] : values_)
        if (key == name) return value;
    return {};
}

std::vector<std::string> flag_values::list(std::string_view name) const {
    std::vector<std::string> out;
    for (const auto& [key, value] : values_)
        if (key == name) out.push_back(value);
    return out;
}

std::optional<bool> flag_values::boolean(std::string_view name) const {
    for (const auto& [key, value] : values_)
        if (key == name) return value == "true";
    return std::nullopt;
}

}  // namespace cobuild::dockerfile::detail

module;
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

module cobuild.dockerfile;

import cobuild.base;
import :detail;

namespace cobuild::dockerfile {

using namespace detail;

namespace {

stage begin_stage(instruction&& from, std::size_t index) {
    stage out;
    const auto& body = std::get<from_instruction>(from.body);
    out.index = static_cast<unsigned>(index);
    out.name = body.name;
    out.base = body.base;
    out.platform = body.platform;
    if (!out.name.empty())
        for (const auto& comment : from.comments)
            if (comment.size() > out.name.size() && comment.starts_with(out.name) && comment[out.name.size()] == ' ') {
                out.description = comment.substr(out.name.size() + 1);
                break;
            }
    out.from = std::move(from);
    return out;
}

/// Where a stage declares `name`, or 0.
unsigned declared_in_a_stage(const parsed& p, std::string_view name) {
    for (const auto& s : p.stages)
        for (const auto& i : s.instructions)
            if (const auto* arg = std::get_if<arg_instruction>(&i.body))
                for (const auto& a : arg->args)
                    if (a.key == name) return i.lines.first;
    return 0;
}

}  // namespace

const stage* parsed::find(std::string_view name) const {
    const std::string lower = to_lower(name);
    const stage* found = nullptr;
    for (const auto& s : stages)
        if (!s.name.empty() && s.name == lower) found = &s;
    return found;
}

parse_result parse_instructions(const file& f) {
    parse_result out;
    auto& [value, errors] = out;
    bool from_failed = false;  // what follows a broken FROM is not blamed for standing before any
    for (const auto& n : f.nodes) {
        const bool is_from = to_lower(n.keyword) == "from";
        try {
            instruction i = parse_instruction(n, f.escape);
            if (is_from) {
                from_failed = false;
                value.stages.push_back(begin_stage(std::move(i), value.stages.size()));
            } else if (!value.stages.empty() && !from_failed) {
                value.stages.back().instructions.push_back(std::move(i));
            } else if (std::holds_alternative<arg_instruction>(i.body) && value.stages.empty() && !from_failed) {
                value.global_args.push_back(std::move(i));
            } else if (!from_failed) {
                errors.push_back(
                    {cat("no build stage in current context: ", to_upper(n.keyword), " stands before the first FROM, where only ARG may"), n.lines});
            }
        } catch (const error& e) {
            from_failed = from_failed || is_from;
            errors.push_back({e.what(), n.lines});
        }
    }
    if (value.stages.empty() && errors.empty()) errors.push_back({"dockerfile contains no stages to build: a FROM is missing", f.nodes.back().lines});
    return out;
}

std::string blank_base_message(const parsed& p, const stage& s, char escape) {
    std::string out = cat("base name (", s.base, ") should not be blank");
    std::vector<std::string> names;
    try {
        auto seen = expand_word(s.base, {}, escape);
        names = std::move(seen.unmatched);
    } catch (const error&) {
        return out;
    }
    for (const auto& name : names) {
        bool global = false;
        for (const auto& i : p.global_args)
            for (const auto& a : std::get<arg_instruction>(i.body).args) global = global || a.key == name;
        if (global) {
            out += cat("; give ARG ", name, " a default or pass it with --build-arg ", name, "=...");
        } else if (const unsigned line = declared_in_a_stage(p, name); line != 0) {
            out += cat("; ARG ", name, " in line ", line, " stands inside of a stage: for FROM it must stand above the first FROM");
        } else {
            out += cat("; ARG ", name, " is not declared above the first FROM");
        }
    }
    return out;
}

}  // namespace cobuild::dockerfile

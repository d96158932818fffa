module;
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.frontend;

import :state;

namespace cobuild::frontend {
namespace {

/// The instruction that reaches over the line.
df::line_range around(const df::parsed& file, unsigned line) {
    const auto holds = [line](const df::instruction& in) { return in.lines.first <= line && line <= in.lines.last; };
    for (const auto& in : file.global_args)
        if (holds(in)) return in.lines;
    for (const auto& st : file.stages) {
        if (holds(st.from)) return st.from.lines;
        for (const auto& in : st.instructions)
            if (holds(in)) return in.lines;
    }
    return {line, line};
}

}  // namespace

told_error told(const request& r, const error& e) {
    if (!e.where() || e.where()->file != r.dockerfile_name || e.where()->line == 0) return {e, {}};
    const auto line = e.where()->line;
    try {
        const auto file = df::parse(r.dockerfile, r.dockerfile_name);
        const auto typed = df::parse_instructions(file);
        if (typed.errors.empty()) return {e, ranges_of(around(typed.value, line))};
        const auto all = df::to_error(file, typed.errors);
        if (std::string_view(all.what()) != e.what()) return {e, ranges_of({line, line})};
        return {error{e.kind(), cat("dockerfile parse error on line ", line, ": ", e.what())}.at({r.dockerfile_name, line}),
                ranges_of(typed.errors.front().lines)};
    } catch (const error&) {
        return {e, ranges_of({line, line})};  // no file of instructions at all
    }
}

}  // namespace cobuild::frontend

module;
#include <algorithm>
#include <charconv>
#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <variant>
#include <vector>

module cobuild.frontend;

import :state;

namespace cobuild::frontend {
namespace {

/// COPY, ADD, RUN and WORKDIR: what makes a vertex and counts in "[stage 2/5]".
bool makes_step(const df::instruction_body& body) {
    return std::holds_alternative<df::run_instruction>(body) || std::holds_alternative<df::copy_instruction>(body) ||
           std::holds_alternative<df::add_instruction>(body) || std::holds_alternative<df::workdir_instruction>(body);
}

std::optional<std::size_t> stage_number(const std::string& text) {
    std::size_t n = 0;
    const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), n);
    return failed == std::errc{} && end == text.data() + text.size() ? std::optional(n) : std::nullopt;
}

}  // namespace

void converter::make_stages() {
    for (const auto& st : parsed_.stages) {
        auto s = std::make_unique<stage_state>();
        s->stage = &st;
        s->index = states_.size();
        s->name = !st.name.empty() ? st.name : cat("stage-", states_.size());
        s->lines = st.from.lines;
        if (const auto* named = st.name.empty() ? nullptr : named_context(st.name)) {
            // The stage's own lines are not even looked at.
            s->context = *named;
            s->base_name = st.name;
            s->triggers_known = true;
            s->command_total = 1;
            by_name_[st.name] = s.get();
            states_.push_back(std::move(s));
            continue;
        }
        try {
            s->base_name = expand_base(st, *s);
            s->platform = expand_platform(st, *s);
        } catch (const error& e) {
            note(e, s->lines);
        }
        if (const auto base = by_name_.find(to_lower(s->base_name)); base != by_name_.end()) s->base = base->second;
        s->command_total = s->base == nullptr && s->base_name != "scratch" ? 1 : 0;
        s->command_total += static_cast<std::size_t>(
            std::count_if(st.instructions.begin(), st.instructions.end(), [](const auto& in) { return makes_step(in.body); }));
        s->ignore_cache = req_.no_cache || std::any_of(req_.no_cache_stages.begin(), req_.no_cache_stages.end(),
                                                       [&](const auto& name) { return !st.name.empty() && to_lower(name) == st.name; });
        if (!st.name.empty()) by_name_[st.name] = s.get();
        states_.push_back(std::move(s));
    }
    throw_noted();
    if (states_.size() == 1) states_.front()->name.clear();
}

std::string converter::expand_base(const df::stage& st, stage_state& s) {
    df::expansion e;
    try {
        e = df::expand_word(st.base, global_args_.lookup(), file_.escape);
    } catch (const error& bad) {
        fail(bad.kind(), bad.what(), st.from.lines);
    }
    s.used_args.insert(e.matched.begin(), e.matched.end());
    if (!e.text.empty()) return e.text;
    std::string message = cat("base name (", st.base, ") should not be blank");
    for (const auto* names : {&e.unmatched, &e.matched}) {
        for (const auto& name : *names) {
            message += cat(": ", name, names == &e.unmatched ? " is not set" : " is empty", " here; an ARG for FROM must stand above the first FROM");
            for (const auto& other : parsed_.stages) {
                for (const auto& in : other.instructions) {
                    const auto* arg = std::get_if<df::arg_instruction>(&in.body);
                    if (arg != nullptr && std::any_of(arg->args.begin(), arg->args.end(), [&](const auto& a) { return a.key == name; })) {
                        fail(errc::invalid, cat(message, ", and ", name, " stands below it in line ", in.lines.first), st.from.lines);
                    }
                }
            }
            fail(errc::invalid, message + did_you_mean(name, global_args_.keys()), st.from.lines);
        }
    }
    fail(errc::invalid, message, st.from.lines);
}

std::optional<oci::platform> converter::expand_platform(const df::stage& st, stage_state& s) const {
    if (st.platform.empty()) return std::nullopt;
    std::string hint;
    try {
        const auto e = df::expand_word(st.platform, global_args_.lookup(), file_.escape);
        s.used_args.insert(e.matched.begin(), e.matched.end());
        if (!e.unmatched.empty()) hint = did_you_mean(e.unmatched.front(), global_args_.keys());
        if (e.text.empty()) {
            fail(errc::invalid, cat("empty platform value from expression ", st.platform, hint), st.from.lines);
        }
        return oci::parse_platform(e.text);
    } catch (const error& e) {
        if (e.where()) throw;
        fail(e.kind(), cat("failed to parse platform ", st.platform, ": ", e.what(), ": invalid argument", hint), st.from.lines);
    }
}

stage_state* converter::find_target() {
    if (req_.target.empty()) return states_[parsed_.stages.size() - 1].get();
    if (const auto found = by_name_.find(to_lower(req_.target)); found != by_name_.end()) return found->second;
    std::vector<std::string_view> names;
    for (const auto& [name, s] : by_name_) names.emplace_back(name);
    throw error{errc::not_found, cat("target stage ", quoted(req_.target), " could not be found", did_you_mean(to_lower(req_.target), names))}.at(
        {req_.dockerfile_name, 0});
}

void converter::connect_stages() {
    for (std::size_t i = 0; i < parsed_.stages.size(); ++i) {
        auto& s = *states_[i];
        if (!s.context.empty()) continue;
        for (const auto& in : parsed_.stages[i].instructions) {
            try {
                s.commands.push_back(make_command(s, in, false));
            } catch (const error& e) {
                note(e, in.lines);
            }
        }
    }
    refuse_cycles();
}

command converter::make_command(stage_state& s, df::instruction in, bool on_build) {
    command c{std::move(in), {}, on_build};
    const auto lines = c.what.lines;
    const auto note = [&](const std::string& from, bool by_index) {
        stage_state* source = from.empty() || (from == "scratch" && !by_name_.contains(from)) ? nullptr : find_source(from, lines, by_index);
        c.sources.push_back(source);
        if (source != nullptr && std::find(s.deps.begin(), s.deps.end(), source) == s.deps.end()) s.deps.push_back(source);
    };
    if (const auto* copy = std::get_if<df::copy_instruction>(&c.what.body); copy != nullptr && !copy->from.empty()) {
        note(copy->from, true);
    } else if (const auto* run = std::get_if<df::run_instruction>(&c.what.body)) {
        for (const auto& m : run->mounts) note(m.from, false);
    }
    return c;
}

/// A stage by name or, for COPY, by number; else an image.
stage_state* converter::find_source(const std::string& from, df::line_range lines, bool by_index) {
    if (by_index) {
        if (const auto n = stage_number(from)) {
            if (*n >= parsed_.stages.size())
                fail(errc::invalid, cat("invalid stage index ", *n, ": the file has ", parsed_.stages.size(), " stages, counted from 0"), lines);
            return states_[*n].get();
        }
    }
    if (const auto found = by_name_.find(to_lower(from)); found != by_name_.end()) return found->second;
    auto& known = images_[from];
    if (known == nullptr) {
        auto s = std::make_unique<stage_state>();
        s->index = states_.size();
        s->base_name = from;
        s->lines = lines;
        known = s.get();
        states_.push_back(std::move(s));
    }
    return known;
}

std::set<const stage_state*> converter::reachable_from(std::vector<const stage_state*> todo) const {
    std::set<const stage_state*> seen(todo.begin(), todo.end());
    while (!todo.empty()) {
        const auto* at = todo.back();
        todo.pop_back();
        const auto visit = [&](const stage_state* next) {
            if (next != nullptr && seen.insert(next).second) todo.push_back(next);
        };
        visit(at->base);
        for (const auto* dep : at->deps) visit(dep);
    }
    return seen;
}

void converter::refuse_cycles() const {
    for (const auto& s : states_) {
        for (const auto& c : s->commands) {
            for (const auto* source : c.sources) {
                if (source == nullptr || source->stage == nullptr || source->index < s->index) continue;
                if (!reachable_from({source}).contains(s.get())) continue;
                fail(errc::invalid, cat("circular dependency detected on stage: ", s->stage->name.empty() ? s->name : s->stage->name), c.what.lines);
            }
        }
    }
}

/// The triggers of the base image, or of a parent stage, come first. True when they need something not resolved yet.
bool converter::add_triggers(stage_state& s) {
    if (s.triggers_known || s.stage == nullptr) return false;
    if (s.base == nullptr && !s.resolved) return false;
    s.triggers_known = true;
    std::vector<std::string> triggers;
    if (s.base != nullptr) {
        for (const auto& c : s.base->commands) {
            if (const auto* on = std::get_if<df::onbuild_instruction>(&c.what.body)) triggers.push_back(on->source);
        }
    } else {
        triggers = std::exchange(s.image.config.on_build, {});
    }
    const auto deps = s.deps.size();
    std::vector<command> commands;
    for (const auto& text : triggers) {
        try {
            auto in = df::parse_instruction(df::parse_line(text), '\\');
            in.lines = s.lines;
            in.comments.clear();
            commands.push_back(make_command(s, std::move(in), true));
        } catch (const error& e) {
            fail(e.kind(), cat("ONBUILD trigger ", quoted(text), " of the base ", s.base_name, ": ", e.what()), s.lines);
        }
    }
    s.command_total +=
        static_cast<std::size_t>(std::count_if(commands.begin(), commands.end(), [](const auto& c) { return makes_step(c.what.body); }));
    s.commands.insert(s.commands.begin(), std::make_move_iterator(commands.begin()), std::make_move_iterator(commands.end()));
    return s.deps.size() != deps;
}

}  // namespace cobuild::frontend

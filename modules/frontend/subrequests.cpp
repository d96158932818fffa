module;
#include <algorithm>
#include <cstddef>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.frontend;

import cobuild.json;
import :state;

namespace cobuild::frontend {
namespace {

json::object position(unsigned line) {
    json::object out;
    if (line != 0) out.set("line", static_cast<std::int64_t>(line));
    return out;
}

json::value location(const std::vector<df::line_range>& lines) {
    json::object out;
    json::array ranges;
    for (const auto& l : lines) {
        if (l.first == 0) continue;
        json::object range;
        range.set("start", position(l.first));
        range.set("end", position(std::max(l.first, l.last)));
        ranges.emplace_back(std::move(range));
    }
    if (!ranges.empty()) out.set("ranges", std::move(ranges));
    return out;
}

void set_text(json::object& o, std::string_view key, const std::string& text) {
    if (!text.empty()) o.set(key, text);
}

std::string written(json::object o) { return json::serialize(json::value(std::move(o)), {.indent = true}); }

/// Columns as wide as their widest cell and `gap` blanks; the last one is not padded.
std::string table(const std::vector<std::vector<std::string>>& rows, std::size_t gap) {
    std::vector<std::size_t> widths;
    for (const auto& row : rows) {
        widths.resize(std::max(widths.size(), row.size()));
        for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
    }
    std::string out;
    for (const auto& row : rows) {
        for (std::size_t i = 0; i < row.size(); ++i) {
            out += row[i];
            if (i + 1 < row.size()) out.append(widths[i] - row[i].size() + gap, ' ');
        }
        out += '\n';
    }
    return out;
}

std::string check_text(const request& r, const std::vector<df::warning>& found) {
    std::string out;
    for (const auto& w : found) {
        out += cat("\nWARNING: ", w.rule, w.url.empty() ? "" : " - ", w.url, "\n", w.message, "\n");
        out += df::render_source(r.dockerfile_name, r.dockerfile, w.lines);
    }
    return out;
}

std::string plain_check_text(const request& r, const std::vector<df::warning>& found) {
    std::string out;
    for (const auto& w : found) {
        out += cat(out.empty() ? "" : "\n", r.dockerfile_name, ":", w.lines.first, ": ", w.rule, ": ", w.message, "\n");
        out += df::render_error(r.dockerfile_name, r.dockerfile, w.lines, w.message);
        const auto* rule = df::find_rule(w.rule);
        if (rule != nullptr) out += cat("help: ", rule->help, "\n");
    }
    if (found.empty()) return "no warnings found\n";
    return cat(out, "\n", found.size(), found.size() == 1 ? " warning found\n" : " warnings found\n");
}

/// `violation` is what a build would fail with, which a check only tells of.
answer check_answer(const request& r, const std::vector<df::warning>& found, std::optional<error> problem, std::optional<error> violation) {
    answer out;
    json::array warnings;
    for (const auto& w : found) {
        json::object o;
        o.set("ruleName", w.rule);
        set_text(o, "description", w.detail);
        set_text(o, "url", w.url);
        set_text(o, "detail", w.message);
        o.set("location", location({w.lines}));
        warnings.emplace_back(std::move(o));
    }
    json::object source;
    source.set("filename", r.dockerfile_name);
    source.set("data", base64_encode(r.dockerfile));
    source.set("language", "Dockerfile");
    json::object all;
    all.set("warnings", std::move(warnings));
    all.set("sources", json::array{json::value(std::move(source))});
    if (const auto& told_of = problem ? problem : violation) {
        std::vector<df::line_range> lines;
        for (const auto& d : df::split_error(*told_of)) lines.push_back(d.lines);
        json::object o;
        o.set("message", told(r, *told_of).what.what());
        o.set("location", location(lines));
        all.set("buildError", std::move(o));
    }
    out.json = written(std::move(all));
    out.text = check_text(r, found);
    out.plain = found.empty() && problem ? std::string() : plain_check_text(r, found);
    out.status = found.empty() && !problem ? 0 : 1;
    out.problem = std::move(problem);
    return out;
}

std::string outline_text(const outline& o) {
    std::string out;
    if (!o.name.empty() || !o.description.empty()) {
        std::vector<std::vector<std::string>> rows{{"TARGET:", o.name.empty() ? "(default)" : o.name}};
        if (!o.description.empty()) rows.push_back({"DESCRIPTION:", o.description});
        out += table(rows, 1) + "\n";
    }
    if (!o.args.empty()) {
        std::vector<std::vector<std::string>> rows{{"BUILD ARG", "VALUE", "DESCRIPTION"}};
        for (const auto& a : o.args) rows.push_back({a.name, a.value, a.description});
        out += table(rows, 3) + "\n";
    }
    for (const auto& [title, list] : {std::pair{"SECRET", &o.secrets}, std::pair{"SSH", &o.ssh}}) {
        if (list->empty()) continue;
        std::vector<std::vector<std::string>> rows{{title, "REQUIRED"}};
        for (const auto& s : *list) rows.push_back({s.name, s.required ? "true" : ""});
        out += table(rows, 3) + "\n";
    }
    return out;
}

json::array demands(const std::vector<outline_demand>& list) {
    json::array out;
    for (const auto& d : list) {
        json::object o;
        o.set("name", d.name);
        if (d.required) o.set("required", true);
        o.set("location", location({{d.first_line, d.last_line}}));
        out.emplace_back(std::move(o));
    }
    return out;
}

std::string outline_json(const outline& o, const std::string& text) {
    json::object all;
    set_text(all, "name", o.name);
    set_text(all, "description", o.description);
    json::array args;
    for (const auto& a : o.args) {
        json::object one;
        one.set("name", a.name);
        set_text(one, "description", a.description);
        set_text(one, "value", a.value);
        one.set("location", location({{a.first_line, a.last_line}}));
        args.emplace_back(std::move(one));
    }
    if (!args.empty()) all.set("args", std::move(args));
    if (!o.secrets.empty()) all.set("secrets", demands(o.secrets));
    if (!o.ssh.empty()) all.set("ssh", demands(o.ssh));
    all.set("sources", json::array{json::value(base64_encode(text))});
    return written(std::move(all));
}

}  // namespace

outline converter::make_outline() {
    outline out;
    out.name = target_->stage->name;
    out.description = target_->stage->description;
    std::map<std::string, arg_note> args;
    std::map<std::string, demand_note> secrets, agents;
    std::set<std::string> seen;
    std::vector<const stage_state*> todo{target_};
    std::set<const stage_state*> visited{target_};
    for (std::size_t at = 0; at < todo.size(); ++at) {
        const auto* s = todo[at];
        std::vector<std::string> used(s->used_args.begin(), s->used_args.end());
        for (std::size_t i = 0; i < used.size(); ++i) {
            const auto own = s->arg_notes.find(used[i]);
            const auto global = global_notes_.find(used[i]);
            if (own == s->arg_notes.end() && global == global_notes_.end()) continue;
            if (!seen.insert(used[i]).second) continue;
            const auto& found = own != s->arg_notes.end() ? own->second : global->second;
            args.emplace(used[i], found);
            used.insert(used.end(), found.needs.begin(), found.needs.end());
        }
        secrets.insert(s->secrets.begin(), s->secrets.end());
        agents.insert(s->agents.begin(), s->agents.end());
        std::vector<const stage_state*> next(s->deps.begin(), s->deps.end());
        if (s->base != nullptr) next.insert(next.begin(), s->base);
        for (const auto* n : next)
            if (visited.insert(n).second) todo.push_back(n);
    }
    for (const auto& [name, a] : args) out.args.push_back({name, a.value, a.description, a.lines.first, a.lines.last});
    for (const auto& [name, d] : secrets) out.secrets.push_back({name, d.required, d.lines.first, d.lines.last});
    for (const auto& [name, d] : agents) out.ssh.push_back({name, d.required, d.lines.first, d.lines.last});
    const auto by_line = [](const auto& a, const auto& b) { return std::tie(a.first_line, a.name) < std::tie(b.first_line, b.name); };
    std::sort(out.args.begin(), out.args.end(), by_line);
    std::sort(out.secrets.begin(), out.secrets.end(), by_line);
    std::sort(out.ssh.begin(), out.ssh.end(), by_line);
    return out;
}

async::task<answer> check(request r, gateway::frontend_gateway& engine) {
    converter c(r, engine);
    std::exception_ptr failed;
    try {
        co_await c.evaluate_all();
    } catch (...) {
        failed = std::current_exception();
    }
    std::optional<error> problem;
    if (failed) {
        problem = describe(failed);
        if (problem->kind() == errc::canceled || problem->kind() == errc::internal) std::rethrow_exception(failed);
    }
    const auto found = c.findings(r.target.empty());
    co_return check_answer(r, found, std::move(problem), c.check_violation(found));
}

async::task<answer> show_outline(request r, gateway::frontend_gateway& engine) {
    converter c(r, engine);
    (void)co_await c.run();
    const auto o = c.make_outline();
    answer out;
    out.json = outline_json(o, r.dockerfile);
    out.text = outline_text(o);
    out.plain = out.text.empty() ? "nothing can be set: the target takes no build argument, secret or ssh agent\n" : out.text;
    co_return out;
}

std::vector<target> list_targets(const std::string& dockerfile, const std::string& dockerfile_name) {
    const auto file = df::parse(dockerfile, dockerfile_name);
    const auto typed = df::parse_instructions(file);
    if (!typed.errors.empty()) throw df::to_error(file, typed.errors);
    std::vector<target> out;
    for (const auto& st : typed.value.stages) {
        out.push_back({.name = st.name,
                       .base = st.base,
                       .platform = st.platform,
                       .description = st.description,
                       .is_default = false,
                       .line = st.from.lines.first});
    }
    if (!out.empty()) out.back().is_default = true;
    return out;
}

answer show_targets(const request& r) {
    json::array list;
    std::vector<std::vector<std::string>> rows{{"TARGET", "DESCRIPTION"}};
    for (const auto& t : list_targets(r.dockerfile, r.dockerfile_name)) {
        json::object o;
        set_text(o, "name", t.name);
        if (t.is_default) o.set("default", true);
        set_text(o, "description", t.description);
        set_text(o, "base", t.base);
        set_text(o, "platform", t.platform);
        o.set("location", location({{t.line, t.line}}));
        list.emplace_back(std::move(o));
        std::string shown = t.name;
        if (t.is_default) shown += shown.empty() ? "(default)" : " (default)";
        rows.push_back({std::move(shown), t.description});
    }
    json::object all;
    all.set("targets", std::move(list));
    all.set("sources", json::array{json::value(base64_encode(r.dockerfile))});
    answer out;
    out.json = written(std::move(all));
    out.text = table(rows, 1);
    out.plain = out.text;
    return out;
}

}  // namespace cobuild::frontend

// buildctl debug histories, buildctl prune-histories.
#include <chrono>
#include <ctime>
#include <functional>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

#include "buildctl.hpp"

namespace cobuild::buildctl {

namespace {

/// RFC 3339 in local time, whole seconds.
std::string local_time(const std::optional<progress::time_point>& t) {
    if (!t) return {};
    const std::time_t seconds = std::chrono::duration_cast<std::chrono::seconds>(t->time_since_epoch()).count();
    std::tm parts{};
    ::localtime_r(&seconds, &parts);
    char text[40];
    const auto n = std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S%z", &parts);
    std::string out(text, n);
    if (out.ends_with("+0000")) return out.substr(0, out.size() - 5) + "Z";
    return out.insert(out.size() - 2, ":");
}

constexpr const char* kinds[] = {"STARTED", "COMPLETE", "DELETED"};

json::value to_json(const client::history_event& e) {
    json::object record;
    record.set("Ref", e.ref);
    if (!e.frontend.empty()) record.set("Frontend", e.frontend);
    if (!e.frontend_attributes.empty()) record.set("FrontendAttrs", json::value(e.frontend_attributes));
    if (!e.error.empty()) record.set("error", json::value(json::object{{"message", e.error}}));
    if (e.created) record.set("CreatedAt", format_time(*e.created));
    if (e.completed) record.set("CompletedAt", format_time(*e.completed));
    if (e.generation != 0) record.set("Generation", e.generation);
    if (e.pinned) record.set("pinned", true);
    if (e.cached_steps != 0) record.set("numCachedSteps", e.cached_steps);
    if (e.total_steps != 0) record.set("numTotalSteps", e.total_steps);
    if (e.completed_steps != 0) record.set("numCompletedSteps", e.completed_steps);
    if (e.warnings != 0) record.set("numWarnings", e.warnings);
    json::object o;
    if (e.kind != client::history_kind::started) o.set("type", static_cast<int>(e.kind));
    o.set("record", json::value(std::move(record)));
    return json::value(std::move(o));
}

struct printer {
    bool as_json;
    table rows;
    void operator()(const client::history_event& e) {
        if (as_json) return print_json(to_json(e));
        rows.line(cat(kinds[static_cast<std::size_t>(e.kind)], "\t", e.ref, "\t", local_time(e.created), "\t", local_time(e.completed), "\t",
                      e.generation, "\t", e.pinned ? "*" : ""));
    }
};

std::shared_ptr<printer> make_printer(const std::string& format) {
    auto out = std::make_shared<printer>(printer{wants_json(format), table{}});
    out->rows.line("TYPE\tREF\tCREATED\tCOMPLETED\tGENERATION\tPINNED");
    return out;
}

async::task<int> list(context c, std::shared_ptr<std::string> format) {
    const auto p = make_printer(*format);
    co_await client::histories(c.daemon, "", false, [p](const client::history_event& e) { (*p)(e); });
    if (!p->as_json) std::cout << p->rows.text();
    co_return 0;
}

async::task<int> prune(context c, std::shared_ptr<std::string> format) {
    const auto p = make_printer(*format);
    std::vector<client::history_event> all;
    co_await client::histories(c.daemon, "", false, [&all](const client::history_event& e) { all.push_back(e); });
    std::string problems;
    for (const auto& e : all) {
        if (e.ref.empty() || e.pinned) continue;
        std::string problem;
        try {
            co_await client::change_history(c.daemon, {.ref = e.ref, .remove = true});
        } catch (const error& why) {
            problem = why.what();
        }
        if (problem.empty())
            (*p)(e);
        else
            problems += cat(problems.empty() ? "" : "; ", e.ref, ": ", problem);
    }
    if (!p->as_json) std::cout << p->rows.text();
    if (!problems.empty()) throw error{errc::io, cat("not all records could be removed: ", problems)};
    co_return 0;
}

}  // namespace

command add_histories(CLI::App& debug, const globals& g, app::interrupt& stop) {
    auto format = std::make_shared<std::string>();
    auto* c = debug.add_subcommand("histories", "List the records of builds");
    c->add_option("--format", *format, "'{{json .}}': print JSON")->type_name("TEMPLATE");
    return {c, [&g, &stop, format] { return with_daemon(g, stop, [format](context x) { return list(x, format); }); }};
}

command add_prune_histories(CLI::App& app, const globals& g, app::interrupt& stop) {
    auto format = std::make_shared<std::string>();
    auto* c = app.add_subcommand("prune-histories", "Remove the records of builds that are not pinned");
    c->add_option("--format", *format, "'{{json .}}': print JSON")->type_name("TEMPLATE");
    return {c, [&g, &stop, format] { return with_daemon(g, stop, [format](context x) { return prune(x, format); }); }};
}

}  // namespace cobuild::buildctl

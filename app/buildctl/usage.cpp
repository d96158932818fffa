// buildctl du, buildctl prune.
#include <chrono>
#include <cstdint>
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

struct usage_flags {
    std::vector<std::string> filters;
    bool verbose = false, all = false;
    std::string format, keep_duration;
    double keep = 0, keep_min = 0, free = 0;  ///< megabytes
};

std::string size_text(std::int64_t bytes) { return (bytes < 0 ? "-" : "") + format_bytes(static_cast<std::uint64_t>(bytes < 0 ? -bytes : bytes)); }
const char* truth(bool b) { return b ? "true" : "false"; }

constexpr std::string_view heading = "ID\tRECLAIMABLE\tSIZE\tLAST ACCESSED";

void add_row(table& t, const client::usage& u) {
    std::string id = u.id + (u.is_mutable ? "*" : "");
    if (id.size() < 71) id.resize(71, ' ');
    std::string reclaimable = truth(!u.in_use);
    reclaimable.resize(11, ' ');
    t.line(cat(id, "\t", reclaimable, "\t", size_text(u.size), u.shared ? "*" : "", "\t"));
}

void add_record(table& t, const client::usage& u) {
    t.line(cat("ID:\t", u.id));
    if (!u.parents.empty()) {
        std::string all;
        for (const auto& p : u.parents) all += cat(all.empty() ? "" : ";", p);
        t.line(cat("Parents:\t", all));
    }
    t.line(cat("Created at:\t", u.created ? go_time(*u.created) : ""));
    t.line(cat("Mutable:\t", truth(u.is_mutable)));
    t.line(cat("Reclaimable:\t", truth(!u.in_use)));
    t.line(cat("Shared:\t", truth(u.shared)));
    t.line(cat("Size:\t", size_text(u.size)));
    if (!u.description.empty()) t.line(cat("Description:\t", u.description));
    t.line(cat("Usage count:\t", u.usage_count));
    if (u.last_used) t.line(cat("Last used:\t", go_time(*u.last_used)));
    if (!u.record_type.empty()) t.line(cat("Type:\t", u.record_type));
    t.line("");
}

json::value to_json(const client::usage& u) {
    json::object o;
    o.set("id", u.id);
    o.set("mutable", u.is_mutable);
    o.set("inUse", u.in_use);
    o.set("size", u.size);
    o.set("createdAt", format_time(u.created.value_or(progress::time_point{})));
    o.set("lastUsedAt", u.last_used ? json::value(format_time(*u.last_used)) : json::value());
    o.set("usageCount", u.usage_count);
    o.set("parents", u.parents.empty() ? json::value() : json::value(u.parents));
    o.set("description", u.description);
    o.set("recordType", u.record_type);
    o.set("shared", u.shared);
    return json::value(std::move(o));
}

void print_summary(const std::vector<client::usage>& all) {
    std::int64_t total = 0, reclaimable = 0, shared = 0;
    for (const auto& u : all) {
        if (u.size > 0) total += u.size;
        if (u.size > 0 && !u.in_use) reclaimable += u.size;
        if (u.shared) shared += u.size;
    }
    table t;
    if (shared > 0) {
        t.line(cat("Shared:\t", size_text(shared)));
        t.line(cat("Private:\t", size_text(total - shared)));
    }
    t.line(cat("Reclaimable:\t", size_text(reclaimable)));
    t.line(cat("Total:\t", size_text(total)));
    std::cout << t.text();
}

async::task<int> show(context c, std::shared_ptr<usage_flags> f) {
    const bool as_json = wants_json(f->format);
    const auto all = co_await client::disk_usage(c.daemon, f->filters);
    if (as_json) {
        json::array rows;
        for (const auto& u : all) rows.push_back(to_json(u));
        print_json(all.empty() ? json::value() : json::value(std::move(rows)));
        co_return 0;
    }
    table t;
    if (!f->verbose) t.line(heading);
    for (const auto& u : all) f->verbose ? add_record(t, u) : add_row(t, u);
    std::cout << t.text();
    if (f->filters.empty()) print_summary(all);
    co_return 0;
}

/// Records are printed as they go, so every one is a table of its own.
struct pruning {
    bool as_json, verbose, first = true;
    std::int64_t total = 0;
    void operator()(const client::usage& u) {
        total += u.size;
        if (as_json) return print_json(to_json(u));
        table t;
        if (verbose)
            add_record(t, u);
        else {
            if (std::exchange(first, false)) t.line(heading);
            add_row(t, u);
        }
        std::cout << t.text() << std::flush;
    }
};

async::task<int> prune(context c, std::shared_ptr<usage_flags> f) {
    client::prune_request q;
    q.filters = f->filters;
    q.all = f->all;
    if (!f->keep_duration.empty()) q.keep_duration = parse_duration(f->keep_duration);
    q.reserved = static_cast<std::int64_t>(f->keep_min * 1e6);
    q.max_used = static_cast<std::int64_t>(f->keep * 1e6);
    q.min_free = static_cast<std::int64_t>(f->free * 1e6);
    const auto printed = std::make_shared<pruning>(pruning{.as_json = wants_json(f->format), .verbose = f->verbose});
    co_await client::prune(c.daemon, std::move(q), [printed](const client::usage& u) { (*printed)(u); });
    if (!printed->as_json) std::cout << "Total:\t" << size_text(printed->total) << "\n";
    co_return 0;
}

void add_common(CLI::App& c, usage_flags& f) {
    c.add_option("-f,--filter", f.filters, "Filter records")->type_name("FILTER")->take_all()->allow_extra_args(false);
    c.add_flag("-v,--verbose", f.verbose, "Verbose output");
    c.add_option("--format", f.format, "'{{json .}}': print JSON")->type_name("TEMPLATE");
}

}  // namespace

std::vector<command> add_usage(CLI::App& app, const globals& g, app::interrupt& stop) {
    auto du_flags = std::make_shared<usage_flags>();
    auto* du = app.add_subcommand("du", "Show disk usage");
    add_common(*du, *du_flags);
    auto prune_flags = std::make_shared<usage_flags>();
    auto* p = app.add_subcommand("prune", "Clean up the build cache");
    add_common(*p, *prune_flags);
    p->add_option("--keep-duration", prune_flags->keep_duration, "Keep what was used within this time (48h)")->type_name("DURATION");
    p->add_option("--keep-storage", prune_flags->keep, "Keep the cache below this size, in MB")->type_name("MB");
    p->add_option("--keep-storage-min", prune_flags->keep_min, "Always allow the cache this size, in MB")->type_name("MB");
    p->add_option("--free-storage", prune_flags->free, "Keep this much of the disk free, in MB")->type_name("MB");
    p->add_flag("--all", prune_flags->all, "Include internal and frontend references");
    return {{du, [&g, &stop, du_flags] { return with_daemon(g, stop, [du_flags](context c) { return show(c, du_flags); }); }},
            {p, [&g, &stop, prune_flags] { return with_daemon(g, stop, [prune_flags](context c) { return prune(c, prune_flags); }); }}};
}

}  // namespace cobuild::buildctl

// buildctl debug: workers, info, logs, get, ctl, monitor, dump-llb.
#include <chrono>
#include <cstdio>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
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

import cobuild.llb;

namespace cobuild::buildctl {

namespace {

struct flags {
    std::vector<std::string> filters;
    std::string format, progress = "auto", ref, digest, file;
    bool verbose = false, trace = false, dot = false, pin = false, unpin = false, remove = false, completed = false;
};
using flags_ptr = std::shared_ptr<flags>;

// ---------------------------------------------------------------- workers and info

std::string platform_text(const client::platform& p) {
    std::string out = p.os;
    if (!p.os_version.empty()) out += cat("(", p.os_version, ")");
    for (const auto& part : {p.architecture, p.variant})
        if (!part.empty()) out += cat("/", part);
    return out;
}

std::string platforms_text(const client::worker& w) {
    std::string out;
    for (const auto& p : w.platforms) out += cat(out.empty() ? "" : ",", platform_text(p));
    return out;
}

void add_rule(table& t, const client::gc_rule& r, std::size_t number) {
    const auto space = [&t](const char* name, std::int64_t bytes) {
        if (bytes <= 0) return;
        // %g of the scaled number: no trailing zeros.
        double value = static_cast<double>(bytes);
        const char* unit = "B";
        for (const auto* next : {"kB", "MB", "GB", "TB"}) {
            if (value < 1000) break;
            value /= 1000;
            unit = next;
        }
        char text[32];
        std::snprintf(text, sizeof text, "%.15g", value);
        t.line(cat("\t", name, ":\t", text, unit));
    };
    t.line(cat("GC Policy rule#", number, ":"));
    t.line(cat("\tAll:\t", r.all ? "true" : "false"));
    std::string filters;
    for (const auto& f : r.filters) filters += cat(filters.empty() ? "" : " ", f);
    if (!filters.empty()) t.line(cat("\tFilters:\t", filters));
    if (r.keep_duration.count() > 0) t.line(cat("\tKeep duration:\t", format_duration(r.keep_duration)));
    space("Reserved space", r.reserved);
    space("Minimum free space", r.min_free);
    space("Maximum used space", r.max_used);
}

void add_worker(table& t, const client::worker& w) {
    t.line(cat("ID:\t", w.id));
    t.line(cat("Platforms:\t", platforms_text(w)));
    t.line(cat("BuildKit:\t", w.version.package, " ", w.version.version, " ", w.version.revision));
    if (!w.version.dockerfile.empty()) t.line(cat("Dockerfile:\t", w.version.dockerfile));
    t.line("Labels:");
    for (const auto& [key, value] : w.labels) t.line(cat("\t", key, ":\t", value));
    for (std::size_t i = 0; i < w.gc.size(); ++i) add_rule(t, w.gc[i], i);
    t.line("");
}

json::value to_json(const client::version_info& v) {
    json::object o{{"package", v.package}, {"version", v.version}, {"revision", v.revision}};
    if (!v.dockerfile.empty()) o.set("dockerfileVersion", v.dockerfile);
    return json::value(std::move(o));
}

json::value to_json(const client::worker& w) {
    json::array platforms, rules;
    for (const auto& p : w.platforms) {
        json::object o{{"architecture", p.architecture}, {"os", p.os}};
        if (!p.os_version.empty()) o.set("os.version", p.os_version);
        if (!p.os_features.empty()) o.set("os.features", p.os_features);
        if (!p.variant.empty()) o.set("variant", p.variant);
        platforms.emplace_back(std::move(o));
    }
    for (const auto& r : w.gc)
        rules.emplace_back(json::object{{"all", r.all},
                                        {"filter", r.filters.empty() ? json::value() : json::value(r.filters)},
                                        {"keepDuration", r.keep_duration.count()},
                                        {"reservedSpace", r.reserved},
                                        {"maxUsedSpace", r.max_used},
                                        {"minFreeSpace", r.min_free}});
    return json::value(json::object{{"id", w.id},
                                    {"labels", w.labels},
                                    {"platforms", std::move(platforms)},
                                    {"gcPolicy", std::move(rules)},
                                    {"buildkitVersion", to_json(w.version)},
                                    {"cdiDevices", json::value()}});
}

async::task<int> list_workers(context c, flags_ptr f) {
    const bool as_json = wants_json(f->format);
    const auto all = co_await client::workers(c.daemon, f->filters);
    if (as_json) {
        json::array out;
        for (const auto& w : all) out.push_back(to_json(w));
        print_json(json::value(std::move(out)));
        co_return 0;
    }
    table t;
    if (!f->verbose) t.line("ID\tPLATFORMS");
    for (const auto& w : all) {
        if (f->verbose)
            add_worker(t, w);
        else
            t.line(cat(w.id, "\t", platforms_text(w)));
    }
    std::cout << t.text();
    co_return 0;
}

async::task<int> show_info(context c, flags_ptr f) {
    const bool as_json = wants_json(f->format);
    const auto v = co_await client::info(c.daemon);
    if (as_json) {
        print_json(json::value(json::object{{"buildkitVersion", to_json(v)}}));
        co_return 0;
    }
    table t(false);
    t.line(cat("BuildKit:\t", v.package, " ", v.version, " ", v.revision));
    if (!v.dockerfile.empty()) t.line(cat("Dockerfile:\t", v.dockerfile));
    std::cout << t.text();
    co_return 0;
}

// ---------------------------------------------------------------- one build, one blob

void print_piece(std::string_view piece) { std::cout.write(piece.data(), static_cast<std::streamsize>(piece.size())); }

async::task<int> show_logs(context c, flags_ptr f) {
    if (f->trace) {
        std::string trace;
        bool known = false;
        co_await client::histories(c.daemon, f->ref, false, [&](const client::history_event& e) {
            known = true;
            trace = e.trace;
        });
        if (!known) throw error{errc::not_found, cat("ref ", f->ref, " not found")};
        if (trace.empty()) throw error{errc::not_found, cat("ref ", f->ref, " does not have trace")};
        co_await client::read_blob(c.daemon, digest::parse(trace), print_piece);
        co_return 0;
    }
    const auto display = app::make_display(f->progress, "");
    std::exception_ptr failed;
    try {
        co_await client::watch(c.daemon, f->ref, display);
    } catch (...) {
        failed = std::current_exception();
    }
    display->finish();
    if (failed) std::rethrow_exception(failed);
    co_return 0;
}

async::task<int> get_blob(context c, flags_ptr f) {
    const auto which = digest::parse(f->digest);
    co_await client::read_blob(c.daemon, which, print_piece);
    std::cout << std::flush;
    if (!std::cout) throw error{errc::io, "writing standard output failed"};
    co_return 0;
}

async::task<int> change(context c, flags_ptr f) {
    if (f->pin && f->unpin) throw error{errc::invalid, "cannot specify both --pin and --unpin"};
    if (!f->pin && !f->unpin && !f->remove) throw error{errc::invalid, "must specify one of --pin, --unpin, --delete"};
    co_await client::change_history(c.daemon, {.ref = f->ref, .pinned = f->pin, .remove = f->remove});
    co_return 0;
}

async::task<int> monitor(context c, flags_ptr f) {
    static constexpr const char* kinds[] = {"STARTED", "COMPLETE", "DELETED"};
    co_await client::histories(c.daemon, f->ref, true, [f](const client::history_event& e) {
        if (f->completed && e.kind != client::history_kind::complete) return;
        std::cout << kinds[static_cast<std::size_t>(e.kind)] << " " << e.ref;
        if (!e.error.empty()) std::cout << " error: " << e.error;
        std::cout << std::endl;
    });
    co_return 0;
}

int dump_llb(const flags& f) {
    std::string bytes;
    if (f.file.empty() || f.file == "-") {
        bytes.assign(std::istreambuf_iterator<char>(std::cin), {});
    } else {
        std::ifstream in(f.file, std::ios::binary);
        if (!in) throw error{errc::not_found, cat("cannot read ", f.file)};
        bytes.assign(std::istreambuf_iterator<char>(in), {});
    }
    const auto d = llb::unmarshal_definition(bytes);
    std::cout << (f.dot ? llb::to_dot(d) : llb::to_json(d));
    return 0;
}

using body = async::task<int> (*)(context, flags_ptr);

command make(CLI::App* c, const globals& g, app::interrupt& stop, flags_ptr f, body run) {
    return {c, [&g, &stop, f, run] { return with_daemon(g, stop, [f, run](context x) { return run(x, f); }); }};
}

}  // namespace

std::vector<command> add_debug(CLI::App& app, const globals& g, app::interrupt& stop) {
    auto* d = app.add_subcommand("debug", "Look into the daemon");
    d->require_subcommand(1);
    std::vector<command> out;
    const auto format = [](CLI::App* c, flags& f) { c->add_option("--format", f.format, "'{{json .}}': print JSON")->type_name("TEMPLATE"); };

    auto f = std::make_shared<flags>();
    auto* c = d->add_subcommand("workers", "List the workers");
    c->add_option("-f,--filter", f->filters, "Filter workers")->type_name("FILTER")->take_all()->allow_extra_args(false);
    c->add_flag("-v,--verbose", f->verbose, "Verbose output");
    format(c, *f);
    out.push_back(make(c, g, stop, f, list_workers));

    f = std::make_shared<flags>();
    c = d->add_subcommand("info", "Show the daemon's version");
    format(c, *f);
    out.push_back(make(c, g, stop, f, show_info));

    f = std::make_shared<flags>();
    c = d->add_subcommand("logs", "Show the progress of a build of the history");
    c->add_option("REF", f->ref, "The build")->required()->type_name("");
    c->add_option("--progress", f->progress, "auto, plain, tty, quiet, rawjson")->type_name("MODE");
    c->add_flag("--trace", f->trace, "Print its OpenTelemetry trace");
    out.push_back(make(c, g, stop, f, show_logs));

    f = std::make_shared<flags>();
    c = d->add_subcommand("get", "Print a blob of the daemon's content store");
    c->add_option("DIGEST", f->digest, "sha256:...")->required()->type_name("");
    out.push_back(make(c, g, stop, f, get_blob));

    f = std::make_shared<flags>();
    c = d->add_subcommand("ctl", "Pin, unpin or delete a build of the history");
    c->add_option("REF", f->ref, "The build")->required()->type_name("");
    c->add_flag("--pin", f->pin, "Keep it");
    c->add_flag("--unpin", f->unpin, "Do not keep it");
    c->add_flag("--delete", f->remove, "Delete it");
    out.push_back(make(c, g, stop, f, change));

    f = std::make_shared<flags>();
    c = d->add_subcommand("monitor", "Tell of builds as they come and go");
    c->add_flag("--completed", f->completed, "Only completed ones");
    c->add_option("--ref", f->ref, "This build only")->type_name("REF");
    out.push_back(make(c, g, stop, f, monitor));

    f = std::make_shared<flags>();
    c = d->add_subcommand("dump-llb", "Print a marshalled LLB definition as JSON lines");
    c->add_option("FILE", f->file, "The definition; standard input without it")->type_name("");
    c->add_flag("--dot", f->dot, "As a Graphviz graph");
    out.push_back({c, [f] { return dump_llb(*f); }});

    out.push_back(add_histories(*d, g, stop));
    return out;
}

}  // namespace cobuild::buildctl

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

#include "cli.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.build;

namespace cobuild::app {

namespace {

using engine_ptr = std::shared_ptr<build::engine>;

/// Prints rows with their columns aligned.
void print_table(const std::vector<std::vector<std::string>>& rows) {
    std::vector<std::size_t> width;
    for (const auto& row : rows)
        for (std::size_t i = 0; i < row.size(); ++i) {
            if (width.size() <= i) width.push_back(0);
            width[i] = std::max(width[i], row[i].size());
        }
    for (const auto& row : rows) {
        std::string line;
        for (std::size_t i = 0; i < row.size(); ++i) line += row[i] + (i + 1 < row.size() ? std::string(width[i] - row[i].size() + 2, ' ') : "");
        std::cout << line << "\n";
    }
}

std::string ago(std::chrono::sys_time<nanoseconds> t) {
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now() - t).count();
    if (seconds < 0) return "now";
    if (seconds < 120) return cat(seconds, " seconds ago");
    if (seconds < 7200) return cat(seconds / 60, " minutes ago");
    if (seconds < 172800) return cat(seconds / 3600, " hours ago");
    return cat(seconds / 86400, " days ago");
}

async::task<int> list_images(engine_ptr engine, bool quiet) {
    std::vector<std::vector<std::string>> rows;
    if (!quiet) rows.push_back({"NAME", "IMAGE ID", "CREATED", "SIZE"});
    for (const auto& image : co_await engine->images()) {
        if (quiet)
            rows.push_back({image.config_digest});
        else
            rows.push_back({image.name, image.config_digest.substr(7, 12), ago(image.created), format_bytes(image.size)});
    }
    print_table(rows);
    co_return 0;
}

async::task<int> remove_images(engine_ptr engine, const std::vector<std::string>& names) {
    int code = 0;
    for (const auto& name : names) {
        if (co_await engine->remove_image(name)) {
            std::cout << "removed " << name << "\n";
        } else {
            std::cerr << "error: no such image: " << name << "\n";
            code = 1;
        }
    }
    co_return code;
}

void print_usage(const std::vector<build::usage_info>& all, bool verbose, bool totals) {
    std::uint64_t total = 0, shared = 0, reclaimable = 0;
    std::vector<std::vector<std::string>> rows{{"ID", "RECLAIMABLE", "SIZE", "LAST ACCESSED"}};
    if (verbose) rows.front().emplace_back("DESCRIPTION");
    for (const auto& u : all) {
        total += u.size;
        if (u.shared) shared += u.size;
        if (!u.in_use) reclaimable += u.size;
        rows.push_back({u.id + (u.mutable_ ? "*" : ""), u.in_use ? "false" : "true", format_bytes(u.size) + (u.shared ? "*" : ""), ago(u.last_used)});
        if (verbose) rows.back().push_back(u.description.empty() ? u.kind : u.description);
    }
    if (!all.empty()) print_table(rows);
    if (!totals) {
        std::cout << "Total:\t" << format_bytes(total) << "\n";
        return;
    }
    print_table({{"Shared:", format_bytes(shared)},
                 {"Private:", format_bytes(total - shared)},
                 {"Reclaimable:", format_bytes(reclaimable)},
                 {"Total:", format_bytes(total)}});
}

async::task<int> show_usage(engine_ptr engine, bool verbose) {
    print_usage(co_await engine->usage(), verbose, true);
    co_return 0;
}

async::task<int> prune(engine_ptr engine, build::prune_options options, bool verbose) {
    print_usage(co_await engine->prune(std::move(options)), verbose, false);
    co_return 0;
}

struct image_flags {
    engine_flags engine;
    bool quiet = false;
    std::vector<std::string> names;
};

struct usage_flags {
    engine_flags engine;
    bool verbose = false, all = false;
    std::string keep_duration, keep_storage, reserved, min_free;
    std::vector<std::string> filters;
};

}  // namespace

std::vector<command> add_image_commands(CLI::App& app, interrupt& stop) {
    std::vector<command> out;
    auto list = std::make_shared<image_flags>();
    auto* images = app.add_subcommand("images", "List the images built here");
    images->add_flag("-q,--quiet", list->quiet, "Only image ids");
    list->engine.add_to(*images);
    out.push_back({images, [list, &stop] { return with_engine(list->engine, stop, [list](engine_ptr e) { return list_images(e, list->quiet); }); }});

    auto* image = app.add_subcommand("image", "Images built here");
    image->require_subcommand(1);
    auto remove = std::make_shared<image_flags>();
    auto* rm = image->add_subcommand("rm", "Remove images by name");
    rm->add_option("NAME", remove->names, "Names of images")->required()->type_name("");
    remove->engine.add_to(*rm);
    out.push_back(
        {rm, [remove, &stop] { return with_engine(remove->engine, stop, [remove](engine_ptr e) { return remove_images(e, remove->names); }); }});
    auto again = std::make_shared<image_flags>();
    auto* ls = image->add_subcommand("ls", "List the images built here");
    ls->add_flag("-q,--quiet", again->quiet, "Only image ids");
    again->engine.add_to(*ls);
    out.push_back({ls, [again, &stop] { return with_engine(again->engine, stop, [again](engine_ptr e) { return list_images(e, again->quiet); }); }});
    return out;
}

std::vector<command> add_usage_commands(CLI::App& app, interrupt& stop) {
    std::vector<command> out;
    auto show = std::make_shared<usage_flags>();
    auto* du = app.add_subcommand("du", "Show what the cache holds");
    du->add_flag("-v,--verbose", show->verbose, "With a description of each record");
    show->engine.add_to(*du);
    out.push_back({du, [show, &stop] { return with_engine(show->engine, stop, [show](engine_ptr e) { return show_usage(e, show->verbose); }); }});

    auto flags = std::make_shared<usage_flags>();
    auto* c = app.add_subcommand("prune", "Remove what no image needs from the cache");
    c->add_flag("-a,--all", flags->all, "Also internal and shared records");
    c->add_flag("-v,--verbose", flags->verbose, "With a description of each record");
    c->add_flag_callback("-f,--force", [] {}, "Accepted for docker's sake; nothing is asked");
    c->add_option("--keep-duration", flags->keep_duration, "Keep what was used since (for example 48h)")->type_name("DURATION");
    c->add_option("--max-used-space", flags->keep_storage, "Stop when no more than this is used")->type_name("SIZE");
    c->add_option("--reserved-space", flags->reserved, "Always keep this much")->type_name("SIZE");
    c->add_option("--min-free-space", flags->min_free, "Remove until this much of the disk is free")->type_name("SIZE");
    c->add_option("--filter", flags->filters, "Only records that match")->type_name("FILTER")->allow_extra_args(false);
    flags->engine.add_to(*c);
    out.push_back({c, [flags, &stop] {
                       build::prune_options o{.all = flags->all, .filters = flags->filters};
                       if (!flags->keep_duration.empty()) o.keep_duration = parse_duration(flags->keep_duration);
                       if (!flags->keep_storage.empty()) o.max_used = parse_bytes(flags->keep_storage);
                       if (!flags->reserved.empty()) o.reserved = parse_bytes(flags->reserved);
                       if (!flags->min_free.empty()) o.min_free = parse_bytes(flags->min_free);
                       return with_engine(flags->engine, stop, [flags, o](engine_ptr e) { return prune(e, o, flags->verbose); });
                   }});
    return out;
}

std::vector<command> add_config_commands(CLI::App& app) {
    std::vector<command> out;
    auto* parent = app.add_subcommand("config", "Look at a configuration file");
    parent->require_subcommand(1);
    auto file = std::make_shared<std::string>();
    auto* check = parent->add_subcommand("check", "Name every mistake of a configuration file");
    check->add_option("FILE", *file, "Configuration file, as buildkitd's")->required()->type_name("");
    out.push_back({check, [file] {
                       const auto findings = config::check(*file);
                       bool bad = false;
                       for (const auto& f : findings) {
                           std::cout << config::to_string(f) << "\n";
                           bad = bad || f.level == config::severity::error;
                       }
                       if (findings.empty()) std::cout << *file << ": in order\n";
                       return bad ? 1 : 0;
                   }});
    auto flags = std::make_shared<engine_flags>();
    auto* print = parent->add_subcommand("print", "Show the effective configuration as TOML");
    flags->add_to(*print);
    out.push_back({print, [flags] {
                       auto settings = flags->load();
                       settings.root = build::state_directory({.settings = settings}).string();
                       std::cout << config::to_toml(settings);
                       return 0;
                   }});
    return out;
}

}  // namespace cobuild::app

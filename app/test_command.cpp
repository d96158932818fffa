#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

#include "cli.hpp"

import cobuild.script;

namespace cobuild::app {

namespace {

struct test_flags {
    std::vector<std::string> files;
    script::options options;
    std::vector<std::string> build_args;
};

/// Directories stand for the scenarios (*.txtar) in them.
std::vector<std::filesystem::path> find_files(const std::vector<std::string>& named) {
    std::vector<std::filesystem::path> out;
    for (const auto& n : named) {
        if (!std::filesystem::exists(n)) throw error{errc::not_found, cat("there is no scenario ", quoted(n))};
        if (!std::filesystem::is_directory(n)) {
            out.emplace_back(n);
            continue;
        }
        std::vector<std::filesystem::path> inside;
        for (const auto& e : std::filesystem::directory_iterator(n))
            if (e.path().extension() == ".txtar") inside.push_back(e.path());
        std::sort(inside.begin(), inside.end());
        out.insert(out.end(), inside.begin(), inside.end());
    }
    return out;
}

int run_tests(const test_flags& flags, interrupt& stop) {
    const auto files = find_files(flags.files);
    if (files.empty()) throw error{errc::not_found, "there are no scenarios (*.txtar) to run"};
    auto options = flags.options;
    options.program = std::filesystem::read_symlink("/proc/self/exe").string();
    async::runtime rt;
    const auto report = [](const script::outcome& o) {
        static constexpr const char* words[] = {"ok  ", "FAIL", "skip"};
        char time[32];
        std::snprintf(time, sizeof time, "%.2fs", std::chrono::duration<double>(o.took).count());
        std::cout << words[static_cast<int>(o.verdict)] << "  " << o.name << "  " << time << "\n";
        if (!o.message.empty()) std::cout << o.message << (o.message.ends_with('\n') ? "" : "\n");
        std::cout << std::flush;
    };
    const auto all = rt.block_on(async::linked(stop.token(), script::run(files, options, rt, report)));
    std::size_t failed = 0, skipped = 0;
    for (const auto& o : all) {
        failed += o.verdict == script::verdict::failed ? 1 : 0;
        skipped += o.verdict == script::verdict::skipped ? 1 : 0;
    }
    std::cout << all.size() << " scenarios, " << failed << " failed, " << skipped << " skipped\n";
    return failed == 0 ? 0 : 1;
}

}  // namespace

command add_test(CLI::App& app, interrupt& stop) {
    auto flags = std::make_shared<test_flags>();
    flags->options.parallel = std::max(1U, std::thread::hardware_concurrency());
    auto* c = app.add_subcommand("test", "Run scripted builds");
    c->add_option("FILE", flags->files, "Scenarios, or directories of them")->required()->type_name("");
    c->add_flag("--update,-u", flags->options.update, "Accept new output where cmp differs");
    c->add_flag("--keep", flags->options.keep, "Leave the working directories");
    c->add_option("-j,--parallel", flags->options.parallel, "Scenarios at once")->type_name("N");
    c->add_option("--build-flag", flags->options.arguments, "Flag for every 'cobuild build' of the scripts")
        ->type_name("FLAG")
        ->allow_extra_args(false);
    return {c, [flags, &stop] { return run_tests(*flags, stop); }};
}

}  // namespace cobuild::app

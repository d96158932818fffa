// What can be asked instead of building, and how errors in a Dockerfile are shown.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

#include "cli.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.build;
import cobuild.dockerfile;

namespace cobuild::app {

namespace {

bool truth(const std::string& flag, std::string_view value) {
    if (value.empty() || value == "true" || value == "1") return true;
    if (value == "false" || value == "0") return false;
    throw error{errc::invalid, cat(flag, ": ignorestatus takes true or false")};
}

std::optional<build::question> method(std::string_view name) {
    if (name == "check" || name == "lint") return build::question::check;
    if (name == "outline") return build::question::outline;
    if (name == "targets") return build::question::targets;
    if (name.empty() || name == "build") return std::nullopt;
    static constexpr std::string_view known[] = {"build", "check", "outline", "targets"};
    const auto near = dockerfile::likely_word(name, known);
    throw error{errc::invalid, cat("--call: unknown method ", quoted(name),
                                   near.empty() ? " (build, check, outline and targets are known)" : cat(", did you mean ", near, "?"))};
}

std::string dockerfile_text(const build::build_request& r, const std::string& name) {
    if (r.dockerfile_text) return *r.dockerfile_text;
    std::ifstream in(r.dockerfile.empty() ? r.context / name : r.dockerfile, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
}

bool is_dockerfile(const build::build_request& r, const std::string& name) {
    if (r.dockerfile_text) return true;
    if (r.context.empty()) return false;  // it came with a remote context
    return r.dockerfile.empty() ? name == "Dockerfile" || name == "dockerfile" : name == r.dockerfile.filename().string();
}

}  // namespace

std::string read_policy(const std::string& file) {
    std::ifstream in(file, std::ios::binary);
    std::string out{std::istreambuf_iterator<char>(in), {}};
    if (!in) throw error{errc::not_found, cat("cannot read the source policy ", file, " (EXPERIMENTAL_BUILDKIT_SOURCE_POLICY)")};
    return out;
}

std::optional<build_call> parse_call(const std::string& call, const std::string& print_llb) {
    if (!print_llb.empty()) {
        if (print_llb != "json" && print_llb != "dot") throw error{errc::invalid, cat("--print-llb=", print_llb, ": json and dot are known")};
        return build_call{.what = build::question::graph, .json = print_llb == "json"};
    }
    build_call out;
    const auto words = split(call, ',');
    const auto what = method(words.front());
    for (std::size_t i = 1; i < words.size(); ++i) {
        const auto eq = words[i].find('=');
        const auto key = words[i].substr(0, eq);
        const auto value = eq == std::string_view::npos ? std::string_view() : words[i].substr(eq + 1);
        if (key == "format" && (value == "json" || value == "text"))
            out.json = value == "json";
        else if (key == "ignorestatus")
            out.ignore_status = truth(cat("--call=", call), value);
        else
            throw error{errc::invalid, cat("--call=", call, ": format=json, format=text and ignorestatus= are known")};
    }
    if (!what) return std::nullopt;
    out.what = *what;
    return out;
}

async::task<int> run_call(std::shared_ptr<build::engine> engine, build::build_request request, build_call call,
                          std::shared_ptr<progress_display> display, async::cancel_token stop) {
    const auto asked = request;
    std::exception_ptr failed;
    build::answer answer;
    try {
        answer = co_await engine->ask(std::move(request), call.what, display, stop);
    } catch (...) {
        failed = std::current_exception();
    }
    if (failed) throw show_problem(asked, describe(failed));
    std::cout << (call.json ? answer.json : answer.text);
    if (call.json && !answer.json.ends_with('\n')) std::cout << '\n';
    std::cout << std::flush;
    // In JSON the error is part of the answer.
    if (answer.problem && !call.ignore_status && !call.json) throw show_problem(asked, *answer.problem);
    co_return call.ignore_status ? 0 : answer.status;
}

error show_problem(const build::build_request& request, error e) {
    if (!e.where() || e.where()->line == 0) return e;
    const auto& file = e.where()->file;
    if (!is_dockerfile(request, file)) return e;
    const auto text = dockerfile_text(request, file);
    const auto all = dockerfile::split_error(e);
    for (std::size_t i = 0; i < all.size(); ++i) {
        std::cerr << dockerfile::render_error(file, text, all[i].lines, all[i].message);
        if (all.size() > 1) std::cerr << "error: " << file << ":" << all[i].lines.first << ": " << all[i].message << "\n\n";
    }
    if (all.size() == 1) return e;
    return error{e.kind(), cat(file, ": ", all.size(), " errors, shown above")};
}

}  // namespace cobuild::app

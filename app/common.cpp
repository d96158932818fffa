#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <system_error>

#include <boost/asio/awaitable.hpp>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

#include "cli.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.config;
import cobuild.build;

namespace cobuild::app {

// ---------------------------------------------------------------- engine flags

void engine_flags::add_to(CLI::App& command) {
    auto& o = overrides;
    const auto text = [&](const std::string& name, std::optional<std::string>& target, const std::string& help) {
        command.add_option_function<std::string>(name, [&target](const std::string& v) { target = v; }, help)->group("Engine")->type_name("TEXT");
    };
    command.add_option("--config", config_file, "Configuration file, as buildkitd's")->group("Engine")->type_name("FILE");
    text("--root", o.root, "State directory (/var/lib/cobuild)");
    command.add_flag_callback("--debug", [&o] { o.debug = true; }, "Log what the engine does, every registry request included")->group("Engine");
    text("--log-level", o.log_level, "trace, debug, info, warning, error, fatal or panic");
    text("--log-format", o.log_format, "text or json");
    command.add_flag_callback("--trace", [&o] { o.trace = true; }, "As --debug, and more")->group("Engine");
    text("--oci-worker-net", o.oci.network, "Network of steps: auto, cni, host or none");
    text("--oci-worker-binary", o.oci.binary, "OCI runtime: runc or crun, by name or path");
    text("--oci-worker-snapshotter", o.oci.snapshotter, "auto, overlayfs or native");
    text("--oci-worker-gc-keepstorage", o.oci.gc_keep_storage, "Reserved[,Free[,Max]] in MB");
    command
        .add_option_function<std::vector<std::string>>(
            "--allow-insecure-entitlement", [&o](const std::vector<std::string>& v) { o.allow_insecure_entitlement = v; },
            "What builds may be granted: network.host, security.insecure, device")
        ->group("Engine")
        ->type_name("NAME")
        ->take_all()
        ->allow_extra_args(false);
    text("--oci-cni-config-path", o.oci.cni_config_path, "CNI network configuration");
    text("--oci-cni-binary-dir", o.oci.cni_binary_dir, "Directory of CNI plugins");
    command
        .add_option_function<std::int64_t>(
            "--oci-cni-pool-size", [&o](std::int64_t v) { o.oci.cni_pool_size = v; }, "Network namespaces kept ready")
        ->group("Engine");
    command
        .add_option_function<std::int64_t>(
            "--oci-max-parallelism", [&o](std::int64_t v) { o.oci.max_parallelism = v; }, "Most steps that run at once")
        ->group("Engine");
    command
        .add_flag_function(
            "--oci-worker-gc", [&o](std::int64_t n) { o.oci.gc = n > 0; }, "Remove old data by itself; --oci-worker-gc=false switches it off")
        ->group("Engine");
}

namespace {
config::loaded read_settings(const engine_flags& f) {
    const bool named = !f.config_file.empty();
    return config::load(named ? std::filesystem::path(f.config_file) : config::default_path(), named, f.overrides);
}
}  // namespace

config::configuration engine_flags::reload() const {
    auto loaded = read_settings(*this);
    for (const auto& w : loaded.warnings) log(log_level::warning, config::to_string(w));
    return std::move(loaded.config);
}

config::configuration engine_flags::load() const {
    auto loaded = read_settings(*this);
    auto& c = loaded.config;
    set_log({.level = c.log.level.value_or(default_level), .format = c.log.format});
    for (const auto& w : loaded.warnings) std::cerr << config::to_string(w) << "\n";
    return std::move(c);
}

// ---------------------------------------------------------------- engine

namespace {
async::task<int> run_with(build::engine_options options, std::function<async::task<int>(std::shared_ptr<build::engine>)> work, engine_setup setup) {
    const auto settings = options.settings;
    auto engine = co_await build::engine::open(std::move(options));
    if (setup) setup(engine, settings);
    std::exception_ptr failed;
    int code = 0;
    try {
        code = co_await work(engine);
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::no_cancel;
    co_await engine->close();
    if (failed) std::rethrow_exception(failed);
    co_return code;
}
}  // namespace

int with_engine(const engine_flags& flags, interrupt&, std::function<async::task<int>(std::shared_ptr<build::engine>)> work, engine_setup setup) {
    build::engine_options options;
    options.settings = flags.load();
    async::runtime here({.max_blocking_threads = 1});
    return here.block_on(run_with(std::move(options), std::move(work), std::move(setup)));
}

void let_the_last_count(CLI::App& command) {
    for (auto* option : command.get_options({}))
        if (option->get_expected_max() <= 1 && option->get_multi_option_policy() == CLI::MultiOptionPolicy::Throw)
            option->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
    for (auto* below : command.get_subcommands({})) let_the_last_count(*below);
}

std::string daemon_program() {
    std::error_code ec;
    const auto self = std::filesystem::read_symlink("/proc/self/exe", ec);
    return (self.parent_path() / "cobuildd").string();
}

}  // namespace cobuild::app

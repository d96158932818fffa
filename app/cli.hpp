// The command line: one function per command, and what they share.
#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "terminal.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.config;
import cobuild.progress;
import cobuild.build;

namespace CLI {
class App;
}

namespace cobuild::app {

/// Flags that every command which opens the engine takes: --config, --root, --debug and buildkitd's worker flags.
struct engine_flags {
    std::string config_file;
    config::overrides overrides;
    log_level default_level = log_level::warning;  ///< where neither file nor flag says one
    void add_to(CLI::App& command);
    /// Reads the configuration, sets up the log, prints warnings. Throws for a bad file or flag.
    [[nodiscard]] config::configuration load() const;
    /// Reads it again while all goes on: the log stays as it is, and gets the warnings.
    [[nodiscard]] config::configuration reload() const;
};

/// What --check, --call and --print-llb ask for; nothing when it is a build. Throws errc::invalid for an unknown method.
struct build_call {
    build::question what = build::question::check;
    bool json = false;
    bool ignore_status = false;
};
std::optional<build_call> parse_call(const std::string& call, const std::string& print_llb);
/// Asks and prints the answer on standard output. The exit code is the answer's status, unless that is ignored.
async::task<int> run_call(std::shared_ptr<build::engine> engine, build::build_request request, build_call call,
                          std::shared_ptr<progress_display> display, async::cancel_token stop);
/// The text of a source policy's file. Throws errc::not_found.
std::string read_policy(const std::string& file);
/// Prints the Dockerfile around every place that `e` names, marked. Returns what is left to say of it.
error show_problem(const build::build_request& request, error e);

/// "cobuild help [COMMAND|CHECK]"; what it prints.
std::string help_text(CLI::App& app, const std::string& topic);
/// The sentence for words of the command line that nothing took.
std::string unexpected_words(const CLI::App& app);

/// Registers a command; the returned function runs it when it was chosen and returns the exit code.
using runner = std::function<int()>;
struct command {
    CLI::App* parsed;
    runner run;
};
/// Before the first build of an engine: who runs frontends that are images.
using engine_setup = std::function<void(std::shared_ptr<build::engine>, const config::configuration&)>;
/// Without a setup, builds with such a frontend go on in cobuildd, which this process becomes.
command add_build(CLI::App& app, interrupt& stop, engine_setup setup = {});
std::vector<command> add_image_commands(CLI::App& app, interrupt& stop);
std::vector<command> add_usage_commands(CLI::App& app, interrupt& stop);
std::vector<command> add_config_commands(CLI::App& app);
std::vector<command> add_registry_commands(CLI::App& app, interrupt& stop);
command add_test(CLI::App& app, interrupt& stop);

/// Opens an engine, runs `work` with it and closes it, in whatever way `work` ends.
int with_engine(const engine_flags& flags, interrupt& stop, std::function<async::task<int>(std::shared_ptr<build::engine>)> work,
                engine_setup setup = {});

/// As docker's flags are: of a flag that takes one value, the last one given counts.
void let_the_last_count(CLI::App& command);
/// The program beside this one that has gRPC: linking it costs every start of a command five milliseconds.
std::string daemon_program();

}  // namespace cobuild::app

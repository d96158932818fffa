#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

#include "cli.hpp"

import cobuild.base;

namespace {

int become_daemon(char** argv) {
    const auto program = cobuild::app::daemon_program();
    std::string name = "cobuild daemon";
    argv[1] = name.data();
    ::execv(program.c_str(), argv + 1);
    throw cobuild::os_error(errno, "starting " + program);
}

int run(int argc, char** argv) {
    using namespace cobuild;
    if (argc > 1 && std::string_view(argv[1]) == "daemon") return become_daemon(argv);
    CLI::App cli{"cobuild builds container images from Dockerfiles, without a daemon.", "cobuild"};
    cli.require_subcommand(0, 1);
    cli.set_version_flag("--version", "cobuild " + std::string(version()));
    cli.get_formatter()->column_width(32);
    cli.footer("Run 'cobuild COMMAND --help' for a command's flags.");

    app::interrupt stop;
    std::vector<app::command> commands;
    commands.push_back(app::add_build(cli, stop));
    for (auto& c : app::add_image_commands(cli, stop)) commands.push_back(std::move(c));
    for (auto& c : app::add_usage_commands(cli, stop)) commands.push_back(std::move(c));
    for (auto& c : app::add_config_commands(cli)) commands.push_back(std::move(c));
    for (auto& c : app::add_registry_commands(cli, stop)) commands.push_back(std::move(c));
    commands.push_back(app::add_test(cli, stop));
    auto* version_command = cli.add_subcommand("version", "Show the version");
    commands.push_back({version_command, [] {
                            std::cout << "cobuild " << version() << "\n";
                            return 0;
                        }});
    // Only for the list of commands: what follows it is cobuildd's.
    cli.add_subcommand("daemon", "Serve BuildKit's API to docker buildx and buildctl (see cobuild daemon --help)");

    std::string topic;
    auto* help = cli.add_subcommand("help", "Explain a command, or a check of 'cobuild build --check'");
    help->add_option("COMMAND", topic, "A command, a check's name, or 'checks'")->type_name("");
    commands.push_back({help, [&cli, &topic] {
                            std::cout << app::help_text(cli, topic);
                            return 0;
                        }});

    app::let_the_last_count(cli);
    try {
        cli.parse(argc, argv);
    } catch (const CLI::ParseError& e) {
        if (e.get_exit_code() == 0) return cli.exit(e);  // --help, --version
        // A word that nothing knows explains what is said to be missing.
        const auto words = app::unexpected_words(cli);
        std::cerr << "error: " << (words.empty() ? e.what() : words) << "\n";
        return 2;
    }
    for (const auto& c : commands)
        if (c.parsed->parsed() && c.run) return c.run();
    std::cout << cli.help();
    return cli.get_subcommands().empty() && argc > 1 ? 2 : 0;
}

}  // namespace

int main(int argc, char** argv) {
    // A reader that goes away (cobuild ... | head) is an error of write(2), not a death.
    ::signal(SIGPIPE, SIG_IGN);
    try {
        return run(argc, argv);
    } catch (...) {
        const auto e = cobuild::describe(std::current_exception());
        cobuild::app::print_error(e);
        return cobuild::app::exit_code_for(e);
    }
}

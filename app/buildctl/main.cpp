// buildctl: BuildKit's client. It speaks to any daemon with BuildKit's API.
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <exception>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

#include "buildctl.hpp"

namespace cobuild::buildctl {

client::endpoint globals::endpoint() const {
    client::endpoint out{.address = address, .ca = ca, .certificate = certificate, .key = key, .server_name = server_name};
    if (tls_dir.empty()) return out;
    if (!ca.empty() || !certificate.empty() || !key.empty())
        throw error{errc::invalid, "cannot specify tlsdir and tlscacert/tlscert/tlskey at the same time"};
    client::use_tls_directory(out, tls_dir);
    return out;
}

namespace {

using namespace std::chrono_literals;

async::task<void> until_there(client::channel_ptr daemon) {
    for (;;) {
        bool there = true;
        try {
            co_await client::info(daemon);
        } catch (const error& e) {
            // A daemon without Info is one all the same.
            there = e.kind() != errc::unavailable;
        }
        if (there) co_return;
        co_await async::sleep_for(100ms);
    }
}

async::task<int> connected(const globals& g, async::runtime& rt, std::function<async::task<int>(context)> work) {
    const auto daemon = client::dial(rt.get_executor(), g.endpoint());
    if (g.wait && g.timeout > 0)
        co_await async::with_deadline(std::chrono::seconds(g.timeout), cat("waiting for the daemon at ", g.address), until_there(daemon));
    else if (g.wait)
        co_await until_there(daemon);
    co_return co_await work(context{daemon, rt.pool()});
}

/// gRPC's own words for "nobody listens there", made a sentence.
error reached(const globals& g, error e) {
    static constexpr std::string_view marker = "last error: ";
    const std::string_view what = e.what();
    if (e.kind() != errc::unavailable || what.find("failed to connect to all addresses") == std::string_view::npos) return e;
    auto reason = what.substr(what.find(marker) == std::string_view::npos ? 0 : what.find(marker) + marker.size());
    if (const auto last = reason.rfind(": "); last != std::string_view::npos) reason = reason.substr(last + 2);
    if (reason.starts_with("Endpoint read failed") || reason.starts_with("Socket closed"))
        return error{errc::unavailable,
                     cat("cannot connect to the daemon at ", g.address,
                         ": it closed the connection; does it want TLS and a client certificate? (--tlscacert, --tlscert, --tlskey)")};
    return error{errc::unavailable, cat("cannot connect to the daemon at ", g.address, ": ", reason, "; is it running? (--addr or BUILDKIT_HOST)")};
}

}  // namespace

int with_daemon(const globals& g, app::interrupt& stop, std::function<async::task<int>(context)> work) {
    // Never destroyed: gRPC's threads may still tell it of the end of a call that was dropped.
    static async::runtime* rt = new async::runtime;
    std::exception_ptr failed;
    try {
        return rt->block_on(async::linked(stop.token(), connected(g, *rt, std::move(work))));
    } catch (...) {
        failed = std::current_exception();
    }
    throw reached(g, describe(failed));
}

namespace {

void let_the_last_count(CLI::App& command) {
    for (auto* option : command.get_options({}))
        if (option->get_expected_max() <= 1 && option->get_multi_option_policy() == CLI::MultiOptionPolicy::Throw)
            option->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
    for (auto* below : command.get_subcommands({})) let_the_last_count(*below);
}

void add_globals(CLI::App& cli, globals& g) {
    const char* host = std::getenv("BUILDKIT_HOST");
    g.address = host != nullptr && *host != '\0' ? host : "unix:///run/buildkit/buildkitd.sock";
    cli.add_option("--addr", g.address, "Address of the daemon: unix:///path or tcp://host:port (BUILDKIT_HOST)")->type_name("ADDRESS");
    cli.add_flag("--debug", g.debug, "Log what is done");
    cli.add_option("--tlsservername", g.server_name, "Name expected in the daemon's certificate")->type_name("NAME");
    cli.add_option("--tlscacert", g.ca, "CA certificate for the daemon's")->type_name("FILE");
    cli.add_option("--tlscert", g.certificate, "Client certificate")->type_name("FILE");
    cli.add_option("--tlskey", g.key, "Key of the client certificate")->type_name("FILE");
    cli.add_option("--tlsdir", g.tls_dir, "Directory with ca.pem, cert.pem and key.pem")->type_name("DIR");
    cli.add_option("--timeout", g.timeout, "Seconds to wait for the daemon with --wait (5)")->type_name("SECONDS");
    cli.add_flag("--wait", g.wait, "Wait until the daemon is there");
    cli.add_option_function<std::string>(
           "--log-format",
           [](const std::string& v) {
               if (v != "text" && v != "json") throw error{errc::invalid, cat("--log-format ", quoted(v), ": text and json are known")};
           },
           "Form of log lines: text or json")
        ->type_name("FORM");
}

int run(int argc, char** argv) {
    CLI::App cli{"buildctl builds images with a BuildKit daemon, or one that speaks its API.", "buildctl"};
    cli.require_subcommand(0, 1);
    cli.set_version_flag("-v,--version", cat("buildctl github.com/cobuild ", version()));
    cli.get_formatter()->column_width(32);
    globals g;
    add_globals(cli, g);
    app::interrupt stop;
    std::vector<command> commands;
    for (auto& c : add_usage(cli, g, stop)) commands.push_back(std::move(c));
    commands.push_back(add_prune_histories(cli, g, stop));
    commands.push_back(add_build(cli, g, stop));
    for (auto& c : add_debug(cli, g, stop)) commands.push_back(std::move(c));
    commands.push_back(add_dial_stdio(cli, g));
    let_the_last_count(cli);
    try {
        cli.parse(argc, argv);
    } catch (const CLI::ParseError& e) {
        if (e.get_exit_code() == 0) return cli.exit(e);  // --help, --version
        std::cerr << "error: " << e.what() << "\n";
        return 1;
    }
    app::set_log({.level = g.debug ? log_level::debug : log_level::warning});
    for (const auto& c : commands)
        if (c.parsed->parsed()) return c.run();
    std::cout << cli.help();
    return 0;
}

}  // namespace

}  // namespace cobuild::buildctl

int main(int argc, char** argv) {
    ::signal(SIGPIPE, SIG_IGN);
    int code = 1;
    try {
        code = cobuild::buildctl::run(argc, argv);
    } catch (...) {
        // As BuildKit's client, whatever failed: 1.
        cobuild::app::print_error(cobuild::describe(std::current_exception()));
    }
    std::cout << std::flush;
    return code;
}

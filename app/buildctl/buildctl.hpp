// buildctl: one function per command, and what they share.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "terminal.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.client;
import cobuild.json;
import cobuild.progress;

namespace CLI {
class App;
}

namespace cobuild::buildctl {

/// Flags before the command.
struct globals {
    std::string address, ca, certificate, key, tls_dir, server_name;
    int timeout = 5;  ///< seconds
    bool wait = false, debug = false;
    [[nodiscard]] client::endpoint endpoint() const;
};

/// What a command works with; one io thread for all.
struct context {
    client::channel_ptr daemon;
    async::blocking_pool& pool;
};
/// Connects and runs `work`, which Ctrl-C cancels. With --wait it first waits for the daemon, for --timeout seconds.
int with_daemon(const globals& g, app::interrupt& stop, std::function<async::task<int>(context)> work);

using runner = std::function<int()>;
struct command {
    CLI::App* parsed;
    runner run;
};
command add_build(CLI::App& app, const globals& g, app::interrupt& stop);
std::vector<command> add_usage(CLI::App& app, const globals& g, app::interrupt& stop);
command add_prune_histories(CLI::App& app, const globals& g, app::interrupt& stop);
command add_histories(CLI::App& debug, const globals& g, app::interrupt& stop);
std::vector<command> add_debug(CLI::App& app, const globals& g, app::interrupt& stop);
command add_dial_stdio(CLI::App& app, const globals& g);

/// Lines of cells in columns, laid out as Go's tabwriter does: a column is as wide as the widest cell of the lines that
/// follow each other with that column ended by a tab.
class table {
public:
    /// `tab`: cells are filled up with tabs to multiples of 8; otherwise with spaces.
    explicit table(bool tab = true) : tab_(tab) {}
    /// Cells are separated by tabs; what is after the last tab belongs to no column.
    void line(std::string_view text);
    [[nodiscard]] std::string text() const;

private:
    void format(std::string& out, std::size_t from, std::size_t to, std::vector<std::size_t>& widths) const;
    void print(std::string& out, std::size_t line, const std::vector<std::size_t>& widths) const;
    bool tab_;
    std::vector<std::vector<std::string>> lines_;
};

/// Only {{json .}} (or "json") is understood as --format; throws errc::unsupported for another template.
bool wants_json(const std::string& format);
void print_json(const json::value& v);
/// "2026-11-25 12:00:00.5 +0000 UTC", as Go prints a time.
std::string go_time(progress::time_point t);

}  // namespace cobuild::buildctl

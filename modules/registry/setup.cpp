module;
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.registry;

namespace cobuild::registry {

namespace {
// Certificates of a host without an entry in any file: certs/HOST[:PORT] beside the system's and the user's configuration.
void add_found_dirs(std::vector<std::string>& dirs, const std::string& host) {
    const auto* xdg = std::getenv("XDG_CONFIG_HOME");
    const auto* home = std::getenv("HOME");
    std::vector<std::string> places{"/etc/buildkit/certs/"};
    if (xdg != nullptr && *xdg == '/') {
        places.push_back(cat(xdg, "/buildkit/certs/"));
    } else if (home != nullptr && *home == '/') {
        places.push_back(cat(home, "/.config/buildkit/certs/"));
    }
    for (const auto& place : places)
        if (const auto dir = place + host; ::access(dir.c_str(), X_OK) == 0) dirs.push_back(dir);
}
}  // namespace

host_resolver configured_hosts(const config::configuration& settings) {
    return [settings](std::string_view domain) {
        std::vector<host_settings> out;
        for (const auto& h : config::hosts_for(settings, domain)) {
            host_settings s;
            s.host = h.host;
            s.plain_http = h.scheme == config::transport::http || h.scheme == config::transport::https_then_http;
            s.insecure = h.scheme == config::transport::https_unverified || h.scheme == config::transport::https_then_http;
            s.try_https_first = h.scheme == config::transport::https_then_http;
            s.ca = h.ca;
            for (const auto& k : h.key_pairs) s.key_pairs.push_back({.cert = k.cert, .key = k.key});
            s.tls_dirs = h.tls_config_dirs;
            s.path_prefix = h.path_prefix;
            s.mirror = h.mirror;
            const auto entry = h.mirror ? h.host : std::string(domain);
            s.section = cat("[registry.", quoted(entry), ']');
            add_found_dirs(s.tls_dirs, entry);
            s.configured = settings.registries.contains(entry);
            out.push_back(std::move(s));
        }
        return out;
    };
}

namespace {
async::task<std::string> run_helper(process::spawner& programs, std::string program, std::string verb, std::string input) {
    constexpr auto patience = std::chrono::seconds(60);
    std::optional<error> failed;
    process::output out;
    try {
        out = co_await programs.capture({.args = {program, verb}}, {.input = std::move(input), .time_limit = patience});
    } catch (const error& e) {
        failed = e;
    }
    if (failed) throw std::move(*failed).with(cat("the credential helper ", program));
    if (out.status.ok()) co_return std::move(out.out);
    // Helpers say what is wrong on their standard output.
    const std::string said(trim(std::string_view(out.out.empty() ? out.err : out.out).substr(0, 500)));
    throw error{errc::unauthorized, cat("the credential helper ", program, " failed: ", said.empty() ? out.status.str() : said)};
}
}  // namespace

helper_runner run_helpers_with(process::spawner& programs) {
    return [&programs](std::string program, std::string verb, std::string input) {
        return run_helper(programs, std::move(program), std::move(verb), std::move(input));
    };
}

}  // namespace cobuild::registry

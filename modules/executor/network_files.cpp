module;
#include <algorithm>
#include <cstdint>
#include <ctime>
#include <fstream>
#include <iterator>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

module cobuild.executor;

#include "parts.hpp"

namespace cobuild::executor {

namespace {

std::string file_text(const char* path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
}

std::vector<std::string_view> words(std::string_view line) {
    std::vector<std::string_view> out;
    const auto comment = line.find_first_of("#;");
    line = line.substr(0, comment);
    while (!(line = trim(line)).empty()) {
        const auto end = std::min(line.find_first_of(" \t"), line.size());
        out.push_back(line.substr(0, end));
        line.remove_prefix(end);
    }
    return out;
}

std::vector<std::string> servers_of(std::string_view text) {
    std::vector<std::string> out;
    for (const auto line : split(text, '\n'))
        if (const auto w = words(line); w.size() >= 2 && w[0] == "nameserver") out.emplace_back(w[1]);
    return out;
}

/// The last line of a kind counts, as in the resolver.
std::vector<std::string> last_of(std::string_view text, std::string_view kind) {
    std::vector<std::string> out;
    for (const auto line : split(text, '\n'))
        if (const auto w = words(line); !w.empty() && w[0] == kind) out.assign(w.begin() + 1, w.end());
    return out;
}

bool is_loopback(std::string_view server) { return server.starts_with("127.") || server == "::1" || server.starts_with("::1%"); }

}  // namespace

std::string hosts_text(std::string_view hostname, std::span<const host_entry> extra) {
    std::string out = cat("127.0.0.1\tlocalhost ", hostname, "\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for (const auto& e : extra) out += cat(e.ip, '\t', e.host, '\n');
    return out;
}

std::string resolv_conf_text(std::string_view host, const dns& overrides, bool host_network) {
    auto servers = overrides.nameservers.empty() ? servers_of(host) : overrides.nameservers;
    auto search = overrides.search.empty() ? last_of(host, "search") : overrides.search;
    auto options = overrides.options.empty() ? last_of(host, "options") : overrides.options;
    if (!host_network) {
        std::erase_if(servers, is_loopback);
        if (servers.empty()) servers = {"8.8.8.8", "8.8.4.4", "2001:4860:4860::8888", "2001:4860:4860::8844"};
    }
    std::string out;
    const auto add_list = [&](std::string_view kind, const std::vector<std::string>& all) {
        if (all.empty()) return;
        out += kind;
        for (const auto& one : all) out += cat(' ', one);
        out += '\n';
    };
    add_list("search", search);
    for (const auto& s : servers) out += cat("nameserver ", s, '\n');
    add_list("options", options);
    return out;
}

std::string host_resolv_conf(bool host_network) {
    auto text = file_text("/etc/resolv.conf");
    if (!host_network && servers_of(text) == std::vector<std::string>{"127.0.0.53"})
        if (auto real = file_text("/run/systemd/resolve/resolv.conf"); !real.empty()) return real;
    return text;
}

}  // namespace cobuild::executor

module;
#include <arpa/inet.h>

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.config;

import cobuild.base;

namespace cobuild::config {
namespace {

std::string without_port(std::string_view host) {
    if (host.starts_with('[')) return std::string(host.substr(1, host.find(']') - 1));
    const auto colon = host.find(':');
    if (colon != std::string_view::npos && host.find(':', colon + 1) != std::string_view::npos) return std::string(host);  // bare IPv6
    return std::string(host.substr(0, colon));
}

/// "/v2" joined with a mirror's path, cleaned as Go's path.Join does.
std::string api_root(std::string_view path) {
    std::vector<std::string_view> parts{"v2"};
    for (const auto part : split(path, '/')) {
        if (part == "..") {
            if (!parts.empty()) parts.pop_back();
        } else if (!part.empty() && part != ".") {
            parts.push_back(part);
        }
    }
    std::string out;
    for (const auto part : parts) out += cat('/', part);
    return out.empty() ? "/" : out;
}

/// The host with what its own section says; without a section only loopback is special.
registry_host host_with(const configuration& config, std::string host, std::string_view section) {
    registry_host out{.host = std::move(host), .path_prefix = "/v2"};
    const auto found = config.registries.find(std::string(section));
    const registry_table table = found == config.registries.end() ? registry_table{} : found->second;
    const bool http = table.http.value_or(is_loopback(section));
    if (table.insecure.value_or(false))
        out.scheme = http ? transport::https_then_http : transport::https_unverified;
    else
        out.scheme = http ? transport::http : transport::https;
    out.ca = table.ca;
    out.key_pairs = table.key_pairs;
    out.tls_config_dirs = table.tls_config_dirs;
    return out;
}

}  // namespace

bool is_loopback(std::string_view host) {
    const std::string name = without_port(host);
    in_addr v4{};
    in6_addr v6{};
    if (name == "localhost") return true;
    if (::inet_pton(AF_INET, name.c_str(), &v4) == 1) return ntohl(v4.s_addr) >> 24 == 127;
    return ::inet_pton(AF_INET6, name.c_str(), &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

std::vector<registry_host> hosts_for(const configuration& config, std::string_view domain) {
    std::vector<registry_host> out;
    if (const auto found = config.registries.find(std::string(domain)); found != config.registries.end())
        for (std::string_view mirror : found->second.mirrors) {
            if (const auto at = mirror.find("://"); at != std::string_view::npos) mirror.remove_prefix(at + 3);
            const auto slash = mirror.find('/');
            const auto host = mirror.substr(0, slash);
            auto& added = out.emplace_back(host_with(config, std::string(host), host));
            added.path_prefix = api_root(slash == std::string_view::npos ? "" : mirror.substr(slash));
            added.mirror = true;
            added.push = false;
        }
    out.push_back(host_with(config, domain == "docker.io" ? "registry-1.docker.io" : std::string(domain), domain));
    return out;
}

}  // namespace cobuild::config

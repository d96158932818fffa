module;
#include <arpa/inet.h>
#include <netinet/in.h>

#include <array>
#include <charconv>
#include <concepts>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.frontend;

import :state;

namespace cobuild::frontend {
namespace {

using attributes = std::map<std::string, std::string>;

[[noreturn]] void bad(std::string_view key, std::string_view value, std::string_view why) {
    throw error{errc::invalid, cat("invalid ", key, "=", quoted(value), ": ", why)};
}

std::string_view get(const attributes& attrs, std::string_view key) {
    const auto found = attrs.find(std::string(key));
    return found != attrs.end() ? std::string_view(found->second) : std::string_view();
}

template<std::integral T>
std::optional<T> whole_number(std::string_view text) {
    T n{};
    const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), n);
    return failed == std::errc{} && end == text.data() + text.size() ? std::optional(n) : std::nullopt;
}

/// Above 0, or `special`; empty when not given.
template<std::integral T>
void limit(const attributes& attrs, std::string_view key, T& out, std::optional<T> special = {}) {
    const auto text = get(attrs, key);
    if (text.empty()) return;
    const auto n = whole_number<T>(text);
    if (!n || (*n <= 0 && n != special)) bad(key, text, special ? "expected a number above 0, or -1 for no limit" : "expected a number above 0");
    out = *n;
}

void cpu_list(const attributes& attrs, std::string_view key, std::string& out) {
    const auto text = get(attrs, key);
    if (text.empty()) return;
    for (const auto part : split(text, ',')) {
        const auto dash = part.find('-');
        const auto first = whole_number<unsigned>(part.substr(0, dash));
        const auto last = dash == std::string_view::npos ? first : whole_number<unsigned>(part.substr(dash + 1));
        if (!first || !last || *last < *first) bad(key, text, "expected a list such as 0-3,5");
    }
    out = text;
}

std::optional<llb::linux_resources> resources(const attributes& attrs) {
    llb::linux_resources r;
    limit(attrs, "memory", r.memory);
    limit(attrs, "memswap", r.memory_swap, std::optional<std::int64_t>(-1));
    limit(attrs, "cpushares", r.cpu_shares);
    limit(attrs, "cpuperiod", r.cpu_period);
    limit(attrs, "cpuquota", r.cpu_quota);
    cpu_list(attrs, "cpusetcpus", r.cpuset_cpus);
    cpu_list(attrs, "cpusetmems", r.cpuset_mems);
    const bool any = r.memory != 0 || r.memory_swap != 0 || r.cpu_shares != 0 || r.cpu_period != 0 || r.cpu_quota != 0 || !r.cpuset_cpus.empty() ||
                     !r.cpuset_mems.empty();
    return any ? std::optional(std::move(r)) : std::nullopt;
}

bool is_address(const std::string& text) {
    std::array<unsigned char, sizeof(in6_addr)> raw{};
    return inet_pton(AF_INET, text.c_str(), raw.data()) == 1 || inet_pton(AF_INET6, text.c_str(), raw.data()) == 1;
}

std::vector<llb::host_ip> hosts(std::string_view text) {
    std::vector<llb::host_ip> out;
    if (text.empty()) return out;
    for (const auto part : split(text, ',')) {
        const auto eq = part.find('=');
        if (eq == std::string_view::npos) bad("add-hosts", part, "expected host=address");
        llb::host_ip h{to_lower(part.substr(0, eq)), to_lower(part.substr(eq + 1))};
        if (!is_address(h.ip)) bad("add-hosts", part, "the address is not an IP address");
        out.push_back(std::move(h));
    }
    return out;
}

std::vector<llb::ulimit> ulimits(std::string_view text) {
    std::vector<llb::ulimit> out;
    if (text.empty()) return out;
    for (const auto part : split(text, ',')) {
        const auto eq = part.find('=');
        if (eq == 0 || eq == std::string_view::npos) bad("ulimit", part, "expected name=soft[:hard]");
        const auto value = part.substr(eq + 1);
        const auto colon = value.find(':');
        const auto soft = whole_number<std::int64_t>(value.substr(0, colon));
        const auto hard = colon == std::string_view::npos ? soft : whole_number<std::int64_t>(value.substr(colon + 1));
        if (!soft || !hard) bad("ulimit", part, "expected name=soft[:hard] with whole numbers");
        if (*hard != -1 && (*soft == -1 || *soft > *hard)) bad("ulimit", part, "the soft limit is above the hard one");
        out.push_back({std::string(part.substr(0, eq)), *soft, *hard});
    }
    return out;
}

bool boolean(std::string_view key, std::string_view text) {
    const auto word = to_lower(text);
    if (word == "1" || word == "t" || word == "true") return true;
    if (word == "0" || word == "f" || word == "false") return false;
    bad(key, text, "expected true or false");
}

gateway::resolve_mode resolve(std::string_view text) {
    if (text.empty() || text == "default") return gateway::resolve_mode::standard;
    if (text == "pull") return gateway::resolve_mode::pull;
    if (text == "local") return gateway::resolve_mode::local;
    bad("image-resolve-mode", text, "expected default, pull or local");
}

llb::net_mode network(std::string_view text) {
    if (text.empty() || text == "sandbox") return llb::net_mode::sandbox;
    if (text == "host") return llb::net_mode::host;
    if (text == "none") return llb::net_mode::none;
    bad("force-network-mode", text, "expected sandbox, host or none");
}

}  // namespace

attr_request parse_attrs(const std::map<std::string, std::string>& attrs) {
    attr_request out;
    auto& r = out.build;
    if (const auto name = get(attrs, "dockerfilekey"); !name.empty()) r.dockerfile_context = name;
    r.context_subdir = get(attrs, "contextsubdir");
    if (const auto name = get(attrs, "filename"); !name.empty()) r.dockerfile_name = name;
    r.target = get(attrs, "target");
    for (const auto& [key, value] : attrs) {
        const auto take = [&, &k = key, &v = value](std::string_view prefix, std::map<std::string, std::string>& into) {
            if (k.starts_with(prefix)) into[k.substr(prefix.size())] = v;
        };
        take("build-arg:", r.build_args);
        take("label:", r.labels);
        take("context:", r.named_contexts);
        take("input-metadata:", r.input_metadata);
        take("local-sessionid:", r.local_sessions);
    }
    // "docker-image:NAME" is as good as "docker-image://NAME".
    for (auto& [name, value] : r.named_contexts)
        for (const std::string_view scheme : {"docker-image:", "oci-layout:"})
            if (value.starts_with(scheme) && !value.substr(scheme.size()).starts_with("//")) value.insert(scheme.size(), "//");
    if (const auto text = get(attrs, "platform"); !text.empty()) {
        for (const auto part : split(text, ',')) out.platforms.push_back(oci::normalize(oci::parse_platform(part)));
    }
    r.multi_platform = out.platforms.size() > 1;
    for (const std::string_view key : {"multi-platform", "build-arg:BUILDKIT_MULTI_PLATFORM"}) {
        const auto text = get(attrs, key);
        if (text.empty()) continue;
        const bool wanted = boolean(key, text);
        if (!wanted && out.platforms.size() > 1) bad(key, text, "more than one target platform was asked for");
        r.multi_platform = wanted;
    }
    if (const auto found = attrs.find("no-cache"); found != attrs.end()) {
        r.no_cache = found->second.empty();
        if (!r.no_cache) {
            for (const auto name : split(found->second, ',')) r.no_cache_stages.push_back(to_lower(name));
        }
    }
    r.resolve = resolve(get(attrs, "image-resolve-mode"));
    r.extra_hosts = hosts(get(attrs, "add-hosts"));
    if (const auto text = get(attrs, "shm-size"); !text.empty()) {
        const auto n = whole_number<std::int64_t>(text);
        if (!n || *n < 0) bad("shm-size", text, "expected a number of bytes");
        r.shm_size = *n;
    }
    r.ulimits = ulimits(get(attrs, "ulimit"));
    r.cgroup_parent = get(attrs, "cgroup-parent");
    r.network = network(get(attrs, "force-network-mode"));
    r.hostname = get(attrs, "hostname");
    r.resources = resources(attrs);
    if (const auto name = get(attrs, "contextkey"); !name.empty()) r.context_name = name;
    return out;
}

async::task<request> read_sources(request r, gateway::frontend_gateway& engine) {
    if (r.dockerfile.empty()) {
        auto text = co_await engine.read_context_file(r.dockerfile_context, r.dockerfile_name);
        if (!text && r.dockerfile_name == "Dockerfile") {
            text = co_await engine.read_context_file(r.dockerfile_context, "dockerfile");
            if (text) r.dockerfile_name = "dockerfile";
        }
        if (!text) throw error{errc::not_found, cat("there is no Dockerfile ", quoted(r.dockerfile_name), ": create it, or name another with -f")};
        r.dockerfile = std::move(*text);
    }
    if (!r.ignore_file) {
        auto name = cat(r.dockerfile_name, ".dockerignore");
        r.ignore_file = co_await engine.read_context_file(r.dockerfile_context, name);
        if (r.ignore_file) {
            r.ignore_file_name = std::move(name);
        } else {
            r.ignore_file = co_await engine.read_context_file(r.context_name, ".dockerignore");
        }
    }
    co_return r;
}

}  // namespace cobuild::frontend

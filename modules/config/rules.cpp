module;
#include <arpa/inet.h>

#include <charconv>
#include <chrono>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

module cobuild.config;

import cobuild.base;
import :schema;

namespace cobuild::config {
namespace {

bool is_address(std::string_view text) {
    in6_addr out{};
    const std::string plain(text.substr(0, text.find('%')));  // fe80::1%eth0
    return ::inet_pton(AF_INET, std::string(text).c_str(), &out) == 1 || ::inet_pton(AF_INET6, plain.c_str(), &out) == 1;
}

std::optional<std::int64_t> whole(std::string_view text) {
    std::int64_t value = 0;
    const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (text.empty() || ec != std::errc{} || end != text.data() + text.size()) return std::nullopt;
    return value;
}

bool only(std::string_view text, std::string_view more) {
    for (const char c : text) {
        const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
        if (!plain && more.find(c) == std::string_view::npos) return false;
    }
    return true;
}

/// "host", "host:5000", "[::1]:5000"; a complaint or nothing.
std::string host_rule(std::string_view host) {
    if (host.empty()) return "has no host";
    std::string_view port;
    if (host.starts_with('[')) {
        const auto end = host.find(']');
        if (end == std::string_view::npos || !is_address(host.substr(1, end - 1))) return "has a host that is no IPv6 address in brackets";
        port = host.substr(end + 1);
    } else {
        const auto colon = host.find(':');
        if (!only(host.substr(0, colon), ".-_") || colon == 0) return "has a host name with characters that none can have";
        port = colon == std::string_view::npos ? std::string_view{} : host.substr(colon);
    }
    if (port.empty()) return {};
    const auto number = port.front() == ':' ? whole(port.substr(1)) : std::nullopt;
    return number && *number > 0 && *number < 65536 ? "" : "has a port that is no number from 1 to 65535";
}

}  // namespace

std::string entitlement_rule(std::string_view text) {
    if (text == "network.host" || text == "security.insecure" || text == "device") return {};
    return "invalid entitlement, expected network.host, security.insecure or device";
}

std::string address_rule(std::string_view text) {
    const auto at = text.find("://");
    if (at == std::string_view::npos) return cat("has no scheme, perhaps unix://", text, " is meant");
    const auto scheme = text.substr(0, at);
    if (scheme == "fd") return text.size() == at + 3 ? "" : "fd:// takes no name";
    if (scheme != "unix" && scheme != "tcp" && scheme != "npipe") return "has an unknown scheme, expected unix, tcp or fd";
    return text.size() > at + 3 ? "" : "names no socket";
}

std::string mirror_rule(std::string_view text) {
    if (const auto at = text.find("://"); at != std::string_view::npos) text.remove_prefix(at + 3);
    const auto slash = text.find('/');
    if (slash != std::string_view::npos && !only(text.substr(slash), "/.-_~%+")) return "has a path with characters that a mirror's path cannot have";
    return host_rule(text.substr(0, slash));
}

std::string registry_name_rule(std::string_view name) {
    if (name.find("://") != std::string_view::npos || name.find('/') != std::string_view::npos)
        return "is never looked up: a registry section is named by host and port alone";
    if (name == "registry-1.docker.io" || name == "index.docker.io")
        return "is only looked up for a mirror of that name: the section of the Hub is registry.\"docker.io\"";
    return {};
}

std::string nameserver_rule(std::string_view text) { return is_address(text) ? "" : "is not an IP address"; }

std::string subnet_rule(std::string_view text) {
    const auto slash = text.find('/');
    if (slash == std::string_view::npos || !is_address(text.substr(0, slash))) return "is not a network such as 10.10.0.0/16";
    const auto bits = whole(text.substr(slash + 1));
    const bool v6 = text.find(':') != std::string_view::npos;
    return bits && *bits >= 0 && *bits <= (v6 ? 128 : 32) ? "" : "is not a network such as 10.10.0.0/16";
}

std::string platform_rule(std::string_view text) {
    const auto parts = split(text, '/');
    bool good = parts.size() <= 3;
    for (const auto p : parts) good = good && !p.empty() && only(p, "-_.");
    return good ? "" : "is not a platform such as linux/amd64 or linux/arm/v7";
}

std::string filter_rule(std::string_view text) {
    static constexpr std::string_view known[] = {"id", "parents", "description", "inuse", "mutable", "immutable", "type", "shared", "private"};
    std::size_t at = 0;
    for (;;) {
        const std::size_t start = at;
        while (at < text.size() && only(text.substr(at, 1), "._-")) ++at;
        const auto name = text.substr(start, at - start);
        bool found = false;
        for (const auto k : known) found = found || k == name;
        if (!found)
            return cat("names no field of a cache record at ", quoted(text.substr(start)),
                       "; there are id, parents, description, inuse, mutable, immutable, type, shared and private");
        const auto op = text.substr(at, 2);
        if (op == "==" || op == "!=" || op == "~=") {
            at += 2;
            if (at < text.size() && text[at] == '"') {
                for (++at; at < text.size() && text[at] != '"'; ++at)
                    if (text[at] == '\\') ++at;
                if (at >= text.size()) return "has a quoted value without an end";
                ++at;
            } else {
                while (at < text.size() && text[at] != ',') ++at;
            }
        }
        if (at == text.size()) return {};
        if (text[at] != ',') return cat("has an unknown operator at ", quoted(text.substr(at)), ", expected ==, != or ~=");
        ++at;
    }
}

nanoseconds parse_time_span(std::string_view text) {
    if (const auto seconds = whole(text)) {
        constexpr std::int64_t limit = std::numeric_limits<std::int64_t>::max() / 1000000000;
        if (*seconds > limit || *seconds < -limit) throw error{errc::invalid, cat("is too long a time: ", *seconds, " seconds")};
        return std::chrono::seconds{*seconds};
    }
    return parse_duration(text);
}

disk_space parse_disk_space(std::string_view text) {
    if (text.ends_with('%')) {
        const auto percent = whole(text.substr(0, text.size() - 1));
        if (!percent || *percent < 0 || *percent > 100) throw error{errc::invalid, cat("not a percentage from 0% to 100%: ", quoted(text))};
        return {.percent = static_cast<unsigned>(*percent)};
    }
    return {.bytes = parse_bytes(text)};
}

std::uint64_t disk_space::resolve(std::uint64_t total) const {
    if (bytes != 0 || percent == 0) return bytes;
    if (total == 0) return 2'000'000'000;
    const std::uint64_t share = total / 100 * percent + total % 100 * percent / 100;  // total * percent could overflow
    return ((share >> 30) + 1) * 1'000'000'000;
}

}  // namespace cobuild::config

module;
#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

module cobuild.dockerfile;

import cobuild.base;
import :detail;

namespace cobuild::dockerfile {

using namespace detail;

namespace {

[[noreturn]] void fail(std::string message) { throw error{errc::invalid, std::move(message)}; }

std::optional<int> decimal(std::string_view text) {
    int value = 0;
    const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (failed != std::errc{} || end != text.data() + text.size()) return std::nullopt;
    return value;
}

nanoseconds interval(const flag_values& flags, std::string_view name) {
    const std::string text = flags.text(name);
    if (text.empty()) return nanoseconds{0};
    const nanoseconds value = parse_duration(text);
    if (value.count() != 0 && value < std::chrono::milliseconds(1)) fail(cat("Interval ", quoted(name), " cannot be less than 1ms"));
    return value;
}

// Linux' names, without SIG.
constexpr std::array<std::string_view, 36> signals{"ABRT", "ALRM",   "BUS",  "CHLD",   "CLD",   "CONT", "FPE",  "HUP",   "ILL",
                                                   "INT",  "IO",     "IOT",  "KILL",   "PIPE",  "POLL", "PROF", "PWR",   "QUIT",
                                                   "SEGV", "STKFLT", "STOP", "SYS",    "TERM",  "TRAP", "TSTP", "TTIN",  "TTOU",
                                                   "URG",  "USR1",   "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ", "RTMIN", "RTMAX"};

struct port_range {
    int first, last;
};

int port_number(std::string_view text, std::string_view word) {
    const auto value = decimal(text);
    if (!value || *value < 0 || *value > 65535)
        fail(cat("invalid port ", quoted(text), " in ", quoted(word), ": a port is a number from 0 to 65535"));
    return *value;
}

port_range read_range(std::string_view text, std::string_view word) {
    const std::size_t dash = text.find('-');
    const int first = port_number(text.substr(0, dash), word);
    const int last = dash == std::string_view::npos ? first : port_number(text.substr(dash + 1), word);
    if (last < first) fail(cat("invalid port range ", quoted(text), " in ", quoted(word), ": it ends before it begins"));
    return {first, last};
}

bool is_ipv4(std::string_view text) {
    const auto parts = split(text, '.');
    return parts.size() == 4 && std::all_of(parts.begin(), parts.end(), [](std::string_view p) {
               const auto v = decimal(p);
               return v && *v >= 0 && *v <= 255 && p.size() <= 3 && std::all_of(p.begin(), p.end(), is_digit);
           });
}

bool is_ipv6(std::string_view text) {
    if (text.find(':') == std::string_view::npos || text.size() > 45) return false;
    std::size_t groups = 0;
    bool gap = false;
    if (text.starts_with("::")) {
        gap = true;
        text.remove_prefix(2);
    }
    while (!text.empty()) {
        const std::size_t colon = text.find(':');
        const std::string_view group = text.substr(0, colon);
        if (group.find('.') != std::string_view::npos) {
            groups += 2;
            if (colon != std::string_view::npos || !is_ipv4(group)) return false;
            break;
        }
        const bool hex = !group.empty() && group.size() <= 4 && group.find_first_not_of("0123456789abcdefABCDEF") == std::string_view::npos;
        if (!hex) return false;
        ++groups;
        if (colon == std::string_view::npos) break;
        text.remove_prefix(colon + 1);
        if (text.empty()) return false;
        if (text.front() == ':') {
            if (gap) return false;
            gap = true;
            text.remove_prefix(1);
        }
    }
    return gap ? groups < 8 : groups == 8;
}

void check_ip(std::string_view ip) {
    std::string_view bare = ip;
    if (bare.starts_with('[') && bare.ends_with(']')) bare = bare.substr(1, bare.size() - 2);
    if (!is_ipv4(bare) && !is_ipv6(bare)) fail(cat("invalid IP address: ", ip));
}

struct port_word {
    exposed_ports marks;
    port_range ports;
    std::string protocol;
};

port_word read_port(std::string_view word) {
    exposed_ports out;
    std::string_view container = word, host, ip;
    if (const std::size_t colon = word.rfind(':'); colon != std::string_view::npos) {
        out.host_part = true;
        container = word.substr(colon + 1);
        host = word.substr(0, colon);
        if (const std::size_t before = host.rfind(':'); before != std::string_view::npos) {
            ip = host.substr(0, before);
            host = host.substr(before + 1);
        }
        out.host_part = !ip.empty() || !host.empty();
    }
    const std::size_t slash = container.find('/');
    const std::string_view written = slash == std::string_view::npos ? std::string_view{} : container.substr(slash + 1);
    container = container.substr(0, slash);
    const std::string protocol = written.empty() ? "tcp" : to_lower(written);
    if (container.empty()) fail(cat("invalid port: ", quoted(word), ": no port specified"));
    if (protocol != "tcp" && protocol != "udp" && protocol != "sctp") fail(cat("invalid port: ", quoted(word), ": invalid proto: ", written));
    out.odd_protocol_case = !written.empty() && written != protocol;
    if (!ip.empty()) check_ip(ip);
    const port_range ports = read_range(container, word);
    if (!host.empty()) {
        const port_range hosts = read_range(host, word);
        if (ports.first != ports.last && ports.last - ports.first != hosts.last - hosts.first)
            fail(cat("invalid ranges specified for container and host Ports: ", container, " and ", host));
    }
    return {std::move(out), ports, protocol};
}

}  // namespace

exposed_ports parse_port(std::string_view word) {
    port_word read = read_port(word);
    for (int p = read.ports.first; p <= read.ports.last; ++p) read.marks.ports.push_back(cat(p, '/', read.protocol));
    return std::move(read.marks);
}

bool is_signal(std::string_view text) {
    if (!text.empty() && std::all_of(text.begin(), text.end(), is_digit)) {
        const auto number = decimal(text);
        return number && *number > 0 && *number <= 64;
    }
    std::string name = to_upper(text);
    if (name.starts_with("SIG")) name.erase(0, 3);
    if (std::find(signals.begin(), signals.end(), name) != signals.end()) return true;
    const auto offset = [&](std::string_view prefix, int most) {
        if (!std::string_view(name).starts_with(prefix)) return false;
        const auto n = decimal(std::string_view(name).substr(prefix.size()));
        return n && *n >= 1 && *n <= most;
    };
    return offset("RTMIN+", 15) || offset("RTMAX-", 14);
}

namespace detail {

exposed_ports check_port(std::string_view word) { return read_port(word).marks; }

instruction_body parse_stopsignal(const node& n, char escape) {
    if (n.args.size() != 1) fail("STOPSIGNAL requires exactly one argument");
    const std::string& signal = n.args.front();
    if (signal.find('$') == std::string::npos && !is_signal(expand_word(signal, {}, escape).text)) fail(cat("invalid signal: ", signal));
    return stopsignal_instruction{signal};
}

instruction_body parse_healthcheck(const node& n) {
    static constexpr std::array<flag_spec, 5> known{{{"interval", flag_kind::text},
                                                     {"timeout", flag_kind::text},
                                                     {"start-period", flag_kind::text},
                                                     {"start-interval", flag_kind::text},
                                                     {"retries", flag_kind::text}}};
    const flag_values flags(n, known);
    if (n.args.empty()) fail("HEALTHCHECK requires at least one argument");
    const std::string type = to_upper(n.args.front());
    healthcheck_instruction out;
    if (type == "NONE") {
        if (n.args.size() > 1) fail("HEALTHCHECK NONE takes no arguments");
        out.test = {"NONE"};
        return out;
    }
    if (type != "CMD") fail(cat("Unknown type ", quoted(n.args.front()), " in HEALTHCHECK (try CMD)"));
    if (n.args.size() < 2) fail("Missing command after HEALTHCHECK CMD");
    out.test = n.args;
    out.test.front() = n.json ? "CMD" : "CMD-SHELL";
    out.interval = interval(flags, "interval");
    out.timeout = interval(flags, "timeout");
    out.start_period = interval(flags, "start-period");
    out.start_interval = interval(flags, "start-interval");
    if (const std::string text = flags.text("retries"); !text.empty()) {
        const auto retries = decimal(text);
        if (!retries) fail(cat("--retries is not a number: ", quoted(text)));
        if (*retries < 0) fail(cat("--retries cannot be negative (", *retries, ")"));
        out.retries = *retries;
    }
    return out;
}

}  // namespace detail

}  // namespace cobuild::dockerfile

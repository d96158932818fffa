module;
#include <algorithm>
#include <charconv>
#include <compare>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

module cobuild.http;

namespace cobuild::http {

namespace {

bool unreserved(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '.' || c == '_' || c == '~';
}

bool printable(std::string_view text) {
    return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) > 0x20 && c != 0x7f; });
}

// RFC 3986 5.2.4; the path begins with '/'.
std::string remove_dots(std::string_view path) {
    std::vector<std::string_view> kept;
    const auto parts = split(path.substr(1), '/');
    for (std::size_t i = 0; i < parts.size(); ++i) {
        const bool last = i + 1 == parts.size();
        if (parts[i] == "..") {
            if (!kept.empty()) kept.pop_back();
            if (last) kept.emplace_back();
        } else if (parts[i] == ".") {
            if (last) kept.emplace_back();
        } else {
            kept.push_back(parts[i]);
        }
    }
    std::string out;
    for (const auto part : kept) out.append("/").append(part);
    return out.empty() ? "/" : out;
}

}  // namespace

std::string endpoint::authority() const {
    return port == (tls ? 443 : 80) ? (host.find(':') != std::string::npos ? cat('[', host, ']') : host) : host_port();
}
std::string endpoint::host_port() const { return host.find(':') != std::string::npos ? cat('[', host, "]:", port) : cat(host, ':', port); }
std::string endpoint::origin() const { return cat(tls ? "https://" : "http://", authority()); }

endpoint parse_endpoint(std::string_view authority, bool tls) {
    const auto bad = [&](std::string_view why) { return error{errc::invalid, cat("invalid host ", quoted(authority), ": ", why)}; };
    endpoint out{.tls = tls, .port = static_cast<std::uint16_t>(tls ? 443 : 80)};
    std::string_view host = authority;
    std::string_view port;
    if (host.starts_with('[')) {
        const auto close = host.find(']');
        if (close == std::string_view::npos) throw bad("the closing bracket is missing");
        const auto after = host.substr(close + 1);
        if (!after.empty() && !after.starts_with(':')) throw bad("expected a port after the bracket");
        port = after.empty() ? after : after.substr(1);
        if (!after.empty() && port.empty()) throw bad("the port is empty");
        host = host.substr(1, close - 1);
    } else if (const auto colon = host.find(':'); colon != std::string_view::npos) {
        port = host.substr(colon + 1);
        host = host.substr(0, colon);
        if (port.empty()) throw bad("the port is empty");
    }
    if (host.empty()) throw bad("the name is empty");
    if (!std::all_of(host.begin(), host.end(), [](char c) { return unreserved(c) || c == ':' || c == '%'; }) ||
        host.find('~') != std::string_view::npos)
        throw bad("a host name has letters, digits, dots and dashes only");
    if (!port.empty()) {
        const auto [end, ec] = std::from_chars(port.data(), port.data() + port.size(), out.port);
        if (ec != std::errc{} || end != port.data() + port.size() || out.port == 0) throw bad("the port is a number from 1 to 65535");
    }
    out.host = to_lower(host);
    return out;
}

bool is_loopback(std::string_view host) {
    if (host == "localhost" || host == "::1") return true;
    const auto parts = split(host, '.');
    return parts.size() == 4 && parts[0] == "127" && std::all_of(parts.begin(), parts.end(), [](std::string_view p) {
               return !p.empty() && p.find_first_not_of("0123456789") == std::string_view::npos;
           });
}

std::string percent_encode(std::string_view text) {
    static constexpr std::string_view digits = "0123456789ABCDEF";
    std::string out;
    for (const char c : text) {
        if (unreserved(c)) {
            out += c;
        } else {
            const auto byte = static_cast<unsigned char>(c);
            out += '%';
            out += digits[byte >> 4];
            out += digits[byte & 15];
        }
    }
    return out;
}

url url::parse(std::string_view text) {
    const auto bad = [&](std::string_view why) { return error{errc::invalid, cat("invalid address ", quoted(text), ": ", why)}; };
    if (text.size() > 16384) throw error{errc::invalid, "invalid address: longer than 16384 characters"};
    if (!printable(text)) throw bad("it has spaces or control characters");
    const auto scheme_end = text.find("://");
    if (scheme_end == std::string_view::npos) throw bad("expected http:// or https://");
    const auto scheme = to_lower(text.substr(0, scheme_end));
    if (scheme != "http" && scheme != "https") throw bad("expected http:// or https://");
    auto rest = text.substr(scheme_end + 3);
    rest = rest.substr(0, rest.find('#'));
    const auto path = rest.find_first_of("/?");
    const auto authority = rest.substr(0, path);
    if (authority.find('@') != std::string_view::npos) throw bad("a user name or password is not allowed here");
    url out{.server = parse_endpoint(authority, scheme == "https")};
    if (path != std::string_view::npos) out.target = rest[path] == '?' ? cat('/', rest.substr(path)) : std::string(rest.substr(path));
    return out;
}

url url::resolve(std::string_view location) const {
    location = location.substr(0, location.find('#'));
    if (!printable(location)) throw error{errc::invalid, cat("invalid address ", quoted(location), ": it has spaces or control characters")};
    const auto colon = location.find(':');
    if (colon != std::string_view::npos && location.find_first_of("/?") > colon) return parse(location);
    if (location.starts_with("//")) return parse(cat(server.tls ? "https:" : "http:", location));
    if (location.empty()) return *this;
    url out{.server = server};
    const auto base_path = std::string_view(target).substr(0, target.find('?'));
    if (location.front() == '?') {
        out.target = cat(base_path, location);
        return out;
    }
    const auto query = std::min(location.find('?'), location.size());
    const auto path = location.substr(0, query);
    const auto whole = path.front() == '/' ? std::string(path) : cat(base_path.substr(0, base_path.rfind('/') + 1), path);
    out.target = cat(remove_dots(whole), location.substr(query));
    return out;
}

std::string url::str() const { return cat(server.origin(), target); }

}  // namespace cobuild::http

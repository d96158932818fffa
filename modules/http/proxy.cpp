module;
#include <algorithm>
#include <array>
#include <charconv>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/ip/address.hpp>
#include <boost/asio/ip/network_v4.hpp>
#include <boost/asio/ip/network_v6.hpp>

module cobuild.http;

import :internal;

namespace cobuild::http {

namespace ip = boost::asio::ip;

namespace {

std::string environment(const char* lower, const char* upper) {
    for (const auto* name : {lower, upper})
        if (const auto* v = std::getenv(name); v != nullptr && *v != '\0') return v;
    return {};
}

bool in_network(const ip::address& address, std::string_view block) {
    boost::system::error_code ec;
    if (address.is_v4()) {
        const auto net = ip::make_network_v4(std::string(block), ec);
        return !ec && ip::make_network_v4(address.to_v4(), net.prefix_length()).canonical() == net.canonical();
    }
    const auto net = ip::make_network_v6(std::string(block), ec);
    return !ec && ip::make_network_v6(address.to_v6(), net.prefix_length()).canonical() == net.canonical();
}

// One entry of NO_PROXY as golang.org/x/net/http/httpproxy reads it.
bool excepted(std::string_view entry, const endpoint& e) {
    if (entry == "*") return true;
    boost::system::error_code ec;
    const auto address = ip::make_address(e.host, ec);
    if (entry.find('/') != std::string_view::npos) return !ec && in_network(address, entry);
    std::string name = to_lower(entry);
    if (const auto colon = name.rfind(':'); colon != std::string::npos && name.find(':') == colon) {
        if (name.substr(colon + 1) != cat(e.port)) return false;
        name.resize(colon);
    }
    if (name.starts_with("*.")) name.erase(0, 1);
    if (name.starts_with('.')) return e.host.ends_with(name);
    return e.host == name || (ec && e.host.ends_with(cat('.', name)));
}

}  // namespace

proxy_settings proxy_settings::from_environment() {
    proxy_settings out;
    // In a CGI program HTTP_PROXY comes from a request's header.
    if (std::getenv("REQUEST_METHOD") == nullptr) out.http = environment("http_proxy", "HTTP_PROXY");
    out.https = environment("https_proxy", "HTTPS_PROXY");
    const auto all = environment("all_proxy", "ALL_PROXY");
    if (out.http.empty() && std::getenv("REQUEST_METHOD") == nullptr) out.http = all;
    if (out.https.empty()) out.https = all;
    out.no_proxy = environment("no_proxy", "NO_PROXY");
    return out;
}

std::optional<std::string> proxy_settings::proxy_for(const endpoint& e) const {
    const auto& chosen = e.tls ? https : http;
    if (chosen.empty() || is_loopback(e.host)) return std::nullopt;
    for (const auto entry : split(no_proxy, ','))
        if (const auto name = trim(entry); !name.empty() && excepted(name, e)) return std::nullopt;
    return chosen;
}

proxy_target parse_proxy(std::string_view text) {
    std::string_view rest = text;
    if (const auto scheme = rest.find("://"); scheme != std::string_view::npos) {
        if (to_lower(rest.substr(0, scheme)) != "http")
            throw error{errc::unsupported, cat("proxies of the scheme ", quoted(rest.substr(0, scheme)), " are not supported: use http://")};
        rest = rest.substr(scheme + 3);
    }
    rest = rest.substr(0, rest.find('/'));
    proxy_target out;
    if (const auto at = rest.rfind('@'); at != std::string_view::npos) {
        out.authorization = cat("Basic ", base64_encode(rest.substr(0, at)));
        rest = rest.substr(at + 1);
    }
    out.server = parse_endpoint(rest, false);
    return out;
}

}  // namespace cobuild::http

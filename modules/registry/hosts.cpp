module;
#include <string>
#include <string_view>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.registry;

namespace cobuild::registry {

namespace {
bool on_loopback(std::string_view domain) {
    try {
        return http::is_loopback(http::parse_endpoint(domain, false).host);
    } catch (const error&) {
        return false;
    }
}
}  // namespace

std::vector<host_settings> default_hosts(std::string_view domain) {
    return {{.host = domain == "docker.io" ? std::string("registry-1.docker.io") : std::string(domain),
             .plain_http = on_loopback(domain),
             .section = cat("[registry.", quoted(domain), ']'),
             .configured = false}};
}

}  // namespace cobuild::registry

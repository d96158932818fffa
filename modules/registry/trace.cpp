module;
#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.registry;

import :internal;

namespace cobuild::registry {

namespace {

// Redirect targets and upload locations carry signatures in their queries: only what is known to be none is shown.
std::string shown_url(const http::url& u) {
    static constexpr std::array<std::string_view, 9> harmless{"ns", "digest", "mount", "from", "n", "last", "service", "scope", "client_id"};
    const auto text = u.str();
    const auto query = text.find('?');
    if (query == std::string::npos) return text;
    auto out = text.substr(0, query);
    char separator = '?';
    const auto rest = text.substr(query + 1);
    for (const auto part : split(rest, '&')) {
        const auto key = part.substr(0, part.find('='));
        const bool known = std::find(harmless.begin(), harmless.end(), key) != harmless.end();
        out.append(cat(std::exchange(separator, '&'), known ? std::string(part) : cat(key, "=redacted")));
    }
    return out;
}

std::string shown_value(const http::url& u, const http::header& h) {
    const auto name = to_lower(h.name);
    if (name == "authorization" || name == "proxy-authorization" || name == "cookie" || name == "set-cookie") return "redacted";
    if (name != "location") return h.value;
    try {
        return shown_url(u.resolve(h.value));
    } catch (const error&) {
        return "redacted";
    }
}

}  // namespace

log_ids next_span(const std::string& trace) {
    if (!log_enabled(log_level::debug)) return {};
    return {trace, random_id().substr(0, 16)};
}

void log_request(const http::url& u, const http::request& q, const std::string& digest, const log_ids& ids) {
    if (!log_enabled(log_level::debug)) return;
    std::vector<log_field> fields;
    if (!digest.empty()) fields.push_back({"digest", digest});
    fields.push_back({"host", u.server.authority()});
    fields.push_back({"request.header.accept", std::string(q.headers.get("accept").value_or(""))});
    if (const auto range = q.headers.get("range")) fields.push_back({"request.header.range", std::string(*range)});
    fields.push_back({"request.header.user-agent", std::string(q.headers.get("user-agent").value_or(""))});
    fields.push_back({"request.method", q.method});
    fields.push_back({"spanID", ids.span});
    fields.push_back({"traceID", ids.trace});
    fields.push_back({"url", shown_url(u)});
    log(log_level::debug, "do request", fields);
}

void log_response(const http::url& u, const http::response& a, const std::string& digest, const log_ids& ids) {
    if (!log_enabled(log_level::debug)) return;
    std::vector<std::pair<std::string, std::string>> named;
    for (const auto& h : a.headers) named.emplace_back(cat("response.header.", to_lower(h.name)), shown_value(u, h));
    std::vector<log_field> fields;
    if (!digest.empty()) fields.push_back({"digest", digest});
    fields.push_back({"host", u.server.authority()});
    for (const auto& [name, value] : named) fields.push_back({name, value});
    fields.push_back({"response.status", a.status_text()});
    fields.push_back({"spanID", ids.span});
    fields.push_back({"traceID", ids.trace});
    fields.push_back({"url", shown_url(u)});
    log(log_level::debug, "fetch response received", fields);
}

}  // namespace cobuild::registry

module;
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.cni;

import cobuild.json;

#include "parts.hpp"

namespace cobuild::cni {
namespace {

// Best first. What a file asks beyond these is refused by name.
constexpr std::array<std::string_view, 7> spoken{"1.1.0", "1.0.0", "0.4.0", "0.3.1", "0.3.0", "0.2.0", "0.1.0"};

bool valid_word(std::string_view text) {
    if (text.empty()) return false;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
        if (!letter && (i == 0 || (c != '_' && c != '.' && c != '-'))) return false;
    }
    return true;
}

std::vector<std::string> known_versions(const json::object& o) {
    std::vector<std::string> asked = json::strings_at(o, "cniVersions");
    if (auto one = json::optional_string(o, "cniVersion")) asked.push_back(std::move(*one));
    if (asked.empty()) asked.emplace_back("0.1.0");  // the specification's reading of a file without one
    std::vector<std::string> out;
    for (const auto v : spoken)
        if (std::find(asked.begin(), asked.end(), v) != asked.end()) out.emplace_back(v);
    if (out.empty()) throw error{errc::invalid, cat("CNI version ", quoted(asked.front()), " is not known, the newest is ", spoken.front())};
    return out;
}

void check_plugin(const json::value& plugin, std::size_t index) {
    const auto here = cat("plugin ", index + 1);
    if (!plugin.is_object()) throw error{errc::invalid, cat(here, " is no object")};
    const auto type = json::optional_string(plugin.as_object(), "type");
    if (!type || type->empty()) throw error{errc::invalid, cat(here, " has no \"type\"")};
    if (type->find('/') != std::string::npos || type->front() == '.')
        throw error{errc::invalid, cat(here, ": the type ", quoted(*type), " is no plain file name")};
    if (const auto* ipam = json::optional_object(plugin.as_object(), "ipam"))
        if (const auto name = json::optional_string(*ipam, "type"); name && (name->find('/') != std::string::npos || name->starts_with('.')))
            throw error{errc::invalid, cat(here, ": the ipam type ", quoted(*name), " is no plain file name")};
    if (const auto* capabilities = json::optional_object(plugin.as_object(), "capabilities"))
        for (const auto& m : capabilities->members())
            if (!m.val.is_bool()) throw error{errc::invalid, cat(here, ": the capability ", quoted(m.key), " is neither true nor false")};
}

plugin_list read_list(const json::value& file) {
    if (!file.is_object()) throw error{errc::invalid, "a network configuration is a JSON object"};
    const auto& o = file.as_object();
    plugin_list out;
    const auto name = json::optional_string(o, "name");
    if (!name || !valid_word(*name))
        throw error{errc::invalid,
                    name ? cat("the name ", quoted(*name), " may only have letters, digits, _ . and -") : "the network has no \"name\""};
    out.name = *name;
    out.versions = known_versions(o);
    if (const auto* plugins = json::optional_array(o, "plugins")) {
        if (plugins->empty()) throw error{errc::invalid, "the list of plugins is empty"};
        out.plugins = *plugins;
    } else {
        if (!o.contains("type")) throw error{errc::invalid, "there is neither a list \"plugins\" nor a \"type\""};
        out.plugins.push_back(file);
    }
    for (std::size_t i = 0; i < out.plugins.size(); ++i) check_plugin(out.plugins[i], i);
    return out;
}

addresses::ip ip_of(const json::object& o) {
    return {.address = json::optional_string(o, "address").value_or(json::optional_string(o, "ip").value_or("")),
            .gateway = json::optional_string(o, "gateway").value_or("")};
}

void add_routes(addresses& out, const json::object& o) {
    if (const auto* routes = json::optional_array(o, "routes"))
        for (const auto& r : *routes)
            out.routes.push_back({.to = json::string_at(r.as_object(), "dst"), .via = json::optional_string(r.as_object(), "gw").value_or("")});
}

}  // namespace

plugin_list parse_list(std::string_view text, std::string_view where) {
    try {
        return read_list(json::parse(text, {.max_bytes = std::size_t{1} << 20}));
    } catch (const error& e) {
        throw error{errc::invalid, cat(where, ": ", e.what())};
    }
}

std::string list_text(const plugin_list& list, std::string_view version) {
    return json::serialize(json::object{{"cniVersion", version}, {"name", list.name}, {"plugins", list.plugins}}, {.escape_html = false});
}

network parse_network(std::string_view text, std::string_view filename) {
    const auto list = parse_list(text, cat("CNI configuration ", filename));
    network out{.name = list.name, .versions = list.versions, .list = list_text(list, list.versions.front())};
    for (const auto& p : list.plugins) out.plugins.push_back(json::string_at(p.as_object(), "type"));
    return out;
}

addresses addresses_of(const json::value& result) {
    addresses out;
    const auto& o = result.as_object();
    if (const auto* ips = json::optional_array(o, "ips"))
        for (const auto& ip : *ips) out.ips.push_back(ip_of(ip.as_object()));
    for (const auto* old : {"ip4", "ip6"})  // the form before 0.3.0
        if (const auto* ip = json::optional_object(o, old)) {
            out.ips.push_back(ip_of(*ip));
            add_routes(out, *ip);
        }
    add_routes(out, o);
    if (const auto* dns = json::optional_object(o, "dns")) {
        out.nameservers = json::strings_at(*dns, "nameservers");
        out.search = json::strings_at(*dns, "search");
        out.options = json::strings_at(*dns, "options");
        out.domain = json::optional_string(*dns, "domain").value_or("");
    }
    return out;
}

}  // namespace cobuild::cni

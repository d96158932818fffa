module;
#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.exporter;

import cobuild.json;

namespace cobuild::exporter {

namespace {

/// All but unreserved letters as %XX; ':' stays, as purl-spec wants it.
std::string percent(std::string_view text) {
    static constexpr std::string_view hex = "0123456789ABCDEF";
    std::string out;
    for (const char c : text) {
        const auto u = static_cast<unsigned char>(c);
        const bool plain =
            (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.' || c == '~' || c == ':';
        if (plain)
            out += c;
        else
            out.append({'%', hex[u >> 4], hex[u & 15]});
    }
    return out;
}

}  // namespace

std::string package_url(std::string_view kind, const oci::reference& ref, const std::optional<oci::platform>& platform) {
    std::string out = cat("pkg:", kind);
    const auto name = ref.familiar_name();
    // A registry's port too: a namespace has no ':' of its own.
    for (const auto part : split(name, '/')) {
        auto text = percent(part);
        for (auto colon = text.find(':'); colon != std::string::npos; colon = text.find(':')) text.replace(colon, 1, "%3A");
        out += cat("/", text);
    }
    if (!ref.tag().empty())
        out += cat("@", percent(ref.tag()));
    else if (!ref.digest())
        out += "@latest";
    char separator = '?';
    if (ref.tag().empty() && ref.digest()) {
        out += cat(separator, "digest=", percent(ref.digest()->str()));
        separator = '&';
    }
    if (platform) out += cat(separator, "platform=", percent(oci::format(oci::normalize(*platform))));
    return out;
}

std::string hide_credentials(std::string_view url) {
    const auto scheme = url.find("://");
    if (scheme == std::string_view::npos) return std::string(url);
    const auto begin = scheme + 3;
    const auto end = std::min(url.find_first_of("/?#", begin), url.size());
    const auto user = url.substr(begin, end - begin);
    const auto at = user.rfind('@');
    if (at == std::string_view::npos) return std::string(url);
    const bool password = user.substr(0, at).find(':') != std::string_view::npos;
    return cat(url.substr(0, begin), password ? "xxxxx:xxxxx@" : "xxxxx@", url.substr(begin + at + 1));
}

std::string make_statement(const attestation& a, const std::vector<subject>& subjects) {
    json::array list;
    const auto add = [&list](const std::string& name, const std::map<std::string, std::string>& digests) {
        json::object one;
        one.set("name", name);
        one.set("digest", json::value(digests));
        list.emplace_back(std::move(one));
    };
    const auto about = a.about.empty() ? std::vector<attested>{{}} : a.about;
    for (const auto& what : about) {
        if (!what.self) add(what.name, what.digests);
        for (const auto& s : subjects)
            if (what.self) add(s.name, {{"sha256", s.sha256}});
    }
    json::object out;
    out.set("_type", "https://in-toto.io/Statement/v1");
    out.set("predicateType", a.predicate_type);
    out.set("subject", json::value(std::move(list)));
    out.set("predicate", a.predicate.empty() ? json::value() : json::parse(a.predicate));
    return json::serialize(json::value(std::move(out)), {.indent = true});
}

}  // namespace cobuild::exporter

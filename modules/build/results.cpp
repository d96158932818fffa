// What a frontend's result says of itself: platforms, and whether they are those that were asked for.
module;
#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.build;

import cobuild.json;
import :parts;

namespace cobuild::build {

namespace {

std::string text_of(const std::set<std::string>& platforms) {
    std::string out;
    for (const auto& p : platforms) out += cat(out.empty() ? "" : ",", p);
    return out;
}

std::string normal_text(const oci::platform& p) { return oci::format(oci::normalize(p)); }

/// One entry of refs.platforms.
std::pair<std::string, oci::platform> entry_of(const json::value& one) {
    const auto* id = one.find("ID");
    const auto* platform = one.find("Platform");
    if (id == nullptr || !id->is_string() || id->as_string().empty()) throw error{errc::invalid, "invalid empty platform key for exporter"};
    auto parsed = platform == nullptr ? oci::platform{} : oci::platform_of(*platform);
    if (parsed.os.empty() || parsed.architecture.empty())
        throw error{errc::invalid, cat("invalid platform value for exporter: the entry ", quoted(id->as_string()), " lacks its os or architecture")};
    return {std::string(id->as_string()), oci::normalize(parsed)};
}

}  // namespace

std::string platforms_json(const std::vector<oci::platform>& platforms) {
    json::array list;
    for (const auto& p : platforms) {
        json::object one;
        one.set("ID", json::value(oci::format(p)));
        one.set("Platform", oci::to_json(p));
        list.emplace_back(std::move(one));
    }
    json::object out;
    out.set("Platforms", json::value(std::move(list)));
    return json::serialize(json::value(std::move(out)));
}

result_platforms platforms_of_result(const std::map<std::string, std::string>& metadata) {
    result_platforms out;
    const auto at = metadata.find("refs.platforms");
    if (at == metadata.end()) return out;
    const auto parsed = at->second.empty() ? json::value{} : json::parse(at->second);
    const auto* list = parsed.is_object() ? parsed.find("Platforms") : nullptr;
    if (list != nullptr && list->is_array())
        for (const auto& one : list->as_array()) out.push_back(entry_of(one));
    if (out.empty()) throw error{errc::invalid, "invalid empty platforms index for exporter"};
    return out;
}

oci::platform platform_of_config(const std::string& config) {
    if (config.empty()) return oci::host_platform();
    if (trim(config) == "null") throw error{errc::invalid, "invalid null image config for export"};
    auto out = oci::parse_image(config).platform;
    if (out.os.empty() && out.architecture.empty()) return oci::host_platform();
    if (out.os.empty() || out.architecture.empty())
        throw error{errc::invalid, "invalid image config: os and architecture must be specified together"};
    return oci::normalize(out);
}

std::string platform_warning(const std::string& asked, bool map, const result_platforms& made) {
    std::set<std::string> wanted, got;
    if (asked.empty()) wanted.insert(normal_text(oci::host_platform()));
    for (const auto one : asked.empty() ? std::vector<std::string_view>{} : split(asked, ',')) {
        const auto parsed = oci::parse_platform(one);
        if (!wanted.insert(normal_text(parsed)).second) return cat("Duplicate platform result requested ", quoted(one));
    }
    for (const auto& [id, platform] : made) got.insert(normal_text(platform));
    if (wanted.size() == 1 && got.size() == 1) {
        if (wanted == got) return {};
        // Who names no version of the system takes any.
        auto platform = made.front().second;
        platform.os_version.clear();
        if (wanted.contains(normal_text(platform))) return {};
        return cat("Requested platform ", quoted(asked.empty() ? *wanted.begin() : asked), " does not match result platform ", quoted(*got.begin()));
    }
    if (!map && wanted.size() > 1) return "Multiple platforms requested but result is not multi-platform";
    if (wanted != got) return cat("Requested platforms ", text_of(wanted), " do not match result platforms ", text_of(got));
    return {};
}

}  // namespace cobuild::build

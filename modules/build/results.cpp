// What a frontend's result says of itself beside its refs: platforms, and whether they are those that were asked for, names, annotations.
module;
#include <algorithm>
#include <cstddef>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.build;

import cobuild.json;
import cobuild.llb;
import cobuild.oci;
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

void check_image_config(const std::string& config) {
    if (config.empty()) return;
    const auto parsed = json::parse(config);
    if (parsed.is_null()) throw error{errc::invalid, "invalid null image config for export"};
    if (!parsed.is_object()) throw error{errc::invalid, "invalid image config for export: an object is expected"};
    const auto* os = parsed.find("os");
    const auto* architecture = parsed.find("architecture");
    const auto empty = [](const json::value* v) { return v == nullptr || !v->is_string() || v->as_string().empty(); };
    if (empty(os) != empty(architecture)) throw error{errc::invalid, "invalid image config: os and architecture must be specified together"};
}

oci::platform platform_of_config(const std::string& config) {
    check_image_config(config);
    if (config.empty()) return oci::host_platform();
    const auto out = oci::parse_image(config).platform;
    return out.os.empty() ? oci::host_platform() : oci::normalize(out);
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

void apply_metadata(std::vector<output>& outputs, const std::map<std::string, std::string>& metadata) {
    const auto name = metadata.find("image.name");
    for (auto& o : outputs) {
        if (o.type != "image" && o.type != "registry" && o.type != "oci" && o.type != "docker") continue;
        if (const auto own = o.attributes.find("name"); own != o.attributes.end() && own->second == "*") {
            if (name == metadata.end())
                o.attributes.erase(own);
            else
                own->second = name->second;
        }
        for (const auto& [key, value] : metadata)
            if (key.starts_with("annotation.") || key.starts_with("annotation-") || key.starts_with("annotation[")) o.attributes.emplace(key, value);
    }
}

std::optional<job::failure> place_of(const llb::definition& graph, const std::optional<digest>& vertex) {
    if (!vertex) return std::nullopt;
    job::failure out{.vertex = *vertex};
    for (const auto& op : graph.ops)
        if (digest::of(op) == *vertex) out.op = op;
    if (const auto meta = graph.metadata.find(*vertex); meta != graph.metadata.end()) out.description = meta->second.description;
    if (!graph.source) return out;
    const auto at = graph.source->locations.find(*vertex);
    if (at == graph.source->locations.end()) return out;
    for (const auto& l : at->second.list)
        if (const auto index = static_cast<std::size_t>(l.source_index); index < graph.source->infos.size())
            out.sources.push_back({graph.source->infos[index], l.ranges});
    return out;
}

}  // namespace cobuild::build

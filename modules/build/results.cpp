// What a frontend says of its result beside the refs themselves, and what exporters are to make of it.
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

std::vector<std::pair<std::string, oci::platform>> parse_platforms(const std::map<std::string, std::string>& metadata) {
    std::vector<std::pair<std::string, oci::platform>> out;
    const auto text = metadata.find("refs.platforms");
    if (text == metadata.end() || text->second.empty()) return out;
    const auto parsed = json::parse(text->second);
    const auto* list = parsed.find("Platforms");
    if (list == nullptr || !list->is_array() || list->as_array().empty()) throw error{errc::invalid, "invalid empty platforms index for exporter"};
    const auto has = [](const json::value& of, std::string_view key) {
        const auto* v = of.find(key);
        return v != nullptr && v->is_string() && !v->as_string().empty();
    };
    for (const auto& one : list->as_array()) {
        const auto* id = one.find("ID");
        if (id == nullptr || !id->is_string() || id->as_string().empty()) throw error{errc::invalid, "invalid empty platform key for exporter"};
        const auto* platform = one.find("Platform");
        if (platform == nullptr || !has(*platform, "os") || !has(*platform, "architecture"))
            throw error{errc::invalid, cat("invalid platform value for exporter: ", id->as_string(), " has no os or no architecture")};
        out.emplace_back(id->as_string(), oci::normalize(oci::platform_of(*platform)));
    }
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

std::optional<std::string> platforms_warning(const std::string& asked, const job_result& what) {
    const bool empty = std::all_of(what.refs.begin(), what.refs.end(), [](const auto& r) { return !r.second; });
    if (empty && !what.metadata.contains("refs.platforms")) return std::nullopt;
    std::vector<std::string> requested;
    const auto list = asked.empty() ? oci::format(oci::host_platform()) : asked;
    for (const auto text : split(list, ',')) {
        std::string one;
        try {
            one = oci::format(oci::normalize(oci::parse_platform(trim(text))));
        } catch (const error& e) {
            return cat("Invalid platform result requested ", quoted(text), ": ", e.what());
        }
        if (std::find(requested.begin(), requested.end(), one) != requested.end()) return cat("Duplicate platform result requested ", quoted(text));
        requested.push_back(std::move(one));
    }
    std::vector<std::string> made;
    for (const auto& [id, platform] : parse_platforms(what.metadata)) made.push_back(oci::format(platform));
    const auto config = what.metadata.find("containerimage.config");
    if (made.empty() && config != what.metadata.end() && !what.map) {
        check_image_config(config->second);
        const auto platform = oci::parse_image(config->second).platform;
        if (!platform.os.empty()) made.push_back(oci::format(oci::normalize(platform)));
    }
    if (made.empty()) made.push_back(oci::format(oci::normalize(oci::host_platform())));
    const auto joined = [](const std::vector<std::string>& all) {
        std::string out;
        for (const auto& p : all) out += cat(out.empty() ? "" : ",", p);
        return out;
    };
    if (requested.size() == 1 && made.size() == 1) {
        if (requested.front() == made.front()) return std::nullopt;
        return cat("Requested platform ", quoted(list), " does not match result platform ", quoted(made.front()));
    }
    if (!what.map && requested.size() > 1) return "Multiple platforms requested but result is not multi-platform";
    if (std::set<std::string>(requested.begin(), requested.end()) == std::set<std::string>(made.begin(), made.end())) return std::nullopt;
    return cat("Requested platforms ", joined(requested), " do not match result platforms ", joined(made));
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

module;
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

bool parse_bool(std::string_view key, const std::string& text) {
    const auto word = to_lower(text);
    if (word.empty() || word == "1" || word == "t" || word == "true") return true;
    if (word == "0" || word == "f" || word == "false") return false;
    throw error{errc::invalid, cat("provenance: ", key, "=", text, ": true or false is expected")};
}

/// "k=v,k=v"; quotes protect commas as in RFC 4180. A bare "true" or "false" is buildx's short form.
std::map<std::string, std::string> parse_parameters(const std::string& kind, const std::string& text) {
    std::vector<std::string> fields(1);
    bool in_quotes = false;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (c == '"' && in_quotes && i + 1 < text.size() && text[i + 1] == '"')
            fields.back() += text[i++];
        else if (c == '"')
            in_quotes = !in_quotes;
        else if (c == ',' && !in_quotes)
            fields.emplace_back();
        else
            fields.back() += c;
    }
    std::map<std::string, std::string> out;
    for (const auto& f : fields) {
        if (f.empty()) continue;
        const auto eq = f.find('=');
        const auto key = to_lower(trim(f.substr(0, eq)));
        if (eq == std::string::npos && (key == "true" || key == "1")) continue;
        if (eq == std::string::npos && (key == "false" || key == "0"))
            out["disabled"] = "true";
        else if (eq == std::string::npos)
            throw error{errc::invalid, cat("attestation ", kind, ": ", quoted(f), ": KEY=VALUE is expected")};
        else
            out[key] = f.substr(eq + 1);
    }
    return out;
}

provenance_options parse_provenance(const std::map<std::string, std::string>& parameters, bool default_max) {
    provenance_options out;
    out.max = default_max;
    for (const auto& [key, value] : parameters) {
        if (key == "mode") {
            if (value != "min" && value != "max" && value != "full")
                throw error{errc::invalid, cat("provenance: mode=", value, ": min or max is expected")};
            out.max = value != "min";
        } else if (key == "version") {
            if (value != "v1" && value != "v0.2") throw error{errc::invalid, cat("provenance: version=", value, ": v1 or v0.2 is expected")};
            out.v1 = value == "v1";
        } else if (key == "inline-only") {
            out.inline_only = parse_bool(key, value);
        } else if (key == "reproducible") {
            out.reproducible = parse_bool(key, value);
        } else if (key == "complete-materials") {
            out.complete_materials = parse_bool(key, value);
        } else if (key == "builder-id") {
            out.builder_id = value;
        } else if (key == "filename") {
            out.filename = value;
        } else if (key == "capture-usage") {
            if (parse_bool(key, value)) throw error{errc::unsupported, "provenance: capture-usage is not supported yet"};
        } else if (key != "disabled" && !(key == "type" && value == "provenance")) {  // buildx passes the flag's text on as it is
            static constexpr std::string_view known[] = {
                "mode", "version", "inline-only", "reproducible", "builder-id", "complete-materials", "filename", "capture-usage"};
            const auto near = nearest(key, known);
            throw error{errc::invalid, cat("provenance: unknown parameter ", quoted(key), near.empty() ? "" : cat(", did you mean ", near, "?"))};
        }
    }
    return out;
}

}  // namespace

attest_request parse_attests(const std::map<std::string, std::string>& attests, bool default_max) {
    attest_request out;
    for (const auto& [kind, text] : attests) {
        if (kind != "provenance" && kind != "sbom")
            throw error{errc::invalid, cat("unknown attestation type ", quoted(kind), " (provenance and sbom are known)")};
        const auto parameters = parse_parameters(kind, text);
        if (const auto off = parameters.find("disabled"); off != parameters.end() && parse_bool("disabled", off->second)) continue;
        if (kind == "sbom") {
            out.sbom = parameters;
            out.sbom->erase("type");
            out.sbom->emplace("generator", "docker/buildkit-syft-scanner:stable-1");
            continue;
        }
        out.provenance = parse_provenance(parameters, default_max);
    }
    return out;
}

std::map<std::string, std::string> attests_of(const std::map<std::string, std::string>& attrs) {
    constexpr std::string_view attest = "attest:", argument = "build-arg:BUILDKIT_ATTEST_";
    std::map<std::string, std::string> out;
    for (const auto& [key, value] : attrs)
        if (key.starts_with(attest)) out[key.substr(attest.size())] = value;
    for (const auto& [key, value] : attrs)
        if (key.starts_with(argument)) out.emplace(to_lower(key.substr(argument.size())), value);
    return out;
}

}  // namespace cobuild::exporter

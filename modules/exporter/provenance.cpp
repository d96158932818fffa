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

constexpr std::string_view build_type_v1 = "https://github.com/moby/buildkit/blob/master/docs/attestations/slsa-definitions.md";
constexpr std::string_view build_type_v02 = "https://mobyproject.org/buildkit@v1";

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

json::value digests_json(const std::map<std::string, std::string>& digests) { return json::value(digests); }

json::array materials_json(const build_record& r) {
    json::array out;
    for (const auto& m : r.materials) {
        json::object one;
        one.set("uri", m.uri);
        if (!m.digests.empty()) one.set("digest", digests_json(m.digests));
        out.emplace_back(std::move(one));
    }
    return out;
}

struct shown_request {
    json::object value;
    bool complete = true;  ///< nothing was left out
    json::object vcs;
};

/// What is the host's, or about the request itself, is never told.
bool is_told(std::string_view key) {
    for (const std::string_view other : {"cgroup-parent", "image-resolve-mode", "platform", "cache-imports"})
        if (key == other) return false;
    return !key.starts_with("attest:") && !key.starts_with("build-arg:BUILDKIT_ATTEST_");
}

json::array demands_json(const std::vector<named_demand>& all) {
    json::array out;
    for (const auto& d : all) {
        json::object one;
        one.set("id", d.id);
        if (d.optional) one.set("optional", true);
        out.emplace_back(std::move(one));
    }
    return out;
}

shown_request show_request(const build_record& r, bool max) {
    shown_request out;
    out.value.set("frontend", r.frontend);
    json::object args;
    for (const auto& [key, value] : r.attrs) {
        if (!is_told(key)) continue;
        if (key.starts_with("vcs:")) {
            out.vcs.set(key.substr(4), without_credentials(value));
            continue;
        }
        if (!max && (key.starts_with("build-arg:") || key.starts_with("label:"))) {
            out.complete = false;
            continue;
        }
        args.set(key, key == "context" || key.starts_with("context:") ? without_credentials(value) : value);
    }
    if (!args.empty()) out.value.set("args", std::move(args));
    if (max && !r.secrets.empty()) out.value.set("secrets", json::value(demands_json(r.secrets)));
    if (max && !r.ssh.empty()) out.value.set("ssh", json::value(demands_json(r.ssh)));
    if (!max && (!r.secrets.empty() || !r.ssh.empty())) out.complete = false;
    json::array locals;
    for (const auto& name : r.locals) locals.emplace_back(json::object{{"name", name}});
    if (!locals.empty()) out.value.set("locals", json::value(std::move(locals)));
    return out;
}

json::value steps_json(const build_record& r) {
    json::array steps;
    json::object ids;
    for (const auto& s : r.steps) {
        json::object one;
        one.set("id", s.id);
        one.set("op", json::parse(s.op));
        if (!s.inputs.empty()) one.set("inputs", json::value(s.inputs));
        steps.emplace_back(std::move(one));
        ids.set(s.digest, s.id);
    }
    json::object out;
    out.set("llbDefinition", json::value(std::move(steps)));
    out.set("digestMapping", std::move(ids));
    return json::value(std::move(out));
}

json::object metadata_json(const build_record& r, bool max, json::object vcs) {
    json::object out;
    if (!vcs.empty()) out.set("vcs", std::move(vcs));
    if (!max || r.sources.empty()) return out;
    json::array infos;
    for (const auto& s : r.sources) {
        json::object one;
        one.set("filename", s.filename);
        if (!s.language.empty()) one.set("language", s.language);
        one.set("data", base64_encode(s.data));
        infos.emplace_back(std::move(one));
    }
    json::object source;
    source.set("infos", json::value(std::move(infos)));
    out.set("source", std::move(source));
    return out;
}

json::object config_source(const build_record& r, std::string_view path_key) {
    json::object out;
    if (!r.config_uri.empty()) out.set("uri", without_credentials(r.config_uri));
    if (!r.config_digests.empty()) out.set("digest", digests_json(r.config_digests));
    const auto file = r.attrs.find("filename");
    out.set(path_key, file == r.attrs.end() ? "Dockerfile" : file->second);
    return out;
}

json::object predicate_v1(const provenance_options& o, const build_record& r) {
    auto request = show_request(r, o.max);
    json::object external;
    external.set("configSource", config_source(r, "path"));
    external.set("request", std::move(request.value));
    json::object internal;
    if (o.max) internal.set("buildConfig", steps_json(r));
    internal.set("builderPlatform", oci::format(r.builder));
    json::object definition;
    definition.set("buildType", build_type_v1);
    definition.set("externalParameters", std::move(external));
    definition.set("internalParameters", std::move(internal));
    definition.set("resolvedDependencies", json::value(materials_json(r)));
    json::object metadata;
    metadata.set("invocationID", r.invocation);
    metadata.set("startedOn", format_time(r.started));
    metadata.set("finishedOn", format_time(r.finished));
    if (auto extra = metadata_json(r, o.max, std::move(request.vcs)); !extra.empty()) metadata.set("buildkit_metadata", std::move(extra));
    metadata.set("buildkit_hermetic", r.complete && !r.network);
    json::object complete;
    complete.set("request", request.complete);
    complete.set("resolvedDependencies", r.complete);
    metadata.set("buildkit_completeness", std::move(complete));
    metadata.set("buildkit_reproducible", o.reproducible);
    json::object details;
    details.set("builder", json::object{{"id", o.builder_id}});
    details.set("metadata", std::move(metadata));
    json::object out;
    out.set("buildDefinition", std::move(definition));
    out.set("runDetails", std::move(details));
    return out;
}

json::object predicate_v02(const provenance_options& o, const build_record& r) {
    auto request = show_request(r, o.max);
    json::object invocation;
    invocation.set("configSource", config_source(r, "entryPoint"));
    invocation.set("parameters", std::move(request.value));
    invocation.set("environment", json::object{{"platform", oci::format(r.builder)}});
    json::object complete;
    complete.set("parameters", request.complete);
    complete.set("environment", true);
    complete.set("materials", r.complete);
    json::object metadata;
    metadata.set("buildInvocationID", r.invocation);
    metadata.set("buildStartedOn", format_time(r.started));
    metadata.set("buildFinishedOn", format_time(r.finished));
    metadata.set("completeness", std::move(complete));
    metadata.set("reproducible", o.reproducible);
    metadata.set("https://mobyproject.org/buildkit@v1#hermetic", r.complete && !r.network);
    if (auto extra = metadata_json(r, o.max, std::move(request.vcs)); !extra.empty())
        metadata.set("https://mobyproject.org/buildkit@v1#metadata", std::move(extra));
    json::object out;
    out.set("builder", json::object{{"id", o.builder_id}});
    out.set("buildType", build_type_v02);
    out.set("materials", json::value(materials_json(r)));
    out.set("invocation", std::move(invocation));
    if (o.max) out.set("buildConfig", steps_json(r));
    out.set("metadata", std::move(metadata));
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

attestation make_provenance(const provenance_options& o, const build_record& r) {
    if (o.complete_materials && !r.complete)
        throw error{errc::invalid, "provenance: complete-materials is demanded, and not every source of this build has a digest"};
    auto predicate = o.v1 ? predicate_v1(o, r) : predicate_v02(o, r);
    return {.predicate_type = o.v1 ? "https://slsa.dev/provenance/v1" : "https://slsa.dev/provenance/v0.2",
            .predicate = json::serialize(json::value(std::move(predicate))),
            .filename = o.filename,
            .inline_only = o.inline_only};
}

}  // namespace cobuild::exporter

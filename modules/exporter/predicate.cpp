module;
#include <fcntl.h>

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

module cobuild.exporter;

import cobuild.fs;
import cobuild.json;

namespace cobuild::exporter {

namespace {

constexpr std::string_view build_type_v1 = "https://github.com/moby/buildkit/blob/master/docs/attestations/slsa-definitions.md";
constexpr std::string_view build_type_v02 = "https://mobyproject.org/buildkit@v1";
constexpr std::string_view metadata_v1 = "buildkit_metadata", metadata_v02 = "https://mobyproject.org/buildkit@v1#metadata";
constexpr unsigned most_requests_deep = 32;  ///< of requests whose inputs other requests made
constexpr std::size_t max_environment = std::size_t{1} << 20;

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

const std::string* attribute(const asked_request& r, const std::string& key) {
    const auto at = r.attrs.find(key);
    return at == r.attrs.end() || at->second.empty() ? nullptr : &at->second;
}

/// The attribute that holds the build context.
std::string context_key(const asked_request& r) {
    if (const auto* named = attribute(r, "contextkey")) return *named;
    return attribute(r, "input:context") != nullptr ? "input:context" : "context";
}

/// What the context was, if it is one of the materials. A directory of a repository stands in the URL only.
const material* material_of(const build_record& r, const std::string& uri) {
    const auto hash = uri.find('#');
    const auto directory = hash == std::string::npos ? hash : uri.find(':', hash);
    const auto whole = uri.substr(0, directory);
    const auto plain = whole.ends_with('#') ? whole.substr(0, whole.size() - 1) : whole;
    const auto at = std::find_if(r.materials.begin(), r.materials.end(), [&](const material& m) { return m.uri == plain; });
    return at == r.materials.end() ? nullptr : &*at;
}

json::object config_source(const build_record& r, const asked_request& asked, std::string_view path_key) {
    json::object out;
    if (const auto* context = attribute(asked, context_key(asked))) {
        const auto uri = hide_credentials(*context);
        out.set("uri", uri);
        if (const auto* m = material_of(r, uri); m != nullptr && !m->digests.empty()) out.set("digest", digests_json(m->digests));
    }
    if (const auto* file = attribute(asked, "filename"))
        out.set(path_key, *file);
    else if (asked.frontend == "dockerfile.v0")
        out.set(path_key, "Dockerfile");
    return out;
}

/// The arguments as they are told; `complete` becomes false when some are left out.
json::object shown_args(const asked_request& r, bool max, bool& complete) {
    json::object args;
    const auto context = context_key(r);
    for (const auto& [key, value] : r.attrs) {
        if (!is_told(key) || key.starts_with("vcs:") || ((key == context || key == "filename") && !value.empty())) continue;
        if (!max && (key.starts_with("build-arg:") || key.starts_with("label:"))) {
            complete = false;
            continue;
        }
        args.set(key, key.starts_with("context:") ? hide_credentials(value) : value);
    }
    return args;
}

json::object nested(const build_record& r, const asked_request& asked, bool max, bool& complete, unsigned depth);

void add_origins(json::object& to, const build_record& r, const asked_request& asked, bool max, bool& complete, unsigned depth) {
    if (depth >= most_requests_deep) return;
    json::object inputs;
    for (const auto& [name, in] : asked.inputs)
        if (in) inputs.set(name, nested(r, *in, max, complete, depth + 1));
    if (!inputs.empty()) to.set("inputs", std::move(inputs));
    if (asked.root) to.set("root", nested(r, *asked.root, max, complete, depth + 1));
}

/// A request that made an input, or the client's own: BuildKit's RequestProvenance.
json::object nested(const build_record& r, const asked_request& asked, bool max, bool& complete, unsigned depth) {
    json::object request;
    if (!asked.frontend.empty()) request.set("frontend", asked.frontend);
    if (auto args = shown_args(asked, max, complete); !args.empty()) request.set("args", std::move(args));
    add_origins(request, r, asked, max, complete, depth);
    json::object out;
    out.set("configSource", config_source(r, asked, "path"));
    out.set("request", std::move(request));
    return out;
}

struct shown_request {
    json::object value;
    bool complete = true;  ///< nothing was left out
    json::object vcs;
};

shown_request show_request(const build_record& r, bool max) {
    shown_request out;
    const auto& asked = r.request;
    out.complete = !asked.frontend.empty();
    if (!asked.frontend.empty()) out.value.set("frontend", asked.frontend);
    if (auto args = shown_args(asked, max, out.complete); !args.empty()) out.value.set("args", std::move(args));
    for (const auto& [key, value] : asked.attrs)
        if (key.starts_with("vcs:") && !value.empty()) out.vcs.set(key.substr(4), hide_credentials(value));
    if (max && !r.secrets.empty()) out.value.set("secrets", json::value(demands_json(r.secrets)));
    if (max && !r.ssh.empty()) out.value.set("ssh", json::value(demands_json(r.ssh)));
    json::array locals;
    for (const auto& name : r.locals) locals.emplace_back(json::object{{"name", name}});
    if (!locals.empty()) out.value.set("locals", json::value(std::move(locals)));
    add_origins(out.value, r, asked, max, out.complete, 0);
    return out;
}

void add_steps(json::object& to, const std::vector<provenance_step>& all) {
    json::array steps;
    json::object ids;
    for (const auto& s : all) {
        json::object one;
        one.set("id", s.id);
        one.set("op", json::parse(s.op));
        if (!s.inputs.empty()) one.set("inputs", json::value(s.inputs));
        steps.emplace_back(std::move(one));
        ids.set(s.digest, s.id);
    }
    to.set("llbDefinition", json::value(std::move(steps)));
    to.set("digestMapping", std::move(ids));
}

json::object config_json(const build_record& r) {
    json::object out;
    add_steps(out, r.steps);
    return out;
}

json::object metadata_json(const build_record& r, bool max, json::object vcs) {
    json::object out;
    if (!vcs.empty()) out.set("vcs", std::move(vcs));
    if (!max || r.sources.empty()) return out;
    json::object source;
    json::object places;
    for (const auto& [step, place] : r.locations) places.set(step, json::parse(place));
    if (!places.empty()) source.set("locations", std::move(places));
    json::array infos;
    for (const auto& s : r.sources) {
        json::object one;
        one.set("filename", s.filename);
        if (!s.language.empty()) one.set("language", s.language);
        one.set("data", base64_encode(s.data));
        if (!s.steps.empty()) add_steps(one, s.steps);
        infos.emplace_back(std::move(one));
    }
    source.set("infos", json::value(std::move(infos)));
    out.set("source", std::move(source));
    return out;
}

/// What the configuration adds, and which frontend this was.
void add_surroundings(json::object& to, const build_record& r) {
    if (!r.dockerfile_version.empty()) to.set("dockerfileVersion", r.dockerfile_version);
    if (r.environment.empty()) return;
    const auto parsed = json::parse(r.environment);
    for (const auto& m : parsed.as_object().members()) to.set(m.key, m.val);
}

json::object predicate_v1(const provenance_options& o, const build_record& r) {
    auto request = show_request(r, o.max);
    json::object external;
    external.set("configSource", config_source(r, r.request, "path"));
    external.set("request", std::move(request.value));
    json::object internal;
    if (o.max) internal.set("buildConfig", config_json(r));
    internal.set("builderPlatform", oci::format(r.builder));
    add_surroundings(internal, r);
    json::object definition;
    definition.set("buildType", build_type_v1);
    definition.set("externalParameters", std::move(external));
    definition.set("internalParameters", std::move(internal));
    definition.set("resolvedDependencies", json::value(materials_json(r)));
    json::object metadata;
    metadata.set("invocationID", r.invocation);
    metadata.set("startedOn", format_time(r.started));
    metadata.set("finishedOn", format_time(r.finished));
    metadata.set(metadata_v1, metadata_json(r, o.max, std::move(request.vcs)));
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
    invocation.set("configSource", config_source(r, r.request, "entryPoint"));
    invocation.set("parameters", std::move(request.value));
    json::object environment{{"platform", oci::format(r.builder)}};
    add_surroundings(environment, r);
    invocation.set("environment", std::move(environment));
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
    metadata.set(metadata_v02, metadata_json(r, o.max, std::move(request.vcs)));
    json::object out;
    out.set("builder", json::object{{"id", o.builder_id}});
    out.set("buildType", build_type_v02);
    out.set("materials", json::value(materials_json(r)));
    out.set("invocation", std::move(invocation));
    if (o.max) out.set("buildConfig", config_json(r));
    out.set("metadata", std::move(metadata));
    return out;
}

/// The member, made when it is not there.
json::object& member(json::object& of, std::string_view key) {
    auto& at = of[key];
    if (!at.is_object()) at = json::value(json::object{});
    return at.as_object();
}

}  // namespace

attestation make_provenance(const provenance_options& o, const build_record& r) {
    if (o.complete_materials && !r.complete)
        throw error{errc::invalid, "provenance: complete-materials is demanded, and not every source of this build has a digest"};
    auto predicate = o.v1 ? predicate_v1(o, r) : predicate_v02(o, r);
    return {.predicate_type = o.v1 ? "https://slsa.dev/provenance/v1" : "https://slsa.dev/provenance/v0.2",
            .predicate = json::serialize(json::value(std::move(predicate))),
            .filename = o.filename,
            .inline_only = o.inline_only,
            .layers = o.max ? r.layers : std::map<std::string, std::size_t>{}};
}

attestation with_layers(attestation a, const std::vector<oci::descriptor>& layers) {
    json::object all;
    for (const auto& [result, count] : a.layers) {
        if (count == 0 || count > layers.size()) continue;
        json::array chain;
        for (std::size_t i = 0; i < count; ++i) {
            auto d = layers[i];
            d.annotations.clear();
            chain.push_back(oci::to_json(d));
        }
        all.set(result, json::array{json::value(std::move(chain))});
    }
    a.layers.clear();
    if (all.empty()) return a;
    auto predicate = json::parse(a.predicate);
    auto& root = predicate.as_object();
    auto& metadata = root.contains("runDetails") ? member(member(member(root, "runDetails"), "metadata"), metadata_v1)
                                                 : member(member(root, "metadata"), metadata_v02);
    metadata.set("layers", std::move(all));
    a.predicate = json::serialize(predicate);
    return a;
}

std::string read_environment(const std::string& directory) {
    namespace stdfs = std::filesystem;
    std::vector<stdfs::path> files;
    std::error_code ec;
    for (const auto& e : stdfs::directory_iterator(directory, ec))
        if (e.path().extension() == ".json") files.push_back(e.path());
    std::sort(files.begin(), files.end());
    json::object all;
    for (const auto& file : files) {
        try {
            const unique_fd fd{::open(file.c_str(), O_RDONLY | O_CLOEXEC)};
            if (!fd) throw_errno("reading it");
            const auto parsed = json::parse(fs::read_all(fd.get(), max_environment));
            for (const auto& m : parsed.as_object().members()) all.set(m.key, m.val);
        } catch (const error& e) {
            throw error(e).with(cat("provenanceEnvDir: ", file.string()));
        }
    }
    for (const auto* own : {"buildConfig", "builderPlatform", "platform"})
        if (all.contains(own))
            throw error{errc::invalid, cat("provenanceEnvDir ", directory, ": the key ", own, " is the builder's own; leave it out")};
    return all.empty() ? std::string() : json::serialize(json::value(std::move(all)));
}

}  // namespace cobuild::exporter

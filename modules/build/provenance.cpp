module;
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import cobuild.frontend;
import cobuild.json;
import cobuild.llb;
import :parts;

namespace cobuild::build {

namespace {

constexpr std::string_view image_scheme = "docker-image://", layout_scheme = "oci-layout://", git_scheme = "git://", local_scheme = "local://",
                           blob_scheme = "docker-image+blob://";

std::optional<oci::platform> platform_of(const llb::op& op) {
    if (!op.platform) return std::nullopt;
    return oci::platform{op.platform->os, op.platform->architecture, op.platform->variant, op.platform->os_version, op.platform->os_features};
}

std::map<std::string, std::string> digests_of(const ops::found_sources& found, const std::string& identifier) {
    const auto at = found.find(identifier);
    return at == found.end() ? std::map<std::string, std::string>{} : at->second;
}

/// An image by its package URL, with the digest of what its name stands for.
exporter::material image_material(std::string_view kind, const oci::reference& ref, const llb::op& op, std::map<std::string, std::string> digests) {
    if (ref.digest()) digests = {{"sha256", ref.digest()->hex()}};
    return {.uri = exporter::package_url(kind, ref, platform_of(op)), .digests = std::move(digests)};
}

exporter::material git_material(const llb::source_op& source, std::map<std::string, std::string> digests) {
    const auto full = source.attrs.find("git.fullurl");
    const auto fragment_at = source.identifier.find('#');
    std::string uri =
        full != source.attrs.end() ? full->second : cat("https://", source.identifier.substr(git_scheme.size(), fragment_at - git_scheme.size()));
    if (fragment_at != std::string::npos) {
        const auto fragment = source.identifier.substr(fragment_at + 1);
        if (const auto ref = fragment.substr(0, fragment.find(':')); !ref.empty()) uri += cat("#", ref);
    }
    return {.uri = exporter::without_credentials(uri), .digests = std::move(digests)};
}

exporter::material http_material(const llb::source_op& source, std::map<std::string, std::string> digests) {
    const auto sum = source.attrs.find("http.checksum");
    if (sum != source.attrs.end())
        if (const auto d = digest::try_parse(sum->second)) digests = {{"sha256", d->hex()}};
    return {.uri = exporter::without_credentials(source.identifier), .digests = std::move(digests)};
}

void add_source(exporter::build_record& r, const llb::op& op, const llb::source_op& source, const ops::found_sources& found) {
    const std::string_view id = source.identifier;
    auto digests = digests_of(found, source.identifier);
    std::optional<exporter::material> m;
    if (id.starts_with(image_scheme))
        m = image_material("docker", oci::reference::parse(id.substr(image_scheme.size())), op, std::move(digests));
    else if (id.starts_with(layout_scheme))
        m = image_material("oci", oci::reference::parse(id.substr(layout_scheme.size())), op, std::move(digests));
    else if (id.starts_with(blob_scheme)) {
        auto uri = exporter::package_url("docker", oci::reference::parse(id.substr(blob_scheme.size())), std::nullopt);
        uri += cat(uri.find('?') == std::string::npos ? "?" : "&", "ref_type=blob");
        m = exporter::material{.uri = std::move(uri), .digests = std::move(digests)};
    } else if (id.starts_with(git_scheme))
        m = git_material(source, std::move(digests));
    else if (id.starts_with("http://") || id.starts_with("https://"))
        m = http_material(source, std::move(digests));
    else if (id.starts_with(local_scheme))
        r.locals.emplace_back(id.substr(local_scheme.size()));
    r.complete = r.complete && m && !m->digests.empty();
    if (m && std::find(r.materials.begin(), r.materials.end(), *m) == r.materials.end()) r.materials.push_back(std::move(*m));
}

/// A thing asked for twice is demanded if one of those who ask cannot do without.
void demand(std::map<std::string, bool>& all, const std::string& id, bool optional) {
    const auto [at, fresh] = all.try_emplace(id, optional);
    at->second = at->second && optional;
}

std::vector<exporter::named_demand> listed(const std::map<std::string, bool>& all) {
    std::vector<exporter::named_demand> out;
    for (const auto& [id, optional] : all) out.push_back({id, optional});
    return out;
}

void add_steps(exporter::build_record& r, const llb::definition& graph, const llb::loaded& loaded) {
    std::unordered_map<std::string, std::string> op_of;
    const auto lines = llb::to_json(graph);
    for (const auto line : split(lines, '\n')) {
        if (line.empty()) continue;
        const auto parsed = json::parse(line).as_object();
        op_of[json::string_at(parsed, "Digest")] = json::serialize(json::at(parsed, "Op"));
    }
    std::map<digest, std::string> ids;
    for (const auto& v : loaded.vertices) {
        exporter::provenance_step s{.id = cat("step", ids.size()), .digest = v.id.str(), .op = op_of[v.id.str()]};
        if (s.op.empty()) s.op = "{}";
        for (const auto& in : v.what.inputs) s.inputs.push_back(cat(ids[in.vertex], ":", in.index));
        ids[v.id] = s.id;
        r.steps.push_back(std::move(s));
    }
    if (!graph.source) return;
    for (const auto& i : graph.source->infos) r.sources.push_back({.filename = i.filename, .language = i.language, .data = std::string(i.data)});
}

}  // namespace

exporter::build_record make_record(std::string frontend, std::map<std::string, std::string> attrs, const llb::definition& graph,
                                   const ops::found_sources& found, std::chrono::sys_time<nanoseconds> started) {
    exporter::build_record r{.frontend = std::move(frontend), .attrs = std::move(attrs)};
    const auto loaded = llb::load(graph);
    std::map<std::string, bool> secrets, ssh;
    for (const auto& v : loaded.vertices) {
        if (const auto* source = std::get_if<llb::source_op>(&v.what.what)) add_source(r, v.what, *source, found);
        const auto* exec = std::get_if<llb::exec_op>(&v.what.what);
        if (exec == nullptr) continue;
        r.network = r.network || exec->network != llb::net_mode::none;
        for (const auto& s : exec->secret_envs) demand(secrets, s.id, s.optional);
        for (const auto& m : exec->mounts) {
            if (m.type == llb::mount_type::secret && m.secret) demand(secrets, m.secret->id, m.secret->optional);
            if (m.type == llb::mount_type::ssh && m.ssh) demand(ssh, m.ssh->id, m.ssh->optional);
        }
    }
    std::sort(r.materials.begin(), r.materials.end(), [](const auto& a, const auto& b) { return a.uri < b.uri; });
    r.secrets = listed(secrets);
    r.ssh = listed(ssh);
    add_steps(r, graph, loaded);
    r.builder = oci::host_platform();
    r.invocation = random_id();
    r.started = started;
    r.finished = std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now());
    return r;
}

std::map<std::string, std::string> frontend_attributes(const build_request& r, const frontend::request& converted) {
    std::map<std::string, std::string> out;
    const auto put = [&](const std::string& key, const std::string& value) {
        if (!value.empty()) out[key] = value;
    };
    if (converted.dockerfile_name != "Dockerfile") put("filename", converted.dockerfile_name);
    put("target", r.target);
    put("context", r.remote_context);
    for (const auto& [key, value] : converted.build_args) out[cat("build-arg:", key)] = value;
    for (const auto& [key, value] : r.labels) out[cat("label:", key)] = value;
    for (const auto& [key, value] : r.build_contexts) out[cat("context:", key)] = value;
    std::string stages;
    for (const auto& s : r.no_cache_stages) stages += cat(stages.empty() ? "" : ",", s);
    if (r.no_cache)
        out["no-cache"] = "";
    else
        put("no-cache", stages);
    if (r.network == "host" || r.network == "none") out["force-network-mode"] = r.network;
    std::string hosts, limits;
    for (const auto& h : converted.extra_hosts) hosts += cat(hosts.empty() ? "" : ",", h.host, "=", h.ip);
    put("add-hosts", hosts);
    for (const auto& u : converted.ulimits) limits += cat(limits.empty() ? "" : ",", u.name, "=", u.soft, ":", u.hard);
    put("ulimit", limits);
    if (r.shm_size != 0) out["shm-size"] = cat(r.shm_size);
    return out;
}

}  // namespace cobuild::build

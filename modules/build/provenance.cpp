module;
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <tuple>
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
    return {.uri = exporter::hide_credentials(uri), .digests = std::move(digests)};
}

exporter::material http_material(const llb::source_op& source, std::map<std::string, std::string> digests) {
    const auto sum = source.attrs.find("http.checksum");
    if (sum != source.attrs.end())
        if (const auto d = digest::try_parse(sum->second)) digests = {{"sha256", d->hex()}};
    return {.uri = exporter::hide_credentials(source.identifier), .digests = std::move(digests)};
}

/// Images come first, then repositories, then files, each by name: the order of BuildKit's materials.
struct ranked_material {
    int rank = 0;
    exporter::material what;
};

void add_source(exporter::build_record& r, std::set<std::string>& locals, std::vector<ranked_material>& out, const llb::op& op,
                const llb::source_op& source, const ops::found_sources& found) {
    const std::string_view id = source.identifier;
    auto digests = digests_of(found, source.identifier);
    std::optional<ranked_material> m;
    if (id.starts_with(image_scheme))
        m = {0, image_material("docker", oci::reference::parse(id.substr(image_scheme.size())), op, std::move(digests))};
    else if (id.starts_with(layout_scheme))
        m = {0, image_material("oci", oci::reference::parse(id.substr(layout_scheme.size())), op, std::move(digests))};
    else if (id.starts_with(blob_scheme)) {
        auto uri = exporter::package_url("docker", oci::reference::parse(id.substr(blob_scheme.size())), std::nullopt);
        uri += cat(uri.find('?') == std::string::npos ? "?" : "&", "ref_type=blob");
        m = {0, exporter::material{.uri = std::move(uri), .digests = std::move(digests)}};
    } else if (id.starts_with(git_scheme))
        m = {1, git_material(source, std::move(digests))};
    else if (id.starts_with("http://") || id.starts_with("https://"))
        m = {2, http_material(source, std::move(digests))};
    else if (id.starts_with(local_scheme))
        locals.emplace(id.substr(local_scheme.size()));
    r.complete = r.complete && m && !m->what.digests.empty();
    const auto same = [&](const ranked_material& known) { return known.what == m->what; };
    if (m && std::none_of(out.begin(), out.end(), same)) out.push_back(std::move(*m));
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

/// An op as JSON, without its inputs, which are told by step, and without what means something in one build only.
std::string shown_op(const json::value& op) {
    auto out = op.as_object();
    out.erase("inputs");
    if (auto* what = out.find("Op"); what != nullptr && what->is_object())
        if (auto* source = what->as_object().find("source"); source != nullptr && source->is_object())
            if (auto* attrs = source->as_object().find("attrs"); attrs != nullptr && attrs->is_object())
                for (const auto* key : {"local.session", "local.unique"}) attrs->as_object().erase(key);
    return json::serialize(json::value(std::move(out)));
}

/// The steps of a graph, inputs first, the terminal last.
std::vector<exporter::provenance_step> steps_of(const llb::definition& graph) {
    std::vector<exporter::provenance_step> out;
    if (graph.ops.empty()) return out;
    std::unordered_map<std::string, std::string> op_of;
    const auto lines = llb::to_json(graph);
    for (const auto line : split(lines, '\n')) {
        if (line.empty()) continue;
        const auto parsed = json::parse(line).as_object();
        op_of[json::string_at(parsed, "Digest")] = shown_op(json::at(parsed, "Op"));
    }
    std::map<digest, std::string> ids;
    const auto loaded = llb::load(graph);
    const auto add = [&](const digest& id, const std::vector<llb::input>& inputs) {
        exporter::provenance_step s{.id = cat("step", ids.size()), .digest = id.str(), .op = op_of[id.str()], .inputs = {}};
        if (s.op.empty()) s.op = "{}";
        for (const auto& in : inputs) s.inputs.push_back(cat(ids[in.vertex], ":", in.index));
        ids[id] = s.id;
        out.push_back(std::move(s));
    };
    for (const auto& v : loaded.vertices) add(v.id, v.what.inputs);
    if (loaded.result) add(digest::of(graph.ops.back()), {*loaded.result});
    return out;
}

json::value place_json(const llb::position& p) {
    json::object out;
    if (p.line != 0) out.set("line", static_cast<std::int64_t>(p.line));
    if (p.character != 0) out.set("character", static_cast<std::int64_t>(p.character));
    return json::value(std::move(out));
}

/// pb.Locations as Go's encoding/json writes it.
std::string locations_json(const llb::locations& all) {
    json::array list;
    for (const auto& l : all.list) {
        json::object one;
        if (l.source_index != 0) one.set("sourceIndex", static_cast<std::int64_t>(l.source_index));
        json::array ranges;
        for (const auto& r : l.ranges) ranges.emplace_back(json::object{{"start", place_json(r.start)}, {"end", place_json(r.end)}});
        one.set("ranges", json::value(std::move(ranges)));
        list.emplace_back(std::move(one));
    }
    return json::serialize(json::value(json::object{{"locations", json::value(std::move(list))}}));
}

void add_steps(exporter::build_record& r, const llb::definition& graph) {
    r.steps = steps_of(graph);
    if (!graph.source) return;
    for (const auto& i : graph.source->infos)
        r.sources.push_back({.filename = i.filename,
                             .language = i.language,
                             .data = std::string(i.data),
                             .steps = i.definition ? steps_of(*i.definition) : std::vector<exporter::provenance_step>{}});
    for (const auto& s : r.steps)
        if (const auto at = graph.source->locations.find(digest::parse(s.digest)); at != graph.source->locations.end())
            r.locations[s.id] = locations_json(at->second);
}

/// What the steps and sources of one graph use.
struct used_things {
    std::set<std::string> locals;
    std::vector<ranked_material> materials;
    std::map<std::string, bool> secrets, ssh;

    void add(exporter::build_record& r, const llb::definition& graph, const ops::found_sources& found) {
        for (const auto& v : llb::load(graph).vertices) {
            if (const auto* source = std::get_if<llb::source_op>(&v.what.what)) {
                add_source(r, locals, materials, v.what, *source, found);
                for (const auto* key : {"git.authtokensecret", "git.authheadersecret"})
                    if (const auto at = source->attrs.find(key); at != source->attrs.end()) demand(secrets, at->second, true);
                if (const auto at = source->attrs.find("git.mountsshsock"); at != source->attrs.end()) demand(ssh, at->second, true);
            }
            if (std::holds_alternative<llb::build_op>(v.what.what)) r.complete = false;
            const auto* exec = std::get_if<llb::exec_op>(&v.what.what);
            if (exec == nullptr) continue;
            r.network = r.network || exec->network != llb::net_mode::none;
            for (const auto& s : exec->secret_envs) demand(secrets, s.id, s.optional);
            for (const auto& m : exec->mounts) {
                if (m.type == llb::mount_type::secret && m.secret) demand(secrets, m.secret->id, m.secret->optional);
                if (m.type == llb::mount_type::ssh && m.ssh) demand(ssh, m.ssh->id.empty() ? "default" : m.ssh->id, m.ssh->optional);
            }
        }
    }
};

/// Whose request it was does not matter. What lies more than `depth` requests deep is not looked at.
bool same_request(const exporter::asked_request& a, const exporter::asked_request& b, unsigned depth = 32) {
    const auto same = [depth](const auto& x, const auto& y) { return x == y || depth == 0 || (x && y && same_request(*x, *y, depth - 1)); };
    if (a.frontend != b.frontend || a.attrs != b.attrs || a.inputs.size() != b.inputs.size()) return false;
    for (const auto& [name, in] : a.inputs)
        if (const auto at = b.inputs.find(name); at == b.inputs.end() || !same(in, at->second)) return false;
    return true;
}

}  // namespace

exporter::build_record make_record(exporter::asked_request asked, const llb::definition& graph, const std::vector<const llb::definition*>& also,
                                   const ops::found_sources& found, std::chrono::sys_time<nanoseconds> started,
                                   const config::configuration& settings) {
    exporter::build_record r{.request = std::move(asked)};
    used_things used;
    used.add(r, graph, found);
    for (const auto* other : also) used.add(r, *other, found);
    std::stable_sort(used.materials.begin(), used.materials.end(),
                     [](const auto& a, const auto& b) { return std::tie(a.rank, a.what.uri) < std::tie(b.rank, b.what.uri); });
    for (auto& m : used.materials) r.materials.push_back(std::move(m.what));
    r.locals.assign(used.locals.begin(), used.locals.end());
    r.secrets = listed(used.secrets);
    r.ssh = listed(used.ssh);
    add_steps(r, graph);
    r.builder = oci::host_platform();
    r.invocation = random_id();
    r.started = started;
    r.finished = std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now());
    if (r.request.frontend == "dockerfile.v0") r.dockerfile_version = frontend::language_version;
    r.environment = exporter::read_environment(settings.provenance_env_dir);
    return r;
}

void add_call(const frontend_call& call, const std::set<const noted_graph*>& not_these, std::vector<const llb::definition*>& graphs,
              std::set<std::string>& locals) {
    std::vector<const frontend_call*> todo{&call};
    for (std::size_t i = 0; i < todo.size(); ++i) {
        const auto& one = *todo[i];
        locals.insert(one.locals.begin(), one.locals.end());
        for (const auto& g : one.graphs)
            if (g->brought && !not_these.contains(g.get())) graphs.push_back(&g->graph);
        for (const auto& c : one.calls) todo.push_back(c.get());
    }
}

void origins::add(const llb::definition& made, const std::shared_ptr<const exporter::asked_request>& by) {
    std::erase_if(known_, [](const auto& entry) { return entry.second.expired(); });
    if (const auto head = made.ops.empty() ? std::nullopt : llb::load(made).result; head && by) known_.emplace(head->vertex, by);
}

std::shared_ptr<const exporter::asked_request> origins::of(const llb::definition& what) const {
    const auto head = what.ops.empty() ? std::nullopt : llb::load(what).result;
    if (!head) return nullptr;
    std::shared_ptr<const exporter::asked_request> out;
    const auto [first, last] = known_.equal_range(head->vertex);
    for (auto at = first; at != last; ++at) {
        const auto one = at->second.lock();
        if (!one) continue;
        if (out && !same_request(*out, *one)) return nullptr;
        out = one;
    }
    return out;
}

std::shared_ptr<const exporter::asked_request> note_request(std::string frontend, std::map<std::string, std::string> attrs,
                                                            const std::map<std::string, llb::definition>& inputs, const origins& known,
                                                            std::shared_ptr<const exporter::asked_request> root) {
    auto out = std::make_shared<exporter::asked_request>();
    out->frontend = std::move(frontend);
    out->attrs = std::move(attrs);
    for (const auto& [name, graph] : inputs) {
        const auto by = known.of(graph);
        if (!by) continue;
        auto one = std::make_shared<exporter::asked_request>(*by);
        one->root = nullptr;
        out->inputs[name] = std::move(one);
    }
    out->root = std::move(root);
    return out;
}

async::task<std::map<std::string, std::size_t>> layers_of(const std::vector<solver::solved>& report, const exporter::build_record& record,
                                                          snapshot::chain root, bool look) {
    std::map<std::string, std::string> ids;
    for (const auto& s : record.steps) ids[s.digest] = s.id;
    std::map<std::string, std::size_t> out;
    for (const auto& v : report) {
        const auto id = ids.find(v.id.str());
        if (id == ids.end() || !v.outputs || (!v.loaded && !look)) continue;
        const auto results = co_await v.outputs();
        for (std::size_t i = 0; i < results.size(); ++i) {
            const auto value = std::dynamic_pointer_cast<ops::chain_value>(results[i]);
            if (!value || value->chain.layers.empty() || value->chain.layers.size() > root.layers.size()) continue;
            if (std::equal(value->chain.layers.begin(), value->chain.layers.end(), root.layers.begin()))
                out[cat(id->second, ":", i)] = value->chain.layers.size();
        }
    }
    co_return out;
}

std::map<std::string, std::string> client_attrs(std::map<std::string, std::string> attrs) {
    std::erase_if(attrs, [](const auto& a) { return a.first.starts_with("attest:") || a.first == "platform" || a.first == "cache-imports"; });
    return attrs;
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

module;
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import cobuild.archive;
import cobuild.frontend;
import cobuild.fs;
import cobuild.llb;
import :parts;

namespace cobuild::build {

/// inputs.cpp
async::task<build_inputs> open_inputs(parts& p, build_request r, std::shared_ptr<progress::sink> sink);

namespace {

namespace stdfs = std::filesystem;

/// Passes events on and counts what the result tells: steps of the graph and those that came from cache.
class counting_sink final : public progress::sink {
public:
    explicit counting_sink(std::shared_ptr<progress::sink> next) : next_(std::move(next)) {}
    void on_event(const progress::event& e) override {
        if (const auto* v = std::get_if<progress::vertex>(&e); v != nullptr && v->completed) {
            cached_[v->id] = v->cached;
            if (!v->error.empty() && !v->canceled && !failed_) failed_ = v->id;
        }
        next_->on_event(e);
    }
    /// The first vertex that failed.
    [[nodiscard]] const std::optional<digest>& failed() const { return failed_; }
    void fill(build_result& result, const solver::graph& g) const {
        for (const auto& v : g) {
            const auto at = cached_.find(v.id);
            if (at == cached_.end() || v.name.starts_with("[internal]")) continue;
            ++result.steps;
            if (at->second) ++result.cached_steps;
        }
    }

private:
    std::shared_ptr<progress::sink> next_;
    std::map<digest, bool> cached_;
    std::optional<digest> failed_;
};

std::vector<llb::host_ip> parse_hosts(const std::vector<std::string>& items) {
    std::vector<llb::host_ip> out;
    for (const auto& item : items) {
        const auto at = item.find_first_of(":=");
        if (at == std::string::npos || at == 0) throw error{errc::invalid, cat("--add-host ", quoted(item), ": NAME:ADDRESS is expected")};
        std::string address = item.substr(at + 1);
        if (address.starts_with('[') && address.ends_with(']')) address = address.substr(1, address.size() - 2);
        if (address == "host-gateway") throw error{errc::unsupported, "--add-host with host-gateway is not supported yet; give an address"};
        out.push_back({item.substr(0, at), address});
    }
    return out;
}

std::vector<llb::ulimit> parse_ulimits(const std::vector<std::string>& items) {
    std::vector<llb::ulimit> out;
    for (const auto& item : items) {
        const auto bad = [&] { return error{errc::invalid, cat("--ulimit ", quoted(item), ": NAME=SOFT[:HARD] is expected")}; };
        const auto eq = item.find('=');
        if (eq == std::string::npos || eq == 0) throw bad();
        const auto number = [&](std::string_view text) {
            std::int64_t v = 0;
            const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), v);
            if (ec != std::errc{} || end != text.data() + text.size()) throw bad();
            return v;
        };
        const std::string_view values = std::string_view(item).substr(eq + 1);
        const auto colon = values.find(':');
        const auto soft = number(values.substr(0, colon));
        out.push_back({item.substr(0, eq), soft, colon == std::string_view::npos ? soft : number(values.substr(colon + 1))});
    }
    return out;
}

frontend::request complete(frontend::request out, const build_request& r) {
    out.build_args = r.build_args;
    if (r.source_date_epoch) out.build_args["SOURCE_DATE_EPOCH"] = cat(*r.source_date_epoch);
    out.target = r.target;
    out.labels = r.labels;
    const auto host = oci::host_platform();
    out.build_platform = host;
    if (!r.platform.empty()) out.target_platform = oci::normalize(oci::parse_platform(r.platform));
    out.no_cache = r.no_cache;
    for (const auto& s : r.no_cache_stages) out.no_cache_stages.push_back(to_lower(s));
    if (r.network == "host")
        out.network = llb::net_mode::host;
    else if (r.network == "none")
        out.network = llb::net_mode::none;
    else if (!r.network.empty() && r.network != "default" && r.network != "bridge")
        throw error{errc::invalid, cat("--network ", quoted(r.network), ": default, none or host is expected")};
    out.extra_hosts = parse_hosts(r.add_hosts);
    out.ulimits = parse_ulimits(r.ulimits);
    out.shm_size = static_cast<std::int64_t>(r.shm_size);
    out.cgroup_parent = r.cgroup_parent;
    return out;
}

/// Where in the Dockerfile a vertex comes from.
std::optional<source_location> location_of(const llb::definition& graph, const std::optional<digest>& vertex) {
    if (!vertex || !graph.source) return std::nullopt;
    const auto at = graph.source->locations.find(*vertex);
    if (at == graph.source->locations.end()) return std::nullopt;
    for (const auto& l : at->second.list) {
        const auto index = static_cast<std::size_t>(l.source_index);
        if (l.ranges.empty() || index >= graph.source->infos.size()) continue;
        return source_location{graph.source->infos[index].filename, static_cast<unsigned>(l.ranges.front().start.line)};
    }
    return std::nullopt;
}

/// Solves, and tells of a failure where in the Dockerfile it stands.
async::task<solver::result> solve(parts& p, const solver::graph& vertices, solver::edge target, const llb::definition& graph,
                                  solver::solve_options options, std::shared_ptr<counting_sink> sink) {
    std::exception_ptr failed;
    std::vector<solver::result> out;
    try {
        out = co_await p.solver->solve(vertices, {target}, sink, std::move(options));
    } catch (...) {
        failed = std::current_exception();
    }
    if (!failed) co_return out.at(0);
    auto e = describe(failed);
    if (e.kind() != errc::canceled && !e.where())
        if (auto where = location_of(graph, sink->failed())) throw std::move(e).at(std::move(*where));
    throw e;
}

void show_warnings(const std::vector<frontend::warning>& warnings, const progress::writer& about) {
    for (const auto& w : warnings) {
        progress::warning out;
        out.message = w.rule.empty() ? w.message : cat(w.rule, ": ", w.message, " (line ", w.where.line, ")");
        if (!w.detail.empty()) out.detail.push_back(w.detail);
        out.url = w.url;
        out.location = w.where;
        about.warn(std::move(out));
    }
}

source::freshness freshness_of(const build_request& r) {
    return r.pull == pull_mode::always  ? source::freshness::always
           : r.pull == pull_mode::never ? source::freshness::never
                                        : source::freshness::missing;
}

async::task<frontend::result> convert(parts& p, const build_request& r, build_inputs& in, std::shared_ptr<progress::sink> sink) {
    const auto name = cat("[internal] load build definition from ", in.request.dockerfile_name);
    build_gateway gateway(p, in.scope, sink, freshness_of(r));
    auto out = co_await frontend::convert(complete(std::move(in.request), r), gateway);
    show_warnings(out.warnings, progress::writer(sink, {.id = progress::internal_id("load", name), .name = ""}));
    co_return out;
}

/// After a reboot only layers that were made durable count. That they are not is a slower build then, no failure of this one.
async::task<void> make_durable(parts& p) {
    std::exception_ptr failed;
    try {
        co_await p.snapshots->sync();
    } catch (...) {
        failed = std::current_exception();
    }
    if (!failed) co_return;
    const auto e = describe(failed);
    if (e.kind() == errc::canceled) throw e;
    log(log_level::warning, "the layers of this build may have to be built again after a reboot", {{"error", e.what()}});
}

/// Steps that ask for more than a sandbox need the build's leave. (A local user is root already: this guards against what a
/// foreign Dockerfile asks for. A daemon's configuration is asked besides.)
void check_entitlements(const build_request& r, const llb::definition& graph, const llb::loaded& loaded) {
    const auto allowed = [&](std::string_view name) { return std::find(r.allow.begin(), r.allow.end(), name) != r.allow.end(); };
    for (const auto& v : loaded.vertices) {
        const auto* exec = std::get_if<llb::exec_op>(&v.what.what);
        if (exec == nullptr) continue;
        std::string_view missing;
        if (exec->network == llb::net_mode::host && r.network != "host" && !allowed("network.host")) missing = "network.host";
        if (exec->security == llb::security_mode::insecure && !allowed("security.insecure")) missing = "security.insecure";
        if (missing.empty()) continue;
        error e{errc::permission, cat("the step asks for ", missing, ", which this build is not allowed: add --allow ", missing)};
        if (auto where = location_of(graph, v.id)) throw std::move(e).at(std::move(*where));
        throw e;
    }
}

}  // namespace

namespace {

using caches = std::vector<std::shared_ptr<solver::remote_cache>>;

/// Caches are asked for while the Dockerfile is converted, which asks registries too.
async::task<std::pair<frontend::result, caches>> convert_and_import(parts& p, const build_request& r, std::vector<remotecache::import_options> from,
                                                                    build_inputs& inputs, std::shared_ptr<progress::sink> sink) {
    std::pair<frontend::result, caches> out;
    const auto convert_into = [](parts& all, const build_request& request, build_inputs& in, std::shared_ptr<progress::sink> to,
                                 frontend::result& result) -> async::task<void> { result = co_await convert(all, request, in, std::move(to)); };
    const auto import_into = [](parts& all, const build_request& request, std::vector<remotecache::import_options> entries,
                                std::shared_ptr<progress::sink> to, caches& result) -> async::task<void> {
        const auto platform = request.platform.empty() ? oci::host_platform() : oci::normalize(oci::parse_platform(request.platform));
        result = co_await import_caches(all, std::move(entries), platform, std::move(to));
    };
    std::vector<async::task<void>> both;
    both.push_back(convert_into(p, r, inputs, sink, out.first));
    if (!from.empty()) both.push_back(import_into(p, r, std::move(from), sink, out.second));
    co_await async::when_all(std::move(both));
    co_return out;
}

/// How the first image of the outputs is compressed.
std::map<std::string, std::string> image_compression(const std::vector<output>& outputs) {
    std::map<std::string, std::string> out;
    for (const auto& o : outputs) {
        if (o.type == "local" || o.type == "tar" || o.type == "cacheonly") continue;
        for (const auto* key : {"compression", "compression-level", "force-compression"})
            if (const auto at = o.attributes.find(key); at != o.attributes.end()) out.insert(*at);
        break;
    }
    return out;
}

}  // namespace

async::task<build_result> run_build(parts& p, build_request r, std::shared_ptr<progress::sink> sink) {
    auto names = normalized_names(r.tags);
    auto cache_to = parse_cache_to(r.cache_to);
    auto cache_from = parse_cache_from(r.cache_from);
    auto counting = std::make_shared<counting_sink>(std::move(sink));
    auto inputs = co_await open_inputs(p, r, counting);
    inputs.scope.hash_local = !cache_from.empty();
    auto [converted, imported] = co_await convert_and_import(p, r, std::move(cache_from), inputs, counting);
    const auto loaded = llb::load(converted.graph);
    check_entitlements(r, converted.graph, loaded);
    auto graph = ops::make_graph(loaded, *p.environment, inputs.scope);

    exporter::input in;
    in.config = converted.image_config;
    in.platform = oci::normalize(converted.platform);
    in.epoch = converted.epoch ? converted.epoch : r.source_date_epoch;
    state::pin keep;
    const auto report = cache_to.empty() ? nullptr : std::make_shared<std::vector<solver::solved>>();
    if (graph.result) {
        solver::solve_options options{.no_cache = r.no_cache, .caches = std::move(imported), .report = report};
        const auto value = co_await ops::as_chain_value(
            *p.environment, co_await solve(p, graph.vertices, *graph.result, converted.graph, std::move(options), counting));
        in.root = value->chain;
        keep = value->keep;
    }
    cache_source cached{.report = report, .graph = graph.vertices, .target = graph.result, .in = in, .compression = image_compression(r.outputs)};
    if (std::any_of(cache_to.begin(), cache_to.end(), [](const auto& c) { return c.kind == remotecache::kind::inline_; }))
        in.config = co_await with_inline_cache(p, cached);
    build_result out;
    counting->fill(out, graph.vertices);
    auto outputs = r.outputs;
    // A tag without an output, or no output at all, means the image is kept here.
    if (outputs.empty() || (r.push && outputs.empty()))
        outputs.push_back({.type = r.push ? "registry" : "image", .attributes = {}});
    else if (r.push)
        outputs.push_back({.type = "registry", .attributes = {}});
    built what;
    what.list.push_back({.platform = oci::format(in.platform), .in = std::move(in)});
    // What was built reaches the disk while it is exported, which reads it from memory.
    std::vector<async::task<void>> last;
    last.push_back(export_all(p, std::move(what), std::move(outputs), std::move(names), counting, out));
    last.push_back(make_durable(p));
    co_await async::when_all(std::move(last));
    if (!cache_to.empty()) co_await export_caches(p, std::move(cache_to), std::move(cached), counting, out);
    co_await collect_garbage(p);
    co_return out;
}

async::task<answer> run_ask(parts& p, build_request r, question what, std::shared_ptr<progress::sink> sink) {
    auto inputs = co_await open_inputs(p, r, sink);
    if (what == question::graph) {
        const auto converted = co_await convert(p, r, inputs, sink);
        co_return answer{.text = llb::to_dot(converted.graph), .json = llb::to_json(converted.graph)};
    }
    auto request = complete(std::move(inputs.request), r);
    build_gateway gateway(p, inputs.scope, sink, freshness_of(r));
    auto found = what == question::check     ? co_await frontend::check(std::move(request), gateway)
                 : what == question::outline ? co_await frontend::show_outline(std::move(request), gateway)
                                             : frontend::show_targets(request);
    co_return answer{.text = std::move(found.plain), .json = std::move(found.json), .status = found.status, .problem = std::move(found.problem)};
}

}  // namespace cobuild::build

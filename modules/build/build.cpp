module;
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
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
import :container;
import :parts;

namespace cobuild::build {

/// inputs.cpp
async::task<build_inputs> open_inputs(parts& p, build_request r, std::shared_ptr<progress::sink> sink);

namespace {

namespace stdfs = std::filesystem;

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
    if (const auto all = r.build_args.find("BUILDKIT_MULTI_PLATFORM"); all != r.build_args.end())
        out.multi_platform = all->second == "1" || to_lower(all->second) == "true";
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

source::freshness freshness_of(const build_request& r) {
    return r.pull == pull_mode::always  ? source::freshness::always
           : r.pull == pull_mode::never ? source::freshness::never
                                        : source::freshness::missing;
}

std::map<std::string, std::string> attests_of(const build_request& r) {
    std::map<std::string, std::string> attrs;
    for (const auto& [key, value] : r.build_args) attrs[cat("build-arg:", key)] = value;
    for (const auto& [key, value] : r.attests) attrs[cat("attest:", key)] = value;
    return exporter::attests_of(attrs);
}

/// The outputs asked for; none at all means the image is kept here. --push is for the image outputs there are, as buildx has it.
std::vector<output> outputs_of(const build_request& r) {
    auto out = r.outputs;
    if (out.empty()) out.push_back({.type = r.push ? "registry" : "image", .attributes = {}});
    bool pushed = !r.push;
    for (auto& o : out) {
        if (!r.push || (o.type != "image" && o.type != "registry")) continue;
        o.attributes["push"] = "true";
        pushed = true;
    }
    if (!pushed) out.push_back({.type = "registry", .attributes = {}});
    return out;
}

}  // namespace

namespace {

using caches = std::vector<std::shared_ptr<solver::remote_cache>>;

/// Caches are asked for while the Dockerfile is converted, which asks registries too.
async::task<std::pair<std::vector<frontend::result>, caches>> convert_and_import(parts& p, frontend::request request,
                                                                                 std::vector<oci::platform> platforms, ops::build_scope scope,
                                                                                 source::freshness how, std::vector<remotecache::import_options> from,
                                                                                 std::shared_ptr<progress::sink> sink, const build_request& r,
                                                                                 source_check check) {
    std::pair<std::vector<frontend::result>, caches> out;
    const auto platform = platforms.empty() ? oci::host_platform() : platforms.front();
    const auto convert_into = [](parts& all, frontend::request what, std::vector<oci::platform> wanted, const ops::build_scope& in,
                                 source::freshness fresh, std::shared_ptr<progress::sink> to, std::vector<frontend::result>& result,
                                 const build_request& asked, source_check checked) -> async::task<void> {
        if (auto foreign = frontend::wanted_frontend(what))
            result = co_await convert_elsewhere(all, asked, std::move(what), in, std::move(*foreign), std::move(to));
        else
            result = co_await convert_all(all, std::move(what), std::move(wanted), in, fresh, std::move(to), std::move(checked));
    };
    const auto import_into = [](parts& all, std::vector<remotecache::import_options> entries, oci::platform wanted,
                                std::shared_ptr<progress::sink> to, caches& result) -> async::task<void> {
        result = co_await import_caches(all, std::move(entries), wanted, std::move(to));
    };
    std::vector<async::task<void>> both;
    both.push_back(convert_into(p, std::move(request), std::move(platforms), scope, how, sink, out.first, r, std::move(check)));
    if (!from.empty()) both.push_back(import_into(p, std::move(from), platform, sink, out.second));
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
    const auto started = std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now());
    auto names = normalized_names(r.tags);
    const auto platforms = asked_platforms(r.platforms);
    const auto attested = exporter::parse_attests(attests_of(r), false);
    if (attested.sbom) throw error{errc::unsupported, "the attestation sbom is not supported yet; leave out --sbom and --attest type=sbom"};
    auto cache_to = parse_cache_to(r.cache_to);
    auto cache_from = parse_cache_from(r.cache_from);
    if (!cache_to.empty() && platforms.size() > 1)
        throw error{errc::unsupported, "--cache-to with several platforms is not supported yet: build them one by one"};
    auto counting = std::make_shared<counting_sink>(std::move(sink));
    auto inputs = co_await open_inputs(p, r, counting);
    inputs.scope.found = std::make_shared<ops::found_sources>();
    inputs.scope.hash_local = !cache_from.empty();
    const auto request = complete(std::move(inputs.request), r);
    if (!p.settings.frontend.dockerfile_enabled.value_or(true) && !frontend::wanted_frontend(request))
        throw error{errc::permission, "the frontend dockerfile.v0 is switched off by the configuration"};
    const auto [converted, imported] =
        co_await convert_and_import(p, request, platforms, inputs.scope, freshness_of(r), std::move(cache_from), counting, r, inputs.check);
    auto allowed = r.allow;
    if (r.network == "host") allowed.emplace_back("network.host");
    // What each step came to is told to an exported cache, and in full provenance.
    const bool reported = !cache_to.empty() || (attested.provenance && attested.provenance->max);
    const auto report = reported ? std::make_shared<std::vector<solver::solved>>() : nullptr;
    build_result out;
    solved_graph whole;
    solver::solve_options options{.no_cache = r.no_cache, .caches = imported, .report = report};
    const auto roots = co_await solve_all(p, converted, std::move(allowed), inputs.scope, std::move(options), counting, out, &whole);
    built what;
    what.map = platforms.size() > 1 || request.multi_platform;
    for (std::size_t i = 0; i < converted.size(); ++i) {
        const auto& c = converted[i];
        exporter::input in;
        in.root = roots[i]->chain;
        in.config = c.image_config;
        in.base_config = c.base_config;
        in.platform = oci::normalize(c.platform);
        in.epoch = c.epoch ? c.epoch : r.source_date_epoch;
        if (attested.provenance) {
            auto record = make_record(
                {.frontend = frontend::wanted_frontend(request) ? "gateway.v0" : "dockerfile.v0", .attrs = frontend_attributes(r, request)}, c.graph,
                {}, *inputs.scope.found, started, p.settings);
            if (report) record.layers = co_await layers_of(*report, record, in.root, imported.empty());
            in.attestations.push_back(exporter::make_provenance(*attested.provenance, record));
        }
        what.list.push_back({.platform = oci::format(in.platform), .in = std::move(in)});
    }
    cache_source cached{.report = report,
                        .graph = std::move(whole.vertices),
                        .target = whole.target,
                        .in = what.list.front().in,
                        .compression = image_compression(r.outputs)};
    if (std::any_of(cache_to.begin(), cache_to.end(), [](const auto& c) { return c.kind == remotecache::kind::inline_; }))
        what.list.front().in.config = co_await with_inline_cache(p, cached);
    co_await export_and_keep(p, std::move(what), outputs_of(r), std::move(names), counting, out);
    if (!cache_to.empty()) co_await export_caches(p, std::move(cache_to), std::move(cached), counting, out);
    co_return out;
}

async::task<answer> run_ask(parts& p, build_request r, question what, std::shared_ptr<progress::sink> sink) {
    auto inputs = co_await open_inputs(p, r, sink);
    auto request = complete(std::move(inputs.request), r);
    const auto platforms = asked_platforms(r.platforms);
    if (what == question::graph) {
        answer out;
        for (const auto& c : co_await convert_all(p, std::move(request), platforms, inputs.scope, freshness_of(r), sink, inputs.check)) {
            out.text += llb::to_dot(c.graph);
            out.json += llb::to_json(c.graph);
        }
        co_return out;
    }
    if (!platforms.empty()) request.target_platform = platforms.front();
    request.emulated = co_await emulated_for(p, request, platforms);
    build_gateway gateway(p, inputs.scope, sink, freshness_of(r), inputs.check);
    auto found = what == question::check     ? co_await frontend::check(std::move(request), gateway)
                 : what == question::outline ? co_await frontend::show_outline(std::move(request), gateway)
                                             : frontend::show_targets(request);
    co_return answer{.text = std::move(found.plain), .json = std::move(found.json), .status = found.status, .problem = std::move(found.problem)};
}

}  // namespace cobuild::build

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

source::freshness freshness_of(const build_request& r) {
    return r.pull == pull_mode::always  ? source::freshness::always
           : r.pull == pull_mode::never ? source::freshness::never
                                        : source::freshness::missing;
}

async::task<frontend::result> convert(parts& p, const build_request& r, build_inputs& in, std::shared_ptr<progress::sink> sink) {
    const auto name = cat("[internal] load build definition from ", in.request.dockerfile_name);
    build_gateway gateway(p, in.scope, sink, freshness_of(r));
    const auto text = in.request.dockerfile;
    auto out = co_await frontend::convert(complete(std::move(in.request), r), gateway);
    show_warnings(out.warnings, text, progress::writer(sink, {.id = progress::internal_id("load", name), .name = ""}));
    co_return out;
}

}  // namespace

async::task<build_result> run_build(parts& p, build_request r, std::shared_ptr<progress::sink> sink) {
    auto names = normalized_names(r.tags);
    auto counting = std::make_shared<counting_sink>(std::move(sink));
    auto inputs = co_await open_inputs(p, r, counting);
    const auto converted = co_await convert(p, r, inputs, counting);
    const auto loaded = llb::load(converted.graph);
    auto allowed = r.allow;
    if (r.network == "host") allowed.emplace_back("network.host");
    check_entitlements(allowed, converted.graph, loaded);
    auto graph = ops::make_graph(loaded, *p.environment, inputs.scope);

    exporter::input in;
    in.config = converted.image_config;
    in.platform = oci::normalize(converted.platform);
    in.epoch = converted.epoch ? converted.epoch : r.source_date_epoch;
    state::pin keep;
    if (graph.result) {
        const auto value = co_await ops::as_chain_value(
            *p.environment, co_await solve(p, graph.vertices, *graph.result, converted.graph, {.no_cache = r.no_cache, .runs = {}}, counting));
        in.root = value->chain;
        keep = value->keep;
    }
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
    co_await export_and_keep(p, std::move(what), std::move(outputs), std::move(names), counting, out);
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

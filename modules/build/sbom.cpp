// A list of what a result is made of: a scanner's image looks at it, as a step of the build.
module;
#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import cobuild.gateway;
import cobuild.llb;
import cobuild.oci;
import :parts;

namespace cobuild::build {

namespace {

constexpr std::string_view spdx = "https://spdx.dev/Document", core = "sbom", source_dir = "/run/src/core/sbom", out_dir = "/run/out/";

bool has_sbom(const std::vector<attested_ref>& given) {
    return std::any_of(given.begin(), given.end(), [](const auto& a) { return a.predicate_type == spdx; });
}

/// The last of two settings of a variable counts.
void set_variable(std::vector<std::string>& env, const std::string& name, const std::string& value) {
    std::erase_if(env, [&](const std::string& e) { return e.starts_with(cat(name, "=")); });
    env.push_back(cat(name, "=", value));
}

llb::exec_op scan_op(const oci::image& scanner, const std::map<std::string, std::string>& parameters) {
    llb::exec_op out;
    out.meta.args = scanner.config.entrypoint;
    out.meta.args.insert(out.meta.args.end(), scanner.config.cmd.begin(), scanner.config.cmd.end());
    out.meta.env = scanner.config.env;
    set_variable(out.meta.env, "BUILDKIT_SCAN_DESTINATION", std::string(out_dir));
    set_variable(out.meta.env, "BUILDKIT_SCAN_SOURCE", std::string(source_dir));
    for (const auto& [key, value] : parameters)
        if (key != "generator") set_variable(out.meta.env, cat("BUILDKIT_SCAN_", key), value);
    out.meta.cwd = scanner.config.working_dir.empty() ? "/" : scanner.config.working_dir;
    out.mounts = {
        {.input = 0, .selector = {}, .dest = "/", .output = 0},
        {.input = llb::scratch, .selector = {}, .dest = "/tmp", .output = llb::no_output, .type = llb::mount_type::tmpfs, .tmpfs = llb::tmpfs_opt{}},
        {.input = 1, .selector = {}, .dest = std::string(source_dir), .output = llb::no_output, .readonly = true},
        {.input = llb::scratch, .selector = {}, .dest = std::string(out_dir), .output = 1}};
    return out;
}

/// The result's graph with the scanner's step above it.
llb::definition scan_graph(const llb::definition& target, const std::string& scanner, llb::exec_op scan, const std::string& name) {
    llb::graph g;
    std::map<digest, digest> moved;
    const auto loaded = llb::load(target);
    for (const auto& v : loaded.vertices) {
        auto op = v.what;
        for (auto& in : op.inputs) in.vertex = moved.at(in.vertex);
        moved.emplace(v.id, g.add(op, v.meta).vertex);
    }
    const auto host = oci::host_platform();
    const llb::platform platform{host.architecture, host.os, host.variant, host.os_version, host.os_features};
    const auto image = g.add({.inputs = {}, .what = llb::source_op{cat("docker-image://", scanner), {}}, .platform = platform});
    llb::op_metadata meta;
    meta.description[std::string(llb::custom_name)] = name;
    llb::op step{.inputs = {image, {moved.at(loaded.result->vertex), loaded.result->index}}, .what = std::move(scan), .platform = platform};
    return g.finish(llb::input{g.add(step, std::move(meta)).vertex, 1});
}

}  // namespace

async::task<void> add_sboms(job_result& what, std::map<std::string, std::string> parameters, scan_tools tools) {
    std::vector<std::string> wanted;
    for (const auto& [key, r] : what.refs)
        if (r && r->definition().ops.size() > 1) wanted.push_back(key);
    for (const auto& [key, given] : what.attestations)
        if (has_sbom(given)) co_return;  // who made the result knows better
    if (wanted.empty()) co_return;
    auto scanner = oci::reference::parse(parameters["generator"]).with_default_tag();
    const auto config = co_await tools.resolve(
        {.reference = scanner.str(), .platform = oci::host_platform(), .log_name = cat("resolve the sbom generator ", scanner.familiar())});
    const auto image = oci::parse_image(config.config);
    if (image.config.entrypoint.empty() && image.config.cmd.empty())
        throw error{errc::invalid, cat("scanner ", scanner.familiar(), " does not have cmd")};
    auto named = oci::reference::parse(config.reference);
    if (config.manifest && !named.digest()) named = named.with_digest(*config.manifest);
    for (const auto& key : wanted) {
        const auto platform = key.empty() ? oci::format(oci::host_platform()) : key;
        const auto name = cat("[", platform, "] generating sbom using ", scanner.str());
        attested_ref one;
        one.bundle = true;
        one.ref = tools.define(scan_graph(what.refs.at(key)->definition(), named.str(), scan_op(image, parameters), name));
        one.predicate_type = spdx;
        one.metadata = {{"reason", "sbom"}, {"sbom-core", std::string(core)}};
        what.attestations[key].push_back(std::move(one));
    }
}

}  // namespace cobuild::build

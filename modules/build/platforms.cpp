module;
#include <algorithm>
#include <cstddef>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import cobuild.frontend;
import cobuild.llb;
import :parts;

namespace cobuild::build {

std::vector<oci::platform> asked_platforms(const std::vector<std::string>& texts) {
    std::vector<oci::platform> out;
    for (const auto& list : texts)
        for (const auto text : split(list, ',')) {
            auto p = oci::normalize(oci::parse_platform(trim(text)));
            if (std::find(out.begin(), out.end(), p) == out.end()) out.push_back(std::move(p));
        }
    return out;
}

namespace {

/// Findings are the file's, so what every platform's conversion says is told once.
void show_all_warnings(const std::vector<frontend::result>& all, const std::string& text, const progress::writer& about) {
    std::vector<frontend::warning> once;
    std::set<std::tuple<std::string, std::string, unsigned>> seen;
    for (const auto& r : all)
        for (const auto& w : r.warnings)
            if (seen.emplace(w.rule, w.message, w.where.line).second) once.push_back(w);
    show_warnings(once, text, about);
}

/// The graphs as one: a vertex that several have (a stage for the build platform, the context) stands in it once.
struct joined {
    solver::graph vertices;
    std::map<digest, std::size_t> index;

    std::optional<solver::edge> add(ops::graph g) {
        std::vector<std::size_t> moved;
        for (auto& v : g.vertices) {
            const auto [at, fresh] = index.try_emplace(v.id, vertices.size());
            moved.push_back(at->second);
            if (!fresh) continue;
            for (auto& in : v.inputs) in.vertex = moved.at(in.vertex);
            vertices.push_back(std::move(v));
        }
        if (!g.result) return std::nullopt;
        return solver::edge{moved.at(g.result->vertex), g.result->output};
    }
};

/// The definition that knows where in the Dockerfile the vertex comes from.
const llb::definition& owner_of(const std::vector<frontend::result>& all, const std::optional<digest>& vertex) {
    for (const auto& r : all)
        if (vertex && r.graph.source && r.graph.source->locations.contains(*vertex)) return r.graph;
    return all.front().graph;
}

}  // namespace

async::task<std::vector<frontend::result>> convert_all(parts& p, frontend::request request, std::vector<oci::platform> platforms,
                                                       const ops::build_scope& scope, source::freshness how, std::shared_ptr<progress::sink> sink,
                                                       source_check check) {
    const auto name = cat("[internal] load build definition from ", request.dockerfile_name);
    build_gateway gateway(p, scope, sink, how, check);
    request.emulated = co_await emulated_for(p, request, platforms);
    request.multi_platform = request.multi_platform || platforms.size() > 1;
    std::vector<frontend::result> out;
    // One after the other: the first finds out what the tags mean, for all.
    for (std::size_t i = 0; i < std::max<std::size_t>(1, platforms.size()); ++i) {
        auto one = request;
        if (!platforms.empty()) one.target_platform = platforms[i];
        std::vector<frontend::warning> found;
        std::exception_ptr failed;
        try {
            out.push_back(co_await frontend::convert(std::move(one), gateway, &found));
        } catch (...) {
            failed = std::current_exception();
        }
        if (failed) {
            show_warnings(found, request.dockerfile, progress::writer(sink, {.id = progress::internal_id("load", name), .name = ""}));
            std::rethrow_exception(failed);
        }
        if (check) out.back().graph = co_await check_sources(std::move(out.back().graph), check);
    }
    show_all_warnings(out, request.dockerfile, progress::writer(sink, {.id = progress::internal_id("load", name), .name = ""}));
    co_return out;
}

async::task<std::vector<oci::platform>> emulated_for(parts& p, const frontend::request& request, const std::vector<oci::platform>& platforms) {
    // Trying costs some milliseconds, and who names no platform builds for this machine.
    const bool foreign = std::any_of(platforms.begin(), platforms.end(), [&](const auto& w) { return !oci::match_rank(request.build_platform, w); });
    return emulated_platforms(p, foreign || request.dockerfile.find("--platform") != std::string::npos);
}

async::task<std::vector<std::shared_ptr<ops::chain_value>>> solve_all(parts& p, const std::vector<frontend::result>& converted,
                                                                      std::vector<std::string> allowed, const ops::build_scope& scope,
                                                                      solver::solve_options options, std::shared_ptr<counting_sink> sink,
                                                                      build_result& counted, solved_graph* whole) {
    joined all;
    std::vector<std::optional<std::size_t>> place;
    std::vector<solver::edge> targets;
    for (const auto& r : converted) {
        const auto loaded = llb::load(r.graph);
        check_entitlements(allowed, r.graph, loaded);
        const auto result = all.add(ops::make_graph(loaded, *p.environment, scope));
        place.push_back(result ? std::optional(targets.size()) : std::nullopt);
        if (result) targets.push_back(*result);
    }
    std::vector<solver::result> solved;
    std::exception_ptr failed;
    try {
        if (!targets.empty()) solved = co_await p.solver->solve(all.vertices, targets, sink, std::move(options));
    } catch (...) {
        failed = std::current_exception();
    }
    if (failed) throw located(describe(failed), owner_of(converted, sink->failed()), sink->failed());
    sink->fill(counted, all.vertices);
    if (whole != nullptr) *whole = {all.vertices, targets.empty() ? std::nullopt : std::optional(targets.front())};
    std::vector<std::shared_ptr<ops::chain_value>> out;
    for (const auto& at : place)
        out.push_back(at ? co_await ops::as_chain_value(*p.environment, solved.at(*at)) : std::make_shared<ops::chain_value>());
    co_return out;
}

}  // namespace cobuild::build

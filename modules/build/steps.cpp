module;
#include <algorithm>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import cobuild.llb;
import :parts;

namespace cobuild::build {

void counting_sink::on_event(const progress::event& e) {
    if (const auto* v = std::get_if<progress::vertex>(&e); v != nullptr && v->completed) {
        cached_[v->id] = v->cached;
        if (!v->error.empty() && !v->canceled && !failed_) failed_ = v->id;
    }
    next_->on_event(e);
}

void counting_sink::fill(build_result& result, const solver::graph& g) const {
    for (const auto& v : g) {
        const auto at = cached_.find(v.id);
        if (at == cached_.end() || v.name.starts_with("[internal]")) continue;
        ++result.steps;
        if (at->second) ++result.cached_steps;
    }
}

namespace {

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

}  // namespace

error located(error e, const llb::definition& graph, const std::optional<digest>& vertex) {
    if (e.kind() != errc::canceled && !e.where())
        if (auto where = location_of(graph, vertex)) return std::move(e).at(std::move(*where));
    return e;
}

async::task<solver::result> solve(parts& p, solver::graph vertices, solver::edge target, const llb::definition& graph, solver::solve_options options,
                                  std::shared_ptr<counting_sink> sink) {
    std::exception_ptr failed;
    std::vector<solver::result> out;
    try {
        out = co_await p.solver->solve(std::move(vertices), {target}, sink, std::move(options));
    } catch (...) {
        failed = std::current_exception();
    }
    if (!failed) co_return out.at(0);
    throw located(describe(failed), graph, sink->failed());
}

namespace {

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

}  // namespace

void show_warnings(const std::vector<frontend::warning>& warnings, const std::string& text, const progress::writer& about) {
    for (const auto& w : warnings) {
        progress::warning out;
        out.message = w.rule.empty() ? w.message : cat(w.rule, ": ", w.message, " (line ", w.where.line, ")");
        if (!w.detail.empty()) out.detail.push_back(w.detail);
        out.url = w.url;
        out.location = w.where;
        out.source = text;
        out.ranges.push_back({.first_line = static_cast<int>(w.where.line), .last_line = static_cast<int>(std::max(w.where.line, w.last_line))});
        about.warn(std::move(out));
    }
}

void check_entitlements(const std::vector<std::string>& allow, const llb::definition& graph, const llb::loaded& loaded) {
    const auto allowed = [&](std::string_view name) { return std::find(allow.begin(), allow.end(), name) != allow.end(); };
    for (const auto& v : loaded.vertices) {
        const auto* exec = std::get_if<llb::exec_op>(&v.what.what);
        if (exec == nullptr) continue;
        std::string_view missing;
        if (exec->network == llb::net_mode::host && !allowed("network.host")) missing = "network.host";
        if (exec->security == llb::security_mode::insecure && !allowed("security.insecure")) missing = "security.insecure";
        if (missing.empty()) continue;
        error e{errc::permission, cat(missing, " is not allowed: the step asks for it, so add --allow ", missing)};
        if (auto where = location_of(graph, v.id)) throw std::move(e).at(std::move(*where));
        throw e;
    }
}

async::task<void> export_and_keep(parts& p, built what, std::vector<output> outputs, std::vector<std::string> names,
                                  std::shared_ptr<progress::sink> sink, build_result& result) {
    // What was built reaches the disk while it is exported, which reads it from memory.
    std::vector<async::task<void>> last;
    last.push_back(export_all(p, std::move(what), std::move(outputs), std::move(names), std::move(sink), result));
    last.push_back(make_durable(p));
    co_await async::when_all(std::move(last));
    co_await collect_garbage(p);
}

}  // namespace cobuild::build

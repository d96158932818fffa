module;
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.ops;

import cobuild.progress;
import :bodies;

namespace cobuild::ops {

namespace {

std::shared_ptr<solver::op> make_op(const llb::op& what, environment& env, const build_scope& scope, bool ignore_cache) {
    if (std::holds_alternative<llb::source_op>(what.what)) return make_source_op(what, env, scope);
    if (std::holds_alternative<llb::exec_op>(what.what)) return make_exec_op(what, env, scope, ignore_cache);
    if (std::holds_alternative<llb::file_op>(what.what)) return make_file_op(what, env, scope);
    if (std::holds_alternative<llb::merge_op>(what.what)) return make_merge_op(what, env);
    if (std::holds_alternative<llb::diff_op>(what.what)) return make_diff_op(what, env);
    if (std::holds_alternative<llb::build_op>(what.what)) throw error{errc::unsupported, "a build op (LLB inside LLB) is not supported yet"};
    return make_passthrough_op(what);
}

}  // namespace

graph make_graph(const llb::loaded& definition, environment& env, build_scope scope) {
    graph out;
    std::unordered_map<digest, std::size_t> index;
    for (const auto& v : definition.vertices) {
        solver::vertex made;
        made.id = v.id;
        scope.vertex = v.id;
        made.op = make_op(v.what, env, scope, v.meta.ignore_cache && scope.renewed);
        for (const auto& in : v.what.inputs) made.inputs.push_back({index.at(in.vertex), static_cast<std::size_t>(in.index)});
        made.name = llb::display_name(v.what, v.meta);
        if (v.meta.progress_group)
            made.progress_group = progress::group{v.meta.progress_group->id, v.meta.progress_group->name, v.meta.progress_group->weak};
        made.ignore_cache = v.meta.ignore_cache;
        index.emplace(v.id, out.vertices.size());
        out.vertices.push_back(std::move(made));
    }
    if (definition.result) out.result = solver::edge{index.at(definition.result->vertex), static_cast<std::size_t>(definition.result->index)};
    return out;
}

}  // namespace cobuild::ops

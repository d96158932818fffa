module;
#include <algorithm>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

module cobuild.llb;

namespace cobuild::llb {
namespace {

/// What is known of a vertex that was added twice: the later word counts, "ignore the cache" stays.
void merge(op_metadata& into, op_metadata from) {
    into.ignore_cache = into.ignore_cache || from.ignore_cache;
    for (auto& [k, v] : from.description) into.description.insert_or_assign(k, std::move(v));
    for (const auto& [k, v] : from.caps) into.caps.insert_or_assign(k, v);
    if (from.export_cache) into.export_cache = from.export_cache;
    if (from.progress_group) into.progress_group = std::move(from.progress_group);
    if (from.linux_resources) into.linux_resources = std::move(from.linux_resources);
}

/// Indexes of the entries that the last of `roots` needs, found without recursion.
template<class Inputs>
std::vector<char> reachable(std::size_t count, std::size_t root, Inputs inputs) {
    std::vector<char> seen(count);
    std::vector<std::size_t> todo{root};
    seen[root] = 1;
    while (!todo.empty()) {
        const auto at = todo.back();
        todo.pop_back();
        inputs(at, [&](std::size_t next) {
            if (!seen[next]) {
                seen[next] = 1;
                todo.push_back(next);
            }
        });
    }
    return seen;
}

}  // namespace

input graph::add(const op& o, op_metadata meta, std::vector<range> where) {
    validate(o);
    std::vector<digest> inputs;
    for (const input& in : o.inputs) {
        const auto found = index_.find(in.vertex);
        if (found == index_.end() || in.index >= entries_[found->second].outputs) {
            throw error{errc::internal, cat("a build step was added before its input ", in.vertex.str(), ":", in.index)};
        }
        inputs.push_back(in.vertex);
    }
    bytes data = marshal(o);
    const digest id = digest::of(data);
    const auto [found, fresh] = index_.try_emplace(id, entries_.size());
    if (fresh) {
        entries_.push_back({id, std::move(data), std::move(inputs), output_count(o), std::move(meta), {}});
    } else {
        merge(entries_[found->second].meta, std::move(meta));
    }
    if (!where.empty()) entries_[found->second].where.push_back({.source_index = 0, .ranges = std::move(where)});
    return {id, 0};
}

std::optional<input> graph::add(const definition& d) {
    auto all = load(d);
    if (!all.result) return std::nullopt;
    std::unordered_map<digest, const bytes*> data;
    for (const bytes& b : d.ops) data.emplace(digest::of(b), &b);
    std::vector<std::int32_t> moved;
    if (d.source) {
        for (const auto& info : d.source->infos) {
            const auto same = [&](const source_info& s) { return s.filename == info.filename && s.data == info.data && s.language == info.language; };
            const auto at = std::find_if(sources_.begin(), sources_.end(), same);
            moved.push_back(static_cast<std::int32_t>(at - sources_.begin()));
            if (at == sources_.end()) sources_.push_back(info);
        }
    }
    for (auto& v : all.vertices) {
        const auto [found, fresh] = index_.try_emplace(v.id, entries_.size());
        if (fresh) {
            std::vector<digest> inputs;
            for (const input& in : v.what.inputs) inputs.push_back(in.vertex);
            entries_.push_back({v.id, *data.at(v.id), std::move(inputs), output_count(v.what), std::move(v.meta), {}});
        } else {
            merge(entries_[found->second].meta, std::move(v.meta));
        }
        const auto* places = d.source ? &d.source->locations : nullptr;
        if (places == nullptr || !places->contains(v.id)) continue;
        for (auto where : places->at(v.id).list) {
            if (where.source_index < 0 || static_cast<std::size_t>(where.source_index) >= moved.size()) continue;
            where.source_index = moved[static_cast<std::size_t>(where.source_index)];
            entries_[found->second].where.push_back(std::move(where));
        }
    }
    return all.result;
}

void graph::set_source(source_info info) { sources_.insert(sources_.begin(), std::move(info)); }

definition graph::finish(std::optional<input> result) const {
    definition d;
    if (!result) return d;
    const auto root = index_.find(result->vertex);
    if (root == index_.end()) throw error{errc::internal, cat("the result ", result->vertex.str(), " is not in the build graph")};
    const auto needed = reachable(entries_.size(), root->second, [&](std::size_t at, auto visit) {
        for (const digest& in : entries_[at].inputs) visit(index_.at(in));
    });
    source_map places;
    places.infos = sources_;
    for (std::size_t i = 0; i < entries_.size(); ++i) {
        const entry& e = entries_[i];
        if (!needed[i]) continue;
        d.ops.push_back(e.data);
        d.metadata.emplace(e.id, e.meta);
        if (!sources_.empty() && !e.where.empty()) places.locations.emplace(e.id, locations{e.where});
    }
    const op terminal{.inputs = {*result}, .what = {}, .platform = {}, .constraints = {}};
    d.ops.push_back(marshal(terminal));
    d.metadata.emplace(digest::of(d.ops.back()), op_metadata{});
    if (!sources_.empty()) d.source = std::move(places);
    return d;
}

loaded load(const definition& d, const limits& l) {
    loaded out;
    if (d.ops.empty()) return out;
    if (d.ops.size() > l.max_ops) throw error{errc::invalid, cat("build definition has ", d.ops.size(), " steps, more than ", l.max_ops)};
    std::vector<vertex> all;
    std::unordered_map<digest, std::size_t> index;
    std::size_t total = 0;
    for (const bytes& data : d.ops) {
        total += data.size();
        if (total > l.max_bytes) throw error{errc::invalid, cat("build definition has more than ", l.max_bytes, " bytes")};
        const digest id = digest::of(data);
        if (!index.try_emplace(id, all.size()).second) continue;
        const auto meta = d.metadata.find(id);
        all.push_back({id, unmarshal_op(data, l), meta != d.metadata.end() ? meta->second : op_metadata{}});
    }
    const std::size_t last = index.at(digest::of(d.ops.back()));
    if (all[last].what.inputs.empty()) throw error{errc::invalid, "build definition does not end with its result"};

    // Kahn's order over what the result needs. Digests cannot form a cycle, but bytes from outside prove nothing until hashed.
    const auto at = [&](const input& in) {
        const auto found = index.find(in.vertex);
        if (found == index.end()) throw error{errc::invalid, cat("build definition lacks the step ", in.vertex.str())};
        return found->second;
    };
    const auto needed = reachable(all.size(), last, [&](std::size_t v, auto visit) {
        for (const input& in : all[v].what.inputs) visit(at(in));
    });
    std::vector<std::size_t> waiting(all.size());
    std::vector<std::vector<std::size_t>> users(all.size());
    std::vector<std::size_t> ready;
    for (std::size_t v = 0; v < all.size(); ++v) {
        if (!needed[v]) continue;
        validate(all[v].what);
        for (const input& in : all[v].what.inputs) {
            const auto from = at(in);
            if (in.index >= output_count(all[from].what)) {
                throw error{errc::invalid,
                            cat("build definition uses output ", in.index, " of ", in.vertex.str(), ", which has ", output_count(all[from].what))};
            }
            users[from].push_back(v);
            ++waiting[v];
        }
        if (waiting[v] == 0) ready.push_back(v);
    }
    out.result = all[last].what.inputs.front();
    for (std::size_t i = 0; i < ready.size(); ++i) {
        for (const auto user : users[ready[i]]) {
            if (--waiting[user] == 0) ready.push_back(user);
        }
    }
    for (const auto v : ready) {
        if (!std::holds_alternative<std::monostate>(all[v].what.what)) out.vertices.push_back(std::move(all[v]));
    }
    return out;
}

}  // namespace cobuild::llb

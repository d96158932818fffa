module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

module cobuild.frontend;

import :state;

namespace cobuild::frontend {

draft::draft() {
    add({.inputs = {}, .what = llb::source_op{"local://", {}}, .platform = {}}, {},
        {.description = {{std::string(llb::custom_name), "[internal] load build context"}}});
}

// The key is the digest the op would have if the context had no attributes: equal keys now are equal digests later.
ref draft::add(llb::op o, const std::vector<ref>& inputs, llb::op_metadata meta, std::vector<llb::range> where) {
    o.inputs.clear();
    for (const ref& in : inputs) o.inputs.push_back({keys_[in.node], in.output});
    const digest key = digest::of(llb::marshal(o));
    const auto [found, fresh] = index_.try_emplace(key, nodes_.size());
    if (fresh) {
        nodes_.push_back({std::move(o), inputs, std::move(meta), {}, {}});
        keys_.push_back(key);
    } else {
        auto& known = nodes_[found->second].meta;
        known.ignore_cache = known.ignore_cache || meta.ignore_cache;
    }
    if (!where.empty()) nodes_[found->second].where.push_back(std::move(where));
    return {found->second, 0};
}

root_ref draft::add(const llb::definition& whole) {
    const auto result = llb::load(whole).result;
    if (!result) return std::nullopt;
    const digest key = digest::of(cat(result->vertex.str(), ":", result->index));
    const auto [found, fresh] = index_.try_emplace(key, nodes_.size());
    if (fresh) {
        nodes_.push_back({{}, {}, {}, {}, std::make_shared<const llb::definition>(whole)});
        keys_.push_back(key);
    }
    return ref{found->second, 0};
}

void draft::set_attribute(const ref& source, const std::string& key, std::string value) {
    std::get<llb::source_op>(nodes_.at(source.node).what.what).attrs[key] = std::move(value);
}

llb::definition draft::finish(root_ref result, context_parts context, llb::source_info source) const {
    llb::graph g;
    g.set_source(std::move(source));
    std::vector<llb::input> ids;  // of output 0
    for (const node& n : nodes_) {
        llb::op o = n.what;
        if (ids.empty()) {
            std::optional<llb::input> last;
            if (context.graph) last = g.add(*context.graph);
            for (auto& c : context.ops) {
                if (last) c.inputs = {*last};
                last = g.add(c, n.meta);
            }
            ids.push_back(last.value());
            continue;
        }
        if (n.whole) {
            ids.push_back(g.add(*n.whole).value());
            continue;
        }
        o.inputs.clear();
        for (const ref& in : n.inputs) o.inputs.push_back({ids[in.node].vertex, ids[in.node].index + in.output});
        ids.push_back(g.add(o, n.meta, n.where.empty() ? std::vector<llb::range>{} : n.where.front()));
        for (std::size_t i = 1; i < n.where.size(); ++i) g.add(o, {}, n.where[i]);
    }
    if (!result) return g.finish({});
    return g.finish(llb::input{ids[result->node].vertex, ids[result->node].index + result->output});
}

std::int64_t input_list::of(const root_ref& r) {
    if (!r) return llb::scratch;
    const auto found = std::find(refs.begin(), refs.end(), *r);
    if (found != refs.end()) return found - refs.begin();
    refs.push_back(*r);
    return static_cast<std::int64_t>(refs.size()) - 1;
}

void env_list::set(std::string_view key, std::string_view value) {
    auto at = entries_.find(key);
    if (at == entries_.end()) at = entries_.emplace(key, entry{}).first;
    at->second.value = value;
    at->second.order = next_++;
}

void env_list::erase(std::string_view key) {
    if (const auto at = entries_.find(key); at != entries_.end()) entries_.erase(at);
}

std::optional<std::string> env_list::get(std::string_view key) const {
    const auto at = entries_.find(key);
    return at != entries_.end() ? std::optional(at->second.value) : std::nullopt;
}

std::vector<std::string> env_list::list() const {
    std::vector<const decltype(entries_)::value_type*> sorted;
    for (const auto& e : entries_) sorted.push_back(&e);
    std::sort(sorted.begin(), sorted.end(), [](const auto* a, const auto* b) { return a->second.order < b->second.order; });
    std::vector<std::string> out;
    for (const auto* e : sorted) out.push_back(cat(e->first, "=", e->second.value));
    return out;
}

std::vector<std::string_view> env_list::keys() const {
    std::vector<std::string_view> out;
    for (const auto& e : entries_) out.emplace_back(e.first);
    return out;
}

df::lookup env_list::lookup() const {
    return [this](std::string_view name) { return get(name); };
}

}  // namespace cobuild::frontend

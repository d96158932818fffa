// Source policies: every source of a definition is asked about before it counts for anything.
module;
#include <cstddef>
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

import cobuild.llb;
import cobuild.policy;
import :parts;

namespace cobuild::build {

namespace {

constexpr unsigned max_rounds = 10;

async::task<void> check_one(source_check check, llb::op& op) {
    auto& source = std::get<llb::source_op>(op.what);
    source = co_await check(source, op.platform);
}

/// What is the same keeps its bytes: marshalling anew could lose what is not known here.
bool same_source(const llb::bytes& before, const llb::op& now) {
    const auto old = std::get<llb::source_op>(llb::unmarshal_op(before).what);
    const auto& source = std::get<llb::source_op>(now.what);
    return old.identifier == source.identifier && old.attrs == source.attrs;
}

/// The definition with the sources that `loaded` has now, and all that stands on them named anew.
llb::definition replaced(const llb::definition& what, llb::loaded loaded) {
    std::map<digest, const llb::bytes*> known;
    for (const auto& op : what.ops) known.emplace(digest::of(op), &op);
    std::map<digest, digest> moved;
    const auto follow = [&moved](llb::op& op) {
        bool changed = false;
        for (auto& in : op.inputs) {
            const auto& to = moved.at(in.vertex);
            changed = changed || to != in.vertex;
            in.vertex = to;
        }
        return changed;
    };
    llb::definition out;
    bool any = false;
    for (auto& v : loaded.vertices) {
        auto bytes = *known.at(v.id);
        const bool source = std::holds_alternative<llb::source_op>(v.what.what);
        const bool changed = source ? !same_source(bytes, v.what) : follow(v.what);
        if (changed) bytes = llb::marshal(v.what);
        any = any || changed;
        const auto id = digest::of(bytes);
        moved.emplace(v.id, id);
        out.metadata[id] = std::move(v.meta);
        out.ops.push_back(std::move(bytes));
    }
    if (!any || what.ops.empty()) return what;
    auto terminal = llb::unmarshal_op(what.ops.back());
    (void)follow(terminal);
    auto bytes = llb::marshal(terminal);
    if (const auto meta = what.metadata.find(digest::of(what.ops.back())); meta != what.metadata.end())
        out.metadata[digest::of(bytes)] = meta->second;
    out.ops.push_back(std::move(bytes));
    if (!what.source) return out;
    out.source.emplace();
    out.source->infos = what.source->infos;
    for (const auto& [id, where] : what.source->locations)
        if (const auto at = moved.find(id); at != moved.end()) out.source->locations[at->second] = where;
    return out;
}

}  // namespace

async::task<llb::source_op> check_source(std::vector<policy::policy> policies, source_verifier verify, llb::source_op what,
                                         std::optional<llb::platform> platform) {
    (void)policy::apply(policies, what);
    if (!verify) co_return what;
    what.identifier = policy::normalized(what.identifier);
    for (unsigned round = 0; round < max_rounds; ++round) {
        auto other = co_await verify(what, platform);
        if (!other) co_return what;
        what = std::move(*other);
        (void)policy::apply(policies, what);
        what.identifier = policy::normalized(what.identifier);
    }
    throw error{errc::invalid, cat("too many policy requests for the source ", quoted(what.identifier))};
}

async::task<llb::definition> check_sources(llb::definition what, source_check check) {
    auto loaded = llb::load(what);
    std::vector<async::task<void>> asking;
    for (auto& v : loaded.vertices)
        if (std::holds_alternative<llb::source_op>(v.what.what)) asking.push_back(check_one(check, v.what));
    co_await async::when_all(std::move(asking));
    co_return replaced(what, std::move(loaded));
}

void convert_contexts(std::map<std::string, std::string>& named, const std::vector<policy::policy>& policies) {
    static constexpr std::string_view image = "docker-image://", local = "local://";
    for (auto& [name, value] : named) {
        if (!value.starts_with(image)) continue;
        llb::source_op source{value, {}};
        if (!policy::apply(policies, source) || source.identifier.starts_with(image)) continue;
        value = source.identifier.starts_with(local) ? cat("local:", source.identifier.substr(local.size())) : source.identifier;
    }
}

}  // namespace cobuild::build

module;
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>
#include <range/v3/algorithm/all_of.hpp>
#include <range/v3/algorithm/any_of.hpp>
#include <range/v3/algorithm/sort.hpp>
#include <range/v3/functional/comparisons.hpp>

module cobuild.build;

import cobuild.fs;
import :parts;

namespace cobuild::build {

namespace {

/// Layers that images built here are made of, as their label tells.
std::set<std::string> layers_of_images(const content::store& content) {
    std::set<std::string> out;
    for (const auto& i : content.list_images()) {
        const auto at = i.labels.find(std::string(source::chain_label));
        if (at == i.labels.end()) continue;
        for (const auto id : split(at->second, ',')) out.emplace(id);
    }
    return out;
}

usage_info to_info(const snapshot::usage& u, const std::set<std::string>& of_images) {
    usage_info out;
    out.id = cat(u.id.value);
    out.kind = u.kind;
    out.description = u.description;
    out.size = u.size;
    out.in_use = u.in_use;
    out.shared = of_images.contains(out.id);
    out.mutable_ = u.changeable;
    out.created = u.created;
    out.last_used = u.last_used.value_or(u.created);
    out.usage_count = u.use_count;
    for (const auto& p : u.parents) out.parents.push_back(cat(p.value));
    return out;
}

/// One filter of containerd's language as far as records have fields: "type==regular", "id~=...", "inuse", "!shared".
bool matches_one(const usage_info& u, std::string_view item) {
    const bool negated = item.starts_with('!');
    if (negated) item.remove_prefix(1);
    const auto flag = [&](std::string_view name) -> std::optional<bool> {
        if (name == "inuse") return u.in_use;
        if (name == "mutable") return u.mutable_;
        if (name == "immutable") return !u.mutable_;
        if (name == "shared") return u.shared;
        if (name == "private") return !u.shared;
        return std::nullopt;
    };
    if (const auto f = flag(item)) return *f != negated;
    const auto op = item.find_first_of("=!~");
    if (op == std::string_view::npos)
        throw error{errc::invalid, cat("unknown filter ", quoted(item), " (id, description, type, inuse, mutable, immutable, shared, private)")};
    const auto key = item.substr(0, op);
    auto rest = item.substr(op);
    const bool unequal = rest.starts_with("!=");
    const bool contains = rest.starts_with("~=");
    rest.remove_prefix(rest.starts_with("==") || unequal || contains ? 2 : 1);
    std::string value;
    if (key == "id")
        value = u.id;
    else if (key == "type")
        value = u.kind;
    else if (key == "description")
        value = u.description;
    else if (const auto f = flag(key))
        value = *f ? "true" : "false";
    else
        throw error{errc::invalid, cat("unknown filter field ", quoted(key), " (id, description, type, inuse, mutable, immutable, shared, private)")};
    const bool hit = contains ? value.find(rest) != std::string::npos : value == rest;
    return (hit != unequal) != negated;
}

/// Filters of the list are alternatives; commas inside one mean "and".
bool matches(const usage_info& u, const std::vector<std::string>& filters) {
    if (filters.empty()) return true;
    return ranges::any_of(filters, [&](const std::string& f) {
        return ranges::all_of(split(f, ','), [&](std::string_view item) { return matches_one(u, trim(item)); });
    });
}

/// How much a pass may leave: BuildKit's rule (maxUsed, then what minFree demands, never below reserved); empty: no limit.
std::optional<std::uint64_t> keep_bytes(const prune_options& o, std::uint64_t total, const fs::disk_usage& disk) {
    std::optional<std::uint64_t> keep = o.max_used;
    if (o.min_free && *o.min_free > disk.free) {
        const auto excess = *o.min_free - disk.free;
        const auto left = total > excess ? total - excess : 0;
        keep = keep ? std::min(*keep, left) : left;
    } else if (o.min_free && !keep) {
        return total;
    }
    if (keep && o.reserved) keep = std::max(*keep, *o.reserved);
    return keep;
}

}  // namespace

async::task<std::vector<usage_info>> measure_usage(parts& p, std::vector<std::string> filters) {
    const auto of_images = co_await p.runtime.pool().run([&p] { return layers_of_images(*p.content); });
    std::vector<usage_info> out;
    for (const auto& u : co_await p.snapshots->du())
        if (auto info = to_info(u, of_images); matches(info, filters)) out.push_back(std::move(info));
    co_return out;
}

async::task<std::vector<usage_info>> run_prune(parts& p, prune_options options) {
    auto all = co_await measure_usage(p, {});
    const auto disk = co_await p.runtime.pool().run([&p] { return fs::disk_space(p.directory->root()); });
    const auto now = std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now());
    std::uint64_t total = 0;
    for (const auto& u : all)
        if (!u.shared) total += u.size;
    const auto keep = keep_bytes(options, total, disk);
    // Least recently and least often used first.
    ranges::sort(all, ranges::less{}, [](const usage_info& u) { return std::pair(u.last_used, u.usage_count); });
    std::vector<usage_info> removed;
    for (const auto& u : all) {
        if (keep && total <= *keep) break;
        if (u.in_use || !matches(u, options.filters)) continue;
        if (!options.all && (u.shared || u.kind == "internal" || u.kind == "frontend")) continue;
        if (options.keep_duration.count() > 0 && u.last_used + options.keep_duration > now) continue;
        if (!co_await p.snapshots->remove(snapshot::layer_id{std::stoull(u.id)})) continue;
        total -= std::min(total, u.size);
        removed.push_back(u);
    }
    // Blobs that neither an image nor a layer that is still here needs.
    const auto roots = co_await p.snapshots->all_blobs();
    co_await p.content->collect(roots, [&p](const digest& d) { return children_of(*p.content, d); });
    const bool everything = options.all && !options.max_used && !options.min_free && options.keep_duration.count() == 0 && options.filters.empty();
    if (everything) co_await p.git->clear();
    co_await p.directory->empty_trash();
    co_return removed;
}

namespace {

constexpr std::string_view gc_stamp = "gc.stamp";
constexpr auto gc_interval = std::chrono::minutes(10);

/// Whether the policy was last applied long enough ago; notes that it is being applied now. A new state directory is not due.
bool gc_is_due(const state::directory& directory) {
    const auto info = fs::stat_at(directory.fd(), gc_stamp);
    const auto now = std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch());
    const bool due = info && std::chrono::seconds(info->mtime.seconds) + gc_interval < now;
    if (due || !info) fs::atomic_write(directory.fd(), gc_stamp, "", 0600, false);
    return due;
}

}  // namespace

async::task<void> collect_garbage(parts& p) {
    if (!p.settings.oci.gc.enabled || !co_await p.runtime.pool().run([&p] { return gc_is_due(*p.directory); })) co_return;
    const auto total = co_await p.runtime.pool().run([&p] { return fs::disk_space(p.directory->root()).total; });
    for (const auto& rule : config::gc_rules(p.settings.oci.gc, total)) {
        prune_options o{.all = rule.all, .keep_duration = rule.keep_duration, .filters = rule.filters};
        if (rule.max_used_space != 0) o.max_used = rule.max_used_space;
        if (rule.reserved_space != 0) o.reserved = rule.reserved_space;
        if (rule.min_free_space != 0) o.min_free = rule.min_free_space;
        co_await run_prune(p, std::move(o));
    }
}

}  // namespace cobuild::build

module;
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

module cobuild.config;

import cobuild.base;

namespace cobuild::config {
namespace {

constexpr std::uint64_t gigabyte = 1'000'000'000;

/// A tenth of the disk but at most 10 GB reserved, a fifth kept free, at most 80 % and 100 GB used.
gc_rule detected_caps(std::uint64_t total) {
    return {.reserved_space = std::min(disk_space{.percent = 10}.resolve(total), 10 * gigabyte),
            .max_used_space = std::min(disk_space{.percent = 80}.resolve(total), 100 * gigabyte),
            .min_free_space = disk_space{.percent = 20}.resolve(total)};
}

}  // namespace

std::vector<gc_rule> gc_rules(const gc_settings& settings, std::uint64_t total_bytes) {
    if (!settings.enabled) return {};
    std::vector<gc_rule> out;
    for (const auto& p : settings.policies)
        out.push_back({p.all, p.filters, p.keep_duration, p.reserved_space.resolve(total_bytes), p.max_used_space.resolve(total_bytes),
                       p.min_free_space.resolve(total_bytes)});
    if (!out.empty()) return out;
    const bool unset = settings.reserved_space.empty() && settings.max_used_space.empty() && settings.min_free_space.empty();
    gc_rule caps = unset ? detected_caps(total_bytes)
                         : gc_rule{.reserved_space = settings.reserved_space.resolve(total_bytes),
                                   .max_used_space = settings.max_used_space.resolve(total_bytes),
                                   .min_free_space = settings.min_free_space.resolve(total_bytes)};
    gc_rule old = caps;
    old.keep_duration = std::chrono::hours{60 * 24};
    gc_rule everything = caps;
    everything.all = true;
    return {{.filters = {"type==source.local", "type==exec.cachemount", "type==source.git.checkout"},
             .keep_duration = std::chrono::hours{48},
             .max_used_space = 512'000'000},
            old,
            caps,
            everything};
}

}  // namespace cobuild::config

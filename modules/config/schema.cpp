module;
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

module cobuild.config;

import cobuild.base;
import :schema;

namespace cobuild::config {
namespace {

constexpr std::string_view level_names[] = {"trace", "debug", "info", "warning", "error", "fatal"};

std::string set_level(std::optional<log_level>& out, std::string_view text) {
    const std::string lower = to_lower(text);
    if (lower == "warn") {
        out = log_level::warning;
        return {};
    }
    if (lower == "panic") {
        out = log_level::off;
        return {};
    }
    for (std::size_t i = 0; i < std::size(level_names); ++i)
        if (level_names[i] == lower) {
            out = static_cast<log_level>(i);
            return {};
        }
    return "expected trace, debug, info, warning, error, fatal or panic";
}

word level_word(std::optional<log_level>& level) {
    return {[&level](std::string_view text) { return set_level(level, text); },
            [&level] { return level ? std::optional<std::string>(level_name(*level)) : std::nullopt; }};
}

word format_word(log_format& format) {
    return {[&format](std::string_view text) -> std::string {
                if (text != "json" && text != "text") return "unsupported log type, expected json or text";
                format = text == "json" ? log_format::json : log_format::text;
                return {};
            },
            [&format] { return std::optional<std::string>(format == log_format::json ? "json" : "text"); }};
}

word network_word(network_mode& mode) {
    return {[&mode](std::string_view text) -> std::string {
                for (const auto m : {network_mode::automatic, network_mode::cni, network_mode::host, network_mode::none, network_mode::bridge})
                    if (to_string(m) == text) {
                        mode = m;
                        return {};
                    }
                return "expected auto, cni, host, none or bridge";
            },
            [&mode] { return std::optional<std::string>(to_string(mode)); }};
}

word snapshotter_word(std::string& name) {
    return {[&name](std::string_view text) -> std::string {
                for (const auto known : {"auto", "overlayfs", "native", "fuse-overlayfs", "stargz"})
                    if (text == known) {
                        name = text;
                        return {};
                    }
                return "expected auto, overlayfs or native";
            },
            [&name] { return std::optional<std::string>(name); }};
}

folded_bool level_shortcut(std::optional<log_level>& level, log_level wanted) {
    return [&level, wanted](bool on) {
        if (on && !level) level = wanted;
    };
}

slot table(fields members) { return sub_table{std::make_shared<fields>(std::move(members))}; }

/// An array of tables kept in a vector; the vector must not move while its fields are in use.
template<class T>
family array_of(std::vector<T>& items, fields (*members)(T&)) {
    return {.keyed = false,
            .add = [&items, members](const std::string&) { return members(items.emplace_back()); },
            .all =
                [&items, members] {
                    std::vector<std::pair<std::string, fields>> out;
                    for (auto& item : items) out.emplace_back(cat("[", out.size(), "]"), members(item));
                    return out;
                },
            .name_rule = {}};
}

fields gc_policy_fields(gc_policy& p) {
    return {
        {"all", &p.all},
        {"filters", &p.filters, "", filter_rule},
        {.key = "keepDuration", .where = &p.keep_duration, .least = 0},
        {"reservedSpace", &p.reserved_space},
        {"maxUsedSpace", &p.max_used_space},
        {"minFreeSpace", &p.min_free_space},
        {.key = "keepBytes",
         .where = folded_space{[&p](disk_space s) {
             if (p.reserved_space.empty()) p.reserved_space = s;
         }},
         .instead = "reservedSpace"},
    };
}

fields key_pair_fields(key_pair& p) { return {{"key", &p.key}, {"cert", &p.cert}}; }

fields registry_fields(registry_table& r) {
    return {
        {"mirrors", &r.mirrors, "", mirror_rule},
        {"http", &r.http},
        {"insecure", &r.insecure},
        {"ca", &r.ca},
        {"keypair", array_of(r.key_pairs, key_pair_fields)},
        {"tlsconfigdir", &r.tls_config_dirs},
    };
}

void add_worker_fields(fields& out, worker_table& w, const std::string& flag, const std::string& short_flag) {
    auto& gc = w.gc;
    const auto keep = [&gc](disk_space s) {
        if (gc.reserved_space.empty() && gc.max_used_space.empty() && gc.min_free_space.empty()) gc.reserved_space = s;
    };
    fields shared{
        {"enabled", &w.enabled, flag},
        {"labels", &w.labels, flag + "-labels"},
        {"platforms", &w.platforms, flag + "-platform", platform_rule},
        {"rootless", &w.rootless, flag + "-rootless"},
        {"gc", &gc.enabled, flag + "-gc"},
        {"reservedSpace", &gc.reserved_space, flag + "-gc-keepstorage"},
        {"maxUsedSpace", &gc.max_used_space, flag + "-gc-keepstorage"},
        {"minFreeSpace", &gc.min_free_space, flag + "-gc-keepstorage"},
        {.key = "gckeepstorage", .where = folded_space{keep}, .instead = "reservedSpace"},
        {"gcpolicy", array_of(gc.policies, gc_policy_fields)},
        {"networkMode", network_word(w.network), flag + "-net"},
        {"cniConfigPath", &w.cni_config_path, short_flag + "-cni-config-path"},
        {"cniBinaryPath", &w.cni_binary_path, short_flag + "-cni-binary-dir"},
        {.key = "cniPoolSize", .where = &w.cni_pool_size, .flag = short_flag + "-cni-pool-size", .least = 0},
        {"bridgeName", &w.bridge_name},
        {"bridgeSubnet", &w.bridge_subnet, "", subnet_rule},
        {"defaultCgroupParent", &w.default_cgroup_parent},
        {"apparmor-profile", &w.apparmor_profile, flag + "-apparmor-profile"},
        {"selinux", &w.selinux, flag + "-selinux"},
        {.key = "max-parallelism", .where = &w.max_parallelism, .flag = short_flag + "-max-parallelism", .least = 0},
    };
    for (auto& f : shared) out.push_back(std::move(f));
}

fields oci_fields(oci_table& w) {
    const std::string flag = "--oci-worker";
    fields out{
        {"snapshotter", snapshotter_word(w.snapshotter), flag + "-snapshotter"},
        {"binary", &w.binary, flag + "-binary"},
        {"noProcessSandbox", &w.no_process_sandbox, flag + "-no-process-sandbox"},
        {"isolateCgroups", &w.isolate_cgroups},
        {"userRemapUnsupported", &w.user_remap},
        {"proxySnapshotterPath", &w.proxy_snapshotter_path, flag + "-proxy-snapshotter-path"},
        {"stargzSnapshotter", free_table{&w.stargz_snapshotter}},
    };
    add_worker_fields(out, w, flag, "--oci");
    return out;
}

fields containerd_fields(containerd_table& w) {
    const std::string flag = "--containerd-worker";
    fields out{
        {"address", &w.address, flag + "-addr"},
        {"namespace", &w.containerd_namespace, flag + "-namespace"},
        {"snapshotter", &w.snapshotter, flag + "-snapshotter"},
        {"runtime", table({{"name", &w.runtime_name, flag + "-runtime"}, {"path", &w.runtime_path}, {"options", free_table{&w.runtime_options}}})},
    };
    add_worker_fields(out, w, flag, "--containerd");
    return out;
}

family registries_of(std::map<std::string, registry_table>& all) {
    return {.keyed = true,
            .add = [&all](const std::string& name) { return registry_fields(all[name]); },
            .all =
                [&all] {
                    std::vector<std::pair<std::string, fields>> out;
                    for (auto& [name, table] : all) out.emplace_back(name, registry_fields(table));
                    return out;
                },
            .name_rule = registry_name_rule};
}

}  // namespace

std::string_view level_name(log_level level) { return level_names[static_cast<std::size_t>(level)]; }

std::string_view to_string(network_mode mode) {
    switch (mode) {
        case network_mode::automatic: return "auto";
        case network_mode::cni: return "cni";
        case network_mode::host: return "host";
        case network_mode::none: return "none";
        case network_mode::bridge: break;
    }
    return "bridge";
}

fields schema(configuration& c) {
    auto& g = c.grpc;
    fields out{
        {"root", &c.root, "--root"},
        {"insecure-entitlements", &c.insecure_entitlements, "--allow-insecure-entitlement", entitlement_rule},
        {"proxyNetwork", &c.proxy_network, "--proxy-network"},
        {"provenanceEnvDir", &c.provenance_env_dir},
        {"log", table({{"format", format_word(c.log.format), "--log-format"}, {"level", level_word(c.log.level), "--log-level"}})},
        {.key = "trace", .where = level_shortcut(c.log.level, log_level::trace), .flag = "--trace", .instead = "log.level = \"trace\""},
        {.key = "debug", .where = level_shortcut(c.log.level, log_level::debug), .flag = "--debug", .instead = "log.level = \"debug\""},
        {"grpc", table({{"address", &g.address, "--addr", address_rule},
                        {"debugAddress", &g.debug_address, "--debugaddr"},
                        {.key = "uid", .where = &g.uid, .least = 0},
                        {.key = "gid", .where = &g.gid, .flag = "--group", .least = 0},
                        {"securityDescriptor", &g.security_descriptor},
                        {"tls", table({{"cert", &g.tls.cert, "--tlscert"}, {"key", &g.tls.key, "--tlskey"}, {"ca", &g.tls.ca, "--tlscacert"}})}})},
        {"otel", table({{"socketPath", &c.otel.socket_path, "--otel-socket-path"}})},
        {"cdi", table({{"disabled", &c.cdi.disabled, "--cdi-disabled"},
                       {"specDirs", &c.cdi.spec_dirs, "--cdi-spec-dir"},
                       {"autoAllowed", &c.cdi.auto_allowed}})},
        {"dns",
         table({{"nameservers", &c.dns.nameservers, "", nameserver_rule}, {"options", &c.dns.options}, {"searchDomains", &c.dns.search_domains}})},
        {"history",
         table({{.key = "maxAge", .where = &c.history.max_age, .least = 0}, {.key = "maxEntries", .where = &c.history.max_entries, .least = 0}})},
        {"frontend",
         table({{"dockerfile.v0", table({{"enabled", &c.frontend.dockerfile_enabled}})},
                {"gateway.v0", table({{"enabled", &c.frontend.gateway_enabled}, {"allowedRepositories", &c.frontend.allowed_repositories}})}})},
        {"system", table({{"platformsCacheMaxAge", &c.system.platforms_cache_max_age},
                          {.key = "maxRegistryConcurrency", .where = &c.system.max_registry_concurrency, .least = 1}})},
        {"cache",
         table({{"gha",
                 table({{"sign", table({{"command", &c.gha_cache.sign_command}})},
                        {"verify", table({{"required", &c.gha_cache.verify_required}, {"policy", free_table{&c.gha_cache.verify_policy}}})}})}})},
        {"worker", table({{"oci", table(oci_fields(c.oci))}, {"containerd", table(containerd_fields(c.containerd))}})},
        {"registry", registries_of(c.registries)},
    };
    return out;
}

}  // namespace cobuild::config

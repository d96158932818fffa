/// cobuild.config:tables: what a `buildkitd.toml` says, as plain data with its defaults.
///
/// One struct per table, members named after the keys (docs/configuration.md has the list). Deprecated spellings have no
/// member of their own: reading folds them into the key that replaced them.
module;
#include <chrono>
#include <compare>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

export module cobuild.config:tables;

import cobuild.base;

export namespace cobuild::config {

// ---------------------------------------------------------------- values

/// An amount of disk: bytes, or a percentage of the file system; both zero means "not set".
struct disk_space {
    std::uint64_t bytes = 0;
    unsigned percent = 0;
    [[nodiscard]] bool empty() const { return bytes == 0 && percent == 0; }
    /// In bytes on a file system of `total` bytes (0: unknown, then 2 GB). A percentage rounds up to whole gigabytes as
    /// BuildKit does: (total * percent / 100 / 2^30 + 1) * 10^9.
    [[nodiscard]] std::uint64_t resolve(std::uint64_t total) const;
    bool operator==(const disk_space&) const = default;
};

/// "1024", "40MB" (40 * 2^20), "10%"; throws errc::invalid.
disk_space parse_disk_space(std::string_view text);

enum class network_mode { automatic, cni, host, none, bridge };
std::string_view to_string(network_mode mode);

// ---------------------------------------------------------------- tables

struct log_table {
    log_format format = log_format::text;
    std::optional<log_level> level;  ///< also set by the deprecated `debug` and `trace`; unset: the program's own default
    bool operator==(const log_table&) const = default;
};

struct tls_table {
    std::string cert, key, ca;
    bool operator==(const tls_table&) const = default;
};

struct grpc_table {
    std::vector<std::string> address;  ///< empty: the default socket
    std::string debug_address;
    std::optional<std::int64_t> uid, gid;  ///< owner of the socket; unset: our own
    std::string group;                     ///< from --group: a name or number, over `gid`
    std::string security_descriptor;
    tls_table tls;
    bool operator==(const grpc_table&) const = default;
};

struct otel_table {
    std::string socket_path = "/run/buildkit/otel-grpc.sock";
    bool operator==(const otel_table&) const = default;
};

struct cdi_table {
    std::optional<bool> disabled;
    std::vector<std::string> spec_dirs{"/etc/cdi", "/var/run/cdi", "/etc/buildkit/cdi"};
    std::vector<std::string> auto_allowed;
    bool operator==(const cdi_table&) const = default;
};

/// What goes into the steps' resolv.conf instead of the host's values.
struct dns_table {
    std::vector<std::string> nameservers, options, search_domains;
    bool operator==(const dns_table&) const = default;
};

struct history_table {
    nanoseconds max_age = std::chrono::hours{48};
    std::int64_t max_entries = 50;
    bool operator==(const history_table&) const = default;
};

struct frontend_table {
    std::optional<bool> dockerfile_enabled, gateway_enabled;
    std::vector<std::string> allowed_repositories;  ///< image names without tag; empty: all
    bool operator==(const frontend_table&) const = default;
};

struct system_table {
    nanoseconds platforms_cache_max_age = std::chrono::seconds{20};  ///< negative: never looked up again
    std::int64_t max_registry_concurrency = 4;                       ///< connections per registry, at least 1
    bool operator==(const system_table&) const = default;
};

struct gha_cache_table {
    std::vector<std::string> sign_command;
    bool verify_required = false;
    std::map<std::string, std::string> verify_policy;
    bool operator==(const gha_cache_table&) const = default;
};

/// `[[worker.x.gcpolicy]]`. Filters are containerd's: items of the list are alternatives, commas inside one mean "and".
struct gc_policy {
    bool all = false;
    std::vector<std::string> filters;
    nanoseconds keep_duration{0};
    disk_space reserved_space, max_used_space, min_free_space;
    bool operator==(const gc_policy&) const = default;
};

struct gc_settings {
    bool enabled = true;                                        ///< `gc`
    disk_space reserved_space, max_used_space, min_free_space;  ///< all empty: see default_caps
    std::vector<gc_policy> policies;                            ///< not empty: they replace the default ones
    bool operator==(const gc_settings&) const = default;
};

/// `[worker.oci]` and what `[worker.containerd]` shares with it.
struct worker_table {
    std::optional<bool> enabled;  ///< unset: automatic
    std::map<std::string, std::string> labels;
    std::vector<std::string> platforms;  ///< "linux/amd64"; empty: detected
    std::string snapshotter = "auto";    ///< or "overlayfs", "native"
    bool rootless = false;
    gc_settings gc;
    network_mode network = network_mode::automatic;
    std::optional<std::string> cni_config_path;  ///< unset: /etc/buildkit/cni.json where that exists
    std::string cni_binary_path = "/opt/cni/bin";
    std::int64_t cni_pool_size = 0;
    std::string bridge_name = "buildkit0";
    std::string bridge_subnet = "10.10.0.0/16";
    std::string default_cgroup_parent, apparmor_profile;
    bool selinux = false;
    std::int64_t max_parallelism = 0;  ///< 0: unlimited
    bool operator==(const worker_table&) const = default;
};

struct oci_table : worker_table {
    std::string binary;  ///< runtime by name or path; empty: runc or crun from PATH
    bool no_process_sandbox = false;
    bool isolate_cgroups = false;
    std::string user_remap, proxy_snapshotter_path;
    std::map<std::string, std::string> stargz_snapshotter;
    bool operator==(const oci_table&) const = default;
};

struct containerd_table : worker_table {
    std::string address = "/run/containerd/containerd.sock";
    std::string containerd_namespace = "buildkit";
    std::string runtime_name = "io.containerd.runc.v2", runtime_path;
    std::map<std::string, std::string> runtime_options;
    bool operator==(const containerd_table&) const = default;
};

struct key_pair {
    std::string key, cert;
    bool operator==(const key_pair&) const = default;
};

/// `[registry."<domain>"]`; the domain is the one of the image reference ("docker.io" for the Hub).
struct registry_table {
    std::vector<std::string> mirrors;  ///< "[scheme://]host[:port][/path]"; the scheme is ignored
    std::optional<bool> http, insecure;
    std::vector<std::string> ca;  ///< PEM files added to the system's
    std::vector<key_pair> key_pairs;
    std::vector<std::string> tls_config_dirs;
    bool operator==(const registry_table&) const = default;
};

struct configuration {
    std::string root = "/var/lib/buildkit";
    std::vector<std::string> insecure_entitlements;  ///< "network.host", "security.insecure", "device"
    bool proxy_network = false;
    std::string provenance_env_dir = "/etc/buildkit/provenance.d";
    log_table log;
    grpc_table grpc;
    otel_table otel;
    cdi_table cdi;
    dns_table dns;
    history_table history;
    frontend_table frontend;
    system_table system;
    gha_cache_table gha_cache;
    oci_table oci;
    containerd_table containerd;
    std::map<std::string, registry_table> registries;
    bool operator==(const configuration&) const = default;
};

// ---------------------------------------------------------------- findings and flags

enum class severity { warning, error };

/// One finding. `where` is empty for a finding about the command line. The message begins with the key or flag.
struct diagnostic {
    severity level = severity::error;
    errc kind = errc::invalid;
    std::string message;
    std::optional<source_location> where;
    bool operator==(const diagnostic&) const = default;
};

struct worker_overrides {
    std::optional<std::string> enabled;              ///< "true", "false" or "auto"
    std::optional<std::vector<std::string>> labels;  ///< "k=v"; replace the file's
    std::optional<std::vector<std::string>> platforms;
    std::optional<std::string> snapshotter;
    std::optional<bool> rootless, gc;
    std::optional<std::string> gc_keep_storage;  ///< "Reserved[,Free[,Max]]" in units of 10^6 bytes
    std::optional<std::string> network;          ///< auto, cni, host, none or bridge
    std::optional<std::string> cni_config_path, cni_binary_dir;
    std::optional<std::int64_t> cni_pool_size;
    std::optional<std::string> apparmor_profile;
    std::optional<bool> selinux;
    std::optional<std::int64_t> max_parallelism;
    // --oci-worker-*
    std::optional<bool> no_process_sandbox;
    std::optional<std::string> binary, proxy_snapshotter_path;
    // --containerd-worker-*
    std::optional<std::string> address, containerd_namespace, runtime;
};

/// The flags of buildkitd that were given explicitly; lists replace the file's.
struct overrides {
    std::optional<bool> debug, trace, proxy_network, rootless;
    std::optional<std::string> root, log_format, log_level;
    std::optional<std::vector<std::string>> allow_insecure_entitlement;
    std::optional<std::vector<std::string>> addr;
    std::optional<std::string> group, debugaddr, tlscert, tlskey, tlscacert, otel_socket_path;
    std::optional<bool> cdi_disabled;
    std::optional<std::vector<std::string>> cdi_spec_dir;
    worker_overrides oci, containerd;
};

}  // namespace cobuild::config

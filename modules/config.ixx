/// cobuild.config: BuildKit's `buildkitd.toml` as typed values, the daemon's flags over it, and every mistake named.
///
/// Follows the file format of buildkitd (keys, defaults and deprecated spellings; docs/configuration.md lists them all).
/// Struct keys are found in any letter case, as go-toml does. What BuildKit ignores silently, an unknown key, is a
/// warning here. A key whose feature is not built yet is a warning, or an error where it restricts or isolates.
///
/// Errors: errc::invalid with file, line and key in it, errc::unsupported for a refused key. Every function is pure but
/// for load(), check() and default_path(), which read files and environment; all may be called from any thread.
/// Not its job: reading the TLS files it names, looking at disks, choosing a runtime or a network.
module;
#include <compare>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

export module cobuild.config;

import cobuild.base;
export import :tables;

export namespace cobuild::config {

// ---------------------------------------------------------------- reading

/// "FILE:LINE: error: message", as `cobuild config check` prints it.
std::string to_string(const diagnostic& finding);

struct loaded {
    configuration config;
    std::vector<diagnostic> warnings;
};

/// The configuration that `text` and the flags give. Throws the first mistake; `filename` is for messages only.
loaded parse(std::string_view text, std::string filename, const overrides& flags = {});
/// The same from a file. A missing file is the empty one unless `must_exist` (a path somebody named). Without root in a user
/// namespace the default root is $XDG_DATA_HOME/buildkit or ~/.local/share/buildkit.
loaded load(const std::filesystem::path& file, bool must_exist, const overrides& flags = {});
/// Every finding of a file, mistakes first by line; empty when it is in order. Never throws for what the file says.
std::vector<diagnostic> check(const std::filesystem::path& file);
std::vector<diagnostic> check_text(std::string_view text, std::string filename);

/// Where buildkitd looks: /etc/buildkit/buildkitd.toml, rootless $XDG_CONFIG_HOME or ~/.config + /buildkit/buildkitd.toml.
std::filesystem::path default_path();

/// The effective configuration as TOML that parse() reads back to an equal value: built keys always, others when set.
std::string to_toml(const configuration& config);

/// One row of docs/configuration.md.
struct key_description {
    std::string path;           ///< `worker.oci.max-parallelism`; a map's or array's element as `registry.<name>.http`
    std::string type;           ///< in words: "true or false", "an integer", "a list of strings"
    std::string value_default;  ///< as TOML, empty when unset
    std::string flag;           ///< without the value; empty when there is none
    enum class state { built, deprecated, warned, refused } built = state::built;
};
std::vector<key_description> describe_keys();

// ---------------------------------------------------------------- registries

/// How a registry endpoint is spoken to.
enum class transport {
    https,
    https_unverified,
    http,
    https_then_http,  ///< unverified https; http when the answer is not TLS (remembered by the registry module)
};

/// One endpoint to try, with the TLS settings of its own section.
struct registry_host {
    std::string host;         ///< with port where one was given: "registry-1.docker.io", "mirror:5000"
    std::string path_prefix;  ///< "/v2", or "/v2/path" for a mirror with a path
    transport scheme = transport::https;
    bool mirror = false;
    bool pull = true, resolve = true, push = true;  ///< mirrors never push
    std::vector<std::string> ca;
    std::vector<key_pair> key_pairs;
    std::vector<std::string> tls_config_dirs;
    bool operator==(const registry_host&) const = default;
};

/// Mirrors in the file's order, then the origin. `domain` is the image reference's.
std::vector<registry_host> hosts_for(const configuration& config, std::string_view domain);
/// True for localhost, 127.0.0.0/8 and ::1, with or without a port.
bool is_loopback(std::string_view host);

// ---------------------------------------------------------------- garbage collection

/// One rule in bytes; 0 and an empty duration mean "no limit of that kind". Rules are applied in order.
struct gc_rule {
    bool all = false;
    std::vector<std::string> filters;
    nanoseconds keep_duration{0};
    std::uint64_t reserved_space = 0, max_used_space = 0, min_free_space = 0;
    bool operator==(const gc_rule&) const = default;
};

/// The rules for a file system of `total_bytes` (0: unknown): the file's, else BuildKit's four; none when gc is off.
std::vector<gc_rule> gc_rules(const gc_settings& settings, std::uint64_t total_bytes);

}  // namespace cobuild::config

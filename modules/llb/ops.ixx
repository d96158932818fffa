/// cobuild.llb:ops: ops and definitions as plain data; see modules/llb.ixx. Field numbers stand in proto/ops.proto.
module;
#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

export module cobuild.llb:ops;

import cobuild.base;

export namespace cobuild::llb {

using bytes = std::string;

struct platform {
    std::string architecture;  ///< Go's names: amd64, arm64, arm, ...
    std::string os;
    std::string variant;  ///< v7, v8, ...
    std::string os_version;
    std::vector<std::string> os_features;
    bool operator==(const platform&) const = default;
};

/// Output `index` of a vertex.
struct input {
    digest vertex;
    std::int64_t index = 0;
    auto operator<=>(const input&) const = default;
};

inline constexpr std::int64_t scratch = -1;    ///< as an input index: nothing, an empty directory
inline constexpr std::int64_t no_output = -1;  ///< as an output index: the result is dropped

// ---------------------------------------------------------------- exec

struct host_ip {
    std::string host;
    std::string ip;
};
struct ulimit {
    std::string name;
    std::int64_t soft = 0;
    std::int64_t hard = 0;
};
struct proxy_env {
    std::string http, https, ftp, no, all;
};
struct exec_meta {
    std::vector<std::string> args;  ///< never empty
    std::vector<std::string> env;   ///< KEY=value
    std::string cwd;
    std::string user;  ///< as USER says it; empty is root
    std::optional<proxy_env> proxy;
    std::vector<host_ip> extra_hosts;
    std::string hostname;
    std::vector<ulimit> ulimits;
    std::string cgroup_parent;
    bool remove_mount_stubs_recursive = false;
    std::vector<std::int32_t> valid_exit_codes;  ///< empty: 0 only
};

enum class net_mode { sandbox, host, none };
enum class security_mode { sandbox, insecure };
enum class mount_type { bind, secret, ssh, cache, tmpfs };
enum class cache_sharing { shared, private_, locked };
enum class content_cache { standard, on, off };

struct tmpfs_opt {
    std::int64_t size = 0;  ///< bytes, 0: no limit
};
struct cache_opt {
    std::string id;
    cache_sharing sharing = cache_sharing::shared;
};
/// Of a secret or an ssh mount.
struct secret_opt {
    std::string id;
    std::uint32_t uid = 0;
    std::uint32_t gid = 0;
    std::uint32_t mode = 0;
    bool optional = false;
};
struct mount {
    std::int64_t input = 0;   ///< index into the op's inputs, or scratch
    std::string selector;     ///< the path inside the input that is mounted; empty: its root
    std::string dest;         ///< "/" is the root mount, which every exec has
    std::int64_t output = 0;  ///< the op's output that the mount's result becomes, or no_output
    bool readonly = false;
    mount_type type = mount_type::bind;
    std::optional<tmpfs_opt> tmpfs;
    std::optional<cache_opt> cache;
    std::optional<secret_opt> secret;
    std::optional<secret_opt> ssh;
    std::string result_id;  ///< gateway containers only
    content_cache content = content_cache::standard;
};
struct secret_env {
    std::string id;
    std::string name;
    bool optional = false;
};
struct cdi_device {
    std::string name;
    bool optional = false;
};
struct exec_op {
    exec_meta meta;
    std::vector<mount> mounts;
    net_mode network = net_mode::sandbox;
    security_mode security = security_mode::sandbox;
    std::vector<secret_env> secret_envs;
    std::vector<cdi_device> devices;
};

// ---------------------------------------------------------------- source, file, merge, diff, ...

/// `identifier` is "<scheme>://<what>": docker-image, local, git, http, https, oci-layout, ... with its attributes.
struct source_op {
    std::string identifier;
    std::map<std::string, std::string> attrs;
};

/// A name is looked up in /etc/passwd or /etc/group of input `input` (scratch: no look-up possible).
struct named_user {
    std::string name;
    std::int64_t input = 0;
};
using user_opt = std::variant<std::monostate, named_user, std::uint32_t>;
struct chown_opt {
    std::optional<user_opt> user;
    std::optional<user_opt> group;
};

/// Permission bits -1: as the source's. `timestamp` in ns since 1970, -1: as it comes.
struct copy_action {
    std::string src;
    std::string dest;  ///< a trailing slash means "into the directory"
    std::optional<chown_opt> owner;
    std::int32_t mode = -1;
    bool follow_symlink = false;
    bool dir_copy_contents = false;
    bool attempt_unpack = false;
    bool create_dest_path = false;
    bool allow_wildcard = false;
    bool allow_empty_wildcard = false;
    std::int64_t timestamp = -1;
    std::vector<std::string> include_patterns;
    std::vector<std::string> exclude_patterns;
    bool always_replace_existing = false;
    std::string mode_str;  ///< chmod(1)'s symbolic form, instead of `mode`
    std::vector<std::string> required_paths;
};
struct mkfile_action {
    std::string path;
    std::int32_t mode = 0;
    bytes data;
    std::optional<chown_opt> owner;
    std::int64_t timestamp = -1;
};
struct mkdir_action {
    std::string path;
    std::int32_t mode = 0;
    bool make_parents = false;
    std::optional<chown_opt> owner;
    std::int64_t timestamp = -1;
};
struct rm_action {
    std::string path;
    bool allow_not_found = false;
    bool allow_wildcard = false;
};
struct symlink_action {
    std::string oldpath;
    std::string newpath;
    std::optional<chown_opt> owner;
    std::int64_t timestamp = -1;
};
/// Index i below the number n of the op's inputs is that input; i >= n is the result of action i-n, an earlier one.
struct file_action {
    std::int64_t input = 0;             ///< what is changed, or scratch
    std::int64_t secondary_input = -1;  ///< what is copied from, or scratch
    std::int64_t output = no_output;
    std::variant<std::monostate, copy_action, mkfile_action, mkdir_action, rm_action, symlink_action> what;
};
struct file_op {
    std::vector<file_action> actions;
};

/// Later inputs lie on top. Indexes into the op's inputs.
struct merge_op {
    std::vector<std::int64_t> inputs;
};
struct diff_op {
    std::int64_t lower = scratch;
    std::int64_t upper = scratch;
};
/// Passes inputs on as outputs, for their order's sake.
struct passthrough_op {
    std::string id;
    std::vector<std::int64_t> outputs;
};

struct definition;
/// Builds the definition found in an input (or given here); `builder` is scratch for LLB itself.
struct build_op {
    std::int64_t builder = 0;
    std::map<std::string, std::int64_t> inputs;
    std::shared_ptr<const definition> def;
    std::map<std::string, std::string> attrs;
};

struct worker_constraints {
    std::vector<std::string> filter;
};

using operation = std::variant<std::monostate, exec_op, source_op, file_op, build_op, merge_op, diff_op, passthrough_op>;

struct op {
    std::vector<input> inputs;
    operation what;
    /// Set for exec, image and oci-layout sources only: the others give the same on every platform.
    std::optional<struct platform> platform;
    /// Present though empty in every op BuildKit's client makes, and so in ours.
    std::optional<worker_constraints> constraints = worker_constraints{};
};

// ---------------------------------------------------------------- definition

struct progress_group {
    std::string id;
    std::string name;
    bool weak = false;
};
struct linux_resources {
    std::int64_t memory = 0;
    std::int64_t memory_swap = 0;
    std::uint64_t cpu_shares = 0;
    std::uint64_t cpu_period = 0;
    std::int64_t cpu_quota = 0;
    std::string cpuset_cpus;
    std::string cpuset_mems;
};
/// What is known of a vertex beside its name. `description["llb.customname"]` is what progress shows.
struct op_metadata {
    bool ignore_cache = false;
    std::map<std::string, std::string> description;
    std::optional<bool> export_cache;
    std::map<std::string, bool> caps;
    std::optional<struct progress_group> progress_group;
    std::optional<struct linux_resources> linux_resources;
};
inline constexpr std::string_view custom_name = "llb.customname";

struct position {
    std::int32_t line = 0;  ///< from 1
    std::int32_t character = 0;
};
struct range {
    position start;
    position end;
};
struct location {
    std::int32_t source_index = 0;
    std::vector<range> ranges;
};
struct locations {
    std::vector<location> list;
};
struct source_info {
    std::string filename;
    bytes data;
    std::shared_ptr<const llb::definition> definition;
    std::string language;
};
/// Where in the user's files a vertex comes from.
struct source_map {
    std::map<digest, llb::locations> locations;
    std::vector<source_info> infos;
};

struct definition {
    std::vector<bytes> ops;
    std::map<digest, op_metadata> metadata;
    std::optional<source_map> source;
};

}  // namespace cobuild::llb

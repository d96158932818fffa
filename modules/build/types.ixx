/// Partition of cobuild.build: what the engine is asked, and what it answers. See build.ixx.
module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <boost/asio/awaitable.hpp>

export module cobuild.build:types;

import cobuild.base;
import cobuild.async;
import cobuild.session;

export namespace cobuild::build {

enum class pull_mode {
    missing,  ///< ask the registry about a tag (one HEAD), pull what is not here
    always,   ///< the same, and never take an image that was built here
    never,    ///< use only what is here
};

/// The files of a result, a directory's descriptor. `name` is empty, or of several platforms "linux_amd64" and so on.
struct result_tree {
    std::string name;
    int fd = -1;
    std::optional<std::int64_t> epoch;  ///< times of files are to be this; seconds since 1970
};

/// Where a result goes: BuildKit's exporters by name (image, oci, docker, local, tar, registry) and their attributes.
struct output {
    std::string type;
    std::map<std::string, std::string> attributes;
    int fd = -1;  ///< for oci, docker and tar: write here instead of attributes["dest"]; stays the caller's
    /// For local: gets the files instead of attributes["dest"]; the descriptors are open until it has ended.
    std::function<async::task<void>(std::vector<result_tree>)> receive;
    /// For oci and docker with tar=false: gets the image's blobs instead of a layout in attributes["dest"].
    std::shared_ptr<session::blob_store> blobs{};
    bool lenient = false;  ///< attributes that are not known are passed over, as BuildKit does, instead of refused
};

/// One --cache-to or --cache-from: BuildKit's kinds by name (registry, local, inline) and their attributes; its CacheOptionsEntry.
struct cache_entry {
    std::string type;
    std::map<std::string, std::string> attributes;
};

/// A secret's bytes, asked for by each step that mounts it. Never stored, logged or part of a cache key.
struct secret_source {
    std::string id;
    std::filesystem::path file;  ///< read when first needed
    std::string environment;     ///< or the name of an environment variable
};

/// One build, in docker buildx's terms.
struct build_request {
    std::filesystem::path context;  ///< a directory, read in place
    /// Instead of `context`: a git repository ("https://host/x.git#ref:subdir", "git@host:x.git"), or the URL of an archive or
    /// of a Dockerfile. `dockerfile` is then a path inside it.
    std::string remote_context;
    /// Instead of `context`: read to its end, an archive (tar, plain or compressed) or a Dockerfile. Stays the caller's.
    int context_stream = -1;
    std::filesystem::path dockerfile;            ///< empty: Dockerfile in the context; relative: to the working directory
    std::optional<std::string> dockerfile_text;  ///< the Dockerfile itself, instead of a file
    std::string target;
    std::vector<std::string> tags;
    std::map<std::string, std::string> build_args;
    std::map<std::string, std::string> labels;
    std::vector<std::string> platforms;  ///< empty: this machine's; several: one image for each, and an index over them
    /// Attestations by kind ("provenance") with their parameters ("mode=max,version=v1").
    std::map<std::string, std::string> attests;
    bool no_cache = false;
    std::vector<std::string> no_cache_stages;  ///< --no-cache-filter
    pull_mode pull = pull_mode::missing;
    std::string network;                 ///< default, none, host
    std::vector<std::string> add_hosts;  ///< "name:address"
    std::uint64_t shm_size = 0;          ///< bytes; 0: 64 MiB
    std::vector<std::string> ulimits;    ///< "name=soft[:hard]"
    std::string cgroup_parent;
    std::vector<secret_source> secrets;
    std::vector<std::string> allow;  ///< entitlements of this build: network.host, security.insecure
    /// --build-context: by name a directory, a git repository, a URL, "docker-image://REF" or "oci-layout://DIRECTORY[:TAG]".
    std::map<std::string, std::string> build_contexts;
    std::map<std::string, std::filesystem::path> ssh_agents;  ///< sockets by id, for RUN --mount=type=ssh and git over ssh
    std::vector<output> outputs;                              ///< empty: the image is built and kept, nothing is exported
    std::optional<std::int64_t> source_date_epoch;
    std::vector<cache_entry> cache_from;  ///< looked into before a step runs; one that cannot be had is a warning
    std::vector<cache_entry> cache_to;    ///< written after the outputs
    std::string source_policy;            ///< JSON of a source policy; empty: every source may be used
    bool push = false;                    ///< push every tag after the image was stored
    std::string name;                     ///< shown in progress, for example the context as the user typed it
};

struct build_result {
    std::string image_digest;   ///< of the manifest
    std::string config_digest;  ///< docker's image id
    std::uint64_t size = 0;     ///< of all layers as stored, in bytes
    std::vector<std::string> names;
    std::vector<std::string> images;                       ///< descriptors (JSON) of what the outputs that are images made, in the outputs' order
    std::map<std::string, std::string> exporter_response;  ///< BuildKit's keys, as --metadata-file holds them
    std::size_t steps = 0;
    std::size_t cached_steps = 0;
    /// A job's, when it is recorded: SLSA provenance by platform (of a single result the key is empty), as JSON.
    std::map<std::string, std::string> provenance{};
};

/// What can be asked about a build without doing it. Base images are looked up, nothing else is fetched or run.
enum class question {
    check,    ///< the build checks, of every stage when no target is named
    outline,  ///< build arguments, secrets and agents that the target takes
    targets,  ///< the stages
    graph,    ///< the LLB graph
};
struct answer {
    std::string text;              ///< for people; of the graph: Graphviz
    std::string json;              ///< BuildKit's result.json; of the graph: one JSON object a line
    int status = 0;                ///< 1: checks found something, or the file cannot be built
    std::optional<error> problem;  ///< check: why the file cannot be built
};

struct image_info {
    std::string name;
    std::string digest;
    std::string config_digest;
    std::uint64_t size = 0;
    std::chrono::sys_time<nanoseconds> created;
};

/// One row of `cobuild du`.
struct usage_info {
    std::string id;
    std::string kind;  ///< BuildKit's record types: regular, source.local, exec.cachemount, internal, frontend
    std::string description;
    std::uint64_t size = 0;
    bool in_use = false;
    bool shared = false;
    bool mutable_ = false;
    std::chrono::sys_time<nanoseconds> created;
    std::chrono::sys_time<nanoseconds> last_used;
    std::uint64_t usage_count = 0;
    std::vector<std::string> parents;
};

/// A blob of the content store.
struct blob_info {
    std::string digest;
    std::uint64_t size = 0;
};

/// A moment of the engine, for monitoring.
struct activity {
    /// Sockets to the hosts of one registry.
    struct registry {
        std::string domain;
        std::size_t open = 0, peak = 0;  ///< now, and the most there ever were
        std::size_t waiting = 0;         ///< calls that wait for a slot
    };
    std::vector<registry> registries;
    /// What every vertex that is not finished waits for, a line each.
    std::string waits;
};

struct prune_options {
    bool all = false;                       ///< also what images built here are made of
    nanoseconds keep_duration{0};           ///< keep what was used since
    std::optional<std::uint64_t> max_used;  ///< stop when no more than this is used
    std::optional<std::uint64_t> reserved;  ///< always keep this much
    std::optional<std::uint64_t> min_free;  ///< remove until this much of the disk is free
    std::vector<std::string> filters;
};

}  // namespace cobuild::build

/// cobuild.frontend:types: what a conversion is asked, and what it gives.
module;
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

export module cobuild.frontend:types;

import cobuild.base;
import cobuild.llb;
import cobuild.oci;
import cobuild.gateway;

export namespace cobuild::frontend {

/// The options of one build, BuildKit's frontend attributes in types.
struct request {
    std::string dockerfile;                          ///< its text
    std::string dockerfile_name = "Dockerfile";      ///< for messages and progress
    std::optional<std::string> ignore_file;          ///< the text of the ignore file that counts, if there is one
    std::string ignore_file_name = ".dockerignore";  ///< for messages
    std::map<std::string, std::string> build_args;   ///< including those with a meaning, as SOURCE_DATE_EPOCH
    std::string target;                              ///< a stage's name; empty: the last
    std::map<std::string, std::string> labels;       ///< written last, they win
    /// Empty: the build platform, and the image keeps the platform its base states.
    std::optional<oci::platform> target_platform;
    oci::platform build_platform;  ///< this machine's
    /// Other platforms whose steps this machine can run, because the kernel has an emulator for them.
    std::vector<oci::platform> emulated;
    bool any_platform = false;    ///< steps of other platforms are not refused: whether they run shows when they do
    bool multi_platform = false;  ///< names of vertices then carry the platform
    bool no_cache = false;
    std::vector<std::string> no_cache_stages;  ///< lower case; --no-cache-filter
    llb::net_mode network = llb::net_mode::sandbox;
    std::vector<llb::host_ip> extra_hosts;
    std::int64_t shm_size = 0;  ///< bytes; 0: the runtime's default
    std::vector<llb::ulimit> ulimits;
    std::string hostname;
    std::string cgroup_parent;
    std::optional<llb::linux_resources> resources;
    gateway::resolve_mode resolve = gateway::resolve_mode::standard;
    /// The local source the build context is: "local://<context_name>".
    std::string context_name = "context";
    std::string shared_key_hint;  ///< contextkey; empty: context_name
    /// The context when it is no directory of the client: a git repository, or a file to be unpacked.
    std::optional<llb::source_op> remote_context;
    /// `remote_context` is one file of this name, which is unpacked when it is an archive; empty: a tree.
    std::string context_archive;
    /// Only this directory of the context, when that is no directory of the client.
    std::string context_subdir;
    /// The client's directory that holds the Dockerfile.
    std::string dockerfile_context = "dockerfile";
    /// Named contexts by name (or name::platform): "docker-image://...", "oci-layout://STORE:TAG", "local:NAME" (a directory
    /// of the client), "input:NAME", a git repository or a URL (unpacked when it is an archive). Only those that are needed are
    /// looked at.
    std::map<std::string, std::string> named_contexts;
    /// Graphs by name, of "input:NAME" in named_contexts; "context" is the build context itself. Empty ones are empty roots.
    std::map<std::string, llb::definition> inputs;
    /// What is known of inputs, by their name: a JSON object of result metadata, its values in base64.
    std::map<std::string, std::string> input_metadata;
    /// "local-sessionid:NAME": the session whose directory NAME is, where that is not the build's own.
    std::map<std::string, std::string> local_sessions;
    /// The graph that the Dockerfile was read from, for who shows the source; none: it is read from the client's directory.
    std::shared_ptr<const llb::definition> dockerfile_graph;
};

/// A remark that does not stop the build. Level 1 of BuildKit's vertex warnings.
struct warning {
    std::string rule;     ///< UndefinedVar, CopyIgnoredFile, ...
    std::string message;  ///< one sentence, as BuildKit's linter words it
    std::string detail;   ///< what the rule is about, the same for each finding
    std::string url;
    source_location where;
    unsigned last_line = 0;
};

struct base_image {
    std::string reference;  ///< as the Dockerfile names it, normalised
    std::string resolved;   ///< with the digest
    std::optional<digest> manifest;
};

struct result {
    llb::definition graph;  ///< no ops at all: the result is an empty root
    /// OCI image configuration with Docker's additions, history included (its `created` is left out for the exporter
    /// unless SOURCE_DATE_EPOCH fixes it); rootfs.diff_ids and created are the exporter's.
    std::string image_config;
    /// The base's configuration as it was, for the exporter's provenance and `containerimage.base.config`; empty: scratch.
    std::string base_config;
    oci::platform platform;  ///< the image's
    std::vector<warning> warnings;
    std::vector<std::string> stages;    ///< names of all stages, "" for one without
    std::vector<base_image> bases;      ///< those that were resolved
    std::optional<std::int64_t> epoch;  ///< SOURCE_DATE_EPOCH, seconds
    bool ignore_cache = false;          ///< the target's stage is built without cache
};

// ---------------------------------------------------------------- sub-requests

/// What a stage and those below it can be given, in the order of lines.
struct outline_arg {
    std::string name, value, description;
    unsigned first_line = 0, last_line = 0;
};
struct outline_demand {  ///< a secret or an ssh agent
    std::string name;
    bool required = false;
    unsigned first_line = 0, last_line = 0;
};
struct outline {
    std::string name, description;
    std::vector<outline_arg> args;
    std::vector<outline_demand> secrets, ssh;
};

/// A stage as `--call=targets` lists it.
struct target {
    std::string name;
    std::string base;
    std::string platform;
    std::string description;
    bool is_default = false;
    unsigned line = 0;
};

/// A sub-request's result in BuildKit's terms, and as the command line shows it.
struct answer {
    std::string json;              ///< result.json
    std::string text;              ///< result.txt
    std::string plain;             ///< as `text`, with plain help in place of links
    int status = 0;                ///< result.statuscode: 1 when checks found something or the file cannot be built
    std::optional<error> problem;  ///< check: why the file cannot be built
};

}  // namespace cobuild::frontend

/// cobuild.client: the client's side of BuildKit's API: what `buildctl` is made of, for any daemon that speaks it.
///
/// Words. A **session** is what a client lends the daemon for one build: directories, secrets, ssh agents, logins, OCI
/// layouts, and the places where results go. It is a gRPC server of ours on a byte pipe through Control.Session, so the
/// daemon asks and we answer. A build goes the **gateway way**, as buildctl's and buildx' do: Control.Solve without a
/// frontend opens it, LLBBridge.Solve names the frontend or graph, LLBBridge.Return hands the result over for exporting.
///
/// Threads: everything on one executor's thread (a runtime's io thread); files are read and written on the pool.
/// Errors: cobuild::error with the daemon's own sentence; `failed to solve: ...` for a failed build. Cancelling a call
/// cancels it at the daemon. Not its job: flags, drawing, printing.
module;
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

export module cobuild.client;

import cobuild.base;
import cobuild.async;
import cobuild.rpc;
import cobuild.progress;

export namespace cobuild::client {

using attributes = std::map<std::string, std::string>;

// ---------------------------------------------------------------- reaching a daemon

struct endpoint {
    std::string address;                         ///< unix:///path or tcp://host:port
    std::filesystem::path ca, certificate, key;  ///< PEM files; with any of them the connection is TLS
    std::string server_name;                     ///< expected in the certificate; empty: the address' host
};
/// ca.pem, cert.pem and key.pem of a directory, or Kubernetes' names for them. Throws errc::not_found naming the missing.
void use_tls_directory(endpoint& e, const std::filesystem::path& dir);
/// Reads the TLS files; connects when first used. Throws errc::invalid for an address of an unknown form.
std::shared_ptr<rpc::channel> dial(async::executor ex, const endpoint& e);

// ---------------------------------------------------------------- asking a daemon

struct usage {
    std::string id;
    bool is_mutable = false, in_use = false, shared = false;
    std::int64_t size = 0, usage_count = 0;
    std::optional<progress::time_point> created, last_used;
    std::vector<std::string> parents;
    std::string description, record_type;
};
struct version_info {
    std::string package, version, revision, dockerfile;
};
struct platform {
    std::string os, architecture, variant, os_version;
    std::vector<std::string> os_features;
};
struct gc_rule {
    bool all = false;
    std::vector<std::string> filters;
    nanoseconds keep_duration{0};
    std::int64_t reserved = 0, max_used = 0, min_free = 0;  ///< bytes
};
struct worker {
    std::string id;
    attributes labels;
    std::vector<platform> platforms;
    std::vector<gc_rule> gc;
    version_info version;
};
struct prune_request {
    std::vector<std::string> filters;
    bool all = false;
    nanoseconds keep_duration{0};
    std::int64_t reserved = 0, max_used = 0, min_free = 0;  ///< bytes
};
enum class history_kind { started, complete, deleted };
struct history_event {
    history_kind kind = history_kind::started;
    std::string ref, frontend, error;
    attributes frontend_attributes;
    std::optional<progress::time_point> created, completed;
    std::int32_t generation = 0;
    bool pinned = false;
    std::int32_t cached_steps = 0, total_steps = 0, completed_steps = 0, warnings = 0;
    std::string trace;  ///< digest of the blob with its trace; empty: none
};
struct history_change {
    std::string ref;
    bool pinned = false, remove = false, finalize = false;
};

using channel_ptr = std::shared_ptr<rpc::channel>;

async::task<std::vector<usage>> disk_usage(channel_ptr to, std::vector<std::string> filters);
/// `removed` is told of every record as it goes.
async::task<void> prune(channel_ptr to, prune_request what, std::function<void(const usage&)> removed);
async::task<std::vector<worker>> workers(channel_ptr to, std::vector<std::string> filters);
async::task<version_info> info(channel_ptr to);
/// What is known now; with `follow` also what comes, until cancelled. `ref` empty: all.
async::task<void> histories(channel_ptr to, std::string ref, bool follow, std::function<void(const history_event&)> each);
async::task<void> change_history(channel_ptr to, history_change what);
/// A blob of the daemon's content store, piece by piece.
async::task<void> read_blob(channel_ptr to, digest which, std::function<void(std::string_view)> piece);
/// The events of a build that runs, or of a finished one in the history, to its end.
async::task<void> watch(channel_ptr to, std::string ref, std::shared_ptr<progress::sink> sink);

// ---------------------------------------------------------------- what a client lends

struct secret {
    std::filesystem::path file;  ///< else
    std::string environment;     ///< a variable of this process
};
/// Where the result of output number `id` (in the request's order) goes: a directory, a file, or an open descriptor.
struct target {
    std::filesystem::path directory;
    std::filesystem::path file;
    int fd = -1;
    bool mirror = false;  ///< of a directory: remove what the result does not have
};
struct login {
    std::string username;
    std::string secret;  ///< a password, or with an empty user name an identity token
};
struct session_options {
    std::map<std::string, std::filesystem::path> directories;
    std::map<std::string, secret> secrets;
    std::map<std::string, std::string> ssh_agents;             ///< paths of sockets by id
    std::map<std::string, std::filesystem::path> oci_layouts;  ///< by store id ("oci:NAME", "local:DIR"); read only
    /// Layout directories that the daemon may write blobs to, and read them from, by store id ("local:DIR", "export"); made
    /// when the first blob comes. Their index.json is the client's to write: note_in_layout().
    std::map<std::string, std::filesystem::path> stores;
    std::map<int, target> targets;
    std::map<std::string, std::string> uploads;  ///< contents by url path (Upload/Pull)
    /// The login for a registry's host, or nothing; may be empty.
    std::function<async::task<std::optional<login>>(std::string host)> logins;
};

/// The services of a session by themselves: what rpc::server calls. Every handler checks what it is asked for against
/// the options and gives nothing else.
class session {
public:
    session(async::executor ex, async::blocking_pool& pool, session_options options);
    ~session();
    session(const session&) = delete;
    session& operator=(const session&) = delete;
    [[nodiscard]] const std::string& id() const noexcept;
    /// The paths of the methods it serves, as Control.Session's headers list them.
    [[nodiscard]] std::vector<std::string> methods() const;
    [[nodiscard]] rpc::handler handler() const;
    /// Serves a daemon through Control.Session until it closes the session or this is cancelled; nothing is left running.
    async::task<void> run(channel_ptr to);

private:
    struct state;
    std::shared_ptr<state> state_;
};

/// A name in a layout: a tag, or an image's full name.
struct layout_name {
    std::string name;
    bool image = false;
};
/// Names a manifest (its descriptor, JSON) in a layout's index.json; others of these names go. With `reset` also the blobs that
/// no entry needs. Blocks.
void note_in_layout(const std::filesystem::path& directory, const std::string& descriptor, const std::vector<layout_name>& names, bool reset);

// ---------------------------------------------------------------- building

struct exporter {
    std::string type;
    attributes attrs;
};
struct cache_entry {
    std::string type;
    attributes attrs;
};
struct build_request {
    std::string ref;       ///< names the build in the daemon; empty: a random one
    std::string frontend;  ///< empty: `definition` is built
    attributes frontend_attrs;
    std::string definition;  ///< a marshalled llb.Definition
    std::vector<exporter> exporters;
    std::vector<cache_entry> cache_exports, cache_imports;
    std::vector<std::string> entitlements;
    std::string source_policy;  ///< JSON of a source policy, or empty
    bool internal = false;      ///< not kept in the history
    bool proxy_network = false;
    bool direct = false;  ///< by Control.Solve alone, not the gateway way
    session_options lends;
};
struct build_result {
    attributes exporter_response;
    std::map<std::string, std::string> metadata;  ///< of the result; a sub-request's answer ("result.txt") among it
};
/// A place in a file of the build's own that an error is about, with the file's text.
struct source_excerpt {
    std::string file, text;
    std::vector<std::pair<int, int>> lines;  ///< first and last, from 1
};
/// What a failed build's status carries beside its sentence.
struct failure_details {
    std::vector<source_excerpt> sources;
};
failure_details details_of(const rpc::status& s);
/// Lines of the excerpt around the place, marked, as BuildKit's clients show them; empty when it names no lines of it.
std::string render(const source_excerpt& e);

/// Builds, and tells `sink` what the daemon tells. `failed` is called with the daemon's status before the error is thrown.
async::task<build_result> build(channel_ptr to, async::blocking_pool& pool, build_request request, std::shared_ptr<progress::sink> sink,
                                std::function<void(const rpc::status&)> failed = {});

}  // namespace cobuild::client

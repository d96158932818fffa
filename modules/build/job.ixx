/// Partition of cobuild.build: one client's build, driven from outside step by step. The daemon's Solve and LLBBridge calls
/// are made of it; who builds a Dockerfile in one go wants engine::build().
///
/// A *ref* is a result that may not have been brought about yet: asking for its files, or exporting it, runs what is
/// missing. What a ref came to stays as long as the ref, whatever is pruned meanwhile.
///
/// Thread safety: everything on the engine's io thread (engine::runtime()). Cancelling the awaiting task ends the steps that
/// nobody else waits for.
module;
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

export module cobuild.build:job;

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import cobuild.gateway;
import cobuild.llb;
import cobuild.oci;
import cobuild.policy;
import cobuild.progress;
import cobuild.registry;
import cobuild.session;
import :types;

export namespace cobuild::build {

/// A file of a result.
struct file_entry {
    std::string name;  ///< the last part of its path
    fs::file_info info;
    std::string link;  ///< of a symbolic link
};

class ref {
public:
    virtual ~ref() = default;
    [[nodiscard]] virtual const llb::definition& definition() const noexcept = 0;
    virtual async::task<void> evaluate() = 0;
    /// Links are followed, never out of the root. `length` 0: to the end. At most 16 MiB.
    virtual async::task<std::string> read_file(std::string path, std::uint64_t offset, std::uint64_t length) = 0;
    /// In the order of names; `include` is a pattern for names, empty: all.
    virtual async::task<std::vector<file_entry>> read_directory(std::string path, std::string include) = 0;
    virtual async::task<file_entry> stat(std::string path) = 0;
};

/// What a frontend attests of a result: the file of a ref is the predicate, or (a bundle) every file of a directory is a
/// statement as a whole.
struct attested_ref {
    bool bundle = false;
    std::shared_ptr<build::ref> ref;
    std::string path;
    std::string predicate_type;  ///< of a bundle: what each of its files must have; empty: any
    struct subject {
        bool self = true;
        std::string name;
        std::vector<std::string> digests;
    };
    std::vector<subject> subjects;  ///< empty: the result itself
    std::map<std::string, std::string> metadata;
};

/// What a frontend gives: one ref, or (a map) one for each platform; a null ref is an empty root. `metadata` as BuildKit
/// names it: containerimage.config[/PLATFORM], refs.platforms, ...
struct job_result {
    std::map<std::string, std::shared_ptr<ref>> refs;  ///< of a single one the key is empty
    bool map = false;
    std::map<std::string, std::string> metadata;
    std::map<std::string, std::vector<attested_ref>> attestations;  ///< by the key of a ref
};

/// Decides about a source that the policies leave: another one to be used in its place, or nothing. Throws what refuses it.
using source_verifier = std::function<async::task<std::optional<llb::source_op>>(llb::source_op what, std::optional<llb::platform> platform)>;

struct job_options {
    std::string id;                                        ///< of the build, as its client named it
    std::shared_ptr<session::session> client;              ///< files, secrets, agents; none: an empty one
    std::shared_ptr<const registry::login> who;            ///< none: the engine's own logins
    std::vector<std::string> allow;                        ///< entitlements granted: network.host, security.insecure
    std::map<std::string, std::filesystem::path> layouts;  ///< OCI layouts of the client by store id
    std::shared_ptr<progress::sink> sink;
    std::vector<cache_entry> cache_to;  ///< exported by finish()
    /// The request as it came: the frontend (empty: the client runs it itself), its attributes, among which stands what is to be
    /// attested, and its inputs.
    std::string frontend{};
    std::map<std::string, std::string> attrs;
    std::map<std::string, llb::definition> inputs{};
    bool recorded = false;                 ///< provenance is made for a record of the build, whatever is to be attested
    std::vector<policy::policy> policies;  ///< asked about every source
    source_verifier verify;                ///< asked after them, at most 10 times a source; none: all may be used
    bool local_caches_of_client = false;   ///< caches of type local are in the client's stores, never in directories here
};

// ---------------------------------------------------------------- containers

/// A root and mounts to run processes on. What they write is dropped with the container.
struct container_request {
    std::string id;  ///< as its client named it
    std::vector<llb::mount> mounts;
    std::vector<std::shared_ptr<ref>> refs;  ///< by mount; null: an empty directory
    llb::net_mode network = llb::net_mode::sandbox;
    std::string hostname;
    std::vector<llb::host_ip> extra_hosts;
    std::string os;  ///< of its platform; decides the default PATH
};

struct process_request {
    std::vector<std::string> args, env;
    std::vector<llb::secret_env> secret_envs;
    std::string cwd, user;
    bool terminal = false;
    int security = 0;  ///< BuildKit's numbers: 0 sandbox, 1 insecure
    bool remove_stubs_recursively = false;
    std::function<async::task<void>(std::string)> out, err;  ///< awaited before more is read; of a terminal all goes to `out`
    unique_fd in;                                            ///< its input, to the end
    unique_fd direct_out;                                    ///< instead of `out`
};

class container_process {
public:
    virtual ~container_process() = default;
    /// It runs, or has ended.
    virtual async::task<void> started() = 0;
    /// Its exit code, 128 + signal where one ended it. Throws what kept it from running; errc::canceled after release().
    virtual async::task<int> wait() = 0;
    virtual async::task<void> signal(int number) = 0;
    virtual void resize(unsigned rows, unsigned columns) = 0;
};

/// The first process is the container's own: with it every other ends. It must be released.
class container {
public:
    virtual ~container() = default;
    /// Throws errc::not_found for a secret that is missing; whatever else goes wrong is told by the process' wait().
    virtual async::task<std::shared_ptr<container_process>> start(process_request what) = 0;
    /// Kills what runs and waits for it. Throws, when all is done, the first failure of its processes, a kill by this among them.
    virtual async::task<void> release() = 0;
    /// Files of the n-th mount, as ref has them; links are followed by stat() too.
    virtual async::task<std::string> read_file(std::size_t mount, std::string path, std::uint64_t offset, std::uint64_t length) = 0;
    virtual async::task<std::vector<file_entry>> read_directory(std::size_t mount, std::string path, std::string include) = 0;
    virtual async::task<file_entry> stat(std::size_t mount, std::string path) = 0;
};

// ---------------------------------------------------------------- frontends

class job;
/// A frontend that is not built in, by its image.
struct frontend_request {
    std::string image;
    std::map<std::string, std::string> attrs;
    std::map<std::string, llb::definition> inputs;
};
/// Runs such frontends; see engine::run_frontends_with().
using frontend_runner = std::function<async::task<job_result>(std::shared_ptr<job>, frontend_request)>;

class job {
public:
    virtual ~job() = default;
    /// A ref of what the definition's terminal names; null for an empty definition. Nothing runs yet. `policies` are asked before
    /// the job's.
    virtual std::shared_ptr<ref> define(llb::definition what, std::vector<policy::policy> policies = {}) = 0;
    /// "dockerfile.v0" (also by the name gateway.v0 with that source) with BuildKit's attributes; sub-requests are answered in
    /// the metadata. "gateway.v0" with another source, and a Dockerfile whose syntax directive names another image, go to the
    /// engine's frontend_runner. Throws errc::unsupported for any other frontend, errc::permission for one that is switched off.
    virtual async::task<job_result> run_frontend(std::string name, std::map<std::string, std::string> attrs,
                                                 std::map<std::string, llb::definition> inputs) = 0;
    /// Caches that are looked into from now on, as --cache-from names them; one that cannot be had is a warning.
    virtual void import_caches(std::vector<cache_entry> from) = 0;
    virtual async::task<gateway::image_config> resolve_image(gateway::resolve_request request) = 0;
    /// What the policies, and with `verify` the verifier too, make of a source; `platform` is of an image.
    virtual async::task<llb::source_op> check_source(llb::source_op what, std::optional<llb::platform> platform, std::vector<policy::policy> policies,
                                                     bool verify) = 0;
    /// What a git or http source is now; `name` is what progress shows.
    struct source_facts {
        std::string checksum, commit, ref, filename, commit_object, tag_object;  ///< see ops::source_facts
        std::int64_t modified = 0;
    };
    virtual async::task<source_facts> resolve_source(llb::source_op what, std::string name, bool objects = false) = 0;
    /// Brings every ref about and hands it to the exporters. Without outputs only the former.
    virtual async::task<build_result> finish(job_result what, std::vector<output> outputs) = 0;
    virtual void warn(progress::warning what) = 0;
    /// Brings its refs about and opens its mounts; released before the job ends.
    virtual async::task<std::shared_ptr<container>> open_container(container_request what) = 0;

    /// The step whose failure ended a call last, and where it comes from.
    struct failure_source {
        llb::source_info file;
        std::vector<llb::range> ranges;
    };
    struct failure {
        std::optional<digest> vertex;  ///< empty: the frontend did, for the text of a file
        llb::bytes op;
        std::map<std::string, std::string> description;
        std::vector<failure_source> sources;
        /// What a client asked for and the frontend does not know, by BuildKit's kind: "Subrequest" or "FrontendCap".
        std::string unknown_kind{}, unknown_name{};
        /// What the step had and what it left, for who wants to look into it; null where there is nothing. Of a command by mount; of file
        /// actions by input and by action.
        std::vector<std::shared_ptr<ref>> inputs{}, mounts{};
        std::optional<std::size_t> action{};  ///< the file action that failed
        std::optional<std::size_t> unread{};  ///< the input whose content could not be read: the one in `inputs`
    };
    [[nodiscard]] virtual const std::string& id() const noexcept = 0;
    [[nodiscard]] virtual std::optional<failure> failed() const = 0;
    /// What was told of it once is not told of the next failure.
    virtual void forget_failure() = 0;
};

}  // namespace cobuild::build

/// Partition of cobuild.build: one client's build, driven from outside step by step. The daemon's Solve and LLBBridge calls
/// are made of it; who builds a Dockerfile in one go wants engine::build().
///
/// A *ref* is a result that may not have been brought about yet: asking for its files, or exporting it, runs what is
/// missing. What a ref came to stays as long as the ref, whatever is pruned meanwhile.
///
/// Thread safety: everything on the engine's io thread (engine::runtime()). Cancelling the awaiting task ends the steps that
/// nobody else waits for.
module;
#include <cstdint>
#include <filesystem>
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

/// What a frontend gives: one ref, or (a map) one for each platform; a null ref is an empty root. `metadata` as BuildKit
/// names it: containerimage.config[/PLATFORM], refs.platforms, ...
struct job_result {
    std::map<std::string, std::shared_ptr<ref>> refs;  ///< of a single one the key is empty
    bool map = false;
    std::map<std::string, std::string> metadata;
};

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
    bool recorded = false;  ///< provenance is made for a record of the build, whatever is to be attested
};

class job {
public:
    virtual ~job() = default;
    /// A ref of what the definition's terminal names; null for an empty definition. Nothing runs yet.
    virtual std::shared_ptr<ref> define(llb::definition what) = 0;
    /// "dockerfile.v0" (also by the name gateway.v0 with that source) with BuildKit's attributes; sub-requests are answered in
    /// the metadata. Throws errc::unsupported for any other frontend.
    virtual async::task<job_result> run_frontend(std::string name, std::map<std::string, std::string> attrs,
                                                 std::map<std::string, llb::definition> inputs) = 0;
    /// Caches that are looked into from now on, as --cache-from names them; one that cannot be had is a warning.
    virtual void import_caches(std::vector<cache_entry> from) = 0;
    virtual async::task<gateway::image_config> resolve_image(gateway::resolve_request request) = 0;
    /// What a git or http source is now; `name` is what progress shows.
    struct source_facts {
        std::string checksum, ref, filename;
        std::int64_t modified = 0;
        std::string commit_object;  ///< of a git repository, when asked for
    };
    virtual async::task<source_facts> resolve_source(llb::source_op what, std::string name, bool objects = false) = 0;
    /// Brings every ref about and hands it to the exporters. Without outputs only the former.
    virtual async::task<build_result> finish(job_result what, std::vector<output> outputs) = 0;
    virtual void warn(progress::warning what) = 0;

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
    };
    [[nodiscard]] virtual std::optional<failure> failed() const = 0;
};

}  // namespace cobuild::build

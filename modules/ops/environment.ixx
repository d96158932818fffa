/// Partition of cobuild.ops: what ops work with. See ops.ixx.
module;
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

export module cobuild.ops:environment;

import cobuild.base;
import cobuild.async;
import cobuild.state;
import cobuild.content;
import cobuild.snapshot;
import cobuild.cache;
import cobuild.solver;
import cobuild.session;
import cobuild.cni;
import cobuild.executor;
import cobuild.source;
import cobuild.registry;

export namespace cobuild::ops {

/// A root file system, pinned.
struct chain_value final : solver::value {
    snapshot::chain chain;
    state::pin keep;
};

/// Which network a step asks for; `standard` is the configured one.
enum class network_kind { standard, none, host };

/// resolv.conf's text for steps on the host's network or not, and other things that are one per engine.
struct step_defaults {
    std::string resolv_conf;
    std::string host_resolv_conf;
};

/// What ops work with; outlives every graph made with it.
struct environment {
    async::blocking_pool& pool;
    state::directory& directory;
    snapshot::store& snapshots;
    cache::index& cache;
    source::images& images;
    /// Both are opened when a step first needs them: a build from cache needs neither.
    std::function<executor::runner&()> runner;
    std::function<async::task<cni::provider*>(network_kind)> network;
    std::function<step_defaults()> steps;
    bool host_network_allowed = true;
    source::http_files* http = nullptr;  ///< null: sources of this kind are refused
    source::git_repositories* git = nullptr;
    content::store* content = nullptr;
};

/// Source ops of one build by the digest of their bytes: what a branch or URL means is asked once, however many graphs the
/// build has.
using known_sources = std::map<digest, std::shared_ptr<solver::op>>;

/// What sources turned out to be in one build, by their LLB identifier: digests by algorithm, such as {"sha1", COMMIT}.
using found_sources = std::map<std::string, std::map<std::string, std::string>>;

/// What a step that failed had before it and left behind, for who wants to look into it. Null where there is nothing.
struct failed_step {
    std::vector<std::shared_ptr<chain_value>> inputs;  ///< of a command: by mount; of file actions: by input
    std::vector<std::shared_ptr<chain_value>> mounts;  ///< of a command: by mount; of file actions: by action
    std::optional<std::size_t> action;                 ///< the file action that failed
    std::optional<std::size_t> unread;                 ///< the input whose content could not be read; `inputs` is that one alone
};
using failed_steps = std::map<digest, failed_step>;
/// What refs of git repositories mean, by remote and ref.
using known_commits = std::map<std::string, source::git_commit>;

/// One client's build.
struct build_scope {
    std::shared_ptr<session::session> session;
    std::string id;  ///< of this build: what is keyed by it means nothing later
    bool always_pull = false;
    bool never_pull = false;
    /// What a COPY reads of the client's directory is hashed to learn its key, instead of by copying it: an imported cache may
    /// have what stands under that key, and then neither the copy nor what is below it is needed.
    bool hash_local = false;
    std::shared_ptr<known_sources> sources;                ///< null: nothing is shared
    std::shared_ptr<known_commits> commits{};              ///< likewise: a ref means the same in a whole build
    std::shared_ptr<found_sources> found{};                ///< null: nobody wants to know
    std::map<std::string, std::filesystem::path> layouts;  ///< OCI layouts of the client by name
    std::shared_ptr<const registry::login> who;            ///< the client's logins; none: the engine's own
    std::shared_ptr<failed_steps> failures{};              ///< by vertex; null: nobody wants to look into them
    digest vertex{};                                       ///< of the op that is being made
    /// Cache directories that a step which ignores the cache has begun anew, once a graph (BuildKit's rule); null: they outlive it.
    std::shared_ptr<std::set<std::string>> renewed{};
};

}  // namespace cobuild::ops

/// Partition of cobuild.ops: what ops work with. See ops.ixx.
module;
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

export module cobuild.ops:environment;

import cobuild.base;
import cobuild.async;
import cobuild.state;
import cobuild.snapshot;
import cobuild.cache;
import cobuild.solver;
import cobuild.session;
import cobuild.cni;
import cobuild.executor;
import cobuild.source;

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
};

/// One client's build.
struct build_scope {
    std::shared_ptr<session::session> session;
    std::string id;  ///< of this build: what is keyed by it means nothing later
    bool always_pull = false;
};

}  // namespace cobuild::ops

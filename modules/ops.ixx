/// cobuild.ops: the ops of a build graph bound to what carries them out: sources, snapshots, steps, files.
///
/// make_graph() turns a definition into the solver's graph. Results are chains of layers (or, for a local source, the
/// client's directory read in place). A local COPY is keyed by the bytes that landed in its layer: they are hashed while
/// copied; when every file is remembered by its stat the key is known without reading any.
///
/// Cache keys follow BuildKit's rules (see docs/architecture.md, "Cache"): for a step, hosts' addresses, proxies, and which cache
/// directory a cache mount gets do not count; for a file op, paths of sources count by what they select.
///
/// Thread safety: everything on the engine's io thread. Errors: errc::unsupported names ops and sources not built yet;
/// errc::step_failed has the exit code; errors of file actions name the path.
/// Not its job: order, caching, parallelism (solver); where images come from (source); how steps run (executor).
module;
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

export module cobuild.ops;

import cobuild.base;
import cobuild.async;
import cobuild.executor;
import cobuild.snapshot;
import cobuild.solver;
import cobuild.llb;
export import :environment;

export namespace cobuild::ops {

struct graph {
    solver::graph vertices;
    std::optional<solver::edge> result;  ///< empty: an empty root
};

/// Throws errc::unsupported for an op or source that is not built yet, naming it.
graph make_graph(const llb::loaded& definition, environment& env, build_scope scope);

/// What a git or http source is now, for who wants to pin it.
struct source_facts {
    std::string checksum;       ///< the commit, or the annotated tag that was asked for; "sha256:..." of a file
    std::string commit;         ///< git: what an annotated tag names
    std::string commit_object;  ///< git, when asked for: as git keeps it
    std::string tag_object;     ///< likewise of an annotated tag
    std::string ref;            ///< git: the full name the commit was found under
    std::string filename;       ///< of a file
    std::int64_t modified = 0;  ///< of a file: Last-Modified, seconds since 1970; 0: not known
};
/// Asks now; a later solve in the same scope does not ask again. `objects`: a git commit is fetched. Throws errc::unsupported for
/// other sources.
async::task<source_facts> look_at_source(llb::op what, environment& env, build_scope scope, solver::context ctx, bool objects = false);

/// What a container that a client asked for stands on. Its cache directories are locked and its layers there until `held` goes; what
/// is written to them is dropped.
struct container_base {
    executor::step step;      ///< root and mounts are open; what runs and where (args, env, network) is the caller's to say
    std::vector<int> mounts;  ///< by mount of the op: a descriptor of its files, -1 where it has none of its own
    std::shared_ptr<void> held;
};
/// `what` is an exec op whose mounts name `inputs`. Throws errc::invalid for mounts that make no sense.
async::task<container_base> prepare_container(llb::op what, std::vector<std::shared_ptr<chain_value>> inputs, environment& env, build_scope scope);

/// A vertex' result as a chain; a client's directory that is the result itself is copied into a layer.
async::task<std::shared_ptr<chain_value>> as_chain_value(environment& env, solver::result value);

/// Chains by their layer ids. A record whose layer is gone is not loaded.
std::shared_ptr<solver::result_store> make_result_store(snapshot::store& snapshots);

}  // namespace cobuild::ops

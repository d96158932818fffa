/// cobuild.solver: brings about the results of a graph of vertices, from cache or by running them, each at most once.
///
/// Words. A *vertex* is an op with inputs, named by a digest; an *edge* is one output of a vertex. An *op* knows how to
/// describe, key and run itself. Keys (see docs/architecture.md, "Cache"): the fast key comes from the op and the canonical
/// keys of its inputs, the content key from the bytes the op reads. A key is *ephemeral* when it means something within
/// one build only (a local directory's, say); nothing is stored under it, nor under what depends on it by key.
///
/// How it goes. Keys are looked up from the bottom without running anything. A vertex found nowhere still has a key (its
/// first), so what stands on it is looked up too; it runs only when its result is demanded: by the caller, by a vertex that
/// must run, or by one that reads it by content. Equal vertices are one; the same key in several builds at once is one
/// run, which is cancelled when the last of them has gone. If the build whose op runs it goes first and the run then
/// fails, it is run again by one of the others.
///
/// Waiting. Order is fixed: the inputs' results, the op's prepare() (its own locks), the slot, the run. Nothing is waited
/// for while a slot is held. Every wait shows in debug_dump().
/// Thread safety: everything on the engine's io thread. Graph depth costs no stack.
/// Not responsible for what ops do, images, definitions, or the life of results (result store).
module;
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

export module cobuild.solver;

import cobuild.base;
import cobuild.async;
import cobuild.cache;
import cobuild.progress;

export namespace cobuild::solver {

// ---------------------------------------------------------------- results

/// What a vertex brings about; the ops know what it is. Holding it keeps it alive.
class value {
public:
    virtual ~value() = default;
};
using result = std::shared_ptr<value>;

/// Makes results survive the process.
class result_store {
public:
    virtual ~result_store() = default;
    /// A text from which load() brings it back; what it names is safe on disk before this returns.
    virtual async::task<std::string> save(result r) = 0;
    /// Empty when it is not there any more. May return a handle that loads its data when they are needed.
    virtual async::task<std::optional<result>> load(std::string text) = 0;
    virtual async::task<bool> alive(std::string text) = 0;
};

// ---------------------------------------------------------------- ops

/// What one call on an op may use.
struct context {
    /// For status lines, output and warnings of this vertex (begin, output, warn): shown in every build that waits for it. The
    /// vertex' own state (started, completed) is the solver's to tell.
    progress::writer progress;
    /// For what runs on pool threads; coroutines are cancelled by themselves.
    async::cancel_token cancelled;
    std::vector<result> inputs{};  ///< for prepare() alone: the inputs' results
};

struct input_info {
    std::string selector;     ///< which part of the input is meant; counts in the fast key
    bool content_of = false;  ///< content_key() can tell what the op reads from it
    bool late = false;        ///< only run() can tell (`run_result::content`), so this vertex has no key before it ran
};

struct cache_info {
    digest op_digest;
    /// Other digests a vertex without inputs may be known by (an image by its manifest, else by its chain of layers).
    std::vector<digest> also;
    /// Per input of the vertex; missing ones are as default.
    std::vector<input_info> inputs;
    bool ephemeral = false;  ///< op_digest means something in this build only
    bool no_cache = false;   ///< never take what is remembered; what comes out is new to everything above it
    bool pinned = false;     ///< the key names the bytes themselves (an image by digest): ignore-cache does not apply
};

struct run_result {
    std::vector<result> outputs;
    /// Per input what was read from it, where run() found out; may be shorter. If a record with these bytes exists and is
    /// alive, it is taken and these outputs are dropped.
    std::vector<std::optional<digest>> content;
};

/// All calls on the io thread, several of them at once when several builds share the op object.
class op {
public:
    virtual ~op() = default;
    virtual async::task<cache_info> describe(context ctx) = 0;
    /// A digest of what the op reads from `input`, for inputs with `content_of`; empty: cannot tell after all.
    virtual async::task<std::optional<digest>> content_key(std::size_t input, result value, context ctx);
    /// Takes the op's own locks, held until the run has ended; may wait. Called before the slot is taken.
    virtual async::task<std::shared_ptr<void>> prepare(context ctx);
    virtual async::task<run_result> run(std::vector<result> inputs, context ctx) = 0;
    /// Whether a run counts against max_parallelism.
    [[nodiscard]] virtual bool counted() const noexcept { return true; }
    /// The input that `output` is a changed form of, for who follows what a result stands on.
    [[nodiscard]] virtual std::optional<std::size_t> changed_input(std::size_t output) const noexcept {
        (void)output;
        return 0;
    }
    /// Whether describe() is worth showing (it asks a registry): the vertex is then shown as started meanwhile.
    [[nodiscard]] virtual bool describe_is_work() const noexcept { return false; }
};

// ---------------------------------------------------------------- graphs

struct edge {
    std::size_t vertex = 0;  ///< index in the graph
    std::size_t output = 0;
    bool operator==(const edge&) const = default;
};

struct vertex {
    digest id;
    std::shared_ptr<solver::op> op;
    std::vector<edge> inputs;  ///< of vertices that stand before this one
    std::string name;
    std::optional<progress::group> progress_group{};
    bool ignore_cache = false;  ///< run it although its result is known
};

using graph = std::vector<vertex>;

// ---------------------------------------------------------------- caches elsewhere

/// Another machine's records, for one build. The keys of a vertex there come from canonical keys that differ from those here,
/// so it is looked up there by keys of its own. What is loaded from there is remembered here. Io thread.
class remote_cache {
public:
    struct found {
        digest canonical;           ///< there
        bool loadable = false;      ///< false: only the key is known, which what stands above is found by
        std::uint64_t outputs = 1;  ///< those that can be loaded, the first in the lowest bit
    };
    virtual ~remote_cache() = default;
    /// From memory: what is asked here was fetched before the build.
    [[nodiscard]] virtual std::optional<found> find(const digest& key) const = 0;
    /// The outputs of a record; one that cannot be loaded is empty. When it throws, the vertex is looked for in the next cache, and runs in the end;
    /// `progress` gets a warning.
    virtual async::task<std::vector<result>> load(digest canonical, progress::writer progress) = 0;
};

/// What a build found out about one vertex: what a cache export is made of. Vertices that mean something in one build only
/// (a client's directory) are left out.
struct solved {
    digest id;
    digest canonical;
    std::vector<digest> keys;  ///< it is found under, the canonical one not necessarily among them
    /// Its outputs, as run or from a cache; empty when there are none.
    std::function<async::task<std::vector<result>>()> outputs;
    bool loaded = false;  ///< outputs() has them in memory
};

// ---------------------------------------------------------------- solver

struct solver_options {
    std::size_t max_parallelism = 0;  ///< runs of counted ops at once, over all builds; 0: no limit
};

/// What several solves of one build share: a vertex that ignores the cache runs once in all of them. Keys by keys.
struct shared_runs {
    std::map<digest, digest> fresh;
};

struct solve_options {
    bool no_cache = false;  ///< every vertex counts as ignore_cache
    std::shared_ptr<shared_runs> runs{};
    std::vector<std::shared_ptr<remote_cache>> caches{};    ///< looked into after the own one, in this order
    std::shared_ptr<std::vector<solved>> report = nullptr;  ///< filled when the solve succeeds, inputs before what uses them
};

class solver {
public:
    solver(async::executor ex, std::shared_ptr<cache::index> index, std::shared_ptr<result_store> store, solver_options options = {});
    ~solver();  ///< after every solve() has returned, and close()
    solver(const solver&) = delete;
    solver& operator=(const solver&) = delete;

    /// The results of `targets`, in their order; an output its op did not make is empty. The first failure cancels the
    /// build's other work, and is thrown with the vertex' name before it. When the caller is cancelled the runs that no
    /// other build waits for are, and are waited for. Throws errc::invalid for a graph that is not one.
    async::task<std::vector<result>> solve(graph g, std::vector<edge> targets, std::shared_ptr<progress::sink> sink, solve_options options = {});

    /// What every vertex that is not finished waits for, a line each.
    [[nodiscard]] std::string debug_dump() const;
    /// Waits for runs that are still ending.
    async::task<void> close();

private:
    struct state;
    std::shared_ptr<state> state_;
};

}  // namespace cobuild::solver

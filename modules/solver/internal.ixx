/// What the bodies of cobuild.solver share: builds, their nodes, flights (runs under way). Not installed. Io thread only.
module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

export module cobuild.solver.internal;

import cobuild.base;
import cobuild.async;
import cobuild.cache;
import cobuild.progress;
import cobuild.solver;

export namespace cobuild::solver {

// ---------------------------------------------------------------- keys

struct key {
    digest value;
    bool ephemeral = false;
};

/// One input's share in a key.
struct key_part {
    key from;              ///< canonical key of the vertex, or the digest of what is read from it
    bool content = false;  ///< the latter: then output and selector do not count
    std::size_t output = 0;
    std::string selector;
};

key fast_key(const digest& op, bool ephemeral, std::span<const key_part> inputs);
key content_key(const digest& op, bool ephemeral, std::span<const key_part> inputs);
/// A key nobody has had before, for a result that must not count as the one remembered.
key fresh_key(const key& fast);

/// The texts of a record's outputs, an empty one for an output that is none.
std::string encode_texts(const std::vector<std::string>& texts);
/// Empty when it is damaged.
std::optional<std::vector<std::string>> decode_texts(std::string_view text);

// ---------------------------------------------------------------- states

enum class vertex_state : std::uint8_t {
    unused,           ///< no target needs it
    describing,       ///< its op is telling what makes up its key
    waiting_keys,     ///< described; an input has no key yet
    looking_up,       ///< its key is being looked up in the storage
    waiting_content,  ///< not found by fast key; inputs read by content are being brought about
    hashing,          ///< what it reads from them is being digested
    keyed,            ///< its key is settled; the result may be remembered or not, and nobody has asked for it
    loading,          ///< a remembered result is being loaded
    waiting_inputs,   ///< it has to run; inputs' results are missing
    preparing,        ///< its run is taking the op's own locks
    queued,           ///< its run waits for a slot
    running,          ///< its run has the slot
    saving,           ///< the run is over, its result is being stored
    done,             ///< the result is here
    failed,           ///< it could not be brought about
    canceled,         ///< the build ended before it did
};

std::string_view to_string(vertex_state s) noexcept;
bool is_final(vertex_state s) noexcept;
bool may_follow(vertex_state from, vertex_state to) noexcept;

// ---------------------------------------------------------------- runs under way

class build;
struct engine;

/// Hands on what a run says to every build that waits for it, under that build's own vertex; late-comers get what was said.
class broadcast final : public progress::sink {
public:
    void on_event(const progress::event& what) override;
    void add(std::shared_ptr<progress::sink> to, digest as);
    void drop(const digest& as, const progress::sink* to);

private:
    void remember(const progress::event& what);
    std::vector<std::pair<std::shared_ptr<progress::sink>, digest>> to_;
    std::deque<progress::event> said_;
    std::map<std::string, std::size_t> lines_;
    std::size_t log_bytes_ = 0;
};

struct subscriber {
    cobuild::solver::build* build;
    std::size_t node;
    bool operator==(const subscriber&) const = default;
};

struct outcome {
    std::exception_ptr failed;
    key canonical;
    std::optional<cache::record> adopted;  ///< set: take this record's result, there are no outputs
    std::vector<result> outputs;
};

/// One run of one op, for all nodes of all builds that need it.
struct flight {
    std::shared_ptr<cobuild::solver::op> op;
    std::string name;
    std::vector<result> inputs;
    digest op_digest;
    bool op_ephemeral = false;
    std::vector<key_part> parts;        ///< as for the content key, as far as known before
    std::vector<key> fast;              ///< all it may be found under later
    std::optional<key> content;         ///< known before the run
    std::optional<key> canonical;       ///< already told to those above
    std::optional<cache::record> dead;  ///< a record whose result is gone
    std::optional<key> fresh;           ///< takes no remembered result, counts under this key

    std::vector<digest> registered;
    std::vector<subscriber> subscribers;
    cobuild::solver::build* owner = nullptr;  ///< whose op it is; null once that build has gone
    vertex_state stage = vertex_state::preparing;
    std::shared_ptr<broadcast> out = std::make_shared<broadcast>();
    async::cancel_source cancel;
    async::event ended;
};

struct engine {
    async::executor ex;
    std::shared_ptr<cache::index> index;
    std::shared_ptr<result_store> store;
    solver_options options;
    async::semaphore slots;
    async::task_group group;
    std::unordered_map<digest, std::shared_ptr<flight>> flights;
    std::map<std::uint64_t, build*> builds;
    std::uint64_t next_build = 1;
    std::unordered_map<std::string, std::weak_ptr<value>> live;  ///< results by text, so that one is loaded once
    std::size_t live_limit = 1024;

    engine(async::executor e, std::shared_ptr<cache::index> i, std::shared_ptr<result_store> s, solver_options o);
    void remember_live(const std::string& text, const result& r);
    async::task<std::optional<result>> load(std::string text);
    async::task<bool> alive(std::string texts);

    std::shared_ptr<flight> find_flight(const std::vector<digest>& keys);
    void launch(std::shared_ptr<flight> f);
    /// Joins; the node is told what has happened so far.
    void join(const std::shared_ptr<flight>& f, subscriber s);
    /// True when nobody is left, and the run was told to stop.
    bool leave(const std::shared_ptr<flight>& f, subscriber s, const error& cause);

private:
    async::task<void> fly(std::shared_ptr<flight> f);
    async::task<void> work(std::shared_ptr<flight> f, std::shared_ptr<outcome> out);
    async::task<void> store_outcome(std::shared_ptr<flight> f, run_result r, std::shared_ptr<outcome> out);
    void set_stage(const std::shared_ptr<flight>& f, vertex_state stage);
    void unregister(const std::shared_ptr<flight>& f);
};

// ---------------------------------------------------------------- builds

struct user {
    std::size_t node, slot;  ///< and which of its inputs
};

/// A node as one of the build's remote caches sees it.
struct view_elsewhere {
    std::vector<key> fast;
    std::optional<key> content;
    key canonical;  ///< with node::has_key
    std::optional<remote_cache::found> found;
    bool failed = false;  ///< it could not be loaded from there
};

struct node {
    const vertex* v = nullptr;
    std::vector<edge> inputs;  ///< with equal vertices made one
    std::vector<user> users;
    vertex_state state = vertex_state::unused;
    std::chrono::steady_clock::time_point since;
    std::size_t missing = 0;  ///< inputs waited for, in the waiting states
    bool in_queue = false;
    bool wanted = false;  ///< its result
    bool target = false;
    bool has_key = false, has_result = false;
    bool fresh = false;
    bool blocked = false;            ///< its key waits for a run below
    std::uint64_t used_outputs = 0;  ///< as in remote_cache::found

    cache_info info;
    std::vector<key> fast;
    std::vector<std::optional<digest>> contents;
    std::optional<key> content;
    key canonical;
    std::optional<key> fresh_key;
    std::vector<view_elsewhere> elsewhere;  ///< one for each of the build's caches, in their order
    std::optional<cache::record> record;
    std::optional<cache::record> dead;
    std::vector<result> outputs;
    std::shared_ptr<cobuild::solver::flight> flight;
    progress::writer progress;
};

/// One solve() under way.
class build {
public:
    build(std::shared_ptr<engine> e, graph g, std::vector<edge> targets, std::shared_ptr<progress::sink> sink, solve_options options);
    ~build();
    async::task<void> run();
    [[nodiscard]] std::vector<result> results() const;
    void dump(std::string& out) const;

    // What flights tell.
    void flight_at(std::size_t i, vertex_state stage);
    void landed(std::size_t i, const flight& f, const outcome& out);
    [[nodiscard]] const std::shared_ptr<progress::sink>& sink() const noexcept { return sink_; }
    [[nodiscard]] const digest& id_of(std::size_t i) const { return nodes_[i].v->id; }

private:
    void load_graph();
    void move(std::size_t i, vertex_state next);
    void push(std::size_t i);
    void pump();
    void step(std::size_t i);

    async::task<void> describe(std::size_t i);
    void described(std::size_t i, cache_info info);
    void compute_fast(std::size_t i);
    void look_up(std::size_t i, std::vector<key> keys, bool by_content);
    async::task<void> look_up_stored(std::size_t i, std::vector<key> keys, bool by_content);
    void looked_up(std::size_t i, std::optional<cache::record> found, bool by_content);
    void after_fast_miss(std::size_t i);
    async::task<void> hash(std::size_t i);
    void hashed(std::size_t i);
    void settle(std::size_t i);
    void key_known(std::size_t i, key k);
    async::task<void> load(std::size_t i);
    void look_elsewhere(std::size_t i);
    void settle_elsewhere(std::size_t i);
    [[nodiscard]] static bool known_elsewhere(const node& n);
    [[nodiscard]] std::optional<std::size_t> found_elsewhere(const node& n) const;
    async::task<void> load_elsewhere(std::size_t i);
    async::task<std::vector<result>> try_elsewhere(std::size_t i, std::size_t cache);
    async::task<void> remember(std::size_t i, std::vector<result> outputs);
    void report() const;
    void collect(std::size_t i);
    void take_off(std::size_t i);
    void finish(std::size_t i, std::vector<result> outputs);
    void want(std::size_t i);
    void block(std::size_t i);
    void settled(std::size_t i);
    void abandon(std::size_t i, const error& cause);

    /// As they count here, or in one of the caches elsewhere.
    [[nodiscard]] std::vector<key_part> parts(std::size_t i, bool with_content, std::optional<std::size_t> cache = {}) const;
    [[nodiscard]] input_info input(const node& n, std::size_t slot) const;
    [[nodiscard]] context context_of(std::size_t i) const;
    /// After a task of node `i`: does what follows, or fails the build when either has failed; then everything that can go on.
    template<class F>
    void go_on(std::size_t i, const std::exception_ptr& failed, F next) {
        if (over_) return;
        try {
            if (failed) std::rethrow_exception(failed);
            next();
        } catch (...) {
            broken(i, std::current_exception());
        }
        pump();
    }
    void broken(std::size_t i, const std::exception_ptr& why);
    void stop(const error& cause);
    [[nodiscard]] std::string waits_for(std::size_t i) const;

    std::shared_ptr<engine> engine_;
    graph graph_;
    std::vector<edge> targets_;
    std::shared_ptr<progress::sink> sink_;
    solve_options options_;
    std::uint64_t id_;
    std::vector<node> nodes_;
    std::deque<std::size_t> queue_;
    bool pumping_ = false;
    bool over_ = false;
    std::size_t targets_missing_ = 0;
    std::optional<error> failure_;
    async::cancel_source cancel_;
    async::task_group group_;
    async::event wake_;
    std::vector<std::shared_ptr<flight>> ending_;
};

}  // namespace cobuild::solver

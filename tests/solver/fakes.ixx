/// Ops, values and a result store for the solver's tests.
module;
#include <algorithm>
#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

export module cobuild.test.solver_fakes;

import cobuild.base;
import cobuild.async;
import cobuild.cache;
import cobuild.progress;
import cobuild.solver;

export namespace cobuild::test {

struct text_value final : solver::value {
    std::string text;
    explicit text_value(std::string t) : text(std::move(t)) {}
};

inline std::string text_of_result(const solver::result& r) { return r ? static_cast<const text_value&>(*r).text : std::string("(none)"); }

/// Texts name themselves: what was saved can be loaded until it is lost.
class fake_store final : public solver::result_store {
public:
    std::set<std::string> saved;
    std::size_t loads = 0;
    async::task<std::string> save(solver::result r) override {
        saved.insert(text_of_result(r));
        co_return text_of_result(r);
    }
    async::task<std::optional<solver::result>> load(std::string text) override {
        ++loads;
        if (!saved.contains(text)) co_return std::nullopt;
        co_return std::make_shared<text_value>(text);
    }
    async::task<bool> alive(std::string text) override { co_return saved.contains(text); }
};

struct plan {
    std::string name;  ///< makes up the op digest, unless `version` does
    std::string salt;  ///< changes the op digest, not the output
    bool counted = true;
    bool ephemeral = false;
    bool no_cache = false;
    bool pinned = false;
    bool shows_describe = false;
    std::vector<std::string> also;
    std::set<std::size_t> content_of;                          ///< inputs read by content: only the part before '|' of the input's text counts
    std::set<std::size_t> late;                                ///< the same, told by run()
    std::function<async::task<void>(solver::context)> during;  ///< in run()
    std::function<async::task<void>()> preparing;
    std::function<std::string(const std::vector<std::string>&)> make;
};

class fake_op final : public solver::op {
public:
    explicit fake_op(plan p) : p_(std::move(p)) {}
    int described = 0;
    int hashed = 0;
    int runs = 0;
    int canceled = 0;

    async::task<solver::cache_info> describe(solver::context) override {
        ++described;
        solver::cache_info out{
            .op_digest = digest::of(p_.name + "/" + p_.salt), .ephemeral = p_.ephemeral, .no_cache = p_.no_cache, .pinned = p_.pinned};
        for (const auto& other : p_.also) out.also.push_back(digest::of(other));
        std::size_t inputs = 0;
        for (const auto i : p_.content_of) inputs = std::max(inputs, i + 1);
        for (const auto i : p_.late) inputs = std::max(inputs, i + 1);
        out.inputs.resize(inputs);
        for (const auto i : p_.content_of) out.inputs[i].content_of = true;
        for (const auto i : p_.late) out.inputs[i].late = true;
        co_return out;
    }
    async::task<std::optional<digest>> content_key(std::size_t, solver::result value, solver::context) override {
        ++hashed;
        co_return digest::of(read(value));
    }
    async::task<std::shared_ptr<void>> prepare(solver::context) override {
        if (p_.preparing) co_await p_.preparing();
        co_return nullptr;
    }
    async::task<solver::run_result> run(std::vector<solver::result> inputs, solver::context ctx) override {
        ++runs;
        if (p_.during) {
            std::exception_ptr failed;
            try {
                co_await p_.during(ctx);
            } catch (...) {
                failed = std::current_exception();
            }
            if (failed) {
                ++canceled;
                std::rethrow_exception(failed);
            }
        }
        std::vector<std::string> texts;
        solver::run_result out;
        out.content.resize(inputs.size());
        for (std::size_t i = 0; i < inputs.size(); ++i) {
            texts.push_back(text_of_result(inputs[i]));
            if (p_.content_of.contains(i) || p_.late.contains(i)) texts.back() = read(inputs[i]);
            if (p_.late.contains(i)) out.content[i] = digest::of(read(inputs[i]));
        }
        out.outputs.push_back(std::make_shared<text_value>(p_.make ? p_.make(texts) : plain(texts)));
        co_return out;
    }
    [[nodiscard]] bool counted() const noexcept override { return p_.counted; }
    [[nodiscard]] bool describe_is_work() const noexcept override { return p_.shows_describe; }

    static std::string read(const solver::result& r) {
        const auto text = text_of_result(r);
        return text.substr(0, text.find('|'));
    }

private:
    [[nodiscard]] std::string plain(const std::vector<std::string>& inputs) const {
        std::string out = p_.name + "(";
        for (const auto& i : inputs) out += i + ",";
        return out.size() > 200 ? digest::of(out).hex() : out + ")";
    }
    plan p_;
};

/// Builds graphs; remembers the ops by name.
class graph_maker {
public:
    solver::graph graph;
    std::map<std::string, std::shared_ptr<fake_op>> ops;

    std::size_t add(plan p, std::vector<std::size_t> inputs = {}, bool ignore_cache = false) {
        const auto name = p.name;
        std::string id = name + "/" + p.salt;
        std::vector<solver::edge> edges;
        for (const auto i : inputs) {
            edges.push_back({i, 0});
            id += graph.at(i).id.hex();
        }
        auto made = std::make_shared<fake_op>(std::move(p));
        ops[name] = made;
        graph.push_back({.id = digest::of(id), .op = made, .inputs = std::move(edges), .name = name, .ignore_cache = ignore_cache});
        return graph.size() - 1;
    }
    std::size_t add(const std::string& name, std::vector<std::size_t> inputs = {}) { return add(plan{.name = name}, std::move(inputs)); }
    [[nodiscard]] int runs(const std::string& name) const { return ops.at(name)->runs; }
    [[nodiscard]] int all_runs() const {
        int n = 0;
        for (const auto& [_, o] : ops) n += o->runs;
        return n;
    }
};

/// Events, with the last state of each vertex by name.
struct watcher {
    std::vector<progress::event> events;
    std::map<std::string, progress::vertex> last;
    std::map<std::string, int> started;
    std::vector<std::string> order;  ///< of starts
    std::shared_ptr<progress::sink> sink = progress::make_sink([this](const progress::event& e) {
        events.push_back(e);
        if (const auto* v = std::get_if<progress::vertex>(&e)) {
            if (v->started && !v->completed) {
                ++started[v->name];
                order.push_back(v->name);
            }
            last[v->name] = *v;
        }
    });
};

/// An engine around one storage: a second one on the same storage is the next process.
class world {
public:
    std::shared_ptr<cache::storage> storage = cache::make_memory_storage();
    std::shared_ptr<fake_store> store = std::make_shared<fake_store>();
    std::shared_ptr<cache::index> index;
    std::unique_ptr<solver::solver> solver;

    async::task<void> open(async::runtime& rt, std::size_t parallel = 0) {
        index = co_await cache::index::open(rt.pool(), storage);
        solver =
            std::make_unique<cobuild::solver::solver>(rt.get_executor(), index, store, cobuild::solver::solver_options{.max_parallelism = parallel});
    }
    async::task<void> close() {
        co_await solver->close();
        co_await index->close();
        solver.reset();
        index.reset();
    }
    async::task<std::string> solve(const graph_maker& g, std::size_t target, std::shared_ptr<progress::sink> sink = nullptr, bool no_cache = false) {
        std::vector<cobuild::solver::edge> targets{{target, 0}};
        auto made = co_await solver->solve(g.graph, std::move(targets), std::move(sink), {.no_cache = no_cache});
        co_return text_of_result(made.at(0));
    }
};

}  // namespace cobuild::test

// Stands after the imports of base, async, fs, state, content, snapshot, cache, solver, session, registry, source, llb, ops.
#pragma once

using namespace cobuild;
using namespace cobuild::async;
namespace stdfs = std::filesystem;
using test::write_file;

namespace {

using filler = std::function<void(const stdfs::path&)>;

/// Everything ops need that is neither a network nor a runtime, and a client's directory named "context".
struct world {
    explicit world(runtime& r)
        : rt(r),
          d(state::directory::open((dir / "state").string(), rt.pool())),
          snapshots(snapshot::open_overlay(d)),
          content(d),
          registry(registry::options{.executor = rt.get_executor()}),
          images(rt.pool(), content, *snapshots, registry) {
        stdfs::create_directories(context());
    }
    task<void> open() {
        index = co_await cache::index::open(rt.pool(), cache::make_memory_storage());
        env = std::make_unique<ops::environment>(ops::environment{.pool = rt.pool(),
                                                                  .directory = *d,
                                                                  .snapshots = *snapshots,
                                                                  .cache = *index,
                                                                  .images = images,
                                                                  .runner = {},
                                                                  .network = {},
                                                                  .steps = {}});
        scope.session = session::make_local(rt.pool(), {.directories = {{"context", context()}}, .secrets = {}});
        scope.id = "test";
    }
    task<void> close() {
        co_await registry.close();
        co_await index->close();
    }
    [[nodiscard]] stdfs::path context() const { return dir / "context"; }

    runtime& rt;
    test::scratch_dir dir;
    std::shared_ptr<state::directory> d;
    std::shared_ptr<snapshot::store> snapshots;
    content::store content;
    registry::client registry;
    source::images images;
    std::shared_ptr<cache::index> index;
    std::unique_ptr<ops::environment> env;
    ops::build_scope scope;
};

/// A chain of one layer that `fill` made.
inline task<std::shared_ptr<ops::chain_value>> chain_of(world& w, filler fill) {
    auto layer = co_await w.snapshots->begin({});
    fill(stdfs::path(cat("/proc/self/fd/", layer.upper())));
    auto done = co_await w.snapshots->commit(std::move(layer), {});
    auto out = std::make_shared<ops::chain_value>();
    out->chain.layers = {done.id};
    out->keep = done.keep;
    co_return out;
}

/// What a result looks like.
struct seen {
    snapshot::view view;
    std::optional<fs::root> root;
    [[nodiscard]] std::optional<fs::file_info> stat(std::string_view path) const { return root->stat(path); }
    [[nodiscard]] std::string text(std::string_view path) const { return root->stat(path) ? root->read_file(path, 1 << 20) : "<absent>"; }
    [[nodiscard]] bool has(std::string_view path) const { return root->stat(path).has_value(); }
    [[nodiscard]] std::string mode(std::string_view path) const {
        const auto info = root->stat(path);
        if (!info) return "<absent>";
        char out[16];
        std::snprintf(out, sizeof out, "%04o", info->permissions());
        return out;
    }
    [[nodiscard]] std::string owner(std::string_view path) const {
        const auto info = root->stat(path);
        return info ? cat(info->uid, ":", info->gid) : "<absent>";
    }
};

inline task<std::shared_ptr<seen>> look(world& w, solver::result r) {
    auto out = std::make_shared<seen>();
    const auto chain = co_await ops::as_chain_value(*w.env, std::move(r));
    out->view = co_await w.snapshots->view(chain->chain);
    out->root.emplace(out->view.mount().duplicate());
    co_return out;
}

/// An input of an op whose value the test gives by itself.
inline llb::op placeholder(std::string_view name) { return {.inputs = {}, .what = llb::source_op{cat("docker-image://", name), {}}, .platform = {}}; }
inline llb::op context_op(const std::map<std::string, std::string>& attrs = {}) {
    return {.inputs = {}, .what = llb::source_op{"local://context", attrs}, .platform = {}};
}

/// The op of the last vertex of a definition, made from `what` with placeholders as inputs.
inline std::shared_ptr<solver::op> make_op(world& w, llb::op what, std::size_t inputs) {
    llb::graph g;
    for (std::size_t i = 0; i < inputs; ++i) what.inputs.push_back(g.add(placeholder(cat("input", i))));
    const auto top = g.add(what);
    auto made = ops::make_graph(llb::load(g.finish(top)), *w.env, w.scope);
    return made.vertices.at(made.result->vertex).op;
}

inline task<solver::result> open_context(world& w, std::map<std::string, std::string> attrs = {}) {
    llb::graph g;
    const auto top = g.add(context_op(attrs));
    auto made = ops::make_graph(llb::load(g.finish(top)), *w.env, w.scope);
    const auto out = co_await made.vertices.at(0).op->run({}, {});
    co_return out.outputs.at(0);
}

inline llb::copy_action copy_of(std::string src, std::string dest) {
    llb::copy_action a;
    a.src = std::move(src);
    a.dest = std::move(dest);
    a.follow_symlink = a.dir_copy_contents = a.create_dest_path = a.allow_wildcard = a.allow_empty_wildcard = true;
    return a;
}

/// One or more copies, as COPY makes them, from `from` onto `base` (empty: scratch).
inline llb::op copies(std::vector<llb::copy_action> actions, bool on_base) {
    llb::file_op f;
    const std::int64_t inputs = on_base ? 2 : 1;
    for (std::size_t i = 0; i < actions.size(); ++i) {
        llb::file_action a{.input = i > 0     ? inputs + static_cast<std::int64_t>(i) - 1
                                    : on_base ? 0
                                              : llb::scratch,
                           .secondary_input = inputs - 1,
                           .output = i + 1 == actions.size() ? 0 : llb::no_output,
                           .what = {}};
        a.what = std::move(actions[i]);
        f.actions.push_back(std::move(a));
    }
    return {.inputs = {}, .what = std::move(f), .platform = {}};
}

struct copied {
    solver::result result;
    std::optional<digest> predicted;  ///< what the files' remembered digests said before anything was read
    std::optional<digest> landed;
    std::shared_ptr<seen> now;
};

inline task<copied> copy(world& w, solver::result from, std::vector<llb::copy_action> actions, solver::result base = {}) {
    std::vector<solver::result> inputs;
    if (base) inputs.push_back(base);
    inputs.push_back(from);
    const auto op = make_op(w, copies(std::move(actions), base != nullptr), inputs.size());
    copied out;
    out.predicted = co_await op->content_key(inputs.size() - 1, from, {});
    auto ran = co_await op->run(inputs, {});
    out.result = ran.outputs.at(0);
    out.landed = ran.content.at(inputs.size() - 1);
    out.now = co_await look(w, out.result);
    co_return out;
}

inline task<copied> copy(world& w, solver::result from, llb::copy_action action, solver::result base = {}) {
    std::vector<llb::copy_action> one{std::move(action)};
    co_return co_await copy(w, std::move(from), std::move(one), std::move(base));
}

template<class T>
task<std::optional<error>> failure(task<T> t) {
    std::optional<error> out;
    try {
        (void)co_await std::move(t);
    } catch (const error& e) {
        BOOST_TEST_MESSAGE(e.what());
        out = e;
    }
    co_return out;
}

inline bool says(const std::optional<error>& e, errc kind, std::string_view part) {
    return e && e->kind() == kind && std::string_view(e->what()).find(part) != std::string_view::npos;
}

}  // namespace

/// A case with a world `w`, as root.
#define WORLD_CASE(name)                             \
    static task<void> name##_in(world& w);           \
    CO_TEST_CASE(name) {                             \
        if (!cobuild::test::needs_root()) co_return; \
        world w(rt);                                 \
        co_await w.open();                           \
        co_await name##_in(w);                       \
        co_await w.close();                          \
    }                                                \
    static task<void> name##_in([[maybe_unused]] world& w)

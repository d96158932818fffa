// What the suites share that build with our own client: a daemon on a socket, and a build that lends it something.
// Stands after the imports.
#pragma once

namespace cobuild::test {

struct lending_daemon {
    scratch_dir dir;
    std::shared_ptr<build::engine> engine;
    std::shared_ptr<daemon::daemon> d;
    std::shared_ptr<rpc::channel> channel;

    /// Builds `definition`, without a frontend.
    async::task<client::build_result> build(std::string definition, client::build_request r = {}, std::shared_ptr<progress::sink> sink = {}) {
        r.definition = std::move(definition);
        return client::build(channel, engine->runtime().pool(), std::move(r), std::move(sink));
    }
};
using lending_test = std::function<async::task<void>(lending_daemon&)>;

namespace lending {

inline async::task<void> use(std::shared_ptr<lending_daemon> s, std::string address, lending_test work) {
    std::exception_ptr failed;
    try {
        s->channel = rpc::channel::connect(s->engine->runtime().get_executor(), address);
        co_await work(*s);
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::no_cancel;
    s->channel.reset();
    co_await s->d->stop(std::chrono::seconds(0));
    if (failed) std::rethrow_exception(failed);
}

inline async::task<void> run(std::shared_ptr<lending_daemon> s, lending_test work) {
    const auto root = s->dir / "root";
    s->engine = co_await build::engine::open({.root = root});
    daemon::options o{.engine = s->engine, .settings = {}, .root = root.string()};
    const auto address = "unix://" + (s->dir / "s.sock").string();
    o.settings.grpc.address = {address};
    const auto ex = s->engine->runtime().get_executor();
    std::exception_ptr failed;
    try {
        s->d = co_await async::on(ex, daemon::daemon::open(o));
        co_await async::on(ex, use(s, address, std::move(work)));
    } catch (...) {
        failed = std::current_exception();
    }
    co_await s->engine->close();
    s->d.reset();
    if (failed) std::rethrow_exception(failed);
}

}  // namespace lending

inline void with_lending_daemon(lending_test work) {
    if (!needs_root()) return;
    async::runtime rt;
    rt.block_on(lending::run(std::make_shared<lending_daemon>(), std::move(work)));
}

/// A source alone.
inline std::string source_definition(std::string identifier, std::map<std::string, std::string> attrs = {}) {
    llb::graph g;
    return llb::marshal(g.finish(g.add({.inputs = {}, .what = llb::source_op{std::move(identifier), std::move(attrs)}, .platform = {}})));
}

/// FROM scratch with one file in it.
inline std::string file_definition(const std::string& path, const std::string& text) {
    llb::graph g;
    llb::file_op f;
    f.actions.push_back(
        {.input = llb::scratch, .secondary_input = llb::scratch, .output = 0, .what = llb::mkfile_action{.path = path, .mode = 0644, .data = text}});
    return llb::marshal(g.finish(g.add({.inputs = {}, .what = std::move(f), .platform = {}})));
}

/// The result's files go to `directory`.
inline client::build_request into(const std::filesystem::path& directory) {
    client::build_request r;
    r.exporters.push_back({.type = "local", .attrs = {}});
    r.lends.targets[0] = {.directory = directory, .file = {}};
    return r;
}

}  // namespace cobuild::test

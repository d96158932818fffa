// A daemon over an engine of its own, for tests. Include after the imports: base, async, build, config, daemon, llb, rpc.
#pragma once

#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "control.pb.h"
#include "gateway.pb.h"

#include "support/failure.hpp"

using namespace cobuild;
using namespace std::chrono_literals;
using cobuild::test::failure;
using cobuild::test::says;
namespace wire = moby::buildkit::v1;
namespace bridge = moby::buildkit::v1::frontend;

inline constexpr std::string_view control = "/moby.buildkit.v1.Control/", gateway = "/moby.buildkit.v1.frontend.LLBBridge/";

/// An engine and a daemon over it on a socket of their own; `work` gets a channel to it, on the engine's thread.
struct served {
    test::scratch_dir dir;
    std::shared_ptr<build::engine> engine;
    std::shared_ptr<daemon::daemon> d;
    std::shared_ptr<rpc::channel> channel;
    [[nodiscard]] std::string address() const { return "unix://" + (dir / "s.sock").string(); }
};

inline async::task<void> use(std::shared_ptr<served> s, std::function<async::task<void>(served&)> work) {
    std::exception_ptr failed;
    try {
        s->channel = rpc::channel::connect(s->engine->runtime().get_executor(), s->address());
        co_await work(*s);
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::no_cancel;
    s->channel.reset();
    co_await s->d->stop(0s);
    if (failed) std::rethrow_exception(failed);
}

inline void with_daemon(std::function<async::task<void>(served&)> work, const std::function<void(daemon::options&)>& change = {}) {
    if (!test::needs_root()) return;
    async::runtime rt;
    auto s = std::make_shared<served>();
    rt.block_on([](std::shared_ptr<served> all, std::function<async::task<void>(served&)> what,
                   std::function<void(daemon::options&)> alter) -> async::task<void> {
        build::engine_options o;
        o.root = all->dir / "root";
        all->engine = co_await build::engine::open(o);
        daemon::options d{.engine = all->engine, .settings = {}, .root = o.root.string()};
        d.settings.grpc.address = {all->address()};
        if (alter) alter(d);
        const auto ex = all->engine->runtime().get_executor();
        std::exception_ptr failed;
        try {
            all->d = co_await async::on(ex, daemon::daemon::open(d));
            co_await async::on(ex, use(all, std::move(what)));
        } catch (...) {
            failed = std::current_exception();
        }
        co_await all->engine->close();
        all->d.reset();
        if (failed) std::rethrow_exception(failed);
    }(s, std::move(work), change));
}

template<class R, class Q>
async::task<R> call(served& s, std::string method, Q request, rpc::metadata m = {}) {
    R out;
    const auto bytes = co_await s.channel->unary(std::move(method), request.SerializeAsString(), std::move(m));
    BOOST_TEST(out.ParseFromString(bytes));
    co_return out;
}

/// FROM scratch with one file in it.
inline std::string one_file(const std::string& path, const std::string& text) {
    llb::graph g;
    llb::file_op f;
    f.actions.push_back(
        {.input = llb::scratch, .secondary_input = llb::scratch, .output = 0, .what = llb::mkfile_action{.path = path, .mode = 0644, .data = text}});
    return llb::marshal(g.finish(g.add({.inputs = {}, .what = std::move(f), .platform = {}})));
}

inline wire::SolveRequest solve_request(const std::string& ref) {
    wire::SolveRequest r;
    r.set_ref(ref);
    r.set_definition(one_file("/hello", "hi"));
    return r;
}

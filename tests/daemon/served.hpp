// A daemon on a socket of its own, and calls on it. Includes nothing but Boost.Test's; stands after the imports: cobuild.base, async,
// build, config, daemon, rpc.
#pragma once

namespace cobuild::test {

namespace wire = moby::buildkit::v1;

inline constexpr std::string_view control = "/moby.buildkit.v1.Control/", gateway = "/moby.buildkit.v1.frontend.LLBBridge/";

/// An engine and a daemon over it on a socket of their own; `work` gets a channel to it, on the engine's thread.
struct served {
    scratch_dir dir;
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
    co_await s->d->stop(nanoseconds{0});
    if (failed) std::rethrow_exception(failed);
}

inline void with_daemon(std::function<async::task<void>(served&)> work, const std::function<void(daemon::options&)>& change = {}) {
    if (!needs_root()) return;
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

/// A build that its client drives: Solve without anything, and what is asked of it meanwhile.
inline async::task<void> drive(served& s, std::string ref, std::function<async::task<void>(rpc::metadata)> work, rpc::status* end) {
    wire::SolveRequest empty;
    empty.set_ref(ref);
    auto solving = s.channel->open(cat(control, "Solve"));
    BOOST_TEST(co_await solving->write(empty.SerializeAsString()));
    co_await solving->writes_done();
    co_await work({{"buildkit-controlapi-buildid", ref}});
    (void)co_await solving->read();
    *end = co_await solving->finish();
}

}  // namespace cobuild::test

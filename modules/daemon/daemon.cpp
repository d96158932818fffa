module;
#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <unistd.h>

#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>

module cobuild.daemon;

import cobuild.fs;
import :internal;

namespace cobuild::daemon {

world::world(options o, std::string worker)
    : given(std::move(o)),
      ex(given.engine->runtime().get_executor()),
      pool(given.engine->runtime().pool()),
      sessions(ex),
      contexts(given.root, pool),
      history(given.root, pool, given.settings.history),
      worker_id(std::move(worker)) {}

namespace {

async::task<rpc::status> unknown_method(std::shared_ptr<rpc::call> c) {
    co_return rpc::status{rpc::code::unimplemented, cat("the method ", c->method(), " is not supported"), {}};
}

async::task<rpc::status> route(std::shared_ptr<world> w, std::shared_ptr<rpc::call> c) {
    static constexpr std::string_view control = "/moby.buildkit.v1.Control/", bridge = "/moby.buildkit.v1.frontend.LLBBridge/",
                                      content = "/containerd.services.content.v1.Content/";
    const std::string_view name = c->method();
    log(log_level::debug, "call", {{"method", std::string(name)}});
    if (name.starts_with(control))
        if (const auto m = control_method(name.substr(control.size()))) return m(std::move(w), std::move(c));
    if (name.starts_with(bridge))
        if (const auto m = bridge_method(name.substr(bridge.size()))) return m(std::move(w), std::move(c));
    if (name.starts_with(content))
        if (const auto m = content_method(name.substr(content.size()))) return m(std::move(w), std::move(c));
    if (const auto m = common_method(name)) return m(std::move(w), std::move(c));
    return unknown_method(std::move(c));
}

/// One daemon a state directory: an flock, with the pid in it for whom it refuses.
unique_fd take_lock(const std::string& root) {
    const auto path = root + "/cobuildd.lock";
    unique_fd out{::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)};
    if (!out) throw_errno(cat("opening ", path));
    if (::flock(out.get(), LOCK_EX | LOCK_NB) != 0) {
        const auto owner = fs::read_all(out.get(), 64);
        throw error{errc::exists, cat("another daemon uses the state directory ", root, " (process ", trim(owner), " holds ", path,
                                      "); stop it, or give this one another --root")};
    }
    const auto pid = cat(::getpid(), "\n");
    if (::ftruncate(out.get(), 0) != 0 || ::pwrite(out.get(), pid.data(), pid.size(), 0) < 0) throw_errno(cat("writing ", path));
    return out;
}

/// A name for this state directory's worker that stays.
std::string worker_id(const std::string& root) {
    const auto path = root + "/workerid";
    const unique_fd file{::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)};
    if (!file) throw_errno(cat("opening ", path));
    auto text = std::string(trim(fs::read_all(file.get(), 256)));
    if (!text.empty()) return text;
    text = random_id();
    if (::pwrite(file.get(), text.data(), text.size(), 0) < 0) throw_errno(cat("writing ", path));
    return text;
}

class daemon_impl final : public daemon {
public:
    daemon_impl(std::shared_ptr<world> w, unique_fd lock, std::vector<listener> listeners, std::optional<rpc::tls> security)
        : world_(std::move(w)), lock_(std::move(lock)), listeners_(std::move(listeners)), accepting_(world_->ex, true) {
        const auto serve = [w = world_](std::shared_ptr<rpc::call> c) { return route(w, std::move(c)); };
        plain_ = std::make_shared<rpc::server>(world_->ex, world_->pool, serve);
        if (security) secure_ = std::make_shared<rpc::server>(world_->ex, world_->pool, serve, std::move(security));
        for (auto& l : listeners_) accepting_.spawn(accept(world_->ex, l.fd.duplicate(), l.tls ? secure_ : plain_));
    }

    /// After the others; `l` stays open until stop().
    void debug_on(listener l) {
        const auto calls = [plain = plain_, secure = secure_] {
            auto out = plain->open_calls();
            if (secure)
                for (auto& c : secure->open_calls()) out.push_back(std::move(c));
            return out;
        };
        accepting_.spawn(serve_debug(world_, calls, l.fd.duplicate()));
        debug_.emplace(std::move(l));
    }

    [[nodiscard]] std::vector<std::string> addresses() const override {
        std::vector<std::string> out;
        for (const auto& l : listeners_) out.push_back(l.address);
        return out;
    }

    [[nodiscard]] std::string debug_address() const override { return debug_ ? debug_->address : std::string(); }

    async::task<void> reload(config::configuration settings) override {
        // Files first: what cannot be read leaves all as it was.
        if (auto security = read_tls(settings.grpc.tls); security && secure_) secure_->set_security(std::move(*security));
        co_await world_->given.engine->reload(std::move(settings));
    }

    async::task<void> stop(nanoseconds grace) override {
        co_await async::no_cancel;
        accepting_.cancel();
        try {
            co_await accepting_.join();
        } catch (const std::exception&) {
            // Cancelled, that is all.
        }
        listeners_.clear();
        debug_.reset();
        // Idle clients keep streams open for ever: only builds are worth waiting for.
        const auto patience = world_->builds.running() > 0 ? grace : nanoseconds{0};
        if (secure_) co_await secure_->stop(patience);
        co_await plain_->stop(patience);
        lock_.reset();
    }

private:
    static async::task<void> accept(async::executor ex, unique_fd fd, std::shared_ptr<rpc::server> server) {
        boost::asio::posix::stream_descriptor listening(ex, fd.get());
        (void)fd.release();
        for (;;) {
            co_await listening.async_wait(boost::asio::posix::stream_descriptor::wait_read, async::use_task);
            for (;;) {
                unique_fd connection{::accept4(listening.native_handle(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK)};
                if (connection) {
                    server->adopt(std::move(connection));
                    continue;
                }
                if (errno == EAGAIN || errno == EWOULDBLOCK) break;
                if (errno == EINTR || errno == ECONNABORTED) continue;
                log(log_level::error, "a connection could not be accepted", {{"error", std::string(os_error(errno, "accept").what())}});
                co_await async::sleep_for(std::chrono::milliseconds{100});
                break;
            }
        }
    }

    std::shared_ptr<world> world_;
    unique_fd lock_;
    std::vector<listener> listeners_;
    std::optional<listener> debug_;
    std::shared_ptr<rpc::server> plain_, secure_;
    async::task_group accepting_;
};

async::task<std::shared_ptr<daemon>> open_here(options o) {
    auto lock = take_lock(o.root);
    auto security = read_tls(o.settings.grpc.tls);
    auto listeners = open_listeners(o);
    auto w = std::make_shared<world>(o, worker_id(o.root));
    w->disk = fs::disk_space(o.root).total;
    std::optional<listener> debug;
    if (!o.settings.grpc.debug_address.empty()) debug.emplace(open_debug_listener(o.settings.grpc.debug_address, o));
    o.engine->run_frontends_with(run_frontend_images(w));
    auto out = std::make_shared<daemon_impl>(std::move(w), std::move(lock), std::move(listeners), std::move(security));
    if (debug) out->debug_on(std::move(*debug));
    co_return out;
}

}  // namespace

async::task<std::shared_ptr<daemon>> daemon::open(options o) { return open_here(std::move(o)); }

}  // namespace cobuild::daemon

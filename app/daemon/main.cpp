// cobuildd: the daemon, also under the name buildkitd with that program's flags. `cobuild daemon` becomes it.
#include <malloc.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <functional>
#include <iostream>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

#include "cli.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.build;
import cobuild.config;
import cobuild.daemon;

namespace cobuild::app {
namespace {

/// For builds under way when it is told to end: less than the ten seconds after which `docker stop` kills.
constexpr auto grace = std::chrono::seconds{7};

/// sd_notify(3) without the library: one datagram to $NOTIFY_SOCKET.
void notify(std::string_view what) {
    const char* path = std::getenv("NOTIFY_SOCKET");
    if (path == nullptr || *path == '\0') return;
    sockaddr_un to{};
    to.sun_family = AF_UNIX;
    const std::string_view name = path;
    if (name.size() >= sizeof to.sun_path) return;
    std::memcpy(to.sun_path, name.data(), name.size());
    if (to.sun_path[0] == '@') to.sun_path[0] = '\0';
    const unique_fd s{::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0)};
    if (!s) return;
    const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + name.size());
    (void)::sendto(s.get(), what.data(), what.size(), MSG_NOSIGNAL, reinterpret_cast<const sockaddr*>(&to), size);
}

/// buildkitd's flags that the engine's commands do not have.
struct daemon_flags {
    engine_flags engine;
    bool allow_insecure_tcp = false;

    void add_to(CLI::App& cli) {
        engine.add_to(cli);
        auto& o = engine.overrides;
        const auto text = [&cli](const std::string& name, std::optional<std::string>& target, const std::string& help) {
            return cli.add_option_function<std::string>(name, [&target](const std::string& v) { target = v; }, help)->type_name("TEXT");
        };
        const auto list = [&cli](const std::string& name, std::optional<std::vector<std::string>>& target, const std::string& help) {
            cli.add_option_function<std::vector<std::string>>(
                   name, [&target](const std::vector<std::string>& v) { target = v; }, help)
                ->type_name("TEXT")
                ->take_all()
                ->allow_extra_args(false);
        };
        const auto flag = [&cli](const std::string& name, std::optional<bool>& target, const std::string& help) {
            cli.add_flag_function(name, [&target](std::int64_t n) { target = n > 0; }, help);
        };
        list("--addr", o.addr, "Where to listen: unix:///PATH, tcp://HOST:PORT, fd:// (may repeat)");
        text("--group", o.group, "Group that may use the socket, by name or number");
        text("--debugaddr", o.debugaddr, "HOST:PORT of the debug listener: /metrics, /debug/")->envname("BUILDKITD_DEBUGADDR");
        text("--tlscert", o.tlscert, "Certificate of the tcp listeners");
        text("--tlskey", o.tlskey, "Its key");
        text("--tlscacert", o.tlscacert, "Authority that clients' certificates must be signed by");
        text("--otel-socket-path", o.otel_socket_path, "Socket for steps' traces");
        flag("--proxy-network", o.proxy_network, "Force every build through a capturing proxy");
        flag("--rootless", o.rootless, "Run without root");
        flag("--cdi-disabled", o.cdi_disabled, "No CDI devices");
        list("--cdi-spec-dir", o.cdi_spec_dir, "Directories of CDI specifications");
        cli.add_flag("--allow-insecure-tcp", allow_insecure_tcp, "Serve plain tcp on other addresses than loopback");
        worker("--oci-worker", o.oci, cli, text, list, flag);
        worker("--containerd-worker", o.containerd, cli, text, list, flag);
    }

private:
    template<class Text, class List, class Flag>
    static void worker(const std::string& prefix, config::worker_overrides& w, CLI::App& cli, const Text& text, const List& list, const Flag& flag) {
        // Go's flag: without a value it is true, and the next word is not its value.
        cli.add_option_function<std::string>(
               prefix, [&w](const std::string& v) { w.enabled = v.empty() ? "true" : v; }, "true, false or auto")
            ->expected(0, 1)
            ->type_name("TEXT");
        list(prefix + "-labels", w.labels, "Labels of the worker, KEY=VALUE");
        list(prefix + "-platform", w.platforms, "Platforms of the worker");
        text(prefix + "-apparmor-profile", w.apparmor_profile, "AppArmor profile of steps");
        flag(prefix + "-selinux", w.selinux, "SELinux labels for steps");
        flag(prefix + "-rootless", w.rootless, "Run without root");
        if (prefix == "--oci-worker") return;
        flag(prefix + "-gc", w.gc, "Remove old data by itself");
        text(prefix + "-gc-keepstorage", w.gc_keep_storage, "Reserved[,Free[,Max]] in MB");
        text(prefix + "-net", w.network, "Network of steps");
        text(prefix + "-snapshotter", w.snapshotter, "Snapshotter");
    }
};

async::task<void> until(async::cancel_token stop) {
    auto over = std::make_shared<async::event>();
    const auto registered = stop.on_cancel([over] { over->set(); });
    co_await over->wait();
}

/// SIGHUPs on their way from the thread that takes signals to the coroutine that answers them; those that come meanwhile are one.
class hangups {
public:
    void arrived() {
        const std::lock_guard lock(guard_);
        next_->set();
    }
    async::task<void> wait() {
        const auto event = next();
        co_await event->wait();
        const std::lock_guard lock(guard_);
        next_ = std::make_shared<async::event>();
    }

private:
    std::shared_ptr<async::event> next() {
        const std::lock_guard lock(guard_);
        return next_;
    }
    std::mutex guard_;
    std::shared_ptr<async::event> next_ = std::make_shared<async::event>();
};

async::task<void> reload_on_hangup(std::shared_ptr<daemon::daemon> d, async::executor ex, std::shared_ptr<hangups> signals,
                                   const engine_flags& flags) {
    for (;;) {
        co_await signals->wait();
        notify("RELOADING=1");
        try {
            auto settings = flags.reload();
            co_await async::on(ex, d->reload(std::move(settings)));
            log(log_level::info, "registry settings and certificates were read anew");
        } catch (const error& e) {
            if (e.kind() == errc::canceled) throw;
            log(log_level::error, "the settings could not be read anew; the old ones stay", {{"error", e.what()}});
        }
        notify("READY=1");
    }
}

async::task<void> serve(std::shared_ptr<build::engine> engine, daemon::options o, std::shared_ptr<hangups> signals, const engine_flags& flags,
                        async::cancel_token stop) {
    const auto ex = engine->runtime().get_executor();
    const auto d = co_await async::on(ex, daemon::daemon::open(std::move(o)));
    for (const auto& a : d->addresses()) log(log_level::info, cat("running server on ", a));
    if (!d->debug_address().empty()) log(log_level::info, cat("debug listener on ", d->debug_address()));
    async::task_group reloading(co_await async::current_executor, true);
    reloading.spawn(reload_on_hangup(d, ex, std::move(signals), flags));
    notify("READY=1");
    co_await until(std::move(stop));
    notify("STOPPING=1");
    log(log_level::info, "stopping server");
    co_await async::no_cancel;
    reloading.cancel();
    try {
        co_await reloading.join();
    } catch (const std::exception&) {
        // Cancelled, that is all.
    }
    co_await async::on(ex, d->stop(grace));
}

async::task<int> run_engine(build::engine_options options, daemon::options o, std::shared_ptr<hangups> signals, const engine_flags& flags,
                            async::cancel_token stop) {
    auto engine = co_await build::engine::open(std::move(options));
    std::exception_ptr failed;
    try {
        o.engine = engine;
        co_await serve(engine, std::move(o), std::move(signals), flags, std::move(stop));
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::no_cancel;
    co_await engine->close();
    if (failed) std::rethrow_exception(failed);
    co_return 0;
}

/// "cobuildd build ...": `cobuild build` where the Dockerfile is for a frontend that is an image.
int run_build(int argc, char** argv) {
    CLI::App cli{"Builds with frontends that are images.", "cobuild"};
    interrupt stop;
    const auto build = add_build(cli, stop, [](std::shared_ptr<build::engine> engine, const config::configuration& settings) {
        build::engine_options at;
        at.settings = settings;
        engine->run_frontends_with(daemon::frontend_runner({.engine = engine, .settings = settings, .root = build::state_directory(at).string()}));
    });
    let_the_last_count(cli);
    try {
        cli.parse(argc, argv);
    } catch (const CLI::ParseError& e) {
        if (e.get_exit_code() == 0) return cli.exit(e);
        const auto words = unexpected_words(cli);
        std::cerr << "error: " << (words.empty() ? e.what() : words) << "\n";
        return 2;
    }
    return build.run();
}

int run(int argc, char** argv) {
    if (argc > 1 && std::string_view(argv[1]) == "build") return run_build(argc, argv);
    const bool as_buildkitd = std::filesystem::path(argv[0]).filename() == "buildkitd";
    CLI::App cli{"Serves BuildKit's API: docker buildx and buildctl build with it.",
                 as_buildkitd ? "buildkitd" : std::filesystem::path(argv[0]).filename().string()};
    cli.set_version_flag("--version", "cobuildd " + std::string(version()));
    cli.get_formatter()->column_width(32);
    interrupt stop;
    daemon_flags flags;
    flags.add_to(cli);
    let_the_last_count(cli);
    try {
        cli.parse(argc, argv);
    } catch (const CLI::ParseError& e) {
        if (e.get_exit_code() == 0) return cli.exit(e);
        const auto words = unexpected_words(cli);
        std::cerr << "error: " << (words.empty() ? e.what() : words) << "\n";
        return 2;
    }
    flags.engine.default_level = log_level::info;
    if (const char* level = std::getenv("BUILDKITD_LOG_LEVEL"); level != nullptr && *level != '\0' && !flags.engine.overrides.log_level)
        flags.engine.overrides.log_level = level;
    build::engine_options options;
    options.settings = flags.engine.load();
    // Who starts it under that name means BuildKit's directory: the volume that buildx gives its containers.
    if (as_buildkitd) options.root = options.settings.root;
    daemon::options o;
    o.settings = options.settings;
    o.root = build::state_directory(options).string();
    o.allow_insecure_tcp = flags.allow_insecure_tcp;
    o.as_buildkitd = as_buildkitd;
    const auto signals = std::make_shared<hangups>();
    stop.on_hangup([signals] { signals->arrived(); });
    async::runtime here({.max_blocking_threads = 1});
    return here.block_on(run_engine(std::move(options), std::move(o), signals, flags.engine, stop.token()));
}

}  // namespace
}  // namespace cobuild::app

int main(int argc, char** argv) {
    ::signal(SIGPIPE, SIG_IGN);
    // Dozens of threads that mostly wait: many arenas would only keep from one what another has freed.
    ::mallopt(M_ARENA_MAX, 2);
    try {
        return cobuild::app::run(argc, argv);
    } catch (...) {
        const auto e = cobuild::describe(std::current_exception());
        cobuild::app::print_error(e);
        return cobuild::app::exit_code_for(e);
    }
}

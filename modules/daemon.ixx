/// cobuild.daemon: BuildKit's gRPC API over an engine: Control, LLBBridge, health, and the sessions of its clients.
///
/// A *build* is one Control.Solve call; what it tells goes to the Status calls that name it, also for ten seconds after its
/// end. A build without definition and frontend is driven by its client: LLBBridge calls name it in their metadata, and
/// Return gives its result. A *session* is a tunnel in which the roles are exchanged: the client serves its files, secrets,
/// logins and ssh agents, and takes what is exported to it.
///
/// Beside it: gRPC's health and reflection services, OpenTelemetry's traces (taken and dropped), and the debug listener, plain
/// HTTP (metrics, the graph, what waits for what).
///
/// Follows moby/buildkit's api/services/control and frontend/gateway; docs/daemon.md lists what is not there.
/// Threads: everything on the engine's io thread. A client that goes away ends its build, unless another waits for the same
/// steps. Limits: a message 16 MiB, a build's kept output 64 MiB (the oldest is dropped), waiting for a session 5 s.
/// Not its job: flags and configuration files, signals (app), the engine.
module;
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

export module cobuild.daemon;

import cobuild.base;
import cobuild.async;
import cobuild.build;
import cobuild.config;
export import :types;

export namespace cobuild::daemon {

class daemon {
public:
    /// Takes the daemon's lock of the state directory and listens on settings.grpc.address (unix, tcp, fd). Throws errc::exists naming
    /// the process that has the lock, errc::invalid for an address, errc::permission for plain tcp.
    static async::task<std::shared_ptr<daemon>> open(options o);
    virtual ~daemon() = default;
    /// Where it listens, as one writes it: "unix:///run/...", "tcp://127.0.0.1:1234".
    [[nodiscard]] virtual std::vector<std::string> addresses() const = 0;
    /// Of the debug listener (settings.grpc.debug_address); empty without one.
    [[nodiscard]] virtual std::string debug_address() const = 0;
    /// Takes over the registry sections and the TLS files of `settings`: for connections and registry calls from now on. Throws for
    /// files that cannot be read or used, and then leaves all as it was.
    virtual async::task<void> reload(config::configuration settings) = 0;
    /// Takes no more connections; builds under way may end within `grace`, then they are cancelled. Sockets are removed.
    virtual async::task<void> stop(nanoseconds grace) = 0;
};

/// Runs frontends that are images for an engine without a daemon (engine::run_frontends_with); `o.settings` says which may run.
build::frontend_runner frontend_runner(options o);

}  // namespace cobuild::daemon

/// cobuild.build: the engine. A Dockerfile goes in, an image comes out; the command line and embedders use the same calls.
///
///     auto engine = co_await build::engine::open({.root = "/var/lib/cobuild"});
///     auto result = co_await engine->build({.context = "app", .tags = {"app:1"}});
///     co_await engine->close();
///
/// An engine owns its threads. Its calls may be awaited from any executor and resume the caller there. It installs no
/// signal handler, leaves umask and locale alone, and waits for no child that is not its own. Several engines and
/// processes may share one state directory. Thread safety: all members may be called from any thread.
///
/// Errors are cobuild::error. Cancelling an awaited build, or its cancel token, ends running steps (TERM, then KILL after
/// half a second), removes what they made, and throws errc::canceled with the cause.
module;
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

export module cobuild.build;

import cobuild.base;
import cobuild.async;
import cobuild.config;
import cobuild.progress;
export import :types;
export import :job;

export namespace cobuild::build {

/// How an engine is set up. Everything not said here comes from `settings`, BuildKit's buildkitd.toml.
struct engine_options {
    config::configuration settings;  ///< as config::load made them; the default is the empty file's
    std::filesystem::path root;      ///< state directory; empty: settings.root
    std::string docker_config;       ///< directory of docker's config.json with logins; empty: DOCKER_CONFIG, else ~/.docker
};

/// Where an engine of these options keeps its state: `root`, else the configuration's, in which BuildKit's own default
/// directory stands for /var/lib/cobuild: no directory is shared with BuildKit.
std::filesystem::path state_directory(const engine_options& options);

/// The engine. Made by open(); close() ends it, the destructor cancels and joins what close() did not.
class engine {
public:
    /// Opens the state directory (made when absent, repaired when a process died in it) and starts the engine's threads.
    /// Warnings about settings that are not built yet go to the log.
    static async::task<std::shared_ptr<engine>> open(engine_options options);
    virtual ~engine() = default;

    /// Builds. `sink` gets every progress event on the engine's io thread, until the call returns.
    virtual async::task<build_result> build(build_request request, std::shared_ptr<progress::sink> sink = {}, async::cancel_token token = {}) = 0;

    /// Answers without building; what only concerns the result of `request` (tags, outputs) is not looked at.
    virtual async::task<answer> ask(build_request request, question what, std::shared_ptr<progress::sink> sink = {},
                                    async::cancel_token token = {}) = 0;

    virtual async::task<std::vector<image_info>> images() = 0;
    /// False when there is no such image.
    virtual async::task<bool> remove_image(std::string name) = 0;
    /// Those that BuildKit's filters take (see prune_options::filters); without any all.
    virtual async::task<std::vector<usage_info>> usage(std::vector<std::string> filters = {}) = 0;
    /// What was removed.
    virtual async::task<std::vector<usage_info>> prune(prune_options options) = 0;

    /// What the content store holds, and a part of it (to the end: `size` 0, at most 4 MiB); throws errc::not_found.
    virtual async::task<std::vector<blob_info>> blobs() = 0;
    virtual async::task<std::string> read_blob(std::string digest, std::uint64_t offset, std::uint64_t size) = 0;

    /// A build that its caller drives, on the engine's io thread. It must have ended before close().
    virtual std::shared_ptr<job> start(job_options options) = 0;
    /// Registry sections (mirrors, certificates, http, insecure) are those of `settings` from now on, and certificates are read anew;
    /// transfers under way end as they began. Nothing else of it counts.
    virtual async::task<void> reload(config::configuration settings) = 0;
    /// What the engine is doing right now, for who looks at it from outside; on the engine's io thread.
    [[nodiscard]] virtual activity current() const = 0;
    /// Who runs frontends that are images, from now on; without one they are refused. Called on the engine's io thread; freed by
    /// close().
    virtual void run_frontends_with(frontend_runner runner) = 0;
    /// The engine's threads, for who runs beside it.
    virtual async::runtime& runtime() = 0;

    /// Waits for builds to end and gives back every thread, lock and descriptor. Later calls throw errc::canceled.
    virtual async::task<void> close() = 0;
};

}  // namespace cobuild::build

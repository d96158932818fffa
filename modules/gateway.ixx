/// cobuild.gateway: what a frontend may ask of the engine while it turns source text into a definition.
///
/// A contract only: the engine implements it for one build (its session, its login, its platforms), tests fake it. Calls
/// come from the engine's executor and may run at the same time. What is not here a frontend cannot do.
module;
#include <cstdint>
#include <optional>
#include <string>

export module cobuild.gateway;

import cobuild.base;
import cobuild.async;
import cobuild.llb;
import cobuild.oci;

export namespace cobuild::gateway {

/// BuildKit's image-resolve-mode: `standard` asks the registry unless the reference has a digest that is here already,
/// `pull` always asks, `local` takes what is here and asks only when nothing is.
enum class resolve_mode { standard, pull, local };

struct resolve_request {
    std::string reference;   ///< normalised: docker.io/library/busybox:latest
    oci::platform platform;  ///< which member of an index
    resolve_mode mode = resolve_mode::standard;
    std::string store{};   ///< of "oci-layout://NAME@DIGEST": the client's id of the layout; empty: NAME
    std::string log_name;  ///< the progress line: "[internal] load metadata for docker.io/library/busybox:latest"
};

struct image_config {
    std::string reference;           ///< as asked, unless the engine's policy put another in its place; no digest added
    std::optional<digest> manifest;  ///< of the index or manifest the reference names; pins the reference. Empty for a local image without one
    std::string config;              ///< the image's configuration, JSON bytes
};

class frontend_gateway {
public:
    virtual ~frontend_gateway() = default;

    /// Throws errc::not_found when there is no such image or it has no such platform.
    virtual async::task<image_config> resolve_image_config(resolve_request request) = 0;

    /// A small file (at most 16 MiB) of a context the client offers: "dockerfile" or "context", path relative to its root.
    /// Empty when there is no such file.
    virtual async::task<std::optional<std::string>> read_context_file(std::string context, std::string path) = 0;

    /// When what a git or http source names was last changed, in seconds since 1970: a commit's time, a file's Last-Modified,
    /// else the newest file of the archive it is. Empty when nothing says so, and for other sources.
    virtual async::task<std::optional<std::int64_t>> source_time(llb::source_op source, std::string log_name);

protected:
    frontend_gateway() = default;
    frontend_gateway(const frontend_gateway&) = default;
    frontend_gateway& operator=(const frontend_gateway&) = default;
};

}  // namespace cobuild::gateway

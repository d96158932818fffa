/// cobuild.frontend: from a Dockerfile to a definition and an image configuration.
///
/// Follows BuildKit's dockerfile.v0 (docs: Dockerfile reference): parse, expand, only the stages the target needs, base
/// images resolved in parallel through the gateway. `# syntax=docker/dockerfile:1...` is this frontend; another image's
/// is refused by name, as is everything not built yet: ADD from http or git, contexts with names, platforms of
/// which the base has none, RUN --security=insecure, RUN --device.
///
/// The types of its request and result stand in modules/frontend/types.ixx.
/// Errors: errc::invalid or errc::unsupported with the source location (Dockerfile's name and line); the gateway's own
/// errors get the line of the FROM that asked. Pure but for the gateway. Runs on the caller's executor.
module;
#include <string>
#include <vector>

#include <boost/asio/awaitable.hpp>

export module cobuild.frontend;

import cobuild.base;
import cobuild.async;
import cobuild.llb;
import cobuild.oci;
export import :types;
import cobuild.gateway;

export namespace cobuild::frontend {

/// Converts; see the head of this file.
async::task<result> convert(request r, gateway::frontend_gateway& engine);

/// A stage as `--call=targets` lists it.
struct target {
    std::string name;
    std::string base;
    std::string platform;
    std::string description;
    bool is_default = false;
    unsigned line = 0;
};
std::vector<target> list_targets(const std::string& dockerfile, const std::string& dockerfile_name);

}  // namespace cobuild::frontend

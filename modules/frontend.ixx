/// cobuild.frontend: from a Dockerfile to a definition and an image configuration.
///
/// Follows BuildKit's dockerfile.v0 (docs: Dockerfile reference): parse, expand, only the stages the target needs, base
/// images resolved in parallel through the gateway. `# syntax=docker/dockerfile:1...` is this frontend; another image's
/// is refused by name, as is everything not built yet: RUN --device.
///
/// The types of its request and result stand in modules/frontend/types.ixx.
/// Errors: errc::invalid or errc::unsupported with the source location (Dockerfile's name and line); the gateway's own
/// errors get the line of the FROM that asked. Pure but for the gateway. Runs on the caller's executor.
module;
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

export module cobuild.frontend;

import cobuild.base;
import cobuild.async;
import cobuild.llb;
import cobuild.oci;
export import :types;
import cobuild.gateway;

export namespace cobuild::frontend {

/// The version of docker/dockerfile whose language this is.
inline constexpr std::string_view language_version = "1.26.0";

/// Converts; see the head of this file. `found` gets the warnings, also when it throws.
async::task<result> convert(request r, gateway::frontend_gateway& engine, std::vector<warning>* found = nullptr);

/// An error of the request's Dockerfile as BuildKit's clients know it: a mistake in an instruction begins with "dockerfile parse
/// error on line 4: ", and the lines of the whole instruction are told, one range a line. Without ranges: no error of the file.
struct told_error {
    error what;
    std::vector<llb::range> ranges;
};
told_error told(const request& r, const error& e);
/// The Dockerfile as steps' places name it, with the graph that it is read from.
llb::source_info source_of(const request& r);

/// The ops that a remote context of the request is made of, each the only input of the next; the last one is the context.
/// For who wants a file of it (its Dockerfile) before the conversion.
std::vector<llb::op> context_ops(const request& r);

/// What a context named on a command line is, as a remote context of a request: a git repository, or a file behind a URL that
/// is to be unpacked ("context"). False for a path.
bool set_remote_context(request& r, std::string_view text, bool keep_git_dir);

/// Reads the Dockerfile (context "dockerfile", name as the request says; "dockerfile" stands in for "Dockerfile") and the
/// ignore file that counts: "<name>.dockerignore" beside it, else ".dockerignore" of context "context". What the request
/// holds already is kept. Throws errc::not_found without a Dockerfile.
async::task<request> read_sources(request r, gateway::frontend_gateway& engine);

/// BuildKit's frontend attributes ("target", "build-arg:X", "platform", ...) as a request for each of `platforms`: set
/// `build.target_platform` to one after the other; when there is none, leave it empty. `build.build_platform` is the
/// caller's. Attributes that are others' work (cache-from, attest:, vcs:, ...) are passed over. Throws errc::invalid naming
/// the attribute, errc::unsupported for a subdirectory of the context; what `context` names is the caller's (set_remote_context).
struct attr_request {
    request build;
    std::vector<oci::platform> platforms;
};
attr_request parse_attrs(const std::map<std::string, std::string>& attrs);

/// The frontend image that the request's Dockerfile is written for (`# syntax=`, the build argument BUILDKIT_SYNTAX), unless it is
/// docker/dockerfile, which is this frontend.
struct foreign_frontend {
    std::string image;
    std::string cmdline;                   ///< the directive's whole value
    std::optional<source_location> where;  ///< of the directive
};
std::optional<foreign_frontend> wanted_frontend(const request& r);

std::vector<target> list_targets(const std::string& dockerfile, const std::string& dockerfile_name);

/// BuildKit's sub-requests frontend.lint, frontend.outline and frontend.targets. Nothing is built; bases are resolved.
/// `check` looks at every stage when the request names none, never throws for the file's own errors (see answer::problem),
/// and `# check=error=true` does not make it fail: its status does.
async::task<answer> check(request r, gateway::frontend_gateway& engine);
async::task<answer> show_outline(request r, gateway::frontend_gateway& engine);
answer show_targets(const request& r);

}  // namespace cobuild::frontend

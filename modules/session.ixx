/// cobuild.session: what a client offers while its build runs: directories, secrets and ssh agents by name.
///
/// The contract, and the kind for a client in the same process, which reads its directories in place. A daemon brings the
/// kind for remote clients. Thread safety: calls on the engine's io thread; directories may be read from pool threads.
/// Not its job: logins (registry asks for them through its own contract), exporting back to the client.
module;
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

export module cobuild.session;

import cobuild.base;
import cobuild.async;

export namespace cobuild::session {

class session {
public:
    virtual ~session() = default;
    /// The directory a client gave under this name ("context", "dockerfile"), to be read in place; empty: none of that name.
    [[nodiscard]] virtual std::optional<std::filesystem::path> directory(const std::string& name) const = 0;
    /// The bytes of a secret, asked for each time it is needed; empty: not given. At most 500 KiB, else errc::invalid.
    virtual async::task<std::optional<std::string>> secret(std::string id) = 0;
    /// The path of an ssh agent's socket that the client lends under this id ("default"); empty: none.
    virtual async::task<std::optional<std::string>> ssh_agent(std::string id);
};

/// Where a local client keeps a secret: a file, or an environment variable of this process.
struct local_secret {
    std::filesystem::path file;
    std::string environment;
};

struct local_options {
    std::map<std::string, std::filesystem::path> directories;
    std::map<std::string, local_secret> secrets;
    std::map<std::string, std::string> ssh_agents;  ///< paths of sockets by id
};
/// Reads files on the pool. A file that can be read only once (a pipe, a process substitution) is read when first asked
/// for and kept in memory, so a second step sees it too.
std::shared_ptr<session> make_local(async::blocking_pool& pool, local_options options);

}  // namespace cobuild::session

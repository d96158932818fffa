/// Partition of cobuild.source: git repositories as layers, through the system's git.
///
/// A remote's objects are kept in one bare repository under the state directory, shared by all builds and locked while it is
/// used; a fetch brings one commit without its history where the server can. git runs without the user's and the system's
/// configuration, without hooks and prompts, and may speak http, https, ssh and git only. A token goes to the remote's own
/// scheme, host and port, never to submodules elsewhere. A cancelled call kills git with its children; locks that a killed
/// git left are removed by the next user.
///
/// Thread safety: calls on the engine's io thread. Errors name the remote, passwords left out: errc::unsupported without
/// git, unauthorized, not_found (repository, ref or subdirectory), unavailable, corrupt (not the commit asked for).
module;
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

export module cobuild.source:git;

import cobuild.base;
import cobuild.async;
import cobuild.state;
import cobuild.snapshot;
import cobuild.process;
import cobuild.progress;
import :http;

export namespace cobuild::source {

struct git_request {
    std::string remote;    ///< as git takes it
    std::string ref;       ///< branch, tag, "refs/...", commit; empty: HEAD
    std::string subdir;    ///< clean, relative; empty: all
    std::string checksum;  ///< hex digits the commit must begin with
    bool keep_git_dir = false;
    bool submodules = true;
    bool commit_time = false;  ///< files get the commit's time instead of the time of the checkout
    std::string token_secret = "GIT_AUTH_TOKEN", header_secret = "GIT_AUTH_HEADER";
    std::string known_hosts;  ///< for ssh; empty: any host key is taken
    std::string ssh_id = "default";
};

/// What the client lends while git runs.
struct git_access {
    secret_reader secrets;
    /// The path of an ssh agent's socket, by id.
    std::function<async::task<std::optional<std::string>>(std::string)> ssh_agent;
};

struct git_commit {
    std::string id;
    std::string ref;  ///< the full name it was found under; empty for a commit named by itself
};

struct git_tree {
    snapshot::chain chain;
    state::pin keep;
    std::int64_t committed = 0;  ///< seconds since 1970
};

class git_repositories {
public:
    git_repositories(state::directory& directory, snapshot::store& snapshots, process::spawner& programs);
    ~git_repositories();
    git_repositories(const git_repositories&) = delete;
    git_repositories& operator=(const git_repositories&) = delete;

    /// Which commit is meant; a full commit id asks nobody.
    async::task<git_commit> resolve(git_request request, git_access access, progress::writer progress);
    /// The files of that commit.
    async::task<git_tree> checkout(git_request request, git_commit commit, git_access access, progress::writer progress);
    /// The commit itself, as git keeps it: "tree ...", author, committer, message.
    async::task<std::string> commit_object(git_request request, git_commit commit, git_access access, progress::writer progress);
    /// Removes the shared repositories that nobody uses now.
    async::task<void> clear();

private:
    struct state;
    std::shared_ptr<state> state_;
};

}  // namespace cobuild::source

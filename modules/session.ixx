/// cobuild.session: what a client offers while its build runs: directories, secrets and ssh agents by name.
///
/// The contract, and the kind for a client in the same process, which reads its directories in place. A daemon brings the
/// kind for remote clients. Thread safety: calls on the engine's io thread; directories may be read from pool threads.
/// Not its job: logins (registry asks for them through its own contract), exporting back to the client.
module;
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

export module cobuild.session;

import cobuild.base;
import cobuild.async;

export namespace cobuild::session {

/// What of a directory is wanted, in BuildKit's terms; every list may be empty.
struct directory_request {
    std::string name;
    std::vector<std::string> include;        ///< patterns; empty: everything
    std::vector<std::string> exclude;        ///< ignore rules
    std::vector<std::string> follow;         ///< paths whose links are followed and whose targets come too; empty: everything
    std::string shared_key_hint;             ///< tells directories of one client apart
    bool metadata_is_no_difference = false;  ///< local.differ=none: every file is sent anew
    /// Told while the directory comes over a wire: bytes so far.
    std::function<void(std::uint64_t)> on_bytes{};
};

/// Gets a blob's or file's bytes piece by piece, in their order.
using piece_sink = std::function<async::task<void>(std::string piece)>;

/// Blobs at the client by digest: an OCI layout that it lends, or a place that takes what is exported. What is read is not
/// verified here. Calls may run at the same time.
class blob_store {
public:
    virtual ~blob_store() = default;
    /// Bytes; empty: the client has no such blob (or lends no such store).
    virtual async::task<std::optional<std::uint64_t>> size(digest which) = 0;
    /// Throws errc::not_found.
    virtual async::task<void> read(digest which, piece_sink to) = 0;
    /// `next` gives the blob's pieces, an empty one at its end. One that is there already is not sent.
    virtual async::task<void> write(digest which, std::uint64_t size, std::function<async::task<std::string>()> next) = 0;
};

class session {
public:
    virtual ~session() = default;
    /// The directory a client gave under this name ("context", "dockerfile"), to be read in place while the session lives; it has
    /// at least what `what` asks for, or (a local client's) everything. Empty: none of that name.
    virtual async::task<std::optional<std::filesystem::path>> directory(directory_request what) = 0;
    /// A file of such a directory, at most 16 MiB, links followed but never out of it; empty when there is none.
    virtual async::task<std::optional<std::string>> read_file(std::string name, std::string path) = 0;
    /// The bytes of a secret, asked for each time it is needed; empty: not given. At most 500 KiB, else errc::invalid.
    virtual async::task<std::optional<std::string>> secret(std::string id) = 0;
    /// The path of an ssh agent's socket that the client lends under this id ("default"); empty: none.
    virtual async::task<std::optional<std::string>> ssh_agent(std::string id);
    /// The blobs the client keeps under an id: "oci:NAME" (a layout), "local:DIR" (a cache), "export". Null: it lends none at all.
    virtual std::shared_ptr<blob_store> blobs(std::string id);
    /// What the client sends when it is asked for a path (a context from its standard input); false: it sends nothing so.
    virtual async::task<bool> upload(std::string path, piece_sink to);
    /// Another session of the same daemon, whose directories this one's build was told to use; null: this one knows no others.
    virtual async::task<std::shared_ptr<session>> other(std::string id);
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
/// Reads files on the pool, directories in place. A file that can be read only once (a pipe, a process substitution) is read when first asked
/// for and kept in memory, so a second step sees it too.
std::shared_ptr<session> make_local(async::blocking_pool& pool, local_options options);

}  // namespace cobuild::session

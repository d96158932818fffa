/// cobuild.remote: how users name what is to be fetched: git repositories and files behind URLs.
///
/// The forms are BuildKit's (docs: "Build context", "ADD"): https://host/x.git, git@host:x.git, ssh://, git://, each with
/// a fragment "#ref:subdir" or a query "?ref=...&subdir=...", never both. Pure: nothing is resolved or asked.
/// Errors: errc::invalid for what is clearly meant to be git but is malformed. Thread-safe.
/// Not its job: fetching (source), local paths.
module;
#include <optional>
#include <string>
#include <string_view>

export module cobuild.remote;

import cobuild.base;

export namespace cobuild::remote {

/// A git repository, and what of it is meant.
struct git_ref {
    std::string remote;    ///< what git is told, without fragment and query
    std::string scheme;    ///< https, http, ssh (also of the form user@host:path) or git
    std::string host;      ///< with the port where one is named, without user
    std::string path;      ///< without a leading slash
    std::string ref;       ///< branch, tag, "refs/..." or a commit; empty: the remote's HEAD
    std::string subdir;    ///< relative and clean; empty: all
    std::string checksum;  ///< hex digits the commit must begin with
    std::optional<bool> keep_git_dir;
    std::optional<bool> submodules;
    bool commit_time = false;      ///< mtime=commit: files get the time of the commit
    bool fetch_by_commit = false;  ///< the ref only helps to find `checksum`'s commit
};

/// Empty for what is no git form (a path, an image, an http URL that does not end in .git).
std::optional<git_ref> parse_git(std::string_view text);
/// The same, and "github.com/x/y", which is a path to ADD but a repository where a context is named.
std::optional<git_ref> parse_git_context(std::string_view text);
/// http:// or https:// and no git form.
bool is_http(std::string_view text);

/// The last component of the URL's path, decoded; "__unnamed__" when it has none. Never has a slash, is never "..".
std::string file_name(std::string_view url);
/// BuildKit's name of a git source: "host/path#ref:subdir".
std::string identifier(const git_ref& r);
/// The text with a password or token between "//" and "@" shown as "xxxxx".
std::string redacted(std::string_view url);
/// 40 or 64 hex digits.
bool is_commit(std::string_view text);
/// Throws errc::invalid for what git could take for an option or something else than the name of a ref.
void check_ref(std::string_view ref);

}  // namespace cobuild::remote

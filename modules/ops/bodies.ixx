/// Internal to cobuild.ops: the ops by kind, and the result of a local source.
module;
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.ops:bodies;

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import cobuild.llb;
import cobuild.snapshot;
import cobuild.solver;
import cobuild.cache;
import :environment;

namespace cobuild::ops {

/// A client's directory, read in place: never the input of a step as it is.
struct local_value final : solver::value {
    std::string name;
    fs::root root;
    fs::ignore_patterns excluded;
    /// Patterns that say what counts at all; empty: everything.
    fs::ignore_patterns included;
    explicit local_value(fs::root r) : root(std::move(r)) {}
    /// What the rules leave of a path relative to the root.
    [[nodiscard]] fs::copy_verdict verdict(std::string_view path, bool directory) const;
};

/// One list of patterns applied to one path; a directory is entered when something below it may count.
fs::copy_verdict excluded_by(const fs::ignore_patterns& patterns, std::string_view path, bool directory);
fs::copy_verdict included_by(const fs::ignore_patterns& patterns, std::string_view path, bool directory);
/// What is left when both must allow it.
fs::copy_verdict both(fs::copy_verdict a, fs::copy_verdict b);

/// Paths in `root` that a pattern of filepath.Match names component by component, in path order. Links before the first
/// wildcard are followed (the last of them only with `follow`), behind it no link is entered (BuildKit's rule).
std::vector<std::string> expand_wildcard(const fs::root& root, std::string_view pattern, bool follow);

std::shared_ptr<solver::op> make_source_op(const llb::op& what, environment& env, const build_scope& scope);
/// http://, https://, git:// and oci-layout://; null for any other.
std::shared_ptr<solver::op> make_remote_op(const llb::op& what, environment& env, const build_scope& scope);
/// One that ignores the cache begins its cache directories anew, see build_scope::renewed.
std::shared_ptr<solver::op> make_exec_op(const llb::op& what, environment& env, const build_scope& scope, bool ignore_cache);
std::shared_ptr<solver::op> make_file_op(const llb::op& what, environment& env, const build_scope& scope);
std::shared_ptr<solver::op> make_merge_op(const llb::op& what, environment& env);
std::shared_ptr<solver::op> make_diff_op(const llb::op& what, environment& env);
std::shared_ptr<solver::op> make_passthrough_op(const llb::op& what);

/// The chain of a value; copies a local directory's selected files into a layer first (a step must never see the live
/// directory). `select` is a path inside it.
async::task<std::shared_ptr<chain_value>> as_chain(environment& env, solver::result value, std::string select);
/// A chain with its pins. Throws errc::not_found when a layer was removed meanwhile.
async::task<std::shared_ptr<chain_value>> hold_chain(environment& env, snapshot::chain c);
std::shared_ptr<chain_value> with_layer(const chain_value& below, snapshot::layer top);

/// What of a step's output is shown, by BuildKit's variables BUILDKIT_STEP_LOG_MAX_SIZE (bytes) and _MAX_SPEED (bytes a second).
/// Unset or negative: all of it, since it goes to the terminal of whoever builds. One per stream.
class output_limit {
public:
    output_limit();
    /// What of `data` is shown now; the first time something is held back, with a line that says so.
    std::string pass(std::string_view data);
    /// The last that was held back, at most 256 KiB: where a step failed it holds the reason.
    std::string rest();

private:
    std::optional<std::uint64_t> size_, speed_;
    std::optional<std::chrono::steady_clock::time_point> begun_;
    std::uint64_t shown_ = 0;
    std::string tail_;
};

/// The op without what its inputs are: what counts of it in a cache key.
digest key_of(std::string_view kind, const llb::op& without_inputs);

/// Users and groups by name, from the tree's /etc/passwd and /etc/group.
struct user_id {
    std::uint32_t uid = 0;
    std::uint32_t gid = 0;
};
std::uint32_t find_user(const fs::root& root, const std::string& name, std::uint32_t* primary_group);
std::uint32_t find_group(const fs::root& root, const std::string& name);

/// chmod(1)'s symbolic form ("u=rwX,go=rX") applied to a mode; throws errc::invalid.
std::uint32_t apply_symbolic_mode(std::string_view text, std::uint32_t mode, bool directory);

/// One copy action: from a tree (a chain's view or a live directory) into a mounted writable tree.
struct copy_job {
    const fs::root* from = nullptr;
    const local_value* live = nullptr;  ///< set when `from` is a client's directory: its rules decide what is seen
    const fs::root* to = nullptr;       ///< null: nothing is written, only the digest is made (from remembered stats)
    llb::copy_action what;
    std::optional<fs::owner> owner;
    bool read = false;  ///< with `to` null: files that are not remembered are read
};
/// Copies and digests what landed (live sources). With `to` null: the digest the copy would have, or empty when a file's
/// bytes are not remembered by its stat and not to be read.
std::optional<digest> run_copy(const copy_job& job, cache::stat_memo* memo);

}  // namespace cobuild::ops

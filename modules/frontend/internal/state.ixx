/// What a conversion holds while it runs. The steps, in the order of `converter::run`: scope.cpp (syntax, checks, global
/// ARGs), stages.cpp (stages, their dependencies, ONBUILD), bases.cpp (base images), dispatch.cpp and its fellows (one
/// instruction after the other), convert.cpp (the whole, and the result).
module;
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

module cobuild.frontend:state;

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import cobuild.llb;
import cobuild.oci;
import cobuild.dockerfile;
import cobuild.gateway;
import cobuild.remote;
import :types;

namespace cobuild::frontend {

namespace df = cobuild::dockerfile;

// ---------------------------------------------------------------- the graph in the making

struct ref {
    std::size_t node = 0;
    std::int64_t output = 0;
    bool operator==(const ref&) const = default;
};
/// A root file system; empty is scratch.
using root_ref = std::optional<ref>;

/// The graph while its build context is open: which paths of it are needed is known only when every instruction was seen,
/// and they are part of the context's name and so of the name of all that lies upon it.
/// What the build context is made of: a graph, if any, and ops each of which is the only input of the next.
struct context_parts {
    std::optional<llb::definition> graph;
    std::vector<llb::op> ops;
};

class draft {
public:
    draft();
    [[nodiscard]] static ref context() { return {0, 0}; }
    /// `inputs` stand for o.inputs, which is made of them. Equal ops are one node.
    ref add(llb::op o, const std::vector<ref>& inputs, llb::op_metadata meta, std::vector<llb::range> where = {});
    /// All of a graph; nothing when that is empty.
    root_ref add(const llb::definition& whole);
    /// What is told of a source only at the end: an attribute that does not count for what equals what.
    void set_attribute(const ref& source, const std::string& key, std::string value);
    [[nodiscard]] llb::definition finish(root_ref result, context_parts context, llb::source_info source) const;

private:
    struct node {
        llb::op what;
        std::vector<ref> inputs;
        llb::op_metadata meta;
        std::vector<std::vector<llb::range>> where;
        std::shared_ptr<const llb::definition> whole;  ///< instead of `what`
    };
    std::vector<node> nodes_;
    std::vector<digest> keys_;
    std::unordered_map<digest, std::size_t> index_;
};

/// The inputs of one op: each root once.
struct input_list {
    std::vector<ref> refs;
    std::int64_t of(const root_ref& r);
};

// ---------------------------------------------------------------- variables

/// NAME=value pairs in the order of their last setting.
class env_list {
public:
    void set(std::string_view key, std::string_view value);
    void erase(std::string_view key);
    [[nodiscard]] std::optional<std::string> get(std::string_view key) const;
    [[nodiscard]] std::vector<std::string> list() const;
    [[nodiscard]] std::vector<std::string_view> keys() const;
    /// A look-up into this list, which must outlive it.
    [[nodiscard]] df::lookup lookup() const;

private:
    struct entry {
        std::string value;
        std::uint64_t order = 0;
    };
    std::map<std::string, entry, std::less<>> entries_;
    std::uint64_t next_ = 0;
};

// ---------------------------------------------------------------- stages

struct stage_state;

/// What an outline tells of an ARG, and of a secret or agent that steps ask for.
struct arg_note {
    std::string value;
    std::string description;
    df::line_range lines;
    std::vector<std::string> needs;  ///< other ARGs that its default names
};
struct demand_note {
    bool required = false;
    df::line_range lines;
};

struct command {
    df::instruction what;
    std::vector<stage_state*> sources;  ///< COPY --from: one; RUN: one a mount, null where it names none
    bool on_build = false;
};

/// A stage of the file, or an image that COPY --from or a mount names (`stage` is null then).
struct stage_state {
    const df::stage* stage = nullptr;
    std::size_t index = 0;
    std::string name;       ///< what its vertices are called after; empty for the only stage
    std::string base_name;  ///< after expansion; a reference with digest once resolved
    std::string context;    ///< the named context that stands in its place, if any
    df::line_range lines;
    stage_state* base = nullptr;
    std::size_t heirs = 0;  ///< who still wants its history: stages from it that are to come, and the result
    std::vector<stage_state*> deps;
    std::vector<command> commands;
    std::optional<oci::platform> platform;

    bool resolved = false;  ///< the base image is known
    bool triggers_known = false;
    bool dispatched = false;  ///< `root` is what others may copy from
    bool ignore_cache = false;

    root_ref root;
    std::optional<ref> local;  ///< the client's directory that `root` is, or was copied from
    env_list env;
    std::map<std::string, std::size_t, std::less<>> config_env;  ///< where a name stands in image.config.env, for the first
    std::size_t config_env_known = 0;                            ///< this many of its entries
    std::string dir;
    std::string user;
    oci::image image;
    std::string base_config;
    std::vector<df::arg_declaration> args;  ///< ARGs declared so far, values in effect
    bool cmd_set = false;

    std::size_t command_index = 0;  ///< of the progress names
    std::size_t command_total = 0;
    bool in_trigger = false;

    std::map<std::string, arg_note> arg_notes;
    std::set<std::string> used_args;  ///< by FROM and by ARG
    std::map<std::string, demand_note> secrets, agents;
};

struct base_key {
    std::string reference;
    std::string platform;
    auto operator<=>(const base_key&) const = default;
};

// ---------------------------------------------------------------- the conversion

class converter {
public:
    converter(request r, gateway::frontend_gateway& engine);
    async::task<result> run();
    /// For sub-requests: everything up to the result, for every stage when no target is named.
    async::task<void> evaluate_all();
    /// What was found so far, sorted by line. Without `all`: of the target's stages and of FROM lines.
    [[nodiscard]] std::vector<df::warning> findings(bool all) const;
    [[nodiscard]] std::vector<warning> told_warnings() const;
    /// The error that findings are where the file or the build says so.
    [[nodiscard]] std::optional<error> check_violation(const std::vector<df::warning>& found) const;
    [[nodiscard]] outline make_outline();
    [[nodiscard]] const std::string& file_name() const noexcept { return req_.dockerfile_name; }

private:
    async::task<stage_state*> evaluate(bool all_stages);
    /// Keeps an error of the file, so that all are told at once; other kinds are thrown on.
    void note(const error& e, df::line_range lines);
    void throw_noted() const;
    void tell_all_problems();
    // scope.cpp
    void check_syntax() const;
    void read_file();
    void warn_before(df::parsed known, unsigned line);
    void make_global_args();
    // epoch.cpp
    async::task<void> read_epoch();
    [[nodiscard]] std::optional<llb::source_op> timed_context(const std::string& name, const std::string& what) const;
    [[nodiscard]] llb::source_op timed_stage(const df::stage& stage) const;

    // scope.cpp
    void warn(df::check_rule rule, df::line_range lines, const std::vector<std::string>& comments, std::string_view first,
              std::string_view second = {}, std::string_view third = {});
    void report_unset(const stage_state& s, const df::instruction& in, const std::vector<std::string>& unmatched);
    [[nodiscard]] source_location place(df::line_range lines) const { return {req_.dockerfile_name, lines.first}; }
    [[noreturn]] void fail(errc kind, std::string message, df::line_range lines) const;
    [[nodiscard]] std::optional<std::string> build_arg(std::string_view name) const;

    // stages.cpp
    void make_stages();
    std::string expand_base(const df::stage& st, stage_state& s);
    [[nodiscard]] std::optional<oci::platform> expand_platform(const df::stage& st, stage_state& s) const;
    [[nodiscard]] stage_state* find_target();
    void connect_stages();
    command make_command(stage_state& s, df::instruction in, bool on_build);
    stage_state* find_source(const std::string& from, df::line_range lines, bool by_index);
    void refuse_cycles() const;
    [[nodiscard]] std::set<const stage_state*> reachable_from(std::vector<const stage_state*> todo) const;
    bool add_triggers(stage_state& s);

    // bases.cpp
    async::task<void> resolve_bases(const std::set<const stage_state*>& needed);
    async::task<void> ask(base_key key, const stage_state* for_whom, oci::platform platform);
    void apply_base(stage_state& s, const gateway::image_config& found, const oci::platform& platform);

    // contexts.cpp
    [[nodiscard]] const std::string* named_context(const std::string& name) const;
    async::task<void> apply_context(stage_state& s);
    void apply_local(stage_state& s, const std::string& directory, const std::vector<std::string>& ignored);
    void apply_input(stage_state& s, const std::string& input);
    /// Paths of a client's directory that a step wants, where the root of `s` is one ("/": all of it).
    void want(const stage_state& s, const std::string& path);
    [[nodiscard]] root_ref unpacked_file(const ref& file, const std::string& name, llb::op_metadata meta);
    [[nodiscard]] oci::image empty_image() const;

    // dispatch.cpp
    void dispatch_stage(stage_state& s);
    void inherit(stage_state& s);
    void dispatch(stage_state& s, command& c);
    void add_history(stage_state& s, std::string created_by, bool layer);
    [[nodiscard]] std::string step_name(stage_state& s, std::string text, const oci::platform* platform) const;
    std::string expand(const stage_state& s, const df::instruction& in, std::string_view word);
    [[nodiscard]] llb::op_metadata metadata(const stage_state& s, std::string name) const;
    [[nodiscard]] std::string display(const stage_state& s, const df::instruction& in) const;

    // config.cpp: one for each instruction that touches the config alone, and WORKDIR
    void set_env(stage_state& s, const df::instruction& in);
    void set_arg(stage_state& s, df::instruction in);
    void set_label(stage_state& s, const df::instruction& in);
    void set_workdir(stage_state& s, const df::instruction& in);
    void change_dir(stage_state& s, std::string_view path) const;
    void set_expose(stage_state& s, const df::instruction& in);
    void set_volume(stage_state& s, const df::instruction& in);
    void set_command(stage_state& s, df::instruction in);
    void set_healthcheck(stage_state& s, const df::instruction& in);
    [[nodiscard]] std::vector<std::string> with_shell(const stage_state& s, std::vector<std::string> args) const;

    // run.cpp, mounts.cpp
    void run_command(stage_state& s, command& c);
    llb::exec_meta run_meta(const stage_state& s) const;
    void add_mounts(stage_state& s, command& c, std::vector<llb::mount>& mounts, std::vector<root_ref>& roots, llb::exec_op& e, env_list& env);
    void add_secret(stage_state& s, const df::mount& m, df::line_range lines, std::vector<llb::mount>& special, llb::exec_op& e) const;
    void add_directory_mount(stage_state& s, const df::mount& m, stage_state* source, df::line_range lines, llb::mount& out, root_ref& root);

    // transfer.cpp
    void transfer(stage_state& s, command& c);
    void check_sources(const stage_state& s, const command& c, const df::transfer& t, bool is_add) const;
    void warn_ignored(const df::instruction& in, std::string_view source, bool is_add);
    root_ref inline_document(const stage_state& s, const df::instruction& in, const df::heredoc& doc);
    llb::copy_action local_copy(std::string src, bool parents) const;
    struct part {
        llb::copy_action what;
        root_ref from;
    };
    part remote_part(const stage_state& s, const command& c, const std::string& source, const std::string& name);

    // convert.cpp
    [[nodiscard]] context_parts context_source() const;
    void tell_wanted_paths();
    result finish(stage_state& target);
    void warn_unused_build_args(result& r) const;

    request req_;
    gateway::frontend_gateway& engine_;
    df::file file_;
    df::parsed parsed_;
    df::check_options checks_;
    std::vector<df::warning> warnings_;
    std::vector<df::diagnostic> problems_;  ///< errors of the file that are not told yet
    std::optional<error> first_problem_;
    std::size_t hints_left_ = 20;  ///< how many more undefined variables get a did-you-mean
    stage_state* target_ = nullptr;

    oci::platform target_platform_;
    env_list global_args_;
    std::map<std::string, arg_note> global_notes_;
    std::optional<std::int64_t> epoch_;  ///< seconds
    std::optional<llb::proxy_env> proxy_;

    std::vector<std::unique_ptr<stage_state>> states_;
    std::map<std::string, stage_state*> by_name_;  ///< stages by lower-case name, the last of a name
    std::map<std::string, stage_state*> images_;   ///< images that are not stages
    std::map<base_key, gateway::image_config> configs_;
    std::vector<base_image> bases_;

    std::vector<std::string> ignore_rules_;
    std::optional<fs::ignore_patterns> ignore_;
    bool ignore_has_exceptions_ = false;
    std::set<std::string> context_paths_;
    std::map<std::size_t, std::set<std::string>> local_paths_;  ///< likewise, of named contexts; by node
    draft draft_;
};

// ---------------------------------------------------------------- paths.cpp

/// Go's path.Join("/", base, p).
std::string join_path(std::string_view base, std::string_view p);
/// As join_path for relative paths; keeps a trailing "/" or "/.".
std::string path_in(std::string_view dir, std::string_view p);
/// [user][:group] as a chown: numbers are ids, "root" is 0, other names are looked up in the op's input `base`.
llb::chown_opt parse_owner(std::string_view text, std::int64_t base);
bool has_wildcards(std::string_view path);
/// One range a line, as BuildKit's frontend tells where a step stands.
std::vector<llb::range> ranges_of(df::line_range lines);
/// chmod(1)'s symbolic form.
bool is_symbolic_mode(std::string_view text);
/// " (did you mean x?)", or nothing.
std::string did_you_mean(std::string_view word, const std::vector<std::string_view>& candidates);
/// The source op of a git repository, as BuildKit's clients write it.
llb::source_op git_source(const remote::git_ref& r, bool keep_git_dir, std::string_view checksum);
llb::source_op http_source(std::string_view url, std::string_view filename, std::string_view checksum);
/// A file op that copies the file `name` of its only input to "/", unpacked when it is an archive.
llb::op unpacking(const std::string& name);
/// One that takes the contents of a directory of its only input.
llb::op below(const std::string& directory);

}  // namespace cobuild::frontend

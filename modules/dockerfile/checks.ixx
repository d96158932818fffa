/// Build checks (the rules of docs.docker.com/build/checks) and the texts that image history shows.
module;
#include <string>
#include <string_view>
#include <vector>

export module cobuild.dockerfile:checks;

import :syntax;
import :expansion;
import :instructions;

export namespace cobuild::dockerfile {

enum class check_rule {
    stage_name_casing,
    from_as_casing,
    no_empty_continuation,
    consistent_instruction_casing,
    duplicate_stage_name,
    reserved_stage_name,
    json_args_recommended,
    maintainer_deprecated,
    undefined_arg_in_from,
    workdir_relative_path,
    undefined_var,
    multiple_instructions_disallowed,
    legacy_key_value_format,
    invalid_base_image_platform,
    redundant_target_platform,
    secrets_used_in_arg_or_env,
    invalid_default_arg_in_from,
    from_platform_flag_const_disallowed,
    copy_ignored_file,
    invalid_definition_description,
    expose_proto_casing,
    expose_invalid_format,
};

struct rule_info {
    std::string_view name;         ///< "StageNameCasing"
    std::string_view description;  ///< one sentence, the same for every finding
    std::string_view url;          ///< empty for InvalidBaseImagePlatform
    bool experimental = false;     ///< runs only when asked for
    std::string_view help;         ///< what is wrong with it and what to write instead, in plain words
};
const rule_info& info(check_rule rule) noexcept;
const std::vector<rule_info>& all_rules();
/// By name, in any case; null when there is none.
const rule_info* find_rule(std::string_view name);

/// One finding.
struct warning {
    std::string rule;
    std::string message;
    std::string detail;  ///< the rule's description
    std::string url;
    line_range lines;
    int stage = -1;  ///< the stage it lies in, -1 for the file: a frontend may leave out those of stages it does not build

    /// "Rule: message (line N)"
    [[nodiscard]] std::string short_text() const;
};

/// `skip=Rule,Rule|all;error=true|false;experimental=Rule,...|all`
struct check_options {
    bool skip_all = false;
    bool experimental_all = false;
    bool error = false;  ///< any finding fails the build, after everything else went well
    std::vector<std::string> skip;
    std::vector<std::string> experimental;
};
/// Throws errc::invalid for an unknown option, or a value of `error` that is not a boolean. Unknown rules are let through.
check_options parse_check_options(std::string_view text);
/// The options of the file: `override_text` (build argument BUILDKIT_DOCKERFILE_CHECK) if not empty, else its directive.
check_options file_check_options(const file& f, std::string_view override_text = {});
/// `base` with what a comment "check=..." directly above an instruction adds.
check_options merged(const check_options& base, const std::vector<std::string>& comments);
bool enabled(check_rule rule, const check_options& options);

/// A finding, its message made by the rule: undefined_var(name, suggestion or nothing), copy_ignored_file("Copy" or "Add", path),
/// invalid_base_image_platform(image, expected, actual), from_as_casing(from, as), consistent_instruction_casing(keyword,
/// "uppercase" or "lowercase"), undefined_arg_in_from(name, suggestion), secrets_used_in_arg_or_env("ARG" or "ENV", key),
/// invalid_definition_description("ARG" or "FROM", name); the others take the one thing that their message names, or nothing.
warning make_warning(check_rule rule, line_range lines, std::string_view first = {}, std::string_view second = {}, std::string_view third = {});

/// Everything that can be found from the file alone, in order of lines. Comments "check=" above instructions are honoured.
/// Not reported, for lack of knowledge: UndefinedVar, InvalidBaseImagePlatform, CopyIgnoredFile, and EXPOSE words and WORKDIR
/// paths that hold variables. `automatic` gives TARGETPLATFORM and its like (linux/amd64 when it is empty).
/// JSONArgsRecommended looks at SHELL in the file only: drop it where a base image sets its own.
std::vector<warning> check_file(const file& f, const parsed& p, const check_options& options, const lookup& automatic = {});

/// The names of the automatic arguments of the global scope: TARGETPLATFORM ... BUILDVARIANT, TARGETSTAGE.
const std::vector<std::string_view>& automatic_args();

// ---------------------------------------------------------------- history

/// Go's %q: double quotes, escapes \a \b \f \n \r \t \v \\ \" \xNN \uNNNN \UNNNNNNNN, printable Unicode as it is.
std::string go_quote(std::string_view text);
/// Go's %q of a list: `["a" "b c"]`.
std::string go_quote_list(const std::vector<std::string>& list);
/// Go's %v of a list: `[a b c]`.
std::string go_list(const std::vector<std::string>& list);

/// What image history's `created_by` says of an instruction after expand_fields:
/// `ENV a=b c=d`, `CMD ["a" "b"]`, `VOLUME [/a /b]`, `HEALTHCHECK &{["CMD" "a"] "5s" ...}`, `COPY --chown=1 a /b # buildkit`.
/// CMD and ENTRYPOINT in shell form: give the args with the shell in front. EXPOSE: give the list of "80/tcp" as `ports`.
/// ARG: give the values in effect. RUN: see run_history. ONBUILD has none, FROM neither: empty.
std::string history(const instruction_body& body);
/// `RUN |2 A=1 B=2 /bin/sh -c text # buildkit`: `args` are the ARGs declared so far with their values, first declaration first.
std::string run_history(const std::vector<std::string>& command, const std::vector<key_value>& args);
/// The first line of a here-document's body for a step's name, "..." behind it when there is more.
std::string summarize(const heredoc& h);

}  // namespace cobuild::dockerfile

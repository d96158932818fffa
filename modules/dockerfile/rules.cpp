module;
#include <algorithm>
#include <array>
#include <cstddef>
#include <iterator>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.dockerfile;

import cobuild.base;
import :detail;

namespace cobuild::dockerfile {

using namespace detail;

namespace {

[[noreturn]] void fail(std::string message) { throw error{errc::invalid, std::move(message)}; }

std::string did_you_mean(std::string_view suggestion, std::string_view sigil) {
    return suggestion.empty() ? std::string() : cat(" (did you mean ", sigil, suggestion, "?)");
}

std::string message_of(check_rule rule, std::string_view a, std::string_view b, std::string_view c) {
    switch (rule) {
        case check_rule::stage_name_casing: return cat("Stage name '", a, "' should be lowercase");
        case check_rule::from_as_casing: return cat("'", b, "' and '", a, "' keywords' casing do not match");
        case check_rule::no_empty_continuation: return "Empty continuation line";
        case check_rule::consistent_instruction_casing: return cat("Command '", a, "' should match the case of the command majority (", b, ")");
        case check_rule::duplicate_stage_name: return cat("Duplicate stage name ", go_quote(a), ", stage names should be unique");
        case check_rule::reserved_stage_name: return cat("Stage name should not use the same name as reserved stage ", go_quote(a));
        case check_rule::json_args_recommended:
            return cat("JSON arguments recommended for ", a, " to prevent unintended behavior related to OS signals");
        case check_rule::maintainer_deprecated: return "Maintainer instruction is deprecated in favor of using label";
        case check_rule::undefined_arg_in_from: return cat("FROM argument '", a, "' is not declared", did_you_mean(b, ""));
        case check_rule::workdir_relative_path:
            return cat("Relative workdir ", go_quote(a), " can have unexpected results if the base image changes");
        case check_rule::undefined_var: return cat("Usage of undefined variable '$", a, "'", did_you_mean(b, "$"));
        case check_rule::multiple_instructions_disallowed:
            return cat("Multiple ", a, " instructions should not be used in the same stage because only the last one will be used");
        case check_rule::legacy_key_value_format: return cat("\"", a, " key=value\" should be used instead of legacy \"", a, " key value\" format");
        case check_rule::invalid_base_image_platform:
            return cat("Base image ", a, " was pulled with platform ", go_quote(c), ", expected ", go_quote(b), " for current build");
        case check_rule::redundant_target_platform:
            return cat("Setting platform to predefined ", a, " in FROM is redundant as this is the default behavior");
        case check_rule::secrets_used_in_arg_or_env: return cat("Do not use ARG or ENV instructions for sensitive data (", a, " ", go_quote(b), ")");
        case check_rule::invalid_default_arg_in_from: return cat("Default value for ARG ", a, " results in empty or invalid base image name");
        case check_rule::from_platform_flag_const_disallowed: return cat("FROM --platform flag should not use constant value ", go_quote(a));
        case check_rule::copy_ignored_file: return cat("Attempting to ", a, " file ", go_quote(b), " that is excluded by .dockerignore");
        case check_rule::invalid_definition_description: return cat("Comment for ", a, " should follow the format: `# ", b, " <description>`");
        case check_rule::expose_proto_casing: return cat("Defined protocol '", a, "' in EXPOSE instruction should be lowercase");
        case check_rule::expose_invalid_format:
            return cat("EXPOSE instruction should not define an IP address or host-port mapping, found '", a, "'");
    }
    return {};
}

std::vector<std::string> comma_list(std::string_view value) {
    std::vector<std::string> out;
    for (const auto name : split(value, ',')) out.emplace_back(trim(name));
    return out;
}

bool listed(const std::vector<std::string>& list, std::string_view name) { return std::find(list.begin(), list.end(), name) != list.end(); }

}  // namespace

#define COBUILD_RULE_URL "https://docs.docker.com/go/dockerfile/rule/"
const std::vector<rule_info>& all_rules() {
    static const std::vector<rule_info> rules{
        {"StageNameCasing", "Stage names should be lowercase", COBUILD_RULE_URL "stage-name-casing/", false,
         "stage names are compared without regard to case; write the name after AS in lower case so that every place that uses it looks the same"},
        {"FromAsCasing", "The 'as' keyword should match the case of the 'from' keyword", COBUILD_RULE_URL "from-as-casing/", false,
         "write FROM and AS both in capitals or both in small letters"},
        {"NoEmptyContinuation", "Empty continuation lines will become errors in a future release", COBUILD_RULE_URL "no-empty-continuation/", false,
         "an empty line inside of a continued instruction does not end it, which misleads the reader; remove the line, or put a # comment there"},
        {"ConsistentInstructionCasing", "All commands within the Dockerfile should use the same casing (either upper or lower)",
         COBUILD_RULE_URL "consistent-instruction-casing/", false, "write all instructions in one case, capitals by custom"},
        {"DuplicateStageName", "Stage names should be unique", COBUILD_RULE_URL "duplicate-stage-name/", false,
         "the later stage hides the earlier one of the same name; give each stage a name of its own"},
        {"ReservedStageName", "Reserved words should not be used as stage names", COBUILD_RULE_URL "reserved-stage-name/", false,
         "scratch and context have a meaning of their own; choose another name after AS"},
        {"JSONArgsRecommended", "JSON arguments recommended for ENTRYPOINT/CMD to prevent unintended behavior related to OS signals",
         COBUILD_RULE_URL "json-args-recommended/", false,
         "in the shell form a shell is process 1 and does not pass signals on, so the program is killed instead of stopped; write [\"program\", "
         "\"argument\"], or set SHELL to say that the shell is meant"},
        {"MaintainerDeprecated", "The MAINTAINER instruction is deprecated, use a label instead to define an image author",
         COBUILD_RULE_URL "maintainer-deprecated/", false, "write LABEL org.opencontainers.image.authors=\"...\" instead"},
        {"UndefinedArgInFrom", "FROM command must use declared ARGs", COBUILD_RULE_URL "undefined-arg-in-from/", false,
         "only an ARG above the first FROM can be used in FROM; declare it there, or correct the name"},
        {"WorkdirRelativePath",
         "Relative workdir without an absolute workdir declared within the build can have unexpected results if the base image changes",
         COBUILD_RULE_URL "workdir-relative-path/", false,
         "where a relative path leads depends on the base image; begin the stage with an absolute WORKDIR"},
        {"UndefinedVar", "Variables should be defined before their use", COBUILD_RULE_URL "undefined-var/", false,
         "nothing sets this variable, so it is replaced by nothing; declare it with ARG or ENV above, or correct the name"},
        {"MultipleInstructionsDisallowed", "Multiple instructions of the same type should not be used in the same stage",
         COBUILD_RULE_URL "multiple-instructions-disallowed/", false, "only the last of them counts; remove the others"},
        {"LegacyKeyValueFormat", "Legacy key/value format with whitespace separator should not be used", COBUILD_RULE_URL "legacy-key-value-format/",
         false, "write KEY=value, with quotes around a value that has blanks"},
        {"InvalidBaseImagePlatform", "Base image platform does not match expected target platform", "", false,
         "the base image is for another platform than the build; choose an image or --platform that fit each other"},
        {"RedundantTargetPlatform", "Setting platform to predefined $TARGETPLATFORM in FROM is redundant as this is the default behavior",
         COBUILD_RULE_URL "redundant-target-platform/", false, "FROM uses the target platform by itself; remove --platform=$TARGETPLATFORM"},
        {"SecretsUsedInArgOrEnv", "Sensitive data should not be used in the ARG or ENV commands", COBUILD_RULE_URL "secrets-used-in-arg-or-env/",
         false,
         "whoever has the image can read ARG and ENV values; use RUN --mount=type=secret, and set secrets of the running program when it is started"},
        {"InvalidDefaultArgInFrom", "Default value for global ARG results in an empty or invalid base image name",
         COBUILD_RULE_URL "invalid-default-arg-in-from/", false,
         "without a build argument FROM has no valid name; give the ARG a default that makes one"},
        {"FromPlatformFlagConstDisallowed", "FROM --platform flag should not use a constant value",
         COBUILD_RULE_URL "from-platform-flag-const-disallowed/", false,
         "a fixed platform makes the file useless for others; use $BUILDPLATFORM or $TARGETPLATFORM, or name the stage after the platform"},
        {"CopyIgnoredFile", "Attempting to Copy file that is excluded by .dockerignore", COBUILD_RULE_URL "copy-ignored-file/", false,
         "the ignore file takes this path out of the build context, so there is nothing to copy; change the ignore file or the path"},
        {"InvalidDefinitionDescription",
         "Comment for build stage or argument should follow the format: `# <arg/stage name> <description>`. If this is not intended to be a "
         "description comment, add an empty line or comment between the instruction and the comment.",
         COBUILD_RULE_URL "invalid-definition-description/", true,
         "a comment directly above ARG or FROM describes it and begins with its name; rewrite it, or put an empty line between"},
        {"ExposeProtoCasing", "Protocol in EXPOSE instruction should be lowercase", COBUILD_RULE_URL "expose-proto-casing/", false,
         "write the protocol in small letters: tcp, udp or sctp"},
        {"ExposeInvalidFormat",
         "IP address and host-port mapping should not be used in EXPOSE instruction. This will become an error in a future release",
         COBUILD_RULE_URL "expose-invalid-format/", false,
         "EXPOSE takes the container's port alone; addresses and ports of the host are given when the container is started"},
    };
    return rules;
}
#undef COBUILD_RULE_URL

const rule_info* find_rule(std::string_view name) {
    const auto& rules = all_rules();
    const auto lower = to_lower(name);
    const auto found = std::find_if(rules.begin(), rules.end(), [&](const rule_info& r) { return to_lower(r.name) == lower; });
    return found == rules.end() ? nullptr : &*found;
}

const rule_info& info(check_rule rule) noexcept { return all_rules()[static_cast<std::size_t>(rule)]; }

std::string warning::short_text() const {
    return lines.first == 0 ? cat(rule, ": ", message) : cat(rule, ": ", message, " (line ", lines.first, ")");
}

warning make_warning(check_rule rule, line_range lines, std::string_view first, std::string_view second, std::string_view third) {
    const rule_info& i = info(rule);
    return {std::string(i.name), message_of(rule, first, second, third), std::string(i.description), std::string(i.url), lines, -1};
}

check_options parse_check_options(std::string_view text) {
    check_options out;
    text = trim(text);
    if (text.empty()) return out;
    for (const auto part : split(text, ';')) {
        const std::size_t equals = part.find('=');
        if (equals == std::string_view::npos) fail(cat("invalid check option ", quoted(part), ": expected skip=, experimental= or error="));
        const std::string_view key = trim(part.substr(0, equals)), value = trim(part.substr(equals + 1));
        if (key == "skip") {
            if (value == "all")
                out.skip_all = true;
            else
                out.skip = comma_list(value);
        } else if (key == "experimental") {
            if (value == "all")
                out.experimental_all = true;
            else
                out.experimental = comma_list(value);
        } else if (key == "error") {
            const auto on = parse_bool(value);
            if (!on) fail(cat("failed to parse check option ", quoted(part), ": error= takes true or false"));
            out.error = *on;
        } else {
            static constexpr std::array<std::string_view, 3> keys{"skip", "experimental", "error"};
            fail(suggest(cat("invalid check option ", quoted(key)), key, keys));
        }
    }
    return out;
}

check_options file_check_options(const file& f, std::string_view override_text) {
    if (!override_text.empty()) return parse_check_options(override_text);
    const directive* d = f.find("check");
    if (d == nullptr) return {};
    try {
        return parse_check_options(std::string_view(d->value).substr(0, d->value.find(' ')));
    } catch (error& e) {
        throw std::move(e).at({f.name, d->line});
    }
}

check_options merged(const check_options& base, const std::vector<std::string>& comments) {
    for (const auto& comment : comments) {
        const auto found = match_directive(comment, "");
        if (!found || found->name != "check") continue;
        check_options out = base;
        try {
            check_options more = parse_check_options(std::string_view(found->value).substr(0, found->value.find(' ')));
            out.skip_all = out.skip_all || more.skip_all;
            out.experimental_all = out.experimental_all || more.experimental_all;
            std::move(more.skip.begin(), more.skip.end(), std::back_inserter(out.skip));
            std::move(more.experimental.begin(), more.experimental.end(), std::back_inserter(out.experimental));
        } catch (const error&) {
            return base;  // a comment that only looks like one
        }
        return out;
    }
    return base;
}

bool enabled(check_rule rule, const check_options& options) {
    const rule_info& i = info(rule);
    if (i.experimental) return options.experimental_all || listed(options.experimental, i.name);
    return !options.skip_all && !listed(options.skip, i.name);
}

}  // namespace cobuild::dockerfile

/// cobuild.policy: source policies: which sources a build may use, and which others stand in for them (reference 5.8, 4.2).
///
/// A policy is a list of rules; each selects sources by their identifier ("docker-image://docker.io/library/alpine:latest",
/// "https://...", "git://...#ref:dir") and, where it says so, by their attributes. Of the ALLOW and DENY rules that select a
/// source the last one counts; a CONVERT rule puts another source in its place, for which all policies are asked anew.
/// Selectors are exact, with "*" for anything (the default), or regular expressions (ECMAScript's, searched for anywhere in the
/// identifier). Parts that "*" or a group took may be named "$1", "${1}" in the identifier of a CONVERT.
///
/// Pure. Errors: errc::permission `source "..." denied by policy`; errc::invalid for rules that are none. Time is polynomial in
/// the lengths, which are bounded: policies come from clients. Not its job: asking a client's verifier (build, daemon).
module;
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

export module cobuild.policy;

import cobuild.base;
import cobuild.json;
import cobuild.llb;
import cobuild.oci;

export namespace cobuild::policy {

/// Numbers as in proto/policy.proto; others may come from a client and are refused when they are met.
enum class action : std::int32_t { allow = 0, deny = 1, convert = 2 };
enum class match_type : std::int32_t { wildcard = 0, exact = 1, regex = 2 };
enum class condition : std::int32_t { equal = 0, not_equal = 1, matches = 2 };

/// What one attribute of the source must be; one that it does not have is empty.
struct constraint {
    std::string key, value;
    policy::condition condition = policy::condition::equal;
};
struct selector {
    std::string identifier;
    match_type type = match_type::wildcard;
    std::vector<constraint> constraints;
};
struct update {
    std::string identifier;  ///< empty: the selector's
    std::map<std::string, std::string> attrs;
};
struct rule {
    policy::action action = policy::action::allow;
    policy::selector selector;
    std::optional<update> updates{};
};
struct policy {
    std::vector<rule> rules;
};

/// A policy as `--source-policy-file` has it: {"rules": [{"action": "DENY", "selector": {"identifier": "..."}}]}; enumerations by
/// name or number. Throws errc::invalid.
policy parse(std::string_view json_text);

/// The identifier as rules see it: an image with its registry and tag, a git subdirectory without "..".
std::string normalized(std::string_view identifier);

/// Normalizes the source and asks the policies, again after every change, at most 20 times. True when a rule changed it.
/// Throws errc::permission when it is denied.
bool apply(const std::vector<policy>& policies, llb::source_op& source);

}  // namespace cobuild::policy

// Source policies: which rule counts, what selects, what a conversion makes.
#include "support/support.hpp"

#include <string>
#include <vector>

import cobuild.base;
import cobuild.async;
import cobuild.llb;
import cobuild.policy;

#include "support/failure.hpp"

using namespace cobuild;
using cobuild::test::says;
using policy::action;
using policy::condition;
using policy::match_type;
using policies = std::vector<policy::policy>;

namespace {

policy::rule rule(action a, std::string identifier, match_type type = match_type::wildcard) {
    return {.action = a, .selector = {.identifier = std::move(identifier), .type = type, .constraints = {}}};
}

policy::rule conversion(std::string from, std::string to, match_type type = match_type::wildcard) {
    auto out = rule(action::convert, std::move(from), type);
    out.updates = policy::update{std::move(to), {}};
    return out;
}

bool denied(const policies& all, std::string identifier, std::map<std::string, std::string> attrs = {}) {
    llb::source_op s{std::move(identifier), std::move(attrs)};
    try {
        (void)policy::apply(all, s);
    } catch (const error& e) {
        BOOST_TEST((e.kind() == errc::permission));
        BOOST_TEST(says(e, cat("source ", quoted(s.identifier), " denied by policy")));
        return true;
    }
    return false;
}

std::string converted(const policies& all, std::string identifier) {
    llb::source_op s{std::move(identifier), {}};
    (void)policy::apply(all, s);
    return s.identifier;
}

constexpr const char* alpine = "docker-image://docker.io/library/alpine:latest";

}  // namespace

BOOST_AUTO_TEST_CASE(the_last_rule_that_selects_counts) {
    const policies none, deny{{{rule(action::deny, alpine)}}}, both{{{rule(action::deny, "*"), rule(action::allow, alpine)}}},
        turned{{{rule(action::allow, alpine), rule(action::deny, "*")}}};
    BOOST_TEST(!denied(none, alpine));
    BOOST_TEST(denied(deny, alpine));
    BOOST_TEST(!denied(deny, "docker-image://docker.io/library/busybox:latest"));
    BOOST_TEST(!denied(both, alpine));
    BOOST_TEST(denied(both, "https://host/file"));
    BOOST_TEST(denied(turned, alpine));
}

BOOST_AUTO_TEST_CASE(every_policy_must_allow) {
    const policies two{{{rule(action::allow, "*")}}, {{rule(action::deny, alpine)}}};
    BOOST_TEST(denied(two, alpine));
}

BOOST_AUTO_TEST_CASE(sources_are_compared_by_their_full_names) {
    const policies deny{{{rule(action::deny, alpine, match_type::exact)}}};
    BOOST_TEST(denied(deny, "docker-image://alpine"));
    const policies git{{{rule(action::deny, "git://github.com/user/repo.git#main:absolute/path", match_type::exact)}}};
    BOOST_TEST(denied(git, "git://github.com/user/repo.git#main:../absolute/path"));
    BOOST_TEST(!denied(git, "git://github.com/user/repo.git#main:other"));
}

BOOST_AUTO_TEST_CASE(stars_and_regular_expressions) {
    const policies stars{{{rule(action::deny, "docker-image://*/library/*:1.*")}}};
    BOOST_TEST(denied(stars, "docker-image://docker.io/library/golang:1.19"));
    BOOST_TEST(!denied(stars, "docker-image://docker.io/library/golang:2.19"));
    BOOST_TEST(!denied(stars, "xdocker-image://docker.io/library/golang:1.19"));
    const policies exact{{{rule(action::deny, "https://host/*", match_type::exact)}}};
    BOOST_TEST(!denied(exact, "https://host/file"));
    const policies regex{{{rule(action::deny, "golang:1\\.(19|20)$", match_type::regex)}}};
    BOOST_TEST(denied(regex, "docker-image://docker.io/library/golang:1.20"));
    BOOST_TEST(!denied(regex, "docker-image://docker.io/library/golang:1.200"));
}

BOOST_AUTO_TEST_CASE(attributes_narrow_a_rule) {
    auto without = rule(action::deny, "https://*");
    without.selector.constraints = {{"http.checksum", "", condition::equal}};
    BOOST_TEST(denied({{{without}}}, "https://host/file"));
    BOOST_TEST(!denied({{{without}}}, "https://host/file", {{"http.checksum", "sha256:aa"}}));
    auto other = rule(action::deny, "https://*");
    other.selector.constraints = {{"http.perm", "0644", condition::not_equal}};
    BOOST_TEST(denied({{{other}}}, "https://host/file", {{"http.perm", "0600"}}));
    BOOST_TEST(!denied({{{other}}}, "https://host/file", {{"http.perm", "0644"}}));
    auto like = rule(action::deny, "https://*");
    like.selector.constraints = {{"http.filename", "^a.*z$", condition::matches}, {"http.perm", "0644", condition::equal}};
    BOOST_TEST(denied({{{like}}}, "https://host/file", {{"http.filename", "abz"}, {"http.perm", "0644"}}));
    BOOST_TEST(!denied({{{like}}}, "https://host/file", {{"http.filename", "abz"}}));
}

BOOST_AUTO_TEST_CASE(a_conversion_puts_another_source_in_place) {
    const policies pin{{{conversion(alpine, cat(alpine, "@sha256:", std::string(64, 'a')), match_type::exact)}}};
    BOOST_TEST(converted(pin, "docker-image://alpine") == cat(alpine, "@sha256:", std::string(64, 'a')));
    const policies stars{{{conversion("docker-image://docker.io/library/golang:*", "docker-image://docker.io/library/golang:${1}-alpine"),
                           rule(action::deny, "*-alpine-alpine*")}}};
    BOOST_CHECK_EXCEPTION(converted(stars, "docker-image://golang:1.19"), error, [](const error& e) { return says(e, "too many"); });
    const policies mirror{{{conversion("^docker-image://docker\\.io/(.*)$", "docker-image://mirror.example/$1", match_type::regex)}}};
    BOOST_TEST(converted(mirror, "docker-image://alpine") == "docker-image://mirror.example/library/alpine:latest");
}

BOOST_AUTO_TEST_CASE(a_conversion_may_set_attributes) {
    auto sum = rule(action::convert, "https://host/file", match_type::exact);
    sum.updates = policy::update{"", {{"http.checksum", "sha256:aa"}}};
    llb::source_op s{"https://host/file", {{"http.checksum", "sha256:bb"}, {"http.perm", "0644"}}};
    BOOST_TEST(policy::apply({{{sum}}}, s));
    BOOST_TEST(s.identifier == "https://host/file");
    BOOST_TEST(s.attrs["http.checksum"] == "sha256:aa");
    BOOST_TEST(s.attrs["http.perm"] == "0644");
    BOOST_TEST(!policy::apply({{{sum}}}, s));  // nothing is left to change
}

BOOST_AUTO_TEST_CASE(what_was_converted_is_asked_about_again) {
    const policies moved{
        {{conversion(alpine, "docker-image://docker.io/library/busybox:latest"), rule(action::deny, "docker-image://docker.io/library/busybox*")}}};
    llb::source_op s{alpine, {}};
    BOOST_CHECK_EXCEPTION(policy::apply(moved, s), error, [](const error& e) { return says(e, "busybox:latest\" denied by policy"); });
}

BOOST_AUTO_TEST_CASE(rules_that_are_none_are_refused) {
    const auto refused = [](policy::rule r, const char* why) {
        llb::source_op s{alpine, {}};
        BOOST_CHECK_EXCEPTION(policy::apply({{{std::move(r)}}}, s), error,
                              [why](const error& e) { return e.kind() == errc::invalid && says(e, why); });
    };
    refused(rule(static_cast<action>(9000), alpine), "unknown type");
    refused(rule(action::convert, alpine), "missing destination for convert rule");
    refused(rule(action::deny, "docker-image://**"), "invalid wildcard");
    refused(rule(action::deny, "a(", match_type::regex), "invalid regex");
    refused(rule(action::deny, "other", static_cast<match_type>(7)), "unknown match type");
}

// A pattern on which a matcher that goes back and forth would take longer than the universe is old.
BOOST_AUTO_TEST_CASE(a_hostile_pattern_ends) {
    const policies hostile{{{rule(action::deny, "^(a+)+$", match_type::regex)}}};
    BOOST_TEST(!denied(hostile, std::string(60, 'a') + "!"));
    llb::source_op s{alpine, {}};
    BOOST_CHECK_EXCEPTION(policy::apply({{{rule(action::deny, std::string(5000, 'a'), match_type::regex)}}}, s), error,
                          [](const error& e) { return e.kind() == errc::invalid; });
}

BOOST_AUTO_TEST_CASE(a_policy_file_is_read) {
    const auto p = policy::parse(R"({"version": 1, "rules": [
        {"action": "DENY", "selector": {"identifier": "*"}},
        {"action": 0, "selector": {"identifier": "docker-image://docker.io/library/alpine:*", "match_type": "WILDCARD"}},
        {"action": "CONVERT", "selector": {"identifier": "a", "matchType": "EXACT", "constraints": [{"key": "k", "value": "v", "condition": "NOTEQUAL"}]},
         "updates": {"identifier": "b", "attrs": {"x": "y"}}}]})");
    BOOST_REQUIRE(p.rules.size() == 3U);
    BOOST_TEST((p.rules[0].action == action::deny && p.rules[0].selector.type == match_type::wildcard));
    BOOST_TEST((p.rules[1].action == action::allow));
    BOOST_TEST((p.rules[2].selector.type == match_type::exact && p.rules[2].selector.constraints.at(0).condition == condition::not_equal));
    BOOST_TEST(p.rules[2].updates->attrs.at("x") == "y");
    BOOST_TEST(!denied({p}, alpine));
    BOOST_TEST(denied({p}, "docker-image://busybox"));
}

BOOST_AUTO_TEST_CASE(a_policy_file_that_is_none_is_refused) {
    for (const auto* text :
         {"", "[]", "{", R"({"rules": {}})", R"({"rules": [{"action": "DENY"}]})", R"({"rules": [{"action": "REFUSE", "selector": {}}]})",
          R"({"rules": [{"selector": {"match_type": 3}}]})", R"({"rules": [1]})"})
        BOOST_CHECK_EXCEPTION(policy::parse(text), error, [](const error& e) { return e.kind() == errc::invalid && says(e, "policy"); });
}

#include "support/support.hpp"

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "dockerfile_support.hpp"

import cobuild.base;
import cobuild.dockerfile;

using namespace cobuild;
namespace df = cobuild::dockerfile;
using namespace dftest;

namespace {

/// "Rule@line: message" for every finding.
std::vector<std::string> findings(std::string_view text, std::string_view options = {}) {
    const df::file f = df::parse(text);
    const auto r = df::parse_instructions(f);
    BOOST_REQUIRE_MESSAGE(r.errors.empty(), (r.errors.empty() ? "" : r.errors[0].message));
    std::vector<std::string> out;
    for (const auto& w : df::check_file(f, r.value, df::file_check_options(f, options)))
        out.push_back(cat(w.rule, '@', w.lines.first, ": ", w.message));
    return out;
}

using list = std::vector<std::string>;

void expect(std::string_view text, const list& expected) {
    const auto found = findings(text);
    BOOST_TEST(found == expected, boost::test_tools::per_element());
}

}  // namespace

BOOST_AUTO_TEST_SUITE(checks)

BOOST_AUTO_TEST_CASE(a_good_file_has_none) {
    expect(
        "# syntax=docker/dockerfile:1\nARG V=3\nFROM --platform=$BUILDPLATFORM alpine:$V AS build\nARG TARGETARCH\nWORKDIR /src\nWORKDIR sub\n"
        "ENV A=b\nEXPOSE 80/udp $P\nRUN a\nCMD [\"x\"]\nFROM scratch\nCOPY --from=build /a /\nENTRYPOINT [\"/a\"]\n",
        {});
}

BOOST_AUTO_TEST_CASE(stage_names) {
    expect("FROM a AS Build\n", {"StageNameCasing@1: Stage name 'Build' should be lowercase"});
    expect("FROM a AS x\nFROM b AS X\n", {"DuplicateStageName@2: Duplicate stage name \"x\", stage names should be unique",
                                          "StageNameCasing@2: Stage name 'X' should be lowercase"});
    expect("FROM a AS context\n", {"ReservedStageName@1: Stage name should not use the same name as reserved stage \"context\""});
    expect("FROM a AS scratch\n", {"ReservedStageName@1: Stage name should not use the same name as reserved stage \"scratch\""});
}

BOOST_AUTO_TEST_CASE(casing) {
    expect("FROM a as b\n", {"FromAsCasing@1: 'as' and 'FROM' keywords' casing do not match"});
    expect("from a AS b\nrun x\n", {"FromAsCasing@1: 'AS' and 'from' keywords' casing do not match"});
    expect("FROM a\nrun b\nRUN c\n", {"ConsistentInstructionCasing@2: Command 'run' should match the case of the command majority (uppercase)"});
    expect("from a\nrun b\nRUN c\n", {"ConsistentInstructionCasing@3: Command 'RUN' should match the case of the command majority (lowercase)"});
    expect("FROM a\nrun b\n", {"ConsistentInstructionCasing@2: Command 'run' should match the case of the command majority (uppercase)"});
    expect("From a\nRUN b\n", {"ConsistentInstructionCasing@1: Command 'From' should match the case of the command majority (uppercase)"});
}

BOOST_AUTO_TEST_CASE(forms) {
    expect("FROM a\nRUN b \\\n\n c\n", {"NoEmptyContinuation@4: Empty continuation line"});
    expect("FROM a\nMAINTAINER x\n", {"MaintainerDeprecated@2: Maintainer instruction is deprecated in favor of using label"});
    expect("FROM a\nENV a b\nLABEL c d\n",
           {"LegacyKeyValueFormat@2: \"ENV key=value\" should be used instead of legacy \"ENV key value\" format",
            "LegacyKeyValueFormat@3: \"LABEL key=value\" should be used instead of legacy \"LABEL key value\" format"});
    expect("FROM a\nCMD x\nENTRYPOINT y\n",
           {"JSONArgsRecommended@2: JSON arguments recommended for CMD to prevent unintended behavior related to OS signals",
            "JSONArgsRecommended@3: JSON arguments recommended for ENTRYPOINT to prevent unintended behavior related to OS signals"});
    expect("FROM a AS one\nSHELL [\"x\"]\nCMD y\nFROM one\nCMD z\n", {});
}

BOOST_AUTO_TEST_CASE(once_in_a_stage) {
    expect("FROM a\nCMD [\"x\"]\nRUN b\nCMD [\"y\"]\nHEALTHCHECK NONE\nHEALTHCHECK NONE\nENTRYPOINT [\"a\"]\nFROM c\nCMD [\"z\"]\n",
           {"MultipleInstructionsDisallowed@2: Multiple CMD instructions should not be used in the same stage because only the last one will be used",
            "MultipleInstructionsDisallowed@5: Multiple HEALTHCHECK instructions should not be used in the same stage because only the last one "
            "will be used"});
}

BOOST_AUTO_TEST_CASE(workdir) {
    expect("FROM a AS one\nWORKDIR b\nWORKDIR c\nFROM one\nWORKDIR d\nFROM x\nWORKDIR \"/e\"\n",
           {"WorkdirRelativePath@2: Relative workdir \"b\" can have unexpected results if the base image changes"});
}

BOOST_AUTO_TEST_CASE(secrets) {
    const auto flagged = [](std::string_view key) { return !findings("FROM a\nARG " + std::string(key) + "\n").empty(); };
    for (const std::string_view key : {"API_KEY", "DATABASE_PASSWORD", "github_token", "secret_MESSAGE", "AUTH", "KEY", "passwd", "x_credentials_y"})
        BOOST_TEST(flagged(key), key);
    for (const std::string_view key : {"PUBLIC_KEY", "KEY_FILE", "TOKEN_VERSION", "MONKEY", "keys", "AUTHOR", "SECRETARY", "APIKEY2"})
        BOOST_TEST(!flagged(key), key);
    expect("ARG TOKEN=x\nFROM a\nENV A=b MY_SECRET=c\n",
           {"SecretsUsedInArgOrEnv@3: Do not use ARG or ENV instructions for sensitive data (ENV \"MY_SECRET\")"});
}

BOOST_AUTO_TEST_CASE(expose) {
    expect("FROM a\nEXPOSE 80/TcP\nEXPOSE 127.0.0.1:80:80 8080:81\n",
           {"ExposeProtoCasing@2: Defined protocol '80/TcP' in EXPOSE instruction should be lowercase",
            "ExposeInvalidFormat@3: EXPOSE instruction should not define an IP address or host-port mapping, found '127.0.0.1:80:80'",
            "ExposeInvalidFormat@3: EXPOSE instruction should not define an IP address or host-port mapping, found '8080:81'"});
}

BOOST_AUTO_TEST_CASE(descriptions_are_asked_for) {
    const std::string_view bad =
        "# check=experimental=InvalidDefinitionDescription\n# bar this is the bar\nARG foo=bar\n# BasE this is the BasE image\n"
        "FROM scratch AS base\n# definitely a bad comment\nARG version=latest\n# definitely a bad comment\nARG foo=baz bar=qux\n";
    expect(bad, {"InvalidDefinitionDescription@3: Comment for ARG should follow the format: `# foo <description>`",
                 "InvalidDefinitionDescription@5: Comment for FROM should follow the format: `# base <description>`",
                 "InvalidDefinitionDescription@7: Comment for ARG should follow the format: `# version <description>`",
                 "InvalidDefinitionDescription@9: Comment for ARG should follow the format: `# <arg_key> <description>`"});
    BOOST_TEST(findings(bad, "skip=none").empty());
    expect("# check=experimental=all\n# foo is it\nARG foo\n\n# base too\nFROM scratch AS base\n#\nARG x\n# far away\n\nARG y\n", {});
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(check_options)

BOOST_AUTO_TEST_CASE(the_directive) {
    const auto o = df::parse_check_options(" skip = A, B ;error=true;experimental=C");
    BOOST_TEST((o.skip == list{"A", "B"}));
    BOOST_TEST(o.error);
    BOOST_TEST((o.experimental == list{"C"}));
    BOOST_TEST(df::parse_check_options("skip=all").skip_all);
    BOOST_TEST(df::parse_check_options("experimental=all").experimental_all);
    BOOST_TEST(!df::parse_check_options("").error);
    BOOST_TEST(contains(thrown([] { df::parse_check_options("skp=A"); }), "did you mean skip?"));
    BOOST_TEST(contains(thrown([] { df::parse_check_options("error=maybe"); }), "error= takes true or false"));
    BOOST_TEST(contains(thrown([] { df::parse_check_options("A"); }), "invalid check option \"A\""));
}

BOOST_AUTO_TEST_CASE(skipping) {
    BOOST_TEST(findings("# check=skip=all\nFROM a as B\n").empty());
    BOOST_TEST((findings("# check=skip=FromAsCasing\nFROM a as B\n") == list{"StageNameCasing@1: Stage name 'B' should be lowercase"} ||
                findings("# check=skip=FromAsCasing\nFROM a as B\n") == list{"StageNameCasing@2: Stage name 'B' should be lowercase"}));
    BOOST_TEST(findings("FROM a as B\n", "skip=StageNameCasing,FromAsCasing").empty());
    BOOST_TEST(findings("# check=skip=all\nFROM a as b\n", "error=false").size() == 1U);
}

BOOST_AUTO_TEST_CASE(above_an_instruction) {
    BOOST_TEST((findings("FROM a\n# check=skip=JSONArgsRecommended\nCMD x\nENTRYPOINT y\n").size() == 1U));
    BOOST_TEST((findings("FROM a\n# check=skip=FromAsCasing;error=true\nFROM b as c\n").empty()));
    BOOST_TEST((findings("FROM a\n# check=nonsense\nCMD x\n").size() == 1U));
}

BOOST_AUTO_TEST_CASE(an_error_in_the_directive_has_its_line) {
    try {
        df::file_check_options(df::parse("# syntax=a\n# check=foo=bar\nFROM a\n", "D"));
        BOOST_ERROR("accepted");
    } catch (const error& e) {
        BOOST_TEST((e.where() == source_location{"D", 2}));
    }
}

BOOST_AUTO_TEST_CASE(rules_and_findings) {
    BOOST_TEST(df::all_rules().size() == 22U);
    const auto w = df::make_warning(df::check_rule::undefined_var, {3, 4}, "FO", "FOO");
    BOOST_TEST(w.short_text() == "UndefinedVar: Usage of undefined variable '$FO' (did you mean $FOO?) (line 3)");
    BOOST_TEST(w.url == "https://docs.docker.com/go/dockerfile/rule/undefined-var/");
    BOOST_TEST(w.detail == "Variables should be defined before their use");
    BOOST_TEST(df::make_warning(df::check_rule::invalid_base_image_platform, {}, "i", "linux/arm64", "linux/amd64").message ==
               "Base image i was pulled with platform \"linux/amd64\", expected \"linux/arm64\" for current build");
    BOOST_TEST(df::make_warning(df::check_rule::copy_ignored_file, {1, 1}, "Add", "x").message ==
               "Attempting to Add file \"x\" that is excluded by .dockerignore");
}

BOOST_AUTO_TEST_SUITE_END()

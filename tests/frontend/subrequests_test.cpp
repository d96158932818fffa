#include "frontend/fixture.hpp"

using namespace frontend_test;

namespace {

template<class F>
frontend::answer answer_of(F ask, std::string dockerfile, const adjust& change = {}) {
    frontend::request r;
    r.dockerfile = std::move(dockerfile);
    r.build_platform = {.os = "linux", .architecture = "amd64"};
    fake_gateway g;
    if (change) change(r, g);
    async::runtime rt;
    return rt.block_on(ask(std::move(r), g));
}

frontend::answer check(std::string dockerfile, const adjust& change = {}) { return answer_of(frontend::check, std::move(dockerfile), change); }
frontend::answer outline(std::string dockerfile, const adjust& change = {}) {
    return answer_of(frontend::show_outline, std::move(dockerfile), change);
}

/// "Rule:line Rule:line"
std::string rules(const frontend::answer& a) {
    std::string out;
    const auto all = json::parse(a.json);
    for (const auto& w : json::array_at(all.as_object(), "warnings")) {
        const auto& o = w.as_object();
        const auto* ranges = json::optional_array(json::object_at(o, "location"), "ranges");
        const auto line = ranges == nullptr ? 0 : json::int_at(json::object_at(ranges->front().as_object(), "start"), "line");
        out += cat(out.empty() ? "" : " ", json::string_at(o, "ruleName"), ":", line);
    }
    return out;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(subrequests)

// One case for each of the 22 rules of reference 6.10, the smallest file that breaks it and nothing else.
BOOST_AUTO_TEST_CASE(every_rule_is_found_at_its_line) {
    const std::vector<std::pair<std::string, std::string>> cases{
        {"StageNameCasing:1", "FROM busybox AS Base\n"},
        {"FromAsCasing:1", "FROM busybox as base\n"},
        {"NoEmptyContinuation:4", "FROM busybox\nRUN a \\\n\n  b\n"},
        {"ConsistentInstructionCasing:2", "FROM busybox\nrun a\nRUN b\n"},
        {"DuplicateStageName:2", "FROM busybox AS a\nFROM busybox AS a\n"},
        {"ReservedStageName:1", "FROM busybox AS context\n"},
        {"JSONArgsRecommended:2", "FROM busybox\nENTRYPOINT a b\n"},
        {"MaintainerDeprecated:2", "FROM busybox\nMAINTAINER me\n"},
        {"UndefinedArgInFrom:2", "ARG NAME=busybox\nFROM $NAMES$NAME\n"},
        {"WorkdirRelativePath:2", "FROM busybox\nWORKDIR app\n"},
        {"UndefinedVar:2", "FROM busybox\nCOPY a $NOWHERE/\n"},
        {"MultipleInstructionsDisallowed:2", "FROM busybox\nCMD [\"a\"]\nCMD [\"b\"]\n"},
        {"LegacyKeyValueFormat:2", "FROM busybox\nENV a b\n"},
        {"InvalidBaseImagePlatform:1", "FROM arm\n"},
        {"RedundantTargetPlatform:1", "FROM --platform=$TARGETPLATFORM busybox\n"},
        {"SecretsUsedInArgOrEnv:2", "FROM busybox\nARG GIT_TOKEN\n"},
        {"InvalidDefaultArgInFrom:2", "ARG TAG\nFROM busybox:${TAG}\n"},
        {"FromPlatformFlagConstDisallowed:1", "FROM --platform=linux/amd64 busybox AS a\n"},
        {"CopyIgnoredFile:2", "FROM busybox\nCOPY secret /\n"},
        {"InvalidDefinitionDescription:3", "# check=experimental=InvalidDefinitionDescription\n# about it\nFROM busybox AS a\n"},
        {"ExposeProtoCasing:2", "FROM busybox\nEXPOSE 53/UDP\n"},
        {"ExposeInvalidFormat:2", "FROM busybox\nEXPOSE 127.0.0.1:80:80\n"},
    };
    BOOST_TEST(cases.size() == 22U);
    for (const auto& [expected, text] : cases) {
        BOOST_TEST_CONTEXT(expected) {
            const auto a = check(text, [](auto& r, auto& g) {
                r.ignore_file = "secret\n";
                r.build_args = {{"TAG", "latest"}};
                auto arm = busybox;
                arm.replace(arm.find("amd64"), 5, "arm64");
                g.images["docker.io/library/arm:latest"] = arm;
            });
            BOOST_TEST(!a.problem);
            BOOST_TEST(rules(a) == expected);
            BOOST_TEST(a.status == 1);
            const auto name = expected.substr(0, expected.find(':'));
            BOOST_TEST(a.plain.find(cat(": ", name, ": ")) != std::string::npos);
            BOOST_TEST(a.plain.find("\nhelp: ") != std::string::npos);
            BOOST_TEST(a.plain.find("http") == std::string::npos);  // help that needs no link
            BOOST_TEST(a.text.find(cat("\nWARNING: ", name)) == 0U);
        }
    }
}

BOOST_AUTO_TEST_CASE(a_clean_file_has_status_0) {
    const auto a = check("FROM busybox\nCMD [\"sh\"]\n");
    BOOST_TEST(a.status == 0);
    BOOST_TEST(a.plain == "no warnings found\n");
    BOOST_TEST(a.text.empty());
    BOOST_TEST(json::serialize(*json::parse(a.json).find("warnings")) == "[]");
}

BOOST_AUTO_TEST_CASE(the_json_form_is_buildkits) {
    const auto a = check("FROM busybox\nMAINTAINER me\n");
    const std::string expected = R"({"warnings":[{"ruleName":"MaintainerDeprecated",)"
                                 R"("description":"The MAINTAINER instruction is deprecated, use a label instead to define an image author",)"
                                 R"("url":"https://docs.docker.com/go/dockerfile/rule/maintainer-deprecated/",)"
                                 R"("detail":"Maintainer instruction is deprecated in favor of using label",)"
                                 R"("location":{"ranges":[{"start":{"line":2},"end":{"line":2}}]}}],)"
                                 R"("sources":[{"filename":"Dockerfile","data":"RlJPTSBidXN5Ym94Ck1BSU5UQUlORVIgbWUK","language":"Dockerfile"}]})";
    BOOST_TEST(json::serialize(json::parse(a.json)) == expected);
}

BOOST_AUTO_TEST_CASE(the_directive_and_the_build_argument_choose) {
    const std::string bad = "FROM busybox AS Base\nMAINTAINER me\n";
    BOOST_TEST(rules(check("# check=skip=StageNameCasing\n" + bad)) == "MaintainerDeprecated:3");
    BOOST_TEST(rules(check("# check=skip=StageNameCasing,MaintainerDeprecated\n" + bad)) == "");
    BOOST_TEST(rules(check("# check=skip=all\n" + bad)) == "");
    const auto given = [](const std::string& text) { return [text](auto& r, auto&) { r.build_args["BUILDKIT_DOCKERFILE_CHECK"] = text; }; };
    BOOST_TEST(rules(check("# check=skip=all\n" + bad, given("skip=StageNameCasing"))) == "MaintainerDeprecated:3");
    // error=true fails a build; --check has its status for that.
    const auto a = check("# check=error=true\n" + bad);
    BOOST_TEST(!a.problem);
    BOOST_TEST(a.status == 1);
    const auto e = failure("# check=error=true\n" + bad);
    BOOST_TEST(says(e, "lint violation found for rules: MaintainerDeprecated, StageNameCasing"));
    BOOST_TEST(says(failure(bad, given("error=true")), "lint violation found"));
    BOOST_TEST(build("# check=error=true;skip=all\n" + bad).r.warnings.empty());
    BOOST_TEST(says(failure("# check=eror=true\nFROM busybox\n"), "did you mean error?"));
    // Directly above one instruction.
    BOOST_TEST(rules(check("FROM busybox\n# check=skip=MaintainerDeprecated\nMAINTAINER me\nWORKDIR x\n")) == "WorkdirRelativePath:4");
}

BOOST_AUTO_TEST_CASE(without_a_target_every_stage_is_looked_at) {
    const std::string text = "FROM busybox AS a\nWORKDIR x\nFROM busybox AS b\nCOPY f $U\n";
    BOOST_TEST(rules(check(text)) == "WorkdirRelativePath:2 UndefinedVar:4");
    BOOST_TEST(rules(check(text, [](auto& r, auto&) { r.target = "a"; })) == "WorkdirRelativePath:2");
    BOOST_TEST(build(text).warnings() == "UndefinedVar:4 ");
}

BOOST_AUTO_TEST_CASE(an_error_of_the_file_is_told_beside_the_findings) {
    const auto a = check("FROM busybox AS Base\nCOPY ../x /\nWORKDIR ${y\n");
    BOOST_REQUIRE(a.problem);
    BOOST_TEST(a.status == 1);
    BOOST_TEST(rules(a) == "StageNameCasing:1");
    const auto all = json::parse(a.json);
    const auto& e = json::object_at(all.as_object(), "buildError");
    BOOST_TEST(json::string_at(e, "message").find("outside of the build context") != std::string::npos);
    const auto lines = json::serialize(*json::object_at(e, "location").find("ranges"));
    BOOST_TEST(lines == R"([{"start":{"line":2},"end":{"line":2}},{"start":{"line":3},"end":{"line":3}}])");
    BOOST_TEST((check("FROM nowhere\n").problem->kind() == errc::not_found));
}

BOOST_AUTO_TEST_CASE(an_outline_tells_what_can_be_set) {
    const std::string text =
        "# NAME which base\nARG NAME=busybox\nARG TAG=latest\nARG FULL=$NAME:$TAG\nARG UNUSED=1\n"
        "FROM ${FULL} AS dep\n# WHO is greeted\nARG WHO=you\nRUN --mount=type=secret,id=key,required true\n"
        "FROM scratch AS other\nARG HIDDEN\n"
        "# app the program\nFROM scratch AS app\nARG NAME\nRUN --mount=type=ssh --mount=type=secret,target=/k2 true\nCOPY --from=dep / /\n";
    const auto a = outline(text, [](auto& r, auto&) { r.build_args["WHO"] = "them"; });
    BOOST_TEST(a.text ==
               "TARGET:      app\nDESCRIPTION: the program\n\n"
               "BUILD ARG   VALUE            DESCRIPTION\n"
               "NAME        busybox          which base\n"
               "TAG         latest           \n"
               "FULL        busybox:latest   \n"
               "WHO         them             is greeted\n\n"
               "SECRET   REQUIRED\n"
               "key      true\n"
               "k2       \n\n"
               "SSH       REQUIRED\n"
               "default   \n\n");
    const auto all = json::parse(a.json);
    const auto& args = json::array_at(all.as_object(), "args");
    BOOST_TEST(json::serialize(args.at(0)) ==
               R"({"name":"NAME","description":"which base","value":"busybox","location":{"ranges":[{"start":{"line":2},"end":{"line":2}}]}})");
    BOOST_TEST(json::array_at(all.as_object(), "secrets").at(0).find("required")->as_bool());
    BOOST_TEST(json::string_at(all.as_object(), "description") == "the program");
    BOOST_TEST(outline("FROM busybox\n").plain.find("nothing can be set") == 0U);
}

BOOST_AUTO_TEST_CASE(targets_are_the_stages) {
    frontend::request r;
    r.dockerfile = "# build compiles\nFROM --platform=$BUILDPLATFORM golang AS build\nFROM scratch AS empty\nFROM build\n";
    const auto a = frontend::show_targets(r);
    BOOST_TEST(a.text == "TARGET    DESCRIPTION\nbuild     compiles\nempty     \n(default) \n");
    const auto all = json::parse(a.json);
    const auto& list = json::array_at(all.as_object(), "targets");
    BOOST_TEST(json::serialize(list.at(0)) == R"({"name":"build","description":"compiles","base":"golang","platform":"$BUILDPLATFORM",)"
                                              R"("location":{"ranges":[{"start":{"line":2},"end":{"line":2}}]}})");
    BOOST_TEST(json::serialize(list.at(2)) == R"({"default":true,"base":"build","location":{"ranges":[{"start":{"line":4},"end":{"line":4}}]}})");
}

// ---------------------------------------------------------------- errors

BOOST_AUTO_TEST_CASE(all_errors_are_told_at_once) {
    const auto e = failure("FROM missing\nCOPY --from=9 a b\nWORKDIR ${x\nCOPY ../x /y\nCOPY --chmod=999 a /\n");
    BOOST_TEST(e.where()->line == 2U);
    BOOST_TEST(says(e, "invalid stage index 9"));
    BOOST_TEST(says(e, "; line 3: failed to process"));
    BOOST_TEST(says(e, "; line 4: COPY source \"../x\" is outside of the build context"));
    BOOST_TEST(says(e, "; line 5: invalid chmod parameter: '999'"));
    const auto from = failure("FROM ${A\nFROM --platform=x/y/z/w busybox\n");
    BOOST_TEST(from.where()->line == 1U);
    BOOST_TEST(says(from, "; line 2: failed to parse platform x/y/z/w: "));
}

BOOST_AUTO_TEST_CASE(a_name_that_is_no_stage_is_offered_the_nearest) {
    const auto near = failure("FROM busybox AS builder\nFROM scratch\nCOPY --from=biulder /a /b\n");
    BOOST_TEST(says(near, "there is no stage \"biulder\" in the file (did you mean builder?), and as an image: "));
    BOOST_TEST(near.where()->line == 3U);
    const auto far = failure("FROM busybox AS builder\nFROM scratch\nCOPY --from=nope /a /b\n");
    BOOST_TEST(says(far, "there is no stage \"nope\" in the file, and as an image: "));
    BOOST_TEST(!says(far, "did you mean"));
    // A name that is an image is one.
    BOOST_TEST(build("FROM scratch\nCOPY --from=busybox /a /b\n").asked.size() == 1U);
}

BOOST_AUTO_TEST_CASE(a_build_argument_that_nothing_takes_is_warned_about) {
    const auto given = [](const std::string& name) { return [name](auto& r, auto&) { r.build_args[name] = "x"; }; };
    const std::string text = "ARG VERSION\nFROM busybox\nARG VERSION\n";
    const auto o = build(text, given("VERSOIN"));
    BOOST_REQUIRE(o.r.warnings.size() == 1U);
    BOOST_TEST(o.r.warnings[0].rule == "");
    BOOST_TEST(o.r.warnings[0].message == "the build argument VERSOIN is not used: no ARG of the file has that name (did you mean VERSION?)");
    for (const auto* name : {"VERSION", "http_proxy", "NO_PROXY", "BUILDKIT_CACHE_MOUNT_NS", "TARGETARCH"})
        BOOST_TEST(build(text, given(name)).r.warnings.empty(), name);
}

BOOST_AUTO_TEST_SUITE_END()

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

std::vector<std::string> findings(std::string_view text, const df::lookup& automatic = {}) {
    const df::file f = df::parse(text);
    std::vector<std::string> out;
    for (const auto& w : df::check_file(f, df::parse_instructions(f).value, {}, automatic))
        out.push_back(cat(w.rule, '@', w.lines.first, ": ", w.message));
    return out;
}

using list = std::vector<std::string>;

void expect(std::string_view text, const list& expected) {
    const auto found = findings(text);
    BOOST_TEST(found == expected, boost::test_tools::per_element());
}

}  // namespace

BOOST_AUTO_TEST_SUITE(checks_of_from)

BOOST_AUTO_TEST_CASE(arguments_must_be_declared) {
    expect("ARG VERSION=1\nFROM a:$VERSON\n",
           {"InvalidDefaultArgInFrom@2: Default value for ARG a:$VERSON results in empty or invalid base image name",
            "UndefinedArgInFrom@2: FROM argument 'VERSON' is not declared (did you mean VERSION?)"});
    expect("FROM --platform=$BUILDPLATFROM a\n",
           {"UndefinedArgInFrom@1: FROM argument 'BUILDPLATFROM' is not declared (did you mean BUILDPLATFORM?)"});
    expect("ARG X\nFROM a${X:+:$X}\n", {});
}

BOOST_AUTO_TEST_CASE(defaults_must_give_an_image) {
    expect("ARG X\nFROM $X\n", {"InvalidDefaultArgInFrom@2: Default value for ARG $X results in empty or invalid base image name"});
    expect("ARG X\nFROM a:$X\n", {"InvalidDefaultArgInFrom@2: Default value for ARG a:$X results in empty or invalid base image name"});
    expect("ARG X=Upper\nFROM $X\n", {"InvalidDefaultArgInFrom@2: Default value for ARG $X results in empty or invalid base image name"});
    expect("ARG A=1\nARG B=x-$A\nFROM img:$B-${TARGETARCH}\n", {});
    for (const std::string_view good :
         {"a", "a/b:c", "localhost/a", "host.x:5000/a/b:T_1.x", "a@sha256:0123456789abcdef0123456789abcdef", "HOST/a", "a__b/c-d.e"})
        BOOST_TEST(findings("ARG X=" + std::string(good) + "\nFROM $X\n").empty(), good);
    for (const std::string_view bad : {"a:", "a/", "/a", "a b", "a::b", "a@x", "a..b", "-a", "a:.x", "h:x/a"})
        BOOST_TEST(findings("ARG X=\"" + std::string(bad) + "\"\nFROM $X\n").size() == 1U, bad);
}

BOOST_AUTO_TEST_CASE(platforms) {
    for (const std::string_view text : {"$TARGETPLATFORM", "${TARGETPLATFORM}"})
        expect("FROM --platform=" + std::string(text) + " a\n", {"RedundantTargetPlatform@1: Setting platform to predefined " + std::string(text) +
                                                                 " in FROM is redundant as this is the default behavior"});
    expect("FROM --platform=linux/arm64 a AS b\n",
           {"FromPlatformFlagConstDisallowed@1: FROM --platform flag should not use constant value \"linux/arm64\""});
    expect("FROM --platform=arm64 a\n", {"FromPlatformFlagConstDisallowed@1: FROM --platform flag should not use constant value \"arm64\""});
    expect("FROM --platform=linux/aarch64 a AS build-arm64\n", {});
    expect("FROM --platform=linux/arm64 a AS linux-x\n", {});
    expect("FROM --platform=nonsense a AS b\n", {});
    expect("FROM --platform=$BUILDPLATFORM a\nFROM --platform=linux/$TARGETARCH b\n", {});
}

BOOST_AUTO_TEST_CASE(the_stage_is_told) {
    const df::file f = df::parse("FROM a\nFROM --platform=linux/arm64 b\nCMD x\n");
    const auto found = df::check_file(f, df::parse_instructions(f).value, {});
    BOOST_REQUIRE(found.size() == 2U);
    BOOST_TEST(found[0].stage == 1);
    BOOST_TEST(found[1].stage == 1);
}

BOOST_AUTO_TEST_CASE(automatic_arguments_as_given) {
    const auto found = findings("FROM a:$TARGETVARIANT\n", [](std::string_view name) -> std::optional<std::string> {
        return name == "TARGETVARIANT" ? std::optional<std::string>("v7") : std::nullopt;
    });
    BOOST_TEST(found.empty());
}

BOOST_AUTO_TEST_SUITE_END()

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

BOOST_AUTO_TEST_SUITE(errors)

BOOST_AUTO_TEST_CASE(all_at_once) {
    const df::file f = df::parse("FORM a\nFROM b\nENV x\nCOPY y\nRUN --netwrk=none z\nBLA\nCMD [1]\n", "D");
    const auto errors = df::parse_instructions(f).errors;
    const std::vector<df::diagnostic> expected{
        {"unknown instruction: FORM (did you mean FROM?)", {1, 1}},
        {"ENV must have two arguments", {3, 3}},
        {"COPY requires at least two arguments, but only one was provided. Destination could not be determined", {4, 4}},
        {"unknown flag: --netwrk (did you mean network?)", {5, 5}},
        {"unknown instruction: BLA", {6, 6}},
        {"when using JSON array syntax, arrays must be comprised of strings only", {7, 7}},
    };
    BOOST_REQUIRE(errors.size() == expected.size());
    for (std::size_t i = 0; i < expected.size(); ++i) {
        BOOST_TEST(errors[i].message == expected[i].message);
        BOOST_TEST((errors[i].lines == expected[i].lines));
    }
    const error e = df::to_error(f, errors);
    BOOST_TEST((e.kind() == errc::invalid));
    BOOST_TEST((e.where() == source_location{"D", 1}));
    BOOST_TEST(
        std::string(e.what()).starts_with("unknown instruction: FORM (did you mean FROM?); line 3: ENV must have two arguments; line 4: COPY"));
}

BOOST_AUTO_TEST_CASE(order_of_instructions) {
    const auto first = [](std::string_view text) {
        const auto errors = df::parse_instructions(df::parse(text)).errors;
        return errors.size() == 1 ? errors[0].message : cat(errors.size(), " errors");
    };
    BOOST_TEST(contains(first("RUN a\nFROM b\n"), "no build stage in current context: RUN stands before the first FROM"));
    BOOST_TEST(contains(first("ARG a\n"), "dockerfile contains no stages to build"));
    BOOST_TEST(contains(first("FROM a b\nRUN c\nARG d\n"), "FROM requires either one or three arguments"));
}

BOOST_AUTO_TEST_CASE(source_around_one_line) {
    const std::string_view text = "l1\nl2\nl3\nl4\nl5\nl6\n";
    BOOST_TEST(df::render_source("Dockerfile", text, {3, 3}) ==
               "Dockerfile:3\n"
               "--------------------\n"
               "   1 |     l1\n"
               "   2 |     l2\n"
               "   3 | >>> l3\n"
               "   4 |     l4\n"
               "   5 |     l5\n"
               "--------------------\n");
    BOOST_TEST(df::render_source("D", "l1\r\nl2", {1, 1}) == "D:1\n--------------------\n   1 | >>> l1\n   2 |     l2\n--------------------\n");
    BOOST_TEST(df::render_source("D", text, {0, 0}).empty());
    BOOST_TEST(df::render_source("D", text, {99, 99}).empty());
}

BOOST_AUTO_TEST_CASE(source_around_several_lines) {
    const df::file f = df::parse("FROM a\nRUN b \\\n  c\nRUN d\nRUN e\n", "D");
    BOOST_TEST(df::render_source(f, f.nodes[1].lines) ==
               "D:2\n--------------------\n   1 |     FROM a\n   2 | >>> RUN b \\\n   3 | >>>   c\n   4 |     RUN d\n--------------------\n");
}

BOOST_AUTO_TEST_CASE(control_characters_do_not_reach_the_terminal) {
    BOOST_TEST(contains(df::render_source("D", "RUN \x1b[31m\tx", {1, 1}), ">>> RUN \\x1b[31m\tx\n"));
}

BOOST_AUTO_TEST_CASE(many_errors_are_cut_short) {
    std::string text = "FROM a\n";
    for (int i = 0; i < 100; ++i) text += "BLA\n";
    const df::file f = df::parse(text);
    const auto errors = df::parse_instructions(f).errors;
    BOOST_TEST(errors.size() == 100U);
    BOOST_TEST(std::string(df::to_error(f, errors).what()).ends_with("; line 22: unknown instruction: BLA; and 79 more errors"));
}

BOOST_AUTO_TEST_SUITE_END()

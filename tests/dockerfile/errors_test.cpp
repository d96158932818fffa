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

// The caret stands below what the message speaks of.
BOOST_AUTO_TEST_CASE(carets) {
    const auto marked = [](std::string_view text, df::line_range lines, std::string_view message) {
        const std::string out = df::render_error("D", text, lines, message);
        std::string before;
        for (const auto line : split(out, '\n')) {
            if (line.find('^') != std::string_view::npos && line.starts_with("     |")) {
                const auto at = line.find('^');
                return before.substr(at, line.rfind('^') - at + 1);
            }
            before = line;
        }
        return std::string("none");
    };
    BOOST_TEST(marked("FROM a\nCOPPY b c\n", {2, 2}, "unknown instruction: COPPY (did you mean COPY?)") == "COPPY");
    BOOST_TEST(marked("RUN --netwrk=none x\n", {1, 1}, "unknown flag: --netwrk (did you mean network?)") == "--netwrk");
    BOOST_TEST(marked("RUN --mount=type=cach,target=/c x\n", {1, 1}, "unsupported mount type \"cach\" (did you mean cache?)") == "cach");
    BOOST_TEST(marked("RUN --mount=targt=/c x\n", {1, 1}, "unexpected key 'targt' in 'targt=/c' (did you mean target?)") == "targt");
    BOOST_TEST(marked("COPY --from=9 a b\n", {1, 1}, "invalid stage index 9: the file has 1 stages, counted from 0") == "9");
    BOOST_TEST(marked("ENV x\n", {1, 1}, "ENV must have two arguments") == "ENV");
    BOOST_TEST(marked("  copy a\n", {1, 1}, "something else") == "copy");
    // On a later line of the instruction.
    BOOST_TEST(marked("RUN --mount=type=bind \\\n  --netwrk=none x\n", {1, 1}, "unknown flag: --netwrk") == "--netwrk");
    BOOST_TEST(marked("RUN x\n--netwrk\n", {1, 1}, "unknown flag: --netwrk") == "RUN");
}

BOOST_AUTO_TEST_CASE(a_caret_keeps_its_place_behind_tabs_and_wide_letters) {
    BOOST_TEST(df::render_error("D", "\tENV é=${x\n", {1, 1}, "failed to process \"${x\": missing") ==
               "D:1\n--------------------\n   1 | >>> \tENV é=${x\n     |     \t      ^^^\n   2 |     \n--------------------\n");
}

BOOST_AUTO_TEST_CASE(errors_come_apart_again) {
    const df::file f = df::parse("FORM a\nFROM b\nENV x\n", "D");
    const auto errors = df::parse_instructions(f).errors;
    const auto apart = df::split_error(df::to_error(f, errors));
    BOOST_REQUIRE(apart.size() == errors.size());
    for (std::size_t i = 0; i < apart.size(); ++i) {
        BOOST_TEST(apart[i].message == errors[i].message);
        BOOST_TEST(apart[i].lines.first == errors[i].lines.first);
    }
    const auto one = df::split_error(error{errc::invalid, "see; line x: or; line 3"}.at({"D", 7}));
    BOOST_REQUIRE(one.size() == 1U);
    BOOST_TEST((one[0].lines == df::line_range{7, 7}));
}

BOOST_AUTO_TEST_CASE(likely_words) {
    static constexpr std::string_view known[] = {"build", "images", "prune"};
    BOOST_TEST(df::likely_word("biuld", known) == "build");
    BOOST_TEST(df::likely_word("image", known) == "images");
    BOOST_TEST(df::likely_word("daemon", known) == "");
}

BOOST_AUTO_TEST_CASE(every_rule_has_plain_help) {
    BOOST_TEST(df::all_rules().size() == 22U);
    for (const auto& r : df::all_rules()) {
        BOOST_TEST(!r.help.empty(), r.name);
        BOOST_TEST(r.help.find("://") == std::string_view::npos, r.name);
        BOOST_TEST(df::find_rule(r.name) == &r, r.name);
    }
    BOOST_TEST(df::find_rule("undefinedvar") == &df::info(df::check_rule::undefined_var));
    BOOST_TEST(df::find_rule("nothing") == nullptr);
}

BOOST_AUTO_TEST_SUITE_END()

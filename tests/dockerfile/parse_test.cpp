#include "support/support.hpp"

#include <algorithm>
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
std::string tree(std::string_view text) { return df::dump(df::parse(text)); }
}  // namespace

BOOST_AUTO_TEST_SUITE(lines)

BOOST_AUTO_TEST_CASE(byte_order_mark_and_windows_line_ends_are_accepted) {
    BOOST_TEST(tree("\xEF\xBB\xBF"
                    "FROM a\r\nRUN b \\\r\n  c\r\n") == "(from \"a\")\n(run \"b   c\")\n");
    BOOST_TEST(df::parse("\xEF\xBB\xBF# escape=`\r\nFROM a\r\n").escape == '`');
}

BOOST_AUTO_TEST_CASE(a_continued_line_keeps_its_blanks_and_loses_comments_and_blank_lines) {
    const df::file f = df::parse("FROM a\nRUN one \\\n# not me\n   # nor me\n\n  two \\  \n three\nRUN four\n");
    BOOST_TEST(df::dump(f) == "(from \"a\")\n(run \"one   two  three\")\n(run \"four\")\n");
    BOOST_TEST((f.nodes[1].lines == df::line_range{2, 7}));
    BOOST_TEST(f.nodes[1].empty_continuation == 7U);
    BOOST_TEST((f.nodes[2].lines == df::line_range{8, 8}));
    BOOST_TEST(f.nodes[2].empty_continuation == 0U);
}

BOOST_AUTO_TEST_CASE(an_escaped_escape_character_does_not_continue) {
    BOOST_TEST(tree("FROM a\nENV A b\\\\\nENV C d\n") == "(from \"a\")\n(env \"A\" \"b\\\\\\\\\" \"\")\n(env \"C\" \"d\" \"\")\n");
    BOOST_TEST(tree("FROM a\nRUN b\\\n\\\nc\n") == "(from \"a\")\n(run \"bc\")\n");
    BOOST_TEST(tree("FROM a\nRUN b \\") == "(from \"a\")\n(run \"b\")\n");
}

// O-DF-04: lines that begin with # inside of a continued instruction are comments, whatever quotes are open.
BOOST_AUTO_TEST_CASE(o_df_04_comments_inside_of_a_string) {
    BOOST_TEST(tree("FROM a\nRUN printf 'x\\n\\\n# one\\n\\\n  # two\\n\\\ny'\n") == "(from \"a\")\n(run \"printf 'x\\\\ny'\")\n");
    const df::file kept = df::parse("FROM a\nRUN <<E\n# one\n  # two\nE\n");
    BOOST_TEST(kept.nodes[1].heredocs[0].content == "# one\n  # two\n");
}

BOOST_AUTO_TEST_CASE(a_file_without_instructions_is_an_error) {
    for (const std::string_view text : {"", "\n\n", "# only\n# comments\n", "\xEF\xBB\xBF"})
        BOOST_TEST(contains(thrown([&] { df::parse(text, "the/Dockerfile"); }), "file with no instructions: the/Dockerfile"));
}

BOOST_AUTO_TEST_CASE(the_longest_line) {
    const std::string longest = "RUN " + std::string(df::max_line - 4, 'x');
    BOOST_TEST(df::parse("FROM a\n" + longest + "\n").nodes[1].args[0].size() == df::max_line - 4);
    try {
        df::parse("FROM a\n" + longest + "x\n", "D");
        BOOST_ERROR("accepted");
    } catch (const error& e) {
        BOOST_TEST(contains(e.what(), "greater than max allowed size of 65535"));
        BOOST_TEST((e.where() == source_location{"D", 2}));
    }
}

BOOST_AUTO_TEST_CASE(comments_directly_above_belong_to_the_instruction) {
    const df::file f = df::parse("# first\n#\n# second\n#third\nFROM a\n\n# lost\n\nRUN b\n# kept \\\nRUN c \\\n # inside\n d\nRUN e\n");
    BOOST_TEST((f.nodes[0].comments == std::vector<std::string>{"second", "third"}));
    BOOST_TEST(f.nodes[1].comments.empty());
    BOOST_TEST((f.nodes[2].comments == std::vector<std::string>{"kept \\"}));
    BOOST_TEST(f.nodes[3].comments.empty());
}

BOOST_AUTO_TEST_CASE(keywords_in_any_case_and_unknown_ones) {
    const df::file f = df::parse("fRoM a\nFOO --x bar\n");
    BOOST_TEST(f.nodes[0].keyword == "fRoM");
    BOOST_TEST(f.nodes[1].keyword == "FOO");
    BOOST_TEST(f.nodes[1].args.empty());
    BOOST_TEST(f.nodes[1].original == "FOO --x bar");
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(directives)

// O-DF-05: any order, as long as they stand before everything else; each once.
BOOST_AUTO_TEST_CASE(o_df_05_escape_on_the_second_line) {
    const df::file f = df::parse("# syntax = docker/dockerfile:1 more\n#ESCAPE=`\n# check=skip=all;error=true\nFROM `\n  a\\b\n");
    BOOST_TEST(f.escape == '`');
    BOOST_TEST(f.directives.size() == 3U);
    BOOST_TEST(f.find("syntax")->value == "docker/dockerfile:1 more");
    BOOST_TEST(f.find("escape")->line == 2U);
    BOOST_TEST(f.find("check")->value == "skip=all;error=true");
    BOOST_TEST(df::dump(f) == "(from \"a\\\\b\")\n");
    BOOST_TEST(f.nodes[0].comments.empty());
}

BOOST_AUTO_TEST_CASE(twice_or_unfit_is_an_error_with_its_line) {
    try {
        df::parse("# escape=`\n# syntax=x\n# Escape=`\nFROM a\n", "D");
        BOOST_ERROR("accepted");
    } catch (const error& e) {
        BOOST_TEST(e.what() == std::string("only one escape parser directive can be used"));
        BOOST_TEST((e.where() == source_location{"D", 3}));
    }
    BOOST_TEST(contains(thrown([] { df::parse("# escape=x\nFROM a\n"); }), "invalid escape token"));
}

BOOST_AUTO_TEST_CASE(anything_else_ends_them) {
    for (const std::string_view before : {"# a comment\n", "\n", "# unknown=x\n", "#\n"})
        BOOST_TEST(df::parse(std::string(before) + "# escape=`\nFROM a\n").escape == '\\');
}

BOOST_AUTO_TEST_CASE(the_requested_frontend) {
    BOOST_TEST(df::detect_syntax("# syntax=a/b:1 x y\nFROM c\n")->image == "a/b:1");
    BOOST_TEST(df::detect_syntax("# syntax=a/b:1 x y\nFROM c\n")->value == "a/b:1 x y");
    BOOST_TEST(df::detect_syntax("#!/usr/bin/env x\n# escape=`\n#syntax=a\n")->line == 3U);
    BOOST_TEST(df::detect_syntax("//syntax=a\n")->image == "a");
    BOOST_TEST(df::detect_syntax("// escape=`\n// Syntax = a\n")->image == "a");
    BOOST_TEST(df::detect_syntax("\xEF\xBB\xBF{\"x\": {\"syntax\": \"no\"}, \"syntax\" : \"a\\/b\"}\n")->image == "a/b");
    BOOST_TEST(!df::detect_syntax("FROM a\n# syntax=b\n"));
    BOOST_TEST(!df::detect_syntax("{\"syntax\": 1}"));
    BOOST_TEST(!df::detect_syntax(""));
    BOOST_TEST(!df::detect_syntax("{\"syntax\": \"open"));
    BOOST_TEST(df::detect_directive("check", "# syntax=a\n# check=skip=X\nFROM b\n")->value == "skip=X");
    BOOST_TEST(!df::detect_directive("check", "// check=skip=X\n"));
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(arguments)

BOOST_AUTO_TEST_CASE(flags) {
    const auto flags = [](std::string_view line) { return df::parse_line(line).flags; };
    BOOST_TEST((flags("COPY --a --b=c d e") == std::vector<std::string>{"--a", "--b=c"}));
    BOOST_TEST((flags("COPY --a=\"b c\"\\ d'e' -- --x y") == std::vector<std::string>{"--a=b c de"}));
    BOOST_TEST((df::parse_line("COPY --a -- --x y").args == std::vector<std::string>{"--x", "y"}));
    BOOST_TEST((flags("COPY -a --b c") == std::vector<std::string>{}));
    BOOST_TEST((flags("RUN --mount=type=cache,target=/é true") == std::vector<std::string>{"--mount=type=cache,target=/é"}));
    BOOST_TEST(df::parse_line("RUN --a\t\n").flags.size() == 1U);
}

BOOST_AUTO_TEST_CASE(json_or_text) {
    const auto json = [](std::string_view rest) { return df::parse_line("CMD " + std::string(rest)).json; };
    BOOST_TEST(json("[]"));
    BOOST_TEST(json("[ \"a\" , \"\\u00e9\\ud83d\\ude00\" ] "));
    for (const std::string_view text :
         {"['a']", "[\"a\"", "[\"a\",]", "[\"a\"] x", "[,]", "[\"a\" \"b\"]", "[\"\\x\"]", "[\"\\u12\"]", "[a]", "[{]}", "[1 2]", "[01]"})
        BOOST_TEST(!json(text), text);
    const df::node n = df::parse_line("CMD [\"a\", \"\\u00e9\\ud83d\\ude00\\ud800\", \"\\u0000\"]");
    BOOST_TEST(n.args[1] == "é😀\xEF\xBF\xBD");
    BOOST_TEST(n.args[2] == std::string(1, '\0'));
    BOOST_TEST((df::parse_line("COPY [\"a b\", \"c\"]").args == std::vector<std::string>{"a b", "c"}));
}

BOOST_AUTO_TEST_CASE(json_with_something_else_in_it_is_an_error) {
    for (const std::string_view text : {"[1]", "[\"a\", [\"b\"]]", "[null]", "[{\"a\": [1, {}]}]", "[true, \"x\"]", "[-1.5e+3]"}) {
        const df::node n = df::parse_line("CMD " + std::string(text));
        BOOST_REQUIRE_MESSAGE(n.problem.has_value(), text);
        BOOST_TEST(contains(*n.problem, "arrays must be comprised of strings only"));
    }
}

BOOST_AUTO_TEST_CASE(words_keep_their_quotes) {
    BOOST_TEST((df::parse_line("ARG a=\"b c\" d='e f' g=h\\ i j").args == std::vector<std::string>{"a=\"b c\"", "d='e f'", "g=h\\ i", "j"}));
    BOOST_TEST((df::parse_line("ENV a=b c=").args == std::vector<std::string>{"a", "b", "=", "c", "", "="}));
    BOOST_TEST((df::parse_line("ENV a  b=c d").args == std::vector<std::string>{"a", "b=c d", ""}));
    BOOST_TEST(*df::parse_line("ENV a").problem == "ENV must have two arguments");
    BOOST_TEST(contains(*df::parse_line("LABEL a=b c").problem, "can't find = in \"c\""));
    BOOST_TEST((df::parse_line("EXPOSE 1  2\t3").args == std::vector<std::string>{"1", "2", "3"}));
    BOOST_TEST((df::parse_line("HEALTHCHECK --retries=1 CMD  [\"x\"]").args == std::vector<std::string>{"CMD", "x"}));
}

BOOST_AUTO_TEST_CASE(a_single_instruction) {
    BOOST_TEST(df::dump(df::parse_line("ONBUILD RUN --x a b")) == "onbuild (run [\"--x\"] \"a b\")");
    BOOST_TEST(contains(thrown([] { df::parse_line("RUN a\nRUN b\n"); }), "expected a single instruction, found 2"));
    BOOST_TEST(df::parse_line("RUN a `\n b", '`').args[0] == "a  b");
}

BOOST_AUTO_TEST_SUITE_END()

#include "support/support.hpp"

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "dockerfile_support.hpp"

import cobuild.base;
import cobuild.dockerfile;

using namespace cobuild;
namespace df = cobuild::dockerfile;
using namespace dftest;

namespace {

df::node first(std::string_view text) { return df::parse(text).nodes.at(0); }

template<class T>
T body(std::string_view text) {
    return std::get<T>(df::parse_instruction(df::parse_line(text)).body);
}

}  // namespace

BOOST_AUTO_TEST_SUITE(heredocs)

BOOST_AUTO_TEST_CASE(words) {
    const auto word = [](std::string_view text) { return df::parse_heredoc_word(text); };
    BOOST_TEST(word("<<EOF")->name == "EOF");
    BOOST_TEST(word("<<EOF")->expand);
    BOOST_TEST(word("12<<-EOF")->fd == 12U);
    BOOST_TEST(word("12<<-EOF")->chomp);
    BOOST_TEST(!word("<<'EOF'")->expand);
    BOOST_TEST(word("<<eo'f'")->name == "eof");
    BOOST_TEST(!word("<<eo'f'")->expand);
    BOOST_TEST(word("<<eo\\'f")->name == "eo'f");
    BOOST_TEST(word("<<eo\\'f")->expand);
    BOOST_TEST(word("<<'e'o\\'f")->name == "eo'f");
    BOOST_TEST(word("<<\"one two\"")->name == "one two");
    BOOST_TEST(word("<<$EOF")->name == "$EOF");
    BOOST_TEST(word("<<  EOF")->name == "EOF");
    BOOST_TEST(word("<<file.txt")->name == "file.txt");
    for (const std::string_view text : {"<<", "<<-", "<EOF", "<<<EOF", "x<<EOF", "\"<<EOF\"", "<<one two", "<<''", "<<'open", "<<a<b", ""})
        BOOST_TEST(!word(text).has_value(), text);
}

BOOST_AUTO_TEST_CASE(bodies_follow_in_order) {
    const df::node n = first("COPY <<X <<-Y /dest\nY\nX\n\tX\n\t Y\n\tY\nRUN next\n");
    BOOST_TEST(n.heredocs.size() == 2U);
    BOOST_TEST(n.heredocs[0].content == "Y\n");
    BOOST_TEST(n.heredocs[1].content == "\tX\n\t Y\n");
    BOOST_TEST(n.heredocs[1].text() == "X\n Y\n");
    BOOST_TEST((n.lines == df::line_range{1, 6}));
}

BOOST_AUTO_TEST_CASE(line_ends_inside_are_kept) {
    BOOST_TEST(first("RUN <<E\r\na\r\n\r\nE\r\n").heredocs[0].content == "a\r\n\r\n");
    BOOST_TEST(first("RUN <<E\nE").heredocs[0].content.empty());
}

BOOST_AUTO_TEST_CASE(only_where_they_are_supported) {
    BOOST_TEST(first("RUN \"<<E\"\nRUN b\n").heredocs.empty());
    BOOST_TEST(first("RUN [\"<<E\"]\nRUN b\n").heredocs.empty());
    BOOST_TEST(first("RUN cat <<<E\nRUN b\n").heredocs.empty());
    BOOST_TEST(first("RUN echo $((1 << 3)) && a\nRUN b\n").heredocs.empty());
    BOOST_TEST(first("RUN echo it's <<E\nRUN b\n").heredocs.empty());
    BOOST_TEST(first("ONBUILD RUN <<E\na\nE\n").heredocs[0].content == "a\n");
    BOOST_TEST(first("RUN --mount=type=cache,target=/x 3<<E cat\na\nE\n").heredocs[0].fd == 3U);
}

BOOST_AUTO_TEST_CASE(an_end_that_is_missing) {
    try {
        df::parse("FROM a\nRUN <<E\na\n E\nEE\n", "D");
        BOOST_ERROR("accepted");
    } catch (const error& e) {
        BOOST_TEST(contains(e.what(), "unterminated heredoc: no line \"E\""));
        BOOST_TEST((e.where() == source_location{"D", 2}));
    }
}

// O-DF-02: script lines are not taken for instructions; where there is no here-document, one error at the first line.
BOOST_AUTO_TEST_CASE(o_df_02_a_line_that_looks_like_an_instruction) {
    const df::node run = first("RUN <<EOF\necho\nenv\nEOF\n");
    BOOST_TEST(run.heredocs[0].content == "echo\nenv\n");
    const df::file f = df::parse("FROM a\nCMD <<EOF\necho\nenv\nEOF\nRUN b\n");
    BOOST_REQUIRE(f.nodes.size() == 3U);
    const auto errors = df::parse_instructions(f).errors;
    BOOST_REQUIRE(errors.size() == 1U);
    BOOST_TEST(errors[0].message == "CMD does not take a here-document (<<EOF): only RUN, COPY and ADD do");
    BOOST_TEST((errors[0].lines == df::line_range{2, 5}));
    // Without the end of one it is ordinary text.
    BOOST_TEST(df::parse_instructions(df::parse("FROM a\nCMD cat <<EOF\nRUN b\n")).errors.empty());
}

// O-DF-03: no blank, a blank behind the plain marker, a blank behind the dash: all alike.
BOOST_AUTO_TEST_CASE(o_df_03_a_blank_behind_the_marker) {
    for (const std::string_view marker : {"<<E", "<< E", "<<-E", "<<- E", "<<-\t E"}) {
        const df::node run = first("RUN cat " + std::string(marker) + "\nx\nE\n");
        BOOST_REQUIRE_MESSAGE(run.heredocs.size() == 1U, marker);
        BOOST_TEST(run.heredocs[0].name == "E");
        const auto copy = body<df::copy_instruction>("COPY " + std::string(marker) + " /x\nx\nE\n");
        BOOST_TEST(copy.sources.empty());
        BOOST_TEST(copy.heredocs.size() == 1U, marker);
        BOOST_TEST(copy.destination == "/x");
    }
}

// O-DF-01: an inline file holds its quotes.
BOOST_AUTO_TEST_CASE(o_df_01_quotes_in_the_body) {
    const auto copy = body<df::copy_instruction>("COPY <<EOF /x.xml\n<?xml version=\"1.0\" encoding=\"UTF-8\"?>$VAR\\$VAR it's\nEOF\n");
    BOOST_TEST(copy.heredocs[0].expand);
    BOOST_TEST(df::expand_heredoc(copy.heredocs[0].text(), look_in({{"VAR", "v"}})).text == "<?xml version=\"1.0\" encoding=\"UTF-8\"?>v$VAR it's\n");
    BOOST_TEST(!body<df::copy_instruction>("COPY <<\"EOF\" /x\n$VAR\nEOF\n").heredocs[0].expand);
}

// What docker makes of backslashes in a body: one protects the character behind it and goes away.
BOOST_AUTO_TEST_CASE(backslashes_in_the_body) {
    const auto text = [](std::string_view content) { return df::expand_heredoc(content, {}).text; };
    BOOST_TEST(text("\\\n") == "\n");
    BOOST_TEST(text("\\\\\n") == "\\\n");
    BOOST_TEST(text("\\$\n") == "$\n");
    BOOST_TEST(text("\"a\" 'b'\n") == "\"a\" 'b'\n");
    BOOST_TEST((df::expand_heredoc("$A ${B:-$C}", look_in({{"C", "c"}})).unmatched == std::vector<std::string>{"A", "B"}));
}

BOOST_AUTO_TEST_CASE(what_a_run_gives_to_the_shell) {
    const auto script = body<df::run_instruction>("RUN <<-E\n\ta\n\t\tb\n\tE\n");
    BOOST_REQUIRE(script.script() != nullptr);
    BOOST_TEST(script.shell_text() == "a\nb\n");
    const auto python = body<df::run_instruction>("RUN python3 <<A 3<<B\nx\nA\ny\nB\n");
    BOOST_TEST(python.script() == nullptr);
    BOOST_TEST(python.shell_text() == "python3 <<A 3<<B\nx\nA\ny\nB");
    BOOST_TEST(body<df::run_instruction>("RUN a b").shell_text() == "a b");
    BOOST_TEST(df::summarize(script.heredocs[0]) == "a...");
    BOOST_TEST(df::summarize(df::heredoc{.name = "E", .content = "\n one\n\n"}) == "one");
}

BOOST_AUTO_TEST_CASE(files_out_of_heredocs) {
    const auto copy = body<df::copy_instruction>("COPY a <<one <<-'two 2' /dir/\nx\none\n\ty\n\ttwo 2\n");
    BOOST_TEST((copy.sources == std::vector<std::string>{"a"}));
    BOOST_TEST(copy.heredocs.size() == 2U);
    BOOST_TEST(copy.heredocs[1].name == "two 2");
    BOOST_TEST(copy.heredocs[1].text() == "y\n");
    BOOST_TEST(copy.destination == "/dir/");
    BOOST_TEST(contains(thrown([] { body<df::copy_instruction>("COPY a <<E\nx\nE\n"); }), "COPY cannot accept a heredoc as a destination"));
}

BOOST_AUTO_TEST_CASE(a_trigger_keeps_its_heredoc_in_the_text) {
    const auto trigger = body<df::onbuild_instruction>("ONBUILD  RUN <<E cat\na\nE\n");
    BOOST_TEST(trigger.source == "RUN <<E cat\na\nE");
    BOOST_TEST(std::get<df::run_instruction>(trigger.trigger->body).heredocs[0].content == "a\n");
    BOOST_TEST(body<df::run_instruction>(trigger.source).heredocs[0].content == "a\n");
}

BOOST_AUTO_TEST_SUITE_END()

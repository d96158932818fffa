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

struct row {
    std::string_view input, expected;
};

const variables env{{"DIR", "/srv"}, {"EMPTY", ""}, {"V", "v1.2.3"}, {"P", "/a/b/c.tar.gz"}, {"X", "xxyy"}, {"STAR", "*"}, {"한", "u"}};

std::string word(std::string_view text, char escape = '\\') { return df::expand_word(text, look_in(env), escape).text; }

void check(std::initializer_list<row> rows) {
    for (const auto& r : rows) BOOST_TEST(word(r.input) == r.expected, r.input << " gave " << word(r.input));
}

void check_errors(std::initializer_list<row> rows) {
    for (const auto& r : rows) {
        const std::string what = thrown([&] { word(r.input); });
        BOOST_TEST(contains(what, r.expected), r.input << ": " << what);
    }
}

}  // namespace

BOOST_AUTO_TEST_SUITE(expansion)

BOOST_AUTO_TEST_CASE(quotes_and_escapes) {
    check({{"plain", "plain"},
           {"", ""},
           {"a'b c'd", "ab cd"},
           {"a\"b c\"d", "ab cd"},
           {"a\\ b", "a b"},
           {"a\\\\b", "a\\b"},
           {"\\'", "'"},
           {"\"\\t\\\"\\$DIR\"", "\\t\"$DIR"},
           {"'\\t$DIR'", "\\t$DIR"},
           {"end\\", "end"},
           {"\"'\"", "'"},
           {"'\"'", "\""},
           {"''", ""},
           {"\\$DIR", "$DIR"},
           {"\\\\$DIR", "\\/srv"},
           {"\"\\\\$DIR\"", "\\/srv"},
           {"a  b", "a  b"}});
    BOOST_TEST(word("`$DIR\\x", '`') == "$DIR\\x");
    BOOST_TEST(word("\"`\"\\\"", '`') == "\"\\");
}

BOOST_AUTO_TEST_CASE(names) {
    check({{"$DIR", "/srv"},
           {"x${DIR}y", "x/srvy"},
           {"$DIRx", ""},
           {"$DIR.x", "/srv.x"},
           {"$", "$"},
           {"$.", "$."},
           {"a$ b", "a$ b"},
           {"$1x", "x"},
           {"$12x", "x"},
           {"$@x", "x"},
           {"$$DIR", "DIR"},
           {"$#", ""},
           {"${1}", ""},
           {"${@:-d}", "d"},
           {"${10:-d}", "d"},
           {"$한", "u"},
           {"${한}", "u"},
           {"$DIR-$EMPTY-$NONE", "/srv--"}});
}

// O-DF-08: without the colon only unset counts, with it empty too. The table of POSIX.1-2017, 2.6.2.
BOOST_AUTO_TEST_CASE(o_df_08_defaults_alternatives_and_required) {
    check({{"${DIR:-w}", "/srv"},
           {"${EMPTY:-w}", "w"},
           {"${NONE:-w}", "w"},
           {"${DIR-w}", "/srv"},
           {"${EMPTY-w}", ""},
           {"${NONE-w}", "w"},
           {"${DIR:+w}", "w"},
           {"${EMPTY:+w}", ""},
           {"${NONE:+w}", ""},
           {"${DIR+w}", "w"},
           {"${EMPTY+w}", "w"},
           {"${NONE+w}", ""},
           {"${DIR:?w}", "/srv"},
           {"${DIR?w}", "/srv"},
           {"${EMPTY?w}", ""}});
    check_errors({{"${EMPTY:?must be set}", "EMPTY: must be set"},
                  {"${NONE:?}", "NONE: is not allowed to be unset"},
                  {"${NONE?$DIR missing}", "NONE: /srv missing"},
                  {"${EMPTY:?}", "EMPTY: is not allowed to be empty"}});
}

BOOST_AUTO_TEST_CASE(words_nest) {
    check({{"${NONE:-${NIL:-$DIR}}", "/srv"},
           {"${NONE:-\"a }\"}", "a }"},
           {"${NONE:-a\\}}", "a}"},
           {"${NONE:-'$DIR'}", "$DIR"},
           {"${DIR:+${EMPTY:-\"${V}\"}}", "v1.2.3"},
           {"\"${NONE:-a b}\"", "a b"},
           {"${NONE:-}", ""},
           {"${NONE:-a{b}c", "a{bc"}});
}

// O-DF-07: prefixes and suffixes.
BOOST_AUTO_TEST_CASE(o_df_07_prefixes_and_suffixes) {
    check({{"/opt/${V#v}", "/opt/1.2.3"},
           {"${P#*/}", "a/b/c.tar.gz"},
           {"${P##*/}", "c.tar.gz"},
           {"${P%.*}", "/a/b/c.tar"},
           {"${P%%.*}", "/a/b/c"},
           {"${V#x}", "v1.2.3"},
           {"${V#}", "v1.2.3"},
           {"${V%}", "v1.2.3"},
           {"${X#*}", "xxyy"},
           {"${X##*}", ""},
           {"${X%%*}", ""},
           {"${X#?}", "xyy"},
           {"${X##*x}", "yy"},
           {"${X#*x*y}", "y"},
           {"${X%y?}", "xx"},
           {"${X%x?}", "xxyy"},
           {"${X%?y}", "xx"},
           {"${NONE#x}", ""},
           {"${X#$NONE}", "xxyy"},
           {"${X#$STAR}", "xxyy"},
           {"${X##$STAR}", ""},
           {"${STAR#\\*}", ""},
           {"${X#\\*}", "xxyy"},
           {"${V%%.?}", "v1.2"},
           {"${P##*/?}", ".tar.gz"},
           {"${X#\"x\"}", "xyy"},
           {"${X#'x'}", "xyy"}});
    check_errors({{"${V:#v}", "unsupported modifier (:#)"},
                  {"${V:##v}", "unsupported modifier (:#)"},
                  {"${V:%v}", "unsupported modifier (:%)"},
                  {"${V#\\v}", "invalid pattern (\\v)"}});
}

BOOST_AUTO_TEST_CASE(special_characters_of_patterns_are_only_three) {
    const auto look = look_in({{"F", "()[]{}^$.*?|\\x"}, {"Q", "???y"}, {"S", "a***yy*"}, {"한글", "가나다"}, {"N", "a\nb"}, {"B", "\xff\xfe"}});
    const auto text = [&](std::string_view t) { return df::expand_word(t, look).text; };
    BOOST_TEST(text("${F#()[]{\\}^$.\\*\\?|\\\\}") == "x");
    BOOST_TEST(text("${Q#?\\?}") == "?y");
    BOOST_TEST(text("${S%%\\**\\*}") == "a");
    BOOST_TEST(text("${한글#?}") == "나다");
    BOOST_TEST(text("${한글%?}") == "가나");
    BOOST_TEST(text("${N#?*}") == "\nb");
    BOOST_TEST(text("${N##a?}") == "b");
    BOOST_TEST(text("${B#?}") == "\xfe");
}

BOOST_AUTO_TEST_CASE(replacement) {
    check({{"${P/a/x}", "/x/b/c.tar.gz"},
           {"${X/x/z}", "zxyy"},
           {"${X//x/z}", "zzyy"},
           {"${X//x/}", "yy"},
           {"${X/x*y/z}", "z"},
           {"${X//?/-}", "----"},
           {"${P//\\//:}", ":a:b:c.tar.gz"},
           {"${X/q/z}", "xxyy"},
           {"${NONE/a/b}", ""},
           {"${X/$NONE/w}", "wxxyy"},
           {"${X///}", "xxyy"},
           {"${X//*/z}", "z"},
           {"${P/.*/}", "/a/b/c"},
           {"${X//xy/[$DIR]}", "x[/srv]y"},
           {"${EMPTY//*/z}", "z"}});
    check_errors({{"${X/x}", "missing '/'"}, {"${X//}", "missing '/'"}, {"${X/x/y", "missing '}'"}});
}

// O-DF-06: what is malformed does not pass.
BOOST_AUTO_TEST_CASE(o_df_06_malformed) {
    check_errors({{"${DIR", "missing '}'"},
                  {"${", "missing '}'"},
                  {"${DIR:", "missing '}'"},
                  {"${DIR:-x", "missing '}'"},
                  {"${{DIR}", "bad substitution"},
                  {"${}", "bad substitution"},
                  {"${:-x}", "bad substitution"},
                  {"${:}", "bad substitution"},
                  {"${+x}", "bad substitution"},
                  {"${.}", "unsupported modifier (.)"},
                  {"${DIR:=x}", "unsupported modifier (:=)"},
                  {"${DIR=x}", "unsupported modifier (=)"},
                  {"${DIR^^}", "unsupported modifier (^)"},
                  {"${#DIR}", "unsupported modifier (D)"},
                  {"${DIR:1:2}", "unsupported modifier (:1)"},
                  {"'x", "single-quote"},
                  {"\"x", "double-quote"},
                  {"\"x\\\"", "double-quote"}});
    BOOST_TEST(thrown([] { word("a${}"); }) == "failed to process \"a${}\": syntax error: bad substitution");
}

BOOST_AUTO_TEST_CASE(names_met_are_reported) {
    const auto e = df::expand_word("$B ${A:-$DIR} '$Q' ${V:+$B}", look_in(env));
    BOOST_TEST((e.unmatched == std::vector<std::string>{"A", "B"}));
    BOOST_TEST((e.matched == std::vector<std::string>{"DIR", "V"}));
}

BOOST_AUTO_TEST_CASE(several_words) {
    const auto words = [](std::string_view text) { return df::expand_words(text, look_in({{"P", "80 443/udp"}, {"L", "  a b "}, {"E", ""}})).words; };
    using list = std::vector<std::string>;
    BOOST_TEST((words("$P") == list{"80", "443/udp"}));
    BOOST_TEST((words("\"$P\"") == list{"80 443/udp"}));
    BOOST_TEST((words("8$P") == list{"880", "443/udp"}));
    BOOST_TEST((words("x${L}y") == list{"x", "a", "b", "y"}));
    BOOST_TEST((words("x\"$L\"y") == list{"x  a b y"}));
    BOOST_TEST((words("80${N:-1}") == list{"801"}));
    BOOST_TEST((words(" a\\ b  'c d' ") == list{"a b", "c d"}));
    BOOST_TEST((words("$E") == list{}));
    BOOST_TEST((words("") == list{}));
}

BOOST_AUTO_TEST_CASE(for_display) {
    const auto shown = [](std::string_view text) { return df::expand_for_display(text, look_in(env)); };
    BOOST_TEST(shown("RUN echo \"$DIR\" '$DIR' $NONE ${NONE} ${NONE:-$DIR} ${NONE#x}") ==
               "RUN echo \"/srv\" '$DIR' $NONE ${NONE} ${NONE:-/srv} ${NONE#x}");
    BOOST_TEST(shown("RUN echo it's ${x^^}") == "RUN echo it's ${x^^}");
}

BOOST_AUTO_TEST_SUITE_END()

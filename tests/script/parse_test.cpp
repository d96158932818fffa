#include "support/support.hpp"

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

import cobuild.base;
import cobuild.script;

using namespace cobuild;
using words = std::vector<std::string>;

namespace {

words one_line(const std::string& text) { return script::parse(text, "s").script.at(0).words; }

}  // namespace

BOOST_AUTO_TEST_CASE(words_of_a_line) {
    const std::map<std::string, words> table{
        {"cobuild build .", {"cobuild", "build", "."}},
        {"  exec \t a  b  ", {"exec", "a", "b"}},
        {R"(stdout "two words")", {"stdout", "two words"}},
        {R"(stdout a"b c"d)", {"stdout", "ab cd"}},
        {R"(write f "")", {"write", "f", ""}},
        {R"(write f "a\"b\\c\nd\te")", {"write", "f", "a\"b\\c\nd\\te"}},
        {R"(stdout a\d+$)", {"stdout", R"(a\d+$)"}},
        {"exec a # a comment", {"exec", "a"}},
        {"exec a#b \"#c\"", {"exec", "a#b", "#c"}},
    };
    for (const auto& [text, expected] : table) BOOST_TEST(one_line(text) == expected, boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(lines_and_files) {
    const auto s = script::parse(
        "# head\n\ncobuild build .\n! exec false\n!  exec false\n-- a/Dockerfile --\nFROM x\n\n-- not a file\n-- b --\n-- c --\nlast", "name");
    BOOST_TEST(s.name == "name");
    BOOST_REQUIRE(s.script.size() == 3U);
    BOOST_TEST(s.script[0].number == 3U);
    BOOST_TEST(!s.script[0].negated);
    BOOST_TEST(s.script[1].number == 4U);
    BOOST_TEST(s.script[1].negated);
    BOOST_TEST(s.script[2].words == (words{"exec", "false"}), boost::test_tools::per_element());
    BOOST_REQUIRE(s.files.size() == 3U);
    BOOST_TEST(s.files[0].first == "a/Dockerfile");
    BOOST_TEST(s.files[0].second == "FROM x\n\n-- not a file\n");
    BOOST_TEST(s.files[1].second == "");
    BOOST_TEST(s.files[2].second == "last\n");
}

BOOST_AUTO_TEST_CASE(mistakes_tell_file_and_line) {
    const std::map<std::string, std::pair<unsigned, std::string>> table{
        {"exec a\nexec \"b\n", {2, "not closed"}},
        {"exec a\n\n!\n", {3, "after '!'"}},
        {"exec a\n-- /etc/x --\n", {2, "/etc/x"}},
        {"exec a\n-- a/../../x --\n", {2, "leads out"}},
        {"exec a\n--      --\n", {2, "name is missing"}},
        {"-- a --\ntext\n", {1, "no commands"}},
        {"", {1, "no commands"}},
    };
    for (const auto& [text, expected] : table) {
        BOOST_CHECK_EXCEPTION(script::parse(text, "file.txtar"), error, [&](const error& e) {
            BOOST_TEST_MESSAGE(e.what());
            return e.kind() == errc::invalid && e.where() && e.where()->file == "file.txtar" && e.where()->line == expected.first &&
                   std::string_view(e.what()).find(expected.second) != std::string_view::npos;
        });
    }
}

#include "support/support.hpp"

#include <string>

#include "buildctl.hpp"

using cobuild::buildctl::table;
using cobuild::buildctl::wants_json;

// The expected texts follow the rules of Go's text/tabwriter, as buildctl sets it up: minimal width 1, tabs of 8, padding 1.

BOOST_AUTO_TEST_CASE(columns_are_filled_up_with_tabs) {
    table t;
    t.line("ID\tPLATFORMS");
    t.line("0123456\tlinux/amd64");
    BOOST_TEST(t.text() == "ID\tPLATFORMS\n0123456\tlinux/amd64\n");
    table wider;
    wider.line("ID\tPLATFORMS");
    wider.line("01234567\tlinux/amd64");
    BOOST_TEST(wider.text() == "ID\t\tPLATFORMS\n01234567\tlinux/amd64\n");
}

BOOST_AUTO_TEST_CASE(a_column_ends_where_a_line_lacks_it) {
    table t;
    t.line("a long name:\tx");
    t.line("Labels:");
    t.line("\tkey:\tvalue");
    t.line("\ta longer key:\tvalue");
    BOOST_TEST(t.text() == "a long name:\tx\nLabels:\n\tkey:\t\tvalue\n\ta longer key:\tvalue\n");
}

BOOST_AUTO_TEST_CASE(or_with_spaces) {
    table t(false);
    t.line("BuildKit:\tv1");
    t.line("Dockerfile:\tv2");
    BOOST_TEST(t.text() == "BuildKit:   v1\nDockerfile: v2\n");
}

BOOST_AUTO_TEST_CASE(json_is_the_one_template) {
    BOOST_TEST(!wants_json(""));
    BOOST_TEST(wants_json("json"));
    BOOST_TEST(wants_json("{{json .}}"));
    BOOST_CHECK_THROW(wants_json("{{.ID}}"), std::exception);
}

#include "support/support.hpp"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

import cobuild.base;
import cobuild.fs;

using namespace cobuild;
using cobuild::fs::ignore_patterns;
using texts = std::vector<std::string>;

namespace {
bool ignored(texts patterns, std::string_view path) { return ignore_patterns(patterns).matches(path); }
bool fails(std::string_view pattern) {
    try {
        fs::wildcard_match(pattern, "a");
    } catch (const error& e) {
        return e.kind() == errc::invalid;
    }
    return false;
}
}  // namespace

BOOST_AUTO_TEST_SUITE(ignore)

// The cases of moby/patternmatcher's own table.
BOOST_AUTO_TEST_CASE(one_pattern) {
    const struct {
        std::string pattern;
        std::string path;
        bool matches;
    } cases[] = {
        {"**", "file", true},
        {"**/", "file", true},
        {"**", "dir/file", true},
        {"**/", "dir/file", true},
        {"**/**", "dir/file", true},
        {"dir/**", "dir/file", true},
        {"dir/**", "dir/dir2/file", true},
        {"**/dir", "dir", true},
        {"**/dir", "dir/file", true},
        {"**/dir2/*", "dir/dir2/file", true},
        {"**/dir2/**", "dir/dir2/dir2/file", true},
        {"**file", "file", true},
        {"**file", "dir/file", true},
        {"**/file", "dir/file", true},
        {"**file", "dir/dir/file", true},
        {"**/file", "dir/dir/file", true},
        {"**/file*", "dir/dir/file", true},
        {"**/file*", "dir/dir/file.txt", true},
        {"**/file*txt", "dir/dir/file.txt", true},
        {"**/file*.txt", "dir/dir/file.txt", true},
        {"**/file*.txt*", "dir/dir/file.txt", true},
        {"**/**/*.txt", "dir/dir/file.txt", true},
        {"**/**/*.txt2", "dir/dir/file.txt", false},
        {"**/*.txt", "file.txt", true},
        {"**/**/*.txt", "file.txt", true},
        {"a**/*.txt", "a/file.txt", true},
        {"a**/*.txt", "a/dir/file.txt", true},
        {"a**/*.txt", "a/dir/dir/file.txt", true},
        {"a/*.txt", "a/dir/file.txt", false},
        {"a/*.txt", "a/file.txt", true},
        {"a/*.txt**", "a/file.txt", true},
        {"a[b-d]e", "ae", false},
        {"a[b-d]e", "ace", true},
        {"a[b-d]e", "aae", false},
        {"a[^b-d]e", "aze", true},
        {".*", ".foo", true},
        {".*", "foo", false},
        {"abc.def", "abcdef", false},
        {"abc.def", "abc.def", true},
        {"abc.def", "abcZdef", false},
        {"abc?def", "abcZdef", true},
        {"abc?def", "abcdef", false},
        {"a\\\\", "a\\", true},
        {"**/foo/bar", "foo/bar", true},
        {"**/foo/bar", "dir/foo/bar", true},
        {"**/foo/bar", "dir/dir2/foo/bar", true},
        {"abc/**", "abc", false},
        {"abc/**", "abc/def", true},
        {"abc/**", "abc/def/ghi", true},
        {"**/.foo", ".foo", true},
        {"**/.foo", "bar.foo", false},
        {"a(b)c/def", "a(b)c/def", true},
        {"a(b)c/def", "a(b)c/xyz", false},
        {"a.|)$(}+{bc", "a.|)$(}+{bc", true},
        {"dist/*.whl", "dist/proxy.py-2.4.0rc3+g08-none.whl", true},
        {"dist/proxy.py-2.4.0rc3+g08-none.whl", "dist/proxy.py-2.4.0rc3+g08-none.whl", true},
        {"foo", "foo/bar/baz", true},
        {"foo", "foobar", false},
        {"*.txt", "a/b.txt", false},
        {"a/../b", "b", true},
        {"./b", "b", true},
        {"caf?", "caf\xc3\xa9", true},
        {"x*y", "x\ny", true},
        {"[[]0]", "[0]", true},
    };
    for (const auto& c : cases) BOOST_TEST(ignored({c.pattern}, c.path) == c.matches, c.pattern << " on " << c.path);
}

BOOST_AUTO_TEST_CASE(the_last_match_wins) {
    BOOST_TEST(!ignored({"**", "!util/docker/web"}, "util/docker/web/foo"));
    BOOST_TEST(ignored({"**", "!util/docker/web", "util/docker/web/foo"}, "util/docker/web/foo"));
    BOOST_TEST(ignored({"!a", "a"}, "a/b"));
    BOOST_TEST(!ignored({"a", "!a/b"}, "a/b/c"));
    BOOST_TEST(ignored({"a", "!a/b"}, "a/c"));
    BOOST_TEST(!ignored({"!a"}, "a"));
    BOOST_TEST(!ignored({}, "a"));
}

BOOST_AUTO_TEST_CASE(malformed_patterns_are_named) {
    for (const std::string p : {"[", "a[", "a\\", "[]a]", "[-]", "[a-]", "!"}) {
        BOOST_CHECK_EXCEPTION(ignore_patterns(texts{p}), error, [](const error& e) { return e.kind() == errc::invalid; });
    }
}

BOOST_AUTO_TEST_CASE(a_hostile_pattern_takes_linear_time) {
    std::string pattern, path;
    for (int i = 0; i < 40; ++i) pattern += "**/a*";
    for (int i = 0; i < 2000; ++i) path += "a/";
    BOOST_TEST(!ignored({pattern + "b"}, path + "c"));
}

// O-IG-05 and O-IG-08: an ignored directory is entered when, and only when, a later exception can match below it.
BOOST_AUTO_TEST_CASE(where_exceptions_can_match) {
    const ignore_patterns one{texts{"*", "!foo/requirements.txt"}};
    BOOST_TEST(one.may_reinclude_below("foo"));
    BOOST_TEST(!one.may_reinclude_below("bar"));
    BOOST_TEST(!one.may_reinclude_below("foo/sub"));
    const ignore_patterns deep{texts{"sub/deep/*", "!**/*.txt"}};
    BOOST_TEST(deep.may_reinclude_below("sub/deep/x"));
    const ignore_patterns star{texts{"a", "!a/*/keep"}};
    BOOST_TEST(star.may_reinclude_below("a"));
    BOOST_TEST(star.may_reinclude_below("a/b"));
    BOOST_TEST(!star.may_reinclude_below("a/b/c"));
    const ignore_patterns again{texts{"*", "!foo/x", "foo"}};
    BOOST_TEST(!again.may_reinclude_below("foo"));
    const ignore_patterns whole{texts{"*", "!foo"}};
    BOOST_TEST(whole.may_reinclude_below("foo/bar"));
    const ignore_patterns take{texts{"src/*.c", "docs/**"}};
    BOOST_TEST(take.may_match_below("src"));
    BOOST_TEST(!take.may_match_below("src/sub"));
    BOOST_TEST(take.may_match_below("docs"));
    BOOST_TEST(!take.may_match_below("test"));
}

BOOST_AUTO_TEST_CASE(the_file) {
    BOOST_TEST(fs::parse_ignore_file("\xef\xbb\xbf# comment\r\n  a  \n/b//c/\n! /d\n\ne#\n!x/./y\n../../q/../../z\n.\n!\n#e") ==
                   (texts{"a", "b/c", "!d", "e#", "!x/y", "../../../z", ".", "!"}),
               boost::test_tools::per_element());
    BOOST_TEST(fs::parse_ignore_file(" # not a comment") == (texts{"# not a comment"}), boost::test_tools::per_element());
    BOOST_TEST(fs::parse_ignore_file("").empty());
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(wildcard)

// The table of Go's path/filepath tests.
BOOST_AUTO_TEST_CASE(go_match) {
    const struct {
        std::string_view pattern;
        std::string_view name;
        bool matches;
    } cases[] = {
        {"abc", "abc", true},
        {"*", "abc", true},
        {"*c", "abc", true},
        {"a*", "a", true},
        {"a*", "abc", true},
        {"a*", "ab/c", false},
        {"a*/b", "abc/b", true},
        {"a*/b", "a/c/b", false},
        {"a*b*c*d*e*/f", "axbxcxdxe/f", true},
        {"a*b*c*d*e*/f", "axbxcxdxexxx/f", true},
        {"a*b*c*d*e*/f", "axbxcxdxe/xxx/f", false},
        {"a*b*c*d*e*/f", "axbxcxdxexxx/fff", false},
        {"a*b?c*x", "abxbbxdbxebxczzx", true},
        {"a*b?c*x", "abxbbxdbxebxczzy", false},
        {"ab[c]", "abc", true},
        {"ab[b-d]", "abc", true},
        {"ab[e-g]", "abc", false},
        {"ab[^c]", "abc", false},
        {"ab[^b-d]", "abc", false},
        {"ab[^e-g]", "abc", true},
        {"a\\*b", "a*b", true},
        {"a\\*b", "ab", false},
        {"a?b",
         "a\xe2\x98\xba"
         "b",
         true},
        {"a[^a]b",
         "a\xe2\x98\xba"
         "b",
         true},
        {"a???b",
         "a\xe2\x98\xba"
         "b",
         false},
        {"[a-\xce\xb6]*", "\xce\xb1", true},
        {"*[a-\xce\xb6]", "A", false},
        {"a?b", "a/b", false},
        {"a*b", "a/b", false},
        {"[\\]a]", "]", true},
        {"[\\-]", "-", true},
        {"[x\\-]", "x", true},
        {"[x\\-]", "-", true},
        {"[x\\-]", "z", false},
        {"[\\-x]", "a", false},
        {"*x", "xxx", true},
        {"", "", true},
        {"", "a", false},
    };
    for (const auto& c : cases) BOOST_TEST(fs::wildcard_match(c.pattern, c.name) == c.matches, c.pattern << " on " << c.name);
    for (const char* p : {"[]a]", "[-]", "[x-]", "[-x]", "\\", "[a-b-c]", "[", "[^", "[^bc", "a[", "a/b["}) BOOST_TEST(fails(p), p);
}

BOOST_AUTO_TEST_CASE(clean) {
    BOOST_TEST(fs::clean_path("") == ".");
    BOOST_TEST(fs::clean_path("a//b/./c/../d/") == "a/b/d");
    BOOST_TEST(fs::clean_path("/../a") == "/a");
    BOOST_TEST(fs::clean_path("../../a") == "../../a");
    BOOST_TEST(fs::clean_path("a/..") == ".");
}

BOOST_AUTO_TEST_SUITE_END()

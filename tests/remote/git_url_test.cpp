// The forms in which users name repositories, as BuildKit's documentation of ADD and of contexts lists them.
#include "support/support.hpp"

#include <optional>
#include <string>
#include <string_view>

import cobuild.base;
import cobuild.remote;

using namespace cobuild;
using remote::parse_git;

namespace {

std::string shown(std::string_view text) {
    const auto r = parse_git(text);
    if (!r) return "no";
    return cat(r->scheme, " ", r->host, " ", r->path, " ref=", r->ref, " sub=", r->subdir, " remote=", r->remote);
}

std::string refusal(std::string_view text) {
    try {
        (void)parse_git(text);
    } catch (const error& e) {
        return e.what();
    }
    return "";
}

}  // namespace

BOOST_AUTO_TEST_CASE(forms_that_are_git) {
    BOOST_TEST(shown("https://host.test/a/b.git") == "https host.test a/b.git ref= sub= remote=https://host.test/a/b.git");
    BOOST_TEST(shown("https://host.test:8443/b.git#v1:docs/x") == "https host.test:8443 b.git ref=v1 sub=docs/x remote=https://host.test:8443/b.git");
    BOOST_TEST(shown("http://h/b.git#:sub/") == "http h b.git ref= sub=sub remote=http://h/b.git");
    BOOST_TEST(shown("git@host.test:a/b.git#main") == "ssh host.test a/b.git ref=main sub= remote=git@host.test:a/b.git");
    BOOST_TEST(shown("git@host.test:a/b") == "ssh host.test a/b ref= sub= remote=git@host.test:a/b");
    BOOST_TEST(shown("ssh://git@host.test:22/a/b") == "ssh host.test:22 a/b ref= sub= remote=ssh://git@host.test:22/a/b");
    BOOST_TEST(shown("git://host.test/a/b#refs/pull/3/head") == "git host.test a/b ref=refs/pull/3/head sub= remote=git://host.test/a/b");
}

BOOST_AUTO_TEST_CASE(forms_that_are_not) {
    for (const auto* text :
         {"https://host.test/a/b", "github.com/a/b", "./x.git", "dir/x@y:z", "@x:y", "busybox:latest", "https://host.test/a.git/b"})
        BOOST_TEST(shown(text) == "no");
    BOOST_TEST(remote::parse_git_context("github.com/a/b#v1")->remote == "https://github.com/a/b.git");
    BOOST_TEST(remote::parse_git_context("github.com/a/b#v1")->ref == "v1");
}

BOOST_AUTO_TEST_CASE(query_form) {
    const auto r = *parse_git("https://h/b.git?branch=dev&subdir=a%2Fb&keep-git-dir=1&submodules=false&mtime=commit&checksum=abc123");
    BOOST_TEST(r.remote == "https://h/b.git");
    BOOST_TEST(r.ref == "refs/heads/dev");
    BOOST_TEST(r.subdir == "a/b");
    BOOST_TEST((r.keep_git_dir == true && r.submodules == false && r.commit_time));
    BOOST_TEST(r.checksum == "abc123");
    BOOST_TEST(parse_git("https://h/b.git?tag=v1")->ref == "refs/tags/v1");
    BOOST_TEST(parse_git("https://h/b.git?ref=v1")->ref == "v1");
    const std::string commit(40, 'a');
    BOOST_TEST(parse_git("https://h/b.git?commit=" + commit)->ref == commit);
    BOOST_TEST(refusal("https://h/b.git?brunch=x").find("unknown query key") != std::string::npos);
    BOOST_TEST(refusal("https://h/b.git?tag=a&branch=b").find("both") != std::string::npos);
    BOOST_TEST(refusal("https://h/b.git?ref=a#b").find("ref conflicts: \"b\" vs \"a\"") != std::string::npos);
    BOOST_TEST(refusal("https://h/b.git?subdir=a#:b").find("subdir conflicts") != std::string::npos);
    // Both may say the same.
    const auto both = remote::parse_git("https://h/b.git?tag=v1&subdir=s#refs/tags/v1:s").value();
    BOOST_TEST(both.ref == "refs/tags/v1");
    BOOST_TEST(both.subdir == "s");
}

BOOST_AUTO_TEST_CASE(nothing_becomes_an_option_or_leaves_the_repository) {
    for (const auto* text : {"https://h/b.git#-x", "https://h/b.git#a:../b", "ssh://-oProxyCommand=x/b", "git@-oX:b", "https://h/b.git#a..b",
                             "https:///b.git", "https://h/b.git#a b"})
        BOOST_TEST(!refusal(text).empty(), text);
}

BOOST_AUTO_TEST_CASE(names_and_identifiers) {
    BOOST_TEST(remote::file_name("https://h/a/b.tar.gz?x=1") == "b.tar.gz");
    BOOST_TEST(remote::file_name("https://h/a/b%20c/") == "b c");
    for (const auto* url : {"https://h", "https://h/", "https://h/a/..", "https://h/.", "https://h?x=/y"})
        BOOST_TEST(remote::file_name(url) == "__unnamed__", url);
    BOOST_TEST(remote::identifier(*parse_git("https://u:p@h/b.git#:d")) == "h/b.git#:d");
    BOOST_TEST(remote::identifier(*parse_git("git@h:a/b.git#v1")) == "h/a/b.git#v1");
    BOOST_TEST(remote::redacted("https://u:secret@h/b.git") == "https://u:xxxxx@h/b.git");
    BOOST_TEST(remote::redacted("https://secret@h/b.git") == "https://xxxxx@h/b.git");
    BOOST_TEST(remote::redacted("ssh://git@h/b.git") == "ssh://git@h/b.git");
}

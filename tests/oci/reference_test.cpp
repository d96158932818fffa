#include "support/support.hpp"

#include <optional>
#include <string>
#include <vector>

import cobuild.base;
import cobuild.oci;

using namespace cobuild;
using oci::reference;

namespace {
const std::string hex64(64, 'a');
std::string refusal(std::string_view text) {
    try {
        return cat("parsed as ", reference::parse(text).str());
    } catch (const error& e) {
        BOOST_TEST((e.kind() == errc::invalid));
        return "refused";
    }
}
}  // namespace

// The table of distribution's normalize_test.go: what is typed, its familiar name, its full name.
BOOST_AUTO_TEST_CASE(normalisation) {
    struct row {
        std::string_view text, familiar, full, domain, path;
    };
    for (const auto& r : std::vector<row>{
             {"fooo", "fooo", "docker.io/library/fooo", "docker.io", "library/fooo"},
             {"library/fooo", "fooo", "docker.io/library/fooo", "docker.io", "library/fooo"},
             {"nonlibrary/fooo", "nonlibrary/fooo", "docker.io/nonlibrary/fooo", "docker.io", "nonlibrary/fooo"},
             {"docker.io/fooo", "fooo", "docker.io/library/fooo", "docker.io", "library/fooo"},
             {"index.docker.io/fooo", "fooo", "docker.io/library/fooo", "docker.io", "library/fooo"},
             {"index.docker.io/library/fooo", "fooo", "docker.io/library/fooo", "docker.io", "library/fooo"},
             {"docker.io/library/foo/bar", "library/foo/bar", "docker.io/library/foo/bar", "docker.io", "library/foo/bar"},
             {"localhost/library/fooo", "localhost/library/fooo", "localhost/library/fooo", "localhost", "library/fooo"},
             {"127.0.0.1:8000/foo/bar", "127.0.0.1:8000/foo/bar", "127.0.0.1:8000/foo/bar", "127.0.0.1:8000", "foo/bar"},
             {"[2001:db8::1]:5000/repo", "[2001:db8::1]:5000/repo", "[2001:db8::1]:5000/repo", "[2001:db8::1]:5000", "repo"},
             {"Uppercase/foo", "Uppercase/foo", "Uppercase/foo", "Uppercase", "foo"},
             {"example.com/foo-bar__baz.qux", "example.com/foo-bar__baz.qux", "example.com/foo-bar__baz.qux", "example.com", "foo-bar__baz.qux"},
             {"a---b", "a---b", "docker.io/library/a---b", "docker.io", "library/a---b"},
         }) {
        BOOST_TEST_CONTEXT(r.text) {
            const auto ref = reference::parse(r.text);
            BOOST_TEST(ref.familiar() == r.familiar);
            BOOST_TEST(ref.name() == r.full);
            BOOST_TEST(ref.domain() == r.domain);
            BOOST_TEST(ref.path() == r.path);
            BOOST_TEST((reference::parse(ref.str()) == ref));
        }
    }
}

BOOST_AUTO_TEST_CASE(tags_and_digests) {
    const auto both = reference::parse(cat("alpine:3.20@sha256:", hex64));
    BOOST_TEST(both.tag() == "3.20");
    BOOST_TEST(both.digest().value().hex() == hex64);
    BOOST_TEST(both.familiar() == cat("alpine:3.20@sha256:", hex64));
    BOOST_TEST(both.name_only().str() == "docker.io/library/alpine");
    BOOST_TEST(reference::parse("alpine").tag().empty());
    BOOST_TEST(reference::parse("alpine").with_default_tag().str() == "docker.io/library/alpine:latest");
    BOOST_TEST(both.with_default_tag().tag() == "3.20");
    BOOST_TEST(reference::parse(cat("a@sha256:", hex64)).with_default_tag().tag().empty());
    BOOST_TEST(reference::parse("localhost:5000/a:_x.-").tag() == "_x.-");
    BOOST_TEST(reference::parse("foo_bar.com:8080").tag() == "8080");
    BOOST_TEST(reference::parse(cat("a:", std::string(128, 'T'))).tag().size() == 128U);
    BOOST_TEST(reference::parse(std::string(247, 'a')).path().size() == 255U);
}

// Shortened, these would name another registry.
BOOST_AUTO_TEST_CASE(a_path_that_looks_like_a_host_keeps_its_domain) {
    for (const std::string text : {"docker.io/quay.io/x:1", "docker.io/localhost/x"}) {
        const auto ref = reference::parse(text);
        BOOST_TEST(ref.domain() == "docker.io");
        BOOST_TEST(ref.familiar() == text);
    }
}

BOOST_AUTO_TEST_CASE(refused) {
    for (const auto text : {"",
                            "https://example.com/a/b",
                            "docker/Docker",
                            "-docker",
                            "-docker/docker",
                            "-docker.io/docker/docker",
                            "docker///docker",
                            "docker.io/docker/Docker",
                            "docker.io/docker///docker",
                            "a:",
                            "a@",
                            "a:-x",
                            "a@sha256:abc",
                            "/a",
                            "a/",
                            "a b",
                            "a..b",
                            "a___b",
                            "a._b",
                            "Uppercase",
                            "localhost:x/a",
                            "my_host.com/a",
                            "a@md5:0123456789abcdef0123456789abcdef",
                            ":tag",
                            "a:t:t",
                            "[::1/a",
                            "\xff",
                            "a\n"})
        BOOST_TEST(refusal(text) == "refused");
    BOOST_TEST(refusal(hex64) == "refused");
    BOOST_TEST(refusal(cat("a:", std::string(129, 'T'))) == "refused");
    BOOST_TEST(refusal(std::string(248, 'a')) == "refused");
    BOOST_TEST(refusal(cat("a@sha256:", std::string(64, 'A'))) == "refused");
}

#include "support/support.hpp"

#include <chrono>
#include <functional>
#include <optional>
#include <string>
#include <vector>

import cobuild.base;
import cobuild.async;
import cobuild.registry;

using namespace cobuild;

BOOST_AUTO_TEST_CASE(challenges) {
    const auto one =
        registry::parse_challenges(R"(Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a/b:pull,push")");
    BOOST_TEST_REQUIRE(one.size() == 1U);
    BOOST_TEST(one[0].scheme == "bearer");
    BOOST_TEST(one[0].get("realm") == "https://auth.example/token");
    BOOST_TEST(one[0].get("scope") == "repository:a/b:pull,push");
    BOOST_TEST(one[0].get("gone").empty());

    const auto two = registry::parse_challenges(R"(Basic realm="a \"b\", c", BEARER Realm = x , error=insufficient_scope)");
    BOOST_TEST_REQUIRE(two.size() == 2U);
    BOOST_TEST(two[0].get("realm") == "a \"b\", c");
    BOOST_TEST(two[1].scheme == "bearer");
    BOOST_TEST(two[1].get("realm") == "x");
    BOOST_TEST(two[1].get("error") == "insufficient_scope");

    BOOST_TEST(registry::parse_challenges("").empty());
    BOOST_TEST(registry::parse_challenges(",,==\"").size() <= 1U);
    BOOST_TEST(registry::parse_challenges("Basic").size() == 1U);
    BOOST_TEST(registry::parse_challenges("Bearer realm=\"open").at(0).get("realm") == "open");
}

BOOST_AUTO_TEST_CASE(hosts_without_configuration) {
    BOOST_TEST(registry::default_hosts("docker.io").at(0).host == "registry-1.docker.io");
    BOOST_TEST(!registry::default_hosts("docker.io").at(0).plain_http);
    BOOST_TEST(registry::default_hosts("localhost:5000").at(0).plain_http);
    BOOST_TEST(registry::default_hosts("127.0.0.1:5000").at(0).plain_http);
    BOOST_TEST(!registry::default_hosts("example.com:5000").at(0).plain_http);
}

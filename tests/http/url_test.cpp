#include "support/support.hpp"

#include <optional>
#include <string>

import cobuild.base;
import cobuild.async;
import cobuild.http;

using namespace cobuild;
using http::url;

BOOST_AUTO_TEST_CASE(urls) {
    const auto u = url::parse("https://Example.com/a/b?q=1#f");
    BOOST_TEST(u.server.host == "example.com");
    BOOST_TEST(u.server.port == 443);
    BOOST_TEST(u.target == "/a/b?q=1");
    BOOST_TEST(u.str() == "https://example.com/a/b?q=1");
    BOOST_TEST(url::parse("http://[::1]:5000").str() == "http://[::1]:5000/");
    BOOST_TEST(url::parse("http://h?x").target == "/?x");
    for (const auto text : {"", "ftp://h/", "http://", "http://h:0/", "http://h:99999/", "http://user@h/", "http://h/a b", "http://h/\r\nX: y", "//h",
                            "http://[::1", "http://h:/"})
        BOOST_TEST_CONTEXT(text) BOOST_CHECK_THROW(url::parse(text), error);
}

// RFC 3986 5.4
BOOST_AUTO_TEST_CASE(resolution) {
    const auto base = url::parse("http://a/b/c/d?q");
    BOOST_TEST(base.resolve("g").str() == "http://a/b/c/g");
    BOOST_TEST(base.resolve("./g").str() == "http://a/b/c/g");
    BOOST_TEST(base.resolve("g/").str() == "http://a/b/c/g/");
    BOOST_TEST(base.resolve("/g").str() == "http://a/g");
    BOOST_TEST(base.resolve("//g").str() == "http://g/");
    BOOST_TEST(base.resolve("?y").str() == "http://a/b/c/d?y");
    BOOST_TEST(base.resolve("g?y").str() == "http://a/b/c/g?y");
    BOOST_TEST(base.resolve("..").str() == "http://a/b/");
    BOOST_TEST(base.resolve("../../../g").str() == "http://a/g");
    BOOST_TEST(base.resolve("g?y/../x").str() == "http://a/b/c/g?y/../x");
    BOOST_TEST(base.resolve("https://x/y").str() == "https://x/y");
}

BOOST_AUTO_TEST_CASE(header_names_have_no_case) {
    http::headers h{{"Content-Type", "a"}, {"X", "1"}};
    h.add("x", "2");
    BOOST_TEST((h.get("content-type") == "a"));
    BOOST_TEST(h.all("X").size() == 2U);
    h.set("x", "3");
    BOOST_TEST(h.all("X").size() == 1U);
}

BOOST_AUTO_TEST_CASE(proxies) {
    http::proxy_settings p{.http = "http://p:1", .https = "http://q:2", .no_proxy = "direct.example, .inner.example,10.0.0.0/8,h:81"};
    const auto chosen = [&](std::string_view authority, bool tls = false) {
        return p.proxy_for(http::parse_endpoint(authority, tls)).value_or("none");
    };
    BOOST_TEST(chosen("example.com") == "http://p:1");
    BOOST_TEST(chosen("example.com", true) == "http://q:2");
    BOOST_TEST(chosen("direct.example") == "none");
    BOOST_TEST(chosen("sub.direct.example") == "none");
    BOOST_TEST(chosen("a.inner.example") == "none");
    BOOST_TEST(chosen("inner.example") == "http://p:1");
    BOOST_TEST(chosen("10.1.2.3") == "none");
    BOOST_TEST(chosen("11.1.2.3") == "http://p:1");
    BOOST_TEST(chosen("h:81") == "none");
    BOOST_TEST(chosen("h:82") == "http://p:1");
    BOOST_TEST(chosen("127.0.0.1:5000") == "none");
    BOOST_TEST(chosen("localhost") == "none");
}

BOOST_AUTO_TEST_CASE(loopback) {
    BOOST_TEST(http::is_loopback("127.5.0.1"));
    BOOST_TEST(http::is_loopback("::1"));
    BOOST_TEST(!http::is_loopback("127.evil.example.com"));
    BOOST_TEST(!http::is_loopback("localhost.example"));
}

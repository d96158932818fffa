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

namespace {
std::string of(std::string_view text) { return df::history(df::parse_instruction(df::parse_line(text)).body); }
}  // namespace

BOOST_AUTO_TEST_SUITE(history)

// strconv.Quote's documentation and the language specification of Go, "String literals".
BOOST_AUTO_TEST_CASE(go_quotes) {
    BOOST_TEST(df::go_quote("a\"b\\c\n\t\x01\x7f\a\v") == R"("a\"b\\c\n\t\x01\x7f\a\v")");
    BOOST_TEST(df::go_quote("é☃😀") == "\"é☃😀\"");
    BOOST_TEST(df::go_quote("\xff\xc3") == R"("\xff\xc3")");
    BOOST_TEST(df::go_quote("\xc2\xa0\xe2\x80\x8b\xef\xbb\xbf") == R"("\u00a0\u200b\ufeff")");
    BOOST_TEST(df::go_quote("\xf3\xa0\x80\x81") == R"("\U000e0001")");
    BOOST_TEST(df::go_quote_list({"a", "b c"}) == R"(["a" "b c"])");
    BOOST_TEST(df::go_quote_list({}) == "[]");
    BOOST_TEST(df::go_list({"a", "b c"}) == "[a b c]");
}

BOOST_AUTO_TEST_CASE(created_by) {
    BOOST_TEST(of("ENV a=b c=d") == "ENV a=b c=d");
    BOOST_TEST(of("LABEL a b c") == "LABEL a=b c");
    BOOST_TEST(of("ARG a b=c") == "ARG a b=c");
    BOOST_TEST(of("WORKDIR /x") == "WORKDIR /x");
    BOOST_TEST(of("USER x") == "USER x");
    BOOST_TEST(of("MAINTAINER x") == "MAINTAINER x");
    BOOST_TEST(of("STOPSIGNAL SIGINT") == "STOPSIGNAL SIGINT");
    BOOST_TEST(of("VOLUME /a /b") == "VOLUME [/a /b]");
    BOOST_TEST(of("SHELL [\"a\", \"-c\"]") == "SHELL [a -c]");
    BOOST_TEST(of("CMD [\"a\", \"b\"]") == "CMD [\"a\" \"b\"]");
    BOOST_TEST(of("ENTRYPOINT [\"a\"]") == "ENTRYPOINT [\"a\"]");
    BOOST_TEST(of("HEALTHCHECK --interval=90s --retries=2 CMD [\"a\", \"b\"]") == R"(HEALTHCHECK &{["CMD" "a" "b"] "1m30s" "0s" "0s" "0s" '\x02'})");
    BOOST_TEST(of("COPY --from=x --chown=1:2 --chmod=755 --link --parents a b /c") == "COPY --parents --chown=1:2 --chmod=755 a b /c # buildkit");
    BOOST_TEST(of("ADD --unpack <<f a /c\nf\n") == "ADD a <<f /c # buildkit");
    BOOST_TEST(of("ONBUILD RUN x").empty());
    BOOST_TEST(df::history(df::expose_instruction{{"80/tcp", "81/udp"}}) == "EXPOSE [80/tcp 81/udp]");
}

BOOST_AUTO_TEST_CASE(runs) {
    BOOST_TEST(df::run_history({"/bin/sh", "-c", "a b"}, {}) == "RUN /bin/sh -c a b # buildkit");
    BOOST_TEST(df::run_history({"x"}, {{"A", "1", false}, {"B", "2", false}, {"A", "3", false}}) == "RUN |2 A=3 B=2 x # buildkit");
}

BOOST_AUTO_TEST_SUITE_END()

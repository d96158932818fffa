#include "support/support.hpp"

#include <chrono>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "dockerfile_support.hpp"

import cobuild.base;
import cobuild.dockerfile;

// Input made to be slow. The limits are far above what is needed, even without optimisation and under a sanitizer, and far
// below what a quadratic or exponential path takes.

using namespace cobuild;
namespace df = cobuild::dockerfile;
using namespace dftest;

namespace {

constexpr std::size_t big = 64UL * 1024;
constexpr std::chrono::seconds limit{10};

std::string repeat(std::string_view piece, std::size_t total) {
    std::string out;
    while (out.size() + piece.size() <= total) out += piece;
    return out;
}

template<class F>
void quick(std::string_view what, F f) {
    const auto start = std::chrono::steady_clock::now();
    try {
        f();
    } catch (const error& e) {
        BOOST_TEST((e.kind() == errc::invalid));
    }
    const auto took = std::chrono::steady_clock::now() - start;
    BOOST_TEST_MESSAGE(what << ": " << std::chrono::duration_cast<std::chrono::milliseconds>(took).count() << " ms");
    BOOST_TEST((took < limit), what);
}

void whole(std::string_view what, const std::string& text) {
    quick(what, [&] {
        const df::file f = df::parse(text);
        df::dump(f);
        const auto r = df::parse_instructions(f);
        df::check_file(f, r.value, {.experimental_all = true});
        if (!r.errors.empty()) df::to_error(f, r.errors);
    });
}

}  // namespace

BOOST_AUTO_TEST_SUITE(hostile)

BOOST_AUTO_TEST_CASE(files) {
    const std::string from = "FROM a\n";
    whole("nested JSON", from + "CMD " + std::string(60000, '['));
    whole("nested JSON, closed", from + "CMD " + std::string(30000, '[') + std::string(30000, ']'));
    whole("chained ONBUILD", from + repeat("ONBUILD ", 60000) + "RUN x\n");
    whole("open here-documents under CMD", from + repeat("CMD <<X\n", big));
    whole("many here-documents", from + "RUN " + repeat("<<a ", 4000) + "\n" + repeat("a\n", big));
    whole("digits and markers", from + "RUN " + std::string(30000, '1') + repeat("<a", 30000) + "\n");
    whole("unknown instructions", from + repeat("FOO\n", big));
    whole("many flags", from + "COPY " + repeat("--exclude=a ", 60000) + "a b\n");
    whole("many duplicate stages", repeat("FROM a AS b\n", big));
    whole("empty continuations", from + "RUN a \\\n" + repeat("\n", big));
    whole("quotes", from + "ENV a=" + repeat("'\"", 60000) + "\n");
    whole("undeclared arguments", repeat("FROM a$B$C$D\n", big));
    whole("many arguments", "ARG " + repeat("a$a=$a ", 60000) + "\nFROM a\n");
    whole("ports", from + "EXPOSE " + repeat("0-65535 ", 60000) + "\n");
    whole("global arguments that double", "ARG a=xxxxxxxxxx\n" + repeat("ARG a=$a$a\n", 2000) + "FROM $a\n");
}

BOOST_AUTO_TEST_CASE(expansions) {
    const auto look = [](std::string value) { return look_in({{"V", std::move(value)}}); };
    quick("nesting", [] { df::expand_word(repeat("${A:-", big), {}); });
    quick("nesting, closed", [] { df::expand_word(repeat("${A:-", big / 2) + std::string(big / 10, '}'), {}); });
    quick("stars", [&] { df::expand_word("${V##" + repeat("*a", big / 2) + "b}", look(std::string(big / 2, 'a'))); });
    quick("question marks", [&] { df::expand_word("${V#*" + repeat("a?", big / 2) + "b}", look(std::string(big / 2, 'a'))); });
    quick("suffix", [&] { df::expand_word("${V%%b" + repeat("?a*", big / 2) + "}", look(std::string(big / 2, 'a'))); });
    quick("replacement", [&] { df::expand_word("${V//" + repeat("a*", 1000) + "b/x}", look(std::string(big / 2, 'a'))); });
    quick("replacement of all", [&] { df::expand_word("${V//a/xx}", look(std::string(big, 'a'))); });
    quick("a long literal", [&] { df::expand_word("${V//" + std::string(big / 2, 'a') + "b/x}", look(std::string(big / 2, 'a'))); });
    quick("a value taken often", [&] { df::expand_word(repeat("$V", big), look(std::string(big, 'a'))); });
    quick("words", [&] { df::expand_words(repeat("$V ", 3000), look(repeat("a ", 1000))); });
}

BOOST_AUTO_TEST_CASE(limits_are_errors) {
    BOOST_TEST(contains(thrown([] { df::expand_word(repeat("${A:-", 5000) + std::string(1000, '}'), {}); }), "nested deeper than 200"));
    BOOST_TEST(contains(thrown([] { df::expand_word(repeat("$V", big), look_in({{"V", std::string(big, 'a')}})); }), "longer than 16777216 bytes"));
}

// Ten thousand lines in a thousand stages; in a release build under 50 ms.
BOOST_AUTO_TEST_CASE(a_large_file) {
    std::string text = "ARG V=1\n";
    for (int i = 0; i < 1000; ++i) {
        text += cat("FROM ", i == 0 ? std::string("alpine:$V") : cat("s", i - 1), " AS s", i, "\nARG A=b\nENV C=$A D=\"e f\"\nWORKDIR /x/$C\n");
        text +=
            "COPY --from=s0 --chown=1:2 a b /c/\nRUN --mount=type=cache,target=/root/.cache \\\n    make && \\\n    make install\nEXPOSE 80/tcp\nCMD "
            "[\"x\", \"y\"]\n";
    }
    quick("large file", [&] {
        const df::file f = df::parse(text);
        const auto r = df::parse_instructions(f);
        BOOST_TEST(r.errors.empty());
        BOOST_TEST(r.value.stages.size() == 1000U);
        BOOST_TEST(df::check_file(f, r.value, {}).empty());
    });
}

BOOST_AUTO_TEST_SUITE_END()

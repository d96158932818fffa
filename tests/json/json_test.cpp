#include "support/support.hpp"

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

import cobuild.base;
import cobuild.json;

using namespace cobuild;

namespace {
std::string failure(std::string_view text, json::parse_limits limits = {}) {
    try {
        (void)json::parse(text, limits);
    } catch (const error& e) {
        BOOST_TEST((e.kind() == errc::corrupt));
        return e.what();
    }
    return "no failure";
}
std::string again(std::string_view text) { return json::serialize(json::parse(text)); }
}  // namespace

BOOST_AUTO_TEST_CASE(round_trip_keeps_order_and_values) {
    const std::string text = R"({"z":1,"a":[true,false,null,"x"],"m":{"k":-5,"big":18446744073709551615,"real":1.5}})";
    BOOST_TEST(again(text) == text);
    BOOST_TEST(json::serialize(json::parse(text), {.sorted = true}) ==
               R"({"a":[true,false,null,"x"],"m":{"big":18446744073709551615,"k":-5,"real":1.5},"z":1})");
}

BOOST_AUTO_TEST_CASE(go_forms) {
    // Each right side is what Go's encoding/json prints.
    BOOST_TEST(again(R"("<a>&b")") == "\"\\u003ca\\u003e\\u0026b\"");
    BOOST_TEST(json::serialize(json::value("<a>&b"), {.escape_html = false}) == "\"<a>&b\"");
    BOOST_TEST(again("\"\\u2028\\u0001\\n\\t/\"") == "\"\\u2028\\u0001\\n\\t/\"");
    BOOST_TEST(again("\"\xc3\xa9\\u00e9\"") == "\"\xc3\xa9\xc3\xa9\"");
    BOOST_TEST(again("[1e21,1e-7,100000.5,0.000001]") == "[1e+21,1e-7,100000.5,0.000001]");
    const auto once = again("333333333338333333333333333333333333333333333333333333333");  // longer than any precision
    BOOST_TEST(again(once) == once);
    BOOST_CHECK_THROW(json::parse("1e400"), error);
    BOOST_CHECK_THROW(json::parse("3e00000000016194444251893513556"), error);
    BOOST_TEST(json::serialize(json::parse(R"({"a":{},"b":[],"c":[1,2]})"), {.indent = true}) ==
               "{\n  \"a\": {},\n  \"b\": [],\n  \"c\": [\n    1,\n    2\n  ]\n}");
}

BOOST_AUTO_TEST_CASE(duplicate_members_count_once_with_the_last_value) {
    const auto v = json::parse(R"({"a":1,"b":2,"a":3})");
    BOOST_TEST(v.as_object().size() == 2U);
    BOOST_TEST(json::int_at(v.as_object(), "a") == 3);
}

BOOST_AUTO_TEST_CASE(failures_name_the_place) {
    BOOST_TEST(failure("{\"a\":1,}").starts_with("JSON at byte 7: "));
    BOOST_TEST(failure("[1,2") == "JSON at byte 4: the text ends too early");
    BOOST_TEST(failure("") == "JSON at byte 0: the text ends too early");
    BOOST_TEST(failure("{} x") == "JSON at byte 3: something stands after the value");
    BOOST_TEST(failure("\"\xff\"").starts_with("JSON at byte "));
    BOOST_TEST(failure(std::string(65, '[') + std::string(65, ']')).find("nested deeper than 64 levels") != std::string::npos);
    BOOST_TEST(failure(std::string(64, '[') + std::string(64, ']')) == "no failure");
    BOOST_TEST(failure("[1,2,3]", {.max_bytes = 4}) == "JSON of 7 bytes, above the limit of 4");
    BOOST_TEST(failure("12") == "no failure");
}

BOOST_AUTO_TEST_CASE(getters) {
    const auto v = json::parse(R"({"s":"x","n":null,"i":7,"l":["a","b"],"m":{"k":"v"},"neg":-1})");
    const auto& o = v.as_object();
    BOOST_TEST(json::string_at(o, "s") == "x");
    BOOST_TEST((json::optional_string(o, "n") == std::nullopt));
    BOOST_TEST((json::optional_int(o, "i") == 7));
    BOOST_TEST((json::strings_at(o, "l") == std::vector<std::string>{"a", "b"}));
    BOOST_TEST((json::string_map_at(o, "m") == std::map<std::string, std::string>{{"k", "v"}}));
    const auto said = [&](auto f) {
        try {
            f();
        } catch (const error& e) {
            return std::string(e.what());
        }
        return std::string();
    };
    BOOST_TEST(said([&] { json::string_at(o, "i"); }) == "\"i\": expected a string, found a number");
    BOOST_TEST(said([&] { json::string_at(o, "gone"); }) == "missing \"gone\"");
    BOOST_TEST(said([&] { json::uint_at(o, "neg"); }) == "\"neg\": expected a number of at least 0, found -1");
    BOOST_TEST(said([&] { json::strings_at(o, "s"); }) == "\"s\": expected an array, found a string");
}

BOOST_AUTO_TEST_CASE(building) {
    json::object o{{"b", 1}, {"a", std::vector<std::string>{"x"}}};
    o["c"] = std::map<std::string, std::string>{{"k", "v"}};
    o.set("b", "two");
    BOOST_TEST(json::serialize(o) == R"({"b":"two","a":["x"],"c":{"k":"v"}})");
    BOOST_TEST(o.erase("a"));
    BOOST_TEST(!o.contains("a"));
    BOOST_TEST((json::value(std::uint64_t{5}) == json::value(5)));
}

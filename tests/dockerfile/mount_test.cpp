#include "support/support.hpp"

#include <cstdint>
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
using namespace dftest;

namespace {

df::mount mount(std::string_view csv) {
    return df::parse_mount(csv, [](std::string_view word) { return df::expand_word(word, look_in({{"T", "/t"}, {"RO", "true"}})).text; });
}

std::string refusal(std::string_view csv) {
    return thrown([&] { mount(csv); });
}

std::string early_refusal(std::string_view csv) {
    return thrown([&] { df::parse_instruction(df::parse_line("RUN --mount=" + std::string(csv) + " x")); });
}

}  // namespace

BOOST_AUTO_TEST_SUITE(mounts)

BOOST_AUTO_TEST_CASE(types_and_their_defaults) {
    BOOST_TEST((mount("target=/x") == df::mount{.target = "/x"}));
    BOOST_TEST(mount("target=/x").readonly);
    BOOST_TEST(!mount("type=bind,target=/x,rw").readonly);
    BOOST_TEST(!mount("type=cache,target=/x").readonly);
    BOOST_TEST(mount("type=cache,target=/x,ro").readonly);
    BOOST_TEST(!mount("type=tmpfs,target=/x").readonly);
    BOOST_TEST(mount("type=secret,id=a").readonly);
    BOOST_TEST(mount("type=ssh").readonly);
    BOOST_TEST((mount("TYPE=Bind,From=a,SRC=/s,DST=/d") == df::mount{.from = "a", .source = "/s", .target = "/d"}));
}

BOOST_AUTO_TEST_CASE(every_key) {
    const df::mount cache = mount("type=cache,id=i,from=f,source=s,destination=d,sharing=LOCKED,mode=0750,uid=1,gid=2,readonly=false");
    const df::mount expected{.type = df::mount_type::cache,
                             .from = "f",
                             .source = "s",
                             .target = "d",
                             .readonly = false,
                             .id = "i",
                             .sharing = df::cache_sharing::locked,
                             .mode = 0750,
                             .uid = 1,
                             .gid = 2};
    BOOST_TEST((cache == expected));
    BOOST_TEST(mount("type=tmpfs,target=/x,size=64m").size_limit == std::uint64_t{64} << 20);
    BOOST_TEST(mount("type=secret,id=a,required").required);
    BOOST_TEST(!mount("type=secret,id=a,required=false").required);
    BOOST_TEST((mount("type=secret,id=a,env=TOKEN").env == "TOKEN"));
    BOOST_TEST((mount("type=secret,id=a,env=").env == ""));
    BOOST_TEST(mount("type=ssh,id=k,mode=600,required=true").required);
    BOOST_TEST(mount("type=bind,\"source=a,b\",target=/x").source == "a,b");
}

BOOST_AUTO_TEST_CASE(values_expand_but_from_does_not) {
    BOOST_TEST(mount("target=$T/x,ro=$RO").target == "/t/x");
    BOOST_TEST(contains(refusal("from=$F,target=/x"), "'from' doesn't support variable expansion, define alias stage instead"));
    BOOST_TEST(contains(early_refusal("from=$F,target=/x"), "'from' doesn't support variable expansion"));
}

// O-SE-02 and O-SE-03 begin here: what a secret mount may say.
BOOST_AUTO_TEST_CASE(o_se_02_secrets) {
    BOOST_TEST(!mount("type=secret,id=a").required);
    BOOST_TEST(refusal("type=secret") == "invalid secret mount. one of source, target required");
    BOOST_TEST(refusal("type=secret,id=a,source=b") == "both source and id can't be set");
    BOOST_TEST(refusal("type=secret,id=a,from=b") == "secret mount should not have a from");
    BOOST_TEST(refusal("type=secret,id=a,sharing=shared") == "secret mount should not define sharing");
    BOOST_TEST(refusal("required,type=secret,id=a") == "unexpected key 'required' for mount type 'bind'");
}

BOOST_AUTO_TEST_CASE(refusals) {
    BOOST_TEST(refusal("type=cahce,target=/x") == "unsupported mount type \"cahce\" (did you mean cache?)");
    BOOST_TEST(refusal("tpe=cache") == "unexpected key 'tpe' in 'tpe=cache' (did you mean type?)");
    BOOST_TEST(refusal("type=cache,target=/x,sharing=lock") == "unsupported sharing value \"lock\" (did you mean locked?)");
    BOOST_TEST(refusal("target") == "invalid field 'target' must be a key=value pair");
    BOOST_TEST(refusal("ro=maybe") == "invalid value for ro: maybe");
    BOOST_TEST(refusal("type=cache,size=1m") == "unexpected key 'size' for mount type 'cache'");
    BOOST_TEST(refusal("type=tmpfs,size=much") == "invalid value for size: much");
    BOOST_TEST(refusal("type=bind,mode=0700") == "mode not allowed for \"bind\" type mounts");
    BOOST_TEST(refusal("type=tmpfs,uid=1") == "uid not allowed for \"tmpfs\" type mounts");
    BOOST_TEST(refusal("type=cache,mode=9") == "invalid value 9 for mode");
    BOOST_TEST(refusal("type=cache,uid=-1") == "invalid value -1 for uid");
    BOOST_TEST(refusal("type=bind,sharing=shared") == "invalid cache sharing set for bind mount");
    BOOST_TEST(refusal("type=ssh,source=a") == "ssh mount should not define source");
    BOOST_TEST(refusal("type=cache,target=/") == "invalid mount target \"/\"");
    BOOST_TEST(contains(refusal("\"type=bind"), "a quote is not closed"));
    BOOST_TEST(contains(refusal("a\"b"), "a quote stands inside of a field"));
}

BOOST_AUTO_TEST_CASE(known_at_once_where_no_variable_stands) {
    BOOST_TEST(contains(early_refusal("type=cahce,target=/x"), "did you mean cache?"));
    BOOST_TEST(contains(early_refusal("tpe=$X"), "did you mean type?"));
    BOOST_TEST(early_refusal("type=$X,target=/x").empty());
    const auto run = std::get<df::run_instruction>(df::parse_instruction(df::parse_line("RUN --mount=from=a,target=$X --mount=type=ssh x")).body);
    BOOST_TEST((run.mounts == std::vector<df::mount_text>{{"from=a,target=$X", "a"}, {"type=ssh", ""}}));
}

BOOST_AUTO_TEST_SUITE_END()

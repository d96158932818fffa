#include "support/support.hpp"

#include <chrono>
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

using list = std::vector<std::string>;

df::instruction typed(std::string_view text) { return df::parse_instruction(df::parse_line(text)); }

template<class T>
T body(std::string_view text) {
    return std::get<T>(typed(text).body);
}

std::string refusal(std::string_view text) {
    return thrown([&] { typed(text); });
}

}  // namespace

BOOST_AUTO_TEST_SUITE(instructions)

BOOST_AUTO_TEST_CASE(from) {
    const auto f = body<df::from_instruction>("from --platform=$BUILDPLATFORM alpine:3 As Build-1.x_y");
    BOOST_TEST(f.base == "alpine:3");
    BOOST_TEST(f.platform == "$BUILDPLATFORM");
    BOOST_TEST(f.name == "build-1.x_y");
    BOOST_TEST(f.name_written == "Build-1.x_y");
    BOOST_TEST(f.as == "As");
    for (const std::string_view text : {"FROM", "FROM a b", "FROM a is b", "FROM a AS b c"})
        BOOST_TEST(refusal(text) == "FROM requires either one or three arguments", text);
    for (const std::string_view text : {"FROM a AS 1b", "FROM a AS b/c", "FROM a AS -b", "FROM a AS ünder"})
        BOOST_TEST(contains(refusal(text), "invalid name for build stage"), text);
    BOOST_TEST(refusal("FROM --plattform=x a") == "unknown flag: --plattform (did you mean platform?)");
}

BOOST_AUTO_TEST_CASE(run) {
    const auto shell = body<df::run_instruction>("RUN --network=none --security=insecure echo $A  \"b\"");
    BOOST_TEST((shell.command.args == list{"echo $A  \"b\""}));
    BOOST_TEST(shell.command.shell_form);
    BOOST_TEST((shell.network == df::network_mode::none));
    BOOST_TEST((shell.security == df::security_mode::insecure));
    const auto json = body<df::run_instruction>("RUN [\"a\", \"b\"]");
    BOOST_TEST((json.command == df::command_line{{"a", "b"}, false}));
    BOOST_TEST((json.network == df::network_mode::default_));
    BOOST_TEST(refusal("RUN --network=hosts a") == "invalid network mode \"hosts\" (did you mean host?)");
    BOOST_TEST(contains(refusal("RUN --security=x a"), "security \"x\" is not valid"));
    BOOST_TEST(refusal("RUN --mounts=x a") == "unknown flag: --mounts (did you mean mount?)");
    BOOST_TEST(refusal("RUN --network=host --network=host a") == "duplicate flag specified: --network");
    BOOST_TEST(refusal("RUN --network a") == "missing a value on flag: --network");
    BOOST_TEST(refusal("RUN") == "RUN requires at least one argument");
}

BOOST_AUTO_TEST_CASE(devices) {
    const auto devices = [](std::string_view text) { return body<df::run_instruction>("RUN " + std::string(text) + " x").devices; };
    BOOST_TEST((devices("--device=vendor.com/gpu=0,required") == std::vector<df::device>{{"vendor.com/gpu=0", true}}));
    BOOST_TEST((devices("--device=name=a,required=false --device=b") == std::vector<df::device>{{"a", false}, {"b", false}}));
    BOOST_TEST(contains(refusal("RUN --device=a,name=b x"), "device name already set to a"));
    BOOST_TEST(contains(refusal("RUN --device=a,requird=1 x"), "did you mean required?"));
    BOOST_TEST(contains(refusal("RUN --device=a,required=maybe x"), "invalid value for required: maybe"));
}

BOOST_AUTO_TEST_CASE(copy_and_its_flags) {
    const auto c = body<df::copy_instruction>("COPY --from=build --chown=1:2 --chmod=u=rwX --link --parents --exclude=*.o --exclude=*.d a b /c/");
    BOOST_TEST(c.from == "build");
    BOOST_TEST(c.chown == "1:2");
    BOOST_TEST(c.chmod == "u=rwX");
    BOOST_TEST(c.link);
    BOOST_TEST(c.parents);
    BOOST_TEST((c.exclude == list{"*.o", "*.d"}));
    BOOST_TEST((c.sources == list{"a", "b"}));
    BOOST_TEST(c.destination == "/c/");
    BOOST_TEST(!body<df::copy_instruction>("COPY --link=FALSE a b").link);
    BOOST_TEST(contains(refusal("COPY a"), "requires at least two arguments, but only one was provided"));
    BOOST_TEST(refusal("COPY --link=maybe a b") == "expecting boolean value for flag --link, not: maybe");
    BOOST_TEST(refusal("COPY --link= a b") == "missing a value on flag: --link");
    BOOST_TEST(refusal("COPY --form=x a b") == "unknown flag: --form (did you mean from?)");
    BOOST_TEST(refusal("COPY --checksum=x a b").starts_with("unknown flag: --checksum"));
    BOOST_TEST(contains(refusal("COPY --from=$IMAGE a b"), "variable expansion is not supported for --from"));
}

BOOST_AUTO_TEST_CASE(add_and_its_flags) {
    const auto a =
        body<df::add_instruction>("ADD --checksum=sha256:0 --keep-git-dir --unpack=false --link --chown=u --chmod=1 --exclude=x https://h/f /d");
    BOOST_TEST(a.checksum == "sha256:0");
    BOOST_TEST((a.keep_git_dir == true));
    BOOST_TEST((a.unpack == false));
    BOOST_TEST((a.sources == list{"https://h/f"}));
    BOOST_TEST(!body<df::add_instruction>("ADD a b").unpack.has_value());
    BOOST_TEST(refusal("ADD --from=x a b").starts_with("unknown flag: --from"));
}

BOOST_AUTO_TEST_CASE(key_values) {
    const auto env = body<df::env_instruction>("ENV a=\"b c\" d=$a");
    BOOST_TEST((env.pairs == std::vector<df::key_value>{{"a", "\"b c\"", false}, {"d", "$a", false}}));
    BOOST_TEST(body<df::env_instruction>("ENV a b c").pairs[0].legacy);
    BOOST_TEST((body<df::label_instruction>("LABEL a=b").pairs[0] == df::key_value{"a", "b", false}));
    BOOST_TEST(refusal("ENV =x") == "ENV names can not be blank");
    BOOST_TEST(refusal("LABEL") == "LABEL requires at least one argument");
    const auto arg = body<df::arg_instruction>("# b is the thing\nARG a b=c d=");
    BOOST_TEST((arg.args == std::vector<df::arg_declaration>{{"a", std::nullopt, ""}, {"b", "c", "is the thing"}, {"d", "", ""}}));
    BOOST_TEST(refusal("ARG =x") == "ARG names can not be blank");
    BOOST_TEST(refusal("ENV --x a=b").starts_with("unknown flag: --x"));
}

BOOST_AUTO_TEST_CASE(simple_ones) {
    BOOST_TEST(body<df::workdir_instruction>("WORKDIR  /a b ").path == "/a b");
    BOOST_TEST(body<df::user_instruction>("USER a:b").user == "a:b");
    BOOST_TEST(body<df::maintainer_instruction>("MAINTAINER a b").name == "a b");
    BOOST_TEST((body<df::volume_instruction>("VOLUME /a /b").paths == list{"/a", "/b"}));
    BOOST_TEST((body<df::volume_instruction>("VOLUME [\" /a \"]").paths == list{"/a"}));
    BOOST_TEST(contains(refusal("VOLUME [\"\"]"), "can not be an empty string"));
    BOOST_TEST((body<df::cmd_instruction>("CMD").command == df::command_line{{}, true}));
    BOOST_TEST((body<df::cmd_instruction>("CMD []").command == df::command_line{{}, false}));
    BOOST_TEST((body<df::entrypoint_instruction>("ENTRYPOINT a b").command == df::command_line{{"a b"}, true}));
    BOOST_TEST((body<df::shell_instruction>("SHELL [\"a\", \"-c\"]").shell == list{"a", "-c"}));
    BOOST_TEST(contains(refusal("SHELL a -c"), "SHELL requires the arguments to be in JSON form"));
    BOOST_TEST(refusal("SHELL []") == "SHELL requires at least one argument");
    BOOST_TEST(refusal("WORKDIR") == "WORKDIR requires exactly one argument");
}

BOOST_AUTO_TEST_CASE(expose) {
    BOOST_TEST((body<df::expose_instruction>("EXPOSE 90 80/udp $P").ports == list{"$P", "80/udp", "90"}));
    const auto ports = [](std::string_view word) { return df::parse_port(word).ports; };
    BOOST_TEST((ports("80") == list{"80/tcp"}));
    BOOST_TEST((ports("80-82/UDP") == list{"80/udp", "81/udp", "82/udp"}));
    BOOST_TEST(df::parse_port("80/UDP").odd_protocol_case);
    BOOST_TEST((ports("127.0.0.1:8080:80") == list{"80/tcp"}));
    BOOST_TEST((ports("[::1]:8080:80/sctp") == list{"80/sctp"}));
    BOOST_TEST((ports("8080-8090:80") == list{"80/tcp"}));
    BOOST_TEST(df::parse_port("8080:80").host_part);
    BOOST_TEST(!df::parse_port("80").host_part);
    for (const std::string_view word :
         {"", "x", "80/icmp", "65536", "-1", "82-80", "80-", "/tcp", "1.2.3:1:80", "1.2.3.4.5:1:80", "80-82:90-93", "99999999999", "[x]:1:2"})
        BOOST_TEST(!thrown([&] { df::parse_port(word); }).empty(), word);
    BOOST_TEST(contains(refusal("EXPOSE 80/icmp"), "invalid proto: icmp"));
    BOOST_TEST(refusal("EXPOSE") == "EXPOSE requires at least one argument");
}

BOOST_AUTO_TEST_CASE(stopsignal) {
    for (const std::string_view good : {"SIGTERM", "term", "9", "SIGRTMIN+3", "rtmax-1", "SIGRTMIN"}) BOOST_TEST(df::is_signal(good), good);
    for (const std::string_view bad : {"", "0", "SIGFOO", "TERM ", "RTMIN+16", "RTMAX-15", "-9", "65", "SIG"}) BOOST_TEST(!df::is_signal(bad), bad);
    BOOST_TEST(body<df::stopsignal_instruction>("STOPSIGNAL $SIG").signal == "$SIG");
    BOOST_TEST(body<df::stopsignal_instruction>("STOPSIGNAL \"SIGINT\"").signal == "\"SIGINT\"");
    BOOST_TEST(refusal("STOPSIGNAL SIGFOO") == "invalid signal: SIGFOO");
}

BOOST_AUTO_TEST_CASE(healthcheck) {
    using namespace std::chrono_literals;
    const auto h =
        body<df::healthcheck_instruction>("HEALTHCHECK --interval=5s --timeout=1m30s --start-period=1ms --start-interval=0s --retries=3 cmd curl  x");
    BOOST_TEST((h.test == list{"CMD-SHELL", "curl  x"}));
    BOOST_TEST((h.interval == 5s));
    BOOST_TEST((h.timeout == 90s));
    BOOST_TEST((h.start_period == 1ms));
    BOOST_TEST((h.start_interval == 0s));
    BOOST_TEST(h.retries == 3);
    BOOST_TEST((body<df::healthcheck_instruction>("HEALTHCHECK CMD [\"a\", \"b\"]").test == list{"CMD", "a", "b"}));
    BOOST_TEST((body<df::healthcheck_instruction>("HEALTHCHECK NONE").test == list{"NONE"}));
    BOOST_TEST(refusal("HEALTHCHECK NONE x") == "HEALTHCHECK NONE takes no arguments");
    BOOST_TEST(refusal("HEALTHCHECK CMD") == "Missing command after HEALTHCHECK CMD");
    BOOST_TEST(refusal("HEALTHCHECK CMD []") == "Missing command after HEALTHCHECK CMD");
    BOOST_TEST(refusal("HEALTHCHECK FOO x") == "Unknown type \"FOO\" in HEALTHCHECK (try CMD)");
    BOOST_TEST(refusal("HEALTHCHECK --interval=1us CMD x") == "Interval \"interval\" cannot be less than 1ms");
    BOOST_TEST(refusal("HEALTHCHECK --timeout=-1s CMD x") == "Interval \"timeout\" cannot be less than 1ms");
    BOOST_TEST(refusal("HEALTHCHECK --retries=-1 CMD x") == "--retries cannot be negative (-1)");
    BOOST_TEST(contains(refusal("HEALTHCHECK --retries=x CMD x"), "--retries is not a number"));
    BOOST_TEST(!refusal("HEALTHCHECK --interval=5 CMD x").empty());
}

BOOST_AUTO_TEST_CASE(onbuild) {
    const auto o = body<df::onbuild_instruction>("onbuild   COPY --from=x a b");
    BOOST_TEST(o.source == "COPY --from=x a b");
    BOOST_TEST(std::get<df::copy_instruction>(o.trigger->body).from == "x");
    BOOST_TEST(contains(refusal("ONBUILD ONBUILD RUN a"), "Chaining ONBUILD"));
    BOOST_TEST(refusal("ONBUILD FROM a") == "FROM isn't allowed as an ONBUILD trigger");
    BOOST_TEST(refusal("ONBUILD maintainer a") == "MAINTAINER isn't allowed as an ONBUILD trigger");
    BOOST_TEST(refusal("ONBUILD") == "ONBUILD requires at least one argument");
    BOOST_TEST(contains(refusal("ONBUILD COPY --form=x a b"), "did you mean from?"));
    BOOST_TEST(contains(refusal("ONBUILD FOO"), "unknown instruction: FOO"));
}

BOOST_AUTO_TEST_CASE(fields_that_expand) {
    const df::expander expand = [](std::string_view word) { return "<" + std::string(word) + ">"; };
    const auto expanded = [&](std::string_view text) {
        df::instruction i = typed(text);
        df::expand_fields(i.body, expand);
        return i.body;
    };
    const auto copy = std::get<df::copy_instruction>(expanded("COPY --from=f --chown=o --exclude=e a b"));
    BOOST_TEST(copy.from == "f");
    BOOST_TEST(copy.chown == "<o>");
    BOOST_TEST((copy.exclude == list{"e"}));
    BOOST_TEST((copy.sources == list{"<a>"}));
    BOOST_TEST(copy.destination == "<b>");
    BOOST_TEST(std::get<df::add_instruction>(expanded("ADD --checksum=c a b")).checksum == "<c>");
    BOOST_TEST((std::get<df::env_instruction>(expanded("ENV a=b")).pairs[0] == df::key_value{"<a>", "<b>", false}));
    BOOST_TEST(std::get<df::workdir_instruction>(expanded("WORKDIR /a")).path == "</a>");
    BOOST_TEST((std::get<df::run_instruction>(expanded("RUN a")).command.args == list{"a"}));
    BOOST_TEST((std::get<df::expose_instruction>(expanded("EXPOSE 1")).ports == list{"1"}));
    BOOST_TEST((std::get<df::cmd_instruction>(expanded("CMD $a")).command.args == list{"$a"}));
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(stages)

// O-DF-09 rests on this: what stands before FROM is global, what stands behind it belongs to the stage.
BOOST_AUTO_TEST_CASE(o_df_09_global_and_stage_scope) {
    const df::file f = df::parse("ARG V=1\n# base is where it starts\nFROM a:$V AS Base\nARG V\nRUN x\nFROM base\nFROM c as base\n");
    const auto r = df::parse_instructions(f);
    BOOST_TEST(r.errors.empty());
    BOOST_TEST(r.value.global_args.size() == 1U);
    BOOST_REQUIRE(r.value.stages.size() == 3U);
    const auto& s = r.value.stages[0];
    BOOST_TEST(s.index == 0U);
    BOOST_TEST(s.name == "base");
    BOOST_TEST(s.base == "a:$V");
    BOOST_TEST(s.description == "is where it starts");
    BOOST_TEST(s.instructions.size() == 2U);
    BOOST_TEST(std::holds_alternative<df::arg_instruction>(s.instructions[0].body));
    BOOST_TEST(s.instructions[1].source == "RUN x");
    BOOST_TEST((s.from.lines == df::line_range{3, 3}));
    BOOST_TEST(r.value.find("BASE")->index == 2U);
    BOOST_TEST(r.value.find("none") == nullptr);
}

// O-DF-10: the error of a blank base names the argument and where it must stand.
BOOST_AUTO_TEST_CASE(o_df_10_an_argument_declared_too_late) {
    const auto p = df::parse_instructions(df::parse("ARG G\nFROM a AS one\nARG LATE=x\nFROM b\nFROM ${LATE}$G$NONE\n")).value;
    const std::string message = df::blank_base_message(p, p.stages[2]);
    BOOST_TEST(contains(message, "base name (${LATE}$G$NONE) should not be blank"));
    BOOST_TEST(contains(message, "ARG LATE in line 3 stands inside of a stage: for FROM it must stand above the first FROM"));
    BOOST_TEST(contains(message, "give ARG G a default"));
    BOOST_TEST(contains(message, "ARG NONE is not declared above the first FROM"));
}

BOOST_AUTO_TEST_SUITE_END()

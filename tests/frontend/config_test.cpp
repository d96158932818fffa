#include <algorithm>
#include <cstdint>

#include "frontend/fixture.hpp"

using namespace frontend_test;

BOOST_AUTO_TEST_SUITE(image_config)

BOOST_AUTO_TEST_CASE(every_instruction_leaves_its_mark) {
    const auto o = build(
        "FROM busybox\n"
        "ENV A=1 B=\"two words\"\n"
        "ENV A=2\n"
        "LABEL l=v\n"
        "EXPOSE 80 443/UDP 8000-8001\n"
        "VOLUME /a /b\n"
        "USER 1:2\n"
        "STOPSIGNAL SIGTERM\n"
        "SHELL [\"/bin/ash\", \"-c\"]\n"
        "HEALTHCHECK --interval=5s --retries=3 CMD curl x\n"
        "MAINTAINER me\n"
        "ENTRYPOINT [\"/e\"]\n"
        "CMD echo hi\n"
        "ONBUILD RUN x\n");
    const auto& c = o.image.config;
    BOOST_TEST(c.env == (strings{"PATH=/bin", "LANG=C", "A=2", "B=two words"}), boost::test_tools::per_element());
    BOOST_TEST(c.labels.at("l") == "v");
    BOOST_TEST(c.exposed_ports == (std::set<std::string>{"80/tcp", "443/udp", "8000/tcp", "8001/tcp"}), boost::test_tools::per_element());
    BOOST_TEST(c.volumes == (std::set<std::string>{"/a", "/b"}), boost::test_tools::per_element());
    BOOST_TEST(c.user == "1:2");
    BOOST_TEST(c.stop_signal == "SIGTERM");
    BOOST_TEST(c.shell == (strings{"/bin/ash", "-c"}), boost::test_tools::per_element());
    BOOST_TEST((c.healthcheck->interval == std::chrono::seconds(5)));
    BOOST_TEST(c.healthcheck->retries == 3);
    BOOST_TEST(c.healthcheck->test == (strings{"CMD-SHELL", "curl x"}), boost::test_tools::per_element());
    BOOST_TEST(o.image.author == "me");
    BOOST_TEST(c.entrypoint == strings{"/e"}, boost::test_tools::per_element());
    BOOST_TEST(c.cmd == (strings{"/bin/ash", "-c", "echo hi"}), boost::test_tools::per_element());
    BOOST_TEST(c.args_escaped);
    BOOST_TEST(c.on_build == strings{"RUN x"}, boost::test_tools::per_element());
    BOOST_TEST(o.image.created.empty());
    BOOST_TEST(o.image.unknown.empty());
    BOOST_TEST(o.history() == (strings{"ADD rootfs", "ENV A=1 B=two words (empty)", "ENV A=2 (empty)", "LABEL l=v (empty)",
                                       "EXPOSE [443/udp 80/tcp 8000/tcp 8001/tcp] (empty)", "VOLUME [/a /b] (empty)", "USER 1:2 (empty)",
                                       "STOPSIGNAL SIGTERM (empty)", "SHELL [/bin/ash -c] (empty)",
                                       R"(HEALTHCHECK &{["CMD-SHELL" "curl x"] "5s" "0s" "0s" "0s" '\x03'} (empty))", "MAINTAINER me (empty)",
                                       "ENTRYPOINT [\"/e\"] (empty)", "CMD [\"/bin/ash\" \"-c\" \"echo hi\"] (empty)"}),
               boost::test_tools::per_element());
    BOOST_TEST(o.image.history.at(1).comment == "buildkit.dockerfile.v0");
    BOOST_TEST(o.image.history.at(1).created.empty());
    BOOST_TEST(o.graph.vertices.size() == 1U);
}

BOOST_AUTO_TEST_CASE(history_of_steps_shows_declared_args) {
    const auto o = build("FROM busybox\nARG A=1 B C\nRUN one\nENV A=9\nRUN [\"two\"]\nCOPY --chown=1 a b /d/\nWORKDIR /w\nWORKDIR /\n");
    BOOST_TEST(o.history() == (strings{"ADD rootfs", "ARG A=1 B C (empty)", "RUN |3 A=1 B= C= /bin/sh -c one # buildkit", "ENV A=9 (empty)",
                                       "RUN |3 A=9 B= C= two # buildkit", "COPY --chown=1 a b /d/ # buildkit", "WORKDIR /w", "WORKDIR / (empty)"}),
               boost::test_tools::per_element());
    BOOST_TEST(build("FROM busybox\nRUN x\n").history().back() == "RUN /bin/sh -c x # buildkit");
}

BOOST_AUTO_TEST_CASE(an_entrypoint_drops_the_inherited_command) {
    BOOST_TEST(build("FROM busybox\nENTRYPOINT [\"x\"]\n").image.config.cmd.empty());
    BOOST_TEST(build("FROM busybox\nCMD [\"y\"]\nENTRYPOINT [\"x\"]\n").image.config.cmd == strings{"y"}, boost::test_tools::per_element());
    BOOST_TEST(build("FROM busybox\nRUN x\n").image.config.cmd == strings{"sh"}, boost::test_tools::per_element());
    BOOST_TEST(build("FROM busybox AS a\nCMD [\"y\"]\nFROM a\nENTRYPOINT [\"x\"]\n").image.config.cmd.empty());
}

BOOST_AUTO_TEST_CASE(later_settings_win_inside_run_and_only_env_stays) {
    const auto o = build("FROM busybox\nARG V=arg\nRUN 1\nENV V=env\nRUN 2\nARG V=again\nRUN 3\n");
    BOOST_TEST(o.exec("[2/4] RUN 1").meta.env.back() == "V=arg");
    BOOST_TEST(o.exec("[3/4] RUN 2").meta.env.back() == "V=env");
    BOOST_TEST(o.exec("[4/4] RUN 3").meta.env.back() == "V=again");
    BOOST_TEST(o.image.config.env.back() == "V=env");
    // Passed on to stages built FROM this one.
    BOOST_TEST(build("FROM busybox AS a\nARG V=x\nFROM a\nRUN z\n").exec("[stage-1 1/1] RUN z").meta.env.at(0) == "V=x");
}

BOOST_AUTO_TEST_CASE(automatic_args_must_be_declared_and_can_be_overridden) {
    const auto o = build("FROM busybox AS s\nARG TARGETPLATFORM BUILDOS TARGETSTAGE TARGETVARIANT\nRUN x\n",
                         [](auto& r, auto&) { r.build_args["BUILDOS"] = "mine"; });
    const auto& env = o.exec("[2/2] RUN x").meta.env;
    for (const auto* entry : {"TARGETPLATFORM=linux/amd64", "BUILDOS=mine", "TARGETSTAGE=s", "TARGETVARIANT="}) {
        BOOST_TEST(std::count(env.begin(), env.end(), entry) == 1, entry);
    }
    BOOST_TEST(build("FROM busybox\nRUN x\n").exec("[2/2] RUN x").meta.env.size() == 2U);
}

BOOST_AUTO_TEST_CASE(labels_of_the_request_come_last) {
    const auto o = build("FROM busybox\nLABEL a=1 b=2\n", [](auto& r, auto&) { r.labels = {{"a", "x"}, {"c", "y"}}; });
    BOOST_TEST(o.image.config.labels.at("a") == "x");
    BOOST_TEST(o.image.config.labels.at("b") == "2");
    BOOST_TEST(o.image.config.labels.at("c") == "y");
}

BOOST_AUTO_TEST_CASE(the_image_takes_the_platform_asked_for) {
    const auto arm = build("FROM scratch\nCOPY a /\n",
                           [](auto& r, auto&) { r.target_platform = oci::platform{.os = "linux", .architecture = "arm", .variant = "v6"}; });
    BOOST_TEST(oci::format(arm.image.platform) == "linux/arm/v6");
    BOOST_TEST(oci::format(build("FROM busybox\n").image.platform) == "linux/amd64");
}

BOOST_AUTO_TEST_CASE(source_date_epoch) {
    const auto o = build("FROM busybox\nWORKDIR /w\n", [](auto& r, auto&) { r.build_args["SOURCE_DATE_EPOCH"] = "1700000000"; });
    BOOST_TEST(*o.r.epoch == 1700000000);
    BOOST_TEST(o.image.history.back().created == "2023-11-14T22:13:20Z");
    BOOST_TEST(o.image.history.front().created == "2024-01-01T00:00:00Z");
    BOOST_TEST(std::get<llb::mkdir_action>(o.file("[2/2] WORKDIR /w").actions.at(0).what).timestamp == 1700000000000000000);
    BOOST_TEST(!build("FROM busybox\n", [](auto& r, auto&) { r.build_args["SOURCE_DATE_EPOCH"] = ""; }).r.epoch.has_value());
    BOOST_TEST(*build("ARG SOURCE_DATE_EPOCH=0\nFROM busybox\n").r.epoch == 0);
    BOOST_TEST(says(failure("FROM busybox\n", [](auto& r, auto&) { r.build_args["SOURCE_DATE_EPOCH"] = "soon"; }), "SOURCE_DATE_EPOCH: soon"));
}

BOOST_AUTO_TEST_CASE(workdir_is_a_directory_of_the_user) {
    const auto o = build("FROM busybox\nUSER app:7\nWORKDIR /a\nWORKDIR b/../c\nRUN pwd\n");
    const auto& v = o.step("[3/4] WORKDIR b/../c");
    const auto& a = std::get<llb::file_op>(v.what.what).actions.at(0);
    const auto& mkdir = std::get<llb::mkdir_action>(a.what);
    BOOST_TEST(mkdir.path == "/a/c");
    BOOST_TEST(mkdir.mode == 0755);
    BOOST_TEST(mkdir.make_parents);
    BOOST_TEST(mkdir.timestamp == -1);
    BOOST_TEST(a.secondary_input == llb::scratch);
    BOOST_TEST(a.output == 0);
    BOOST_TEST(std::get<llb::named_user>(*mkdir.owner->user).name == "app");
    BOOST_TEST(std::get<llb::named_user>(*mkdir.owner->user).input == 0);
    BOOST_TEST(std::get<std::uint32_t>(*mkdir.owner->group) == 7U);
    BOOST_TEST(!v.what.platform.has_value());
    BOOST_TEST(o.exec("[4/4] RUN pwd").meta.cwd == "/a/c");
    BOOST_TEST(o.exec("[4/4] RUN pwd").meta.user == "app:7");
    BOOST_TEST(o.image.config.working_dir == "/a/c");
}

// The link itself is the directory; what it points to is made by the file op.
BOOST_AUTO_TEST_CASE(o_sl_05_a_workdir_that_is_a_link_is_made_and_used_by_its_name) {
    const auto o = build("FROM busybox\nRUN ln -s /real /link\nWORKDIR /link\nCOPY f ./name\n");
    BOOST_TEST(std::get<llb::mkdir_action>(o.file("[3/4] WORKDIR /link").actions.at(0).what).path == "/link");
    BOOST_TEST(o.copy("[4/4] COPY f ./name").dest == "/link/name");
}

BOOST_AUTO_TEST_CASE(warnings_have_rule_place_and_sense) {
    const auto o = build("FROM busybox\nENV A=$NOPE LANGUAGE=$LANGE\nWORKDIR rel\nCMD x\n");
    BOOST_TEST(o.warnings() == "UndefinedVar:2 UndefinedVar:2 WorkdirRelativePath:3 JSONArgsRecommended:4 ");
    bool hint = false;
    for (const auto& w : o.r.warnings) hint = hint || w.message.find("LANG") != std::string::npos;
    BOOST_TEST(hint);
    BOOST_TEST(build("FROM busybox\nARG NOPE\nENV A=$NOPE\n").warnings() == "");
    BOOST_TEST(build("# check=skip=UndefinedVar\nFROM busybox\nENV A=$NOPE\n").warnings() == "");
    // Findings of stages that are not built are left out.
    BOOST_TEST(build("FROM busybox AS a\nCMD x\nFROM busybox\nRUN y\n").warnings() == "");
    BOOST_TEST(build("FROM shelled\nCMD x\n", [](auto&, auto& g) {
                   g.images["docker.io/library/shelled:latest"] =
                       R"({"architecture":"amd64","os":"linux","config":{"Shell":["/bin/bash","-c"]},"rootfs":{"type":"layers","diff_ids":[]}})";
               }).warnings() == "");
    const auto e = failure("# check=error=true\nFROM busybox\nENV A=$NOPE\n");
    BOOST_TEST(says(e, "lint violation found for rules: UndefinedVar"));
    BOOST_TEST(e.where()->line == 3U);
}

BOOST_AUTO_TEST_CASE(errors_have_their_line) {
    BOOST_TEST(failure("FROM busybox\n\nENV A=${x:?needed}\n").where()->line == 3U);
    BOOST_TEST(failure("FROM busybox\nARG S=NOSIG\nSTOPSIGNAL $S\n").where()->line == 3U);
    BOOST_TEST(failure("FROM busybox\nRUNN x\n").where()->line == 2U);
    BOOST_TEST(failure("ARG A=${b\nFROM busybox\n").where()->line == 1U);
    BOOST_TEST(says(failure(""), "cannot be empty"));
    BOOST_TEST(says(failure("ARG A=1\n"), "no stages"));
}

BOOST_AUTO_TEST_SUITE_END()

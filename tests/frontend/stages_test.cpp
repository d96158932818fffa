#include "frontend/fixture.hpp"

using namespace frontend_test;

BOOST_AUTO_TEST_SUITE(stages)

BOOST_AUTO_TEST_CASE(names_follow_the_stage_and_count_its_steps) {
    const auto o = build("FROM busybox AS base\nRUN a\nFROM base AS Final\nWORKDIR /w\nCOPY x y\n");
    BOOST_TEST(o.steps() == (strings{"[internal] load build context",
                                     "[base 1/2] FROM docker.io/library/busybox:latest@" + digest::of("docker.io/library/busybox:latest").str(),
                                     "[base 2/2] RUN a", "[final 1/2] WORKDIR /w", "[final 2/2] COPY x y"}),
               boost::test_tools::per_element());
    BOOST_TEST(o.names == strings{"[internal] load metadata for docker.io/library/busybox:latest"}, boost::test_tools::per_element());
    BOOST_TEST(o.asked == strings{"docker.io/library/busybox:latest linux/amd64"}, boost::test_tools::per_element());
    BOOST_TEST(o.r.stages == (strings{"base", "final"}), boost::test_tools::per_element());
    BOOST_TEST(o.r.bases.at(0).reference == "docker.io/library/busybox:latest");
}

BOOST_AUTO_TEST_CASE(a_single_stage_has_no_name_and_ten_steps_are_padded) {
    std::string text = "FROM busybox\n";
    for (int i = 0; i < 9; ++i) text += cat("RUN ", i, "\n");
    const auto o = build(text);
    BOOST_TEST(o.steps().at(1) == "[ 2/10] RUN 0");
    BOOST_TEST(o.steps().at(9) == "[10/10] RUN 8");
}

BOOST_AUTO_TEST_CASE(the_image_source_is_pinned_and_has_its_platform) {
    const auto o = build("FROM busybox\nRUN x\n", [](auto& r, auto&) { r.resolve = gateway::resolve_mode::pull; });
    const auto& from = o.graph.vertices.at(0).what;
    const auto& source = std::get<llb::source_op>(from.what);
    BOOST_TEST(source.identifier == "docker-image://docker.io/library/busybox:latest@" + digest::of("docker.io/library/busybox:latest").str());
    BOOST_TEST(source.attrs.at("image.resolvemode") == "pull");
    BOOST_TEST(from.platform->architecture == "amd64");
}

BOOST_AUTO_TEST_CASE(only_what_the_target_needs_is_built_and_asked_for) {
    const auto o = build("FROM missing AS no\nRUN n\nFROM busybox AS a\nRUN x\nFROM scratch\nCOPY --from=a /x /\nRUN z\n",
                         [](auto& r, auto&) { r.target = "A"; });
    BOOST_TEST(o.asked.size() == 1U);
    BOOST_TEST(o.graph.vertices.size() == 2U);
    const auto e = failure("FROM busybox AS builder\nRUN x\n", [](auto& r, auto&) { r.target = "bulider"; });
    BOOST_TEST(says(e, "target stage \"bulider\" could not be found (did you mean builder?)"));
    BOOST_TEST((e.kind() == errc::not_found));
}

BOOST_AUTO_TEST_CASE(bases_of_all_stages_are_asked_once_each) {
    const auto o = build(
        "FROM busybox AS a\nRUN 1\nFROM alpine AS b\nRUN 2\nFROM busybox\nCOPY --from=a / /\nCOPY --from=b / /\nCOPY --from=alpine:latest / /x\n",
        [](auto&, auto& g) { g.images["docker.io/library/alpine:latest"] = busybox; });
    BOOST_TEST(std::set<std::string>(o.asked.begin(), o.asked.end()).size() == o.asked.size());
    BOOST_TEST(o.asked.size() == 2U);
}

BOOST_AUTO_TEST_CASE(a_missing_base_names_its_line_and_a_near_stage) {
    const auto e = failure("FROM busybox AS builder\nFROM biulder\nRUN x\n");
    BOOST_TEST(e.where()->line == 2U);
    BOOST_TEST(e.where()->file == "Dockerfile");
    BOOST_TEST(says(e, "did you mean builder?"));
    const auto bad = failure("FROM Upper\n");
    BOOST_TEST(says(bad, "failed to parse stage name"));
    BOOST_TEST(bad.where()->line == 1U);
}

BOOST_AUTO_TEST_CASE(scratch_has_no_vertex) {
    const auto o = build("FROM scratch\nCOPY a /\n");
    BOOST_TEST(o.graph.vertices.size() == 2U);
    const auto& f = o.file("[1/1] COPY a /");
    BOOST_TEST(f.actions.at(0).input == llb::scratch);
    BOOST_TEST(f.actions.at(0).secondary_input == 0);
    BOOST_TEST(o.image.config.working_dir == "/");
    BOOST_TEST(o.image.config.env == strings{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, boost::test_tools::per_element());
    BOOST_TEST(o.r.base_config.empty());
    BOOST_TEST(build("FROM scratch\nLABEL a=b\n").r.graph.ops.empty());
}

BOOST_AUTO_TEST_CASE(a_base_without_layers_is_scratch) {
    const auto o = build("FROM empty\nCOPY a /\n", [](auto&, auto& g) {
        g.images["docker.io/library/empty:latest"] =
            R"({"architecture":"amd64","os":"linux","config":{"Env":["A=b"]},"rootfs":{"type":"layers","diff_ids":[]},"history":[{"created_by":"x","empty_layer":true}]})";
    });
    BOOST_TEST(o.graph.vertices.size() == 2U);
    BOOST_TEST(o.image.config.env.at(0) == "A=b");
    BOOST_TEST(o.image.config.env.at(1) == "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
}

BOOST_AUTO_TEST_CASE(copy_from_by_number_and_forward_references) {
    const auto o = build("FROM busybox\nRUN a\nFROM scratch\nCOPY --from=0 /x /y\n");
    const auto& v = o.step("[stage-1 1/1] COPY --from=0 /x /y");
    BOOST_TEST((v.what.inputs.at(0).vertex == o.step("[stage-0 2/2] RUN a").id));
    BOOST_TEST(says(failure("FROM scratch\nCOPY --from=7 a b\n"), "invalid stage index 7"));
    const auto forward = failure("FROM busybox AS a\nCOPY --from=b x y\nFROM busybox AS b\nRUN x\n", [](auto& r, auto&) { r.target = "a"; });
    BOOST_TEST(says(forward, "needs to be defined before current stage"));
    BOOST_TEST(forward.where()->line == 2U);
    BOOST_TEST(says(failure("FROM busybox AS a\nCOPY --from=b x y\nFROM a AS b\nRUN x\n"), "circular dependency detected on stage: a"));
    BOOST_TEST(says(failure("FROM busybox AS a\nCOPY --from=a x y\n"), "circular dependency detected"));
    BOOST_TEST(says(failure("FROM busybox AS a\nARG V=a\nCOPY --from=$V x y\n"), "variable expansion is not supported for --from"));
}

BOOST_AUTO_TEST_CASE(platforms_of_stages) {
    const auto arm = [](auto& r, auto& g) {
        r.target_platform = oci::platform{.os = "linux", .architecture = "arm64"};
        g.images["docker.io/library/busybox:latest"] = busybox;
    };
    const auto o =
        build("FROM --platform=$BUILDPLATFORM busybox AS cross\nARG TARGETARCH\nRUN make $TARGETARCH\nFROM scratch\nCOPY --from=cross /out /\n", arm);
    BOOST_TEST(o.asked.at(0) == "docker.io/library/busybox:latest linux/amd64");
    BOOST_TEST(o.exec("[cross 2/2] RUN make arm64").meta.env.back() == "TARGETARCH=arm64");
    BOOST_TEST(oci::format(o.r.platform) == "linux/arm64");
    BOOST_TEST(o.image.platform.architecture == "arm64");
    const auto foreign = failure("FROM busybox\nRUN x\n", arm);
    BOOST_TEST((foreign.kind() == errc::unsupported));
    BOOST_TEST(says(foreign, "RUN for platform linux/arm64 on a linux/amd64 machine needs emulation"));
    BOOST_TEST(foreign.where()->line == 2U);
    // Without RUN nothing needs to run; the base is not what was asked for.
    BOOST_TEST(build("FROM busybox\nCOPY a /\n", arm).warnings() == "InvalidBaseImagePlatform:1 ");
    BOOST_TEST(says(failure("FROM --platform=$NOPE busybox\n"), "empty platform value from expression $NOPE"));
    BOOST_TEST(says(failure("FROM --platform=a/b/c/d busybox\n"), "failed to parse platform a/b/c/d: "));
}

BOOST_AUTO_TEST_CASE(multi_platform_names_carry_the_platform) {
    const auto o = build("FROM --platform=$BUILDPLATFORM busybox AS c\nARG TARGETPLATFORM\nRUN x\n", [](auto& r, auto&) {
        r.multi_platform = true;
        r.target_platform = oci::platform{.os = "linux", .architecture = "arm64"};
    });
    (void)o.step("[linux/amd64->arm64 2/2] RUN x");
    BOOST_TEST(o.names.at(0) == "[linux/amd64 internal] load metadata for docker.io/library/busybox:latest");
}

BOOST_AUTO_TEST_CASE(no_cache_by_stage) {
    const auto text = "FROM busybox AS a\nRUN 1\nFROM a AS b\nRUN 2\n";
    const auto one = build(text, [](auto& r, auto&) { r.no_cache_stages = {"B"}; });
    BOOST_TEST(!one.step("[a 2/2] RUN 1").meta.ignore_cache);
    BOOST_TEST(one.step("[b 1/1] RUN 2").meta.ignore_cache);
    BOOST_TEST(one.r.ignore_cache);
    BOOST_TEST(build(text, [](auto& r, auto&) { r.no_cache = true; }).step("[a 2/2] RUN 1").meta.ignore_cache);
}

BOOST_AUTO_TEST_CASE(o_df_09_a_global_arg_counts_in_a_stage_only_once_declared_there) {
    const auto text = "ARG V=one\nFROM busybox\nRUN before\nARG V\nRUN after\n";
    const auto o = build(text);
    const auto has = [](const outcome& out, std::string_view step, const std::string& entry) {
        const auto& env = out.exec(step).meta.env;
        return std::find(env.begin(), env.end(), entry) != env.end();
    };
    BOOST_TEST(!has(o, "[2/3] RUN before", "V=one"));
    BOOST_TEST(has(o, "[3/3] RUN after", "V=one"));
    const auto given = build(text, [](auto& r, auto&) { r.build_args["V"] = "two"; });
    BOOST_TEST(!has(given, "[2/3] RUN before", "V=two"));
    BOOST_TEST(has(given, "[3/3] RUN after", "V=two"));
    BOOST_TEST(build("ARG T=latest\nFROM busybox:$T\nRUN x\n").asked.size() == 1U);
}

BOOST_AUTO_TEST_CASE(o_df_10_a_blank_base_name_tells_the_argument) {
    const auto e = failure("FROM busybox AS one\nRUN x\nARG BASE=alpine\nFROM ${BASE} AS two\nRUN y\n", [](auto& r, auto&) { r.target = "one"; });
    BOOST_TEST(e.where()->line == 4U);
    BOOST_TEST(says(e,
                    "base name (${BASE}) should not be blank: BASE is not set here; an ARG for FROM must stand above the first FROM, and BASE stands "
                    "below it in line 3"));
}

BOOST_AUTO_TEST_CASE(o_df_11_triggers_of_a_base_copy_from_stages_and_images) {
    const auto o = build("FROM busybox AS tools\nRUN t\nFROM trigger\nRUN own\n", [](auto&, auto& g) {
        g.images["docker.io/library/alpine:latest"] = busybox;
        g.images["docker.io/library/trigger:latest"] =
            R"({"architecture":"amd64","os":"linux","config":{"OnBuild":["COPY --from=alpine /a /b","COPY --from=tools /c /d"]},"rootfs":{"type":"layers","diff_ids":["sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"]}})";
    });
    const auto& first = o.step("[stage-1 2/4] ONBUILD COPY --from=alpine /a /b");
    const auto& second = o.step("[stage-1 3/4] ONBUILD COPY --from=tools /c /d");
    BOOST_TEST((second.what.inputs.at(0).vertex == first.id));
    BOOST_TEST((second.what.inputs.at(1).vertex == o.step("[tools 2/2] RUN t").id));
    (void)o.step("[stage-1 4/4] RUN own");
    BOOST_TEST(o.image.config.on_build.empty());
}

BOOST_AUTO_TEST_CASE(o_df_12_triggers_of_a_stage_run_in_its_child_only) {
    const auto o = build("FROM busybox AS one\nONBUILD RUN hook\nRUN a\nFROM one AS two\nRUN b\nFROM two\nRUN c\n");
    BOOST_TEST(o.steps().size() == 5U);
    (void)o.step("[two 1/2] ONBUILD RUN hook");
    (void)o.step("[stage-2 1/1] RUN c");
    BOOST_TEST(o.image.config.on_build.empty());
    const auto stored = build("FROM busybox\nONBUILD RUN hook\nONBUILD COPY . .\n");
    BOOST_TEST(stored.image.config.on_build == (strings{"RUN hook", "COPY . ."}), boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(triggers_are_expanded_where_they_run) {
    const auto o = build("FROM busybox AS one\nENV D=/early\nONBUILD COPY x ${D}/\nFROM one\nENV E=1\n");
    BOOST_TEST(o.copy("[stage-1 1/1] ONBUILD COPY x /early/").dest == "/early/");
    BOOST_TEST(build("FROM busybox\nENV D=/early\nONBUILD COPY x ${D}/\n").image.config.on_build == strings{"COPY x ${D}/"},
               boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(syntax_directives) {
    for (const auto* image :
         {"docker/dockerfile:1", "docker/dockerfile:1.7-labs", "docker.io/docker/dockerfile:1@sha256:aa", "docker/dockerfile-upstream:master"}) {
        BOOST_TEST(build(cat("# syntax=", image, "\nFROM busybox\nRUN x\n")).graph.vertices.size() == 2U);
    }
    const auto e = failure("# syntax=example.com/other:1\nFROM busybox\n");
    BOOST_TEST((e.kind() == errc::unsupported));
    BOOST_TEST(says(e, "example.com/other:1"));
    BOOST_TEST(e.where()->line == 1U);
    BOOST_TEST(says(failure("FROM busybox\n", [](auto& r, auto&) { r.build_args["BUILDKIT_SYNTAX"] = "other"; }), "BUILDKIT_SYNTAX"));
}

BOOST_AUTO_TEST_CASE(named_contexts) {
    const auto o = build("FROM base\nRUN x\n", [](auto& r, auto&) { r.named_contexts["base"] = "docker-image://busybox"; });
    BOOST_TEST(o.asked.at(0) == "docker.io/library/busybox:latest linux/amd64");
    // A directory has its own ignore file, which hides what COPY would find.
    const auto dir = build("FROM busybox\nCOPY --from=src a b\n", [](auto& r, auto& g) {
        r.named_contexts["src"] = "local:src";
        g.files["src/.dockerignore"] = "*.o\n";
    });
    const auto& local = std::get<llb::source_op>(dir.step("[context src] load from client").what.what);
    BOOST_TEST(local.identifier == "local://src");
    BOOST_TEST(local.attrs.at("local.excludepatterns") == R"(["*.o"])");

    const auto git =
        build("FROM busybox\nRUN --mount=from=src,target=/s x\n", [](auto& r, auto&) { r.named_contexts["src"] = "https://h/r.git#v1:d"; });
    const auto& repository = std::get<llb::source_op>(git.step("[context src] load git source https://h/r.git#v1:d").what.what);
    BOOST_TEST(repository.identifier == "git://h/r.git#v1:d");
    BOOST_TEST(repository.attrs.at("git.fullurl") == "https://h/r.git");

    const auto e = failure("FROM busybox\nCOPY --from=src a b\n", [](auto& r, auto&) { r.named_contexts["src"] = "ftp:src"; });
    BOOST_TEST(says(e, "the named context src=ftp:src"));
    BOOST_TEST(e.where()->line == 2U);
}

// What stands in for a stage is all of it: its base is not asked for, its lines are not run.
BOOST_AUTO_TEST_CASE(a_named_context_replaces_a_stage) {
    const auto o = build("FROM nowhere AS made\nRUN never\nFROM scratch\nCOPY --from=made a b\n",
                         [](auto& r, auto&) { r.named_contexts["made"] = "local:made"; });
    BOOST_TEST(o.asked.empty());
    for (const auto& name : o.steps()) BOOST_TEST(name.find("RUN") == std::string::npos);
    const auto image =
        build("FROM nowhere AS made\nRUN never\nFROM made\nRUN last\n", [](auto& r, auto&) { r.named_contexts["made"] = "docker-image://busybox"; });
    BOOST_TEST(image.asked == strings{"docker.io/library/busybox:latest linux/amd64"}, boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(a_context_from_git_is_the_context) {
    const auto o = build("FROM scratch\nCOPY a b\n", [](auto& r, auto&) { BOOST_TEST(frontend::set_remote_context(r, "git@h:x/y.git#v2", true)); });
    BOOST_TEST(o.context().identifier == "git://h/x/y.git#v2");
    BOOST_TEST(o.context().attrs.at("git.keepgitdir") == "true");
    BOOST_TEST(o.context().attrs.at("git.mountsshsock") == "default");
    frontend::request path;
    BOOST_TEST(!frontend::set_remote_context(path, "./some/dir", false));
}

BOOST_AUTO_TEST_CASE(the_target_list) {
    const auto list = frontend::list_targets("# build compiles it\nFROM busybox AS build\nFROM --platform=linux/arm64 scratch\n", "Dockerfile");
    BOOST_REQUIRE(list.size() == 2U);
    BOOST_TEST(list[0].name == "build");
    BOOST_TEST(list[0].description == "compiles it");
    BOOST_TEST(!list[0].is_default);
    BOOST_TEST(list[1].is_default);
    BOOST_TEST(list[1].platform == "linux/arm64");
}

BOOST_AUTO_TEST_SUITE_END()

#include <algorithm>
#include <cstdint>

#include "frontend/fixture.hpp"

using namespace frontend_test;

BOOST_AUTO_TEST_SUITE(run)

BOOST_AUTO_TEST_CASE(shell_and_exec_form) {
    const auto o = build("FROM busybox\nRUN echo $HOME\nRUN [\"/x\", \"$HOME\"]\nSHELL [\"/b\", \"-ec\"]\nRUN y\n");
    const auto& first = o.exec("[2/4] RUN echo $HOME");
    BOOST_TEST(first.meta.args == (strings{"/bin/sh", "-c", "echo $HOME"}), boost::test_tools::per_element());
    BOOST_TEST(first.meta.env == (strings{"PATH=/bin", "LANG=C"}), boost::test_tools::per_element());
    BOOST_TEST(first.meta.cwd == "/");
    BOOST_TEST(first.meta.remove_mount_stubs_recursive);
    BOOST_TEST(first.mounts.size() == 1U);
    BOOST_TEST(first.mounts[0].dest == "/");
    BOOST_TEST(first.mounts[0].input == 0);
    BOOST_TEST(first.mounts[0].output == 0);
    const auto names = o.steps();
    BOOST_TEST(std::get<llb::exec_op>(o.graph.vertices.at(2).what.what).meta.args == (strings{"/x", "$HOME"}), boost::test_tools::per_element());
    BOOST_TEST(o.exec("[4/4] RUN y").meta.args == (strings{"/b", "-ec", "y"}), boost::test_tools::per_element());
    BOOST_TEST(o.step("[4/4] RUN y").what.platform->os == "linux");
    BOOST_TEST(o.step("[4/4] RUN y").meta.description.at("com.docker.dockerfile.v1.command") == "RUN y");
}

BOOST_AUTO_TEST_CASE(places_lead_to_the_dockerfile) {
    const auto o = build("FROM busybox\nRUN a \\\n  b\n");
    BOOST_TEST(o.r.graph.source->infos.at(0).filename == "Dockerfile");
    BOOST_TEST(o.r.graph.source->infos.at(0).language == "Dockerfile");
    const auto& where = o.r.graph.source->locations.at(o.graph.vertices.at(1).id).list.at(0).ranges;
    BOOST_REQUIRE(where.size() == 2U);
    BOOST_TEST(where[0].start.line == 2);
    BOOST_TEST(where[1].end.line == 3);
}

BOOST_AUTO_TEST_CASE(options_of_the_request_reach_the_step) {
    const auto o = build("FROM busybox\nRUN x\nRUN --network=none y\nRUN --network=host z\n", [](auto& r, auto&) {
        r.network = llb::net_mode::host;
        r.extra_hosts = {{"h", "1.2.3.4"}};
        r.shm_size = 1024;
        r.ulimits = {{"nofile", 1, 2}};
        r.hostname = "name";
        r.cgroup_parent = "cg";
        r.resources = llb::linux_resources{.memory = 5};
        r.build_args = {{"http_proxy", "p"}, {"HTTPS_PROXY", "q"}};
    });
    const auto& e = o.exec("[2/4] RUN x");
    BOOST_TEST((e.network == llb::net_mode::host));
    BOOST_TEST((o.exec("[3/4] RUN --network=none y").network == llb::net_mode::none));
    BOOST_TEST(e.meta.extra_hosts.at(0).ip == "1.2.3.4");
    BOOST_TEST(e.meta.ulimits.at(0).hard == 2);
    BOOST_TEST(e.meta.hostname == "name");
    BOOST_TEST(e.meta.cgroup_parent == "cg");
    BOOST_TEST(e.meta.proxy->http == "p");
    BOOST_TEST(e.meta.proxy->https == "q");
    BOOST_TEST(e.meta.env.size() == 2U);
    BOOST_TEST(e.mounts.at(1).dest == "/dev/shm");
    BOOST_TEST(e.mounts.at(1).tmpfs->size == 1024);
    BOOST_TEST(e.mounts.at(1).input == llb::scratch);
    BOOST_TEST(o.step("[2/4] RUN x").meta.linux_resources->memory == 5);
    BOOST_TEST(o.history().back() == "RUN /bin/sh -c z # buildkit");
}

BOOST_AUTO_TEST_CASE(here_documents) {
    const auto shell = build("FROM busybox\nRUN <<EOF\necho 1\necho 2\nEOF\n");
    BOOST_TEST(shell.exec("[2/2] RUN <<EOF (echo 1...)").meta.args == (strings{"/bin/sh", "-c", "echo 1\necho 2\n"}),
               boost::test_tools::per_element());
    const auto script = build("FROM busybox\nRUN <<EOF\n#!/usr/bin/env python\nprint(1)\nEOF\n");
    const auto& e = script.exec("[2/2] RUN <<EOF (#!/usr/bin/env python...)");
    BOOST_TEST(e.meta.args == (strings{"/bin/sh", "-c", "/dev/pipes/EOF"}), boost::test_tools::per_element());
    BOOST_TEST(e.mounts.at(1).dest == "/dev/pipes/");
    BOOST_TEST(e.mounts.at(1).readonly);
    BOOST_TEST(e.mounts.at(1).output == llb::no_output);
    const auto& file = std::get<llb::mkfile_action>(script.file("[internal] preparing inline document").actions.at(0).what);
    BOOST_TEST(file.path == "/EOF");
    BOOST_TEST(file.mode == 0755);
    BOOST_TEST(file.data == "#!/usr/bin/env python\nprint(1)\n");
    const auto mixed = build("FROM busybox\nRUN cat <<A - <<B\na\nA\nb\nB\n");
    BOOST_TEST(std::get<llb::exec_op>(mixed.graph.vertices.at(1).what.what).meta.args.at(2) == "cat <<A - <<B\na\nA\nb\nB");
    const auto tabs = build("FROM busybox\nRUN <<-EOF\n\techo 1\n\tEOF\n");
    BOOST_TEST(std::get<llb::exec_op>(tabs.graph.vertices.at(1).what.what).meta.args.at(2) == "echo 1\n");
}

BOOST_AUTO_TEST_CASE(bind_mounts) {
    const auto o = build(
        "FROM busybox AS a\nRUN a\nFROM busybox\nWORKDIR /w\nRUN --mount=target=.,rw --mount=from=a,source=/s,target=/t "
        "--mount=source=d/e,target=rel x\n");
    const auto& v = o.step("[stage-1 3/3] RUN --mount=target=.,rw --mount=from=a,source=/s,target=/t --mount=source=d/e,target=rel x");
    const auto& m = std::get<llb::exec_op>(v.what.what).mounts;
    BOOST_REQUIRE(m.size() == 4U);
    BOOST_TEST(m[0].dest == "/");
    BOOST_TEST(m[1].dest == "/t");
    BOOST_TEST(m[1].selector == "/s");
    BOOST_TEST(m[1].readonly);
    BOOST_TEST((v.what.inputs.at(static_cast<std::size_t>(m[1].input)).vertex == o.step("[a 2/2] RUN a").id));
    BOOST_TEST(m[2].dest == "/w");
    BOOST_TEST(!m[2].readonly);
    BOOST_TEST(m[2].output == llb::no_output);
    BOOST_TEST(m[3].dest == "/w/rel");
    BOOST_TEST(m[3].selector == "/d/e");
    BOOST_TEST(m[2].input == m[3].input);
    // One mount takes the whole context.
    BOOST_TEST(!o.context().attrs.contains("local.followpaths"));
    BOOST_TEST(build("FROM busybox\nRUN --mount=source=d/e,target=/t x\n").context().attrs.at("local.followpaths") == R"(["d/e"])");
    BOOST_TEST(says(failure("FROM busybox\nRUN --mount=target=/ x\n"), "invalid mount target \"/\""));
    BOOST_TEST(failure("FROM busybox\nRUN --mount=type=nope,target=/x y\n").where()->line == 2U);
    BOOST_TEST(says(failure("FROM busybox AS x\nRUN --mount=from=late,target=/x y\nFROM busybox AS late\nFROM x\nRUN z\n"),
                    "cannot mount from stage \"late\""));
}

BOOST_AUTO_TEST_CASE(cache_and_tmpfs_mounts) {
    const auto o = build(
        "FROM busybox\nRUN --mount=type=cache,target=/root/.cache/ --mount=type=cache,id=i,target=/c,sharing=locked,uid=5,mode=0700 "
        "--mount=type=tmpfs,target=/t,size=64 x\n",
        [](auto& r, auto&) { r.build_args["BUILDKIT_CACHE_MOUNT_NS"] = "ns"; });
    const auto& v = o.graph.vertices.back();
    const auto& m = std::get<llb::exec_op>(v.what.what).mounts;
    BOOST_REQUIRE(m.size() == 4U);
    BOOST_TEST(m[1].dest == "/c");
    BOOST_TEST(m[1].cache->id == "ns/i");
    BOOST_TEST((m[1].cache->sharing == llb::cache_sharing::locked));
    BOOST_TEST(m[1].selector == "/cache");
    BOOST_TEST(m[1].output == llb::no_output);
    const auto& mkdir = std::get<llb::mkdir_action>(o.file("[internal] setting cache mount permissions").actions.at(0).what);
    BOOST_TEST(mkdir.mode == 0700);
    BOOST_TEST(std::get<std::uint32_t>(*mkdir.owner->user) == 5U);
    BOOST_TEST(m[2].dest == "/root/.cache/");
    BOOST_TEST(m[2].cache->id == "ns//root/.cache");
    BOOST_TEST(m[2].input == llb::scratch);
    BOOST_TEST(!m[2].readonly);
    BOOST_TEST((m[3].type == llb::mount_type::tmpfs));
    BOOST_TEST(m[3].tmpfs->size == 64);
}

BOOST_AUTO_TEST_CASE(secrets_and_ssh) {
    const auto o = build(
        "FROM busybox\nARG TOKEN\nRUN --mount=type=secret,id=a --mount=type=secret,id=t,env=TOKEN "
        "--mount=type=secret,target=/x/name,required,uid=1,mode=0440 --mount=type=ssh cmd $TOKEN\n");
    const auto& v = o.graph.vertices.back();
    const auto& e = std::get<llb::exec_op>(v.what.what);
    BOOST_REQUIRE(e.mounts.size() == 4U);
    BOOST_TEST(e.mounts[1].dest == "/run/secrets/a");
    BOOST_TEST(e.mounts[1].secret->mode == 0400U);
    BOOST_TEST(e.mounts[1].secret->optional);
    BOOST_TEST(e.mounts[2].dest == "/x/name");
    BOOST_TEST(e.mounts[2].secret->id == "name");
    BOOST_TEST(e.mounts[2].secret->uid == 1U);
    BOOST_TEST(e.mounts[2].secret->mode == 0440U);
    BOOST_TEST(!e.mounts[2].secret->optional);
    BOOST_TEST(e.mounts[3].dest == "/run/buildkit/ssh_agent.0");
    BOOST_TEST(e.mounts[3].ssh->id == "default");
    BOOST_TEST(e.mounts[3].ssh->mode == 0600U);
    BOOST_TEST(e.secret_envs.at(0).name == "TOKEN");
    BOOST_TEST(e.secret_envs.at(0).id == "t");
    BOOST_TEST(e.meta.env.back() == "SSH_AUTH_SOCK=/run/buildkit/ssh_agent.0");
    BOOST_TEST(o.steps().back().ends_with("cmd ****"));
    BOOST_TEST(says(failure("FROM busybox\nRUN --mount=type=secret x\n"), "secret"));
}

BOOST_AUTO_TEST_CASE(security_reaches_the_step) {
    const auto o = build("FROM busybox\nRUN --security=insecure x\nRUN --security=sandbox y\n");
    BOOST_TEST((o.exec("[2/3] RUN --security=insecure x").security == llb::security_mode::insecure));
    BOOST_TEST((o.exec("[3/3] RUN --security=sandbox y").security == llb::security_mode::sandbox));
}

BOOST_AUTO_TEST_CASE(what_is_not_there_is_refused_by_name) {
    const auto e = failure("FROM busybox\nRUN --device=vendor.test/dev x\n");
    BOOST_TEST((e.kind() == errc::unsupported));
    BOOST_TEST(says(e, "RUN --device=vendor.test/dev"));
    BOOST_TEST(e.where()->line == 2U);
}

BOOST_AUTO_TEST_SUITE_END()

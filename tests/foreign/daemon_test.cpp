// The daemon with other people's clients and our own: docker buildx (Debian 13's, an old client) and buildctl.
#include "support/program.hpp"

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

import cobuild.base;

using namespace cobuild;
using namespace cobuild::test;
namespace stdfs = std::filesystem;

namespace {

std::string beside(const std::string& name) { return (stdfs::path(program()).parent_path() / name).string(); }

/// docker's plugin as ./dev setup unpacks it; empty where it is not there.
std::string buildx() {
    const char* given = std::getenv("COBUILD_DOCKER_DIR");
    const char* source = std::getenv("COBUILD_SOURCE_DIR");
    const std::string dir = given != nullptr ? given : std::string(source != nullptr ? source : ".") + "/build/tools/docker";
    const auto at = dir + "/usr/libexec/docker/cli-plugins/docker-buildx";
    if (stdfs::exists(at)) return stdfs::absolute(at).string();
    BOOST_TEST_MESSAGE("skipped: no docker buildx (./dev setup unpacks one in build/tools/docker)");
    return {};
}

/// cobuildd on a socket of the workshop's.
struct served {
    workshop place;
    std::optional<running> daemon;
    std::string address;
    explicit served(const strings& more = {}) : address("unix://" + place.path("d.sock")) {
        place.make_base("busybox");
        strings args{beside("cobuildd"), "--root", place.root, "--config", place.config, "--addr", address, "--debug"};
        args.insert(args.end(), place.flags.begin(), place.flags.end());
        args.insert(args.end(), more.begin(), more.end());
        daemon.emplace(args, place.options({}, std::chrono::seconds(300)));
        BOOST_REQUIRE(daemon->wait_stderr("running server on " + address));
    }
    outcome buildctl(strings args) const {
        args.insert(args.begin(), {beside("buildctl"), "--addr", address});
        return run(args, place.options());
    }
    /// Ends it as a service manager does.
    outcome stop() {
        daemon->signal(SIGTERM);
        return daemon->wait();
    }
};

const char* const dockerfile =
    "FROM busybox\n"
    "COPY own /own\n"
    "RUN --mount=type=secret,id=word cat /run/secrets/word /own > /made\n"
    "FROM scratch\n"
    "COPY --from=0 /made /made\n";

}  // namespace

BOOST_TEST_GLOBAL_FIXTURE(isolation);

BOOST_AUTO_TEST_CASE(buildctl_builds_with_files_and_secrets_of_the_client) {
    if (!needs_root() || !docker_registry::available()) return;
    served s;
    write_file(s.place / "ctx/own", "own\n");
    write_file(s.place / "ctx/Dockerfile", dockerfile);
    write_file(s.place / "word", "secret ");
    const strings args{"build",
                       "--frontend",
                       "dockerfile.v0",
                       "--local",
                       "context=" + s.place.path("ctx"),
                       "--local",
                       "dockerfile=" + s.place.path("ctx"),
                       "--secret",
                       "id=word,src=" + s.place.path("word"),
                       "--progress",
                       "plain",
                       "--output",
                       "type=local,dest=" + s.place.path("out")};
    const auto first = s.buildctl(args);
    BOOST_REQUIRE_MESSAGE(first.code == 0, first.str());
    BOOST_TEST(read_file(s.place / "out/made") == "secret own\n");
    write_file(s.place / "ctx/own", "other\n");
    const auto second = s.buildctl(args);
    BOOST_REQUIRE_MESSAGE(second.code == 0, second.str());
    BOOST_TEST(read_file(s.place / "out/made") == "secret other\n");
    const auto workers = s.buildctl({"debug", "workers"});
    BOOST_TEST(workers.out.find("linux/amd64") != std::string::npos);
    BOOST_TEST(s.buildctl({"prune", "--all"}).code == 0);
    const auto usage = s.buildctl({"du"});
    BOOST_TEST(usage.out.find("Total:\t\t0B") != std::string::npos, usage.out);
    const auto ended = s.stop();
    BOOST_TEST(ended.code == 0, ended.str());
    // The mirror of the configuration answered, as the log shows.
    BOOST_TEST(ended.err.find("msg=\"do request\"") != std::string::npos);
    BOOST_TEST(ended.err.find("msg=\"fetch response received\"") != std::string::npos);
    BOOST_TEST(s.place.leftovers().empty());
    BOOST_TEST(!stdfs::exists(s.place / "d.sock"));
}

BOOST_AUTO_TEST_CASE(a_failed_step_shows_its_line) {
    if (!needs_root() || !docker_registry::available()) return;
    served s;
    write_file(s.place / "ctx/Dockerfile", "FROM busybox\nRUN echo about to fail && exit 7\n");
    const auto o = s.buildctl({"build", "--frontend", "dockerfile.v0", "--local", "context=" + s.place.path("ctx"), "--local",
                               "dockerfile=" + s.place.path("ctx"), "--progress", "plain"});
    BOOST_TEST(o.code == 1);
    BOOST_TEST(o.err.find("about to fail") != std::string::npos, o.err);
    BOOST_TEST(o.err.find("did not complete successfully: exit code: 7") != std::string::npos, o.err);
    BOOST_TEST(o.err.find(">>> RUN echo about to fail") != std::string::npos, o.err);
    BOOST_TEST(s.stop().code == 0);
    BOOST_TEST(s.place.leftovers().empty());
}

BOOST_AUTO_TEST_CASE(buildx_builds_through_a_remote_builder) {
    if (!needs_root() || !docker_registry::available()) return;
    const auto plugin = buildx();
    if (plugin.empty()) return;
    served s;
    write_file(s.place / "ctx/own", "own\n");
    write_file(s.place / "ctx/Dockerfile", "FROM busybox\nCOPY own /own\nRUN cat /own > /made\nLABEL a=b\n");
    const auto docker = [&](strings args) {
        args.insert(args.begin(), plugin);
        auto o = run(args, s.place.options({"BUILDX_CONFIG=" + s.place.path("bx")}));
        BOOST_REQUIRE_MESSAGE(o.code == 0, o.str());
        return o;
    };
    docker({"create", "--name", "ours", "--driver", "remote", s.address});
    BOOST_TEST(docker({"inspect", "ours"}).out.find("linux/amd64") != std::string::npos);
    docker({"build", "--builder", "ours", "--progress=plain", "-o", "type=oci,dest=" + s.place.path("x.tar"), "--provenance=false",
            s.place.path("ctx")});
    const auto image = run({"skopeo", "inspect", "--config", "oci-archive:" + s.place.path("x.tar")}, s.place.options());
    BOOST_TEST(image.out.find("\"a\": \"b\"") != std::string::npos, image.str());
    docker({"build", "--builder", "ours", "--progress=plain", "-o", "type=local,dest=" + s.place.path("out"), s.place.path("ctx")});
    BOOST_TEST(read_file(s.place / "out/made") == "own\n");
    const auto name = s.place.registry().host() + "/built/here:1";
    docker({"build", "--builder", "ours", "--progress=plain", "--push", "-t", name, s.place.path("ctx")});
    const auto pushed = run({"skopeo", "inspect", "--tls-verify=false", "docker://" + name}, s.place.options());
    BOOST_TEST(pushed.out.find("\"a\": \"b\"") != std::string::npos, pushed.str());
    docker({"du", "--builder", "ours"});
    docker({"prune", "--builder", "ours", "--all", "--force"});
    BOOST_TEST(s.stop().code == 0);
    BOOST_TEST(s.place.leftovers().empty());
}

BOOST_AUTO_TEST_CASE(builds_at_once_do_not_meet) {
    if (!needs_root() || !docker_registry::available()) return;
    served s;
    std::vector<std::unique_ptr<running>> all;
    for (int i = 0; i < 6; ++i) {
        const auto ctx = "ctx" + std::to_string(i);
        write_file(s.place / (ctx + "/own"), std::to_string(i) + "\n");
        write_file(s.place / (ctx + "/Dockerfile"), "FROM busybox\nCOPY own /own\nRUN cat /own > /made\n");
        all.push_back(std::make_unique<running>(strings{beside("buildctl"), "--addr", s.address, "build", "--frontend", "dockerfile.v0", "--local",
                                                        "context=" + s.place.path(ctx), "--local", "dockerfile=" + s.place.path(ctx), "--progress",
                                                        "plain", "--output", "type=local,dest=" + s.place.path("out" + std::to_string(i))},
                                                s.place.options()));
    }
    for (int i = 0; i < 6; ++i) {
        const auto o = all[static_cast<std::size_t>(i)]->wait();
        BOOST_REQUIRE_MESSAGE(o.code == 0, o.str());
        BOOST_TEST(read_file(s.place / ("out" + std::to_string(i) + "/made")) == std::to_string(i) + "\n");
    }
    BOOST_TEST(s.stop().code == 0);
    BOOST_TEST(s.place.leftovers().empty());
}

BOOST_AUTO_TEST_CASE(a_killed_client_ends_its_step) {
    if (!needs_root() || !docker_registry::available()) return;
    served s;
    write_file(s.place / "ctx/Dockerfile", "FROM busybox\nRUN echo here we are; sleep 1000\n");
    running client({beside("buildctl"), "--addr", s.address, "build", "--frontend", "dockerfile.v0", "--local", "context=" + s.place.path("ctx"),
                    "--local", "dockerfile=" + s.place.path("ctx"), "--progress", "plain"},
                   s.place.options());
    if (!client.wait_stderr("here we are")) BOOST_FAIL("it ended: " << client.wait().str());
    BOOST_TEST(client.kill().code == 137);
    // Nothing is in use once the step has gone: prune can take all.
    bool empty = false;
    for (int i = 0; i < 100 && !empty; ++i) {
        BOOST_TEST(s.buildctl({"prune", "--all"}).code == 0);
        empty = s.buildctl({"du"}).out.find("Total:\t\t0B") != std::string::npos;
    }
    BOOST_TEST(empty);
    BOOST_TEST(s.stop().code == 0);
    BOOST_TEST(s.place.leftovers().empty());
}

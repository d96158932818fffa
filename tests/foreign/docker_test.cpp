// A real Docker engine, unpacked aside by ./dev setup, loads and runs what we write.
#include "foreign/engine.hpp"

#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

using namespace cobuild::test;
namespace stdfs = std::filesystem;

BOOST_AUTO_TEST_CASE(docker_loads_and_runs) {
    if (!needs_root() || !docker_registry::available()) return;
    const auto dir = docker_dir();
    if (dir.empty()) return;
    workshop place;
    place.make_base("busybox");
    write_file(place / "ctx/Dockerfile",
               "FROM busybox\nRUN echo hello from a step > /greeting && chown guest:users /greeting\nRUN rm /bin/vi\nENV A=1\nLABEL a=b\nUSER "
               "guest\nWORKDIR /tmp\nCMD [\"sh\", \"-c\", \"cat /greeting; id -u; pwd; echo $A; ls /bin/vi; stat -c %U /greeting\"]\n");
    const docker_engine engine(place, dir);
    const std::string said = "hello from a step\n405\n/tmp\n1\nguest\n";
    const std::string name = "from-docker:1";
    must_run(place.build("ctx", {"-t", name, "-o", "type=docker,dest=" + place.path("x.tar")}), place.options());
    const auto loaded = engine.must({"load", "-i", place.path("x.tar")});
    BOOST_CHECK_MESSAGE(loaded.out.find(name) != std::string::npos, loaded.str());
    BOOST_TEST(engine.docker({"run", "--rm", "--network=none", name}).out == said);
    // The base, two steps, and WORKDIR, which is a layer even where the directory exists.
    BOOST_TEST(
        engine
            .must({"inspect", "-f", "{{.Config.Labels.a}} {{.Config.User}} {{.Config.WorkingDir}} {{json .Config.Env}} {{len .RootFS.Layers}}", name})
            .out == "b guest /tmp [\"PATH=/bin\",\"A=1\"] 4\n");
    const auto history = engine.must({"history", "--no-trunc", "--format", "{{.CreatedBy}}|{{.Comment}}", name}).out;
    BOOST_CHECK_MESSAGE(history.find("RUN /bin/sh -c rm /bin/vi # buildkit|buildkit.dockerfile.v0") != std::string::npos, history);
    // Straight into the engine.
    auto with_engine = place.options(engine.environment);
    must_run(place.build("ctx", {"-t", "straight:1", "--load"}), with_engine);
    BOOST_TEST(engine.docker({"run", "--rm", "--network=none", "straight:1"}).out == said);
    BOOST_TEST(engine.must({"image", "inspect", "-f", "{{.Id}}", "straight:1"}).out == engine.must({"image", "inspect", "-f", "{{.Id}}", name}).out);
}

BOOST_AUTO_TEST_CASE(load_without_an_engine_is_one_sentence) {
    if (!needs_root()) return;
    const auto dir = docker_dir();
    if (dir.empty()) return;
    workshop place;
    write_file(place / "ctx/Dockerfile", "FROM scratch\nCOPY Dockerfile /\n");
    const auto nowhere = run(place.build("ctx", {"-t", "x", "--load"}),
                             place.options({"DOCKER_HOST=unix://" + place.path("nobody"), "PATH=" + dir + "/usr/bin:" + std::getenv("PATH")}));
    BOOST_CHECK_MESSAGE(
        nowhere.code == 1 && error_lines(nowhere).size() == 1 && error_lines(nowhere).front().find(place.path("nobody")) != std::string::npos,
        nowhere.str());
    const auto no_docker = run(place.build("ctx", {"-t", "x", "--load"}), place.options({"PATH=" + place.path("home")}));
    BOOST_CHECK_MESSAGE(
        no_docker.code != 0 && error_lines(no_docker).size() == 1 && error_lines(no_docker).front().find("docker") != std::string::npos,
        no_docker.str());
}

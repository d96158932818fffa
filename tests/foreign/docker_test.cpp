// A real Docker engine, unpacked aside by ./dev setup, loads and runs what we write.
#include "support/program.hpp"

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

namespace {

/// $COBUILD_DOCKER_DIR, else build/tools/docker of the source tree; empty where there is no engine.
std::string docker_dir() {
    const char* given = std::getenv("COBUILD_DOCKER_DIR");
    const char* source = std::getenv("COBUILD_SOURCE_DIR");
    const std::string dir = given != nullptr ? given : std::string(source != nullptr ? source : ".") + "/build/tools/docker";
    if (stdfs::exists(dir + "/usr/sbin/dockerd")) return stdfs::absolute(dir).string();
    BOOST_TEST_MESSAGE("skipped: no Docker engine in " << dir << " (./dev setup)");
    return {};
}

/// An engine in a PID namespace of its own, so that nothing of it outlives this: no bridge, no firewall rules, all its files in
/// one directory.
class docker_engine {
public:
    docker_engine(workshop& place, const std::string& dir) : place_(place) {
        environment = {"DOCKER_HOST=unix://" + place.path("docker/sock"), "PATH=" + dir + "/usr/bin:" + dir + "/usr/sbin:" + std::getenv("PATH")};
        stdfs::create_directories(place / "docker/cgroups");
        auto o = place.options(environment);
        o.limit = std::chrono::seconds(600);
        // Its own /run, or it would meet another engine's containerd; the parent of its containers' cgroups is ours to remove.
        cgroup_ = "cobuild-foreign-" + std::to_string(::getpid());
        const auto start = "mount -t tmpfs tmpfs /run && exec dockerd --data-root " + place.path("docker/data") + " --exec-root " +
                           place.path("docker/exec") + " -H unix://" + place.path("docker/sock") + " --pidfile " + place.path("docker/pid") +
                           " --bridge=none --iptables=false --ip6tables=false --exec-opt native.cgroupdriver=cgroupfs --cgroup-parent /" + cgroup_;
        engine_.emplace(strings{"unshare", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child", "sh", "-c", start}, o);
        for (int i = 0; i < 600; ++i) {
            if (engine_->ended(std::chrono::milliseconds(50))) break;
            if (docker({"version"}).code == 0) return;
        }
        BOOST_FAIL("dockerd did not start: " + engine_->kill().str());
    }
    ~docker_engine() {
        engine_->signal(SIGTERM);
        if (engine_->ended(std::chrono::seconds(1))) engine_->wait();
        engine_.reset();
        remove_cgroups();
    }
    docker_engine(const docker_engine&) = delete;
    docker_engine& operator=(const docker_engine&) = delete;

    outcome docker(strings args) const {
        args.insert(args.begin(), "docker");
        return run(std::move(args), place_.options(environment));
    }
    outcome must(strings args) const {
        auto o = docker(args);
        BOOST_REQUIRE_MESSAGE(o.code == 0, "docker " << args.front() << ": " << o.str());
        return o;
    }
    strings environment;  ///< for a client

private:
    void remove_cgroups() const {
        for (int i = 0; i < 200; ++i) {
            run({"sh", "-c", "find /sys/fs/cgroup -depth -type d -path '*/" + cgroup_ + "*' -exec rmdir {} + 2>/dev/null"});
            bool left = stdfs::exists("/sys/fs/cgroup/" + cgroup_);
            for (const auto& e : stdfs::directory_iterator("/sys/fs/cgroup")) left = left || stdfs::exists(e.path() / cgroup_);
            if (!left) return;
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
        }
    }
    workshop& place_;
    std::string cgroup_;
    std::optional<running> engine_;
};

}  // namespace

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

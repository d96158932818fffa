// A real Docker engine, unpacked aside by ./dev setup. Include before any import.
#pragma once

#include "support/program.hpp"

#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>
#include <thread>
#include <utility>

namespace cobuild::test {

/// $COBUILD_DOCKER_DIR, else build/tools/docker of the source tree; empty (with a message) where there is no engine.
inline std::string docker_dir() {
    const char* given = std::getenv("COBUILD_DOCKER_DIR");
    const char* source = std::getenv("COBUILD_SOURCE_DIR");
    const std::string dir = given != nullptr ? given : std::string(source != nullptr ? source : ".") + "/build/tools/docker";
    if (std::filesystem::exists(dir + "/usr/sbin/dockerd")) return std::filesystem::absolute(dir).string();
    BOOST_TEST_MESSAGE("skipped: no Docker engine in " << dir << " (./dev setup)");
    return {};
}

/// An engine in a PID namespace of its own, so that nothing of it outlives this: no bridge, no firewall rules, all its files in
/// one directory. Its containers may use the network of the test program ("host").
class docker_engine {
public:
    /// `hosts`: more lines for /etc/hosts, as the engine and its containers see it.
    docker_engine(workshop& place, const std::string& dir, const std::string& hosts = {}) : place_(place) {
        // What an engine starts beside a container's first process: Debian's tini has another name.
        std::filesystem::create_directories(place / "docker/bin");
        for (const auto* tini : {"/usr/bin/tini-static", "/usr/bin/tini"})
            if (std::filesystem::exists(tini) && !std::filesystem::exists(place / "docker/bin/docker-init"))
                std::filesystem::create_symlink(tini, place / "docker/bin/docker-init");
        environment = {"DOCKER_HOST=unix://" + place.path("docker/sock"),
                       "PATH=" + place.path("docker/bin") + ":" + dir + "/usr/bin:" + dir + "/usr/sbin:" + std::getenv("PATH")};
        write_file(place / "docker/hosts", "127.0.0.1 localhost\n" + hosts);
        auto o = place.options(environment);
        o.limit = std::chrono::seconds(900);
        // Its own /run, or it would meet another engine's containerd; the parent of its containers' cgroups is ours to remove.
        cgroup_ = "cobuild-foreign-" + std::to_string(::getpid());
        const auto start = "mount -t tmpfs tmpfs /run && mount --bind " + place.path("docker/hosts") + " /etc/hosts && exec dockerd --data-root " +
                           place.path("docker/data") + " --exec-root " + place.path("docker/exec") + " -H unix://" + place.path("docker/sock") +
                           " --pidfile " + place.path("docker/pid") +
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

    [[nodiscard]] outcome docker(strings args) const {
        args.insert(args.begin(), "docker");
        return run(std::move(args), place_.options(environment, std::chrono::seconds(120)));
    }
    outcome must(const strings& args) const {
        auto o = docker(args);
        std::string words;
        for (const auto& a : args) words += " " + a;
        BOOST_REQUIRE_MESSAGE(o.code == 0, "docker" << words << ": " << o.str());
        return o;
    }
    strings environment;  ///< for a client

private:
    void remove_cgroups() const {
        for (int i = 0; i < 200; ++i) {
            run({"sh", "-c", "find /sys/fs/cgroup -depth -type d -path '*/" + cgroup_ + "*' -exec rmdir {} + 2>/dev/null"});
            bool left = std::filesystem::exists("/sys/fs/cgroup/" + cgroup_);
            for (const auto& e : std::filesystem::directory_iterator("/sys/fs/cgroup")) left = left || std::filesystem::exists(e.path() / cgroup_);
            if (!left) return;
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
        }
    }
    workshop& place_;
    std::string cgroup_;
    std::optional<running> engine_;
};

}  // namespace cobuild::test

// Many commands at once on one state directory, and what is left of them.
#include <csignal>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "support/program.hpp"

using namespace cobuild::test;
namespace stdfs = std::filesystem;

namespace {

std::string dockerfile(int n) {
    return "FROM busybox AS build\nRUN echo shared > /shared\nRUN echo " + std::to_string(n) +
           " > /own\nFROM busybox\nCOPY --from=build /shared /own /\nRUN cat /shared /own > /both\n";
}

/// Runs builds 0..count-1 at once, each of its own context; all must succeed.
void build_at_once(const workshop& place, int count) {
    std::vector<std::unique_ptr<running>> all;
    for (int n = 0; n < count; ++n) {
        const auto context = "ctx" + std::to_string(n);
        write_file(place / (context + "/Dockerfile"), dockerfile(n));
        all.push_back(std::make_unique<running>(place.build(context, {"-t", "image" + std::to_string(n)}), place.options()));
    }
    for (auto& build : all) {
        const auto o = build->wait();
        BOOST_CHECK_MESSAGE(o.code == 0, o.str());
    }
}

outcome command(const workshop& place, strings words) {
    words.insert(words.begin(), program());
    for (const auto* flag : {"--root", "--config"}) {
        words.emplace_back(flag);
        words.push_back(flag == std::string("--root") ? place.root : place.config);
    }
    return must_run(std::move(words), place.options());
}

int entries(const stdfs::path& dir) {
    int n = 0;
    for ([[maybe_unused]] const auto& e : stdfs::directory_iterator(dir)) ++n;
    return n;
}

}  // namespace

// O-EN-03: ten clients, other Dockerfiles, the same stage name and base.
BOOST_AUTO_TEST_CASE(equal_stage_names_do_not_collide) {
    if (!needs_root() || !docker_registry::available()) return;
    workshop place;
    place.make_base("busybox");
    build_at_once(place, 10);
    for (int n = 0; n < 10; ++n) {
        const auto to = place.path("out" + std::to_string(n));
        const auto o = place.run_build("ctx" + std::to_string(n), {"-o", "type=local,dest=" + to});
        BOOST_REQUIRE_MESSAGE(o.code == 0, o.str());
        BOOST_TEST(read_file(to + "/both") == "shared\n" + std::to_string(n) + "\n");
    }
    for (const auto& l : place.leftovers()) BOOST_ERROR("left " << l);
}

// O-EN-05: twenty builds that share layers; pruning all gives everything back.
BOOST_AUTO_TEST_CASE(prune_gives_back_what_parallel_builds_took) {
    if (!needs_root() || !docker_registry::available()) return;
    workshop place;
    place.make_base("busybox");
    build_at_once(place, 20);
    strings remove{"image", "rm"};
    for (int n = 0; n < 20; ++n) remove.push_back("image" + std::to_string(n));
    command(place, remove);
    command(place, {"prune", "--all"});
    BOOST_TEST(entries(place.root + "/content/blobs/sha256") == 0);
    for (const auto* empty : {"active", "trash", "content/ingest", "ledger", "owners"})
        BOOST_CHECK_MESSAGE(entries(place.root + "/" + empty) == 0, empty << " is not empty");
    for (const auto& e : stdfs::directory_iterator(place.root + "/layers")) BOOST_CHECK_MESSAGE(!e.is_directory(), "left " << e.path());
    for (const auto& l : place.leftovers()) BOOST_ERROR("left " << l);
}

// O-EN-14: a cancelled step gets TERM first, and time to tidy up what outlives it.
BOOST_AUTO_TEST_CASE(a_cancelled_step_may_clean_up) {
    if (!needs_root() || !docker_registry::available()) return;
    workshop place;
    place.make_base("busybox");
    write_file(place / "ctx/Dockerfile",
               "FROM busybox\n"
               "RUN --mount=type=cache,id=c,target=/c trap 'rm /c/half; exit 1' TERM; touch /c/half; echo step-is-$((40+2)); "
               "while true; do sleep 0.02; done\n");
    running build(place.build("ctx"), place.options());
    if (!build.wait_stderr("step-is-42")) BOOST_FAIL(build.wait().str());
    build.signal(SIGINT);
    BOOST_TEST(build.wait().code == 130);
    write_file(place / "ctx/Dockerfile", "FROM busybox\nRUN --mount=type=cache,id=c,target=/c test ! -e /c/half\n");
    const auto next = place.run_build("ctx");
    BOOST_CHECK_MESSAGE(next.code == 0, next.str());
    for (const auto& l : place.leftovers()) BOOST_ERROR("left " << l);
}

// O-NW-04: commands that make one bridge at the same time.
BOOST_AUTO_TEST_CASE(one_bridge_made_by_two_commands) {
    if (!needs_root() || !docker_registry::available()) return;
    if (!stdfs::exists("/usr/lib/cni/bridge")) {
        BOOST_TEST_MESSAGE("skipped: the CNI plugins are not installed");
        return;
    }
    workshop place;
    place.make_base("busybox");
    write_file(place / "cni.conflist", R"({"cniVersion":"1.0.0","name":"two","plugins":[{"type":"bridge","bridge":"br-two","isGateway":true,)"
                                       R"("ipam":{"type":"host-local","dataDir":")" +
                                           place.path("ipam") + R"(","ranges":[[{"subnet":"10.98.0.0/24"}]]}}]})");
    place.flags = {"--oci-worker-net=cni", "--oci-cni-config-path=" + place.path("cni.conflist"), "--oci-cni-binary-dir=/usr/lib/cni"};
    for (int round = 0; round < 4; ++round) {
        std::vector<std::unique_ptr<running>> both;
        for (const std::string name : {"a", "b"}) {
            write_file(place / (name + "/Dockerfile"), "FROM busybox\nRUN ip addr show dev eth0 | grep 'inet 10.98.0.' # " + name + "\n");
            both.push_back(std::make_unique<running>(place.build(name, {"--no-cache"}), place.options()));
        }
        for (auto& build : both) {
            const auto o = build->wait();
            BOOST_CHECK_MESSAGE(o.code == 0, "round " << round << ": " << o.str());
        }
        must_run({"ip", "link", "del", "br-two"});
    }
    for (const auto& l : place.leftovers()) BOOST_ERROR("left " << l);
}

// Death at any instant: the next build succeeds with the digest of an undisturbed one, and nothing of the dead remains.
#include "support/program.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <thread>

using namespace cobuild::test;
namespace stdfs = std::filesystem;

BOOST_TEST_GLOBAL_FIXTURE(isolation);

namespace {

/// Pulls, runs two steps (one in a network of its own where the plugins are installed), copies, exports.
struct crash_place {
    workshop place;
    std::string digest;
    std::chrono::milliseconds took{0};
    int had_to_repair = 0;  ///< deaths that did leave something to the next start

    crash_place() {
        stdfs::create_directory(place / "out");
        write_file(place / "ctx/f", std::string(300'000, 'f'));
        write_file(place / "ctx/Dockerfile",
                   "FROM busybox\n"
                   "RUN mkdir /made && seq 1 20000 > /made/f && touch -d @1700000000 /made/f /made\n"
                   "COPY f /f\n"
                   "RUN cat /f /made/f > /both && touch -d @1700000000 /both\n");
        stdfs::last_write_time(place / "ctx/f", stdfs::file_time_type(std::chrono::hours(-24 * 365 * 150)));
        place.make_base("busybox");
        if (stdfs::exists("/usr/lib/cni/bridge") && stdfs::exists("/usr/lib/cni/host-local")) {
            write_file(
                place / "cni.conflist",
                R"({"cniVersion":"1.0.0","name":"crash","plugins":[{"type":"bridge","bridge":"br-crash","ipam":{"type":"host-local","dataDir":")" +
                    place.path("ipam") + R"(","ranges":[[{"subnet":"10.99.0.0/24"}]]}}]})");
            place.flags = {"--oci-worker-net=cni", "--oci-cni-config-path=" + place.path("cni.conflist"), "--oci-cni-binary-dir=/usr/lib/cni"};
        }
        const auto o = next_build();
        took = o.took;
        digest = image_digest(place / "meta.json");
        BOOST_TEST_MESSAGE("undisturbed: " << digest << " in " << took.count() << " ms");
        check_clean("after the undisturbed build");
    }
    [[nodiscard]] strings arguments() const {
        return place.build("ctx", {"-t", "x", "-o", "type=oci,dest=" + place.path("out/x.tar"), "--metadata-file", place.path("meta.json")});
    }
    outcome next_build() const {
        stdfs::remove(place / "meta.json");
        return must_run(arguments(), place.options());
    }
    void check_clean(const std::string& when) const {
        for (const auto& l : place.leftovers()) BOOST_ERROR(when << ": left " << l);
        for (const auto& e : stdfs::directory_iterator(place / "out"))
            BOOST_CHECK_MESSAGE(e.path().filename() == "x.tar", when << ": left file out/" << e.path().filename().string());
        if (!stdfs::exists(place / "ipam/crash")) return;
        for (const auto& e : stdfs::directory_iterator(place / "ipam/crash")) {
            const auto name = e.path().filename().string();
            BOOST_CHECK_MESSAGE(name == "lock" || name.starts_with("last_reserved_ip"), when << ": left address " << name);
        }
    }
    /// After a death: the next build, its digest, what is left.
    void recover(const std::string& when) {
        place.note_owners();
        if (!place.leftovers().empty()) ++had_to_repair;
        next_build();
        BOOST_CHECK_MESSAGE(image_digest(place / "meta.json") == digest, when << ": the image is another one");
        check_clean(when);
    }
    void fresh() const {
        stdfs::remove_all(place.root);
        stdfs::remove(place / "out/x.tar");
    }
};

}  // namespace

BOOST_AUTO_TEST_CASE(two_builds_at_once_share_a_state_directory) {
    if (!needs_root() || !docker_registry::available()) return;
    workshop place;
    place.make_base("busybox");
    write_file(place / "ctx/Dockerfile", "FROM busybox\nRUN sleep 1; echo one > /one && touch -d @1700000000 /one\n");
    running first(place.build("ctx", {"-t", "first", "--metadata-file", place.path("first.json")}), place.options());
    running second(place.build("ctx", {"-t", "second", "--metadata-file", place.path("second.json")}), place.options());
    const auto a = first.wait(), b = second.wait();
    BOOST_REQUIRE_MESSAGE(a.code == 0, a.str());
    BOOST_REQUIRE_MESSAGE(b.code == 0, b.str());
    BOOST_TEST(image_digest(place / "first.json") == image_digest(place / "second.json"));
    const auto listed = must_run({program(), "images", "--root", place.root, "--config", place.config}, place.options());
    BOOST_CHECK_MESSAGE(listed.out.find("first") != std::string::npos && listed.out.find("second") != std::string::npos, listed.str());
    for (const auto& l : place.leftovers()) BOOST_ERROR("left " << l);
}

BOOST_AUTO_TEST_CASE(what_is_thrown_away_does_not_pile_up) {
    if (!needs_root() || !docker_registry::available()) return;
    workshop place;
    write_file(place / "ctx/Dockerfile", "FROM scratch\nCOPY Dockerfile /\n");
    const auto thrown_away = [&] { return std::distance(stdfs::directory_iterator(place.root + "/trash"), stdfs::directory_iterator{}); };
    for (int i = 0; i < 8; ++i) must_run(place.build("ctx", {"-t", "x", "--no-cache"}), place.options());
    // One command may leave the rest to the next one, but not for ever.
    BOOST_TEST(thrown_away() <= 4);
}

BOOST_AUTO_TEST_CASE(killed_at_random_instants) {
    if (!needs_root() || !docker_registry::available()) return;
    crash_place c;
    const char* given = std::getenv("COBUILD_TEST_SEED");
    const auto seed = given != nullptr ? static_cast<unsigned>(std::stoul(given)) : std::random_device{}();
    std::mt19937 random(seed);
    int killed = 0;
    for (int i = 0; i < 20; ++i) {
        c.fresh();
        const auto when = std::uniform_int_distribution<long>(1, std::max<long>(2, c.took.count()))(random);
        const auto name = "seed " + std::to_string(seed) + ", kill " + std::to_string(i) + " after " + std::to_string(when) + " ms";
        BOOST_TEST_MESSAGE(name);
        running build(c.arguments(), c.place.options());
        if (build.ended(std::chrono::milliseconds(when))) {
            BOOST_TEST(build.wait().code == 0);
        } else {
            // It may end by itself in the moment between.
            const auto code = build.kill().code;
            BOOST_TEST((code == 137 || code == 0));
            if (code == 137) ++killed;
        }
        c.recover(name);
    }
    BOOST_TEST(killed > 5);
    BOOST_TEST(c.had_to_repair > 0);
}

BOOST_AUTO_TEST_CASE(killed_after_every_rename) {
    if (!needs_root() || !docker_registry::available()) return;
    crash_place c;
    int n = 1;
    for (; n < 400; ++n) {
        c.fresh();
        const auto name = "killed after rename " + std::to_string(n);
        const auto o = run(c.arguments(), c.place.options({"LD_PRELOAD=" KILL_AT_RENAME, "COBUILD_KILL_AT=" + std::to_string(n)}));
        if (o.code == 0) break;
        BOOST_REQUIRE_MESSAGE(o.code == 137, name << ": " << o.str());
        c.recover(name);
    }
    BOOST_TEST_MESSAGE("the build makes " << n - 1 << " renames");
    BOOST_TEST(n > 5);
    BOOST_TEST(c.had_to_repair > 0);
    BOOST_TEST(n < 400);
}

// Ctrl-C while a step runs that does not want to end.
#include "support/program.hpp"

#include <chrono>
#include <csignal>
#include <string>

using namespace cobuild::test;
using namespace std::chrono_literals;

namespace {

struct deaf_step {
    workshop place;
    deaf_step() {
        place.make_base("busybox");
        write_file(place / "ctx/Dockerfile", "FROM busybox\nRUN trap '' TERM; echo step-is-$((40+2)); while true; do sleep 1000; done\n");
    }
    /// Runs until the step speaks.
    void wait_for_step(running& build) {
        if (!build.wait_stderr("step-is-42")) BOOST_FAIL(build.wait().str());
        place.note_owners();
    }
};

std::chrono::milliseconds since(std::chrono::steady_clock::time_point t) {
    return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - t);
}

}  // namespace

BOOST_AUTO_TEST_CASE(one_interrupt_stops_the_step_and_leaves_nothing) {
    if (!needs_root() || !docker_registry::available()) return;
    deaf_step d;
    running build(d.place.build("ctx"), d.place.options({}, std::chrono::seconds(15)));
    d.wait_for_step(build);
    const auto begin = std::chrono::steady_clock::now();
    build.signal(SIGINT);
    const auto o = build.wait();
    const auto took = since(begin);
    BOOST_TEST_MESSAGE("stopped within " << took.count() << " ms");
    BOOST_TEST(o.code == 130);
    BOOST_CHECK_MESSAGE(took >= 400ms, "the step had no half second to end by itself: " << took.count() << " ms");
    BOOST_CHECK_MESSAGE(took < 2000ms, took.count() << " ms\n" << o.str());
    BOOST_CHECK_MESSAGE(error_lines(o).size() == 1, o.str());
    for (const auto& l : d.place.leftovers()) BOOST_ERROR("left " << l);
}

BOOST_AUTO_TEST_CASE(terminate_stops_it_too) {
    if (!needs_root() || !docker_registry::available()) return;
    deaf_step d;
    running build(d.place.build("ctx"), d.place.options({}, std::chrono::seconds(15)));
    d.wait_for_step(build);
    build.signal(SIGTERM);
    const auto o = build.wait();
    BOOST_CHECK_MESSAGE(o.code == 130 || o.code == 143, o.str());
    BOOST_CHECK_MESSAGE(error_lines(o).size() == 1, o.str());
    for (const auto& l : d.place.leftovers()) BOOST_ERROR("left " << l);
}

BOOST_AUTO_TEST_CASE(a_second_interrupt_ends_at_once) {
    if (!needs_root() || !docker_registry::available()) return;
    deaf_step d;
    running build(d.place.build("ctx"), d.place.options({}, std::chrono::seconds(15)));
    d.wait_for_step(build);
    const auto begin = std::chrono::steady_clock::now();
    build.signal(SIGINT);
    // A second one sent at once would be merged with the first where that was not taken yet.
    while (!build.ended(20ms) && since(begin) < 1000ms) build.signal(SIGINT);
    const auto o = build.wait();
    BOOST_CHECK_MESSAGE(o.code == 130, o.str());
    BOOST_CHECK_MESSAGE(since(begin) < 450ms, "not before the step's half second: " << since(begin).count() << " ms");
    write_file(d.place / "ctx/Dockerfile", "FROM busybox\nRUN true\n");
    const auto next = d.place.run_build("ctx", {"-t", "x"});
    BOOST_CHECK_MESSAGE(next.code == 0, next.str());
    for (const auto& l : d.place.leftovers()) BOOST_ERROR("left " << l);
}

// `cobuild build` of a Dockerfile whose frontend is an image: it goes on in cobuildd, with the same flags, output and state.
#include "support/program.hpp"

#include <cstdlib>
#include <filesystem>
#include <sstream>
#include <string>
#include <string_view>

import cobuild.base;

using namespace cobuild;
using namespace cobuild::test;
namespace stdfs = std::filesystem;

BOOST_TEST_GLOBAL_FIXTURE(isolation);

namespace {

/// The frontend and the libraries it needs below `to`, as ldd(1) lists them.
void collect(const stdfs::path& to) {
    const auto tiny = stdfs::path(program()).parent_path() / "tiny_frontend";
    stdfs::create_directories(to);
    stdfs::copy_file(tiny, to / "tiny");
    std::istringstream lines(must_run({"ldd", tiny.string()}).out);
    for (std::string line; std::getline(lines, line);) {
        const auto from = line.find('/');
        if (from == std::string::npos) continue;
        const stdfs::path file = line.substr(from, line.find(' ', from) - from);
        stdfs::create_directories(to / file.parent_path().relative_path());
        stdfs::copy_file(file, to / file.relative_path(), stdfs::copy_options::overwrite_existing);
    }
}

struct bench {
    workshop shop;
    bench() {
        collect(shop / "tiny/root");
        write_file(shop / "tiny/Dockerfile",
                   "FROM scratch\nCOPY root /\nENV LD_LIBRARY_PATH=/usr/lib/x86_64-linux-gnu:/lib/x86_64-linux-gnu\nENTRYPOINT [\"/tiny\"]\n");
        const auto made = shop.run_build(shop.path("tiny"), {"-t", "example.com/tiny:1"});
        BOOST_REQUIRE_MESSAGE(made.code == 0, made.str());
        stdfs::create_directories(shop / "app");
        write_file(shop / "app/Dockerfile", "# syntax=example.com/tiny:1\nanything\n");
    }
};

}  // namespace

BOOST_AUTO_TEST_CASE(a_build_with_a_frontend_image_goes_on_in_cobuildd) {
    if (!needs_root()) return;
    bench b;
    const auto r = b.shop.run_build(b.shop.path("app"), {"--target", "x", "-o", "type=local,dest=" + b.shop.path("out")});
    BOOST_REQUIRE_MESSAGE(r.code == 0, r.str());
    BOOST_TEST(r.err.find("mkfile /told") != std::string::npos, r.err);  // the same progress
    BOOST_TEST(
        read_file(b.shop / "out/told") ==
        "cmdline=example.com/tiny:1\nsource=example.com/tiny:1\ntarget=x\nproduct=buildkit\nworkers=1\n# syntax=example.com/tiny:1\nanything\n");
    const auto failed = b.shop.run_build(b.shop.path("app"), {"--build-arg", "fail=1"});
    BOOST_TEST(failed.code == 1);
    BOOST_TEST(error_lines(failed) == strings{"error: the tiny frontend gave up"}, boost::test_tools::per_element());
    for (const auto& left : b.shop.leftovers()) BOOST_ERROR(left);
}

// O-RG-03: only the mirror of Docker Hub has it.
BOOST_AUTO_TEST_CASE(a_frontend_image_comes_through_the_mirror) {
    if (!needs_root() || !docker_registry::available()) return;
    bench b;
    const auto pushed = b.shop.run_build(b.shop.path("tiny"), {"-t", b.shop.registry().host() + "/library/tiny:2", "--push"});
    BOOST_REQUIRE_MESSAGE(pushed.code == 0, pushed.str());
    write_file(b.shop / "app/Dockerfile", "# syntax=tiny:2\nanything\n");
    const auto r = b.shop.run_build(b.shop.path("app"), {"--debug", "-o", "type=local,dest=" + b.shop.path("out")});
    BOOST_REQUIRE_MESSAGE(r.code == 0, r.str());
    BOOST_TEST(read_file(b.shop / "out/told").starts_with("cmdline=tiny:2\n"));
    BOOST_TEST(r.err.find("http://" + b.shop.registry().host() + "/v2/library/tiny/manifests/2?ns=docker.io") != std::string::npos, r.err);
}

BOOST_AUTO_TEST_CASE(without_cobuildd_the_sentence_names_it) {
    if (!needs_root()) return;
    bench b;
    stdfs::create_directories(b.shop / "alone");
    stdfs::copy_file(program(), b.shop / "alone/cobuild");
    auto args = b.shop.build(b.shop.path("app"));
    args.front() = b.shop.path("alone/cobuild");
    const auto r = run(args, b.shop.options());
    BOOST_TEST(r.code == 2);
    BOOST_TEST(
        r.err.find("Dockerfile:1: the frontend image \"example.com/tiny:1\" is run by cobuildd, which is not beside cobuild") != std::string::npos,
        r.err);
}

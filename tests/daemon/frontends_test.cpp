// Frontends that are images (gateway.v0): a program of ours in an image, asked for by name and by a Dockerfile's syntax directive.
#include "support/support.hpp"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "control.pb.h"
#include "gateway.pb.h"

import cobuild.base;
import cobuild.async;
import cobuild.build;
import cobuild.config;
import cobuild.daemon;
import cobuild.llb;
import cobuild.process;
import cobuild.rpc;

#include "daemon/served.hpp"
#include "support/failure.hpp"

using namespace cobuild;
using namespace std::chrono_literals;
using namespace cobuild::test;
namespace bridge = moby::buildkit::v1::frontend;
namespace stdfs = std::filesystem;

namespace {

std::string tiny_program() {
    const char* dir = std::getenv("COBUILD_BIN_DIR");
    return cat(dir == nullptr ? "build/dev/bin" : dir, "/tiny_frontend");
}

/// The program and the libraries it needs, as ldd(1) lists them, below `to`.
void collect(const stdfs::path& to) {
    stdfs::create_directories(to);
    stdfs::copy_file(tiny_program(), to / "tiny");
    process::spawner programs;
    async::runtime rt;
    const auto listed = rt.block_on(programs.capture({.args = {"ldd", tiny_program()}}));
    BOOST_REQUIRE_MESSAGE(listed.status.ok(), listed.err);
    std::istringstream lines(listed.out);
    for (std::string line; std::getline(lines, line);) {
        const auto from = line.find('/');
        if (from == std::string::npos) continue;
        const stdfs::path file = line.substr(from, line.find(' ', from) - from);
        stdfs::create_directories(to / file.parent_path().relative_path());
        stdfs::copy_file(file, to / file.relative_path(), stdfs::copy_options::overwrite_existing);
    }
}

/// The image example.com/tiny in the engine's store.
async::task<void> make_image(served& s) {
    const auto context = s.dir / "tiny-context";
    collect(context / "root");
    build::build_request r;
    r.context = context;
    r.dockerfile_text =
        "FROM scratch\nCOPY root /\nENV LD_LIBRARY_PATH=/usr/lib/x86_64-linux-gnu:/lib/x86_64-linux-gnu\nENTRYPOINT [\"/tiny\"]\n"
        "LABEL moby.buildkit.frontend.caps=moby.buildkit.frontend.inputs,my.cap moby.buildkit.frontend.network.none=true\n";
    r.tags = {"example.com/tiny:1"};
    (void)co_await s.engine->build(std::move(r));
}

void with_frontend(std::function<async::task<void>(served&)> work, const std::function<void(daemon::options&)>& change = {}) {
    with_daemon(
        [work](served& s) -> async::task<void> {
            const auto run = [](served& on, std::function<async::task<void>(served&)> what) -> async::task<void> {
                co_await make_image(on);
                co_await what(on);
            };
            return run(s, work);
        },
        change);
}

wire::SolveRequest request(std::map<std::string, std::string> attrs) {
    wire::SolveRequest r;
    r.set_ref(random_id());
    r.set_frontend("gateway.v0");
    for (auto& [key, value] : attrs) (*r.mutable_frontend_attrs())[key] = value;
    return r;
}

/// A build with that frontend whose client looks at the result's one file.
async::task<std::string> told(served& s, std::map<std::string, std::string> attrs, std::map<std::string, std::string> inputs = {}) {
    rpc::status end;
    std::string out;
    co_await drive(
        s, random_id(),
        [&s, &out, attrs, inputs](rpc::metadata m) -> async::task<void> {
            const auto ask = [](served& on, rpc::metadata meta, std::map<std::string, std::string> opts, std::map<std::string, std::string> given,
                                std::string* to) -> async::task<void> {
                std::exception_ptr failed;
                try {
                    bridge::SolveRequest q;
                    q.set_frontend("gateway.v0");
                    q.set_allow_result_return(true);
                    q.set_allow_result_array_ref(true);
                    for (auto& [key, value] : opts) (*q.mutable_frontend_opt())[key] = value;
                    for (auto& [key, value] : given) (*q.mutable_frontend_inputs())[key] = value;
                    const auto solved = co_await call<bridge::SolveResponse>(on, cat(gateway, "Solve"), q, meta);
                    BOOST_TEST(solved.result().metadata().at("containerimage.config").find("made.by") != std::string::npos);
                    bridge::ReadFileRequest read;
                    read.set_ref(solved.result().ref().id());
                    read.set_file_path("/told");
                    *to = (co_await call<bridge::ReadFileResponse>(on, cat(gateway, "ReadFile"), read, meta)).data();
                } catch (...) {
                    failed = std::current_exception();
                }
                (void)co_await call<bridge::ReturnResponse>(on, cat(gateway, "Return"), bridge::ReturnRequest(), meta);
                if (failed) std::rethrow_exception(failed);
            };
            return ask(s, std::move(m), attrs, inputs, &out);
        },
        &end);
    BOOST_TEST(end.ok(), end.message);
    co_return out;
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_frontend_image_builds) {
    with_frontend([](served& s) -> async::task<void> {
        BOOST_TEST(co_await told(s, {{"source", "example.com/tiny:1"}, {"target", "x"}}) ==
                   "cmdline=\nsource=example.com/tiny:1\ntarget=x\nproduct=buildkit\nworkers=1\n");
        // Its inputs, as its caller gives them.
        llb::graph g;
        const auto input = llb::marshal(g.finish(g.add({.inputs = {}, .what = llb::source_op{"local://x", {}}, .platform = {}})));
        BOOST_TEST((co_await told(s, {{"source", "example.com/tiny:1"}}, {{"base", input}})).ends_with(cat("input base ", input.size(), "\n")));
        // As the whole build.
        (void)co_await call<wire::SolveResponse>(s, cat(control, "Solve"), request({{"source", "example.com/tiny:1"}}));
    });
}

BOOST_AUTO_TEST_CASE(what_a_frontend_image_says_is_what_its_caller_hears) {
    with_frontend([](served& s) -> async::task<void> {
        const auto why = [&s](std::map<std::string, std::string> attrs) {
            return failure(call<wire::SolveResponse>(s, cat(control, "Solve"), request(std::move(attrs))));
        };
        BOOST_TEST(says(co_await why({{"source", "example.com/tiny:1"}, {"build-arg:fail", "1"}}), "the tiny frontend gave up"));
        const auto silent = co_await why({{"source", "example.com/tiny:1"}, {"build-arg:exit", "1"}});
        BOOST_TEST(says(silent, "the frontend example.com/tiny:1 ended with exit code 9: no idea"));
        BOOST_TEST(says(co_await why({{"source", "example.com/tiny:1"}, {"frontend.caps", "my.cap,other.cap"}}),
                        "unsupported frontend capability other.cap"));
        BOOST_TEST(says(co_await why({}), "no source specified for gateway"));
        BOOST_TEST(says(co_await why({{"source", "example.com/tiny:1"}, {"gateway-devel", ""}}), "development gateway"));
    });
}

BOOST_AUTO_TEST_CASE(only_allowed_frontend_images_run) {
    with_frontend(
        [](served& s) -> async::task<void> {
            const auto e = co_await failure(call<wire::SolveResponse>(s, cat(control, "Solve"), request({{"source", "example.com/tiny:1"}})));
            BOOST_TEST((e.kind() == errc::permission));
            BOOST_TEST(says(e, "'example.com/tiny:1' is not an allowed gateway source"));
        },
        [](daemon::options& o) { o.settings.frontend.allowed_repositories = {"example.com/other", "docker/dockerfile:1"}; });
    with_frontend(
        [](served& s) -> async::task<void> {
            (void)co_await call<wire::SolveResponse>(s, cat(control, "Solve"), request({{"source", "example.com/tiny:1"}}));
        },
        [](daemon::options& o) { o.settings.frontend.allowed_repositories = {"example.com/tiny"}; });
}

BOOST_AUTO_TEST_CASE(a_syntax_directive_names_the_frontend) {
    with_frontend([](served& s) -> async::task<void> {
        const auto out = s.dir / "out";
        build::build_request r;
        stdfs::create_directories(s.dir / "ctx");
        const std::string dockerfile = "# syntax=example.com/tiny:1 and more\nANYTHING at all\n";
        write_file(s.dir / "ctx/Dockerfile", dockerfile);
        r.context = s.dir / "ctx";
        r.target = "t";
        r.outputs = {{.type = "local", .attributes = {{"dest", out.string()}}}};
        (void)co_await s.engine->build(r);
        BOOST_TEST(read_file(out / "told") ==
                   cat("cmdline=example.com/tiny:1 and more\nsource=example.com/tiny:1\ntarget=t\nproduct=buildkit\nworkers=1\n", dockerfile));
        // The image has the configuration that the frontend gave.
        r.outputs = {{.type = "image", .attributes = {{"name", "made:1"}}}};
        const auto built = co_await s.engine->build(r);
        BOOST_TEST((co_await s.engine->read_blob(built.config_digest, 0, 0)).find(R"("made.by":"tiny")") != std::string::npos);
        // From standard input.
        r.outputs = {{.type = "local", .attributes = {{"dest", (s.dir / "out2").string()}}}};
        r.dockerfile_text = dockerfile;
        (void)co_await s.engine->build(r);
        BOOST_TEST(read_file(s.dir / "out2/told") == read_file(out / "told"));
        r.dockerfile_text = "FROM scratch\n";
        r.build_args["BUILDKIT_SYNTAX"] = "example.com/tiny:1";
        r.build_args["fail"] = "1";
        BOOST_TEST(says(co_await failure(s.engine->build(r)), "the tiny frontend gave up"));
    });
}

namespace {

/// What a build warns of.
async::task<std::vector<std::string>> warnings_of(served& s, std::string ref) {
    auto status = s.channel->open(cat(control, "Status"));
    wire::StatusRequest q;
    q.set_ref(ref);
    BOOST_TEST(co_await status->write(q.SerializeAsString()));
    co_await status->writes_done();
    std::vector<std::string> out;
    while (const auto bytes = co_await status->read()) {
        wire::StatusResponse r;
        BOOST_TEST(r.ParseFromString(*bytes));
        for (const auto& w : r.warnings()) out.push_back(w.short_());
    }
    co_return out;
}

std::string small_definition() {
    llb::graph g;
    llb::file_op f;
    f.actions.push_back(
        {.input = llb::scratch, .secondary_input = llb::scratch, .output = 0, .what = llb::mkfile_action{.path = "/f", .mode = 0644, .data = "x"}});
    return llb::marshal(g.finish(g.add({.inputs = {}, .what = std::move(f), .platform = {}})));
}

}  // namespace

BOOST_AUTO_TEST_CASE(platforms_that_were_asked_for_and_not_built_are_warned_of) {
    with_daemon([](served& s) -> async::task<void> {
        wire::SolveRequest r;
        r.set_definition(small_definition());
        r.set_ref("plain");
        (void)co_await call<wire::SolveResponse>(s, cat(control, "Solve"), r);
        BOOST_TEST((co_await warnings_of(s, "plain")).empty());
        r.set_ref("several");
        (*r.mutable_frontend_attrs())["platform"] = "linux/amd64,linux/arm64";
        (void)co_await call<wire::SolveResponse>(s, cat(control, "Solve"), r);
        // A frontend that says what it built.
        r.clear_definition();
        r.set_ref("stated");
        auto solving = s.channel->open(cat(control, "Solve"));
        BOOST_TEST(co_await solving->write(r.SerializeAsString()));
        co_await solving->writes_done();
        bridge::ReturnRequest result;
        for (const auto* p : {"linux/amd64", "linux/arm64"}) (*result.mutable_result()->mutable_refs()->mutable_refs())[p].set_id("");
        (*result.mutable_result()->mutable_metadata())["refs.platforms"] =
            R"({"Platforms":[{"ID":"linux/amd64","Platform":{"architecture":"amd64","os":"linux"}},)"
            R"({"ID":"linux/arm64","Platform":{"architecture":"arm64","os":"linux"}}]})";
        (void)co_await call<bridge::ReturnResponse>(s, cat(gateway, "Return"), result, rpc::metadata{{"buildkit-controlapi-buildid", "stated"}});
        (void)co_await solving->read();
        const auto end = co_await solving->finish();
        BOOST_TEST(end.ok(), end.message);
        BOOST_TEST((co_await warnings_of(s, "stated")).empty());
        const std::vector<std::string> expected{"Multiple platforms requested but result is not multi-platform"};
        BOOST_TEST((co_await warnings_of(s, "several")) == expected, boost::test_tools::per_element());
    });
}

BOOST_AUTO_TEST_CASE(a_frontend_may_name_the_image) {
    with_daemon([](served& s) -> async::task<void> {
        wire::SolveRequest r;
        r.set_ref("named");
        auto* e = r.add_exporters();
        e->set_type("image");
        (*e->mutable_attrs())["name"] = "*";
        auto solving = s.channel->open(cat(control, "Solve"));
        BOOST_TEST(co_await solving->write(r.SerializeAsString()));
        co_await solving->writes_done();
        bridge::ReturnRequest result;
        (void)result.mutable_result()->mutable_ref();  // an empty root
        (*result.mutable_result()->mutable_metadata())["image.name"] = "example.com/by-frontend:1";
        (void)co_await call<bridge::ReturnResponse>(s, cat(gateway, "Return"), result, rpc::metadata{{"buildkit-controlapi-buildid", "named"}});
        const auto bytes = co_await solving->read();
        const auto end = co_await solving->finish();
        BOOST_REQUIRE_MESSAGE(end.ok(), end.message);
        wire::SolveResponse answer;
        BOOST_REQUIRE(bytes && answer.ParseFromString(*bytes));
        BOOST_TEST(answer.exporter_response().at("image.name") == "example.com/by-frontend:1");
    });
}

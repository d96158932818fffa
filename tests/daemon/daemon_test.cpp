// The daemon as its clients see it: every method over a real socket, and a session whose services the test gives.
#include "support/support.hpp"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <array>
#include <chrono>
#include <cstring>
#include <deque>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/write.hpp>

#include "control.pb.h"
#include "gateway.pb.h"
#include "session.pb.h"
#include "status.pb.h"

import cobuild.base;
import cobuild.async;
import cobuild.build;
import cobuild.config;
import cobuild.daemon;
import cobuild.llb;
import cobuild.rpc;

#include "daemon/served.hpp"

#include "daemon/client_session.hpp"
#include "support/failure.hpp"

using namespace cobuild;
using namespace std::chrono_literals;
using namespace cobuild::test;
namespace wire = moby::buildkit::v1;
namespace bridge = moby::buildkit::v1::frontend;

namespace {

/// FROM scratch with one file in it.
std::string one_file(const std::string& path, const std::string& text) {
    llb::graph g;
    llb::file_op f;
    f.actions.push_back(
        {.input = llb::scratch, .secondary_input = llb::scratch, .output = 0, .what = llb::mkfile_action{.path = path, .mode = 0644, .data = text}});
    return llb::marshal(g.finish(g.add({.inputs = {}, .what = std::move(f), .platform = {}})));
}

wire::SolveRequest solve_request(const std::string& ref) {
    wire::SolveRequest r;
    r.set_ref(ref);
    r.set_definition(one_file("/hello", "hi"));
    return r;
}

}  // namespace

BOOST_AUTO_TEST_CASE(it_tells_who_it_is) {
    with_daemon([](served& s) -> async::task<void> {
        const auto info = co_await call<wire::InfoResponse>(s, cat(control, "Info"), wire::InfoRequest());
        BOOST_TEST(info.buildkit_version().package() == "cobuild");
        const auto workers = co_await call<wire::ListWorkersResponse>(s, cat(control, "ListWorkers"), wire::ListWorkersRequest());
        BOOST_REQUIRE(workers.record_size() == 1);
        BOOST_TEST(workers.record(0).labels().at("org.mobyproject.buildkit.worker.executor") == "oci");
        BOOST_TEST(workers.record(0).platforms(0).os() == "linux");
        BOOST_TEST(workers.record(0).gc_policy_size() == 4);
        const auto again = co_await call<wire::ListWorkersResponse>(s, cat(control, "ListWorkers"), wire::ListWorkersRequest());
        BOOST_TEST(again.record(0).id() == workers.record(0).id());
        moby::session::HealthCheckRequest q;
        const auto health = co_await call<moby::session::HealthCheckResponse>(s, "/grpc.health.v1.Health/Check", q);
        BOOST_TEST(health.status() == moby::session::HealthCheckResponse::SERVING);
    });
}

BOOST_AUTO_TEST_CASE(unknown_methods_are_refused_by_name) {
    with_daemon([](served& s) -> async::task<void> {
        const auto e = co_await failure(s.channel->unary(cat(control, "Nothing"), ""));
        BOOST_TEST((e.kind() == errc::unsupported));
        BOOST_TEST(says(e, "Control/Nothing is not supported"));
    });
}

BOOST_AUTO_TEST_CASE(a_definition_is_built_and_its_steps_are_told) {
    with_daemon([](served& s) -> async::task<void> {
        auto status = s.channel->open(cat(control, "Status"));
        wire::StatusRequest q;
        q.set_ref("b1");
        BOOST_TEST(co_await status->write(q.SerializeAsString()));  // before the build is known
        co_await status->writes_done();
        (void)co_await call<wire::SolveResponse>(s, cat(control, "Solve"), solve_request("b1"));
        std::map<std::string, wire::Vertex> seen;
        while (const auto bytes = co_await status->read()) {
            wire::StatusResponse r;
            BOOST_TEST(r.ParseFromString(*bytes));
            for (const auto& v : r.vertexes()) seen[v.name()] = v;
        }
        BOOST_TEST((co_await status->finish()).ok());
        BOOST_REQUIRE(seen.contains("mkfile /hello"));
        BOOST_TEST(seen["mkfile /hello"].has_completed());
        BOOST_TEST(seen["mkfile /hello"].error().empty());
    });
}

// Only a request without a definition leaves the build to its client; one of an empty root is a build like any other.
BOOST_AUTO_TEST_CASE(an_empty_definition_is_a_result) {
    with_daemon([](served& s) -> async::task<void> {
        wire::SolveRequest r;
        r.set_ref("empty");
        r.set_definition("");
        (void)co_await call<wire::SolveResponse>(s, cat(control, "Solve"), r);
    });
}

BOOST_AUTO_TEST_CASE(a_ref_serves_one_build) {
    with_daemon([](served& s) -> async::task<void> {
        (void)co_await call<wire::SolveResponse>(s, cat(control, "Solve"), solve_request("b1"));
        const auto e = co_await failure(call<wire::SolveResponse>(s, cat(control, "Solve"), solve_request("b1")));
        BOOST_TEST((e.kind() == errc::exists));
        const auto none = co_await failure(call<wire::SolveResponse>(s, cat(control, "Solve"), solve_request("")));
        BOOST_TEST((none.kind() == errc::invalid));
    });
}

BOOST_AUTO_TEST_CASE(the_history_keeps_what_was_built) {
    with_daemon([](served& s) -> async::task<void> {
        (void)co_await call<wire::SolveResponse>(s, cat(control, "Solve"), solve_request("kept"));
        auto internal = solve_request("hidden");
        internal.set_internal(true);
        (void)co_await call<wire::SolveResponse>(s, cat(control, "Solve"), internal);
        const auto list = [](served& from, std::string filter) -> async::task<std::vector<std::string>> {
            wire::BuildHistoryRequest q;
            q.set_early_exit(true);
            if (!filter.empty()) q.add_filter(filter);
            auto stream = from.channel->open(cat(control, "ListenBuildHistory"));
            BOOST_TEST(co_await stream->write(q.SerializeAsString()));
            co_await stream->writes_done();
            std::vector<std::string> out;
            while (const auto bytes = co_await stream->read()) {
                wire::BuildHistoryEvent e;
                BOOST_TEST(e.ParseFromString(*bytes));
                BOOST_TEST(e.type() == wire::COMPLETE);
                BOOST_TEST(e.record().num_total_steps() > 0);
                BOOST_TEST(e.record().logs().media_type() == "application/vnd.buildkit.status.v0");
                out.push_back(e.record().ref());
            }
            const auto end = co_await stream->finish();
            if (!end.ok()) throw rpc::to_error(end);
            co_return out;
        };
        const std::vector<std::string> only{"kept"};
        BOOST_TEST((co_await list(s, "") == only));
        BOOST_TEST((co_await list(s, "status==completed,ref==kept") == only));
        BOOST_TEST((co_await list(s, "status==error")).empty());
        BOOST_TEST((co_await list(s, "startedAt<1h")).empty());  // longer ago than an hour
        BOOST_TEST((co_await list(s, "startedAt>1h") == only));
        BOOST_TEST(((co_await failure(list(s, "color==red"))).kind() == errc::invalid));
        wire::UpdateBuildHistoryRequest gone;
        gone.set_ref("kept");
        gone.set_delete_(true);
        (void)co_await call<wire::UpdateBuildHistoryResponse>(s, cat(control, "UpdateBuildHistory"), gone);
        BOOST_TEST((co_await list(s, "")).empty());
        BOOST_TEST(
            ((co_await failure(call<wire::UpdateBuildHistoryResponse>(s, cat(control, "UpdateBuildHistory"), gone))).kind() == errc::not_found));
    });
}

BOOST_AUTO_TEST_CASE(disk_use_is_told_and_given_back) {
    with_daemon([](served& s) -> async::task<void> {
        (void)co_await call<wire::SolveResponse>(s, cat(control, "Solve"), solve_request("b"));
        const auto before = co_await call<wire::DiskUsageResponse>(s, cat(control, "DiskUsage"), wire::DiskUsageRequest());
        BOOST_REQUIRE(before.record_size() == 1);
        BOOST_TEST(before.record(0).record_type() == "regular");
        wire::PruneRequest all;
        all.set_all(true);
        auto stream = s.channel->open(cat(control, "Prune"));
        BOOST_TEST(co_await stream->write(all.SerializeAsString()));
        co_await stream->writes_done();
        int removed = 0;
        while (co_await stream->read()) ++removed;
        BOOST_TEST((co_await stream->finish()).ok());
        BOOST_TEST(removed == 1);
        const auto after = co_await call<wire::DiskUsageResponse>(s, cat(control, "DiskUsage"), wire::DiskUsageRequest());
        BOOST_TEST(after.record_size() == 0);
    });
}

BOOST_AUTO_TEST_CASE(a_client_drives_its_build) {
    with_daemon([](served& s) -> async::task<void> {
        rpc::status end;
        co_await drive(
            s, "d1",
            [&s](rpc::metadata m) -> async::task<void> {
                const auto pong = co_await call<bridge::PongResponse>(s, cat(gateway, "Ping"), bridge::PingRequest(), m);
                BOOST_TEST(pong.llb_caps_size() > 50);
                bridge::SolveRequest q;
                q.set_definition(one_file("/hello", "hi"));
                q.set_allow_result_return(true);
                q.set_allow_result_array_ref(true);
                const auto solved = co_await call<bridge::SolveResponse>(s, cat(gateway, "Solve"), q, m);
                const auto id = solved.result().ref().id();
                BOOST_TEST(!id.empty());
                BOOST_TEST(solved.result().ref().def() == q.definition());
                bridge::ReadFileRequest read;
                read.set_ref(id);
                read.set_file_path("hello");
                BOOST_TEST((co_await call<bridge::ReadFileResponse>(s, cat(gateway, "ReadFile"), read, m)).data() == "hi");
                read.mutable_range()->set_offset(1);
                read.mutable_range()->set_length(1);
                BOOST_TEST((co_await call<bridge::ReadFileResponse>(s, cat(gateway, "ReadFile"), read, m)).data() == "i");
                bridge::ReadDirRequest list;
                list.set_ref(id);
                list.set_dir_path("/");
                const auto entries = co_await call<bridge::ReadDirResponse>(s, cat(gateway, "ReadDir"), list, m);
                BOOST_REQUIRE(entries.entries_size() == 1);
                BOOST_TEST(entries.entries(0).path() == "hello");
                BOOST_TEST(entries.entries(0).mode() == 0644U);
                BOOST_TEST(entries.entries(0).size() == 2);
                bridge::StatFileRequest stat;
                stat.set_ref(id);
                stat.set_path("/");
                BOOST_TEST(((co_await call<bridge::StatFileResponse>(s, cat(gateway, "StatFile"), stat, m)).stat().mode() & 1U << 31) != 0U);
                stat.set_path("/none");
                BOOST_TEST(says(co_await failure(call<bridge::StatFileResponse>(s, cat(gateway, "StatFile"), stat, m)), "no such file"));
                bridge::ReturnRequest result;
                *result.mutable_result()->mutable_ref() = solved.result().ref();
                (void)co_await call<bridge::ReturnResponse>(s, cat(gateway, "Return"), result, m);
            },
            &end);
        BOOST_TEST(end.ok());
    });
}

BOOST_AUTO_TEST_CASE(a_client_returns_an_error) {
    with_daemon([](served& s) -> async::task<void> {
        rpc::status end;
        co_await drive(
            s, "d2",
            [&s](rpc::metadata m) -> async::task<void> {
                bridge::ReturnRequest result;
                result.mutable_error()->set_code(2);
                result.mutable_error()->set_message("the frontend gave up");
                (void)co_await call<bridge::ReturnResponse>(s, cat(gateway, "Return"), result, m);
            },
            &end);
        BOOST_TEST((end.code == rpc::code::unknown));
        BOOST_TEST(end.message == "the frontend gave up");
    });
}

BOOST_AUTO_TEST_CASE(a_bridge_call_needs_a_build) {
    with_daemon([](served& s) -> async::task<void> {
        BOOST_TEST(says(co_await failure(call<bridge::PongResponse>(s, cat(gateway, "Ping"), bridge::PingRequest())), "no buildid"));
    });
}

BOOST_AUTO_TEST_CASE(a_failing_step_tells_where_it_comes_from) {
    with_daemon([](served& s) -> async::task<void> {
        llb::graph g;
        g.set_source({.filename = "Dockerfile", .data = "FROM scratch\nCOPY x /\n", .definition = {}, .language = "Dockerfile"});
        llb::file_op rm;
        rm.actions.push_back({.input = llb::scratch, .secondary_input = llb::scratch, .output = 0, .what = llb::rm_action{.path = "/gone"}});
        const auto step = g.add({.inputs = {}, .what = std::move(rm), .platform = {}}, {}, {{{2, 0}, {2, 0}}});
        wire::SolveRequest r;
        r.set_ref("f");
        r.set_definition(llb::marshal(g.finish(step)));
        auto solving = s.channel->open(cat(control, "Solve"));
        BOOST_TEST(co_await solving->write(r.SerializeAsString()));
        co_await solving->writes_done();
        BOOST_TEST(!(co_await solving->read()).has_value());
        const auto end = co_await solving->finish();
        BOOST_TEST(!end.ok());
        google::rpc::Status details;
        BOOST_TEST(details.ParseFromString(end.details));
        std::map<std::string, std::string> by_type;
        for (const auto& d : details.details()) by_type[d.type_url()] = d.value();
        BOOST_TEST(by_type["github.com/moby/buildkit/errdefs.Vertex+json"] == cat(R"({"digest":")", step.vertex.str(), R"("})"));
        BOOST_TEST(by_type["github.com/moby/buildkit/errdefs.Source+json"].find(R"("ranges":[{"start":{"line":2},"end":{"line":2}}])") !=
                   std::string::npos);
    });
}

// Clients wrap the details from the last to the first, and take the last place that was given for the nearest.
BOOST_AUTO_TEST_CASE(several_places_of_a_step_are_told_the_last_one_first) {
    with_daemon([](served& s) -> async::task<void> {
        llb::graph g;
        g.set_source({.filename = "f", .data = "text", .definition = {}, .language = ""});
        llb::file_op rm;
        rm.actions.push_back({.input = llb::scratch, .secondary_input = llb::scratch, .output = 0, .what = llb::rm_action{.path = "/gone"}});
        const llb::op what{.inputs = {}, .what = std::move(rm), .platform = {}};
        (void)g.add(what, {}, {{{7, 0}, {7, 0}}});
        wire::SolveRequest r;
        r.set_ref("f");
        r.set_definition(llb::marshal(g.finish(g.add(what, {}, {{{9, 0}, {9, 0}}}))));
        auto solving = s.channel->open(cat(control, "Solve"));
        BOOST_TEST(co_await solving->write(r.SerializeAsString()));
        co_await solving->writes_done();
        (void)co_await solving->read();
        google::rpc::Status details;
        BOOST_TEST(details.ParseFromString((co_await solving->finish()).details));
        std::vector<std::string> lines;
        for (const auto& d : details.details())
            if (d.type_url().ends_with("errdefs.Source+json")) lines.push_back(d.value().substr(d.value().find("\"line\":") + 7, 1));
        const std::vector<std::string> expected{"9", "7"};
        BOOST_TEST(lines == expected, boost::test_tools::per_element());
    });
}

BOOST_AUTO_TEST_CASE(entitlements_need_the_daemons_leave) {
    with_daemon([](served& s) -> async::task<void> {
        auto r = solve_request("e");
        r.add_entitlements("network.host");
        const auto e = co_await failure(call<wire::SolveResponse>(s, cat(control, "Solve"), r));
        BOOST_TEST((e.kind() == errc::permission));
        BOOST_TEST(says(e, "granting entitlement network.host is not allowed by build daemon configuration"));
    });
}

BOOST_AUTO_TEST_CASE(a_second_daemon_is_refused) {
    with_daemon([](served& s) -> async::task<void> {
        daemon::options other{.engine = s.engine, .settings = {}, .root = (s.dir / "root").string()};
        other.settings.grpc.address = {"unix://" + (s.dir / "other.sock").string()};
        const auto e = co_await failure(daemon::daemon::open(other));
        BOOST_TEST((e.kind() == errc::exists));
        BOOST_TEST(says(e, cat("process ", ::getpid())));
    });
}

BOOST_AUTO_TEST_CASE(the_socket_is_the_owners_and_goes_in_the_end) {
    std::string path;
    with_daemon([&path](served& s) -> async::task<void> {
        path = (s.dir / "s.sock").string();
        struct stat info{};
        BOOST_TEST(::stat(path.c_str(), &info) == 0);
        BOOST_TEST((info.st_mode & 0777U) == 0660U);
        co_return;
    });
    BOOST_TEST(!std::filesystem::exists(path));
}

BOOST_AUTO_TEST_CASE(plain_tcp_beyond_loopback_is_refused) {
    if (!test::needs_root()) return;
    const auto open = [](bool allow) {
        with_daemon(
            [](served& s) -> async::task<void> {
                BOOST_TEST(s.d->addresses().size() == 2U);
                co_return;
            },
            [allow](daemon::options& o) {
                o.settings.grpc.address.emplace_back("tcp://0.0.0.0:0");
                o.allow_insecure_tcp = allow;
            });
    };
    BOOST_CHECK_EXCEPTION(open(false), error, [](const error& e) { return e.kind() == errc::permission && says(e, "--allow-insecure-tcp"); });
    open(true);
}

// ---------------------------------------------------------------- sessions

namespace {

async::task<rpc::status> take_tar(std::shared_ptr<std::string> to, std::shared_ptr<rpc::call> c) {
    if (c->method() != "/moby.filesync.v1.FileSend/DiffCopy") co_return rpc::status{rpc::code::unimplemented, "not here", {}};
    BOOST_TEST(rpc::value(c->request(), "buildkit-attachable-exporter-id") == "0");
    while (const auto bytes = co_await c->read()) {
        moby::session::BytesMessage m;
        BOOST_TEST(m.ParseFromString(*bytes));
        *to += m.data();
    }
    co_return rpc::status{};
}

}  // namespace

BOOST_AUTO_TEST_CASE(an_archive_goes_to_the_client) {
    with_daemon([](served& s) -> async::task<void> {
        const auto tar = std::make_shared<std::string>();
        client_session session(s, "s1", {"/moby.filesync.v1.FileSend/DiffCopy"},
                               [tar](std::shared_ptr<rpc::call> c) { return take_tar(tar, std::move(c)); });
        auto r = solve_request("x");
        r.set_session("s1");
        r.add_exporters()->set_type("tar");
        std::exception_ptr failed;
        try {
            (void)co_await call<wire::SolveResponse>(s, cat(control, "Solve"), r);
        } catch (...) {
            failed = std::current_exception();
        }
        co_await session.close();
        if (failed) std::rethrow_exception(failed);
        BOOST_REQUIRE(tar->size() >= 1024U);
        BOOST_TEST(tar->substr(0, 5) == "hello");
        BOOST_TEST(tar->substr(257, 5) == "ustar");
        BOOST_TEST(tar->substr(512, 2) == "hi");
    });
}

// A client that hangs is found out by its health, as soon as it asked for.
BOOST_AUTO_TEST_CASE(a_client_that_answers_no_more_ends_its_build) {
    with_daemon([](served& s) -> async::task<void> {
        const auto never = std::make_shared<async::event>();
        const auto hang = [](std::shared_ptr<async::event> until) -> async::task<rpc::status> {
            co_await until->wait();
            co_return rpc::status{};
        };
        client_session session(s, "s1", {"/moby.filesync.v1.FileSend/DiffCopy"},
                               [never, hang](const std::shared_ptr<rpc::call>&) { return hang(never); },
                               {{"x-buildkit-session-health-custom-timeout", "1000"}});
        auto r = solve_request("x");
        r.set_session("s1");
        r.add_exporters()->set_type("tar");
        const auto e = co_await failure(call<wire::SolveResponse>(s, cat(control, "Solve"), r));
        never->set();
        co_await session.close();
        BOOST_TEST(says(e, "the client of the session does not answer"));
    });
}

BOOST_AUTO_TEST_CASE(an_output_needs_a_session_that_takes_it) {
    with_daemon([](served& s) -> async::task<void> {
        auto r = solve_request("x");
        r.add_exporters()->set_type("tar");
        BOOST_TEST(says(co_await failure(call<wire::SolveResponse>(s, cat(control, "Solve"), r)), "no session"));
        auto unknown = solve_request("y");
        unknown.set_session("nobody");
        BOOST_TEST(says(co_await failure(call<wire::SolveResponse>(s, cat(control, "Solve"), unknown)), "no active session for nobody"));
    });
}

// ---------------------------------------------------------------- the frontend in the daemon

BOOST_AUTO_TEST_CASE(the_frontend_builds_from_graphs) {
    with_daemon([](served& s) -> async::task<void> {
        rpc::status end;
        co_await drive(
            s, "g1",
            [&s](rpc::metadata m) -> async::task<void> {
                bridge::SolveRequest q;
                q.set_frontend("dockerfile.v0");
                auto& inputs = *q.mutable_frontend_inputs();
                inputs["dockerfile"] = one_file("/Dockerfile", "FROM scratch\nCOPY in /\nCOPY --from=other hello /copied\n");
                inputs["context"] = one_file("/in", "of the context");
                inputs["o"] = one_file("/hello", "of the other");
                (*q.mutable_frontend_opt())["context:other"] = "input:o";
                q.set_allow_result_return(true);
                q.set_allow_result_array_ref(true);
                const auto solved = co_await call<bridge::SolveResponse>(s, cat(gateway, "Solve"), q, m);
                bridge::ReadFileRequest read;
                read.set_ref(solved.result().ref().id());
                read.set_file_path("in");
                BOOST_TEST((co_await call<bridge::ReadFileResponse>(s, cat(gateway, "ReadFile"), read, m)).data() == "of the context");
                read.set_file_path("copied");
                BOOST_TEST((co_await call<bridge::ReadFileResponse>(s, cat(gateway, "ReadFile"), read, m)).data() == "of the other");
                inputs["context"] = "";
                BOOST_TEST(says(co_await failure(call<bridge::SolveResponse>(s, cat(gateway, "Solve"), q, m)), "invalid nil input definition"));
                // The client's own inputs are none: Solve gave it none.
                BOOST_TEST((co_await call<bridge::InputsResponse>(s, cat(gateway, "Inputs"), bridge::InputsRequest(), m)).definitions().empty());
                bridge::ReturnRequest result;
                *result.mutable_result()->mutable_ref() = solved.result().ref();
                (void)co_await call<bridge::ReturnResponse>(s, cat(gateway, "Return"), result, m);
            },
            &end);
        BOOST_TEST(end.ok());
    });
}

// The lines of the Dockerfile go to the client, and into the record with the whole error.
BOOST_AUTO_TEST_CASE(a_mistake_in_the_dockerfile_is_told_and_kept) {
    with_daemon([](served& s) -> async::task<void> {
        wire::SolveRequest r;
        r.set_ref("bad");
        r.set_frontend("dockerfile.v0");
        (*r.mutable_frontend_inputs())["dockerfile"] = one_file("/Dockerfile", "FROM scratch\nBADCMD \\\n x\n");
        auto solving = s.channel->open(cat(control, "Solve"));
        BOOST_TEST(co_await solving->write(r.SerializeAsString()));
        co_await solving->writes_done();
        BOOST_TEST(!(co_await solving->read()).has_value());
        const auto end = co_await solving->finish();
        BOOST_TEST(end.message == "dockerfile parse error on line 2: unknown instruction: BADCMD");
        google::rpc::Status details;
        BOOST_TEST(details.ParseFromString(end.details));
        std::map<std::string, std::string> by_type;
        for (const auto& d : details.details()) by_type[d.type_url()] = d.value();
        const auto& source = by_type["github.com/moby/buildkit/errdefs.Source+json"];
        BOOST_TEST(source.find(R"("ranges":[{"start":{"line":2},"end":{"line":2}},{"start":{"line":3},"end":{"line":3}}])") != std::string::npos);
        BOOST_TEST(source.find(R"("definition":{"def":[)") != std::string::npos);
        BOOST_TEST(!by_type.contains("github.com/moby/buildkit/errdefs.Vertex+json"));
        BOOST_TEST(by_type["github.com/moby/buildkit/stack.Stack+json"].find(cat("\"pid\":", ::getpid())) != std::string::npos);
        (void)co_await call<wire::SolveResponse>(s, cat(control, "Solve"), solve_request("good"));
        wire::BuildHistoryRequest q;
        q.set_early_exit(true);
        auto stream = s.channel->open(cat(control, "ListenBuildHistory"));
        BOOST_TEST(co_await stream->write(q.SerializeAsString()));
        co_await stream->writes_done();
        std::map<std::string, wire::BuildHistoryRecord> records;
        while (const auto bytes = co_await stream->read()) {
            wire::BuildHistoryEvent e;
            BOOST_TEST(e.ParseFromString(*bytes));
            records[e.record().ref()] = e.record();
        }
        BOOST_TEST((co_await stream->finish()).ok());
        BOOST_TEST(records["bad"].external_error().digest() == digest::of(end.details).str());
        BOOST_TEST(records["bad"].external_error().media_type() == "application/vnd.googeapis.google.rpc.status+proto");
        BOOST_TEST(records["bad"].error().message() == end.message);
        BOOST_TEST(records["bad"].trace().size() > 0);
        BOOST_REQUIRE(records["good"].result().attestations_size() == 1);
        BOOST_TEST(records["good"].result().attestations(0).annotations().at("in-toto.io/predicate-type") == "https://slsa.dev/provenance/v1");
    });
}

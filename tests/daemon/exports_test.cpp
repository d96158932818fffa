// Results that go to the client in several pieces, and what its policies and its frontend say of them.
#include "support/support.hpp"

#include <sys/socket.h>

#include <array>
#include <chrono>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "control.pb.h"
#include "gateway.pb.h"
#include "policysession.pb.h"
#include "status.pb.h"

import cobuild.base;
import cobuild.async;
import cobuild.build;
import cobuild.client;
import cobuild.config;
import cobuild.daemon;
import cobuild.json;
import cobuild.llb;
import cobuild.progress;
import cobuild.rpc;

#include "lending.hpp"
#include "support/failure.hpp"

using namespace cobuild;
using namespace cobuild::test;
namespace stdfs = std::filesystem;
namespace wire = moby::buildkit::v1;
namespace bridge = moby::buildkit::v1::frontend;
namespace verifying = moby::buildkit::v1::sourcepolicy::policysession;

namespace {

template<class R, class Q>
async::task<R> call(lending_daemon& s, std::string method, Q request, rpc::metadata m) {
    R out;
    BOOST_TEST(out.ParseFromString(co_await s.channel->unary(std::move(method), request.SerializeAsString(), std::move(m))));
    co_return out;
}

/// A client that runs its own frontend: Solve with `exporters`, and over the bridge whatever `work` does, which returns the result.
using frontend_work = std::function<async::task<bridge::Result>(lending_daemon&, rpc::metadata)>;

async::task<void> hand_over(lending_daemon& s, std::string ref, frontend_work work, std::shared_ptr<std::exception_ptr> failed) {
    const rpc::metadata m{{"buildkit-controlapi-buildid", ref}};
    bridge::ReturnRequest back;
    try {
        *back.mutable_result() = co_await work(s, m);
    } catch (...) {
        *failed = std::current_exception();
    }
    if (*failed) back.mutable_error()->set_code(2);
    (void)co_await call<bridge::ReturnResponse>(s, "/moby.buildkit.v1.frontend.LLBBridge/Return", back, m);
}

async::task<void> build_by(lending_daemon& s, std::string ref, std::vector<client::exporter> exporters, client::session_options lends,
                           frontend_work work) {
    client::session lent(s.engine->runtime().get_executor(), s.engine->runtime().pool(), std::move(lends));
    async::task_group session(s.engine->runtime().get_executor(), true);
    session.spawn(lent.run(s.channel));
    wire::SolveRequest r;
    r.set_ref(ref);
    r.set_session(lent.id());
    for (const auto& e : exporters) {
        auto* x = r.add_exporters();
        x->set_type(e.type);
        x->mutable_attrs()->insert(e.attrs.begin(), e.attrs.end());
    }
    auto solving = s.channel->open("/moby.buildkit.v1.Control/Solve");
    BOOST_TEST(co_await solving->write(r.SerializeAsString()));
    co_await solving->writes_done();
    const auto failed = std::make_shared<std::exception_ptr>();
    co_await hand_over(s, ref, std::move(work), failed);
    while (co_await solving->read()) {
    }
    const auto end = co_await solving->finish();
    session.cancel();
    std::exception_ptr ignored;
    try {
        co_await session.join();
    } catch (...) {
        ignored = std::current_exception();
    }
    if (*failed) std::rethrow_exception(*failed);
    if (!end.ok()) throw rpc::to_error(end);
}

async::task<bridge::Ref> solved(lending_daemon& s, rpc::metadata m, std::string definition) {
    bridge::SolveRequest q;
    q.set_definition(std::move(definition));
    q.set_allow_result_return(true);
    q.set_allow_result_array_ref(true);
    const auto r = co_await call<bridge::SolveResponse>(s, "/moby.buildkit.v1.frontend.LLBBridge/Solve", q, m);
    co_return r.result().ref();
}

constexpr const char* platforms =
    R"({"Platforms":[{"ID":"linux/amd64","Platform":{"architecture":"amd64","os":"linux"}},{"ID":"linux/arm64","Platform":{"architecture":"arm64","os":"linux"}}]})";

/// One file for each of two platforms, with an attestation of a predicate in a file.
async::task<bridge::Result> two_platforms(lending_daemon& s, rpc::metadata m) {
    bridge::Result out;
    const auto predicate = co_await solved(s, m, file_definition("/fact.json", R"({"success":true})"));
    for (const std::string platform : {"linux/amd64", "linux/arm64"}) {
        (*out.mutable_refs()->mutable_refs())[platform] = co_await solved(s, m, file_definition("/greeting", cat("hello ", platform)));
        auto* a = (*out.mutable_attestations())[platform].add_attestation();
        a->set_kind(bridge::IN_TOTO);
        *a->mutable_ref() = predicate;
        a->set_path("/fact.json");
        a->set_in_toto_predicate_type("https://example.com/attestations/v1.0");
        a->add_in_toto_subjects()->set_kind(bridge::SELF);
        auto* raw = a->add_in_toto_subjects();
        raw->set_kind(bridge::RAW);
        raw->set_name("something");
        raw->add_digest(digest::of(std::string_view("x")).str());
    }
    (*out.mutable_metadata())["refs.platforms"] = platforms;
    co_return out;
}

client::session_options target(const stdfs::path& directory) {
    client::session_options out;
    out.targets[0] = {.directory = directory, .file = {}};
    return out;
}

}  // namespace

BOOST_AUTO_TEST_CASE(platforms_and_their_attestations_go_into_directories_of_their_own) {
    with_lending_daemon([](lending_daemon& s) -> async::task<void> {
        const auto out = s.dir / "out";
        co_await build_by(s, "b1", {{.type = "local", .attrs = {{"attestation-prefix", "test."}}}}, target(out), two_platforms);
        for (const std::string platform : {"amd64", "arm64"}) {
            BOOST_TEST(read_file(out / cat("linux_", platform) / "greeting") == cat("hello linux/", platform));
            const auto statement = json::parse(read_file(out / cat("linux_", platform) / "test.fact.json"));
            BOOST_TEST(json::string_at(statement.as_object(), "predicateType") == "https://example.com/attestations/v1.0");
            BOOST_TEST(json::serialize(json::at(statement.as_object(), "predicate")) == R"({"success":true})");
            const auto& subjects = json::at(statement.as_object(), "subject").as_array();
            BOOST_REQUIRE(subjects.size() == 2U);
            BOOST_TEST(json::string_at(subjects[0].as_object(), "name") == "greeting");
            BOOST_TEST(json::string_at(json::at(subjects[0].as_object(), "digest").as_object(), "sha256") ==
                       digest::of(cat("hello linux/", platform)).hex());
            BOOST_TEST(json::string_at(subjects[1].as_object(), "name") == "something");
        }
    });
}

BOOST_AUTO_TEST_CASE(without_the_split_platforms_share_a_directory_unless_they_meet) {
    with_lending_daemon([](lending_daemon& s) -> async::task<void> {
        const auto apart = [](lending_daemon& d, rpc::metadata m) -> async::task<bridge::Result> {
            bridge::Result out;
            for (const std::string platform : {"linux/amd64", "linux/arm64"})
                (*out.mutable_refs()->mutable_refs())[platform] =
                    co_await solved(d, m, file_definition(cat("/hello-", platform.substr(6)), platform));
            (*out.mutable_metadata())["refs.platforms"] = platforms;
            co_return out;
        };
        const client::exporter together{.type = "local", .attrs = {{"platform-split", "false"}}};
        co_await build_by(s, "b1", {together}, target(s.dir / "out"), apart);
        BOOST_TEST(read_file(s.dir / "out/hello-amd64") == "linux/amd64");
        BOOST_TEST(read_file(s.dir / "out/hello-arm64") == "linux/arm64");
        const auto e = co_await failure(build_by(s, "b2", {together}, target(s.dir / "none"), two_platforms));
        BOOST_TEST(says(e, "cannot overwrite greeting from linux/amd64 with linux/arm64 when split option is disabled"));
    });
}

BOOST_AUTO_TEST_CASE(what_the_frontend_says_of_the_image_counts) {
    with_lending_daemon([](lending_daemon& s) -> async::task<void> {
        client::session_options lends;
        lends.stores["export"] = s.dir / "layout";
        const auto named = [](lending_daemon& d, rpc::metadata m) -> async::task<bridge::Result> {
            bridge::Result out;
            *out.mutable_ref() = co_await solved(d, m, file_definition("/a", "a"));
            (*out.mutable_metadata())["image.name"] = "docker.io/library/named:v1";
            (*out.mutable_metadata())["annotation.from-frontend"] = "yes";
            (*out.mutable_metadata())["annotation.both"] = "frontend";
            co_return out;
        };
        const std::string config = R"({"architecture":"amd64","os":"linux","config":{"Labels":{"a":"b"}}})";
        const client::exporter exporter{
            .type = "oci",
            .attrs = {{"tar", "false"}, {"name", "*"}, {"annotation.both", "exporter"}, {"containerimage.config", config}, {"unknown", "x"}}};
        co_await build_by(s, "b1", {exporter}, lends, named);
        bool found = false;
        for (const auto& e : stdfs::directory_iterator(s.dir / "layout/blobs/sha256")) {
            const auto text = read_file(e.path());
            if (text.find("\"layers\": [") != std::string::npos) {
                const auto manifest = json::parse(text);
                const auto& annotations = json::at(manifest.as_object(), "annotations").as_object();
                BOOST_TEST(json::string_at(annotations, "from-frontend") == "yes");
                BOOST_TEST(json::string_at(annotations, "both") == "exporter");
                found = true;
            } else if (text.find("\"rootfs\"") != std::string::npos) {
                BOOST_TEST(text.find(R"("Labels":{"a":"b"})") != std::string::npos);
            }
        }
        BOOST_TEST(found);
    });
}

BOOST_AUTO_TEST_CASE(a_result_that_says_nonsense_is_refused) {
    with_lending_daemon([](lending_daemon& s) -> async::task<void> {
        int n = 0;
        for (const auto& [key, value, why] : std::vector<std::array<std::string, 3>>{
                 {"containerimage.config", "null", "invalid null image config for export"},
                 {"containerimage.config", R"({"architecture":"amd64"})", "os and architecture must be specified together"},
                 {"refs.platforms", "null", "invalid empty platforms index for exporter"},
                 {"refs.platforms", R"({"Platforms":[{}]})", "invalid empty platform key for exporter"},
                 {"refs.platforms", R"({"Platforms":[{"ID":"foo","Platform":{"architecture":"","os":""}}]})", "invalid platform value"}}) {
            const auto says_it = [key, value](lending_daemon& d, rpc::metadata m) -> async::task<bridge::Result> {
                const auto make = [](lending_daemon& with, rpc::metadata meta, std::string k, std::string v) -> async::task<bridge::Result> {
                    bridge::Result out;
                    *out.mutable_ref() = co_await solved(with, meta, file_definition("/a", "a"));
                    (*out.mutable_metadata())[k] = v;
                    co_return out;
                };
                return make(d, std::move(m), key, value);
            };
            const auto e = co_await failure(build_by(s, cat("b", ++n), {{.type = "image", .attrs = {}}}, {}, says_it));
            BOOST_TEST(says(e, why), e.what());
        }
    });
}

BOOST_AUTO_TEST_CASE(a_frontend_speaks_of_no_provenance) {
    with_lending_daemon([](lending_daemon& s) -> async::task<void> {
        const auto forged = [](lending_daemon& d, rpc::metadata m) -> async::task<bridge::Result> {
            bridge::Result out;
            *out.mutable_ref() = co_await solved(d, m, file_definition("/p.json", "{}"));
            auto* a = (*out.mutable_attestations())[""].add_attestation();
            *a->mutable_ref() = out.ref();
            a->set_path("/p.json");
            a->set_in_toto_predicate_type("https://slsa.dev/provenance/v1");
            co_return out;
        };
        BOOST_TEST(says(co_await failure(build_by(s, "b1", {{.type = "image", .attrs = {}}}, {}, forged)), "frontend may not set provenance"));
    });
}

BOOST_AUTO_TEST_CASE(one_build_has_several_outputs) {
    with_lending_daemon([](lending_daemon& s) -> async::task<void> {
        client::build_request r;
        r.exporters = {{.type = "local", .attrs = {}}, {.type = "tar", .attrs = {}}, {.type = "oci", .attrs = {}}, {.type = "local", .attrs = {}}};
        r.lends.targets[0] = {.directory = s.dir / "first", .file = {}};
        r.lends.targets[1] = {.directory = {}, .file = s.dir / "out.tar"};
        r.lends.targets[2] = {.directory = {}, .file = s.dir / "oci.tar"};
        r.lends.targets[3] = {.directory = s.dir / "second", .file = {}};
        (void)co_await s.build(file_definition("/hello", "hi"), std::move(r));
        BOOST_TEST(read_file(s.dir / "first/hello") == "hi");
        BOOST_TEST(read_file(s.dir / "second/hello") == "hi");
        BOOST_TEST(read_file(s.dir / "out.tar").substr(0, 5) == "hello");
        BOOST_TEST(read_file(s.dir / "oci.tar").find("oci-layout") != std::string::npos);
    });
}

// ---------------------------------------------------------------- policies

BOOST_AUTO_TEST_CASE(a_policy_denies_and_converts_sources) {
    with_lending_daemon([](lending_daemon& s) -> async::task<void> {
        for (const std::string name : {"a", "b"}) {
            stdfs::create_directories(s.dir.path() / name);
            write_file(s.dir.path() / name / "file", name);
        }
        const auto lent = [&s] {
            auto r = into(s.dir / "out");
            r.lends.directories = {{"a", s.dir / "a"}, {"b", s.dir / "b"}};
            return r;
        };
        auto deny = lent();
        deny.source_policy = R"({"rules":[{"action":"DENY","selector":{"identifier":"local://*"}}]})";
        const auto e = co_await failure(s.build(source_definition("local://a"), std::move(deny)));
        BOOST_TEST(says(e, R"(source "local://a" denied by policy)"));
        auto convert = lent();
        convert.source_policy = R"({"rules":[{"action":"CONVERT","selector":{"identifier":"local://a"},"updates":{"identifier":"local://b"}}]})";
        (void)co_await s.build(source_definition("local://a"), std::move(convert));
        BOOST_TEST(read_file(s.dir / "out/file") == "b");
    });
}

namespace {
/// A session that decides about sources: what it is asked, and how it answers.
struct verifier {
    std::vector<verifying::CheckPolicyRequest> asked;
    std::function<verifying::CheckPolicyResponse(const verifying::CheckPolicyRequest&)> decide;
};

async::task<rpc::status> answer(std::shared_ptr<verifier> v, std::shared_ptr<rpc::call> c) {
    return rpc::unary(std::move(c), [v](std::string bytes) -> async::task<std::string> {
        const auto decide = [](std::shared_ptr<verifier> who, std::string request) -> async::task<std::string> {
            verifying::CheckPolicyRequest q;
            BOOST_TEST(q.ParseFromString(request));
            who->asked.push_back(q);
            co_return who->decide(q).SerializeAsString();
        };
        return decide(v, std::move(bytes));
    });
}

/// Control.Session for a verifier alone: bytes between the tunnel and a server's socket.
class verifier_session {
public:
    verifier_session(lending_daemon& s, std::string id, std::shared_ptr<verifier> v)
        : pool_(s.engine->runtime().pool()), group_(s.engine->runtime().get_executor(), true) {
        std::array<int, 2> ends{};
        BOOST_REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) == 0);
        ours_ = std::make_shared<unique_fd>(ends[0]);
        server_ = std::make_unique<rpc::server>(s.engine->runtime().get_executor(), pool_,
                                                [v](std::shared_ptr<rpc::call> c) { return answer(v, std::move(c)); });
        server_->adopt(unique_fd{ends[1]});
        stream_ =
            s.channel->open("/moby.buildkit.v1.Control/Session",
                            {{"x-docker-expose-session-uuid", std::move(id)},
                             {"x-docker-expose-session-grpc-method", "/moby.buildkit.v1.sourcepolicy.policysession.PolicyVerifier/CheckPolicy"}});
        group_.spawn(up(pool_, ours_, stream_));
        group_.spawn(down(pool_, ours_, stream_));
    }
    async::task<void> close() {
        co_await async::no_cancel;
        ::shutdown(ours_->get(), SHUT_RDWR);
        stream_->cancel();
        std::exception_ptr ignored;
        try {
            co_await group_.join();
        } catch (...) {
            ignored = std::current_exception();
        }
        co_await server_->stop(std::chrono::seconds(0));
    }

private:
    static async::task<void> up(async::blocking_pool& pool, std::shared_ptr<unique_fd> from, std::shared_ptr<rpc::stream> to) {
        for (;;) {
            const auto data = co_await pool.run([from] {
                std::string out(32768, '\0');
                const auto n = ::recv(from->get(), out.data(), out.size(), 0);
                out.resize(n > 0 ? static_cast<std::size_t>(n) : 0);
                return out;
            });
            if (data.empty()) co_return;
            wire::BytesMessage m;
            m.set_data(data);
            if (!co_await to->write(m.SerializeAsString())) co_return;
        }
    }
    static async::task<void> down(async::blocking_pool& pool, std::shared_ptr<unique_fd> to, std::shared_ptr<rpc::stream> from) {
        while (const auto bytes = co_await from->read()) {
            wire::BytesMessage m;
            m.ParseFromString(*bytes);
            co_await pool.run([&] { (void)::send(to->get(), m.data().data(), m.data().size(), MSG_NOSIGNAL); });
        }
    }
    async::blocking_pool& pool_;
    std::shared_ptr<unique_fd> ours_;
    std::shared_ptr<rpc::stream> stream_;
    std::unique_ptr<rpc::server> server_;
    async::task_group group_;
};

async::task<rpc::status> solve_with(lending_daemon& s, std::string ref, std::string definition, std::string session) {
    wire::SolveRequest r;
    r.set_ref(std::move(ref));
    r.set_definition(std::move(definition));
    r.set_session(session);
    r.set_source_policy_session(std::move(session));
    auto solving = s.channel->open("/moby.buildkit.v1.Control/Solve");
    BOOST_TEST(co_await solving->write(r.SerializeAsString()));
    co_await solving->writes_done();
    while (co_await solving->read()) {
    }
    co_return co_await solving->finish();
}

/// FROM a source that is never fetched, since it is refused; with a step on top.
std::string remote_definition() { return source_definition("https://nowhere.invalid/file", {{"http.filename", "f"}}); }
}  // namespace

BOOST_AUTO_TEST_CASE(a_verifier_of_the_session_decides_about_sources) {
    with_lending_daemon([](lending_daemon& s) -> async::task<void> {
        const auto v = std::make_shared<verifier>();
        verifier_session session(s, "v1", v);
        v->decide = [](const verifying::CheckPolicyRequest&) {
            verifying::CheckPolicyResponse out;
            out.mutable_decision()->set_action(wire::sourcepolicy::DENY);
            out.mutable_decision()->add_deny_messages()->set_message("not from there");
            return out;
        };
        const auto end = co_await solve_with(s, "b1", remote_definition(), "v1");
        BOOST_TEST(end.message.find(R"(source "https://nowhere.invalid/file" not allowed by policy: action DENY)") != std::string::npos);
        BOOST_REQUIRE(v->asked.size() == 1U);
        BOOST_TEST(v->asked[0].source().source().attrs().at("http.filename") == "f");
        google::rpc::Status details;
        BOOST_TEST(details.ParseFromString(end.details));
        BOOST_REQUIRE(details.details_size() >= 1);
        BOOST_TEST(details.details(0).type_url() == "github.com/moby/buildkit/policysession.DecisionResponse+json");
        BOOST_TEST(details.details(0).value().find(R"("denyMessages":[{"message":"not from there"}])") != std::string::npos);

        // It may put others in place of a source for ever, but is not asked for ever.
        v->asked.clear();
        v->decide = [](const verifying::CheckPolicyRequest& q) {
            verifying::CheckPolicyResponse out;
            out.mutable_decision()->set_action(wire::sourcepolicy::CONVERT);
            *out.mutable_decision()->mutable_update() = q.source().source();
            return out;
        };
        const auto loop = co_await solve_with(s, "b2", remote_definition(), "v1");
        BOOST_TEST(loop.message.find("too many policy requests") != std::string::npos);
        BOOST_TEST(v->asked.size() == 10U);

        // It may ask about the source it decides about, and no other.
        v->decide = [](const verifying::CheckPolicyRequest&) {
            verifying::CheckPolicyResponse out;
            out.mutable_request()->mutable_source()->set_identifier("https://other.invalid/");
            return out;
        };
        const auto other = co_await solve_with(s, "b3", remote_definition(), "v1");
        BOOST_TEST(other.message.find("policy requested different source identifier") != std::string::npos);
        co_await session.close();
    });
}

BOOST_AUTO_TEST_CASE(a_verifier_that_does_not_appear_fails_the_build) {
    with_lending_daemon([](lending_daemon& s) -> async::task<void> {
        wire::SolveRequest r;
        r.set_ref("b1");
        r.set_definition(file_definition("/a", "a"));
        r.set_source_policy_session("nobody");
        // Without a source there is nothing to ask about.
        (void)co_await s.channel->unary("/moby.buildkit.v1.Control/Solve", r.SerializeAsString());
        r.set_ref("b2");
        r.set_definition(remote_definition());
        BOOST_TEST(
            says(co_await failure(s.channel->unary("/moby.buildkit.v1.Control/Solve", r.SerializeAsString())), "no active session for nobody"));
    });
}

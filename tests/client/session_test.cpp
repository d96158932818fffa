#include "support/support.hpp"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "content.pb.h"
#include "session.pb.h"

import cobuild.base;
import cobuild.async;
import cobuild.rpc;
import cobuild.client;

#include "daemon.hpp"
#include "support/failure.hpp"

using namespace cobuild;
using namespace cobuild::test;
using namespace std::chrono_literals;
namespace api = moby::session;
namespace blobs = containerd::services::content::v1;

namespace {

constexpr const char* get_secret = "/moby.buildkit.secrets.v1.Secrets/GetSecret";
constexpr const char* take_files = "/moby.filesync.v1.FileSend/DiffCopy";

std::string secret_request(const std::string& id) {
    api::GetSecretRequest q;
    q.set_id(id);
    return q.SerializeAsString();
}

std::string secret_in(const std::string& answer) {
    api::GetSecretResponse a;
    BOOST_REQUIRE(a.ParseFromString(answer));
    return a.data();
}

std::string bytes_message(std::string data) {
    api::BytesMessage m;
    m.set_data(std::move(data));
    return m.SerializeAsString();
}

async::task<std::optional<client::login>> one_login(std::string host) {
    if (host != "registry.test") co_return std::nullopt;
    co_return client::login{"user", "password"};
}

}  // namespace

CO_TEST_CASE(a_session_says_it_is_healthy) {
    lent_session s(rt, {});
    api::HealthCheckResponse a;
    BOOST_REQUIRE(a.ParseFromString(co_await s.daemon->unary("/grpc.health.v1.Health/Check", {})));
    BOOST_TEST(a.status() == api::HealthCheckResponse::SERVING);
    co_await s.server.stop(1s);
}

CO_TEST_CASE(it_lists_only_what_it_lends) {
    client::session bare(rt.get_executor(), rt.pool(), {});
    BOOST_TEST(bare.methods() == (std::vector<std::string>{"/grpc.health.v1.Health/Check", "/moby.filesync.v1.Auth/Credentials"}),
               boost::test_tools::per_element());
    client::session full(rt.get_executor(), rt.pool(),
                         {.directories = {{"context", "/"}}, .secrets = {{"a", {}}}, .ssh_agents = {{"default", "/x"}}, .targets = {{0, {}}}});
    const auto methods = full.methods();
    for (const auto* m : {get_secret, take_files, "/moby.filesync.v1.FileSync/DiffCopy", "/moby.sshforward.v1.SSH/ForwardAgent"})
        BOOST_TEST((std::find(methods.begin(), methods.end(), m) != methods.end()), m);
    co_return;
}

CO_TEST_CASE(secrets_come_from_files_and_the_environment) {
    scratch_dir dir;
    write_file(dir / "key", std::string("\0bytes\n", 7));
    ::setenv("CLIENT_TEST_SECRET", "from outside", 1);
    lent_session s(rt, {.secrets = {{"file", {.file = dir / "key", .environment = {}}}, {"env", {.file = {}, .environment = "CLIENT_TEST_SECRET"}}}});
    BOOST_TEST((secret_in(co_await s.daemon->unary(get_secret, secret_request("file"))) == std::string("\0bytes\n", 7)));
    BOOST_TEST(secret_in(co_await s.daemon->unary(get_secret, secret_request("env"))) == "from outside");
    const auto none = co_await failure(s.daemon->unary(get_secret, secret_request("other")));
    BOOST_TEST((none.kind() == errc::not_found));
    BOOST_TEST(says(none, "secret other: not found"));
    co_await s.server.stop(1s);
}

CO_TEST_CASE(a_secret_over_500_kib_is_refused) {
    scratch_dir dir;
    write_file(dir / "most", std::string(500 * 1024, 'x'));
    write_file(dir / "more", std::string(500 * 1024 + 1, 'x'));
    lent_session s(rt, {.secrets = {{"most", {.file = dir / "most", .environment = {}}}, {"more", {.file = dir / "more", .environment = {}}}}});
    BOOST_TEST(secret_in(co_await s.daemon->unary(get_secret, secret_request("most"))).size() == 500U * 1024);
    BOOST_TEST(says(co_await failure(s.daemon->unary(get_secret, secret_request("more"))), "larger than 500 KiB"));
    co_await s.server.stop(1s);
}

CO_TEST_CASE(logins_are_given_for_known_hosts_and_tokens_are_not_fetched_here) {
    lent_session s(rt, {.logins = one_login});
    api::CredentialsRequest q;
    q.set_host("registry.test");
    api::CredentialsResponse a;
    BOOST_REQUIRE(a.ParseFromString(co_await s.daemon->unary("/moby.filesync.v1.Auth/Credentials", q.SerializeAsString())));
    BOOST_TEST(a.username() == "user");
    BOOST_TEST(a.secret() == "password");
    q.set_host("other.test");
    BOOST_REQUIRE(a.ParseFromString(co_await s.daemon->unary("/moby.filesync.v1.Auth/Credentials", q.SerializeAsString())));
    BOOST_TEST(a.username() == "");
    BOOST_TEST(a.secret() == "");
    // The daemon then fetches tokens itself.
    BOOST_TEST(((co_await failure(s.daemon->unary("/moby.filesync.v1.Auth/GetTokenAuthority", {}))).kind() == errc::unsupported));
    co_await s.server.stop(1s);
}

CO_TEST_CASE(an_ssh_agent_is_a_pipe_to_its_socket) {
    scratch_dir dir;
    const auto path = (dir / "agent").string();
    const unique_fd listener{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    sockaddr_un at{};
    at.sun_family = AF_UNIX;
    BOOST_REQUIRE(path.size() < sizeof at.sun_path);
    std::memcpy(at.sun_path, path.data(), path.size());
    BOOST_REQUIRE(::bind(listener.get(), reinterpret_cast<const sockaddr*>(&at), sizeof at) == 0);
    BOOST_REQUIRE(::listen(listener.get(), 1) == 0);
    std::thread agent([&listener] {
        const unique_fd one{::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC)};
        char buffer[64];
        const auto n = ::read(one.get(), buffer, sizeof buffer);
        const std::string answer = "signed " + std::string(buffer, n > 0 ? static_cast<std::size_t>(n) : 0);
        [[maybe_unused]] const auto written = ::write(one.get(), answer.data(), answer.size());
    });
    lent_session s(rt, {.ssh_agents = {{"default", path}}});
    BOOST_TEST(co_await s.daemon->unary("/moby.sshforward.v1.SSH/CheckAgent", {}) == "");
    api::CheckAgentRequest other;
    other.set_id("other");
    BOOST_TEST(
        says(co_await failure(s.daemon->unary("/moby.sshforward.v1.SSH/CheckAgent", other.SerializeAsString())), "unset ssh forward key other"));
    auto call = s.daemon->open("/moby.sshforward.v1.SSH/ForwardAgent", {{"buildkit.ssh.id", "default"}});
    co_await call->write(bytes_message("this"));
    std::string heard;
    while (auto m = co_await call->read()) {
        api::BytesMessage b;
        BOOST_REQUIRE(b.ParseFromString(*m));
        heard += b.data();
    }
    BOOST_TEST(heard == "signed this");
    BOOST_TEST((co_await call->finish()).ok());
    agent.join();
    co_await s.server.stop(1s);
}

CO_TEST_CASE(a_file_is_written_as_it_comes) {
    scratch_dir dir;
    write_file(dir / "out.tar", "an older and longer content than the new one");
    client::target file, other;
    file.file = dir / "out.tar";
    lent_session s(rt, {.targets = {{1, file}}});
    auto call = s.daemon->open(take_files, {{"buildkit-attachable-exporter-id", "1"}});
    co_await call->write(bytes_message("one "));
    co_await call->write(bytes_message("two"));
    co_await call->writes_done();
    BOOST_TEST(!(co_await call->read()).has_value());
    BOOST_TEST((co_await call->finish()).ok());
    BOOST_TEST(read_file(dir / "out.tar") == "one two");
    auto wrong = s.daemon->open(take_files, {{"buildkit-attachable-exporter-id", "7"}});
    BOOST_TEST((co_await wrong->finish()).message == "exporter 7 not found");
    co_await s.server.stop(1s);
}

CO_TEST_CASE(an_oci_layout_is_read_blob_by_blob_and_nothing_else) {
    scratch_dir dir;
    const std::string content(3 << 20, 'b');
    const auto id = digest::of(content);
    std::filesystem::create_directories(dir / "blobs/sha256");
    write_file(dir.path() / "blobs/sha256" / id.hex(), content);
    lent_session s(rt, {.oci_layouts = {{"oci:store", dir.path()}}});
    const rpc::metadata store{{"buildkit-attachable-store-id", "oci:store"}};
    blobs::InfoRequest q;
    q.set_digest(id.str());
    blobs::InfoResponse a;
    BOOST_REQUIRE(a.ParseFromString(co_await s.daemon->unary("/containerd.services.content.v1.Content/Info", q.SerializeAsString(), store)));
    BOOST_TEST(a.info().size() == 3 << 20);
    BOOST_TEST(a.info().digest() == id.str());

    blobs::ReadContentRequest r;
    r.set_digest(id.str());
    r.set_offset(5);
    r.set_size((2 << 20) + 1);
    auto call = s.daemon->open("/containerd.services.content.v1.Content/Read", store);
    co_await call->write(r.SerializeAsString());
    co_await call->writes_done();
    std::string got;
    while (auto m = co_await call->read()) {
        blobs::ReadContentResponse piece;
        BOOST_REQUIRE(piece.ParseFromString(*m));
        BOOST_TEST(piece.offset() == static_cast<std::int64_t>(5 + got.size()));
        got += piece.data();
    }
    BOOST_TEST((co_await call->finish()).ok());
    BOOST_TEST((got == content.substr(5, (2 << 20) + 1)));

    q.set_digest(digest::of(std::string_view("other")).str());
    BOOST_TEST(((co_await failure(s.daemon->unary("/containerd.services.content.v1.Content/Info", q.SerializeAsString(), store))).kind() ==
                errc::not_found));
    q.set_digest("../../etc/passwd");
    BOOST_TEST(
        ((co_await failure(s.daemon->unary("/containerd.services.content.v1.Content/Info", q.SerializeAsString(), store))).kind() == errc::invalid));
    q.set_digest(id.str());
    BOOST_TEST(says(co_await failure(s.daemon->unary("/containerd.services.content.v1.Content/Info", q.SerializeAsString(),
                                                     {{"buildkit-attachable-store-id", "local:/etc"}})),
                    "no OCI layout of the id"));
    co_await s.server.stop(1s);
}

CO_TEST_CASE(blobs_are_written_whole_or_not_at_all) {
    scratch_dir dir;
    const std::string content(3 << 20, 'b');
    const auto id = digest::of(content);
    lent_session s(rt, {.stores = {{"export", dir / "made"}}});
    const rpc::metadata store{{"buildkit-attachable-store-id", "export"}};
    const auto file = dir.path() / "made/blobs/sha256" / id.hex();
    const auto write = [](lent_session& to, rpc::metadata m, digest which, std::string bytes, std::int64_t at) -> async::task<rpc::status> {
        auto call = to.daemon->open("/containerd.services.content.v1.Content/Write", std::move(m));
        blobs::WriteContentRequest q;
        q.set_action(blobs::STAT);
        q.set_ref("r");
        q.set_total(static_cast<std::int64_t>(bytes.size()));
        q.set_expected(which.str());
        bool going = co_await call->write(q.SerializeAsString()) && (co_await call->read()).has_value();
        for (const auto action : {blobs::WRITE, blobs::COMMIT}) {
            q.Clear();
            q.set_action(action);
            q.set_expected(which.str());
            q.set_total(static_cast<std::int64_t>(bytes.size()));
            q.set_offset(action == blobs::WRITE ? at : static_cast<std::int64_t>(bytes.size()));
            if (action == blobs::WRITE) q.set_data(bytes);
            going = going && co_await call->write(q.SerializeAsString()) && (co_await call->read()).has_value();
        }
        co_await call->writes_done();
        co_return co_await call->finish();
    };
    BOOST_TEST(((co_await write(s, store, digest::of(std::string_view("other")), content, 0)).code == rpc::code::invalid_argument));
    BOOST_TEST(!(co_await write(s, store, id, content, 7)).ok());  // it has no byte 7 yet
    BOOST_TEST(std::filesystem::is_empty(dir / "made/blobs/sha256"));
    BOOST_TEST((co_await write(s, store, id, content, 0)).ok());
    BOOST_TEST((read_file(file) == content));
    BOOST_TEST(((co_await write(s, store, id, content, 0)).code == rpc::code::already_exists));
    const auto unknown = co_await write(s, {{"buildkit-attachable-store-id", "local:/etc"}}, id, content, 0);
    BOOST_TEST(unknown.message.find("no store of the id") != std::string::npos);
    co_await s.server.stop(1s);
}

CO_TEST_CASE(uploads_are_named) {
    lent_session s(rt, {.uploads = {{"/context", std::string((1 << 20) + 3, 'u')}}});
    auto call = s.daemon->open("/moby.upload.v1.Upload/Pull", {{"urlpath", "/context"}});
    co_await call->writes_done();
    std::size_t size = 0;
    while (auto m = co_await call->read()) {
        api::BytesMessage b;
        BOOST_REQUIRE(b.ParseFromString(*m));
        size += b.data().size();
    }
    BOOST_TEST(size == (1U << 20) + 3);
    BOOST_TEST((co_await call->finish()).ok());
    co_await s.server.stop(1s);
}

CO_TEST_CASE(what_is_not_served_is_named) {
    lent_session s(rt, {});
    const auto e = co_await failure(s.daemon->unary("/moby.filesync.v1.FileSync/TarStream", {}));
    BOOST_TEST((e.kind() == errc::unsupported));
    BOOST_TEST(says(e, "/moby.filesync.v1.FileSync/TarStream"));
    co_await s.server.stop(1s);
}

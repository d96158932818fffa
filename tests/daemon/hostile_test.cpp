// Clients that are none, or mean harm: they are refused, and others do not notice.
#include "support/support.hpp"

#include "support/certs.hpp"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/write.hpp>

#include "control.pb.h"
#include "fsutil.pb.h"
#include "gateway.pb.h"

import cobuild.base;
import cobuild.async;
import cobuild.build;
import cobuild.config;
import cobuild.daemon;
import cobuild.llb;
import cobuild.rpc;

#include "daemon/served.hpp"

#include "daemon/client_session.hpp"
#include "daemon/requests.hpp"
#include "support/failure.hpp"

using namespace cobuild;
using namespace std::chrono_literals;
using namespace cobuild::test;
namespace wire = moby::buildkit::v1;
namespace bridge = moby::buildkit::v1::frontend;

namespace {

/// Another client, who must be served whatever happens: one whole build.
async::task<void> others_are_served(served& s, std::string ref) {
    (void)co_await call<wire::SolveResponse>(s, cat(control, "Solve"), hello_request(ref));
}

unique_fd dial(const std::string& path) {
    unique_fd out{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    sockaddr_un to{};
    to.sun_family = AF_UNIX;
    BOOST_REQUIRE(path.size() < sizeof to.sun_path);
    std::memcpy(to.sun_path, path.data(), path.size());
    BOOST_REQUIRE(::connect(out.get(), reinterpret_cast<const sockaddr*>(&to), sizeof to) == 0);
    return out;
}

/// Sends these bytes and reads until the daemon closes, ten seconds at most; false when it did not.
bool is_hung_up_on(const std::string& path, const std::string& bytes) {
    const auto s = dial(path);
    const timeval limit{.tv_sec = 10, .tv_usec = 0};
    ::setsockopt(s.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    (void)::send(s.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    char piece[4096];
    for (;;) {
        const auto n = ::recv(s.get(), piece, sizeof piece, 0);
        if (n > 0) continue;
        return n == 0 || errno == ECONNRESET || errno == EPIPE;
    }
}

// ---------------------------------------------------------------- HTTP/2 by hand (RFC 9113)

std::string frame(int type, int flags, std::uint32_t stream, const std::string& payload, std::optional<std::size_t> declared = {}) {
    const auto size = declared.value_or(payload.size());
    std::string out;
    for (const int shift : {16, 8, 0}) out += static_cast<char>(size >> shift & 255U);
    out += static_cast<char>(type);
    out += static_cast<char>(flags);
    for (const int shift : {24, 16, 8, 0}) out += static_cast<char>(stream >> shift & 255U);
    return out + payload;
}

constexpr std::string_view preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
constexpr int data_frame = 0, headers_frame = 1, settings_frame = 4, end_stream = 1, end_headers = 4;

/// A gRPC call's head, each field a literal without index (RFC 7541).
std::string call_head(const std::string& path, const std::vector<std::pair<std::string, std::string>>& more = {}) {
    std::vector<std::pair<std::string, std::string>> fields{
        {":method", "POST"}, {":scheme", "http"}, {":path", path}, {":authority", "x"}, {"content-type", "application/grpc"}, {"te", "trailers"}};
    fields.insert(fields.end(), more.begin(), more.end());
    std::string out;
    for (const auto& [name, value] : fields) {
        out += '\0';
        for (const auto& text : {name, value}) {
            BOOST_REQUIRE(text.size() < 127U);
            out += static_cast<char>(text.size());
            out += text;
        }
    }
    return out;
}

std::string message(const std::string& bytes, bool compressed) {
    std::string out(1, compressed ? '\1' : '\0');
    for (const int shift : {24, 16, 8, 0}) out += static_cast<char>(bytes.size() >> shift & 255U);
    return out + bytes;
}

std::string random_bytes(std::size_t n, unsigned seed) {
    std::minstd_rand x(seed);
    std::string out(n, '\0');
    for (auto& c : out) c = static_cast<char>(x() >> 8);
    return out;
}

/// Whether a trailer in these bytes ends the call with that status; its fields came as literals.
bool has_status(const std::string& bytes, const std::string& status) {
    return bytes.find(cat("grpc-status", std::string(1, static_cast<char>(status.size())), status)) != std::string::npos;
}

/// The most memory this process had, in bytes.
std::uint64_t peak_memory() {
    std::ifstream in("/proc/self/status");
    for (std::string line; std::getline(in, line);)
        if (line.starts_with("VmHWM:")) return std::stoull(line.substr(6)) * 1024;
    return 0;
}

}  // namespace

BOOST_AUTO_TEST_CASE(garbage_is_hung_up_on) {
    with_daemon([](served& s) -> async::task<void> {
        const auto path = (s.dir / "s.sock").string();
        const std::string settings = frame(settings_frame, 0, 0, "");
        const std::vector<std::string> all{
            random_bytes(100'000, 1),
            "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            std::string(preface) + random_bytes(100'000, 2),
            // A frame longer than was agreed on; a head that is no HPACK.
            std::string(preface) + settings + frame(data_frame, 0, 1, "", 0xffffff),
            std::string(preface) + settings + frame(headers_frame, end_headers, 1, std::string(64, '\xff')),
        };
        for (std::size_t i = 0; i < all.size(); ++i) {
            BOOST_TEST(co_await s.engine->runtime().pool().run([&] { return is_hung_up_on(path, all[i]); }), "number " << i);
            co_await others_are_served(s, cat("other", i));
        }
    });
}

BOOST_AUTO_TEST_CASE(silent_connections_keep_nobody_out) {
    with_daemon([](served& s) -> async::task<void> {
        const auto path = (s.dir / "s.sock").string();
        // Some say nothing, some only hello, some begin a message that does not end.
        const auto begun = std::string(preface) + frame(settings_frame, 0, 0, "") +
                           frame(headers_frame, end_headers, 1, call_head("/moby.buildkit.v1.Control/Solve")) +
                           frame(data_frame, 0, 1, message(std::string(1000, 'x'), false).substr(0, 500));
        const auto open = co_await s.engine->runtime().pool().run([&] {
            std::vector<unique_fd> out;
            for (int i = 0; i < 300; ++i) {
                out.push_back(dial(path));
                const auto what = i % 3 == 0 ? std::string() : i % 3 == 1 ? std::string(preface) : begun;
                (void)::send(out.back().get(), what.data(), what.size(), MSG_NOSIGNAL);
            }
            return std::make_shared<std::vector<unique_fd>>(std::move(out));
        });
        co_await others_are_served(s, "other");
        BOOST_TEST(open->size() == 300U);
    });
}

BOOST_AUTO_TEST_CASE(a_message_that_is_too_long_ends_its_call_alone) {
    with_daemon([](served& s) -> async::task<void> {
        auto big = hello_request("big");
        big.set_frontend(std::string(rpc::max_message + 1000, 'x'));
        const auto e = co_await failure(call<wire::SolveResponse>(s, cat(control, "Solve"), big));
        BOOST_TEST((e.kind() != errc::internal), e.what());
        co_await others_are_served(s, "other");
    });
}

BOOST_AUTO_TEST_CASE(compressed_messages_are_not_unpacked) {
    with_daemon([](served& s) -> async::task<void> {
        // A quarter of a gigabyte of zeros in a quarter of a megabyte.
        const auto file = (s.dir / "bomb.gz").string();
        const auto path = (s.dir / "s.sock").string();
        co_await s.engine->runtime().pool().run([&] { shell("head -c 268435456 /dev/zero | gzip -9 > " + file); });
        const auto before = peak_memory();
        std::string bytes = std::string(preface) + frame(settings_frame, 0, 0, "") +
                            frame(headers_frame, end_headers, 1, call_head("/moby.buildkit.v1.Control/Solve", {{"grpc-encoding", "gzip"}}));
        const auto body = message(read_file(file), true);
        for (std::size_t at = 0; at < body.size(); at += 16000)
            bytes += frame(data_frame, at + 16000 >= body.size() ? end_stream : 0, 1, body.substr(at, 16000));
        const auto said = co_await s.engine->runtime().pool().run([&] {
            const auto c = dial(path);
            const timeval limit{.tv_sec = 3, .tv_usec = 0};
            ::setsockopt(c.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
            (void)::send(c.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
            std::string out;
            char piece[4096];
            for (ssize_t n = 0; out.find("grpc-status") == std::string::npos && (n = ::recv(c.get(), piece, sizeof piece, 0)) > 0;)
                out.append(piece, static_cast<std::size_t>(n));
            return out;
        });
        BOOST_TEST(has_status(said, "12"));  // UNIMPLEMENTED
        BOOST_TEST(peak_memory() - before < std::uint64_t{64} << 20);
        co_await others_are_served(s, "other");
    });
}

BOOST_AUTO_TEST_CASE(heads_without_end_are_refused) {
    with_daemon([](served& s) -> async::task<void> {
        rpc::metadata much;
        for (int i = 0; i < 40; ++i) much.emplace("filler", std::string(100'000, 'x'));
        const auto e = co_await failure(s.channel->unary(cat(control, "Info"), "", much));
        BOOST_TEST((e.kind() != errc::internal || says(e, "header") || says(e, "metadata")), e.what());
        co_await others_are_served(s, "other");
    });
}

BOOST_AUTO_TEST_CASE(requests_that_are_none_are_refused) {
    with_daemon([](served& s) -> async::task<void> {
        for (unsigned seed = 0; seed < 50; ++seed)
            for (const auto* method : {"Solve", "Status", "DiskUsage", "Prune", "ListenBuildHistory", "UpdateBuildHistory"}) {
                // What they make of it is theirs; that they end is ours.
                auto stream = s.channel->open(cat(control, method));
                (void)co_await stream->write(cat("\xff", random_bytes(seed * 7 + 1, seed + 1)));
                co_await stream->writes_done();
                (void)co_await async::with_deadline(10s, cat("the answer of ", method), stream->read());
                const auto end = co_await stream->finish();
                BOOST_TEST(!end.ok(), method);
            }
        auto no_graph = hello_request("g");
        no_graph.set_definition(random_bytes(1000, 3));
        BOOST_TEST(says(co_await failure(call<wire::SolveResponse>(s, cat(control, "Solve"), no_graph)), "not a valid build definition"));
        co_await others_are_served(s, "other");
    });
}

BOOST_AUTO_TEST_CASE(a_result_is_read_within_its_root) {
    with_daemon([](served& s) -> async::task<void> {
        const auto outside = (s.dir / "outside").string();
        write_file(outside, "not for you");
        rpc::status end;
        co_await drive(
            s, "d",
            [&](rpc::metadata m) -> async::task<void> {
                llb::graph g;
                llb::file_op f;
                f.actions.push_back({.input = llb::scratch,
                                     .secondary_input = llb::scratch,
                                     .output = 0,
                                     .what = llb::symlink_action{.oldpath = outside, .newpath = "/link"}});
                bridge::SolveRequest q;
                q.set_definition(llb::marshal(g.finish(g.add({.inputs = {}, .what = std::move(f), .platform = {}}))));
                q.set_allow_result_return(true);
                q.set_allow_result_array_ref(true);
                const auto id = (co_await call<bridge::SolveResponse>(s, cat(gateway, "Solve"), q, m)).result().ref().id();
                for (const auto& path : {std::string("link"), cat("../../../..", outside), outside, cat("/link/../..", outside)}) {
                    bridge::ReadFileRequest read;
                    read.set_ref(id);
                    read.set_file_path(path);
                    const auto e = co_await failure(call<bridge::ReadFileResponse>(s, cat(gateway, "ReadFile"), read, m));
                    BOOST_TEST(says(e, "there is no such file in the result"), path);
                }
                (void)co_await call<bridge::ReturnResponse>(s, cat(gateway, "Return"), bridge::ReturnRequest(), m);
            },
            &end);
        BOOST_TEST(end.ok(), end.message);
    });
}

// ---------------------------------------------------------------- sessions

namespace {

/// A build of a client's directory, in the session `id`.
wire::SolveRequest context_request(const std::string& ref, const std::string& id) {
    llb::graph g;
    wire::SolveRequest r;
    r.set_ref(ref);
    r.set_session(id);
    r.set_definition(llb::marshal(g.finish(g.add({.inputs = {}, .what = llb::source_op{"local://context", {}}, .platform = {}}))));
    return r;
}

struct entry {
    std::string path;
    std::uint32_t mode = 0644;
    std::string link;
    std::string data;
};

std::string packet(fsutil::types::Packet::PacketType type, const std::optional<entry>& e = {}, std::uint32_t id = 0, const std::string& data = {}) {
    fsutil::types::Packet p;
    p.set_type(type);
    p.set_id(id);
    p.set_data(data);
    if (e) {
        p.mutable_stat()->set_path(e->path);
        p.mutable_stat()->set_mode(e->mode);
        p.mutable_stat()->set_linkname(e->link);
        p.mutable_stat()->set_size(static_cast<std::int64_t>(e->data.size()));
    }
    return p.SerializeAsString();
}

/// A client that claims to have these files, and sends what it is asked for.
async::task<rpc::status> send_tree(std::shared_ptr<std::vector<entry>> tree, std::shared_ptr<rpc::call> c) {
    using fsutil::types::Packet;
    if (c->method() != "/moby.filesync.v1.FileSync/DiffCopy") co_return rpc::status{};
    for (const auto& e : *tree) co_await c->write(packet(Packet::PACKET_STAT, e));
    co_await c->write(packet(Packet::PACKET_STAT));
    while (const auto bytes = co_await c->read()) {
        Packet p;
        BOOST_TEST(p.ParseFromString(*bytes));
        if (p.type() == Packet::PACKET_FIN) {
            co_await c->write(packet(Packet::PACKET_FIN));
            break;
        }
        if (p.type() != Packet::PACKET_REQ || p.id() >= tree->size()) continue;
        co_await c->write(packet(Packet::PACKET_DATA, {}, p.id(), tree->at(p.id()).data));
        co_await c->write(packet(Packet::PACKET_DATA, {}, p.id()));
    }
    co_return rpc::status{};
}

async::task<error> build_from(served& s, std::string name, std::vector<entry> tree) {
    const auto files = std::make_shared<std::vector<entry>>(std::move(tree));
    client_session session(s, name, {"/moby.filesync.v1.FileSync/DiffCopy"},
                           [files](std::shared_ptr<rpc::call> c) { return send_tree(files, std::move(c)); });
    const auto e = co_await failure(call<wire::SolveResponse>(s, cat(control, "Solve"), context_request(name, name)));
    co_await session.close();
    co_return e;
}

}  // namespace

BOOST_AUTO_TEST_CASE(files_of_a_client_stay_in_their_directory) {
    with_daemon([](served& s) -> async::task<void> {
        constexpr std::uint32_t link = 1U << 27 | 0777U, directory = 1U << 31 | 0755U;
        const auto outside = s.dir / "outside";
        std::filesystem::create_directories(outside);
        const auto far = outside.string();
        const std::map<std::string, std::vector<entry>> tricks{
            {"up", {{.path = "../evil", .data = "x"}}},
            {"absolute", {{.path = cat(far, "/evil"), .data = "x"}}},
            {"inside-up", {{.path = "a", .mode = directory}, {.path = "a/../../evil", .data = "x"}}},
            {"through-a-link", {{.path = "a", .mode = link, .link = far}, {.path = "a/evil", .data = "x"}}},
            {"hard-link-out", {{.path = "a", .link = "../../../../../../../../etc/passwd"}}},
            {"dot", {{.path = ".", .data = "x"}}},
            {"null", {{.path = std::string("a\0b", 3), .data = "x"}}},
            {"twice", {{.path = "b", .data = "x"}, {.path = "a", .data = "x"}}},
        };
        for (const auto& [name, tree] : tricks) {
            const auto e = co_await build_from(s, name, tree);
            BOOST_TEST(says(e, "the other side of the file transfer sent \""), name);
            BOOST_TEST(std::filesystem::is_empty(outside), name);
            BOOST_TEST(!std::filesystem::exists(s.dir / "evil"), name);
            BOOST_TEST(!std::filesystem::exists(s.dir / "root/evil"), name);
            co_await others_are_served(s, cat("other-", name));
        }
        // The same tool with nothing bad in it: a link that leads out is only a link.
        const auto good = co_await build_from(s, "good", {{.path = "a", .mode = link, .link = far}, {.path = "b", .data = "hello"}});
        BOOST_TEST(says(good, "no failure"));
    });
}

BOOST_AUTO_TEST_CASE(a_session_that_talks_nonsense_ends) {
    with_daemon([](served& s) -> async::task<void> {
        auto tunnel = s.channel->open(cat(control, "Session"), {{"x-docker-expose-session-uuid", "mad"},
                                                                {"x-docker-expose-session-grpc-method", "/moby.filesync.v1.FileSync/DiffCopy"}});
        wire::BytesMessage m;
        m.set_data(random_bytes(10'000, 4));
        BOOST_TEST(co_await tunnel->write(m.SerializeAsString()));
        const auto e = co_await async::with_deadline(20s, "the build",
                                                     failure(call<wire::SolveResponse>(s, cat(control, "Solve"), context_request("m", "mad"))));
        BOOST_TEST((e.kind() != errc::internal), e.what());
        co_await others_are_served(s, "other");
        tunnel->cancel();
    });
}

BOOST_AUTO_TEST_CASE(a_session_that_says_nothing_holds_up_nobody_else) {
    with_daemon([](served& s) -> async::task<void> {
        auto tunnel = s.channel->open(cat(control, "Session"), {{"x-docker-expose-session-uuid", "mute"},
                                                                {"x-docker-expose-session-grpc-method", "/moby.filesync.v1.FileSync/DiffCopy"}});
        auto waiting = s.channel->open(cat(control, "Solve"));
        BOOST_TEST(co_await waiting->write(context_request("m", "mute").SerializeAsString()));
        co_await waiting->writes_done();
        co_await others_are_served(s, "other");
        // Nobody else takes its place either.
        auto second = s.channel->open(cat(control, "Session"), {{"x-docker-expose-session-uuid", "mute"}});
        BOOST_TEST(!(co_await second->read()).has_value());
        BOOST_TEST(((co_await second->finish()).code == rpc::code::already_exists));
        // When it goes its build ends.
        tunnel->cancel();
        (void)co_await async::with_deadline(20s, "the build's end", waiting->read());
        const auto end = co_await waiting->finish();
        BOOST_TEST(!end.ok());
    });
}

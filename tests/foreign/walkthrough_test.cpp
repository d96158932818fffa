// What BuildKit's documentation of its configuration has one type, word for word, with cobuild in BuildKit's place: a real Docker
// engine, docker's own command line, buildx, and the builder image that cobuild builds of itself.
#include "foreign/site.hpp"

#include "support/fake_registry.hpp"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <optional>
#include <regex>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

import cobuild.base;

using namespace cobuild;
using namespace cobuild::test;
using namespace std::chrono_literals;
namespace stdfs = std::filesystem;

BOOST_TEST_GLOBAL_FIXTURE(isolation);

namespace {
struct shared_site {
    site::closer at_the_end;
};
}  // namespace
BOOST_TEST_GLOBAL_FIXTURE(shared_site);

BOOST_AUTO_TEST_CASE(one_a_mirror) {
    if (!needs_root()) return;
    auto* s = site::get();
    if (s == nullptr) return;
    s->create("mybuilder", s->mirrored());
    const auto heredoc = "cd " + s->place.path("home") +
                         " && docker buildx build --load -t hello . -f - <<EOF\n"
                         "FROM busybox\nRUN echo hello > /greeting; cat /greeting\nCMD [\"cat\", \"/greeting\"]\nEOF\n";
    const auto built = s->shell_line(heredoc);
    BOOST_REQUIRE_MESSAGE(built.code == 0, built.str());
    BOOST_TEST(s->must({"run", "--rm", "--network=none", "hello"}).out == "hello\n");
    const auto logs = s->logs("mybuilder");
    // The mirror answered, and nobody else was asked.
    const auto host = s->place.registry().host();
    bool asked = false, answered = false;
    std::istringstream lines(logs);
    for (std::string line; std::getline(lines, line);) {
        asked = asked || (has(line, "msg=\"do request\"") && has(line, host));
        answered = answered || (has(line, "msg=\"fetch response received\"") && has(line, host));
        BOOST_TEST(!has(line, "registry-1.docker.io"), line);
    }
    BOOST_TEST(asked);
    BOOST_TEST(answered);
    // Without the container but with its volume everything is still known.
    s->buildx({"rm", "--keep-state", "mybuilder"});
    s->create("mybuilder", s->mirrored());
    const auto again = s->shell_line(heredoc);
    BOOST_TEST(again.code == 0, again.str());
    BOOST_TEST(std::regex_search(again.err, std::regex("\\[2/2\\] RUN echo hello[^\\n]*\\n#\\d+ CACHED")), again.err);
    s->buildx({"rm", "mybuilder"});
}

BOOST_AUTO_TEST_CASE(two_certificates) {
    if (!needs_root()) return;
    auto* s = site::get();
    if (s == nullptr) return;
    stdfs::create_directories(s->place / "tls");
    const authority ca(s->place / "tls", "ca"), other(s->place / "tls", "other");
    const auto server = ca.issue("server", "DNS:myregistry.com"), client = ca.issue("client", "DNS:client");
    const docker_registry registry(s->place / "secured", {.tls_cert = server.cert, .tls_key = server.key, .client_ca = ca.cert(), .port = 443});
    s->create("certs", s->mirrored() + "[registry.\"myregistry.com\"]\n  ca=[\"" + ca.cert() +
                           "\"]\n  [[registry.\"myregistry.com\".keypair]]\n    key=\"" + client.key + "\"\n    cert=\"" + client.cert + "\"\n");
    // What buildx copied.
    const auto config = s->must({"exec", "buildx_buildkit_certs0", "cat", "/etc/buildkit/buildkitd.toml"}).out;
    BOOST_TEST(has(config, "/etc/buildkit/certs/myregistry.com/ca.pem"), config);
    const auto files = s->must({"exec", "buildx_buildkit_certs0", "ls", "/etc/buildkit/certs/myregistry.com/"}).out;
    for (const auto* name : {"ca.pem", "client.key", "client.cert"}) BOOST_TEST(has(files, name), files);
    write_file(s->place / "image/Dockerfile", "FROM busybox\nRUN echo mine > /mine\n");
    s->buildx({"build", "--builder", "certs", "--push", "--tag", "myregistry.com/myimage:latest", s->place.path("image")});
    // Somebody else with that certificate finds it there, and nobody without.
    const auto seen = [&](strings more) {
        strings args{"curl",
                     "-sS",
                     "--fail",
                     "--resolve",
                     "myregistry.com:443:127.0.0.1",
                     "--cacert",
                     ca.cert(),
                     "https://myregistry.com/v2/myimage/tags/list"};
        args.insert(args.end(), more.begin(), more.end());
        return run(args);
    };
    const auto tags = seen({"--cert", client.cert, "--key", client.key});
    BOOST_TEST(has(tags.out, "\"latest\""), tags.str());
    BOOST_TEST(seen({}).code != 0);
    s->buildx({"rm", "certs"});
}

BOOST_AUTO_TEST_CASE(three_networks_of_their_own) {
    if (!needs_root()) return;
    auto* s = site::get();
    if (s == nullptr) return;
    // An image of cobuild with a configuration for its plugins, made as BuildKit's documentation has it.
    write_file(s->place / "cni/cni.json",
               R"({"cniVersion":"1.0.0","name":"buildkit","plugins":[{"type":"bridge","bridge":"br-cni0","isGateway":true,"ipMasq":false,)"
               R"("ipam":{"type":"host-local","ranges":[[{"subnet":"10.77.0.0/16"}]],"routes":[{"dst":"0.0.0.0/0"}]}},{"type":"loopback"}]})");
    write_file(s->place / "cni/Dockerfile", std::string("FROM ") + site::image + "\nCOPY cni.json /etc/buildkit/cni.json\n");
    const auto made = s->shell_line("DOCKER_BUILDKIT=0 docker build -q -t cobuild:cni " + s->place.path("cni"));
    BOOST_REQUIRE_MESSAGE(made.code == 0, made.str());
    s->create("cnibuilder", s->mirrored(), {"--driver-opt", "image=cobuild:cni", "--buildkitd-flags", "--oci-worker-net=cni"});
    // Each listens until it has seen that the other listens too.
    const auto step = [](const std::string& mine, const std::string& other) {
        return "FROM busybox\nRUN --mount=type=cache,id=meet,target=/meet nc -l -p 9999 -e true & "
               "until netstat -ltn | grep -q :9999; do sleep 0.05; done; touch /meet/" +
               mine +
               "; "
               "for i in $(seq 600); do [ -e /meet/" +
               other +
               " ] && break; sleep 0.05; done; "
               "test -e /meet/" +
               other + " && netstat -ltn | grep -q :9999 && ip addr show eth0 | grep -q 'inet 10.77.' && echo both listened\n";
    };
    write_file(s->place / "a/Dockerfile", step("a", "b"));
    write_file(s->place / "b/Dockerfile", step("b", "a"));
    const auto start = [&](const std::string& context) {
        return std::make_unique<running>(strings{"docker", "buildx", "build", "--builder", "cnibuilder", "--progress=plain", s->place.path(context)},
                                         s->place.options(s->engine().environment, 100s));
    };
    const auto a = start("a"), b = start("b");
    for (const auto& build : {a.get(), b.get()}) {
        const auto o = build->wait();
        BOOST_TEST(o.code == 0, o.str());
        BOOST_TEST(std::regex_search(o.err, std::regex("\\d both listened")), o.err);
    }
    s->buildx({"rm", "cnibuilder"});
    // The bridge is the plugin's to keep.
    run({"ip", "link", "del", "br-cni0"});
}

BOOST_AUTO_TEST_CASE(four_steps_at_once_and_no_more) {
    if (!needs_root()) return;
    auto* s = site::get();
    if (s == nullptr) return;
    s->create("par", s->mirrored("[worker.oci]\n  max-parallelism = 4\n"));
    std::string file, last = "FROM scratch\n";
    for (int i = 1; i <= 12; ++i) {
        const auto n = std::to_string(i);
        file += "FROM busybox AS s" + n +
                "\nRUN cut -d' ' -f1 /proc/uptime | sed s/^/begin=/; sleep 1; cut -d' ' -f1 /proc/uptime | sed s/^/end=/; echo " + n + " > /f\n";
        last += "COPY --from=s" + n + " /f /f" + n + "\n";
    }
    write_file(s->place / "par/Dockerfile", file + last);
    const auto o = s->buildx({"build", "--builder", "par", "--progress=plain", s->place.path("par")});
    // When each began and ended, by the steps' own clock: a begin counts one more, an end one less.
    std::vector<std::pair<double, int>> times;
    const std::regex mark("(begin|end)=([0-9.]+)");
    for (std::sregex_iterator at(o.err.begin(), o.err.end(), mark), end; at != end; ++at)
        if ((*at)[0].str().find("=/") == std::string::npos) times.emplace_back(std::stod((*at)[2]), (*at)[1] == "begin" ? 1 : -1);
    std::sort(times.begin(), times.end());
    BOOST_TEST(times.size() == 24U, o.err);
    int now = 0, most = 0;
    for (const auto& [when, change] : times) most = std::max(most, now += change);
    BOOST_TEST(most == 4);
    s->buildx({"rm", "par"});
}

BOOST_AUTO_TEST_CASE(five_connections_and_no_more) {
    if (!needs_root()) return;
    auto* s = site::get();
    if (s == nullptr) return;
    // Twelve layers in a registry that holds every blob back until it has seen how many are asked for at once.
    fake_registry registry;
    std::string layers, diffs;
    std::size_t index = 0;
    for (int i = 0; i < 12; ++i) {
        const auto dir = s->place / ("layer" + std::to_string(i));
        write_file(dir / ("f" + std::to_string(i)), std::string(50'000, static_cast<char>('a' + i)));
        must_run({"tar", "--numeric-owner", "-cf", dir.string() + ".tar", "-C", dir.string(), "."});
        const auto bytes = read_file(dir.string() + ".tar");
        const auto id = registry.add_blob(bytes);
        layers +=
            cat(index == 0 ? "" : ",", R"({"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":")", id, R"(","size":)", bytes.size(), "}");
        diffs += cat(index++ == 0 ? "" : ",", '"', id, '"');
    }
    const auto config = cat(R"({"architecture":"amd64","os":"linux","config":{},"rootfs":{"type":"layers","diff_ids":[)", diffs, "]}}");
    const auto config_id = registry.add_blob(config);
    registry.add_manifest(
        "library/many", "latest", "application/vnd.oci.image.manifest.v1+json",
        cat(R"({"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":)",
            R"("application/vnd.oci.image.config.v1+json","digest":")", config_id, R"(","size":)", config.size(), R"(},"layers":[)", layers, "]}"));
    s->create("tcp", "[registry.\"docker.io\"]\n  mirrors = [\"" + registry.host() + "\"]\n[grpc]\n  debugAddress = \"127.0.0.1:7999\"\n");
    write_file(s->place / "many/Dockerfile", "FROM many\nCOPY Dockerfile /\n");
    std::once_flag first;
    registry.on_request([&](const fake_request& q) -> std::optional<fake_response> {
        if (has(q.path, "/blobs/") && !has(q.path, config_id)) std::call_once(first, [&] { registry.hold_blobs(true); });
        return std::nullopt;
    });
    running build({"docker", "buildx", "build", "--builder", "tcp", "--progress=plain", s->place.path("many")},
                  s->place.options(s->engine().environment, 100s));
    registry.wait_for_blob_transfers(4);
    // While those four hang, another image's manifest still comes through, over the fifth.
    write_file(s->place / "one/Dockerfile", "FROM many:other\n");
    const auto other = s->engine().docker({"buildx", "build", "--builder", "tcp", s->place.path("one")});
    BOOST_TEST(has(other.err, "not found"), other.str());
    const auto figures = run({"curl", "-sS", "http://127.0.0.1:7999/metrics"}).out;
    BOOST_TEST(has(figures, "cobuild_registry_sockets_peak{registry=\"docker.io\"} 5\n"), figures);
    registry.hold_blobs(false);
    const auto o = build.wait();
    BOOST_TEST(o.code == 0, o.str());
    BOOST_TEST(registry.peak_blob_transfers() == 4U);
    BOOST_TEST(registry.peak_sockets() == 5U);
    s->buildx({"rm", "tcp"});
}

// Every command of docker buildx that talks to a builder, against cobuild: in a container, over a unix socket, over tcp with certificates.
#include "foreign/site.hpp"

#include <sys/stat.h>

#include <chrono>
#include <filesystem>
#include <memory>
#include <optional>
#include <regex>
#include <string>
#include <vector>

import cobuild.base;

using namespace cobuild;
using namespace cobuild::test;
using namespace std::chrono_literals;
namespace stdfs = std::filesystem;

namespace {

/// Whether plain progress shows the step of that name as taken from a cache, whatever it says in between.
bool cached(const std::string& progress, const std::string& name) {
    const auto at = progress.find(cat("] ", name, "\n"));
    if (at == std::string::npos) return false;
    const auto line = progress.rfind('\n', at) + 1;
    const auto number = progress.substr(line, progress.find(' ', line) - line);
    return has(progress, cat("\n", number, " CACHED\n"));
}

/// One builder and what is done with it.
class tour {
public:
    tour(site& s, std::string builder) : s_(s), builder_(std::move(builder)), at_(s.place / builder_), registry_(s.place.registry().host()) {
        write_file(at_ / "ctx/own", "own\n");
        write_file(
            at_ / "ctx/Dockerfile",
            "ARG WORD=none\nFROM busybox AS base\nRUN echo base > /base\nFROM base\nARG WORD\nCOPY own /own\nRUN echo $WORD > /word\nLABEL a=b\n");
    }

    void outputs() {
        const auto ctx = path("ctx");
        const auto out = [this](const std::string& how) { return strings{"-o", how}; };
        build(ctx, out("type=local,dest=" + path("local")));
        BOOST_TEST(read_file(at_ / "local/own") == "own\n");
        build(ctx, out("type=tar,dest=" + path("x.tar")));
        BOOST_TEST(has(must_run({"tar", "tf", path("x.tar")}).out, "own\n"));
        for (const auto* type : {"oci", "docker"}) {
            build(ctx, {"-t", "named:1", "-o", cat("type=", type, ",dest=", path(type)), "--provenance=false"});
            const auto image = must_run({"skopeo", "inspect", "--config", cat(type, "-archive:", path(type))});
            BOOST_TEST(has(image.out, "\"a\": \"b\""), image.out);
        }
        build(ctx, {"-t", cat(builder_, ":loaded"), "-o", "type=docker"});
        BOOST_TEST(s_.must({"run", "--rm", "--network=none", cat(builder_, ":loaded"), "cat", "/own"}).out == "own\n");
        build(ctx, {"-o", cat("type=image,name=", name("image"), ",push=true")});
        build(ctx, {"-t", name("registry"), "-o", "type=registry"});
        for (const auto* n : {"image", "registry"}) BOOST_TEST(has(config_of(name(n)), "\"a\": \"b\""));
        build(ctx, out("type=cacheonly"));
    }

    void inputs() {
        write_file(at_ / "more/Dockerfile",
                   "FROM busybox\nCOPY --from=other file /file\n"
                   "RUN --mount=type=secret,id=s cat /run/secrets/s > /secret\n"
                   "RUN --mount=type=ssh test -S \"$SSH_AUTH_SOCK\" && echo agent > /agent\n");
        write_file(at_ / "other/file", "from another place\n");
        write_file(at_ / "secret", "told in secret\n");
        must_run({"ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path("key")});
        build(path("more"), {"--build-context", cat("other=", path("other")), "--secret", cat("id=s,src=", path("secret")), "--ssh",
                             cat("default=", path("key")), "-o", cat("type=local,dest=", path("got"))});
        BOOST_TEST(read_file(at_ / "got/file") == "from another place\n");
        BOOST_TEST(read_file(at_ / "got/secret") == "told in secret\n");
        BOOST_TEST(read_file(at_ / "got/agent") == "agent\n");
    }

    void caches() {
        const auto ctx = path("ctx");
        const auto cache = name("cache");
        build(ctx, {"--build-arg", "WORD=cached", "--cache-to", cat("type=registry,mode=max,ref=", cache)});
        build(ctx, {"--build-arg", "WORD=inline", "-t", name("inline"), "--push", "--cache-to", "type=inline"});
        for (const auto& [word, from] : std::vector<std::pair<std::string, std::string>>{{"cached", cache}, {"inline", name("inline")}}) {
            s_.buildx({"prune", "--builder", builder_, "--all", "--force"});
            const auto again = build(ctx, {"--build-arg", cat("WORD=", word), "--cache-from", cat("type=registry,ref=", from)});
            BOOST_TEST(cached(again.err, cat("RUN echo ", word, " > /word")), again.err);
        }
    }

    void attestations() {
        const auto metadata = path("metadata.json");
        build(path("ctx"), {"-t", name("attested"), "--push", "--attest", "type=provenance,mode=max", "--metadata-file", metadata});
        const auto told = read_file(metadata);
        BOOST_TEST(has(told, "\"containerimage.digest\": \"sha256:"), told);
        BOOST_TEST(has(told, cat("\"image.name\": \"", name("attested"))), told);
        const auto statement = s_.buildx({"imagetools", "inspect", name("attested"), "--format", "{{json .Provenance}}"}).out;
        BOOST_TEST(has(statement, "\"buildType\":"), statement);
        BOOST_TEST(has(statement, "busybox"), statement);
        s_.buildx({"imagetools", "create", "-t", name("copied"), name("attested")});
        // The first one named is the root's own.
        const auto digest = [&](const std::string& what) {
            const auto told = s_.buildx({"imagetools", "inspect", what}).out;
            const auto at = told.find("Digest:");
            return at == std::string::npos ? told : told.substr(at, told.find('\n', at) - at);
        };
        BOOST_TEST(digest(name("copied")) == digest(name("attested")));
    }

    void bake() {
        write_file(at_ / "docker-bake.hcl",
                   "group \"default\" { targets = [\"one\", \"two\", \"three\"] }\n"
                   "target \"one\" {\n  context = \"ctx\"\n  args = { WORD = \"1\" }\n  output = [\"type=local,dest=baked1\"]\n}\n"
                   "target \"two\" {\n  inherits = [\"one\"]\n  args = { WORD = \"2\" }\n  output = [\"type=local,dest=baked2\"]\n}\n"
                   "target \"three\" {\n  dockerfile-inline = \"FROM busybox\\nCOPY --from=first own /copied\\n\"\n"
                   "  contexts = { first = \"./ctx\" }\n  output = [\"type=local,dest=baked3\"]\n}\n");
        auto o = s_.place.options(s_.engine().environment, 120s);
        o.cwd = at_.string();
        const auto baked = run({"docker", "buildx", "bake", "--builder", builder_, "--progress=plain"}, o);
        BOOST_TEST(baked.code == 0, baked.str());
        BOOST_TEST(read_file(at_ / "baked1/word") == "1\n");
        BOOST_TEST(read_file(at_ / "baked2/word") == "2\n");
        BOOST_TEST(read_file(at_ / "baked3/copied") == "own\n");
    }

    void questions() {
        BOOST_TEST(has(s_.buildx({"inspect", builder_}).out, "linux/amd64"));
        const auto list = s_.buildx({"ls"}).out;
        BOOST_TEST(std::regex_search(list, std::regex(builder_ + "[^\\n]*\\n[^\\n]*running")), list);
        // What this buildx may not know yet.
        const auto knows = [this](const strings& args, const std::string& word) { return has(s_.engine().docker(args).str(), word); };
        if (knows({"buildx", "build", "--help"}, "--check")) {
            write_file(at_ / "odd/Dockerfile", "from busybox AS Odd\nRUN true\n");
            const auto checked = s_.engine().docker({"buildx", "build", "--builder", builder_, "--check", path("odd")});
            BOOST_TEST(checked.code == 1, checked.str());
            BOOST_TEST(has(checked.str(), "StageNameCasing"), checked.str());
            const auto outline = s_.buildx({"build", "--builder", builder_, "--call", "outline", path("ctx")}).out;
            BOOST_TEST(has(outline, "WORD"), outline);
        }
        if (knows({"buildx", "--help"}, "history")) {
            const auto builds = s_.buildx({"history", "ls", "--builder", builder_, "--format", "{{.Ref}}"}).out;
            BOOST_TEST(!builds.empty());
            const auto latest = builds.substr(0, builds.find('\n'));
            const auto ref = latest.substr(latest.rfind('/') + 1);
            BOOST_TEST(has(s_.buildx({"history", "inspect", "--builder", builder_, ref}).out, "Duration"));
            BOOST_TEST(has(s_.buildx({"history", "logs", "--builder", builder_, "--progress", "plain", ref}).str(), "#1 "));
        }
    }

    void clean() {
        BOOST_TEST(!has(s_.buildx({"du", "--builder", builder_}).out, "Total:\t\t0B"));
        s_.buildx({"prune", "--builder", builder_, "--all", "--force"});
        const auto left = s_.buildx({"du", "--builder", builder_}).out;
        BOOST_TEST(std::regex_search(left, std::regex("Total:\\s*0B")), left);
    }

    /// All of it; a builder in a container also stops, and what it knew stays.
    void all() {
        outputs();
        inputs();
        caches();
        attestations();
        bake();
        questions();
    }
    outcome build(const std::string& context, strings more = {}) {
        strings args{"build", "--builder", builder_, "--progress=plain"};
        args.insert(args.end(), more.begin(), more.end());
        args.push_back(context);
        return s_.buildx(args);
    }
    [[nodiscard]] std::string path(const std::string& name) const { return (at_ / name).string(); }

private:
    [[nodiscard]] std::string name(const std::string& what) const { return cat(registry_, "/", builder_, ":", what); }
    std::string config_of(const std::string& image) { return s_.buildx({"imagetools", "inspect", image, "--format", "{{json .Image}}"}).out; }
    site& s_;
    std::string builder_;
    stdfs::path at_;
    std::string registry_;
};

/// cobuildd on this machine, for buildx's driver "remote".
struct remote_daemon {
    workshop place;
    std::optional<running> daemon;
    remote_daemon(const site& s, const std::string& address, strings more = {}) {
        write_file(place.config, s.mirrored());
        strings args{beside("cobuildd"), "--root", place.root, "--config", place.config, "--addr", address};
        args.insert(args.end(), place.flags.begin(), place.flags.end());
        args.insert(args.end(), more.begin(), more.end());
        daemon.emplace(args, place.options({}, 300s));
        BOOST_REQUIRE(daemon->wait_stderr("running server on " + address));
    }
    void stop() {
        daemon->signal(SIGTERM);
        const auto o = daemon->wait();
        BOOST_TEST(o.code == 0, o.str());
        // Processes come and go: the engine's.
        for (const auto& left : place.leftovers())
            if (!left.starts_with("process ")) BOOST_ERROR(left);
    }
};

}  // namespace

BOOST_AUTO_TEST_CASE(six_a_builder_in_a_container) {
    if (!needs_root()) return;
    auto* s = site::get();
    if (s == nullptr) return;
    s->create("tour", s->mirrored());
    tour t(*s, "tour");
    t.all();
    s->buildx({"stop", "tour"});
    BOOST_TEST(has(s->buildx({"inspect", "tour"}).out, "stopped"));
    const auto log = s->logs("tour");
    BOOST_TEST(has(log, "stopping server"), log);
    // It starts again with the next build, and knows what it knew.
    const auto again = t.build(t.path("ctx"), {"--build-arg", "WORD=inline"});
    BOOST_TEST(cached(again.err, "RUN echo inline > /word"), again.err);
    t.clean();
    s->buildx({"rm", "tour"});
    BOOST_TEST(!has(s->buildx({"ls"}).out, "tour"));
}

BOOST_AUTO_TEST_CASE(six_a_remote_builder_over_a_socket) {
    if (!needs_root()) return;
    auto* s = site::get();
    if (s == nullptr) return;
    const auto address = "unix://" + s->place.path("remote.sock");
    remote_daemon d(*s, address);
    s->buildx({"create", "--name", "remote", "--driver", "remote", address});
    tour t(*s, "remote");
    t.all();
    t.clean();
    s->buildx({"rm", "remote"});
    d.stop();
}

BOOST_AUTO_TEST_CASE(six_a_remote_builder_over_tcp_with_certificates) {
    if (!needs_root()) return;
    auto* s = site::get();
    if (s == nullptr) return;
    stdfs::create_directories(s->place / "mtls");
    const authority ca(s->place / "mtls", "ca"), other(s->place / "mtls", "other");
    const auto server = ca.issue("server", "DNS:localhost,IP:127.0.0.1"), client = ca.issue("client", "DNS:client"),
               stranger = other.issue("stranger", "DNS:x");
    const std::string address = "tcp://127.0.0.1:7998";
    remote_daemon d(*s, address, {"--tlscert", server.cert, "--tlskey", server.key, "--tlscacert", ca.cert()});
    s->buildx({"create", "--name", "secure", "--driver", "remote", "--driver-opt",
               cat("cacert=", ca.cert(), ",cert=", client.cert, ",key=", client.key, ",servername=localhost"), address});
    tour t(*s, "secure");
    t.outputs();
    t.inputs();
    t.bake();
    t.questions();
    t.clean();
    // A certificate of somebody else's, and none at all. (buildx would knock for twenty seconds.)
    const auto knock = [&](strings who) {
        who.insert(who.begin(), {beside("buildctl"), "--addr", address, "--tlscacert", ca.cert(), "--tlsservername", "localhost"});
        who.insert(who.end(), {"debug", "workers"});
        return run(who, s->place.options());
    };
    BOOST_TEST(knock({"--tlscert", client.cert, "--tlskey", client.key}).code == 0);
    BOOST_TEST(knock({"--tlscert", stranger.cert, "--tlskey", stranger.key}).code == 1);
    BOOST_TEST(knock({}).code == 1);
    s->buildx({"rm", "secure"});
    d.stop();
}

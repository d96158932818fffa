// skopeo, umoci, runc and docker-registry open what we write.
#include "support/program.hpp"

#include <unistd.h>

#include <filesystem>
#include <string>

import cobuild.base;
import cobuild.json;

using namespace cobuild;
using namespace cobuild::test;
namespace stdfs = std::filesystem;

BOOST_TEST_GLOBAL_FIXTURE(isolation);

namespace {

bool have(const strings& programs) {
    for (const auto& p : programs)
        if (run({"sh", "-c", "command -v " + p}).code != 0) {
            BOOST_TEST_MESSAGE("skipped: " << p << " is not installed");
            return false;
        }
    return needs_root() && docker_registry::available();
}

const char* const dockerfile =
    "FROM busybox\n"
    "RUN echo hello from a step > /greeting\n"
    "COPY own /own\n"
    "LABEL org.example.a=\"b c\"\n"
    "ENV GREETING=/greeting\n"
    "CMD [\"cat\", \"/greeting\"]\n";

struct shop {
    workshop place;
    shop() {
        place.make_base("busybox");
        write_file(place / "ctx/own", "own\n");
        write_file(place / "ctx/Dockerfile", dockerfile);
    }
    void build(strings extra, strings env = {}) {
        extra.insert(extra.end(), {"--metadata-file", place.path("meta.json")});
        must_run(place.build("ctx", std::move(extra)), place.options(std::move(env)));
    }
    /// `skopeo inspect` says what was built.
    void check_inspected(const outcome& o) {
        const auto v = json::parse(o.out);
        const auto& image = v.as_object();
        BOOST_TEST(json::string_at(image, "Digest") == image_digest(place / "meta.json"));
        BOOST_TEST(json::array_at(image, "Layers").size() == 3U);
        BOOST_TEST(json::string_at(json::object_at(image, "Labels"), "org.example.a") == "b c");
        BOOST_TEST(json::strings_at(image, "Env") == (strings{"PATH=/bin", "GREETING=/greeting"}));
        BOOST_TEST(json::string_at(image, "Architecture") == "amd64");
        BOOST_TEST(json::string_at(image, "Os") == "linux");
        BOOST_TEST(json::string_at(image, "Created") == "2023-11-14T22:13:20Z");
    }
};

}  // namespace

BOOST_AUTO_TEST_CASE(skopeo_reads_an_oci_archive) {
    if (!have({"skopeo"})) return;
    shop s;
    s.build({"-t", "app:1", "-o", "type=oci,dest=" + s.place.path("x.tar")});
    s.check_inspected(must_run({"skopeo", "inspect", "oci-archive:" + s.place.path("x.tar")}, s.place.options()));
    must_run({"skopeo", "copy", "oci-archive:" + s.place.path("x.tar"), "dir:" + s.place.path("copied")}, s.place.options());
}

BOOST_AUTO_TEST_CASE(skopeo_reads_a_docker_archive) {
    if (!have({"skopeo"})) return;
    shop s;
    s.build({"-t", "app:1", "-o", "type=docker,dest=" + s.place.path("x.tar")});
    const auto o =
        must_run({"skopeo", "inspect", "--config", "docker-archive:" + s.place.path("x.tar") + ":docker.io/library/app:1"}, s.place.options());
    const auto v = json::parse(o.out);
    BOOST_TEST(json::strings_at(json::object_at(v.as_object(), "config"), "Cmd") == (strings{"cat", "/greeting"}));
    must_run({"skopeo", "copy", "docker-archive:" + s.place.path("x.tar"), "dir:" + s.place.path("copied")}, s.place.options());
}

BOOST_AUTO_TEST_CASE(pushed_over_http) {
    if (!have({"skopeo"})) return;
    shop s;
    const auto name = s.place.registry().host() + "/team/app:1";
    s.build({"-t", name, "--push"});
    s.check_inspected(must_run({"skopeo", "inspect", "--tls-verify=false", "docker://" + name}, s.place.options()));
    must_run({"skopeo", "copy", "--src-tls-verify=false", "docker://" + name, "dir:" + s.place.path("copied")}, s.place.options());
}

BOOST_AUTO_TEST_CASE(pushed_over_https_with_a_login) {
    if (!have({"skopeo", "openssl", "htpasswd"})) return;
    shop s;
    stdfs::create_directories(s.place / "tls");
    stdfs::create_directories(s.place / "secure");
    const authority ca(s.place / "tls", "ca");
    const auto pair = ca.issue("registry", "DNS:localhost,IP:127.0.0.1");
    const docker_registry secure(s.place / "secure", {.tls_cert = pair.cert, .tls_key = pair.key, .user = "alice", .password = "open-sesame"});
    const auto name = secure.host() + "/team/app:1";
    write_file(s.place.config, read_file(s.place.config) + "[registry.\"" + secure.host() + "\"]\nhttp = false\nca = [\"" + ca.cert() + "\"]\n");
    const auto log_in = [&](const std::string& password) {
        write_file(s.place / "home/.docker/config.json",
                   "{\"auths\":{\"" + secure.host() + "\":{\"auth\":\"" + base64_encode("alice:" + password) + "\"}}}");
    };
    log_in("open-sesame");
    s.build({"-t", name, "--push"});
    stdfs::create_directories(s.place / "certs");
    stdfs::copy_file(ca.cert(), s.place / "certs/ca.crt");
    s.check_inspected(
        must_run({"skopeo", "inspect", "--cert-dir", s.place.path("certs"), "--creds", "alice:open-sesame", "docker://" + name}, s.place.options()));
    // And pulled again by its digest.
    write_file(s.place / "ctx/Dockerfile",
               "FROM " + secure.host() + "/team/app@" + image_digest(s.place / "meta.json") + "\nRUN grep hello /greeting\n");
    s.place.root = s.place.path("other-root");
    s.build({"-t", "again"});

    for (const auto* password : {"wrong", ""}) {
        if (*password == '\0')
            stdfs::remove(s.place / "home/.docker/config.json");
        else
            log_in(password);
        const auto o = s.place.run_build("ctx", {"-t", name, "--push", "--no-cache"});
        const auto lines = error_lines(o);
        BOOST_CHECK_MESSAGE(o.code == 1 && lines.size() == 1, o.str());
        if (!lines.empty()) {
            BOOST_TEST_MESSAGE(lines.front());
            BOOST_CHECK_MESSAGE(lines.front().find(secure.host()) != std::string::npos, lines.front());
        }
        BOOST_CHECK_MESSAGE(o.err.find("open-sesame") == std::string::npos &&
                                (*password == '\0' || o.err.find(base64_encode("alice:" + std::string(password))) == std::string::npos),
                            o.str());
    }
    // Without the authority the certificate is refused by name.
    write_file(s.place.config, "[registry.\"" + secure.host() + "\"]\nhttp = false\n");
    const auto o = s.place.run_build("ctx", {"-t", name, "--push"});
    BOOST_CHECK_MESSAGE(o.code != 0 && error_lines(o).size() == 1 && error_lines(o).front().find("certificate") != std::string::npos, o.str());
}

BOOST_AUTO_TEST_CASE(umoci_unpacks_and_runc_runs) {
    if (!have({"umoci", "runc"})) return;
    shop s;
    s.build({"-t", "app:1", "-o", "type=oci,dest=" + s.place.path("x.tar")});
    stdfs::create_directories(s.place / "layout");
    must_run({"tar", "-xf", s.place.path("x.tar"), "-C", s.place.path("layout")});
    must_run({"umoci", "unpack", "--image", s.place.path("layout") + ":1", s.place.path("bundle")}, s.place.options());
    BOOST_TEST(read_file(s.place / "bundle/rootfs/greeting") == "hello from a step\n");
    BOOST_TEST(read_file(s.place / "bundle/rootfs/own") == "own\n");
    auto spec = json::parse(read_file(s.place / "bundle/config.json"));
    spec.as_object()["process"].as_object().set("terminal", false);
    write_file(s.place / "bundle/config.json", json::serialize(spec));
    const auto id = "cobuild-foreign-" + std::to_string(::getpid());
    const auto o = run({"runc", "--root", s.place.path("runc"), "run", "--bundle", s.place.path("bundle"), id}, s.place.options());
    run({"runc", "--root", s.place.path("runc"), "delete", "--force", id}, s.place.options());
    BOOST_CHECK_MESSAGE(o.code == 0, o.str());
    BOOST_TEST(o.out == "hello from a step\n");
}

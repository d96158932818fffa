#include "support/support.hpp"

#include <string>
#include <string_view>

#include "support/certs.hpp"
#include "support/fake_registry.hpp"
#include "support/program.hpp"

import cobuild.base;

using namespace cobuild;
using test::docker_registry;
using test::strings;

namespace {

/// Two private registries behind TLS, the second with a login, and a configuration that trusts them.
struct place {
    place()
        : ours(dir.path(), "Ours"),
          server(ours.issue("server", "IP:127.0.0.1")),
          first(dir / "one", {.tls_cert = server.cert, .tls_key = server.key}),
          second(dir / "two", {.tls_cert = server.cert, .tls_key = server.key, .user = "ann", .password = "sesame"}) {
        std::filesystem::create_directory(dir / "home");
        // Loopback is plain http unless the file says otherwise.
        std::string trusting, distrusting;
        for (const auto* r : {&first, &second}) {
            const auto entry = cat("[registry.\"", r->host(), "\"]\nhttp = false\n");
            distrusting += entry;
            trusting += cat(entry, "ca = [\"", ours.cert(), "\"]\n");
        }
        test::write_file(dir / "trusting.toml", trusting);
        test::write_file(dir / "distrusting.toml", distrusting);
    }

    test::outcome cobuild(strings args, const std::string& config = "trusting.toml") const {
        args.insert(args.begin(), test::program());
        if (args.at(1) != "logout") args.insert(args.end(), {"--config", (dir / config).string()});
        return test::run(std::move(args), {.env = {cat("HOME=", (dir / "home").string()), cat("DOCKER_CONFIG=", (dir / "home").string())}});
    }

    /// A first image, pushed by another tool.
    void fill() const {
        test::shell(cat("mkdir -p '", (dir / "oci").string(), "' && cd '", (dir / "oci").string(),
                        "' && umoci init --layout image && umoci new --image image:1 && skopeo --insecure-policy copy -q --dest-cert-dir='",
                        (dir / "certs").string(), "' oci:image:1 docker://", first.host(), "/app/web:1"));
    }

    test::scratch_dir dir;
    test::authority ours;
    test::authority::pair server;
    docker_registry first, second;
};

bool has(const std::string& text, std::string_view part) {
    if (text.find(part) == std::string::npos) BOOST_TEST_MESSAGE("it says: " << text);
    return text.find(part) != std::string::npos;
}

}  // namespace

BOOST_AUTO_TEST_CASE(look_copy_and_log_in) {
    if (!docker_registry::available()) return;
    const place p;
    std::filesystem::create_directory(p.dir / "certs");
    std::filesystem::copy(p.ours.cert(), p.dir / "certs/ca.crt");
    p.fill();
    const auto source = cat(p.first.host(), "/app/web:1");
    const auto target = cat(p.second.host(), "/mirror/web:2");

    const auto checked = p.cobuild({"registry", "check", source});
    BOOST_TEST(checked.code == 0, checked.str());
    BOOST_TEST(has(checked.out, cat(p.first.host(), " (origin)")));
    BOOST_TEST(has(checked.out, cat("[registry.\"", p.first.host(), "\"]")));
    BOOST_TEST(has(checked.out, "issued by CN = Ours"));
    BOOST_TEST(has(checked.out, "200 OK, sha256:"));
    const auto distrusted = p.cobuild({"registry", "check", source}, "distrusting.toml");
    BOOST_TEST(distrusted.code == 1);
    BOOST_TEST(has(distrusted.out, "is signed by an unknown authority (issuer CN = Ours)"));

    // Without a login the copy is refused and says so; a wrong one is not kept; a right one is.
    const auto refused = p.cobuild({"registry", "copy", source, target});
    BOOST_TEST(refused.code == 1);
    BOOST_TEST(has(refused.err, "there is no login for it"));
    const auto wrong = p.cobuild({"login", p.second.host(), "-u", "ann", "-p", "wrong"});
    BOOST_TEST(wrong.code == 1);
    BOOST_TEST(has(wrong.err, "401"));
    BOOST_TEST(!std::filesystem::exists(p.dir / "home/config.json"));
    const auto kept = p.cobuild({"login", p.second.host(), "-u", "ann", "-p", "sesame"});
    BOOST_TEST(kept.code == 0, kept.str());
    const auto copied = p.cobuild({"registry", "copy", source, target});
    BOOST_TEST_REQUIRE(copied.code == 0, copied.str());
    const auto inspected = p.cobuild({"registry", "inspect", target});
    BOOST_TEST(has(inspected.out, cat("Digest:    ", copied.out.substr(0, copied.out.find('\n')))));
    BOOST_TEST(has(inspected.out, "Name:      "));
    BOOST_TEST(p.cobuild({"registry", "ls", cat(p.second.host(), "/mirror/web")}).out == "2\n");
    // Another tool finds it whole.
    test::shell(cat("skopeo --insecure-policy copy -q --src-creds ann:sesame --src-cert-dir='", (p.dir / "certs").string(), "' docker://", target,
                    " dir:'", (p.dir / "out").string(), "'"));
    const auto logged_out = p.cobuild({"logout", p.second.host()});
    BOOST_TEST(logged_out.code == 0, logged_out.str());
    BOOST_TEST(p.cobuild({"registry", "ls", cat(p.second.host(), "/mirror/web")}).code == 1);
    BOOST_TEST(p.cobuild({"logout", p.second.host()}).code == 1);
}

BOOST_AUTO_TEST_CASE(the_log_and_its_two_forms) {
    if (!docker_registry::available()) return;
    const place p;
    const auto text = p.cobuild({"registry", "ls", cat(p.first.host(), "/none"), "--debug"});
    BOOST_TEST(text.code == 1);
    BOOST_TEST(has(text.err, "level=debug msg=\"do request\""));
    BOOST_TEST(has(text.err, "request.method=GET"));
    BOOST_TEST(has(text.err, "response.status=\"404 Not Found\""));
    const auto json = p.cobuild({"registry", "ls", cat(p.first.host(), "/none"), "--debug", "--log-format", "json"});
    BOOST_TEST(has(json.err, "\"msg\":\"fetch response received\""));
    BOOST_TEST(has(json.err, "\"response.status\":\"404 Not Found\""));
}

// A build ends with 1 when a certificate is not trusted, as with every other answer of a registry.
BOOST_AUTO_TEST_CASE(a_build_from_an_untrusted_registry) {
    if (!docker_registry::available() || !test::needs_root()) return;
    const place p;
    std::filesystem::create_directory(p.dir / "ctx");
    test::write_file(p.dir / "ctx/Dockerfile", cat("FROM ", p.first.host(), "/app/web:1\n"));
    const auto built =
        p.cobuild({"build", "--root", (p.dir / "root").string(), "--oci-worker-net=none", (p.dir / "ctx").string()}, "distrusting.toml");
    BOOST_TEST(built.code == 1, built.str());
    BOOST_TEST(has(built.err, cat("the certificate of ", p.first.host(),
                                  " is signed by an unknown authority (issuer CN = Ours); add its CA file to \"ca\" in "
                                  "[registry.\"",
                                  p.first.host(), "\"]")));
}

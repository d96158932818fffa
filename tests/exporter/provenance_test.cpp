// What is attested, read without our own writer.
#include "support/support.hpp"

#include <chrono>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

import cobuild.base;
import cobuild.oci;
import cobuild.json;
import cobuild.exporter;

using namespace cobuild;

namespace {

exporter::build_record a_record() {
    exporter::build_record r;
    r.request.attrs = {{"filename", "app.Dockerfile"},
                       {"build-arg:TOKEN", "hush"},
                       {"label:owner", "me"},
                       {"context", "https://user:pass@example.org/x.git#main"},
                       {"platform", "linux/arm64"},
                       {"cgroup-parent", "/x"},
                       {"attest:provenance", "mode=max"},
                       {"vcs:revision", "abc"}};
    r.secrets = {{"key", false}, {"maybe", true}};
    r.locals = {"context"};
    r.materials = {{"pkg:docker/alpine@3?platform=linux%2Famd64", {{"sha256", "00ff"}}},
                   {"https://xxxxx:xxxxx@example.org/x.git#main", {{"sha1", "cafe"}}}};
    r.complete = false;
    r.builder = oci::parse_platform("linux/amd64");
    r.invocation = "id";
    r.started = std::chrono::sys_time<nanoseconds>{std::chrono::seconds{978307200}};
    r.finished = r.started + std::chrono::seconds{5};
    r.steps = {{.id = "step0", .digest = "sha256:aa", .op = R"({"Op":1})", .inputs = {}},
               {.id = "step1", .digest = "sha256:bb", .op = "{}", .inputs = {"step0:0"}}};
    r.sources = {{.filename = "app.Dockerfile", .language = "Dockerfile", .data = "FROM alpine"}};
    return r;
}

json::object predicate(const exporter::attestation& a) { return json::parse(a.predicate).as_object(); }
const json::object& in(const json::object& o, std::string_view key) { return json::object_at(o, key); }

}  // namespace

BOOST_AUTO_TEST_SUITE(provenance)

// slsa.dev/provenance/v1 with BuildKit's members (reference 8.8).
BOOST_AUTO_TEST_CASE(version_1) {
    const auto a = exporter::make_provenance({.max = true, .builder_id = "https://ci/1"}, a_record());
    BOOST_TEST(a.predicate_type == "https://slsa.dev/provenance/v1");
    BOOST_TEST(a.filename == "provenance.json");
    const auto p = predicate(a);
    const auto& definition = in(p, "buildDefinition");
    const auto& external = in(definition, "externalParameters");
    BOOST_TEST(json::string_at(in(external, "configSource"), "path") == "app.Dockerfile");
    BOOST_TEST(json::string_at(in(external, "configSource"), "uri") == "https://xxxxx:xxxxx@example.org/x.git#main");
    BOOST_TEST(json::string_map_at(in(external, "configSource"), "digest").at("sha1") == "cafe");
    const auto& request = in(external, "request");
    BOOST_TEST(json::string_at(request, "frontend") == "dockerfile.v0");
    const std::map<std::string, std::string> args{{"build-arg:TOKEN", "hush"}, {"label:owner", "me"}};
    BOOST_TEST((json::string_map_at(request, "args") == args));
    BOOST_TEST(json::array_at(request, "secrets").size() == 2U);
    BOOST_TEST(json::string_at(json::array_at(request, "locals").at(0).as_object(), "name") == "context");
    const auto& config = in(in(definition, "internalParameters"), "buildConfig");
    const auto& steps = json::array_at(config, "llbDefinition");
    BOOST_TEST(steps.size() == 2U);
    BOOST_TEST(json::strings_at(steps[1].as_object(), "inputs").at(0) == "step0:0");
    BOOST_TEST(json::string_map_at(config, "digestMapping").at("sha256:bb") == "step1");
    BOOST_TEST(json::string_at(in(definition, "internalParameters"), "builderPlatform") == "linux/amd64");
    const auto& used = json::array_at(definition, "resolvedDependencies").at(0).as_object();
    BOOST_TEST(json::string_at(used, "uri") == "pkg:docker/alpine@3?platform=linux%2Famd64");
    BOOST_TEST(json::string_map_at(used, "digest").at("sha256") == "00ff");
    const auto& details = in(p, "runDetails");
    BOOST_TEST(json::string_at(in(details, "builder"), "id") == "https://ci/1");
    const auto& metadata = in(details, "metadata");
    BOOST_TEST(json::string_at(metadata, "startedOn") == "2001-01-01T00:00:00Z");
    BOOST_TEST(json::string_at(metadata, "finishedOn") == "2001-01-01T00:00:05Z");
    BOOST_TEST(!json::at(in(metadata, "buildkit_completeness"), "resolvedDependencies").as_bool());
    BOOST_TEST(json::at(in(metadata, "buildkit_completeness"), "request").as_bool());
    const auto& extra = in(metadata, "buildkit_metadata");
    BOOST_TEST(json::string_at(in(extra, "vcs"), "revision") == "abc");
    const auto& info = json::array_at(in(extra, "source"), "infos").at(0).as_object();
    BOOST_TEST(base64_decode(json::string_at(info, "data")).value() == "FROM alpine");
}

BOOST_AUTO_TEST_CASE(mode_min_tells_no_values) {
    const auto a = exporter::make_provenance({}, a_record());
    for (const auto* word : {"hush", "owner", "\"key\"", "llbDefinition", "infos", "pass"})
        BOOST_TEST(a.predicate.find(word) == std::string::npos, word);
    const auto p = predicate(a);
    BOOST_TEST(!json::at(in(in(in(p, "runDetails"), "metadata"), "buildkit_completeness"), "request").as_bool());
    BOOST_TEST(a.predicate.find("abc") != std::string::npos);
}

BOOST_AUTO_TEST_CASE(version_0_2) {
    const auto a = exporter::make_provenance({.max = true, .v1 = false, .reproducible = true, .filename = "p.json"}, a_record());
    BOOST_TEST(a.predicate_type == "https://slsa.dev/provenance/v0.2");
    BOOST_TEST(a.filename == "p.json");
    const auto p = predicate(a);
    BOOST_TEST(json::string_at(p, "buildType") == "https://mobyproject.org/buildkit@v1");
    BOOST_TEST(json::string_at(in(in(p, "invocation"), "configSource"), "entryPoint") == "app.Dockerfile");
    BOOST_TEST(json::string_at(in(in(p, "invocation"), "environment"), "platform") == "linux/amd64");
    BOOST_TEST(json::array_at(p, "materials").size() == 2U);
    BOOST_TEST(json::array_at(in(p, "buildConfig"), "llbDefinition").size() == 2U);
    BOOST_TEST(json::at(in(p, "metadata"), "reproducible").as_bool());
    BOOST_TEST(!json::at(in(in(p, "metadata"), "completeness"), "materials").as_bool());
}

BOOST_AUTO_TEST_CASE(hermetic_and_complete) {
    auto r = a_record();
    const auto hermetic = [&] {
        return json::at(in(in(predicate(exporter::make_provenance({}, r)), "runDetails"), "metadata"), "buildkit_hermetic").as_bool();
    };
    BOOST_TEST(!hermetic());
    BOOST_CHECK_THROW((void)exporter::make_provenance({.complete_materials = true}, r), error);
    r.complete = true;
    BOOST_TEST(hermetic());
    (void)exporter::make_provenance({.complete_materials = true}, r);
    r.network = true;
    BOOST_TEST(!hermetic());
}

BOOST_AUTO_TEST_CASE(parameters) {
    const auto parse = [](std::string text, bool max = false) { return exporter::parse_attests({{"provenance", std::move(text)}}, max).provenance; };
    BOOST_TEST(!parse("").value().max);
    BOOST_TEST(parse("true", true).value().max);
    BOOST_TEST(!parse("false").has_value());
    BOOST_TEST(!parse("disabled=true").has_value());
    const auto all = parse("mode=full,version=v0.2,inline-only=true,reproducible=1,filename=f.json,\"builder-id=a,b\"").value();
    BOOST_TEST(all.max);
    BOOST_TEST(!all.v1);
    BOOST_TEST(all.inline_only);
    BOOST_TEST(all.reproducible);
    BOOST_TEST(all.builder_id == "a,b");
    for (const auto* bad : {"mode=some", "version=v2", "mod=max", "inline-only=perhaps"}) BOOST_CHECK_THROW((void)parse(bad), error);
    // buildx 0.13 sends --attest's text whole.
    BOOST_TEST(parse("type=provenance,mode=max").value().max);
    BOOST_CHECK_THROW((void)parse("type=sbom"), error);
    const auto sbom = exporter::parse_attests({{"sbom", "generator=reg.test/scanner,x=y"}}, false).sbom.value();
    BOOST_TEST((sbom == std::map<std::string, std::string>{{"generator", "reg.test/scanner"}, {"x", "y"}}));
    BOOST_TEST(!exporter::parse_attests({{"sbom", ""}}, false).sbom->at("generator").empty());
    BOOST_TEST(exporter::parse_attests({{"provenance", "type=provenance,mode=max"}}, false).provenance->max);
    BOOST_CHECK_THROW((void)exporter::parse_attests({{"vex", ""}}, false), error);
    BOOST_TEST(!exporter::parse_attests({{"sbom", "false"}}, false).provenance.has_value());
    const auto found = exporter::attests_of({{"attest:provenance", "mode=min"},
                                             {"build-arg:BUILDKIT_ATTEST_PROVENANCE", "mode=max"},
                                             {"build-arg:BUILDKIT_ATTEST_SBOM", ""},
                                             {"target", "x"}});
    BOOST_TEST((found == std::map<std::string, std::string>{{"provenance", "mode=min"}, {"sbom", ""}}));
}

// purl-spec, and BuildKit's choice of parts.
BOOST_AUTO_TEST_CASE(package_urls) {
    const auto url = [](std::string_view ref, const char* platform = nullptr) {
        return exporter::package_url("docker", oci::reference::parse(ref),
                                     platform != nullptr ? std::optional(oci::parse_platform(platform)) : std::nullopt);
    };
    BOOST_TEST(url("alpine") == "pkg:docker/alpine@latest");
    BOOST_TEST(url("bitnami/redis:7", "linux/arm64") == "pkg:docker/bitnami/redis@7?platform=linux%2Farm64");
    BOOST_TEST(url("localhost:5000/team/app:1") == "pkg:docker/localhost%3A5000/team/app@1");
    const std::string hex(64, 'a');
    BOOST_TEST(url(cat("alpine:3@sha256:", hex)) == "pkg:docker/alpine@3");
    BOOST_TEST(url(cat("alpine@sha256:", hex), "linux/amd64") == cat("pkg:docker/alpine?digest=sha256:", hex, "&platform=linux%2Famd64"));
    BOOST_TEST(exporter::hide_credentials("https://u:p@h/x?a=b@c") == "https://xxxxx:xxxxx@h/x?a=b@c");
    BOOST_TEST(exporter::hide_credentials("https://token@h/x") == "https://xxxxx@h/x");
    BOOST_TEST(exporter::hide_credentials("https://h/x@y") == "https://h/x@y");
    BOOST_TEST(exporter::hide_credentials("git@h:x") == "git@h:x");
}

// The request that made an input stands in the one that used it, and loses its build arguments with it in mode min.
BOOST_AUTO_TEST_CASE(requests_of_inputs_and_the_clients_own) {
    auto r = a_record();
    r.request.inputs["base"] = std::make_shared<exporter::asked_request>(
        exporter::asked_request{.frontend = "dockerfile.v0", .attrs = {{"target", "base"}, {"build-arg:SECRET", "hush2"}}});
    r.request.root = std::make_shared<exporter::asked_request>(exporter::asked_request{.frontend = "", .attrs = {{"root-request", "x"}}});
    const auto request = [&](bool max) {
        const auto p = predicate(exporter::make_provenance({.max = max}, r));
        return in(in(in(p, "buildDefinition"), "externalParameters"), "request");
    };
    const auto all = request(true);
    const auto& made = in(in(in(all, "inputs"), "base"), "request");
    BOOST_TEST((json::string_map_at(made, "args") == std::map<std::string, std::string>{{"target", "base"}, {"build-arg:SECRET", "hush2"}}));
    BOOST_TEST(!in(in(all, "root"), "request").contains("frontend"));
    BOOST_TEST(json::string_map_at(in(in(all, "root"), "request"), "args").at("root-request") == "x");
    const auto few = request(false);
    BOOST_TEST((json::string_map_at(in(in(in(few, "inputs"), "base"), "request"), "args") == std::map<std::string, std::string>{{"target", "base"}}));
}

// A client that makes its graph itself has no request to tell of.
BOOST_AUTO_TEST_CASE(a_client_without_frontend) {
    auto r = a_record();
    r.request = {};
    const auto p = predicate(exporter::make_provenance({.max = true}, r));
    BOOST_TEST(!json::at(in(in(in(p, "runDetails"), "metadata"), "buildkit_completeness"), "request").as_bool());
    const auto& external = in(in(p, "buildDefinition"), "externalParameters");
    BOOST_TEST(in(external, "configSource").empty());
    BOOST_TEST(!in(external, "request").contains("args"));
}

BOOST_AUTO_TEST_CASE(layers_of_steps) {
    auto r = a_record();
    r.layers = {{"step0:0", 1}, {"step1:0", 2}, {"step9:0", 3}};
    oci::descriptor one, two;
    one.digest = digest::of("one");
    two.digest = digest::of("two");
    one.annotations["internal"] = "x";
    for (const bool v1 : {true, false}) {
        const auto whole = exporter::with_layers(exporter::make_provenance({.max = true, .v1 = v1}, r), {one, two});
        const auto p = predicate(whole);
        const auto& metadata = v1 ? in(in(p, "runDetails"), "metadata") : in(p, "metadata");
        const auto& layers = in(in(metadata, v1 ? "buildkit_metadata" : "https://mobyproject.org/buildkit@v1#metadata"), "layers");
        BOOST_TEST(layers.size() == 2U);  // of step9 the image holds no more than two layers
        const auto& chain = json::array_at(layers, "step1:0").at(0).as_array();
        BOOST_TEST(chain.size() == 2U);
        BOOST_TEST(json::string_at(chain.at(1).as_object(), "digest") == two.digest.str());
        BOOST_TEST(!chain.at(0).as_object().contains("annotations"));
    }
    BOOST_TEST(exporter::with_layers(exporter::make_provenance({}, r), {one, two}).predicate.find("layers") == std::string::npos);
}

BOOST_AUTO_TEST_CASE(environment_of_the_configuration) {
    const test::scratch_dir dir;
    const auto write = [&](const char* name, const char* text) { std::ofstream(dir.path() / name) << text; };
    write("a.json", R"({"foo": "bar", "n": [1, 2]})");
    write("b.json", R"({"foo": "later"})");
    write("c.txt", "no");
    auto r = a_record();
    r.environment = exporter::read_environment(dir.path().string());
    r.dockerfile_version = "1.2";
    const auto v1 = in(in(predicate(exporter::make_provenance({}, r)), "buildDefinition"), "internalParameters");
    BOOST_TEST(json::string_at(v1, "foo") == "later");
    BOOST_TEST(json::string_at(v1, "dockerfileVersion") == "1.2");
    const auto v02 = in(in(predicate(exporter::make_provenance({.v1 = false}, r)), "invocation"), "environment");
    BOOST_TEST(json::array_at(v02, "n").size() == 2U);
    BOOST_TEST(exporter::read_environment("/no/such/directory").empty());
    write("d.json", R"({"builderPlatform": "x"})");
    BOOST_CHECK_THROW((void)exporter::read_environment(dir.path().string()), error);
}

BOOST_AUTO_TEST_SUITE_END()

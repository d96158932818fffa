#include "support/support.hpp"

#include <sys/stat.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

import cobuild.base;
import cobuild.config;

using namespace cobuild;
using namespace cobuild::config;
using namespace std::chrono_literals;
using strings = std::vector<std::string>;

namespace {

error failure_of(std::string_view text, const overrides& flags = {}) {
    try {
        (void)parse(text, "b.toml", flags);
    } catch (const error& e) {
        return e;
    }
    return {errc::internal, "no failure"};
}

bool contains(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

/// "a.b.c = v" as a file: the last key below its table's heading.
std::string file_of(const std::string& table, const std::string& line) { return table.empty() ? line + "\n" : "[" + table + "]\n" + line + "\n"; }

struct key_case {
    std::string table, good;
    std::function<bool(const configuration&)> holds;
    std::string wrong_type;  ///< a value of a type the key does not take
    strings bad_values{};
    bool warns = false;  ///< its feature is not built: the value is there and a warning names the key
};

const std::string W = "worker.oci";

std::vector<key_case> cases() {
    using c = const configuration&;
    return {
        {"", "root = \"/srv/b\"", [](c x) { return x.root == "/srv/b"; }, "1"},
        {"",
         "insecure-entitlements = [\"network.host\", \"security.insecure\", \"device\"]",
         [](c x) { return x.insecure_entitlements == strings{"network.host", "security.insecure", "device"}; },
         "\"network.host\"",
         {"[\"root\"]"}},
        {"", "provenanceEnvDir = \"/p\"", [](c x) { return x.provenance_env_dir == "/p"; }, "[]"},
        {"log", "format = \"json\"", [](c x) { return x.log.format == log_format::json; }, "true", {"\"xml\""}},
        {"log", "level = \"WARN\"", [](c x) { return x.log.level == log_level::warning; }, "3", {"\"loud\""}},
        {"log", "level = \"fatal\"", [](c x) { return x.log.level == log_level::off; }, "3"},
        {"grpc",
         "address = [\"unix:///x.sock\", \"tcp://0.0.0.0:1\", \"fd://\"]",
         [](c x) { return x.grpc.address == strings{"unix:///x.sock", "tcp://0.0.0.0:1", "fd://"}; },
         "\"unix:///x\"",
         {"[\"/run/x.sock\"]", "[\"fd://x\"]", "[\"http://x\"]", "[\"unix://\"]"}},
        {"grpc", "debugAddress = \"0.0.0.0:6060\"", [](c x) { return x.grpc.debug_address == "0.0.0.0:6060"; }, "6060"},
        {"grpc", "uid = 1000", [](c x) { return x.grpc.uid == 1000; }, "\"1000\"", {"-1"}},
        {"grpc", "gid = 1000", [](c x) { return x.grpc.gid == 1000; }, "\"docker\"", {"-1"}},
        {"grpc", "securityDescriptor = \"D:\"", [](c x) { return x.grpc.security_descriptor == "D:"; }, "1", {}, true},
        {"grpc.tls", "cert = \"c\"\nkey = \"k\"", [](c x) { return x.grpc.tls.cert == "c"; }, "1"},
        {"grpc.tls", "key = \"k\"\ncert = \"c\"", [](c x) { return x.grpc.tls.key == "k"; }, "1"},
        {"grpc.tls", "ca = \"a\"\nkey = \"k\"\ncert = \"c\"", [](c x) { return x.grpc.tls.ca == "a"; }, "1"},
        {"otel", "socketPath = \"/o.sock\"", [](c x) { return x.otel.socket_path == "/o.sock"; }, "1", {}, true},
        {"cdi", "disabled = true", [](c x) { return x.cdi.disabled == true; }, "\"yes\"", {}, true},
        {"cdi", "specDirs = [\"/c\"]", [](c x) { return x.cdi.spec_dirs == strings{"/c"}; }, "\"/c\"", {}, true},
        {"cdi", "autoAllowed = [\"v/c\"]", [](c x) { return x.cdi.auto_allowed == strings{"v/c"}; }, "[1]", {}, true},
        {"dns",
         "nameservers = [\"1.1.1.1\", \"fe80::1%eth0\"]",
         [](c x) { return x.dns.nameservers == strings{"1.1.1.1", "fe80::1%eth0"}; },
         "\"1.1.1.1\"",
         {"[\"dns.local\"]"}},
        {"dns", "options = [\"edns0\"]", [](c x) { return x.dns.options == strings{"edns0"}; }, "1"},
        {"dns", "searchDomains = [\"a.b\"]", [](c x) { return x.dns.search_domains == strings{"a.b"}; }, "[true]"},
        {"history", "maxAge = 3600", [](c x) { return x.history.max_age == 1h; }, "true", {"-1", "\"1 day\"", "\"-1h\""}, true},
        {"history", "maxAge = \"72h\"", [](c x) { return x.history.max_age == 72h; }, "1.5", {}, true},
        {"history", "maxEntries = 3", [](c x) { return x.history.max_entries == 3; }, "\"3\"", {"-3"}, true},
        {"frontend.\"dockerfile.v0\"", "enabled = true", [](c x) { return x.frontend.dockerfile_enabled == true; }, "1"},
        {"frontend.\"gateway.v0\"", "enabled = true", [](c x) { return x.frontend.gateway_enabled == true; }, "1"},
        {"frontend.\"gateway.v0\"", "allowedRepositories = [\"a\"]",
         [](c x) { return x.frontend.allowed_repositories == std::vector<std::string>{"a"}; }, "1"},
        {"system", "platformsCacheMaxAge = \"-1s\"", [](c x) { return x.system.platforms_cache_max_age == -1s; }, "true", {"\"x\""}, true},
        {"system", "maxRegistryConcurrency = 8", [](c x) { return x.system.max_registry_concurrency == 8; }, "\"8\"", {"0", "-1"}},
        {"cache.gha.sign", "command = [\"s\"]", [](c x) { return x.gha_cache.sign_command == strings{"s"}; }, "\"s\"", {}, true},
        {W, "enabled = true", [](c x) { return x.oci.enabled == true; }, "\"auto\"", {"false"}},
        {W, "labels = {a = \"b\"}", [](c x) { return x.oci.labels == std::map<std::string, std::string>{{"a", "b"}}; }, "{a = 1}"},
        {W, "snapshotter = \"native\"", [](c x) { return x.oci.snapshotter == "native"; }, "1", {"\"zfs\""}},
        {W, "gc = false", [](c x) { return !x.oci.gc.enabled; }, "\"no\""},
        {W, "gckeepstorage = 9000", [](c x) { return x.oci.gc.reserved_space.bytes == 9000U; }, "true", {"-1", "\"lots\""}},
        {W, "reservedSpace = \"40MB\"", [](c x) { return x.oci.gc.reserved_space.bytes == 40U << 20; }, "[]", {"\"101%\"", "\"-1%\"", "\"x%\""}},
        {W, "maxUsedSpace = \"60%\"", [](c x) { return x.oci.gc.max_used_space.percent == 60; }, "1.5"},
        {W, "minFreeSpace = \"10g\"", [](c x) { return x.oci.gc.min_free_space.bytes == std::uint64_t{10} << 30; }, "{}"},
        {W, "networkMode = \"cni\"", [](c x) { return x.oci.network == network_mode::cni; }, "false", {"\"dhcp\""}},
        {W, "networkMode = \"\"", [](c x) { return x.oci.network == network_mode::automatic; }, "0"},
        {W, "cniConfigPath = \"/c.json\"", [](c x) { return x.oci.cni_config_path == "/c.json"; }, "0"},
        {W, "cniBinaryPath = \"/bin\"", [](c x) { return x.oci.cni_binary_path == "/bin"; }, "[\"/bin\"]"},
        {W, "cniPoolSize = 16", [](c x) { return x.oci.cni_pool_size == 16; }, "\"16\"", {"-1"}},
        {W, "bridgeName = \"br\"", [](c x) { return x.oci.bridge_name == "br"; }, "0", {}, true},
        {W,
         "bridgeSubnet = \"10.9.0.0/24\"",
         [](c x) { return x.oci.bridge_subnet == "10.9.0.0/24"; },
         "0",
         {"\"10.9.0.0\"", "\"10.9.0.0/33\""},
         true},
        {W, "binary = \"crun\"", [](c x) { return x.oci.binary == "crun"; }, "true"},
        {W, "proxySnapshotterPath = \"/s\"", [](c x) { return x.oci.proxy_snapshotter_path == "/s"; }, "true", {}, true},
        {W,
         "stargzSnapshotter = {a = {b = [1, \"c\"]}}",
         [](c x) { return x.oci.stargz_snapshotter.at("a") == "{ b = [1, \"c\"] }"; },
         "1",
         {},
         true},
        {W, "max-parallelism = 4", [](c x) { return x.oci.max_parallelism == 4; }, "\"4\"", {"-1"}},
        {"worker.containerd", "address = \"/c\"", [](c x) { return x.containerd.address == "/c"; }, "1", {}, true},
        {"worker.containerd", "namespace = \"n\"", [](c x) { return x.containerd.containerd_namespace == "n"; }, "1", {}, true},
        {"worker.containerd.runtime", "path = \"/r\"", [](c x) { return x.containerd.runtime_path == "/r"; }, "1", {}, true},
        {"registry.\"docker.io\"",
         "mirrors = [\"http://m:5000/p\", \"[::1]:80\"]",
         [](c x) { return x.registries.at("docker.io").mirrors == strings{"http://m:5000/p", "[::1]:80"}; },
         "\"m\"",
         {"[\"\"]", "[\"https://\"]", "[\"m:0\"]", "[\"m:http\"]", "[\"u@m\"]", "[\"m/a?b\"]"}},
        {"registry.\"a:5000\"", "http = true", [](c x) { return x.registries.at("a:5000").http == true; }, "\"true\""},
        {"registry.\"a:5000\"", "insecure = false", [](c x) { return x.registries.at("a:5000").insecure == false; }, "0"},
        {"registry.\"a:5000\"", "ca = [\"/a.pem\"]", [](c x) { return x.registries.at("a:5000").ca == strings{"/a.pem"}; }, "\"/a.pem\""},
        {"registry.\"a:5000\"", "tlsconfigdir = [\"/d\"]", [](c x) { return x.registries.at("a:5000").tls_config_dirs == strings{"/d"}; }, "\"/d\""},
        {"registry.\"a:5000\"",
         "keypair = [{key = \"k\", cert = \"c\"}]",
         [](c x) { return x.registries.at("a:5000").key_pairs == std::vector<key_pair>{{.key = "k", .cert = "c"}}; },
         "{}",
         {"[{key = \"k\"}]"}},
    };
}

}  // namespace

BOOST_AUTO_TEST_SUITE(config_keys)

BOOST_AUTO_TEST_CASE(every_key_takes_its_value_and_refuses_others) {
    for (const auto& k : cases()) {
        BOOST_TEST_CONTEXT(k.table << ": " << k.good) {
            const auto got = parse(file_of(k.table, k.good), "b.toml");
            BOOST_TEST(k.holds(got.config));
            const std::string key = k.good.substr(0, k.good.find(' '));
            BOOST_TEST(got.warnings.size() == (k.warns || key == "gckeepstorage" ? 1U : 0U));
            if (k.warns && !got.warnings.empty()) {
                BOOST_TEST(contains(got.warnings[0].message, "not supported yet and ignored"));
                BOOST_TEST(contains(got.warnings[0].message, key));
            }
            // Reading back what is written gives the same.
            BOOST_TEST((parse(to_toml(got.config), "again").config == got.config));
            const unsigned line = k.table.empty() ? 1 : 2;
            auto bad = k.bad_values;
            bad.push_back(k.wrong_type);
            for (const auto& value : bad) {
                const auto e = failure_of(file_of(k.table, key + " = " + value));
                BOOST_TEST_CONTEXT(value << " gave " << e.what()) {
                    BOOST_TEST((e.kind() == errc::invalid));
                    BOOST_TEST(contains(e.what(), k.table.empty() ? key : k.table + "." + key));
                    BOOST_REQUIRE(e.where().has_value());
                    BOOST_TEST(e.where()->file == "b.toml");
                    BOOST_TEST(e.where()->line == line);
                }
            }
        }
    }
}

BOOST_AUTO_TEST_CASE(defaults_are_buildkits) {
    const auto c = parse("", "b.toml").config;
    BOOST_TEST(c.root == "/var/lib/buildkit");
    BOOST_TEST(c.provenance_env_dir == "/etc/buildkit/provenance.d");
    BOOST_TEST(c.insecure_entitlements.empty());
    BOOST_TEST(!c.log.level.has_value());
    BOOST_TEST(c.otel.socket_path == "/run/buildkit/otel-grpc.sock");
    BOOST_TEST((c.cdi.spec_dirs == strings{"/etc/cdi", "/var/run/cdi", "/etc/buildkit/cdi"}));
    BOOST_TEST((c.history.max_age == 48h && c.history.max_entries == 50));
    BOOST_TEST((c.system.platforms_cache_max_age == 20s));
    BOOST_TEST(c.system.max_registry_concurrency == 4);
    BOOST_TEST((c.oci.gc.enabled && c.oci.gc.policies.empty() && c.oci.gc.reserved_space.empty()));
    BOOST_TEST((c.oci.network == network_mode::automatic));
    BOOST_TEST(!c.oci.cni_config_path.has_value());
    BOOST_TEST(c.oci.cni_binary_path == "/opt/cni/bin");
    BOOST_TEST((c.oci.bridge_name == "buildkit0" && c.oci.bridge_subnet == "10.10.0.0/16"));
    BOOST_TEST((c.oci.max_parallelism == 0 && c.oci.cni_pool_size == 0));
    BOOST_TEST(c.oci.snapshotter == "auto");
    BOOST_TEST((c.containerd.address == "/run/containerd/containerd.sock" && c.containerd.containerd_namespace == "buildkit"));
    BOOST_TEST((c == configuration{}));
}

BOOST_AUTO_TEST_CASE(every_key_of_the_schema_is_tested_or_refused) {
    std::string all;
    for (const auto& k : cases()) all += k.table + "." + k.good.substr(0, k.good.find(' ')) + "\n";
    for (const auto& d : describe_keys()) {
        if (d.path.starts_with("worker.containerd.") || d.built == key_description::state::refused) continue;
        if (d.path == "worker.oci.platforms") continue;  // depends on the machine: flags_test
        if (contains(d.path, "gcpolicy[]") || contains(d.path, "keypair[]") || d.path == "debug" || d.path == "trace") continue;
        std::string path = d.path;
        if (const auto at = path.find("<name>"); at != std::string::npos) path = path.substr(at + 7);
        BOOST_TEST(contains(all, path + "\n"), "no case for " << d.path);
    }
}

BOOST_AUTO_TEST_CASE(what_restricts_and_is_not_built_is_refused) {
    for (const auto* text : {"proxyNetwork = true", "cache.gha.verify.required = true", "cache.gha.verify.policy = {tlogThreshold = 1}",
                             "worker.oci.networkMode = \"bridge\"", "worker.oci.rootless = true", "worker.oci.noProcessSandbox = true",
                             "worker.oci.isolateCgroups = true", "worker.oci.defaultCgroupParent = \"x\"", "worker.oci.userRemapUnsupported = \"u\"",
                             "worker.oci.apparmor-profile = \"p\"", "worker.oci.selinux = true", "worker.oci.snapshotter = \"stargz\"",
                             "worker.containerd.selinux = true"}) {
        const auto e = failure_of(text);
        BOOST_TEST_CONTEXT(text << " gave " << e.what()) {
            BOOST_TEST((e.kind() == errc::unsupported));
            BOOST_TEST(contains(e.what(), "is not supported yet"));
            BOOST_TEST((e.where() && e.where()->line == 1U));
        }
    }
    // Values that ask for nothing are fine, and a worker that is switched off does not matter.
    const auto quiet = parse(
        "worker.oci.selinux = false\nworker.oci.apparmor-profile = \"\"\nfrontend.\"gateway.v0\".allowedRepositories = [\"a\"]\n"
        "worker.containerd = {enabled = false, selinux = true, address = \"/x\"}\n",
        "b.toml");
    BOOST_TEST(quiet.warnings.empty());
}

BOOST_AUTO_TEST_CASE(one_warning_names_all_that_is_ignored) {
    const auto got = parse("[history]\nmaxAge = 1\n[otel]\nsocketPath = \"/x\"\n", "b.toml");
    BOOST_REQUIRE(got.warnings.size() == 1U);
    BOOST_TEST(got.warnings[0].message == "not supported yet and ignored: history.maxAge, otel.socketPath");
    BOOST_TEST((got.warnings[0].where == source_location{"b.toml", 2}));
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(config_spelling)

BOOST_AUTO_TEST_CASE(unknown_keys_are_named_with_the_nearest) {
    const auto got = parse("[worker.oci]\nmax-paralelism = 4\n[regestry.x]\n[ghacache]\n", "b.toml");
    BOOST_REQUIRE(got.warnings.size() == 3U);
    BOOST_TEST(to_string(got.warnings[0]) ==
               "b.toml:2: warning: worker.oci.max-paralelism: unknown key, ignored; perhaps worker.oci.max-parallelism is meant");
    BOOST_TEST(to_string(got.warnings[1]) == "b.toml:3: warning: regestry: unknown key, ignored; perhaps registry is meant");
    BOOST_TEST(contains(to_string(got.warnings[2]), "cache.gha"));
}

BOOST_AUTO_TEST_CASE(letter_case_does_not_matter_for_struct_keys_but_for_names) {
    const auto got = parse("ROOT = \"/x\"\n[Worker.OCI]\nMax-Parallelism = 3\n[registry.\"A.example\"]\nHTTP = true\n", "b.toml");
    BOOST_TEST(got.warnings.empty());
    BOOST_TEST(got.config.root == "/x");
    BOOST_TEST(got.config.oci.max_parallelism == 3);
    BOOST_TEST(got.config.registries.contains("A.example"));
    // The exact spelling wins.
    const auto both = parse("Root = \"/a\"\nroot = \"/b\"\n", "b.toml");
    BOOST_TEST(both.config.root == "/b");
    BOOST_TEST(both.warnings.size() == 1U);
}

BOOST_AUTO_TEST_CASE(deprecated_spellings_fold_into_the_new) {
    const auto level = [](std::string_view text) { return parse(text, "b.toml").config.log.level; };
    BOOST_TEST((level("debug = true") == log_level::debug));
    BOOST_TEST((level("debug = true\ntrace = true") == log_level::trace));
    BOOST_TEST((level("debug = true\nlog.level = \"error\"") == log_level::error));
    BOOST_TEST(!level("debug = false").has_value());
    const auto got = parse("debug = true", "b.toml");
    BOOST_REQUIRE(got.warnings.size() == 1U);
    BOOST_TEST(got.warnings[0].message == "debug: deprecated, write log.level = \"debug\"");

    const auto gc = parse("[worker.oci]\ngckeepstorage = 5\nmaxUsedSpace = 7\n", "b.toml").config.oci.gc;
    BOOST_TEST(gc.reserved_space.empty());  // only where none of the three is given
    const auto p =
        parse("[[worker.oci.gcpolicy]]\nkeepBytes = 5\n[[worker.oci.gcpolicy]]\nkeepBytes = 5\nreservedSpace = 7\n", "b.toml").config.oci.gc.policies;
    BOOST_REQUIRE(p.size() == 2U);
    BOOST_TEST((p[0].reserved_space.bytes == 5U && p[1].reserved_space.bytes == 7U));
}

BOOST_AUTO_TEST_CASE(registry_names_that_are_never_looked_up) {
    const auto got = parse("[registry.\"https://a\"]\nhttp = true\n[registry.\"registry-1.docker.io\"]\n", "b.toml");
    BOOST_TEST(got.warnings.size() == 2U);
    BOOST_TEST(contains(got.warnings.front().message, "never looked up"));
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(config_files)

BOOST_AUTO_TEST_CASE(broken_toml_has_a_line) {
    const auto e = failure_of("root = \"/x\"\n[worker.oci\n");
    BOOST_TEST((e.kind() == errc::invalid));
    BOOST_TEST(contains(e.what(), "not TOML"));
    BOOST_TEST(e.where()->line == 2U);
    const auto odd = failure_of("root = \"/x\"\n\n[= 1\na = 1\n");  // an assertion of toml++ 3.3
    BOOST_TEST((odd.kind() == errc::invalid && odd.where()->line == 3U));
    for (const auto* text : {"a = 1\na = 2", "\xff", "x = \"\\q\"", "[a]\n[a]"}) BOOST_TEST((failure_of(text).kind() == errc::invalid));
}

BOOST_AUTO_TEST_CASE(letters_beyond_ascii_stand_in_strings_and_comments) {
    const auto root = [](std::string_view text) { return parse(text, "b.toml").config.root; };
    BOOST_TEST(root("\xEF\xBB\xBF# caf\u00E9 \"'\nroot = \"/caf\u00E9/\U0001F600\" # \u3000\n") == "/caf\u00E9/\U0001F600");
    BOOST_TEST(root("root = '/\u00E9 \"q\" \\n'\n") == "/\u00E9 \"q\" \\n");
    BOOST_TEST(root("root = '''\n/\u00E9''\\'''\n") == "/\u00E9''\\");
    BOOST_TEST(root("root = \"\"\"/a\\\n  \u00E9\\\"\"\"\"\n") == "/a\u00E9\"");
    BOOST_TEST(parse("[registry.'caf\u00E9'] # \u00E9\nhttp = true", "b.toml").config.registries.contains("caf\u00E9"));

    const auto line = [](std::string_view text) {
        const auto e = failure_of(text);
        BOOST_TEST(contains(e.what(), "not TOML"));
        return e.where() ? e.where()->line : 0;
    };
    BOOST_TEST(line("debug = true\nr\u00F6\u00F6t = 1\n") == 2U);  // a bare key
    BOOST_TEST(line("debug = true\u3000\n") == 1U);                // a space that is none
    BOOST_TEST(line("# ok\nroot = \"\xC3(\"\n") == 2U);            // not UTF-8, in a string
    BOOST_TEST(line("# \xFF\n") == 1U);                            // and in a comment
    BOOST_TEST(line("root = \"\u00E9\ndebug = true") != 0U);       // never closed
    BOOST_TEST(line("root = '''\u00E9") != 0U);
}

BOOST_AUTO_TEST_CASE(missing_and_unreadable_files) {
    test::scratch_dir dir;
    BOOST_TEST((load(dir / "none.toml", false).config == configuration{}));
    const auto kind = [](const std::filesystem::path& p) {
        try {
            (void)load(p, true);
        } catch (const error& e) {
            BOOST_TEST(contains(e.what(), p.string()));
            return e.kind();
        }
        return errc::internal;
    };
    BOOST_TEST((kind(dir / "none.toml") == errc::invalid));
    BOOST_TEST((kind(dir.path()) == errc::invalid));
    test::write_file(dir / "long.toml", std::string((std::size_t{1} << 20) + 1, '#'));
    BOOST_TEST((kind(dir / "long.toml") == errc::invalid));
    BOOST_REQUIRE(::mkfifo((dir / "pipe").c_str(), 0600) == 0);
    BOOST_TEST((load(dir / "pipe", true).config == configuration{}));  // does not hang: /dev/null and process substitution work
    BOOST_TEST(check(dir / "none.toml").size() == 1U);
}

BOOST_AUTO_TEST_CASE(check_lists_every_mistake_at_once) {
    test::scratch_dir dir;
    const auto file = dir / "b.toml";
    test::write_file(file,
                     "rooot = 1\n[log]\nlevel = 3\n[worker.oci]\nselinux = true\nmax-parallelism = -1\n[[registry.\"a\".keypair]]\nkey = \"k\"\n");
    const auto found = check(file);
    std::vector<std::pair<severity, unsigned>> got;
    for (const auto& d : found) got.emplace_back(d.level, d.where ? d.where->line : 0);
    const std::vector<std::pair<severity, unsigned>> want{
        {severity::error, 3}, {severity::error, 5}, {severity::error, 6}, {severity::error, 7}, {severity::warning, 1}};
    BOOST_TEST((got == want));
    try {
        (void)load(file, true);
        BOOST_ERROR("no failure");
    } catch (const error& e) {
        BOOST_TEST(contains(e.what(), "(and 3 more"));
    }
}

BOOST_AUTO_TEST_CASE(what_is_written_reads_back) {
    const std::string text = R"(
root = "/x \" \\ \u0007 é"
insecure-entitlements = ["network.host"]
debug = true
[dns]
nameservers = ["1.1.1.1"]
[history]
maxAge = "1h0.5s"
[worker.oci]
labels = {"a b" = "c", d = "e"}
maxUsedSpace = "80%"
cniConfigPath = "/c"
gc = true
[[worker.oci.gcpolicy]]
all = true
filters = ["type==source.local,id!=\"a,b\"", "inuse"]
keepDuration = "48h"
reservedSpace = "10%"
[[worker.oci.gcpolicy]]
[registry."docker.io"]
mirrors = ["m:5000"]
[[registry."docker.io".keypair]]
key = "k"
cert = "c"
[registry.empty]
)";
    const auto first = parse(text, "b.toml").config;
    BOOST_TEST(first.oci.gc.policies.size() == 2U);
    BOOST_TEST(first.registries.contains("empty"));
    const auto written = to_toml(first);
    BOOST_TEST_CONTEXT(written) { BOOST_TEST((parse(written, "again").config == first)); }
    // The default configuration needs no warning of its own.
    const auto plain = parse(to_toml(configuration{}), "again");
    BOOST_TEST((plain.config == configuration{}));
    BOOST_TEST(plain.warnings.empty());
}

BOOST_AUTO_TEST_CASE(reference_page_names_every_key_and_flag) {
    const char* source = std::getenv("COBUILD_SOURCE_DIR");
    if (source == nullptr) return;
    const auto page = test::read_file(std::filesystem::path(source) / "docs/configuration.md");
    for (const auto& d : describe_keys()) {
        if (d.path.starts_with("worker.containerd.")) continue;
        std::string_view key = d.path;
        key.remove_prefix(key.rfind('.') == std::string_view::npos ? 0 : key.rfind('.') + 1);
        BOOST_TEST(contains(page, "`" + std::string(key) + "`"), "docs/configuration.md lacks " << d.path);
        BOOST_TEST((d.flag.empty() || contains(page, "`" + d.flag + "`")), "docs/configuration.md lacks " << d.flag);
    }
}

BOOST_AUTO_TEST_SUITE_END()

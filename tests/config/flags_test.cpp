#include "support/support.hpp"

#include <sys/utsname.h>

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

import cobuild.base;
import cobuild.config;

using namespace cobuild;
using namespace cobuild::config;
using namespace std::chrono_literals;
using strings = std::vector<std::string>;

namespace {
std::string failure(std::string_view text, const overrides& flags) {
    try {
        (void)parse(text, "b.toml", flags);
    } catch (const error& e) {
        return e.what();
    }
    return "no failure";
}
bool contains(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }
}  // namespace

BOOST_AUTO_TEST_SUITE(config_flags)

BOOST_AUTO_TEST_CASE(flags_win_and_lists_replace) {
    overrides o;
    o.root = "/flag";
    o.allow_insecure_entitlement = strings{"network.host"};
    o.debug = true;
    o.log_format = "json";
    o.oci.labels = strings{"a=b=c"};
    o.oci.network = "none";
    o.oci.max_parallelism = 2;
    o.oci.gc = false;
    o.oci.cni_config_path = "/c";  // BuildKit clears the path here by mistake
    o.oci.cni_binary_dir = "/d";
    o.oci.binary = "crun";
    o.oci.enabled = "auto";
    const auto c = parse(
                       "root = \"/file\"\ninsecure-entitlements = [\"security.insecure\"]\nlog.level = \"error\"\n"
                       "worker.oci.labels = {x = \"y\"}\nworker.oci.networkMode = \"host\"\nworker.oci.enabled = false\n",
                       "b.toml", o)
                       .config;
    BOOST_TEST(c.root == "/flag");
    BOOST_TEST((c.insecure_entitlements == strings{"network.host"}));
    BOOST_TEST((c.log.level == log_level::debug && c.log.format == log_format::json));
    BOOST_TEST((c.oci.labels == std::map<std::string, std::string>{{"a", "b=c"}}));
    BOOST_TEST((c.oci.network == network_mode::none));
    BOOST_TEST((c.oci.max_parallelism == 2 && !c.oci.gc.enabled && !c.oci.enabled));
    BOOST_TEST((c.oci.cni_config_path == "/c" && c.oci.cni_binary_path == "/d" && c.oci.binary == "crun"));
}

BOOST_AUTO_TEST_CASE(a_flag_can_undo_what_would_be_refused) {
    overrides o;
    o.oci.network = "host";
    BOOST_TEST((parse("worker.oci.networkMode = \"bridge\"", "b.toml", o).config.oci.network == network_mode::host));
}

BOOST_AUTO_TEST_CASE(keep_storage_is_in_megabytes) {
    overrides o;
    o.oci.gc_keep_storage = "10,20,30";
    const auto gc = parse("", "b.toml", o).config.oci.gc;
    BOOST_TEST((gc.reserved_space.bytes == 10'000'000U && gc.min_free_space.bytes == 20'000'000U && gc.max_used_space.bytes == 30'000'000U));
    for (const auto* bad : {"", "x", "1,2,3,4", "-1", "1,,2"}) {
        o.oci.gc_keep_storage = bad;
        BOOST_TEST(contains(failure("", o), "--oci-worker-gc-keepstorage"), bad);
    }
}

BOOST_AUTO_TEST_CASE(mistakes_name_the_flag) {
    const auto one = [](auto set) {
        overrides o;
        set(o);
        return failure("", o);
    };
    BOOST_TEST(one([](auto& o) {
                   o.allow_insecure_entitlement = strings{"root"};
               }).starts_with("--allow-insecure-entitlement: \"root\" invalid entitlement"));
    BOOST_TEST(one([](auto& o) { o.oci.max_parallelism = -1; }).starts_with("--oci-max-parallelism: "));
    BOOST_TEST(one([](auto& o) { o.log_format = "xml"; }).starts_with("--log-format: unsupported log type"));
    BOOST_TEST(one([](auto& o) { o.oci.selinux = true; }).starts_with("--oci-worker-selinux: true is not supported yet"));
    BOOST_TEST(one([](auto& o) { o.rootless = true; }).starts_with("--rootless: true is not supported yet"));
    BOOST_TEST(one([](auto& o) { o.tlscert = "c"; }).starts_with("--tlscert: "));
    BOOST_TEST(one([](auto& o) { o.oci.labels = strings{"a"}; }).starts_with("--oci-worker-labels: "));
    BOOST_TEST(one([](auto& o) { o.oci.enabled = "maybe"; }).starts_with("--oci-worker: "));
    BOOST_TEST(one([](auto& o) { o.oci.enabled = "false"; }).starts_with("--oci-worker: "));
    BOOST_TEST(one([](auto& o) { o.oci.platforms = strings{"linux/s390x"}; }).starts_with("--oci-worker-platform: "));
}

BOOST_AUTO_TEST_CASE(every_flag_reaches_its_key) {
    overrides o;
    o.proxy_network = false;
    o.addr = strings{"tcp://h:1"};
    o.group = "docker";
    o.debugaddr = ":1";
    o.otel_socket_path = "/o";
    o.cdi_disabled = true;
    o.cdi_spec_dir = strings{"/c"};
    o.log_level = "trace";
    o.oci.snapshotter = "native";
    o.oci.cni_pool_size = 3;
    o.oci.rootless = false;
    o.oci.no_process_sandbox = false;
    o.oci.apparmor_profile = "";
    o.oci.proxy_snapshotter_path = "/p";
    o.containerd.enabled = "true";
    o.containerd.labels = strings{"a=b"};
    o.containerd.snapshotter = "zfs";
    o.containerd.cni_binary_dir = "/b";
    o.containerd.address = "/a";
    o.containerd.containerd_namespace = "n";
    o.containerd.runtime = "r";
    const auto got = parse("", "b.toml", o);
    const auto& c = got.config;
    BOOST_TEST((c.grpc.address == strings{"tcp://h:1"} && c.grpc.group == "docker" && c.grpc.debug_address == ":1"));
    BOOST_TEST((c.otel.socket_path == "/o" && c.cdi.disabled == true && c.cdi.spec_dirs == strings{"/c"}));
    BOOST_TEST((c.log.level == log_level::trace && c.oci.snapshotter == "native" && c.oci.cni_pool_size == 3));
    BOOST_TEST((c.containerd.enabled == true && c.containerd.address == "/a" && c.containerd.containerd_namespace == "n" &&
                c.containerd.runtime_name == "r"));
    BOOST_TEST((c.containerd.snapshotter == "zfs" && c.containerd.cni_binary_path == "/b" && c.oci.cni_binary_path == "/opt/cni/bin"));
    BOOST_REQUIRE(got.warnings.size() == 1U);
    BOOST_TEST(contains(got.warnings[0].message, "--containerd-worker-addr"));
    BOOST_TEST(!got.warnings[0].where.has_value());
    o.group = "7";
    BOOST_TEST((parse("", "b.toml", o).config.grpc.gid == 7));
}

BOOST_AUTO_TEST_CASE(platforms_hold_the_machines_own) {
    utsname machine{};
    ::uname(&machine);
    const std::string own = std::string("linux/") + machine.machine;  // also a spelling that is accepted
    BOOST_TEST((parse("worker.oci.platforms = [\"linux/s390x\", \"" + own + "\"]", "b.toml").config.oci.platforms == strings{"linux/s390x", own}));
    const std::string other = std::string(machine.machine) == "riscv64" ? "linux/s390x" : "linux/riscv64";
    BOOST_TEST(contains(failure("worker.oci.platforms = [\"" + other + "\"]", {}), "this machine's own platform"));
    BOOST_TEST(contains(failure("worker.oci.platforms = [\"linux//v7\", \"" + own + "\"]", {}), "is not a platform"));
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(config_registry)

BOOST_AUTO_TEST_CASE(without_a_section_there_is_the_origin_alone) {
    const configuration c;
    const auto hub = hosts_for(c, "docker.io");
    BOOST_REQUIRE(hub.size() == 1U);
    BOOST_TEST((hub[0] == registry_host{.host = "registry-1.docker.io", .path_prefix = "/v2"}));
    for (const auto* local : {"localhost", "localhost:5000", "127.0.0.1", "127.9.8.7:1", "[::1]:5000", "::1"})
        BOOST_TEST((hosts_for(c, local)[0].scheme == transport::http), local);
    for (const auto* far : {"example.org", "localhost.example.org:5000", "128.0.0.1", "[::2]:1"})
        BOOST_TEST((hosts_for(c, far)[0].scheme == transport::https), far);
}

BOOST_AUTO_TEST_CASE(mirrors_first_each_by_its_own_section) {
    const auto c = parse(R"(
[registry."docker.io"]
mirrors = ["https://m1:5000/proxy//hub/", "m2", "localhost:9"]
insecure = true
ca = ["/hub.pem"]
[registry."m1:5000"]
http = true
mirrors = ["never.followed"]
ca = ["/m1.pem"]
[registry."localhost:9"]
insecure = true
)",
                         "b.toml")
                       .config;
    const auto hosts = hosts_for(c, "docker.io");
    BOOST_REQUIRE(hosts.size() == 4U);
    BOOST_TEST((hosts[0] ==
                registry_host{
                    .host = "m1:5000", .path_prefix = "/v2/proxy/hub", .scheme = transport::http, .mirror = true, .push = false, .ca = {"/m1.pem"}}));
    BOOST_TEST((hosts[1] == registry_host{.host = "m2", .path_prefix = "/v2", .mirror = true, .push = false}));
    BOOST_TEST((hosts[2].scheme == transport::https_then_http));
    BOOST_TEST(
        (hosts[3] == registry_host{.host = "registry-1.docker.io", .path_prefix = "/v2", .scheme = transport::https_unverified, .ca = {"/hub.pem"}}));
}

BOOST_AUTO_TEST_CASE(scheme_by_http_and_insecure) {
    const auto scheme = [](const std::string& host, const std::string& body) {
        return hosts_for(parse("[registry.\"" + host + "\"]\n" + body, "b.toml").config, host)[0].scheme;
    };
    BOOST_TEST((scheme("a", "") == transport::https));
    BOOST_TEST((scheme("a", "http = true") == transport::http));
    BOOST_TEST((scheme("a", "insecure = true") == transport::https_unverified));
    BOOST_TEST((scheme("a", "insecure = true\nhttp = true") == transport::https_then_http));
    BOOST_TEST((scheme("localhost", "") == transport::http));
    BOOST_TEST((scheme("localhost", "http = false") == transport::https));
    BOOST_TEST((scheme("localhost", "insecure = true") == transport::https_then_http));
    BOOST_TEST((scheme("localhost", "insecure = true\nhttp = false") == transport::https_unverified));
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(config_gc)

BOOST_AUTO_TEST_CASE(percentages_round_up_to_gigabytes) {
    const std::uint64_t tera = std::uint64_t{1} << 40;
    BOOST_TEST(disk_space{.percent = 10}.resolve(tera) == 103'000'000'000U);  // 102.4 GiB
    BOOST_TEST(disk_space{.percent = 10}.resolve(0) == 2'000'000'000U);
    BOOST_TEST(disk_space{.percent = 100}.resolve(~std::uint64_t{0}) > std::uint64_t{1} << 62);
    BOOST_TEST((disk_space{.bytes = 5, .percent = 10}.resolve(tera) == 5U));
    BOOST_TEST(disk_space{}.resolve(tera) == 0U);
}

BOOST_AUTO_TEST_CASE(default_rules) {
    const auto rules = gc_rules({}, std::uint64_t{1} << 40);
    const gc_rule caps{.reserved_space = 10'000'000'000, .max_used_space = 100'000'000'000, .min_free_space = 205'000'000'000};
    gc_rule old = caps;
    old.keep_duration = 1440h;
    gc_rule all = caps;
    all.all = true;
    const gc_rule first{
        .filters = {"type==source.local", "type==exec.cachemount", "type==source.git.checkout"}, .keep_duration = 48h, .max_used_space = 512'000'000};
    BOOST_TEST((rules == std::vector<gc_rule>{first, old, caps, all}));
    const auto small = gc_rules({}, std::uint64_t{10} << 30);  // 10 GiB: 10 % is 1 GiB and rounds up to 2 GB
    BOOST_TEST((small[2].reserved_space == 2'000'000'000U && small[2].max_used_space == 9'000'000'000U && small[2].min_free_space == 3'000'000'000U));
}

BOOST_AUTO_TEST_CASE(the_files_values_replace_the_detected) {
    BOOST_TEST(gc_rules({.enabled = false}, 1).empty());
    const auto capped = gc_rules({.max_used_space = {.bytes = 7}}, 1);
    BOOST_REQUIRE(capped.size() == 4U);
    BOOST_TEST((capped[2] == gc_rule{.max_used_space = 7}));
    const auto own = gc_rules({.policies = {{.all = true, .filters = {"inuse"}, .keep_duration = 1h, .reserved_space = {.bytes = 3}}}}, 1);
    BOOST_TEST((own == std::vector<gc_rule>{{.all = true, .filters = {"inuse"}, .keep_duration = 1h, .reserved_space = 3}}));
}

BOOST_AUTO_TEST_CASE(policies_are_checked) {
    const auto bad = [](const std::string& line) { return failure("[[worker.oci.gcpolicy]]\n" + line, {}); };
    BOOST_TEST(contains(bad("filters = [\"typ==x\"]"), "worker.oci.gcpolicy[0].filters[0]: \"typ==x\" names no field"));
    BOOST_TEST(contains(bad("filters = [\"type=x\"]"), "unknown operator"));
    BOOST_TEST(contains(bad("filters = [\"id==\\\"x\"]"), "without an end"));
    BOOST_TEST(contains(bad("filters = [\"\"]"), "names no field"));
    BOOST_TEST(contains(bad("keepDuration = -1"), "negative"));
    BOOST_TEST(contains(bad("all = 1"), "expected true or false, not the integer 1"));
    BOOST_TEST(contains(failure("[worker.oci.gcpolicy]\nall = true", {}), "[[worker.oci.gcpolicy]]"));
    const auto p = parse("[[worker.oci.gcpolicy]]\nkeepDuration = \"3600\"\nfilters = [\"type~=^source,inuse\"]", "b.toml").config.oci.gc.policies;
    BOOST_TEST((p.at(0).keep_duration == 1h));
}

BOOST_AUTO_TEST_SUITE_END()

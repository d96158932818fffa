#include "frontend/fixture.hpp"

using namespace frontend_test;

namespace {

using attrs = std::map<std::string, std::string>;

std::string refused(const attrs& a) {
    try {
        (void)frontend::parse_attrs(a);
    } catch (const error& e) {
        return e.what();
    }
    return "accepted";
}

frontend::request sources(std::map<std::string, std::string> files, std::string name = "Dockerfile") {
    fake_gateway g;
    g.files = std::move(files);
    frontend::request r;
    r.dockerfile_name = std::move(name);
    async::runtime rt;
    return rt.block_on(frontend::read_sources(std::move(r), g));
}

}  // namespace

BOOST_AUTO_TEST_SUITE(options)

BOOST_AUTO_TEST_CASE(every_attribute_finds_its_place) {
    const auto o = frontend::parse_attrs({{"filename", "sub/Dockerfile"},
                                          {"target", "t"},
                                          {"platform", "linux/amd64,linux/arm64/v8"},
                                          {"build-arg:A", "1"},
                                          {"label:l", "v"},
                                          {"context:c", "docker-image://x"},
                                          {"no-cache", "One,two"},
                                          {"image-resolve-mode", "local"},
                                          {"add-hosts", "H=1.2.3.4,v6=::1"},
                                          {"shm-size", "64"},
                                          {"ulimit", "nofile=1:2,core=-1"},
                                          {"cgroup-parent", "cg"},
                                          {"force-network-mode", "host"},
                                          {"hostname", "h"},
                                          {"memory", "5"},
                                          {"memswap", "-1"},
                                          {"cpuquota", "7"},
                                          {"cpusetcpus", "0-3,5"},
                                          {"contextkey", "key"},
                                          {"cache-from", "x"},
                                          {"vcs:source", "y"},
                                          {"unknown", "z"}});
    const auto& r = o.build;
    BOOST_TEST(r.dockerfile_name == "sub/Dockerfile");
    BOOST_TEST(r.target == "t");
    BOOST_REQUIRE(o.platforms.size() == 2U);
    BOOST_TEST(oci::format(o.platforms[1]) == "linux/arm64");
    BOOST_TEST(r.multi_platform);
    BOOST_TEST(r.build_args.at("A") == "1");
    BOOST_TEST(r.labels.at("l") == "v");
    BOOST_TEST(r.named_contexts.at("c") == "docker-image://x");
    const auto short_forms = frontend::parse_attrs({{"context:a", "docker-image:busybox"}, {"context:b", "oci-layout:store@sha256:00"}}).build;
    BOOST_TEST(short_forms.named_contexts.at("a") == "docker-image://busybox");
    BOOST_TEST(short_forms.named_contexts.at("b") == "oci-layout://store@sha256:00");
    BOOST_TEST(!r.no_cache);
    BOOST_TEST(r.no_cache_stages == (strings{"one", "two"}), boost::test_tools::per_element());
    BOOST_TEST((r.resolve == gateway::resolve_mode::local));
    BOOST_TEST(r.extra_hosts.at(0).host == "h");
    BOOST_TEST(r.extra_hosts.at(1).ip == "::1");
    BOOST_TEST(r.shm_size == 64);
    BOOST_TEST(r.ulimits.at(0).hard == 2);
    BOOST_TEST(r.ulimits.at(1).soft == -1);
    BOOST_TEST(r.cgroup_parent == "cg");
    BOOST_TEST((r.network == llb::net_mode::host));
    BOOST_TEST(r.hostname == "h");
    BOOST_TEST(r.resources->memory == 5);
    BOOST_TEST(r.resources->memory_swap == -1);
    BOOST_TEST(r.resources->cpuset_cpus == "0-3,5");
    BOOST_TEST(r.context_name == "key");
    const auto plain = frontend::parse_attrs({{"no-cache", ""}});
    BOOST_TEST(plain.build.no_cache);
    BOOST_TEST(!plain.build.resources.has_value());
    BOOST_TEST(plain.platforms.empty());
    BOOST_TEST(frontend::parse_attrs({{"platform", "linux/amd64"}, {"build-arg:BUILDKIT_MULTI_PLATFORM", "1"}}).build.multi_platform);
}

BOOST_AUTO_TEST_CASE(wrong_values_name_the_attribute) {
    for (const auto& [key, value] : attrs{{"memory", "0"},
                                          {"memswap", "-2"},
                                          {"cpushares", "x"},
                                          {"cpusetcpus", "3-1"},
                                          {"ulimit", "nofile"},
                                          {"shm-size", "1k"},
                                          {"add-hosts", "h=x"},
                                          {"force-network-mode", "bridge"},
                                          {"image-resolve-mode", "never"},
                                          {"multi-platform", "maybe"}}) {
        BOOST_TEST(refused({{key, value}}).find(cat("invalid ", key, "=")) == 0U, refused({{key, value}}));
    }
    BOOST_TEST(refused({{"platform", "linux/amd64,linux/arm64"}, {"multi-platform", "false"}}).find("more than one") != std::string::npos);
    BOOST_TEST(refused({{"ulimit", "nofile=3:2"}}).find("above the hard") != std::string::npos);
}

BOOST_AUTO_TEST_CASE(which_files_are_read) {
    const auto both =
        sources({{"dockerfile/Dockerfile", "FROM a"}, {"dockerfile/Dockerfile.dockerignore", "own"}, {"context/.dockerignore", "common"}});
    BOOST_TEST(both.dockerfile == "FROM a");
    BOOST_TEST(*both.ignore_file == "own");
    BOOST_TEST(both.ignore_file_name == "Dockerfile.dockerignore");
    const auto lower = sources({{"dockerfile/dockerfile", "FROM b"}, {"context/.dockerignore", "common"}});
    BOOST_TEST(lower.dockerfile_name == "dockerfile");
    BOOST_TEST(*lower.ignore_file == "common");
    BOOST_TEST(!sources({{"dockerfile/x", "FROM c"}}, "x").ignore_file.has_value());
    try {
        (void)sources({{"dockerfile/dockerfile", "FROM b"}}, "Other");
        BOOST_FAIL("found");
    } catch (const error& e) {
        BOOST_TEST((e.kind() == errc::not_found));
        BOOST_TEST(says(e, "\"Other\""));
    }
}

BOOST_AUTO_TEST_CASE(a_bad_ignore_file_is_named) {
    const auto e = failure("FROM busybox\nCOPY a /\n", [](auto& r, auto&) {
        r.ignore_file = "[\n";
        r.ignore_file_name = "x.dockerignore";
    });
    BOOST_TEST(e.where()->file == "x.dockerignore");
}

BOOST_AUTO_TEST_SUITE_END()

#include "support/support.hpp"

#include <optional>
#include <string>
#include <vector>

import cobuild.base;
import cobuild.json;
import cobuild.oci;

using namespace cobuild;

// containerd/platforms' platforms_test.go.
BOOST_AUTO_TEST_CASE(parse_and_format) {
    const auto shown = [](std::string_view text) { return oci::format(oci::parse_platform(text)); };
    BOOST_TEST(shown("linux/amd64") == "linux/amd64");
    BOOST_TEST(shown("LINUX/x86_64") == "linux/amd64");
    BOOST_TEST(shown("linux/aarch64") == "linux/arm64");
    BOOST_TEST(shown("linux/arm64/v8") == "linux/arm64/v8");
    BOOST_TEST(oci::format(oci::normalize(oci::parse_platform("linux/arm64/v8"))) == "linux/arm64");
    BOOST_TEST(shown("linux/arm") == "linux/arm");
    BOOST_TEST(oci::format(oci::normalize(oci::parse_platform("linux/arm"))) == "linux/arm/v7");
    BOOST_TEST(shown("linux/arm/6") == "linux/arm/v6");
    BOOST_TEST(shown("linux/armhf") == "linux/arm");
    BOOST_TEST(shown("linux/armel") == "linux/arm/v6");
    BOOST_TEST(shown("macOS/arm64") == "darwin/arm64");
    BOOST_TEST(shown("linux/i386") == "linux/386");
    BOOST_TEST(shown("riscv64") == "linux/riscv64");
    BOOST_TEST(shown("linux") == oci::format(oci::host_platform()));
    BOOST_TEST(oci::parse_platform("windows(10.0.17763)/amd64").os_version == "10.0.17763");
    BOOST_TEST(oci::format({}) == "unknown");
    for (const auto text : {"", "foo", "linux/", "/amd64", "linux/&arm", "linux/arm/v7/x", "linux//v7"}) {
        BOOST_TEST_CONTEXT(text) {
            BOOST_CHECK_EXCEPTION(oci::parse_platform(text), error, [](const error& e) { return e.kind() == errc::invalid; });
        }
    }
}

BOOST_AUTO_TEST_CASE(what_serves_what) {
    const auto rank = [](std::string_view wanted, std::string_view offered) {
        return oci::match_rank(oci::parse_platform(wanted), oci::parse_platform(offered));
    };
    BOOST_TEST((rank("linux/amd64", "linux/amd64") == 0U));
    BOOST_TEST((rank("linux/amd64", "linux/386") == 1U));
    BOOST_TEST(!rank("linux/amd64", "linux/arm64"));
    BOOST_TEST(!rank("linux/amd64", "windows/amd64"));
    BOOST_TEST(!rank("linux/amd64", "linux/amd64/v2"));
    BOOST_TEST((rank("linux/amd64/v3", "linux/amd64") == 2U));
    BOOST_TEST((rank("linux/arm64", "linux/arm64/v8") == 0U));
    BOOST_TEST((rank("linux/arm64/v8", "linux/arm64") == 0U));
    BOOST_TEST((rank("linux/arm/v7", "linux/arm/v6") == 1U));
    BOOST_TEST(!rank("linux/arm/v6", "linux/arm/v7"));
    BOOST_TEST((*rank("linux/arm64", "linux/arm/v7") < *rank("linux/arm64", "linux/arm/v6")));
    BOOST_TEST((rank("linux/arm64/v9", "linux/arm64").has_value()));
    // A version that no architecture has is itself and nothing else, whatever its number.
    BOOST_TEST((rank("linux/arm/v777777777", "linux/arm/v777777777") == 0U));
    BOOST_TEST(!rank("linux/arm/v777777777", "linux/arm/v6"));
}

BOOST_AUTO_TEST_CASE(choice_from_an_index) {
    const auto entry = [](char n, std::string_view platform) {
        return cat(R"({"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:)", std::string(64, n), R"(","size":1,"platform":)",
                   platform, "}");
    };
    const auto index = oci::parse_index(
        cat(R"({"schemaVersion":2,"manifests":[)", entry('1', R"({"architecture":"arm","os":"linux","variant":"v6"})"), ",",
            entry('2', R"({"architecture":"arm","os":"linux","variant":"v7"})"), ",", entry('3', R"({"architecture":"unknown","os":"unknown"})"), ",",
            entry('4', R"({"architecture":"amd64","os":"linux"})"), "]}"));
    const auto chosen = oci::select(index, oci::parse_platform("linux/arm/v7"));
    BOOST_TEST_REQUIRE(chosen.size() == 2U);
    BOOST_TEST(chosen[0].digest.hex()[0] == '2');
    BOOST_TEST(chosen[1].digest.hex()[0] == '1');
    BOOST_TEST(oci::select(index, oci::parse_platform("linux/s390x")).empty());
}

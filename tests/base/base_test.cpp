#include "support/support.hpp"

#include <chrono>
#include <optional>
#include <string>

import cobuild.base;

using namespace cobuild;

BOOST_AUTO_TEST_SUITE(errors)

BOOST_AUTO_TEST_CASE(context_comes_first_and_the_kind_stays) {
    const error e = error{errc::not_found, "no such stage: x"}.with("COPY").at({"Dockerfile", 3});
    BOOST_TEST(e.what() == std::string("COPY: no such stage: x"));
    BOOST_TEST((e.kind() == errc::not_found));
    BOOST_TEST(e.where()->line == 3U);
}

BOOST_AUTO_TEST_CASE(system_errors_are_told_by_kind) {
    BOOST_TEST((os_error(ENOSPC, "writing x").kind() == errc::no_space));
    BOOST_TEST(os_error(ENOENT, "opening x").what() == std::string("opening x: No such file or directory"));
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(digests)

// The test vectors of FIPS 180-2, appendix B.
BOOST_AUTO_TEST_CASE(sha256_vectors) {
    BOOST_TEST(digest::of("").str() == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    BOOST_TEST(digest::of("abc").hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    hasher h;
    BOOST_TEST(h.update("a").update("bc").finish().str() == digest::of("abc").str());
    BOOST_TEST(h.update("abc").finish().str() == digest::of("abc").str());
}

BOOST_AUTO_TEST_CASE(only_one_spelling_is_accepted) {
    const std::string good = digest::of("x").str();
    BOOST_TEST(digest::parse(good).str() == good);
    for (const std::string& bad : {std::string("sha256:"), good.substr(0, 70), good + "0", "sha512" + good.substr(6),
                                   "sha256:" + std::string(64, 'G'), std::string("sha256:") + std::string(64, 'A')})
        BOOST_CHECK_THROW(digest::parse(bad), error);
}

// RFC 4648, section 10.
BOOST_AUTO_TEST_CASE(base64_vectors) {
    BOOST_TEST(base64_encode("foobar") == "Zm9vYmFy");
    BOOST_TEST(base64_encode("fo") == "Zm8=");
    BOOST_TEST(base64_decode("Zm9vYg==").value() == "foob");
    BOOST_TEST(base64_decode("Zm9vYg").value() == "foob");
    BOOST_TEST(!base64_decode("Zm9*").has_value());
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(units)

BOOST_AUTO_TEST_CASE(bytes) {
    BOOST_TEST(parse_bytes("512") == 512U);
    BOOST_TEST(parse_bytes("64k") == 65536U);
    BOOST_TEST(parse_bytes("40MB") == 40U << 20);
    BOOST_TEST(parse_bytes("1.5GiB") == 1610612736U);
    for (const auto* bad : {"", "x", "5q", "1.2.3", "-1"}) BOOST_CHECK_THROW(parse_bytes(bad), error);
    BOOST_TEST(format_bytes(999) == "999B");
    BOOST_TEST(format_bytes(1210) == "1.21kB");
    BOOST_TEST(format_bytes(1070000000) == "1.07GB");
}

BOOST_AUTO_TEST_CASE(durations) {
    using namespace std::chrono_literals;
    BOOST_TEST((parse_duration("1h30m") == 90min));
    BOOST_TEST((parse_duration("1.5s") == 1500ms));
    BOOST_TEST((parse_duration("-2ms") == -2ms));
    BOOST_TEST((parse_duration("0") == 0s));
    for (const auto* bad : {"", "3", "1x", "s", "1h30"}) BOOST_CHECK_THROW(parse_duration(bad), error);
    BOOST_TEST(format_duration(90min) == "1h30m0s");
    BOOST_TEST(format_duration(250ms) == "250ms");
    BOOST_TEST(format_duration(1500ms) == "1.5s");
    BOOST_TEST(format_duration(1500us) == "1.5ms");
    BOOST_TEST(format_duration(0s) == "0s");
}

BOOST_AUTO_TEST_CASE(times) {
    const std::chrono::sys_time<nanoseconds> t{std::chrono::seconds{1700000000} + std::chrono::milliseconds{120}};
    BOOST_TEST(format_time(t) == "2023-11-14T22:13:20.12Z");
    BOOST_TEST((parse_time("2023-11-14T22:13:20.12Z") == t));
    BOOST_TEST((parse_time("2023-11-15T00:13:20.12+02:00") == t));
    BOOST_TEST(!parse_time("2023-13-14T22:13:20Z").has_value());
    BOOST_TEST(!parse_time("yesterday").has_value());
}

BOOST_AUTO_TEST_CASE(suggestions) {
    const std::string_view words[] = {"COPY", "FROM", "RUN"};
    BOOST_TEST(nearest("COPPY", words) == "COPY");
    BOOST_TEST(nearest("rn", words) == "RUN");
    BOOST_TEST(nearest("maintainer", words).empty());
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_CASE(log_lines_have_logrus_fields) {
    int fds[2];
    BOOST_REQUIRE(::pipe(fds) == 0);
    const unique_fd in{fds[0]};
    const unique_fd out{fds[1]};
    configure_log({.level = log_level::debug, .fd = out.get()});
    log(log_level::debug, "do request", {{"host", "localhost:5000"}, {"url", "http://x/v2/?ns=a b"}});
    log(log_level::trace, "unseen");
    configure_log({});
    char buffer[512];
    const auto n = ::read(in.get(), buffer, sizeof buffer);
    const std::string line(buffer, static_cast<std::size_t>(n));
    BOOST_TEST(line.find(" level=debug msg=\"do request\" host=\"localhost:5000\" url=\"http://x/v2/?ns=a b\"\n") != std::string::npos);
}

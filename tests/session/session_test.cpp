#include "support/support.hpp"

#include <sys/stat.h>

#include <cstdlib>
#include <exception>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

import cobuild.base;
import cobuild.async;
import cobuild.session;

using namespace cobuild;
using namespace cobuild::async;

namespace {

task<error> failure(std::shared_ptr<session::session> s, std::string id) {
    std::exception_ptr thrown;
    try {
        (void)co_await s->secret(std::move(id));
    } catch (...) {
        thrown = std::current_exception();
    }
    co_return thrown ? describe(thrown) : error{errc::internal, "no failure"};
}

bool says(const error& e, std::string_view part) {
    const bool found = std::string_view(e.what()).find(part) != std::string_view::npos;
    if (!found) BOOST_TEST_MESSAGE("the error says: " << e.what());
    return found;
}

}  // namespace

CO_TEST_CASE(directories_by_name) {
    const auto s = session::make_local(rt.pool(), {.directories = {{"context", "/some/where"}}, .secrets = {}});
    BOOST_TEST((co_await s->directory({.name = "context"})).value() == "/some/where");
    BOOST_TEST(!(co_await s->directory({.name = "dockerfile"})).has_value());
    BOOST_TEST(!(co_await s->directory({})).has_value());
    co_return;
}

CO_TEST_CASE(a_secret_is_what_the_file_holds_now) {
    const test::scratch_dir dir;
    const std::string bytes("two\nlines\0and a zero\n", 21);
    test::write_file(dir / "s", bytes);
    test::write_file(dir / "empty", "");
    const auto s = session::make_local(
        rt.pool(),
        {.directories = {}, .secrets = {{"a", {.file = dir / "s", .environment = {}}}, {"e", {.file = dir / "empty", .environment = {}}}}});
    BOOST_TEST((co_await s->secret("a")).value() == bytes);
    test::write_file(dir / "s", "changed");
    BOOST_TEST((co_await s->secret("a")).value() == "changed");
    BOOST_TEST((co_await s->secret("e")).value() == "");
    BOOST_TEST(!(co_await s->secret("none")).has_value());
}

CO_TEST_CASE(a_secret_in_the_environment) {
    const auto s = session::make_local(rt.pool(), {.directories = {}, .secrets = {{"a", {.file = {}, .environment = "COBUILD_TEST_SECRET"}}}});
    ::unsetenv("COBUILD_TEST_SECRET");
    const auto unset = co_await failure(s, "a");
    BOOST_TEST((unset.kind() == errc::not_found));
    BOOST_TEST(says(unset, "COBUILD_TEST_SECRET"));
    ::setenv("COBUILD_TEST_SECRET", "", 1);
    BOOST_TEST((co_await s->secret("a")).value() == "");
    ::setenv("COBUILD_TEST_SECRET", "value", 1);
    BOOST_TEST((co_await s->secret("a")).value() == "value");
    ::setenv("COBUILD_TEST_SECRET", std::string(500 * 1024 + 1, 'x').c_str(), 1);
    BOOST_TEST(((co_await failure(s, "a")).kind() == errc::invalid));
    ::unsetenv("COBUILD_TEST_SECRET");
}

CO_TEST_CASE(the_limit_is_500_kib) {
    const test::scratch_dir dir;
    test::write_file(dir / "fits", std::string(500 * 1024, 'x'));
    test::write_file(dir / "large", std::string(500 * 1024 + 1, 'x'));
    const auto s = session::make_local(
        rt.pool(),
        {.directories = {}, .secrets = {{"fits", {.file = dir / "fits", .environment = {}}}, {"large", {.file = dir / "large", .environment = {}}}}});
    BOOST_TEST((co_await s->secret("fits")).value().size() == 500U * 1024);
    const auto e = co_await failure(s, "large");
    BOOST_TEST((e.kind() == errc::invalid));
    BOOST_TEST(says(e, "\"large\""));
    BOOST_TEST(says(e, "500 KiB"));
}

CO_TEST_CASE(what_cannot_be_read_is_named) {
    const test::scratch_dir dir;
    const auto s = session::make_local(
        rt.pool(),
        {.directories = {}, .secrets = {{"gone", {.file = dir / "gone", .environment = {}}}, {"dir", {.file = dir.path(), .environment = {}}}}});
    const auto gone = co_await failure(s, "gone");
    BOOST_TEST((gone.kind() == errc::not_found));
    BOOST_TEST(says(gone, (dir / "gone").string()));
    BOOST_TEST(says(co_await failure(s, "dir"), dir.path().string()));
    // It may come later: a failure is not remembered.
    test::write_file(dir / "gone", "here");
    BOOST_TEST((co_await s->secret("gone")).value() == "here");
}

// O-SE-01
CO_TEST_CASE(a_pipe_is_read_once_for_all_steps) {
    const test::scratch_dir dir;
    BOOST_REQUIRE(::mkfifo((dir / "pipe").c_str(), 0600) == 0);
    const auto s = session::make_local(rt.pool(), {.directories = {}, .secrets = {{"a", {.file = dir / "pipe", .environment = {}}}}});
    std::thread writer([&] { test::write_file(dir / "pipe", "once"); });
    std::vector<std::string> got;
    task_group group(co_await current_executor);
    for (int i = 0; i < 3; ++i)
        group.spawn([](std::shared_ptr<session::session> from, std::vector<std::string>& out) -> task<void> {
            out.push_back((co_await from->secret("a")).value());
        }(s, got));
    co_await group.join();
    writer.join();
    got.push_back((co_await s->secret("a")).value());
    BOOST_TEST(got == (std::vector<std::string>(4, "once")), boost::test_tools::per_element());
}

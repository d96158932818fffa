// Helpers for tests. Include first, before any import: it brings Boost.Test and the Asio headers that coroutine bodies need.
#pragma once

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>

#include <boost/asio/awaitable.hpp>
#include <boost/test/unit_test.hpp>

namespace cobuild::test {

/// A directory of its own, removed with everything in it when the test ends.
class scratch_dir {
public:
    scratch_dir();
    ~scratch_dir();
    scratch_dir(const scratch_dir&) = delete;
    scratch_dir& operator=(const scratch_dir&) = delete;
    [[nodiscard]] const std::filesystem::path& path() const { return path_; }
    std::filesystem::path operator/(std::string_view name) const { return path_ / name; }

private:
    std::filesystem::path path_;
};

void write_file(const std::filesystem::path& file, std::string_view content);
std::string read_file(const std::filesystem::path& file);

/// True as root; otherwise says so in the test's output, and the case returns: `if (!needs_root()) return;`.
bool needs_root();

/// The folder beside the repository with the shared corpora, or empty (with a message) where it is absent.
std::filesystem::path shared_dir();

}  // namespace cobuild::test

/// A test case whose body is a coroutine on a runtime of its own: `CO_TEST_CASE(name) { co_await ...; }`.
/// `rt` is the runtime. Needs `import cobuild.async;` in the including file.
#define CO_TEST_CASE(name)                                                                       \
    static cobuild::async::task<void> name##_body([[maybe_unused]] cobuild::async::runtime& rt); \
    BOOST_AUTO_TEST_CASE(name) {                                                                 \
        cobuild::async::runtime rt;                                                              \
        rt.block_on(name##_body(rt));                                                            \
    }                                                                                            \
    static cobuild::async::task<void> name##_body([[maybe_unused]] cobuild::async::runtime& rt)

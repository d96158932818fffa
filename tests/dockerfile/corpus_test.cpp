#include "support/support.hpp"

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

import cobuild.base;
import cobuild.dockerfile;

// The corpora beside the repository, read in place; every case is skipped with a message where they are absent.

using namespace cobuild;
namespace df = cobuild::dockerfile;
using namespace cobuild::test;

namespace {

std::string trimmed(std::string_view text) { return std::string(trim(text)); }

std::filesystem::path corpus(std::string_view name) {
    const auto shared = shared_dir();
    return shared.empty() ? shared : shared / "corpora" / name;
}

df::lookup variables(const std::map<std::string, std::string>& env) {
    return [&env](std::string_view name) -> std::optional<std::string> {
        const auto it = env.find(std::string(name));
        return it == env.end() ? std::nullopt : std::optional(it->second);
    };
}

}  // namespace

BOOST_AUTO_TEST_SUITE(corpora)

BOOST_AUTO_TEST_CASE(every_tree_is_the_expected_one) {
    const auto root = corpus("dockerfile-parser");
    if (root.empty()) return;
    std::size_t seen = 0;
    for (const auto& entry : std::filesystem::directory_iterator(root / "testfiles")) {
        BOOST_TEST_CONTEXT(entry.path().filename().string()) {
            const df::file f = df::parse(read_file(entry.path() / "Dockerfile"));
            BOOST_TEST(trimmed(df::dump(f)) == trimmed(read_file(entry.path() / "result")));
            ++seen;
        }
    }
    BOOST_TEST(seen >= 30U);
}

BOOST_AUTO_TEST_CASE(every_bad_file_is_refused) {
    const auto root = corpus("dockerfile-parser");
    if (root.empty()) return;
    for (const auto& entry : std::filesystem::directory_iterator(root / "testfiles-negative")) {
        bool refused = false;
        try {
            refused = !df::parse_instructions(df::parse(read_file(entry.path() / "Dockerfile"))).errors.empty();
        } catch (const error& e) {
            refused = e.kind() == errc::invalid;
        }
        BOOST_TEST(refused, entry.path().filename());
    }
}

BOOST_AUTO_TEST_CASE(line_numbers_count_through_continuations_and_comments) {
    const auto root = corpus("dockerfile-parser");
    if (root.empty()) return;
    const df::file f = df::parse(read_file(root / "testfile-line" / "Dockerfile"));
    const std::vector<df::line_range> expected{{5, 5}, {11, 12}, {17, 31}};
    BOOST_REQUIRE(f.nodes.size() == expected.size());
    for (std::size_t i = 0; i < expected.size(); ++i) BOOST_TEST((f.nodes[i].lines == expected[i]));
}

BOOST_AUTO_TEST_CASE(one_word) {
    const auto root = corpus("dockerfile-expansion");
    if (root.empty()) return;
    const std::map<std::string, std::string> env{{"PWD", "/home"}, {"SHELL", "bash"}, {"KOREAN", "한국어"}, {"NULL", ""}};
    const std::string table = read_file(root / "envVarTest");
    std::size_t rows = 0;
    for (std::string_view line : split(table, '\n')) {
        if (line.size() < 2 || line[1] != '|' || (line[0] != 'A' && line[0] != 'U')) continue;
        const std::size_t bar = line.find('|', 2);
        BOOST_REQUIRE(bar != std::string_view::npos);
        const std::string input = trimmed(line.substr(2, bar - 2)), expected = trimmed(line.substr(bar + 1));
        BOOST_TEST_CONTEXT(input) {
            ++rows;
            try {
                BOOST_TEST(df::expand_word(input, variables(env)).text == expected);
            } catch (const error& e) {
                BOOST_TEST(expected == "error", e.what());
            }
        }
    }
    BOOST_TEST(rows > 190U);
}

BOOST_AUTO_TEST_CASE(several_words) {
    const auto root = corpus("dockerfile-expansion");
    if (root.empty()) return;
    std::map<std::string, std::string> env;
    const std::string table = read_file(root / "wordsTest");
    for (std::string_view line : split(table, '\n')) {
        if (line.empty() || line.front() == '#') continue;
        if (line.starts_with("ENV ")) {
            const std::size_t equals = line.find('=');
            env[std::string(line.substr(4, equals - 4))] = line.substr(equals + 1);
            continue;
        }
        const std::size_t bar = line.find('|');
        const std::string input(trim(line.substr(0, bar)));
        const std::string expected(line.substr(bar + 2));
        BOOST_TEST_CONTEXT(input) {
            try {
                std::string words;
                for (const auto& word : df::expand_words(input, variables(env)).words) words += (words.empty() ? "" : ",") + word;
                BOOST_TEST(words == expected);
            } catch (const error& e) {
                BOOST_TEST(expected == "error", e.what());
            }
        }
    }
}

BOOST_AUTO_TEST_SUITE_END()

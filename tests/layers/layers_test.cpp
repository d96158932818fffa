// Reads the import lines of every module and fails on one that points upward (docs/architecture.md, "Floors").
#include "support/support.hpp"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <vector>

namespace {

namespace stdfs = std::filesystem;

stdfs::path source_dir() {
    const char* dir = std::getenv("COBUILD_SOURCE_DIR");
    BOOST_REQUIRE(dir != nullptr);
    return dir;
}

/// The indented block under "## Floors": one line a floor, lowest first.
std::map<std::string, int> floors() {
    std::ifstream in(source_dir() / "docs/architecture.md");
    std::map<std::string, int> out;
    std::string line;
    bool inside = false;
    int floor = 0;
    while (std::getline(in, line)) {
        if (line == "## Floors") inside = true;
        if (!inside || !line.starts_with("    ")) {
            if (!out.empty()) break;
            continue;
        }
        std::istringstream words(line);
        for (std::string word; words >> word;) out[word] = floor;
        ++floor;
    }
    return out;
}

const std::set<std::pair<std::string, std::string>> allowed_on_one_floor = {
    {"fs", "async"},         {"archive", "async"},  {"archive", "fs"},    {"db", "async"},     {"db", "fs"},           {"snapshot", "content"},
    {"registry", "content"}, {"cache", "snapshot"}, {"cache", "content"}, {"solver", "cache"}, {"registry", "config"},
};

std::vector<std::pair<std::string, std::string>> imports() {
    static const std::regex import_line(R"(^\s*(?:export\s+)?import\s+cobuild\.([a-z_0-9]+)\s*;)");
    std::vector<std::pair<std::string, std::string>> out;
    const auto modules = source_dir() / "modules";
    for (const auto& entry : stdfs::recursive_directory_iterator(modules)) {
        const auto extension = entry.path().extension();
        if (extension != ".ixx" && extension != ".cpp") continue;
        const auto relative = stdfs::relative(entry.path(), modules);
        std::string module = relative.begin()->string();
        if (module.ends_with(".ixx")) module.resize(module.size() - 4);
        std::ifstream in(entry.path());
        std::smatch match;
        for (std::string line; std::getline(in, line);)
            if (std::regex_search(line, match, import_line)) out.emplace_back(module, match[1]);
    }
    return out;
}

}  // namespace

BOOST_AUTO_TEST_CASE(every_import_points_down) {
    const auto floor = floors();
    BOOST_REQUIRE(floor.size() > 20);
    const auto all = imports();
    BOOST_REQUIRE(!all.empty());
    for (const auto& [module, imported] : all) {
        BOOST_REQUIRE_MESSAGE(floor.contains(module), module << " is on no floor of docs/architecture.md");
        BOOST_REQUIRE_MESSAGE(floor.contains(imported), imported << " is on no floor of docs/architecture.md");
        // A module's internal partitions may import its own contract.
        const bool down = floor.at(imported) < floor.at(module) || imported == module;
        BOOST_TEST((down || allowed_on_one_floor.contains({module, imported})), module << " must not import " << imported);
    }
}

BOOST_AUTO_TEST_CASE(files_fit_a_sitting) {
    for (const auto* top : {"modules", "app", "tests"})
        for (const auto& entry : stdfs::recursive_directory_iterator(source_dir() / top)) {
            const auto extension = entry.path().extension();
            if (extension != ".ixx" && extension != ".cpp" && extension != ".hpp") continue;
            std::ifstream in(entry.path());
            const std::string text{std::istreambuf_iterator<char>(in), {}};
            const auto lines = std::count(text.begin(), text.end(), '\n');
            const auto limit = text.find("\nexport module ") != std::string::npos ? 300 : 600;
            BOOST_TEST(lines <= limit, entry.path() << " has " << lines << " lines");
        }
}

#include "support/support.hpp"

#include <cstdlib>

namespace cobuild::test {

scratch_dir::scratch_dir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "cobuild-test-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = pattern;
}

scratch_dir::~scratch_dir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
}

void write_file(const std::filesystem::path& file, std::string_view content) {
    std::filesystem::create_directories(file.parent_path());
    std::ofstream out(file, std::ios::binary | std::ios::trunc);
    out << content;
    BOOST_REQUIRE_MESSAGE(out.good(), "cannot write " << file);
}

std::string read_file(const std::filesystem::path& file) {
    std::ifstream in(file, std::ios::binary);
    BOOST_REQUIRE_MESSAGE(in.good(), "cannot read " << file);
    return {std::istreambuf_iterator<char>(in), {}};
}

bool needs_root() {
    if (::geteuid() == 0) return true;
    BOOST_TEST_MESSAGE("skipped: needs root");
    return false;
}

std::filesystem::path shared_dir() {
    const char* source = std::getenv("COBUILD_SOURCE_DIR");
    const std::filesystem::path dir = std::filesystem::path(source != nullptr ? source : ".") / ".." / "shared";
    if (std::filesystem::is_directory(dir)) return std::filesystem::canonical(dir);
    BOOST_TEST_MESSAGE("skipped: the shared corpora are not beside the repository");
    return {};
}

}  // namespace cobuild::test

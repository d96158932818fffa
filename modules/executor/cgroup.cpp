module;
#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

module cobuild.executor;

#include "parts.hpp"

namespace cobuild::executor {

std::string read_kernel_file(const std::string& path) {
    const unique_fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    std::string out;
    std::array<char, 4096> piece{};
    while (fd) {
        const auto n = ::read(fd.get(), piece.data(), piece.size());
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) break;
        out.append(piece.data(), static_cast<std::size_t>(n));
    }
    return out;
}

namespace {

constexpr std::string_view entry_word = "cgroup ";

struct hierarchy {
    std::string where;
    bool v2 = false;
};

std::vector<hierarchy> all_hierarchies() {
    std::vector<hierarchy> out;
    const auto text = read_kernel_file("/proc/self/mountinfo");
    for (const auto line : split(text, '\n')) {
        const auto fields = split(line, ' ');
        const auto dash = std::find(fields.begin(), fields.end(), "-");
        if (fields.size() < 7 || std::distance(dash, fields.end()) < 2 || fields[3] != "/") continue;
        const auto type = *std::next(dash);
        if (type == "cgroup" || type == "cgroup2") out.push_back({std::string(fields[4]), type == "cgroup2"});
    }
    return out;
}

/// Removes a cgroup with all below; true when nothing is left.
bool remove_tree(const std::string& dir) {
    if (::rmdir(dir.c_str()) == 0 || errno == ENOENT) return true;
    std::error_code ec;
    for (const auto& below : std::filesystem::directory_iterator(dir, ec))
        if (below.is_directory(ec)) remove_tree(below.path().string());
    return ::rmdir(dir.c_str()) == 0 || errno == ENOENT;
}

}  // namespace

std::vector<std::string> cgroup_hierarchies() {
    std::vector<std::string> out;
    for (auto& h : all_hierarchies()) out.push_back(std::move(h.where));
    return out;
}

cgroup_mode host_cgroups() {
    bool v1 = false;
    bool v2 = false;
    for (const auto& h : all_hierarchies()) (h.v2 ? v2 : v1) = true;
    if (v1) return v2 ? cgroup_mode::hybrid : cgroup_mode::v1;
    return v2 ? cgroup_mode::unified : cgroup_mode::none;
}

bool remove_cgroup(const std::vector<std::string>& hierarchies, const std::string& path) {
    using namespace std::chrono_literals;
    bool clean = true;
    for (const auto& h : hierarchies) {
        const auto dir = h + path;
        // A killed process leaves its cgroup a moment after its parent was told of its end.
        auto pause = 1ms;
        int tries = 0;
        for (; !remove_tree(dir) && tries < 40; ++tries) {
            std::this_thread::sleep_for(pause);
            pause = std::min(pause * 2, std::chrono::milliseconds(50));
        }
        clean = clean && tries < 40;
    }
    return clean;
}

void make_cgroup(const std::vector<std::string>& hierarchies, const std::string& path) {
    for (const auto& h : hierarchies) {
        // A build that ends takes the empty directory above away between our two steps: then once more. What else is wrong the
        // runtime says, for a hierarchy it needs.
        std::error_code failed = std::make_error_code(std::errc::no_such_file_or_directory);
        for (int tries = 0; failed == std::errc::no_such_file_or_directory && tries < 100; ++tries)
            std::filesystem::create_directories(h + path, failed);
    }
}

std::vector<int> cgroup_processes(const std::vector<std::string>& hierarchies, const std::string& path) {
    std::vector<int> out;
    for (const auto& h : hierarchies) {
        const auto text = read_kernel_file(cat(h, path, "/cgroup.procs"));
        for (const auto line : split(text, '\n')) {
            int pid = 0;
            if (std::from_chars(line.data(), line.data() + line.size(), pid).ec == std::errc() && pid > 0) out.push_back(pid);
        }
        if (!out.empty()) break;
    }
    return out;
}

std::string cgroup_entry(std::string_view path) { return cat(entry_word, path); }

std::uint64_t oom_kills(const std::string& path) {
    for (const auto& h : all_hierarchies()) {
        if (!h.v2) continue;
        const auto text = read_kernel_file(cat(h.where, path, "/memory.events"));
        for (const auto line : split(text, '\n'))
            if (line.starts_with("oom_kill ")) {
                std::uint64_t n = 0;
                std::from_chars(line.data() + 9, line.data() + line.size(), n);
                return n;
            }
    }
    return 0;
}

async::task<void> clean_cgroups(async::blocking_pool& pool, std::string text) {
    const std::string path(trim(std::string_view(text).substr(std::min(text.size(), entry_word.size()))));
    const auto parts = split(path, '/');
    // Only what we named ourselves: .../cobuild/<owner>
    if (!text.starts_with(entry_word) || !path.starts_with('/') || parts.size() < 3 || parts[parts.size() - 2] != "cobuild" || parts.back().empty() ||
        std::find(parts.begin(), parts.end(), "..") != parts.end())
        throw error{errc::corrupt, cat("not the name of a cgroup of ours: ", cobuild::quoted(text))};
    const bool clean = co_await pool.run([path] {
        const auto hierarchies = cgroup_hierarchies();
        const bool gone = remove_cgroup(hierarchies, path);
        for (const auto& h : hierarchies) ::rmdir(std::filesystem::path(h + path).parent_path().c_str());  // stays while others use it
        return gone;
    });
    if (!clean) throw error{errc::io, cat("cgroup ", path, " still has processes")};
}

}  // namespace cobuild::executor

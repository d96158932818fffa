#include "executor/tree.hpp"
#include "support/support.hpp"

#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <fcntl.h>
#include <sys/mount.h>

namespace cobuild::test {

namespace fs = std::filesystem;

void busybox_tree(const fs::path& base) {
    for (const auto* d : {"bin", "etc", "tmp", "home/joe"}) fs::create_directories(base / d);
    fs::copy_file("/bin/busybox", base / "bin/busybox");
    for (const auto* name : {"sh", "cat",  "ls",   "id", "stat", "env",  "sleep", "mount", "umount", "touch", "hostname", "mkdir", "unshare", "ps",
                             "dd", "grep", "true", "wc", "head", "date", "rm",    "ip",    "sort",   "chmod", "kill",     "echo",  "test"})
        fs::create_symlink("busybox", base / "bin" / name);
    write_file(base / "etc/passwd", "root:x:0:0:root:/root:/bin/sh\njoe:x:1000:1001:Joe:/home/joe:/bin/sh\n");
    write_file(base / "etc/group", "root:x:0:\nwheel:x:10:root,joe\nusers:x:1001:\nextra:x:2000:joe\n");
    fs::permissions(base / "tmp", fs::perms::all | fs::perms::sticky_bit);
}

int overlay_root(const fs::path& dir, int n) {
    const auto upper = dir / ("upper" + std::to_string(n));
    const auto work = dir / ("ovl" + std::to_string(n));
    fs::create_directories(upper);
    fs::create_directories(work);
    const int context = ::fsopen("overlay", FSOPEN_CLOEXEC);
    const auto set = [&](const char* key, const std::string& value) {
        BOOST_REQUIRE(::fsconfig(context, FSCONFIG_SET_STRING, key, value.c_str(), 0) == 0);
    };
    set("lowerdir", dir / "base");
    set("upperdir", upper);
    set("workdir", work);
    BOOST_REQUIRE(::fsconfig(context, FSCONFIG_CMD_CREATE, nullptr, nullptr, 0) == 0);
    const int tree = ::fsmount(context, FSMOUNT_CLOEXEC, 0);
    BOOST_REQUIRE(tree >= 0);
    ::close(context);
    return tree;
}

std::vector<int> pids_with(const std::string& word) {
    std::vector<int> out;
    std::error_code ec;
    for (const auto& p : fs::directory_iterator("/proc", ec)) {
        const auto name = p.path().filename().string();
        if (name.find_first_not_of("0123456789") != std::string::npos) continue;
        const int fd = ::open((p.path() / "cmdline").c_str(), O_RDONLY | O_CLOEXEC);
        char text[4096];
        const auto n = fd < 0 ? 0 : ::read(fd, text, sizeof text);  // fails when the process ends meanwhile: a stream would throw
        if (fd >= 0) ::close(fd);
        if (n > 0 && std::string_view(text, static_cast<std::size_t>(n)).find(word) != std::string_view::npos) out.push_back(std::stoi(name));
    }
    return out;
}

}  // namespace cobuild::test

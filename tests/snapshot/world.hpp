// What the snapshot suites share. Include first; needs `import cobuild.{base,async,state,snapshot};` after it, then world_body.hpp.
#pragma once
#include "support/child.hpp"
#include "support/support.hpp"

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

namespace cobuild::test {

/// A scratch directory in memory: what makes hundreds of layers need not wait for a disk that others use.
class memory_dir {
public:
    memory_dir() { BOOST_REQUIRE(::mount("tmpfs", dir_.path().c_str(), "tmpfs", 0, "size=512m,nr_inodes=0") == 0); }
    ~memory_dir() { BOOST_TEST(::umount2(dir_.path().c_str(), MNT_DETACH) == 0); }
    memory_dir(const memory_dir&) = delete;
    memory_dir& operator=(const memory_dir&) = delete;
    std::filesystem::path operator/(std::string_view name) const { return dir_ / name; }

private:
    scratch_dir dir_;
};

}  // namespace cobuild::test

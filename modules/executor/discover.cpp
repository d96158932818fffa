module;
#include <cstdint>
#include <ctime>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

module cobuild.executor;

#include "parts.hpp"

namespace cobuild::executor {

namespace {

bool is_crun(const std::string& path) { return std::filesystem::path(path).filename().string().find("crun") != std::string::npos; }

}  // namespace

runtime_program find_runtime(std::string_view binary) {
    const bool hybrid = host_cgroups() == cgroup_mode::hybrid;
    if (!binary.empty()) {
        const auto path = process::find_program(binary);
        if (!path)
            throw error{errc::not_found, cat("OCI runtime ", quoted(binary),
                                             " is not an executable file; correct worker.oci.binary, or install runc or crun and leave the key out")};
        if (is_crun(*path) && hybrid)
            throw error{errc::unsupported, cat("crun (", *path,
                                               ") refuses hosts with hybrid cgroups, as this one is (v1 hierarchies beside a unified one); "
                                               "use runc (package runc), or boot with systemd.unified_cgroup_hierarchy=1")};
        return {*path, is_crun(*path)};
    }
    for (const std::string_view name : {"buildkit-runc", "runc"})
        if (auto path = process::find_program(name)) return {*path, false};
    if (auto path = process::find_program("crun")) {
        if (!hybrid) return {*path, true};
        throw error{errc::unsupported, cat("crun (", *path, ") refuses hosts with hybrid cgroups, as this one is; install runc (package runc)")};
    }
    throw error{errc::not_found, "no OCI runtime in PATH (looked for buildkit-runc, runc, crun); install runc or crun (packages of that name)"};
}

}  // namespace cobuild::executor

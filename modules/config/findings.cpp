module;
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

module cobuild.config;

import cobuild.base;
import :schema;

namespace cobuild::config {
namespace {

// What no part of cobuild looks at yet. Building a feature removes its line; nothing else has to change. The first line
// that fits a key counts. `true`: the key restricts or isolates, so ignoring it would be worse than stopping.
constexpr unbuilt not_built[] = {
    {"proxyNetwork", true},
    {"grpc.securityDescriptor"},
    {"otel"},
    {"cdi"},
    {"history"},
    {"system.platformsCacheMaxAge"},
    {"cache.gha.verify", true},
    {"cache.gha"},
    {"worker.oci.snapshotter", true, "\"fuse-overlayfs\""},
    {"worker.oci.snapshotter", true, "\"stargz\""},
    {"worker.oci.networkMode", true, "\"bridge\""},
    {"worker.oci.bridgeName"},
    {"worker.oci.bridgeSubnet"},
    {"worker.oci.rootless", true},
    {"worker.oci.noProcessSandbox", true},
    {"worker.oci.isolateCgroups", true},
    {"worker.oci.defaultCgroupParent", true},
    {"worker.oci.userRemapUnsupported", true},
    {"worker.oci.apparmor-profile", true},
    {"worker.oci.selinux", true},
    {"worker.oci.proxySnapshotterPath"},
    {"worker.oci.stargzSnapshotter"},
    {"worker.containerd.networkMode", true},
    {"worker.containerd.rootless", true},
    {"worker.containerd.defaultCgroupParent", true},
    {"worker.containerd.apparmor-profile", true},
    {"worker.containerd.selinux", true},
    {"worker.containerd"},
};

bool covers(std::string_view line, std::string_view path) {
    return path == line || (path.starts_with(line) && path.size() > line.size() && (path[line.size()] == '.' || path[line.size()] == '['));
}

std::optional<unsigned> line_of(const reading& r, const std::string& path) {
    const auto found = r.lines.find(path);
    return found == r.lines.end() ? std::nullopt : std::optional(found->second);
}

std::string name_of(const reading& r, const std::string& path) {
    const auto flag = r.flags.find(path);
    return flag == r.flags.end() ? path : flag->second;
}

void judge_unbuilt(reading& r) {
    configuration plain;
    const auto defaults = flatten(schema(plain));
    const bool containerd_off = r.config.containerd.enabled == false;
    std::string ignored;
    std::optional<unsigned> first;
    for (const auto& [path, value] : flatten(schema(r.config))) {
        const auto known = defaults.find(path);
        if (known != defaults.end() && known->second == value) continue;
        const auto* line = find_unbuilt(path, value);
        if (line == nullptr || (containerd_off && covers("worker.containerd", path))) continue;
        if (line->restricts) {
            r.report(severity::error, errc::unsupported,
                     cat(name_of(r, path), ": ", value, " is not supported yet, and ignoring it would build with less restriction than it asks for"),
                     line_of(r, path));
            continue;
        }
        if (value.empty()) continue;  // the heading of an array's element; its keys are named themselves
        ignored += cat(ignored.empty() ? "" : ", ", name_of(r, path));
        if (const auto at = line_of(r, path); at && (!first || *at < *first)) first = at;
    }
    if (!ignored.empty()) r.report(severity::warning, errc::unsupported, cat("not supported yet and ignored: ", ignored), first);
}

std::string architecture_of(std::string_view text) {
    static constexpr std::array<std::pair<std::string_view, std::string_view>, 10> names{{{"x86_64", "amd64"},
                                                                                          {"x86-64", "amd64"},
                                                                                          {"aarch64", "arm64"},
                                                                                          {"armhf", "arm"},
                                                                                          {"armel", "arm"},
                                                                                          {"armv7l", "arm"},
                                                                                          {"armv6l", "arm"},
                                                                                          {"i386", "386"},
                                                                                          {"i686", "386"},
                                                                                          {"loongarch64", "loong64"}}};
    const std::string lower = to_lower(text);
    for (const auto& [from, to] : names)
        if (lower == from) return std::string(to);
    return lower;
}

void judge_platforms(reading& r, const worker_table& w, const std::string& path) {
    if (w.platforms.empty()) return;
    utsname machine{};
    ::uname(&machine);
    const std::string own = architecture_of(machine.machine);
    for (const auto& p : w.platforms) {
        const auto parts = split(p, '/');
        const bool linux_arch = parts.size() > 1 && to_lower(parts[0]) == "linux" && architecture_of(parts[1]) == own;
        if (linux_arch || (parts.size() == 1 && (to_lower(parts[0]) == "linux" || architecture_of(parts[0]) == own))) return;
    }
    r.report(severity::error, errc::invalid, cat(name_of(r, path), ": the list must hold this machine's own platform, linux/", own),
             line_of(r, path));
}

void judge_pairs(reading& r) {
    const auto& tls = r.config.grpc.tls;
    if (tls.cert.empty() != tls.key.empty()) {
        const std::string given = tls.cert.empty() ? "grpc.tls.key" : "grpc.tls.cert";
        r.report(severity::error, errc::invalid, cat(name_of(r, given), ": a certificate and its key are given together"), line_of(r, given));
    }
    for (const auto& [name, table] : r.config.registries)
        for (std::size_t i = 0; i < table.key_pairs.size(); ++i) {
            const std::string path = cat(join_key("registry", name), ".keypair[", i, "]");
            if (table.key_pairs[i].key.empty() || table.key_pairs[i].cert.empty())
                r.report(severity::error, errc::invalid, cat(path, ": needs both key and cert"), line_of(r, path));
        }
}

/// The text of a file, or nothing when it is missing and may be.
std::optional<std::string> read_text(const std::filesystem::path& file, bool must_exist) {
    constexpr std::size_t limit = std::size_t{1} << 20;
    const auto bad = [&](std::string_view why) {
        return error{errc::invalid, cat("cannot read the configuration file ", file.string(), ": ", why)}.at({file.string(), 0});
    };
    const unique_fd fd(::open(file.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (!fd) {
        const int reason = errno;
        if (!must_exist && (reason == ENOENT || reason == ENOTDIR)) return std::nullopt;
        throw bad(std::generic_category().message(reason));
    }
    std::string out;
    std::array<char, 16384> block;
    for (;;) {
        const auto n = ::read(fd.get(), block.data(), block.size());
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw bad(std::generic_category().message(errno));
        if (n == 0) return out;
        out.append(block.data(), static_cast<std::size_t>(n));
        if (out.size() > limit) throw bad("it is longer than 1 MiB");
    }
}

reading read_all(std::string_view text, std::string filename, const overrides& flags, std::string default_root = {}) {
    reading r;
    r.file = std::move(filename);
    if (!default_root.empty()) r.config.root = std::move(default_root);
    read_toml(r, text);
    apply_flags(r, flags);
    judge(r);
    return r;
}

/// $VARIABLE, or a folder of the home directory.
std::filesystem::path below_home(const char* variable, const char* otherwise) {
    if (const char* v = std::getenv(variable); v != nullptr && *v != '\0') return v;
    const char* home = std::getenv("HOME");
    return std::filesystem::path(home == nullptr ? "/" : home) / otherwise;
}

/// True in a user namespace where we are not called root, as buildkitd decides it.
bool rootless_user() {
    const char* user = std::getenv("USER");
    if (user == nullptr || *user == '\0' || std::string_view(user) == "root") return false;
    const auto map = read_text("/proc/self/uid_map", false);
    return map && map->find("4294967295") == std::string::npos;
}

}  // namespace

const unbuilt* find_unbuilt(std::string_view path, std::string_view value) {
    for (const auto& line : not_built)
        if (covers(line.path, path) && (line.value.empty() || line.value == value)) return &line;
    return nullptr;
}

const unbuilt* find_unbuilt(std::string_view path) {
    for (const auto& line : not_built)
        if (covers(line.path, path)) return &line;
    return nullptr;
}

void judge(reading& r) {
    judge_unbuilt(r);
    judge_platforms(r, r.config.oci, "worker.oci.platforms");
    judge_pairs(r);
    if (r.config.oci.enabled == false)
        r.report(severity::error, errc::invalid, cat(name_of(r, "worker.oci.enabled"), ": false leaves no worker to build with"),
                 line_of(r, "worker.oci.enabled"));
    const auto rank = [](const diagnostic& d) {
        return std::tuple(d.level == severity::error ? 0 : 1, d.where ? d.where->line : 0U, std::string_view(d.message));
    };
    std::sort(r.findings.begin(), r.findings.end(), [&](const auto& a, const auto& b) { return rank(a) < rank(b); });
}

std::string to_string(const diagnostic& d) {
    std::string out;
    if (d.where) out = d.where->line != 0 ? cat(d.where->file, ":", d.where->line, ": ") : cat(d.where->file, ": ");
    return cat(out, d.level == severity::error ? "error: " : "warning: ", d.message);
}

namespace {
loaded accept(reading r) {
    const auto mistakes = std::count_if(r.findings.begin(), r.findings.end(), [](const auto& d) { return d.level == severity::error; });
    if (mistakes == 0) return {std::move(r.config), std::move(r.findings)};
    auto& first = r.findings.front();
    std::string message = first.message;
    if (mistakes > 1) message += cat(" (and ", mistakes - 1, " more; \"cobuild config check ", r.file, "\" lists them)");
    error e{first.kind, std::move(message)};
    if (first.where) throw std::move(e).at(*first.where);
    throw e;
}

}  // namespace

loaded parse(std::string_view text, std::string filename, const overrides& flags) { return accept(read_all(text, std::move(filename), flags)); }

loaded load(const std::filesystem::path& file, bool must_exist, const overrides& flags) {
    std::string root;
    if (rootless_user()) root = below_home("XDG_DATA_HOME", ".local/share") / "buildkit";
    return accept(read_all(read_text(file, must_exist).value_or(""), file.string(), flags, std::move(root)));
}

std::vector<diagnostic> check_text(std::string_view text, std::string filename) { return read_all(text, std::move(filename), {}).findings; }

std::vector<diagnostic> check(const std::filesystem::path& file) {
    try {
        return check_text(*read_text(file, true), file.string());
    } catch (const error& e) {
        return {{severity::error, e.kind(), e.what(), e.where()}};
    }
}

std::filesystem::path default_path() {
    if (!rootless_user()) return "/etc/buildkit/buildkitd.toml";
    return below_home("XDG_CONFIG_HOME", ".config") / "buildkit/buildkitd.toml";
}

}  // namespace cobuild::config

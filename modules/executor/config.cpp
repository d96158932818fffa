module;
#include <algorithm>
#include <array>
#include <cstdint>
#include <ctime>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <linux/capability.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

module cobuild.executor;

import cobuild.json;

#include "parts.hpp"

namespace cobuild::executor {

namespace {

constexpr std::string_view default_path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

// By number.
constexpr std::array<std::string_view, 41> names_of_capabilities{"CHOWN",
                                                                 "DAC_OVERRIDE",
                                                                 "DAC_READ_SEARCH",
                                                                 "FOWNER",
                                                                 "FSETID",
                                                                 "KILL",
                                                                 "SETGID",
                                                                 "SETUID",
                                                                 "SETPCAP",
                                                                 "LINUX_IMMUTABLE",
                                                                 "NET_BIND_SERVICE",
                                                                 "NET_BROADCAST",
                                                                 "NET_ADMIN",
                                                                 "NET_RAW",
                                                                 "IPC_LOCK",
                                                                 "IPC_OWNER",
                                                                 "SYS_MODULE",
                                                                 "SYS_RAWIO",
                                                                 "SYS_CHROOT",
                                                                 "SYS_PTRACE",
                                                                 "SYS_PACCT",
                                                                 "SYS_ADMIN",
                                                                 "SYS_BOOT",
                                                                 "SYS_NICE",
                                                                 "SYS_RESOURCE",
                                                                 "SYS_TIME",
                                                                 "SYS_TTY_CONFIG",
                                                                 "MKNOD",
                                                                 "LEASE",
                                                                 "AUDIT_WRITE",
                                                                 "AUDIT_CONTROL",
                                                                 "SETFCAP",
                                                                 "MAC_OVERRIDE",
                                                                 "MAC_ADMIN",
                                                                 "SYSLOG",
                                                                 "WAKE_ALARM",
                                                                 "BLOCK_SUSPEND",
                                                                 "AUDIT_READ",
                                                                 "PERFMON",
                                                                 "BPF",
                                                                 "CHECKPOINT_RESTORE"};
constexpr std::array<std::string_view, 14> granted{"CHOWN",  "DAC_OVERRIDE", "FSETID",  "FOWNER",           "MKNOD",      "NET_RAW", "SETGID",
                                                   "SETUID", "SETFCAP",      "SETPCAP", "NET_BIND_SERVICE", "SYS_CHROOT", "KILL",    "AUDIT_WRITE"};

bool insecure(const oci_input& in) { return in.step.security == security::insecure; }

/// The granted ones, or every one, as far as this process has them itself.
json::array capabilities(bool every) {
    __user_cap_header_struct head{.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
    std::array<__user_cap_data_struct, 2> data{};
    if (::syscall(SYS_capget, &head, data.data()) < 0) throw_errno("capget");
    json::array out;
    for (unsigned number = 0; number < names_of_capabilities.size(); ++number) {
        const auto name = names_of_capabilities[number];
        const bool wanted = every || std::find(granted.begin(), granted.end(), name) != granted.end();
        if (wanted && (data[number / 32].permitted >> number % 32 & 1U) != 0 && ::prctl(PR_CAPBSET_READ, number) == 1)
            out.emplace_back(cat("CAP_", name));
    }
    return out;
}

std::string_view key_of(std::string_view variable) { return variable.substr(0, variable.find('=')); }

json::array environment(const oci_input& in) {
    std::vector<std::string> all{std::string(default_path), cat("HOME=", in.user.home)};
    all.insert(all.end(), in.step.env.begin(), in.step.env.end());
    const auto proxy = [&](std::string_view upper, std::string_view lower, const std::string& value) {
        if (value.empty()) return;
        all.push_back(cat(upper, '=', value));
        all.push_back(cat(lower, '=', value));
    };
    proxy("HTTP_PROXY", "http_proxy", in.step.proxies.http);
    proxy("HTTPS_PROXY", "https_proxy", in.step.proxies.https);
    proxy("FTP_PROXY", "ftp_proxy", in.step.proxies.ftp);
    proxy("NO_PROXY", "no_proxy", in.step.proxies.no);
    proxy("ALL_PROXY", "all_proxy", in.step.proxies.all);
    json::array out;
    for (std::size_t i = 0; i < all.size(); ++i) {
        const auto same = [&](const std::string& later) { return key_of(later) == key_of(all[i]); };
        if (std::none_of(all.begin() + static_cast<std::ptrdiff_t>(i) + 1, all.end(), same)) out.emplace_back(all[i]);
    }
    return out;
}

json::array limits(const step& s) {
    static constexpr std::array<std::string_view, 16> known{"as",   "core",   "cpu",   "data", "fsize",  "locks",  "memlock",    "msgqueue",
                                                            "nice", "nofile", "nproc", "rss",  "rtprio", "rttime", "sigpending", "stack"};
    json::array out;
    for (const auto& u : s.ulimits) {
        const auto name = to_lower(u.name);
        if (std::find(known.begin(), known.end(), name) == known.end()) throw error{errc::invalid, cat("unknown ulimit ", quoted(u.name))};
        std::string type = "RLIMIT_";
        for (const char c : name) type += static_cast<char>(c - ('a' - 'A'));
        const auto value = [](std::int64_t v) { return v < 0 ? json::value(UINT64_MAX) : json::value(v); };
        out.emplace_back(json::object{{"type", type}, {"hard", value(u.hard)}, {"soft", value(u.soft)}});
    }
    return out;
}

json::object process_part(const oci_input& in) {
    json::array groups;
    for (const auto g : in.user.groups) groups.emplace_back(g);
    const auto caps = capabilities(insecure(in));
    json::object sets{{"bounding", caps}, {"effective", caps}, {"permitted", caps}};
    if (insecure(in)) {
        sets.set("inheritable", caps);
        sets.set("ambient", caps);
    }
    json::object out{
        {"terminal", in.step.terminal},   {"user", json::object{{"uid", in.user.uid}, {"gid", in.user.gid}, {"additionalGids", std::move(groups)}}},
        {"args", in.step.args},           {"env", environment(in)},
        {"cwd", clean_path(in.step.cwd)}, {"capabilities", std::move(sets)},
        {"noNewPrivileges", false}};
    if (auto l = limits(in.step); !l.empty()) out.set("rlimits", std::move(l));
    return out;
}

json::array mounts_part(const oci_input& in) {
    const std::vector<std::string> closed{"nosuid", "noexec", "nodev"};
    const auto with = [](std::vector<std::string> a, std::vector<std::string> more) {
        a.insert(a.end(), more.begin(), more.end());
        return a;
    };
    std::vector<oci_mount> all{
        {"/proc", "proc", "proc", closed},
        {"/dev", "tmpfs", "tmpfs", {"nosuid", "strictatime", "mode=755", "size=65536k"}},
        {"/dev/pts", "devpts", "devpts", {"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
        {"/dev/shm", "tmpfs", "shm", with(closed, {"mode=1777", cat("size=", in.step.shm_size)})},
        {"/dev/mqueue", "mqueue", "mqueue", closed},
        {"/sys", "sysfs", "sysfs", with(closed, {"ro"})},
        {"/sys/fs/cgroup", "cgroup", "cgroup", with(closed, {"relatime", "ro"})},
    };
    if (insecure(in))
        for (auto& m : all) std::erase(m.options, "ro");
    // A mount of the step's own takes the place of a standard one; outer ones come before inner ones.
    auto own = in.mounts;
    std::sort(own.begin(), own.end(), [](const oci_mount& a, const oci_mount& b) { return a.target < b.target; });
    for (auto& m : own) {
        const auto standard = std::find_if(all.begin(), all.end(), [&](const oci_mount& one) { return one.target == m.target; });
        if (standard != all.end())
            *standard = std::move(m);
        else
            all.push_back(std::move(m));
    }
    json::array out;
    for (const auto& m : all)
        out.emplace_back(json::object{{"destination", m.target}, {"type", m.type}, {"source", m.source}, {"options", m.options}});
    return out;
}

json::object resources_part(const oci_input& in) {
    // Everything is denied; the runtime adds the standard devices it creates.
    json::object out{{"devices", json::array{json::object{{"allow", insecure(in)}, {"access", "rwm"}}}}};
    const auto& r = in.step.resources;
    json::object memory;
    if (r.memory != 0) memory.set("limit", r.memory);
    if (r.memory_swap != 0) memory.set("swap", r.memory_swap);
    if (!memory.empty()) out.set("memory", std::move(memory));
    json::object cpu;
    if (r.cpu_shares != 0) cpu.set("shares", r.cpu_shares);
    if (r.cpu_quota != 0) cpu.set("quota", r.cpu_quota);
    if (r.cpu_period != 0) cpu.set("period", r.cpu_period);
    if (!r.cpuset_cpus.empty()) cpu.set("cpus", r.cpuset_cpus);
    if (!r.cpuset_mems.empty()) cpu.set("mems", r.cpuset_mems);
    if (!cpu.empty()) out.set("cpu", std::move(cpu));
    return out;
}

/// Device files of the host that an unconfined step gets on top of the standard ones.
json::array devices_part() {
    std::vector<std::string> paths{"/dev/kmsg", "/dev/cuse", "/dev/fuse", "/dev/kvm", "/dev/net/tun", "/dev/loop-control"};
    for (int n = 0; n < 8; ++n) paths.push_back(cat("/dev/loop", n));
    json::array out;
    for (const auto& path : paths) {
        struct stat info{};
        if (::stat(path.c_str(), &info) < 0 || (!S_ISCHR(info.st_mode) && !S_ISBLK(info.st_mode))) continue;
        out.emplace_back(json::object{{"path", path},
                                      {"type", S_ISCHR(info.st_mode) ? "c" : "b"},
                                      {"major", ::major(info.st_rdev)},
                                      {"minor", ::minor(info.st_rdev)},
                                      {"fileMode", info.st_mode & 0777U},
                                      {"uid", info.st_uid},
                                      {"gid", info.st_gid}});
    }
    return out;
}

json::object linux_part(const oci_input& in) {
    json::array namespaces;
    for (const auto* kind : {"pid", "ipc", "uts", "mount"}) namespaces.emplace_back(json::object{{"type", kind}});
    if (host_cgroups() == cgroup_mode::unified) namespaces.emplace_back(json::object{{"type", "cgroup"}});
    json::object out{{"cgroupsPath", in.cgroup}, {"resources", resources_part(in)}, {"namespaces", std::move(namespaces)}};
    if (insecure(in)) {
        out.set("devices", devices_part());
        return out;
    }
    out.set("maskedPaths", json::array{"/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                                       "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"});
    out.set("readonlyPaths", json::array{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"});
    return out;
}

}  // namespace

std::string oci_process(const oci_input& in) { return json::serialize(process_part(in), {.escape_html = false}); }

std::string oci_config(const oci_input& in) {
    const json::object all{{"ociVersion", "1.0.2"},
                           {"process", process_part(in)},
                           {"root", json::object{{"path", "rootfs"}, {"readonly", in.step.root_readonly}}},
                           {"hostname", in.step.hostname},
                           {"mounts", mounts_part(in)},
                           {"linux", linux_part(in)}};
    auto text = json::serialize(all, {.escape_html = false});
    if (insecure(in)) return text;
    // The profile is the same for every step and the longest part: written once. "linux" is last, so both braces are its and ours.
    text.resize(text.size() - 2);
    return cat(text, ",\"seccomp\":", seccomp_profile_json(), "}}");
}

}  // namespace cobuild::executor

module;
#include <sys/utsname.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

module cobuild.oci;

namespace cobuild::oci {

namespace {

// Go's lists (go/build/syslist.go), which decide what a single word means.
constexpr std::array<std::string_view, 17> known_os{"aix",   "android", "darwin", "dragonfly", "freebsd", "hurd",    "illumos", "ios", "js",
                                                    "linux", "nacl",    "netbsd", "openbsd",   "plan9",   "solaris", "windows", "zos"};
constexpr std::array<std::string_view, 26> known_arch{
    "386",      "amd64",     "amd64p32",    "arm", "armbe", "arm64",   "arm64be", "ppc64", "ppc64le", "loong64", "mips", "mipsle",  "mips64",
    "mips64le", "mips64p32", "mips64p32le", "ppc", "riscv", "riscv64", "s390",    "s390x", "sparc",   "sparc64", "wasm", "aarch64", "x86_64"};

template<std::size_t N>
bool among(const std::array<std::string_view, N>& list, std::string_view word) {
    return std::find(list.begin(), list.end(), word) != list.end();
}

std::string host_machine() {
    utsname name{};
    if (::uname(&name) != 0) throw_errno("uname");
    return name.machine;
}

bool word_is_valid(std::string_view word) {
    return !word.empty() && std::all_of(word.begin(), word.end(), [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '.' || c == '-';
    });
}

// "v8.2" -> {8, 2}. A number beyond what any architecture counts to is no version: nothing is enumerated up to it.
constexpr int highest_version = 99;
struct version {
    int major = 0;
    int minor = 0;
};
std::optional<version> parse_version(std::string_view text) {
    if (!text.starts_with('v')) return std::nullopt;
    version out;
    const char* end = text.data() + text.size();
    auto [p, ec] = std::from_chars(text.data() + 1, end, out.major);
    if (ec != std::errc{} || out.major < 0 || out.major > highest_version) return std::nullopt;
    if (p == end) return out;
    if (*p != '.') return std::nullopt;
    auto [q, ec2] = std::from_chars(p + 1, end, out.minor);
    if (ec2 != std::errc{} || q != end) return std::nullopt;
    return out;
}

// What a machine for `p` can run besides, best first (containerd's platformVector).
std::vector<platform> compatible(const platform& p) {
    std::vector<platform> out{p};
    const auto add = [&](std::string_view arch, std::string variant) {
        platform next = p;
        next.architecture = arch;
        next.variant = std::move(variant);
        out.push_back(std::move(next));
    };
    const auto v = parse_version(p.variant);
    if (p.architecture == "amd64") {
        for (int n = v ? v->major - 1 : 0; n >= 1; --n) add("amd64", n == 1 ? "" : cat('v', n));
        add("386", "");
    } else if (p.architecture == "arm") {
        for (int n = v ? v->major - 1 : 0; n >= 5; --n) add("arm", cat('v', n));
    } else if (p.architecture == "arm64") {
        // Every v9.n implements v8.(n+5).
        version at = v.value_or(version{8, 0});
        while (at.major > 8 || at.minor > 0) {
            if (at.major > 9 || at.minor > 30) break;
            if (at.major == 9 && at.minor == 0) {
                at = {8, 5};
            } else {
                --at.minor;
            }
            add("arm64", at.major == 8 && at.minor == 0 ? "" : at.minor == 0 ? cat('v', at.major) : cat('v', at.major, '.', at.minor));
        }
        for (int n = 8; n >= 5; --n) add("arm", cat('v', n));
    }
    return out;
}

}  // namespace

platform normalize(platform p) {
    p.os = to_lower(p.os);
    if (p.os.empty()) p.os = "linux";
    if (p.os == "macos") p.os = "darwin";
    p.architecture = to_lower(p.architecture);
    p.variant = to_lower(p.variant);
    auto& arch = p.architecture;
    auto& variant = p.variant;
    if (arch == "i386") {
        arch = "386";
        variant.clear();
    } else if (arch == "x86_64" || arch == "x86-64" || arch == "amd64") {
        arch = "amd64";
        if (variant == "v1") variant.clear();
    } else if (arch == "aarch64" || arch == "arm64") {
        arch = "arm64";
        if (variant == "8" || variant == "v8" || variant == "v8.0") variant.clear();
        if (variant == "9" || variant == "9.0" || variant == "v9.0") variant = "v9";
    } else if (arch == "armhf") {
        arch = "arm";
        variant = "v7";
    } else if (arch == "armel") {
        arch = "arm";
        variant = "v6";
    } else if (arch == "arm") {
        if (variant.empty() || variant == "7") {
            variant = "v7";
        } else if (variant == "5" || variant == "6" || variant == "8") {
            variant.insert(0, 1, 'v');
        }
    }
    return p;
}

platform parse_platform(std::string_view text) {
    const auto bad = [&](std::string_view why) { return error{errc::invalid, cat("invalid platform ", quoted(text), ": ", why)}; };
    const auto bad_word = [&](std::string_view word) {
        // As containerd words it, whose sentence users of BuildKit look for.
        return error{errc::invalid, cat(quoted(word), " is an invalid component of ", quoted(text),
                                        ": platform specifier component must match \"^[A-Za-z0-9_.-]+$\"")};
    };
    const auto words = split(text, '/');
    platform p;
    if (words.size() > 3) throw bad("expected os/architecture or os/architecture/variant");
    // An operating system may carry its version in parentheses: "windows(10.0.17763)".
    std::string_view os = words[0];
    if (const auto open = os.find('('); open != std::string_view::npos && os.ends_with(')')) {
        p.os_version = os.substr(open + 1, os.size() - open - 2);
        os = os.substr(0, open);
        if (!p.os_version.empty() && !word_is_valid(p.os_version)) throw bad("the version may have letters, digits, dots and dashes only");
    }
    if (!word_is_valid(os)) throw bad_word(os);
    for (std::size_t i = 1; i < words.size(); ++i)
        if (!word_is_valid(words[i])) throw bad_word(words[i]);
    if (words.size() == 1) {
        const auto host = host_platform();
        p.os = normalize({.os = std::string(os)}).os;
        if (among(known_os, p.os)) {
            p.architecture = host.architecture;
            p.variant = host.variant == "v7" ? "" : host.variant;
            return p;
        }
        const auto named = normalize({.os = host.os, .architecture = std::string(os)});
        if (!among(known_arch, named.architecture)) throw bad("neither a known operating system nor a known architecture");
        p = named;
        if (p.architecture == "arm" && p.variant == "v7") p.variant.clear();
        return p;
    }
    auto out = normalize({.os = std::string(os), .architecture = std::string(words[1]), .variant = words.size() == 3 ? std::string(words[2]) : ""});
    out.os_version = std::move(p.os_version);
    if (words.size() == 2 && out.architecture == "arm" && out.variant == "v7") out.variant.clear();
    if (words.size() == 3 && out.architecture == "arm64" && out.variant.empty()) out.variant = "v8";
    return out;
}

std::string format(const platform& p) {
    if (p.os.empty()) return "unknown";
    std::string out = p.os;
    for (const auto* part : {&p.architecture, &p.variant})
        if (!part->empty()) out.append("/").append(*part);
    return out;
}

platform host_platform() {
    const auto machine = host_machine();
    platform p{.os = "linux", .architecture = machine};
    if (machine.starts_with("armv8") || machine.starts_with("armv7")) p = {.os = "linux", .architecture = "arm", .variant = "v7"};
    if (machine.starts_with("armv6")) p = {.os = "linux", .architecture = "arm", .variant = "v6"};
    if (machine.starts_with("armv5")) p = {.os = "linux", .architecture = "arm", .variant = "v5"};
    if (machine == "i686" || machine == "i586") p.architecture = "386";
    if (machine == "loongarch64") p.architecture = "loong64";
    return normalize(std::move(p));
}

std::optional<unsigned> match_rank(const platform& wanted, const platform& offered) {
    const auto have = normalize(offered);
    unsigned rank = 0;
    for (const auto& option : compatible(normalize(wanted))) {
        const auto want = normalize(option);
        if (want.os == have.os && want.architecture == have.architecture && want.variant == have.variant &&
            (want.os_version.empty() || have.os_version.empty() || want.os_version == have.os_version))
            return rank;
        ++rank;
    }
    return std::nullopt;
}

}  // namespace cobuild::oci

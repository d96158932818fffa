module;
#include <fcntl.h>
#include <sched.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import cobuild.fs;
import :parts;

namespace cobuild::build {

namespace {

/// A machine's smallest program: it ends with 0.
struct machine {
    std::string_view platform;
    std::uint16_t elf_machine;
    bool wide;  ///< ELF64
    bool big_endian;
    std::uint32_t flags;
    std::string_view code;
};

using namespace std::string_view_literals;

constexpr std::array machines{
    machine{"linux/amd64", 62, true, false, 0, "\xb8\x3c\x00\x00\x00\x31\xff\x0f\x05"sv},
    machine{"linux/386", 3, false, false, 0, "\xb8\x01\x00\x00\x00\x31\xdb\xcd\x80"sv},
    machine{"linux/arm64", 183, true, false, 0, "\xa8\x0b\x80\xd2\x00\x00\x80\xd2\x01\x00\x00\xd4"sv},
    machine{"linux/arm/v7", 40, false, false, 0x05000000, "\x01\x70\xa0\xe3\x00\x00\xa0\xe3\x00\x00\x00\xef"sv},
    machine{"linux/riscv64", 243, true, false, 0, "\x93\x08\xd0\x05\x13\x05\x00\x00\x73\x00\x00\x00"sv},
    machine{"linux/ppc64le", 21, true, false, 2, "\x01\x00\x00\x38\x00\x00\x60\x38\x02\x00\x00\x44"sv},
    machine{"linux/ppc64", 21, true, true, 2, "\x38\x00\x00\x01\x38\x60\x00\x00\x44\x00\x00\x02"sv},
    machine{"linux/s390x", 22, true, true, 0, "\xa7\x29\x00\x00\x0a\x01\x00\x00"sv},
    machine{"linux/mips64le", 8, true, false, 0x80000007, "\xc2\x13\x02\x24\x00\x00\x04\x24\x0c\x00\x00\x00"sv},
    machine{"linux/mips64", 8, true, true, 0x80000007, "\x24\x02\x13\xc2\x24\x04\x00\x00\x00\x00\x00\x0c"sv},
    machine{"linux/loong64", 258, true, false, 0x43, "\x0b\x74\x81\x03\x04\x00\x80\x03\x00\x00\x2b\x00"sv},
};

/// An executable of one segment: header, program header, code.
std::string make_elf(const machine& m) {
    std::string out;
    const auto number = [&](std::uint64_t v, unsigned bytes) {
        for (unsigned i = 0; i < bytes; ++i) out += static_cast<char>((v >> (8 * (m.big_endian ? bytes - 1 - i : i))) & 0xff);
    };
    const unsigned word = m.wide ? 8 : 4;
    const std::uint64_t header = m.wide ? 64 : 52, program = m.wide ? 56 : 32, base = 0x400000;
    const std::uint64_t size = header + program + m.code.size();
    out +=
        "\x7f"
        "ELF";
    out += static_cast<char>(m.wide ? 2 : 1);
    out += static_cast<char>(m.big_endian ? 2 : 1);
    out += '\1';
    out.resize(16);
    number(2, 2);
    number(m.elf_machine, 2);
    number(1, 4);
    number(base + header + program, word);  // entry
    number(header, word);
    number(0, word);
    number(m.flags, 4);
    for (const auto v : {header, program, std::uint64_t{1}, std::uint64_t{0}, std::uint64_t{0}, std::uint64_t{0}}) number(v, 2);
    number(1, 4);
    if (m.wide) number(5, 4);
    number(0, word);
    number(base, word);
    number(base, word);
    number(size, word);
    number(size, word);
    if (!m.wide) number(5, 4);
    number(0x10000, word);
    return out.append(m.code);
}

/// Runs `name` of the directory with nothing else to see: an emulator that the kernel would have to look up, as it would in a
/// step's root, is none. The child raises no signal and is nobody else's to wait for.
bool runs_alone(int directory, const char* name) {
    const char* const args[] = {name, nullptr};
    const char* const env[] = {nullptr};
    const auto pid = static_cast<pid_t>(::syscall(SYS_clone, 0, nullptr, nullptr, nullptr, nullptr));
    if (pid == 0) {
        if (::fchdir(directory) == 0 && ::chroot(".") == 0) ::execve(name, const_cast<char* const*>(args), const_cast<char* const*>(env));
        ::_exit(127);
    }
    if (pid < 0) return false;
    int status = 0;
    while (::waitpid(pid, &status, __WALL) < 0)
        if (errno != EINTR) return false;
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

std::vector<oci::platform> probe(int directory) {
    std::vector<oci::platform> out;
    for (const auto& m : machines) {
        {
            const unique_fd file{::openat(directory, "probe", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0755)};
            if (!file) throw_errno("writing a program to try emulators with");
            fs::write_all(file.get(), bytes_of(make_elf(m)));
        }
        if (runs_alone(directory, "/probe")) out.push_back(oci::normalize(oci::parse_platform(m.platform)));
    }
    return out;
}

/// What was found out lately, for all engines of the process: the kernel's table is one.
struct recent_answer {
    std::mutex guard;
    std::chrono::steady_clock::time_point asked;
    std::vector<oci::platform> platforms;
};
recent_answer& recent() {
    static recent_answer r;
    return r;
}

}  // namespace

async::task<std::vector<oci::platform>> emulated_platforms(parts& p, bool needed) {
    if (!needed) co_return std::vector<oci::platform>{};
    constexpr auto lasting = std::chrono::seconds(20);
    {
        const std::lock_guard lock(recent().guard);
        if (recent().asked.time_since_epoch().count() != 0 && std::chrono::steady_clock::now() - recent().asked < lasting)
            co_return recent().platforms;
    }
    auto place = co_await p.snapshots->begin({});
    auto found = co_await p.runtime.pool().run([&] { return probe(place.upper()); });
    const std::lock_guard lock(recent().guard);
    recent().asked = std::chrono::steady_clock::now();
    recent().platforms = found;
    co_return found;
}

}  // namespace cobuild::build

module;
#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

module cobuild.executor;

#include "parts.hpp"

namespace cobuild::executor {

namespace {

constexpr std::size_t max_file = std::size_t{10} << 20;

std::optional<unsigned> number(std::string_view text) {
    unsigned out = 0;
    const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), out);
    if (ec != std::errc() || end != text.data() + text.size() || text.empty() || out > 0x7fffffffU) return std::nullopt;
    return out;
}

/// The text of a user file; empty when it is missing.
std::string read_inside(int root, const std::string& path) {
    const auto fd = open_inside(root, path, O_RDONLY | O_NONBLOCK | O_NOCTTY);
    if (!fd) return {};
    struct stat info{};
    if (::fstat(fd.get(), &info) < 0) throw_errno(cat("read ", path));
    if (!S_ISREG(info.st_mode) || static_cast<std::size_t>(info.st_size) > max_file)
        throw error{errc::invalid, cat("the step's ", path, " is not a regular file of at most 10 MiB")};
    std::string out;
    std::array<char, 16384> piece{};
    for (;;) {
        const auto n = ::read(fd.get(), piece.data(), piece.size());
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw_errno(cat("read ", path));
        if (n == 0 || out.size() > max_file) return out;
        out.append(piece.data(), static_cast<std::size_t>(n));
    }
}

struct passwd_entry {
    std::string name;
    unsigned uid = 0;
    unsigned gid = 0;
    std::string home;
};

/// The entry by name, or by number when the name is one.
std::optional<passwd_entry> find_passwd(std::string_view text, std::string_view user) {
    const auto wanted = number(user);
    for (const auto line : split(text, '\n')) {
        const auto fields = split(line, ':');
        if (fields.size() < 6 || line.starts_with('#')) continue;
        const auto uid = number(trim(fields[2]));
        const auto gid = number(trim(fields[3]));
        if (!uid || !gid) continue;
        if (fields[0] == user || (wanted && *uid == *wanted)) return passwd_entry{std::string(fields[0]), *uid, *gid, std::string(fields[5])};
    }
    return std::nullopt;
}

std::vector<unsigned> groups_of(std::string_view text, std::string_view user) {
    std::vector<unsigned> out;
    for (const auto line : split(text, '\n')) {
        const auto fields = split(line, ':');
        if (fields.size() < 4) continue;
        const auto gid = number(trim(fields[2]));
        if (!gid) continue;
        for (const auto member : split(fields[3], ','))
            if (trim(member) == user) {
                out.push_back(*gid);
                break;
            }
    }
    return out;
}

std::optional<unsigned> find_group(std::string_view text, std::string_view group) {
    for (const auto line : split(text, '\n')) {
        const auto fields = split(line, ':');
        if (fields.size() >= 3 && fields[0] == group)
            if (const auto gid = number(trim(fields[2]))) return gid;
    }
    return number(group);
}

}  // namespace

identity find_user(int root, const std::string& name) {
    const bool by_default = name.empty();
    const std::string_view wanted = by_default ? "0" : std::string_view(name);
    const auto colon = wanted.find(':');
    const auto user = wanted.substr(0, colon);
    const auto group = colon == std::string_view::npos ? std::string_view() : wanted.substr(colon + 1);
    identity out;
    const auto passwd = read_inside(root, "/etc/passwd");
    const auto entry = find_passwd(passwd, user.empty() ? "0" : user);
    if (entry) {
        out.uid = entry->uid;
        out.gid = entry->gid;
        out.home = entry->home.empty() ? "/" : entry->home;
    } else if (const auto uid = number(user.empty() ? "0" : user)) {
        out.uid = *uid;
    } else {
        throw error{errc::not_found, cat("unable to find user ", user, ": no matching entry in the step's /etc/passwd")};
    }
    if (!group.empty()) {
        const auto both_numbers = number(user) && number(group);
        const auto gid = both_numbers ? number(group) : find_group(read_inside(root, "/etc/group"), group);
        if (!gid) throw error{errc::not_found, cat("unable to find group ", group, ": no matching entry in the step's /etc/group")};
        out.gid = *gid;
    } else if (entry) {
        out.groups = groups_of(read_inside(root, "/etc/group"), entry->name);
    }
    if (std::find(out.groups.begin(), out.groups.end(), out.gid) == out.groups.end()) out.groups.insert(out.groups.begin(), out.gid);
    return out;
}

}  // namespace cobuild::executor

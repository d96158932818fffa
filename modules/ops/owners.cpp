module;
#include <fcntl.h>

#include <charconv>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.ops;

import :bodies;

namespace cobuild::ops {

namespace {

constexpr std::size_t max_file = std::size_t{10} << 20;

/// The fields of the line for `name`; empty when the file or the line is not there.
std::optional<std::vector<std::string>> find_line(const fs::root& root, std::string_view file, std::string_view name) {
    const auto info = root.stat(file, fs::links::follow);
    if (!info || !info->is_file()) return std::nullopt;
    const std::string text = root.read_file(file, max_file);
    for (const auto line : split(text, '\n')) {
        const auto fields = split(line, ':');
        if (fields.size() < 3 || fields[0] != name) continue;
        return std::vector<std::string>(fields.begin(), fields.end());
    }
    return std::nullopt;
}

std::uint32_t number(const std::string& text, std::string_view file) {
    std::uint32_t value = 0;
    const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (ec != std::errc{} || end != text.data() + text.size())
        throw error{errc::invalid, cat(file, " of the image is damaged: ", quoted(text), " is no number")};
    return value;
}

}  // namespace

std::uint32_t find_user(const fs::root& root, const std::string& name, std::uint32_t* primary_group) {
    const auto line = find_line(root, "/etc/passwd", name);
    if (!line) throw error{errc::not_found, cat("the user ", quoted(name), " is not in /etc/passwd of the image")};
    if (primary_group != nullptr && line->size() > 3) *primary_group = number((*line)[3], "/etc/passwd");
    return number((*line)[2], "/etc/passwd");
}

std::uint32_t find_group(const fs::root& root, const std::string& name) {
    const auto line = find_line(root, "/etc/group", name);
    if (!line) throw error{errc::not_found, cat("the group ", quoted(name), " is not in /etc/group of the image")};
    return number((*line)[2], "/etc/group");
}

namespace {

constexpr std::uint32_t set_id = 06000, every_bit = 07777;

/// Bits that the letters before the operator are about; 0 when there are none, which means all.
std::uint32_t take_who(std::string_view& clause) {
    std::uint32_t who = 0;
    for (; !clause.empty() && std::string_view("ugoa").find(clause[0]) != std::string_view::npos; clause.remove_prefix(1))
        who |= clause[0] == 'u' ? 04700U : clause[0] == 'g' ? 02070U : clause[0] == 'o' ? 01007U : every_bit;
    return who;
}

/// Bits that the letters after the operator name, for everybody; `mode` is what the file has by now.
std::optional<std::uint32_t> take_bits(std::string_view& clause, std::uint32_t mode, bool directory) {
    std::uint32_t bits = 0;
    for (; !clause.empty() && std::string_view("+-=").find(clause[0]) == std::string_view::npos; clause.remove_prefix(1)) {
        switch (clause[0]) {
            case 'r': bits |= 0444; break;
            case 'w': bits |= 0222; break;
            case 'x': bits |= 0111; break;
            case 'X': bits |= directory || (mode & 0111) != 0 ? 0111U : 0U; break;
            case 's': bits |= set_id; break;
            case 't': bits |= 01000; break;
            case 'u': bits |= (mode >> 6 & 7) * 0111; break;
            case 'g': bits |= (mode >> 3 & 7) * 0111; break;
            case 'o': bits |= (mode & 7) * 0111; break;
            default: return std::nullopt;
        }
    }
    return bits;
}

}  // namespace

/// As GNU chmod does with a umask of 0: "=" also takes away special bits of those it is about, but a directory keeps its
/// set-id bits unless they are named.
std::uint32_t apply_symbolic_mode(std::string_view text, std::uint32_t mode, bool directory) {
    const auto bad = [&] { return error{errc::invalid, cat("--chmod=", text, ": neither an octal number nor chmod's symbolic form")}; };
    for (auto clause : split(text, ',')) {
        const std::uint32_t named = take_who(clause);
        const std::uint32_t who = named == 0 ? every_bit : named;
        if (clause.empty()) throw bad();
        while (!clause.empty()) {
            const char op = clause[0];
            clause.remove_prefix(1);
            if (op != '+' && op != '-' && op != '=') throw bad();
            const auto bits = take_bits(clause, mode, directory);
            if (!bits) throw bad();
            const std::uint32_t kept = directory ? set_id & ~*bits : 0;
            if (op == '+')
                mode |= *bits & who;
            else if (op == '-')
                mode &= ~(*bits & who);
            else
                mode = (mode & (~who | kept)) | (*bits & who);
        }
    }
    return mode & every_bit;
}

}  // namespace cobuild::ops

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
    if (ec != std::errc{} || end != text.data() + text.size()) throw error{errc::invalid, cat(file, " of the image is damaged: ", quoted(text), " is no number")};
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

std::uint32_t apply_symbolic_mode(std::string_view text, std::uint32_t mode, bool directory) {
    const auto bad = [&] { return error{errc::invalid, cat("--chmod=", text, ": neither an octal number nor chmod's symbolic form")}; };
    for (auto clause : split(text, ',')) {
        std::uint32_t who = 0;
        std::size_t at = 0;
        for (; at < clause.size() && std::string_view("ugoa").find(clause[at]) != std::string_view::npos; ++at)
            who |= clause[at] == 'u' ? 04700U : clause[at] == 'g' ? 02070U : clause[at] == 'o' ? 01007U : 07777U;
        if (who == 0) who = 07777;
        if (at >= clause.size()) throw bad();
        while (at < clause.size()) {
            const char op = clause[at++];
            if (op != '+' && op != '-' && op != '=') throw bad();
            std::uint32_t bits = 0;
            for (; at < clause.size() && std::string_view("+-=").find(clause[at]) == std::string_view::npos; ++at) {
                switch (clause[at]) {
                    case 'r': bits |= 0444; break;
                    case 'w': bits |= 0222; break;
                    case 'x': bits |= 0111; break;
                    case 'X': bits |= directory || (mode & 0111) != 0 ? 0111U : 0U; break;
                    case 's': bits |= 06000; break;
                    case 't': bits |= 01000; break;
                    case 'u': bits |= (mode >> 6 & 7) * 0111; break;
                    case 'g': bits |= (mode >> 3 & 7) * 0111; break;
                    case 'o': bits |= (mode & 7) * 0111; break;
                    default: throw bad();
                }
            }
            bits &= who;
            if (op == '+') mode |= bits;
            else if (op == '-') mode &= ~bits;
            else mode = (mode & ~(who & 0777)) | bits;
        }
    }
    return mode & 07777;
}

}  // namespace cobuild::ops

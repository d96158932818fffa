module;
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

module cobuild.filesync;

import cobuild.base;
import :parts;

namespace cobuild::filesync {

namespace {
constexpr std::size_t max_name = 255;

[[noreturn]] void refuse(std::string_view path, std::string_view why) {
    // A hostile path may be megabytes long.
    throw error{errc::corrupt, cat("the other side of the file transfer sent ", quoted(path.substr(0, 200)), ", ", why)};
}
}  // namespace

void order::check_path(std::string_view path) const {
    if (path.empty()) refuse(path, "an empty path");
    if (path.size() > max_.path_bytes) refuse(path, cat("a path of more than ", max_.path_bytes, " bytes"));
    if (path.front() == '/') refuse(path, "an absolute path");
    if (path.find('\0') != std::string_view::npos) refuse(path, "a path with a NUL byte");
    for (const auto name : split(path, '/')) {
        if (name == "..") refuse(path, "which leads out of the directory");
        if (name.empty() || name == ".") refuse(path, "which is not a clean path");
        if (name.size() > max_name) refuse(path, cat("a name of more than ", max_name, " bytes"));
    }
}

void order::check_content(const file_stat& s) const {
    from_go_mode(s.mode);
    if (s.size < 0) refuse(s.path, "a file of negative size");
    if (s.link.size() > max_.path_bytes) refuse(s.path, cat("a link of more than ", max_.path_bytes, " bytes"));
    if (s.link.find('\0') != std::string::npos) refuse(s.path, "a link with a NUL byte");
    if (s.is_symlink() && s.link.empty()) refuse(s.path, "a symbolic link to nothing");
    if (!s.is_symlink() && !s.is_dir() && !s.link.empty() && !files_.contains(s.link))
        refuse(s.path, cat("a hard link to ", quoted(s.link), ", which is no file sent before"));
    if (s.dev_major < 0 || s.dev_major > UINT32_MAX || s.dev_minor < 0 || s.dev_minor > UINT32_MAX) refuse(s.path, "a device number out of range");
    if (s.xattrs.size() > max_.xattrs) refuse(s.path, cat("which has more than ", max_.xattrs, " attributes"));
    std::size_t bytes = 0;
    for (const auto& [key, value] : s.xattrs) {
        if (key.empty() || key.size() > max_name || key.find('\0') != std::string::npos) refuse(s.path, "an attribute's name that cannot be");
        bytes += key.size() + value.size();
    }
    if (bytes > max_.xattr_bytes) refuse(s.path, cat("which has more than ", max_.xattr_bytes, " bytes of attributes"));
}

void order::check(const file_stat& s) {
    if (++entries_ > max_.entries) refuse(s.path, cat("one more than the ", max_.entries, " entries that are allowed"));
    check_path(s.path);
    path_bytes_ += s.path.size() + s.link.size();
    if (path_bytes_ > max_.all_paths) refuse(s.path, cat("with which the paths are over ", max_.all_paths, " bytes"));
    check_content(s);
    const auto slash = s.path.rfind('/');
    const std::string_view dir = slash == std::string::npos ? std::string_view{} : std::string_view(s.path).substr(0, slash);
    const std::string_view name = slash == std::string::npos ? std::string_view(s.path) : std::string_view(s.path).substr(slash + 1);
    while (open_.size() > 1 && open_.back().path != dir) open_.pop_back();
    // Once left, a directory is not come back to: its name is not below its parent's last any more.
    if (open_.back().path != dir) refuse(s.path, "whose directory was not sent just before");
    if (open_.back().last >= name) refuse(s.path, cat("out of order, after ", quoted(open_.back().last)));
    open_.back().last = name;
    if (s.is_dir()) open_.push_back({s.path, {}});
    if (s.is_file() && s.link.empty()) files_.insert(s.path);
}

}  // namespace cobuild::filesync

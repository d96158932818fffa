module;
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.cache;

namespace cobuild::cache {

namespace {

constexpr std::size_t block = std::size_t{256} << 10;

void add_number(std::string& to, std::uint64_t n) {
    for (int shift = 56; shift >= 0; shift -= 8) to.push_back(static_cast<char>(n >> shift & 0xff));
}

void add_text(std::string& to, std::string_view text) {
    add_number(to, text.size());
    to += text;
}

/// A context of its own for each thread: making one costs more than hashing a header.
digest quick_digest(std::string_view text) {
    thread_local hasher h;
    return h.update(text).finish();
}

bool counts(std::string_view xattr) {
    if (xattr.starts_with("security.")) return xattr == "security.capability";
    return !xattr.starts_with("system.");
}

digest hash_bytes(int fd, std::string_view name, const async::cancel_token& cancelled) {
    hasher h;
    const auto buffer = std::make_unique_for_overwrite<std::byte[]>(block);
    for (off_t at = 0;;) {
        cancelled.throw_if_cancelled();
        const auto n = ::pread(fd, buffer.get(), block, at);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw_errno(cat("reading ", quoted(name)));
        if (n == 0) return h.finish();
        h.update(std::span<const std::byte>(buffer.get(), static_cast<std::size_t>(n)));
        at += n;
    }
}

fs::file_info look(int fd, std::string_view name) {
    if (auto info = fs::stat_at(fd, "")) return *info;
    throw error{errc::io, cat(quoted(name), " vanished while it was read")};
}

}  // namespace

digest file_digest(const file_header& header, const digest& data) {
    std::string text = "cobuild.file.1\n";
    text.reserve(text.size() + 160);
    text.push_back(static_cast<char>(header.type));
    add_number(text, header.type == file_type::symlink ? 0 : header.mode & 07777);
    add_number(text, header.uid);
    add_number(text, header.gid);
    add_number(text, header.type == file_type::regular ? header.size : 0);
    add_number(text, header.major);
    add_number(text, header.minor);
    add_text(text, header.link_target);
    text += text_of(header.xattrs.raw());
    text += text_of(data.raw());
    return quick_digest(text);
}

directory_hasher::directory_hasher(const digest& own) { hash_.update("cobuild.directory.1\n").update(own.raw()); }

void directory_hasher::child(std::string_view name, const digest& d) {
    std::string text;
    add_text(text, name);
    text += text_of(d.raw());
    hash_.update(text);
}

digest directory_hasher::finish() { return hash_.finish(); }

digest xattrs_digest(std::vector<std::pair<std::string, std::string>> xattrs) {
    std::erase_if(xattrs, [](const auto& x) { return !counts(x.first); });
    if (xattrs.empty()) return {};
    std::sort(xattrs.begin(), xattrs.end());
    std::string text = "cobuild.xattrs.1\n";
    for (const auto& [name, value] : xattrs) {
        add_text(text, name);
        add_text(text, value);
    }
    return digest::of(text);
}

digest xattrs_digest(int fd) {
    std::vector<std::pair<std::string, std::string>> all;
    for (auto& name : fs::list_xattrs(fd, "")) {
        if (!counts(name)) continue;
        if (auto value = fs::get_xattr(fd, "", name)) all.emplace_back(std::move(name), std::move(*value));
    }
    return xattrs_digest(std::move(all));
}

hashed_file hash_file(int fd, std::uint64_t fs, std::string_view name, stat_memo* memo, const async::cancel_token& cancelled) {
    for (int attempt = 0;; ++attempt) {
        const auto asked = std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now());
        const auto before = look(fd, name);
        const auto key = key_of(fs, before);
        if (memo != nullptr)
            if (const auto known = memo->find(key)) return {before, *known};
        const file_value value{hash_bytes(fd, name, cancelled), xattrs_digest(fd)};
        const auto after = key_of(fs, look(fd, name));
        const bool same = memo != nullptr ? memo->remember(key, asked, after, value) : key == after;
        if (same) return {before, value};
        if (attempt == 1) throw error{errc::io, cat(quoted(name), " changed while it was read, twice; is something still writing to it?")};
    }
}

}  // namespace cobuild::cache

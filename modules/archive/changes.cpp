module;
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.archive;

import cobuild.base;
import cobuild.fs;
import :changes;

namespace cobuild::archive {

namespace {

bool has_mark(int dirfd, std::string_view name, std::string_view what) {
    for (const std::string_view space : {"trusted.overlay.", "user.overlay."}) {
        const auto value = fs::get_xattr(dirfd, name, cat(space, what));
        if (value && (what != "opaque" || *value == "y")) return true;
    }
    return false;
}

bool same_capability(const lower_chain::hit& base, const fs::walk_entry& e) {
    return e.info.is_link() || fs::get_xattr(base.layer_fd, e.path, capability) == fs::get_xattr(e.dir_fd, e.name, capability);
}

}  // namespace

unique_fd open_to_read(int dirfd, std::string_view path) {
    unique_fd fd{::openat(dirfd, std::string(path).c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)};
    if (!fd) throw_errno("reading it");
    return fd;
}

std::size_t read_some(int fd, std::span<std::byte> into, std::uint64_t offset) {
    for (;;) {
        const ssize_t n = ::pread(fd, into.data(), into.size(), static_cast<off_t>(offset));
        if (n >= 0) return static_cast<std::size_t>(n);
        if (errno != EINTR) throw_errno("reading it");
    }
}

void changes::run() {
    level top;
    top.written = true;
    top.opaque = whole() || has_mark(upper_, "", "opaque");
    if (top.opaque) top.hidden = lower_.list("");
    if (top.opaque && !whole()) left_out();
    levels_.push_back(std::move(top));
    fs::walk(upper_, fs::walk_hooks{[this](const fs::walk_entry& e) { return visit(e); }, [this](std::string_view, int) { leave(); }});
}

fs::walk_step changes::visit(const fs::walk_entry& e) {
    try {
        pass_hidden(e.name);
        if (e.info.is_whiteout())
            whiteout(e);
        else if (e.info.is_dir())
            enter(e);
        else if (!e.info.is_socket())
            other(e);
    } catch (const error& failed) {
        throw error{failed}.with(cat("layer entry ", quoted(e.path)));
    }
    return fs::walk_step::go_on;
}

void changes::leave() {
    pass_hidden({});
    if (levels_.back().written)
        left(levels_.back());
    else
        left_out();
    levels_.pop_back();
}

/// Tells of what the current directory hides up to `name`, all when it is empty. `name` itself is replaced.
void changes::pass_hidden(std::string_view name) {
    level& l = levels_.back();
    for (; l.next_hidden < l.hidden.size(); ++l.next_hidden) {
        const std::string& h = l.hidden[l.next_hidden];
        if (!name.empty() && h >= name) break;
        write_deleted(l.path.empty() ? h : cat(l.path, "/", h));
    }
    replaced_ = !name.empty() && l.next_hidden < l.hidden.size() && l.hidden[l.next_hidden] == name;
    if (replaced_) ++l.next_hidden;
}

void changes::whiteout(const fs::walk_entry& e) {
    const bool there = levels_.back().opaque ? replaced_ : lower_.find(e.path).has_value();
    if (there || form_ == form::layer)
        write_deleted(std::string(e.path));
    else
        left_out();
}

void changes::enter(const fs::walk_entry& e) {
    if (!whole() && has_mark(e.dir_fd, e.name, "redirect"))
        throw error{errc::unsupported, "a directory renamed by overlayfs (redirect) cannot be written as a layer: mount with redirect_dir=off"};
    const auto base = lower_.find(e.path);
    const bool marked = !whole() && has_mark(e.dir_fd, e.name, "opaque");
    if (marked) left_out();
    level l{.path = std::string(e.path), .info = e.info, .caps = fs::get_xattr(e.dir_fd, e.name, capability)};
    l.opaque = base && (whole() || levels_.back().opaque || marked);
    if (l.opaque && base->info.is_dir()) l.hidden = lower_.list(e.path);
    const bool changed = !base || !same(*base, e);
    levels_.push_back(std::move(l));
    if (changed) write_levels();
}

void changes::other(const fs::walk_entry& e) {
    const auto base = lower_.find(e.path);
    if (base && same(*base, e)) return left_out();
    write_levels();
    entry(e);
}

// ---------------------------------------------------------------- what is unchanged

bool changes::same(const lower_chain::hit& base, const fs::walk_entry& e) {
    const fs::file_info& a = base.info;
    const fs::file_info& b = e.info;
    if (a.mode != b.mode || a.uid != b.uid || a.gid != b.gid || a.rdev_major != b.rdev_major || a.rdev_minor != b.rdev_minor) return false;
    if (b.is_dir() && !b.is_link()) return same_capability(base, e);
    if (a.size != b.size || a.mtime.seconds != b.mtime.seconds) return false;
    const bool cut = a.mtime.nanoseconds == 0 && b.mtime.nanoseconds == 0;
    if (!cut && a.mtime.nanoseconds != b.mtime.nanoseconds) return false;
    if (!same_capability(base, e)) return false;
    if (!cut) return true;
    if (b.is_link()) return fs::read_link_at(base.layer_fd, e.path) == fs::read_link_at(e.dir_fd, e.name);
    return !b.is_file() || b.size == 0 || same_content(base, e);
}

bool changes::same_content(const lower_chain::hit& base, const fs::walk_entry& e) {
    const unique_fd a = open_to_read(base.layer_fd, e.path);
    const unique_fd b = open_to_read(e.dir_fd, e.name);
    buffer_.resize(other_.size());
    for (std::uint64_t at = 0;;) {
        const std::size_t n = read_some(a.get(), other_, at);
        if (n == 0) return true;
        for (std::size_t have = 0; have < n;) {
            const std::size_t m = read_some(b.get(), std::span(buffer_).first(n - have), at + have);
            if (m == 0 || std::memcmp(other_.data() + have, buffer_.data(), m) != 0) return false;
            have += m;
        }
        at += n;
    }
}

void changes::write_levels() {
    for (level& l : levels_) {
        if (l.written) continue;
        l.written = true;
        directory(l);
    }
}

void changes::write_deleted(const std::string& path) {
    write_levels();
    deleted(path);
}

}  // namespace cobuild::archive

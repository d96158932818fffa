module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.archive;

import cobuild.base;
import cobuild.fs;

namespace cobuild::archive {

namespace {
constexpr std::string_view capability = "security.capability";
constexpr std::size_t buffer_size = std::size_t{1} << 20;

/// A directory of the upper layer that the walk is in.
struct open_level {
    std::string path;
    fs::file_info info;
    std::optional<std::string> capability;
    bool written = false;
    bool opaque = false;              ///< nothing of what is below the layer shows through
    std::vector<std::string> hidden;  ///< of an opaque one: lower names not yet passed
    std::size_t next_hidden = 0;
};

class differ {
public:
    differ(int upper, lower_chain& lower, tar_writer& out, const diff_options& o)
        : upper_(upper), lower_(lower), out_(out), options_(o), buffer_(buffer_size), other_(std::size_t{64} << 10) {}

    diff_result run() {
        open_level top;
        top.written = true;
        top.opaque = has_mark(upper_, "", "opaque");
        if (top.opaque) top.hidden = lower_.list("");
        levels_.push_back(std::move(top));
        fs::walk(upper_, fs::walk_hooks{[this](const fs::walk_entry& e) { return visit(e); }, [this](std::string_view, int) { leave(); }});
        out_.finish();
        return result_;
    }

private:
    static bool has_mark(int dirfd, std::string_view name, std::string_view what) {
        for (const std::string_view space : {"trusted.overlay.", "user.overlay."}) {
            const auto value = fs::get_xattr(dirfd, name, cat(space, what));
            if (value && (what != "opaque" || *value == "y")) return true;
        }
        return false;
    }

    fs::walk_step visit(const fs::walk_entry& e) {
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

    void leave() {
        pass_hidden({});
        levels_.pop_back();
    }

    /// Writes whiteouts for what the current directory hides up to `name`, all when it is empty. `name` itself is replaced.
    void pass_hidden(std::string_view name) {
        open_level& l = levels_.back();
        for (; l.next_hidden < l.hidden.size(); ++l.next_hidden) {
            const std::string& h = l.hidden[l.next_hidden];
            if (!name.empty() && h >= name) break;
            write_whiteout(l.path.empty() ? h : cat(l.path, "/", h));
        }
        replaced_ = !name.empty() && l.next_hidden < l.hidden.size() && l.hidden[l.next_hidden] == name;
        if (replaced_) ++l.next_hidden;
    }

    void whiteout(const fs::walk_entry& e) {
        const bool there = levels_.back().opaque ? replaced_ : lower_.find(e.path).has_value();
        if (there) write_whiteout(e.path);
    }

    void enter(const fs::walk_entry& e) {
        if (has_mark(e.dir_fd, e.name, "redirect"))
            throw error{errc::unsupported, "a directory renamed by overlayfs (redirect) cannot be written as a layer: mount with redirect_dir=off"};
        const auto base = lower_.find(e.path);
        open_level l{.path = std::string(e.path), .info = e.info, .capability = fs::get_xattr(e.dir_fd, e.name, capability)};
        l.opaque = base && (levels_.back().opaque || has_mark(e.dir_fd, e.name, "opaque"));
        if (l.opaque && base->info.is_dir()) l.hidden = lower_.list(e.path);
        const bool changed = !base || !same(*base, e);
        levels_.push_back(std::move(l));
        if (changed) write_levels();
    }

    void other(const fs::walk_entry& e) {
        const auto base = lower_.find(e.path);
        if (base && same(*base, e)) return;
        write_levels();
        write_entry(e.path, e.dir_fd, e.name, e.info, e.info.is_link() ? std::nullopt : fs::get_xattr(e.dir_fd, e.name, capability));
    }

    // ---------------------------------------------------------------- what is unchanged

    bool same(const lower_chain::hit& base, const fs::walk_entry& e) {
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

    static bool same_capability(const lower_chain::hit& base, const fs::walk_entry& e) {
        return e.info.is_link() || fs::get_xattr(base.layer_fd, e.path, capability) == fs::get_xattr(e.dir_fd, e.name, capability);
    }

    static unique_fd open_file(int dirfd, std::string_view path) {
        unique_fd fd{::openat(dirfd, std::string(path).c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)};
        if (!fd) throw_errno("reading it");
        return fd;
    }

    static std::size_t read_some(int fd, std::span<std::byte> into, std::uint64_t offset) {
        for (;;) {
            const ssize_t n = ::pread(fd, into.data(), into.size(), static_cast<off_t>(offset));
            if (n >= 0) return static_cast<std::size_t>(n);
            if (errno != EINTR) throw_errno("reading it");
        }
    }

    bool same_content(const lower_chain::hit& base, const fs::walk_entry& e) {
        const unique_fd a = open_file(base.layer_fd, e.path);
        const unique_fd b = open_file(e.dir_fd, e.name);
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

    // ---------------------------------------------------------------- writing

    void write_levels() {
        for (open_level& l : levels_) {
            if (l.written) continue;
            l.written = true;
            // The walk may have closed the descriptor of a directory far up; nothing of it is needed.
            write_entry(l.path, -1, {}, l.info, l.capability);
        }
    }

    void write_whiteout(std::string_view path) {
        write_levels();
        out_.whiteout(path);
        ++result_.entries;
    }

    static entry_type type_of(const fs::file_info& info) {
        switch (info.mode & S_IFMT) {
            case S_IFDIR: return entry_type::directory;
            case S_IFLNK: return entry_type::symlink;
            case S_IFCHR: return entry_type::char_device;
            case S_IFBLK: return entry_type::block_device;
            case S_IFIFO: return entry_type::fifo;
            default: return entry_type::file;
        }
    }

    void write_entry(std::string_view path, int dirfd, std::string_view name, const fs::file_info& info, const std::optional<std::string>& caps) {
        tar_entry t;
        t.type = type_of(info);
        t.path = path;
        if (t.type == entry_type::directory) t.path += '/';
        if (t.type == entry_type::symlink) t.link = fs::read_link_at(dirfd, name);
        t.mode = info.permissions();
        t.uid = info.uid;
        t.gid = info.gid;
        t.mtime.seconds = options_.clamp_mtime ? std::min(info.mtime.seconds, *options_.clamp_mtime) : info.mtime.seconds;
        if (t.type == entry_type::char_device || t.type == entry_type::block_device) {
            t.dev_major = info.rdev_major;
            t.dev_minor = info.rdev_minor;
        }
        if (t.type == entry_type::file) t.size = info.size;
        if (t.type != entry_type::directory && info.nlink > 1) {
            const auto [first, fresh] = first_names_.try_emplace({info.device, info.inode}, path);
            if (!fresh) {
                t.type = entry_type::hard_link;
                t.link = first->second;
                t.size = 0;
            }
        }
        if (caps && !caps->empty()) t.xattrs.emplace_back(capability, *caps);
        out_.add(t);
        ++result_.entries;
        if (t.size != 0) write_content(dirfd, name, t.size);
    }

    void write_content(int dirfd, std::string_view name, std::uint64_t size) {
        const unique_fd fd = open_file(dirfd, name);
        result_.bytes += size;
        for (std::uint64_t at = 0; at < size;) {
            std::uint64_t end = size;
            // A file that fits into the buffer is read at once, holes or not.
            if (size > buffer_.size()) {
                const off_t data = ::lseek(fd.get(), static_cast<off_t>(at), SEEK_DATA);
                const std::uint64_t start = data >= 0 ? std::min<std::uint64_t>(static_cast<std::uint64_t>(data), size) : errno == ENXIO ? size : at;
                out_.write_zeros(start - at);
                at = start;
                const off_t hole = data >= 0 ? ::lseek(fd.get(), data, SEEK_HOLE) : -1;
                if (hole >= 0) end = std::min<std::uint64_t>(static_cast<std::uint64_t>(hole), size);
            }
            while (at < end) {
                const auto want = static_cast<std::size_t>(std::min<std::uint64_t>(buffer_.size(), end - at));
                const std::size_t n = read_some(fd.get(), std::span(buffer_).first(want), at);
                if (n == 0) throw error{errc::io, "the file became shorter while it was read"};
                out_.write(std::span(buffer_).first(n));
                at += n;
            }
        }
    }

    int upper_;
    lower_chain& lower_;
    tar_writer& out_;
    const diff_options& options_;
    diff_result result_;
    std::vector<open_level> levels_;
    std::map<std::pair<std::uint64_t, std::uint64_t>, std::string> first_names_;
    bool replaced_ = false;
    std::vector<std::byte> buffer_;
    std::vector<std::byte> other_;
};
}  // namespace

diff_result diff_layer(int upper, lower_chain& lower, tar_writer& out, const diff_options& options) {
    return differ{upper, lower, out, options}.run();
}

}  // namespace cobuild::archive

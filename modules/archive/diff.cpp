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
import :changes;

namespace cobuild::archive {

namespace {
constexpr std::size_t buffer_size = std::size_t{1} << 20;

/// Changes as a layer archive.
class differ final : changes {
public:
    differ(int upper, lower_chain& lower, tar_writer& out, const diff_options& o)
        : changes(upper, lower, form::archive), out_(out), options_(o), buffer_(buffer_size) {}

    diff_result write() {
        run();
        out_.finish();
        return result_;
    }

private:
    /// The walk may have closed the descriptor of a directory far up; nothing of it is needed.
    void directory(level& l) override { write_entry(l.path, -1, {}, l.info, l.caps); }

    void entry(const fs::walk_entry& e) override {
        write_entry(e.path, e.dir_fd, e.name, e.info, e.info.is_link() ? std::nullopt : fs::get_xattr(e.dir_fd, e.name, capability));
    }

    void deleted(const std::string& path) override {
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
        const unique_fd fd = open_to_read(dirfd, name);
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

    tar_writer& out_;
    const diff_options& options_;
    diff_result result_;
    std::map<std::pair<std::uint64_t, std::uint64_t>, std::string> first_names_;
    std::vector<std::byte> buffer_;
};
}  // namespace

diff_result diff_layer(int upper, lower_chain& lower, tar_writer& out, const diff_options& options) {
    return differ{upper, lower, out, options}.write();
}

}  // namespace cobuild::archive

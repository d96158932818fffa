module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

module cobuild.filesync;

import cobuild.base;
import cobuild.fs;
import :parts;

namespace cobuild::filesync {

namespace {
// Zeros of this size, and at this alignment, become holes.
constexpr std::size_t hole_bytes = 32768;

bool all_zero(std::string_view bytes) { return bytes.front() == '\0' && std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0; }

std::pair<std::string_view, std::string_view> parted(std::string_view path) {
    const auto slash = path.rfind('/');
    if (slash == std::string_view::npos) return {{}, path};
    return {path.substr(0, slash), path.substr(slash + 1)};
}

void write_at(int fd, std::string_view bytes, std::uint64_t at, std::string_view path) {
    while (!bytes.empty()) {
        const ssize_t n = ::pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(at));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw_errno(cat("writing ", quoted(path)));
        bytes.remove_prefix(static_cast<std::size_t>(n));
        at += static_cast<std::uint64_t>(n);
    }
}

error changed_size(const file_stat& s, std::uint64_t got) {
    return error{errc::io, cat(quoted(s.path), " changed while it was sent: ", static_cast<std::uint64_t>(s.size), " bytes were announced and ", got,
                               got > static_cast<std::uint64_t>(s.size) ? " or more" : "", " came")};
}
}  // namespace

disk::disk(std::shared_ptr<const fs::root> to, const receive_options& options)
    : to_(std::move(to)),
      options_(options),
      xattr_(xattr_filter(options.xattr)),
      order_(options.max),
      mark_(cat(".cobuild-", random_id().substr(0, 16), "-")) {}

disk::~disk() {
    for (const auto& [id, f] : files_) {
        if (!f.fd) continue;
        try {
            ::unlinkat(dir_of(f.stat.path), f.temporary.c_str(), 0);
        } catch (const error&) {
            // Its directory is gone, and it with it.
        }
    }
}

int disk::dir_of(std::string_view path) {
    const auto dir = parted(path).first;
    if (!dir_ || dir != dir_path_) {
        dir_ = to_->open(dir, O_PATH | O_DIRECTORY, fs::links::refuse);
        dir_path_ = dir;
    }
    return dir_.get();
}

std::string disk::temporary_name() { return cat(mark_, ++temporaries_); }

void disk::note(change_kind kind, std::string path) { result_.changes.push_back({kind, std::move(path)}); }

bool disk::entry(file_stat s, std::uint32_t id) {
    order_.check(s);
    ++result_.transferred.entries;
    const auto [parent, last] = parted(s.path);
    while (open_.size() > 1 && open_.back().path != parent) leave();
    const std::string name{last};
    if (options_.how == into::mirror && !open_.back().left_out) open_.back().names.push_back(name);
    if (open_.back().left_out || (options_.map && !options_.map(s))) {
        if (s.is_dir())
            open_.push_back({.path = s.path, .left_out = true});
        else
            left_out_.insert(s.path);
        return false;
    }
    if ((s.mode & go_mode::type) == go_mode::socket) return false;
    std::erase_if(s.xattrs, [this](const auto& x) { return !xattr_(x.first); });
    const int dir = dir_of(s.path);
    const auto old = fs::stat_at(dir, name);
    if (s.is_dir()) {
        make_directory(std::move(s), old, dir, name);
        return false;
    }
    if (s.is_file() && !s.link.empty()) {
        // Its file may still be on the way.
        links_.push_back({s.path, s.link});
        return false;
    }
    if (options_.how == into::mirror && options_.compare == differ::metadata && unchanged(s, old, dir, name)) {
        ++result_.unchanged;
        return false;
    }
    if (!s.is_file()) {
        make_special(s, old, dir, name);
        return false;
    }
    announced_ += static_cast<std::uint64_t>(s.size);
    if (announced_ > options_.max.bytes) throw error{errc::corrupt, cat("the files sent are more than ", options_.max.bytes, " bytes")};
    const bool ask = s.size > 0 || !options_.exact_sizes;
    files_.emplace(id, incoming{.stat = std::move(s), .fd = {}, .temporary = {}, .got = 0, .replaces = old.has_value()});
    if (!ask) complete(id);
    return ask;
}

bool disk::unchanged(const file_stat& s, const std::optional<fs::file_info>& old, int dir, const std::string& name) {
    if (!old || (old->mode & S_IFMT) != (from_go_mode(s.mode) & S_IFMT) || old->uid != s.uid || old->gid != s.gid || from_time(old->mtime) != s.mtime)
        return false;
    if (s.is_symlink()) return fs::read_link_at(dir, name) == s.link;
    if (old->mode != from_go_mode(s.mode)) return false;
    if ((s.mode & go_mode::device) != 0) return old->rdev_major == s.dev_major && old->rdev_minor == s.dev_minor;
    if (!s.is_file()) return true;
    if (old->size != static_cast<std::uint64_t>(s.size)) return false;
    // Two files that are sent as two must not stay one here.
    return old->nlink < 2 || claimed_.try_emplace({old->device, old->inode}, s.path).second;
}

void disk::open_file(incoming& f) {
    if (f.fd) return;
    f.temporary = temporary_name();
    f.fd = unique_fd{::openat(dir_of(f.stat.path), f.temporary.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, 0600)};
    if (!f.fd) throw_errno(cat("creating ", quoted(f.stat.path)));
}

void disk::data(std::uint32_t id, std::string_view bytes) {
    incoming& f = files_.at(id);
    open_file(f);
    if (options_.exact_sizes && bytes.size() > static_cast<std::uint64_t>(f.stat.size) - f.got) throw changed_size(f.stat, f.got + bytes.size());
    result_.transferred.bytes += bytes.size();
    if (result_.transferred.bytes > options_.max.bytes)
        throw error{errc::corrupt, cat("the files sent are more than ", options_.max.bytes, " bytes")};
    while (!bytes.empty()) {
        const auto part = bytes.substr(0, hole_bytes - f.got % hole_bytes);
        if (part.size() < hole_bytes || !all_zero(part)) write_at(f.fd.get(), part, f.got, f.stat.path);
        f.got += part.size();
        bytes.remove_prefix(part.size());
    }
}

void disk::complete(std::uint32_t id) {
    incoming& f = files_.at(id);
    open_file(f);
    if (options_.exact_sizes && f.got != static_cast<std::uint64_t>(f.stat.size)) throw changed_size(f.stat, f.got);
    const auto& s = f.stat;
    const auto fail_unless = [&](int result, std::string_view what) {
        if (result != 0) throw_errno(cat(what, " ", quoted(s.path)));
    };
    // The last bytes may be a hole.
    fail_unless(::ftruncate(f.fd.get(), static_cast<off_t>(f.got)), "writing");
    fail_unless(::fchown(f.fd.get(), s.uid, s.gid), "setting the owner of");
    fail_unless(::fchmod(f.fd.get(), from_go_mode(s.mode) & 07777), "setting the mode of");
    set_xattrs(f.fd.get(), "", s);
    const auto t = to_time(s.mtime);
    const timespec when{t.seconds, static_cast<long>(t.nanoseconds)};
    const std::array<timespec, 2> times{when, when};
    fail_unless(::futimens(f.fd.get(), times.data()), "setting the time of");
    put(dir_of(s.path), f.temporary, std::string(parted(s.path).second), s.path);
    ++result_.transferred.files;
    note(f.replaces ? change_kind::modified : change_kind::added, s.path);
    files_.erase(id);
}

void disk::put(int dir, const std::string& temporary, const std::string& name, std::string_view path) {
    if (::renameat(dir, temporary.c_str(), dir, name.c_str()) == 0) return;
    const int why = errno;
    // A directory is in its place.
    if ((why == EISDIR || why == ENOTEMPTY || why == EEXIST) && fs::remove_tree(dir, name) &&
        ::renameat(dir, temporary.c_str(), dir, name.c_str()) == 0)
        return;
    throw os_error(why, cat("putting ", quoted(path), " in its place"));
}

void disk::leave() {
    const level left = std::move(open_.back());
    open_.pop_back();
    if (options_.how != into::mirror || left.fresh || left.left_out) return;
    const auto dir = to_->open(left.path, O_RDONLY | O_DIRECTORY, fs::links::refuse);
    for (const auto& name : fs::list_dir(dir.get())) {
        if (name.starts_with(mark_) || std::ranges::binary_search(left.names, name)) continue;
        if (fs::remove_tree(dir.get(), name)) note(change_kind::removed, left.path.empty() ? name : cat(left.path, "/", name));
    }
}

void disk::finish() {
    while (!open_.empty()) leave();
    for (const auto& l : links_) make_hard_link(l);
    // A directory's time changes with what is made in it.
    for (auto d = directories_.rbegin(); d != directories_.rend(); ++d) finish_directory(d->stat);
}

}  // namespace cobuild::filesync

module;
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.cache;

namespace cobuild::cache {

namespace {

constexpr std::size_t none = static_cast<std::size_t>(-1);
constexpr std::size_t longest_path = 4000;  // what one openat2 can take
constexpr std::size_t files_per_thread = 32;

file_type type_of(std::uint32_t mode) {
    if (S_ISREG(mode)) return file_type::regular;
    if (S_ISDIR(mode)) return file_type::directory;
    if (S_ISLNK(mode)) return file_type::symlink;
    if (S_ISCHR(mode)) return file_type::character;
    if (S_ISBLK(mode)) return file_type::block;
    return S_ISFIFO(mode) ? file_type::fifo : file_type::socket;
}

file_header header_of(const fs::file_info& info, const hash_options& o) {
    const auto type = type_of(info.mode);
    const bool device = type == file_type::character || type == file_type::block;
    return {.type = type,
            .mode = info.permissions(),
            .uid = o.owned_by ? o.owned_by->uid : info.uid,
            .gid = o.owned_by ? o.owned_by->gid : info.gid,
            .size = info.size,
            .major = device ? info.rdev_major : 0,
            .minor = device ? info.rdev_minor : 0};
}

digest regular(int fd, std::uint64_t fs, std::string_view name, const hash_options& o) {
    const auto read = hash_file(fd, fs, name, o.memo, o.cancelled);
    auto header = header_of(read.info, o);
    header.xattrs = read.value.xattrs;
    return file_digest(header, read.value.data);
}

struct filter {
    fs::ignore_patterns include;
    fs::ignore_patterns exclude;
    bool everything = true;

    explicit filter(const selector& s) : include(s.include), exclude(s.exclude), everything(s.include.empty() && s.exclude.empty()) {}
    [[nodiscard]] bool takes(std::string_view path) const {
        return everything || ((include.empty() || include.matches(path)) && !(!exclude.empty() && exclude.matches(path)));
    }
    [[nodiscard]] bool enters(std::string_view path) const {
        if (everything) return true;
        if (!exclude.empty() && exclude.matches(path) && !exclude.may_reinclude_below(path)) return false;
        return include.empty() || include.matches(path) || include.may_match_below(path);
    }
};

/// One directory and what is below it, in walking order: a directory stands before its children.
class tree {
public:
    tree(unique_fd start, std::string shown, const filter& f, const hash_options& o)
        : dir_(std::move(start)), shown_(std::move(shown)), filter_(f), options_(o), fs_(file_system_of(dir_.fd())) {}

    digest hash() {
        collect();
        read_files();
        return filter_.everything ? whole() : list();
    }

private:
    struct entry {
        std::string path;  ///< the whole one when filtered, else the last component
        digest own;
        std::size_t first_child = none;
        std::size_t last_child = none;
        std::size_t sibling = none;
        bool taken = true;
        bool directory = false;
        file_header header;  ///< of directories, until they are left
    };
    struct unread {
        std::size_t entry;
        std::string path;
    };
    struct level {
        std::size_t path_size;
        std::size_t entry;
    };

    void collect() {
        const auto info = fs::stat_at(dir_.fd(), "");
        entries_.push_back({.directory = true, .header = header_of(*info, options_)});
        levels_.push_back({0, 0});
        fs::walk(dir_.fd(), {.enter = [this](const fs::walk_entry& e) { return enter(e); },
                             .leave = [this](std::string_view path, int fd) { leave(path, fd); }});
    }

    void rise(std::size_t path_size) {
        while (levels_.back().path_size > path_size) levels_.pop_back();
    }

    fs::walk_step enter(const fs::walk_entry& e) {
        if (entries_.size() % 256 == 0) options_.cancelled.throw_if_cancelled();
        rise(e.path.size() == e.name.size() ? 0 : e.path.size() - e.name.size() - 1);
        if (e.info.is_dir() && !filter_.enters(e.path)) return fs::walk_step::skip_dir;
        const bool taken = filter_.takes(e.path);
        if (!taken && !e.info.is_dir()) return fs::walk_step::go_on;
        const auto at = entries_.size();
        entries_.push_back({.path = std::string(filter_.everything ? e.name : e.path), .taken = taken, .directory = e.info.is_dir()});
        auto& parent = entries_[levels_.back().entry];
        if (parent.last_child == none)
            parent.first_child = at;
        else
            entries_[parent.last_child].sibling = at;
        parent.last_child = at;
        if (e.info.is_dir()) {
            entries_[at].header = header_of(e.info, options_);
            levels_.push_back({e.path.size(), at});
        } else if (e.info.is_file()) {
            file(e, at);
        } else {
            auto header = header_of(e.info, options_);
            if (e.info.is_link()) header.link_target = fs::read_link_at(e.dir_fd, e.name);
            entries_[at].own = file_digest(header, {});
        }
        return fs::walk_step::go_on;
    }

    void file(const fs::walk_entry& e, std::size_t at) {
        if (options_.memo != nullptr)
            if (const auto known = options_.memo->find(key_of(fs_, e.info))) {
                auto header = header_of(e.info, options_);
                header.xattrs = known->xattrs;
                entries_[at].own = file_digest(header, known->data);
                return;
            }
        if (e.path.size() < longest_path) {
            unread_.push_back({at, std::string(e.path)});
            return;
        }
        const unique_fd fd{::openat(e.dir_fd, std::string(e.name).c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)};
        if (!fd) throw_errno(cat("opening ", quoted(e.path)));
        entries_[at].own = regular(fd.get(), fs_, e.path, options_);
    }

    void leave(std::string_view path, int fd) {
        rise(path.size());
        auto& e = entries_[levels_.back().entry];
        e.header.xattrs = xattrs_digest(fd);
        e.own = file_digest(e.header, {});
    }

    void read_one(const unread& u) {
        const auto shown = cat(shown_, '/', u.path);
        const auto fd = dir_.open(u.path, O_RDONLY | O_NONBLOCK, fs::links::refuse);
        entries_[u.entry].own = regular(fd.get(), fs_, shown, options_);
    }

    void read_files() {
        std::atomic<std::size_t> next{0};
        std::mutex guard;
        std::exception_ptr failed;
        const auto work = [&] {
            try {
                for (auto i = next++; i < unread_.size(); i = next++) read_one(unread_[i]);
            } catch (...) {
                const std::lock_guard lock(guard);
                if (!failed) failed = std::current_exception();
                next = unread_.size();
            }
        };
        std::vector<std::thread> helpers;
        const auto useful = std::min<std::size_t>(options_.threads, 1 + unread_.size() / files_per_thread);
        for (std::size_t i = 1; i < useful; ++i) helpers.emplace_back(work);
        work();
        for (auto& h : helpers) h.join();
        if (failed) std::rethrow_exception(failed);
    }

    digest whole() {
        for (std::size_t i = entries_.size(); i-- > 0;) {
            auto& e = entries_[i];
            if (!e.directory) continue;
            directory_hasher h(e.own);
            for (auto c = e.first_child; c != none; c = entries_[c].sibling) h.child(entries_[c].path, entries_[c].own);
            e.own = h.finish();
        }
        return entries_.front().own;
    }

    /// With patterns the tree is a list of what they select; a directory counts by itself alone.
    digest list() {
        directory_hasher h(digest::of("cobuild.selection.1\n"));
        for (std::size_t i = 1; i < entries_.size(); ++i)
            if (entries_[i].taken) h.child(entries_[i].path, entries_[i].own);
        return h.finish();
    }

    fs::root dir_;
    std::string shown_;
    const filter& filter_;
    const hash_options& options_;
    std::uint64_t fs_;
    std::vector<entry> entries_;
    std::vector<level> levels_;
    std::vector<unread> unread_;
};

digest hash_path(const fs::root& root, const std::string& path, bool follow, const filter& f, const hash_options& o) {
    const auto how = follow ? fs::links::follow : fs::links::keep;
    const auto place = root.try_open(path, O_PATH, how);
    if (!place) throw error{errc::not_found, cat(quoted(path), ": not found")};
    const auto info = *fs::stat_at(place->get(), "");
    if (info.is_dir()) {
        auto dir = root.open(path, O_RDONLY | O_DIRECTORY, how);
        return tree(std::move(dir), path == "/" ? "" : path, f, o).hash();
    }
    if (info.is_file()) {
        const auto fd = root.open(path, O_RDONLY | O_NONBLOCK, how);
        return regular(fd.get(), file_system_of(fd.get()), path, o);
    }
    auto header = header_of(info, o);
    if (info.is_link()) header.link_target = fs::read_link_at(place->get(), "");
    return file_digest(header, {});
}

/// The paths that a wildcard names, with the part before its first wildcard taken literally and links in it followed.
std::vector<std::string> expand(const fs::root& root, std::string_view pattern, std::string& prefix) {
    std::vector<std::string> parts;
    const auto whole = fs::clean_path(cat('/', pattern));
    for (const auto p : split(whole, '/'))
        if (!p.empty()) parts.emplace_back(p);
    std::size_t first = 0;
    while (first < parts.size() && !fs::has_wildcard(parts[first])) prefix += cat('/', parts[first++]);
    if (!prefix.empty()) prefix = cat('/', root.resolve(prefix, first == parts.size() ? fs::links::keep : fs::links::follow));
    std::vector<std::string> found{prefix};
    for (std::size_t i = first; i < parts.size(); ++i) {
        std::vector<std::string> next;
        for (const auto& dir : found) {
            const auto info = root.stat(dir.empty() ? "/" : dir);
            if (!info || !info->is_dir()) continue;
            for (const auto& name : root.list(dir.empty() ? "/" : dir))
                if (fs::wildcard_match(parts[i], name)) next.push_back(cat(dir, '/', name));
        }
        found = std::move(next);
    }
    std::erase_if(found, [&](const auto& path) { return !root.stat(path.empty() ? "/" : path); });
    std::sort(found.begin(), found.end(), fs::path_less);
    return found;
}

digest hash_one(const fs::root& root, const selector& what, const hash_options& o) {
    const filter f(what);
    if (!what.wildcard) return hash_path(root, what.path.empty() ? "/" : what.path, what.follow_links, f, o);
    std::string prefix;
    directory_hasher h(digest::of("cobuild.wildcard.1\n"));
    for (const auto& path : expand(root, what.path, prefix))
        h.child(std::string_view(path).substr(prefix.size()), hash_path(root, path.empty() ? "/" : path, what.follow_links, f, o));
    return h.finish();
}

}  // namespace

digest hash_tree(int root, const selector& what, const hash_options& options) {
    unique_fd own{::fcntl(root, F_DUPFD_CLOEXEC, 0)};
    if (!own) throw_errno("duplicating a directory's descriptor");
    return hash_one(fs::root(std::move(own)), what, options);
}

digest hash_tree(int root, std::span<const selector> what, const hash_options& options) {
    if (what.size() == 1) return hash_tree(root, what.front(), options);
    directory_hasher h(digest::of("cobuild.selectors.1\n"));
    for (const auto& s : what) h.child("", hash_tree(root, s, options));
    return h.finish();
}

}  // namespace cobuild::cache

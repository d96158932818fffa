module;
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "gateway.pb.h"
#include "session.pb.h"

module cobuild.client;

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import cobuild.rpc;
import :internal;

namespace cobuild::client {

namespace {

namespace pb = moby::session;
using wire_stat = moby::buildkit::v1::frontend::Stat;

constexpr std::size_t max_entries = 10'000'000;

/// One tree as it arrives. Everything but bookkeeping is done on the pool, one step at a time, in the order of arrival.
class receiving {
public:
    receiving(const std::filesystem::path& dir, bool mirror) : tree_(dir.string()), mirror_(mirror), owner_{::getuid(), ::getgid()} {}
    ~receiving() {
        for (const auto& [id, f] : open_) ::unlinkat(f.dir.get(), f.temporary.c_str(), 0);
    }
    receiving(const receiving&) = delete;
    receiving& operator=(const receiving&) = delete;

    /// True for a regular file whose content is to be asked for.
    bool entry(const std::string& bytes) {
        auto st = decode<wire_stat>(bytes);
        check(st);
        const auto id = next_++;
        kinds_.emplace(st.path(), (from_go_mode(st.mode()) & S_IFMT) == S_IFDIR);
        const auto mode = from_go_mode(st.mode());
        switch (mode & S_IFMT) {
            case S_IFDIR: make_directory(st, mode); return false;
            case S_IFLNK:
                clear(st.path());
                tree_.make_link(st.path(), st.linkname(), owner_);
                tree_.set_mtime(st.path(), mtime_of(st));
                return false;
            case S_IFREG:
                if (!st.linkname().empty()) {
                    if (!kinds_.contains(st.linkname()))
                        throw error{errc::corrupt, cat("the daemon sent ", quoted(st.path()), " as a hard link to what it did not send")};
                    hard_links_.emplace_back(st.path(), st.linkname());
                    return false;
                }
                begin_file(id, st, mode);
                return true;
            case S_IFCHR:
            case S_IFBLK:
            case S_IFIFO: make_node(st, mode); return false;
            default: return false;  // sockets
        }
    }

    [[nodiscard]] std::uint32_t last_id() const { return next_ - 1; }
    [[nodiscard]] bool idle() const { return open_.empty(); }

    void data(std::uint32_t id, const std::string& bytes) {
        const auto found = open_.find(id);
        if (found == open_.end()) throw error{errc::corrupt, "the daemon sent data of a file that was not asked for"};
        auto& f = found->second;
        if (!bytes.empty()) {
            fs::write_all(f.fd.get(), bytes_of(bytes));
            return;
        }
        place(f);
        open_.erase(found);
    }

    void finish() {
        for (const auto& [path, target] : hard_links_) {
            clear(path);
            const auto [from, from_name] = tree_.parent(target);
            const auto [to, to_name] = tree_.parent(path);
            if (::linkat(from.get(), from_name.c_str(), to.get(), to_name.c_str(), 0) != 0) throw_errno(cat("linking ", path, " to ", target));
        }
        if (mirror_) remove_others();
        for (auto d = directories_.rbegin(); d != directories_.rend(); ++d) tree_.set_mtime(d->first, d->second);
    }

private:
    struct file {
        unique_fd dir, fd;
        std::string temporary, name, path;
        std::uint32_t mode = 0;
        fs::file_time mtime;
        std::map<std::string, std::string> xattrs;
    };

    static fs::file_time mtime_of(const wire_stat& st) {
        auto seconds = st.mod_time() / 1'000'000'000;
        auto rest = st.mod_time() % 1'000'000'000;
        if (rest < 0) {
            rest += 1'000'000'000;
            --seconds;
        }
        return {seconds, static_cast<std::uint32_t>(rest)};
    }

    /// The protocol's rules: clean relative paths, in order, below directories that came before.
    void check(const wire_stat& st) {
        const auto& p = st.path();
        if (next_ >= max_entries) throw error{errc::invalid, cat("the daemon sent more than ", max_entries, " files")};
        const bool clean = !p.empty() && p.front() != '/' && fs::clean_path(cat("/", p)) == cat("/", p) && p.find('\0') == std::string::npos;
        if (!clean) throw error{errc::corrupt, cat("the daemon sent the path ", quoted(p), ", which is not a clean relative one")};
        if (!last_.empty() && !fs::path_less(last_, p)) throw error{errc::corrupt, cat("the daemon sent ", quoted(p), " out of order")};
        last_ = p;
        if (const auto slash = p.rfind('/'); slash != std::string::npos) {
            const auto parent = kinds_.find(p.substr(0, slash));
            if (parent == kinds_.end() || !parent->second)
                throw error{errc::corrupt, cat("the daemon sent ", quoted(p), " without the directory it is in")};
        }
    }

    void clear(const std::string& path) { tree_.remove_all(path); }

    void make_directory(const wire_stat& st, std::uint32_t mode) {
        const auto there = tree_.stat(st.path());
        if (there && !there->is_dir()) clear(st.path());
        if (!there || !there->is_dir())
            tree_.make_dirs(st.path(), mode & 07777, owner_);
        else
            tree_.chmod(st.path(), mode & 07777);
        directories_.emplace_back(st.path(), mtime_of(st));
    }

    void begin_file(std::uint32_t id, const wire_stat& st, std::uint32_t mode) {
        auto [dir, name] = tree_.parent(st.path());
        file f;
        f.temporary = cat(".cobuild-", random_id());
        f.fd.reset(::openat(dir.get(), f.temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
        if (!f.fd) throw_errno(cat("writing ", st.path()));
        f.dir = std::move(dir);
        f.name = std::move(name);
        f.path = st.path();
        f.mode = mode & 07777;
        f.mtime = mtime_of(st);
        f.xattrs.insert(st.xattrs().begin(), st.xattrs().end());
        open_.emplace(id, std::move(f));
    }

    void place(file& f) {
        for (const auto& [key, value] : f.xattrs) fs::set_xattr(f.fd.get(), "", key, value);
        if (::fchmod(f.fd.get(), f.mode) != 0) throw_errno(cat("setting the mode of ", f.path));
        const timespec times[2] = {{f.mtime.seconds, static_cast<long>(f.mtime.nanoseconds)},
                                   {f.mtime.seconds, static_cast<long>(f.mtime.nanoseconds)}};
        if (::futimens(f.fd.get(), times) != 0) throw_errno(cat("setting the time of ", f.path));
        if (::renameat(f.dir.get(), f.temporary.c_str(), f.dir.get(), f.name.c_str()) == 0) return;
        if (errno != EISDIR && errno != ENOTEMPTY && errno != EEXIST) throw_errno(cat("writing ", f.path));
        clear(f.path);
        if (::renameat(f.dir.get(), f.temporary.c_str(), f.dir.get(), f.name.c_str()) != 0) throw_errno(cat("writing ", f.path));
    }

    void make_node(const wire_stat& st, std::uint32_t mode) {
        clear(st.path());
        const auto [dir, name] = tree_.parent(st.path());
        const auto device = ::makedev(static_cast<unsigned>(st.devmajor()), static_cast<unsigned>(st.devminor()));
        if (::mknodat(dir.get(), name.c_str(), mode, device) != 0) throw_errno(cat("making ", st.path()));
        tree_.chmod(st.path(), mode & 07777);
        tree_.set_mtime(st.path(), mtime_of(st));
    }

    void remove_others() {
        std::vector<std::string> extra;
        fs::walk(tree_.fd(), [&](const fs::walk_entry& e) {
            if (kinds_.contains(std::string(e.path))) return fs::walk_step::go_on;
            extra.emplace_back(e.path);
            return e.info.is_dir() ? fs::walk_step::skip_dir : fs::walk_step::go_on;
        });
        for (const auto& p : extra) clear(p);
    }

    fs::root tree_;
    bool mirror_;
    fs::owner owner_;
    std::uint32_t next_ = 0;
    std::string last_;
    std::map<std::string, bool> kinds_;  ///< by path: whether it is a directory
    std::map<std::uint32_t, file> open_;
    std::vector<std::pair<std::string, std::string>> hard_links_;
    std::vector<std::pair<std::string, fs::file_time>> directories_;
};

async::task<void> put(call_ptr c, pb::Packet::Type type, std::uint32_t id) {
    pb::Packet p;
    p.set_type(type);
    p.set_id(id);
    co_await c->write(p.SerializeAsString());
}

constexpr std::size_t max_open = 64;

/// Files are asked for a few at a time: each has an open descriptor, and a tree may have a million.
struct queue {
    std::vector<std::string> stats;  ///< received, in order, not yet looked at
    std::size_t at = 0;
};

}  // namespace

async::task<void> receive_tree(async::blocking_pool& pool, std::filesystem::path dir, bool mirror, call_ptr c) {
    const auto r = co_await pool.run([dir, mirror] {
        // Private where it is made, as BuildKit's client makes it; what is in it has the modes of the result.
        if (dir.has_parent_path()) std::filesystem::create_directories(dir.parent_path());
        if (::mkdir(dir.c_str(), 0700) != 0 && errno != EEXIST) throw_errno(cat("making the directory ", dir.string()));
        return std::make_shared<receiving>(dir, mirror);
    });
    queue waiting;
    std::size_t under_way = 0;
    bool all_known = false, told = false;
    for (;;) {
        while (waiting.at < waiting.stats.size() && under_way < max_open) {
            const auto& st = waiting.stats[waiting.at++];
            if (!co_await pool.run([r, &st] { return r->entry(st); })) continue;
            ++under_way;
            co_await put(c, pb::Packet::REQ, r->last_id());
        }
        if (waiting.at == waiting.stats.size()) waiting = {};
        if (all_known && waiting.stats.empty() && under_way == 0 && !std::exchange(told, true)) co_await put(c, pb::Packet::FIN, 0);
        auto m = co_await c->read();
        if (!m) throw error{errc::unavailable, "the daemon stopped in the middle of sending files"};
        auto p = decode<pb::Packet>(*m);
        switch (p.type()) {
            case pb::Packet::STAT:
                if (all_known) throw error{errc::corrupt, "the daemon sent a file after the end of its list"};
                if (p.stat().empty())
                    all_known = true;
                else if (waiting.stats.size() - waiting.at >= max_entries)
                    throw error{errc::invalid, "the daemon sent too many files"};
                else
                    waiting.stats.push_back(std::move(*p.mutable_stat()));
                break;
            case pb::Packet::DATA:
                co_await pool.run([r, &p] { r->data(p.id(), p.data()); });
                if (p.data().empty()) --under_way;
                break;
            case pb::Packet::FIN:
                if (!told) throw error{errc::corrupt, "the daemon ended before it had sent all files"};
                co_await pool.run([r] { r->finish(); });
                co_return;
            case pb::Packet::ERR: throw error{errc::io, cat("the daemon could not send the files: ", p.data())};
            default: throw error{errc::corrupt, "the daemon sent a packet that no sender of files sends"};
        }
    }
}

}  // namespace cobuild::client

module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
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

constexpr std::size_t frame = std::size_t{256} << 10;
constexpr std::size_t max_entries = 10'000'000;

/// One tree on its way: found by a walk on the pool, sent by one task, its files by another, both through `writing`.
struct sending {
    async::blocking_pool& pool;
    call_ptr call;
    fs::root tree;
    tree_filter filter;
    std::vector<std::string> stats;  ///< serialized, in the protocol's order: the index is the id
    std::map<std::uint32_t, std::string> files;
    async::semaphore writing{1};

    sending(async::blocking_pool& p, call_ptr c, const std::string& dir, tree_filter f)
        : pool(p), call(std::move(c)), tree(dir), filter(std::move(f)) {}
};
using sending_ptr = std::shared_ptr<sending>;

class collector {
public:
    explicit collector(sending& s) : s_(s), exclude_(s.filter.exclude) {
        auto wanted = s.filter.include;
        if (!s.filter.follow.empty()) {
            const auto followed = follow_links(s.tree, s.filter.follow);
            // A path that is the root itself asks for everything.
            everything_ = std::find(followed.begin(), followed.end(), "") != followed.end();
            wanted.insert(wanted.end(), followed.begin(), followed.end());
        }
        everything_ = everything_ || wanted.empty();
        if (!everything_) include_ = fs::ignore_patterns(wanted);
    }

    void run() {
        fs::walk(s_.tree.fd(), [this](const fs::walk_entry& e) { return visit(e); });
    }

private:
    /// A directory left out by itself is sent once something below it is.
    struct pending {
        std::string path;
        std::string stat;
    };

    fs::walk_step visit(const fs::walk_entry& e) {
        if (e.info.is_socket()) return fs::walk_step::go_on;
        const bool excluded = !exclude_.empty() && exclude_.matches(e.path);
        const bool included = everything_ || include_.matches(e.path);
        const bool taken = included && !excluded;
        if (e.info.is_dir()) {
            const bool below = (!excluded || exclude_.may_reinclude_below(e.path)) && (included || include_.may_match_below(e.path));
            if (!taken && !below) return fs::walk_step::skip_dir;
        } else if (!taken) {
            return fs::walk_step::go_on;
        }
        leave_to(e.path);
        if (!taken) {
            waiting_.push_back({std::string(e.path), describe_entry(e)});
            return fs::walk_step::go_on;
        }
        for (auto& w : waiting_)
            if (!w.stat.empty()) add(std::exchange(w.stat, {}));
        if (e.info.is_file() && e.info.nlink > 1) {
            const auto [first, fresh] = links_.try_emplace({e.info.device, e.info.inode}, e.path);
            if (!fresh) {
                add(describe_entry(e, first->second));
                return fs::walk_step::go_on;
            }
        }
        if (e.info.is_file()) s_.files.emplace(static_cast<std::uint32_t>(s_.stats.size()), e.path);
        add(describe_entry(e));
        return fs::walk_step::go_on;
    }

    void leave_to(std::string_view path) {
        while (!waiting_.empty() &&
               !(path.size() > waiting_.back().path.size() && path.starts_with(waiting_.back().path) && path[waiting_.back().path.size()] == '/'))
            waiting_.pop_back();
    }

    void add(std::string stat) {
        if (s_.stats.size() >= max_entries) throw error{errc::invalid, cat("the directory has more than ", max_entries, " entries")};
        s_.stats.push_back(std::move(stat));
    }

    static std::string describe_entry(const fs::walk_entry& e, const std::string& hard_link = {}) {
        wire_stat st;
        st.set_path(std::string(e.path));
        st.set_mode(to_go_mode(e.info.mode));
        st.set_mod_time(e.info.mtime.seconds * 1'000'000'000 + e.info.mtime.nanoseconds);
        // Owners are the builder's own matter: what a user copies into an image belongs to root unless the build says else.
        if (e.info.is_link()) {
            st.set_linkname(fs::read_link_at(e.dir_fd, e.name));
            st.set_size(static_cast<std::int64_t>(e.info.size));
        } else if (!hard_link.empty()) {
            st.set_linkname(hard_link);
        } else if (e.info.is_file()) {
            st.set_size(static_cast<std::int64_t>(e.info.size));
        }
        if ((e.info.mode & S_IFMT) == S_IFCHR || (e.info.mode & S_IFMT) == S_IFBLK) {
            st.set_devmajor(e.info.rdev_major);
            st.set_devminor(e.info.rdev_minor);
        }
        for (const auto& key : fs::list_xattrs(e.dir_fd, e.name)) {
            if (!key.starts_with("user.") && key != "security.capability") continue;
            if (const auto value = fs::get_xattr(e.dir_fd, e.name, key)) (*st.mutable_xattrs())[key] = *value;
        }
        return st.SerializeAsString();
    }

    sending& s_;
    fs::ignore_patterns exclude_, include_;
    bool everything_ = false;
    std::vector<pending> waiting_;
    std::map<std::pair<std::uint64_t, std::uint64_t>, std::string> links_;
};

async::task<void> put(sending_ptr s, pb::Packet p) {
    const auto turn = co_await s->writing.acquire();
    co_await s->call->write(p.SerializeAsString());
}

async::task<void> send_stats(sending_ptr s) {
    for (auto& st : s->stats) {
        pb::Packet p;
        p.set_type(pb::Packet::STAT);
        p.set_stat(std::exchange(st, {}));
        co_await put(s, std::move(p));
    }
    co_await put(s, {});
}

async::task<void> send_file(sending_ptr s, std::uint32_t id, std::string path) {
    const auto fd = std::make_shared<unique_fd>(
        co_await s->pool.run([s, path] { return s->tree.open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK, fs::links::keep); }));
    for (;;) {
        pb::Packet p;
        p.set_type(pb::Packet::DATA);
        p.set_id(id);
        p.set_data(co_await s->pool.run([fd, path] {
            std::string out(frame, '\0');
            const auto n = ::read(fd->get(), out.data(), out.size());
            if (n < 0) throw_errno(cat("reading ", path));
            out.resize(static_cast<std::size_t>(n));
            return out;
        }));
        const bool end = p.data().empty();
        co_await put(s, std::move(p));
        if (end) co_return;
    }
}

/// Until the receiver has all it wants.
async::task<void> answer_requests(sending_ptr s) {
    while (auto m = co_await s->call->read()) {
        auto p = decode<pb::Packet>(*m);
        if (p.type() == pb::Packet::ERR) throw error{errc::io, cat("the daemon could not take the files: ", p.data())};
        if (p.type() == pb::Packet::FIN) {
            pb::Packet fin;
            fin.set_type(pb::Packet::FIN);
            co_await put(s, std::move(fin));
            co_return;
        }
        if (p.type() != pb::Packet::REQ) throw error{errc::corrupt, "the daemon sent a packet that no receiver of files sends"};
        const auto file = s->files.find(p.id());
        if (file == s->files.end()) throw error{errc::invalid, cat("the daemon asked for file ", p.id(), ", which is none, or is asked for twice")};
        auto path = std::move(file->second);
        s->files.erase(file);
        co_await send_file(s, p.id(), std::move(path));
    }
    throw error{errc::unavailable, "the daemon stopped in the middle of taking files"};
}

}  // namespace

async::task<void> send_tree(async::blocking_pool& pool, std::filesystem::path dir, tree_filter filter, call_ptr c) {
    const auto s = co_await pool.run([&] { return std::make_shared<sending>(pool, c, dir.string(), std::move(filter)); });
    co_await pool.run([s] { collector(*s).run(); });
    std::vector<async::task<void>> both;
    both.push_back(send_stats(s));
    both.push_back(answer_requests(s));
    std::exception_ptr failed;
    try {
        co_await async::when_all(std::move(both));
    } catch (...) {
        failed = std::current_exception();
    }
    if (!failed) co_return;
    // The receiver learns the reason as a packet; the call's status is often lost behind its own.
    const auto why = describe(failed);
    if (why.kind() != errc::canceled) {
        pb::Packet p;
        p.set_type(pb::Packet::ERR);
        p.set_data(why.what());
        try {
            co_await put(s, std::move(p));
        } catch (...) {
        }
    }
    std::rethrow_exception(failed);
}

}  // namespace cobuild::client

module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <charconv>
#include <cstdint>
#include <deque>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "session.pb.h"

module cobuild.client;

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import cobuild.rpc;
import :internal;

namespace cobuild::client {

namespace {

constexpr std::pair<std::uint32_t, std::uint32_t> go_bits[] = {{S_ISUID, 1U << 23}, {S_ISGID, 1U << 22}, {S_ISVTX, 1U << 20}};
constexpr std::uint32_t go_dir = 1U << 31, go_link = 1U << 27, go_device = 1U << 26, go_pipe = 1U << 25, go_socket = 1U << 24, go_char = 1U << 21;

std::string unescape(std::string_view text) {
    std::string out;
    for (std::size_t i = 0; i < text.size(); ++i) {
        unsigned value = 0;
        if (text[i] == '%' && i + 2 < text.size() &&
            std::from_chars(text.data() + i + 1, text.data() + i + 3, value, 16).ptr == text.data() + i + 3) {
            out += static_cast<char>(value);
            i += 2;
        } else {
            out += text[i] == '+' ? ' ' : text[i];
        }
    }
    return out;
}

/// What is still to be walked: a directory without links in it, and the components after it.
struct way {
    std::string at;
    std::deque<std::string> rest;
};

std::deque<std::string> components(std::string_view path) {
    std::deque<std::string> out;
    for (const auto c : split(path, '/'))
        if (!c.empty() && c != ".") out.emplace_back(c);
    return out;
}

std::string joined(const std::string& dir, std::string_view name) { return dir.empty() ? std::string(name) : cat(dir, "/", name); }

/// The file of an output, made when the first bytes come, so a build that fails leaves an older one alone.
unique_fd open_target(const target& t) {
    if (t.fd >= 0) {
        unique_fd fd{::fcntl(t.fd, F_DUPFD_CLOEXEC, 3)};
        if (!fd) throw_errno("opening the output");
        return fd;
    }
    unique_fd fd{::open(t.file.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)};
    if (!fd) throw_errno(cat("writing ", t.file.string()));
    return fd;
}

}  // namespace

std::uint32_t to_go_mode(std::uint32_t m) noexcept {
    std::uint32_t out = m & 0777;
    for (const auto [ours, theirs] : go_bits)
        if ((m & ours) != 0) out |= theirs;
    switch (m & S_IFMT) {
        case S_IFDIR: return out | go_dir;
        case S_IFLNK: return out | go_link;
        case S_IFBLK: return out | go_device;
        case S_IFCHR: return out | go_device | go_char;
        case S_IFIFO: return out | go_pipe;
        case S_IFSOCK: return out | go_socket;
        default: return out;
    }
}

std::uint32_t from_go_mode(std::uint32_t m) noexcept {
    std::uint32_t out = m & 0777;
    for (const auto [ours, theirs] : go_bits)
        if ((m & theirs) != 0) out |= ours;
    if ((m & go_dir) != 0) return out | S_IFDIR;
    if ((m & go_link) != 0) return out | S_IFLNK;
    if ((m & go_device) != 0) return out | ((m & go_char) != 0 ? S_IFCHR : S_IFBLK);
    if ((m & go_pipe) != 0) return out | S_IFIFO;
    if ((m & go_socket) != 0) return out | S_IFSOCK;
    return out | S_IFREG;
}

std::vector<std::string> header_values(const rpc::metadata& m, const std::string& key) {
    auto out = rpc::values(m, key);
    if (rpc::value(m, key + "-encoded") == "1")
        for (auto& v : out) v = unescape(v);
    return out;
}

std::vector<std::string> follow_links(const fs::root& tree, const std::vector<std::string>& paths) {
    std::set<std::string> found;
    std::deque<way> open;
    for (const auto& p : paths) open.push_back({"", components(fs::clean_path(cat("/", p)))});
    std::size_t steps = 0;
    while (!open.empty()) {
        auto w = std::move(open.front());
        open.pop_front();
        if (++steps > 100'000) throw error{errc::invalid, "the paths of the build lead through too many links"};
        if (w.rest.empty()) {
            found.insert(w.at);
            continue;
        }
        const auto name = w.rest.front();
        w.rest.pop_front();
        if (name == "..") {
            const auto slash = w.at.rfind('/');
            w.at = slash == std::string::npos ? std::string() : w.at.substr(0, slash);
            open.push_back(std::move(w));
            continue;
        }
        // A file that is named like a pattern is taken by its name, else it would expand to itself for ever.
        if (fs::has_wildcard(name) && !tree.stat(joined(w.at, name))) {
            const auto here = tree.stat(w.at);
            if (!here || !here->is_dir()) continue;
            for (const auto& each : tree.list(w.at)) {
                if (!fs::wildcard_match(name, each)) continue;
                auto next = w;
                next.rest.push_front(each);
                open.push_back(std::move(next));
            }
            // The pattern itself stays: what does not need following is matched by it.
            std::string all = joined(w.at, name);
            for (const auto& r : w.rest) all = joined(all, r);
            found.insert(all);
            continue;
        }
        const auto path = joined(w.at, name);
        const auto info = tree.stat(path);
        if (info && info->is_link()) {
            if (!found.insert(path).second && w.rest.empty()) continue;
            const auto target = tree.read_link(path);
            way next{target.starts_with('/') ? std::string() : w.at, components(target)};
            next.rest.insert(next.rest.end(), w.rest.begin(), w.rest.end());
            if (next.rest.size() < 512) open.push_back(std::move(next));
            continue;
        }
        w.at = path;
        open.push_back(std::move(w));
    }
    return {found.begin(), found.end()};
}

async::task<rpc::status> serve_directory(lent what, async::blocking_pool& pool, call_ptr c) {
    const auto& m = c->request();
    const auto name = header_values(m, "dir-name");
    const auto found = what->directories.find(name.empty() ? "" : name.front());
    if (found == what->directories.end())
        throw error{errc::not_found,
                    cat("no access allowed to dir ", quoted(name.empty() ? "" : name.front()), ": this build lends none of that name")};
    tree_filter filter{header_values(m, "include-patterns"), header_values(m, "exclude-patterns"), header_values(m, "followpaths")};
    co_await send_tree(pool, found->second, std::move(filter), c);
    co_return rpc::status{};
}

async::task<rpc::status> serve_target(lent what, async::blocking_pool& pool, call_ptr c) {
    int id = 0;
    const auto text = rpc::value(c->request(), "buildkit-attachable-exporter-id");
    std::from_chars(text.data(), text.data() + text.size(), id);
    const auto found = what->targets.find(id);
    if (found == what->targets.end()) throw error{errc::not_found, cat("exporter ", id, " not found")};
    const auto t = found->second;
    if (!t.directory.empty()) {
        if (t.mirror && rpc::value(c->request(), "buildkit-exporter-multi-platform") != "1")
            throw error{errc::unsupported, "the local exporter's mode=delete needs a daemon that sends all platforms at once; this one does not"};
        co_await receive_tree(pool, t.directory, t.mirror, c);
        co_return rpc::status{};
    }
    const auto fd = std::make_shared<unique_fd>(co_await pool.run([t] { return open_target(t); }));
    while (auto m = co_await c->read()) {
        auto data = decode<moby::session::BytesMessage>(*m);
        co_await pool.run([fd, &data] { fs::write_all(fd->get(), bytes_of(data.data())); });
    }
    // Closed here: the daemon counts the export as done when we answer.
    co_await pool.run([fd] {
        if (::close(fd->release()) != 0) throw_errno("writing the output");
    });
    co_return rpc::status{};
}

}  // namespace cobuild::client

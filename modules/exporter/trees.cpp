module;
#include <fcntl.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.exporter;

import cobuild.fs;

namespace cobuild::exporter {

tree as_tree(const input& in) { return {.name = "", .root = in.root, .epoch = in.epoch}; }

namespace {

std::string hash_file(int dir, std::string_view name, std::string_view path) {
    const unique_fd file{::openat(dir, std::string(name).c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC)};
    if (!file) throw_errno(cat("reading ", path));
    hasher sum;
    std::vector<std::byte> buffer(std::size_t{1} << 20);
    for (;;) {
        const auto n = ::read(file.get(), buffer.data(), buffer.size());
        if (n < 0) throw_errno(cat("reading ", path));
        if (n == 0) return sum.finish().hex();
        sum.update(std::span<const std::byte>(buffer).first(static_cast<std::size_t>(n)));
    }
}

/// Every regular file by path.
std::vector<subject> files_of(int root) {
    std::vector<subject> out;
    fs::walk(root, [&](const fs::walk_entry& e) {
        if (e.info.is_file()) out.push_back({std::string(e.path), hash_file(e.dir_fd, e.name, e.path)});
        return fs::walk_step::go_on;
    });
    return out;
}

std::string with_suffix(const std::string& name, const std::string& suffix) {
    if (suffix.empty()) return name;
    const auto dot = name.rfind('.');
    return dot == std::string::npos ? cat(name, ".", suffix) : cat(name.substr(0, dot), ".", suffix, name.substr(dot));
}

}  // namespace

async::task<std::vector<extra_file>> attestation_files(stores s, input in, std::string prefix, std::string suffix) {
    std::vector<const attestation*> wanted;
    for (const auto& a : in.attestations)
        if (!a.inline_only) wanted.push_back(&a);
    std::vector<extra_file> out;
    if (wanted.empty()) co_return out;
    const auto view = co_await s.snapshots.view(in.root);
    const auto subjects = co_await s.pool.run([&] { return files_of(view.fd()); });
    for (const auto* a : wanted) {
        extra_file f{.name = prefix + with_suffix(a->filename, suffix), .bytes = make_statement(*a, subjects)};
        if (f.name.find('/') != std::string::npos || f.name == "." || f.name == "..")
            throw error{errc::invalid, cat("the attestation's file name ", quoted(f.name), " may not have a '/'")};
        out.push_back(std::move(f));
    }
    co_return out;
}

async::task<void> check_distinct(stores s, std::vector<tree> trees) {
    std::map<std::pair<std::string, std::string>, std::size_t> seen;
    for (std::size_t i = 0; i < trees.size(); ++i) {
        const auto view = co_await s.snapshots.view(trees[i].root);
        co_await s.pool.run([&] {
            const auto take = [&](std::string path) {
                const auto [at, fresh] = seen.try_emplace({trees[i].name, path}, i);
                if (!fresh && at->second != i)
                    throw error{errc::invalid, cat("cannot overwrite ", path, " from ", trees[at->second].platform, " with ", trees[i].platform,
                                                   " when split option is disabled: leave out platform-split=false")};
            };
            fs::walk(view.fd(), [&](const fs::walk_entry& e) {
                if (!e.info.is_dir()) take(std::string(e.path));
                return fs::walk_step::go_on;
            });
            for (const auto& f : trees[i].extra) take(f.name);
        });
    }
}

/// For write_directory: what is in the directory and in no tree goes.
void remove_others(const std::vector<tree>& trees, const std::vector<int>& roots, const std::string& directory) {
    std::set<std::string> wanted;
    for (std::size_t i = 0; i < trees.size(); ++i) {
        const std::string prefix = trees[i].name.empty() ? "" : trees[i].name + "/";
        if (!trees[i].name.empty()) wanted.insert(trees[i].name);
        for (const auto& f : trees[i].extra) wanted.insert(prefix + f.name);
        fs::walk(roots[i], [&](const fs::walk_entry& e) {
            wanted.insert(cat(prefix, e.path));
            return fs::walk_step::go_on;
        });
    }
    const fs::root target(directory);
    const fs::root machine("/");
    const auto here = fs::stat_at(target.fd(), ""), top = fs::stat_at(machine.fd(), "");
    if (here && top && here->inode == top->inode && here->device == top->device)
        throw error{errc::invalid, "mode=delete with dest=/ would remove this machine's own files: name a directory for the result"};
    std::vector<std::string> surplus;
    fs::walk(target.fd(), [&](const fs::walk_entry& e) {
        if (wanted.contains(std::string(e.path))) return fs::walk_step::go_on;
        surplus.emplace_back(e.path);
        return fs::walk_step::skip_dir;
    });
    for (const auto& path : surplus) target.remove_all(path);
}

}  // namespace cobuild::exporter

module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

module cobuild.archive;

import cobuild.base;
import cobuild.fs;
import :tree;

namespace cobuild::archive {

namespace {
std::pair<std::string, std::string> split_path(const std::string& path) {
    const auto slash = path.rfind('/');
    if (slash == std::string::npos) return {{}, path};
    return {path.substr(0, slash), path.substr(slash + 1)};
}

bool below(std::string_view path, std::string_view dir) { return path.starts_with(dir) && (path.size() == dir.size() || path[dir.size()] == '/'); }

class finisher {
public:
    finisher(int dir, lower_chain& lower) : root_(unique_fd{::openat(dir, ".", O_PATH | O_DIRECTORY | O_CLOEXEC)}), lower_(lower) {
        if (root_.fd() < 0) throw_errno("opening the layer's directory");
    }

    void run(const apply_result& pending) {
        for (const auto& path : pending.implied_parents) parent(moved(path));
        for (const auto& link : pending.pending_links) make_link(link);
        for (auto it = times_.rbegin(); it != times_.rend(); ++it) root_.set_mtime(it->first, it->second);
    }

private:
    /// Where a path of the layer is after the moves so far.
    std::string moved(std::string path) const {
        for (const auto& [from, to] : moves_)
            if (below(path, from)) path = path.size() == from.size() ? to : to.empty() ? path.substr(from.size() + 1) : to + path.substr(from.size());
        return path;
    }

    void parent(const std::string& path) {
        const auto found = lower_.find(path);
        if (!found) return;
        if (found->info.is_dir()) return adopt(path, *found);
        if (!found->info.is_link()) return;
        const std::string real = lower_.resolve(path);
        if (below(real, path)) throw error{errc::corrupt, cat("the layer has files below ", quoted(path), ", a link that leads to itself")};
        ensure_dir(real);
        merge(path, real);
        const auto [above, name] = split_path(path);
        keep_time(above);
        root_.remove_all(path);
        moves_.emplace_back(path, real);
    }

    /// The directory takes owner, mode, attributes and time of the one below.
    void adopt(const std::string& path, const lower_chain::hit& below_it) {
        const fs::file_info& info = below_it.info;
        root_.chown(path, {info.uid, info.gid});
        root_.chmod(path, info.permissions());
        for (const auto& key : fs::list_xattrs(below_it.layer_fd, path))
            if (!key.starts_with("trusted.overlay.") && !key.starts_with("user.overlay."))
                if (const auto value = fs::get_xattr(below_it.layer_fd, path, key)) root_.set_xattr(path, key, *value);
        times_.insert_or_assign(path, info.mtime);
    }

    void keep_time(const std::string& dir) {
        if (!times_.contains(dir)) times_.emplace(dir, root_.stat(dir)->mtime);
    }

    /// Makes a directory of the layer and what is above it, each as it is below.
    void ensure_dir(const std::string& path) {
        if (path.empty()) return;
        for (std::size_t end = path.find('/');; end = path.find('/', end + 1)) {
            const std::string part = path.substr(0, end);
            const auto there = root_.stat(part);
            if (there && !there->is_dir())
                throw error{errc::corrupt, cat("the layer has ", quoted(part), " as something else than the directory it needs")};
            if (!there) {
                keep_time(split_path(part).first);
                root_.make_dirs(part, 0755, fs::owner{});
                times_.insert_or_assign(part, fs::file_time{});
                if (const auto found = lower_.find(part); found && found->info.is_dir()) adopt(part, *found);
            }
            if (end == std::string::npos) return;
        }
    }

    /// Moves what is in one directory of the layer into another; what both have comes from the first.
    void merge(const std::string& from, const std::string& to) {
        std::vector<std::pair<std::string, std::string>> todo{{from, to}};
        while (!todo.empty()) {
            const auto [a, b] = std::move(todo.back());
            todo.pop_back();
            keep_time(b);
            for (const auto& name : root_.list(a)) {
                const std::string source = cat(a, "/", name);
                const std::string target = b.empty() ? name : cat(b, "/", name);
                const auto there = root_.stat(target);
                if (there && there->is_dir() && root_.stat(source)->is_dir()) {
                    todo.emplace_back(source, target);
                    continue;
                }
                if (there) root_.remove_all(target);
                const auto [from_dir, from_name] = root_.parent(source);
                const auto [to_dir, to_name] = root_.parent(target);
                if (::renameat(from_dir.get(), from_name.c_str(), to_dir.get(), to_name.c_str()) != 0) throw_errno(cat("moving ", quoted(source)));
            }
        }
    }

    /// A path through links, of the layer and of what is below it.
    std::string resolved(const std::string& path) {
        std::vector<int> all{root_.fd()};
        all.insert(all.end(), lower_.layers().begin(), lower_.layers().end());
        lower_chain merged{std::move(all)};
        const auto [dir, name] = split_path(path);
        const std::string real = merged.resolve(dir);
        return real.empty() ? name : cat(real, "/", name);
    }

    void make_link(const pending_link& link) {
        const std::string path = resolved(moved(link.path));
        const std::string target = resolved(moved(link.target));
        if (const auto there = root_.stat(path); there && !there->is_whiteout()) return;  // a later entry of the archive
        const auto in_layer = root_.stat(target);
        if (!in_layer || in_layer->is_whiteout()) copy_up(link, target, in_layer.has_value());
        const auto [dir, name] = split_path(path);
        ensure_dir(dir);
        keep_time(dir);
        root_.remove_all(path);
        const auto [from_dir, from_name] = root_.parent(target);
        const auto [to_dir, to_name] = root_.parent(path);
        if (::linkat(from_dir.get(), from_name.c_str(), to_dir.get(), to_name.c_str(), 0) != 0)
            throw_errno(cat("making the hard link ", quoted(path)));
    }

    void copy_up(const pending_link& link, const std::string& target, bool hidden) {
        const auto found = hidden ? std::nullopt : lower_.find(target);
        if (!found)
            throw error{errc::corrupt,
                        cat("the target ", quoted(link.target), " of the hard link ", quoted(link.path), " is neither in the layer nor below it")};
        if (found->info.is_dir()) throw error{errc::corrupt, cat("the layer has a hard link ", quoted(link.path), " to a directory")};
        const auto [dir, name] = split_path(target);
        ensure_dir(dir);
        keep_time(dir);
        const unique_fd from{::openat(found->layer_fd, dir.empty() ? "." : dir.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)};
        if (!from) throw_errno(cat("opening ", quoted(dir), " of a layer below"));
        const auto to = root_.open(dir, O_PATH | O_DIRECTORY);
        fs::copy_tree(from.get(), name, to.get(), name, {});
    }

    fs::root root_;
    lower_chain& lower_;
    std::vector<std::pair<std::string, std::string>> moves_;
    std::map<std::string, fs::file_time> times_;
};
}  // namespace

void finish_layer(int dir, lower_chain& lower, const apply_result& pending, const extract_options&) { finisher{dir, lower}.run(pending); }

}  // namespace cobuild::archive

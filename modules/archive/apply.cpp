module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

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
constexpr std::string_view mark = ".wh.";

class applier {
public:
    applier(byte_source tar, int dir, const extract_options& o, bool overlay)
        : reader_(std::move(tar), o.limits), tree_(dir, {overlay, o.user_xattr}), options_(o), overlay_(overlay) {}

    apply_result run() {
        tar_entry e;
        while (reader_.next(e)) {
            ++result_.entries;
            const std::string path = entry_path(e.path);
            try {
                if (!overlay_ || !special(path)) put(path, e);
            } catch (const error& failed) {
                throw error{failed}.with(cat("unpacking ", quoted(e.path)));
            }
        }
        tree_.finish();
        reader_.drain();
        result_.implied_parents = tree_.implied();
        return std::move(result_);
    }

private:
    /// Whiteouts and what else begins like one.
    bool special(const std::string& path) {
        const auto slash = path.rfind('/');
        const std::string dir = slash == std::string::npos ? std::string{} : path.substr(0, slash);
        const std::string_view name = slash == std::string::npos ? std::string_view(path) : std::string_view(path).substr(slash + 1);
        if (!name.starts_with(mark)) return false;
        if (name == ".wh..wh..opq") {
            tree_.opaque(dir);
            if (dir.empty()) result_.opaque_root = true;
            return true;
        }
        if (name.starts_with(".wh..wh.")) return true;  // an aufs host's own book-keeping
        const std::string_view hidden = name.substr(mark.size());
        if (hidden.empty() || hidden == "." || hidden == "..") throw error{errc::corrupt, "a whiteout without a name"};
        tree_.whiteout(dir.empty() ? std::string(hidden) : cat(dir, "/", hidden));
        return true;
    }

    void put(const std::string& path, const tar_entry& e) {
        if (path.empty() && e.type != entry_type::directory) throw error{errc::corrupt, "the top directory would be replaced by something else"};
        const attributes a{e.mode, options_.who.value_or(fs::owner{e.uid, e.gid}), e.mtime, e.xattrs};
        switch (e.type) {
            case entry_type::file: return file(path, e, a);
            case entry_type::directory: return tree_.directory(path, a);
            case entry_type::symlink: return tree_.symlink(path, e.link, a);
            case entry_type::hard_link: return link(path, e);
            case entry_type::char_device: return node(path, S_IFCHR, e, a);
            case entry_type::block_device: return node(path, S_IFBLK, e, a);
            case entry_type::fifo: return node(path, S_IFIFO, e, a);
        }
    }

    void file(const std::string& path, const tar_entry& e, const attributes& a) {
        tree_.begin_file(path, e.size, a);
        for (auto piece = reader_.data(); !piece.empty(); piece = reader_.data()) tree_.piece(piece);
        tree_.end_file(a);
        result_.bytes += e.size;
    }

    void node(const std::string& path, std::uint32_t type, const tar_entry& e, const attributes& a) {
        if (!tree_.node(path, type, e.dev_major, e.dev_minor, a) && !options_.skip_devices)
            throw error{errc::permission, "this user may not make device nodes"};
    }

    void link(const std::string& path, const tar_entry& e) {
        const std::string target = entry_path(e.link);
        if (target.empty()) throw error{errc::corrupt, "a hard link without a target"};
        if (target == path || tree_.hard_link(path, target)) return;
        if (!overlay_) throw error{errc::corrupt, cat("the target ", quoted(target), " of a hard link is not in the archive")};
        result_.pending_links.push_back({path, target});
    }

    tar_reader reader_;
    tree_writer tree_;
    const extract_options& options_;
    bool overlay_;
    apply_result result_;
};
}  // namespace

apply_result apply_layer(byte_source tar, int dir, const extract_options& options) { return applier{std::move(tar), dir, options, true}.run(); }

apply_result extract_plain(byte_source tar, const fs::root& root, std::string_view dest, const extract_options& options) {
    const unique_fd dir = root.open(dest, O_PATH | O_DIRECTORY);
    return applier{std::move(tar), dir.get(), options, false}.run();
}

}  // namespace cobuild::archive

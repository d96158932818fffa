module;
#include <fcntl.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.filesync;

import cobuild.base;
import cobuild.fs;
import :parts;

namespace cobuild::filesync {

namespace {
// More than any real list comes to; a directory of links that lead to patterns could multiply without end.
constexpr std::size_t max_followed = 100'000;

std::string joined(std::string_view a, std::string_view b) { return fs::clean_path(cat("/", a, "/", b)).substr(1); }

bool is_pattern(std::string_view name) {
    for (std::size_t i = 0; i < name.size(); ++i) {
        if (name[i] == '\\')
            ++i;
        else if (name[i] == '*' || name[i] == '?' || name[i] == '[')
            return true;
    }
    return false;
}

class follower {
public:
    explicit follower(const fs::root& root) : root_(root) {}
    void add(std::string path) {
        todo_.push_back(std::move(path));
        while (!todo_.empty()) {
            const std::string next = std::move(todo_.back());
            todo_.pop_back();
            one(next);
        }
    }
    std::set<std::string> found;

private:
    /// Goes down the path to its end or its first link; where that leads is gone down later.
    void one(std::string_view path) {
        const std::string clean = fs::clean_path(cat("/", path)).substr(1);
        std::string here;
        std::string_view rest = clean;
        for (;;) {
            const auto slash = rest.find('/');
            here = joined(here, rest.substr(0, slash));
            rest = slash == std::string_view::npos ? std::string_view{} : rest.substr(slash + 1);
            const auto targets = links_at(here);
            if (targets.empty() && !rest.empty()) continue;
            if (!found.insert(here).second) return;
            if (found.size() > max_followed) throw error{errc::invalid, "the paths to follow lead through too many symbolic links"};
            for (const auto& target : targets) todo_.push_back(cat(target, "/", rest));
            return;
        }
    }
    std::vector<std::string> links_at(std::string_view path) const {
        const auto slash = path.rfind('/');
        const std::string_view dir = slash == std::string_view::npos ? std::string_view{} : path.substr(0, slash);
        const std::string_view name = slash == std::string_view::npos ? path : path.substr(slash + 1);
        std::vector<std::string> out;
        if (!is_pattern(name)) {
            if (auto target = link_at(dir, path)) out.push_back(std::move(*target));
            return out;
        }
        const auto info = root_.stat(dir, fs::links::keep);
        if (!info || !info->is_dir()) return out;
        for (const auto& candidate : root_.list(dir))
            if (fs::wildcard_match(name, candidate))
                if (auto target = link_at(dir, joined(dir, candidate))) out.push_back(std::move(*target));
        return out;
    }
    std::optional<std::string> link_at(std::string_view dir, std::string_view path) const {
        if (path.empty()) return std::nullopt;
        std::optional<unique_fd> fd;
        try {
            fd = root_.try_open(path, O_PATH, fs::links::keep);
        } catch (const error& e) {
            // A file where a directory is needed, a loop: nothing to follow.
            if (e.kind() != errc::invalid && e.kind() != errc::not_found) throw;
        }
        if (!fd || !fs::stat_at(fd->get(), "")->is_link()) return std::nullopt;
        const std::string target = fs::read_link_at(fd->get(), "");
        return target.starts_with('/') ? fs::clean_path(target).substr(1) : joined(dir, target);
    }
    const fs::root& root_;
    std::vector<std::string> todo_;
};

/// What a tree's patterns take.
class selection {
public:
    explicit selection(const tree& t) : exclude_(t.exclude) {
        std::vector<std::string> include = t.include;
        if (!t.follow.empty()) {
            const auto followed = follow_links(*t.root, t.follow);
            include.insert(include.end(), followed.begin(), followed.end());
        }
        restricted_ = !include.empty();
        if (restricted_) include_ = fs::ignore_patterns(include);
    }
    struct verdict {
        bool take;
        bool below;  ///< something below it may be taken
    };
    [[nodiscard]] verdict of(std::string_view path, bool is_dir) const {
        const bool included = !restricted_ || include_.matches(path);
        if (!included && !(is_dir && include_.may_match_below(path))) return {false, false};
        const bool excluded = !exclude_.empty() && exclude_.matches(path);
        if (excluded && !(is_dir && exclude_.may_reinclude_below(path))) return {false, false};
        return {included && !excluded, true};
    }

private:
    bool restricted_ = false;
    fs::ignore_patterns include_;
    fs::ignore_patterns exclude_;
};

class lister {
public:
    lister(const tree& t, const send_options& options, std::function<bool(std::string_view)> xattr,
           const std::function<void(file_stat&&, place&&)>& emit)
        : tree_(t), options_(options), xattr_(std::move(xattr)), emit_(emit), selected_(t) {}

    void run() {
        if (!tree_.name.empty()) {
            file_stat dir = tree_.dir;
            dir.path = tree_.name;
            if (!dir.is_dir()) throw error{errc::invalid, cat(quoted(tree_.name), ": a tree is sent as a directory")};
            if (options_.map && !options_.map(dir)) return;
            emit_(std::move(dir), place{});
        }
        fs::walk(tree_.root->fd(), [this](const fs::walk_entry& e) { return visit(e); });
    }

private:
    struct pending {  ///< a directory on the way that was not taken itself
        file_stat stat;
        bool said = false;
    };
    fs::walk_step visit(const fs::walk_entry& e) {
        if (e.info.is_socket()) return fs::walk_step::go_on;
        while (!way_.empty() && !below(e.path, way_.back().stat.path)) way_.pop_back();
        const auto verdict = selected_.of(e.path, e.info.is_dir());
        if (!verdict.take && !verdict.below) return fs::walk_step::skip_dir;
        if (!verdict.take && !e.info.is_dir()) return fs::walk_step::go_on;
        file_stat s = describe(e);
        // A hard link's first name is the first that is taken.
        if (options_.map && !options_.map(s)) return fs::walk_step::skip_dir;
        s.path = e.path;
        if (!verdict.take) {
            way_.push_back({std::move(s), false});
            return fs::walk_step::go_on;
        }
        for (auto& dir : way_)
            if (!std::exchange(dir.said, true)) say(file_stat(dir.stat));
        if (s.is_dir()) way_.push_back({s, true});
        if (s.is_file() && e.info.nlink > 1) {
            const auto [first, fresh] = first_names_.try_emplace({e.info.device, e.info.inode}, s.path);
            if (!fresh) s.link = first->second;
        }
        say(std::move(s));
        return fs::walk_step::go_on;
    }
    static bool below(std::string_view path, std::string_view dir) {
        return path.size() > dir.size() && path[dir.size()] == '/' && path.starts_with(dir);
    }
    file_stat describe(const fs::walk_entry& e) const {
        file_stat s{
            .path = std::string(e.path), .mode = to_go_mode(e.info.mode), .uid = e.info.uid, .gid = e.info.gid, .mtime = from_time(e.info.mtime)};
        if (!s.is_dir()) s.size = static_cast<std::int64_t>(e.info.size);
        if ((s.mode & go_mode::device) != 0) {
            s.dev_major = e.info.rdev_major;
            s.dev_minor = e.info.rdev_minor;
        }
        if (s.is_symlink()) s.link = fs::read_link_at(e.dir_fd, e.name);
        for (auto& key : fs::list_xattrs(e.dir_fd, e.name)) {
            if (!xattr_(key)) continue;
            if (auto value = fs::get_xattr(e.dir_fd, e.name, key)) s.xattrs.emplace_back(std::move(key), std::move(*value));
        }
        return s;
    }
    void say(file_stat&& s) {
        place where{tree_.root.get(), s.path};
        if (!tree_.name.empty()) {
            s.path = cat(tree_.name, "/", s.path);
            if (s.is_symlink() ? s.link.starts_with('/') : !s.link.empty())
                s.link = s.is_symlink() ? fs::clean_path(cat("/", tree_.name, s.link)) : cat(tree_.name, "/", s.link);
        }
        emit_(std::move(s), std::move(where));
    }

    const tree& tree_;
    const send_options& options_;
    std::function<bool(std::string_view)> xattr_;
    const std::function<void(file_stat&&, place&&)>& emit_;
    selection selected_;
    std::vector<pending> way_;
    std::map<std::pair<std::uint64_t, std::uint64_t>, std::string> first_names_;
};
}  // namespace

std::vector<std::string> follow_links(const fs::root& root, const std::vector<std::string>& paths) {
    follower f(root);
    for (const auto& p : paths) f.add(p);
    std::vector<std::string> out;
    for (const auto& p : f.found) {
        if (p.empty()) return {};
        if (out.empty() || !p.starts_with(out.back() + "/")) out.push_back(p);
    }
    return out;
}

std::function<bool(std::string_view)> xattr_filter(std::function<bool(std::string_view)> asked) {
    if (asked) return asked;
    return [](std::string_view key) { return !is_local_xattr(key); };
}

fs::file_time to_time(std::int64_t t) noexcept {
    constexpr std::int64_t second = 1'000'000'000;
    const std::int64_t seconds = t / second - (t % second < 0 ? 1 : 0);
    return {seconds, static_cast<std::uint32_t>((t % second + second) % second)};
}

std::int64_t from_time(fs::file_time t) noexcept {
    constexpr std::int64_t second = 1'000'000'000;
    constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max() / second - 1;
    return std::clamp(t.seconds, -most, most) * second + t.nanoseconds;
}

namespace {
constexpr std::size_t max_merged = 4'000'000;

/// The protocol's order: byte by byte, '/' before all others.
bool comes_before(std::string_view a, std::string_view b) {
    const auto n = std::min(a.size(), b.size());
    for (std::size_t i = 0; i < n; ++i) {
        if (a[i] == b[i]) continue;
        if (a[i] == '/' || b[i] == '/') return a[i] == '/';
        return static_cast<unsigned char>(a[i]) < static_cast<unsigned char>(b[i]);
    }
    return a.size() < b.size();
}

/// Trees of one name as one: of all but the first the entries are remembered, then the first is walked, and they are put
/// where they belong.
void list_merged(const std::vector<const tree*>& group, const send_options& options, const std::function<void(file_stat&&, place&&)>& emit) {
    std::vector<std::pair<file_stat, place>> others;
    for (std::size_t i = 1; i < group.size(); ++i)
        lister(*group[i], options, xattr_filter(options.xattr), [&others](file_stat&& s, place&& where) {
            if (others.size() == max_merged) throw error{errc::invalid, "there are too many files to send"};
            others.emplace_back(std::move(s), std::move(where));
        }).run();
    std::stable_sort(others.begin(), others.end(), [](const auto& a, const auto& b) { return comes_before(a.first.path, b.first.path); });
    std::size_t next = 0;
    std::string last;
    bool last_is_dir = false;
    const auto say = [&](file_stat&& s, place&& where) {
        if (s.path == last) {
            if (last_is_dir && s.is_dir()) return;
            throw error{errc::exists, cat("two trees to send have a file ", quoted(s.path))};
        }
        last = s.path;
        last_is_dir = s.is_dir();
        emit(std::move(s), std::move(where));
    };
    const auto catch_up = [&](const std::string* until) {
        for (; next < others.size() && (until == nullptr || comes_before(others[next].first.path, *until)); ++next)
            say(std::move(others[next].first), std::move(others[next].second));
    };
    lister(*group.front(), options, xattr_filter(options.xattr), [&](file_stat&& s, place&& where) {
        catch_up(&s.path);
        say(std::move(s), std::move(where));
    }).run();
    catch_up(nullptr);
}
}  // namespace

void list_trees(const std::vector<tree>& trees, const send_options& options, const std::function<void(file_stat&&, place&&)>& emit) {
    std::map<std::string, std::vector<const tree*>> groups;
    for (const auto& t : trees) groups[t.name].push_back(&t);
    for (const auto& [name, group] : groups)
        if (name == "." || name == ".." || name.find('/') != std::string::npos || (name.empty() && groups.size() > 1))
            throw error{errc::invalid, cat(quoted(name), " is not a name for a directory to send")};
    for (const auto& [name, group] : groups) {
        if (group.size() > 1)
            list_merged(group, options, emit);
        else
            lister(*group.front(), options, xattr_filter(options.xattr), emit).run();
    }
}

}  // namespace cobuild::filesync

module;
#include <fcntl.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

module cobuild.archive;

import cobuild.base;
import cobuild.fs;

namespace cobuild::archive {

namespace {
constexpr std::size_t max_views = 8192;
constexpr int max_links = 255;

bool is_opaque(int layer, std::string_view path) {
    for (const std::string_view key : {"trusted.overlay.opaque", "user.overlay.opaque"})
        if (fs::get_xattr(layer, path, key) == "y") return true;
    return false;
}
std::pair<std::string_view, std::string_view> split_path(std::string_view path) {
    const auto slash = path.rfind('/');
    if (slash == std::string_view::npos) return {{}, path};
    return {path.substr(0, slash), path.substr(slash + 1)};
}
}  // namespace

struct lower_chain::state {
    std::vector<int> layers;
    /// Which layers, top first, a merged directory is made of. A layer stands here only when every part of the path is a
    /// real directory in it: then the path leads nowhere else, and plain *at calls are safe.
    using view = std::vector<std::uint32_t>;
    std::unordered_map<std::string, std::shared_ptr<const view>> views;

    std::shared_ptr<const view> root_view() {
        auto v = std::make_shared<view>();
        for (std::uint32_t i = 0; i < layers.size(); ++i) {
            v->push_back(i);
            if (is_opaque(layers[i], "")) break;
        }
        return v;
    }

    std::shared_ptr<const view> below(const view& parent, const std::string& path) {
        auto v = std::make_shared<view>();
        for (const std::uint32_t i : parent) {
            const auto info = fs::stat_at(layers[i], path);
            if (!info) continue;
            if (!info->is_dir()) break;
            v->push_back(i);
            if (is_opaque(layers[i], path)) break;
        }
        return v;
    }

    std::shared_ptr<const view> of(std::string_view dir) {
        if (const auto found = views.find(std::string(dir)); found != views.end()) return found->second;
        if (views.size() >= max_views) views.clear();
        std::shared_ptr<const view> v;
        if (dir.empty()) {
            v = root_view();
        } else {
            auto parent = views.find("");
            v = parent != views.end() ? parent->second : of("");
            for (std::size_t end = dir.find('/');; end = dir.find('/', end + 1)) {
                const std::string part{dir.substr(0, end)};
                if (const auto known = views.find(part); known != views.end())
                    v = known->second;
                else
                    v = views.emplace(part, below(*v, part)).first->second;
                if (end == std::string_view::npos) return v;
            }
        }
        return views.insert_or_assign(std::string(dir), v).first->second;
    }
};

lower_chain::lower_chain() : state_(std::make_unique<state>()) {}
lower_chain::lower_chain(std::vector<int> layers) : lower_chain() { state_->layers = std::move(layers); }
lower_chain::lower_chain(lower_chain&&) noexcept = default;
lower_chain& lower_chain::operator=(lower_chain&&) noexcept = default;
lower_chain::~lower_chain() = default;

const std::vector<int>& lower_chain::layers() const noexcept { return state_->layers; }

std::optional<lower_chain::hit> lower_chain::find(std::string_view path) {
    state& s = *state_;
    if (path.empty()) {
        if (s.layers.empty()) return std::nullopt;
        return hit{s.layers.front(), *fs::stat_at(s.layers.front(), "")};
    }
    const auto view = s.of(split_path(path).first);
    for (const std::uint32_t i : *view) {
        const auto info = fs::stat_at(s.layers[i], path);
        if (!info) continue;
        if (info->is_whiteout()) return std::nullopt;
        return hit{s.layers[i], *info};
    }
    return std::nullopt;
}

std::vector<std::string> lower_chain::list(std::string_view dir) {
    state& s = *state_;
    std::set<std::string> names;
    std::set<std::string> hidden;
    for (const std::uint32_t i : *s.of(dir)) {
        const unique_fd here{::openat(s.layers[i], dir.empty() ? "." : std::string(dir).c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)};
        if (!here) throw_errno(cat("opening ", quoted(dir), " of a layer"));
        for (auto& name : fs::list_dir(here.get())) {
            if (hidden.contains(name) || names.contains(name)) continue;
            const auto info = fs::stat_at(here.get(), name);
            if (info && info->is_whiteout())
                hidden.insert(std::move(name));
            else
                names.insert(std::move(name));
        }
    }
    return {names.begin(), names.end()};
}

std::string lower_chain::resolve(std::string_view path) {
    std::deque<std::string> todo;
    for (const auto part : split(path, '/')) todo.emplace_back(part);
    std::vector<std::string> done;
    const auto joined = [&done] {
        std::string out;
        for (const auto& d : done) out.append(out.empty() ? "" : "/").append(d);
        return out;
    };
    for (int followed = 0; !todo.empty();) {
        const std::string part = std::move(todo.front());
        todo.pop_front();
        if (part.empty() || part == ".") continue;
        if (part == "..") {
            if (!done.empty()) done.pop_back();
            continue;
        }
        done.push_back(part);
        const std::string here = joined();
        const auto found = find(here);
        if (!found || !found->info.is_link()) continue;
        if (++followed > max_links) throw error{errc::invalid, cat(quoted(path), ": too many symbolic links in the path (a loop?)")};
        done.pop_back();
        const std::string target = fs::read_link_at(found->layer_fd, here);
        if (target.starts_with('/')) done.clear();
        const auto parts = split(target, '/');
        for (auto it = parts.rbegin(); it != parts.rend(); ++it) todo.emplace_front(*it);
    }
    return joined();
}

}  // namespace cobuild::archive

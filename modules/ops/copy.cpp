module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <compare>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.ops;

import cobuild.archive;
import :bodies;

namespace cobuild::ops {

namespace {

std::string join(std::string_view dir, std::string_view name) {
    if (dir.empty() || dir == "/") return std::string(name);
    return name.empty() ? std::string(dir) : cat(dir, "/", name);
}

std::string base_name(std::string_view path) {
    while (path.ends_with('/')) path.remove_suffix(1);
    return std::string(path.substr(path.rfind('/') + 1));
}

std::string relative(std::string_view path) {
    std::string clean = fs::clean_path(cat("/", path));
    clean.erase(0, 1);
    return clean;
}

/// What copy actions leave out: the client's ignore rules, and the action's own patterns.
class selection {
public:
    selection(const copy_job& job, std::string source)
        : job_(job), source_(std::move(source)), include_(job.what.include_patterns), exclude_(job.what.exclude_patterns) {}

    /// `path` is relative to the source, "" for the source itself.
    [[nodiscard]] fs::copy_verdict operator()(std::string_view path, const fs::file_info& info) const {
        bool take = true;
        if (job_.live != nullptr) {
            const std::string full = join(source_, path);
            if (!full.empty() && job_.live->excluded.matches(full)) {
                if (!info.is_dir() || !job_.live->excluded.may_reinclude_below(full)) return fs::copy_verdict::skip;
                take = false;
            }
        }
        const std::string own = path.empty() ? (info.is_dir() ? "" : base_name(source_)) : std::string(path);
        if (own.empty()) return take ? fs::copy_verdict::take : fs::copy_verdict::descend;
        if (!exclude_.empty() && exclude_.matches(own)) {
            if (!info.is_dir() || !exclude_.may_reinclude_below(own)) return fs::copy_verdict::skip;
            take = false;
        }
        if (!include_.empty() && !include_.matches(own)) {
            if (!info.is_dir() || !include_.may_match_below(own)) return fs::copy_verdict::skip;
            take = false;
        }
        return take ? fs::copy_verdict::take : fs::copy_verdict::descend;
    }

private:
    const copy_job& job_;
    std::string source_;
    fs::ignore_patterns include_, exclude_;
};

/// The digest of what a copy brings, entry by entry in path order; no time counts.
class landing {
public:
    void source(std::string_view dest) { field("S"), field(dest); }
    void add(std::string_view path, const fs::file_info& info, std::uint32_t mode, fs::owner who, std::string_view link, const digest* content,
             const digest& xattrs) {
        field(path);
        number(info.mode & S_IFMT);
        number(info.is_link() ? 0 : mode);
        number(who.uid);
        number(who.gid);
        field(link);
        if (content != nullptr) field(content->str());
        if (info.rdev_major != 0 || info.rdev_minor != 0) number(info.rdev_major), number(info.rdev_minor);
        field(xattrs.empty() ? "" : xattrs.str());
    }
    digest finish() { return hash_.finish(); }

private:
    void field(std::string_view text) {
        number(text.size());
        hash_.update(text);
    }
    void number(std::uint64_t n) { hash_.update(bytes_of(std::string_view(reinterpret_cast<const char*>(&n), sizeof n))); }
    hasher hash_;
};

/// Sources that the pattern names, in path order. Live directories show only what their rules leave.
std::vector<std::string> find_sources(const copy_job& job) {
    const std::string path = relative(job.what.src);
    if (!job.what.allow_wildcard || !fs::has_wildcard(path)) return {path};
    std::vector<std::string> found{""};
    for (const auto part : split(path, '/')) {
        std::vector<std::string> next;
        for (const auto& dir : found) {
            if (!fs::has_wildcard(part)) {
                next.push_back(join(dir, part));
                continue;
            }
            const auto info = job.from->stat(dir, fs::links::follow);
            if (!info || !info->is_dir()) continue;
            for (const auto& name : job.from->list(dir))
                if (fs::wildcard_match(part, name)) next.push_back(join(dir, name));
        }
        found = std::move(next);
    }
    std::erase_if(found, [&](const std::string& f) {
        const auto info = job.from->stat(f);
        if (!info) return true;
        return job.live != nullptr && job.live->excluded.matches(f) && !(info->is_dir() && job.live->excluded.may_reinclude_below(f));
    });
    if (found.empty() && !job.what.allow_empty_wildcard) throw error{errc::not_found, cat(quoted(job.what.src), ": nothing matches this pattern")};
    return found;
}

error missing(const copy_job& job, std::string_view path) {
    const std::string shown = cat("/", path);
    if (job.live != nullptr && job.live->excluded.matches(path)) return {errc::not_found, cat(quoted(shown), ": not found, the ignore file excludes it")};
    return {errc::not_found, cat(quoted(shown), ": not found", job.live != nullptr ? " in the build context" : "")};
}

std::uint32_t mode_of(const llb::copy_action& what, const fs::file_info& info) {
    if (!what.mode_str.empty()) return apply_symbolic_mode(what.mode_str, info.permissions(), info.is_dir());
    return what.mode >= 0 ? static_cast<std::uint32_t>(what.mode) & 07777 : info.permissions();
}

std::optional<fs::file_time> time_of(const llb::copy_action& what) {
    if (what.timestamp < 0) return std::nullopt;
    return fs::file_time{what.timestamp / 1000000000, static_cast<std::uint32_t>(what.timestamp % 1000000000)};
}

fs::owner owner_of(const copy_job& job, const fs::file_info& info) {
    if (job.owner) return *job.owner;
    return job.live != nullptr ? fs::owner{} : fs::owner{info.uid, info.gid};
}

class copier {
public:
    copier(const copy_job& job, cache::stat_memo* memo) : job_(job), memo_(memo) {}

    std::optional<digest> run() {
        const auto sources = find_sources(job_);
        for (const auto& source : sources) {
            if (!one(source, sources.size() > 1)) return std::nullopt;
        }
        for (const auto& required : job_.what.required_paths)
            if (!job_.from->stat(relative(required))) throw missing(job_, relative(required));
        return landed_.finish();
    }

private:
    bool one(const std::string& pattern, bool several) {
        const auto how = job_.what.follow_symlink || job_.live != nullptr ? fs::links::follow : fs::links::keep;
        const std::string source = job_.from->resolve(pattern, how);
        const auto info = job_.from->stat(source);
        if (!info) throw missing(job_, pattern);
        const selection chosen(job_, source);
        if (chosen("", *info) == fs::copy_verdict::skip) throw missing(job_, pattern);
        const bool contents = info->is_dir() && job_.what.dir_copy_contents;
        landed_.source(contents ? "" : base_name(pattern));
        // A directory's own attributes count as the source has them: where it lands may exist already.
        if (info->is_dir()) add(landed_entry{"", *info, nullptr, ""});
        if (job_.to == nullptr) return remembered(source, *info, chosen);
        const std::string dest = prepare_destination(base_name(pattern), contents, several);
        if (job_.what.attempt_unpack && info->is_file() && unpacked(source, dest)) return true;
        copy(source, dest, chosen);
        return true;
    }

    /// Makes the directories above and tells the path to write to.
    std::string prepare_destination(const std::string& name, bool contents, bool several) {
        const bool slash = job_.what.dest.ends_with('/') || job_.what.dest.ends_with("/.");
        std::string dest = relative(job_.what.dest);
        if (job_.what.create_dest_path) {
            const std::string above = slash || several ? dest : dest.substr(0, dest.rfind('/') == std::string::npos ? 0 : dest.rfind('/'));
            if (!above.empty()) job_.to->make_dirs(above, 0755, job_.owner.value_or(fs::owner{}), time_of(job_.what));
        }
        if (contents) return dest;
        const auto there = job_.to->stat(dest, fs::links::follow);
        return slash || several || (there && there->is_dir()) ? join(dest, name) : dest;
    }

    bool unpacked(const std::string& source, const std::string& dest_file) {
        const auto file = job_.from->open(source, O_RDONLY);
        if (!archive::is_add_archive(file.get())) return false;
        std::string dest = relative(job_.what.dest);
        if (job_.to->stat(dest, fs::links::follow) == std::nullopt) job_.to->make_dirs(dest, 0755, job_.owner.value_or(fs::owner{}), time_of(job_.what));
        (void)dest_file;
        hasher content;
        fs::hash_file(file.get(), content);
        if (::lseek(file.get(), 0, SEEK_SET) != 0) throw_errno(cat("reading ", source));
        archive::extract_plain(archive::open_add_archive(file.get()), *job_.to, dest, {.who = job_.owner});
        const auto sum = content.finish();
        const auto info = *job_.from->stat(source);
        add({"", info, &sum, ""});
        return true;
    }

    void copy(const std::string& source, const std::string& dest, const selection& chosen) {
        fs::copy_options options;
        options.hash = job_.live != nullptr;
        if (job_.owner) options.who = job_.owner;
        else if (job_.live != nullptr) options.who = fs::owner{};
        if (!job_.what.mode_str.empty() || job_.what.mode >= 0) options.mode = [this](const fs::file_info& i) { return mode_of(job_.what, i); };
        options.mtime = time_of(job_.what);
        options.filter = [&chosen](std::string_view path, const fs::file_info& info) { return chosen(path, info); };
        if (job_.live != nullptr) watch(options, chosen);
        auto [from_dir, from_name] = source.empty() ? std::pair{job_.from->open("", O_RDONLY | O_DIRECTORY), std::string(".")} : job_.from->parent(source);
        std::string target = job_.to->resolve(dest, fs::links::keep);
        if (target.empty()) {
            fs::copy_tree(from_dir.get(), from_name, job_.to->fd(), ".", options);
            return;
        }
        // A directory is merged through a link that names a directory; anything else replaces the link's place.
        if (const auto there = job_.to->stat(target); there && there->is_link())
            if (const auto behind = job_.to->stat(target, fs::links::follow); behind && behind->is_dir()) target = job_.to->resolve(dest, fs::links::follow);
        auto [to_dir, to_name] = job_.to->parent(target);
        fs::copy_tree(from_dir.get(), from_name, to_dir.get(), to_name, options);
    }

    /// Digests what lands, and remembers each file's digest by the stat it had before: copy_tree makes sure that it was the
    /// same afterwards.
    void watch(fs::copy_options& options, const selection& chosen) {
        options.keep_hard_links = false;
        options.xattr = [](std::string_view) { return false; };
        options.filter = [this, &chosen](std::string_view path, const fs::file_info& info) {
            const auto verdict = chosen(path, info);
            if (verdict != fs::copy_verdict::skip && info.is_file())
                seen_.insert_or_assign(std::string(path), std::pair{info, std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now())});
            return verdict;
        };
        options.done = [this](const fs::copied_entry& e) {
            if (e.path.empty() && e.info.is_dir()) return;
            landed_.add(e.path, e.info, e.info.permissions(), {e.info.uid, e.info.gid}, e.link, e.content, {});
            const auto before = seen_.find(std::string(e.path));
            if (before == seen_.end()) return;
            if (memo_ != nullptr && e.content != nullptr) {
                const auto key = cache::key_of(file_system(), before->second.first);
                memo_->remember(key, before->second.second, key, {*e.content, {}});
            }
            seen_.erase(before);
        };
    }

    std::uint64_t file_system() {
        if (!file_system_) file_system_ = cache::file_system_of(job_.from->fd());
        return *file_system_;
    }

    /// What copy() would tell `landed_`, from remembered stats alone; false when a file is not remembered.
    bool remembered(const std::string& source, const fs::file_info& info, const selection& chosen) {
        if (job_.what.attempt_unpack && info.is_file()) {
            const auto file = job_.from->open(source, O_RDONLY);
            if (archive::is_add_archive(file.get())) return add_remembered("", info, file.get(), "");
        }
        if (!info.is_dir()) {
            const auto [dir, name] = job_.from->parent(source);
            return add_remembered("", info, dir.get(), name);
        }
        const auto start = job_.from->open(source, O_RDONLY | O_DIRECTORY);
        std::vector<std::pair<std::string, fs::file_info>> waiting;  // directories entered for what may stand below them
        bool known = true;
        fs::walk(start.get(), [&](const fs::walk_entry& e) {
            const auto verdict = chosen(e.path, e.info);
            if (verdict == fs::copy_verdict::skip || e.info.is_socket()) return e.info.is_dir() ? fs::walk_step::skip_dir : fs::walk_step::go_on;
            while (!waiting.empty() && !e.path.starts_with(waiting.back().first + "/")) waiting.pop_back();
            if (verdict == fs::copy_verdict::descend) {
                waiting.emplace_back(std::string(e.path), e.info);
                return fs::walk_step::go_on;
            }
            for (const auto& [path, above] : waiting) add_remembered(path, above, -1, "");
            waiting.clear();
            known = add_remembered(e.path, e.info, e.dir_fd, e.name);
            return known ? fs::walk_step::go_on : fs::walk_step::stop;
        });
        return known;
    }

    bool add_remembered(std::string_view path, const fs::file_info& info, int dir, std::string_view name) {
        std::optional<digest> content;
        std::string link;
        if (info.is_link()) link = fs::read_link_at(dir, name);
        if (info.is_file()) {
            if (memo_ == nullptr) return false;
            const auto value = memo_->find(cache::key_of(file_system(), info));
            if (!value) return false;
            content = value->data;
        }
        add({path, info, content ? &*content : nullptr, link});
        return true;
    }

    struct landed_entry {
        std::string_view path;
        const fs::file_info& info;
        const digest* content;
        std::string_view link;
    };
    void add(const landed_entry& e) { landed_.add(e.path, e.info, mode_of(job_.what, e.info), owner_of(job_, e.info), e.link, e.content, {}); }

    const copy_job& job_;
    cache::stat_memo* memo_;
    landing landed_;
    std::optional<std::uint64_t> file_system_;
    std::map<std::string, std::pair<fs::file_info, std::chrono::sys_time<nanoseconds>>> seen_;
};

}  // namespace

std::optional<digest> run_copy(const copy_job& job, cache::stat_memo* memo) { return copier(job, memo).run(); }

async::task<std::shared_ptr<chain_value>> as_chain(environment& env, solver::result value, std::string select) {
    if (auto chain = std::dynamic_pointer_cast<chain_value>(value)) co_return chain;
    if (!value) co_return std::make_shared<chain_value>();
    const auto local = std::dynamic_pointer_cast<local_value>(value);
    if (!local) throw error{errc::internal, "an input of a step is neither a chain of layers nor a directory"};
    auto target = co_await env.snapshots.begin({});
    co_await env.pool.run([&] {
        const fs::root to{unique_fd{::openat(target.upper(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)}};
        copy_job job{.from = &local->root, .live = local.get(), .to = &to};
        job.what.src = select.empty() ? "/" : select;
        job.what.dest = relative(job.what.src).empty() ? "/" : cat("/", relative(job.what.src));
        job.what.dir_copy_contents = true;
        job.what.create_dest_path = true;
        run_copy(job, nullptr);
    });
    const chain_value nothing;
    co_return with_layer(nothing, co_await env.snapshots.commit(std::move(target), {.kind = "source.local", .description = cat("local source ", local->name)}));
}

}  // namespace cobuild::ops

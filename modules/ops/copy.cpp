module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <compare>
#include <cstddef>
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

/// Of a relative path; "" where nothing stands above.
std::string parent_of(std::string_view path) {
    const auto slash = path.rfind('/');
    return slash == std::string_view::npos ? std::string() : std::string(path.substr(0, slash));
}

/// Of a client's file only what an unprivileged client could have sent counts, and capabilities.
bool client_xattr(std::string_view key) { return key == "security.capability" || (key.starts_with("user.") && !key.starts_with("user.overlay.")); }

std::string relative(std::string_view path) {
    std::string clean = fs::clean_path(cat("/", path));
    clean.erase(0, 1);
    return clean;
}

/// What a copy takes below its source: the client's rules and the action's own patterns.
class selection {
public:
    /// A source that is a single file is matched by `name`, which is what the user called it.
    selection(const copy_job& job, std::string source, std::string name)
        : job_(job), source_(std::move(source)), name_(std::move(name)), include_(job.what.include_patterns), exclude_(job.what.exclude_patterns) {}

    /// `path` is relative to the source, "" for the source itself.
    [[nodiscard]] fs::copy_verdict operator()(std::string_view path, const fs::file_info& info) const {
        const auto client = job_.live != nullptr ? job_.live->verdict(join(source_, path), info.is_dir()) : fs::copy_verdict::take;
        return both(client, by_action(path, info));
    }

    [[nodiscard]] fs::copy_verdict by_action(std::string_view path, const fs::file_info& info) const {
        const std::string_view own = path.empty() && !info.is_dir() ? std::string_view(name_) : path;
        if (own.empty()) return fs::copy_verdict::take;
        const auto verdict = both(excluded_by(exclude_, own, info.is_dir()), included_by(include_, own, info.is_dir()));
        return verdict == fs::copy_verdict::descend ? fs::copy_verdict::way : verdict;
    }

private:
    const copy_job& job_;
    std::string source_, name_;
    fs::ignore_patterns include_, exclude_;
};

/// The digest of what a copy brings, entry by entry in path order; no time counts.
class landing {
public:
    void source(std::string_view dest) { field("S"), field(dest); }
    void add(std::string_view path, const fs::file_info& info, std::uint32_t mode, fs::owner who, std::string_view link, const digest* content,
             const digest& xattrs) {
        ++entries_;
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
    [[nodiscard]] std::size_t entries() const { return entries_; }
    digest finish() { return hash_.finish(); }

private:
    void field(std::string_view text) {
        number(text.size());
        hash_.update(text);
    }
    void number(std::uint64_t n) { hash_.update(bytes_of(std::string_view(reinterpret_cast<const char*>(&n), sizeof n))); }
    hasher hash_;
    std::size_t entries_ = 0;
};

bool hidden(const copy_job& job, std::string_view path, const fs::file_info& info) {
    return job.live != nullptr && job.live->verdict(path, info.is_dir()) == fs::copy_verdict::skip;
}

/// Sources that the action names, in path order. Live directories show only what their rules leave.
std::vector<std::string> find_sources(const copy_job& job) {
    const std::string path = relative(job.what.src);
    if (!job.what.allow_wildcard || !fs::has_wildcard(path)) return {path};
    auto found = expand_wildcard(*job.from, path, job.what.follow_symlink || job.live != nullptr);
    std::erase_if(found, [&](const std::string& f) {
        const auto info = *job.from->stat(f);
        return info.is_socket() || hidden(job, f, info);
    });
    if (found.empty() && !job.what.allow_empty_wildcard) throw error{errc::not_found, cat(quoted(job.what.src), ": nothing matches this pattern")};
    return found;
}

error missing(const copy_job& job, std::string_view path) {
    const std::string shown = cat("/", path);
    if (job.live != nullptr && job.live->excluded.matches(path))
        return {errc::not_found, cat(quoted(shown), ": not found, the ignore file excludes it")};
    return {errc::not_found, cat(quoted(shown), ": not found", job.live != nullptr ? " in the build context" : "")};
}

/// The path without links; throws when there is nothing to see, whether by its given name or where it leads.
std::string resolve_source(const copy_job& job, const std::string& path) {
    const auto named = job.from->stat(path);
    if (!named || hidden(job, path, *named)) throw missing(job, path);
    // Clients resolve links of their own directory; a chain's are followed where the action says so.
    const std::string source = job.from->resolve(path, job.what.follow_symlink || job.live != nullptr ? fs::links::follow : fs::links::keep);
    const auto info = job.from->stat(source);
    if (!info || hidden(job, source, *info)) throw missing(job, path);
    return source;
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
            const auto before = landed_.entries();
            if (!one(source, sources.size() > 1)) return std::nullopt;
            // A directory that the client hides but for exceptions, and there are none.
            const bool by_name = !source.empty() && source == relative(job_.what.src);
            if (job_.live != nullptr && by_name && landed_.entries() == before && job_.live->excluded.matches(source)) throw missing(job_, source);
        }
        for (const auto& required : job_.what.required_paths) resolve_source(job_, relative(required));
        if (const auto time = time_of(job_.what))
            for (const auto& dir : made_) job_.to->set_mtime(dir, *time);  // what was put into them moved it
        return landed_.finish();
    }

private:
    bool one(const std::string& path, bool several) {
        const std::string source = resolve_source(job_, path);
        const auto info = *job_.from->stat(source);
        // No layer can hold a socket; clients do not even send it.
        if (info.is_socket()) {
            if (job_.live != nullptr) throw error{errc::not_found, cat(quoted(cat("/", path)), " is a socket, which no image can hold")};
            return true;
        }
        const selection chosen(job_, source, base_name(path));
        // What the action itself excludes is no mistake: "COPY --exclude=*.md hom* /d/".
        if (chosen.by_action("", info) == fs::copy_verdict::skip) return true;
        const bool contents = info.is_dir() && job_.what.dir_copy_contents;
        landed_.source(contents ? "" : base_name(path));
        // Of a directory whose contents are meant nothing lands but these; otherwise it counts as the source has it, since where
        // it lands it may exist already.
        if (info.is_dir() && !contents) add(landed_entry{"", info, nullptr, "", {}});
        if (job_.to == nullptr) return remembered(source, info, chosen);
        const std::string dest = prepare_destination(base_name(path), info.is_dir(), several);
        if (job_.what.attempt_unpack && info.is_file() && unpacked(source)) return true;
        copy(source, dest, chosen);
        return true;
    }

    void make_dirs(const std::string& path) {
        // An octal --chmod is for the directories above as well (BuildKit's rule), a symbolic one is not.
        const bool octal = job_.what.mode_str.empty() && job_.what.mode >= 0;
        const std::uint32_t mode = octal ? static_cast<std::uint32_t>(job_.what.mode) & 0777 : 0755;
        const auto made = job_.to->make_dirs(path, mode, job_.owner.value_or(fs::owner{}), time_of(job_.what));
        made_.insert(made_.end(), made.begin(), made.end());
    }

    /// Makes the directories above, for contents the one they go into, and tells the path to write to, without links.
    std::string prepare_destination(const std::string& name, bool directory, bool several) {
        const bool slash = several || job_.what.dest.ends_with('/') || job_.what.dest.ends_with("/.");
        const bool contents = directory && job_.what.dir_copy_contents;
        const std::string named = relative(job_.what.dest);
        const std::string above = parent_of(named);
        if (!job_.what.create_dest_path && !job_.to->stat(above, fs::links::follow))
            throw error{errc::not_found, cat("copying to ", job_.what.dest, ": the directory ", quoted(cat("/", above)), " does not exist")};
        make_dirs(slash ? named : above);
        // A link as the last component is followed, dangling or not: what it names is written, never the link replaced.
        const std::string dest = job_.to->resolve(named, fs::links::follow);
        const auto there = job_.to->stat(dest);
        if (contents) {
            if (!there) make_dirs(dest);
            return dest;
        }
        const bool into = there && (directory || there->is_dir());
        make_dirs(into ? dest : parent_of(dest));
        return into ? join(dest, name) : dest;
    }

    /// ADD: an archive's content goes into the directory that the destination names.
    bool unpacked(const std::string& source) {
        const auto file = job_.from->open(source, O_RDONLY);
        if (!archive::is_add_archive(file.get())) return false;
        const std::string dest = relative(job_.what.dest);
        if (!job_.to->stat(dest, fs::links::follow)) make_dirs(dest);
        std::optional<cache::hashed_file> read;
        if (job_.live != nullptr) read = cache::hash_file(file.get(), file_system(), source, memo_);
        archive::extract_plain(archive::open_add_archive(file.get()), *job_.to, dest, {.who = job_.owner});
        if (!read) return true;
        const auto after = *fs::stat_at(file.get(), "");
        if (after.size != read->info.size || after.mtime != read->info.mtime || after.ctime != read->info.ctime)
            throw error{errc::io, cat(quoted(source), " changed while it was unpacked")};
        add({"", read->info, &read->value.data, "", {}});
        return true;
    }

    void copy(const std::string& source, const std::string& target, const selection& chosen) {
        fs::copy_options options;
        options.hash = job_.live != nullptr;
        if (job_.owner)
            options.who = job_.owner;
        else if (job_.live != nullptr)
            options.who = fs::owner{};
        if (!job_.what.mode_str.empty() || job_.what.mode >= 0) options.mode = [this](const fs::file_info& i) { return mode_of(job_.what, i); };
        options.mtime = time_of(job_.what);
        options.replace = job_.what.always_replace_existing;
        options.filter = [&chosen](std::string_view path, const fs::file_info& info) { return chosen(path, info); };
        if (job_.live != nullptr) watch(options, chosen);
        auto [from_dir, from_name] =
            source.empty() ? std::pair{job_.from->open("", O_RDONLY | O_DIRECTORY), std::string(".")} : job_.from->parent(source);
        if (target.empty()) {
            fs::copy_tree(from_dir.get(), from_name, job_.to->fd(), ".", options);
            return;
        }
        auto [to_dir, to_name] = job_.to->parent(target);
        fs::copy_tree(from_dir.get(), from_name, to_dir.get(), to_name, options);
    }

    /// Digests what lands, and remembers each file's digest by the stat it had before: copy_tree makes sure that it was the
    /// same afterwards.
    void watch(fs::copy_options& options, const selection& chosen) {
        options.xattr = client_xattr;
        options.filter = [this, &chosen](std::string_view path, const fs::file_info& info) {
            const auto verdict = chosen(path, info);
            if (verdict != fs::copy_verdict::skip && info.is_file())
                seen_.insert_or_assign(std::string(path),
                                       std::pair{info, std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now())});
            return verdict;
        };
        options.done = [this](const fs::copied_entry& e) {
            if (e.path.empty() && e.info.is_dir()) return;
            // Of a directory on the way the source's attributes count whether they were taken or not.
            const auto xattrs = cache::xattrs_digest({e.xattrs.begin(), e.xattrs.end()});
            landed_.add(e.path, e.info, e.info.permissions(), {e.info.uid, e.info.gid}, e.link, e.content, xattrs);
            const auto before = seen_.find(std::string(e.path));
            if (before == seen_.end()) return;
            if (memo_ != nullptr && e.content != nullptr) {
                const auto key = cache::key_of(file_system(), before->second.first);
                memo_->remember(key, before->second.second, key, {*e.content, xattrs});
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
            if (archive::is_add_archive(file.get())) return add_remembered("", info, file.get(), "", false);
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
            if (verdict != fs::copy_verdict::take) {
                waiting.emplace_back(std::string(e.path), e.info);
                return fs::walk_step::go_on;
            }
            for (const auto& [path, above] : waiting) {
                const auto [dir, name] = job_.from->parent(join(source, path));
                add_remembered(path, above, dir.get(), name);
            }
            waiting.clear();
            known = add_remembered(e.path, e.info, e.dir_fd, e.name);
            return known ? fs::walk_step::go_on : fs::walk_step::stop;
        });
        return known;
    }

    bool add_remembered(std::string_view path, const fs::file_info& info, int dir, std::string_view name, bool attributes = true) {
        std::optional<digest> content;
        digest xattrs;
        std::string link;
        if (info.is_link()) link = fs::read_link_at(dir, name);
        if (info.is_file()) {
            if (memo_ == nullptr) return false;
            auto value = memo_->find(cache::key_of(file_system(), info));
            if (!value && job_.read) value = read_now(path, dir, name);
            if (!value) return false;
            content = value->data;
            if (attributes) xattrs = value->xattrs;
        }
        if (info.is_dir()) xattrs = client_xattrs(dir, name);
        add({path, info, content ? &*content : nullptr, link, xattrs});
        return true;
    }

    cache::file_value read_now(std::string_view path, int dir, std::string_view name) {
        const auto asked = std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now());
        const std::string own(name);
        const unique_fd file{name.empty() ? ::fcntl(dir, F_DUPFD_CLOEXEC, 0) : ::openat(dir, own.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC)};
        if (!file) throw_errno(cat("opening ", quoted(path.empty() ? own : std::string(path))));
        const auto read = cache::hash_file(file.get(), file_system(), path.empty() ? name : path, nullptr);
        const cache::file_value out{read.value.data, name.empty() ? digest{} : client_xattrs(dir, name)};
        const auto key = cache::key_of(file_system(), read.info);
        // An archive that is unpacked counts without its attributes: not for what copies it.
        if (!name.empty()) memo_->remember(key, asked, key, out);
        return out;
    }

    struct landed_entry {
        std::string_view path;
        const fs::file_info& info;
        const digest* content;
        std::string_view link;
        digest xattrs;
    };
    void add(const landed_entry& e) { landed_.add(e.path, e.info, mode_of(job_.what, e.info), owner_of(job_, e.info), e.link, e.content, e.xattrs); }

    static digest client_xattrs(int dir, std::string_view name) {
        std::vector<std::pair<std::string, std::string>> all;
        for (auto& key : fs::list_xattrs(dir, name))
            if (client_xattr(key))
                if (auto value = fs::get_xattr(dir, name, key)) all.emplace_back(std::move(key), std::move(*value));
        return cache::xattrs_digest(std::move(all));
    }

    const copy_job& job_;
    cache::stat_memo* memo_;
    landing landed_;
    std::optional<std::uint64_t> file_system_;
    std::vector<std::string> made_;  ///< directories above what is copied
    std::map<std::string, std::pair<fs::file_info, std::chrono::sys_time<nanoseconds>>> seen_;
};

/// Whether no directory of `path` from where the pattern's first wildcard stands is a link.
bool reached_without_links(const fs::root& root, std::string_view pattern, std::string_view path) {
    bool wild = false;
    std::size_t end = 0;
    for (const auto part : split(pattern, '/')) {
        wild = wild || fs::has_wildcard(part);
        end = path.find('/', end);
        if (end == std::string_view::npos) return true;
        if (wild)
            if (const auto info = root.stat(path.substr(0, end)); info && info->is_link()) return false;
        ++end;
    }
    return true;
}

}  // namespace

std::vector<std::string> expand_wildcard(const fs::root& root, std::string_view pattern, bool follow) {
    std::vector<std::string> found{""};
    bool literal = true;  // up to the first wildcard
    for (const auto part : split(pattern, '/')) {
        std::vector<std::string> next;
        for (const auto& dir : found) {
            // A backslash alone makes no pattern where a file has that very name.
            if (!fs::has_wildcard(part) || (part.find_first_of("*?[") == std::string_view::npos && root.stat(join(dir, part)))) {
                next.push_back(join(dir, part));
                continue;
            }
            const auto info = root.stat(dir, literal && follow ? fs::links::follow : fs::links::keep);
            if (!info || !info->is_dir()) continue;
            for (const auto& name : root.list(dir))
                if (fs::wildcard_match(part, name)) next.push_back(join(dir, name));
        }
        literal = literal && !fs::has_wildcard(part);
        found = std::move(next);
    }
    std::erase_if(found, [&](const std::string& f) { return !root.stat(f) || !reached_without_links(root, pattern, f); });
    return found;
}

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
        job.what.src = job.what.dest = cat("/", relative(select));
        // A directory that is selected keeps its own mode, the root of a layer its own.
        job.what.dir_copy_contents = job.what.src == "/";
        job.what.create_dest_path = true;
        run_copy(job, nullptr);
    });
    const chain_value nothing;
    co_return with_layer(
        nothing, co_await env.snapshots.commit(std::move(target), {.kind = "source.local", .description = cat("local source ", local->name)}));
}

}  // namespace cobuild::ops

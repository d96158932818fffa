module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.source;

import cobuild.fs;
import cobuild.remote;
import :git_run;

namespace cobuild::source {

namespace {

std::string pinned_ref(const git_commit& c) { return cat("refs/cobuild/", c.id); }

std::string missing_ref(const git_request& r) { return cat("repository does not contain ref ", quoted(r.ref), ": ", remote::redacted(r.remote)); }

/// One shared repository, while nobody else uses it.
struct locked_repository {
    async::semaphore::permit turn;  ///< in this process
    std::optional<fs::file_lock> lock;
    std::string path;
};

/// What a killed git left: lock files, and packs half received.
void remove_stale(const std::string& path) {
    const fs::root root(path);
    std::vector<std::string> stale;
    fs::walk(root.fd(), [&](const fs::walk_entry& e) {
        if (e.info.is_file() && (e.name.ends_with(".lock") || e.name.starts_with("tmp_"))) stale.emplace_back(e.path);
        return fs::walk_step::go_on;
    });
    for (const auto& file : stale) root.remove_all(file);
}

/// The commit a line of ls-remote gives for the ref; branches come before tags, as in git checkout.
std::optional<git_commit> pick_ref(std::string_view listing, const std::string& wanted, bool keep_tags) {
    std::map<std::string, std::string, std::less<>> refs;
    for (const auto line : split(listing, '\n')) {
        const auto tab = line.find('\t');
        if (tab == std::string_view::npos || !remote::is_commit(line.substr(0, tab))) continue;
        refs.emplace(line.substr(tab + 1), line.substr(0, tab));
    }
    std::vector<std::string> names;
    if (wanted.empty() || wanted == "HEAD")
        names = {"HEAD"};
    else if (wanted.starts_with("refs/"))
        names = {wanted};
    else
        names = {cat("refs/heads/", wanted), cat("refs/tags/", wanted), cat("refs/", wanted)};
    for (const auto& name : names) {
        if (const auto peeled = refs.find(cat(name, "^{}")); peeled != refs.end() && !keep_tags) return git_commit{peeled->second, name};
        if (const auto found = refs.find(name); found != refs.end()) {
            const auto peeled = refs.find(cat(name, "^{}"));
            return git_commit{peeled != refs.end() ? peeled->second : found->second, name};
        }
    }
    return std::nullopt;
}

/// Failures after which the same thing is asked for in another way.
bool another_way(const git_result& r) {
    for (const auto* sign : {"not our ref", "unadvertised object", "depth", "shallow", "dumb http", "no such remote ref", "couldn't find remote ref"})
        if (r.err.find(sign) != std::string::npos) return true;
    return false;
}

}  // namespace

struct git_repositories::state {
    cobuild::state::directory& directory;
    snapshot::store& snapshots;
    process::spawner& programs;
    std::map<std::string, std::shared_ptr<async::semaphore>> turns;

    async::task<locked_repository> open(const git_request& r, bool sha256);
    async::task<git_runner> runner(git_request r, git_access access, std::string repository);
    async::task<void> fetch(const git_runner& git, const git_request& r, const git_commit& c);
    async::task<void> bring(const git_runner& git, const git_request& r, const git_commit& c, const std::string& path, progress::writer progress);
    async::task<void> plain_checkout(const git_runner& git, const git_commit& c, std::string into);
    async::task<void> full_checkout(const git_runner& git, const git_request& r, const git_commit& c, std::string into);
};

git_repositories::git_repositories(cobuild::state::directory& directory, snapshot::store& snapshots, process::spawner& programs)
    : state_(std::make_shared<state>(state{directory, snapshots, programs, {}})) {}
git_repositories::~git_repositories() = default;

/// Takes the turn in this process, then the lock between processes.
async::task<locked_repository> git_repositories::state::open(const git_request& r, bool sha256) {
    const auto name = cat(digest::of(r.remote).hex().substr(0, 40), sha256 ? "-sha256" : "");
    auto& turn = turns[name];
    if (!turn) turn = std::make_shared<async::semaphore>(1);
    locked_repository out;
    out.turn = co_await std::shared_ptr<async::semaphore>(turn)->acquire();
    const auto dir = co_await directory.pool().run([&] { return directory.subdir("git"); });
    for (;;) {
        out.lock =
            co_await directory.pool().run([&] { return fs::file_lock::try_acquire(dir.get(), cat(name, ".lock"), fs::file_lock::kind::exclusive); });
        if (out.lock) break;
        co_await async::sleep_for(std::chrono::milliseconds(20));
    }
    out.path = cat(directory.root(), "/git/", name);
    co_await directory.pool().run([&] {
        if (fs::stat_at(dir.get(), name)) remove_stale(out.path);
    });
    co_return out;
}

async::task<git_runner> git_repositories::state::runner(git_request r, git_access access, std::string repository) {
    co_await directory.pool().run([&] { (void)directory.subdir("git/home"); });
    git_runner git(programs, r.remote, std::move(repository), cat(directory.root(), "/git/home"));
    co_await git.log_in(r, std::move(access));
    co_return git;
}

async::task<git_commit> git_repositories::resolve(git_request r, git_access access, progress::writer progress) {
    auto s = state_;
    remote::check_ref(r.ref);
    git_commit out{r.ref, ""};
    if (!remote::is_commit(r.ref)) {
        auto line = progress.begin(cat("resolving ", r.ref.empty() ? "HEAD" : r.ref));
        auto git = co_await s->runner(r, std::move(access), cat(s->directory.root(), "/git/home"));
        const std::string name = r.ref.empty() ? "HEAD" : r.ref;
        const auto listing = co_await git.must({"ls-remote", "--", r.remote, name, cat(name, "^{}")});
        const auto found = pick_ref(listing.out, r.ref, false);
        if (!found) throw error{errc::not_found, missing_ref(r)};
        out = *found;
        line.done();
    }
    if (!out.id.starts_with(r.checksum))
        throw error{errc::corrupt, cat("expected checksum to match ", r.checksum, ", got ", out.id, " for ", remote::redacted(r.remote),
                                       r.ref.empty() ? "" : cat("#", r.ref))};
    co_return out;
}

/// Brings the commit into the shared repository, unless it is there: without history where that goes.
async::task<void> git_repositories::state::fetch(const git_runner& git, const git_request& r, const git_commit& c) {
    const auto there = [&git, &c]() -> async::task<bool> { co_return (co_await git.run({"cat-file", "-e", cat(c.id, "^{commit}")})).ok; };
    if ((co_await git.run({"rev-parse", "--verify", "--quiet", pinned_ref(c)})).ok && co_await there()) co_return;
    std::vector<std::vector<std::string>> ways;
    ways.push_back({"--depth=1", "--no-tags", "--", r.remote, c.id});
    if (!c.ref.empty()) {
        ways.push_back({"--depth=1", "--no-tags", "--", r.remote, c.ref});
        ways.push_back({"--no-tags", "--", r.remote, c.ref});
    }
    ways.push_back({"--", r.remote, "+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*"});
    ways.push_back({"--unshallow", "--", r.remote, "+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*"});
    std::string why;
    for (auto& way : ways) {
        way.insert(way.begin(), {"fetch", "--force", "--no-recurse-submodules", "--no-auto-gc", "--update-shallow", "--no-write-fetch-head"});
        const auto result = co_await git.run(way);
        if (!result.ok && !another_way(result)) throw git.failure(result);
        if (co_await there()) {
            co_await git.must({"update-ref", pinned_ref(c), c.id});
            co_return;
        }
    }
    throw error{errc::not_found, cat("the repository ", remote::redacted(r.remote), " does not contain the commit ", c.id)};
}

/// Writes the files of a commit straight from the shared repository.
async::task<void> git_repositories::state::plain_checkout(const git_runner& git, const git_commit& c, std::string into) {
    const auto index = cat(directory.root(), "/git/home/index-", directory.fresh_name());
    const auto remove_index = scope_exit([&index] { ::unlink(index.c_str()); });
    const auto here = git.with_work_tree(std::move(into), index);
    co_await here.must({"read-tree", c.id});
    co_await here.must({"checkout-index", "--all", "--force"});
}

/// A repository of its own, with submodules; .git stays or goes afterwards.
async::task<void> git_repositories::state::full_checkout(const git_runner& git, const git_request& r, const git_commit& c, std::string into) {
    const auto own = git.in(cat(into, "/.git"), into);
    co_await own.must({"init", "--quiet", cat("--object-format=", c.id.size() == 64 ? "sha256" : "sha1"), "--", into});
    const bool tag = c.ref.starts_with("refs/tags/");
    co_await own.local_files().must({"fetch", "--quiet", "--depth=1", "--no-tags", "--", cat("file://", git.repository()),
                                     cat(pinned_ref(c), ":", tag ? c.ref : "refs/cobuild")});
    co_await own.must({"checkout", "--quiet", "--detach", "--force", c.id, "--"});
    if (!tag) co_await own.must({"update-ref", "-d", "refs/cobuild"});
    co_await own.must({"remote", "add", "--", "origin", r.remote});
    if (r.submodules) {
        const auto shallow = co_await own.run({"submodule", "--quiet", "update", "--init", "--recursive", "--depth=1"});
        if (!shallow.ok && !another_way(shallow)) throw own.failure(shallow);
        if (!shallow.ok) co_await own.must({"submodule", "--quiet", "update", "--init", "--recursive"});
    }
    co_await own.must({"remote", "set-url", "origin", "--", remote::redacted(r.remote)});
    co_await own.run({"reflog", "expire", "--all", "--expire=now"});
}

namespace {

/// What was checked out as it is to be seen: the subdirectory alone, .git where it stays, times.
void arrange(const fs::root& from, const fs::root& to, const git_request& r, std::int64_t committed) {
    if (!r.keep_git_dir) {
        std::vector<std::string> links;
        fs::walk(from.fd(), [&](const fs::walk_entry& e) {
            if (e.name == ".git") links.emplace_back(e.path);
            return e.name == ".git" ? fs::walk_step::skip_dir : fs::walk_step::go_on;
        });
        for (const auto& link : links) from.remove_all(link);
    } else {
        from.remove_all(".git/FETCH_HEAD");
    }
    if (!r.subdir.empty()) {
        const auto info = [&] {
            try {
                return from.stat(r.subdir, fs::links::refuse);
            } catch (const error&) {
                return std::optional<fs::file_info>();
            }
        }();
        if (!info || !info->is_dir())
            throw error{errc::not_found,
                        cat("the subdirectory ", quoted(r.subdir), " is no directory of the repository ", remote::redacted(r.remote))};
        const auto inside = from.open(r.subdir, O_RDONLY | O_DIRECTORY, fs::links::refuse);
        for (const auto& name : fs::list_dir(inside.get()))
            if (::renameat(inside.get(), name.c_str(), to.fd(), name.c_str()) != 0) throw_errno(cat("moving ", name));
        if (r.keep_git_dir && from.stat(".git") && ::renameat(from.fd(), ".git", to.fd(), ".git") != 0) throw_errno("moving .git");
    }
    if (!r.commit_time) return;
    std::vector<std::string> all;
    fs::walk(to.fd(), [&](const fs::walk_entry& e) {
        all.emplace_back(e.path);
        return fs::walk_step::go_on;
    });
    for (auto at = all.rbegin(); at != all.rend(); ++at) to.set_mtime(*at, {committed, 0});
}

unique_fd open_upper(const snapshot::writable& w) { return unique_fd{::openat(w.upper(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)}; }

std::string path_of(int fd) {
    std::string out(4096, '\0');
    const auto n = ::readlink(cat("/proc/self/fd/", fd).c_str(), out.data(), out.size());
    if (n < 0) throw_errno("finding the path of a layer");
    out.resize(static_cast<std::size_t>(n));
    return out;
}

}  // namespace

/// With the commit in the repository.
async::task<void> git_repositories::state::bring(const git_runner& git, const git_request& r, const git_commit& c, const std::string& path,
                                                 progress::writer progress) {
    if (!co_await directory.pool().run([&] { return ::access(cat(path, "/HEAD").c_str(), F_OK) == 0; }))
        co_await git.must({"init", "--quiet", "--bare", cat("--object-format=", c.id.size() == 64 ? "sha256" : "sha1"), "--", path});
    auto fetching = progress.begin(cat("fetching ", c.id));
    co_await fetch(git, r, c);
    fetching.done();
}

async::task<std::string> git_repositories::commit_object(git_request r, git_commit c, git_access access, progress::writer progress) {
    auto s = state_;
    const auto repository = co_await s->open(r, c.id.size() == 64);
    const auto git = co_await s->runner(r, std::move(access), repository.path);
    co_await s->bring(git, r, c, repository.path, progress);
    co_return (co_await git.must({"cat-file", "commit", c.id})).out;
}

async::task<git_tree> git_repositories::checkout(git_request r, git_commit c, git_access access, progress::writer progress) {
    auto s = state_;
    const auto repository = co_await s->open(r, c.id.size() == 64);
    const auto git = co_await s->runner(r, std::move(access), repository.path);
    co_await s->bring(git, r, c, repository.path, progress);

    auto line = progress.begin(cat("checking out ", c.id));
    const auto time = co_await git.must({"show", "--no-patch", "--format=%ct", cat(c.id, "^{commit}")});
    git_tree out;
    std::from_chars(time.out.data(), time.out.data() + time.out.size(), out.committed);
    const bool modules = r.submodules && (co_await git.run({"cat-file", "-e", cat(c.id, ":.gitmodules")})).ok;
    auto layer = co_await s->snapshots.begin({});
    // With a subdirectory everything goes to a layer that is thrown away, so that attributes and submodules work as ever.
    std::optional<snapshot::writable> scratch;
    if (!r.subdir.empty()) scratch.emplace(co_await s->snapshots.begin({}));
    const fs::root from{open_upper(scratch ? *scratch : layer)};
    const fs::root to{open_upper(layer)};
    const auto into = path_of(from.fd());
    if (r.keep_git_dir || modules)
        co_await s->full_checkout(git, r, c, into);
    else
        co_await s->plain_checkout(git, c, into);
    co_await s->directory.pool().run([&] { arrange(from, to, r, out.committed); });
    const auto made = co_await s->snapshots.commit(
        std::move(layer), {.kind = "source.git.checkout", .description = cat("git snapshot for ", remote::redacted(r.remote), "#", c.id)});
    line.done();
    out.chain.layers = {made.id};
    out.keep = made.keep;
    co_return out;
}

async::task<void> git_repositories::clear() {
    auto s = state_;
    co_await s->directory.pool().run([&] {
        const auto dir = s->directory.subdir("git");
        for (const auto& name : fs::list_dir(dir.get())) {
            if (!name.ends_with(".lock")) continue;
            // Locked while it goes, so nobody begins to use it meanwhile; the lock file itself stays.
            const auto lock = fs::file_lock::try_acquire(dir.get(), name, fs::file_lock::kind::exclusive);
            if (lock) s->directory.discard(dir.get(), name.substr(0, name.size() - 5));
        }
    });
}

}  // namespace cobuild::source

// Git repositories over loopback, served as plain files ("dumb" http), so that this process sees every request.
#include "support/support.hpp"

#include <fcntl.h>
#include <sys/stat.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "support/fake_registry.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import cobuild.state;
import cobuild.process;
import cobuild.snapshot;
import cobuild.progress;
import cobuild.source;

using namespace cobuild;
using namespace cobuild::async;
using namespace std::chrono_literals;
using test::fake_registry;
using test::fake_request;
using test::fake_response;
namespace stdfs = std::filesystem;

namespace {

/// Shows the files of a directory.
std::optional<fake_response> show(const stdfs::path& root, const fake_request& r) {
    const auto file = root / stdfs::path(r.path).relative_path();
    if (!stdfs::is_regular_file(file)) return fake_response{.status = 404};
    // On a server's thread, where Boost.Test's assertions must not be used.
    std::ifstream in(file, std::ios::binary);
    return fake_response{.headers = {{"Content-Type", "text/plain"}}, .body = {std::istreambuf_iterator<char>(in), {}}};
}

struct world {
    explicit world(runtime& r)
        : rt(r),
          d(state::directory::open((dir / "state").string(), rt.pool())),
          snapshots(snapshot::open_best(d)),
          repositories(*d, *snapshots, programs) {}

    /// One git command in a repository of its own; its output.
    task<std::string> git(std::string where, std::vector<std::string> args) {
        process::command c{
            .args = {"git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "init.defaultBranch=main", "-C", (dir / where).string()}};
        c.args.insert(c.args.end(), args.begin(), args.end());
        const auto done = co_await programs.capture(std::move(c));
        if (!done.status.ok()) BOOST_FAIL("git " << args.front() << ": " << done.err);
        co_return std::string(trim(done.out));
    }
    /// A commit with one file, and the repository as a server shows it.
    task<std::string> commit(std::string name, std::string file, std::string text) {
        if (!stdfs::exists(dir / name)) {
            stdfs::create_directories(dir / name);
            co_await git(name, {"init", "-q"});
        }
        test::write_file(dir / name / file, text);
        co_await git(name, {"add", "-A"});
        co_await git(name, {"commit", "-q", "-m", "x"});
        co_await git(name, {"update-server-info"});
        co_return co_await git(name, {"rev-parse", "HEAD"});
    }
    source::git_access access() {
        return {.secrets = [this](std::string id) -> task<std::optional<std::string>> {
                    const auto found = given.find(id);
                    co_return found == given.end() ? std::nullopt : std::optional(found->second);
                },
                .ssh_agent = {}};
    }
    task<source::git_tree> checkout(source::git_request r) {
        auto commit = co_await repositories.resolve(r, access(), {});
        co_return co_await repositories.checkout(r, commit, access(), {});
    }
    task<std::string> text(source::git_tree t, std::string path) {
        auto view = co_await snapshots->view(t.chain);
        const fs::root root(view.mount().duplicate());
        co_return root.stat(path) ? root.read_file(path, 1 << 20) : std::string("<absent>");
    }

    runtime& rt;
    test::scratch_dir dir;
    process::spawner programs;
    std::map<std::string, std::string> given;
    std::shared_ptr<state::directory> d;
    std::shared_ptr<snapshot::store> snapshots;
    source::git_repositories repositories;
};

/// Children of this process that are git.
std::size_t git_children() {
    std::size_t n = 0;
    for (const auto& entry : stdfs::directory_iterator("/proc")) {
        const auto name = entry.path().filename().string();
        if (name.find_first_not_of("0123456789") != std::string::npos) continue;
        std::ifstream in(entry.path() / "stat");
        std::string line;
        std::getline(in, line);
        const auto close = line.rfind(')');
        if (close == std::string::npos || line.find("(git") == std::string::npos) continue;
        const auto rest = line.substr(close + 2);  // "S <parent> ..."
        if (rest.starts_with("Z")) continue;
        if (std::atoi(rest.c_str() + 2) == ::getpid()) ++n;
    }
    return n;
}

}  // namespace

// O-SE-05: the token is for the main repository's host; a submodule elsewhere is cloned without it.
CO_TEST_CASE(o_se_05_the_token_goes_to_the_main_host_only) {
    world w(rt);
    fake_registry main, other;
    co_await w.commit("sub", "in-sub", "submodule\n");
    co_await w.commit("app", "a", "main\n");
    test::write_file(w.dir / "app/.gitmodules", cat("[submodule \"s\"]\n\tpath = s\n\turl = http://", other.host(), "/sub/.git\n"));
    const auto id = co_await w.git("sub", {"rev-parse", "HEAD"});
    co_await w.git("app", {"update-index", "--add", "--cacheinfo", cat("160000,", id, ",s")});
    co_await w.git("app", {"add", ".gitmodules"});
    co_await w.git("app", {"commit", "-q", "-m", "submodule"});
    co_await w.git("app", {"update-server-info"});
    const stdfs::path root = w.dir.path();
    main.on_request([root](const fake_request& r) -> std::optional<fake_response> {
        if (!r.headers.contains("authorization")) return fake_response{.status = 401, .headers = {{"WWW-Authenticate", "Basic realm=\"x\""}}};
        return show(root, r);
    });
    other.on_request([root](const fake_request& r) -> std::optional<fake_response> {
        if (r.headers.contains("authorization")) return fake_response{.status = 403};
        return show(root, r);
    });
    const source::git_request request{
        .remote = cat("http://", main.host(), "/app/.git"), .ref = "main", .subdir = {}, .checksum = {}, .known_hosts = {}};
    std::exception_ptr failed;
    try {
        (void)co_await w.checkout(request);
    } catch (...) {
        failed = std::current_exception();
    }
    BOOST_REQUIRE(failed != nullptr);
    BOOST_TEST((describe(failed).kind() == errc::unauthorized));
    BOOST_TEST(std::string_view(describe(failed).what()).find("GIT_AUTH_TOKEN") != std::string_view::npos);

    w.given["GIT_AUTH_TOKEN"] = "secret";
    main.forget_requests();
    const auto tree = co_await w.checkout(request);
    BOOST_TEST(co_await w.text(tree, "a") == "main\n");
    BOOST_TEST(co_await w.text(tree, "s/in-sub") == "submodule\n");
    BOOST_TEST(co_await w.text(tree, "s/.git") == "<absent>");
    BOOST_REQUIRE(!main.requests().empty());
    for (const auto& r : main.requests()) BOOST_TEST(r.headers.at("authorization") == cat("basic ", base64_encode("x-access-token:secret")));
    BOOST_REQUIRE(!other.requests().empty());
    for (const auto& r : other.requests()) BOOST_TEST(!r.headers.contains("authorization"));
}

// O-SE-06: a cancelled fetch leaves no git behind and nothing that stops the next one.
CO_TEST_CASE(o_se_06_a_cancelled_fetch_spoils_nothing) {
    world w(rt);
    fake_registry server;
    const auto first = co_await w.commit("app", "a", "one\n");
    const stdfs::path root = w.dir.path();
    struct gate {
        std::mutex m;
        std::condition_variable changed;
        bool open = false;
    };
    const auto slow = std::make_shared<gate>();
    event reached;
    server.on_request([root, slow, &reached](const fake_request& r) -> std::optional<fake_response> {
        if (r.path.find("/objects/") != std::string::npos) {
            std::unique_lock lock(slow->m);
            if (!slow->open) reached.set();
            slow->changed.wait(lock, [&] { return slow->open; });
        }
        return show(root, r);
    });
    const source::git_request request{
        .remote = cat("http://", server.host(), "/app/.git"), .ref = "main", .subdir = {}, .checksum = {}, .known_hosts = {}};
    task_group group(co_await current_executor);
    const auto work = [](world& of, source::git_request r) -> task<void> { (void)co_await of.checkout(std::move(r)); };
    group.spawn(work(w, request));
    co_await reached.wait();
    BOOST_TEST(git_children() > 0U);
    group.cancel();
    try {
        co_await group.join();
    } catch (...) {
        // The cancellation.
    }
    BOOST_TEST(git_children() == 0U);
    {
        const std::lock_guard lock(slow->m);
        slow->open = true;
    }
    slow->changed.notify_all();
    // What a git killed at a worse moment leaves.
    for (const auto& entry : stdfs::directory_iterator(w.dir / "state/git"))
        if (stdfs::exists(entry.path() / "HEAD")) test::write_file(entry.path() / "shallow.lock", "");
    const auto tree = co_await w.checkout(request);
    BOOST_TEST(co_await w.text(tree, "a") == "one\n");
    // And by its full id, after the branch went on.
    co_await w.commit("app", "a", "two\n");
    auto by_id = request;
    by_id.ref = first;
    BOOST_TEST(co_await w.text(co_await w.checkout(by_id), "a") == "one\n");
    BOOST_TEST(co_await w.text(co_await w.checkout(request), "a") == "two\n");
}

// An annotated tag is an object of its own that names a commit; without a ref the repository's own branch is meant.
CO_TEST_CASE(what_refs_mean_and_their_objects) {
    world w(rt);
    fake_registry server;
    server.on_request([&w](const fake_request& r) { return show(w.dir / "served", r); });
    const auto first = co_await w.commit("served", "a", "1");
    co_await w.git("served", {"tag", "-a", "v1", "-m", "release"});
    co_await w.git("served", {"tag", "light"});
    const auto second = co_await w.commit("served", "a", "2");
    const auto tag = co_await w.git("served", {"rev-parse", "v1"});
    source::git_request r{.remote = cat("http://", server.host(), "/.git")};
    const auto head = co_await w.repositories.resolve(r, w.access(), {});
    BOOST_TEST(head.id == second);
    BOOST_TEST(head.ref == "refs/heads/main");
    BOOST_TEST(head.tag.empty());
    r.ref = "light";
    const auto light = co_await w.repositories.resolve(r, w.access(), {});
    BOOST_TEST(light.id == first);
    BOOST_TEST(light.ref == "refs/tags/light");
    BOOST_TEST(light.tag.empty());
    r.ref = "v1";
    r.checksum = tag;  // the tag's own id counts as the commit's does
    const auto annotated = co_await w.repositories.resolve(r, w.access(), {});
    BOOST_TEST(annotated.id == first);
    BOOST_TEST(annotated.ref == "refs/tags/v1");
    BOOST_TEST(annotated.tag == tag);
    const auto objects = co_await w.repositories.objects(r, annotated, w.access(), {});
    BOOST_TEST(objects.commit.starts_with("tree "));
    BOOST_TEST(objects.tag.starts_with(cat("object ", first, "\ntype commit\ntag v1\n")));
    BOOST_TEST(objects.tag.ends_with("\n\nrelease\n"));
    BOOST_TEST(co_await w.text(co_await w.checkout(r), "a") == "1");
}

CO_TEST_CASE(only_safe_protocols_and_refs) {
    world w(rt);
    co_await w.commit("app", "a", "one\n");
    for (const auto& remote : {cat("file://", w.dir.path().string(), "/app"), std::string("ext::sh -c 'touch /tmp/never'")}) {
        std::exception_ptr failed;
        try {
            (void)co_await w.checkout({.remote = remote, .ref = "main", .subdir = {}, .checksum = {}, .known_hosts = {}});
        } catch (...) {
            failed = std::current_exception();
        }
        BOOST_REQUIRE_MESSAGE(failed != nullptr, remote);
        BOOST_TEST((describe(failed).kind() == errc::permission), describe(failed).what());
    }
}

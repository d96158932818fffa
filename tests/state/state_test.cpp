#include "support/child.hpp"
#include "support/support.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <array>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

import cobuild.base;
import cobuild.async;
import cobuild.db;
import cobuild.state;

using namespace cobuild;
using state::directory;
using test::child;
namespace fs = std::filesystem;

namespace {

std::size_t entries(const fs::path& dir) {
    std::size_t n = 0;
    for (const auto& e : fs::directory_iterator(dir)) {
        (void)e;
        ++n;
    }
    return n;
}

std::optional<errc> failure(const std::function<void()>& f) {
    try {
        f();
    } catch (const error& e) {
        BOOST_TEST_MESSAGE(e.what());
        return e.kind();
    }
    return std::nullopt;
}

struct undone {
    std::vector<std::string> texts;
    state::undo_handler handler() {
        return [this](state::undo u) -> async::task<void> {
            texts.push_back(u.text);
            co_return;
        };
    }
};

std::string file_of(const directory& d, const std::string& name) { return d.root() + "/" + name; }

}  // namespace

BOOST_AUTO_TEST_CASE(opening_makes_a_private_directory_and_closing_leaves_no_owner) {
    const test::scratch_dir dir;
    async::blocking_pool pool(2);
    const auto root = dir / "a";
    {
        const auto d = directory::open((root / "state").string() + "/", pool);
        struct stat st{};
        BOOST_REQUIRE(::stat((root / "state").c_str(), &st) == 0);
        BOOST_TEST((st.st_mode & 0777) == 0700u);
        BOOST_TEST(fs::exists(root / "state/owners" / d->owner()));
        const auto again = directory::open((root / "state").string(), pool);
        BOOST_TEST(again->owner() != d->owner());
        BOOST_TEST(d->others().size() == 1u);
        BOOST_TEST(d->others()[0] == "pid " + std::to_string(::getpid()));
        BOOST_TEST(d->fresh_name() != d->fresh_name());
    }
    BOOST_TEST(entries(root / "state/owners") == 0u);
}

CO_TEST_CASE(the_ledger_of_a_killed_process_is_replayed_newest_first) {
    const test::scratch_dir dir;
    child killed([&] {
        async::blocking_pool pool(1);
        const auto d = directory::open(dir.path().string(), pool);
        auto first = d->record("cni", "first");
        auto second = d->record("cni", "second\nline");
        auto gone = d->record("cni", "gone");
        gone.forget();
        auto other = d->record("cgroup", "path");
        child::reached();
        return 0;
    });
    BOOST_REQUIRE(killed.wait_reached());
    const auto d = directory::open(dir.path().string(), rt.pool());
    undone cni, cgroup;
    d->on_undo("cni", cni.handler());
    auto r = co_await d->recover();
    BOOST_TEST(r.dead_owners == 0u);  // it lives
    BOOST_TEST(killed.kill() == -SIGKILL);

    r = co_await d->recover();
    BOOST_TEST(r.dead_owners == 1u);
    BOOST_TEST(r.undone == 2u);
    BOOST_TEST(r.kept == 1u);
    BOOST_TEST((cni.texts == std::vector<std::string>{"second\nline", "first"}));

    d->on_undo("cgroup", [](state::undo) -> async::task<void> {
        throw error{errc::io, "not now"};
        co_return;
    });
    r = co_await d->recover();
    BOOST_TEST(r.kept == 1u);
    d->on_undo("cgroup", cgroup.handler());
    r = co_await d->recover();
    BOOST_TEST(r.undone == 1u);
    BOOST_TEST((cgroup.texts == std::vector<std::string>{"path"}));
    r = co_await d->recover();
    BOOST_TEST(r.dead_owners == 0u);
    BOOST_TEST(entries(dir / "ledger") == 0u);
}

CO_TEST_CASE(an_owner_that_died_at_birth_is_taken_away) {
    const test::scratch_dir dir;
    const auto d = directory::open(dir.path().string(), rt.pool());
    std::ofstream(dir / "owners/0123456789abcdef").flush();  // no text yet
    {
        const unique_fd opening(::open((dir / "open.lock").c_str(), O_RDWR | O_CLOEXEC));
        BOOST_REQUIRE(::flock(opening.get(), LOCK_EX | LOCK_NB) == 0);
        BOOST_TEST((co_await d->recover()).dead_owners == 0u);  // somebody is being born
    }
    BOOST_TEST((co_await d->recover()).dead_owners == 1u);
    BOOST_TEST(!std::filesystem::exists(dir / "owners/0123456789abcdef"));
}

CO_TEST_CASE(a_half_written_entry_was_never_done) {
    const test::scratch_dir dir;
    child killed([&] {
        ::setenv("COBUILD_CRASH_AT", "ledger-created", 1);
        async::blocking_pool pool(1);
        const auto d = directory::open(dir.path().string(), pool);
        (void)d->record("cni", "x");
        return 0;
    });
    BOOST_TEST(killed.wait() == -SIGKILL);
    const auto d = directory::open(dir.path().string(), rt.pool());
    const auto r = co_await d->recover();
    BOOST_TEST(r.dead_owners == 1u);
    BOOST_TEST(r.undone + r.kept == 0u);
    BOOST_TEST(entries(dir / "ledger") == 0u);
}

CO_TEST_CASE(an_entry_left_at_close_is_replayed_by_the_next) {
    const test::scratch_dir dir;
    {
        (void)directory::open(dir.path().string(), rt.pool())->record("cni", "left");
    }
    const auto d = directory::open(dir.path().string(), rt.pool());
    undone cni;
    d->on_undo("cni", cni.handler());
    BOOST_TEST((co_await d->recover()).undone == 1u);
}

CO_TEST_CASE(scratch_of_the_dead_goes_and_of_the_living_stays) {
    const test::scratch_dir dir;
    child killed([&] {
        async::blocking_pool pool(1);
        const auto d = directory::open(dir.path().string(), pool);
        for (const auto* place : {"steps", "content/ingest", "active"}) (void)d->subdir(cat(place, "/", d->fresh_name(), "/deep/er"));
        child::reached();
        return 0;
    });
    BOOST_REQUIRE(killed.wait_reached());
    const auto d = directory::open(dir.path().string(), rt.pool());
    (void)d->subdir("active/" + d->fresh_name());
    (void)d->subdir("active/0123456789abcdef-3");  // of nobody
    std::vector<std::string> told;
    d->on_dead_owner([&](const std::string& id) { told.push_back(id); });
    (void)co_await d->recover();
    BOOST_TEST(entries(dir / "active") == 2u);
    (void)killed.kill();
    (void)co_await d->recover();
    BOOST_TEST(entries(dir / "active") == 1u);
    BOOST_TEST(entries(dir / "steps") == 0u);
    BOOST_TEST(entries(dir / "content/ingest") == 0u);
    BOOST_TEST(told.size() == 1u);
    BOOST_TEST(entries(dir / "trash") == 4u);
    co_await d->empty_trash();
    BOOST_TEST(entries(dir / "trash") == 0u);
}

BOOST_AUTO_TEST_CASE(pins_hold_against_removal_in_every_process) {
    const test::scratch_dir dir;
    const unique_fd fd(::open(dir.path().c_str(), O_RDONLY | O_DIRECTORY));
    state::pin_table mine(fd.get(), "pins");
    child other([&] {
        state::pin_table theirs(fd.get(), "pins");
        auto p = theirs.hold(1ULL << 61);
        if (!p) return 1;
        child::reached();
        p.reset();
        child::reached();
        return 0;
    });
    BOOST_REQUIRE(other.wait_reached());
    BOOST_TEST(mine.pinned(1ULL << 61));
    BOOST_TEST(!mine.try_remove(1ULL << 61).has_value());
    BOOST_TEST(!mine.pinned(5));
    other.go();
    BOOST_REQUIRE(other.wait_reached());
    {
        const auto r = mine.try_remove(1ULL << 61);
        BOOST_TEST(r.has_value());
        BOOST_TEST(!mine.hold(1ULL << 61).has_value());
        BOOST_TEST(!mine.try_remove(1ULL << 61).has_value());
    }
    other.go();
    BOOST_TEST(other.wait() == 0);

    auto a = mine.hold(7);
    const auto b = a;
    auto c = *mine.hold(7);
    c += *mine.hold(8);
    a.reset();
    BOOST_TEST(mine.pinned(7));
    BOOST_TEST(!mine.try_remove(7).has_value());
    c = {};
    BOOST_TEST(!mine.pinned(8));
    BOOST_TEST(mine.pinned(7));  // by b
}

// O-EN-10
BOOST_AUTO_TEST_CASE(a_damaged_database_is_replaced_only_when_nobody_else_lives) {
    const test::scratch_dir dir;
    async::blocking_pool pool(1);
    constexpr std::array<std::string_view, 1> steps{"CREATE TABLE t(a)"};
    const auto root = dir.path().string();
    const auto spoil = [&](const char* name) {
        std::ofstream out(dir / name, std::ios::binary | std::ios::trunc);
        out << "this is not a database, whatever its name says, and it is long enough to be looked at as one";
    };
    {
        directory::open(root, pool)->database().migrate("t", steps);
    }
    spoil("state.db");
    {
        child other([&] {
            async::blocking_pool p(1);
            const auto d = directory::open(root, p);
            child::reached();
            return d->rebuilt() ? 0 : 1;
        });
        BOOST_REQUIRE(other.wait_reached());
        fs::remove(dir / "state.db-wal");
        fs::remove(dir / "state.db-shm");
        spoil("state.db");
        BOOST_TEST((failure([&] { directory::open(root, pool); }) == errc::corrupt));
        other.go();
        BOOST_TEST(other.wait() == 0);
    }
    spoil("state.db");
    const auto d = directory::open(root, pool);
    BOOST_TEST(d->rebuilt());
    d->database().migrate("t", steps);

    spoil("cache.db");
    const auto cache = d->open_database("cache.db");
    BOOST_TEST(cache.replaced);
    cache.database->migrate("t", steps);
    BOOST_TEST(!directory::open(root, pool)->open_database("cache.db").replaced);
}

CO_TEST_CASE(trash_of_any_depth_is_emptied) {
    const test::scratch_dir dir;
    const auto d = directory::open(dir.path().string(), rt.pool());
    auto at = d->subdir("heap");
    for (int i = 0; i < 3000; ++i) {
        BOOST_REQUIRE(::mkdirat(at.get(), "a-directory-with-a-name", 0700) == 0);
        BOOST_REQUIRE(::mkdirat(at.get(), "sibling", 0) == 0);
        const unique_fd f(::openat(at.get(), "file", O_CREAT | O_WRONLY | O_CLOEXEC, 0400));
        at.reset(::openat(at.get(), "a-directory-with-a-name", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    }
    d->discard(d->fd(), "heap");
    d->discard(d->fd(), "absent");
    BOOST_TEST(!fs::exists(dir / "heap"));
    async::cancel_source stop;
    stop.cancel(error{errc::canceled, "no time"});
    const auto token = stop.token();
    BOOST_TEST((failure([&] { d->empty_trash_blocking(token); }) == errc::canceled));
    co_await d->empty_trash();
    BOOST_TEST(entries(dir / "trash") == 0u);
    BOOST_TEST((failure([&] { (void)directory::open("", rt.pool()); }) == errc::invalid));
    BOOST_TEST(!file_of(*d, "x").empty());
}

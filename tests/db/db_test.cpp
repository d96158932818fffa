#include "support/support.hpp"

#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

import cobuild.base;
import cobuild.async;
import cobuild.db;

using namespace cobuild;
using db::database;
namespace fs = std::filesystem;

namespace {

constexpr std::array<std::string_view, 1> one_step{"CREATE TABLE t(id INTEGER PRIMARY KEY, name TEXT, data BLOB)"};

template<class F>
std::optional<errc> failure(F f) {
    try {
        f();
    } catch (const error& e) {
        BOOST_TEST_MESSAGE(e.what());
        return e.kind();
    }
    return std::nullopt;
}

std::int64_t count(database& d) {
    return d.read([](db::connection& c) {
        auto rows = c.query("SELECT count(*) FROM t");
        rows.next();
        return rows.integer(0);
    });
}

void fill(database& d, int n) {
    d.write([&](db::connection& c) {
        for (int i = 0; i < n; ++i) c.run("INSERT INTO t(name,data) VALUES(?,?)", cat("row ", i), digest::of(cat(i)));
    });
}

void overwrite(const fs::path& file, std::uintmax_t offset, std::size_t n) {
    std::fstream out(file, std::ios::in | std::ios::out | std::ios::binary);
    out.seekp(static_cast<std::streamoff>(offset));
    const std::string junk(n, '\x5a');
    out.write(junk.data(), static_cast<std::streamsize>(n));
}

}  // namespace

BOOST_AUTO_TEST_CASE(values_come_back_as_they_went_in) {
    const test::scratch_dir dir;
    database d((dir / "a.db").string());
    d.migrate("test", one_step);
    const auto sum = digest::of("x");
    const std::string name("nul\0inside", 10);
    d.write([&](db::connection& c) {
        BOOST_TEST(c.run("INSERT INTO t VALUES(?1,?2,?3)", 7, name, sum) == 1);
        BOOST_TEST(c.last_id() == 7);
        c.run("INSERT INTO t VALUES(?1,?2,?3)", std::int64_t{-9'000'000'000}, std::nullopt, std::optional<std::string>{});
        c.run("INSERT INTO t VALUES(?1,?2,?3)", 8, "", std::span<const std::byte>{});
    });
    d.read([&](db::connection& c) {
        auto rows = c.query("SELECT id,name,data FROM t ORDER BY id");
        BOOST_REQUIRE(rows.next());
        BOOST_TEST(rows.integer(0) == -9'000'000'000);
        BOOST_TEST(rows.null(1));
        BOOST_TEST(!rows.maybe_digest(2).has_value());
        BOOST_REQUIRE(rows.next());
        BOOST_TEST(rows.text(1) == name);
        BOOST_TEST((rows.digest(2) == sum));
        BOOST_REQUIRE(rows.next());
        BOOST_TEST(!rows.null(1));
        BOOST_TEST(rows.text(1) == "");
        BOOST_TEST((failure([&] { (void)rows.digest(2); }) == errc::corrupt));
        BOOST_TEST(!rows.next());
    });
    struct stat st{};
    BOOST_REQUIRE(::stat((dir / "a.db").c_str(), &st) == 0);
    BOOST_TEST((st.st_mode & 0777) == 0600u);
}

BOOST_AUTO_TEST_CASE(the_same_query_may_be_nested) {
    const test::scratch_dir dir;
    database d((dir / "a.db").string());
    d.migrate("test", one_step);
    fill(d, 3);
    int pairs = 0;
    d.read([&](db::connection& c) {
        for (auto outer = c.query("SELECT id FROM t"); outer.next();)
            for (auto inner = c.query("SELECT id FROM t"); inner.next();) ++pairs;
    });
    BOOST_TEST(pairs == 9);
}

BOOST_AUTO_TEST_CASE(a_throwing_write_leaves_nothing) {
    const test::scratch_dir dir;
    database d((dir / "a.db").string());
    d.migrate("test", one_step);
    BOOST_TEST((failure([&] {
                    d.write([&](db::connection& c) {
                        c.run("INSERT INTO t(name) VALUES('a')");
                        throw error{errc::canceled, "stop"};
                    });
                }) == errc::canceled));
    BOOST_TEST((failure([&] { d.write([](db::connection& c) { c.run("INSERT INTO nowhere VALUES(1)"); }); }) == errc::internal));
    BOOST_TEST(
        (failure([&] { d.write([](db::connection& c) { c.run("INSERT INTO t(id) VALUES(1),(1)"); }, db::durability::full); }) == errc::exists));
    BOOST_TEST(count(d) == 0);
}

BOOST_AUTO_TEST_CASE(migrations_run_once_and_newer_files_are_refused) {
    const test::scratch_dir dir;
    const auto file = (dir / "a.db").string();
    const std::array<std::string_view, 2> two{one_step[0], "ALTER TABLE t ADD COLUMN more INTEGER DEFAULT 5"};
    {
        database d(file);
        d.migrate("test", one_step);
        d.migrate("test", one_step);
        fill(d, 1);
    }
    {
        database d(file);
        d.migrate("test", two);
        d.read([](db::connection& c) {
            auto rows = c.query("SELECT more FROM t");
            BOOST_REQUIRE(rows.next());
            BOOST_TEST(rows.integer(0) == 5);
        });
    }
    database d(file);
    BOOST_TEST((failure([&] { d.migrate("test", one_step); }) == errc::unsupported));
}

// O-EN-10
BOOST_AUTO_TEST_CASE(a_damaged_file_is_told_on_opening) {
    const test::scratch_dir dir;
    const auto file = dir / "a.db";
    const auto fresh = [&] {
        for (const auto* tail : {"", "-wal", "-shm", ".ok"}) fs::remove(file.string() + tail);
        database d(file.string());
        d.migrate("test", one_step);
        fill(d, 5000);
    };
    const auto opening = [&] { return failure([&] { database d(file.string()); }); };
    fresh();
    BOOST_TEST(fs::exists(file.string() + ".ok"));
    BOOST_TEST(!opening().has_value());
    overwrite(file, fs::file_size(file) / 2 / 4096 * 4096, 4096);
    BOOST_TEST((opening() == errc::corrupt));
    BOOST_TEST((opening() == errc::corrupt));  // and every time
    fresh();
    fs::resize_file(file, fs::file_size(file) / 2);
    BOOST_TEST((opening() == errc::corrupt));
    fresh();
    overwrite(file, 0, 100);
    BOOST_TEST((opening() == errc::corrupt));
    const auto aside = db::set_aside(file.string());
    BOOST_TEST(fs::exists(aside));
    BOOST_TEST(!opening().has_value());
}

BOOST_AUTO_TEST_CASE(network_file_systems_have_names) {
    BOOST_TEST(db::network_file_system(0x6969) == "NFS");
    BOOST_TEST(db::network_file_system(static_cast<long>(0xff534d42)) == "CIFS");
    BOOST_TEST(db::network_file_system(static_cast<long>(static_cast<int>(0xff534d42))) == "CIFS");
    BOOST_TEST(db::network_file_system(0xef53) == "");  // ext4
    const test::scratch_dir dir;
    BOOST_TEST(db::network_file_system(dir.path().string()) == "");
}

BOOST_AUTO_TEST_CASE(a_connection_does_not_cross_a_fork) {
    const test::scratch_dir dir;
    database d((dir / "a.db").string());
    d.migrate("test", one_step);
    const auto child = ::fork();
    if (child == 0) ::_exit(failure([&] { (void)count(d); }) == errc::internal ? 0 : 1);
    int status = -1;
    BOOST_REQUIRE(::waitpid(child, &status, 0) == child);
    BOOST_TEST(status == 0);
    fill(d, 1);
    BOOST_TEST(count(d) == 1);
}

BOOST_AUTO_TEST_CASE(two_processes_and_many_threads_write_at_once) {
    const test::scratch_dir dir;
    const auto file = (dir / "a.db").string();
    {
        database(file).migrate("test", one_step);
    }
    const auto work = [&] {
        database d(file);
        std::vector<std::jthread> threads;
        for (int t = 0; t < 4; ++t)
            threads.emplace_back([&] {
                for (int i = 0; i < 100; ++i) fill(d, 1);
            });
    };
    const auto child = ::fork();
    if (child == 0) {
        work();
        ::_exit(0);
    }
    work();
    int status = -1;
    BOOST_REQUIRE(::waitpid(child, &status, 0) == child);
    BOOST_TEST(status == 0);
    database d(file);
    BOOST_TEST(count(d) == 800);
}

BOOST_AUTO_TEST_CASE(the_log_stays_bounded) {
    const test::scratch_dir dir;
    database d((dir / "a.db").string(), {.max_wal_bytes = 256 << 10});
    d.migrate("test", one_step);
    for (int i = 0; i < 300; ++i) fill(d, 50);
    BOOST_TEST(fs::file_size((dir / "a.db-wal").string()) < (1u << 20));
    d.checkpoint();
    BOOST_TEST(fs::file_size((dir / "a.db-wal").string()) == 0u);
}

BOOST_AUTO_TEST_CASE(a_full_disk_is_said_by_name) {
    if (!test::needs_root()) return;
    const test::scratch_dir dir;
    BOOST_REQUIRE(::mount("tmpfs", dir.path().c_str(), "tmpfs", 0, "size=512k") == 0);
    {
        database d((dir / "a.db").string());
        d.migrate("test", one_step);
        BOOST_TEST((failure([&] {
                        for (int i = 0; i < 100; ++i) fill(d, 500);
                    }) == errc::no_space));
        BOOST_TEST(count(d) >= 0);
    }
    BOOST_TEST(::umount2(dir.path().c_str(), MNT_DETACH) == 0);
}

CO_TEST_CASE(tasks_use_the_pool) {
    const test::scratch_dir dir;
    database d((dir / "a.db").string());
    d.migrate("test", one_step);
    const auto id = co_await d.write_on(rt.pool(), [](db::connection& c) {
        c.run("INSERT INTO t(name) VALUES('a')");
        return c.last_id();
    });
    BOOST_TEST(id == 1);
    BOOST_TEST(co_await d.read_on(rt.pool(), [](db::connection& c) { return c.query("SELECT id FROM t").next(); }));
}

BOOST_AUTO_TEST_CASE(costs) {
    using clock = std::chrono::steady_clock;
    const test::scratch_dir dir;
    auto d = std::make_unique<database>((dir / "a.db").string());
    d->migrate("test", one_step);
    fill(*d, 1000);
    const auto report = [](const char* what, int n, auto f) {
        const auto start = clock::now();
        for (int i = 0; i < n; ++i) f(i);
        const std::chrono::duration<double, std::micro> spent = clock::now() - start;
        BOOST_TEST_MESSAGE(what << ": " << spent.count() / n << " us");
    };
    report("read one row", 2000,
           [&](int i) { d->read([&](db::connection& c) { return c.query("SELECT name FROM t WHERE id=?", i % 1000).next(); }); });
    report("deferred write", 500, [&](int) { fill(*d, 1); });
    report("full write", 20, [&](int) { d->write([](db::connection& c) { c.run("INSERT INTO t(name) VALUES('a')"); }, db::durability::full); });
    report("close", 1, [&](int) { d.reset(); });
    report("open, trusted", 1, [&](int) { d = std::make_unique<database>((dir / "a.db").string()); });
    report("whole check of 1500 rows", 1, [&](int) { d->check(); });
}

#include "snapshot/world.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.state;
import cobuild.content;
import cobuild.snapshot;

#include "snapshot/world_body.hpp"

namespace {

using clock_type = std::chrono::steady_clock;

double micros(clock_type::time_point since) { return std::chrono::duration<double, std::micro>(clock_type::now() - since).count(); }

/// What this process itself has computed, whatever else the machine does.
double processor() {
    ::timespec t{};
    ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) * 1e6 + static_cast<double>(t.tv_nsec) / 1e3;
}

/// `n` layers, each with a file of its own and one that all have.
task<std::pair<chain, std::vector<layer>>> stack_of(store& s, int n) {
    std::pair<chain, std::vector<layer>> out;
    for (int i = 0; i < n; ++i) {
        auto u = co_await s.begin_unpack();
        put(u.fd(), cat("f", i), cat(i));
        put(u.fd(), "top", cat(i));
        out.second.push_back(co_await s.commit(std::move(u), {.diff_id = digest::of(cat(i)), .whiteouts = false}));
        out.first.layers.push_back(out.second.back().id);
    }
    co_return out;
}

task<void> use(store& s, const chain& all) {
    const auto n = all.layers.size();
    const auto view = co_await s.view(all);
    BOOST_TEST(get(view.fd(), "top") == cat(n - 1));
    BOOST_TEST(get(view.fd(), "f0") == "0");
    const auto l = co_await add(s, all, [&](int root) {
        BOOST_TEST(get(root, "f1") == "1");
        put(root, "top", "mine");
    });
    BOOST_TEST(get(s.layer_dir(l.id).get(), "top") == "mine");
    struct stat st{};
    BOOST_REQUIRE(::fstatat(s.layer_dir(l.id).get(), ".", &st, 0) == 0);
}

}  // namespace

// O-FS-15, O-FS-16: the kernel's own limit is 500 lower layers; neither the number nor the path's length may matter before.
BOOST_AUTO_TEST_CASE(four_hundred_layers_mount_below_any_path) {
    if (!test::needs_root()) return;
    for (const auto* tail :
         {"s",
          "a-state-directory-of-more-than-one-hundred-and-twenty-characters-so-that-no-option-string-of-one-page-could-ever-hold-its-layers/s"}) {
        for (const auto method :
             {snapshot::mount_method::by_descriptor, snapshot::mount_method::by_proc_name, snapshot::mount_method::by_short_name}) {
            const test::memory_dir dir;
            const auto mounts = mount_table();
            runtime rt;
            const auto d = directory::open((dir / tail).string(), rt.pool());
            const auto s = snapshot::open_overlay(d, {.method = method});
            const auto [all, kept] = rt.block_on(stack_of(*s, 399));
            rt.block_on(use(*s, all));
            BOOST_TEST(mount_table() == mounts);
            if (method != snapshot::mount_method::by_short_name) {
                for (const auto& u : rt.block_on(s->du())) BOOST_TEST(u.kind == "regular");  // nothing was copied together
            }
        }
    }
}

CO_TEST_CASE(six_hundred_layers_are_copied_together_once) {
    if (!test::needs_root()) co_return;
    const test::memory_dir dir;
    const auto s = snapshot::open_overlay(directory::open((dir / "s").string(), rt.pool()));
    const auto [all, kept] = co_await stack_of(*s, 600);
    co_await use(*s, all);
    std::size_t copies = 0;
    for (const auto& u : co_await s->du()) copies += u.kind == "internal";
    BOOST_TEST(copies == 1u);
}

CO_TEST_CASE(an_upper_directory_is_readable_as_a_diff_whatever_the_host_prefers) {
    if (!test::needs_root()) co_return;
    const test::scratch_dir dir;
    const auto s = snapshot::open_overlay(directory::open(dir.path().string(), rt.pool()));
    const auto a = co_await add(*s, {}, [](int root) {
        put(root, "file", std::string(10'000, 'z'));
        BOOST_REQUIRE(::mkdirat(root, "dir", 0755) == 0);
        put(root, "dir/inside", "i");
    });
    const auto b = co_await add(*s, {{a.id}}, [](int root) {
        BOOST_REQUIRE(::fchmodat(root, "file", 0600, 0) == 0);    // metacopy would leave the bytes below
        BOOST_TEST(::renameat(root, "dir", root, "dir2") == -1);  // redirect_dir would leave the tree below
        BOOST_TEST(errno == EXDEV);
    });
    const auto layer_fd = s->layer_dir(b.id);
    BOOST_TEST(get(layer_fd.get(), "file").size() == 10'000u);
    BOOST_TEST(::getxattr((dir / "layers" / std::to_string(b.id.value) / "fs/file").c_str(), "trusted.overlay.metacopy", nullptr, 0) == -1);
}

BOOST_AUTO_TEST_CASE(a_full_disk_fails_by_name_and_works_again) {
    if (!test::needs_root()) return;
    const test::scratch_dir dir;
    BOOST_REQUIRE(::mount("tmpfs", dir.path().c_str(), "tmpfs", 0, "size=4m") == 0);
    {
        runtime rt;
        const auto d = directory::open((dir / "state").string(), rt.pool());
        const auto s = snapshot::open_overlay(d);
        rt.block_on([](directory& dd, store& st, fs::path root) -> task<void> {
            auto ballast = co_await st.begin_unpack();
            const unique_fd f(::openat(ballast.fd(), "ballast", O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
            BOOST_REQUIRE(::fallocate(f.get(), 0, 0, 1 << 20) == 0);
            const std::string piece(4096, 'x');
            while (::write(f.get(), piece.data(), piece.size()) > 0) {
            }
            for (::off_t at = 1 << 20; ::fallocate(f.get(), 0, at, 4096) == 0; at += 4096) {
            }
            // tmpfs counts inodes apart: take bytes until a record no longer fits
            std::optional<errc> failed;
            for (int i = 0; i < 200 && !failed; ++i) {
                failed = co_await failing(add(st, {}, [](int) {}, {.description = std::string(3000, 'd')}));
            }
            BOOST_TEST((failed == errc::no_space));
            BOOST_TEST(names_in(root / "state/active").size() == 1u);
            BOOST_REQUIRE(::ftruncate(f.get(), 0) == 0);
            co_await dd.empty_trash();
            const auto l = co_await add(st, {}, [](int r) { put(r, "a", "a"); });
            BOOST_TEST(get(st.layer_dir(l.id).get(), "a") == "a");
        }(*d, *s, dir.path()));
    }
    BOOST_TEST(::umount2(dir.path().c_str(), MNT_DETACH) == 0);
}

CO_TEST_CASE(the_best_store_works_on_a_file_system_without_extended_attributes) {
    if (!test::needs_root()) co_return;
    const test::scratch_dir dir;
    BOOST_REQUIRE(::mount("ramfs", dir.path().c_str(), "ramfs", 0, "") == 0);
    {
        const auto d = directory::open((dir / "state").string(), rt.pool());
        const auto s = snapshot::open_best(d);
        BOOST_TEST_MESSAGE("on ramfs: " << s->name());
        const auto a = co_await add(*s, {}, [](int root) { put(root, "a", "a"); });
        const auto b = co_await add(*s, {{a.id}}, [](int root) { put(root, "b", get(root, "a")); });
        const auto v = co_await s->view({{a.id, b.id}});
        BOOST_TEST(get(v.fd(), "b") == "a");
    }
    BOOST_TEST(::umount2(dir.path().c_str(), MNT_DETACH) == 0);
}

namespace {
task<void> measure_costs(store& st, bool bounded) {
    auto* s = &st;
    const auto [base, kept] = co_await stack_of(*s, 10);
    double begin = 0, mount = 0, close = 0, commit = 0, views = 0;
    constexpr int n = 200;
    chain all = base;
    std::vector<layer> more;
    double of_begin = 0, of_mount = 0, of_commit = 0;
    for (int i = 0; i < n; ++i) {
        auto cpu = processor();
        auto t = clock_type::now();
        auto w = co_await s->begin(base);
        begin += micros(t);
        of_begin += processor() - cpu;
        cpu = processor();
        t = clock_type::now();
        auto m = co_await w.mount();
        mount += micros(t);
        of_mount += processor() - cpu;
        put(m.get(), "x", "x");
        t = clock_type::now();
        m.reset();
        close += micros(t);
        t = clock_type::now();
        cpu = processor();
        more.push_back(co_await s->commit(std::move(w), {}));
        commit += micros(t);
        of_commit += processor() - cpu;
        t = clock_type::now();
        const auto v = co_await s->view(on(base, more.back()));
        views += micros(t);
    }
    auto t = clock_type::now();
    co_await s->sync();
    const auto sync = micros(t);
    t = clock_type::now();
    const auto lines = co_await s->du();
    const auto du = micros(t);
    BOOST_TEST(lines.size() == 210u);
    BOOST_TEST_MESSAGE("us: begin " << begin / n << ", mount of 10 layers " << mount / n << ", close " << close / n << ", commit " << commit / n
                                    << ", view " << views / n << ", sync of 210 layers " << sync << ", du " << du);
    BOOST_TEST_MESSAGE("us of processor: begin " << of_begin / n << ", mount " << of_mount / n << ", commit " << of_commit / n);
    if (bounded) BOOST_TEST(of_begin + of_commit < n * 1000.0);
}
}  // namespace

// Bounded on a tmpfs, where nobody else's deletions and journal are met; told for the disk.
CO_TEST_CASE(costs) {
    if (!test::needs_root()) co_return;
    const test::scratch_dir disk;
    const test::memory_dir memory;
    co_await measure_costs(*snapshot::open_overlay(directory::open(disk.path().string(), rt.pool())), false);
    co_await measure_costs(*snapshot::open_overlay(directory::open((memory / "s").string(), rt.pool())), true);
}

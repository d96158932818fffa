#include "support/child.hpp"
#include "support/support.hpp"

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
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
import cobuild.state;
import cobuild.content;

using namespace cobuild;
using content::store;
using state::directory;
using test::child;
namespace fs = std::filesystem;

namespace {

struct world {
    test::scratch_dir dir;
    async::blocking_pool pool{4};
    std::shared_ptr<directory> state = directory::open(dir.path().string(), pool);
    std::unique_ptr<store> blobs = std::make_unique<store>(state);
    [[nodiscard]] std::size_t files(const char* below) const {
        std::size_t n = 0;
        for (const auto& e : fs::directory_iterator(dir / below)) n += e.is_regular_file();
        return n;
    }
    /// Makes a blob look as if it had been used an hour ago.
    void age(const digest& d) const {
        const auto file = dir / "content/blobs/sha256" / d.hex();
        fs::last_write_time(file, fs::last_write_time(file) - std::chrono::hours(1));
    }
};

std::optional<errc> failure(const std::function<void()>& f) {
    try {
        f();
    } catch (const error& e) {
        BOOST_TEST_MESSAGE(e.what());
        return e.kind();
    }
    return std::nullopt;
}

store::children_of no_children() {
    return [](const digest&) { return std::vector<digest>{}; };
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_blob_is_written_once_and_read_back) {
    world w;
    const std::string text(300'000, 'x');
    const auto d = digest::of(text);
    BOOST_TEST(!w.blobs->find(d).has_value());
    BOOST_TEST((failure([&] { (void)w.blobs->open(d); }) == errc::not_found));
    auto in = w.blobs->ingest(text.size());
    in.write(std::string_view(text).substr(0, 100'000));
    in.write(std::string_view(text).substr(100'000));
    BOOST_TEST(in.written() == text.size());
    const auto got = in.commit(d, text.size());
    BOOST_TEST((got.digest == d));
    BOOST_TEST((w.blobs->find(d) == text.size()));
    BOOST_TEST(w.blobs->read_all(d) == text);
    BOOST_TEST((failure([&] { (void)w.blobs->read_all(d, 1000); }) == errc::invalid));
    const auto again = w.blobs->put(text);
    BOOST_TEST((again.digest == d));
    BOOST_TEST(w.files("content/blobs/sha256") == 1u);
    BOOST_TEST(w.files("content/ingest") == 0u);
    BOOST_TEST(test::read_file(w.dir / "content/oci-layout") == R"({"imageLayoutVersion":"1.0.0"})");
    BOOST_TEST((w.blobs->put("").digest.str() == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"));
}

BOOST_AUTO_TEST_CASE(what_is_not_as_promised_is_refused_and_removed) {
    world w;
    {
        auto in = w.blobs->ingest();
        in.write("abc");
        BOOST_TEST((failure([&] { (void)in.commit(digest::of("abd")); }) == errc::corrupt));
    }
    {
        auto in = w.blobs->ingest();
        in.write("abc");
        BOOST_TEST((failure([&] { (void)in.commit(digest::of("abc"), 4); }) == errc::corrupt));
    }
    {
        auto in = w.blobs->ingest();
        in.write("abc");
        in.abort();
    }
    BOOST_TEST(w.files("content/ingest") == 0u);
    BOOST_TEST(w.blobs->list().empty());

    const auto good = w.blobs->put("good");
    fs::permissions(w.dir / "content/blobs/sha256" / good.digest.hex(), fs::perms::owner_all);
    test::write_file(w.dir / "content/blobs/sha256" / good.digest.hex(), "evil");
    BOOST_TEST((failure([&] { (void)w.blobs->read_all(good.digest); }) == errc::corrupt));
}

BOOST_AUTO_TEST_CASE(what_an_interrupted_writer_left_is_there_for_the_next) {
    world w;
    const std::string text(3 << 20, 'x');
    const auto d = digest::of(text);
    const std::string_view all(text);
    {
        auto in = w.blobs->resume(d, text.size());
        BOOST_TEST(in.kept() == 0u);
        in.write(all.substr(0, 2 << 20));
        // Whoever wants the same blob meanwhile gets a file of his own.
        auto other = w.blobs->resume(d, text.size());
        BOOST_TEST(other.kept() == 0u);
        other.write("y");
        BOOST_TEST(w.files("content/partial") == 1u);
        BOOST_TEST(w.files("content/ingest") == 1u);
    }
    BOOST_TEST(w.files("content/ingest") == 0u);
    w.blobs = std::make_unique<store>(w.state);
    {
        auto in = w.blobs->resume(d, text.size());
        BOOST_TEST(in.kept() == std::uint64_t{2} << 20);
        std::string kept;
        std::vector<std::byte> buffer(300'000);
        while (const auto n = in.replay(buffer)) kept.append(text_of(std::span(buffer).first(n)));
        BOOST_TEST((kept == all.substr(0, 2 << 20)));
        in.write(all.substr(2 << 20));
        BOOST_TEST(in.written() == text.size());
        BOOST_TEST((in.commit(d, text.size()).digest == d));
    }
    BOOST_TEST(w.files("content/partial") == 0u);
    BOOST_TEST((w.blobs->read_all(d) == text));
}

BOOST_AUTO_TEST_CASE(beginnings_of_blobs_that_are_no_use_go) {
    world w;
    const auto d = digest::of("wanted");
    const std::string part(2 << 20, 'x');
    const auto leave = [&](std::string_view bytes) { w.blobs->resume(d, 3 << 20).write(bytes); };
    leave("too little to be worth a file");
    BOOST_TEST(w.files("content/partial") == 0u);
    leave(part);
    BOOST_TEST(w.blobs->resume(d, 1 << 20).kept() == 0u);  // longer than the blob is said to be
    leave(part);
    w.blobs->resume(d, 3 << 20).abort();
    BOOST_TEST(w.files("content/partial") == 0u);
    leave(part);
    {
        auto in = w.blobs->resume(d, 3 << 20);
        BOOST_TEST(w.blobs->collect_blocking({}, no_children()).blobs == 0u);  // somebody writes it
        BOOST_TEST(in.kept() == part.size());
    }
    const auto gone = w.blobs->collect_blocking({}, no_children());
    BOOST_TEST(gone.blobs == 1u);
    BOOST_TEST(gone.bytes >= part.size());
    BOOST_TEST(w.files("content/partial") == 0u);
}

BOOST_AUTO_TEST_CASE(a_draft_is_adopted) {
    world w;
    auto d = w.blobs->new_draft();
    BOOST_REQUIRE(::write(d.fd(), "hello", 5) == 5);
    const auto got = w.blobs->adopt(std::move(d), digest::of("hello"), 5);
    BOOST_TEST(w.blobs->read_all(got.digest) == "hello");
    auto e = w.blobs->new_draft();
    BOOST_TEST((failure([&] { (void)w.blobs->adopt(std::move(e), digest::of("x"), 1); }) == errc::corrupt));
    BOOST_TEST(w.files("content/ingest") == 0u);
}

BOOST_AUTO_TEST_CASE(images_are_kept_by_name) {
    world w;
    const content::image a{.name = "docker.io/library/a:1",
                           .target = digest::of("a"),
                           .descriptor = R"({"size":3})",
                           .created = content::time_point(std::chrono::seconds(1'700'000'000)),
                           .labels = {{"x", ""}, {"y", "z=1\n"}}};
    w.blobs->put_image(a);
    auto b = a;
    b.name = "docker.io/library/b:1";
    w.blobs->put_image(b);
    b.target = digest::of("b");
    w.blobs->put_image(b);
    const auto got = w.blobs->get_image(a.name);
    BOOST_REQUIRE(got.has_value());
    BOOST_TEST(got->descriptor == a.descriptor);
    BOOST_TEST((got->labels == a.labels));
    BOOST_TEST((got->created == a.created));
    const auto all = w.blobs->list_images();
    BOOST_REQUIRE(all.size() == 2u);
    BOOST_TEST((all[1].target == digest::of("b")));
    BOOST_TEST(w.blobs->remove_image(a.name));
    BOOST_TEST(!w.blobs->remove_image(a.name));
    BOOST_TEST(!w.blobs->get_image(a.name).has_value());
}

// O-EN-09
BOOST_AUTO_TEST_CASE(collect_takes_what_nothing_reaches) {
    world w;
    const auto layer = w.blobs->put("layer").digest, manifest = w.blobs->put("manifest").digest, stray = w.blobs->put("stray").digest;
    const auto history = w.blobs->put("history").digest, asked = w.blobs->put("asked").digest;
    const auto held = w.blobs->put("held");
    for (const auto& d : {layer, manifest, stray, history, asked, held.digest}) w.age(d);
    w.blobs->put_image({.name = "i", .target = manifest, .descriptor = "{}"});
    w.blobs->add_root("history:1", history);
    const auto children = [&](const digest& d) {
        return d == manifest ? std::vector<digest>{layer, manifest, digest::of("absent")} : std::vector<digest>{};
    };
    auto got = w.blobs->collect_blocking({asked}, children);
    BOOST_TEST(got.blobs == 1u);
    BOOST_TEST(got.bytes == 5u);
    BOOST_TEST(!w.blobs->find(stray).has_value());
    BOOST_TEST(!w.blobs->remove(held.digest));
    BOOST_TEST(w.blobs->find(held.digest).has_value());
    w.blobs->remove_image("i");
    w.blobs->remove_roots("history:1");
    got = w.blobs->collect_blocking({}, children);
    BOOST_TEST(got.blobs == 4u);
    BOOST_TEST(w.blobs->list().size() == 1u);
}

BOOST_AUTO_TEST_CASE(collect_spares_what_another_process_has_just_taken_up) {
    world w;
    const auto used = w.blobs->put("used").digest, dropped = w.blobs->put("dropped").digest, fresh = digest::of("fresh");
    w.age(used);
    w.age(dropped);
    // in the middle of the walk: another user pins and lets go, another writes
    const auto meddle = [&](const digest&) {
        (void)w.blobs->hold(used);
        (void)w.blobs->put("fresh");
        return std::vector<digest>{};
    };
    const auto got = w.blobs->collect_blocking({digest::of("root")}, meddle);
    BOOST_TEST(got.blobs == 1u);
    BOOST_TEST(w.blobs->find(used).has_value());
    BOOST_TEST(w.blobs->find(fresh).has_value());
}

// O-EN-04
BOOST_AUTO_TEST_CASE(many_writers_of_one_blob_in_two_processes_all_succeed) {
    const test::scratch_dir dir;
    const std::string text(200'000, 'q');
    const auto work = [&](bool collecting) {
        async::blocking_pool pool(2);
        store blobs(directory::open(dir.path().string(), pool));
        std::vector<std::jthread> threads;
        for (int t = 0; t < 4; ++t) {
            threads.emplace_back([&] {
                for (int i = 0; i < 20; ++i) {
                    const auto got = blobs.put(text);
                    if (blobs.read_all(got.digest) != text) ::_exit(3);  // pinned: nobody may take it
                    if (collecting)
                        (void)blobs.collect_blocking({}, no_children());
                    else
                        (void)blobs.remove(got.digest);
                }
            });
        }
    };
    child other([&] {
        work(true);
        return 0;
    });
    work(false);
    BOOST_TEST(other.wait() == 0);
}

BOOST_AUTO_TEST_CASE(a_killed_writer_leaves_nothing_after_the_next_start) {
    for (const auto* point : {"ingest-written", "ingest-synced"}) {
        const test::scratch_dir dir;
        child killed([&] {
            ::setenv("COBUILD_CRASH_AT", point, 1);
            async::blocking_pool pool(1);
            store(directory::open(dir.path().string(), pool)).put("data");
            return 0;
        });
        BOOST_TEST(killed.wait() == -SIGKILL);
        async::runtime rt;
        const auto d = directory::open(dir.path().string(), rt.pool());
        store blobs(d);
        BOOST_TEST(rt.block_on(d->recover()).dead_owners == 1u);
        BOOST_TEST(fs::is_empty(dir / "content/ingest"));
        BOOST_TEST(blobs.list().empty());
        BOOST_TEST(blobs.read_all(blobs.put("data").digest) == "data");
    }
}

// O-EN-07
BOOST_AUTO_TEST_CASE(a_full_disk_fails_by_name_and_works_again_after_room_is_made) {
    if (!test::needs_root()) return;
    const test::scratch_dir dir;
    BOOST_REQUIRE(::mount("tmpfs", dir.path().c_str(), "tmpfs", 0, "size=4m") == 0);
    {
        async::blocking_pool pool(1);
        store blobs(directory::open((dir / "state").string(), pool));
        const std::string big(6 << 20, 'b');
        BOOST_TEST((failure([&] { (void)blobs.put(big); }) == errc::no_space));
        BOOST_TEST((failure([&] { (void)blobs.ingest(big.size()); }) == errc::no_space));
        BOOST_TEST(fs::is_empty(dir / "state/content/ingest"));
        BOOST_TEST(blobs.read_all(blobs.put("small").digest) == "small");
    }
    BOOST_TEST(::umount2(dir.path().c_str(), MNT_DETACH) == 0);
}

CO_TEST_CASE(collect_runs_as_a_task) {
    const test::scratch_dir dir;
    store blobs(directory::open(dir.path().string(), rt.pool()));
    BOOST_TEST((co_await blobs.collect({}, no_children())).blobs == 0u);
}

#include "support/support.hpp"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

import cobuild.base;
import cobuild.async;
import cobuild.cache;
import cobuild.db;

using namespace cobuild;

namespace {

digest d(std::string_view text) { return digest::of(text); }

/// Counts transactions and fails when told to.
class counting_storage final : public cache::storage {
public:
    std::shared_ptr<cache::storage> under = cache::make_memory_storage();
    std::atomic<int> applied{0};
    std::atomic<int> finds{0};
    std::atomic<bool> failing{false};
    bool others = false;
    cache::contents load(std::size_t max) override { return under->load(max); }
    std::optional<cache::record> find(const digest& key) override {
        ++finds;
        return under->find(key);
    }
    std::vector<cache::memo_entry> load_memos(std::int64_t oldest) override { return under->load_memos(oldest); }
    void apply(const cache::changes& what) override {
        if (failing) throw error{errc::no_space, "the disk is full"};
        ++applied;
        under->apply(what);
    }
    [[nodiscard]] bool shared() const noexcept override { return others; }
};

}  // namespace

CO_TEST_CASE(what_is_saved_is_found_at_once_and_after_reopening) {
    const auto store = std::make_shared<counting_storage>();
    auto index = co_await cache::index::open(rt.pool(), store);
    index->save(d("fast"), "text", {d("fast"), d("content")});
    BOOST_TEST(index->peek(d("content"))->result == "text");
    BOOST_TEST((index->peek(d("content"))->canonical == d("fast")));
    index->link(d("other"), d("fast"));
    index->link(d("dangling"), d("nobody"));
    co_await index->close();
    BOOST_TEST(store->applied == 1);

    index = co_await cache::index::open(rt.pool(), store);
    for (const auto* key : {"fast", "content", "other"}) BOOST_TEST(index->peek(d(key))->result == "text");
    BOOST_TEST(!index->peek(d("dangling")).has_value());
    index->remove(d("fast"));
    BOOST_TEST(!index->peek(d("other")).has_value());
    BOOST_TEST(!(co_await index->find(d("other"))).has_value());
    co_await index->close();
    BOOST_TEST(!store->under->find(d("content")).has_value());
}

CO_TEST_CASE(changes_are_written_together_without_being_asked) {
    const auto store = std::make_shared<counting_storage>();
    auto index = co_await cache::index::open(rt.pool(), store, {.flush_after = std::chrono::milliseconds(1)});
    for (int i = 0; i < 100; ++i) index->save(d(std::to_string(i)), "r", {});
    while (store->applied == 0) co_await async::sleep_for(std::chrono::milliseconds(1));
    BOOST_TEST(store->applied == 1);
    BOOST_TEST(store->under->load(1000).records.size() == 100u);
    co_await index->close();
}

CO_TEST_CASE(a_storage_that_fails_does_not_fail_the_build) {
    const auto store = std::make_shared<counting_storage>();
    auto index = co_await cache::index::open(rt.pool(), store);
    std::string logged;
    configure_log({.sink = [&](log_level, std::string_view message, std::span<const log_field>) { logged = message; }});
    store->failing = true;
    index->save(d("a"), "r", {});
    co_await index->flush();
    configure_log({});
    BOOST_TEST(logged == "cannot write the build cache; what is new is lost");
    BOOST_TEST(index->peek(d("a")).has_value());
    co_await index->close();
}

CO_TEST_CASE(what_another_process_stored_is_found) {
    const auto store = std::make_shared<counting_storage>();
    store->others = true;
    auto index = co_await cache::index::open(rt.pool(), store);
    store->under->apply({.put = {{.canonical = d("a"), .result = "r"}}, .links = {{d("a"), d("a")}, {d("k"), d("a")}}});
    BOOST_TEST(!index->peek(d("k")).has_value());
    BOOST_TEST((co_await index->find(d("k"))).value().result == "r");
    BOOST_TEST(index->peek(d("k")).has_value());
    BOOST_TEST((co_await index->find(d("k"))).has_value());
    BOOST_TEST(store->finds == 1);
    BOOST_TEST((co_await index->all()).size() == 1u);
    co_await index->close();
}

CO_TEST_CASE(memory_is_bounded_and_the_rest_still_found) {
    const auto store = std::make_shared<counting_storage>();
    auto index = co_await cache::index::open(rt.pool(), store, {.max_records = 100});
    for (int i = 0; i < 300; ++i) index->save(d(std::to_string(i)), std::to_string(i), {});
    co_await index->flush();
    int in_memory = 0;
    for (int i = 0; i < 300; ++i) in_memory += index->peek(d(std::to_string(i))).has_value();
    BOOST_TEST(in_memory == 100);
    for (int i = 0; i < 300; ++i) BOOST_TEST((co_await index->find(d(std::to_string(i)))).value().result == std::to_string(i));
    co_await index->close();
}

CO_TEST_CASE(a_moved_key_counts_and_an_orphan_is_forgotten) {
    const auto store = std::make_shared<counting_storage>();
    auto index = co_await cache::index::open(rt.pool(), store);
    index->save(d("a"), "old", {d("k")});
    index->save(d("b"), "new", {d("a"), d("k")});
    BOOST_TEST(index->peek(d("a"))->result == "new");
    co_await index->flush();
    BOOST_TEST(store->under->load(10).records.size() == 1u);
    index->touch(d("b"));  // used within the last minute: nothing to write
    const int before = store->applied;
    co_await index->close();
    BOOST_TEST(store->applied == before);
}

CO_TEST_CASE(the_memo_is_kept_with_the_records) {
    const test::scratch_dir dir;
    const auto open = [&] { return cache::make_storage(std::make_shared<db::database>((dir / "cache.db").string())); };
    const cache::file_key key{1, 2, 3, 4, 5, 6};
    const auto now = std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now());
    {
        auto index = co_await cache::index::open(rt.pool(), open());
        auto memo = co_await index->memo();
        BOOST_TEST((memo == co_await index->memo()));
        BOOST_TEST(memo->remember(key, now, key, {d("data"), {}}));
        co_await index->close();
    }
    auto index = co_await cache::index::open(rt.pool(), open());
    auto memo = co_await index->memo();
    BOOST_TEST((memo->find(key).value().data == d("data")));
    BOOST_TEST(memo->take_new().empty());
    co_await index->close();
}

BOOST_AUTO_TEST_CASE(the_memo_counts_only_what_cannot_have_changed_unseen) {
    cache::stat_memo memo;
    const cache::time_point asked{std::chrono::seconds(1'000)};
    const auto file = [](std::int64_t changed_ms) {
        return cache::file_key{.fs = 1, .device = 2, .inode = 3, .size = 4, .mtime = 5, .ctime = changed_ms * 1'000'000};
    };
    // Changed within 2 s of the look: a second write in the same tick would leave the same stat.
    BOOST_TEST(memo.remember(file(998'500), asked, file(998'500), {d("x"), {}}));
    BOOST_TEST(!memo.find(file(998'500)).has_value());
    BOOST_TEST(memo.remember(file(998'000), asked, file(998'000), {d("x"), {}}));
    BOOST_TEST(!memo.find(file(998'000)).has_value());
    BOOST_TEST(!memo.remember(file(10), asked, file(20), {d("x"), {}}));  // changed while it was read
    BOOST_TEST(memo.size() == 0u);
    BOOST_TEST(memo.remember(file(10), asked, file(10), {d("x"), {}}));
    BOOST_TEST((memo.find(file(10)).value().data == d("x")));
    // Any difference is another state, whichever field it is.
    for (auto field : {&cache::file_key::fs, &cache::file_key::device, &cache::file_key::inode, &cache::file_key::size}) {
        auto other = file(10);
        ++(other.*field);
        BOOST_TEST(!memo.find(other).has_value());
    }
    auto other = file(10);
    ++other.mtime;
    BOOST_TEST(!memo.find(other).has_value());
    BOOST_TEST(!memo.find(file(11)).has_value());
}

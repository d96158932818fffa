// The contract of cache::storage, run for every implementation.
#include "support/support.hpp"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

import cobuild.base;
import cobuild.async;
import cobuild.cache;
import cobuild.db;

using namespace cobuild;
using cache::time_point;

namespace {

digest d(std::string_view text) { return digest::of(text); }
time_point at(std::int64_t seconds) { return time_point(std::chrono::seconds(seconds)); }
cache::record rec(std::string_view name, std::string_view result, std::int64_t used = 100) {
    return {.canonical = d(name), .result = std::string(result), .created = at(50), .last_used = at(used)};
}

/// Runs `test` on each implementation; `reopen` gives the storage as another process would see it.
void for_each(const std::function<void(cache::storage&, const std::function<std::shared_ptr<cache::storage>()>& reopen)>& test) {
    {
        const auto memory = cache::make_memory_storage();
        BOOST_TEST_CONTEXT("in memory") {
            test(*memory, [&] { return memory; });
        }
    }
    {
        const test::scratch_dir dir;
        const auto open = [&] { return cache::make_storage(std::make_shared<db::database>((dir / "cache.db").string())); };
        const auto first = open();
        BOOST_TEST_CONTEXT("in SQLite") { test(*first, open); }
    }
}

}  // namespace

BOOST_AUTO_TEST_CASE(records_are_found_by_each_of_their_keys) {
    for_each([](cache::storage& s, const auto& reopen) {
        BOOST_TEST(!s.find(d("a")).has_value());
        s.apply({.put = {rec("a", "result a")}, .links = {{d("a"), d("a")}, {d("a2"), d("a")}}});
        BOOST_TEST((s.find(d("a")) == rec("a", "result a")));
        BOOST_TEST((reopen()->find(d("a2")) == rec("a", "result a")));
        const auto all = reopen()->load(10);
        BOOST_TEST(all.complete);
        BOOST_TEST((all.records == std::vector{rec("a", "result a")}));
        BOOST_TEST((std::set(all.links.begin(), all.links.end()) == std::set<cache::link>{{d("a"), d("a")}, {d("a2"), d("a")}}));
    });
}

BOOST_AUTO_TEST_CASE(a_second_put_replaces_the_result_and_keeps_the_birth) {
    for_each([](cache::storage& s, const auto&) {
        s.apply({.put = {rec("a", "old")}, .links = {{d("a"), d("a")}, {d("k"), d("a")}}});
        auto next = rec("a", "new", 200);
        next.created = at(150);
        s.apply({.put = {next}});
        const auto found = s.find(d("k"));
        BOOST_REQUIRE(found.has_value());
        BOOST_TEST(found->result == "new");
        BOOST_TEST((found->created == at(50)));
        BOOST_TEST((found->last_used == at(200)));
    });
}

BOOST_AUTO_TEST_CASE(a_key_moves_and_a_record_without_keys_goes) {
    for_each([](cache::storage& s, const auto&) {
        s.apply({.put = {rec("a", "ra"), rec("b", "rb")}, .links = {{d("a"), d("a")}, {d("shared"), d("a")}, {d("b"), d("b")}}});
        s.apply({.links = {{d("shared"), d("b")}}});
        BOOST_TEST(s.find(d("shared"))->result == "rb");
        BOOST_TEST(s.find(d("a"))->result == "ra");
        s.apply({.links = {{d("a"), d("b")}}});
        BOOST_TEST(s.find(d("a"))->result == "rb");
        BOOST_TEST(s.load(10).records.size() == 1u);
        s.apply({.links = {{d("a"), d("nobody")}}});
        BOOST_TEST(s.find(d("a"))->result == "rb");
    });
}

BOOST_AUTO_TEST_CASE(removal_takes_the_keys_along_and_comes_first) {
    for_each([](cache::storage& s, const auto&) {
        s.apply({.put = {rec("a", "ra")}, .links = {{d("a"), d("a")}, {d("k"), d("a")}}});
        s.apply({.removed = {d("a")}, .put = {rec("c", "rc")}, .links = {{d("c"), d("c")}, {d("k2"), d("a")}}});
        for (const auto* key : {"a", "k", "k2"}) BOOST_TEST(!s.find(d(key)).has_value());
        BOOST_TEST(s.find(d("c")).has_value());
        s.apply({.removed = {d("c")}, .put = {rec("c", "again")}, .links = {{d("c"), d("c")}}});
        BOOST_TEST(s.find(d("c"))->result == "again");
    });
}

BOOST_AUTO_TEST_CASE(the_last_used_come_first_when_there_are_too_many) {
    for_each([](cache::storage& s, const auto&) {
        cache::changes c;
        for (int i = 0; i < 10; ++i) {
            c.put.push_back(rec(std::to_string(i), "r", 100 + i));
            c.links.push_back({d(std::to_string(i)), d(std::to_string(i))});
        }
        s.apply(c);
        s.apply({.touched = {{d("0"), at(500)}, {d("9"), at(1)}}});  // an older time changes nothing
        const auto some = s.load(3);
        BOOST_TEST(!some.complete);
        std::set<digest> got;
        for (const auto& r : some.records) got.insert(r.canonical);
        BOOST_TEST((got == std::set{d("0"), d("9"), d("8")}));
        BOOST_TEST(some.links.size() == 3u);
        BOOST_TEST(s.load(10).complete);
    });
}

BOOST_AUTO_TEST_CASE(memos_are_one_per_file_and_age) {
    for_each([](cache::storage& s, const auto& reopen) {
        const cache::memo_entry old{{1, 2, ~std::uint64_t{0}, 4, -5, 6}, {d("x"), {}}, 10};
        auto renewed = old;
        renewed.key.mtime = 7;
        renewed.value.xattrs = d("attributes");
        renewed.used_day = 12;
        const cache::memo_entry other{{1, 2, 4, 4, 5, 6}, {d("y"), {}}, 11};
        s.apply({.memos = {old, other}});
        s.apply({.memos = {renewed}});
        auto got = reopen()->load_memos(0);
        BOOST_TEST(got.size() == 2u);
        BOOST_TEST((std::ranges::count(got, renewed) == 1 && std::ranges::count(got, other) == 1));
        BOOST_TEST((s.load_memos(12) == std::vector{renewed}));
        BOOST_TEST((reopen()->load_memos(0) == std::vector{renewed}));
    });
}

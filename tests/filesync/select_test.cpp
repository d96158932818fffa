// Which entries of a tree are sent.
#include "support/support.hpp"

#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import cobuild.filesync;

#include "rig.hpp"

using namespace cobuild;
using namespace cobuild::test;
using namespace cobuild::filesync;
namespace stdfs = std::filesystem;

namespace {
using list = std::vector<std::string>;

struct rig {
    scratch_dir d;
    std::shared_ptr<const fs::root> from = root_of(d / "from");
    int runs = 0;
    rig() {
        for (const auto* f : {"app/main.c", "app/main.o", "app/sub/x.c", "docs/a.md", "node/m/keep.js", "node/m/drop.js"})
            write_file(d / "from" / f, f);
        stdfs::create_symlink("app/sub", d / "from/link");
        stdfs::create_symlink("../docs", d / "from/app/docs");
        stdfs::create_symlink("/app/docs", d / "from/chain");
        stdfs::create_symlink("loop", d / "from/loop");
    }
};
async::task<list> sent(async::blocking_pool& pool, std::shared_ptr<rig> r, tree t) {
    t.root = r->from;
    const auto to = root_of(r->d / cat("to", ++r->runs));
    std::vector<tree> trees{std::move(t)};
    co_await transfer(pool, std::move(trees), to);
    co_return names(*to);
}
}  // namespace

CO_TEST_CASE(patterns) {
    const auto r = std::make_shared<rig>();
    BOOST_TEST((co_await sent(rt.pool(), r, {.include = {"app/sub"}})) == (list{"app", "app/sub", "app/sub/x.c"}), boost::test_tools::per_element());
    BOOST_TEST((co_await sent(rt.pool(), r, {.include = {"**/*.c"}})) == (list{"app", "app/main.c", "app/sub", "app/sub/x.c"}),
               boost::test_tools::per_element());
    BOOST_TEST((co_await sent(rt.pool(), r, {.include = {"app"}, .exclude = {"**/*.o", "app/docs", "app/sub"}})) == (list{"app", "app/main.c"}),
               boost::test_tools::per_element());
    BOOST_TEST((co_await sent(rt.pool(), r, {.exclude = {"*", "!node/m/keep.js"}})) == (list{"node", "node/m", "node/m/keep.js"}),
               boost::test_tools::per_element());
    BOOST_TEST((co_await sent(rt.pool(), r, {.include = {"nothing"}})).empty());
}

CO_TEST_CASE(links_are_followed) {
    const auto r = std::make_shared<rig>();
    BOOST_TEST(follow_links(*r->from, {"link/x.c"}) == (list{"app/sub/x.c", "link"}), boost::test_tools::per_element());
    BOOST_TEST(follow_links(*r->from, {"chain/a.md"}) == (list{"app/docs", "chain", "docs/a.md"}), boost::test_tools::per_element());
    BOOST_TEST(follow_links(*r->from, {"loop/x"}) == (list{"loop"}), boost::test_tools::per_element());
    BOOST_TEST(follow_links(*r->from, {"li*"}) == (list{"app/sub", "li*"}), boost::test_tools::per_element());
    BOOST_TEST(follow_links(*r->from, {"missing/x", "../../app"}) == (list{"app", "missing/x"}), boost::test_tools::per_element());
    BOOST_TEST(follow_links(*r->from, {"/"}).empty());
    BOOST_TEST((co_await sent(rt.pool(), r, {.follow = {"link/x.c"}})) == (list{"app", "app/sub", "app/sub/x.c", "link"}),
               boost::test_tools::per_element());
}

// The first name of a hard link that is left out is no target; the next one takes its place.
CO_TEST_CASE(a_hard_link_whose_first_name_is_left_out) {
    const auto r = std::make_shared<rig>();
    write_file(r->d / "from/h/1", "x");
    stdfs::create_hard_link(r->d / "from/h/1", r->d / "from/h/2");
    stdfs::create_hard_link(r->d / "from/h/1", r->d / "from/h/3");
    BOOST_TEST((co_await sent(rt.pool(), r, {.include = {"h"}, .exclude = {"h/1"}})) == (list{"h", "h/2", "h/3"}), boost::test_tools::per_element());
    BOOST_TEST(fs::root((r->d / "to1").string()).stat("h/3")->nlink == 2U);
}

// What counts in a cache key and what does not (BuildKit's rules), and file actions other than copies.
#include "ops/world.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import cobuild.state;
import cobuild.content;
import cobuild.snapshot;
import cobuild.cache;
import cobuild.solver;
import cobuild.session;
import cobuild.registry;
import cobuild.source;
import cobuild.llb;
import cobuild.ops;

#include <cstdint>
#include "ops/world_body.hpp"

namespace {

task<solver::cache_info> info_of(world& w, llb::op what, std::size_t inputs = 2) {
    co_return co_await make_op(w, std::move(what), inputs)->describe({});
}

/// A step on input 0 with a bind mount of input 1, a cache, a secret and everything else that a step can have.
llb::op a_step() {
    llb::exec_op e;
    e.meta.args = {"/bin/sh", "-c", "true"};
    e.meta.env = {"A=b"};
    e.meta.cwd = "/";
    e.meta.proxy = llb::proxy_env{.http = "http://proxy"};
    e.meta.extra_hosts = {{"db", "10.0.0.1"}};
    e.mounts.push_back({.input = 0, .dest = "/", .output = 0});
    e.mounts.push_back({.input = 1, .selector = "/sub", .dest = "/src", .output = llb::no_output, .readonly = true});
    e.mounts.push_back(
        {.input = llb::scratch, .dest = "/cache", .output = llb::no_output, .type = llb::mount_type::cache, .cache = llb::cache_opt{.id = "one"}});
    e.secret_envs = {{"token", "TOKEN", false}};
    return {.inputs = {}, .what = std::move(e), .platform = llb::platform{.architecture = "amd64", .os = "linux"}};
}

llb::op changed(const std::function<void(llb::exec_op&)>& change) {
    auto o = a_step();
    change(std::get<llb::exec_op>(o.what));
    return o;
}

task<bool> fails(world& w, llb::op what, std::vector<solver::result> inputs, errc kind, std::string_view part) {
    const auto op = make_op(w, std::move(what), inputs.size());
    co_return says(co_await failure(op->run(std::move(inputs), {})), kind, part);
}

/// A file op of one action on input 0.
template<class A>
llb::op action(A what) {
    llb::file_op f;
    f.actions.push_back({.input = 0, .secondary_input = llb::scratch, .output = 0, .what = std::move(what)});
    return {.inputs = {}, .what = std::move(f), .platform = {}};
}

task<std::shared_ptr<seen>> act(world& w, llb::op what, solver::result base) {
    std::vector<solver::result> inputs{base};
    auto ran = co_await make_op(w, std::move(what), 1)->run(std::move(inputs), {});
    co_return co_await look(w, ran.outputs.at(0));
}

}  // namespace

BOOST_AUTO_TEST_SUITE(keys)

WORLD_CASE(what_counts_for_a_step) {
    const auto base = (co_await info_of(w, a_step())).op_digest;
    const std::vector<std::pair<const char*, std::function<void(llb::exec_op&)>>> same{
        {"address of a host", [](auto& e) { e.meta.extra_hosts[0].ip = "10.9.9.9"; }},
        {"proxy", [](auto& e) { e.meta.proxy.reset(); }},
        {"id of a cache", [](auto& e) { e.mounts[2].cache->id = "two"; }},
        {"sharing of a cache", [](auto& e) { e.mounts[2].cache->sharing = llb::cache_sharing::locked; }},
        {"selector", [](auto& e) { e.mounts[1].selector = "/elsewhere"; }},
    };
    for (const auto& [name, change] : same) BOOST_TEST(((co_await info_of(w, changed(change))).op_digest == base), name);
    const std::vector<std::pair<const char*, std::function<void(llb::exec_op&)>>> other{
        {"arguments", [](auto& e) { e.meta.args.back() = "false"; }},
        {"environment", [](auto& e) { e.meta.env.push_back("C=d"); }},
        {"directory", [](auto& e) { e.meta.cwd = "/tmp"; }},
        {"user", [](auto& e) { e.meta.user = "1"; }},
        {"host name", [](auto& e) { e.meta.hostname = "h"; }},
        {"name of a host", [](auto& e) { e.meta.extra_hosts[0].host = "other"; }},
        {"limit", [](auto& e) { e.meta.ulimits.push_back({"nofile", 1, 2}); }},
        {"cgroup", [](auto& e) { e.meta.cgroup_parent = "p"; }},
        {"network", [](auto& e) { e.network = llb::net_mode::none; }},
        {"secret's name", [](auto& e) { e.secret_envs[0].name = "T"; }},
        {"mount's place", [](auto& e) { e.mounts[1].dest = "/other"; }},
        {"mount's writability", [](auto& e) { e.mounts[1].readonly = false; }},
        {"cache's place", [](auto& e) { e.mounts[2].dest = "/c"; }},
        {"exit codes", [](auto& e) { e.meta.valid_exit_codes = {3}; }},
    };
    std::set<std::string> all{base.str()};
    for (const auto& [name, change] : other) BOOST_TEST(all.insert((co_await info_of(w, changed(change))).op_digest.str()).second, name);
    auto arm = a_step();
    arm.platform->architecture = "arm64";
    BOOST_TEST(all.insert((co_await info_of(w, arm)).op_digest.str()).second);
}

WORLD_CASE(which_inputs_count_by_content) {
    const auto info = co_await info_of(w, a_step());
    BOOST_REQUIRE(info.inputs.size() == 2U);
    BOOST_TEST(!info.inputs[0].content_of);
    BOOST_TEST(info.inputs[1].content_of);
    BOOST_TEST(info.inputs[1].selector.find("/sub") != std::string::npos);
    const auto elsewhere = co_await info_of(w, changed([](auto& e) { e.mounts[1].selector = "/elsewhere"; }));
    BOOST_TEST(elsewhere.inputs[1].selector != info.inputs[1].selector);
    const auto by_content = [&](std::function<void(llb::exec_op&)> change, std::size_t input) -> task<bool> {
        co_return (co_await info_of(w, changed(change))).inputs[input].content_of;
    };
    BOOST_TEST(!(co_await by_content([](auto& e) { e.mounts[1].content = llb::content_cache::off; }, 1)));
    BOOST_TEST((co_await by_content([](auto& e) { e.mounts[0].content = llb::content_cache::on; }, 0)));
    // A writable mount whose result is used counts as a whole, and an input mounted both ways too.
    BOOST_TEST(!(co_await by_content([](auto& e) { e.mounts[1].readonly = false, e.mounts[1].output = 1; }, 1)));
    BOOST_TEST(!(co_await by_content([](auto& e) { e.mounts.push_back({.input = 1, .dest = "/w", .output = 1}); }, 1)));
}

WORLD_CASE(a_step_reads_only_what_is_mounted) {
    const auto make = [&](const char* used, const char* unused) -> task<std::optional<digest>> {
        const auto chain = co_await chain_of(w, [&](const stdfs::path& p) {
            write_file(p / "sub/f", used);
            write_file(p / "other", unused);
        });
        co_return co_await make_op(w, a_step(), 2)->content_key(1, chain, {});
    };
    const auto first = co_await make("1", "1");
    BOOST_TEST((first == co_await make("1", "2")));
    BOOST_TEST((first != co_await make("2", "1")));
}

WORLD_CASE(what_counts_for_a_copy) {
    const auto base = co_await info_of(w, copies({copy_of("/a/b/name", "/d/")}, true));
    BOOST_TEST(!base.inputs[0].content_of);
    BOOST_TEST(base.inputs[1].content_of);
    // Where in its input the source lies is told by the selector; its name lands.
    const auto moved = co_await info_of(w, copies({copy_of("/c/name", "/d/")}, true));
    BOOST_TEST((moved.op_digest == base.op_digest));
    BOOST_TEST(moved.inputs[1].selector != base.inputs[1].selector);
    std::set<std::string> all{base.op_digest.str()};
    const std::vector<std::pair<const char*, std::function<void(llb::copy_action&)>>> other{
        {"name", [](auto& a) { a.src = "/a/b/other"; }},
        {"destination", [](auto& a) { a.dest = "/e/"; }},
        {"mode", [](auto& a) { a.mode = 0600; }},
        {"symbolic mode", [](auto& a) { a.mode_str = "u+x"; }},
        {"owner", [](auto& a) { a.owner = llb::chown_opt{.user = llb::user_opt{std::uint32_t{1}}, .group = {}}; }},  // O-CA-04
        {"time", [](auto& a) { a.timestamp = 0; }},
        {"excluded", [](auto& a) { a.exclude_patterns = {"x"}; }},
        {"included", [](auto& a) { a.include_patterns = {"x"}; }},
        {"unpacking", [](auto& a) { a.attempt_unpack = true; }},
        {"links", [](auto& a) { a.follow_symlink = false; }},
        {"replacing", [](auto& a) { a.always_replace_existing = true; }},
    };
    for (const auto& [name, change] : other) {
        auto a = copy_of("/a/b/name", "/d/");
        change(a);
        BOOST_TEST(all.insert((co_await info_of(w, copies({a}, true))).op_digest.str()).second, name);
    }
    // An owner by name is read from the base; a base that is only copied from as well counts as a whole.
    auto named = copy_of("/a", "/d/");
    named.owner = llb::chown_opt{.user = llb::named_user{"guest", 1}, .group = {}};
    BOOST_TEST(!(co_await info_of(w, copies({named}, true))).inputs[1].content_of);
}

// O-CA-03
WORLD_CASE(a_copy_reads_only_what_it_selects) {
    const auto key = [&](std::map<std::string, std::string> files, std::vector<llb::copy_action> actions) -> task<std::string> {
        const auto chain = co_await chain_of(w, [&](const stdfs::path& p) {
            for (const auto& [name, text] : files) write_file(p / name, text);
        });
        co_return (co_await make_op(w, copies(std::move(actions), true), 2)->content_key(1, chain, {})).value().str();
    };
    const std::vector<llb::copy_action> two{copy_of("/f1", "/d/"), copy_of("/f2", "/d/")};
    const auto first = co_await key({{"f1", "1"}, {"f2", "2"}, {"f3", "3"}}, two);
    BOOST_TEST(first == (co_await key({{"f1", "1"}, {"f2", "2"}, {"f3", "x"}}, two)));
    BOOST_TEST(first != (co_await key({{"f1", "1"}, {"f2", "x"}, {"f3", "3"}}, two)));
    BOOST_TEST(first != (co_await key({{"f1", "2"}, {"f2", "1"}, {"f3", "3"}}, two)));
    auto tree = copy_of("/", "/d/");
    tree.exclude_patterns = {"f3"};
    BOOST_TEST((co_await key({{"f1", "1"}, {"f3", "3"}}, {tree})) == (co_await key({{"f1", "1"}, {"f3", "x"}}, {tree})));
    BOOST_TEST((co_await key({{"f1", "1"}}, {copy_of("/f*", "/d/")})) != (co_await key({{"f2", "1"}}, {copy_of("/f*", "/d/")})));
}

WORLD_CASE(local_sources_differ_by_their_rules) {
    const auto key = [&](std::map<std::string, std::string> attrs, std::string id) -> task<digest> {
        w.scope.id = std::move(id);
        llb::graph g;
        const auto top = g.add(context_op(attrs));
        auto made = ops::make_graph(llb::load(g.finish(top)), *w.env, w.scope);
        const auto info = co_await made.vertices.at(0).op->describe({});
        BOOST_TEST(info.ephemeral);
        co_return info.op_digest;
    };
    const auto base = co_await key({}, "1");
    BOOST_TEST((base == co_await key({}, "1")));
    BOOST_TEST((base != co_await key({}, "2")));
    BOOST_TEST((base != co_await key({{"local.excludepatterns", R"(["a"])"}}, "1")));
    BOOST_TEST((base != co_await key({{"local.includepattern", R"(["a"])"}}, "1")));
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(actions)

WORLD_CASE(mkdir) {
    const auto base = co_await chain_of(w, [](const stdfs::path& p) {
        stdfs::create_directories(p / "there");
        ::chmod((p / "there").c_str(), 0700);
        write_file(p / "file", "x");
    });
    auto deep = llb::mkdir_action{.path = "/a/b",
                                  .mode = 01750,
                                  .make_parents = true,
                                  .owner = llb::chown_opt{.user = llb::user_opt{std::uint32_t{3}}, .group = {}},
                                  .timestamp = 5'000'000'000};
    const auto made = co_await act(w, action(deep), base);
    for (const auto* path : {"a", "a/b"}) {
        BOOST_TEST(made->mode(path) == "0750");  // BuildKit takes no special bits here
        BOOST_TEST(made->owner(path) == "3:3");
    }
    BOOST_TEST(made->stat("a/b")->mtime.seconds == 5);
    // O-FS-10: what exists stays as it is.
    for (const bool parents : {false, true})
        BOOST_TEST((co_await act(w, action(llb::mkdir_action{.path = "/there", .mode = 0755, .make_parents = parents}), base))->mode("there") ==
                   "0700");
    deep.make_parents = false;
    std::vector<solver::result> inputs{base};
    BOOST_TEST((co_await fails(w, action(deep), inputs, errc::not_found, "a")));
    BOOST_TEST((co_await fails(w, action(llb::mkdir_action{.path = "/file", .mode = 0755}), inputs, errc::exists, "/file")));
}

WORLD_CASE(mkfile_rm_symlink) {
    const auto base = co_await chain_of(w, [](const stdfs::path& p) {
        write_file(p / "d/keep", "keep");
        write_file(p / "d/one.txt", "1");
        write_file(p / "d/two.txt", "2");
        write_file(p / "real", "old and longer");
        ::chown((p / "real").c_str(), 4, 5);
        ::chmod((p / "real").c_str(), 0600);
        stdfs::create_symlink("/real", p / "link");
        stdfs::create_symlink("/d", p / "dlink");
    });
    std::vector<solver::result> inputs{base};
    const auto file = co_await act(
        w,
        action(llb::mkfile_action{.path = "/f",
                                  .mode = 04640,
                                  .data = std::string("a\0b", 3),
                                  .owner = llb::chown_opt{.user = llb::user_opt{std::uint32_t{1}}, .group = llb::user_opt{std::uint32_t{2}}},
                                  .timestamp = 7'000'000'009}),
        base);
    BOOST_TEST(file->text("f") == std::string("a\0b", 3));
    BOOST_TEST(file->mode("f") == "0640");
    BOOST_TEST(file->owner("f") == "1:2");
    BOOST_TEST((file->stat("f")->mtime == fs::file_time{7, 9}));
    const auto through = co_await act(w, action(llb::mkfile_action{.path = "/link", .mode = 0644, .data = "new"}), base);
    BOOST_TEST(through->stat("link")->is_link());
    BOOST_TEST(through->text("real") == "new");
    BOOST_TEST(through->mode("real") == "0600");  // as opening and truncating it leaves it
    BOOST_TEST(through->owner("real") == "4:5");
    BOOST_TEST((co_await fails(w, action(llb::mkfile_action{.path = "/d", .mode = 0644}), inputs, errc::exists, "regular file")));
    BOOST_TEST((co_await act(w, action(llb::rm_action{.path = "/d"}), base))->has("d") == false);
    const auto unlinked = co_await act(w, action(llb::rm_action{.path = "/dlink"}), base);
    BOOST_TEST(!unlinked->has("dlink"));
    BOOST_TEST(unlinked->has("d/keep"));
    const auto some = co_await act(w, action(llb::rm_action{.path = "/d/*.txt", .allow_wildcard = true}), base);
    BOOST_TEST(some->root->list("d") == (std::vector<std::string>{"keep"}), boost::test_tools::per_element());
    BOOST_TEST((co_await fails(w, action(llb::rm_action{.path = "/none"}), inputs, errc::not_found, "/none")));
    BOOST_TEST((co_await act(w, action(llb::rm_action{.path = "/none", .allow_not_found = true}), base))->has("d"));
    const auto link =
        co_await act(w, action(llb::symlink_action{.oldpath = "../target", .newpath = "/new", .owner = {}, .timestamp = 3'000'000'000}), base);
    BOOST_TEST(link->root->read_link("new") == "../target");
    BOOST_TEST(link->stat("new")->mtime.seconds == 3);
}

// Each action goes on from an earlier one; a result may go several ways, and what no output needs is not run.
WORLD_CASE(chains_of_actions) {
    const auto base = co_await chain_of(w, [](const stdfs::path& p) { write_file(p / "b", "b"); });
    llb::file_op f;
    f.actions.push_back({.input = 0,
                         .secondary_input = llb::scratch,
                         .output = llb::no_output,
                         .what = llb::mkfile_action{.path = "/one", .mode = 0644, .data = "1"}});
    f.actions.push_back(
        {.input = 1, .secondary_input = llb::scratch, .output = 0, .what = llb::mkfile_action{.path = "/two", .mode = 0644, .data = "2"}});
    const auto both = co_await act(w, {.inputs = {}, .what = f, .platform = {}}, base);
    for (const auto* path : {"b", "one", "two"}) BOOST_TEST(both->has(path), path);
    // A copy out of a result that was made in the same op.
    f.actions[1] = {.input = 0, .secondary_input = 1, .output = 0, .what = copy_of("/one", "/copied")};
    const auto copied_out = co_await act(w, {.inputs = {}, .what = f, .platform = {}}, base);
    BOOST_TEST(copied_out->text("copied") == "1");
    BOOST_TEST(!copied_out->has("one"));
    f.actions[1] = {.input = 1, .secondary_input = 1, .output = 0, .what = copy_of("/one", "/copied")};
    const auto from_itself = co_await act(w, {.inputs = {}, .what = f, .platform = {}}, base);
    for (const auto* path : {"b", "one", "copied"}) BOOST_TEST(from_itself->has(path), path);
}

WORLD_CASE(results_that_go_several_ways) {
    const auto base = co_await chain_of(w, [](const stdfs::path& p) { write_file(p / "b", "b"); });
    const auto file = [](std::string path) { return llb::mkfile_action{.path = std::move(path), .mode = 0644, .data = "x"}; };
    llb::file_op f;  // input 0 is the base, action i has the index i + 1
    f.actions.push_back({.input = 0, .secondary_input = llb::scratch, .output = 1, .what = file("/root")});
    f.actions.push_back({.input = 1, .secondary_input = llb::scratch, .output = llb::no_output, .what = file("/left")});
    f.actions.push_back({.input = 1, .secondary_input = llb::scratch, .output = 2, .what = file("/right")});
    f.actions.push_back({.input = 3, .secondary_input = 2, .output = 0, .what = copy_of("/left", "/from-left")});
    f.actions.push_back({.input = 0, .secondary_input = llb::scratch, .output = llb::no_output, .what = llb::rm_action{.path = "/not-there"}});
    const auto op = make_op(w, {.inputs = {}, .what = f, .platform = {}}, 1);
    std::vector<solver::result> inputs{base};
    const auto ran = co_await op->run(inputs, {});
    const auto names = [&](std::size_t output) -> task<std::vector<std::string>> {
        co_return (co_await look(w, ran.outputs.at(output)))->root->list("");
    };
    using list = std::vector<std::string>;
    BOOST_TEST((co_await names(0)) == (list{"b", "from-left", "right", "root"}), boost::test_tools::per_element());
    BOOST_TEST((co_await names(1)) == (list{"b", "root"}), boost::test_tools::per_element());
    BOOST_TEST((co_await names(2)) == (list{"b", "right", "root"}), boost::test_tools::per_element());
}

BOOST_AUTO_TEST_SUITE_END()

// What ops of a graph come to, as a client of BuildKit drives builds: job by job on one engine.
#include "support/fake_registry.hpp"
#include "support/support.hpp"

#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

import cobuild.base;
import cobuild.async;
import cobuild.build;
import cobuild.config;
import cobuild.llb;
import cobuild.progress;
import cobuild.session;

#include "support/failure.hpp"

using namespace cobuild;
using cobuild::test::failure;
using cobuild::test::fake_registry;
using cobuild::test::says;
using texts = std::vector<std::string>;

namespace {

using output = std::optional<llb::input>;  ///< none: an empty root

/// A graph under construction.
struct graph {
    llb::graph g;

    llb::input add(llb::operation what, std::vector<llb::input> inputs, llb::op_metadata meta = {}, bool platform = false) {
        llb::op o{.inputs = std::move(inputs), .what = std::move(what), .platform = {}};
        if (platform) o.platform = llb::platform{.architecture = "amd64", .os = "linux"};
        return g.add(o, std::move(meta));
    }
    template<class Action>
    llb::input file(output below, Action what, output from = {}) {
        std::vector<llb::input> inputs;
        if (below) inputs.push_back(*below);
        if (from && from != below) inputs.push_back(*from);
        llb::file_op f;
        f.actions.push_back({.input = below ? 0 : llb::scratch, .secondary_input = llb::scratch, .output = 0, .what = std::move(what)});
        if (from) f.actions[0].secondary_input = static_cast<std::int64_t>(inputs.size()) - 1;
        return add(std::move(f), std::move(inputs));
    }
    llb::input text(output below, const std::string& path, const std::string& body, std::int32_t mode = 0644) {
        return file(below, llb::mkfile_action{.path = path, .mode = mode, .data = body, .owner = {}, .timestamp = 1'000'000'000});
    }
    llb::input dir(output below, const std::string& path, std::int32_t mode = 0755) {
        return file(below, llb::mkdir_action{.path = path, .mode = mode, .owner = {}, .timestamp = 1'000'000'000});
    }
    llb::input rm(llb::input below, const std::string& path) { return file(below, llb::rm_action{.path = path}); }
    llb::input merge(const std::vector<llb::input>& all) {
        llb::merge_op m;
        for (std::size_t i = 0; i < all.size(); ++i) m.inputs.push_back(static_cast<std::int64_t>(i));
        return add(std::move(m), all);
    }
    llb::input diff(output lower, output upper) {
        llb::diff_op d;
        std::vector<llb::input> inputs;
        if (lower) d.lower = 0, inputs.push_back(*lower);
        if (upper) d.upper = static_cast<std::int64_t>(inputs.size()), inputs.push_back(*upper);
        return add(d, std::move(inputs));
    }
    /// The host's static busybox in an empty root.
    llb::input busybox() {
        const auto source = add(llb::source_op{"local://tools", {}}, {});
        return file(dir({}, "/bin"), llb::copy_action{.src = "/busybox", .dest = "/bin/busybox"}, source);
    }
    llb::exec_op step(const std::string& script) {
        llb::exec_op e;
        e.meta.args = {"/bin/busybox", "sh", "-ec", script};
        e.meta.cwd = "/";
        e.network = llb::net_mode::none;
        e.mounts.push_back({.input = 0, .dest = "/", .output = 0});
        return e;
    }
    llb::input run(llb::input root, const std::string& script) { return add(step(script), {root}, {}, true); }
};

llb::mount cache_mount(const std::string& id, const std::string& at) {
    return {.input = llb::scratch,
            .dest = at,
            .output = llb::no_output,
            .type = llb::mount_type::cache,
            .cache = llb::cache_opt{.id = id, .sharing = llb::cache_sharing::locked}};
}

/// Warnings that a build gave.
struct warnings final : progress::sink {
    texts all;
    void on_event(const progress::event& e) override {
        if (const auto* w = std::get_if<progress::warning>(&e)) all.push_back(w->message);
    }
};

struct world {
    test::scratch_dir dir;
    std::shared_ptr<build::engine> engine;

    build::job_options options() const {
        session::local_options o;
        o.directories["tools"] = dir / "tools";
        build::job_options out;
        out.id = "test";
        out.client = session::make_local(engine->runtime().pool(), std::move(o));
        return out;
    }
    std::shared_ptr<build::job> job() const { return engine->start(options()); }
};

/// Everything below a directory of a result: "dir/", "file=text".
async::task<texts> tree_of(std::shared_ptr<build::ref> r, std::string at = "") {
    texts out;
    for (const auto& e : co_await r->read_directory(at.empty() ? "/" : at, "")) {
        const auto path = cat(at, "/", e.name);
        if (e.info.is_dir()) {
            out.push_back(path.substr(1) + "/");
            for (auto& below : co_await tree_of(r, path)) out.push_back(std::move(below));
        } else {
            out.push_back(cat(path.substr(1), "=", e.info.is_file() ? co_await r->read_file(path, 0, 0) : "?"));
        }
    }
    co_return out;
}

async::task<texts> tree_of(world& w, graph& g, llb::input result) {
    const auto job = w.job();
    const auto ref = job->define(g.g.finish(result));
    co_return co_await tree_of(ref);
}

void with_engine(std::function<async::task<void>(world&)> work) {
    if (!test::needs_root()) return;
    async::runtime rt;
    auto w = std::make_shared<world>();
    std::filesystem::create_directories(w->dir / "tools");
    for (const auto* candidate : {"/bin/busybox", "/usr/bin/busybox"})
        if (std::filesystem::exists(candidate))
            std::filesystem::copy_file(candidate, w->dir / "tools/busybox", std::filesystem::copy_options::overwrite_existing);
    rt.block_on([](std::shared_ptr<world> all, std::function<async::task<void>(world&)> what) -> async::task<void> {
        build::engine_options o;
        o.root = all->dir / "root";
        o.settings.oci.network = config::network_mode::none;
        all->engine = co_await build::engine::open(o);
        std::exception_ptr failed;
        try {
            co_await async::on(all->engine->runtime().get_executor(), what(*all));
        } catch (...) {
            failed = std::current_exception();
        }
        co_await all->engine->close();
        if (failed) std::rethrow_exception(failed);
    }(w, std::move(work)));
}

}  // namespace

BOOST_AUTO_TEST_SUITE(merge_and_diff)

BOOST_AUTO_TEST_CASE(roots_that_do_not_stand_on_each_other_are_compared) {
    with_engine([](world& w) -> async::task<void> {
        graph g;
        const auto lower = g.text(g.text(g.dir({}, "/d"), "/d/kept", "k"), "/gone", "g");
        const auto upper = g.text(g.text(g.dir({}, "/d"), "/d/kept", "k"), "/new", "n");
        const auto base = g.text(g.text({}, "/gone", "from the base"), "/own", "o");
        const texts alone{"new=n"}, merged{"new=n", "own=o"};
        BOOST_TEST((co_await tree_of(w, g, g.diff(lower, upper))) == alone, boost::test_tools::per_element());
        // What was deleted is deleted on any other root, too.
        BOOST_TEST((co_await tree_of(w, g, g.merge({base, g.diff(lower, upper)}))) == merged, boost::test_tools::per_element());
    });
}

BOOST_AUTO_TEST_CASE(a_diff_to_nothing_deletes_and_one_from_nothing_is_all) {
    with_engine([](world& w) -> async::task<void> {
        graph g;
        const auto one = g.text({}, "/one", "1");
        const auto two = g.text({}, "/two", "2");
        const texts only_two{"two=2"}, only_one{"one=1"};
        BOOST_TEST((co_await tree_of(w, g, g.merge({one, two, g.diff(one, {})}))) == only_two, boost::test_tools::per_element());
        BOOST_TEST((co_await tree_of(w, g, g.diff({}, one))) == only_one, boost::test_tools::per_element());
        BOOST_TEST((co_await tree_of(w, g, g.diff(one, one))).empty());
    });
}

// A step's mounts touch /etc, and a file that went away and came back is in the step's layer: neither is a change.
BOOST_AUTO_TEST_CASE(a_diff_of_a_step_has_what_it_changed) {
    with_engine([](world& w) -> async::task<void> {
        graph g;
        const auto base = g.text(g.dir(g.busybox(), "/etc"), "/etc/old", "x");
        const auto after = g.run(base, "busybox=/bin/busybox; $busybox mv /etc/old /x; $busybox mv /x /etc/old; echo y > /new");
        const texts expected{"new=y\n"};
        BOOST_TEST((co_await tree_of(w, g, g.diff(base, after))) == expected, boost::test_tools::per_element());
    });
}

// O-FS-06 on another root: a directory made again hides what it held, not what another root has there.
BOOST_AUTO_TEST_CASE(a_directory_made_again_hides_nothing_of_others) {
    with_engine([](world& w) -> async::task<void> {
        graph g;
        const auto base = g.text(g.dir(g.busybox(), "/d"), "/d/old", "x");
        const auto again = g.run(base, "/bin/busybox rm -r /d; /bin/busybox mkdir /d; echo n > /d/new");
        const auto other = g.text(g.text(g.dir({}, "/d"), "/d/other", "o"), "/d/old", "other's");
        const texts expected{"d/", "d/new=n\n", "d/other=o"};
        BOOST_TEST((co_await tree_of(w, g, g.merge({other, g.diff(base, again)}))) == expected, boost::test_tools::per_element());
    });
}

BOOST_AUTO_TEST_CASE(deletions_of_a_diff_outlast_a_merge) {
    with_engine([](world& w) -> async::task<void> {
        graph g;
        const auto before = g.text({}, "/foo", "B");
        const auto built = g.text(g.rm(before, "/foo"), "/bar", "");
        const texts expected{"bar="};
        BOOST_TEST((co_await tree_of(w, g, g.merge({g.text({}, "/foo", "A"), g.diff({}, built)}))) == expected, boost::test_tools::per_element());
    });
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(steps)

BOOST_AUTO_TEST_CASE(a_cache_directory_mounted_twice_is_one) {
    with_engine([](world& w) -> async::task<void> {
        graph g;
        auto e = g.step("[ ! -e /m2/foo ]; echo > /m1/foo; [ -e /m2/foo ]");
        e.mounts.push_back(cache_mount("one", "/m1"));
        e.mounts.push_back(cache_mount("one", "/m2"));
        const auto job = w.job();
        co_await job->define(g.g.finish(g.add(std::move(e), {g.busybox()}, {}, true)))->evaluate();
    });
}

BOOST_AUTO_TEST_CASE(a_step_that_ignores_the_cache_begins_its_directories_anew) {
    with_engine([](world& w) -> async::task<void> {
        graph g;
        const auto root = g.busybox();
        const auto with = [&](const std::string& script, bool ignore) {
            auto e = g.step(script);
            e.mounts.push_back(cache_mount("one", "/m"));
            return g.add(std::move(e), {root}, {.ignore_cache = ignore}, true);
        };
        for (const auto step : {with("echo > /m/foo", false), with("[ ! -e /m/foo ]; echo > /m/other", true), with("[ -e /m/other ]", false)}) {
            const auto job = w.job();
            co_await job->define(g.g.finish(step))->evaluate();
        }
    });
}

BOOST_AUTO_TEST_CASE(a_root_that_is_read_only_still_runs_steps) {
    with_engine([](world& w) -> async::task<void> {
        graph g;
        auto e = g.step("/bin/busybox touch /foo");
        e.mounts[0].readonly = true;
        e.mounts[0].output = llb::no_output;
        e.mounts.push_back({.input = llb::scratch, .dest = "/mnt", .output = 0});
        const auto job = w.job();
        const auto ref = job->define(g.g.finish(g.add(std::move(e), {g.busybox()}, {}, true)));
        BOOST_TEST(says(co_await failure(ref->evaluate()), "did not complete successfully: exit code: 1"));
    });
}

BOOST_AUTO_TEST_CASE(a_passthrough_gives_on_what_is_asked_and_builds_the_rest) {
    with_engine([](world& w) -> async::task<void> {
        graph g;
        const auto failing = g.run(g.busybox(), "exit 3");
        const auto a = g.text({}, "/a", "1"), c = g.text({}, "/c", "3");
        const auto good = g.add(llb::passthrough_op{"test", {0, 2}}, {a, g.text({}, "/b", "2"), c});
        const texts expected{"a=1", "c=3"};
        BOOST_TEST((co_await tree_of(w, g, g.merge({good, {good.vertex, 1}}))) == expected, boost::test_tools::per_element());
        const auto job = w.job();
        const auto bad = job->define(g.g.finish(g.add(llb::passthrough_op{"test", {0}}, {a, failing})));
        BOOST_TEST(says(co_await failure(bad->evaluate()), "exit code: 3"));
    });
}

BOOST_AUTO_TEST_CASE(what_a_copy_does_not_find) {
    with_engine([](world& w) -> async::task<void> {
        graph g;
        const auto root = g.text({}, "/foo", "1");
        const auto job = w.job();
        // The source is what is changed as well, so it is not looked at before.
        const auto same = job->define(g.g.finish(g.file(root, llb::copy_action{.src = "/bar", .dest = "/baz"}, root)));
        BOOST_TEST(says(co_await failure(same->evaluate()), "/bar: no such file or directory"));
        const auto other = job->define(g.g.finish(g.file({}, llb::copy_action{.src = "/bar", .dest = "/baz"}, root)));
        BOOST_TEST(says(co_await failure(other->evaluate()), "\"/bar\": not found"));
    });
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(results)

// The further outputs of a step are cached elsewhere as well: here the mount's, whose root nobody wants.
BOOST_AUTO_TEST_CASE(a_mounts_output_comes_back_from_a_cache) {
    fake_registry r;
    const auto build_with = [&r](bool out, std::string* text) {
        with_engine([&r, out, text](world& w) -> async::task<void> {
            graph g;
            auto e = g.step("/bin/busybox head -c 16 /dev/urandom | /bin/busybox sha256sum > /wd/unique");
            e.mounts.push_back({.input = llb::scratch, .dest = "/wd", .output = 1});
            const auto made = g.add(std::move(e), {g.busybox()}, {}, true);
            auto o = w.options();
            const build::cache_entry entry{"registry", {{"ref", cat(r.host(), "/app/cache:1")}}};
            if (out) o.cache_to.push_back(entry);
            const auto job = w.engine->start(std::move(o));
            if (!out) job->import_caches({entry});
            const auto ref = job->define(g.g.finish(llb::input{made.vertex, 1}));
            *text = co_await ref->read_file("/unique", 0, 0);
            build::job_result result;
            result.refs[""] = ref;
            (void)co_await job->finish(std::move(result), {});
        });
    };
    std::string first, second;
    build_with(true, &first);
    build_with(false, &second);
    BOOST_TEST(first == second);
}

// What an image is made of stands in it, and building it from that gives the same image.
BOOST_AUTO_TEST_CASE(an_image_with_its_cache_is_built_again_the_same) {
    fake_registry r;
    const auto ref = cat(r.host(), "/app/image:1"), base = cat(r.host(), "/base/tools:1");
    with_engine([&base](world& w) -> async::task<void> {
        graph g;
        const auto job = w.job();
        build::job_result result;
        result.refs[""] = job->define(g.g.finish(g.busybox()));
        (void)co_await job->finish(std::move(result), {{.type = "image", .attributes = {{"name", base}, {"push", "true"}}}});
    });
    // On one state directory: what is remembered there of results that are gone must not show either.
    with_engine([&ref, &base](world& w) -> async::task<void> {
        const auto built = [&](bool from) -> async::task<std::string> {
            graph g;
            const auto tools = g.add(llb::source_op{cat("docker-image://", base), {}}, {}, {}, true);
            const auto on_mount = [&g, tools](output below, const std::string& script) {
                auto e = g.step(script);
                std::vector<llb::input> inputs{tools};
                e.mounts.push_back({.input = below ? 1 : llb::scratch, .dest = "/wd", .output = 1});
                if (below) inputs.push_back(*below);
                return llb::input{g.add(std::move(e), std::move(inputs), {}, true).vertex, 1};
            };
            const auto first = on_mount({}, "echo foobar > /wd/const");
            const auto last = on_mount(first, "/bin/busybox head -c 16 /dev/urandom | /bin/busybox sha256sum > /wd/unique");
            auto o = w.options();
            o.cache_to.push_back({"inline", {}});
            const auto job = w.engine->start(std::move(o));
            if (from) job->import_caches({{"registry", {{"ref", ref}}}});
            build::job_result result;
            result.refs[""] = job->define(g.g.finish(last));
            const auto made = co_await job->finish(std::move(result), {{.type = "image", .attributes = {{"name", ref}, {"push", "true"}}}});
            co_return made.exporter_response.at("containerimage.digest");
        };
        const auto once = co_await built(false);
        (void)co_await w.engine->prune({.all = true});
        const auto again = co_await built(true);
        BOOST_TEST(again == once);
    });
}

BOOST_AUTO_TEST_CASE(an_empty_root_has_an_empty_cache) {
    fake_registry r;
    with_engine([&r](world& w) -> async::task<void> {
        auto o = w.options();
        o.cache_to.push_back({"registry", {{"ref", cat(r.host(), "/app/cache:1")}}});
        const auto job = w.engine->start(std::move(o));
        build::job_result result;
        result.refs[""] = job->define({});
        (void)co_await job->finish(std::move(result), {});
        BOOST_TEST(r.count("PUT") == 0U);
    });
}

// As BuildKit's worker "oci": what is to last is pushed or sent to the client.
BOOST_AUTO_TEST_CASE(a_jobs_image_is_gone_with_its_layers) {
    with_engine([](world& w) -> async::task<void> {
        graph g;
        const auto job = w.job();
        build::job_result result;
        result.refs[""] = job->define(g.g.finish(g.text({}, "/foo", "1")));
        const auto made = co_await job->finish(std::move(result), {{.type = "image", .attributes = {{"name", "example.com/app:1"}}}});
        BOOST_TEST(made.exporter_response.at("image.name") == "example.com/app:1");
        BOOST_TEST((co_await w.engine->images()).empty());
        (void)co_await w.engine->prune({.all = true});
        BOOST_TEST((co_await w.engine->blobs()).empty());
    });
}

BOOST_AUTO_TEST_CASE(a_frontend_names_the_image_where_the_client_lets_it) {
    with_engine([](world& w) -> async::task<void> {
        const auto job = w.job();
        build::job_result result;
        result.metadata["image.name"] = "example.com/app:fe";
        result.refs[""] = nullptr;
        const auto made = co_await job->finish(result, {{.type = "image", .attributes = {{"name", "*"}}}});
        BOOST_TEST(made.exporter_response.at("image.name") == "example.com/app:fe");
        const auto mine = co_await job->finish(result, {{.type = "image", .attributes = {{"name", "example.com/mine:1"}}}});
        BOOST_TEST(mine.exporter_response.at("image.name") == "example.com/mine:1");
    });
}

BOOST_AUTO_TEST_CASE(what_a_result_says_of_itself_is_checked) {
    with_engine([](world& w) -> async::task<void> {
        const auto refuse = [&w](std::string key, std::string value) -> async::task<error> {
            const auto job = w.job();
            build::job_result result;
            result.metadata[key] = value;
            result.refs[""] = nullptr;
            co_return co_await failure(job->finish(std::move(result), {{.type = "image", .attributes = {}}}));
        };
        const std::string config = "containerimage.config", platforms = "refs.platforms";
        BOOST_TEST(says(co_await refuse(config, "null"), "invalid null image config for export"));
        BOOST_TEST(says(co_await refuse(config, R"({"architecture":"amd64"})"), "os and architecture must be specified together"));
        BOOST_TEST(says(co_await refuse(platforms, "null"), "invalid empty platforms index for exporter"));
        BOOST_TEST(says(co_await refuse(platforms, R"({"Platforms":[{"ID":"","Platform":{}}]})"), "invalid empty platform key for exporter"));
        BOOST_TEST(
            says(co_await refuse(platforms, R"({"Platforms":[{"ID":"foo","Platform":{"architecture":"","os":""}}]})"), "invalid platform value"));
    });
}

BOOST_AUTO_TEST_CASE(platforms_that_were_not_asked_for_are_told) {
    with_engine([](world& w) -> async::task<void> {
        const auto told = [&w](std::string asked) -> async::task<texts> {
            graph g;
            auto o = w.options();
            const auto sink = std::make_shared<warnings>();
            o.sink = sink;
            if (!asked.empty()) o.attrs["platform"] = asked;
            const auto job = w.engine->start(std::move(o));
            build::job_result result;
            result.refs[""] = job->define(g.g.finish(g.text({}, "/foo", "1")));
            result.metadata["containerimage.config"] = R"({"architecture":"amd64","os":"linux"})";
            (void)co_await job->finish(std::move(result), {});
            co_return sink->all;
        };
        BOOST_TEST((co_await told("linux/amd64")).empty());
        const texts several{"Multiple platforms requested but result is not multi-platform"};
        BOOST_TEST((co_await told("linux/amd64,linux/arm64")) == several, boost::test_tools::per_element());
        const texts other{"Requested platform \"linux/arm64\" does not match result platform \"linux/amd64\""};
        BOOST_TEST((co_await told("linux/arm64")) == other, boost::test_tools::per_element());
    });
}

// The same layers under a limit are the same root, and a tag may be held against a digest.
BOOST_AUTO_TEST_CASE(images_by_their_first_layers_and_by_checksum) {
    fake_registry r;
    with_engine([&r](world& w) -> async::task<void> {
        graph g;
        const auto ref = cat(r.host(), "/app/layers:1");
        {
            const auto job = w.job();
            build::job_result result;
            result.refs[""] = job->define(g.g.finish(g.text(g.text(g.text({}, "/first", "1"), "/second", "2"), "/third", "3")));
            (void)co_await job->finish(std::move(result), {{.type = "image", .attributes = {{"name", ref}, {"push", "true"}}}});
        }
        const auto image = [&](std::map<std::string, std::string> attrs) {
            return g.add(llb::source_op{cat("docker-image://", ref), std::move(attrs)}, {}, {}, true);
        };
        const texts two{"first=1", "second=2"}, last{"third=3"};
        BOOST_TEST((co_await tree_of(w, g, image({{"image.layerlimit", "2"}}))) == two, boost::test_tools::per_element());
        BOOST_TEST((co_await tree_of(w, g, g.diff(image({{"image.layerlimit", "2"}}), image({})))) == last, boost::test_tools::per_element());
        BOOST_TEST(says(co_await failure(tree_of(w, g, image({{"image.layerlimit", "0"}}))), "invalid layer limit 0"));
        const auto wrong = cat("sha256:", std::string(64, 'a'));
        const auto e = co_await failure(tree_of(w, g, image({{"image.checksum", wrong}})));
        BOOST_TEST(says(e, cat("for ", ref, " does not match expected checksum ", wrong)));
    });
}

BOOST_AUTO_TEST_SUITE_END()

// Graphs as contexts, what is wanted of named contexts, and times that come from sources.
#include "fixture.hpp"

using namespace frontend_test;

namespace {

/// A graph of one file op upon scratch, read from a source of its own.
llb::definition a_graph(const std::string& path, const std::string& dockerfile = "FROM scratch\n") {
    llb::graph g;
    g.set_source({.filename = "Dockerfile", .data = dockerfile, .definition = nullptr, .language = "Dockerfile"});
    llb::file_op f;
    f.actions.push_back({.input = llb::scratch,
                         .secondary_input = llb::scratch,
                         .output = 0,
                         .what = llb::mkfile_action{.path = path, .mode = 0644, .data = "x", .owner = {}, .timestamp = -1}});
    llb::op_metadata meta;
    meta.description[std::string(llb::custom_name)] = cat("make ", path);
    return g.finish(g.add({.inputs = {}, .what = std::move(f), .platform = {}}, std::move(meta), {{{1, 0}, {1, 0}}}));
}

std::string attribute(const llb::source_op& s, const std::string& key) {
    const auto at = s.attrs.find(key);
    return at == s.attrs.end() ? std::string() : at->second;
}

adjust with_input(const std::string& name, llb::definition graph, const std::string& metadata = {}) {
    return [=](frontend::request& r, fake_gateway&) {
        r.named_contexts["base"] = cat("input:", name);
        r.inputs[name] = graph;
        if (!metadata.empty()) r.input_metadata[name] = metadata;
    };
}

}  // namespace

BOOST_AUTO_TEST_SUITE(inputs)

// The graph comes whole and under its own digests, so that what its maker built is not built again.
BOOST_AUTO_TEST_CASE(a_named_input_is_the_stage) {
    const auto graph = a_graph("/in");
    const auto o = build("FROM base\nRUN true\n", with_input("b", graph));
    BOOST_TEST((o.step("make /in").id == llb::load(graph).vertices.at(0).id));
    const auto& run = o.step("[1/2] RUN true");
    BOOST_TEST((run.what.inputs.at(0).vertex == o.step("make /in").id));
    // Both Dockerfiles are told, each once; the input's places still name its own.
    BOOST_REQUIRE(o.r.graph.source.has_value());
    BOOST_TEST(o.r.graph.source->infos.size() == 2U);
    BOOST_TEST(o.r.graph.source->locations.at(o.step("make /in").id).list.at(0).source_index == 1);
    BOOST_TEST(o.r.graph.source->locations.at(run.id).list.at(0).source_index == 0);
    const auto same = build("FROM base\nRUN true\n", with_input("b", a_graph("/in", "FROM base\nRUN true\n")));
    BOOST_TEST(same.r.graph.source->infos.size() == 1U);
}

BOOST_AUTO_TEST_CASE(the_config_of_an_input_is_taken_over) {
    const auto metadata = cat(R"({"containerimage.config":")", base64_encode(busybox), "\"}");
    const auto o = build("FROM base\nRUN true\n", with_input("b", a_graph("/in"), metadata));
    BOOST_TEST((o.exec("[1/2] RUN true").meta.env == strings{"PATH=/bin", "LANG=C"}));
    BOOST_TEST(o.r.base_config == busybox);
    BOOST_TEST(
        says(failure("FROM base\n", with_input("b", a_graph("/in"), "{\"containerimage.config\":\"%\"}")), "input b of the named context base"));
}

BOOST_AUTO_TEST_CASE(an_input_that_is_not_there) {
    const auto e = failure("FROM scratch\nCOPY --from=base / /\n", [](frontend::request& r, fake_gateway&) {
        r.named_contexts["base"] = "input:bsae";
        r.inputs["base"] = {};
    });
    BOOST_TEST(says(e, "invalid input bsae for base: there is no input of that name (did you mean base?)"));
}

BOOST_AUTO_TEST_CASE(the_build_context_as_an_input) {
    const auto graph = a_graph("/in");
    const auto as_context = [&](std::string subdir) {
        return [&graph, subdir](frontend::request& r, fake_gateway&) {
            r.inputs["context"] = graph;
            r.context_subdir = subdir;
        };
    };
    const auto o = build("FROM scratch\nCOPY in /\n", as_context(""));
    BOOST_TEST((o.step("[1/1] COPY in /").what.inputs == std::vector<llb::input>{{o.step("make /in").id, 0}}));
    const auto below = build("FROM scratch\nCOPY in /\n", as_context("sub/dir"));
    BOOST_TEST(below.copy("[internal] load build context").src == "/sub/dir");
    BOOST_TEST(below.copy("[internal] load build context").dir_copy_contents);
    const auto e = failure("FROM scratch\nCOPY in /\n", [](frontend::request& r, fake_gateway&) { r.inputs["context"] = {}; });
    BOOST_TEST(says(e, "invalid nil input definition to definition op"));
}

// Only what is copied, mounted or built upon comes from the client.
BOOST_AUTO_TEST_CASE(a_named_directory_brings_what_is_wanted) {
    const std::string file =
        "FROM scratch AS one\nCOPY --from=foo /a /\n"
        "FROM busybox AS mounted\nRUN --mount=from=foo,src=/b,target=/b true\n"
        "FROM foo AS whole\nRUN true\n"
        "FROM scratch AS two\nCOPY --from=foo a c/*.txt /\n";
    const auto wanted = [&](const std::string& text, const std::string& target) {
        const auto o = build(text, [&](frontend::request& r, fake_gateway&) {
            r.named_contexts["foo"] = "local:foo";
            r.target = target;
        });
        return attribute(std::get<llb::source_op>(o.step("[context foo] load from client").what.what), "local.followpaths");
    };
    BOOST_TEST(wanted(file, "one") == R"(["a"])");
    BOOST_TEST(wanted(file, "mounted") == R"(["b"])");
    BOOST_TEST(wanted(file, "whole").empty());
    BOOST_TEST(wanted(file, "two") == R"(["a","c/*.txt"])");
    // A stage that the directory stands for is no other.
    BOOST_TEST(wanted("FROM busybox AS foo\n" + file, "one") == R"(["a"])");
    BOOST_TEST(wanted("FROM busybox AS foo\n" + file, "foo").empty());
}

BOOST_AUTO_TEST_CASE(directories_of_other_sessions_say_so) {
    const auto o = build("FROM scratch\nCOPY a /\nCOPY --from=foo a /b\n", [](frontend::request& r, fake_gateway&) {
        r.named_contexts["foo"] = "local:dir";
        r.local_sessions = {{"dir", "s1"}, {"context", "s2"}};
    });
    BOOST_TEST(attribute(o.context(), "local.session") == "s2");
    BOOST_TEST(attribute(std::get<llb::source_op>(o.step("[context foo] load from client").what.what), "local.session") == "s1");
}

BOOST_AUTO_TEST_CASE(a_context_that_is_scratch) {
    const auto o = build("FROM busybox\nCOPY Dockerfile /\n",
                         [](frontend::request& r, fake_gateway&) { r.named_contexts["busybox"] = "docker-image://scratch"; });
    BOOST_TEST(o.asked.empty());
    BOOST_TEST((o.steps() == strings{"[internal] load build context", "[1/2] COPY Dockerfile /"}));
    // Clients leave the slashes away as well.
    const auto image = build("FROM base\n", [](frontend::request& r, fake_gateway&) { r.named_contexts["base"] = "docker-image:busybox"; });
    BOOST_TEST((image.asked == strings{"docker.io/library/busybox:latest linux/amd64"}));
}

BOOST_AUTO_TEST_CASE(attributes) {
    const auto a = frontend::parse_attrs({{"contextsubdir", "sub"},
                                          {"dockerfilekey", "dockerfile2"},
                                          {"input-metadata:base::linux/amd64", "{}"},
                                          {"local-sessionid:context", "s"}})
                       .build;
    BOOST_TEST(a.context_subdir == "sub");
    BOOST_TEST(a.dockerfile_context == "dockerfile2");
    BOOST_TEST(a.input_metadata.at("base::linux/amd64") == "{}");
    BOOST_TEST(a.local_sessions.at("context") == "s");
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(times_of_sources)

namespace {

struct timed {
    std::string source, log_name;
    std::optional<std::int64_t> epoch;
    std::string seen;  ///< what a step sees in $SOURCE_DATE_EPOCH
};

/// What is asked for SOURCE_DATE_EPOCH=`value` when the engine answers `time`.
timed epoch_of(const std::string& value, std::optional<std::int64_t> time, const std::string& before = {}, const adjust& change = {}) {
    struct asking_gateway final : gateway::frontend_gateway {
        std::optional<std::int64_t> time;
        timed seen;
        async::task<gateway::image_config> resolve_image_config(gateway::resolve_request r) override {
            co_return gateway::image_config{r.reference, digest::of(r.reference), busybox};
        }
        async::task<std::optional<std::string>> read_context_file(std::string, std::string) override { co_return std::nullopt; }
        async::task<std::optional<std::int64_t>> source_time(llb::source_op source, std::string log_name) override {
            seen.source = source.identifier;
            seen.log_name = log_name;
            co_return time;
        }
    } g;
    g.time = time;
    frontend::request r;
    r.dockerfile = before + "FROM busybox AS last\nARG SOURCE_DATE_EPOCH\nRUN true\n";
    r.build_platform = {.os = "linux", .architecture = "amd64"};
    r.build_args["SOURCE_DATE_EPOCH"] = value;
    fake_gateway unused;
    if (change) change(r, unused);
    async::runtime rt;
    const auto made = rt.block_on(frontend::convert(std::move(r), g));
    g.seen.epoch = made.epoch;
    for (const auto& v : llb::load(made.graph).vertices)
        if (const auto* e = std::get_if<llb::exec_op>(&v.what.what))
            for (const auto& entry : e->meta.env)
                if (entry.starts_with("SOURCE_DATE_EPOCH=")) g.seen.seen = entry.substr(18);
    return g.seen;
}

}  // namespace

BOOST_AUTO_TEST_CASE(the_build_context) {
    const auto remote = [](frontend::request& r, fake_gateway&) { BOOST_TEST(frontend::set_remote_context(r, "https://h/x.git#main", false)); };
    const auto git = epoch_of("context", 1700000101, {}, remote);
    BOOST_TEST(git.source == "git://h/x.git#main");
    BOOST_TEST(git.log_name == "[internal] resolve main build context metadata");
    BOOST_TEST(git.epoch.value() == 1700000101);
    BOOST_TEST(git.seen == "1700000101");
    // A directory of the client has no time: it is as if nothing had been asked.
    const auto local = epoch_of("context", 5);
    BOOST_TEST(local.source.empty());
    BOOST_TEST(!local.epoch.has_value());
    BOOST_TEST(local.seen.empty());
}

BOOST_AUTO_TEST_CASE(named_contexts_and_stages) {
    const auto named = epoch_of("src", 7, {}, [](frontend::request& r, fake_gateway&) { r.named_contexts["src"] = "https://h/a.tar"; });
    BOOST_TEST(named.source == "https://h/a.tar");
    BOOST_TEST(named.epoch.value() == 7);
    const auto stage = epoch_of("Src", 8, "ARG HOST=h\nFROM scratch AS src\nARG HOST\nARG NAME=b\nADD https://$HOST/$NAME.tar /\n");
    BOOST_TEST(stage.source == "https://h/b.tar");
    BOOST_TEST(stage.log_name == "[internal] resolve SOURCE_DATE_EPOCH source stage src");
    BOOST_TEST(stage.epoch.value() == 8);
    BOOST_TEST(!epoch_of("src", {}, "FROM scratch AS src\nADD https://h/b.tar /\n").epoch.has_value());
}

BOOST_AUTO_TEST_CASE(what_has_no_time) {
    const auto refused = [](const std::string& value, const std::string& before) {
        try {
            (void)epoch_of(value, 1, before);
        } catch (const error& e) {
            return std::string(e.what());
        }
        return std::string("accepted");
    };
    BOOST_TEST(refused("not-a-timestamp", "").starts_with("invalid SOURCE_DATE_EPOCH: not-a-timestamp"));
    BOOST_TEST(refused("src", "FROM busybox AS src\nADD https://h/b /\n") == "SOURCE_DATE_EPOCH stage must use FROM scratch");
    BOOST_TEST(refused("src", "FROM scratch AS src\nADD https://h/b /\nRUN true\n") ==
               "SOURCE_DATE_EPOCH stage does not meet source-only requirements: unsupported run instruction");
    BOOST_TEST(refused("src", "FROM scratch AS src\n") == "SOURCE_DATE_EPOCH stage must contain exactly one remote ADD");
    BOOST_TEST(refused("src", "FROM scratch AS src\nADD a /\n") == "SOURCE_DATE_EPOCH stage source must be a single HTTP(S) or Git ADD");
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(told_to_clients)

namespace {

frontend::told_error told(const std::string& dockerfile) {
    frontend::request r;
    r.dockerfile = dockerfile;
    return frontend::told(r, failure(dockerfile));
}

std::vector<int> lines(const frontend::told_error& t) {
    std::vector<int> out;
    for (const auto& r : t.ranges) {
        BOOST_TEST(r.start.line == r.end.line);
        out.push_back(r.start.line);
    }
    return out;
}

}  // namespace

// BuildKit's clients look for these beginnings, and mark these lines.
BOOST_AUTO_TEST_CASE(errors_have_buildkits_beginning_and_lines) {
    const auto unknown = told("FROM scratch\nBADCMD x\n");
    BOOST_TEST(says(unknown.what, "dockerfile parse error on line 2: unknown instruction: BADCMD"));
    BOOST_TEST((lines(unknown) == std::vector<int>{2}));
    const auto flag = told("FROM scratch\nCOPY --fro=x a \\\n  b\n");
    BOOST_TEST(says(flag.what, "dockerfile parse error on line 2: unknown flag: --fro"));
    BOOST_TEST((lines(flag) == std::vector<int>{2, 3}));
    // What is no mistake of an instruction has its lines only.
    const auto missing = told("FROM scratch\nCOPY --from=nothing a \\\n  b\n");
    BOOST_TEST(!says(missing.what, "parse error"));
    BOOST_TEST((lines(missing) == std::vector<int>{2, 3}));
    const auto chmod = told("FROM scratch\nCOPY --chmod=64a a b\n");
    BOOST_TEST(says(chmod.what, "invalid chmod parameter: '64a'. it should be octal string and between 0 and 07777"));
    BOOST_TEST(says(told("ARG MY_ARCH=amd64\nFROM --platform=linux/${MYARCH} busybox\n").what,
                    "failed to parse platform linux/${MYARCH}: \"\" is an invalid component of \"linux/\": platform specifier component must match "
                    "\"^[A-Za-z0-9_.-]+$\": invalid argument (did you mean MY_ARCH?)"));
}

BOOST_AUTO_TEST_CASE(warnings_come_although_the_file_is_wrong) {
    frontend::request r;
    r.dockerfile = "FROM scratch as base\nCOPY --from=nothing a b\n";
    r.build_platform = {.os = "linux", .architecture = "amd64"};
    fake_gateway g;
    async::runtime rt;
    std::vector<frontend::warning> found;
    BOOST_CHECK_THROW((void)rt.block_on(frontend::convert(r, g, &found)), error);
    BOOST_REQUIRE(found.size() == 1U);
    BOOST_TEST(found.front().rule == "FromAsCasing");
}

// A step is told by its lines, one range each.
BOOST_AUTO_TEST_CASE(places_of_steps) {
    const auto o = build("FROM busybox\nRUN a \\\n  b\n");
    const auto& where = o.r.graph.source->locations.at(o.step("[2/2] RUN a   b").id).list.at(0).ranges;
    BOOST_REQUIRE(where.size() == 2U);
    BOOST_TEST(where[1].start.line == 3);
    BOOST_TEST(where[1].end.line == 3);
    // The Dockerfile is told with the graph that it comes from.
    const auto& file = o.r.graph.source->infos.at(0);
    BOOST_REQUIRE(file.definition != nullptr);
    BOOST_TEST(std::get<llb::source_op>(llb::load(*file.definition).vertices.at(0).what.what).identifier == "local://dockerfile");
}

BOOST_AUTO_TEST_CASE(steps_of_other_platforms) {
    const std::string file = "FROM --platform=linux/arm64 busybox\nRUN true\n";
    BOOST_TEST(says(failure(file), "needs emulation"));
    const auto o = build(file, [](frontend::request& r, fake_gateway&) { r.any_platform = true; });
    BOOST_TEST(o.step("[2/2] RUN true").what.platform->architecture == "arm64");
}

// The shell is the platform's, unless SHELL says otherwise; no PATH is set on Windows.
BOOST_AUTO_TEST_CASE(the_shell_of_windows) {
    const auto o = build("FROM scratch\nENTRYPOINT foo bar\n",
                         [](frontend::request& r, fake_gateway&) { r.target_platform = oci::platform{.os = "windows", .architecture = "amd64"}; });
    BOOST_TEST((o.image.config.entrypoint == strings{"cmd", "/S", "/C", "foo bar"}));
    BOOST_TEST(o.image.config.env.empty());
}

// A check tells of what a build would fail with, and does not fail itself.
BOOST_AUTO_TEST_CASE(a_check_tells_of_violations) {
    frontend::request r;
    r.dockerfile = "#check=error=true\nFROM scratch as base\n";
    r.build_platform = {.os = "linux", .architecture = "amd64"};
    fake_gateway g;
    async::runtime rt;
    const auto a = rt.block_on(frontend::check(r, g));
    BOOST_TEST(!a.problem.has_value());
    const auto parsed = json::parse(a.json);
    BOOST_TEST(json::string_at(json::object_at(parsed.as_object(), "buildError"), "message") == "lint violation found for rules: FromAsCasing");
    r.dockerfile = "FROM scratch\nBADCMD\n";
    const auto bad = json::parse(rt.block_on(frontend::check(r, g)).json);
    BOOST_TEST(json::string_at(json::object_at(bad.as_object(), "buildError"), "message").starts_with("dockerfile parse error on line 2: "));
}

BOOST_AUTO_TEST_SUITE_END()

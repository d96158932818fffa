#include "support/support.hpp"

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

import cobuild.base;
import cobuild.llb;

using namespace cobuild;

namespace {

llb::op source(std::string id) { return {.inputs = {}, .what = llb::source_op{std::move(id), {}}, .platform = {}}; }

llb::op run(llb::input on, std::string what) {
    llb::exec_op e;
    e.meta.args = {std::move(what)};
    e.meta.cwd = "/";
    e.mounts = {{.input = 0, .dest = "/", .output = 0}};
    return {.inputs = {on}, .what = e, .platform = {}};
}

std::string why(const std::function<void()>& f) {
    try {
        f();
    } catch (const error& e) {
        BOOST_TEST((e.kind() == errc::invalid));
        return e.what();
    }
    return "accepted";
}

bool says(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

}  // namespace

BOOST_AUTO_TEST_SUITE(graphs)

BOOST_AUTO_TEST_CASE(equal_ops_are_one_vertex_and_the_terminal_is_last) {
    llb::graph g;
    const auto a = g.add(source("local://a"), {.description = {{"k", "1"}}});
    const auto unused = g.add(source("local://unused"));
    const auto b = g.add(run(a, "x"));
    const auto again = g.add(source("local://a"), {.ignore_cache = true, .description = {{"l", "2"}}});
    BOOST_TEST((a == again));
    BOOST_TEST(g.size() == 3U);
    const auto d = g.finish(b);
    BOOST_REQUIRE(d.ops.size() == 3U);
    BOOST_TEST((digest::of(d.ops[0]) == a.vertex));
    BOOST_TEST((digest::of(d.ops[1]) == b.vertex));
    const auto last = llb::unmarshal_op(d.ops[2]);
    BOOST_TEST(std::holds_alternative<std::monostate>(last.what));
    BOOST_TEST((last.inputs == std::vector<llb::input>{b}));
    BOOST_TEST(!d.metadata.contains(unused.vertex));
    BOOST_TEST(d.metadata.at(a.vertex).ignore_cache);
    BOOST_TEST(d.metadata.at(a.vertex).description.size() == 2U);
    BOOST_TEST(g.finish({}).ops.empty());
}

// What another graph is made of comes with its bytes, its metadata and its sources, each once.
BOOST_AUTO_TEST_CASE(a_graph_in_another) {
    llb::graph inner;
    inner.set_source({"other", "text", nullptr, "Dockerfile"});
    const auto a = inner.add(source("local://a"), {.description = {{"k", "1"}}}, {{{3, 0}, {3, 0}}});
    const auto whole = inner.finish(inner.add(run(a, "x")));
    llb::graph g;
    g.set_source({"Dockerfile", "FROM x", nullptr, "Dockerfile"});
    const auto in = g.add(whole).value();
    BOOST_TEST((in == g.add(whole).value()));
    const auto d = g.finish(g.add(run(in, "y"), {}, {{{1, 0}, {1, 0}}}));
    BOOST_REQUIRE(d.ops.size() == 4U);
    BOOST_TEST(d.ops[0] == whole.ops[0]);
    BOOST_TEST(d.ops[1] == whole.ops[1]);
    BOOST_TEST(d.metadata.at(a.vertex).description.at("k") == "1");
    BOOST_REQUIRE(d.source->infos.size() == 2U);
    BOOST_TEST(d.source->infos[1].filename == "other");
    BOOST_TEST(d.source->locations.at(a.vertex).list.at(0).source_index == 1);
    BOOST_TEST(!g.add(llb::definition{}).has_value());
}

BOOST_AUTO_TEST_CASE(places_in_the_source_follow_their_vertex) {
    llb::graph g;
    g.set_source({"Dockerfile", "FROM x", nullptr, "Dockerfile"});
    const auto a = g.add(source("local://a"), {}, {{{1, 0}, {2, 0}}});
    g.add(source("local://a"), {}, {{{4, 0}, {4, 0}}});
    const auto d = g.finish(a);
    BOOST_TEST(d.source->infos.at(0).filename == "Dockerfile");
    const auto& where = d.source->locations.at(a.vertex).list;
    BOOST_REQUIRE(where.size() == 2U);
    BOOST_TEST(where[1].ranges.at(0).start.line == 4);
    const auto back = llb::unmarshal_definition(llb::marshal(d));
    BOOST_TEST(back.source->locations.at(a.vertex).list.at(0).ranges.at(0).end.line == 2);
    BOOST_TEST(llb::marshal(back) == llb::marshal(d));
}

BOOST_AUTO_TEST_CASE(an_op_before_its_input_is_refused) {
    llb::graph g;
    BOOST_CHECK_THROW(g.add(run({digest::of("nothing"), 0}, "x")), error);
    const auto a = g.add(source("local://a"));
    BOOST_CHECK_THROW(g.add(run({a.vertex, 1}, "x")), error);
}

BOOST_AUTO_TEST_CASE(a_definition_in_any_order_is_loaded_inputs_first) {
    llb::graph g;
    const auto a = g.add(source("local://a"));
    const auto b = g.add(run(a, "b"));
    const auto c = g.add(run(b, "c"), {.description = {{"llb.customname", "the last"}}});
    auto d = g.finish(c);
    std::swap(d.ops[0], d.ops[2]);
    d.ops.insert(d.ops.begin(), llb::marshal(source("local://useless")));
    const auto loaded = llb::load(d);
    BOOST_REQUIRE(loaded.vertices.size() == 3U);
    BOOST_TEST((loaded.vertices[0].id == a.vertex));
    BOOST_TEST((loaded.vertices[1].id == b.vertex));
    BOOST_TEST((loaded.vertices[2].id == c.vertex));
    BOOST_TEST((*loaded.result == c));
    BOOST_TEST(llb::display_name(loaded.vertices[2].what, loaded.vertices[2].meta) == "the last");
    BOOST_TEST(llb::display_name(loaded.vertices[1].what, loaded.vertices[1].meta) == "b");
    BOOST_TEST(!llb::load({}).result.has_value());
}

BOOST_AUTO_TEST_CASE(a_long_chain_needs_no_stack) {
    llb::graph g;
    auto at = g.add(source("local://a"));
    for (int i = 0; i < 20000; ++i) at = g.add(run(at, std::to_string(i)));
    BOOST_TEST(llb::load(g.finish(at)).vertices.size() == 20001U);
}

BOOST_AUTO_TEST_CASE(broken_definitions_are_refused_with_the_reason) {
    llb::graph g;
    const auto a = g.add(source("local://a"));
    const auto good = g.finish(g.add(run(a, "b")));

    auto lacks = good;
    lacks.ops.erase(lacks.ops.begin());
    BOOST_TEST(says(why([&] { llb::load(lacks); }), "lacks the step " + a.vertex.str()));

    auto no_end = good;
    no_end.ops = {good.ops[0]};
    BOOST_TEST(says(why([&] { llb::load(no_end); }), "does not end with its result"));

    auto output = good;
    output.ops.back() = llb::marshal(llb::op{.inputs = {{a.vertex, 1}}, .what = {}, .platform = {}, .constraints = {}});
    BOOST_TEST(says(why([&] { llb::load(output); }), "uses output 1"));
    BOOST_TEST(says(why([&] { llb::load(good, {.max_ops = 2}); }), "more than 2"));
    BOOST_TEST(says(why([&] { llb::load(good, {.max_bytes = 20}); }), "more than 20 bytes"));
}

BOOST_AUTO_TEST_CASE(rules_of_single_ops) {
    const llb::input in{digest::of("a"), 0};
    const auto refused = [&](std::function<void(llb::op&)> spoil) {
        auto o = run(in, "x");
        spoil(o);
        return why([&] { llb::validate(o); });
    };
    const auto exec = [](llb::op& o) -> llb::exec_op& { return std::get<llb::exec_op>(o.what); };
    BOOST_TEST(refused([](llb::op&) {}) == "accepted");
    BOOST_TEST(says(refused([&](llb::op& o) { exec(o).meta.args.clear(); }), "no arguments"));
    BOOST_TEST(says(refused([&](llb::op& o) { exec(o).mounts.clear(); }), "no mounts"));
    BOOST_TEST(says(refused([&](llb::op& o) { exec(o).mounts[0].dest = "/x"; }), "no root file system"));
    BOOST_TEST(says(refused([&](llb::op& o) { exec(o).mounts[0].input = 1; }), "names input 1 of 1"));
    BOOST_TEST(says(refused([&](llb::op& o) { exec(o).mounts[0].input = -2; }), "names input -2"));
    BOOST_TEST(says(refused([&](llb::op& o) { exec(o).mounts[0].output = 1; }), "has the output 1"));
    BOOST_TEST(says(refused([&](llb::op& o) { exec(o).network = static_cast<llb::net_mode>(9); }), "unknown value 9"));
    BOOST_TEST(says(refused([&](llb::op& o) { o.what = llb::file_op{}; }), "no actions"));
    BOOST_TEST(says(refused([&](llb::op& o) { o.what = llb::diff_op{-2, 0}; }), "lower side"));
    BOOST_TEST(says(refused([&](llb::op& o) { o.what = llb::merge_op{{1}}; }), "a merge names input 1"));
    BOOST_TEST(says(refused([&](llb::op& o) { o.what = llb::passthrough_op{"x", {}}; }), "no outputs"));
    BOOST_TEST(says(refused([&](llb::op& o) { o.what = llb::source_op{"local://a", {}}; }), "has inputs"));
    BOOST_TEST(says(refused([&](llb::op& o) {
                        llb::file_op f;
                        f.actions = {{.input = 1, .secondary_input = -1, .output = 0, .what = llb::rm_action{"/x", false, false}}};
                        o.what = f;
                    }),
                    "a file action names input 1"));
    // What an absent lower or upper side unmarshals to is refused, as BuildKit does.
    BOOST_TEST(says(why([] { llb::validate(llb::unmarshal_op(std::string_view("\x3a\x00", 2))); }), "lower side"));
}

BOOST_AUTO_TEST_CASE(dumps) {
    llb::graph g;
    const auto a = g.add({.inputs = {}, .what = llb::source_op{"local://\"q\"", {{"k", "\n"}}}, .platform = {}});
    llb::file_op f;
    f.actions = {{.input = 0,
                  .secondary_input = -1,
                  .output = 0,
                  .what = llb::mkfile_action{.path = "/f", .mode = 420, .data = "hi", .owner = {}, .timestamp = -1}}};
    const auto b = g.add({.inputs = {a}, .what = f, .platform = {}});
    const auto d = g.finish(b);
    const auto json = llb::to_json(d);
    BOOST_TEST(says(json, R"({"Op":{"Op":{"source":{"identifier":"local://\"q\"","attrs":{"k":"\n"}}},"constraints":{}},"Digest":")" +
                              a.vertex.str() + R"(","OpMetadata":{}})"));
    BOOST_TEST(says(
        json,
        R"("inputs":[{"digest":")" + a.vertex.str() +
            R"("}],"Op":{"file":{"actions":[{"secondaryInput":-1,"Action":{"mkfile":{"path":"/f","mode":420,"data":"aGk=","timestamp":-1}}}]}})"));
    BOOST_TEST(says(llb::to_dot(d), R"("mkfile /f")"));
    BOOST_TEST(says(llb::to_dot(d), "\"" + a.vertex.str() + "\" -> \"" + b.vertex.str() + "\";"));
}

BOOST_AUTO_TEST_SUITE_END()

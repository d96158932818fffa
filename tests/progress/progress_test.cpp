#include "support/support.hpp"

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

import cobuild.base;
import cobuild.progress;

using namespace cobuild;

namespace {

struct recorder {
    std::vector<progress::event> events;
    std::shared_ptr<progress::sink> sink = progress::make_sink([this](const progress::event& e) { events.push_back(e); });
    const progress::vertex& vertex(std::size_t i) const { return std::get<progress::vertex>(events.at(i)); }
    const progress::status& status(std::size_t i) const { return std::get<progress::status>(events.at(i)); }
};

const digest id = digest::of("v");

}  // namespace

BOOST_AUTO_TEST_CASE(a_vertex_goes_from_announced_to_completed) {
    recorder r;
    progress::writer w(r.sink, {.id = id, .name = "[1/2] RUN true", .inputs = {digest::of("base")}});
    w.announce();
    w.started();
    w.completed();
    BOOST_REQUIRE_EQUAL(r.events.size(), 3u);
    BOOST_TEST(!r.vertex(0).started.has_value());
    BOOST_TEST(r.vertex(1).started.has_value());
    BOOST_TEST(!r.vertex(1).completed.has_value());
    BOOST_TEST((*r.vertex(2).completed >= *r.vertex(2).started));
    BOOST_TEST(!r.vertex(2).cached);
    BOOST_TEST(r.vertex(2).name == "[1/2] RUN true");
    BOOST_TEST((r.vertex(2).inputs == std::vector{digest::of("base")}));
}

BOOST_AUTO_TEST_CASE(a_start_after_a_cache_hit_opens_a_second_interval) {
    recorder r;
    progress::writer w(r.sink, {.id = id, .name = "x"});
    w.cached();
    w.started();
    BOOST_TEST(r.vertex(0).cached);
    BOOST_TEST(r.vertex(0).completed.has_value());
    BOOST_TEST(!r.vertex(1).cached);
    BOOST_TEST(!r.vertex(1).completed.has_value());
}

BOOST_AUTO_TEST_CASE(failure_and_cancellation_differ) {
    recorder r;
    progress::writer w(r.sink, {.id = id, .name = "x"});
    w.failed(error{errc::step_failed, "exit code: 1"});
    w.failed(error{errc::canceled, "interrupted"});
    BOOST_TEST(r.vertex(0).error == "exit code: 1");
    BOOST_TEST(!r.vertex(0).canceled);
    BOOST_TEST(r.vertex(1).canceled);
    BOOST_TEST(r.vertex(1).started.has_value());
}

BOOST_AUTO_TEST_CASE(lines_logs_and_warnings_name_their_vertex) {
    recorder r;
    progress::writer w(r.sink, {.id = id, .name = "x"});
    auto line = w.begin("extracting", 100);
    line.update(40);
    line.done();
    w.output(progress::stream::err, "oops\n");
    w.warn({.message = "careful"});
    BOOST_REQUIRE_EQUAL(r.events.size(), 5u);
    BOOST_TEST((r.status(0).vertex == id));
    BOOST_TEST(r.status(1).current == 40);
    BOOST_TEST(!r.status(1).completed.has_value());
    BOOST_TEST(r.status(2).current == 100);
    BOOST_TEST(r.status(2).completed.has_value());
    const auto& log = std::get<progress::log>(r.events[3]);
    BOOST_TEST((log.vertex == id && log.stream == progress::stream::err && log.data == "oops\n"));
    BOOST_TEST((std::get<progress::warning>(r.events[4]).vertex == id));
}

BOOST_AUTO_TEST_CASE(a_default_writer_says_nothing) {
    progress::writer w;
    w.started();
    w.begin("x").done();
    BOOST_TEST((progress::internal_id("build-1", "a") != progress::internal_id("build-1", "b")));
}

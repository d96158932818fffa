module;
#include <chrono>
#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.daemon;

import cobuild.json;
import :internal;

namespace cobuild::daemon {

namespace {

json::object context(const std::string& trace, const std::string& span) {
    return {{"TraceID", trace}, {"SpanID", span}, {"TraceFlags", "01"}, {"TraceState", ""}, {"Remote", false}};
}

struct span {
    std::string name, id, parent, failure;
    progress::time_point started, completed;
};

std::string line_of(const std::string& trace, const span& s) {
    json::object out;
    out.set("Name", s.name);
    out.set("SpanContext", context(trace, s.id));
    out.set("Parent", context(s.parent.empty() ? std::string(32, '0') : trace, s.parent.empty() ? std::string(16, '0') : s.parent));
    out.set("SpanKind", 1);
    out.set("StartTime", format_time(s.started));
    out.set("EndTime", format_time(s.completed));
    for (const auto* list : {"Attributes", "Events", "Links"}) out.set(list, nullptr);
    out.set("Status", json::object{{"Code", s.failure.empty() ? "Unset" : "Error"}, {"Description", s.failure}});
    for (const auto* count : {"DroppedAttributes", "DroppedEvents", "DroppedLinks", "ChildSpanCount"}) out.set(count, 0);
    out.set("Resource", nullptr);
    out.set("InstrumentationLibrary", json::object{{"Name", "cobuild"}, {"Version", ""}, {"SchemaURL", ""}});
    return json::serialize(json::value(std::move(out))) + "\n";
}

}  // namespace

std::string trace_of(const std::string& ref, const std::vector<progress::event>& events) {
    std::map<digest, progress::vertex> last;
    for (const auto& e : events)
        if (const auto* v = std::get_if<progress::vertex>(&e); v != nullptr && v->started && v->completed) last[v->id] = *v;
    const auto trace = digest::of(ref).hex().substr(0, 32);
    span whole{.name = "build " + ref, .id = digest::of(ref).hex().substr(32, 16), .parent = {}, .failure = {}, .started = {}, .completed = {}};
    std::vector<span> steps;
    for (const auto& [id, v] : last) {
        if (steps.empty() || *v.started < whole.started) whole.started = *v.started;
        if (steps.empty() || *v.completed > whole.completed) whole.completed = *v.completed;
        steps.push_back(
            {.name = v.name, .id = id.hex().substr(0, 16), .parent = whole.id, .failure = v.error, .started = *v.started, .completed = *v.completed});
    }
    std::string out = line_of(trace, whole);
    for (const auto& s : steps) out += line_of(trace, s);
    return out;
}

}  // namespace cobuild::daemon

// Progress as BuildKit's SolveStatus messages, one JSON object a line.
#include <functional>
#include <iostream>
#include <variant>

#include "progress_common.hpp"
#include "terminal.hpp"

import cobuild.json;

namespace cobuild::app {

namespace {

void set_time(json::object& o, std::string_view key, const std::optional<progress::time_point>& t) {
    if (t) o.set(key, json::value(format_time(*t)));
}

json::value to_json(const progress::vertex& v) {
    json::object o;
    o.set("digest", json::value(v.id.str()));
    if (!v.inputs.empty()) {
        json::array inputs;
        for (const auto& i : v.inputs) inputs.emplace_back(i.str());
        o.set("inputs", json::value(std::move(inputs)));
    }
    o.set("name", json::value(v.name));
    set_time(o, "started", v.started);
    set_time(o, "completed", v.completed);
    if (v.cached) o.set("cached", json::value(true));
    if (!v.error.empty()) o.set("error", json::value(v.error));
    if (v.progress_group) {
        json::object g;
        g.set("id", json::value(v.progress_group->id));
        g.set("name", json::value(v.progress_group->name));
        if (v.progress_group->weak) g.set("weak", json::value(true));
        o.set("progressGroup", json::value(std::move(g)));
    }
    return json::value(std::move(o));
}

json::value to_json(const progress::status& s) {
    json::object o;
    o.set("id", json::value(s.id));
    o.set("vertex", json::value(s.vertex.str()));
    if (!s.name.empty()) o.set("name", json::value(s.name));
    if (s.total != 0) o.set("total", json::value(s.total));
    o.set("current", json::value(s.current));
    o.set("timestamp", json::value(format_time(s.timestamp)));
    set_time(o, "started", s.started);
    set_time(o, "completed", s.completed);
    return json::value(std::move(o));
}

json::value to_json(const progress::log& l) {
    json::object o;
    o.set("vertex", json::value(l.vertex.str()));
    o.set("stream", json::value(static_cast<int>(l.stream)));
    o.set("data", json::value(base64_encode(l.data)));
    o.set("timestamp", json::value(format_time(l.timestamp)));
    return json::value(std::move(o));
}

json::value to_json(const progress::warning& w) {
    json::object o;
    o.set("vertex", json::value(w.vertex.str()));
    o.set("level", json::value(w.level));
    o.set("short", json::value(base64_encode(w.message)));
    if (!w.detail.empty()) {
        json::array lines;
        for (const auto& d : w.detail) lines.emplace_back(base64_encode(d));
        o.set("detail", json::value(std::move(lines)));
    }
    if (!w.url.empty()) o.set("url", json::value(w.url));
    return json::value(std::move(o));
}

class rawjson_display final : public progress_display {
public:
    explicit rawjson_display(std::ostream& out) : out_(out) {}
    void on_event(const progress::event& e) override {
        static constexpr const char* keys[] = {"vertexes", "statuses", "logs", "warnings"};
        json::array items;
        std::visit([&](const auto& what) { items.push_back(to_json(what)); }, e);
        json::object o;
        o.set(keys[e.index()], json::value(std::move(items)));
        out_ << json::serialize(json::value(std::move(o))) + "\n";
    }
    void finish() override { out_ << std::flush; }

private:
    std::ostream& out_;
};

}  // namespace

std::shared_ptr<progress_display> make_rawjson(std::ostream& out) { return std::make_shared<rawjson_display>(out); }

}  // namespace cobuild::app

module;
#include <chrono>
#include <cstddef>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <google/protobuf/timestamp.pb.h>
#include <boost/asio/awaitable.hpp>

#include "control.pb.h"

module cobuild.daemon;

import :internal;

namespace cobuild::daemon {

namespace wire = moby::buildkit::v1;

namespace {

constexpr std::size_t max_kept = std::size_t{64} << 20;
constexpr std::size_t max_response = std::size_t{1} << 20;

std::size_t weight(const progress::event& e) {
    const auto* log = std::get_if<progress::log>(&e);
    return log == nullptr ? 256 : 128 + log->data.size();
}

void set_time(google::protobuf::Timestamp* to, progress::time_point t) {
    const auto ns = t.time_since_epoch().count();
    to->set_seconds(ns / 1'000'000'000);
    to->set_nanos(static_cast<std::int32_t>(ns % 1'000'000'000));
}

void add(wire::StatusResponse& r, const progress::vertex& v) {
    auto* out = r.add_vertexes();
    out->set_digest(v.id.str());
    for (const auto& i : v.inputs) out->add_inputs(i.str());
    out->set_name(v.name);
    out->set_cached(v.cached);
    if (v.started) set_time(out->mutable_started(), *v.started);
    if (v.completed) set_time(out->mutable_completed(), *v.completed);
    // Clients recognise a cancelled step by this text.
    out->set_error(v.canceled ? "context canceled" : v.error);
    if (v.progress_group) {
        out->mutable_progress_group()->set_id(v.progress_group->id);
        out->mutable_progress_group()->set_name(v.progress_group->name);
        out->mutable_progress_group()->set_weak(v.progress_group->weak);
    }
}

void add(wire::StatusResponse& r, const progress::status& s) {
    auto* out = r.add_statuses();
    out->set_id(s.id);
    out->set_vertex(s.vertex.str());
    out->set_name(s.name);
    out->set_current(s.current);
    out->set_total(s.total);
    set_time(out->mutable_timestamp(), s.timestamp);
    if (s.started) set_time(out->mutable_started(), *s.started);
    if (s.completed) set_time(out->mutable_completed(), *s.completed);
}

void add(wire::StatusResponse& r, const progress::log& l) {
    auto* out = r.add_logs();
    out->set_vertex(l.vertex.str());
    set_time(out->mutable_timestamp(), l.timestamp);
    out->set_stream(static_cast<std::int64_t>(l.stream));
    out->set_msg(l.data);
}

void add(wire::StatusResponse& r, const progress::warning& w) {
    auto* out = r.add_warnings();
    out->set_vertex(w.vertex.str());
    out->set_level(w.level);
    out->set_short_(w.message);
    for (const auto& d : w.detail) out->add_detail(d);
    out->set_url(w.url);
    if (!w.location) return;
    auto* info = out->mutable_info();
    info->set_filename(w.location->file);
    info->set_data(w.source);
    info->set_language("Dockerfile");
    auto ranges = w.ranges;
    if (ranges.empty()) ranges.push_back({.first_line = static_cast<int>(w.location->line), .last_line = static_cast<int>(w.location->line)});
    for (const auto& r : ranges) {
        auto* to = out->add_ranges();
        to->mutable_start()->set_line(r.first_line);
        to->mutable_start()->set_character(r.first_column);
        to->mutable_end()->set_line(r.last_line);
        to->mutable_end()->set_character(r.last_column);
    }
}

}  // namespace

void event_log::on_event(const progress::event& e) {
    if (ended_) return;
    if (const auto* v = std::get_if<progress::vertex>(&e)) vertices_[v->id] = {v->completed.has_value(), v->cached};
    if (std::holds_alternative<progress::warning>(e)) ++warnings_;
    events_.push_back(e);
    bytes_ += weight(e);
    while (bytes_ > max_kept && events_.size() > 1) {
        bytes_ -= weight(events_.front());
        events_.pop_front();
        ++first_;
    }
    std::exchange(more_, std::make_shared<async::event>())->set();
}

void event_log::finish() {
    ended_ = true;
    std::exchange(more_, std::make_shared<async::event>())->set();
}

async::task<std::vector<progress::event>> event_log::next(std::size_t& from) {
    for (;;) {
        if (from < first_) from = first_;
        if (from < first_ + events_.size()) {
            std::vector<progress::event> out;
            std::size_t bytes = 0;
            for (auto i = from - first_; i < events_.size() && bytes < max_response; ++i) {
                out.push_back(events_[i]);
                bytes += weight(events_[i]);
            }
            from += out.size();
            co_return out;
        }
        if (ended_) co_return std::vector<progress::event>{};
        const auto more = more_;
        co_await more->wait();
    }
}

event_log::counts event_log::count() const {
    counts out{.total = static_cast<std::int32_t>(vertices_.size()), .warnings = warnings_};
    for (const auto& [id, state] : vertices_) {
        out.completed += state.first ? 1 : 0;
        out.cached += state.second ? 1 : 0;
    }
    return out;
}

std::vector<std::string> encode_status(const std::vector<progress::event>& events) {
    std::vector<std::string> out;
    wire::StatusResponse r;
    std::size_t bytes = 0;
    const auto flush = [&] {
        if (bytes == 0) return;
        out.push_back(r.SerializeAsString());
        r.Clear();
        bytes = 0;
    };
    for (const auto& e : events) {
        std::visit([&r](const auto& what) { add(r, what); }, e);
        bytes += weight(e);
        if (bytes >= max_response) flush();
    }
    flush();
    return out;
}

}  // namespace cobuild::daemon

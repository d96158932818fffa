module;
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "control.pb.h"

module cobuild.client;

import cobuild.base;
import cobuild.async;
import cobuild.rpc;
import cobuild.progress;
import :internal;

namespace cobuild::client {

namespace {

namespace api = moby::buildkit::v1;

/// A digest, or one made from a text that is none, so that events of one vertex still meet.
digest id_of(const std::string& text) {
    const auto d = digest::try_parse(text);
    return d ? *d : progress::internal_id("status", text);
}

progress::vertex to_vertex(const api::Vertex& v) {
    progress::vertex out;
    out.id = id_of(v.digest());
    out.name = v.name();
    for (const auto& i : v.inputs()) out.inputs.push_back(id_of(i));
    if (v.has_started()) out.started = time_of(v.started());
    if (v.has_completed()) out.completed = time_of(v.completed());
    out.cached = v.cached();
    out.error = v.error();
    // On the wire a cancelled step differs by its words alone.
    out.canceled = out.error.ends_with("context canceled");
    if (v.has_progress_group()) out.progress_group = progress::group{v.progress_group().id(), v.progress_group().name(), v.progress_group().weak()};
    return out;
}

progress::status to_status(const api::VertexStatus& s) {
    progress::status out;
    out.id = s.id();
    out.vertex = id_of(s.vertex());
    out.name = s.name();
    out.current = s.current();
    out.total = s.total();
    if (s.has_timestamp()) out.timestamp = time_of(s.timestamp());
    if (s.has_started()) out.started = time_of(s.started());
    if (s.has_completed()) out.completed = time_of(s.completed());
    return out;
}

progress::warning to_warning(const api::VertexWarning& w) {
    progress::warning out;
    out.vertex = id_of(w.vertex());
    out.level = static_cast<int>(w.level());
    out.message = w.short_();
    out.detail.assign(w.detail().begin(), w.detail().end());
    out.url = w.url();
    if (w.has_info())
        out.location = source_location{w.info().filename(), w.ranges().empty() ? 0U : static_cast<unsigned>(std::max(0, w.ranges(0).start().line()))};
    return out;
}

}  // namespace

namespace {

/// What came within a moment, told together. A daemon may end a vertex and begin it again at once (it has several parts of
/// work under one name); told one by one that would show as ended twice.
class gathering {
public:
    explicit gathering(std::shared_ptr<progress::sink> sink) : sink_(std::move(sink)) {}
    void add(std::string_view status_response) { waiting_.MergeFrom(decode<api::StatusResponse>(status_response)); }
    void flush() {
        const auto r = std::exchange(waiting_, {});
        std::map<std::string, int> last;
        for (int i = 0; i < r.vertexes_size(); ++i) last[r.vertexes(i).digest()] = i;
        std::vector<const api::Vertex*> states;
        for (int i = 0; i < r.vertexes_size(); ++i)
            if (last[r.vertexes(i).digest()] == i) states.push_back(&r.vertexes(i));
        for (const auto* v : states) begin(*v);
        for (const auto& s : r.statuses()) sink_->on_event(to_status(s));
        for (const auto& l : r.logs())
            sink_->on_event(progress::log{.vertex = id_of(l.vertex()),
                                          .stream = l.stream() == 2 ? progress::stream::err : progress::stream::out,
                                          .data = l.msg(),
                                          .timestamp = l.has_timestamp() ? time_of(l.timestamp()) : progress::time_point{}});
        for (const auto& w : r.warnings()) sink_->on_event(to_warning(w));
        // An end comes after what was still said: a vertex's lines belong before its DONE.
        for (const auto* v : states)
            if (v->has_completed()) sink_->on_event(to_vertex(*v));
    }

private:
    void begin(const api::Vertex& v) {
        auto begun = to_vertex(v);
        if (begun.completed && (begun.cached || !begun.started)) return;
        begun.completed.reset();
        begun.error.clear();
        begun.canceled = false;
        sink_->on_event(begun);
    }

    std::shared_ptr<progress::sink> sink_;
    api::StatusResponse waiting_;
};

async::task<void> flush_often(std::shared_ptr<gathering> g) {
    for (;;) {
        co_await async::sleep_for(std::chrono::milliseconds(100));
        g->flush();
    }
}

}  // namespace

async::task<void> follow_status(channel_ptr to, std::string ref, std::shared_ptr<progress::sink> sink, std::function<void()> heard) {
    const auto g = std::make_shared<gathering>(std::move(sink));
    api::StatusRequest q;
    q.set_ref(ref);
    async::task_group clock(co_await async::current_executor, true);
    clock.spawn(flush_often(g));
    std::exception_ptr failed;
    try {
        co_await listen(to, "/moby.buildkit.v1.Control/Status", q.SerializeAsString(), [&](std::string_view m) {
            g->add(m);
            if (heard) heard();
        });
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::no_cancel;
    clock.cancel();
    try {
        co_await clock.join();
    } catch (...) {
        // It ends by being cancelled.
    }
    g->flush();
    if (failed) std::rethrow_exception(failed);
}

}  // namespace cobuild::client

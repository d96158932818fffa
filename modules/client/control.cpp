module;
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "content.pb.h"
#include "control.pb.h"

module cobuild.client;

import cobuild.base;
import cobuild.async;
import cobuild.rpc;
import cobuild.progress;
import :internal;

namespace cobuild::client {

namespace api = moby::buildkit::v1;

namespace {

usage to_usage(const api::UsageRecord& r) {
    usage out;
    out.id = r.id();
    out.is_mutable = r.mutable_();
    out.in_use = r.in_use();
    out.shared = r.shared();
    out.size = r.size();
    out.usage_count = r.usage_count();
    if (r.has_created_at()) out.created = time_of(r.created_at());
    if (r.has_last_used_at()) out.last_used = time_of(r.last_used_at());
    out.parents.assign(r.parents().begin(), r.parents().end());
    if (out.parents.empty() && !r.parent().empty()) out.parents.push_back(r.parent());
    out.description = r.description();
    out.record_type = r.record_type();
    return out;
}

version_info to_version(const api::types::BuildkitVersion& v) { return {v.package(), v.version(), v.revision(), v.dockerfile_version()}; }

worker to_worker(const api::types::WorkerRecord& r) {
    worker out;
    out.id = r.id();
    out.labels = to_map(r.labels());
    for (const auto& p : r.platforms())
        out.platforms.push_back({p.os(), p.architecture(), p.variant(), p.os_version(), {p.os_features().begin(), p.os_features().end()}});
    for (const auto& g : r.gc_policy())
        out.gc.push_back({.all = g.all(),
                          .filters = {g.filters().begin(), g.filters().end()},
                          .keep_duration = nanoseconds(g.keep_duration()),
                          .reserved = g.reserved_space(),
                          .max_used = g.max_used_space(),
                          .min_free = g.min_free_space()});
    out.version = to_version(r.buildkit_version());
    return out;
}

history_event to_event(const api::BuildHistoryEvent& e) {
    history_event out;
    out.kind = static_cast<history_kind>(e.type());
    const auto& r = e.record();
    out.ref = r.ref();
    out.frontend = r.frontend();
    out.frontend_attributes = to_map(r.frontend_attrs());
    if (r.has_error()) out.error = r.error().message();
    if (r.has_created_at()) out.created = time_of(r.created_at());
    if (r.has_completed_at()) out.completed = time_of(r.completed_at());
    out.generation = r.generation();
    out.pinned = r.pinned();
    out.cached_steps = r.num_cached_steps();
    out.total_steps = r.num_total_steps();
    out.completed_steps = r.num_completed_steps();
    out.warnings = r.num_warnings();
    if (r.has_trace()) out.trace = r.trace().digest();
    return out;
}

template<class Request>
void add_filters(Request& r, const std::vector<std::string>& filters) {
    for (const auto& f : filters) r.add_filter(f);
}

}  // namespace

async::task<std::vector<usage>> disk_usage(channel_ptr to, std::vector<std::string> filters) {
    api::DiskUsageRequest q;
    add_filters(q, filters);
    const auto answer = decode<api::DiskUsageResponse>(co_await to->unary("/moby.buildkit.v1.Control/DiskUsage", q.SerializeAsString()));
    std::vector<usage> out;
    for (const auto& r : answer.record()) out.push_back(to_usage(r));
    // As BuildKit's client: the largest last.
    std::stable_sort(out.begin(), out.end(), [](const usage& a, const usage& b) { return a.size != b.size ? a.size < b.size : a.id < b.id; });
    co_return out;
}

async::task<void> prune(channel_ptr to, prune_request what, std::function<void(const usage&)> removed) {
    api::PruneRequest q;
    add_filters(q, what.filters);
    q.set_all(what.all);
    q.set_keep_duration(what.keep_duration.count());
    q.set_reserved_space(what.reserved);
    q.set_max_used_space(what.max_used);
    q.set_min_free_space(what.min_free);
    co_await listen(to, "/moby.buildkit.v1.Control/Prune", q.SerializeAsString(),
                    [&removed](std::string_view m) { removed(to_usage(decode<api::UsageRecord>(m))); });
}

async::task<std::vector<worker>> workers(channel_ptr to, std::vector<std::string> filters) {
    api::ListWorkersRequest q;
    add_filters(q, filters);
    const auto answer = decode<api::ListWorkersResponse>(co_await to->unary("/moby.buildkit.v1.Control/ListWorkers", q.SerializeAsString()));
    std::vector<worker> out;
    for (const auto& r : answer.record()) out.push_back(to_worker(r));
    co_return out;
}

async::task<version_info> info(channel_ptr to) {
    const auto answer = decode<api::InfoResponse>(co_await to->unary("/moby.buildkit.v1.Control/Info", {}));
    co_return to_version(answer.buildkit_version());
}

async::task<void> histories(channel_ptr to, std::string ref, bool follow, std::function<void(const history_event&)> each) {
    api::BuildHistoryRequest q;
    q.set_ref(ref);
    q.set_early_exit(!follow);
    co_await listen(to, "/moby.buildkit.v1.Control/ListenBuildHistory", q.SerializeAsString(),
                    [&each](std::string_view m) { each(to_event(decode<api::BuildHistoryEvent>(m))); });
}

async::task<void> change_history(channel_ptr to, history_change what) {
    api::UpdateBuildHistoryRequest q;
    q.set_ref(what.ref);
    q.set_pinned(what.pinned);
    q.set_delete_(what.remove);
    q.set_finalize(what.finalize);
    co_await to->unary("/moby.buildkit.v1.Control/UpdateBuildHistory", q.SerializeAsString());
}

async::task<void> read_blob(channel_ptr to, digest which, std::function<void(std::string_view)> piece) {
    containerd::services::content::v1::ReadContentRequest q;
    q.set_digest(which.str());
    co_await listen(to, "/containerd.services.content.v1.Content/Read", q.SerializeAsString(),
                    [&piece](std::string_view m) { piece(decode<containerd::services::content::v1::ReadContentResponse>(m).data()); });
}

async::task<void> watch(channel_ptr to, std::string ref, std::shared_ptr<progress::sink> sink) {
    co_await follow_status(to, std::move(ref), std::move(sink), {});
}

}  // namespace cobuild::client

module;
#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <google/protobuf/timestamp.pb.h>
#include <boost/asio/awaitable.hpp>

#include "control.pb.h"

module cobuild.daemon;

import cobuild.fs;
import :internal;

namespace cobuild::daemon {

namespace wire = moby::buildkit::v1;

namespace {

template<class M>
M parse(const std::string& bytes) {
    M out;
    if (!out.ParseFromString(bytes)) throw error{errc::invalid, "the request cannot be read"};
    return out;
}

void set_time(google::protobuf::Timestamp* to, std::chrono::sys_time<nanoseconds> t) {
    const auto ns = t.time_since_epoch().count();
    to->set_seconds(ns / 1'000'000'000);
    to->set_nanos(static_cast<std::int32_t>(ns % 1'000'000'000));
}

wire::UsageRecord record_of(const build::usage_info& u) {
    wire::UsageRecord out;
    out.set_id(u.id);
    out.set_mutable_(u.mutable_);
    out.set_in_use(u.in_use);
    out.set_size(static_cast<std::int64_t>(u.size));
    if (!u.parents.empty()) out.set_parent(u.parents.front());
    for (const auto& p : u.parents) out.add_parents(p);
    set_time(out.mutable_created_at(), u.created);
    if (u.usage_count > 0) set_time(out.mutable_last_used_at(), u.last_used);
    out.set_usage_count(static_cast<std::int64_t>(u.usage_count));
    out.set_description(u.description);
    out.set_record_type(u.kind);
    out.set_shared(u.shared);
    return out;
}

async::task<std::string> info(std::string) {
    wire::InfoResponse out;
    out.mutable_buildkit_version()->ParseFromString(version_record());
    co_return out.SerializeAsString();
}

async::task<std::string> list_workers(std::shared_ptr<world> w, std::string) {
    wire::ListWorkersResponse out;
    out.add_record()->ParseFromString(worker_record(*w));
    co_return out.SerializeAsString();
}

async::task<std::string> disk_usage(std::shared_ptr<world> w, std::string request) {
    const auto asked = parse<wire::DiskUsageRequest>(request);
    wire::DiskUsageResponse out;
    std::vector<std::string> filters(asked.filter().begin(), asked.filter().end());
    std::erase(filters, "");  // buildx sends one that says nothing
    for (const auto& u : co_await w->given.engine->usage(std::move(filters))) *out.add_record() = record_of(u);
    co_return out.SerializeAsString();
}

async::task<rpc::status> prune(std::shared_ptr<world> w, std::shared_ptr<rpc::call> c) {
    const auto request = co_await c->read();
    const auto asked = parse<wire::PruneRequest>(request.value_or(""));
    build::prune_options o;
    o.all = asked.all();
    o.keep_duration = nanoseconds{asked.keep_duration()};
    if (asked.max_used_space() > 0) o.max_used = static_cast<std::uint64_t>(asked.max_used_space());
    if (asked.reserved_space() > 0) o.reserved = static_cast<std::uint64_t>(asked.reserved_space());
    if (asked.min_free_space() > 0) o.min_free = static_cast<std::uint64_t>(asked.min_free_space());
    o.filters.assign(asked.filter().begin(), asked.filter().end());
    std::erase(o.filters, "");
    if (o.filters.empty()) (void)co_await w->contexts.clear();
    for (const auto& u : co_await w->given.engine->prune(std::move(o))) co_await c->write(record_of(u).SerializeAsString());
    co_return rpc::status{};
}

rpc::metadata timestamp_header() {
    const auto now = std::chrono::duration_cast<nanoseconds>(std::chrono::system_clock::now().time_since_epoch());
    return {{"buildkit-timestamp", format_time(std::chrono::sys_time<nanoseconds>{now})}};
}

/// What a build of the history told.
async::task<void> replay(std::shared_ptr<world> w, std::string file, std::shared_ptr<rpc::call> c) {
    const auto bytes = co_await w->pool.run([file] {
        const unique_fd fd{::open(file.c_str(), O_RDONLY | O_CLOEXEC)};
        if (!fd) throw_errno("reading the history");
        return fs::read_all(fd.get(), std::size_t{256} << 20);
    });
    for (std::size_t at = 0; at + 4 <= bytes.size();) {
        std::size_t size = 0;
        for (std::size_t i = 0; i < 4; ++i) size |= std::size_t{static_cast<unsigned char>(bytes[at + i])} << (8 * i);
        at += 4;
        if (size > bytes.size() - at) throw error{errc::corrupt, "the kept output of the build is cut off"};
        co_await c->write(bytes.substr(at, size));
        at += size;
    }
}

async::task<rpc::status> status(std::shared_ptr<world> w, std::shared_ptr<rpc::call> c) {
    const auto request = co_await c->read();
    const auto asked = parse<wire::StatusRequest>(request.value_or(""));
    c->set_header(timestamp_header());
    co_await c->send_header();
    co_await w->history.open();
    if (const auto kept = w->history.logs_of(asked.ref())) {
        co_await replay(w, *kept, c);
        co_return rpc::status{};
    }
    const auto b = co_await w->builds.get(asked.ref(), std::chrono::seconds{6});
    const auto events = b->events;
    std::size_t from = 0;
    for (;;) {
        const auto batch = co_await events->next(from);
        if (batch.empty()) co_return rpc::status{};
        for (auto& message : encode_status(batch)) co_await c->write(std::move(message));
    }
}

async::task<rpc::status> listen_history(std::shared_ptr<world> w, std::shared_ptr<rpc::call> c) {
    auto request = co_await c->read();
    c->set_header(timestamp_header());
    co_await c->send_header();
    co_return co_await w->history.listen(c, request.value_or(""));
}

async::task<std::string> update_history(std::shared_ptr<world> w, std::string request) {
    const auto asked = parse<wire::UpdateBuildHistoryRequest>(request);
    // What a build told is written when it ends: there is nothing to finalize.
    if (asked.delete_() || !asked.finalize()) co_await w->history.update(asked.ref(), asked.delete_(), asked.pinned());
    co_return wire::UpdateBuildHistoryResponse().SerializeAsString();
}

async::task<rpc::status> session(std::shared_ptr<world> w, std::shared_ptr<rpc::call> c) { return w->sessions.serve(std::move(c)); }

/// A method of one request and one answer.
method unary_method(std::function<async::task<std::string>(std::shared_ptr<world>, std::string)> answer) {
    return [answer](std::shared_ptr<world> w, std::shared_ptr<rpc::call> c) {
        return rpc::unary(std::move(c), [answer, w](std::string request) { return answer(w, std::move(request)); });
    };
}

}  // namespace

method control_method(std::string_view name) {
    static const std::map<std::string, method, std::less<>> known{
        {"Info", unary_method([](std::shared_ptr<world>, std::string request) { return info(std::move(request)); })},
        {"ListWorkers", unary_method(list_workers)},
        {"DiskUsage", unary_method(disk_usage)},
        {"Prune", prune},
        {"Solve", solve},
        {"Status", status},
        {"Session", session},
        {"ListenBuildHistory", listen_history},
        {"UpdateBuildHistory", unary_method(update_history)},
    };
    const auto at = known.find(name);
    return at == known.end() ? method{} : at->second;
}

}  // namespace cobuild::daemon

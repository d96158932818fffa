module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <google/protobuf/util/json_util.h>
#include <boost/asio/awaitable.hpp>

#include "control.pb.h"
#include "gateway.pb.h"

module cobuild.client;

import cobuild.base;
import cobuild.async;
import cobuild.rpc;
import cobuild.progress;
import :internal;

namespace cobuild::client {

namespace {

namespace api = moby::buildkit::v1;
using namespace std::chrono_literals;

/// What the tasks of one build share.
struct run {
    channel_ptr to;
    build_request request;
    std::string ref, session_id;
    std::shared_ptr<progress::sink> sink;
    async::event watched;   ///< the status stream has ended
    std::size_t heard = 0;  ///< messages of it
    std::optional<outcome> solved;
    async::event solve_ended;
    rpc::status driven;  ///< why the gateway way failed, if it did
    std::map<std::string, std::string> metadata;
};
using run_ptr = std::shared_ptr<run>;

api::sourcepolicy::Policy to_policy(const std::string& json) {
    api::sourcepolicy::Policy out;
    google::protobuf::util::JsonParseOptions lenient;
    lenient.ignore_unknown_fields = true;
    const auto ok = google::protobuf::util::JsonStringToMessage(json, &out, lenient);
    if (!ok.ok()) throw error{errc::invalid, cat("the source policy is not one: ", std::string(ok.message()))};
    return out;
}

template<class Repeated>
void add_entries(Repeated* to, const std::vector<cache_entry>& entries) {
    for (const auto& e : entries) {
        auto* out = to->Add();
        out->set_type(e.type);
        out->mutable_attrs()->insert(e.attrs.begin(), e.attrs.end());
    }
}

std::string solve_message(const run& r) {
    const auto& q = r.request;
    api::SolveRequest out;
    out.set_ref(r.ref);
    out.set_session(r.session_id);
    out.mutable_frontend_attrs()->insert(q.frontend_attrs.begin(), q.frontend_attrs.end());
    if (q.direct) {
        out.set_frontend(q.frontend);
        out.set_definition(q.definition);
    }
    for (const auto& e : q.exporters) {
        auto* x = out.add_exporters();
        x->set_type(e.type);
        x->mutable_attrs()->insert(e.attrs.begin(), e.attrs.end());
    }
    if (!q.exporters.empty()) {
        // Daemons before BuildKit 0.13 know one exporter.
        out.set_exporter_deprecated(q.exporters.front().type);
        out.mutable_exporter_attrs_deprecated()->insert(q.exporters.front().attrs.begin(), q.exporters.front().attrs.end());
    }
    add_entries(out.mutable_cache()->mutable_exports(), q.cache_exports);
    add_entries(out.mutable_cache()->mutable_imports(), q.cache_imports);
    for (const auto& e : q.entitlements) out.add_entitlements(e);
    if (!q.source_policy.empty()) *out.mutable_source_policy() = to_policy(q.source_policy);
    out.set_internal(q.internal);
    out.set_proxy_network(q.proxy_network);
    return out.SerializeAsString();
}

async::task<void> solve(run_ptr r, std::string message) {
    std::exception_ptr failed;
    try {
        r->solved = co_await invoke(r->to, "/moby.buildkit.v1.Control/Solve", std::move(message));
    } catch (...) {
        failed = std::current_exception();
    }
    r->solve_ended.set();
    if (failed) std::rethrow_exception(failed);
}

/// The status stream. That it fails is no failure of the build, whose end Solve tells.
async::task<void> follow(run_ptr r) {
    std::exception_ptr failed;
    try {
        co_await follow_status(r->to, r->ref, r->sink, [r] { ++r->heard; });
    } catch (...) {
        failed = std::current_exception();
    }
    r->watched.set();
    if (failed) std::rethrow_exception(failed);
}

async::task<outcome> ask_bridge(run_ptr r, std::string_view method, std::string message) {
    co_return co_await invoke(r->to, cat("/moby.buildkit.v1.frontend.LLBBridge/", method), std::move(message),
                              {{"buildkit-controlapi-buildid", r->ref}});
}

/// The gateway way: what is to be built is said here, and its result, or failure, handed over.
async::task<void> drive(run_ptr r) {
    auto answer = co_await ask_bridge(r, "Ping", {});
    api::frontend::ReturnRequest back;
    if (answer.status.ok()) {
        const auto& q = r->request;
        api::frontend::SolveRequest s;
        s.set_frontend(q.frontend);
        s.set_definition(q.definition);
        s.mutable_frontend_opt()->insert(q.frontend_attrs.begin(), q.frontend_attrs.end());
        s.set_allow_result_return(true);
        s.set_allow_result_array_ref(true);
        add_entries(s.mutable_cache_imports(), q.cache_imports);
        answer = co_await ask_bridge(r, "Solve", s.SerializeAsString());
        if (answer.status.ok()) {
            const auto solved = decode<api::frontend::SolveResponse>(answer.answer);
            *back.mutable_result() = solved.result();
            for (const auto& [key, value] : solved.result().metadata()) r->metadata[key] = value;
        }
    }
    if (!answer.status.ok()) {
        r->driven = answer.status;
        back.clear_result();
        if (!back.mutable_error()->ParseFromString(answer.status.details)) back.mutable_error()->Clear();
        back.mutable_error()->set_code(static_cast<int>(answer.status.code));
        back.mutable_error()->set_message(answer.status.message);
    }
    co_await ask_bridge(r, "Return", back.SerializeAsString());
}

/// The last events may still be on their way when Solve has answered: while some come every few seconds they are waited for.
async::task<void> hear_out(run_ptr r) {
    while (!r->watched.is_set()) {
        const auto before = r->heard;
        bool late = false;
        try {
            co_await async::with_deadline(5s, "the build's last events", r->watched.wait());
        } catch (const error&) {
            late = true;
        }
        if (late && r->heard == before) co_return;
    }
}

async::task<void> join_quietly(async::task_group& group) {
    std::exception_ptr ignored;
    try {
        co_await group.join();
    } catch (...) {
        ignored = std::current_exception();
    }
}

/// Waits for Solve; a gateway way that failed gets Solve's own answer 5 s long.
async::task<void> until_solved(run_ptr r, async::task_group& ways) {
    co_await ways.join();
    if (!r->solved && r->driven.ok()) throw error{errc::internal, "the build ended without an answer"};
}

}  // namespace

async::task<build_result> build(channel_ptr to, async::blocking_pool& pool, build_request request, std::shared_ptr<progress::sink> sink,
                                std::function<void(const rpc::status&)> failed) {
    const auto ex = co_await async::current_executor;
    session lends(ex, pool, request.lends);
    const auto r = std::make_shared<run>();
    r->to = to;
    r->request = std::move(request);
    r->ref = r->request.ref.empty() ? random_id() : r->request.ref;
    r->session_id = lends.id();
    r->sink = sink ? std::move(sink) : progress::null_sink();
    auto message = solve_message(*r);

    async::task_group around(ex, true);
    around.spawn(lends.run(to));
    around.spawn(follow(r));
    async::task_group ways(ex, true);
    ways.spawn(solve(r, std::move(message)));
    if (!r->request.direct) ways.spawn(drive(r));
    std::exception_ptr thrown;
    try {
        co_await until_solved(r, ways);
    } catch (...) {
        thrown = std::current_exception();
    }
    co_await async::no_cancel;
    co_await join_quietly(ways);
    co_await hear_out(r);
    around.cancel();
    co_await join_quietly(around);

    if (r->solved && r->solved->status.ok() && !thrown && r->driven.ok()) {
        build_result out;
        out.exporter_response = to_map(decode<api::SolveResponse>(r->solved->answer).exporter_response());
        out.metadata = std::move(r->metadata);
        co_return out;
    }
    const auto& why = r->solved && !r->solved->status.ok() ? r->solved->status : r->driven;
    if (why.ok() && thrown) std::rethrow_exception(thrown);
    if (failed) failed(why);
    throw rpc::to_error(why).with("failed to solve");
}

}  // namespace cobuild::client

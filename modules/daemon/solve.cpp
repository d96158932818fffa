module;
#include <malloc.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "control.pb.h"
#include "status.pb.h"

module cobuild.daemon;

import cobuild.json;
import cobuild.llb;
import cobuild.oci;
import :internal;

namespace cobuild::daemon {

namespace wire = moby::buildkit::v1;

namespace {

template<class M>
std::map<std::string, std::string> map_of(const M& m) {
    return {m.begin(), m.end()};
}

/// Older clients say their one exporter in fields of its own; newer ones say it twice.
std::vector<build::output> outputs_of(const wire::SolveRequest& r) {
    std::vector<build::output> out;
    for (const auto& e : r.exporters()) out.push_back({.type = e.type(), .attributes = map_of(e.attrs())});
    if (out.empty() && !r.exporter_deprecated().empty())
        out.push_back({.type = r.exporter_deprecated(), .attributes = map_of(r.exporter_attrs_deprecated())});
    const auto epoch = r.frontend_attrs().find("build-arg:SOURCE_DATE_EPOCH");
    if (epoch == r.frontend_attrs().end() || epoch->second.empty()) return out;
    if (!std::all_of(epoch->second.begin(), epoch->second.end(), [](char c) { return c >= '0' && c <= '9'; })) return out;
    for (auto& o : out) o.attributes.emplace("source-date-epoch", epoch->second);
    return out;
}

/// What a build may do needs the daemon's leave as well as the client's word.
std::vector<std::string> entitlements_of(const wire::SolveRequest& r, const config::configuration& settings) {
    std::vector<std::string> out;
    for (const auto& asked : r.entitlements()) {
        const auto name = asked.substr(0, asked.find('='));
        const auto& granted = settings.insecure_entitlements;
        if (name == "device") continue;
        if (name != "network.host" && name != "security.insecure") throw error{errc::invalid, cat("invalid entitlement ", quoted(asked))};
        if (std::find(granted.begin(), granted.end(), name) == granted.end())
            throw error{errc::permission, cat("granting entitlement ", name, " is not allowed by build daemon configuration")};
        out.push_back(name);
    }
    return out;
}

void refuse_what_is_missing(const wire::SolveRequest& r) {
    if (r.proxy_network()) throw error{errc::unsupported, "the proxy network is not supported"};
}

/// The result, by whichever of the three roads the request takes.
async::task<build::job_result> result_of(std::shared_ptr<build_state> b, wire::SolveRequest r) {
    if (r.has_definition() && r.frontend().empty()) {
        // Without ops it is the empty root: a result too, and nobody will drive this build.
        build::job_result out;
        out.refs[""] = b->job->define(r.definition().empty() ? llb::definition{} : llb::unmarshal_definition(r.definition()));
        co_return out;
    }
    if (!r.frontend().empty()) {
        std::map<std::string, llb::definition> inputs;
        for (const auto& [name, bytes] : r.frontend_inputs()) inputs[name] = llb::unmarshal_definition(bytes);
        co_return co_await b->job->run_frontend(r.frontend(), map_of(r.frontend_attrs()), std::move(inputs));
    }
    co_await b->driven.wait();
    co_return b->returned.value_or(build::job_result{});
}

async::task<std::map<std::string, std::string>> run(std::shared_ptr<world> w, std::shared_ptr<build_state> b, std::shared_ptr<tunnel> client,
                                                    wire::SolveRequest r) {
    auto result = co_await result_of(b, r);
    if (b->refused) co_return std::map<std::string, std::string>{};
    std::map<std::string, std::string> response;
    for (const auto& [key, value] : result.metadata)
        if (key.starts_with("frontend.")) response[key] = value;
    for (auto& [key, value] : co_await export_result(w, b, client, std::move(result), outputs_of(r))) response[key] = std::move(value);
    co_return response;
}

/// The build is cancelled when the client's tunnel falls, unless it needs none.
async::task<std::map<std::string, std::string>> run_with_client(std::shared_ptr<world> w, std::shared_ptr<build_state> b, wire::SolveRequest r) {
    std::shared_ptr<tunnel> client;
    if (!r.session().empty()) client = co_await w->sessions.get(r.session(), std::chrono::seconds{5});
    build::job_options o;
    o.id = b->ref;
    o.allow = entitlements_of(r, w->given.settings);
    o.sink = b->events;
    o.cache_to = cache_entries(r.cache().exports());
    o.frontend = r.frontend();
    o.attrs = map_of(r.frontend_attrs());
    o.local_caches_of_client = true;
    if (r.has_source_policy()) o.policies.push_back(read_policy(r.source_policy().SerializeAsString()));
    if (!r.source_policy_session().empty()) o.verify = make_verifier(w, b, r.source_policy_session());
    for (const auto& [name, bytes] : r.frontend_inputs()) {
        b->inputs[name] = bytes;
        o.inputs[name] = llb::unmarshal_definition(bytes);
    }
    o.recorded = !r.internal();
    if (client) {
        o.client = make_remote(client, w->contexts, w->pool, [w](std::string id) { return w->sessions.get(std::move(id), std::chrono::seconds{5}); });
        o.who = make_login(client);
    }
    b->job = w->given.engine->start(std::move(o));
    b->job->import_caches(cache_entries(r.cache().imports()));
    b->prepared.set();
    auto work = run(w, b, client, std::move(r));
    if (client) co_return co_await async::linked(client->closed.token(), std::move(work));
    co_return co_await std::move(work);
}

}  // namespace

namespace {

void set_now(google::protobuf::Timestamp* to) {
    const auto ns = std::chrono::duration_cast<nanoseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
    to->set_seconds(ns / 1'000'000'000);
    to->set_nanos(static_cast<std::int32_t>(ns % 1'000'000'000));
}

wire::BuildHistoryRecord begun_record(const wire::SolveRequest& r) {
    wire::BuildHistoryRecord out;
    out.set_ref(r.ref());
    out.set_frontend(r.frontend());
    *out.mutable_frontend_attrs() = r.frontend_attrs();
    *out.mutable_exporters() = r.exporters();
    set_now(out.mutable_created_at());
    return out;
}

/// What the build told, as the history keeps it.
std::string kept_status(const event_log& events) {
    std::string out;
    for (const auto& message : encode_status(events.all())) {
        for (unsigned shift = 0; shift < 32; shift += 8) out += static_cast<char>(message.size() >> shift & 255U);
        out += message;
    }
    return out;
}

/// google.rpc.Status: what the client was told, details and all.
std::string status_bytes(const rpc::status& s) {
    if (!s.details.empty()) return s.details;
    google::rpc::Status out;
    out.set_code(static_cast<int>(s.code));
    out.set_message(s.message);
    return out.SerializeAsString();
}

/// A record that cannot be kept is no failure of the build.
async::task<void> keep_record(std::shared_ptr<world> w, std::shared_ptr<build_state> b, wire::BuildHistoryRecord record, rpc::status end,
                              std::map<std::string, std::string> response) {
    set_now(record.mutable_completed_at());
    if (!end.ok()) {
        record.mutable_error()->set_code(static_cast<int>(end.code));
        record.mutable_error()->set_message(end.message);
    }
    for (auto& [key, value] : response) (*record.mutable_exporter_response())[key] = value;
    // Clients read the result of every record, so there is one, though it may be empty.
    auto* result = record.mutable_result();
    auto images = b->images;
    if (const auto image = response.find("containerimage.descriptor"); images.empty() && image != response.end())
        images.push_back(base64_decode(image->second).value());
    for (std::size_t i = 0; i < images.size(); ++i) {
        const auto d = oci::parse_descriptor(json::parse(images[i]));
        auto& to = (*result->mutable_results())[static_cast<std::int64_t>(i)];
        to.set_media_type(d.media_type);
        to.set_digest(d.digest.str());
        to.set_size(static_cast<std::int64_t>(d.size));
        if (i == 0) *result->mutable_result_deprecated() = to;
    }
    std::vector<std::string> blobs;
    const auto add_blob = [&blobs](wire::Descriptor* to, std::string_view media_type, std::string bytes) {
        to->set_media_type(std::string(media_type));
        to->set_digest(digest::of(bytes).str());
        to->set_size(static_cast<std::int64_t>(bytes.size()));
        blobs.push_back(std::move(bytes));
    };
    for (auto& [platform, predicate] : b->provenance) {
        auto* to = (platform.empty() ? result : &(*record.mutable_results())[platform])->add_attestations();
        (*to->mutable_annotations())["in-toto.io/predicate-type"] = "https://slsa.dev/provenance/v1";
        add_blob(to, "application/vnd.in-toto+json", std::move(predicate));
    }
    if (!end.ok()) add_blob(record.mutable_external_error(), "application/vnd.googeapis.google.rpc.status+proto", status_bytes(end));
    add_blob(record.mutable_trace(), "application/vnd.buildkit.otlp.json.v0", trace_of(b->ref, b->events->all()));
    const auto n = b->events->count();
    record.set_num_total_steps(n.total);
    record.set_num_cached_steps(n.cached);
    record.set_num_completed_steps(n.completed);
    record.set_num_warnings(n.warnings);
    try {
        co_await w->history.complete(b->ref, record.SerializeAsString(), kept_status(*b->events), std::move(blobs));
    } catch (const std::exception& e) {
        log(log_level::warning, "the build's record could not be kept", {{"ref", b->ref}, {"error", e.what()}});
        w->history.forget_active(b->ref);
    }
}

}  // namespace

async::task<rpc::status> solve(std::shared_ptr<world> w, std::shared_ptr<rpc::call> c) {
    const auto bytes = co_await c->read();
    wire::SolveRequest r;
    if (!bytes || !r.ParseFromString(*bytes)) throw error{errc::invalid, "the request cannot be read"};
    refuse_what_is_missing(r);
    const auto b = w->builds.add(r.ref());
    const bool kept = !r.internal();
    const auto record = begun_record(r);
    if (kept) w->history.begin(b->ref, record.SerializeAsString());
    std::exception_ptr failed;
    std::map<std::string, std::string> response;
    try {
        response = co_await run_with_client(w, b, std::move(r));
    } catch (...) {
        failed = std::current_exception();
    }
    rpc::status end = std::move(b->refused).value_or(rpc::status{});
    if (failed) end = failure_status(failed, b->job ? b->job->failed() : std::nullopt, nullptr, b->denied);
    co_await async::no_cancel;
    co_await close_bridge(b);
    w->builds.end(b);
    // What builds had is given back to the kernel when nobody builds.
    if (w->builds.running() == 0) w->pool.post([] { ::malloc_trim(0); });
    if (kept) co_await keep_record(w, b, record, end, response);
    if (!end.ok()) co_return end;
    wire::SolveResponse out;
    for (auto& [key, value] : response) (*out.mutable_exporter_response())[key] = std::move(value);
    co_await c->write(out.SerializeAsString());
    co_return rpc::status{};
}

}  // namespace cobuild::daemon

module;
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <google/protobuf/descriptor.h>
#include <google/protobuf/descriptor.pb.h>
#include <boost/asio/awaitable.hpp>

#include "content.pb.h"
#include "control.pb.h"
#include "gateway.pb.h"
#include "reflection.pb.h"
#include "session.pb.h"

module cobuild.daemon;

import :internal;

namespace cobuild::daemon {

namespace {

namespace api = google::protobuf;
namespace wire = grpc::reflection::v1;

constexpr int not_found = 5, unimplemented = 12;

// ---------------------------------------------------------------- health

bool serves(const std::string& service) {
    static const std::set<std::string> known{"", "moby.buildkit.v1.Control", "moby.buildkit.v1.frontend.LLBBridge"};
    return known.contains(service);
}

std::string health_of(const std::string& request) {
    moby::session::HealthCheckRequest q;
    if (!q.ParseFromString(request)) throw error{errc::invalid, "the request cannot be read"};
    if (!serves(q.service())) throw error{errc::not_found, cat("there is no service ", quoted(q.service()))};
    moby::session::HealthCheckResponse out;
    out.set_status(moby::session::HealthCheckResponse::SERVING);
    return out.SerializeAsString();
}

async::task<std::string> check_health(std::string request) { co_return health_of(request); }

/// Told once: it serves until it ends, and then the call does.
async::task<rpc::status> watch_health(std::shared_ptr<world>, std::shared_ptr<rpc::call> c) {
    const auto request = co_await c->read();
    co_await c->write(health_of(request.value_or("")));
    async::event never;
    co_await never.wait();
    co_return rpc::status{};
}

// ---------------------------------------------------------------- traces

/// Clients send the spans of their build here. Nobody asks for them again, so they are dropped.
async::task<std::string> take_traces(std::string) { co_return std::string(); }

// ---------------------------------------------------------------- reflection

/// Descriptions of a file and of all it imports, each once.
void add_files(const api::FileDescriptor* file, std::set<std::string>& seen, wire::FileDescriptorResponse& to) {
    std::vector<const api::FileDescriptor*> left{file};
    while (!left.empty()) {
        const auto* f = left.back();
        left.pop_back();
        if (!seen.insert(std::string(f->name())).second) continue;
        api::FileDescriptorProto described;
        f->CopyTo(&described);
        to.add_file_descriptor_proto(described.SerializeAsString());
        for (int i = 0; i < f->dependency_count(); ++i) left.push_back(f->dependency(i));
    }
}

const api::FileDescriptor* file_of_symbol(const std::string& name) {
    static constexpr std::string_view v1alpha = "grpc.reflection.v1alpha.";
    const auto* pool = api::DescriptorPool::generated_pool();
    if (name.starts_with(v1alpha)) return pool->FindFileContainingSymbol(cat("grpc.reflection.v1.", name.substr(v1alpha.size())));
    return pool->FindFileContainingSymbol(name);
}

wire::ServerReflectionResponse reflect(const wire::ServerReflectionRequest& q) {
    wire::ServerReflectionResponse out;
    out.set_valid_host(q.host());
    *out.mutable_original_request() = q;
    const auto fail = [&out](int code, std::string what) {
        out.mutable_error_response()->set_error_code(code);
        out.mutable_error_response()->set_error_message(std::move(what));
    };
    const auto answer_file = [&](const api::FileDescriptor* file, const std::string& asked) {
        std::set<std::string> seen;
        if (file != nullptr)
            add_files(file, seen, *out.mutable_file_descriptor_response());
        else
            fail(not_found, cat("there is no description of ", quoted(asked)));
    };
    switch (q.message_request_case()) {
        case wire::ServerReflectionRequest::kListServices:
            for (const auto* name : {"containerd.services.content.v1.Content", "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection",
                                     "grpc.reflection.v1alpha.ServerReflection", "moby.buildkit.v1.Control", "moby.buildkit.v1.frontend.LLBBridge",
                                     "opentelemetry.proto.collector.trace.v1.TraceService"})
                out.mutable_list_services_response()->add_service()->set_name(name);
            break;
        case wire::ServerReflectionRequest::kFileByFilename:
            answer_file(api::DescriptorPool::generated_pool()->FindFileByName(q.file_by_filename()), q.file_by_filename());
            break;
        case wire::ServerReflectionRequest::kFileContainingSymbol:
            answer_file(file_of_symbol(q.file_containing_symbol()), q.file_containing_symbol());
            break;
        default: fail(unimplemented, "extensions are not described"); break;
    }
    return out;
}

async::task<rpc::status> reflection(std::shared_ptr<world>, std::shared_ptr<rpc::call> c) {
    // Their descriptions are registered by the linker's taking them in.
    (void)moby::buildkit::v1::SolveRequest::descriptor();
    (void)moby::buildkit::v1::frontend::SolveRequest::descriptor();
    (void)containerd::services::content::v1::Info::descriptor();
    while (const auto message = co_await c->read()) {
        wire::ServerReflectionRequest q;
        if (!q.ParseFromString(*message)) throw error{errc::invalid, "the request cannot be read"};
        co_await c->write(reflect(q).SerializeAsString());
    }
    co_return rpc::status{};
}

method unary(async::task<std::string> (*answer)(std::string)) {
    return [answer](std::shared_ptr<world>, std::shared_ptr<rpc::call> c) { return rpc::unary(std::move(c), answer); };
}

}  // namespace

method common_method(std::string_view path) {
    static const std::map<std::string, method, std::less<>> known{
        {"/grpc.health.v1.Health/Check", unary(check_health)},
        {"/grpc.health.v1.Health/Watch", watch_health},
        {"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", reflection},
        {"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", reflection},
        {"/opentelemetry.proto.collector.trace.v1.TraceService/Export", unary(take_traces)},
    };
    const auto at = known.find(path);
    return at == known.end() ? method{} : at->second;
}

}  // namespace cobuild::daemon

module;
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "session.pb.h"
#include "worker.pb.h"

module cobuild.daemon;

import cobuild.gateway;
import cobuild.json;
import cobuild.llb;
import cobuild.oci;
import :internal;

namespace cobuild::daemon {

namespace {

constexpr std::size_t max_said = std::size_t{16} << 10;

/// A frontend whose image is here.
struct ready {
    std::shared_ptr<build::ref> root;
    std::string name;  ///< with its digest
    oci::run_config config;
};

std::string without_tag(const std::string& reference) { return oci::reference::parse(reference).name(); }

void check_allowed(const world& w, const std::string& image) {
    const auto& allowed = w.given.settings.frontend.allowed_repositories;
    if (allowed.empty()) return;
    const auto wanted = without_tag(image);
    for (const auto& a : allowed)
        if (without_tag(a) == wanted) return;
    throw error{errc::permission, cat("'", image, "' is not an allowed gateway source")};
}

/// "a,b+c" as {a, b}: what stands behind a plus is only wished for.
std::set<std::string> capabilities(std::string_view text) {
    std::set<std::string> out;
    for (const auto part : split(text, ','))
        if (const auto name = part.substr(0, part.find('+')); !name.empty()) out.emplace(name);
    return out;
}

void check_capabilities(const ready& r, const build::frontend_request& q) {
    const auto label = r.config.labels.find("moby.buildkit.frontend.caps");
    const auto has = capabilities(label == r.config.labels.end() ? std::string_view{} : std::string_view(label->second));
    const auto asked = q.attrs.find("frontend.caps");
    auto wanted = capabilities(asked == q.attrs.end() ? std::string_view{} : std::string_view(asked->second));
    if (!q.inputs.empty()) wanted.insert("moby.buildkit.frontend.inputs");
    for (const auto& c : wanted)
        if (!has.contains(c)) throw error{errc::unsupported, cat("unsupported frontend capability ", c)};
}

/// The image that the attributes put in its place, or its own name.
std::string image_of(const build::frontend_request& q) {
    static constexpr std::string_view scheme = "docker-image://";
    const auto at = q.attrs.find(cat("context:", q.image));
    if (at == q.attrs.end()) return q.image;
    if (!at->second.starts_with(scheme))
        throw error{errc::unsupported,
                    cat("the frontend ", quoted(q.image), " as ", quoted(at->second), " is not supported yet; docker-image:// is")};
    return at->second.substr(scheme.size());
}

async::task<ready> fetch(std::shared_ptr<build::job> j, std::string image) {
    gateway::resolve_request q;
    q.reference = oci::reference::parse(image).with_default_tag().str();
    const auto host = oci::host_platform();
    q.platform = host;
    q.log_name = cat("resolve image config for docker-image://", q.reference);
    const auto found = co_await j->resolve_image(std::move(q));
    ready out;
    out.config = oci::parse_image(found.config).config;
    out.name = found.reference;
    if (found.manifest && out.name.find('@') == std::string::npos) out.name = cat(out.name, "@", found.manifest->str());
    llb::graph g;
    out.root = j->define(g.finish(g.add({.inputs = {},
                                         .what = llb::source_op{cat("docker-image://", out.name), {{"image.recordtype", "frontend"}}},
                                         .platform = llb::platform{host.architecture, host.os, host.variant, host.os_version, host.os_features}})));
    co_return out;
}

/// The definition of the frontend's own image, which it may look at.
std::shared_ptr<build::ref> describe_itself(build::job& j, const build::ref& root) {
    llb::graph g;
    llb::file_op f;
    f.actions.push_back({.input = llb::scratch,
                         .secondary_input = llb::scratch,
                         .output = 0,
                         .what = llb::mkfile_action{.path = "/frontend.bin", .mode = 0400, .data = llb::marshal(root.definition())}});
    llb::op_metadata meta;
    meta.description[std::string(llb::custom_name)] = "[internal] load frontend definition";
    return j.define(g.finish(g.add({.inputs = {}, .what = std::move(f), .platform = {}}, std::move(meta))));
}

std::string workers_json(const world& w) {
    moby::buildkit::v1::types::WorkerRecord r;
    r.ParseFromString(worker_record(w));
    json::array platforms;
    for (const auto& p : r.platforms()) {
        json::object one{{"architecture", p.architecture()}, {"os", p.os()}};
        if (!p.variant().empty()) one.set("variant", p.variant());
        platforms.emplace_back(std::move(one));
    }
    json::object one{{"id", r.id()}, {"labels", std::map<std::string, std::string>(r.labels().begin(), r.labels().end())}};
    one.set("platforms", json::value(std::move(platforms)));
    return json::serialize(json::value(json::array{json::value(std::move(one))}));
}

build::process_request process_of(const world& w, const build::job& j, const ready& r, const build::frontend_request& q) {
    build::process_request out;
    out.args = r.config.entrypoint.empty() ? std::vector<std::string>{"/run"} : r.config.entrypoint;
    out.env = r.config.env;
    std::size_t n = 0;
    for (const auto& [key, value] : q.attrs) out.env.push_back(cat("BUILDKIT_FRONTEND_OPT_", n++, "=", key, "=", value));
    out.env.push_back(cat("BUILDKIT_SESSION_ID=", j.id()));
    out.env.push_back(cat("BUILDKIT_WORKERS=", workers_json(w)));
    out.env.emplace_back("BUILDKIT_EXPORTEDPRODUCT=buildkit");
    out.cwd = r.config.working_dir.empty() ? "/" : r.config.working_dir;
    out.remove_stubs_recursively = true;
    return out;
}

build::container_request container_of(const ready& r, std::shared_ptr<build::ref> itself) {
    build::container_request out;
    out.id = "frontend";
    out.mounts = {{.dest = "/"}, {.dest = "/run/config/buildkit/metadata", .readonly = true}};
    out.refs = {r.root, std::move(itself)};
    const auto alone = r.config.labels.find("moby.buildkit.frontend.network.none");
    if (alone != r.config.labels.end() && (alone->second == "1" || to_lower(alone->second) == "true")) out.network = llb::net_mode::none;
    return out;
}

async::task<std::string> healthy(std::string) {
    moby::session::HealthCheckResponse out;
    out.set_status(moby::session::HealthCheckResponse::SERVING);
    co_return out.SerializeAsString();
}

async::task<rpc::status> serve_call(bridge_call on, std::shared_ptr<rpc::call> c) {
    static constexpr std::string_view bridge = "/moby.buildkit.v1.frontend.LLBBridge/";
    const std::string_view name = c->method();
    if (name == "/grpc.health.v1.Health/Check") return rpc::unary(std::move(c), healthy);
    const auto handler = name.starts_with(bridge) ? bridge_method_of(name.substr(bridge.size())) : bridge_handler{};
    if (handler) return handler(std::move(on), std::move(c));
    const auto unknown = [](std::string method) -> async::task<rpc::status> {
        co_return rpc::status{rpc::code::unimplemented, cat("the method ", method, " is not supported"), {}};
    };
    return unknown(std::string(name));
}

/// The frontend's process, with LLBBridge on its standard input and output; how it ended.
async::task<int> converse(std::shared_ptr<world> w, bridge_call on, std::shared_ptr<build::container> in, build::process_request what) {
    std::array<int, 2> ends{};
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) != 0) throw_errno("making a frontend's socket");
    unique_fd ours{ends[0]};
    what.in = unique_fd{ends[1]};
    what.direct_out = what.in.duplicate();
    rpc::server server(w->ex, w->pool, [on](std::shared_ptr<rpc::call> c) { return serve_call(on, std::move(c)); });
    server.adopt(std::move(ours));
    std::exception_ptr failed;
    int code = 0;
    try {
        const auto process = co_await in->start(std::move(what));
        code = co_await process->wait();
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::no_cancel;
    co_await server.stop(nanoseconds{0});
    if (failed) std::rethrow_exception(failed);
    co_return code;
}

async::task<build::job_result> run_image(std::shared_ptr<world> w, std::shared_ptr<build::job> j, build::frontend_request q) {
    const auto image = image_of(q);
    check_allowed(*w, q.image);
    const auto r = co_await fetch(j, image);
    check_capabilities(r, q);
    const auto b = std::make_shared<build_state>();
    b->ref = b->prefix = cat(j->id(), "-", random_id().substr(0, 12));
    b->job = j;
    for (const auto& [name, definition] : q.inputs) b->inputs[name] = llb::marshal(definition);
    const auto container = co_await j->open_container(container_of(r, describe_itself(*j, *r.root)));
    b->containers["frontend"] = container;
    auto what = process_of(*w, *j, r, q);
    const auto said = std::make_shared<std::string>();
    what.err = [said](std::string text) -> async::task<void> {
        log(log_level::debug, "frontend", {{"says", text}});
        *said += text;
        if (said->size() > max_said) said->erase(0, said->size() - max_said);
        co_return;
    };
    std::exception_ptr failed;
    int code = 0;
    try {
        code = co_await converse(w, {w, b, b}, container, std::move(what));
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::no_cancel;
    co_await close_bridge(b);
    b->job.reset();
    // What the frontend says of itself comes before how its process ended, and that before a result.
    if (b->refused) throw told_error(*b->refused);
    if (failed) std::rethrow_exception(failed);
    if (code != 0)
        throw error{errc::step_failed, cat("the frontend ", q.image, " ended with exit code ", code, said->empty() ? "" : ": ", trim(*said))};
    if (!b->returned) throw error{errc::invalid, cat("the frontend ", q.image, " returned no result")};
    co_return *b->returned;
}

}  // namespace

build::frontend_runner run_frontend_images(std::shared_ptr<world> w) {
    return [w](std::shared_ptr<build::job> j, build::frontend_request q) {
        // A chain of its own: what it shields from cancellation while it cleans up ends with it.
        return async::linked(async::cancel_token{}, run_image(w, std::move(j), std::move(q)));
    };
}

build::frontend_runner frontend_runner(options o) { return run_frontend_images(std::make_shared<world>(std::move(o), random_id())); }

}  // namespace cobuild::daemon

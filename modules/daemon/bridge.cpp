module;
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <sys/stat.h>

#include <boost/asio/awaitable.hpp>

#include "control.pb.h"
#include "gateway.pb.h"

module cobuild.daemon;

import cobuild.gateway;
import cobuild.llb;
import cobuild.oci;
import :internal;

namespace cobuild::daemon {

namespace wire = moby::buildkit::v1::frontend;

namespace {

/// One LLBBridge call on a build that is under way.
struct bridge_call {
    std::shared_ptr<world> w;
    std::shared_ptr<build_state> b;
};
using answer = std::function<async::task<std::string>(bridge_call, std::string)>;

template<class M>
M parse(const std::string& bytes) {
    M out;
    if (!out.ParseFromString(bytes)) throw error{errc::invalid, "the request cannot be read"};
    return out;
}

std::shared_ptr<build::ref> find_ref(const bridge_call& c, const std::string& id) {
    const auto at = c.b->refs.find(id);
    if (at == c.b->refs.end()) throw error{errc::not_found, cat("no such ref: ", id)};
    return at->second;
}

std::string keep_ref(build_state& b, std::shared_ptr<build::ref> r) {
    if (!r) return {};
    auto id = cat(b.ref, "-", ++b.next_ref);
    b.refs[id] = std::move(r);
    return id;
}

wire::Ref wire_ref(build_state& b, const std::shared_ptr<build::ref>& r) {
    wire::Ref out;
    out.set_id(keep_ref(b, r));
    if (r) out.set_def(llb::marshal(r->definition()));
    return out;
}

// ---------------------------------------------------------------- solving

async::task<std::string> solve_part(bridge_call c, std::string bytes) {
    auto r = parse<wire::SolveRequest>(bytes);
    if (r.source_policies_size() > 0) throw error{errc::unsupported, "source policies are not supported yet"};
    c.b->job->import_caches(cache_entries(r.cache_imports()));
    build::job_result result;
    if (!r.frontend().empty()) {
        std::map<std::string, llb::definition> inputs;
        for (const auto& [name, definition] : r.frontend_inputs()) inputs[name] = llb::unmarshal_definition(definition);
        result = co_await c.b->job->run_frontend(r.frontend(), {r.frontend_opt().begin(), r.frontend_opt().end()}, std::move(inputs));
    } else {
        auto definition = r.definition().empty() ? llb::definition{} : llb::unmarshal_definition(r.definition());
        result.refs[""] = c.b->job->define(std::move(definition));
    }
    if (r.evaluate()) {
        std::vector<async::task<void>> all;
        for (const auto& [key, ref] : result.refs)
            if (ref) all.push_back(ref->evaluate());
        co_await async::when_all(std::move(all));
    }
    wire::SolveResponse out;
    auto& made = *out.mutable_result();
    for (const auto& [key, value] : result.metadata) (*made.mutable_metadata())[key] = value;
    if (result.map) {
        for (const auto& [key, ref] : result.refs) (*made.mutable_refs()->mutable_refs())[key] = wire_ref(*c.b, ref);
    } else {
        auto one = wire_ref(*c.b, result.refs[""]);
        if (!r.allow_result_return()) out.set_ref(one.id());
        if (r.allow_result_array_ref())
            *made.mutable_ref() = std::move(one);
        else
            made.set_ref_deprecated(one.id());
    }
    co_return out.SerializeAsString();
}

std::shared_ptr<build::ref> returned_ref(const bridge_call& c, const std::string& id) { return id.empty() ? nullptr : find_ref(c, id); }

async::task<std::string> take_result(bridge_call c, std::string bytes) {
    const auto r = parse<wire::ReturnRequest>(bytes);
    if (r.has_error()) {
        c.b->refused = rpc::status{static_cast<rpc::code>(r.error().code()), r.error().message(), r.error().SerializeAsString()};
        c.b->driven.set();
        co_return wire::ReturnResponse().SerializeAsString();
    }
    build::job_result result;
    const auto& given = r.result();
    if (given.has_ref()) result.refs[""] = returned_ref(c, given.ref().id());
    if (given.result_case() == wire::Result::kRefDeprecated) result.refs[""] = returned_ref(c, given.ref_deprecated());
    if (given.has_refs()) {
        result.map = true;
        for (const auto& [key, ref] : given.refs().refs()) result.refs[key] = returned_ref(c, ref.id());
    }
    if (given.has_refs_deprecated()) {
        result.map = true;
        for (const auto& [key, id] : given.refs_deprecated().refs()) result.refs[key] = returned_ref(c, id);
    }
    result.metadata = {given.metadata().begin(), given.metadata().end()};
    c.b->returned = std::move(result);
    c.b->driven.set();
    co_return wire::ReturnResponse().SerializeAsString();
}

/// What the client gave its own build.
async::task<std::string> inputs_of(bridge_call c, std::string) {
    wire::InputsResponse out;
    for (const auto& [name, bytes] : c.b->inputs) (*out.mutable_definitions())[name] = bytes;
    co_return out.SerializeAsString();
}

async::task<std::string> ping(bridge_call c, std::string) {
    wire::PongResponse out;
    for (const auto& id : frontend_capabilities()) {
        auto* cap = out.add_frontend_api_caps();
        cap->set_id(id);
        cap->set_enabled(true);
    }
    for (const auto& id : llb_capabilities()) {
        auto* cap = out.add_llb_caps();
        cap->set_id(id);
        cap->set_enabled(true);
    }
    out.add_workers()->ParseFromString(worker_record(*c.w));
    co_return out.SerializeAsString();
}

// ---------------------------------------------------------------- sources

oci::platform platform_of(const moby::buildkit::v1::types::Platform& p) {
    return {.os = p.os(),
            .architecture = p.architecture(),
            .variant = p.variant(),
            .os_version = p.os_version(),
            .os_features = {p.os_features().begin(), p.os_features().end()}};
}

gateway::resolve_mode mode_of(const std::string& text) {
    if (text == "pull") return gateway::resolve_mode::pull;
    return text == "local" ? gateway::resolve_mode::local : gateway::resolve_mode::standard;
}

async::task<std::string> resolve_image_config(bridge_call c, std::string bytes) {
    const auto r = parse<wire::ResolveImageConfigRequest>(bytes);
    gateway::resolve_request q;
    q.reference = oci::reference::parse(r.ref()).with_default_tag().str();
    q.platform = r.has_platform() ? platform_of(r.platform()) : oci::host_platform();
    q.mode = mode_of(r.resolve_mode());
    q.log_name = r.log_name().empty() ? cat("resolve image config for ", r.ref()) : r.log_name();
    const auto found = co_await c.b->job->resolve_image(std::move(q));
    wire::ResolveImageConfigResponse out;
    if (found.manifest) out.set_digest(found.manifest->str());
    out.set_config(found.config);
    out.set_ref(found.reference);
    co_return out.SerializeAsString();
}

async::task<std::string> resolve_source(bridge_call c, std::string bytes) {
    const auto r = parse<wire::ResolveSourceMetaRequest>(bytes);
    const std::string_view id = r.source().identifier();
    static constexpr std::string_view image = "docker-image://";
    wire::ResolveSourceMetaResponse out;
    *out.mutable_source() = r.source();
    if (id.starts_with("local://")) co_return out.SerializeAsString();
    if (id.starts_with("git://") || id.starts_with("http://") || id.starts_with("https://")) {
        const auto facts = co_await c.b->job->resolve_source({std::string(id), {r.source().attrs().begin(), r.source().attrs().end()}},
                                                             r.log_name().empty() ? cat("resolve ", id) : r.log_name(), r.git().return_object());
        if (id.starts_with("git://")) {
            out.mutable_git()->set_checksum(facts.checksum);
            out.mutable_git()->set_ref(facts.ref);
            out.mutable_git()->set_commit_object(facts.commit_object);
        } else {
            out.mutable_http()->set_checksum(facts.checksum);
            out.mutable_http()->set_filename(facts.filename);
            if (facts.modified != 0) out.mutable_http()->mutable_last_modified()->set_seconds(facts.modified);
        }
        co_return out.SerializeAsString();
    }
    if (!id.starts_with(image)) throw error{errc::unsupported, cat("resolving ", quoted(id), " is not supported yet")};
    gateway::resolve_request q;
    q.reference = oci::reference::parse(id.substr(image.size())).with_default_tag().str();
    q.platform = r.has_platform() ? platform_of(r.platform()) : oci::host_platform();
    q.mode = mode_of(r.resolve_mode());
    q.log_name = r.log_name().empty() ? cat("resolve image config for ", id) : r.log_name();
    const auto found = co_await c.b->job->resolve_image(std::move(q));
    if (found.manifest) out.mutable_image()->set_digest(found.manifest->str());
    if (!r.image().no_config()) out.mutable_image()->set_config(found.config);
    co_return out.SerializeAsString();
}

// ---------------------------------------------------------------- files

/// Go's file mode bits.
std::uint32_t go_mode(std::uint32_t mode) {
    std::uint32_t out = mode & 0777U;
    if ((mode & S_ISUID) != 0) out |= 1U << 23;
    if ((mode & S_ISGID) != 0) out |= 1U << 22;
    if ((mode & S_ISVTX) != 0) out |= 1U << 20;
    switch (mode & S_IFMT) {
        case S_IFDIR: return out | 1U << 31;
        case S_IFLNK: return out | 1U << 27;
        case S_IFBLK: return out | 1U << 26;
        case S_IFCHR: return out | 1U << 26 | 1U << 21;
        case S_IFIFO: return out | 1U << 25;
        case S_IFSOCK: return out | 1U << 24;
        default: return out;
    }
}

void fill(wire::Stat& out, const build::file_entry& e) {
    out.set_path(e.name);
    out.set_mode(go_mode(e.info.mode));
    out.set_uid(e.info.uid);
    out.set_gid(e.info.gid);
    out.set_size(S_ISREG(e.info.mode) ? static_cast<std::int64_t>(e.info.size) : 0);
    out.set_mod_time(e.info.mtime.seconds * 1'000'000'000 + e.info.mtime.nanoseconds);
    out.set_linkname(e.link);
    out.set_devmajor(e.info.rdev_major);
    out.set_devminor(e.info.rdev_minor);
}

async::task<std::string> read_file(bridge_call c, std::string bytes) {
    const auto r = parse<wire::ReadFileRequest>(bytes);
    const auto ref = find_ref(c, r.ref());
    const auto at = [](std::int64_t v) { return static_cast<std::uint64_t>(v < 0 ? 0 : v); };
    wire::ReadFileResponse out;
    out.set_data(co_await ref->read_file(r.file_path(), at(r.range().offset()), at(r.range().length())));
    co_return out.SerializeAsString();
}

async::task<std::string> read_directory(bridge_call c, std::string bytes) {
    const auto r = parse<wire::ReadDirRequest>(bytes);
    const auto ref = find_ref(c, r.ref());
    wire::ReadDirResponse out;
    for (const auto& e : co_await ref->read_directory(r.dir_path(), r.include_pattern())) fill(*out.add_entries(), e);
    co_return out.SerializeAsString();
}

async::task<std::string> stat_file(bridge_call c, std::string bytes) {
    const auto r = parse<wire::StatFileRequest>(bytes);
    const auto ref = find_ref(c, r.ref());
    wire::StatFileResponse out;
    fill(*out.mutable_stat(), co_await ref->stat(r.path()));
    co_return out.SerializeAsString();
}

async::task<std::string> evaluate(bridge_call c, std::string bytes) {
    const auto r = parse<wire::EvaluateRequest>(bytes);
    const auto ref = find_ref(c, r.ref());
    co_await ref->evaluate();
    co_return wire::EvaluateResponse().SerializeAsString();
}

async::task<std::string> warn(bridge_call c, std::string bytes) {
    const auto r = parse<wire::WarnRequest>(bytes);
    progress::warning out;
    if (const auto id = digest::try_parse(r.digest())) out.vertex = *id;
    out.level = static_cast<int>(r.level());
    out.message = r.short_();
    out.detail.assign(r.detail().begin(), r.detail().end());
    out.url = r.url();
    moby::buildkit::v1::SourceInfo info;
    if (!r.info().empty() && info.ParseFromString(r.info())) {
        out.location = source_location{info.filename(), 0};
        out.source = info.data();
    }
    for (const auto& one : r.ranges()) {
        moby::buildkit::v1::Range range;
        if (!range.ParseFromString(one)) continue;
        out.ranges.push_back({.first_line = range.start().line(),
                              .first_column = range.start().character(),
                              .last_line = range.end().line(),
                              .last_column = range.end().character()});
    }
    if (out.location && !out.ranges.empty()) out.location->line = static_cast<unsigned>(out.ranges.front().first_line);
    c.b->job->warn(std::move(out));
    co_return wire::WarnResponse().SerializeAsString();
}

/// Finds the build that the metadata names, and tells of a failure where it comes from.
method on_build(answer a) {
    return [a](std::shared_ptr<world> w, std::shared_ptr<rpc::call> c) -> async::task<rpc::status> {
        const auto call = [](answer f, std::shared_ptr<world> world, std::shared_ptr<rpc::call> rpc) -> async::task<rpc::status> {
            const auto id = rpc::value(rpc->request(), "buildkit-controlapi-buildid");
            if (id.empty()) throw error{errc::invalid, "no buildid found in context"};
            const auto b = co_await world->builds.get(id, std::chrono::seconds{3});
            const auto request = co_await rpc->read();
            if (!request) throw error{errc::invalid, "the request is missing"};
            // A Solve call that is still looking for its session has no job yet.
            co_await b->prepared.wait();
            if (!b->job) throw error{errc::not_found, cat("no such job ", id)};
            std::exception_ptr failed;
            std::string response;
            try {
                response = co_await f({world, b}, *request);
            } catch (...) {
                failed = std::current_exception();
            }
            if (failed) co_return build_status(describe(failed), b->job ? b->job->failed() : std::nullopt);
            co_await rpc->write(std::move(response));
            co_return rpc::status{};
        };
        return call(a, std::move(w), std::move(c));
    };
}

}  // namespace

method bridge_method(std::string_view name) {
    static const std::map<std::string, method, std::less<>> known{
        {"ResolveImageConfig", on_build(resolve_image_config)},
        {"ResolveSourceMeta", on_build(resolve_source)},
        {"Solve", on_build(solve_part)},
        {"ReadFile", on_build(read_file)},
        {"ReadDir", on_build(read_directory)},
        {"StatFile", on_build(stat_file)},
        {"Evaluate", on_build(evaluate)},
        {"Ping", on_build(ping)},
        {"Return", on_build(take_result)},
        {"Inputs", on_build(inputs_of)},
        {"Warn", on_build(warn)},
    };
    const auto at = known.find(name);
    return at == known.end() ? method{} : at->second;
}

}  // namespace cobuild::daemon

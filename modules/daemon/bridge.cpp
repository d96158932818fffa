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
import cobuild.policy;
import :internal;

namespace cobuild::daemon {

namespace wire = moby::buildkit::v1::frontend;

std::shared_ptr<build::ref> find_ref(const bridge_call& c, const std::string& id) {
    const auto at = c.f->refs.find(id);
    if (at == c.f->refs.end()) throw error{errc::not_found, cat("no such ref: ", id)};
    return at->second;
}

std::string keep_ref(bridge_state& f, std::shared_ptr<build::ref> r) {
    if (!r) return {};
    auto id = cat(f.prefix, "-", ++f.next_ref);
    f.refs[id] = std::move(r);
    return id;
}

namespace {

template<class M>
M parse(const std::string& bytes) {
    M out;
    if (!out.ParseFromString(bytes)) throw error{errc::invalid, "the request cannot be read"};
    return out;
}

wire::Ref wire_ref(bridge_state& b, const std::shared_ptr<build::ref>& r) {
    wire::Ref out;
    out.set_id(keep_ref(b, r));
    if (r) out.set_def(llb::marshal(r->definition()));
    return out;
}

template<class Policies>
std::vector<policy::policy> policies_of(const Policies& list) {
    std::vector<policy::policy> out;
    for (const auto& p : list) out.push_back(read_policy(p.SerializeAsString()));
    return out;
}

// ---------------------------------------------------------------- solving

async::task<std::string> solve_part(bridge_call c, std::string bytes) {
    auto r = parse<wire::SolveRequest>(bytes);
    c.b->job->import_caches(cache_entries(r.cache_imports()));
    build::job_result result;
    if (!r.frontend().empty()) {
        std::map<std::string, llb::definition> inputs;
        for (const auto& [name, definition] : r.frontend_inputs()) inputs[name] = llb::unmarshal_definition(definition);
        result = co_await c.b->job->run_frontend(r.frontend(), {r.frontend_opt().begin(), r.frontend_opt().end()}, std::move(inputs));
    } else {
        auto definition = r.definition().empty() ? llb::definition{} : llb::unmarshal_definition(r.definition());
        result.refs[""] = c.b->job->define(std::move(definition), policies_of(r.source_policies()));
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
        for (const auto& [key, ref] : result.refs) (*made.mutable_refs()->mutable_refs())[key] = wire_ref(*c.f, ref);
    } else {
        auto one = wire_ref(*c.f, result.refs[""]);
        if (!r.allow_result_return()) out.set_ref(one.id());
        if (r.allow_result_array_ref())
            *made.mutable_ref() = std::move(one);
        else
            made.set_ref_deprecated(one.id());
    }
    co_return out.SerializeAsString();
}

std::shared_ptr<build::ref> returned_ref(const bridge_call& c, const std::string& id) { return id.empty() ? nullptr : find_ref(c, id); }

build::attested_ref attested(const bridge_call& c, const wire::Attestation& a) {
    build::attested_ref out;
    out.bundle = a.kind() == wire::BUNDLE;
    if (a.has_ref()) out.ref = returned_ref(c, a.ref().id());
    out.path = a.path();
    out.predicate_type = a.in_toto_predicate_type();
    out.metadata = {a.metadata().begin(), a.metadata().end()};
    for (const auto& s : a.in_toto_subjects())
        out.subjects.push_back({.self = s.kind() == wire::SELF, .name = s.name(), .digests = {s.digest().begin(), s.digest().end()}});
    return out;
}

async::task<std::string> take_result(bridge_call c, std::string bytes) {
    const auto r = parse<wire::ReturnRequest>(bytes);
    if (r.has_error()) {
        c.f->refused = rpc::status{static_cast<rpc::code>(r.error().code()), r.error().message(), r.error().SerializeAsString()};
        c.f->driven.set();
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
    for (const auto& [key, all] : given.attestations())
        for (const auto& a : all.attestation()) result.attestations[key].push_back(attested(c, a));
    c.f->returned = std::move(result);
    c.f->driven.set();
    co_return wire::ReturnResponse().SerializeAsString();
}

async::task<std::string> give_inputs(bridge_call c, std::string) {
    wire::InputsResponse out;
    for (const auto& [name, definition] : c.f->inputs) (*out.mutable_definitions())[name] = definition;
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

std::optional<llb::platform> llb_platform(const moby::buildkit::v1::types::Platform& p) {
    return llb::platform{p.architecture(), p.os(), p.variant(), p.os_version(), {p.os_features().begin(), p.os_features().end()}};
}

/// What the client's policies make of a source, for who asks what it is.
async::task<llb::source_op> checked(std::shared_ptr<build_state> b, llb::source_op what, std::optional<llb::platform> platform,
                                    std::vector<policy::policy> policies, bool verify) {
    std::exception_ptr failed;
    try {
        co_return co_await b->job->check_source(std::move(what), std::move(platform), std::move(policies), verify);
    } catch (const error&) {
        failed = std::current_exception();
    }
    throw describe(failed).with("could not resolve image due to policy");
}

async::task<std::string> resolve_image_config(bridge_call c, std::string bytes) {
    static constexpr std::string_view image = "docker-image://", layout_scheme = "oci-layout://";
    const auto r = parse<wire::ResolveImageConfigRequest>(bytes);
    gateway::resolve_request q;
    const bool layout = r.resolver_type() == 1;
    const auto platform = r.has_platform() ? llb_platform(r.platform()) : std::nullopt;
    auto source = layout ? cat(layout_scheme, r.ref()) : cat(image, oci::reference::parse(r.ref()).with_default_tag().str());
    source = (co_await checked(c.b, {source, {}}, platform, policies_of(r.source_policies()), true)).identifier;
    if (!layout && !source.starts_with(image))
        throw error{errc::invalid, cat("the source policy puts ", source, " in the place of the image ", r.ref())};
    q.reference = layout ? source : source.substr(image.size());
    q.store = r.store_id();
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

/// What a git or http source is.
async::task<void> tell_facts(std::shared_ptr<build_state> b, llb::source_op what, std::string name, bool objects,
                             wire::ResolveSourceMetaResponse& out) {
    const bool git = what.identifier.starts_with("git://");
    const auto facts = co_await b->job->resolve_source(std::move(what), std::move(name), objects);
    if (git) {
        out.mutable_git()->set_checksum(facts.checksum);
        out.mutable_git()->set_ref(facts.ref);
        out.mutable_git()->set_commit_checksum(facts.commit);
        if (!facts.commit_object.empty()) out.mutable_git()->set_commit_object(facts.commit_object);
        if (!facts.tag_object.empty()) out.mutable_git()->set_tag_object(facts.tag_object);
        co_return;
    }
    out.mutable_http()->set_checksum(facts.checksum);
    out.mutable_http()->set_filename(facts.filename);
    if (facts.modified != 0) out.mutable_http()->mutable_last_modified()->set_seconds(facts.modified);
}

async::task<std::string> resolve_source(bridge_call c, std::string bytes) { return resolve_source_meta(c.b, std::move(bytes), true); }

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
    out.set_size(S_ISDIR(e.info.mode) ? 0 : static_cast<std::int64_t>(e.info.size));
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

}  // namespace

async::task<std::string> resolve_source_meta(std::shared_ptr<build_state> b, std::string request, bool verify) {
    const auto r = parse<wire::ResolveSourceMetaRequest>(request);
    const auto platform = r.has_platform() ? llb_platform(r.platform()) : std::nullopt;
    const auto what = co_await checked(b, {r.source().identifier(), {r.source().attrs().begin(), r.source().attrs().end()}}, platform,
                                       policies_of(r.source_policies()), verify);
    const std::string_view id = what.identifier;
    static constexpr std::string_view image = "docker-image://", layout = "oci-layout://";
    wire::ResolveSourceMetaResponse out;
    out.mutable_source()->set_identifier(what.identifier);
    out.mutable_source()->mutable_attrs()->insert(what.attrs.begin(), what.attrs.end());
    if (id.starts_with("local://")) co_return out.SerializeAsString();
    if (id.starts_with("git://") || id.starts_with("http://") || id.starts_with("https://")) {
        co_await tell_facts(b, what, r.log_name().empty() ? cat("resolve ", id) : r.log_name(), r.git().return_object(), out);
        co_return out.SerializeAsString();
    }
    if (!id.starts_with(image) && !id.starts_with(layout)) throw error{errc::unsupported, cat("resolving ", quoted(id), " is not supported yet")};
    gateway::resolve_request q;
    q.reference = id.starts_with(layout) ? std::string(id) : oci::reference::parse(id.substr(image.size())).with_default_tag().str();
    if (const auto store = what.attrs.find("oci.store"); store != what.attrs.end()) q.store = store->second;
    q.platform = r.has_platform() ? platform_of(r.platform()) : oci::host_platform();
    q.mode = mode_of(r.resolve_mode());
    q.log_name = r.log_name().empty() ? cat("resolve image config for ", id) : r.log_name();
    const auto found = co_await b->job->resolve_image(std::move(q));
    if (found.manifest) out.mutable_image()->set_digest(found.manifest->str());
    if (!r.image().no_config()) out.mutable_image()->set_config(found.config);
    co_return out.SerializeAsString();
}

std::string wire_stat(const build::file_entry& e) {
    wire::Stat out;
    fill(out, e);
    return out.SerializeAsString();
}

bridge_handler on_bridge(std::function<async::task<std::string>(bridge_call, std::string)> answer) {
    return [answer](bridge_call c, std::shared_ptr<rpc::call> rpc) -> async::task<rpc::status> {
        const auto call = [](std::function<async::task<std::string>(bridge_call, std::string)> f, bridge_call on,
                             std::shared_ptr<rpc::call> with) -> async::task<rpc::status> {
            const auto held = on.b->job;  // the build may end, and let go of it, while this call still runs
            const auto request = co_await with->read();
            if (!request) throw error{errc::invalid, "the request is missing"};
            std::exception_ptr failed;
            std::string response;
            try {
                response = co_await f(on, *request);
            } catch (...) {
                failed = std::current_exception();
            }
            if (failed) {
                auto out = failure_status(failed, on.b->job ? on.b->job->failed() : std::nullopt, on.f.get(), on.b->denied);
                if (on.b->job) on.b->job->forget_failure();
                co_return out;
            }
            co_await with->write(std::move(response));
            co_return rpc::status{};
        };
        return call(answer, std::move(c), std::move(rpc));
    };
}

bridge_handler bridge_method_of(std::string_view name) {
    static const std::map<std::string, bridge_handler, std::less<>> known{
        {"ResolveImageConfig", on_bridge(resolve_image_config)},
        {"ResolveSourceMeta", on_bridge(resolve_source)},
        {"Solve", on_bridge(solve_part)},
        {"ReadFile", on_bridge(read_file)},
        {"ReadDir", on_bridge(read_directory)},
        {"StatFile", on_bridge(stat_file)},
        {"Evaluate", on_bridge(evaluate)},
        {"Ping", on_bridge(ping)},
        {"Return", on_bridge(take_result)},
        {"Inputs", on_bridge(give_inputs)},
        {"Warn", on_bridge(warn)},
    };
    const auto at = known.find(name);
    return at == known.end() ? container_handler(name) : at->second;
}

/// The build is the one that the metadata names; its client is the frontend.
method bridge_method(std::string_view name) {
    const auto handler = bridge_method_of(name);
    if (!handler) return {};
    return [handler](std::shared_ptr<world> w, std::shared_ptr<rpc::call> c) -> async::task<rpc::status> {
        const auto call = [](bridge_handler serve, std::shared_ptr<world> world, std::shared_ptr<rpc::call> rpc) -> async::task<rpc::status> {
            const auto id = rpc::value(rpc->request(), "buildkit-controlapi-buildid");
            if (id.empty()) throw error{errc::invalid, "no buildid found in context"};
            const auto b = co_await world->builds.get(id, std::chrono::seconds{3});
            // A Solve call that is still looking for its session has no job yet.
            co_await b->prepared.wait();
            if (!b->job) throw error{errc::not_found, cat("no such job ", id)};
            co_return co_await serve({world, b, b}, std::move(rpc));
        };
        return call(handler, std::move(w), std::move(c));
    };
}

}  // namespace cobuild::daemon

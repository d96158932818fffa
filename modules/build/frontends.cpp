module;
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import cobuild.llb;
import :container;

namespace cobuild::build {

// Body in job.cpp.
std::shared_ptr<job> make_job(parts& p, job_options options);

async::task<job_result> run_foreign(parts& p, std::shared_ptr<job> j, frontend_request r, std::optional<source_location> where) {
    std::optional<error> refused;
    if (!p.settings.frontend.gateway_enabled.value_or(true))
        refused.emplace(errc::permission,
                        cat("the frontend image ", quoted(r.image), " is not run: the configuration switches such frontends (gateway.v0) off"));
    else if (!p.frontends)
        refused.emplace(errc::unsupported, cat("the frontend image ", quoted(r.image), " is run by cobuildd, and this is not cobuildd"));
    if (refused) throw where ? error(*refused).at(*where) : error(*refused);
    try {
        co_return co_await p.frontends(std::move(j), std::move(r));
    } catch (const error& e) {
        // What the frontend itself told stays as it is.
        if (!where || e.where() || typeid(e) != typeid(error) || e.kind() == errc::canceled) throw;
        throw error(e).at(*where);
    }
}

namespace {

std::string joined(const std::vector<std::string>& items) {
    std::string out;
    for (const auto& i : items) out += cat(out.empty() ? "" : ",", i);
    return out;
}

std::map<std::string, std::string> attributes_for(const build_request& r, const frontend::request& request, const frontend::foreign_frontend& to) {
    auto out = frontend_attributes(r, request);
    out["cmdline"] = to.cmdline;
    out["source"] = to.image;
    for (const auto& [name, value] : request.named_contexts) out[cat("context:", name)] = value;
    if (!r.platforms.empty()) out["platform"] = joined(r.platforms);
    if (request.multi_platform) out["multi-platform"] = "true";
    if (r.pull == pull_mode::always) out["image-resolve-mode"] = "pull";
    if (!r.cgroup_parent.empty()) out["cgroup-parent"] = r.cgroup_parent;
    if (!request.hostname.empty()) out["hostname"] = request.hostname;
    return out;
}

std::string value_of(const std::map<std::string, std::string>& all, const std::string& key) {
    const auto at = all.find(key);
    return at == all.end() ? std::string() : at->second;
}

frontend::result result_of(const std::map<std::string, std::string>& metadata, const std::string& key, const std::shared_ptr<ref>& r) {
    const auto suffix = key.empty() ? std::string() : cat("/", key);
    frontend::result out;
    if (r) out.graph = r->definition();
    out.image_config = value_of(metadata, cat("containerimage.config", suffix));
    out.base_config = value_of(metadata, cat("containerimage.base.config", suffix));
    if (!key.empty())
        out.platform = oci::parse_platform(key);
    else if (!out.image_config.empty())
        out.platform = oci::parse_image(out.image_config).platform;
    if (out.platform.os.empty()) out.platform = oci::host_platform();
    return out;
}

}  // namespace

async::task<std::vector<frontend::result>> convert_elsewhere(parts& p, build_request r, frontend::request request, ops::build_scope scope,
                                                             frontend::foreign_frontend to, std::shared_ptr<progress::sink> sink) {
    if (!request.context_archive.empty() && r.remote_context.empty())
        throw error{errc::unsupported, cat("the frontend image ", quoted(to.image), " cannot be given a context from standard input yet")};
    job_options o;
    o.id = scope.id;
    o.client = scope.session;
    o.allow = r.allow;
    if (r.network == "host") o.allow.emplace_back("network.host");
    o.layouts = scope.layouts;
    o.sink = std::move(sink);
    const auto j = make_job(p, std::move(o));
    const auto made = co_await run_foreign(p, j, {to.image, attributes_for(r, request, to), {}}, to.where);
    std::vector<frontend::result> out;
    for (const auto& [key, one] : made.refs) out.push_back(result_of(made.metadata, key, one));
    if (out.empty()) throw error{errc::invalid, cat("the frontend image ", quoted(to.image), " gave no result")};
    co_return out;
}

}  // namespace cobuild::build

module;
#include <algorithm>
#include <exception>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import cobuild.frontend;
import cobuild.fs;
import cobuild.json;
import cobuild.llb;
import cobuild.remote;
import :parts;

namespace cobuild::build {

// Bodies in inputs.cpp.
async::task<std::shared_ptr<snapshot::view>> solve_tree(parts& p, llb::definition what, const ops::build_scope& scope,
                                                        std::shared_ptr<progress::sink> sink);
async::task<std::shared_ptr<snapshot::view>> solve_context(parts& p, const build_inputs& in, std::string shown_name,
                                                           std::shared_ptr<progress::sink> sink);
void read_remote_definition(const build_request& r, const fs::root& tree, frontend::request& out);

namespace {

std::string get(const std::map<std::string, std::string>& m, const std::string& key) {
    const auto at = m.find(key);
    return at == m.end() ? std::string() : at->second;
}

frontend_result answered(std::string_view json, std::string_view text) {
    frontend_result out;
    out.graphs[""] = {};
    out.metadata["result.json"] = json;
    out.metadata["result.txt"] = text;
    out.metadata["version"] = "1.0.0";
    return out;
}

/// BuildKit's description of the requests that answer_request() knows.
std::string described_requests() {
    struct known {
        std::string_view name, text;
        std::vector<std::string_view> options, results;
    };
    const std::vector<known> all{{"frontend.outline", "List all parameters current build target supports", {"target"}, {"result.json", "result.txt"}},
                                 {"frontend.targets", "List all targets current build supports", {}, {"result.json", "result.txt"}},
                                 {"frontend.lint", "Check a Dockerfile without building it", {}, {"result.json", "result.txt", "result.statuscode"}},
                                 {"frontend.subrequests.describe", "List available subrequest types", {}, {"result.json", "result.txt"}}};
    json::array list;
    for (const auto& k : all) {
        json::object one{{"name", k.name}, {"version", "1.0.0"}, {"type", "rpc"}, {"description", k.text}};
        for (const auto& [key, names] : {std::pair{"opts", &k.options}, std::pair{"metadata", &k.results}}) {
            json::array named;
            for (const auto name : *names) named.emplace_back(json::object{{"name", name}});
            if (!named.empty()) one.set(key, std::move(named));
        }
        list.emplace_back(std::move(one));
    }
    return json::serialize(json::value(std::move(list)));
}

/// What the client demands of the frontend; "+forward" leaves it to another frontend, which there is none of here.
void check_capabilities(const std::string& wanted, std::optional<frontend_problem>* problem) {
    static constexpr std::string_view known[] = {"inputs", "subrequests", "contexts", "gitquerystring"};
    if (wanted.empty()) return;
    for (const auto item : split(wanted, ',')) {
        const auto name = item.substr(0, item.find('+'));
        const auto is = [name](std::string_view k) { return name == cat("moby.buildkit.frontend.", k); };
        if (std::any_of(std::begin(known), std::end(known), is)) continue;
        *problem = {{}, {}, "FrontendCap", std::string(name)};
        throw error{errc::unsupported, cat("unsupported frontend capability ", name)};
    }
}

async::task<frontend_result> answer_request(std::string id, frontend::request request, build_gateway& gateway) {
    if (id == "frontend.subrequests.describe")
        co_return answered(described_requests(), "frontend.outline\nfrontend.targets\nfrontend.lint\nfrontend.subrequests.describe\n");
    frontend::answer found;
    if (id == "frontend.outline")
        found = co_await frontend::show_outline(std::move(request), gateway);
    else if (id == "frontend.targets")
        found = frontend::show_targets(request);
    else
        found = co_await frontend::check(std::move(request), gateway);
    auto out = answered(found.json, found.text);
    if (id == "frontend.lint") out.metadata["result.statuscode"] = cat(found.status);
    co_return out;
}

/// One run of the Dockerfile frontend for a client.
class dockerfile_run {
public:
    dockerfile_run(parts& p, ops::build_scope scope, std::shared_ptr<progress::sink> sink, frontend_question q, frontend_call& call)
        : p_(p),
          scope_(std::move(scope)),
          sink_(std::move(sink)),
          attrs_(std::move(q.attrs)),
          inputs_(std::move(q.inputs)),
          check_(std::move(q.check)),
          policies_(std::move(q.policies)),
          call_(call) {}

    async::task<frontend_result> run(std::optional<frontend_problem>* problem) {
        check_capabilities(get(attrs_, "frontend.caps"), problem);
        static constexpr std::string_view requests[] = {"", "frontend.outline", "frontend.targets", "frontend.lint", "frontend.subrequests.describe"};
        if (const auto id = get(attrs_, "requestid"); std::find(std::begin(requests), std::end(requests), id) == std::end(requests)) {
            *problem = {{}, {}, "Subrequest", id};
            throw error{errc::unsupported, cat("unsupported request ", id)};
        }
        auto asked = frontend::parse_attrs(attrs_);
        auto& build = asked.build;
        build.build_platform = oci::host_platform();
        build.any_platform = true;
        const auto how = build.resolve == gateway::resolve_mode::pull ? source::freshness::always : source::freshness::missing;
        convert_contexts(build.named_contexts, policies_);
        build_gateway gateway(p_, scope_, sink_, how, check_);
        gateway.local_sessions = build.local_sessions;
        gateway.note = &call_;
        set_context(build);
        co_return co_await convert(std::move(asked), gateway, problem);
    }

private:
    void set_context(frontend::request& build) const {
        // What is named by contextkey is the client's word for the context.
        const auto context = get(attrs_, build.context_name == "context" ? "context" : build.context_name);
        const auto keep = get(attrs_, "build-arg:BUILDKIT_CONTEXT_KEEP_GIT_DIR");
        if (!context.empty() && !frontend::set_remote_context(build, context, keep == "1" || keep == "true")) build.context_name = context;
        if (build.remote_context && !get(attrs_, "build-arg:SOURCE_DATE_EPOCH").empty() && build.context_archive.empty())
            build.remote_context->attrs["git.mtime"] = "commit";
        build.inputs = inputs_;
    }

    async::task<frontend_result> convert(frontend::attr_request asked, build_gateway& gateway, std::optional<frontend_problem>* problem) {
        const auto name = cat("[internal] load build definition from ", asked.build.dockerfile_name);
        auto request =
            co_await shown<frontend::request>(sink_, "load", name, [&](progress::writer) { return read_definition(asked.build, gateway); });
        if (!attrs_.contains("cmdline"))
            if (auto foreign = frontend::wanted_frontend(request)) {
                frontend_result elsewhere;
                elsewhere.foreign = std::move(foreign);
                co_return elsewhere;
            }
        if (const auto id = get(attrs_, "requestid"); !id.empty()) co_return co_await answer_request(id, std::move(request), gateway);
        const progress::writer about(sink_, {.id = progress::internal_id("load", name), .name = ""});
        auto platforms = asked.platforms;
        frontend_result out;
        out.map = request.multi_platform;
        if (platforms.empty()) platforms.emplace_back();
        std::vector<oci::platform> made;
        for (const auto& platform : platforms) {
            auto one = request;
            if (!asked.platforms.empty()) one.target_platform = platform;
            std::vector<frontend::warning> warnings;
            std::exception_ptr failed;
            frontend::result converted;
            try {
                converted = co_await frontend::convert(std::move(one), gateway, &warnings);
            } catch (...) {
                failed = std::current_exception();
            }
            // What is wrong for one platform is wrong for all.
            if (made.empty()) show_warnings(warnings, request.dockerfile, about);
            if (failed) throw as_told(request, describe(failed), problem);
            add(out, made, std::move(converted));
        }
        out.metadata["refs.platforms"] = platforms_json(made);
        co_return out;
    }

    static void add(frontend_result& out, std::vector<oci::platform>& made, frontend::result converted) {
        const auto platform = oci::normalize(converted.platform);
        const auto id = oci::format(platform);
        const auto suffix = out.map ? cat("/", id) : std::string();
        made.push_back(platform);
        out.metadata[cat("containerimage.config", suffix)] = converted.image_config;
        if (!converted.base_config.empty()) out.metadata[cat("containerimage.base.config", suffix)] = converted.base_config;
        if (converted.epoch) out.metadata[cat("source.date.epoch", suffix)] = cat(*converted.epoch);
        out.graphs[out.map ? id : std::string()] = std::move(converted.graph);
    }

    /// The error with the words and the place that clients look for.
    static error as_told(const frontend::request& request, error e, std::optional<frontend_problem>* problem) {
        auto told = frontend::told(request, e);
        if (!told.ranges.empty()) *problem = {frontend::source_of(request), std::move(told.ranges), {}, {}};
        return std::move(told.what);
    }

    /// From the client's directory, an input or a remote context, unless the client gives a directory for the Dockerfile alone.
    async::task<frontend::request> read_definition(frontend::request request, build_gateway& gateway) {
        const bool own_directory = attrs_.contains("dockerfilekey");
        if (request.remote_context && !own_directory) co_return co_await read_remote(std::move(request), get(attrs_, "context"));
        const auto input = inputs_.find(request.dockerfile_context);
        if (!request.remote_context && !own_directory && input != inputs_.end()) co_return co_await read_input(std::move(request), input->second);
        co_return co_await frontend::read_sources(std::move(request), gateway);
    }

    async::task<frontend::request> read_remote(frontend::request request, std::string context) {
        build_inputs in{.request = std::move(request), .scope = scope_, .keep = {}, .check = check_};
        const auto tree = co_await solve_context(p_, in, remote::redacted(context), sink_);
        co_await read_tree(tree, in.request);
        co_return std::move(in.request);
    }

    async::task<frontend::request> read_input(frontend::request request, llb::definition graph) {
        if (graph.ops.empty()) throw error{errc::invalid, "invalid nil input definition to definition op: the input with the Dockerfile is empty"};
        request.dockerfile_graph = std::make_shared<const llb::definition>(graph);
        const auto tree = co_await solve_tree(p_, std::move(graph), scope_, sink_);
        co_await read_tree(tree, request);
        co_return request;
    }

    async::task<void> read_tree(std::shared_ptr<snapshot::view> tree, frontend::request& request) {
        build_request r;
        if (attrs_.contains("filename")) r.dockerfile = request.dockerfile_name;
        co_await p_.runtime.pool().run([&] { read_remote_definition(r, fs::root(tree->mount().duplicate()), request); });
    }

    parts& p_;
    ops::build_scope scope_;
    std::shared_ptr<progress::sink> sink_;
    std::map<std::string, std::string> attrs_;
    std::map<std::string, llb::definition> inputs_;
    source_check check_;
    std::vector<policy::policy> policies_;
    frontend_call& call_;
};

}  // namespace

std::vector<cache_entry> named_caches(const std::map<std::string, std::string>& attrs) {
    std::vector<cache_entry> out;
    if (const auto list = get(attrs, "cache-imports"); !list.empty()) {
        const auto parsed = json::parse(list);
        for (const auto& one : parsed.as_array())
            out.push_back({json::string_at(one.as_object(), "Type"), json::string_map_at(one.as_object(), "Attrs")});
        return out;
    }
    const auto images = get(attrs, "cache-from");
    for (const auto image : split(images, ','))
        if (!image.empty()) out.push_back({"registry", {{"ref", std::string(image)}}});
    return out;
}

async::task<frontend_result> run_dockerfile(parts& p, ops::build_scope scope, std::shared_ptr<progress::sink> sink, frontend_question q,
                                            frontend_call& call, std::optional<frontend_problem>* problem) {
    dockerfile_run run(p, std::move(scope), std::move(sink), std::move(q), call);
    co_return co_await run.run(problem);
}

}  // namespace cobuild::build

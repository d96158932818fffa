module;
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>
#include <gsl/util>

module cobuild.build;

import cobuild.frontend;
import cobuild.fs;
import cobuild.json;
import cobuild.llb;
import cobuild.remote;
import cobuild.remotecache;
import :container;
import :parts;

namespace cobuild::build {

// Bodies in inputs.cpp.
async::task<std::shared_ptr<snapshot::view>> solve_context(parts& p, const build_inputs& in, std::string shown_name,
                                                           std::shared_ptr<progress::sink> sink);
void read_remote_definition(const build_request& r, const fs::root& tree, frontend::request& out);

namespace {

/// What a job and its refs share.
struct job_state {
    job_state(parts& engine, job_options o) : p(engine), options(std::move(o)) {
        if (!options.sink) options.sink = progress::null_sink();
        sink = std::make_shared<counting_sink>(options.sink);
        scope.session = options.client ? options.client : session::make_local(p.runtime.pool(), {});
        scope.id = p.directory->fresh_name();
        scope.sources = std::make_shared<ops::known_sources>();
        scope.commits = std::make_shared<ops::known_commits>();
        scope.found = std::make_shared<ops::found_sources>();
        scope.failures = std::make_shared<ops::failed_steps>();
        scope.layouts = options.layouts;
        scope.who = options.who;
    }
    parts& p;
    job_options options;
    std::shared_ptr<counting_sink> sink;
    ops::build_scope scope;
    std::shared_ptr<solver::shared_runs> runs = std::make_shared<solver::shared_runs>();
    std::optional<job::failure> failed;
    std::vector<remotecache::export_options> cache_to;
    std::vector<cache_entry> cache_from;
    async::single_flight<std::size_t, std::vector<std::shared_ptr<solver::remote_cache>>> importing;
    /// What the last frontend was asked, for provenance.
    std::string frontend;
    std::map<std::string, std::string> attrs;
    std::chrono::sys_time<nanoseconds> started = std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now());
};

/// What the client wants attested of a result. (BuildKit's daemon tells all where no mode is named.)
void attest(const job_state& s, const llb::definition& graph, exporter::input& in) {
    const auto wanted = exporter::parse_attests(exporter::attests_of(s.attrs), true);
    if (!wanted.provenance) return;
    in.attestations.push_back(exporter::make_provenance(*wanted.provenance, make_record(s.frontend, s.attrs, graph, *s.scope.found, s.started)));
}

/// Whose caches of type local are meant: a client's (one that lends nothing when it has no session), or this machine's (null).
std::shared_ptr<session::session> client_of_caches(const job_state& s) { return s.options.local_caches_of_client ? s.scope.session : nullptr; }

/// What the client's policies make of a source; `first` are those of one request.
source_check check_of(const std::shared_ptr<job_state>& s, std::vector<policy::policy> first) {
    first.insert(first.end(), s->options.policies.begin(), s->options.policies.end());
    if (first.empty() && !s->options.verify) return {};
    return [s, first](llb::source_op what, std::optional<llb::platform> platform) {
        return check_source(first, s->options.verify, std::move(what), std::move(platform));
    };
}

/// The caches named so far, each asked once.
async::task<std::vector<std::shared_ptr<solver::remote_cache>>> imported_caches(std::shared_ptr<job_state> s) {
    if (s->cache_from.empty()) co_return std::vector<std::shared_ptr<solver::remote_cache>>{};
    co_return co_await s->importing.run(s->cache_from.size(), [s] {
        return import_caches(s->p, parse_cache_from(s->cache_from), oci::host_platform(), s->sink, client_of_caches(*s));
    });
}

class job_ref final : public chain_ref, public std::enable_shared_from_this<job_ref> {
public:
    job_ref(std::shared_ptr<job_state> state, llb::definition what, source_check check)
        : chain_ref(state->p), state_(std::move(state)), what_(std::move(what)), check_(std::move(check)) {}

    [[nodiscard]] const llb::definition& definition() const noexcept override { return what_; }

    /// What an export of the cache is made of; filled by the solve when the job has one.
    cache_source cached;

    /// The chain, brought about once.
    async::task<std::shared_ptr<ops::chain_value>> value() override {
        if (!value_) value_ = co_await once_.run(0, [self = shared_from_this()] { return self->bring(); });
        co_return value_;
    }

private:
    async::task<std::shared_ptr<ops::chain_value>> bring() {
        auto& p = state_->p;
        if (check_) what_ = co_await check_sources(std::move(what_), check_);
        const auto loaded = llb::load(what_);
        check_entitlements(state_->options.allow, what_, loaded);
        auto scope = state_->scope;
        scope.renewed = std::make_shared<std::set<std::string>>();
        auto graph = ops::make_graph(loaded, *p.environment, std::move(scope));
        if (!graph.result) co_return std::make_shared<ops::chain_value>();
        auto sink = std::make_shared<counting_sink>(state_->sink);
        solver::solve_options options{.no_cache = false, .runs = state_->runs, .caches = co_await imported_caches(state_)};
        if (!state_->cache_to.empty()) options.report = cached.report = std::make_shared<std::vector<solver::solved>>();
        cached.graph = graph.vertices;
        cached.target = graph.result;
        std::exception_ptr failed;
        solver::result solved;
        try {
            solved = co_await solve(p, std::move(graph.vertices), *graph.result, what_, std::move(options), sink);
        } catch (...) {
            failed = std::current_exception();
        }
        if (failed) {
            if (auto place = place_of(what_, sink->failed())) {
                if (const auto left = state_->scope.failures->extract(place->vertex)) keep_left(left.mapped(), *place);
                state_->failed = std::move(place);
            }
            std::rethrow_exception(failed);
        }
        co_return co_await ops::as_chain_value(*p.environment, std::move(solved));
    }

    void keep_left(const ops::failed_step& from, job::failure& to) const {
        for (const auto& v : from.inputs) to.inputs.push_back(make_settled_ref(state_->p, v));
        for (const auto& v : from.mounts) to.mounts.push_back(make_settled_ref(state_->p, v));
        to.action = from.action;
        to.unread = from.unread;
    }

    std::shared_ptr<job_state> state_;
    llb::definition what_;
    source_check check_;
    std::shared_ptr<ops::chain_value> value_;
    async::single_flight<int, std::shared_ptr<ops::chain_value>> once_;
};

std::string get(const std::map<std::string, std::string>& m, const std::string& key) {
    const auto at = m.find(key);
    return at == m.end() ? std::string() : at->second;
}

class job_impl final : public job, public std::enable_shared_from_this<job_impl> {
public:
    job_impl(parts& p, job_options options) : state_(std::make_shared<job_state>(p, std::move(options))) {
        state_->cache_to = parse_cache_to(state_->options.cache_to);
        state_->attrs = state_->options.attrs;
    }

    std::shared_ptr<ref> define(llb::definition what, std::vector<policy::policy> policies) override {
        if (what.ops.empty()) return nullptr;
        return std::make_shared<job_ref>(state_, std::move(what), check_of(state_, std::move(policies)));
    }

    async::task<job_result> run_frontend(std::string name, std::map<std::string, std::string> attrs,
                                         std::map<std::string, llb::definition> inputs) override {
        const auto source = get(attrs, "source");
        if (name == "gateway.v0" && attrs.contains("gateway-devel"))
            throw error{errc::unsupported, "the development gateway is not supported, nor is it by BuildKit any longer"};
        if (name == "gateway.v0" && source.empty()) throw error{errc::invalid, "no source specified for gateway"};
        if (name == "gateway.v0" && source != "dockerfile.v0") {
            state_->frontend = name;
            state_->attrs = attrs;
            return run_foreign(state_->p, shared_from_this(), {source, std::move(attrs), std::move(inputs)}, std::nullopt);
        }
        if (name != "dockerfile.v0" && name != "gateway.v0")
            throw error{errc::unsupported, cat("there is no frontend ", quoted(name), "; dockerfile.v0 and gateway.v0 are known")};
        if (!state_->p.settings.frontend.dockerfile_enabled.value_or(true))
            throw error{errc::permission, "the frontend dockerfile.v0 is switched off by the configuration"};
        (void)exporter::parse_attests(exporter::attests_of(attrs), true);  // what cannot be attested is refused before anything runs
        state_->frontend = name;
        state_->attrs = attrs;
        if (!inputs.empty()) throw error{errc::unsupported, "inputs of the Dockerfile frontend are not supported yet"};
        return dockerfile(std::move(attrs));
    }

    [[nodiscard]] const std::string& id() const noexcept override { return state_->options.id; }

    void import_caches(std::vector<cache_entry> from) override {
        (void)parse_cache_from(from);  // a mistake in them is told at once
        for (auto& e : from) {
            const auto same = [&e](const cache_entry& known) { return known.type == e.type && known.attributes == e.attributes; };
            if (std::none_of(state_->cache_from.begin(), state_->cache_from.end(), same)) state_->cache_from.push_back(std::move(e));
        }
        state_->scope.hash_local = state_->scope.hash_local || !state_->cache_from.empty();
    }

    async::task<llb::source_op> check_source(llb::source_op what, std::optional<llb::platform> platform, std::vector<policy::policy> policies,
                                             bool verify) override {
        policies.insert(policies.end(), state_->options.policies.begin(), state_->options.policies.end());
        return build::check_source(std::move(policies), verify ? state_->options.verify : source_verifier{}, std::move(what), std::move(platform));
    }

    async::task<gateway::image_config> resolve_image(gateway::resolve_request request) override {
        const auto gateway = std::make_shared<build_gateway>(state_->p, state_->scope, state_->sink, freshness_of(request.mode));
        co_return co_await gateway->resolve_image_config(std::move(request));
    }

    async::task<source_facts> resolve_source(llb::source_op what, std::string name, bool with_objects) override {
        const auto state = state_;
        co_return co_await shown<source_facts>(
            state->sink, "resolve", name, [state, what, with_objects](progress::writer w) -> async::task<source_facts> {
                llb::op op;
                op.what = what;
                auto found =
                    co_await ops::look_at_source(std::move(op), *state->p.environment, state->scope, {.progress = w, .cancelled = {}}, with_objects);
                co_return source_facts{.checksum = std::move(found.checksum),
                                       .commit = std::move(found.commit),
                                       .ref = std::move(found.ref),
                                       .filename = std::move(found.filename),
                                       .commit_object = std::move(found.commit_object),
                                       .tag_object = std::move(found.tag_object),
                                       .modified = found.modified};
            });
    }

    async::task<build_result> finish(job_result what, std::vector<output> outputs) override {
        build_result out;
        std::vector<async::task<void>> all;
        for (const auto& [key, r] : what.refs)
            if (r) all.push_back(r->evaluate());
        co_await async::when_all(std::move(all));
        if (const auto wanted = exporter::parse_attests(exporter::attests_of(state_->attrs), true); wanted.sbom && !outputs.empty())
            co_await add_sboms(what, *wanted.sbom,
                               {.resolve = [this](gateway::resolve_request q) { return resolve_image(std::move(q)); },
                                .define = [this](llb::definition d) { return define(std::move(d), {}); }});
        built made;
        std::vector<state::pin> keep;
        std::vector<cache_source> caches;
        const auto platforms = platforms_of_result(what.metadata);
        apply_metadata(outputs, what.metadata);
        made.map = what.map;
        warn_of_platforms(what, platforms);
        std::vector<std::string> order;
        for (const auto& [id, platform] : platforms)
            if (what.refs.contains(id)) order.push_back(id);
        for (const auto& [key, r] : what.refs)
            if (std::find(order.begin(), order.end(), key) == order.end()) order.push_back(key);
        for (const auto& key : order) {
            const auto r = what.refs.at(key);
            auto in = input_of(what, key, platforms, outputs);
            // A frontend that gives one ref names its platform in attestations all the same.
            for (const auto& name : {key, key.empty() && platforms.size() == 1 ? platforms.front().first : key})
                if (const auto given = what.attestations.find(name); in.attestations.empty() && given != what.attestations.end())
                    in.attestations = co_await read_attestations(given->second);
            attest(*state_, r ? r->definition() : llb::definition{}, in);
            cache_source cached;
            if (const auto mine = std::dynamic_pointer_cast<chain_ref>(r)) {
                const auto value = co_await mine->value();
                in.root = value->chain;
                keep.push_back(value->keep);
            }
            if (const auto mine = std::dynamic_pointer_cast<job_ref>(r)) cached = mine->cached;
            cached.client = client_of_caches(*state_);
            cached.in = in;
            caches.push_back(std::move(cached));
            made.list.push_back({.platform = key.empty() ? oci::format(in.platform) : key, .in = std::move(in)});
        }
        for (auto& o : outputs)
            for (const auto* key : {"source-date-epoch", "containerimage.config"}) o.attributes.erase(key);
        made.who = state_->options.who;
        made.keep = false;  // as BuildKit's worker "oci": what is to last is pushed or sent to the client
        if (made.list.empty()) co_return out;
        const auto to = state_->cache_to;
        if (to.empty()) {
            co_await export_and_keep(state_->p, std::move(made), std::move(outputs), {}, state_->sink, out);
            co_return out;
        }
        if (caches.size() > 1)
            throw error{errc::unsupported, "exporting the cache of several platforms at once is not supported yet: build them one by one"};
        if (!caches.front().report) caches.front().report = std::make_shared<std::vector<solver::solved>>();  // an empty root: no step
        if (std::any_of(to.begin(), to.end(), [](const auto& c) { return c.kind == remotecache::kind::inline_; }))
            made.list.front().in.config = co_await with_inline_cache(state_->p, caches.front());
        co_await export_and_keep(state_->p, std::move(made), std::move(outputs), {}, state_->sink, out);
        co_await export_caches(state_->p, to, std::move(caches.front()), state_->sink, out);
        co_return out;
    }

    void warn(progress::warning what) override { state_->sink->on_event(std::move(what)); }
    [[nodiscard]] std::optional<failure> failed() const override { return state_->failed; }
    void forget_failure() override { state_->failed.reset(); }

    async::task<std::shared_ptr<container>> open_container(container_request what) override {
        const auto state = state_;
        llb::exec_op exec;
        exec.meta.args = {cat("container ", what.id)};
        exec.mounts = what.mounts;
        std::vector<std::shared_ptr<ops::chain_value>> inputs;
        for (std::size_t i = 0; i < exec.mounts.size(); ++i) {
            auto& m = exec.mounts[i];
            m.input = llb::scratch;
            m.output = llb::no_output;
            const auto from = i < what.refs.size() ? std::dynamic_pointer_cast<chain_ref>(what.refs[i]) : nullptr;
            if (!from) continue;
            m.input = static_cast<std::int64_t>(inputs.size());
            inputs.push_back(co_await from->value());
        }
        auto base = co_await ops::prepare_container({.inputs = {}, .what = std::move(exec), .platform = {}}, std::move(inputs), *state->p.environment,
                                                    state->scope);
        co_return make_container(state->p, state->scope, state->options.allow, std::move(what), std::move(base));
    }

private:
    /// What the exporters get of one ref but its root.
    exporter::input input_of(const job_result& what, const std::string& key, const result_platforms& platforms, const std::vector<output>& outputs) {
        exporter::input in;
        in.config = get(what.metadata, key.empty() ? "containerimage.config" : cat("containerimage.config/", key));
        if (in.config.empty() && what.refs.size() == 1) in.config = get(what.metadata, "containerimage.config");
        // What the client says of the image comes before what the frontend does.
        for (const auto& o : outputs)
            if (auto given = get(o.attributes, "containerimage.config"); !given.empty()) in.config = std::move(given);
        const auto known = std::find_if(platforms.begin(), platforms.end(), [&](const auto& p) { return p.first == key; });
        in.platform = known != platforms.end() ? known->second : platform_of_config(in.config);
        in.base_config = get(what.metadata, key.empty() ? "containerimage.base.config" : cat("containerimage.base.config/", key));
        // The build argument comes before what the frontend found.
        std::vector<std::string> epochs;
        for (const auto& o : outputs) epochs.push_back(get(o.attributes, "source-date-epoch"));
        epochs.push_back(get(what.metadata, key.empty() ? "source.date.epoch" : cat("source.date.epoch/", key)));
        for (const auto& epoch : epochs)
            if (!epoch.empty() && !in.epoch) in.epoch = std::strtoll(epoch.c_str(), nullptr, 10);
        return in;
    }

    /// A result that nobody built anything for has no platform to be wrong.
    void warn_of_platforms(const job_result& what, const result_platforms& platforms) {
        const bool empty = std::all_of(what.refs.begin(), what.refs.end(), [](const auto& r) { return !r.second; });
        if (platforms.empty() && empty) return;
        auto made = platforms;
        if (made.empty()) made.emplace_back("", platform_of_config(get(what.metadata, "containerimage.config")));
        if (auto text = platform_warning(get(state_->options.attrs, "platform"), what.map, made); !text.empty()) {
            progress::writer w(state_->sink, {.id = progress::internal_id("verify", state_->options.id), .name = "[internal] verify build result"});
            w.started();
            w.warn({.message = std::move(text)});
            w.completed();
        }
    }

    static source::freshness freshness_of(gateway::resolve_mode mode) {
        return mode == gateway::resolve_mode::pull ? source::freshness::always : source::freshness::missing;
    }

    async::task<job_result> dockerfile(std::map<std::string, std::string> attrs) {
        auto asked = frontend::parse_attrs(attrs);
        asked.build.build_platform = oci::host_platform();
        convert_contexts(asked.build.named_contexts, state_->options.policies);
        build_gateway gateway(state_->p, state_->scope, state_->sink, freshness_of(asked.build.resolve), check_of(state_, {}));
        const auto name = cat("[internal] load build definition from ", asked.build.dockerfile_name);
        const auto context = get(attrs, "context");
        const bool keep_git_dir =
            get(attrs, "build-arg:BUILDKIT_CONTEXT_KEEP_GIT_DIR") == "1" || get(attrs, "build-arg:BUILDKIT_CONTEXT_KEEP_GIT_DIR") == "true";
        if (!context.empty() && !frontend::set_remote_context(asked.build, context, keep_git_dir)) asked.build.context_name = context;
        auto request = co_await shown<frontend::request>(state_->sink, "load", name,
                                                         [&](progress::writer) { return read_definition(asked.build, attrs, gateway); });
        if (!attrs.contains("cmdline"))
            if (const auto foreign = frontend::wanted_frontend(request)) {
                attrs["cmdline"] = foreign->cmdline;
                attrs["source"] = foreign->image;
                co_return co_await run_foreign(state_->p, shared_from_this(), {foreign->image, std::move(attrs), {}}, foreign->where);
            }
        if (const auto id = get(attrs, "requestid"); !id.empty()) co_return co_await answer_request(id, std::move(request), gateway);
        auto platforms = asked.platforms;
        request.emulated = co_await emulated_for(state_->p, request, platforms);
        job_result out;
        out.map = request.multi_platform;
        if (platforms.empty()) platforms.emplace_back();
        std::vector<oci::platform> made;
        for (const auto& platform : platforms) {
            auto one = request;
            if (!asked.platforms.empty()) one.target_platform = platform;
            auto converted = co_await frontend::convert(std::move(one), gateway);
            // What is wrong for one platform is wrong for all.
            if (made.empty())
                show_warnings(converted.warnings, request.dockerfile,
                              progress::writer(state_->sink, {.id = progress::internal_id("load", name), .name = ""}));
            const auto id = oci::format(oci::normalize(converted.platform));
            const auto key = out.map ? id : std::string();
            const auto suffix = out.map ? cat("/", id) : std::string();
            made.push_back(oci::normalize(converted.platform));
            out.metadata[cat("containerimage.config", suffix)] = converted.image_config;
            if (!converted.base_config.empty()) out.metadata[cat("containerimage.base.config", suffix)] = converted.base_config;
            if (converted.epoch) out.metadata[cat("source.date.epoch", suffix)] = cat(*converted.epoch);
            out.refs[key] = define(std::move(converted.graph), {});
        }
        out.metadata["refs.platforms"] = platforms_json(made);
        co_return out;
    }

    /// From the client's directory, or a remote context unless the client gives a directory for the Dockerfile alone.
    async::task<frontend::request> read_definition(frontend::request request, std::map<std::string, std::string> attrs, build_gateway& gateway) {
        if (!request.remote_context || attrs.contains("dockerfilekey")) return frontend::read_sources(std::move(request), gateway);
        return read_remote(std::move(request), attrs.contains("filename"), get(attrs, "context"));
    }
    async::task<frontend::request> read_remote(frontend::request request, bool named, std::string context) {
        build_inputs in{.request = std::move(request), .scope = state_->scope, .keep = {}, .check = check_of(state_, {})};
        const auto tree = co_await solve_context(state_->p, in, remote::redacted(context), state_->sink);
        build_request r;
        if (named) r.dockerfile = in.request.dockerfile_name;
        co_await state_->p.runtime.pool().run([&] { read_remote_definition(r, fs::root(tree->mount().duplicate()), in.request); });
        co_return std::move(in.request);
    }

    async::task<job_result> answer_request(std::string id, frontend::request request, build_gateway& gateway) {
        job_result out;
        out.refs[""] = nullptr;
        if (id == "frontend.subrequests.describe") {
            out.metadata["result.json"] =
                R"([{"name":"frontend.outline","version":"1.0.0","type":"rpc","description":"List all parameters current build target supports"},)"
                R"({"name":"frontend.targets","version":"1.0.0","type":"rpc","description":"List all targets current build supports"},)"
                R"({"name":"frontend.lint","version":"1.0.0","type":"rpc","description":"Check a Dockerfile without building it"},)"
                R"({"name":"frontend.subrequests.describe","version":"1.0.0","type":"rpc","description":"List available subrequest types"}])";
            out.metadata["result.txt"] = "frontend.outline\nfrontend.targets\nfrontend.lint\nfrontend.subrequests.describe\n";
            out.metadata["version"] = "1.0.0";
            co_return out;
        }
        frontend::answer found;
        if (id == "frontend.outline")
            found = co_await frontend::show_outline(std::move(request), gateway);
        else if (id == "frontend.targets")
            found = frontend::show_targets(request);
        else if (id == "frontend.lint")
            found = co_await frontend::check(std::move(request), gateway);
        else
            throw error{errc::unsupported, cat("the request ", quoted(id), " is not supported")};
        out.metadata["result.json"] = found.json;
        out.metadata["result.txt"] = found.text;
        out.metadata["version"] = "1.0.0";
        if (id == "frontend.lint") out.metadata["result.statuscode"] = cat(found.status);
        co_return out;
    }

    std::shared_ptr<job_state> state_;
};

}  // namespace

std::shared_ptr<job> make_job(parts& p, job_options options) { return std::make_shared<job_impl>(p, std::move(options)); }

}  // namespace cobuild::build

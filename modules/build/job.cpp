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

import cobuild.fs;
import cobuild.json;
import cobuild.llb;
import cobuild.remotecache;
import :container;
import :parts;

namespace cobuild::build {

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
    /// The client, and below it the frontends it asked.
    std::shared_ptr<frontend_call> root = std::make_shared<frontend_call>();
    std::chrono::sys_time<nanoseconds> started = std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now());
};

/// What the client wants attested. (BuildKit's daemon tells all where no mode is named.)
exporter::attest_request attests(const job_state& s) { return exporter::parse_attests(exporter::attests_of(s.options.attrs), true); }

bool tells_layers(const job_state& s) {
    const auto wanted = attests(s).provenance;
    return wanted && wanted->max;
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
    job_ref(std::shared_ptr<job_state> state, llb::definition what, std::shared_ptr<frontend_call> by, source_check check)
        : chain_ref(state->p),
          state_(std::move(state)),
          call_(std::move(by)),
          noted_(std::make_shared<noted_graph>(noted_graph{std::move(what)})),
          check_(std::move(check)) {
        call_->graphs.push_back(noted_);
    }

    [[nodiscard]] const llb::definition& definition() const noexcept override { return noted_->graph; }
    /// Who asked for it, and what of it is told there.
    [[nodiscard]] const frontend_call& call() const noexcept { return *call_; }
    [[nodiscard]] const noted_graph* noted() const noexcept { return noted_.get(); }

    /// What an export of the cache is made of; filled by the solve when the job has one.
    cache_source cached;

    /// The chain, brought about once.
    async::task<std::shared_ptr<ops::chain_value>> value() override {
        if (!value_) value_ = co_await once_.run(0, [self = shared_from_this()] { return self->bring(); });
        noted_->brought = true;
        co_return value_;
    }

private:
    async::task<std::shared_ptr<ops::chain_value>> bring() {
        auto& p = state_->p;
        auto& graph_told = noted_->graph;
        if (check_) graph_told = co_await check_sources(std::move(graph_told), check_);
        const auto loaded = llb::load(graph_told);
        check_entitlements(state_->options.allow, graph_told, loaded);
        auto scope = state_->scope;
        scope.renewed = std::make_shared<std::set<std::string>>();
        auto graph = ops::make_graph(loaded, *p.environment, std::move(scope));
        if (!graph.result) co_return std::make_shared<ops::chain_value>();
        auto sink = std::make_shared<counting_sink>(state_->sink);
        solver::solve_options options{.no_cache = false, .runs = state_->runs, .caches = co_await imported_caches(state_)};
        if (!state_->cache_to.empty() || tells_layers(*state_)) options.report = cached.report = std::make_shared<std::vector<solver::solved>>();
        cached.graph = graph.vertices;
        cached.target = graph.result;
        std::exception_ptr failed;
        solver::result solved;
        try {
            solved = co_await solve(p, std::move(graph.vertices), *graph.result, graph_told, std::move(options), sink);
        } catch (...) {
            failed = std::current_exception();
        }
        if (failed) {
            if (auto place = place_of(graph_told, sink->failed())) {
                if (const auto left = state_->scope.failures->extract(*place->vertex)) keep_left(left.mapped(), *place);
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
    std::shared_ptr<frontend_call> call_;
    std::shared_ptr<noted_graph> noted_;
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
        (void)attests(*state_);  // what cannot be attested is refused before anything runs
        state_->root->asked = std::make_shared<exporter::asked_request>();
    }

    std::shared_ptr<ref> define(llb::definition what, std::vector<policy::policy> policies) override {
        return make_ref(std::move(what), state_->root, std::move(policies));
    }

    async::task<job_result> run_frontend(std::string name, std::map<std::string, std::string> attrs,
                                         std::map<std::string, llb::definition> inputs) override {
        const auto source = get(attrs, "source");
        if (name == "gateway.v0" && attrs.contains("gateway-devel"))
            throw error{errc::unsupported, "the development gateway is not supported, nor is it by BuildKit any longer"};
        if (name == "gateway.v0" && source.empty()) throw error{errc::invalid, "no source specified for gateway"};
        if (name == "gateway.v0" && source != "dockerfile.v0") {
            note_call(name, attrs, inputs);
            return run_foreign(state_->p, shared_from_this(), {source, std::move(attrs), std::move(inputs)}, std::nullopt);
        }
        if (name != "dockerfile.v0" && name != "gateway.v0")
            throw error{errc::unsupported, cat("there is no frontend ", quoted(name), "; dockerfile.v0 and gateway.v0 are known")};
        if (!state_->p.settings.frontend.dockerfile_enabled.value_or(true))
            throw error{errc::permission, "the frontend dockerfile.v0 is switched off by the configuration"};
        return dockerfile(std::move(name), std::move(attrs), std::move(inputs));
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

    async::task<source_facts> resolve_source(llb::source_op what, std::string name, bool objects) override {
        const auto state = state_;
        co_return co_await shown<source_facts>(state->sink, "resolve", name, [state, what, objects](progress::writer w) -> async::task<source_facts> {
            llb::op op;
            op.what = what;
            auto found = co_await ops::look_at_source(std::move(op), *state->p.environment, state->scope, {.progress = w, .cancelled = {}}, objects);
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
        const auto self = shared_from_this();
        build_result out;
        std::vector<async::task<void>> all;
        for (const auto& [key, r] : what.refs)
            if (r) all.push_back(r->evaluate());
        co_await async::when_all(std::move(all));
        if (const auto wanted = attests(*state_); wanted.sbom && !outputs.empty())
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
            cache_source cached;
            const auto mine = std::dynamic_pointer_cast<job_ref>(r);
            if (const auto any = std::dynamic_pointer_cast<chain_ref>(r)) {
                const auto value = co_await any->value();
                in.root = value->chain;
                keep.push_back(value->keep);
            }
            if (mine) cached = mine->cached;
            cached.client = client_of_caches(*state_);
            co_await attest(what, key, mine.get(), in, out);
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
    std::shared_ptr<ref> make_ref(llb::definition what, std::shared_ptr<frontend_call> by, std::vector<policy::policy> policies) {
        if (what.ops.empty()) return nullptr;
        return std::make_shared<job_ref>(state_, std::move(what), std::move(by), check_of(state_, std::move(policies)));
    }

    /// The exporter's word, even an empty one, comes before what the frontend found.
    static std::optional<std::int64_t> epoch_of(const std::vector<output>& outputs, std::string found) {
        for (const auto& o : outputs) {
            const auto at = o.attributes.find("source-date-epoch");
            if (at == o.attributes.end()) continue;
            found = at->second;
            break;
        }
        return found.empty() ? std::nullopt : std::optional<std::int64_t>(std::strtoll(found.c_str(), nullptr, 10));
    }

    /// What is told of a result, for its consumers and for the record of the build.
    async::task<void> attest(const job_result& all, std::string key, job_ref* mine, exporter::input& in, build_result& out) {
        const auto wanted = attests(*state_).provenance;
        if (!wanted && !state_->options.recorded) co_return;
        std::set<const noted_graph*> results;
        for (const auto& [unused, r] : all.refs)
            if (const auto one = std::dynamic_pointer_cast<job_ref>(r)) results.insert(one->noted());
        const auto& call = mine != nullptr ? mine->call() : last_call();
        std::vector<const llb::definition*> also;
        std::set<std::string> locals;
        add_call(call, results, also, locals);
        auto record = make_record(*call.asked, mine != nullptr ? mine->definition() : llb::definition{}, also, *state_->scope.found, state_->started,
                                  state_->p.settings);
        locals.insert(record.locals.begin(), record.locals.end());
        record.locals.assign(locals.begin(), locals.end());
        record.complete = record.complete && locals.empty();
        if (mine != nullptr && mine->cached.report)
            record.layers = co_await layers_of(*mine->cached.report, record, in.root, state_->cache_from.empty());
        if (state_->options.recorded) out.provenance[key] = exporter::make_provenance({.max = true}, record).predicate;
        if (wanted) in.attestations.push_back(exporter::make_provenance(*wanted, record));
    }

    /// An empty result has no graph; the frontend asked last, if any, made it.
    const frontend_call& last_call() const { return state_->root->calls.empty() ? *state_->root : *state_->root->calls.back(); }

    /// Notes a request to a frontend, for who wants to know later what made the result.
    std::shared_ptr<frontend_call> note_call(std::string name, std::map<std::string, std::string> attrs,
                                             const std::map<std::string, llb::definition>& inputs) {
        const auto& o = state_->options;
        // A frontend that the client asks for during its own build: who looks at the result learns of both requests.
        std::shared_ptr<const exporter::asked_request> client;
        if (o.frontend.empty() && (!o.attrs.empty() || !o.inputs.empty()))
            client = note_request("", client_attrs(o.attrs), o.inputs, state_->p.made_by, {});
        if (client && client->attrs.empty() && client->inputs.empty()) client.reset();
        auto call = std::make_shared<frontend_call>();
        call->asked = note_request(std::move(name), std::move(attrs), inputs, state_->p.made_by, client);
        state_->root->calls.push_back(call);
        return call;
    }

    async::task<job_result> dockerfile(std::string name, std::map<std::string, std::string> attrs, std::map<std::string, llb::definition> inputs) {
        const auto self = shared_from_this();
        if (auto caches = named_caches(attrs); !caches.empty()) import_caches(std::move(caches));
        // gateway.v0 only leads to this one.
        auto told = attrs;
        if (name == "gateway.v0")
            for (const auto* key : {"source", "cmdline"}) told.erase(key);
        const auto call = note_call("dockerfile.v0", std::move(told), inputs);
        std::optional<frontend_problem> problem;
        std::exception_ptr failed;
        frontend_result found;
        try {
            found = co_await run_dockerfile(state_->p, state_->scope, state_->sink, {attrs, inputs, check_of(state_, {}), state_->options.policies},
                                            *call, &problem);
        } catch (...) {
            failed = std::current_exception();
        }
        if (failed) {
            if (problem) {
                state_->failed = failure{.vertex = {},
                                         .op = {},
                                         .description = {},
                                         .sources = {},
                                         .unknown_kind = problem->unknown_kind,
                                         .unknown_name = problem->unknown_name};
                if (!problem->ranges.empty()) state_->failed->sources = {{problem->file, problem->ranges}};
            }
            std::rethrow_exception(failed);
        }
        if (found.foreign) {
            attrs["cmdline"] = found.foreign->cmdline;
            attrs["source"] = found.foreign->image;
            co_return co_await run_foreign(state_->p, shared_from_this(), {found.foreign->image, std::move(attrs), std::move(inputs)},
                                           found.foreign->where);
        }
        job_result out;
        out.map = found.map;
        out.metadata = std::move(found.metadata);
        for (auto& [key, graph] : found.graphs) {
            state_->p.made_by.add(graph, call->asked);
            out.refs[key] = make_ref(std::move(graph), call, {});
        }
        co_return out;
    }

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
        in.epoch = epoch_of(outputs, get(what.metadata, key.empty() ? "source.date.epoch" : cat("source.date.epoch/", key)));
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

    std::shared_ptr<job_state> state_;
};

}  // namespace

std::shared_ptr<job> make_job(parts& p, job_options options) { return std::make_shared<job_impl>(p, std::move(options)); }

}  // namespace cobuild::build

module;
#include <sys/stat.h>

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
import :parts;

namespace cobuild::build {

namespace {

constexpr std::uint64_t max_file = std::uint64_t{16} << 20;

/// What a job and its refs share.
struct job_state {
    job_state(parts& engine, job_options o) : p(engine), options(std::move(o)) {
        if (!options.sink) options.sink = progress::null_sink();
        sink = std::make_shared<counting_sink>(options.sink);
        scope.session = options.client ? options.client : session::make_local(p.runtime.pool(), {});
        scope.id = p.directory->fresh_name();
        scope.sources = std::make_shared<ops::known_sources>();
        scope.found = std::make_shared<ops::found_sources>();
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

/// The caches named so far, each asked once.
async::task<std::vector<std::shared_ptr<solver::remote_cache>>> imported_caches(std::shared_ptr<job_state> s) {
    if (s->cache_from.empty()) co_return std::vector<std::shared_ptr<solver::remote_cache>>{};
    co_return co_await s->importing.run(s->cache_from.size(),
                                        [s] { return import_caches(s->p, parse_cache_from(s->cache_from), oci::host_platform(), s->sink); });
}

/// The place of the vertex that failed, for who shows its source.
std::optional<job::failure> place_of(const llb::definition& graph, const std::optional<digest>& vertex) {
    if (!vertex) return std::nullopt;
    job::failure out{.vertex = *vertex};
    for (const auto& op : graph.ops)
        if (digest::of(op) == *vertex) out.op = op;
    if (const auto meta = graph.metadata.find(*vertex); meta != graph.metadata.end()) out.description = meta->second.description;
    if (!graph.source) return out;
    const auto at = graph.source->locations.find(*vertex);
    if (at == graph.source->locations.end()) return out;
    for (const auto& l : at->second.list)
        if (const auto index = static_cast<std::size_t>(l.source_index); index < graph.source->infos.size())
            out.sources.push_back({graph.source->infos[index], l.ranges});
    return out;
}

class job_ref final : public ref, public std::enable_shared_from_this<job_ref> {
public:
    job_ref(std::shared_ptr<job_state> state, llb::definition what, std::shared_ptr<frontend_call> by)
        : state_(std::move(state)), call_(std::move(by)), noted_(std::make_shared<noted_graph>(noted_graph{std::move(what)})), what_(noted_->graph) {
        call_->graphs.push_back(noted_);
    }

    [[nodiscard]] const llb::definition& definition() const noexcept override { return what_; }
    /// Who asked for it, and what of it is told there.
    [[nodiscard]] const frontend_call& call() const noexcept { return *call_; }
    [[nodiscard]] const noted_graph* noted() const noexcept { return noted_.get(); }
    async::task<void> evaluate() override { (void)co_await value(); }

    /// What an export of the cache is made of; filled by the solve when the job has one.
    cache_source cached;

    /// The chain, brought about once.
    async::task<std::shared_ptr<ops::chain_value>> value() {
        if (!value_) value_ = co_await once_.run(0, [self = shared_from_this()] { return self->bring(); });
        noted_->brought = true;
        co_return value_;
    }

    async::task<std::string> read_file(std::string path, std::uint64_t offset, std::uint64_t length) override {
        const auto tree = co_await view();
        co_return co_await state_->p.runtime.pool().run([&] {
            const fs::root root(tree->mount().duplicate());
            const auto info = root.stat(path, fs::links::follow);
            if (!info) throw error{errc::not_found, cat(path, ": there is no such file in the result")};
            if (!info->is_file()) throw error{errc::invalid, cat(path, " is no regular file")};
            auto all = root.read_file(root.resolve(path), max_file);
            if (offset >= all.size()) return std::string();
            return all.substr(offset, length == 0 ? std::string::npos : length);
        });
    }

    async::task<std::vector<file_entry>> read_directory(std::string path, std::string include) override {
        const auto tree = co_await view();
        co_return co_await state_->p.runtime.pool().run([&] {
            const fs::root root(tree->mount().duplicate());
            const auto at = root.resolve(path);
            const auto dir = root.stat(at);
            if (!dir) throw error{errc::not_found, cat(path, ": there is no such directory in the result")};
            if (!dir->is_dir()) throw error{errc::invalid, cat(path, " is no directory")};
            const auto wanted = include.empty() ? fs::ignore_patterns{} : fs::ignore_patterns(std::vector<std::string>{include});
            std::vector<file_entry> out;
            for (const auto& name : root.list(at)) {
                if (!include.empty() && !wanted.matches(name)) continue;
                out.push_back(entry(root, at.empty() ? name : cat(at, "/", name), name));
            }
            return out;
        });
    }

    async::task<file_entry> stat(std::string path) override {
        const auto tree = co_await view();
        co_return co_await state_->p.runtime.pool().run([&] {
            const fs::root root(tree->mount().duplicate());
            const auto at = root.resolve(path, fs::links::keep);
            if (!root.stat(at)) throw error{errc::not_found, cat(path, ": there is no such file in the result")};
            return entry(root, at, at.substr(at.rfind('/') + 1));
        });
    }

private:
    static file_entry entry(const fs::root& root, const std::string& path, std::string name) {
        file_entry out{.name = std::move(name), .info = root.stat(path).value()};
        if (out.info.is_link()) out.link = root.read_link(path);
        return out;
    }

    async::task<std::shared_ptr<snapshot::view>> view() {
        const auto chain = co_await value();
        if (!view_) view_ = std::make_shared<snapshot::view>(co_await state_->p.snapshots->view(chain->chain));
        co_return view_;
    }

    async::task<std::shared_ptr<ops::chain_value>> bring() {
        auto& p = state_->p;
        const auto loaded = llb::load(what_);
        check_entitlements(state_->options.allow, what_, loaded);
        auto graph = ops::make_graph(loaded, *p.environment, state_->scope);
        if (!graph.result) co_return std::make_shared<ops::chain_value>();
        auto sink = std::make_shared<counting_sink>(state_->sink);
        solver::solve_options options{.no_cache = false, .runs = state_->runs, .caches = co_await imported_caches(state_)};
        if (!state_->cache_to.empty() || tells_layers(*state_)) options.report = cached.report = std::make_shared<std::vector<solver::solved>>();
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
            if (auto place = place_of(what_, sink->failed())) state_->failed = std::move(place);
            std::rethrow_exception(failed);
        }
        co_return co_await ops::as_chain_value(*p.environment, std::move(solved));
    }

    std::shared_ptr<job_state> state_;
    std::shared_ptr<frontend_call> call_;
    std::shared_ptr<noted_graph> noted_;
    const llb::definition& what_;
    std::shared_ptr<ops::chain_value> value_;
    std::shared_ptr<snapshot::view> view_;
    async::single_flight<int, std::shared_ptr<ops::chain_value>> once_;
};

std::string get(const std::map<std::string, std::string>& m, const std::string& key) {
    const auto at = m.find(key);
    return at == m.end() ? std::string() : at->second;
}

/// In the frontend's order, which is the exporters'.
std::vector<std::pair<std::string, oci::platform>> parse_platforms(const std::string& text) {
    std::vector<std::pair<std::string, oci::platform>> out;
    if (text.empty()) return out;
    const auto parsed = json::parse(text);
    const auto* list = parsed.find("Platforms");
    if (list == nullptr) return out;
    for (const auto& one : list->as_array()) {
        const auto* id = one.find("ID");
        const auto* platform = one.find("Platform");
        if (id == nullptr || platform == nullptr) throw error{errc::invalid, "refs.platforms of the result has an entry without ID or Platform"};
        out.emplace_back(id->as_string(), oci::normalize(oci::platform_of(*platform)));
    }
    return out;
}

class job_impl final : public job {
public:
    job_impl(parts& p, job_options options) : state_(std::make_shared<job_state>(p, std::move(options))) {
        state_->cache_to = parse_cache_to(state_->options.cache_to);
        (void)attests(*state_);  // what cannot be attested is refused before anything runs
        state_->root->asked = std::make_shared<exporter::asked_request>();
    }

    std::shared_ptr<ref> define(llb::definition what) override { return make_ref(std::move(what), state_->root); }

    async::task<job_result> run_frontend(std::string name, std::map<std::string, std::string> attrs,
                                         std::map<std::string, llb::definition> inputs) override {
        const auto source = get(attrs, "source");
        const bool ours = name == "dockerfile.v0" || (name == "gateway.v0" && source == "dockerfile.v0");
        if (!ours)
            throw error{errc::unsupported, name == "gateway.v0"
                                               ? cat("the frontend image ", quoted(source), " is not supported yet; dockerfile.v0 is")
                                               : cat("there is no frontend ", quoted(name), "; dockerfile.v0 is known")};
        return dockerfile(std::move(name), std::move(attrs), std::move(inputs));
    }

    void import_caches(std::vector<cache_entry> from) override {
        (void)parse_cache_from(from);  // a mistake in them is told at once
        for (auto& e : from) {
            const auto same = [&e](const cache_entry& known) { return known.type == e.type && known.attributes == e.attributes; };
            if (std::none_of(state_->cache_from.begin(), state_->cache_from.end(), same)) state_->cache_from.push_back(std::move(e));
        }
        state_->scope.hash_local = state_->scope.hash_local || !state_->cache_from.empty();
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
            co_return source_facts{std::move(found.checksum), std::move(found.ref), std::move(found.filename), found.modified,
                                   std::move(found.commit_object)};
        });
    }

    async::task<build_result> finish(job_result what, std::vector<output> outputs) override {
        build_result out;
        std::vector<async::task<void>> all;
        for (const auto& [key, r] : what.refs)
            if (r) all.push_back(r->evaluate());
        co_await async::when_all(std::move(all));
        built made;
        std::vector<state::pin> keep;
        std::vector<cache_source> caches;
        const auto platforms = parse_platforms(get(what.metadata, "refs.platforms"));
        made.map = what.map;
        std::vector<std::string> order;
        for (const auto& [id, platform] : platforms)
            if (what.refs.contains(id)) order.push_back(id);
        for (const auto& [key, r] : what.refs)
            if (std::find(order.begin(), order.end(), key) == order.end()) order.push_back(key);
        for (const auto& key : order) {
            const auto r = what.refs.at(key);
            exporter::input in;
            in.config = get(what.metadata, key.empty() ? "containerimage.config" : cat("containerimage.config/", key));
            if (in.config.empty() && what.refs.size() == 1) in.config = get(what.metadata, "containerimage.config");
            const auto known = std::find_if(platforms.begin(), platforms.end(), [&](const auto& p) { return p.first == key; });
            in.platform = known != platforms.end() ? known->second
                          : in.config.empty()      ? oci::host_platform()
                                                   : oci::normalize(oci::parse_image(in.config).platform);
            if (in.platform.os.empty()) in.platform = oci::host_platform();
            in.base_config = get(what.metadata, key.empty() ? "containerimage.base.config" : cat("containerimage.base.config/", key));
            cache_source cached;
            const auto mine = std::dynamic_pointer_cast<job_ref>(r);
            if (mine) {
                const auto value = co_await mine->value();
                in.root = value->chain;
                keep.push_back(value->keep);
                cached = mine->cached;
            }
            co_await attest(what, key, mine.get(), in, out);
            in.epoch = epoch_of(outputs, get(what.metadata, key.empty() ? "source.date.epoch" : cat("source.date.epoch/", key)));
            cached.in = in;
            caches.push_back(std::move(cached));
            made.list.push_back({.platform = key.empty() ? oci::format(in.platform) : key, .in = std::move(in)});
        }
        for (auto& o : outputs) o.attributes.erase("source-date-epoch");
        made.who = state_->options.who;
        if (made.list.empty()) co_return out;
        const auto to = state_->cache_to;
        if (to.empty()) {
            co_await export_and_keep(state_->p, std::move(made), std::move(outputs), {}, state_->sink, out);
            co_return out;
        }
        if (caches.size() > 1)
            throw error{errc::unsupported, "exporting the cache of several platforms at once is not supported yet: build them one by one"};
        if (!caches.front().report) throw error{errc::internal, "the build kept no record of its steps for the cache"};
        if (std::any_of(to.begin(), to.end(), [](const auto& c) { return c.kind == remotecache::kind::inline_; }))
            made.list.front().in.config = co_await with_inline_cache(state_->p, caches.front());
        co_await export_and_keep(state_->p, std::move(made), std::move(outputs), {}, state_->sink, out);
        co_await export_caches(state_->p, to, std::move(caches.front()), state_->sink, out);
        co_return out;
    }

    void warn(progress::warning what) override { state_->sink->on_event(std::move(what)); }
    [[nodiscard]] std::optional<failure> failed() const override { return state_->failed; }

private:
    std::shared_ptr<ref> make_ref(llb::definition what, std::shared_ptr<frontend_call> by) {
        if (what.ops.empty()) return nullptr;
        return std::make_shared<job_ref>(state_, std::move(what), std::move(by));
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

    async::task<job_result> dockerfile(std::string name, std::map<std::string, std::string> attrs, std::map<std::string, llb::definition> inputs) {
        const auto& o = state_->options;
        // A frontend that the client asks for during its own build: who looks at the result learns of both requests.
        std::shared_ptr<const exporter::asked_request> client;
        if (o.frontend.empty() && (!o.attrs.empty() || !o.inputs.empty()))
            client = note_request("", client_attrs(o.attrs), o.inputs, state_->p.made_by, {});
        if (client && client->attrs.empty() && client->inputs.empty()) client.reset();
        if (auto caches = named_caches(attrs); !caches.empty()) import_caches(std::move(caches));
        auto call = std::make_shared<frontend_call>();
        // gateway.v0 only leads to this one.
        auto told = attrs;
        if (name == "gateway.v0")
            for (const auto* key : {"source", "cmdline"}) told.erase(key);
        call->asked = note_request("dockerfile.v0", std::move(told), inputs, state_->p.made_by, client);
        state_->root->calls.push_back(call);
        std::optional<frontend_problem> problem;
        std::exception_ptr failed;
        frontend_result found;
        try {
            found = co_await run_dockerfile(state_->p, state_->scope, state_->sink, {std::move(attrs), std::move(inputs)}, *call, &problem);
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
        job_result out{.refs = {}, .map = found.map, .metadata = std::move(found.metadata)};
        for (auto& [key, graph] : found.graphs) {
            state_->p.made_by.add(graph, call->asked);
            out.refs[key] = make_ref(std::move(graph), call);
        }
        co_return out;
    }

    static source::freshness freshness_of(gateway::resolve_mode mode) {
        return mode == gateway::resolve_mode::pull ? source::freshness::always : source::freshness::missing;
    }

    std::shared_ptr<job_state> state_;
};

}  // namespace

std::shared_ptr<job> make_job(parts& p, job_options options) { return std::make_shared<job_impl>(p, std::move(options)); }

}  // namespace cobuild::build

/// Internal to cobuild.build: the engine's parts, and what its bodies share.
module;
#include <chrono>
#include <cstdint>
#include <exception>
#include <filesystem>
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

module cobuild.build:parts;

import cobuild.base;
import cobuild.async;
import cobuild.cache;
import cobuild.cni;
import cobuild.config;
import cobuild.content;
import cobuild.executor;
import cobuild.exporter;
import cobuild.frontend;
import cobuild.gateway;
import cobuild.llb;
import cobuild.oci;
import cobuild.ops;
import cobuild.policy;
import cobuild.process;
import cobuild.progress;
import cobuild.registry;
import cobuild.remotecache;
import cobuild.session;
import cobuild.snapshot;
import cobuild.solver;
import cobuild.source;
import cobuild.state;
import :types;
import :calls;
import :job;

namespace cobuild::build {

/// Notes deeds in the state directory's ledger under one kind, by text, as cni and executor want it.
class ledger_of_kind final : public cni::ledger, public executor::ledger {
public:
    ledger_of_kind(state::directory& directory, std::string kind) : directory_(directory), kind_(std::move(kind)) {}
    async::task<void> record(std::string text) override;
    async::task<void> forget(std::string text) override;

private:
    state::directory& directory_;
    std::string kind_;
    std::multimap<std::string, state::ledger_entry> entries_;
};

/// Everything an engine owns, in the order it is made. Members made on demand are empty until then.
struct parts {
    config::configuration settings;
    std::string docker_config;
    async::runtime runtime;
    std::shared_ptr<state::directory> directory;
    std::unique_ptr<content::store> content;
    std::shared_ptr<snapshot::store> snapshots;
    std::unique_ptr<process::spawner> programs;
    std::unique_ptr<registry::client> registry;
    std::unique_ptr<source::images> images;
    std::unique_ptr<source::http_files> http;
    std::unique_ptr<source::git_repositories> git;
    std::shared_ptr<cache::index> cache;
    std::unique_ptr<solver::solver> solver;
    std::unique_ptr<ledger_of_kind> cni_ledger, cgroup_ledger;
    std::unique_ptr<executor::runner> runner;
    std::map<ops::network_kind, std::unique_ptr<cni::provider>> networks;
    async::single_flight<int, int> opening_network;
    std::unique_ptr<ops::environment> environment;
    frontend_runner frontends;  ///< who runs those that are images; none: refused
    origins made_by;

    explicit parts(config::configuration c) : settings(std::move(c)) {}
    async::task<void> open(std::string root);
    async::task<void> close();
    executor::runner& get_runner();
    async::task<cni::provider*> get_network(ops::network_kind kind);
    exporter::stores stores();
};

/// The definition with every source checked, several at a time; unchanged where nothing is to be changed.
async::task<llb::definition> check_sources(llb::definition what, source_check check);
/// Named contexts whose image the policies put something else in place of: that something, as a context.
void convert_contexts(std::map<std::string, std::string>& named, const std::vector<policy::policy>& policies);
/// The policies one after the other, then the verifier.
async::task<llb::source_op> check_source(std::vector<policy::policy> policies, source_verifier verify, llb::source_op what,
                                         std::optional<llb::platform> platform);

/// What the frontend asks of the engine during one build.
class build_gateway final : public gateway::frontend_gateway {
public:
    build_gateway(parts& p, const ops::build_scope& scope, std::shared_ptr<progress::sink> sink, source::freshness how, source_check check = {})
        : parts_(p),
          session_(scope.session),
          layouts_(scope.layouts),
          who_(scope.who),
          sink_(std::move(sink)),
          how_(how),
          check_(std::move(check)),
          scope_(scope) {}
    async::task<gateway::image_config> resolve_image_config(gateway::resolve_request request) override;
    async::task<std::optional<std::string>> read_context_file(std::string context, std::string path) override;
    async::task<std::optional<std::int64_t>> source_time(llb::source_op source, std::string log_name) override;

    std::map<std::string, std::string> local_sessions;  ///< whose a directory is, where it is not the build's own session's
    frontend_call* note = nullptr;                      ///< outlives this, when given

private:
    async::task<source::resolved_image> resolve(gateway::resolve_request& request, progress::writer shown);
    async::task<std::string> checked(std::string reference, oci::platform platform);
    async::task<source::resolved_image> lent_image(std::string store, digest wanted, oci::platform platform, progress::writer shown);
    parts& parts_;
    std::shared_ptr<session::session> session_;
    std::map<std::string, std::filesystem::path> layouts_;
    std::shared_ptr<const registry::login> who_;
    std::shared_ptr<progress::sink> sink_;
    source::freshness how_;
    source_check check_;
    ops::build_scope scope_;
    std::map<std::string, digest> known_;  ///< what tags mean: asked once, however many platforms are built
};

/// Shows one part of the build that is no vertex of the graph, and passes its failure on.
template<class T>
async::task<T> shown(std::shared_ptr<progress::sink> sink, std::string scope, std::string name,
                     std::function<async::task<T>(progress::writer)> work) {
    progress::writer w(std::move(sink), {.id = progress::internal_id(scope, name), .name = name});
    w.started();
    std::exception_ptr failed;
    std::optional<T> out;
    try {
        out.emplace(co_await work(w));
    } catch (...) {
        failed = std::current_exception();
    }
    if (failed) {
        w.failed(describe(failed));
        std::rethrow_exception(failed);
    }
    w.completed();
    co_return std::move(*out);
}

/// Where the context and the named contexts of a build are, as frontend, session and ops want to know it.
struct build_inputs {
    frontend::request request;  ///< contexts and Dockerfile only; an ignore file where there is one
    ops::build_scope scope;
    std::shared_ptr<void> keep;  ///< an archive that was received
    source_check check{};        ///< asked about every source
};

/// What a build came to: one root, or (a map) one for each platform.
struct built {
    struct one {
        std::string platform;  ///< its key in a map: "linux/amd64"
        exporter::input in;
    };
    std::vector<one> list;
    bool map = false;
    std::shared_ptr<const registry::login> who{};  ///< who pushes; none: the engine's own logins
    bool keep = true;                              ///< images are kept under their names
};
/// refs.platforms of a result: keys and platforms, in the frontend's order, which is the exporters'; empty when there is none.
/// Throws errc::invalid for entries that say nothing.
using result_platforms = std::vector<std::pair<std::string, oci::platform>>;
std::string platforms_json(const std::vector<oci::platform>& platforms);
result_platforms platforms_of_result(const std::map<std::string, std::string>& metadata);
/// Of an image config, this machine's when it has none or names none. Throws errc::invalid for half a platform.
oci::platform platform_of_config(const std::string& config);
/// What is to be said when the platforms of a result are not those that were asked for ("linux/amd64,linux/arm64"; empty:
/// this machine's); empty when they are.
std::string platform_warning(const std::string& asked, bool map, const result_platforms& made);
/// The tags of a request with their registry and tag spelled out.
std::vector<std::string> normalized_names(const std::vector<std::string>& names);
/// Runs the exporters one after the other; `result` gets their keys.
async::task<void> export_all(parts& p, built what, std::vector<output> outputs, std::vector<std::string> names, std::shared_ptr<progress::sink> sink,
                             build_result& result);

/// export_all() while what was built is made durable; then the garbage is collected.
async::task<void> export_and_keep(parts& p, built what, std::vector<output> outputs, std::vector<std::string> names,
                                  std::shared_ptr<progress::sink> sink, build_result& result);

/// Passes events on and counts what the result tells: steps of the graph and those that came from cache.
class counting_sink final : public progress::sink {
public:
    explicit counting_sink(std::shared_ptr<progress::sink> next) : next_(std::move(next)) {}
    void on_event(const progress::event& e) override;
    /// The first vertex that failed.
    [[nodiscard]] const std::optional<digest>& failed() const { return failed_; }
    void fill(build_result& result, const solver::graph& g) const;

private:
    std::shared_ptr<progress::sink> next_;
    std::map<digest, bool> cached_;
    std::optional<digest> failed_;
};
/// `e` with the place in the Dockerfile that the vertex comes from.
error located(error e, const llb::definition& graph, const std::optional<digest>& vertex);
/// Solves, and tells of a failure where in the Dockerfile it stands.
async::task<solver::result> solve(parts& p, solver::graph vertices, solver::edge target, const llb::definition& graph, solver::solve_options options,
                                  std::shared_ptr<counting_sink> sink);
/// The platforms of --platform, normalized, each once.
std::vector<oci::platform> asked_platforms(const std::vector<std::string>& texts);
/// Platforms besides this machine's own whose steps run here through an emulator that the kernel keeps open (binfmt_misc, flag
/// F); tried out when it is needed, and remembered for 20 seconds. The second tells by the request whether it is.
async::task<std::vector<oci::platform>> emulated_platforms(parts& p, bool needed);
async::task<std::vector<oci::platform>> emulated_for(parts& p, const frontend::request& request, const std::vector<oci::platform>& platforms);
/// A conversion for each platform (none: this machine's), in their order; what they warn of is shown once.
async::task<std::vector<frontend::result>> convert_all(parts& p, frontend::request request, std::vector<oci::platform> platforms,
                                                       const ops::build_scope& scope, source::freshness how, std::shared_ptr<progress::sink> sink,
                                                       source_check check = {});
/// What was solved, for who looks at it again; `target` is the first platform's.
struct solved_graph {
    solver::graph vertices;
    std::optional<solver::edge> target;
};
/// All platforms at once, in one graph; the roots in their order.
async::task<std::vector<std::shared_ptr<ops::chain_value>>> solve_all(parts& p, const std::vector<frontend::result>& converted,
                                                                      std::vector<std::string> allowed, const ops::build_scope& scope,
                                                                      solver::solve_options options, std::shared_ptr<counting_sink> sink,
                                                                      build_result& counted, solved_graph* whole = nullptr);

/// The attributes that a client of BuildKit would send for the request.
std::map<std::string, std::string> frontend_attributes(const build_request& r, const frontend::request& converted);

/// The Dockerfile frontend with BuildKit's attributes; sub-requests are answered in the metadata. `problem` is filled before it throws.
async::task<frontend_result> run_dockerfile(parts& p, ops::build_scope scope, std::shared_ptr<progress::sink> sink, frontend_question q,
                                            frontend_call& call, std::optional<frontend_problem>* problem);

/// `text` is the Dockerfile's.
void show_warnings(const std::vector<frontend::warning>& warnings, const std::string& text, const progress::writer& about);
/// Steps that ask for more than a sandbox need the build's leave. (A local user is root already: this guards against what a
/// foreign Dockerfile asks for. A daemon's configuration is asked besides.)
void check_entitlements(const std::vector<std::string>& allow, const llb::definition& graph, const llb::loaded& loaded);

/// The keys of `containerimage.descriptor` and the like that an exported image adds to the response.
void describe_image(const exporter::exported& image, const std::vector<std::string>& names, std::map<std::string, std::string>& response);
/// Keeps an image or index under its names, with the chains it was made of.
async::task<void> keep_image(parts& p, exporter::exported image, built what, std::vector<std::string> names);
struct push_manner {
    bool by_digest = false;                        ///< no tag is set
    bool insecure = false;                         ///< https unverified, else http, whatever the configuration says
    std::shared_ptr<const registry::login> who{};  ///< none: the engine's own logins
};
async::task<void> push_image(parts& p, exporter::exported image, std::vector<std::string> names, push_manner how, progress::writer progress);
/// Pipes a docker archive into `docker load`.
async::task<void> load_into_docker(parts& p, exporter::exported image, std::vector<std::string> names, progress::writer progress);

/// The attributes of all entries, checked before anything runs. Throws errc::invalid for two equal exports.
std::vector<remotecache::export_options> parse_cache_to(const std::vector<cache_entry>& entries);
std::vector<remotecache::import_options> parse_cache_from(const std::vector<cache_entry>& entries);
/// What is there of them; one that cannot be had is a warning. Layers are fetched when a result is needed.
/// `client`: caches of type local are in its stores; none: in directories here.
async::task<std::vector<std::shared_ptr<solver::remote_cache>>> import_caches(parts& p, std::vector<remotecache::import_options> from,
                                                                              oci::platform platform, std::shared_ptr<progress::sink> sink,
                                                                              std::shared_ptr<session::session> client = {});
/// What a cache export is made of.
struct cache_source {
    std::shared_ptr<std::vector<solver::solved>> report;
    solver::graph graph;
    std::optional<solver::edge> target;
    exporter::input in;                              ///< the exported image's
    std::map<std::string, std::string> compression;  ///< attributes of the image's exporter, for exports that name none
    std::shared_ptr<session::session> client{};      ///< as import_caches() has it
};
/// The place of the vertex that failed, for who shows its source.
std::optional<job::failure> place_of(const llb::definition& graph, const std::optional<digest>& vertex);
/// Throws errc::invalid for a config that no image can have.
void check_image_config(const std::string& config);
/// What a frontend's metadata means for the exporters: annotations, and the names behind "name=*".
void apply_metadata(std::vector<output>& outputs, const std::map<std::string, std::string>& metadata);
/// Copies an image, with all that it is made of, to a client's store.
async::task<void> send_image(parts& p, exporter::exported image, std::shared_ptr<session::blob_store> to, progress::writer progress);
/// A blob of the content store.
async::task<void> send_blob(parts& p, std::shared_ptr<session::blob_store> to, digest which, std::uint64_t size);
/// What a scan is made with.
struct scan_tools {
    std::function<async::task<gateway::image_config>(gateway::resolve_request)> resolve;
    std::function<std::shared_ptr<ref>(llb::definition)> define;
};
/// A scan of every ref, with the parameters of attest:sbom, unless the frontend gave a list of contents itself.
async::task<void> add_sboms(job_result& what, std::map<std::string, std::string> parameters, scan_tools tools);
/// The attestations that a frontend gave, read.
async::task<std::vector<exporter::attestation>> read_attestations(std::vector<attested_ref> given);
async::task<void> export_caches(parts& p, std::vector<remotecache::export_options> to, cache_source what, std::shared_ptr<progress::sink> sink,
                                build_result& result);
/// The image config with its inline cache.
async::task<std::string> with_inline_cache(parts& p, cache_source what);

/// Applies the configured policy, at most every ten minutes over all processes; records of images built here stay unless a
/// rule says `all`.
async::task<void> collect_garbage(parts& p);

/// Descriptors below a manifest or index of the content store; nothing for other blobs.
std::vector<digest> children_of(const content::store& content, const digest& d);

}  // namespace cobuild::build

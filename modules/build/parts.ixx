/// Internal to cobuild.build: the engine's parts, and what its bodies share.
module;
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
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
import cobuild.oci;
import cobuild.ops;
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

    explicit parts(config::configuration c) : settings(std::move(c)) {}
    async::task<void> open(std::string root);
    async::task<void> close();
    executor::runner& get_runner();
    async::task<cni::provider*> get_network(ops::network_kind kind);
    exporter::stores stores();
};

/// What the frontend asks of the engine during one build.
class build_gateway final : public gateway::frontend_gateway {
public:
    build_gateway(parts& p, const ops::build_scope& scope, std::shared_ptr<progress::sink> sink, source::freshness how)
        : parts_(p), session_(scope.session), layouts_(scope.layouts), sink_(std::move(sink)), how_(how) {}
    async::task<gateway::image_config> resolve_image_config(gateway::resolve_request request) override;
    async::task<std::optional<std::string>> read_context_file(std::string context, std::string path) override;

private:
    async::task<source::resolved_image> resolve(gateway::resolve_request& request, progress::writer shown);
    parts& parts_;
    std::shared_ptr<session::session> session_;
    std::map<std::string, std::filesystem::path> layouts_;
    std::shared_ptr<progress::sink> sink_;
    source::freshness how_;
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
};

/// What a build came to: one root, or (a map) one for each platform.
struct built {
    struct one {
        std::string platform;  ///< its key in a map: "linux/amd64"
        exporter::input in;
    };
    std::vector<one> list;
    bool map = false;
};
/// The tags of a request with their registry and tag spelled out.
std::vector<std::string> normalized_names(const std::vector<std::string>& names);
/// Runs the exporters one after the other; `result` gets their keys.
async::task<void> export_all(parts& p, built what, std::vector<output> outputs, std::vector<std::string> names, std::shared_ptr<progress::sink> sink,
                             build_result& result);

/// The keys of `containerimage.descriptor` and the like that an exported image adds to the response.
void describe_image(const exporter::image& image, const std::vector<std::string>& names, std::map<std::string, std::string>& response);
/// Keeps an image under its names, with the chain it was made of.
async::task<void> keep_image(parts& p, exporter::image image, snapshot::chain chain, std::vector<std::string> names);
struct push_manner {
    bool by_digest = false;  ///< no tag is set
    bool insecure = false;   ///< https unverified, else http, whatever the configuration says
};
async::task<void> push_image(parts& p, exporter::image image, std::vector<std::string> names, push_manner how, progress::writer progress);
/// Pipes a docker archive into `docker load`.
async::task<void> load_into_docker(parts& p, exporter::image image, std::vector<std::string> names, progress::writer progress);

/// The attributes of all entries, checked before anything runs. Throws errc::invalid for two equal exports.
std::vector<remotecache::export_options> parse_cache_to(const std::vector<cache_entry>& entries);
std::vector<remotecache::import_options> parse_cache_from(const std::vector<cache_entry>& entries);
/// What is there of them; one that cannot be had is a warning. Layers are fetched when a result is needed.
async::task<std::vector<std::shared_ptr<solver::remote_cache>>> import_caches(parts& p, std::vector<remotecache::import_options> from,
                                                                              oci::platform platform, std::shared_ptr<progress::sink> sink);
/// What a cache export is made of.
struct cache_source {
    std::shared_ptr<std::vector<solver::solved>> report;
    solver::graph graph;
    std::optional<solver::edge> target;
    exporter::input in;                              ///< the exported image's
    std::map<std::string, std::string> compression;  ///< attributes of the image's exporter, for exports that name none
};
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

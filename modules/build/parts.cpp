module;
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import cobuild.fs;
import cobuild.http;
import :parts;

namespace cobuild::build {

// ---------------------------------------------------------------- ledger

async::task<void> ledger_of_kind::record(std::string text) {
    auto entry = co_await directory_.pool().run([this, text] { return directory_.record(kind_, text); });
    entries_.emplace(std::move(text), std::move(entry));
}

async::task<void> ledger_of_kind::forget(std::string text) {
    auto at = entries_.extract(text);
    if (at.empty()) co_return;
    co_await directory_.pool().run([&at] { at.mapped().forget(); });
}

// ---------------------------------------------------------------- parts

namespace {

/// Deletes what builds discarded, for a moment: large trees are left to the next command or to prune, a little each time.
async::task<void> take_out_trash(parts& p) {
    async::cancel_source enough;
    const auto stop_later = [](async::cancel_source source) -> async::task<void> {
        co_await async::sleep_for(std::chrono::milliseconds(500));
        source.cancel(error{errc::canceled, "enough for now"});
    };
    async::task_group group(co_await async::current_executor, true);
    group.spawn(stop_later(enough));
    co_await p.runtime.pool().run([&] {
        try {
            p.directory->empty_trash_blocking(enough.token());
        } catch (const error& e) {
            if (e.kind() != errc::canceled) log(log_level::warning, "discarded files could not be deleted", {{"error", e.what()}});
        }
    });
    group.cancel();
    try {
        co_await group.join();
    } catch (...) {
        // The timer, cancelled.
    }
}

std::shared_ptr<snapshot::store> open_snapshots(const std::string& kind, std::shared_ptr<state::directory> directory) {
    if (kind == "native") return snapshot::open_native(std::move(directory));
    if (kind == "overlayfs") return snapshot::open_overlay(std::move(directory));
    return snapshot::open_best(std::move(directory));
}

unsigned cores() { return std::max(1U, std::thread::hardware_concurrency()); }
}  // namespace

async::task<void> parts::open(std::string root) {
    auto& pool = runtime.pool();
    co_await pool.run([&] {
        directory = state::directory::open(root, pool);
        content = std::make_unique<content::store>(directory);
        snapshots = open_snapshots(settings.oci.snapshotter, directory);
    });
    programs = std::make_unique<process::spawner>();
    cni_ledger = std::make_unique<ledger_of_kind>(*directory, "cni");
    cgroup_ledger = std::make_unique<ledger_of_kind>(*directory, "cgroup");
    directory->on_undo("cni", [this](state::undo u) { return cni::replay(runtime, *programs, std::move(u.text)); });
    directory->on_undo("cgroup", [this](state::undo u) { return executor::clean_cgroups(runtime.pool(), std::move(u.text)); });
    co_await directory->recover();

    registry::options r;
    r.executor = runtime.get_executor();
    r.pool = &pool;
    r.hosts = registry::configured_hosts(settings);
    r.who.credentials = registry::docker_credentials(pool, docker_config, registry::run_helpers_with(*programs));
    r.limits.transfers = static_cast<std::size_t>(settings.system.max_registry_concurrency);
    registry = std::make_unique<registry::client>(std::move(r));
    images = std::make_unique<source::images>(pool, *content, *snapshots, *registry);
    http = std::make_unique<source::http_files>(*directory, *snapshots);
    git = std::make_unique<source::git_repositories>(*directory, *snapshots, *programs);
    auto storage = co_await pool.run([this] { return cache::make_storage(directory->open_database("cache.db").database); });
    cache = co_await cache::index::open(pool, std::move(storage));
    solver = std::make_unique<solver::solver>(runtime.get_executor(), cache, ops::make_result_store(*snapshots),
                                              solver::solver_options{.max_parallelism = static_cast<std::size_t>(settings.oci.max_parallelism)});
    const auto& allowed = settings.insecure_entitlements;
    environment = std::make_unique<ops::environment>(ops::environment{
        .pool = pool,
        .directory = *directory,
        .snapshots = *snapshots,
        .cache = *cache,
        .images = *images,
        .runner = [this]() -> executor::runner& { return get_runner(); },
        .network = [this](ops::network_kind kind) { return get_network(kind); },
        .steps =
            [this] {
                const executor::dns dns{settings.dns.nameservers, settings.dns.search_domains, settings.dns.options};
                return ops::step_defaults{.resolv_conf = executor::resolv_conf_text(executor::host_resolv_conf(false), dns, false),
                                          .host_resolv_conf = executor::resolv_conf_text(executor::host_resolv_conf(true), dns, true)};
            },
        // A local user is root already and needs no entitlement of a daemon's configuration.
        .host_network_allowed = true,
        .http = http.get(),
        .git = git.get(),
        .content = content.get(),
    });
    (void)allowed;
}

executor::runner& parts::get_runner() {
    if (!runner) {
        executor::options o;
        o.binary = settings.oci.binary;
        (void)directory->subdir("steps");
        o.work_dir = directory->root() + "/steps";
        o.owner = directory->owner();
        o.ledger = cgroup_ledger.get();
        runner = executor::open_oci_runner(runtime, *programs, std::move(o));
    }
    return *runner;
}

async::task<cni::provider*> parts::get_network(ops::network_kind kind) {
    co_await opening_network.run(static_cast<int>(kind), [this, kind]() -> async::task<int> {
        if (networks.contains(kind)) co_return 0;
        if (kind == ops::network_kind::host)
            networks[kind] = cni::make_host_provider();
        else if (kind == ops::network_kind::none)
            networks[kind] = cni::make_none_provider(runtime);
        else {
            cni::options o;
            switch (settings.oci.network) {
                case config::network_mode::cni: o.mode = cni::mode::cni; break;
                case config::network_mode::host: o.mode = cni::mode::host; break;
                case config::network_mode::none: o.mode = cni::mode::none; break;
                case config::network_mode::bridge:
                    throw error{errc::unsupported, "networkMode = \"bridge\" is not supported yet; use cni with a bridge plugin"};
                case config::network_mode::automatic: break;
            }
            o.config_path = settings.oci.cni_config_path;
            if (!o.config_path && o.mode == cni::mode::cni) o.config_path = "/etc/buildkit/cni.json";
            o.binary_dir = settings.oci.cni_binary_path;
            o.pool_size = static_cast<std::size_t>(settings.oci.cni_pool_size);
            (void)directory->subdir("net");
            o.lock_file = directory->root() + "/net/lock";
            o.ledger = cni_ledger.get();
            networks[kind] = co_await cni::make_provider(runtime, *programs, std::move(o));
        }
        co_return 0;
    });
    co_return networks.at(kind).get();
}

exporter::stores parts::stores() { return {runtime.pool(), *content, *snapshots, cores()}; }

async::task<void> parts::close() {
    if (solver) co_await solver->close();
    for (auto& [kind, n] : networks) co_await n->close();
    networks.clear();
    if (runner) co_await runner->close();
    if (cache) co_await cache->close();
    if (registry) co_await registry->close();
    if (snapshots) co_await runtime.pool().run([this] { snapshots->flush(); });
    // Again: what a killed command left may have been held a moment longer by its dying children when we started.
    if (directory) co_await directory->recover();
    if (directory) co_await take_out_trash(*this);
    environment.reset();
    solver.reset();
    images.reset();
    http.reset();
    git.reset();
    registry.reset();
    cache.reset();
    runner.reset();
    if (directory)
        co_await runtime.pool().run([this] {
            snapshots.reset();
            content.reset();
        });
    programs.reset();
    cni_ledger.reset();
    cgroup_ledger.reset();
    directory.reset();
}

// ---------------------------------------------------------------- gateway

/// The image that the policies put in the place of this one.
async::task<std::string> build_gateway::checked(std::string reference, oci::platform platform) {
    static constexpr std::string_view image = "docker-image://";
    const llb::platform p{platform.architecture, platform.os, platform.variant, platform.os_version, platform.os_features};
    const auto found = co_await check_({cat(image, reference), {}}, p);
    if (!found.identifier.starts_with(image))
        throw error{errc::unsupported, cat("the source policy puts ", found.identifier, " in the place of the image ", reference,
                                           ", and only another image is supported there yet")};
    co_return found.identifier.substr(image.size());
}

/// What a session lends is taken over into the content store, but for the layers, which nobody may want.
async::task<source::resolved_image> build_gateway::lent_image(std::string store, digest wanted, oci::platform platform, progress::writer shown) {
    const auto blobs = session_ ? session_->blobs(cat("oci:", store)) : nullptr;
    if (!blobs) throw error{errc::not_found, cat("the client offers no OCI layout named ", store)};
    const auto taken = co_await source::import_store(parts_.runtime.pool(), *parts_.content, blobs, wanted, platform);
    const auto name = oci::reference::parse("oci-layout.invalid/image").with_digest(taken.top.digest);
    co_return co_await parts_.images->resolve(name, platform, source::freshness::never, shown);
}

/// An image of a layout is taken over into the content store, which then has what its digest names.
async::task<source::resolved_image> build_gateway::resolve(gateway::resolve_request& request, progress::writer shown) {
    static constexpr std::string_view scheme = "oci-layout://";
    const auto platform = oci::normalize(request.platform);
    if (!request.reference.starts_with(scheme)) {
        if (check_) request.reference = co_await checked(request.reference, platform);
        auto ref = oci::reference::parse(request.reference);
        if (const auto known = known_.find(ref.str()); known != known_.end()) ref = ref.with_digest(known->second);
        auto found = co_await parts_.images->resolve(ref, platform, how_, shown, who_);
        known_.emplace(request.reference, found.target.digest);
        co_return found;
    }
    const auto text = request.reference.substr(scheme.size());
    if (!request.store.empty()) {
        const auto at = text.find('@');
        const auto wanted = at == std::string::npos ? std::nullopt : digest::try_parse(text.substr(at + 1));
        if (!wanted) throw error{errc::invalid, cat("the OCI layout reference ", text, " has no digest")};
        request.reference = text;
        co_return co_await lent_image(request.store, *wanted, platform, shown);
    }
    const auto name = oci::reference::parse(cat("oci-layout.invalid/", text));
    const auto directory = layouts_.find(name.path());
    if (directory == layouts_.end()) {
        if (!name.digest()) throw error{errc::invalid, cat("the OCI layout reference ", text, " has no digest")};
        request.reference = name.name();
        co_return co_await lent_image(name.path(), *name.digest(), platform, shown);
    }
    const auto tag = name.tag().empty() ? "latest" : name.tag();
    const auto taken = co_await source::import_layout(parts_.runtime.pool(), *parts_.content, directory->second, tag, name.digest(), platform);
    request.reference = name.name();
    co_return co_await parts_.images->resolve(name.name_only().with_digest(taken.top.digest), platform, source::freshness::never, shown);
}

async::task<gateway::image_config> build_gateway::resolve_image_config(gateway::resolve_request request) {
    progress::writer shown(sink_, {.id = progress::internal_id("metadata", request.reference), .name = request.log_name});
    shown.started();
    std::exception_ptr failed;
    gateway::image_config out;
    try {
        const auto image = co_await resolve(request, shown);
        out.reference = request.reference;
        out.manifest = image.target.digest;
        out.config = image.config;
    } catch (...) {
        failed = std::current_exception();
    }
    if (failed) {
        shown.failed(describe(failed));
        std::rethrow_exception(failed);
    }
    shown.completed();
    co_return out;
}

async::task<std::optional<std::string>> build_gateway::read_context_file(std::string context, std::string path) {
    auto from = session_;
    if (const auto id = local_sessions.find(context); id != local_sessions.end()) from = co_await session_->other(id->second);
    if (!from) from = session_;
    auto out = co_await from->read_file(context, std::move(path));
    if (note != nullptr) note->locals.insert(std::move(context));
    co_return out;
}

}  // namespace cobuild::build

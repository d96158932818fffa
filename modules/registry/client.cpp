module;
#include <algorithm>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/strand.hpp>

module cobuild.registry;

import :internal;

namespace cobuild::registry {

struct client::state {
    std::shared_ptr<const options> opts;
    host_resolver hosts;  // in force now
    mutable std::mutex guard;
    std::map<std::string, std::shared_ptr<registry_state>, std::less<>> registries;

    std::shared_ptr<registry_state> find(std::string_view domain) const {
        const std::lock_guard lock(guard);
        const auto found = registries.find(domain);
        return found != registries.end() ? found->second : nullptr;
    }

    std::shared_ptr<registry_state> get(const std::string& domain) {
        const std::lock_guard lock(guard);
        auto& found = registries[domain];
        if (!found) found = make(domain);
        return found;
    }

    std::shared_ptr<registry_state> make(const std::string& domain) const {
        auto r = std::make_shared<registry_state>();
        r->domain = domain;
        r->opts = opts;
        r->strand = boost::asio::make_strand(opts->executor);
        r->pool = std::make_shared<socket_pool>(r->strand, opts->limits, opts->idle_close);
        add_hosts(*r);
        return r;
    }

    void add_hosts(registry_state& r) const {
        for (auto& settings : hosts(r.domain)) {
            auto h = std::make_unique<host_state>();
            const bool tls = !settings.plain_http || settings.try_https_first;
            h->endpoint = http::parse_endpoint(settings.host, tls);
            h->settings = std::move(settings);
            if (h->settings.try_https_first) h->settings.insecure = true;
            r.hosts.push_back(std::move(h));
        }
    }

    /// The same registry with the hosts in force now: its sockets are counted on.
    std::shared_ptr<registry_state> renewed(const registry_state& old) const {
        auto r = std::make_shared<registry_state>();
        r->domain = old.domain;
        r->opts = old.opts;
        r->strand = old.strand;
        r->pool = old.pool;
        r->far_pools = old.far_pools;
        r->seen_in = old.seen_in;
        add_hosts(*r);
        return r;
    }
};

namespace {
options completed(options o) {
    if (o.user_agent.empty()) o.user_agent = cat("cobuild/", version());
    o.limits.transfers = std::max<std::size_t>(o.limits.transfers, 1);
    o.limits.metadata = std::max<std::size_t>(o.limits.metadata, 1);
    o.retry.attempts = std::max(o.retry.attempts, 1U);
    return o;
}

std::string listed(const oci::index& i) {
    std::set<std::string> names;
    for (const auto& d : i.manifests)
        if (d.platform && d.platform->os != "unknown") names.insert(oci::format(*d.platform));
    std::string out;
    for (const auto& n : names) out.append(out.empty() ? "" : ", ").append(n);
    return out.empty() ? "none" : out;
}

template<class F>
async::task<void> run_at_exit(std::shared_ptr<registry_state> r, F f) {
    f(*r);
    co_return;
}
}  // namespace

client::client(options o) : state_(std::make_shared<state>()) {
    state_->opts = std::make_shared<const options>(completed(std::move(o)));
    state_->hosts = state_->opts->hosts;
}
client::~client() = default;

async::task<resolved> client::resolve(oci::reference ref, call_options call) {
    ref = ref.with_default_tag();
    if (ref.digest()) co_return resolved{.target = {.digest = *ref.digest()}};
    auto r = state_->get(ref.domain());
    const auto strand = r->strand;
    co_return co_await async::on(strand, do_resolve(std::move(r), std::move(ref), std::move(call)));
}

async::task<manifest_content> client::fetch_manifest(oci::reference ref, oci::descriptor target, call_options call) {
    auto r = state_->get(ref.domain());
    const auto strand = r->strand;
    co_return co_await async::on(strand, do_fetch_manifest(std::move(r), std::move(ref), std::move(target), std::move(call)));
}

async::task<std::string> client::fetch_small(oci::reference ref, oci::descriptor target, call_options call) {
    auto r = state_->get(ref.domain());
    const auto strand = r->strand;
    co_return co_await async::on(strand, do_fetch_small(std::move(r), std::move(ref), std::move(target), std::move(call)));
}

async::task<image_content> client::fetch_image(oci::reference ref, oci::platform wanted, local_lookup local, call_options call) {
    constexpr unsigned max_nesting = 4;  // an index may point to an index
    const auto r = state_->get(ref.domain());
    image_content out;
    auto target = (co_await resolve(ref, call)).target;
    for (unsigned depth = 0;; ++depth) {
        manifest_content m;
        std::optional<std::string> known;
        if (local) known = co_await local(target);
        if (known && digest::of(*known) == target.digest) {
            m = {.media_type = target.media_type.empty() ? oci::sniff_media_type(*known) : target.media_type,
                 .bytes = std::move(*known),
                 .target = target};
            m.target.size = m.bytes.size();
            m.target.media_type = m.media_type;
        } else {
            m = co_await fetch_manifest(ref, target, call);
        }
        if (oci::is_manifest(m.media_type)) {
            out.parsed = oci::parse_manifest(m.bytes);
            out.manifest = std::move(m);
            break;
        }
        if (!oci::is_index(m.media_type))
            throw error{errc::unsupported, cat(ref.familiar(), " is no image: its media type is ", quoted(m.media_type))};
        if (depth == max_nesting) throw error{errc::corrupt, cat(ref.familiar(), ": indexes nested too deep")};
        const auto index = oci::parse_index(m.bytes);
        const auto choice = oci::select(index, wanted);
        if (choice.empty()) throw error{errc::not_found, cat(ref.familiar(), " has no image for ", oci::format(wanted), "; it has: ", listed(index))};
        target = choice.front();
        if (!out.index) out.index = std::move(m);
    }
    boost::asio::post(r->strand, [r, repository = ref.path(), parsed = out.parsed] {
        if (r->seen_in.size() > 10000) r->seen_in.clear();
        for (const auto& layer : parsed.layers) r->seen_in[layer.digest].insert(repository);
    });
    std::optional<std::string> known;
    if (local) known = co_await local(out.parsed.config);
    if (known && digest::of(*known) == out.parsed.config.digest) {
        out.config_bytes = std::move(*known);
    } else {
        out.config_bytes = co_await fetch_small(ref, out.parsed.config, call);
    }
    if (oci::is_config(out.parsed.config.media_type)) out.config = oci::parse_image(out.config_bytes);
    co_return out;
}

async::task<std::string> client::fetch_blob(oci::reference ref, oci::descriptor blob, blob_sink sink, fetch_options o) {
    auto r = state_->get(ref.domain());
    const auto strand = r->strand;
    co_return co_await async::on(strand, do_fetch_blob(std::move(r), std::move(ref), std::move(blob), std::move(sink), std::move(o)));
}

void client::distrust(const oci::reference& ref, const std::string& host, const digest& blob) {
    const auto r = state_->find(ref.domain());
    if (!r) return;
    boost::asio::post(r->strand, [r, host, id = blob.str()] {
        for (const auto& h : r->hosts)
            if (h->name() == host && h->distrusted.size() < 10000) h->distrusted.insert(id);
    });
}

async::task<bool> client::exists(oci::reference ref, oci::descriptor what, call_options call) {
    auto r = state_->get(ref.domain());
    const auto strand = r->strand;
    co_return co_await async::on(strand, do_exists(std::move(r), std::move(ref), std::move(what), std::move(call)));
}

async::task<push_outcome> client::push_blob(oci::reference ref, oci::descriptor blob, std::function<async::task<http::body_source>()> open,
                                            push_options o) {
    auto r = state_->get(ref.domain());
    const auto strand = r->strand;
    co_return co_await async::on(strand, do_push_blob(std::move(r), std::move(ref), std::move(blob), std::move(open), std::move(o)));
}

async::task<digest> client::push_manifest(oci::reference ref, std::string media_type, std::string bytes, call_options call) {
    auto r = state_->get(ref.domain());
    const auto strand = r->strand;
    co_return co_await async::on(strand, do_push_manifest(std::move(r), std::move(ref), std::move(media_type), std::move(bytes), std::move(call)));
}

async::task<std::vector<std::string>> client::tags(oci::reference ref, call_options call) {
    auto r = state_->get(ref.domain());
    const auto strand = r->strand;
    co_return co_await async::on(strand, do_tags(std::move(r), std::move(ref), std::move(call)));
}

async::task<std::vector<host_report>> client::check(oci::reference ref, call_options call) {
    auto r = state_->get(ref.domain());
    const auto strand = r->strand;
    co_return co_await async::on(strand, do_check(std::move(r), std::move(ref), std::move(call)));
}

async::task<void> client::ping(std::string domain, call_options call) {
    auto r = state_->get(domain);
    const auto strand = r->strand;
    co_await async::on(strand, do_ping(std::move(r), std::move(call)));
}

async::task<oci::descriptor> client::copy(oci::reference from, oci::reference to, copy_options o) {
    if (state_->opts->pool == nullptr) throw error{errc::internal, "copying between registries needs options.pool"};
    co_return co_await do_copy(*this, *state_->opts->pool, std::move(from), std::move(to), std::move(o));
}

// A rough look from any thread: the counters are plain words that one strand writes.
std::size_t client::open_sockets(std::string_view domain) const {
    const auto r = state_->find(domain);
    return r ? r->pool->open() : 0;
}

std::size_t client::peak_sockets(std::string_view domain) const {
    const auto r = state_->find(domain);
    return r ? r->pool->peak() : 0;
}

std::vector<std::pair<std::string, socket_use>> client::sockets() const {
    const std::lock_guard lock(state_->guard);
    std::vector<std::pair<std::string, socket_use>> out;
    for (const auto& [domain, r] : state_->registries) out.push_back({domain, {r->pool->open(), r->pool->peak(), r->pool->waiting()}});
    return out;
}

async::task<void> client::reload(host_resolver hosts) {
    std::vector<std::shared_ptr<registry_state>> all;
    {
        const std::lock_guard lock(state_->guard);
        state_->hosts = std::move(hosts);
        for (const auto& [domain, r] : state_->registries) all.push_back(r);
    }
    for (const auto& r : all) {
        const auto strand = r->strand;
        co_await async::on(strand, run_at_exit(r, [self = state_](registry_state& old) {
                               old.pool->close_idle();
                               for (const auto& [origin, pool] : old.far_pools) pool->close_idle();
                               auto fresh = self->renewed(old);
                               const std::lock_guard lock(self->guard);
                               self->registries[old.domain] = std::move(fresh);
                           }));
    }
}

async::task<void> client::close() {
    std::vector<std::shared_ptr<registry_state>> all;
    {
        const std::lock_guard lock(state_->guard);
        for (const auto& [domain, r] : state_->registries) all.push_back(r);
    }
    for (const auto& r : all) {
        const auto strand = r->strand;
        co_await async::on(strand, run_at_exit(r, [](registry_state& s) {
                               s.pool->close_idle();
                               for (const auto& [origin, pool] : s.far_pools) pool->close_idle();
                           }));
    }
}

}  // namespace cobuild::registry

// Imported and exported caches of a build: transfers, and which results an export takes. Their form is remotecache's.
module;
#include <algorithm>
#include <cstddef>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import cobuild.json;
import :parts;

namespace cobuild::build {

// ---------------------------------------------------------------- attributes

std::vector<remotecache::export_options> parse_cache_to(const std::vector<cache_entry>& entries) {
    std::vector<remotecache::export_options> out;
    std::set<std::pair<std::string, std::map<std::string, std::string>>> seen;
    for (const auto& e : entries) {
        if (!seen.emplace(e.type, e.attributes).second) {
            if (e.type == "inline") continue;
            throw error{errc::invalid, cat("--cache-to type=", e.type, " is given twice with the same attributes")};
        }
        out.push_back(remotecache::parse_export(e.type, e.attributes));
        auto compression = out.back().rest;
        (void)exporter::take_image_options(compression);  // a mistake in them is told before the build
    }
    return out;
}

std::vector<remotecache::import_options> parse_cache_from(const std::vector<cache_entry>& entries) {
    std::vector<remotecache::import_options> out;
    for (const auto& e : entries) {
        out.push_back(remotecache::parse_import(e.type, e.attributes));
        if (out.back().insecure)
            throw error{errc::unsupported,
                        "--cache-from: registry.insecure=true is not supported yet; set insecure = true for this registry in buildkitd.toml"};
    }
    return out;
}

// ---------------------------------------------------------------- import

namespace {

constexpr std::string_view created_at = "buildkit/createdat";  // as the exporter keeps it at a layer's blob
constexpr std::string_view pulled_variant = "pulled";

/// Brings a chain of layers of a cache; what is here already is not fetched.
async::task<solver::result> load_chain(parts& p, remotecache::import_options from, std::shared_ptr<session::blob_store> blobs,
                                       std::vector<remotecache::layer> chain, progress::writer w) {
    source::resolved_image image;
    const bool local = from.kind == remotecache::kind::local;
    image.reference = oci::reference::parse(local ? "local.invalid/cache" : from.ref);
    for (const auto& l : chain) {
        image.parsed.layers.push_back(l.blob);
        image.diff_ids.push_back(l.diff_id);
        source::blob_origin origin{.variant = l.variant, .annotations = {}};
        if (!l.created.empty()) origin.annotations.emplace(created_at, l.created);
        image.origins.push_back(std::move(origin));
        if (!local || co_await p.snapshots->find_by_diff_id(l.diff_id)) continue;
        if (blobs)
            image.keep += co_await source::take_blob(p.runtime.pool(), *p.content, blobs, l.blob.digest);
        else
            image.keep += co_await p.runtime.pool().run([&] { return remotecache::take_blob(*p.content, from.directory, l.blob); });
    }
    const auto keep = image.keep;
    auto pulled = co_await p.images->pull(std::move(image), std::move(w));
    auto out = std::make_shared<ops::chain_value>();
    out->chain = std::move(pulled.chain);
    out->keep = std::move(pulled.keep);
    co_return out;
}

/// A cache manifest's document; else the inline cache of an image, of an index the one for `platform`.
async::task<remotecache::document> read_registry(parts& p, std::string name, oci::platform platform) {
    const auto ref = oci::reference::parse(name);
    auto found = co_await p.registry->fetch_manifest(ref, (co_await p.registry->resolve(ref)).target);
    if (const auto cache = remotecache::find_config(found.media_type, found.bytes))
        co_return remotecache::decode(co_await p.registry->fetch_small(ref, cache->config), cache->blobs);
    if (oci::is_index(found.media_type)) {
        const auto fits = oci::select(oci::parse_index(found.bytes), platform);
        if (fits.empty()) throw error{errc::not_found, cat(ref.familiar(), " has no image for ", oci::format(platform))};
        found = co_await p.registry->fetch_manifest(ref, fits.front());
    }
    const auto manifest = oci::parse_manifest(found.bytes);
    if (!oci::is_config(manifest.config.media_type)) throw error{errc::not_found, cat(ref.familiar(), " is neither a cache nor an image")};
    auto cache = remotecache::decode_inline(co_await p.registry->fetch_small(ref, manifest.config), manifest);
    if (!cache) throw error{errc::not_found, cat("the image ", ref.familiar(), " was exported without a cache (--cache-to type=inline)")};
    co_return std::move(*cache);
}

async::task<remotecache::document> read_local(parts& p, remotecache::import_options from) {
    co_return co_await p.runtime.pool().run([&] {
        const auto top = remotecache::find_document(from.directory, from.tag, from.digest);
        const auto cache = remotecache::find_config(top.media_type, remotecache::read_document(from.directory, top));
        if (!cache) throw error{errc::not_found, cat("what the directory ", from.directory, " has under ", from.tag, " is no cache")};
        return remotecache::decode(remotecache::read_document(from.directory, cache->config), cache->blobs);
    });
}

/// A client's store: always by digest, since the client knows what its directory's tags mean.
async::task<remotecache::document> read_lent(parts& p, remotecache::import_options from, std::shared_ptr<session::blob_store> blobs) {
    if (!from.digest) throw error{errc::invalid, "local cache importer requires explicit digest"};
    static constexpr std::uint64_t limit = std::uint64_t{8} << 20;
    const auto read = [](parts& with, std::shared_ptr<session::blob_store> store, digest which) -> async::task<std::string> {
        const auto keep = co_await source::take_blob(with.runtime.pool(), *with.content, store, which, limit);
        co_return co_await with.runtime.pool().run([&with, which] { return with.content->read_all(which, limit); });
    };
    const auto top = co_await read(p, blobs, *from.digest);
    const auto cache = remotecache::find_config(oci::sniff_media_type(top), top);
    if (!cache) throw error{errc::not_found, cat("what ", from.name(), " has under ", from.digest->str(), " is no cache")};
    co_return remotecache::decode(co_await read(p, blobs, cache->config.digest), cache->blobs);
}

/// Where a cache of type local is: null in a directory here, for which there is no client.
std::shared_ptr<session::blob_store> store_of(const std::shared_ptr<session::session>& client, bool local, const std::string& directory) {
    if (!client || !local) return nullptr;
    auto out = client->blobs(cat("local:", directory));
    if (!out) throw error{errc::invalid, cat("the cache local:", directory, " is in the client's directories, and the client lends none")};
    return out;
}

async::task<remotecache::document> read_cache(parts& p, remotecache::import_options from, std::shared_ptr<session::blob_store> blobs,
                                              oci::platform platform) {
    if (blobs) return read_lent(p, std::move(from), std::move(blobs));
    if (from.kind == remotecache::kind::local) return read_local(p, std::move(from));
    return read_registry(p, from.ref, std::move(platform));
}

/// One cache into its place; a failure leaves it empty.
async::task<void> import_one(parts& p, remotecache::import_options from, oci::platform platform, std::shared_ptr<progress::sink> sink,
                             std::shared_ptr<session::session> client, std::shared_ptr<solver::remote_cache>& out) {
    const auto name = cat("importing cache manifest from ", from.name());
    progress::writer w(std::move(sink), {.id = progress::internal_id("import", cat(from.name(), from.tag)), .name = name});
    w.started();
    std::exception_ptr failed;
    try {
        const auto blobs = store_of(client, from.kind == remotecache::kind::local, from.directory);
        auto document = co_await read_cache(p, from, blobs, platform);
        out = std::make_shared<remotecache::imported>(std::move(document),
                                                      [&p, from, blobs](std::vector<remotecache::layer> chain, progress::writer to) {
                                                          return load_chain(p, from, blobs, std::move(chain), std::move(to));
                                                      });
    } catch (...) {
        failed = std::current_exception();
    }
    if (failed) {
        const auto why = describe(failed);
        if (why.kind() == errc::canceled) {
            w.failed(why);
            std::rethrow_exception(failed);
        }
        log(log_level::warning, "a cache cannot be imported", {{"cache", from.name()}, {"error", why.what()}});
        w.warn({.message = cat("the cache ", from.name(), " is not used: ", why.what())});
    }
    w.completed();
}

}  // namespace

async::task<std::vector<std::shared_ptr<solver::remote_cache>>> import_caches(parts& p, std::vector<remotecache::import_options> from,
                                                                              oci::platform platform, std::shared_ptr<progress::sink> sink,
                                                                              std::shared_ptr<session::session> client) {
    std::vector<std::shared_ptr<solver::remote_cache>> out(from.size());
    std::vector<async::task<void>> work;
    for (std::size_t i = 0; i < from.size(); ++i) work.push_back(import_one(p, std::move(from[i]), platform, sink, client, out[i]));
    co_await async::when_all(std::move(work));
    std::erase(out, nullptr);
    co_return out;
}

// ---------------------------------------------------------------- what is exported

namespace {

struct chained_record {
    remotecache::record record;
    std::map<std::size_t, std::shared_ptr<ops::chain_value>> values;  ///< by output; none: the keys alone
};

bool is_prefix(const snapshot::chain& of, const snapshot::chain& whole) {
    return of.layers.size() <= whole.layers.size() && std::equal(of.layers.begin(), of.layers.end(), whole.layers.begin());
}

/// Outputs of vertices, by the vertex.
using outputs_of = std::map<digest, std::set<std::size_t>>;

/// Those that the target stands on: what an op changes, down to where it begins.
outputs_of path_to(const cache_source& what) {
    outputs_of out;
    for (auto at = what.target; at;) {
        const auto& v = what.graph[at->vertex];
        out[v.id].insert(at->output);
        const auto slot = v.op->changed_input(at->output);
        at = slot && *slot < v.inputs.size() ? std::optional(v.inputs[*slot]) : std::nullopt;
    }
    return out;
}

/// Those that anything uses.
outputs_of used_in(const cache_source& what) {
    outputs_of out;
    for (const auto& v : what.graph)
        for (const auto& in : v.inputs) out[what.graph[in.vertex].id].insert(in.output);
    if (what.target) out[what.graph[what.target->vertex].id].insert(what.target->output);
    return out;
}

/// The outputs of one vertex, as far as they are roots with layers. What cannot be had any more is exported by its keys.
async::task<std::map<std::size_t, std::shared_ptr<ops::chain_value>>> results_of(const solver::solved& s, std::set<std::size_t> wanted) {
    std::vector<solver::result> outputs;
    try {
        outputs = co_await s.outputs();
    } catch (const error& e) {
        if (e.kind() == errc::canceled) throw;
        log(log_level::warning, "a result is left out of the exported cache", {{"error", e.what()}});
    }
    std::map<std::size_t, std::shared_ptr<ops::chain_value>> out;
    for (const auto number : wanted) {
        if (number >= outputs.size() || number > remotecache::max_output) continue;
        auto chain = std::dynamic_pointer_cast<ops::chain_value>(outputs[number]);
        if (chain && !chain->chain.layers.empty()) out[number] = std::move(chain);
    }
    co_return out;
}

async::task<std::vector<chained_record>> collect_records(const cache_source& what, bool max) {
    const auto wanted = max ? used_in(what) : path_to(what);
    std::vector<chained_record> out;
    std::map<digest, std::size_t> seen;
    for (const auto& s : *what.report) {
        // Different steps that read the same come to one record.
        const auto [at, fresh] = seen.try_emplace(s.canonical, out.size());
        if (fresh) out.push_back({.record = {.canonical = s.canonical, .keys = {}, .chain = {}}, .values = {}});
        auto& one = out[at->second];
        one.record.keys.insert(one.record.keys.end(), s.keys.begin(), s.keys.end());
        const auto numbers = wanted.find(s.id);
        if (numbers == wanted.end()) continue;
        for (auto& [number, value] : co_await results_of(s, numbers->second))
            if (max || is_prefix(value->chain, what.in.root)) one.values.try_emplace(number, std::move(value));
    }
    co_return out;
}

/// The place of an output's chain in a record.
std::vector<std::size_t>& chain_of(remotecache::record& r, std::size_t number) { return number == 0 ? r.chain.emplace() : r.others[number]; }

/// Chains that are no beginning of another one.
std::vector<snapshot::chain> longest(const std::vector<chained_record>& records) {
    std::vector<snapshot::chain> out;
    for (const auto& r : records)
        for (const auto& [number, value] : r.values) out.push_back(value->chain);
    std::sort(out.begin(), out.end(), [](const auto& a, const auto& b) { return a.layers < b.layers; });
    // Sorted, a chain stands right before those that begin with it.
    std::vector<snapshot::chain> kept;
    for (std::size_t i = 0; i < out.size(); ++i)
        if (i + 1 == out.size() || !is_prefix(out[i], out[i + 1])) kept.push_back(out[i]);
    return kept;
}

/// A document under way, with what keeps its blobs.
struct packed {
    remotecache::document document;
    std::map<std::vector<snapshot::layer_id>, std::size_t> layer_at;  ///< by the chain that ends with it
    state::pin keep;
};

/// The blobs of one chain, made by the image exporter: those of an exported image are there already.
async::task<void> pack(parts& p, packed& out, snapshot::chain chain, const cache_source& what, exporter::image_options options, progress::writer w) {
    exporter::input in = what.in;
    in.config.clear();
    in.root = chain;
    const auto image = co_await exporter::write_image(p.stores(), std::move(in), std::move(options), std::move(w));
    out.keep += image.keep;
    std::vector<snapshot::layer_id> below;
    for (std::size_t i = 0; i < chain.layers.size(); ++i) {
        below.push_back(chain.layers[i]);
        if (!out.layer_at.try_emplace(below, out.document.layers.size()).second) continue;
        const auto blobs = co_await p.snapshots->blobs(chain.layers[i]);
        const auto blob = std::find_if(blobs.begin(), blobs.end(), [&](const auto& b) { return b.blob == image.layers[i].digest; });
        if (blob == blobs.end()) throw error{errc::internal, cat("the layer blob ", image.layers[i].digest.str(), " is not known to its layer")};
        remotecache::layer l{.blob = image.layers[i], .diff_id = blob->diff_id, .created = {}, .variant = {}};
        if (const auto at = blob->annotations.find(std::string(created_at)); at != blob->annotations.end()) l.created = at->second;
        if (blob->variant != pulled_variant) l.variant = blob->variant;
        out.document.layers.push_back(std::move(l));
    }
}

async::task<packed> pack_all(parts& p, std::vector<chained_record> records, const cache_source& what, exporter::image_options options,
                             progress::writer w) {
    packed out;
    for (auto& chain : longest(records)) co_await pack(p, out, std::move(chain), what, options, w);
    for (auto& r : records) {
        for (const auto& [number, value] : r.values) {
            std::vector<snapshot::layer_id> below;
            auto& chain = chain_of(r.record, number);
            for (const auto& id : value->chain.layers) {
                below.push_back(id);
                chain.push_back(out.layer_at.at(below));
            }
        }
        out.document.records.push_back(std::move(r.record));
    }
    co_return out;
}

// ---------------------------------------------------------------- export

/// One export; empty when there is nothing to export.
async::task<std::optional<oci::descriptor>> export_one(parts& p, remotecache::export_options to, const cache_source& what, progress::writer w) {
    auto attributes = to.rest.empty() ? what.compression : to.rest;
    auto options = exporter::take_image_options(attributes);
    const auto made = co_await pack_all(p, co_await collect_records(what, to.max), what, options, w);
    if (made.document.layers.empty()) {
        w.warn({.message = "there are no layers to export, so no cache is written"});
        co_return std::nullopt;
    }
    const auto text = remotecache::encode(made.document);
    const auto config = co_await p.runtime.pool().run([&] { return p.content->put(text); });
    exporter::image image;
    image.config = {.media_type = std::string(remotecache::config_type), .digest = config.digest, .size = config.size};
    auto around = remotecache::make_manifest(image.config, made.document.layers, to.image_manifest, to.oci_types);
    image.manifest = {.media_type = around.media_type, .digest = digest::of(around.bytes), .size = around.bytes.size()};
    image.manifest_bytes = std::move(around.bytes);
    std::set<digest> known;
    for (const auto& l : made.document.layers)
        if (known.insert(l.blob.digest).second) image.layers.push_back(l.blob);
    image.keep = made.keep;
    const auto target = image.manifest;
    if (to.kind == remotecache::kind::registry) {
        exporter::exported whole{.top = image.manifest, .top_bytes = image.manifest_bytes, .images = {image}, .attestations = {}, .keep = image.keep};
        co_await push_image(p, std::move(whole), {to.ref}, {.insecure = to.insecure}, w);
        co_return target;
    }
    auto line = w.begin(cat("writing to ", to.directory));
    auto blobs = image.layers;
    blobs.push_back(image.config);
    if (const auto store = store_of(what.client, true, to.directory)) {
        // The client writes its index itself, by the manifest that the response names.
        image.keep += co_await p.runtime.pool().run([&] { return p.content->put(image.manifest_bytes).keep; });
        blobs.push_back(target);
        for (const auto& b : blobs) co_await send_blob(p, store, b.digest, b.size);
        line.done();
        co_return target;
    }
    co_await p.runtime.pool().run(
        [&] { return remotecache::write_layout(*p.content, to.directory, to.tag, target, image.manifest_bytes, blobs, to.reset); });
    line.done();
    co_return target;
}

}  // namespace

async::task<std::string> with_inline_cache(parts&, cache_source what) {
    remotecache::document document;
    for (auto& r : co_await collect_records(what, false)) {
        for (const auto& [number, value] : r.values) {
            auto& chain = chain_of(r.record, number);
            for (std::size_t i = 0; i < value->chain.layers.size(); ++i) chain.push_back(i);
        }
        document.records.push_back(std::move(r.record));
    }
    auto config = json::parse(what.in.config.empty() ? "{}" : what.in.config);
    config.as_object().set(remotecache::inline_member, remotecache::encode_inline(document));
    co_return json::serialize(config);
}

async::task<void> export_caches(parts& p, std::vector<remotecache::export_options> to, cache_source what, std::shared_ptr<progress::sink> sink,
                                build_result& result) {
    for (auto& one : to) {
        if (one.kind == remotecache::kind::inline_) continue;
        const bool may_fail = one.ignore_error;
        const auto where = one.kind == remotecache::kind::local ? cat("local:", one.directory) : one.ref;
        std::exception_ptr failed;
        try {
            const auto manifest = co_await shown<std::optional<oci::descriptor>>(
                sink, cat("cache", where), cat("exporting cache to ", one.kind == remotecache::kind::local ? "client directory" : "registry"),
                [&](progress::writer w) { return export_one(p, one, what, std::move(w)); });
            if (manifest) result.exporter_response["cache.manifest"] = json::serialize(oci::to_json(*manifest));
        } catch (...) {
            failed = std::current_exception();
        }
        if (!failed) continue;
        auto why = describe(failed);
        if (!may_fail || why.kind() == errc::canceled) throw std::move(why).with(cat("exporting the cache to ", where));
        log(log_level::warning, "the cache was not exported", {{"to", where}, {"error", why.what()}});
    }
}

}  // namespace cobuild::build

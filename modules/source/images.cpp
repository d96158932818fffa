module;
#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.source;

import cobuild.archive;
import cobuild.fs;
import cobuild.http;
import cobuild.json;

namespace cobuild::source {

// In blob.cpp.
async::task<pulled_image> blob_as_file(async::blocking_pool& pool, snapshot::store& snapshots, registry::client& registry, blob_request request,
                                       progress::writer progress);

namespace {

constexpr std::string_view pulled_variant = "pulled";

/// What a pool thread found out about a layer's bytes while it unpacked them.
struct unpacked {
    digest blob;
    std::uint64_t size = 0;
    digest diff_id;
    archive::apply_result applied;
    state::pin keep;  ///< of the blob
    /// Why the bytes could not be unpacked. Whether they are the right bytes is the first question, so they are read to their end
    /// all the same.
    std::exception_ptr failed;
};

/// Hashes, inflates, hashes, unpacks: one pass over `blob`. The media type is believed only as far as the bytes agree.
unpacked unpack(archive::byte_source blob, int target) {
    unpacked out;
    hasher compressed, plain;
    auto raw = archive::hashed(std::move(blob), compressed, &out.size);
    try {
        auto tar = archive::hashed(archive::decompress_auto(raw), plain);
        // A thread of its own for inflating leaves this one to unpack: the two take about the same time.
        const auto ahead = archive::read_ahead(tar, std::size_t{1} << 20, 4);
        out.applied = archive::apply_layer(ahead, target);
    } catch (const error& e) {
        if (e.kind() != errc::corrupt) throw;
        out.failed = std::current_exception();
    }
    std::vector<std::byte> rest(65536);
    while (raw(rest) != 0) {
    }  // bytes after the last member still count for the digest
    out.blob = compressed.finish();
    out.diff_id = plain.finish();
    return out;
}

/// A source over a pipe that a coroutine fills.
archive::byte_source read_pipe(async::byte_pipe pipe) {
    auto current = std::make_shared<async::chunk>();
    auto used = std::make_shared<std::size_t>(0);
    return [pipe, current, used](std::span<std::byte> out) mutable -> std::size_t {
        while (*used == current->size()) {
            auto next = pipe.read_blocking();
            if (!next) return 0;
            *current = std::move(*next);
            *used = 0;
        }
        const std::size_t n = std::min(out.size(), current->size() - *used);
        std::copy_n(current->begin() + static_cast<std::ptrdiff_t>(*used), n, out.begin());
        *used += n;
        return n;
    };
}

/// Passes bytes on and writes them to the content store on the way, after those that an interrupted pull left there.
archive::byte_source teed(archive::byte_source in, std::shared_ptr<content::writer> out) {
    return [in = std::move(in), out](std::span<std::byte> buffer) {
        if (const std::size_t n = out->replay(buffer); n > 0 || buffer.empty()) return n;
        const std::size_t n = in(buffer);
        if (n > 0) out->write(std::span<const std::byte>(buffer.data(), n));
        return n;
    };
}

bool hides_all_below(int layer) { return fs::get_xattr(layer, "", "trusted.overlay.opaque") == "y"; }

/// One image that is being pulled.
struct pulling {
    resolved_image image;
    std::vector<digest> chain_ids;
    progress::writer progress;
};
using wanted = std::shared_ptr<const pulling>;

}  // namespace

struct images::state {
    async::blocking_pool& pool;
    content::store& content;
    snapshot::store& snapshots;
    registry::client& registry;
    /// One flight per layer: a layer wanted twice at once is brought once.
    async::single_flight<std::string, snapshot::layer> flights;

    async::task<std::optional<std::string>> from_store(oci::descriptor d) {
        if (!content.find(d.digest)) co_return std::nullopt;
        std::optional<std::string> out;
        try {
            out = co_await pool.run([this, d] { return content.read_all(d.digest); });
        } catch (const error& e) {
            // A damaged file is fetched anew: the store replaces what it holds under that digest.
            if (e.kind() != errc::corrupt && e.kind() != errc::not_found) throw;
            log(log_level::warning, "a blob of the content store is damaged and is fetched again", {{"digest", d.digest.str()}});
            content.remove(d.digest);
        }
        co_return out;
    }

    cobuild::state::pin keep_text(const std::string& bytes) { return content.put(bytes).keep; }

    async::task<resolved_image> built_here(oci::reference ref, content::image named, oci::platform platform);
    /// Layer `index`, brought at most once at a time.
    async::task<snapshot::layer> layer(wanted what, std::size_t index);
    async::task<snapshot::layer> bring(wanted what, std::size_t index);
    async::task<std::optional<unpacked>> unpack_stored(wanted what, std::size_t index, int target);
    /// Empty when what an interrupted pull left turned out to be damaged; it is gone then.
    async::task<std::optional<unpacked>> fetch_and_unpack(wanted what, std::size_t index, int target, std::shared_ptr<content::writer> blob);
    async::task<void> finish(const unpacked& made, int target, wanted what, std::size_t index);
};

namespace {
std::optional<snapshot::chain> parse_chain(const std::map<std::string, std::string>& labels, const std::string& label) {
    const auto at = labels.find(label);
    if (at == labels.end()) return std::nullopt;
    snapshot::chain out;
    if (at->second.empty()) return out;
    for (const auto part : split(at->second, ',')) {
        snapshot::layer_id id;
        const auto [end, ec] = std::from_chars(part.data(), part.data() + part.size(), id.value);
        if (ec != std::errc{} || end != part.data() + part.size()) return std::nullopt;
        out.layers.push_back(id);
    }
    return out;
}

oci::descriptor member_of(const oci::reference& ref, const oci::index& index, const oci::platform& platform) {
    if (auto found = oci::select(index, platform); !found.empty()) return std::move(found.front());
    std::string has;
    for (const auto& d : index.manifests)
        if (d.platform && d.platform->os != "unknown") has += cat(has.empty() ? "" : ", ", oci::format(*d.platform));
    throw error{errc::not_found, cat("the image ", ref.familiar(), ", built here, is not for ", oci::format(platform), " (it is for ", has, ")")};
}
}  // namespace

std::string chain_text(const snapshot::chain& c) {
    std::string out;
    for (const auto& id : c.layers) out += cat(out.empty() ? "" : ",", id.value);
    return out;
}

std::string chain_label_of(const digest& manifest) { return cat(chain_label, ":", manifest.str()); }

images::images(async::blocking_pool& pool, content::store& content, snapshot::store& snapshots, registry::client& registry)
    : state_(std::make_shared<state>(state{pool, content, snapshots, registry, {}})) {}
images::~images() = default;

// ---------------------------------------------------------------- resolve

async::task<resolved_image> images::state::built_here(oci::reference ref, content::image named, oci::platform platform) {
    resolved_image out;
    out.reference = ref;
    out.local = true;
    out.target = oci::parse_descriptor(json::parse(named.descriptor));
    const auto read = [this](digest d) { return content.read_all(d); };
    auto manifest = co_await pool.run([&] { return read(out.target.digest); });
    out.manifest = out.target;
    auto label = std::string(chain_label);
    if (oci::is_index(out.target.media_type)) {
        out.manifest = member_of(ref, oci::parse_index(manifest), platform);
        manifest = co_await pool.run([&] { return read(out.manifest.digest); });
        label = chain_label_of(out.manifest.digest);
    }
    out.chain = parse_chain(named.labels, label);
    out.parsed = oci::parse_manifest(manifest);
    const auto config_digest = out.parsed.config.digest;
    out.config = co_await pool.run([&] { return read(config_digest); });
    const auto config = oci::parse_image(out.config);
    out.diff_ids = config.diff_ids;
    out.platform = config.platform;
    for (const auto& d : {out.target.digest, out.manifest.digest, config_digest})
        if (auto held = content.hold(d)) out.keep += held->keep;
    co_return out;
}

async::task<resolved_image> images::resolve(oci::reference ref, oci::platform platform, freshness how, progress::writer progress,
                                            std::shared_ptr<const registry::login> who) {
    auto& s = *state_;
    ref = ref.with_default_tag();
    if (how != freshness::always) {
        auto named = co_await s.pool.run([&s, ref]() -> std::optional<content::image> {
            if (!ref.digest()) return s.content.get_image(ref.str());
            for (auto& i : s.content.list_images())
                if (i.target == *ref.digest()) return std::move(i);
            return std::nullopt;
        });
        if (named) co_return co_await s.built_here(ref, std::move(*named), platform);
    }
    if (how == freshness::never && !(ref.digest() && s.content.find(*ref.digest())))
        throw error{errc::not_found, cat("the image ", ref.familiar(), " is not here, and --pull=never forbids asking a registry")};
    // A digest that is here asks nobody, and is not worth a line.
    const bool asks = !ref.digest() || !s.content.find(*ref.digest());
    auto line = asks ? progress.begin(cat("resolve ", ref.str())) : progress::line();
    const auto found =
        co_await s.registry.fetch_image(ref, platform, [keep = state_](oci::descriptor d) { return keep->from_store(std::move(d)); }, {.who = who});
    line.done();
    resolved_image out;
    out.who = who;
    out.reference = ref;
    out.target = found.index ? found.index->target : found.manifest.target;
    out.manifest = found.manifest.target;
    out.parsed = found.parsed;
    out.config = found.config_bytes;
    out.diff_ids = found.config.diff_ids;
    out.platform = found.config.platform;
    if (out.diff_ids.size() != out.parsed.layers.size())
        throw error{errc::corrupt,
                    cat("the image ", ref.familiar(), " has ", out.parsed.layers.size(), " layers but its config lists ", out.diff_ids.size())};
    out.keep = co_await s.pool.run([&s, &found] {
        auto keep = s.keep_text(found.manifest.bytes);
        if (found.index) keep += s.keep_text(found.index->bytes);
        keep += s.keep_text(found.config_bytes);
        return keep;
    });
    co_return out;
}

// ---------------------------------------------------------------- pull

async::task<std::optional<unpacked>> images::state::fetch_and_unpack(wanted what, std::size_t index, int target,
                                                                     std::shared_ptr<content::writer> blob) {
    const auto& layer = what->image.parsed.layers[index];
    auto line = std::make_shared<progress::line>(what->progress.begin(layer.digest.str(), static_cast<std::int64_t>(layer.size)));
    async::byte_pipe pipe(std::size_t{4} << 20);
    auto out = std::make_shared<unpacked>();
    std::string host;
    async::task_group both(co_await async::current_executor);
    const auto receive = [](state* self, oci::reference r, oci::descriptor l, async::byte_pipe p, std::shared_ptr<progress::line> shown,
                            std::string* from, std::shared_ptr<const registry::login> who, std::uint64_t have) -> async::task<void> {
        std::exception_ptr failed;
        try {
            registry::fetch_options options;
            options.verify = false;
            options.call.who = who;
            options.offset = have;
            auto arrived = [p, shown, count = static_cast<std::int64_t>(have)](async::chunk c) mutable -> async::task<void> {
                count += static_cast<std::int64_t>(c.size());
                shown->update(count);
                return p.write(std::move(c));
            };
            if (have < l.size) *from = co_await self->registry.fetch_blob(r, l, std::move(arrived), options);
            p.close();
        } catch (...) {
            failed = std::current_exception();
        }
        if (failed) {
            p.fail(failed);
            std::rethrow_exception(failed);
        }
    };
    const auto work = [](state* self, async::byte_pipe p, int dir, std::shared_ptr<content::writer> b,
                         std::shared_ptr<unpacked> result) -> async::task<void> {
        co_await self->pool.run([p, dir, b, result]() mutable {
            try {
                *result = unpack(teed(read_pipe(p), b), dir);
            } catch (...) {
                p.fail(std::current_exception());
                throw;
            }
        });
    };
    both.spawn(receive(this, what->image.reference, layer, pipe, line, &host, what->image.who, blob->kept()));
    both.spawn(work(this, pipe, target, blob, out));
    co_await both.join();
    if (out->blob != layer.digest || out->size != layer.size) {
        const bool resumed = blob->kept() > 0;
        blob->abort();
        if (resumed) co_return std::nullopt;  // it may be the older part that is damaged
        registry.distrust(what->image.reference, host, layer.digest);
        throw error{errc::corrupt, cat("the layer ", layer.digest.str(), " from ", host, " is damaged: received ", out->size, " of ", layer.size,
                                       " bytes with digest ", out->blob.str())};
    }
    line->done();
    co_return *out;
}

/// From the content store; empty when it is not there, or not what its name says: then it is removed and must be fetched.
async::task<std::optional<unpacked>> images::state::unpack_stored(wanted what, std::size_t index, int target) {
    const auto& layer = what->image.parsed.layers[index];
    auto held = content.hold(layer.digest);
    if (!held) co_return std::nullopt;
    auto line = what->progress.begin(cat("extracting ", layer.digest.str()));
    auto made = co_await pool.run([this, &layer, target] {
        const auto file = content.open(layer.digest);
        return unpack(archive::read_from(file.get()), target);
    });
    line.done();
    if (made.blob == layer.digest) {
        made.keep = std::move(held->keep);
        co_return made;
    }
    held.reset();
    log(log_level::warning, "a layer in the content store is damaged and is fetched again", {{"digest", layer.digest.str()}});
    co_await pool.run([this, &layer] { return content.remove(layer.digest); });
    co_return std::nullopt;
}

/// What a layer leans on is looked for below it; the layers there are asked for in order, so each finds those below it done.
async::task<void> images::state::finish(const unpacked& made, int target, wanted what, std::size_t index) {
    std::vector<snapshot::layer> under;
    for (std::size_t i = 0; i < index; ++i) under.push_back(co_await layer(what, i));
    co_await pool.run([this, &made, target, &under] {
        std::vector<unique_fd> dirs;
        for (auto at = under.rbegin(); at != under.rend(); ++at) dirs.push_back(snapshots.layer_dir(at->id));
        std::vector<int> fds;
        for (const auto& d : dirs) fds.push_back(d.get());
        archive::lower_chain lower(std::move(fds));
        archive::finish_layer(target, lower, made.applied);
    });
}

async::task<snapshot::layer> images::state::layer(wanted what, std::size_t index) {
    co_return co_await flights.run(what->chain_ids[index].str(), [this, what, index] { return bring(what, index); });
}

async::task<snapshot::layer> images::state::bring(wanted what, std::size_t index) {
    const auto& image = what->image;
    const auto& layer = image.parsed.layers[index];
    const auto& diff_id = image.diff_ids[index];
    const auto& chain_id = what->chain_ids[index];
    if (auto here = co_await snapshots.find_by_diff_id(diff_id)) co_return std::move(*here);
    if (auto here = co_await snapshots.find_by_chain_id(chain_id)) co_return std::move(*here);
    std::optional<snapshot::unpacking> target(co_await snapshots.begin_unpack());
    auto made = co_await unpack_stored(what, index, target->fd());
    while (!made) {
        target.emplace(co_await snapshots.begin_unpack());
        auto writer = std::make_shared<content::writer>(content.resume(layer.digest, layer.size));
        made = co_await fetch_and_unpack(what, index, target->fd(), writer);
        if (!made) continue;
        made->keep = co_await pool.run([writer, &layer] { return writer->commit(layer.digest, layer.size).keep; });
    }
    if (made->failed) throw describe(made->failed).with(cat("the layer ", layer.digest.str(), " of ", image.reference.familiar()));
    if (made->diff_id != diff_id)
        throw error{errc::corrupt, cat("the layer ", layer.digest.str(), " of ", image.reference.familiar(), " unpacks to ", made->diff_id.str(),
                                       " but the image's config says ", diff_id.str())};
    snapshot::pulled_info info{.diff_id = diff_id, .description = cat("pulled from ", image.reference.str())};
    info.blob = {
        .variant = std::string(pulled_variant), .blob = layer.digest, .size = layer.size, .media_type = layer.media_type, .diff_id = diff_id};
    if (index < image.origins.size()) {
        const auto& origin = image.origins[index];
        if (!origin.variant.empty()) info.blob->variant = origin.variant;
        info.blob->annotations = origin.annotations;
    }
    if (!made->applied.self_contained()) {
        co_await finish(*made, target->fd(), what, index);
        info.chain_id = chain_id;
    }
    co_return co_await snapshots.commit(std::move(*target), std::move(info));
}

async::task<pulled_image> images::blob(blob_request request, progress::writer progress) {
    co_return co_await blob_as_file(state_->pool, state_->snapshots, state_->registry, std::move(request), std::move(progress));
}

async::task<pulled_image> images::pull(resolved_image image, progress::writer progress) {
    auto s = state_;
    if (image.chain)
        if (auto keep = co_await s->snapshots.hold(*image.chain)) co_return pulled_image{*image.chain, std::move(*keep)};
    for (const auto& l : image.parsed.layers) oci::layer_compression(l.media_type);  // refuses what is no layer, by name
    const std::size_t count = image.parsed.layers.size();
    auto chain_ids = oci::chain_ids(image.diff_ids);
    const wanted what = std::make_shared<const pulling>(pulling{std::move(image), std::move(chain_ids), std::move(progress)});
    auto layers = std::make_shared<std::vector<snapshot::layer>>(count);
    const auto one = [](std::shared_ptr<state> self, wanted of, std::size_t i,
                        std::shared_ptr<std::vector<snapshot::layer>> out) -> async::task<void> { (*out)[i] = co_await self->layer(of, i); };
    std::vector<async::task<void>> work;
    for (std::size_t i = 0; i < count; ++i) work.push_back(one(s, what, i, layers));
    co_await async::when_all(std::move(work));
    // A mount does not look at the mark of a layer's top directory that hides all below: such a layer begins the chain.
    const auto bottom = co_await s->pool.run([s, layers] {
        std::size_t at = layers->size();
        while (at > 0 && !hides_all_below(s->snapshots.layer_dir((*layers)[--at].id).get())) {
        }
        return at;
    });
    pulled_image out;
    for (std::size_t i = bottom; i < count; ++i) {
        out.chain.layers.push_back((*layers)[i].id);
        out.keep += (*layers)[i].keep;
    }
    co_return out;
}

}  // namespace cobuild::source

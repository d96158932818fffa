module;
#include <algorithm>
#include <charconv>
#include <cstddef>
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

namespace {

constexpr std::string_view pulled_variant = "pulled";

/// What a pool thread found out about a layer's bytes while it unpacked them.
struct unpacked {
    digest blob;
    std::uint64_t size = 0;
    digest diff_id;
    archive::apply_result applied;
    std::exception_ptr failed;  ///< why the archive could not be unpacked: told only when the digest is right
};

archive::compression archive_kind(std::string_view media_type) {
    switch (oci::layer_compression(media_type)) {
        case oci::compression::gzip: return archive::compression::gzip;
        case oci::compression::zstd: return archive::compression::zstd;
        case oci::compression::none: break;
    }
    return archive::compression::none;
}

/// Hashes, inflates, hashes, unpacks: one pass over `blob`. The media type is believed only as far as the bytes agree.
unpacked unpack(archive::byte_source blob, int target) {
    unpacked out;
    hasher compressed, plain;
    auto raw = archive::hashed(std::move(blob), compressed, &out.size);
    auto tar = archive::hashed(archive::decompress_auto(raw), plain);
    // A thread of its own for inflating leaves this one to unpack: the two take about the same time.
    auto ahead = archive::read_ahead(tar, std::size_t{1} << 20, 4);
    try {
        out.applied = archive::apply_layer(ahead, target);
    } catch (const error& e) {
        // Damaged bytes mostly fail to inflate first. Reading on tells whether they are the ones that were asked for.
        if (e.kind() != errc::corrupt) throw;
        out.failed = std::current_exception();
    }
    ahead = nullptr;
    std::vector<std::byte> rest(65536);
    while (raw(rest) != 0) {}  // bytes after the last member still count for the digest
    out.blob = compressed.finish();
    out.diff_id = plain.finish();
    return out;
}

void throw_if_failed(const unpacked& made, const digest& layer) {
    if (made.failed) throw cobuild::describe(made.failed).with(cat("the layer ", layer.str()));
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

/// Passes bytes on and writes them to the content store on the way.
archive::byte_source teed(archive::byte_source in, std::shared_ptr<content::writer> out) {
    return [in = std::move(in), out](std::span<std::byte> buffer) {
        const std::size_t n = in(buffer);
        if (n > 0) out->write(std::span<const std::byte>(buffer.data(), n));
        return n;
    };
}

/// What the layers below finish once they are there.
struct below {
    async::event ready;
    snapshot::chain chain;
    state::pin keep;
};

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
    async::task<snapshot::layer> bring(oci::reference ref, oci::descriptor layer, digest diff_id, digest chain_id, std::shared_ptr<below> under,
                                       progress::writer progress);
    async::task<unpacked> fetch_and_unpack(oci::reference ref, oci::descriptor layer, int target, std::shared_ptr<content::writer> blob,
                                           progress::writer progress);
    async::task<void> finish(const unpacked& made, int target, std::shared_ptr<below> under);
};

namespace {
std::optional<snapshot::chain> parse_chain(const std::map<std::string, std::string>& labels) {
    const auto at = labels.find(std::string(chain_label));
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
}  // namespace

std::string chain_text(const snapshot::chain& c) {
    std::string out;
    for (const auto& id : c.layers) out += cat(out.empty() ? "" : ",", id.value);
    return out;
}

images::images(async::blocking_pool& pool, content::store& content, snapshot::store& snapshots, registry::client& registry)
    : state_(std::make_shared<state>(state{pool, content, snapshots, registry, {}})) {}
images::~images() = default;

// ---------------------------------------------------------------- resolve

async::task<resolved_image> images::state::built_here(oci::reference ref, content::image named, oci::platform) {
    resolved_image out;
    out.reference = ref;
    out.local = true;
    out.chain = parse_chain(named.labels);
    out.target = oci::parse_descriptor(json::parse(named.descriptor));
    const auto read = [this](digest d) { return content.read_all(d); };
    const auto manifest = co_await pool.run([&] { return read(out.target.digest); });
    out.manifest = out.target;
    out.parsed = oci::parse_manifest(manifest);
    const auto config_digest = out.parsed.config.digest;
    out.config = co_await pool.run([&] { return read(config_digest); });
    const auto config = oci::parse_image(out.config);
    out.diff_ids = config.diff_ids;
    out.platform = config.platform;
    for (const auto& d : {out.target.digest, config_digest})
        if (auto held = content.hold(d)) out.keep += held->keep;
    co_return out;
}

async::task<resolved_image> images::resolve(oci::reference ref, oci::platform platform, freshness how, progress::writer progress) {
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
    const auto found = co_await s.registry.fetch_image(ref, platform, [keep = state_](oci::descriptor d) { return keep->from_store(std::move(d)); });
    line.done();
    resolved_image out;
    out.reference = ref;
    out.target = found.index ? found.index->target : found.manifest.target;
    out.manifest = found.manifest.target;
    out.parsed = found.parsed;
    out.config = found.config_bytes;
    out.diff_ids = found.config.diff_ids;
    out.platform = found.config.platform;
    if (out.diff_ids.size() != out.parsed.layers.size())
        throw error{errc::corrupt, cat("the image ", ref.familiar(), " has ", out.parsed.layers.size(), " layers but its config lists ", out.diff_ids.size())};
    out.keep = co_await s.pool.run([&s, &found] {
        auto keep = s.keep_text(found.manifest.bytes);
        if (found.index) keep += s.keep_text(found.index->bytes);
        keep += s.keep_text(found.config_bytes);
        return keep;
    });
    co_return out;
}

// ---------------------------------------------------------------- pull

async::task<unpacked> images::state::fetch_and_unpack(oci::reference ref, oci::descriptor layer, int target, std::shared_ptr<content::writer> blob,
                                                      progress::writer progress) {
    auto line = std::make_shared<progress::line>(progress.begin(layer.digest.str(), static_cast<std::int64_t>(layer.size)));
    auto received = std::make_shared<std::int64_t>(0);
    async::byte_pipe pipe(std::size_t{8} << 20);
    auto out = std::make_shared<unpacked>();
    std::string host;
    async::task_group both(co_await async::current_executor);
    const auto receive = [](state* self, oci::reference r, oci::descriptor l, async::byte_pipe p, std::shared_ptr<progress::line> shown,
                            std::shared_ptr<std::int64_t> count, std::string* from) -> async::task<void> {
        std::exception_ptr failed;
        try {
            registry::fetch_options options;
            options.verify = false;
            *from = co_await self->registry.fetch_blob(
                r, l,
                [p, shown, count](async::chunk c) mutable -> async::task<void> {
                    *count += static_cast<std::int64_t>(c.size());
                    shown->update(*count);
                    return p.write(std::move(c));
                },
                options);
            p.close();
        } catch (...) {
            failed = std::current_exception();
        }
        if (failed) {
            p.fail(failed);
            std::rethrow_exception(failed);
        }
    };
    const auto work = [](state* self, async::byte_pipe p, int dir, std::shared_ptr<content::writer> b, std::shared_ptr<unpacked> result) -> async::task<void> {
        co_await self->pool.run([p, dir, b, result]() mutable {
            try {
                auto in = read_pipe(p);
                *result = unpack(b ? teed(std::move(in), b) : std::move(in), dir);
            } catch (...) {
                p.fail(std::current_exception());
                throw;
            }
        });
    };
    both.spawn(receive(this, ref, layer, pipe, line, received, &host));
    both.spawn(work(this, pipe, target, blob, out));
    co_await both.join();
    line->done();
    if (out->blob != layer.digest || out->size != layer.size) {
        registry.distrust(ref, host, layer.digest);
        throw error{errc::corrupt, cat("the layer ", layer.digest.str(), " from ", host, " is damaged: received ", out->size, " of ", layer.size, " bytes with digest ",
                                       out->blob.str())};
    }
    throw_if_failed(*out, layer.digest);
    co_return *out;
}

async::task<void> images::state::finish(const unpacked& made, int target, std::shared_ptr<below> under) {
    co_await under->ready.wait();
    co_await pool.run([this, &made, target, under] {
        const auto dirs = snapshots.layer_dirs(under->chain);
        std::vector<int> fds;
        for (const auto& d : dirs) fds.push_back(d.get());
        archive::lower_chain lower(std::move(fds));
        archive::finish_layer(target, lower, made.applied);
    });
}

async::task<snapshot::layer> images::state::bring(oci::reference ref, oci::descriptor layer, digest diff_id, digest chain_id, std::shared_ptr<below> under,
                                                  progress::writer progress) {
    if (auto here = co_await snapshots.find_by_diff_id(diff_id)) co_return std::move(*here);
    if (auto here = co_await snapshots.find_by_chain_id(chain_id)) co_return std::move(*here);
    auto unpacking = co_await snapshots.begin_unpack();
    unpacked made;
    snapshot::layer_blob blob{.variant = std::string(pulled_variant), .blob = layer.digest, .size = layer.size, .media_type = layer.media_type, .diff_id = diff_id};
    cobuild::state::pin keep;
    if (auto held = content.hold(layer.digest)) {
        keep = held->keep;
        auto line = progress.begin(cat("extracting ", layer.digest.str()));
        made = co_await pool.run([this, &layer, fd = unpacking.fd()] {
            const auto file = content.open(layer.digest);
            return unpack(archive::read_from(file.get()), fd);
        });
        line.done();
        if (made.blob != layer.digest) {
            content.remove(layer.digest);
            throw error{errc::corrupt, cat("the blob ", layer.digest.str(), " in the content store is damaged; it was removed, build again to fetch it anew")};
        }
        throw_if_failed(made, layer.digest);
    } else {
        auto writer = std::make_shared<content::writer>(content.ingest(layer.size));
        made = co_await fetch_and_unpack(ref, layer, unpacking.fd(), writer, progress);
        keep = co_await pool.run([writer, &layer] { return writer->commit(layer.digest, layer.size).keep; });
    }
    if (made.applied.opaque_root)
        throw error{errc::unsupported, cat("the layer ", layer.digest.str(), " of ", ref.familiar(), " hides everything below it (an opaque root), which is not supported yet")};
    if (made.diff_id != diff_id)
        throw error{errc::corrupt, cat("the layer ", layer.digest.str(), " of ", ref.familiar(), " unpacks to ", made.diff_id.str(), " but the image's config says ", diff_id.str())};
    snapshot::pulled_info info{.diff_id = diff_id, .blob = std::move(blob), .description = cat("pulled from ", ref.str())};
    if (!made.applied.self_contained()) {
        co_await finish(made, unpacking.fd(), under);
        info.chain_id = chain_id;
    }
    co_return co_await snapshots.commit(std::move(unpacking), std::move(info));
}

async::task<pulled_image> images::pull(resolved_image image, progress::writer progress) {
    auto s = state_;
    if (image.chain)
        if (auto keep = co_await s->snapshots.hold(*image.chain)) co_return pulled_image{*image.chain, std::move(*keep)};
    const auto chain_ids = oci::chain_ids(image.diff_ids);
    const std::size_t count = image.parsed.layers.size();
    auto layers = std::make_shared<std::vector<snapshot::layer>>(count);
    auto under = std::make_shared<std::vector<std::shared_ptr<below>>>();
    for (std::size_t i = 0; i <= count; ++i) under->push_back(std::make_shared<below>());
    (*under)[0]->ready.set();
    // Layer i tells its neighbour above what lies below it once it and all below it are there.
    const auto one = [](std::shared_ptr<state> self, std::size_t i, resolved_image of, digest chain_id, std::shared_ptr<std::vector<snapshot::layer>> out,
                        std::shared_ptr<std::vector<std::shared_ptr<below>>> waiting, progress::writer shown) -> async::task<void> {
        const auto& l = of.parsed.layers[i];
        oci::layer_compression(l.media_type);  // refuses what is no layer, by name
        (*out)[i] = co_await self->flights.run(chain_id.str(), [self, of, l, i, chain_id, waiting, shown] {
            return self->bring(of.reference, l, of.diff_ids[i], chain_id, (*waiting)[i], shown);
        });
        auto& mine = *(*waiting)[i];
        auto& next = *(*waiting)[i + 1];
        co_await mine.ready.wait();
        next.chain = mine.chain;
        next.chain.layers.push_back((*out)[i].id);
        next.keep = mine.keep;
        next.keep += (*out)[i].keep;
        next.ready.set();
    };
    std::vector<async::task<void>> work;
    for (std::size_t i = 0; i < count; ++i) work.push_back(one(s, i, image, chain_ids[i], layers, under, progress));
    co_await async::when_all(std::move(work));
    co_return pulled_image{(*under)[count]->chain, (*under)[count]->keep};
}

}  // namespace cobuild::source

// Images among the blobs of a client's session.
module;
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.source;

import cobuild.archive;

namespace cobuild::source {

namespace {

constexpr std::uint64_t max_document = std::uint64_t{8} << 20;
constexpr std::uint64_t max_blob = std::uint64_t{64} << 30;

/// Takes over a manifest, an index or a config and returns its text.
async::task<std::string> take_document(async::blocking_pool& pool, content::store& content, std::shared_ptr<session::blob_store> from, digest which,
                                       state::pin& keep) {
    keep += co_await take_blob(pool, content, std::move(from), which, max_document);
    co_return co_await pool.run([&content, which] { return content.read_all(which, max_document); });
}

}  // namespace

async::task<state::pin> take_blob(async::blocking_pool& pool, content::store& content, std::shared_ptr<session::blob_store> from, digest which,
                                  std::optional<std::uint64_t> limit) {
    if (auto held = co_await pool.run([&] { return content.hold(which); })) co_return std::move(held->keep);
    const auto size = co_await from->size(which);
    if (!size) throw error{errc::not_found, cat("the client has no blob ", which.str())};
    if (*size > limit.value_or(max_blob))
        throw error{errc::invalid, cat("the client's blob ", which.str(), " is larger than ", format_bytes(limit.value_or(max_blob)))};
    auto out = std::make_shared<content::writer>(co_await pool.run([&] { return content.ingest(*size); }));
    co_await from->read(which, [&pool, out, which, most = *size](std::string piece) -> async::task<void> {
        const auto keep_piece = [](async::blocking_pool& p, std::shared_ptr<content::writer> to, digest id, std::uint64_t all,
                                   std::string bytes) -> async::task<void> {
            if (to->written() + bytes.size() > all) throw error{errc::corrupt, cat("the client's blob ", id.str(), " is longer than it said")};
            co_await p.run([&] { to->write(bytes); });
        };
        return keep_piece(pool, out, which, most, std::move(piece));
    });
    auto made = co_await pool.run([&] { return out->commit(which, *size); });
    co_return std::move(made.keep);
}

async::task<imported_layout> import_store(async::blocking_pool& pool, content::store& content, std::shared_ptr<session::blob_store> from,
                                          digest wanted, oci::platform platform) {
    imported_layout out;
    auto text = co_await take_document(pool, content, from, wanted, out.keep);
    out.top = {.media_type = oci::sniff_media_type(text), .digest = wanted, .size = text.size()};
    auto type = out.top.media_type;
    for (unsigned depth = 0; oci::is_index(type); ++depth) {
        if (depth == 4) throw error{errc::invalid, "indexes are nested too deeply"};
        const auto fits = oci::select(oci::parse_index(text), platform);
        if (fits.empty()) throw error{errc::not_found, cat("the client's image ", wanted.str(), " is not for ", oci::format(platform))};
        text = co_await take_document(pool, content, from, fits.front().digest, out.keep);
        type = oci::sniff_media_type(text);
    }
    if (!oci::is_manifest(type)) throw error{errc::invalid, cat("the client's blob ", wanted.str(), " is no image")};
    const auto manifest = oci::parse_manifest(text);
    (void)co_await take_document(pool, content, from, manifest.config.digest, out.keep);
    co_return out;
}

async::task<state::pin> take_layers(async::blocking_pool& pool, content::store& content, snapshot::store& snapshots,
                                    std::shared_ptr<session::blob_store> from, std::vector<oci::descriptor> layers, std::vector<digest> diff_ids) {
    state::pin keep;
    for (std::size_t i = 0; i < layers.size(); ++i) {
        if (i < diff_ids.size() && co_await snapshots.find_by_diff_id(diff_ids[i])) continue;
        keep += co_await take_blob(pool, content, from, layers[i].digest);
    }
    co_return keep;
}

}  // namespace cobuild::source

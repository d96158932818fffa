// What goes to the blobs of a client's session: images, and exported caches.
module;
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import cobuild.async;
import :parts;

namespace cobuild::build {

namespace {

constexpr std::size_t piece = std::size_t{1} << 20;

/// Gives a file's bytes piece by piece.
std::function<async::task<std::string>()> pieces_of(parts& p, std::shared_ptr<unique_fd> file) {
    return [&p, file] {
        const auto read = [](parts& with, std::shared_ptr<unique_fd> from) -> async::task<std::string> {
            return with.runtime.pool().run([from] {
                std::string out(piece, '\0');
                for (;;) {
                    const auto n = ::read(from->get(), out.data(), out.size());
                    if (n < 0 && errno == EINTR) continue;
                    if (n < 0) throw_errno("reading a blob");
                    out.resize(static_cast<std::size_t>(n));
                    return out;
                }
            });
        };
        return read(p, file);
    };
}

}  // namespace

async::task<void> send_blob(parts& p, std::shared_ptr<session::blob_store> to, digest which, std::uint64_t size) {
    auto file = std::make_shared<unique_fd>(co_await p.runtime.pool().run([&p, which] { return p.content->open(which); }));
    co_await to->write(which, size, pieces_of(p, std::move(file)));
}

async::task<void> send_image(parts& p, exporter::exported image, std::shared_ptr<session::blob_store> to, progress::writer progress) {
    auto line = progress.begin("copying to the client's layout");
    for (const auto& [id, blob] : image.blobs()) co_await send_blob(p, to, id, blob.size);
    // What names others comes after them.
    if (image.is_index())
        for (const auto* list : {&image.images, &image.attestations})
            for (const auto& i : *list) co_await send_blob(p, to, i.manifest.digest, i.manifest.size);
    co_await send_blob(p, to, image.top.digest, image.top.size);
    line.done();
}

}  // namespace cobuild::build

module;
#include <fcntl.h>
#include <unistd.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include <boost/asio/awaitable.hpp>

module cobuild.source;

import cobuild.fs;

namespace cobuild::source {

async::task<pulled_image> blob_as_file(async::blocking_pool& pool, snapshot::store& snapshots, registry::client& registry, blob_request request,
                                       progress::writer progress) {
    const auto wanted = request.reference.digest().value();
    auto line = std::make_shared<progress::line>(progress.begin(wanted.str()));
    auto layer = co_await snapshots.begin({});
    const fs::root root{unique_fd{::openat(layer.upper(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)}};
    auto file = std::make_shared<unique_fd>(
        co_await pool.run([&] { return root.create_file(request.filename, request.perm & 07777, {request.uid, request.gid}); }));
    auto size = std::make_shared<std::uint64_t>(0);
    registry::fetch_options options;
    options.call.who = request.who;
    // The blob's size stands in no manifest here; the registry module holds the bytes against the digest.
    co_await registry.fetch_blob(
        request.reference, {.media_type = {}, .digest = wanted, .size = 0},
        [&pool, file, line, size](async::chunk c) -> async::task<void> {
            const auto write = [](async::blocking_pool& on, std::shared_ptr<unique_fd> to, std::shared_ptr<progress::line> shown,
                                  std::shared_ptr<std::uint64_t> count, async::chunk data) -> async::task<void> {
                co_await on.run([&] { fs::write_all(to->get(), data); });
                shown->update(static_cast<std::int64_t>(*count += data.size()));
            };
            return write(pool, file, line, size, std::move(c));
        },
        options);
    co_await pool.run([&] {
        file->reset();
        root.set_mtime(request.filename, {0, 0});
    });
    auto made = co_await snapshots.commit(std::move(layer), {.description = cat("blob ", request.reference.str()), .size = *size});
    line->done();
    co_return pulled_image{snapshot::chain{{made.id}}, std::move(made.keep)};
}

}  // namespace cobuild::source

// What bench/registry.py holds against skopeo and against the bare work.
//   bench_fetch get HOST REPOSITORY DIR [CA]    the layers of HOST/REPOSITORY:latest into files, as `skopeo copy docker://... dir:` does
//   bench_fetch floor FILE...                   each file hashed, inflated and hashed again, two at a time: no pull can do less
#include <fcntl.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

import cobuild.base;
import cobuild.async;
import cobuild.archive;
import cobuild.http;
import cobuild.oci;
import cobuild.registry;

using namespace cobuild;

namespace {

async::task<void> get(registry::client& c, async::blocking_pool& pool, oci::reference ref, oci::descriptor layer, std::string dir) {
    const auto file = std::make_shared<unique_fd>(::open(cat(dir, '/', layer.digest.hex()).c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    const auto hash = std::make_shared<hasher>();
    const auto write = [file, hash, &pool](async::chunk data) -> async::task<void> {
        return pool.run([file, hash, data = std::move(data)] {
            hash->update(data);
            if (::write(file->get(), data.data(), data.size()) != static_cast<ssize_t>(data.size())) throw_errno("cannot write");
        });
    };
    co_await c.fetch_blob(ref, layer, write, {.verify = false, .chunk_size = std::size_t{1} << 20});
    if (hash->finish() != layer.digest) throw error{errc::corrupt, "wrong bytes"};
}

async::task<void> get_all(registry::client& c, async::blocking_pool& pool, oci::reference ref, std::string dir) {
    const auto image = co_await c.fetch_image(ref, oci::host_platform());
    std::vector<async::task<void>> all;
    for (const auto& layer : image.parsed.layers) all.push_back(get(c, pool, ref, layer, dir));
    co_await async::when_all(std::move(all));
    co_await c.close();
}

void hash_and_inflate(const std::string& path) {
    const unique_fd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    hasher packed, plain;
    const auto raw = archive::hashed(archive::read_from(file.get()), packed);
    const auto tar = archive::hashed(archive::decompress_auto(raw), plain);
    std::vector<std::byte> buffer(std::size_t{1} << 20);
    while (tar(buffer) != 0) {
    }
    (void)packed.finish();
    (void)plain.finish();
}

async::task<void> floor(async::blocking_pool& pool, std::vector<std::string> files) {
    std::vector<async::task<void>> all;
    for (auto& f : files) all.push_back(pool.run([f = std::move(f)] { hash_and_inflate(f); }));
    co_await async::when_all(std::move(all));
}

}  // namespace

int main(int argc, char** argv) try {
    const std::vector<std::string> args(argv + 1, argv + argc);
    if (args.size() >= 2 && args[0] == "floor") {
        async::runtime rt({.max_blocking_threads = 2});
        rt.block_on(floor(rt.pool(), {args.begin() + 1, args.end()}));
        return 0;
    }
    if (args.size() < 4 || args[0] != "get") return 2;
    async::runtime rt;
    const registry::host_settings host{.host = args[1], .plain_http = args.size() < 5, .ca = {args.begin() + 4, args.end()}};
    registry::client c({.executor = rt.get_executor(), .pool = &rt.pool(), .hosts = [host](std::string_view) { return std::vector{host}; }});
    rt.block_on(get_all(c, rt.pool(), oci::reference::parse(cat(args[1], '/', args[2], ":latest")), args[3]));
    return 0;
} catch (const std::exception& e) {
    std::fprintf(stderr, "bench_fetch: %s\n", e.what());
    return 1;
}

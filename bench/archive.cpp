// bench_archive FILE.tar DIR [few]: MB/s; with `few` only the default compression
// of compressing, decompressing, applying and diffing one layer.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

import cobuild.base;
import cobuild.fs;
import cobuild.archive;

using namespace cobuild;
using namespace cobuild::archive;

namespace {
double cpu_seconds() {
    rusage u;
    ::getrusage(RUSAGE_SELF, &u);
    const auto of = [](const timeval& t) { return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) / 1e6; };
    return of(u.ru_utime) + of(u.ru_stime);
}

void measure(const std::string& what, std::size_t bytes, const std::function<std::size_t()>& work) {
    const double cpu = cpu_seconds();
    const auto start = std::chrono::steady_clock::now();
    const std::size_t out = work();
    const double wall = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const double used = cpu_seconds() - cpu;
    const double mb = static_cast<double>(bytes) / 1e6;
    std::printf("%-28s %7.0f MB/s wall  %7.0f MB/s per cpu second  %6.2f s  out %.1f MB\n", what.c_str(), mb / wall, mb / used, wall,
                static_cast<double>(out) / 1e6);
    std::fflush(stdout);
}

std::size_t drain(const byte_source& in) {
    std::vector<std::byte> buffer(1 << 20);
    std::size_t total = 0;
    while (const std::size_t n = in(buffer)) total += n;
    return total;
}
}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) return 2;
    const bool few = argc > 3;
    const unique_fd file{::open(argv[1], O_RDONLY | O_CLOEXEC)};
    const std::string tar = fs::read_all(file.get(), std::size_t{4} << 30);
    const unique_fd base{::open(argv[2], O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
    std::vector<std::byte> gz, zst;
    const auto pack = [&](compression kind, std::optional<int> level, unsigned threads, std::vector<std::byte>& out) {
        out.clear();
        out.reserve(tar.size());
        blob_writer w{[&](std::span<const std::byte> b) { out.insert(out.end(), b.begin(), b.end()); }, {kind, level, threads}};
        for (std::size_t at = 0; at < tar.size(); at += 1 << 18) w.write(bytes_of(std::string_view(tar).substr(at, 1 << 18)));
        w.finish();
        return out.size();
    };
    std::vector<std::byte> other;
    for (const int level : {1, 2, 6, 9})
        for (const unsigned threads : {1U, 2U})
            if (few ? level == 2 && threads == 2 : level < 9 || threads == 2)
                measure(cat("gzip -", level, " threads ", threads), tar.size(),
                        [&] { return pack(compression::gzip, level, threads, level == 2 ? gz : other); });
    for (const unsigned threads : {1U, 2U})
        measure(cat("zstd -3 threads ", threads), tar.size(), [&] { return pack(compression::zstd, 3, threads, zst); });
    measure("gunzip", tar.size(), [&] { return drain(decompress(read_from(gz), compression::gzip)); });
    measure("unzstd", tar.size(), [&] { return drain(decompress(read_from(zst), compression::zstd)); });
    const auto unpack = [&](const char* name, byte_source in) {
        ::mkdirat(base.get(), name, 0755);
        const unique_fd dir{::openat(base.get(), name, O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
        return static_cast<std::size_t>(apply_layer(std::move(in), dir.get()).entries);
    };
    const auto clean = [&] { fs::remove_tree(base.get(), "l"); };
    clean();
    measure("apply tar", tar.size(), [&] { return unpack("l", read_from(bytes_of(tar))); });
    clean();
    measure("apply gzip", tar.size(), [&] { return unpack("l", decompress_auto(read_from(gz))); });
    clean();
    hasher hash;
    measure("apply gzip, hashed, ahead", tar.size(), [&] { return unpack("l", read_ahead(hashed(decompress_auto(read_from(gz)), hash))); });
    const unique_fd dir{::openat(base.get(), "l", O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
    lower_chain none;
    measure("diff only", tar.size(), [&] {
        tar_writer w{[](std::span<const std::byte>) {}};
        return static_cast<std::size_t>(diff_layer(dir.get(), none, w).bytes);
    });
    measure("diff, gzip -2, threads 2", tar.size(), [&] {
        std::size_t out = 0;
        blob_writer blob{[&](std::span<const std::byte> b) { out += b.size(); }, {compression::gzip, 2, 2}};
        tar_writer w{blob.sink()};
        diff_layer(dir.get(), none, w);
        blob.finish();
        return out;
    });
    measure("remove", tar.size(), [&] { return clean(), std::size_t{0}; });
}

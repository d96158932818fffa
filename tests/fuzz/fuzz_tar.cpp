// Any bytes as a layer archive: plain, gzip or zstd. Whatever is in it, reading ends with entries or an error of ours, and
// what our writer makes of the entries reads back the same.
#include <cstddef>
#include <cstdint>
#include <functional>
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
constexpr std::uint64_t most = std::uint64_t{64} << 20;

void round_trip(const tar_entry& e) {
    std::string text;
    tar_writer w{[&](std::span<const std::byte> b) { text += text_of(b); }};
    tar_entry copy = e;
    copy.size = 0;
    copy.mtime.nanoseconds = 0;
    if (copy.dev_major > 07777777 || copy.dev_minor > 07777777) return;
    if (copy.path.find('\0') != std::string::npos || copy.link.find('\0') != std::string::npos) return;
    if (copy.type == entry_type::file && copy.path.ends_with('/')) return;
    for (const auto& [key, value] : copy.xattrs)
        if (key.find('=') != std::string::npos) return;
    w.add(copy);
    w.finish();
    tar_reader r{read_from(bytes_of(text))};
    tar_entry back;
    if (!r.next(back) || back.path != copy.path || back.uid != copy.uid || back.mtime != copy.mtime || back.type != copy.type) __builtin_trap();
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const auto bytes = std::as_bytes(std::span(data, size));
    try {
        tar_reader r{decompress_auto(read_from(bytes), nullptr, {.max_bytes = most}),
                     {.max_header_bytes = 1 << 20, .max_path_bytes = 8192, .max_entries = 2000}};
        for (tar_entry e; r.next(e);) {
            while (!r.data().empty()) {
            }
            round_trip(e);
        }
    } catch (const error& e) {
        if (e.kind() == errc::internal) __builtin_trap();
    }
    return 0;
}

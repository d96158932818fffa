#include "support/support.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

import cobuild.base;
import cobuild.fs;
import cobuild.archive;

using namespace cobuild;
using namespace cobuild::test;
using namespace cobuild::archive;

namespace {
std::string read_everything(const byte_source& in, std::size_t piece = 70001) {
    std::string out;
    std::vector<std::byte> buffer(piece);
    while (const std::size_t n = in(buffer)) out += text_of(std::span(buffer).first(n));
    return out;
}

/// Half random words, half noise: compressible and not.
std::string sample(std::size_t size) {
    std::mt19937 random(7);
    std::string out;
    while (out.size() < size) {
        if (random() % 2 == 0)
            out += cat("line ", static_cast<unsigned>(random() % 1000), " of text\n");
        else
            for (int i = 0; i < 16; ++i) out += static_cast<char>(random());
    }
    out.resize(size);
    return out;
}

struct packed {
    std::string bytes;
    layer_blob blob;
};
packed pack(std::string_view data, compress_options o, std::size_t piece = 100'000) {
    packed p;
    blob_writer w{[&](std::span<const std::byte> b) { p.bytes += text_of(b); }, o};
    for (; !data.empty(); data.remove_prefix(std::min(piece, data.size()))) w.write(bytes_of(data.substr(0, piece)));
    p.blob = w.finish();
    return p;
}
std::string unpack(std::string_view bytes, decompress_limits limits = {}) {
    return read_everything(decompress_auto(read_from(bytes_of(bytes)), nullptr, limits));
}
bool corrupt(std::string_view bytes, decompress_limits limits = {}) {
    try {
        unpack(bytes, limits);
    } catch (const error& e) {
        return e.kind() == errc::corrupt;
    }
    return false;
}
}  // namespace

BOOST_AUTO_TEST_SUITE(compressing)

BOOST_AUTO_TEST_CASE(round_trips_and_the_bytes_do_not_depend_on_threads) {
    const std::string data = sample(5'300'000);
    const struct {
        compression kind;
        int level;
    } cases[] = {{compression::gzip, 0}, {compression::gzip, 1}, {compression::gzip, 2}, {compression::gzip, 6},
                 {compression::gzip, 9}, {compression::zstd, 1}, {compression::zstd, 3}, {compression::none, 0}};
    for (const auto& c : cases) {
        const packed one = pack(data, {c.kind, c.level, 1});
        const packed four = pack(data, {c.kind, c.level, 4}, 1'234'567);
        BOOST_TEST((one.bytes == four.bytes), to_string(c.kind) << c.level);
        BOOST_TEST((unpack(one.bytes) == data), to_string(c.kind) << c.level);
        BOOST_TEST((one.blob.digest == digest::of(one.bytes)));
        BOOST_TEST((one.blob.diff_id == digest::of(data)));
        BOOST_TEST((four.blob.digest == one.blob.digest));
        BOOST_TEST(one.blob.size == one.bytes.size());
        BOOST_TEST(one.blob.uncompressed_size == data.size());
        BOOST_TEST((detect(bytes_of(one.bytes)) == c.kind));
    }
}

BOOST_AUTO_TEST_CASE(the_default_is_isal_2_in_members_of_a_mebibyte) {
    const std::string data = sample(std::size_t{3} << 20);
    const packed p = pack(data, {});
    BOOST_TEST((p.bytes == pack(data, {compression::gzip, 2, 1}).bytes));
    // RFC 1952: magic, deflate, no flags, mtime 0, no extra flags, OS 255.
    BOOST_TEST((p.bytes.substr(0, 10) == std::string("\x1f\x8b\x08\0\0\0\0\0\0\xff", 10)));
    BOOST_TEST((p.bytes.starts_with(pack(std::string_view(data).substr(0, 1 << 20), {}).bytes)));
}

BOOST_AUTO_TEST_CASE(other_programs_read_it) {
    scratch_dir d;
    const std::string data = sample(3'000'000);
    write_file(d / "g.gz", pack(data, {compression::gzip, 2, 2}).bytes);
    write_file(d / "e.gz", pack("", {}).bytes);
    write_file(d / "z.zst", pack(data, {compression::zstd, 3, 2}).bytes);
    write_file(d / "data", data);
    const std::string in = cat("cd ", d.path().string(), " && ");
    BOOST_TEST(std::system(cat(in, "gzip -t g.gz e.gz && gzip -dc g.gz | cmp - data").c_str()) == 0);
    BOOST_TEST(std::system(cat(in, "zstd -q -t z.zst && zstd -q -dc z.zst | cmp - data").c_str()) == 0);
    BOOST_REQUIRE(
        std::system(
            cat(in, "gzip -nk data && gzip -nc data >> data.gz && cp data twice && cat data >> twice && zstd -q data && zstd -qc data >> data.zst")
                .c_str()) == 0);
    BOOST_TEST((unpack(read_file(d / "data.gz")) == data + data));
    BOOST_TEST((unpack(read_file(d / "data.zst")) == data + data));
}

BOOST_AUTO_TEST_CASE(damage_is_found) {
    const std::string data = sample(300'000);
    for (const auto kind : {compression::gzip, compression::zstd}) {
        const std::string good = pack(data, {kind, std::nullopt, 1}).bytes;
        for (const std::size_t cut : {std::size_t{5}, std::size_t{11}, good.size() / 2, good.size() - 1})
            BOOST_TEST(corrupt(good.substr(0, cut)), to_string(kind) << cut);
        std::string flipped = good;
        flipped[good.size() - 6] ^= 1;
        BOOST_TEST(corrupt(flipped), to_string(kind));
        BOOST_TEST(corrupt(good + "junk"), to_string(kind));
    }
    BOOST_TEST((unpack(pack(data, {}).bytes + std::string(1000, '\0')) == data));
}

BOOST_AUTO_TEST_CASE(limits) {
    const std::string zeros(std::size_t{70} << 20, '\0');
    const std::string bomb = pack(zeros, {}).bytes;
    BOOST_TEST(unpack(bomb).size() == zeros.size());
    BOOST_TEST(corrupt(bomb, {.max_bytes = 1 << 20}));
    BOOST_TEST(corrupt(bomb, {.max_ratio = 100}));
}

BOOST_AUTO_TEST_CASE(reading_ahead) {
    const std::string data = sample(3'000'000);
    hasher h;
    std::uint64_t size = 0;
    BOOST_TEST((read_everything(read_ahead(hashed(read_from(bytes_of(data)), h, &size), 64 << 10, 2), 1000) == data));
    BOOST_TEST((h.finish() == digest::of(data)));
    BOOST_TEST(size == data.size());
    int calls = 0;
    const auto failing = read_ahead(
        [&](std::span<std::byte> into) -> std::size_t {
            if (++calls > 3) throw error{errc::unavailable, "gone"};
            return into.size();
        },
        1000, 2);
    BOOST_CHECK_EXCEPTION(read_everything(failing), error, [](const error& e) { return e.kind() == errc::unavailable; });
    // Dropped while the thread waits for room.
    {
        const auto endless = read_ahead([](std::span<std::byte> into) { return into.size(); }, 1000, 2);
    }
}

BOOST_AUTO_TEST_SUITE_END()

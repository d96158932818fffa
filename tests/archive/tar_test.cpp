#include "support/support.hpp"

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

import cobuild.base;
import cobuild.fs;
import cobuild.archive;

using namespace cobuild;
using namespace cobuild::test;
using namespace cobuild::archive;

namespace {
std::string tar_of(const std::function<void(tar_writer&)>& fill) {
    std::string out;
    tar_writer w{[&](std::span<const std::byte> b) { out += text_of(b); }};
    fill(w);
    w.finish();
    return out;
}
tar_entry file(std::string path, std::string_view body) {
    tar_entry e;
    e.path = std::move(path);
    e.mode = 0644;
    e.size = body.size();
    return e;
}
std::vector<std::pair<tar_entry, std::string>> read_tar(std::string_view text, tar_limits limits = {}) {
    tar_reader r{read_from(bytes_of(text)), limits};
    std::vector<std::pair<tar_entry, std::string>> out;
    for (tar_entry e; r.next(e);) {
        std::string body;
        for (auto p = r.data(); !p.empty(); p = r.data()) body += text_of(p);
        out.emplace_back(e, body);
    }
    return out;
}
errc failure(std::string_view text, tar_limits limits = {}) {
    try {
        read_tar(text, limits);
    } catch (const error& e) {
        return e.kind();
    }
    return errc::internal;
}
}  // namespace

BOOST_AUTO_TEST_SUITE(tar)

// Field by field what Go's archive/tar writes for this header in its PAX format.
BOOST_AUTO_TEST_CASE(a_plain_header) {
    tar_entry e = file("dir/name", "hello");
    e.uid = 1000;
    e.gid = 100;
    e.mtime = {1700000000, 999};
    const std::string t = tar_of([&](tar_writer& w) { w.add(e, bytes_of("hello")); });
    BOOST_TEST(t.size() == 512U + 512 + 1024);
    BOOST_TEST(t.substr(0, 9) == std::string("dir/name\0", 9));
    BOOST_TEST(t.substr(100, 48) == std::string("0000644\0"
                                                "0001750\0"
                                                "0000144\0"
                                                "00000000005\0"
                                                "14524770400\0",
                                                48));
    BOOST_TEST(t.substr(156, 1) == "0");
    BOOST_TEST(t.substr(257, 8) == std::string("ustar\0"
                                               "00",
                                               8));
    BOOST_TEST(t.substr(265, 64) == std::string(64, '\0'));
    BOOST_TEST(t.substr(329, 16) == std::string("0000000\0"
                                                "0000000\0",
                                                16));
    BOOST_TEST(t.substr(512, 5) == "hello");
    BOOST_TEST(t.substr(517) == std::string(507 + 1024, '\0'));
    unsigned sum = 8 * ' ';
    for (std::size_t i = 0; i < 512; ++i)
        if (i < 148 || i >= 156) sum += static_cast<unsigned char>(t[i]);
    BOOST_TEST(std::strtoul(t.substr(148, 6).c_str(), nullptr, 8) == sum);
    BOOST_TEST(t.substr(154, 2) == std::string("\0 ", 2));
}

// O-FS-18: long names go into an extended header, never into the prefix field.
BOOST_AUTO_TEST_CASE(extended_headers) {
    tar_entry e = file("d/" + std::string(200, 'n') + "/\xc3\xa9", "");
    e.uid = 3'000'000;
    e.mtime.seconds = -5;
    e.xattrs.emplace_back("security.capability", std::string("\x01\0\n=", 4));
    const std::string t = tar_of([&](tar_writer& w) { w.add(e); });
    BOOST_TEST(t.substr(156, 1) == "x");
    BOOST_TEST(t.substr(0, 100) == ("d/" + std::string(98, 'n')));
    const std::string expected = std::string("44 SCHILY.xattr.security.capability=") + std::string("\x01\0\n=", 4) + "\n" + "12 mtime=-5\n" +
                                 "215 path=" + e.path + "\n" + "15 uid=3000000\n";
    // 44 would be wrong by its own length: the number counts itself.
    const std::string fixed = "41" + expected.substr(2);
    BOOST_TEST((t.substr(512, fixed.size()) == fixed));
    const std::size_t main = 512 + 512;
    BOOST_TEST(t.substr(main, 100) == ("d/" + std::string(98, 'n')));
    BOOST_TEST(t.substr(main + 108, 8) == std::string("0000000\0", 8));
    BOOST_TEST(t.substr(main + 345, 155) == std::string(155, '\0'));
    const auto back = read_tar(t);
    BOOST_TEST(back.size() == 1U);
    BOOST_TEST(back[0].first.path == e.path);
    BOOST_TEST(back[0].first.uid == e.uid);
    BOOST_TEST(back[0].first.mtime.seconds == -5);
    BOOST_TEST((back[0].first.xattrs == e.xattrs));
}

BOOST_AUTO_TEST_CASE(directories_and_whiteouts) {
    const std::string longer = std::string(80, 'a') + "/" + std::string(60, 'b');
    const std::string t = tar_of([&](tar_writer& w) {
        tar_entry d = file(std::string(120, 'd') + "/", "");
        d.type = entry_type::directory;
        w.add(d);
        w.whiteout("etc/gone");
        w.whiteout(longer);
    });
    BOOST_TEST(t.substr(0, 100) == std::string(100, 'd'));  // "<120 d>/PaxHeaders.0", cut
    const std::size_t white = 512 * 3;
    BOOST_TEST(t.substr(white, 13) == std::string("etc/.wh.gone\0", 13));
    BOOST_TEST(t.substr(white + 100, 48) == std::string("0000000\0"
                                                        "0000000\0"
                                                        "0000000\0"
                                                        "00000000000\0"
                                                        "00000000000\0",
                                                        48));
    const std::size_t second = white + 512;
    BOOST_TEST(t.substr(second, 65) == (".wh." + std::string(60, 'b') + std::string(1, '\0')));
    BOOST_TEST(t.substr(second + 345, 81) == (std::string(80, 'a') + std::string(1, '\0')));
    const auto back = read_tar(t);
    BOOST_TEST(back[0].first.path == std::string(120, 'd') + "/");
    BOOST_TEST(back[2].first.path == std::string(80, 'a') + "/.wh." + std::string(60, 'b'));
}

// O-FS-14: one header with several MB of attributes is written and read again. (Basis J; over the wire the daemon cuts a tar into frames.)
BOOST_AUTO_TEST_CASE(megabytes_of_attributes) {
    auto e = file("f", "");
    for (int i = 0; i < 80; ++i) e.xattrs.emplace_back(cat("user.", 100 + i), std::string(65536, static_cast<char>('a' + i % 26)));
    const auto all = read_tar(tar_of([&](tar_writer& w) { w.add(e); }));
    BOOST_REQUIRE(all.size() == 1U);
    BOOST_TEST((all[0].first.xattrs == e.xattrs));
}

// O-FS-13: 8 GiB and one byte less, both as holes.
BOOST_AUTO_TEST_CASE(sizes_around_8_gib) {
    for (const std::uint64_t size : {(std::uint64_t{1} << 33) - 1, std::uint64_t{1} << 33}) {
        std::string head;
        std::uint64_t total = 0;
        tar_writer w{[&](std::span<const std::byte> b) {
            if (head.size() < 2048) head += text_of(b);
            total += b.size();
        }};
        tar_entry e = file("big", "");
        e.size = size;
        w.add(e);
        w.write_zeros(size);
        w.finish();
        const bool large = size >> 33 != 0;
        BOOST_TEST(total == (large ? 1024U : 0U) + 512U + (std::uint64_t{1} << 33) + 1024U);
        if (large) BOOST_TEST(head.substr(512, 19) == "19 size=8589934592\n");
        tar_reader r{read_from(bytes_of(head))};
        BOOST_TEST(r.next(e));
        BOOST_TEST(e.size == size);
    }
}

BOOST_AUTO_TEST_CASE(gnu_tar_and_python_agree) {
    scratch_dir d;
    const std::string deep = std::string(200, 'x') + "/" + std::string(200, 'y') + "/" + std::string(200, 'z');
    const std::string t = tar_of([&](tar_writer& w) {
        w.add(file("plain", "one"), bytes_of("one"));
        w.add(file(deep, "two"), bytes_of("two"));
        tar_entry link = file("link", "");
        link.type = entry_type::symlink;
        link.link = std::string(300, 'l');
        w.add(link);
    });
    write_file(d / "t.tar", t);
    const std::string in = cat("cd ", d.path().string(), " && ");
    BOOST_TEST(std::system(cat(in, "mkdir out && tar -C out -xf t.tar && [ $(readlink out/link | wc -c) = 301 ]").c_str()) == 0);
    BOOST_TEST(read_file(d.path() / "out" / deep) == "two");
    BOOST_TEST(std::system(cat(in,
                               "python3 -c \"import tarfile; t=tarfile.open('t.tar'); assert [len(m.name) for m in t]==[5,602,4]; "
                               "assert t.extractfile(t.getmembers()[1]).read()==b'two'\"")
                               .c_str()) == 0);
    for (const char* format : {"gnu", "pax", "ustar --exclude=xxx* --exclude=link", "v7 --exclude=xxx* --exclude=link"}) {
        BOOST_REQUIRE(std::system(cat(in, "tar -C out --sort=name --format=", format, " -cf g.tar .").c_str()) == 0);
        const auto back = read_tar(read_file(d / "g.tar"));
        const bool all = back.size() == 6;
        BOOST_TEST((all || back.size() == 2U), format << back.size());
        BOOST_TEST(back[all ? 2 : 1].first.path == "./plain");
        BOOST_TEST(back[all ? 2 : 1].second == "one");
        if (!all) continue;
        BOOST_TEST(back[1].first.link == std::string(300, 'l'));
        BOOST_TEST(back[5].first.path == "./" + deep);
        BOOST_TEST(back[5].second == "two");
    }
}

BOOST_AUTO_TEST_CASE(python_writes_numbers_in_base_256) {
    scratch_dir d;
    const std::string script =
        cat("cd ", d.path().string(),
            " && python3 -c \"\nimport tarfile,io\n"
            "t=tarfile.open('t.tar','w',format=tarfile.GNU_FORMAT)\ni=tarfile.TarInfo('a'); i.uid=5000000; i.mtime=-3; t.addfile(i)\nt.close()\n"
            "t=tarfile.open('p.tar','w',format=tarfile.PAX_FORMAT,pax_headers={'comment':'g'})\ni=tarfile.TarInfo('b'); i.mtime=1.5; i.size=3\n"
            "i.pax_headers={'SCHILY.xattr.user.k':'v'}; t.addfile(i,io.BytesIO(b'xyz')); t.close()\"");
    BOOST_REQUIRE(std::system(script.c_str()) == 0);
    const auto gnu = read_tar(read_file(d / "t.tar"));
    BOOST_TEST(gnu[0].first.uid == 5'000'000U);
    BOOST_TEST(gnu[0].first.mtime.seconds == -3);
    const auto pax = read_tar(read_file(d / "p.tar"));
    BOOST_TEST(pax.size() == 1U);
    BOOST_TEST((pax[0].first.mtime == fs::file_time{1, 500'000'000}));
    BOOST_TEST(pax[0].first.xattrs[0].second == "v");
    BOOST_TEST(pax[0].second == "xyz");
}

BOOST_AUTO_TEST_CASE(hostile_input) {
    const std::string good = tar_of([](tar_writer& w) { w.add(file("f", "body"), bytes_of("body")); });
    BOOST_TEST((failure(good.substr(0, 300)) == errc::corrupt));
    BOOST_TEST((failure(good.substr(0, 514)) == errc::corrupt));
    BOOST_TEST(read_tar(good.substr(0, 1024)).size() == 1U);  // no end mark
    std::string bad = good;
    bad[3] = 'x';
    BOOST_TEST((failure(bad) == errc::corrupt));
    BOOST_TEST((failure(good, {.max_entries = 0}) == errc::corrupt));
    tar_entry e = file(std::string(3000, 'p'), "");
    const std::string long_path = tar_of([&](tar_writer& w) { w.add(e); });
    BOOST_TEST((failure(long_path, {.max_header_bytes = 2000}) == errc::corrupt));
    BOOST_TEST((failure(long_path, {.max_path_bytes = 2000}) == errc::corrupt));
    BOOST_TEST((failure(std::string(512, '\0') + good) == errc::corrupt));
    BOOST_TEST(read_tar(std::string(1024, '\0')).empty());
    BOOST_TEST(read_tar("").empty());
    // Extended headers whose lengths lie.
    for (const std::string record :
         {"99 path=x\n", "0 path=x\n", "9 path=x", "7 path\n", "x path=x\n", "18446744073709551615 path=x\n", "17 path=a", "12 size=-1\n\n\n"}) {
        std::string text = tar_of([&](tar_writer& w) { w.add(file("h", record), bytes_of(record)); });
        text[156] = 'x';
        unsigned sum = 8 * ' ';
        for (std::size_t i = 0; i < 512; ++i)
            if (i < 148 || i >= 156) sum += static_cast<unsigned char>(text[i]);
        char digits[8];
        std::snprintf(digits, sizeof digits, "%06o", sum);
        text.replace(148, 6, digits);
        BOOST_TEST((failure(text + good) == errc::corrupt), record);
    }
    scratch_dir d;
    BOOST_REQUIRE(std::system(cat("cd ", d.path().string(),
                                  " && truncate -s 10M s && echo x >> s && tar -S --format=gnu -cf g.tar s && tar -S --format=pax -cf p.tar s")
                                  .c_str()) == 0);
    BOOST_TEST((failure(read_file(d / "g.tar")) == errc::unsupported));
    BOOST_TEST((failure(read_file(d / "p.tar")) == errc::unsupported));
}

BOOST_AUTO_TEST_CASE(the_writer_counts) {
    tar_writer w{[](std::span<const std::byte>) {}};
    w.add(file("f", "12345"));
    w.write(bytes_of("123"));
    BOOST_CHECK_THROW(w.add(file("g", "")), error);
    BOOST_CHECK_THROW(w.write(bytes_of("456")), error);
}

BOOST_AUTO_TEST_SUITE_END()

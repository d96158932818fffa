#include "support/support.hpp"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

import cobuild.base;
import cobuild.fs;
import cobuild.archive;

#include "layers.hpp"

using namespace layers;
using namespace cobuild::test;
using texts = std::vector<std::string>;

namespace {
/// A lower layer and an upper directory written by the kernel's overlayfs, in a mount namespace that ends with the shell.
struct overlay {
    scratch_dir d;
    unique_fd lower = open_dir(d / "lower");
    unique_fd upper = open_dir(d / "upper");
    bool run(const texts& entries, const std::string& script) {
        unpack(tar(entries), lower.get());
        open_dir(d / "work");
        open_dir(d / "m");
        write_file(d / "script", "set -e\ncd " + d.path().string() +
                                     "\nmount -t overlay -o "
                                     "redirect_dir=off,metacopy=off,index=off,xino=off,lowerdir=lower,upperdir=upper,workdir=work overlay m\ncd m\n" +
                                     script + "\n");
        return std::system(cat("unshare -m sh ", (d / "script").string()).c_str()) == 0;
    }
    std::string layer(const diff_options& o = {}) { return diff(upper.get(), {lower.get()}, o); }
};

std::map<std::string, std::string> content(int dirfd) {
    std::map<std::string, std::string> out;
    fs::walk(dirfd, [&](const fs::walk_entry& e) {
        std::string what = cat(e.info.mode, " ", e.info.uid, " ", e.info.is_dir() ? 0 : e.info.nlink);
        if (e.info.is_file()) what += fs::read_all(unique_fd{::openat(e.dir_fd, std::string(e.name).c_str(), O_RDONLY | O_CLOEXEC)}.get(), 1 << 20);
        if (e.info.is_link()) what += fs::read_link_at(e.dir_fd, e.name);
        out[std::string(e.path)] = what;
        return fs::walk_step::go_on;
    });
    return out;
}
}  // namespace

BOOST_AUTO_TEST_SUITE(diffing)

BOOST_AUTO_TEST_CASE(parents_order_and_unchanged_directories) {
    if (!needs_root()) return;
    overlay o;
    BOOST_REQUIRE(o.run({"d etc/", "f etc/passwd x", "d usr/", "d usr/lib/", "f usr/lib/a 1"},
                        "echo new > usr/lib/b; rm etc/passwd; mkdir -p z/y; echo 1 > z/y/x; echo 2 > z-a; chmod 700 usr/lib/a; chmod 644 usr/lib/a; "
                        "touch -d @1000 usr/lib/a"));
    BOOST_TEST(names(o.layer()) == (texts{"etc/", "etc/.wh.passwd", "usr/", "usr/lib/", "usr/lib/b", "z/", "z/y/", "z/y/x", "z-a"}),
               boost::test_tools::per_element());
    BOOST_TEST(o.layer() == o.layer());
}

// O-FS-06 and O-FS-04: deleted; deleted and made again empty; with a new file.
BOOST_AUTO_TEST_CASE(recreated_directories) {
    if (!needs_root()) return;
    const texts lower{"d d/", "f d/a 1", "f d/b 2", "d d/sub/", "f d/sub/x 3", "f d/z 4"};
    overlay gone;
    BOOST_REQUIRE(gone.run(lower, "rm -r d"));
    BOOST_TEST(names(gone.layer()) == (texts{".wh.d"}), boost::test_tools::per_element());
    overlay empty;
    BOOST_REQUIRE(empty.run(lower, "rm -r d; mkdir d"));
    BOOST_TEST(names(empty.layer()) == (texts{"d/", "d/.wh.a", "d/.wh.b", "d/.wh.sub", "d/.wh.z"}), boost::test_tools::per_element());
    overlay fresh;
    BOOST_REQUIRE(fresh.run(lower, "rm -r d; mkdir -p d/sub; echo new > d/b; echo new > d/sub/y; echo new > d/new"));
    BOOST_TEST(names(fresh.layer()) == (texts{"d/", "d/.wh.a", "d/b", "d/new", "d/sub/", "d/sub/.wh.x", "d/sub/y", "d/.wh.z"}),
               boost::test_tools::per_element());
    overlay file;
    BOOST_REQUIRE(file.run(lower, "rm -r d; echo now > d"));
    BOOST_TEST(names(file.layer()) == (texts{"d"}), boost::test_tools::per_element());
}

// O-FS-05: inside a user namespace overlayfs marks with user.overlay.*; such a directory is opaque just so.
BOOST_AUTO_TEST_CASE(recreated_directories_of_a_user_namespace) {
    if (!needs_root()) return;
    scratch_dir d;
    const auto lower = open_dir(d / "lower"), upper = open_dir(d / "upper");
    unpack(tar({"d d/", "f d/old 1", "f d/gone 2"}), lower.get());
    write_file(d / "upper/d/old", "new");
    BOOST_REQUIRE(fs::set_xattr(upper.get(), "d", "user.overlay.opaque", "y"));
    const auto layer = diff(upper.get(), {lower.get()}, {});
    BOOST_TEST(names(layer) == (texts{"d/", "d/.wh.gone", "d/old"}), boost::test_tools::per_element());
    BOOST_TEST(layer.find("user.overlay") == std::string::npos);
}

// The kernel marks every new directory in a merged parent opaque; where nothing is below, that says nothing.
BOOST_AUTO_TEST_CASE(new_directories_and_needless_whiteouts) {
    if (!needs_root()) return;
    overlay o;
    BOOST_REQUIRE(o.run({"d a/", "f x 1"}, "mkdir a/new; echo 1 > a/new/f; echo 1 > tmp; rm tmp; mkdir x2; rmdir x2"));
    BOOST_REQUIRE(::mknodat(o.upper.get(), "stray", S_IFCHR | 0600, 0) == 0);
    BOOST_TEST(names(o.layer()) == (texts{"a/", "a/new/", "a/new/f"}), boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(entries_and_their_headers) {
    if (!needs_root()) return;
    scratch_dir d;
    const auto upper = open_dir(d / "u");
    const fs::root r{upper.duplicate()};
    write_file(d / "u/file", "text");
    r.chown("file", {3'000'000, 7});
    r.chmod("file", 04711);
    r.set_mtime("file", {5000, 999'999'999});
    fs::set_xattr(upper.get(), "file", "security.capability", std::string("\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 20));
    fs::set_xattr(upper.get(), "file", "user.other", "x");
    std::filesystem::create_hard_link(d / "u/file", d / "u/second");
    r.make_link("link", "some/where", {1, 2});
    ::mknodat(upper.get(), "dev", S_IFBLK | 0660, makedev(8, 17));
    ::mkfifo((d / "u/fifo").c_str(), 0600);
    const unique_fd s{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::snprintf(address.sun_path, sizeof address.sun_path, "%s", (d / "u/sock").c_str());
    BOOST_REQUIRE(::bind(s.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
    const auto all = read_tar(diff(upper.get(), {}, {.clamp_mtime = 4000}));
    BOOST_REQUIRE(all.size() == 5U);
    BOOST_TEST(all[0].entry.path == "dev");
    BOOST_TEST(all[0].entry.dev_minor == 17U);
    BOOST_TEST((all[1].entry.type == entry_type::fifo));
    const auto& f = all[2];
    BOOST_TEST(f.body == "text");
    BOOST_TEST(f.entry.mode == 04711U);
    BOOST_TEST(f.entry.uid == 3'000'000U);
    BOOST_TEST((f.entry.mtime == fs::file_time{4000, 0}));
    BOOST_TEST(f.entry.xattrs.size() == 1U);
    BOOST_TEST(f.entry.xattrs[0].first == "security.capability");
    BOOST_TEST(all[3].entry.link == "some/where");
    BOOST_TEST((all[4].entry.type == entry_type::hard_link));
    BOOST_TEST(all[4].entry.link == "file");
}

BOOST_AUTO_TEST_CASE(a_redirected_directory_is_refused) {
    if (!needs_root()) return;
    scratch_dir d;
    const auto upper = open_dir(d / "u");
    open_dir(d / "u/moved");
    fs::set_xattr(upper.get(), "moved", "trusted.overlay.redirect", "/old");
    BOOST_CHECK_EXCEPTION(diff(upper.get(), {}), error, [](const error& e) { return e.kind() == errc::unsupported; });
}

// O-FS-17, smaller: a hole costs neither reading nor disk, and comes back as one.
BOOST_AUTO_TEST_CASE(round_trip_of_a_large_sparse_file) {
    if (!needs_root()) return;
    scratch_dir d;
    const auto upper = open_dir(d / "u");
    const unique_fd f{::openat(upper.get(), "lastlog", O_CREAT | O_RDWR | O_CLOEXEC, 0644)};
    BOOST_REQUIRE(::ftruncate(f.get(), std::int64_t{300} << 20) == 0);
    BOOST_REQUIRE(::pwrite(f.get(), "end", 3, (std::int64_t{300} << 20) - 3) == 3);
    const std::string packed = [&] {
        std::string out;
        blob_writer blob{[&](std::span<const std::byte> b) { out += text_of(b); }, {}};
        tar_writer w{blob.sink()};
        lower_chain none;
        diff_layer(upper.get(), none, w);
        blob.finish();
        return out;
    }();
    BOOST_TEST(packed.size() < 2'000'000U);
    const auto again = open_dir(d / "again");
    apply_layer(decompress_auto(read_from(bytes_of(packed))), again.get());
    const auto info = fs::stat_at(again.get(), "lastlog");
    BOOST_TEST(info->size == std::uint64_t{300} << 20);
    BOOST_TEST(info->blocks < 1024U);
}

BOOST_AUTO_TEST_CASE(what_the_kernel_shows_is_what_the_layer_gives) {
    if (!needs_root()) return;
    overlay o;
    const texts lower{"d d/", "f d/a 1", "d d/e/", "f d/e/f 2", "l d/l a", "d k/", "f k/x 1", "f k/y 2", "f top t"};
    BOOST_REQUIRE(o.run(lower,
                        "rm d/a; echo n > d/n; rm -r k; mkdir k; echo z > k/z; echo h > h1; ln h1 h2; chown 5 d/e/f; mv d/l d/m; cp -a m/. ../merged "
                        "2>/dev/null || cp -a . ../merged"));
    const auto again = open_dir(o.d / "again");
    unpack(o.layer(), again.get());
    const auto merged = open_dir(o.d / "merged");
    // The layer, unpacked and stacked anew by the kernel, must look the same.
    write_file(o.d / "script2", "set -e\ncd " + o.d.path().string() + "\nmount -t overlay -o lowerdir=again:lower overlay m\ncp -a m/. second\n");
    BOOST_REQUIRE(std::system(cat("unshare -m sh ", (o.d / "script2").string()).c_str()) == 0);
    const auto second = open_dir(o.d / "second");
    auto want = content(merged.get());
    auto have = content(second.get());
    BOOST_TEST(want.size() > 8U);
    for (const auto& [path, what] : want) BOOST_TEST((have[path] == what), path << ": " << have[path] << " instead of " << what);
    BOOST_TEST(have.size() == want.size());
}

BOOST_AUTO_TEST_CASE(a_chain_is_read_as_the_kernel_merges_it) {
    if (!needs_root()) return;
    scratch_dir d;
    const auto bottom = open_dir(d / "0"), middle = open_dir(d / "1"), top = open_dir(d / "2");
    unpack(tar({"d a/", "f a/x 0", "f a/y 0", "d o/", "f o/old 0", "l s a", "f f 0"}), bottom.get());
    unpack(tar({"d a/", "f a/.wh.x", "d o/", "f o/.wh..wh..opq", "f o/new 1", "f .wh.f", "l t /s/../s"}), middle.get());
    unpack(tar({"d a/", "f a/z 2"}), top.get());
    lower_chain c{{top.get(), middle.get(), bottom.get()}};
    BOOST_TEST(!c.find("a/x").has_value());
    BOOST_TEST(c.find("a/y")->layer_fd == bottom.get());
    BOOST_TEST(c.find("a")->layer_fd == top.get());
    BOOST_TEST(!c.find("f").has_value());
    BOOST_TEST(!c.find("o/old").has_value());
    BOOST_TEST(!c.find("s/y").has_value());
    BOOST_TEST(c.list("a") == (texts{"y", "z"}), boost::test_tools::per_element());
    BOOST_TEST(c.list("") == (texts{"a", "o", "s", "t"}), boost::test_tools::per_element());
    BOOST_TEST(c.resolve("/t/y") == "a/y");
    BOOST_TEST(c.resolve("no/../t/such/name") == "a/such/name");
}

BOOST_AUTO_TEST_SUITE_END()

#include "support/support.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <functional>
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
struct layer {
    scratch_dir d;
    unique_fd dir = open_dir(d / "layer");
    fs::root root{dir.duplicate()};
    apply_result put(const texts& entries, const extract_options& o = {}) { return unpack(tar(entries), dir.get(), o); }
    std::string read(std::string_view path) { return root.read_file(path, 1 << 20); }
    bool opaque(std::string_view path) { return root.get_xattr(path, "trusted.overlay.opaque") == "y"; }
    bool whiteout(std::string_view path) {
        const auto s = root.stat(path);
        return s && s->is_whiteout();
    }
};
errc failure(layer& l, const texts& entries) {
    try {
        l.put(entries);
    } catch (const error& e) {
        return e.kind();
    }
    return errc::internal;
}
}  // namespace

BOOST_AUTO_TEST_SUITE(applying)

BOOST_AUTO_TEST_CASE(attributes) {
    if (!needs_root()) return;
    layer l;
    std::string text;
    tar_writer w{[&](std::span<const std::byte> b) { text += text_of(b); }};
    const auto add = [&](entry_type type, const char* path, std::uint32_t mode, std::uint32_t uid, const char* link = "") {
        tar_entry e;
        e.type = type;
        e.path = path;
        e.link = link;
        e.mode = mode;
        e.uid = uid;
        e.gid = uid + 1;
        e.mtime = {1000 + uid, 0};
        e.dev_major = 1;
        e.dev_minor = 3;
        if (type == entry_type::file) e.xattrs.emplace_back("security.capability", std::string("\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 20));
        e.xattrs.emplace_back("trusted.overlay.redirect", "/etc");
        w.add(e);
    };
    add(entry_type::directory, "./", 01750, 1);
    add(entry_type::directory, "d/", 02777, 2);
    add(entry_type::file, "d/suid", 06755, 3);
    add(entry_type::symlink, "d/link", 0777, 4, "../../nowhere");
    add(entry_type::char_device, "d/null", 0666, 5);
    add(entry_type::fifo, "d/fifo", 0622, 6);
    add(entry_type::hard_link, "d/again", 0, 0, "/d/suid");
    w.finish();
    const auto result = unpack(text, l.dir.get());
    BOOST_TEST(result.self_contained());
    BOOST_TEST(result.entries == 7U);
    const auto check = [&](const char* path, std::uint32_t mode, std::uint32_t uid) {
        const auto s = l.root.stat(path);
        BOOST_TEST(s->uid == uid, path);
        BOOST_TEST(s->gid == uid + 1, path);
        BOOST_TEST(s->mtime.seconds == 1000 + uid, path);
        if (!s->is_link()) BOOST_TEST(s->permissions() == mode, path << s->permissions());
        BOOST_TEST(!l.root.get_xattr(path, "trusted.overlay.redirect").has_value());
    };
    check("", 01750, 1);
    check("d", 02777, 2);
    check("d/suid", 06755, 3);
    check("d/link", 0, 4);
    check("d/null", 0666, 5);
    check("d/fifo", 0622, 6);
    check("d/again", 06755, 3);
    BOOST_TEST(l.root.stat("d/null")->rdev_minor == 3U);
    BOOST_TEST(l.root.get_xattr("d/suid", "security.capability")->size() == 20U);
    BOOST_TEST(l.root.stat("d/again")->inode == l.root.stat("d/suid")->inode);
}

BOOST_AUTO_TEST_CASE(whiteouts_and_opaque_directories) {
    if (!needs_root()) return;
    layer l;
    const auto r = l.put({"d a/", "f a/.wh.gone", "d b/", "f b/.wh..wh..opq", "f b/new x", "f .wh.top", "f .wh..wh.plnk", "d c/", "f c/x 1",
                          "f .wh.c", "f c/.wh.x", "f .wh.e", "d e/", "f .wh.i", "f i/x 2"});
    BOOST_TEST(l.whiteout("a/gone"));
    BOOST_TEST(!l.opaque("a"));
    BOOST_TEST(l.opaque("b"));
    BOOST_TEST(!l.root.stat("b/.wh..wh..opq").has_value());
    BOOST_TEST(l.read("b/new") == "x");
    BOOST_TEST(l.whiteout("top"));
    // image-spec: a whiteout never hides what its own layer holds.
    BOOST_TEST(l.read("c/x") == "1");
    BOOST_TEST(l.opaque("c"));
    BOOST_TEST(l.opaque("e"));
    BOOST_TEST(l.opaque("i"));
    BOOST_TEST(l.read("i/x") == "2");
    BOOST_TEST(!r.opaque_root);
    layer top;
    BOOST_TEST(top.put({"f .wh..wh..opq"}).opaque_root);
    layer bad;
    BOOST_TEST((failure(bad, {"f a/.wh."}) == errc::corrupt));
    BOOST_TEST((failure(bad, {"f a/.wh..."}) == errc::corrupt));
}

BOOST_AUTO_TEST_CASE(nothing_escapes) {
    layer l;
    write_file(l.d / "victim", "safe");
    l.put({"f ../../victim evil", "f /abs 1", "l out " + l.d.path().string(), "f out/victim evil", "l up ../../..", "f up/x 2", "l self ../victim",
           "f self replaced", "d dir/", "l dir/in ../..", "f dir/in/y 3", "f a/../../b 4"});
    BOOST_TEST(read_file(l.d / "victim") == "safe");
    BOOST_TEST(l.read("victim") == "evil");
    BOOST_TEST(l.read("abs") == "1");
    BOOST_TEST(l.read("x") == "2");
    BOOST_TEST(l.read("y") == "3");
    BOOST_TEST(l.read("b") == "4");
    BOOST_TEST(l.read("self") == "replaced");
    BOOST_TEST(l.read(l.d.path().string() + "/victim") == "evil");
    const auto r = l.put({"h hard ../../../../../etc/passwd", "h hard2 " + (l.d / "none").string()});
    BOOST_TEST(r.pending_links.size() == 2U);
    BOOST_TEST(r.pending_links[0].target == "etc/passwd");
    layer bad;
    BOOST_TEST((failure(bad, {"f a 1", "f a/b 2"}) == errc::corrupt || failure(bad, {"f a 1", "f a/b 2"}) == errc::io));
    BOOST_TEST((failure(bad, {"d d/", "h x d"}) == errc::corrupt));
    BOOST_TEST((failure(bad, {"f . x"}) == errc::corrupt));
}

BOOST_AUTO_TEST_CASE(later_entries_replace_earlier_ones) {
    layer l;
    l.put({"f a 1", "f a 2", "d b/", "f b/x 1", "f b now-a-file", "f c 1", "d c/", "f c/y 2", "l s c", "f s/z 3", "l s b", "d t/", "f t/q 1", "l t c",
           "f t/r 9"});
    BOOST_TEST(l.read("a") == "2");
    BOOST_TEST(l.read("b") == "now-a-file");
    BOOST_TEST(l.read("c/y") == "2");
    BOOST_TEST(l.read("c/z") == "3");
    BOOST_TEST(l.root.read_link("s") == "b");
    BOOST_TEST(l.read("c/r") == "9");
}

BOOST_AUTO_TEST_CASE(holes) {
    layer l;
    std::string body(std::size_t{8} << 20, '\0');
    body[3'000'000] = 'x';
    std::string text;
    tar_writer w{[&](std::span<const std::byte> b) { text += text_of(b); }};
    tar_entry e;
    e.path = "sparse";
    e.size = body.size();
    e.mode = 0600;
    w.add(e, bytes_of(body));
    w.finish();
    unpack(text, l.dir.get());
    BOOST_TEST((l.root.read_file("sparse", 10 << 20) == body));
    BOOST_TEST(l.root.stat("sparse")->blocks * 512 <= 3 * 65536U);
}

// A layer that leans on what is below: owners of parents it does not list, a link target, a parent that is a link (O-SL-07).
BOOST_AUTO_TEST_CASE(finishing) {
    if (!needs_root()) return;
    layer lower;
    layer below;
    lower.put({"d home/", "d home/u/", "f home/u/tool binary", "d usr/", "d usr/lib/", "l lib usr/lib", "f gone 1"});
    below.put({"f .wh.gone"});
    lower.root.chown("home/u", {1000, 1001});
    lower.root.chmod("home/u", 02750);
    lower.root.set_mtime("home/u", {77, 0});
    lower.root.chown("home/u/tool", {5, 6});
    layer l;
    const auto r = l.put({"f home/u/new x", "h home/u/tool2 home/u/tool", "f lib/so 1", "f fresh/dir/x 2", "d mine/", "h mine/t lib/so"});
    BOOST_TEST(r.implied_parents == (texts{"fresh", "fresh/dir", "home", "home/u", "lib"}), boost::test_tools::per_element());
    BOOST_TEST(r.pending_links.size() == 1U);
    lower_chain chain{{below.dir.get(), lower.dir.get()}};
    finish_layer(l.dir.get(), chain, r);
    const auto home = l.root.stat("home/u");
    BOOST_TEST(home->uid == 1000U);
    BOOST_TEST(home->permissions() == 02750U);
    BOOST_TEST(home->mtime.seconds == 77);
    BOOST_TEST(l.root.stat("home/u/tool")->uid == 5U);
    BOOST_TEST(l.root.stat("home/u/tool")->inode == l.root.stat("home/u/tool2")->inode);
    BOOST_TEST(l.read("home/u/tool2") == "binary");
    BOOST_TEST(!l.root.stat("lib").has_value());
    BOOST_TEST(l.read("usr/lib/so") == "1");
    BOOST_TEST(l.root.stat("usr/lib/so")->nlink == 2U);
    BOOST_TEST(l.root.stat("usr")->mtime.seconds == 1000);
    BOOST_TEST(l.root.stat("fresh/dir")->permissions() == 0755U);
    BOOST_TEST(l.root.stat("mine")->mtime.seconds == 1000);
    layer dangling;
    const auto lost = dangling.put({"h x gone"});
    BOOST_CHECK_EXCEPTION(finish_layer(dangling.dir.get(), chain, lost), error, [](const error& e) { return e.kind() == errc::corrupt; });
}

BOOST_AUTO_TEST_CASE(plain_extraction_and_add_archives) {
    layer l;
    write_file(l.d / "layer/opt/old", "stays");
    std::filesystem::create_symlink("/opt", l.d / "layer/link");
    extract_options o;
    if (::geteuid() == 0) o.who = fs::owner{9, 9};
    const std::string text = tar({"f .wh.name x", "d sub/", "f sub/f 1", "h again sub/f"}, ::geteuid());
    extract_plain(read_from(bytes_of(text)), l.root, "/link", o);
    BOOST_TEST(l.read("opt/.wh.name") == "x");
    BOOST_TEST(l.read("opt/old") == "stays");
    BOOST_TEST(l.root.stat("opt/again")->nlink == 2U);
    if (o.who) BOOST_TEST(l.root.stat("opt/sub/f")->uid == 9U);
    scratch_dir d;
    write_file(d / "t.tar", text);
    write_file(d / "text", "only text, and a good deal more than one line of it\n");
    write_file(d / "empty", "");
    write_file(d / "zeros", std::string(2048, '\0'));
    const std::string in = cat("cd ", d.path().string(), " && ");
    BOOST_REQUIRE(
        std::system(
            cat(in, "gzip -k t.tar && bzip2 -k t.tar && xz -k t.tar && zstd -q t.tar && gzip -k text && python3 -m zipfile -c a.zip text").c_str()) ==
        0);
    for (const char* name : {"t.tar", "t.tar.gz", "t.tar.bz2", "t.tar.xz", "t.tar.zst"}) {
        const unique_fd fd{::open((d / name).c_str(), O_RDONLY | O_CLOEXEC)};
        BOOST_TEST(is_add_archive(fd.get()), name);
        layer fresh;
        extract_plain(open_add_archive(fd.get()), fresh.root, "/", o);
        BOOST_TEST(fresh.read("sub/f") == "1");
    }
    for (const char* name : {"text", "empty", "zeros", "text.gz", "a.zip"}) {
        const unique_fd fd{::open((d / name).c_str(), O_RDONLY | O_CLOEXEC)};
        BOOST_TEST(!is_add_archive(fd.get()), name);
        BOOST_TEST(::lseek(fd.get(), 0, SEEK_CUR) == 0);
    }
}

BOOST_AUTO_TEST_SUITE_END()

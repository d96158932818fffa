// Archives, directories and tars, read by other people's programs where they are here.
#include "exporter/world.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.fs;
import cobuild.archive;
import cobuild.state;
import cobuild.content;
import cobuild.snapshot;
import cobuild.oci;
import cobuild.json;
import cobuild.progress;
import cobuild.exporter;

#include "exporter/world_body.hpp"

namespace {

task<snapshot::chain> a_root(world& w) {
    auto c = co_await w.layer({}, [](const stdfs::path& p) {
        write_file(p / "bin/tool", "tool");
        ::chown((p / "bin/tool").c_str(), 12, 34);
        ::chmod((p / "bin/tool").c_str(), 04755);
        // O-EX-06: names of one file in several directories, the first of them in path order last made.
        for (int i = 0; i < 20; ++i) {
            stdfs::create_directories(p / cat("d", i));
            stdfs::create_hard_link(p / "bin/tool", p / cat("d", i, "/name"));
        }
        stdfs::create_hard_link(p / "bin/tool", p / "aaa");
        stdfs::create_symlink("bin/tool", p / "link");
        ::mkfifo((p / "fifo").c_str(), 0600);
        ::setxattr((p / "bin/tool").c_str(), "user.note", "n", 1, 0);
    });
    co_return co_await w.layer(c, [](const stdfs::path& p) {
        write_file(p / "top", "top");
        stdfs::remove(p / "fifo");
    });
}

struct stat at(const stdfs::path& p) {
    struct stat out{};
    BOOST_REQUIRE_MESSAGE(::lstat(p.c_str(), &out) == 0, p.string());
    return out;
}

void check_tree(const stdfs::path& out, unsigned uid, unsigned gid) {
    BOOST_TEST(read_file(out / "d7/name") == "tool");
    BOOST_TEST(at(out / "bin/tool").st_ino == at(out / "d7/name").st_ino);
    BOOST_TEST(at(out / "aaa").st_nlink == 22U);
    BOOST_TEST(at(out / "bin/tool").st_uid == uid);
    BOOST_TEST(at(out / "bin/tool").st_gid == gid);
    BOOST_TEST((at(out / "bin/tool").st_mode & 07777U) == 04755U);
    BOOST_TEST(stdfs::read_symlink(out / "link") == "bin/tool");
    BOOST_TEST(!stdfs::exists(out / "fifo"));
    BOOST_TEST(read_file(out / "top") == "top");
}

}  // namespace

BOOST_AUTO_TEST_SUITE(files)

WORLD_CASE(an_archive_that_others_read) {
    const auto image = co_await exporter::write_image(w.stores(), input_of(co_await a_root(w)), {}, {});
    const auto out = w.dir / "out";
    stdfs::create_directories(out);
    const std::vector<std::string> names{"docker.io/library/x:1", "example.org:5000/y/z:two"};
    for (const auto kind : {exporter::archive_kind::oci, exporter::archive_kind::docker}) {
        const bool docker = kind == exporter::archive_kind::docker;
        const auto file = w.dir / (docker ? "docker.tar" : "oci.tar");
        co_await exporter::write_archive(w.stores(), kind, exporter::as_exported(image), names, {.path = file.string()}, {});
        stdfs::remove_all(out);
        stdfs::create_directories(out);
        BOOST_REQUIRE(shell(cat("tar -C ", out.string(), " -xf ", file.string())));
        BOOST_TEST(json::string_at(json::parse(read_file(out / "oci-layout")).as_object(), "imageLayoutVersion") == "1.0.0");
        const auto index = oci::parse_index(read_file(out / "index.json"));
        BOOST_REQUIRE(index.manifests.size() == 2U);
        BOOST_TEST(index.manifests[0].annotations.at("io.containerd.image.name") == names[0]);
        BOOST_TEST(index.manifests[0].annotations.at("org.opencontainers.image.ref.name") == "1");
        BOOST_TEST(index.manifests[1].annotations.at("org.opencontainers.image.ref.name") == "two");
        for (const auto& e : stdfs::directory_iterator(out / "blobs/sha256")) {
            BOOST_TEST(digest::of(read_file(e.path())).hex() == e.path().filename().string());
            BOOST_TEST((at(e.path()).st_mode & 0777U) == 0444U);
        }
        BOOST_TEST(stdfs::exists(out / "manifest.json") == docker);
        if (docker) {
            const auto list = json::parse(read_file(out / "manifest.json")).as_array();
            BOOST_REQUIRE(list.size() == 1U);
            const auto& one = list[0].as_object();
            BOOST_TEST(json::strings_at(one, "RepoTags") == (std::vector<std::string>{"x:1", "example.org:5000/y/z:two"}),
                       boost::test_tools::per_element());
            BOOST_TEST(json::strings_at(one, "Layers").size() == 2U);
            for (const auto& l : json::strings_at(one, "Layers")) BOOST_TEST(stdfs::exists(out / l));
            BOOST_TEST(stdfs::exists(out / json::string_at(one, "Config")));
        }
        if (shell("command -v skopeo")) {
            const std::string source = docker ? cat("docker-archive:", file.string(), ":x:1") : cat("oci-archive:", file.string(), ":1");
            BOOST_TEST(shell(cat("skopeo --tmpdir ", w.dir.path().string(), " inspect ", source)), source);
        }
    }
    co_await exporter::write_archive(w.stores(), exporter::archive_kind::docker, exporter::as_exported(image), {},
                                     {.path = (w.dir / "bare.tar").string()}, {});
    BOOST_TEST(shell(cat("tar -C ", out.string(), " -xf ", (w.dir / "bare.tar").string())));
    BOOST_TEST(oci::parse_index(read_file(out / "index.json")).manifests.size() == 1U);
    const auto by_digest = cat("example.org/x@", image.manifest.digest.str());
    std::vector<std::string> digest_name{by_digest};
    co_await exporter::write_archive(w.stores(), exporter::archive_kind::oci, exporter::as_exported(image), digest_name,
                                     {.path = (w.dir / "bare.tar").string()}, {});
    BOOST_TEST(shell(cat("tar -C ", out.string(), " -xf ", (w.dir / "bare.tar").string())));
    BOOST_TEST(!oci::parse_index(read_file(out / "index.json")).manifests.at(0).annotations.contains("org.opencontainers.image.ref.name"));
}

WORLD_CASE(a_tar_of_the_files) {
    const auto root = co_await a_root(w);
    const auto file = w.dir / "root.tar", out = w.dir / "out";
    co_await exporter::write_tar(w.stores(), trees_of(input_of(root)), {.path = file.string()}, {});
    stdfs::create_directories(out);
    BOOST_REQUIRE(shell(cat("tar -C ", out.string(), " --xattrs --xattrs-include='*' -xpf ", file.string())));
    check_tree(out, 12, 34);
    char note[4] = {};
    BOOST_TEST(::getxattr((out / "bin/tool").c_str(), "user.note", note, sizeof note) == 1);
    co_await exporter::write_tar(w.stores(), trees_of(input_of(root, "", 5000)), {.path = file.string()}, {});
    const auto first = read_file(file);
    archive::tar_reader tar(archive::read_from(bytes_of(first)));
    archive::tar_entry e;
    while (tar.next(e)) BOOST_TEST(e.mtime.seconds == 5000, e.path);
    co_await exporter::write_tar(w.stores(), trees_of(input_of(root, "", 5000)), {.path = file.string()}, {});
    BOOST_TEST((read_file(file) == first));
}

WORLD_CASE(a_directory) {
    const auto root = co_await a_root(w);
    const auto out = w.dir / "deep/out";
    co_await exporter::write_directory(w.stores(), trees_of(input_of(root)), out.string(), false, {});
    check_tree(out, ::geteuid(), ::getegid());
    // What is there is merged: other files stay, those of the same name are replaced.
    write_file(out / "mine", "mine");
    write_file(out / "top", "older");
    ::chmod(out.c_str(), 0700);
    co_await exporter::write_directory(w.stores(), trees_of(input_of(root, "", 5000)), out.string(), false, {});
    check_tree(out, ::geteuid(), ::getegid());
    BOOST_TEST(read_file(out / "mine") == "mine");
    BOOST_TEST((at(out).st_mode & 0777U) == 0700U);
    BOOST_TEST(at(out / "top").st_mtim.tv_sec == 5000);
    stdfs::remove(out / "top");
    stdfs::create_directories(out / "top");
    const auto clash = co_await failure(exporter::write_directory(w.stores(), trees_of(input_of(root)), out.string(), false, {}));
    BOOST_TEST((clash && std::string_view(clash->what()).find("top") != std::string_view::npos));
    write_file(w.dir / "file", "x");
    BOOST_TEST(
        (co_await failure(exporter::write_directory(w.stores(), trees_of(input_of(root)), (w.dir / "file/sub").string(), false, {}))).has_value());
}

// A file appears whole or not at all; what is no file is written to, not replaced.
WORLD_CASE(destinations) {
    const auto root = co_await a_root(w);
    write_file(w.dir / "real.tar", "before");
    stdfs::create_symlink("real.tar", w.dir / "link.tar");
    co_await exporter::write_tar(w.stores(), trees_of(input_of(root)), {.path = (w.dir / "link.tar").string()}, {});
    BOOST_TEST(stdfs::is_symlink(w.dir / "link.tar"));
    BOOST_TEST(stdfs::file_size(w.dir / "real.tar") > 1000U);
    ::mkfifo((w.dir / "pipe").c_str(), 0600);
    std::string got;
    std::thread reader([&] { got = read_file(w.dir / "pipe"); });
    co_await exporter::write_tar(w.stores(), trees_of(input_of(root)), {.path = (w.dir / "pipe").string()}, {});
    reader.join();
    BOOST_TEST((got == read_file(w.dir / "real.tar")));
    BOOST_TEST(stdfs::is_fifo(w.dir / "pipe"));
    for (const auto& path : {w.dir / "no/such.tar", w.dir.path()}) {
        const auto e = co_await failure(exporter::write_tar(w.stores(), trees_of(input_of(root)), {.path = path.string()}, {}));
        BOOST_TEST((e && std::string_view(e->what()).find(path.string()) != std::string_view::npos));
    }
    const unique_fd own{::open((w.dir / "own.tar").c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600)};
    co_await exporter::write_tar(w.stores(), trees_of(input_of(root)), {.fd = own.get()}, {});
    BOOST_TEST((read_file(w.dir / "own.tar") == got));
    for (const auto& e : stdfs::directory_iterator(w.dir.path())) BOOST_TEST(e.path().filename().string().size() < 12U, e.path().string());
}

BOOST_AUTO_TEST_SUITE_END()

// A full disk, a damaged registry, no registry, no root: one sentence each, and nothing wrong is kept.
#include "support/program.hpp"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>

using namespace cobuild::test;
namespace stdfs = std::filesystem;

namespace {

/// A small file system at `at`, gone with the object.
class small_disk {
public:
    small_disk(std::string at, const std::string& size) : at_(std::move(at)) {
        stdfs::create_directories(at_);
        BOOST_REQUIRE(::mount("tmpfs", at_.c_str(), "tmpfs", 0, ("size=" + size).c_str()) == 0);
    }
    ~small_disk() { ::umount2(at_.c_str(), MNT_DETACH); }
    small_disk(const small_disk&) = delete;
    small_disk& operator=(const small_disk&) = delete;
    void grow(const std::string& size) const { BOOST_REQUIRE(::mount("tmpfs", at_.c_str(), "tmpfs", MS_REMOUNT, ("size=" + size).c_str()) == 0); }

private:
    std::string at_;
};

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

/// Exit code `code` and exactly one sentence, which contains all of `parts`.
void check_sentence(const outcome& o, int code, const strings& parts) {
    const auto lines = error_lines(o);
    BOOST_CHECK_MESSAGE(o.code == code, "exit code " << o.code << " is not " << code << "\n" << o.str());
    BOOST_REQUIRE_MESSAGE(lines.size() == 1, o.str());
    BOOST_TEST_MESSAGE(lines.front());
    for (const auto& p : parts) BOOST_CHECK_MESSAGE(contains(lines.front(), p), "\"" << p << "\" is not in: " << lines.front());
    for (const auto* bad : {"cobuild::", "boost::", "std::", "terminate", "assert"}) BOOST_CHECK_MESSAGE(!contains(o.err, bad), o.str());
}

/// A port where nobody listens: bound, never listening, for as long as this lives.
class dead_port {
public:
    dead_port() : fd_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
        sockaddr_in a{};
        a.sin_family = AF_INET;
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        socklen_t size = sizeof a;
        BOOST_REQUIRE(::bind(fd_, reinterpret_cast<sockaddr*>(&a), size) == 0 && ::getsockname(fd_, reinterpret_cast<sockaddr*>(&a), &size) == 0);
        host = "127.0.0.1:" + std::to_string(ntohs(a.sin_port));
    }
    ~dead_port() { ::close(fd_); }
    dead_port(const dead_port&) = delete;
    dead_port& operator=(const dead_port&) = delete;
    std::string host;

private:
    int fd_;
};

}  // namespace

BOOST_AUTO_TEST_CASE(full_disk_while_copying) {
    if (!needs_root() || !docker_registry::available()) return;
    workshop place;
    place.make_base("busybox");
    write_file(place / "ctx/big", std::string(30'000'000, 'x'));
    write_file(place / "ctx/Dockerfile", "FROM busybox\nCOPY big /big\n");
    const small_disk disk(place.root, "16m");
    check_sentence(place.run_build("ctx", {"-t", "x"}), 1, {"o space left on device"});
    disk.grow("200m");
    const auto o = place.run_build("ctx", {"-t", "x"});
    BOOST_CHECK_MESSAGE(o.code == 0, o.str());
    for (const auto& l : place.leftovers())
        if (!contains(l, "tmpfs")) BOOST_ERROR("left " << l);
}

BOOST_AUTO_TEST_CASE(full_disk_while_pulling) {
    if (!needs_root() || !docker_registry::available()) return;
    workshop place;
    place.make_base("busybox", "", std::string(8'000'000, 'y'));
    write_file(place / "ctx/Dockerfile", "FROM busybox\nRUN true\n");
    const small_disk disk(place.root, "5m");
    check_sentence(place.run_build("ctx", {"-t", "x"}), 1, {"o space left on device"});
    disk.grow("200m");
    const auto o = place.run_build("ctx", {"-t", "x"});
    BOOST_CHECK_MESSAGE(o.code == 0, o.str());
}

BOOST_AUTO_TEST_CASE(disk_full_from_the_start) {
    if (!needs_root() || !docker_registry::available()) return;
    workshop place;
    write_file(place / "ctx/Dockerfile", "FROM scratch\nCOPY Dockerfile /\n");
    const small_disk disk(place.root, "16k");
    check_sentence(place.run_build("ctx", {"-t", "x"}), 1, {});
    disk.grow("200m");
    const auto o = place.run_build("ctx", {"-t", "x"});
    BOOST_CHECK_MESSAGE(o.code == 0, o.str());
}

BOOST_AUTO_TEST_CASE(full_disk_at_the_destination) {
    if (!needs_root() || !docker_registry::available()) return;
    workshop place;
    std::string noise(8'000'000, '\0');
    std::ifstream("/dev/urandom").read(noise.data(), static_cast<std::streamsize>(noise.size()));
    write_file(place / "ctx/big", noise);
    write_file(place / "ctx/Dockerfile", "FROM scratch\nCOPY big /big\n");
    const small_disk disk(place.path("dest"), "4m");
    for (const auto* kind : {"oci", "tar"}) {
        check_sentence(place.run_build("ctx", {"-o", std::string("type=") + kind + ",dest=" + place.path("dest/x.tar")}), 1,
                       {"o space left on device", "dest"});
        BOOST_CHECK_MESSAGE(stdfs::is_empty(place / "dest"), kind << ": a cut-off file stays at the destination");
        for (const auto& e : stdfs::directory_iterator(place / "dest")) stdfs::remove_all(e.path());
    }
}

BOOST_AUTO_TEST_CASE(damaged_layer_in_the_registry) {
    if (!needs_root() || !docker_registry::available()) return;
    workshop place;
    std::string noise(200'000, '\0');
    std::ifstream("/dev/urandom").read(noise.data(), static_cast<std::streamsize>(noise.size()));
    place.make_base("busybox", "", noise);
    // The layer with the noise is the only blob of about its size.
    stdfs::path blob;
    for (const auto& e : stdfs::recursive_directory_iterator(place / "registry/storage"))
        if (e.path().filename() == "data" && e.file_size() > 190'000 && e.file_size() < 220'000) blob = e.path();
    BOOST_REQUIRE(!blob.empty());
    const auto hex = blob.parent_path().filename().string();
    const auto flip = [&] {
        std::fstream f(blob, std::ios::in | std::ios::out | std::ios::binary);
        f.seekg(100'000);
        const char c = static_cast<char>(f.get() ^ 1);
        f.seekp(100'000);
        f.put(c);
    };
    flip();
    write_file(place / "ctx/Dockerfile", "FROM busybox\nRUN true\n");
    check_sentence(place.run_build("ctx", {"-t", "x"}), 1, {"sha256:" + hex, place.registry().host()});
    BOOST_TEST(!stdfs::exists(place.root + "/content/blobs/sha256/" + hex));
    for (const auto& l : place.leftovers()) BOOST_ERROR("left " << l);
    flip();
    const auto o = place.run_build("ctx", {"-t", "x"});
    BOOST_CHECK_MESSAGE(o.code == 0, o.str());
}

BOOST_AUTO_TEST_CASE(cut_off_layer_in_the_registry) {
    if (!needs_root() || !docker_registry::available()) return;
    workshop place;
    std::string noise(200'000, '\0');
    std::ifstream("/dev/urandom").read(noise.data(), static_cast<std::streamsize>(noise.size()));
    place.make_base("busybox", "", noise);
    stdfs::path blob;
    for (const auto& e : stdfs::recursive_directory_iterator(place / "registry/storage"))
        if (e.path().filename() == "data" && e.file_size() > 190'000 && e.file_size() < 220'000) blob = e.path();
    BOOST_REQUIRE(!blob.empty());
    stdfs::resize_file(blob, 100'000);
    write_file(place / "ctx/Dockerfile", "FROM busybox\nRUN true\n");
    check_sentence(place.run_build("ctx", {"-t", "x"}), 1, {"sha256:" + blob.parent_path().filename().string(), place.registry().host()});
    for (const auto& l : place.leftovers()) BOOST_ERROR("left " << l);
}

BOOST_AUTO_TEST_CASE(mirror_and_origin_down) {
    if (!needs_root() || !docker_registry::available()) return;
    workshop place;
    const dead_port mirror, origin;
    write_file(place.config, "[registry.\"" + origin.host + "\"]\nmirrors = [\"" + mirror.host + "\"]\n");
    write_file(place / "ctx/Dockerfile", "FROM " + origin.host + "/app/base:1\nRUN true\n");
    const auto o = place.run_build("ctx", {"-t", "x"});
    check_sentence(o, 1, {origin.host, mirror.host, "app/base:1", "Dockerfile:1"});
    BOOST_CHECK_MESSAGE(o.took < std::chrono::seconds(30), o.str());
    for (const auto& l : place.leftovers()) BOOST_ERROR("left " << l);
}

BOOST_AUTO_TEST_CASE(mirror_down_origin_up) {
    if (!needs_root() || !docker_registry::available()) return;
    workshop place;
    place.make_base("busybox");
    const dead_port mirror;
    const auto host = place.registry().host();
    write_file(place.config, "[registry.\"" + host + "\"]\nmirrors = [\"" + mirror.host + "\"]\n");
    write_file(place / "ctx/Dockerfile", "FROM " + host + "/library/busybox\nRUN true\n");
    const auto o = place.run_build("ctx", {"-t", "x"});
    BOOST_CHECK_MESSAGE(o.code == 0, o.str());
}

BOOST_AUTO_TEST_CASE(without_root) {
    if (!needs_root() || !docker_registry::available()) return;
    workshop place;
    place.make_base("busybox");
    // Where anybody may read: the program itself may lie behind closed doors.
    stdfs::permissions(place.path(""), stdfs::perms::owner_all | stdfs::perms::group_exec | stdfs::perms::others_exec, stdfs::perm_options::replace);
    stdfs::copy_file(program(), place / "cobuild");
    for (const auto* name : {"home", "tmp", "state"}) {
        stdfs::create_directories(place / name);
        BOOST_REQUIRE(::chown(place.path(name).c_str(), 65534, 65534) == 0);
    }
    write_file(place / "ctx/Dockerfile", "FROM busybox\nRUN true\n");
    place.root = place.path("state");
    const auto as_nobody = [&](const std::string& root) {
        strings args{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"};
        place.root = root;
        auto build = place.build("ctx", {"-t", "x"});
        build.front() = place.path("cobuild");
        args.insert(args.end(), build.begin(), build.end());
        return run(args, place.options());
    };
    check_sentence(as_nobody(place.path("state")), 1, {"root", "65534"});
    // The state directory of root.
    place.root = place.path("roots");
    must_run(place.build("ctx", {"-t", "x"}), place.options());
    const auto o = as_nobody(place.path("roots"));
    BOOST_TEST(o.code != 0);
    BOOST_CHECK_MESSAGE(error_lines(o).size() == 1, o.str());
}

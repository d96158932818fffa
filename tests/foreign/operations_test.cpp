// The daemon as a service manager and an administrator see it: signals, sockets handed over, the name it was started under.
#include "support/program.hpp"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

import cobuild.base;

using namespace cobuild;
using namespace cobuild::test;
using namespace std::chrono_literals;
namespace stdfs = std::filesystem;

namespace {

std::string beside(const std::string& name) { return (stdfs::path(program()).parent_path() / name).string(); }

/// cobuildd with a socket of the workshop's.
struct served {
    workshop place;
    std::string address = "unix://" + place.path("d.sock");
    std::optional<running> daemon;
    void start(strings more = {}, const std::string& name = "cobuildd") {
        strings args{beside(name), "--root", place.root, "--config", place.config, "--addr", address, "--debug"};
        args.insert(args.end(), place.flags.begin(), place.flags.end());
        args.insert(args.end(), more.begin(), more.end());
        daemon.emplace(args, place.options({}, 120s));
        BOOST_REQUIRE(daemon->wait_stderr("running server on " + address));
    }
    [[nodiscard]] strings build(const std::string& context, strings more = {}) const {
        strings args{beside("buildctl"),
                     "--addr",
                     address,
                     "build",
                     "--frontend",
                     "dockerfile.v0",
                     "--local",
                     "context=" + place.path(context),
                     "--local",
                     "dockerfile=" + place.path(context),
                     "--progress",
                     "plain"};
        args.insert(args.end(), more.begin(), more.end());
        return args;
    }
    outcome stop() {
        daemon->signal(SIGTERM);
        return daemon->wait();
    }
};

std::string mirror_config(const std::string& host) { return "[registry.\"docker.io\"]\nmirrors = [\"" + host + "\"]\n"; }

bool has(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

}  // namespace

BOOST_TEST_GLOBAL_FIXTURE(isolation);

BOOST_AUTO_TEST_CASE(a_hangup_has_registry_settings_read_anew) {
    if (!needs_root() || !docker_registry::available()) return;
    served s;
    s.place.make_base("busybox");
    write_file(s.place / "ctx/Dockerfile", "FROM busybox\nRUN true\n");
    // Nothing listens at the mirror of the beginning, and Docker Hub is out of reach.
    const auto right = read_file(s.place.config);
    write_file(s.place.config, mirror_config("127.0.0.1:1"));
    s.start();
    const auto failed = run(s.build("ctx"), s.place.options());
    BOOST_TEST(failed.code == 1);
    BOOST_TEST(has(failed.err, "127.0.0.1:1"), failed.err);
    // A file that cannot be read changes nothing and ends nothing.
    write_file(s.place.config, "[registry\n");
    s.daemon->signal(SIGHUP);
    BOOST_REQUIRE(s.daemon->wait_stderr("the settings could not be read anew"));
    write_file(s.place.config, right);
    s.daemon->signal(SIGHUP);
    BOOST_REQUIRE(s.daemon->wait_stderr("registry settings and certificates were read anew"));
    const auto built = run(s.build("ctx"), s.place.options());
    BOOST_TEST(built.code == 0, built.str());
    BOOST_TEST(s.stop().code == 0);
    BOOST_TEST(s.place.leftovers().empty());
}

BOOST_AUTO_TEST_CASE(told_to_end_it_cancels_what_does_not_end) {
    if (!needs_root() || !docker_registry::available()) return;
    served s;
    s.place.make_base("busybox");
    write_file(s.place / "ctx/Dockerfile", "FROM busybox\nRUN echo here we are; sleep 1000\n");
    s.start();
    running client(s.build("ctx"), s.place.options({}, 100s));
    BOOST_REQUIRE(client.wait_stderr("here we are"));
    s.place.note_owners();
    const auto told = std::chrono::steady_clock::now();
    const auto ended = s.stop();
    const auto took = std::chrono::steady_clock::now() - told;
    BOOST_TEST(ended.code == 0, ended.str());
    BOOST_TEST((took < 20s));  // seven for the build, and some for a busy machine
    BOOST_TEST(client.wait().code == 1);
    BOOST_TEST(s.place.leftovers().empty());
}

BOOST_AUTO_TEST_CASE(told_to_end_it_lets_a_short_build_end) {
    if (!needs_root() || !docker_registry::available()) return;
    served s;
    s.place.make_base("busybox");
    write_file(s.place / "ctx/Dockerfile", "FROM busybox\nRUN echo here we are; sleep 1\nRUN echo made > /made\n");
    s.start();
    running client(s.build("ctx", {"--output", "type=local,dest=" + s.place.path("out")}), s.place.options());
    BOOST_REQUIRE(client.wait_stderr("here we are"));
    BOOST_TEST(s.stop().code == 0);
    const auto o = client.wait();
    BOOST_TEST(o.code == 0, o.str());
    BOOST_TEST(read_file(s.place / "out/made") == "made\n");
    BOOST_TEST(s.place.leftovers().empty());
}

namespace {

/// A shell that hands descriptor 3 on as systemd does: LISTEN_PID is the program that it becomes.
const char* const hand_over = "export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\"";

struct unix_listener {
    unique_fd fd;
    explicit unix_listener(const std::string& path) : fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
        sockaddr_un at{};
        at.sun_family = AF_UNIX;
        BOOST_REQUIRE(path.size() < sizeof at.sun_path);
        std::memcpy(at.sun_path, path.data(), path.size());
        BOOST_REQUIRE(::bind(fd.get(), reinterpret_cast<const sockaddr*>(&at), sizeof at) == 0);
        BOOST_REQUIRE(::listen(fd.get(), 16) == 0);
    }
};

}  // namespace

BOOST_AUTO_TEST_CASE(sockets_of_a_service_manager_are_served) {
    if (!needs_root() || !docker_registry::available()) return;
    served s;
    const unix_listener listening(s.place.path("d.sock"));
    // READY=1 goes to the socket that NOTIFY_SOCKET names.
    const auto notify = s.place.path("notify");
    const unique_fd told{::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0)};
    sockaddr_un at{};
    at.sun_family = AF_UNIX;
    std::memcpy(at.sun_path, notify.data(), notify.size());
    BOOST_REQUIRE(::bind(told.get(), reinterpret_cast<const sockaddr*>(&at), sizeof at) == 0);
    // A client may come before there is a daemon: the socket is there.
    running early({beside("buildctl"), "--addr", s.address, "debug", "workers"}, s.place.options());
    auto options = s.place.options({"NOTIFY_SOCKET=" + notify});
    options.inherit = listening.fd.get();
    s.daemon.emplace(strings{"sh", "-c", hand_over, "sh", beside("cobuildd"), "--root", s.place.root, "--config", s.place.config, "--addr", "fd://"},
                     options);
    BOOST_REQUIRE(s.daemon->wait_stderr("running server on fd://3"));
    char text[64] = {};
    BOOST_TEST(::recv(told.get(), text, sizeof text - 1, 0) == 7);
    BOOST_TEST(std::string(text) == "READY=1");
    const auto o = early.wait();
    BOOST_TEST(o.code == 0, o.str());
    BOOST_TEST(has(o.out, "linux/amd64"), o.out);
    BOOST_TEST(s.stop().code == 0);
    BOOST_TEST(stdfs::exists(s.place / "d.sock"));  // it is the service manager's
    BOOST_TEST(s.place.leftovers().empty());
}

BOOST_AUTO_TEST_CASE(without_handed_sockets_fd_is_refused) {
    if (!needs_root()) return;
    workshop place;
    const auto o = run({beside("cobuildd"), "--root", place.root, "--config", place.config, "--addr", "fd://"}, place.options());
    BOOST_TEST(o.code == 2, o.str());
    BOOST_TEST(has(o.err, "LISTEN_FDS"), o.err);
}

BOOST_AUTO_TEST_CASE(the_units_are_installed_and_right) {
    if (!needs_root()) return;
    workshop place;
    const auto build_dir = stdfs::path(program()).parent_path().parent_path().string();
    // What this build would install of packaging/ alone.
    const auto installed =
        run({"cmake", "-DCMAKE_INSTALL_PREFIX=" + place.path("usr"), "-P", build_dir + "/packaging/cmake_install.cmake"}, place.options());
    BOOST_REQUIRE_MESSAGE(installed.code == 0, installed.str());
    const auto unit = place.path("usr/lib/systemd/system/cobuild.service");
    const auto text = read_file(unit);
    BOOST_TEST(has(text, "\nType=notify\n"));
    BOOST_TEST(has(text, "\nExecStart=" + place.path("usr") + "/bin/cobuildd --addr fd://\n"), text);
    BOOST_TEST(has(read_file(place.path("usr/lib/systemd/system/cobuild.socket")), "\nListenStream=/run/cobuild/cobuildd.sock\n"));
    if (run({"sh", "-c", "command -v systemd-analyze"}).code != 0) return;
    stdfs::create_directories(place / "usr/bin");
    stdfs::create_symlink(beside("cobuildd"), place / "usr/bin/cobuildd");
    const auto verified = run({"systemd-analyze", "verify", "--man=no", unit, place.path("usr/lib/systemd/system/cobuild.socket")}, place.options());
    // Of this machine's own units it may complain as it likes.
    for (const auto* name : {"cobuild.service", "cobuild.socket"}) BOOST_TEST(!has(verified.err, name), verified.err);
}

BOOST_AUTO_TEST_CASE(under_buildkitds_name_the_state_is_in_its_directory) {
    if (!needs_root()) return;
    // In a mount namespace where both are empty; the daemon's own answer is the lock.
    workshop place;
    stdfs::create_directories(place / "bin");
    stdfs::create_symlink(beside("cobuildd"), place / "bin/buildkitd");
    for (const auto& [name, root] : std::vector<std::pair<std::string, std::string>>{{place.path("bin/buildkitd"), "/var/lib/buildkit"},
                                                                                     {beside("cobuildd"), "/var/lib/cobuild"}}) {
        // Nothing of the machine's own is touched. The default file is BuildKit's too: a setting of it counts.
        const std::string script =
            "set -e; cd \"$1\"; rm -rf log seen upper work; mkdir upper work; mount -t tmpfs t /var/lib; mkdir /var/lib/buildkit /var/lib/cobuild; "
            "mount -t overlay o -o lowerdir=/etc,upperdir=upper,workdir=work /etc; mkdir -p /etc/buildkit; "
            "printf '[log]\\nformat = \"json\"\\n' > /etc/buildkit/buildkitd.toml; "
            "\"$0\" --addr unix://$1/x.sock 2> log & p=$!; "
            "for i in $(seq 600); do grep -q 'running server' log 2>/dev/null && break; sleep 0.05; done; "
            "ls /var/lib/buildkit /var/lib/cobuild > seen; kill $p; wait $p";
        const auto o = run({"unshare", "--mount", "sh", "-c", script, name, place.path("tmp")}, place.options());
        BOOST_TEST(o.code == 0, o.str() + read_file(place / "tmp/log"));
        const auto seen = read_file(place / "tmp/seen");
        const auto at = seen.find(root + ":\n");
        BOOST_REQUIRE(at != std::string::npos);
        const auto rest = seen.substr(at + root.size() + 2);
        BOOST_TEST(has(rest.substr(0, rest.find("/var/lib/")), "cobuildd.lock"), seen);
        BOOST_TEST(read_file(place / "tmp/log").starts_with("{\""), read_file(place / "tmp/log"));
    }
}

BOOST_AUTO_TEST_CASE(log_lines_come_in_the_form_asked_for) {
    if (!needs_root()) return;
    served s;
    s.start({"--log-format", "json"});
    const auto o = s.stop();
    BOOST_TEST(has(o.err, "\"msg\":\"stopping server\""), o.err);
    const auto wrong = run({beside("cobuildd"), "--root", s.place.root, "--config", s.place.config, "--log-format", "xml"}, s.place.options());
    BOOST_TEST(wrong.code == 2, wrong.str());
}

BOOST_AUTO_TEST_CASE(plain_tcp_beyond_loopback_is_root_for_everybody) {
    if (!needs_root()) return;
    workshop place;
    stdfs::create_directories(place / "bin");
    stdfs::create_symlink(beside("cobuildd"), place / "bin/buildkitd");
    const strings rest{"--root", place.root, "--config", place.config, "--addr", "tcp://0.0.0.0:0"};
    const auto with = [&rest](const std::string& program, strings more) {
        more.insert(more.begin(), program);
        more.insert(more.end(), rest.begin(), rest.end());
        return more;
    };
    const auto refused = run(with(beside("cobuildd"), {}), place.options());
    BOOST_TEST(refused.code == 1, refused.str());
    BOOST_TEST(has(refused.err, "--allow-insecure-tcp"), refused.err);
    for (const auto& args : {with(beside("cobuildd"), {"--allow-insecure-tcp"}), with(place.path("bin/buildkitd"), {})}) {
        running d(args, place.options());
        BOOST_TEST(d.wait_stderr("running server on tcp://0.0.0.0:"));
        d.signal(SIGTERM);
        const auto o = d.wait();
        BOOST_TEST(o.code == 0, o.str());
        BOOST_TEST(has(o.err, "level=warning msg=\"the API is served over plain tcp"), o.err);
    }
}

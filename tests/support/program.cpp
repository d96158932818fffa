#include "support/program.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <stdexcept>
#include <system_error>
#include <thread>

namespace cobuild::test {

namespace {

namespace stdfs = std::filesystem;
using clock = std::chrono::steady_clock;

/// Programs that a `running` will wait for itself.
std::set<int>& waited_for() {
    static std::set<int> pids;
    return pids;
}

[[noreturn]] void fail(const std::string& what) { throw std::system_error(errno, std::generic_category(), what); }

std::string whole(int fd) {
    std::string text;
    char piece[4096];
    for (off_t at = 0;;) {
        const auto n = ::pread(fd, piece, sizeof piece, at);
        if (n <= 0) return text;
        text.append(piece, static_cast<std::size_t>(n));
        at += n;
    }
}

/// The parent of every process, and whether it is only waiting to be taken.
std::map<int, std::pair<int, bool>> all_processes() {
    std::map<int, std::pair<int, bool>> out;
    for (const auto& e : stdfs::directory_iterator("/proc")) {
        const auto name = e.path().filename().string();
        if (name.find_first_not_of("0123456789") != std::string::npos) continue;
        std::ifstream in(e.path() / "stat");
        std::string line;
        if (!std::getline(in, line)) continue;
        std::istringstream rest(line.substr(line.rfind(')') + 1));
        char state = '?';
        int parent = 0;
        rest >> state >> parent;
        out[std::stoi(name)] = {parent, state == 'Z'};
    }
    return out;
}

std::string name_of(int pid) {
    std::ifstream in("/proc/" + std::to_string(pid) + "/cmdline", std::ios::binary);
    std::string text{std::istreambuf_iterator<char>(in), {}};
    std::replace(text.begin(), text.end(), '\0', ' ');
    return std::to_string(pid) + " " + text;
}

strings names_in(const stdfs::path& dir) {
    strings out;
    std::error_code ec;
    for (stdfs::directory_iterator at(dir, ec), end; !ec && at != end; at.increment(ec)) out.push_back(at->path().filename().string());
    std::sort(out.begin(), out.end());
    return out;
}

}  // namespace

std::string program() {
    if (const char* given = std::getenv("COBUILD_PROGRAM")) return given;
    const char* dir = std::getenv("COBUILD_BIN_DIR");
    return std::string(dir != nullptr ? dir : ".") + "/cobuild";
}

// ---------------------------------------------------------------- isolation

isolation::isolation() {
    if (::geteuid() != 0) return;
    if (::prctl(PR_SET_CHILD_SUBREAPER, 1) != 0) fail("becoming a subreaper");
    if (::unshare(CLONE_NEWNS | CLONE_NEWNET) != 0) fail("unshare");
    if (::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) fail("making mounts private");
    shell("ip link set lo up");
}

isolation::~isolation() {
    if (::geteuid() != 0) return;
    for (int i = 0; i < 500; ++i) {
        const auto left = descendants();
        if (left.empty()) return;
        for (const int pid : left) ::kill(pid, SIGKILL);
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
}

std::set<int> descendants() {
    const auto all = all_processes();
    std::set<int> out;
    for (const auto& [pid, about] : all) {
        int up = pid;
        for (int depth = 0; depth < 64 && up > 1 && up != ::getpid(); ++depth) {
            const auto at = all.find(up);
            up = at == all.end() ? 0 : at->second.first;
        }
        if (up != ::getpid() || pid == ::getpid()) continue;
        if (about.second && about.first == ::getpid() && !waited_for().contains(pid)) {
            ::waitpid(pid, nullptr, WNOHANG);
            continue;
        }
        out.insert(pid);
    }
    return out;
}

// ---------------------------------------------------------------- running

std::string outcome::str() const { return "exit code " + std::to_string(code) + " after " + std::to_string(took.count()) + " ms\n" + out + err; }

running::running(strings args, run_options options) : limit_(options.limit), started_(clock::now()) {
    for (const auto& a : args) name_ += (name_.empty() ? "" : " ") + a;
    out_ = ::memfd_create("out", MFD_CLOEXEC);
    err_ = ::memfd_create("err", MFD_CLOEXEC);
    std::vector<char*> argv;
    for (auto& a : args) argv.push_back(a.data());
    argv.push_back(nullptr);
    const int parent = ::getpid();
    pid_ = ::fork();
    if (pid_ < 0) fail("fork");
    if (pid_ == 0) {
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (::getppid() != parent) ::_exit(127);
        ::setpgid(0, 0);
        const int null = ::open("/dev/null", O_RDONLY);
        if (::dup2(null, 0) < 0 || ::dup2(out_, 1) < 0 || ::dup2(err_, 2) < 0) ::_exit(127);
        if (null > 2) ::close(null);
        if (options.inherit == 3) ::fcntl(3, F_SETFD, 0);
        if (options.inherit > 3 && ::dup2(options.inherit, 3) < 0) ::_exit(127);
        if (!options.cwd.empty() && ::chdir(options.cwd.c_str()) != 0) ::_exit(127);
        for (auto& pair : options.env) ::putenv(pair.data());
        ::execvp(argv[0], argv.data());
        ::dprintf(2, "cannot start %s: %s\n", argv[0], std::strerror(errno));
        ::_exit(127);
    }
    ::setpgid(pid_, pid_);
    waited_for().insert(pid_);
    pidfd_ = static_cast<int>(::syscall(SYS_pidfd_open, pid_, 0));
}

running::~running() {
    if (!waited_) {
        ::kill(-pid_, SIGKILL);
        ::kill(pid_, SIGKILL);
        ::waitpid(pid_, nullptr, 0);
        waited_for().erase(pid_);
    }
    for (const int fd : {pidfd_, out_, err_}) ::close(fd);
}

void running::signal(int number) const { ::kill(pid_, number); }

bool running::ended(std::chrono::milliseconds within) const {
    pollfd p{pidfd_, POLLIN, 0};
    return ::poll(&p, 1, static_cast<int>(within.count())) == 1;
}

bool running::wait_stderr(std::string_view text) {
    const auto until = clock::now() + limit_;
    for (;;) {
        const bool over = ended(std::chrono::milliseconds(5));
        if (whole(err_).find(text) != std::string::npos) return true;
        if (over || clock::now() > until) return false;
    }
}

outcome running::wait() {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(started_ + limit_ - clock::now());
    const bool in_time = ended(std::max(left, std::chrono::milliseconds(0)));
    if (!in_time) ::kill(-pid_, SIGKILL);
    int status = 0;
    ::waitpid(pid_, &status, 0);
    waited_ = true;
    waited_for().erase(pid_);
    outcome o{WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), whole(out_), whole(err_),
              std::chrono::duration_cast<std::chrono::milliseconds>(clock::now() - started_)};
    BOOST_REQUIRE_MESSAGE(in_time, name_ << ": not over after " << limit_.count() << " s\n" << o.str());
    return o;
}

outcome running::kill() {
    signal(SIGKILL);
    return wait();
}

outcome run(strings args, run_options options) { return running(std::move(args), std::move(options)).wait(); }

outcome must_run(strings args, run_options options) {
    std::string name;
    for (const auto& a : args) name += a + " ";
    auto o = run(std::move(args), std::move(options));
    BOOST_REQUIRE_MESSAGE(o.code == 0, name << ": " << o.str());
    return o;
}

// ---------------------------------------------------------------- workshop

workshop::workshop() : root(path("root")), config(path("buildkitd.toml")) {
    for (const auto* name : {"registry", "tmp", "home"}) stdfs::create_directories(dir_ / name);
    registry_ = std::make_unique<docker_registry>(dir_ / "registry", docker_registry::options{});
    write_file(config, "[registry.\"docker.io\"]\nmirrors = [\"" + registry_->host() + "\"]\n");
    helpers_ = descendants();
    for (const auto& name : names_in("/run/netns")) other_namespaces_.insert(name);
}

workshop::~workshop() {
    // What a failed test left running would keep files and mounts below the directory.
    for (int i = 0; i < 200; ++i) {
        bool any = false;
        for (const int pid : descendants())
            if (!helpers_.contains(pid) && !waited_for().contains(pid)) any = ::kill(pid, SIGKILL) == 0 || any;
        if (!any) break;
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    note_owners();
    for (const auto& owner : owners_)
        run({"sh", "-c", "find /sys/fs/cgroup -depth -type d -path '*/cobuild/" + owner + "*' -exec rmdir {} + 2>/dev/null"});
}

void workshop::make_base(const std::string& name, const std::string& extra, const std::string& own_file) {
    const auto base = dir_ / ("base-" + name);
    std::string busybox;
    for (const auto* candidate : {"/bin/busybox", "/usr/bin/busybox"})
        if (stdfs::exists(candidate)) busybox = candidate;
    BOOST_REQUIRE_MESSAGE(!busybox.empty(), "these tests need a static busybox (Debian's busybox-static)");
    for (const auto* dir : {"bin", "etc", "tmp", "root"}) stdfs::create_directories(base / "rootfs" / dir);
    stdfs::copy_file(busybox, base / "rootfs/bin/busybox");
    std::istringstream applets(must_run({busybox, "--list"}).out);
    for (std::string applet; std::getline(applets, applet);)
        if (!applet.empty() && applet != "busybox") stdfs::create_symlink("busybox", base / "rootfs/bin" / applet);
    write_file(base / "rootfs/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nguest:x:405:100:guest:/tmp:/bin/sh\n");
    write_file(base / "rootfs/etc/group", "root:x:0:\nusers:x:100:\n");
    ::chmod((base / "rootfs/tmp").c_str(), 01777);
    if (!own_file.empty()) write_file(base / "own", own_file);
    write_file(base / "Dockerfile",
               "FROM scratch\nCOPY rootfs /\n" + std::string(own_file.empty() ? "" : "COPY own /own\n") + "ENV PATH=/bin\nCMD [\"sh\"]\n" + extra);
    must_run({program(), "build", base.string(), "-t", registry_->host() + "/library/" + name, "--push", "--root", path("base-root"), "--config",
              config, "--progress=plain"},
             options());
}

strings workshop::build(const std::string& context, strings extra) const {
    strings args{program(), "build", context, "--root", root, "--config", config, "--progress=plain"};
    args.insert(args.end(), flags.begin(), flags.end());
    args.insert(args.end(), extra.begin(), extra.end());
    return args;
}

run_options workshop::options(strings more, std::chrono::seconds limit) const {
    run_options o{.env = {"HOME=" + path("home"), "TMPDIR=" + path("tmp"), "DOCKER_CONFIG=" + path("home/.docker"), "SOURCE_DATE_EPOCH=1700000000"},
                  .cwd = dir_.path().string()};
    o.limit = limit;
    o.env.insert(o.env.end(), more.begin(), more.end());
    return o;
}

outcome workshop::run_build(const std::string& context, strings extra, strings env) const {
    return run(build(context, std::move(extra)), options(std::move(env)));
}

void workshop::note_owners() {
    for (auto& o : names_in(root + "/owners")) owners_.insert(std::move(o));
}

strings workshop::leftovers() const {
    strings out;
    // The kernel takes a killed PID namespace apart a moment after its first process was told.
    std::set<int> strays;
    for (int i = 0; i < 300; ++i) {
        strays.clear();
        for (const int pid : descendants())
            if (!helpers_.contains(pid) && !waited_for().contains(pid)) strays.insert(pid);
        if (strays.empty()) break;
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    for (const int pid : strays) out.push_back("process " + name_of(pid));
    std::ifstream mounts("/proc/self/mountinfo");
    for (std::string line; std::getline(mounts, line);)
        if (line.find(dir_.path().string() + "/") != std::string::npos) out.push_back("mount " + line);
    for (const auto& e : names_in("/sys/fs/cgroup"))
        for (const auto& o : owners_)
            for (const auto& place : {"/sys/fs/cgroup/" + e + "/cobuild/" + o, "/sys/fs/cgroup/cobuild/" + o})
                if (stdfs::exists(place) && std::find(out.begin(), out.end(), "cgroup " + place) == out.end()) out.push_back("cgroup " + place);
    for (const auto* place : {"owners", "ledger", "steps", "active", "content/ingest"})
        for (const auto& name : names_in(root + "/" + place)) out.push_back(std::string("file ") + place + "/" + name);
    for (const auto& name : names_in(dir_ / "tmp")) out.push_back("file tmp/" + name);
    auto* links = ::if_nameindex();
    for (auto* l = links; l != nullptr && l->if_index != 0; ++l)
        if (std::string_view(l->if_name) != "lo" && !std::string_view(l->if_name).starts_with("br-"))
            out.push_back(std::string("network link ") + l->if_name);
    ::if_freenameindex(links);
    for (const auto& name : names_in("/run/netns"))
        if (!other_namespaces_.contains(name)) out.push_back("network namespace " + name);
    return out;
}

std::string image_digest(const stdfs::path& metadata_file) {
    const auto text = read_file(metadata_file);
    const auto at = text.find("\"containerimage.digest\"");
    BOOST_REQUIRE(at != std::string::npos);
    const auto begin = text.find("sha256:", at);
    return text.substr(begin, 7 + 64);
}

strings error_lines(const outcome& o) {
    strings out;
    std::istringstream text(o.err);
    for (std::string line; std::getline(text, line);)
        if (line.starts_with("error: ")) out.push_back(line);
    return out;
}

}  // namespace cobuild::test

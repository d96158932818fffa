module;
#include <arpa/inet.h>
#include <fcntl.h>
#include <grp.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.daemon;

import cobuild.fs;
import :internal;

namespace cobuild::daemon {

namespace {

constexpr int backlog = 128;

/// --group: a name or a number.
gid_t group_id(const config::grpc_table& grpc) {
    if (!grpc.group.empty()) {
        unsigned number = 0;
        const auto [end, ec] = std::from_chars(grpc.group.data(), grpc.group.data() + grpc.group.size(), number);
        if (ec == std::errc{} && end == grpc.group.data() + grpc.group.size()) return number;
        const auto* found = ::getgrnam(grpc.group.c_str());
        if (found == nullptr) throw error{errc::invalid, cat("--group ", quoted(grpc.group), ": there is no such group")};
        return found->gr_gid;
    }
    return grpc.gid ? static_cast<gid_t>(*grpc.gid) : ::getegid();
}

bool somebody_listens(const sockaddr_un& at) {
    const unique_fd probe{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    return probe && ::connect(probe.get(), reinterpret_cast<const sockaddr*>(&at), sizeof at) == 0;
}

listener listen_unix(const std::string& path, const config::grpc_table& grpc) {
    sockaddr_un at{};
    at.sun_family = AF_UNIX;
    if (path.empty() || path.size() >= sizeof at.sun_path)
        throw error{errc::invalid, cat("the address unix://", path, ": a path of 1 to ", sizeof at.sun_path - 1, " bytes is expected")};
    std::memcpy(at.sun_path, path.data(), path.size());
    std::error_code ec;
    std::filesystem::create_directories(std::filesystem::path(path).parent_path(), ec);
    if (somebody_listens(at)) throw error{errc::exists, cat("another process listens on unix://", path)};
    ::unlink(path.c_str());  // left by one that was killed
    listener out;
    out.fd.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!out.fd) throw_errno("making a socket");
    // Nobody else may connect in the moment before it has its owner.
    const auto old = ::umask(0177);
    const int bound = ::bind(out.fd.get(), reinterpret_cast<const sockaddr*>(&at), sizeof at);
    ::umask(old);
    if (bound != 0) throw_errno(cat("listening on unix://", path));
    out.unlink = path;
    if (::chown(path.c_str(), grpc.uid ? static_cast<uid_t>(*grpc.uid) : ::geteuid(), group_id(grpc)) != 0 || ::chmod(path.c_str(), 0660) != 0)
        throw_errno(cat("setting the owner of ", path));
    if (::listen(out.fd.get(), backlog) != 0) throw_errno(cat("listening on unix://", path));
    out.address = cat("unix://", path);
    return out;
}

bool is_loopback(const sockaddr* a) {
    if (a->sa_family == AF_INET) return (ntohl(reinterpret_cast<const sockaddr_in*>(a)->sin_addr.s_addr) >> 24) == 127;
    return a->sa_family == AF_INET6 && IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6*>(a)->sin6_addr);
}

std::string text_of(const sockaddr_storage& a, socklen_t size) {
    char host[NI_MAXHOST], port[NI_MAXSERV];
    if (::getnameinfo(reinterpret_cast<const sockaddr*>(&a), size, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV) != 0)
        return "tcp://?";
    const bool six = std::string_view(host).find(':') != std::string_view::npos;
    return cat("tcp://", six ? "[" : "", host, six ? "]" : "", ":", port);
}

/// Plain tcp beyond loopback is root for everybody who reaches it.
void judge_plain_tcp(std::string_view where, const options& o) {
    if (!o.allow_insecure_tcp && !o.as_buildkitd)
        throw error{errc::permission, cat("tcp://", where,
                                          " without TLS lets everybody who reaches it become root here: give --tlscert, --tlskey and "
                                          "--tlscacert, or --allow-insecure-tcp")};
    log(log_level::warning,
        "the API is served over plain tcp: everybody who reaches this address becomes root here; give --tlscert, --tlskey and --tlscacert",
        {{"address", cat("tcp://", where)}});
}

listener listen_tcp(std::string_view where, bool secure, const std::function<void()>& beyond_loopback) {
    const auto colon = where.rfind(':');
    if (colon == std::string_view::npos) throw error{errc::invalid, cat("the address tcp://", where, ": HOST:PORT is expected")};
    std::string host(where.substr(0, colon));
    if (host.starts_with('[') && host.ends_with(']')) host = host.substr(1, host.size() - 2);
    const std::string port(where.substr(colon + 1));
    addrinfo hints{};
    hints.ai_family = AF_UNSPEC;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_PASSIVE;
    addrinfo* found = nullptr;
    if (const int rc = ::getaddrinfo(host.empty() ? nullptr : host.c_str(), port.c_str(), &hints, &found); rc != 0)
        throw error{errc::invalid, cat("the address tcp://", where, ": ", ::gai_strerror(rc))};
    const std::unique_ptr<addrinfo, void (*)(addrinfo*)> all(found, ::freeaddrinfo);
    if (!is_loopback(found->ai_addr)) beyond_loopback();
    listener out;
    out.tls = secure;
    out.fd.reset(::socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    const int on = 1;
    if (!out.fd || ::setsockopt(out.fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) != 0) throw_errno("making a socket");
    if (::bind(out.fd.get(), found->ai_addr, found->ai_addrlen) != 0 || ::listen(out.fd.get(), backlog) != 0)
        throw_errno(cat("listening on tcp://", where));
    sockaddr_storage bound{};
    socklen_t size = sizeof bound;
    ::getsockname(out.fd.get(), reinterpret_cast<sockaddr*>(&bound), &size);
    out.address = text_of(bound, size);
    return out;
}

/// Sockets that systemd opened for this process (sd_listen_fds(3)): descriptors from 3 on.
std::vector<listener> take_activated(const options& o) {
    const char* pid = std::getenv("LISTEN_PID");
    const char* count = std::getenv("LISTEN_FDS");
    if (pid == nullptr || count == nullptr || std::atoi(pid) != ::getpid() || std::atoi(count) < 1)
        throw error{errc::invalid, "the address fd://: no sockets were handed to this process (LISTEN_FDS)"};
    std::vector<listener> out;
    for (int fd = 3; fd < 3 + std::atoi(count); ++fd) {
        listener l;
        ::fcntl(fd, F_SETFD, FD_CLOEXEC);
        ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK);
        l.fd.reset(fd);
        sockaddr_storage at{};
        socklen_t size = sizeof at;
        if (::getsockname(fd, reinterpret_cast<sockaddr*>(&at), &size) != 0) throw_errno("looking at a socket of LISTEN_FDS");
        l.tls = at.ss_family != AF_UNIX && !o.settings.grpc.tls.cert.empty();
        l.address = cat("fd://", fd);
        out.push_back(std::move(l));
    }
    return out;
}

}  // namespace

listener::~listener() {
    if (!unlink.empty()) ::unlink(unlink.c_str());
}

std::vector<listener> open_listeners(const options& o) {
    std::vector<listener> out;
    auto addresses = o.settings.grpc.address;
    if (addresses.empty()) addresses.emplace_back(o.as_buildkitd ? "unix:///run/buildkit/buildkitd.sock" : "unix:///run/cobuild/cobuildd.sock");
    const bool secure = !o.settings.grpc.tls.cert.empty();
    for (const auto& a : addresses) {
        const std::string_view address = a;
        if (address.starts_with("unix://"))
            out.push_back(listen_unix(std::string(address.substr(7)), o.settings.grpc));
        else if (address.starts_with("tcp://"))
            out.push_back(listen_tcp(address.substr(6), secure, [&] {
                if (!secure) judge_plain_tcp(address.substr(6), o);
            }));
        else if (address == "fd://")
            for (auto& l : take_activated(o)) out.push_back(std::move(l));
        else
            throw error{errc::invalid, cat("the address ", quoted(address), ": unix:///PATH, tcp://HOST:PORT or fd:// is expected")};
    }
    return out;
}

listener open_debug_listener(std::string address, const options& o) {
    if (address.find("://") == std::string::npos) address = cat("tcp://", address);
    if (address.starts_with("unix://")) return listen_unix(address.substr(7), o.settings.grpc);
    if (!address.starts_with("tcp://"))
        throw error{errc::invalid, cat("--debugaddr ", quoted(address), ": HOST:PORT, tcp://HOST:PORT or unix:///PATH is expected")};
    return listen_tcp(std::string_view(address).substr(6), false, [&] {
        log(log_level::warning, "everybody who reaches the debug listener can read what this daemon builds", {{"address", address}});
    });
}

std::optional<rpc::tls> read_tls(const config::tls_table& files) {
    if (files.cert.empty() && files.key.empty()) {
        if (!files.ca.empty()) throw error{errc::invalid, "--tlscacert needs --tlscert and --tlskey"};
        return std::nullopt;
    }
    if (files.cert.empty() || files.key.empty()) throw error{errc::invalid, "--tlscert and --tlskey go together"};
    const auto read = [](const std::string& file) {
        const unique_fd fd{::open(file.c_str(), O_RDONLY | O_CLOEXEC)};
        if (!fd) throw_errno(cat("reading ", file));
        return fs::read_all(fd.get(), std::size_t{1} << 20);
    };
    return rpc::tls{.certificate = read(files.cert), .key = read(files.key), .ca = files.ca.empty() ? "" : read(files.ca), .server_name = {}};
}

}  // namespace cobuild::daemon

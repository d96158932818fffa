// buildctl dial-stdio: a pipe between standard input and output and the daemon's socket, for clients that reach it over ssh.
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

#include "buildctl.hpp"

namespace cobuild::buildctl {

namespace {

unique_fd connect_to(std::string_view address) {
    static constexpr std::string_view scheme = "unix://";
    if (!address.starts_with(scheme)) throw error{errc::invalid, cat("invalid address ", std::string(address), " (expected unix://)")};
    const auto path = address.substr(scheme.size());
    sockaddr_un to{};
    to.sun_family = AF_UNIX;
    if (path.size() >= sizeof to.sun_path) throw error{errc::invalid, cat("the path of the socket ", path, " is too long")};
    std::memcpy(to.sun_path, path.data(), path.size());
    unique_fd fd{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    if (!fd || ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&to), sizeof to) != 0) throw_errno(cat("connecting to ", address));
    return fd;
}

/// False at the end of the data.
bool move_some(int from, int to) {
    std::array<char, 65536> buffer;
    const auto n = ::read(from, buffer.data(), buffer.size());
    if (n < 0 && errno == EINTR) return true;
    if (n < 0 && errno != ECONNRESET) throw_errno("reading");
    for (ssize_t done = 0; done < n;) {
        const auto written = ::write(to, buffer.data() + done, static_cast<std::size_t>(n - done));
        if (written < 0 && errno != EINTR) throw_errno("writing");
        if (written > 0) done += written;
    }
    return n > 0;
}

int run(const std::string& address) {
    const auto daemon = connect_to(address);
    std::array<pollfd, 2> fds{{{0, POLLIN, 0}, {daemon.get(), POLLIN, 0}}};
    for (;;) {
        if (::poll(fds.data(), fds.size(), -1) < 0 && errno != EINTR) throw_errno("waiting for data");
        if (fds[0].revents != 0 && !move_some(0, daemon.get())) {
            // What the daemon still has to say is waited for.
            ::shutdown(daemon.get(), SHUT_WR);
            fds[0].fd = -1;
        }
        if (fds[1].revents != 0 && !move_some(daemon.get(), 1)) return 0;
    }
}

}  // namespace

command add_dial_stdio(CLI::App& app, const globals& g) {
    auto* c = app.add_subcommand("dial-stdio", "Connect standard input and output to the daemon")->group("");
    return {c, [&g] { return run(g.address); }};
}

}  // namespace cobuild::buildctl

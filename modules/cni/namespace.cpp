module;
#include <fcntl.h>
#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.cni;

import cobuild.json;

#include "parts.hpp"

namespace cobuild::cni {
namespace {

void loopback_up() {
    const unique_fd socket(::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    if (!socket) throw_errno("a socket for the step's loopback");
    ifreq request{};
    std::memcpy(request.ifr_name, "lo", 3);
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    if (::ioctl(socket.get(), SIOCSIFFLAGS, &request) != 0) throw_errno("bringing up the step's loopback");
}

unique_fd make_here() {
    if (::unshare(CLONE_NEWNET) != 0) throw_errno("a new network namespace");
    unique_fd out(::open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC));
    if (!out) throw_errno("opening the new network namespace");
    loopback_up();
    return out;
}

}  // namespace

unique_fd new_network_namespace() {
    return new_network_namespace([] {});
}

unique_fd new_network_namespace(const std::function<void()>& inside) {
    unique_fd out;
    std::exception_ptr failed;
    // A thread of its own: it ends in the new namespace, so no thread of ours is ever in a wrong one.
    std::thread([&] {
        try {
            out = make_here();
            inside();
        } catch (...) {
            failed = std::current_exception();
        }
    }).join();
    if (failed) std::rethrow_exception(failed);
    return out;
}

}  // namespace cobuild::cni

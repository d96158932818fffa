module;
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_link.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.cni;

import cobuild.json;

#include "parts.hpp"

namespace cobuild::cni {
namespace {

/// One rtnetlink request under construction.
class message {
public:
    message(std::uint16_t type, const void* body, std::size_t size) {
        data_.resize(NLMSG_HDRLEN);
        header_.nlmsg_type = type;
        header_.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        append(body, size);
    }
    std::size_t begin(std::uint16_t type) {
        const std::size_t at = data_.size();
        const rtattr head{.rta_len = 0, .rta_type = type};
        append(&head, sizeof head);
        return at;
    }
    void end(std::size_t at) {
        const auto length = static_cast<std::uint16_t>(data_.size() - at);
        std::memcpy(data_.data() + at, &length, sizeof length);
    }
    void attribute(std::uint16_t type, const void* body, std::size_t size) {
        const auto at = begin(type);
        data_.insert(data_.end(), static_cast<const char*>(body), static_cast<const char*>(body) + size);
        end(at);
        data_.resize(NLMSG_ALIGN(data_.size()));
    }
    /// Sends it and waits for the answer.
    void send(int socket, std::string_view what) {
        header_.nlmsg_len = static_cast<std::uint32_t>(data_.size());
        std::memcpy(data_.data(), &header_, sizeof header_);
        if (::send(socket, data_.data(), data_.size(), 0) < 0) throw_errno(what);
        alignas(nlmsghdr) std::array<char, 4096> answer;
        const auto n = ::recv(socket, answer.data(), answer.size(), 0);
        if (n < 0) throw_errno(what);
        nlmsghdr head{};
        nlmsgerr result{};
        if (static_cast<std::size_t>(n) < NLMSG_HDRLEN + sizeof result) throw error{errc::io, cat(what, ": a short answer from the kernel")};
        std::memcpy(&head, answer.data(), sizeof head);
        std::memcpy(&result, answer.data() + NLMSG_HDRLEN, sizeof result);
        if (head.nlmsg_type != NLMSG_ERROR || result.error != 0) throw os_error(-result.error, what);
    }

private:
    void append(const void* body, std::size_t size) {
        data_.insert(data_.end(), static_cast<const char*>(body), static_cast<const char*>(body) + size);
        data_.resize(NLMSG_ALIGN(data_.size()));
    }
    nlmsghdr header_{};
    std::vector<char> data_;
};

void add_link(int socket, std::string_view name) {
    const ifinfomsg body{};
    message m(RTM_NEWLINK, &body, sizeof body);
    m.attribute(IFLA_IFNAME, std::string(name).c_str(), name.size() + 1);
    const auto info = m.begin(IFLA_LINKINFO);
    m.attribute(IFLA_INFO_KIND, "veth", 5);  // what the bridge plugin makes, so the kernel has it
    m.end(info);
    m.send(socket, "making a link");
}

void add_address(int socket, unsigned index, std::string_view text) {
    const auto slash = text.find('/');
    ifaddrmsg body{};
    const auto bits = slash == std::string_view::npos ? std::string_view{} : text.substr(slash + 1);
    if (std::from_chars(bits.data(), bits.data() + bits.size(), body.ifa_prefixlen).ec != std::errc{}) return;
    const std::string plain(text.substr(0, slash));
    std::array<unsigned char, 16> raw{};
    const bool v6 = ::inet_pton(AF_INET6, plain.c_str(), raw.data()) == 1;
    if (!v6 && ::inet_pton(AF_INET, plain.c_str(), raw.data()) != 1) return;
    body.ifa_family = v6 ? AF_INET6 : AF_INET;
    body.ifa_index = index;
    message m(RTM_NEWADDR, &body, sizeof body);
    m.attribute(IFA_LOCAL, raw.data(), v6 ? 16 : 4);
    m.attribute(IFA_ADDRESS, raw.data(), v6 ? 16 : 4);
    m.send(socket, cat("giving a link the address ", text));
}

}  // namespace

void add_ghost_interface(std::string_view name, const addresses& had) {
    const unique_fd socket(::socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE));
    if (!socket) throw_errno("a netlink socket");
    add_link(socket.get(), name);
    const unsigned index = ::if_nametoindex(std::string(name).c_str());
    if (index == 0) throw_errno(cat("finding the link ", name));
    for (const auto& ip : had.ips) add_address(socket.get(), index, ip.address);
}

}  // namespace cobuild::cni

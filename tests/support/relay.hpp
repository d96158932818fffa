// A bad link: passes bytes on to a port of this machine, late, in pieces, or not to the end. Asked to, it is a proxy that answers
// CONNECT and leads there whatever the name was. Include before any import.
#pragma once

#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

namespace cobuild::test {

/// One thread a connection, blocking. Thread-safe.
class relay {
public:
    struct options {
        bool proxy = false;                  ///< waits for a CONNECT first
        int status = 200;                    ///< its answer to that
        std::size_t cut_after = 0;           ///< each connection is cut after so many bytes for the client; 0: never
        std::size_t cut_after_upload = 0;    ///< the same for what the client sends
        unsigned cuts = ~0U;                 ///< that many connections are cut, the others not
        std::chrono::milliseconds delay{0};  ///< of every piece for the client, or with a window
        std::size_t window = 0;              ///< of an answer's beginning and then of each so many bytes, as a long way is felt
        std::chrono::milliseconds stall{0};  ///< nothing moves for so long
        std::size_t stall_every = 0;         ///< after each so many bytes for the client
    };
    relay(int target, options o) : target_(target), options_(o) {
        listener_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        sockaddr_in a{};
        a.sin_family = AF_INET;
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        socklen_t size = sizeof a;
        if (::bind(listener_, reinterpret_cast<sockaddr*>(&a), sizeof a) != 0 || ::listen(listener_, 16) != 0 ||
            ::getsockname(listener_, reinterpret_cast<sockaddr*>(&a), &size) != 0)
            throw std::runtime_error("no port for a proxy");
        port_ = ntohs(a.sin_port);
        acceptor_ = std::thread([this] { accept_all(); });
    }
    ~relay() {
        ::shutdown(listener_, SHUT_RDWR);
        acceptor_.join();
        {
            const std::lock_guard lock(guard_);
            for (const int fd : open_) ::shutdown(fd, SHUT_RDWR);
        }
        for (auto& t : threads_) t.join();
        for (const int fd : open_) ::close(fd);
        ::close(listener_);
    }
    relay(const relay&) = delete;
    relay& operator=(const relay&) = delete;

    [[nodiscard]] int port() const { return port_; }
    /// The head of the last request.
    [[nodiscard]] std::string head() const {
        const std::lock_guard lock(guard_);
        return head_;
    }

private:
    void accept_all() {
        for (;;) {
            const int fd = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
            if (fd < 0) return;
            const std::lock_guard lock(guard_);
            open_.push_back(fd);
            threads_.emplace_back([this, fd] { serve(fd); });
        }
    }

    int dial() {
        const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        sockaddr_in a{};
        a.sin_family = AF_INET;
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        a.sin_port = htons(static_cast<std::uint16_t>(target_));
        if (::connect(fd, reinterpret_cast<sockaddr*>(&a), sizeof a) != 0) {
            ::close(fd);
            return -1;
        }
        const std::lock_guard lock(guard_);
        open_.push_back(fd);
        return fd;
    }

    void serve(int fd) {
        if (!options_.proxy || answer_connect(fd)) {
            const int far = dial();
            if (far >= 0) {
                pass(fd, far);
                ::shutdown(far, SHUT_RDWR);
            }
        }
        ::shutdown(fd, SHUT_RDWR);
    }

    bool answer_connect(int fd) {
        std::string in;
        char piece[4096];
        while (in.find("\r\n\r\n") == std::string::npos) {
            const auto n = ::recv(fd, piece, sizeof piece, 0);
            if (n <= 0) return false;
            in.append(piece, static_cast<std::size_t>(n));
        }
        {
            const std::lock_guard lock(guard_);
            head_ = in;
        }
        const std::string answer =
            "HTTP/1.1 " + std::to_string(options_.status) + (options_.status == 200 ? " Connection established" : " Forbidden") + "\r\n\r\n";
        ::send(fd, answer.data(), answer.size(), MSG_NOSIGNAL);
        return options_.status == 200;
    }

    bool cut(std::size_t passed, std::size_t limit) {
        if (limit == 0 || passed <= limit) return false;
        const std::lock_guard lock(guard_);
        if (options_.cuts == 0) return false;
        if (options_.cuts != ~0U) --options_.cuts;
        return true;
    }

    /// How far one connection has come.
    struct progress {
        std::size_t given = 0, taken = 0, since_delay = 0, since_stall = 0;
        bool asked = false;
    };

    /// False when the connection is to be cut.
    bool hold_up(progress& p, bool for_client, std::size_t n) {
        if (!for_client) {
            p.asked = true;
            return !cut(p.taken += n, options_.cut_after_upload);
        }
        p.since_delay += n;
        if (options_.window == 0 || std::exchange(p.asked, false) || p.since_delay >= options_.window) {
            p.since_delay = 0;
            if (options_.delay.count() > 0) std::this_thread::sleep_for(options_.delay);
        }
        if (options_.stall_every != 0 && (p.since_stall += n) >= options_.stall_every) {
            p.since_stall = 0;
            std::this_thread::sleep_for(options_.stall);
        }
        return !cut(p.given += n, options_.cut_after);
    }

    void pass(int client, int server) {
        std::vector<char> piece(std::size_t{256} << 10);
        progress p;
        for (;;) {
            pollfd both[2] = {{client, POLLIN, 0}, {server, POLLIN, 0}};
            if (::poll(both, 2, -1) < 0) return;
            for (int i = 0; i < 2; ++i) {
                if (both[i].revents == 0) continue;
                const auto n = ::recv(both[i].fd, piece.data(), options_.window == 0 ? std::size_t{65536} : piece.size(), 0);
                if (n <= 0 || !hold_up(p, i == 1, static_cast<std::size_t>(n))) return;
                for (ssize_t sent = 0; sent < n;) {
                    const auto m = ::send(both[1 - i].fd, piece.data() + sent, static_cast<std::size_t>(n - sent), MSG_NOSIGNAL);
                    if (m <= 0) return;
                    sent += m;
                }
            }
        }
    }

    int target_;
    options options_;
    int listener_ = -1;
    int port_ = 0;
    mutable std::mutex guard_;
    std::string head_;
    std::vector<int> open_;
    std::vector<std::thread> threads_;
    std::thread acceptor_;
};

}  // namespace cobuild::test

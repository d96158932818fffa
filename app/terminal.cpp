// What every program of ours needs of its terminal: errors, signals.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>

#include <boost/asio/awaitable.hpp>

#include "terminal.hpp"

import cobuild.base;
import cobuild.async;

namespace cobuild::app {

int exit_code_for(const error& e) {
    switch (e.kind()) {
        case errc::invalid:
        case errc::unsupported: return 2;
        case errc::canceled: return 130;
        case errc::internal: return 70;
        default: return 1;
    }
}

void print_error(const error& e) {
    std::string place;
    if (e.where()) place = e.where()->line != 0 ? cat(e.where()->file, ":", e.where()->line, ": ") : cat(e.where()->file, ": ");
    const std::string_view what = e.what();
    std::cerr << "error: " << (what.starts_with(place) ? "" : place) << what << "\n";
}

// ---------------------------------------------------------------- log

namespace {
log_options configured_log;
}

void set_log(log_options options) {
    configured_log = std::move(options);
    configure_log(configured_log);
}

void log_to(int fd) {
    auto options = configured_log;
    options.fd = fd;
    configure_log(std::move(options));
}

// ---------------------------------------------------------------- interrupt

struct interrupt::state {
    async::cancel_source source;
    std::atomic<int> signal{0};
    unique_fd signals;
    unique_fd wake_read, wake_write;
    std::thread thread;
    std::mutex guard;
    std::function<void()> hangup;

    bool hung_up() {
        const std::lock_guard lock(guard);
        if (hangup) hangup();
        return static_cast<bool>(hangup);
    }

    void serve() {
        for (;;) {
            std::array<pollfd, 2> fds{{{signals.get(), POLLIN, 0}, {wake_read.get(), POLLIN, 0}}};
            if (::poll(fds.data(), fds.size(), -1) < 0) continue;
            if (fds[1].revents != 0) return;
            signalfd_siginfo info{};
            if (::read(signals.get(), &info, sizeof info) != static_cast<ssize_t>(sizeof info)) continue;
            const int number = static_cast<int>(info.ssi_signo);
            if (number == SIGHUP && hung_up()) continue;
            int none = 0;
            if (!signal.compare_exchange_strong(none, number)) {
                // Steps run below a process that dies with us, so leaving at once leaves nothing running.
                static constexpr std::string_view bye = "\nkilled\n";
                [[maybe_unused]] const auto n = ::write(2, bye.data(), bye.size());
                ::_exit(128 + number);
            }
            source.cancel(error{errc::canceled, number == SIGINT ? "interrupted (Ctrl-C)" : cat("stopped by signal ", number)});
        }
    }
};

interrupt::interrupt() : state_(std::make_unique<state>()) {
    sigset_t set;
    ::sigemptyset(&set);
    for (const int s : {SIGINT, SIGTERM, SIGHUP}) ::sigaddset(&set, s);
    ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
    state_->signals.reset(::signalfd(-1, &set, SFD_CLOEXEC));
    std::array<int, 2> wake{};
    if (!state_->signals || ::pipe2(wake.data(), O_CLOEXEC) != 0) throw_errno("preparing signals");
    state_->wake_read.reset(wake[0]);
    state_->wake_write.reset(wake[1]);
    state_->thread = std::thread([s = state_.get()] { s->serve(); });
}

interrupt::~interrupt() {
    state_->wake_write.reset();
    state_->thread.join();
}

void interrupt::on_hangup(std::function<void()> f) {
    const std::lock_guard lock(state_->guard);
    state_->hangup = std::move(f);
}

async::cancel_token interrupt::token() const { return state_->source.token(); }
int interrupt::signal() const { return state_->signal; }

void write_whole(const std::string& file, const std::string& text) {
    const std::string temporary = cat(file, ".", random_id());
    std::ofstream out(temporary, std::ios::binary | std::ios::trunc);
    out << text;
    out.close();
    std::error_code ec;
    if (out) std::filesystem::rename(temporary, file, ec);
    if (!out || ec) {
        std::error_code ignored;
        std::filesystem::remove(temporary, ignored);
        throw error{errc::io, cat("cannot write ", file, ec ? cat(": ", ec.message()) : "")};
    }
}

}  // namespace cobuild::app

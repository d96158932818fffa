// A child process for crash and concurrency tests. Include before any import.
#pragma once

#include "support/support.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <exception>
#include <functional>

namespace cobuild::test {

/// Forks; the child runs `body` and leaves by _exit with its result (99 when it threw). Fork before making threads.
class child {
public:
    explicit child(const std::function<int()>& body) {
        int ready[2] = {-1, -1}, go[2] = {-1, -1};
        BOOST_REQUIRE(::pipe(ready) == 0 && ::pipe(go) == 0);
        pid_ = ::fork();
        BOOST_REQUIRE(pid_ >= 0);
        if (pid_ == 0) {
            ::close(ready[0]);
            ::close(go[1]);
            ready_ = ready[1];
            go_ = go[0];
            current() = this;
            int code = 99;
            try {
                code = body();
            } catch (const std::exception& e) {
                std::fprintf(stderr, "child: %s\n", e.what());
            }
            ::_exit(code);
        }
        ::close(ready[1]);
        ::close(go[0]);
        ready_ = ready[0];
        go_ = go[1];
    }
    ~child() {
        if (pid_ > 0 && !waited_) (void)kill();
        ::close(ready_);
        ::close(go_);
    }
    child(const child&) = delete;
    child& operator=(const child&) = delete;

    /// In the child: tells the parent, then waits until it says go (or dies).
    static void reached() {
        char c = 'r';
        if (::write(current()->ready_, &c, 1) != 1 || ::read(current()->go_, &c, 1) != 1) ::_exit(98);
    }
    /// In the parent: waits until the child called reached(); false when it died before.
    bool wait_reached() const {
        char c = 0;
        return ::read(ready_, &c, 1) == 1;
    }
    void go() const {
        const char c = 'g';
        BOOST_REQUIRE(::write(go_, &c, 1) == 1);
    }
    /// The exit code, or minus the signal.
    int wait() {
        int status = 0;
        BOOST_REQUIRE(::waitpid(pid_, &status, 0) == pid_);
        waited_ = true;
        return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    }
    int kill() {
        ::kill(pid_, SIGKILL);
        return wait();
    }

private:
    static child*& current() {
        static child* self = nullptr;
        return self;
    }
    ::pid_t pid_ = -1;
    int ready_ = -1, go_ = -1;
    bool waited_ = false;
};

}  // namespace cobuild::test

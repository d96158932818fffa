#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "cli.hpp"
#include "hand_over.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.build;

namespace cobuild::app {

bool can_hand_over(const build::build_request& asked) {
    return ::access(daemon_program().c_str(), X_OK) == 0 && (asked.context_stream < 0 || ::lseek(STDIN_FILENO, 0, SEEK_SET) == 0);
}

void become_builder(const hand_over& next) {
    if (next.dockerfile) {
        const int file = ::memfd_create("Dockerfile", 0);
        if (file < 0 || ::write(file, next.dockerfile->data(), next.dockerfile->size()) != static_cast<ssize_t>(next.dockerfile->size()) ||
            ::lseek(file, 0, SEEK_SET) < 0 || ::dup2(file, STDIN_FILENO) < 0)
            throw os_error(errno, "handing the Dockerfile to cobuildd");
        ::close(file);
    }
    std::ifstream in("/proc/self/cmdline", std::ios::binary);
    std::vector<std::string> words;
    for (std::string word; std::getline(in, word, '\0');) words.push_back(word);
    std::vector<char*> argv;
    for (auto& w : words) argv.push_back(w.data());
    argv.push_back(nullptr);
    ::execv(daemon_program().c_str(), argv.data());
    throw os_error(errno, "starting " + daemon_program());
}

build::frontend_runner asks_for_more(std::shared_ptr<hand_over> next) {
    return [next](std::shared_ptr<build::job>, build::frontend_request q) -> async::task<build::job_result> {
        next->wanted = true;
        const auto refuse = [](std::string image) -> async::task<build::job_result> {
            throw error{errc::unsupported,
                        cat("the frontend image ", quoted(image),
                            " is run by cobuildd, which is not beside cobuild or cannot be given the context from standard input")};
            co_return build::job_result{};
        };
        return refuse(q.image);
    };
}

}  // namespace cobuild::app

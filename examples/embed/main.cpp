// Builds a directory's Dockerfile from inside another program: embed STATE_DIRECTORY CONTEXT
#include <exception>
#include <iostream>
#include <memory>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/io_context.hpp>

import cobuild.base;
import cobuild.async;
import cobuild.build;

namespace {

cobuild::async::task<void> build(std::string state_directory, std::string context) {
    const auto engine = co_await cobuild::build::engine::open({.root = state_directory});
    std::exception_ptr failed;
    try {
        const auto result = co_await engine->build({.context = context, .tags = {"embedded:1"}});
        std::cout << result.image_digest << "\n";
    } catch (...) {
        failed = std::current_exception();
    }
    co_await engine->close();
    if (failed) std::rethrow_exception(failed);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) {
        std::cerr << "usage: embed STATE_DIRECTORY CONTEXT\n";
        return 2;
    }
    boost::asio::io_context io;
    int code = 0;
    boost::asio::co_spawn(io, build(argv[1], argv[2]), [&](std::exception_ptr failed) {
        if (!failed) return;
        std::cerr << "embed: " << cobuild::describe(failed).what() << "\n";
        code = 1;
    });
    io.run();
    return code;
}

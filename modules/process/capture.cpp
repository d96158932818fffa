module;
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include <boost/asio/awaitable.hpp>

module cobuild.process;

#include "state.hpp"

namespace cobuild::process {

using namespace std::chrono_literals;

namespace {

unique_fd memory_file(std::string_view text) {
    unique_fd fd(::memfd_create("input", MFD_CLOEXEC));
    if (!fd) throw_errno("memfd_create");
    while (!text.empty()) {
        const auto n = ::write(fd.get(), text.data(), text.size());
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) throw_errno("memfd");
        text.remove_prefix(static_cast<std::size_t>(n));
    }
    if (::lseek(fd.get(), 0, SEEK_SET) < 0) throw_errno("lseek");
    return fd;
}

struct collected {
    std::string text;
    bool truncated = false;
};

std::function<async::task<void>(std::span<const std::byte>)> collector(std::shared_ptr<collected> into, std::size_t limit) {
    return [into = std::move(into), limit](std::span<const std::byte> piece) -> async::task<void> {
        const auto room = limit - into->text.size();
        into->truncated = into->truncated || piece.size() > room;
        into->text += text_of(piece.first(std::min(room, piece.size())));
        co_return;
    };
}

async::task<void> join_all(async::task_group& group) { co_await group.join(); }

}  // namespace

async::task<output> spawner::capture(command c, capture_options options) {
    constexpr auto work = [](spawner& self, command c, capture_options options) -> async::task<output> {
        const auto name = c.args.empty() ? std::string() : c.args.front();
        const auto input = options.input.empty() ? unique_fd() : memory_file(options.input);
        c.in = input ? stdio::given(input.get()) : stdio::null_device();
        c.out = stdio::pipe();
        c.err = stdio::pipe();
        c.setup.new_process_group = true;
        auto program = co_await self.spawn(std::move(c));
        auto out = std::make_shared<collected>();
        auto err = std::make_shared<collected>();
        async::task_group readers(co_await async::current_executor, true);
        readers.spawn(read_all(program.take_stdout(), collector(out, options.max_output)));
        readers.spawn(read_all(program.take_stderr(), collector(err, options.max_output)));

        std::exception_ptr failed;
        try {
            if (options.time_limit > 0ns)
                co_await async::with_deadline(options.time_limit, name, program.state_->until_ended());
            else
                co_await program.state_->until_ended();
        } catch (...) {
            failed = std::current_exception();
        }
        co_await async::no_cancel;
        if (failed) program.signal_group(SIGKILL);
        std::exception_ptr late;
        try {
            co_await async::with_deadline(1s, name, join_all(readers));
        } catch (...) {
            late = std::current_exception();
        }
        program.signal_group(SIGKILL);  // what it left behind; it is not collected yet, so the group is still its own
        const auto status = co_await program.wait();
        if (failed) std::rethrow_exception(failed);
        co_return output{.status = status, .out = std::move(out->text), .err = std::move(err->text), .truncated = out->truncated || err->truncated};
    };
    // A chain of its own: what it shields from cancellation while it cleans up ends with it.
    return async::linked(async::cancel_token{}, work(*this, std::move(c), std::move(options)));
}

}  // namespace cobuild::process

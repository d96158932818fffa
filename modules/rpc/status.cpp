module;
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <grpc/support/log.h>
#include <boost/asio/awaitable.hpp>

#include "grpc.hpp"

module cobuild.rpc;

import :internal;

namespace cobuild::rpc {

namespace {
/// With gRPC 1.51's own choice of poller, messages of 0.5 and 1 MiB over a socket pair stalled for 10 s at times (8 runs of 50;
/// why is not known), with poll(2) never (0 of 50). gRPC reads the choice from the environment when it is first used; this
/// is set before main, when there is one thread.
[[maybe_unused]] const int poll_chosen = ::setenv("GRPC_POLL_STRATEGY", "poll", 0);
}  // namespace

std::vector<std::string> values(const metadata& m, const std::string& key) {
    std::vector<std::string> out;
    const auto [from, to] = m.equal_range(key);
    for (auto i = from; i != to; ++i) out.push_back(i->second);
    return out;
}

std::string value(const metadata& m, const std::string& key) {
    const auto at = m.find(key);
    return at == m.end() ? std::string() : at->second;
}

status to_status(const error& e) {
    const auto of = [](errc kind) {
        switch (kind) {
            case errc::invalid: return code::invalid_argument;
            case errc::not_found: return code::not_found;
            case errc::exists: return code::already_exists;
            case errc::permission: return code::permission_denied;
            case errc::unauthorized: return code::unauthenticated;
            case errc::unavailable: return code::unavailable;
            case errc::timed_out: return code::deadline_exceeded;
            case errc::canceled: return code::canceled;
            case errc::no_space: return code::resource_exhausted;
            case errc::corrupt: return code::data_loss;
            case errc::unsupported: return code::unimplemented;
            case errc::internal: return code::internal;
            case errc::step_failed:
            case errc::io: return code::unknown;
        }
        return code::unknown;
    };
    return {of(e.kind()), e.what(), {}};
}

error to_error(const status& s) {
    const auto of = [](rpc::code c) {
        switch (c) {
            case code::canceled: return errc::canceled;
            case code::invalid_argument:
            case code::out_of_range:
            case code::failed_precondition: return errc::invalid;
            case code::deadline_exceeded: return errc::timed_out;
            case code::not_found: return errc::not_found;
            case code::already_exists: return errc::exists;
            case code::permission_denied: return errc::permission;
            case code::resource_exhausted: return errc::no_space;
            case code::aborted:
            case code::unavailable: return errc::unavailable;
            case code::unimplemented: return errc::unsupported;
            case code::internal: return errc::internal;
            case code::data_loss: return errc::corrupt;
            case code::unauthenticated: return errc::unauthorized;
            case code::ok:
            case code::unknown: break;
        }
        return errc::io;
    };
    return error{of(s.code), s.message.empty() ? std::string("the call failed and the peer did not say why") : s.message};
}

async::task<status> unary(std::shared_ptr<call> c, std::function<async::task<std::string>(std::string)> answer) {
    auto request = co_await c->read();
    if (!request) co_return status{code::invalid_argument, cat(c->method(), ": the request is missing"), {}};
    auto response = co_await answer(std::move(*request));
    co_await c->write(std::move(response));
    co_return status{};
}

void set_up_grpc() {
    static const bool once = [] {
        gpr_set_log_function([](gpr_log_func_args* args) {
            log(args->severity == GPR_LOG_SEVERITY_ERROR ? log_level::debug : log_level::trace, "grpc", {{"message", args->message}});
        });
        return true;
    }();
    (void)once;
}

}  // namespace cobuild::rpc

module;
#include <cstdint>
#include <optional>
#include <string>

#include <boost/asio/awaitable.hpp>

module cobuild.gateway;

namespace cobuild::gateway {

async::task<std::optional<std::int64_t>> frontend_gateway::source_time(llb::source_op, std::string) { co_return std::nullopt; }

}  // namespace cobuild::gateway

module;
#include <cstddef>
#include <memory>
#include <optional>

#include <boost/asio/awaitable.hpp>

module cobuild.solver;

namespace cobuild::solver {

async::task<std::optional<digest>> op::content_key(std::size_t, result, context) { co_return std::nullopt; }
async::task<std::shared_ptr<void>> op::prepare(context) { co_return nullptr; }

}  // namespace cobuild::solver

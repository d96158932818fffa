module;
#include <boost/asio/awaitable.hpp>

module cobuild.gateway;

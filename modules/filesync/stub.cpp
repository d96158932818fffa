module;
#include <boost/asio/awaitable.hpp>
module cobuild.filesync;
namespace cobuild::filesync {
async::task<void> send(async::blocking_pool&, packet_stream&, std::vector<tree>, send_options) { throw error{errc::unsupported, "transferring directories is not supported yet"}; }
async::task<received> receive(async::blocking_pool&, packet_stream&, std::string, receive_options) { throw error{errc::unsupported, "transferring directories is not supported yet"}; }
}

/// Internal to cobuild.client: what its bodies share. Protobuf's types stay in the bodies: what is here takes them as templates.
module;
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.client:internal;

import cobuild.base;
import cobuild.async;
import cobuild.rpc;
import cobuild.progress;
import cobuild.client;

namespace cobuild::client {

template<class M>
M decode(std::string_view bytes) {
    M out;
    if (!out.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) throw error{errc::corrupt, "the peer sent a malformed message"};
    return out;
}

template<class Timestamp>
progress::time_point time_of(const Timestamp& t) {
    return progress::time_point{std::chrono::seconds(t.seconds()) + std::chrono::nanoseconds(t.nanos())};
}

template<class Map>
attributes to_map(const Map& m) {
    return attributes(m.begin(), m.end());
}

struct outcome {
    rpc::status status;
    std::string answer;
};
/// One request, one answer, and how it ended; rpc::channel::unary() would keep the sentence alone.
async::task<outcome> invoke(channel_ptr to, std::string method, std::string message, rpc::metadata request = {});
/// Reads a stream of answers to its end; throws what it ended with.
async::task<void> listen(channel_ptr to, std::string method, std::string message, std::function<void(std::string_view)> each);

/// Tells `sink` a build's status stream to its end; `heard` is called for every message of it.
async::task<void> follow_status(channel_ptr to, std::string ref, std::shared_ptr<progress::sink> sink, std::function<void()> heard);

struct session::state {
    async::executor ex;
    async::blocking_pool& pool;
    session_options options;
    std::string id;
};
using lent = std::shared_ptr<const session_options>;
using call_ptr = std::shared_ptr<rpc::call>;

async::task<rpc::status> serve_secret(lent what, async::blocking_pool& pool, call_ptr c);
async::task<rpc::status> serve_login(lent what, call_ptr c);
async::task<rpc::status> serve_agent_check(lent what, call_ptr c);
async::task<rpc::status> serve_agent(lent what, call_ptr c);
async::task<rpc::status> serve_upload(lent what, call_ptr c);
async::task<rpc::status> serve_blob_info(lent what, async::blocking_pool& pool, call_ptr c);
async::task<rpc::status> serve_blob(lent what, async::blocking_pool& pool, call_ptr c);
async::task<rpc::status> serve_blob_write(lent what, async::blocking_pool& pool, call_ptr c);
async::task<rpc::status> serve_directory(lent what, async::blocking_pool& pool, call_ptr c);
async::task<rpc::status> serve_target(lent what, async::blocking_pool& pool, call_ptr c);

/// The values of a header that may be there in its encoded form ("<key>-encoded: 1", query escapes).
std::vector<std::string> header_values(const rpc::metadata& m, const std::string& key);

}  // namespace cobuild::client

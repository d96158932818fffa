module;
#include <optional>
#include <string>
#include <vector>
#include <boost/asio/awaitable.hpp>
export module cobuild.filesync;
import cobuild.base;
import cobuild.async;
import cobuild.fs;
export namespace cobuild::filesync {
class packet_stream {
public:
    virtual ~packet_stream() = default;
    virtual async::task<std::optional<std::string>> read() = 0;
    virtual async::task<void> write(std::string message) = 0;
};
struct tree { std::string name; int fd = -1; };
struct send_options { std::optional<fs::file_time> mtime; };
struct receive_options { bool compare_metadata = true; };
struct received { std::size_t files = 0; };
async::task<void> send(async::blocking_pool& pool, packet_stream& to, std::vector<tree> trees, send_options o);
async::task<received> receive(async::blocking_pool& pool, packet_stream& from, std::string directory, receive_options o);
}

/// Partition of cobuild.source: files behind http and https URLs, each as a layer that holds the one file.
///
/// What was fetched is remembered with its ETag and Last-Modified under the state directory; while its layer lives the
/// server is asked whether it changed, and only then fetched again. Redirects are followed (ten at most); credentials go to
/// the URL's own scheme, host and port only. What fails for now is tried again (options.attempts). The peer is hostile:
/// sizes and times have limits.
///
/// Thread safety: calls on the engine's io thread. Errors name the URL: errc::not_found (404, 410), unauthorized (401,
/// 403), unavailable, timed_out, corrupt (not the digest asked for), invalid (not a URL).
module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

export module cobuild.source:http;

import cobuild.base;
import cobuild.async;
import cobuild.state;
import cobuild.snapshot;
import cobuild.progress;

export namespace cobuild::source {

/// A secret of the client by name; empty: not given.
using secret_reader = std::function<async::task<std::optional<std::string>>(std::string)>;

/// Gives the file that a client sends under a path, piece by piece; false: it sends none.
using upload_reader = std::function<async::task<bool>(std::string path, std::function<async::task<void>(std::string piece)> to)>;

struct http_request {
    std::string url;                 ///< of the host "buildkit-session": what the client sends when it is asked for the path
    std::optional<digest> checksum;  ///< what the bytes must have
    std::string filename;            ///< in the layer; empty: Content-Disposition, else the URL's last component, else "download"
    std::uint32_t perm = 0600;
    std::uint32_t uid = 0, gid = 0;
    std::string auth_secret;                     ///< secret that is the Authorization header; empty: HTTP_AUTH_HEADER_<host>, HTTP_AUTH_TOKEN_<host>
    std::map<std::string, std::string> headers;  ///< Accept and User-Agent count
    upload_reader upload{};                      ///< for the host "buildkit-session"
};

struct http_file {
    std::string filename;
    digest content;
    std::uint64_t size = 0;
    std::int64_t modified = 0;  ///< Last-Modified, seconds since 1970; 0: the server does not say
    snapshot::chain chain;
    state::pin keep;
};

struct http_options {
    unsigned attempts = 4;
    nanoseconds first_wait = std::chrono::milliseconds{200};  ///< doubled each time
    std::uint64_t max_bytes = std::uint64_t{64} << 30;
    std::size_t parallel = 8;  ///< downloads at once
};

class http_files {
public:
    http_files(state::directory& directory, snapshot::store& snapshots, http_options options = {});
    ~http_files();
    http_files(const http_files&) = delete;
    http_files& operator=(const http_files&) = delete;

    /// Fetches, or finds what is still the same.
    async::task<http_file> fetch(http_request request, secret_reader secrets, progress::writer progress);

private:
    struct state;
    std::shared_ptr<state> state_;
};

}  // namespace cobuild::source

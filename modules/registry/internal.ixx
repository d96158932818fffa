/// What the bodies of cobuild.registry share. Everything here lives on a registry's strand. Not installed.
module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.registry:internal;

import cobuild.base;
import cobuild.async;
import cobuild.http;
import cobuild.oci;
import cobuild.registry;

namespace cobuild::registry {

using clock = std::chrono::steady_clock;

// ---------------------------------------------------------------- counted sockets

/// Sockets to a group of endpoints: at most `transfers` + `metadata`, idle ones included.
class socket_pool : public std::enable_shared_from_this<socket_pool> {
public:
    socket_pool(async::executor strand, limits l, nanoseconds idle_close);
    ~socket_pool();

    /// A slot and at most one socket. Give it back by destroying it, on the strand.
    class lease {
    public:
        lease() = default;
        lease(lease&&) noexcept = default;
        lease& operator=(lease&&) = delete;
        ~lease();
        /// The connection to that endpoint: an idle one, or a new one; the previous goes back.
        http::connection& at(const http::endpoint& e, const http::connection_options& options);
        [[nodiscard]] http::connection* current() const noexcept { return connection_.get(); }
        std::string trace;  ///< ties the log lines of one operation together

    private:
        friend class socket_pool;
        void put_back();
        std::shared_ptr<socket_pool> pool_;
        async::semaphore::permit transfer_, total_;
        std::unique_ptr<http::connection> connection_;
    };

    async::task<lease> acquire(bool transfer);
    /// Transfers that could start now.
    [[nodiscard]] std::size_t spare() const noexcept;
    [[nodiscard]] bool waited_for() const noexcept { return transfers_.waiting() > 0; }
    void close_idle();
    [[nodiscard]] std::size_t open() const noexcept { return count_->now; }
    [[nodiscard]] std::size_t peak() const noexcept { return count_->peak; }
    [[nodiscard]] std::size_t waiting() const noexcept { return transfers_.waiting() + total_.waiting(); }

private:
    struct counter {
        std::size_t now = 0, peak = 0;
    };
    struct idle {
        std::unique_ptr<http::connection> connection;
        clock::time_point since;
    };
    struct timer;
    void sweep();
    void schedule();

    std::size_t cap_, most_transfers_;
    async::semaphore transfers_, total_;
    std::size_t busy_ = 0;    // leases that have a connection
    std::vector<idle> idle_;  // oldest first
    nanoseconds idle_close_;
    std::shared_ptr<counter> count_ = std::make_shared<counter>();
    async::executor strand_;
    std::unique_ptr<timer> timer_;
};

// ---------------------------------------------------------------- hosts

struct token {
    std::string header;  ///< the value of Authorization
    clock::time_point expires;
    std::string login;  ///< what it was got with
};

struct host_state {
    host_settings settings;
    http::endpoint endpoint;
    bool https_tried = false;                  ///< try_https_first has been decided
    std::optional<http::tls_context> tls;      ///< loaded at first use
    std::optional<http::tls_context> far_tls;  ///< the same trust without our keys, for other origins
    std::string files;                         ///< state of the certificate files when they were read
    clock::time_point rests_until{};
    clock::time_point warned_until{};  ///< the same failure is told once until then
    unsigned warned_status = 0;
    std::map<std::string, clock::time_point> lacks;  ///< repositories it answered 404 for, until when that counts
    std::set<std::string> distrusted;                ///< digests it gave wrong bytes for
    std::optional<challenge> wants;                  ///< the last challenge
    std::map<std::string, token> tokens;             ///< by identity, realm, service, scopes
    std::map<std::string, std::shared_ptr<async::semaphore>> token_locks;

    /// "127.0.0.1:5000", as errors and logs name it.
    [[nodiscard]] const std::string& name() const { return settings.host; }
};

/// An answer, or the lack of one, that sends us to the next host.
struct host_error : error {
    host_error(error e, unsigned http_status = 0) : error(std::move(e)), status(http_status) {}
    unsigned status;           ///< 0: no answer
    bool reached = true;       ///< a socket was connected
    bool broken_body = false;  ///< ended in the middle: may be taken up again here
    bool progress = false;     ///< bytes came before it broke
    bool rest = false;         ///< leave this host out for a while
    std::optional<nanoseconds> retry_after;
};

/// One registry of the client.
struct registry_state : std::enable_shared_from_this<registry_state> {
    std::string domain;
    std::shared_ptr<const options> opts;
    async::executor strand;
    std::shared_ptr<socket_pool> pool;
    std::map<std::string, std::shared_ptr<socket_pool>> far_pools;  ///< by origin: token servers, redirect targets
    std::vector<std::unique_ptr<host_state>> hosts;
    std::map<cobuild::digest, std::set<std::string>> seen_in;  ///< blobs and the repositories that have them

    std::shared_ptr<socket_pool> far_pool(const std::string& origin);
    [[nodiscard]] bool owns(const http::endpoint& e) const;
};

const login& who_asks(const registry_state& r, const call_options& call);

// ---------------------------------------------------------------- requests

struct ask {
    std::string method = "GET";
    std::string path;  ///< below the host's path prefix: "/library/alpine/manifests/latest"
    std::vector<std::pair<std::string, std::string>> query;
    http::headers headers;
    std::vector<std::string> scopes;  ///< "repository:library/alpine:pull"
    std::optional<http::body_source> body;
    std::optional<http::url> absolute;  ///< instead of path: an upload's Location
    bool challenged_once = false;       ///< hand a 401 back instead of answering it
    std::string digest;                 ///< for the log
};

/// A head and where its body comes from.
struct answer {
    http::response head;
    http::connection* from = nullptr;
    http::url asked;    ///< after redirects
    std::string login;  ///< that was tried: `the login of "u" from FILE`
    std::optional<socket_pool::lease> far;
};

async::task<void> prepare(registry_state& r, host_state& h);
async::task<answer> perform(registry_state& r, host_state& h, socket_pool::lease& slot, ask what, call_options call);
/// Reads the error document and throws a host_error that says it.
async::task<void> refuse(registry_state& r, host_state& h, answer& a, std::string doing);

struct authorization {
    std::string header;  ///< empty: send none
    std::string login;   ///< what it rests on, for errors: `the login of "u" from FILE`; empty: anonymous
};
/// The Authorization value for these scopes, from cache or a token server. `rejected` got a 401.
async::task<authorization> authorize(registry_state& r, host_state& h, socket_pool::lease& slot, std::vector<std::string> scopes, const login& who,
                                     std::string rejected);

/// Tries hosts in order; returns when `op` does. `fatal` set by op before it throws ends everything with that exception.
struct attempt_plan {
    std::string doing;  ///< "resolve docker.io/library/alpine:3"
    std::string repository;
    bool transfer = false;
    bool by_digest = false;  ///< hosts known to lack the repository are left out
    bool push = false;       ///< origin only
    std::string digest;
    std::string media_type;
    std::uint64_t size = 0;
};
async::task<void> try_hosts(registry_state& r, attempt_plan plan, call_options call,
                            std::function<async::task<void>(host_state&, socket_pool::lease&)> op, std::shared_ptr<bool> fatal = {});

// ---------------------------------------------------------------- docker's config.json

inline constexpr std::string_view hub_key = "https://index.docker.io/v1/";
bool is_hub(std::string_view host);
/// What docker calls the host in its file and to its helpers.
std::string docker_key(const std::string& host);
/// Docker's ConvertToHostname: keys may be addresses with a scheme and a path.
std::string host_of_key(std::string_view key);
/// The config.json in `dir`; empty: $DOCKER_CONFIG, else ~/.docker.
std::string docker_config_file(std::string dir);

std::string pull_scope(const oci::reference& ref);
std::string push_scope(const oci::reference& ref);
std::optional<nanoseconds> parse_retry_after(std::string_view text);

/// The names of one request in the debug log.
struct log_ids {
    std::string trace, span;
};
log_ids next_span(const std::string& trace);
/// "do request" and "fetch response received", with the keys that BuildKit's users look for; secrets left out.
void log_request(const http::url& u, const http::request& q, const std::string& digest, const log_ids& ids);
void log_response(const http::url& u, const http::response& a, const std::string& digest, const log_ids& ids);
/// `[registry."x"]`, or that there is none.
std::string entry_of(const host_state& h);
/// Throws when the body comes in a coding nobody asked for: its bytes are not the blob's.
void refuse_encoding(const answer& a, std::string_view what);

struct content_range {
    std::uint64_t first = 0;
    std::uint64_t last = 0;
    std::optional<std::uint64_t> total;
};
/// "bytes 10-19/20" or "bytes 10-19/*".
std::optional<content_range> parse_content_range(std::string_view text);

/// The rest of a blob, in parts that several connections bring at once.
struct part_fetch {
    ask what;            ///< without a range
    std::string blob;    ///< as errors name it
    std::uint64_t from;  ///< the first byte wanted
    std::uint64_t size;  ///< of the whole blob
    call_options call;
    /// In order, on the strand.
    std::function<async::task<void>(async::chunk, nanoseconds waited)> deliver;
};
/// `slot` and spare transfers of its pool, which go back one by one when others wait for them. The first failure ends it all.
async::task<void> fetch_parts(registry_state& r, host_state& h, socket_pool::lease& slot, part_fetch job);
/// Where a mount may find `blob`, best first.
std::vector<std::string> mount_sources(const registry_state& r, const oci::reference& ref, const cobuild::digest& blob,
                                       std::vector<std::string> named);

// ---------------------------------------------------------------- operations

async::task<std::vector<host_report>> do_check(std::shared_ptr<registry_state> r, oci::reference ref, call_options call);
async::task<oci::descriptor> do_copy(client& c, async::blocking_pool& pool, oci::reference from, oci::reference to, copy_options o);
async::task<void> do_ping(std::shared_ptr<registry_state> r, call_options call);
async::task<std::vector<std::string>> do_tags(std::shared_ptr<registry_state> r, oci::reference ref, call_options call);

async::task<resolved> do_resolve(std::shared_ptr<registry_state> r, oci::reference ref, call_options call);
async::task<manifest_content> do_fetch_manifest(std::shared_ptr<registry_state> r, oci::reference ref, oci::descriptor target, call_options call);
async::task<std::string> do_fetch_small(std::shared_ptr<registry_state> r, oci::reference ref, oci::descriptor target, call_options call);
async::task<std::string> do_fetch_blob(std::shared_ptr<registry_state> r, oci::reference ref, oci::descriptor blob, blob_sink sink, fetch_options o);
async::task<bool> do_exists(std::shared_ptr<registry_state> r, oci::reference ref, oci::descriptor what, call_options call);
async::task<push_outcome> do_push_blob(std::shared_ptr<registry_state> r, oci::reference ref, oci::descriptor blob,
                                       std::function<async::task<http::body_source>()> open, push_options o);
async::task<digest> do_push_manifest(std::shared_ptr<registry_state> r, oci::reference ref, std::string media_type, std::string bytes,
                                     call_options call);

}  // namespace cobuild::registry

/// Internal to cobuild.daemon: its parts and what they say to each other. Everything on the engine's io thread.
module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.daemon:internal;

import cobuild.base;
import cobuild.async;
import cobuild.build;
import cobuild.config;
import cobuild.filesync;
import cobuild.policy;
import cobuild.progress;
import cobuild.registry;
import cobuild.rpc;
import cobuild.session;
import :types;

namespace cobuild::daemon {

// ---------------------------------------------------------------- sessions

/// A client's end of a session, as long as the tunnel stands.
struct tunnel {
    std::string id, name, shared_key;
    std::set<std::string> methods;  ///< lower case
    std::shared_ptr<rpc::channel> channel;
    async::cancel_source closed;
    [[nodiscard]] bool offers(std::string_view method) const;
};

class sessions {
public:
    explicit sessions(async::executor ex) : ex_(std::move(ex)) {}
    /// Control.Session: until the client closes the tunnel, or does not answer two health checks.
    async::task<rpc::status> serve(std::shared_ptr<rpc::call> c);
    /// Waits for it to appear; a "prefix:" before the id is nothing. Throws errc::not_found after `limit`.
    async::task<std::shared_ptr<tunnel>> get(std::string id, nanoseconds limit);
    [[nodiscard]] std::size_t size() const { return open_.size(); }

private:
    async::executor ex_;
    std::map<std::string, std::shared_ptr<tunnel>> open_;
    std::map<std::string, std::shared_ptr<async::event>> awaited_;
};

/// Directories of clients that stay for their next build, so that only changes are sent. Below "<root>/contexts".
class context_store {
public:
    context_store(std::string root, async::blocking_pool& pool) : root_(std::move(root)), pool_(pool) {}
    /// One that nobody uses, the one with the same rules first; locked until destroyed.
    struct place {
        std::string path;
        unique_fd lock;
    };
    async::task<std::shared_ptr<place>> take(std::string key, std::string rules);
    /// Removes what nobody uses; returns bytes.
    async::task<std::uint64_t> clear();

private:
    std::string root_;
    async::blocking_pool& pool_;
};

/// Waits for another client's tunnel.
using tunnel_finder = std::function<async::task<std::shared_ptr<tunnel>>(std::string id)>;
/// A remote client as the engine knows clients; `find` for directories that are another's ("local-sessionid:").
std::shared_ptr<::cobuild::session::session> make_remote(std::shared_ptr<tunnel> t, context_store& contexts, async::blocking_pool& pool,
                                                         tunnel_finder find = {});
/// Its blobs under one id; null when it serves none.
std::shared_ptr<::cobuild::session::blob_store> make_blobs(std::shared_ptr<tunnel> t, std::string id);
/// Its logins.
std::shared_ptr<const registry::login> make_login(std::shared_ptr<tunnel> t);

// ---------------------------------------------------------------- what builds tell

/// Keeps what a build told for its Status calls. Bounded: of output the oldest goes first.
class event_log final : public progress::sink {
public:
    void on_event(const progress::event& e) override;
    void finish();
    /// The events from number `from` on, at least one unless the build has ended; `from` is moved. Empty: the end.
    async::task<std::vector<progress::event>> next(std::size_t& from);

    struct counts {
        std::int32_t total = 0, cached = 0, completed = 0, warnings = 0;
    };
    [[nodiscard]] counts count() const;
    /// Everything that is kept.
    [[nodiscard]] std::vector<progress::event> all() const { return {events_.begin(), events_.end()}; }

private:
    std::deque<progress::event> events_;
    std::size_t first_ = 0;  ///< number of events_.front()
    std::size_t bytes_ = 0;
    bool ended_ = false;
    std::shared_ptr<async::event> more_ = std::make_shared<async::event>();
    std::map<digest, std::pair<bool, bool>> vertices_;  ///< completed, cached
    std::int32_t warnings_ = 0;
};

/// StatusResponse messages, each small enough for every client.
std::vector<std::string> encode_status(const std::vector<progress::event>& events);

// ---------------------------------------------------------------- builds

/// What one frontend (a client, or an image's) knows and has of a build: its end of LLBBridge.
struct bridge_state {
    std::string prefix;                                       ///< of its refs' ids
    std::map<std::string, std::shared_ptr<build::ref>> refs;  ///< those it was told of, by id
    std::uint64_t next_ref = 0;
    std::map<std::string, std::string> inputs;  ///< serialized definitions by name
    std::map<std::string, std::shared_ptr<build::container>> containers;
    bool closed = false;
    /// What Return brought: a result, or a status.
    std::optional<build::job_result> returned;
    std::optional<rpc::status> refused;
    async::event driven;  ///< set with either
};

/// One Solve call, and its client as a frontend.
struct build_state : bridge_state {
    std::string ref;
    std::shared_ptr<event_log> events = std::make_shared<event_log>();
    std::shared_ptr<build::job> job;
    std::map<std::string, std::string> provenance;  ///< of its results by platform, for the record
    std::vector<std::string> images;                ///< descriptors of the images it made
    std::vector<std::string> denied;                ///< why the client's policy verifier refused a source
    async::event prepared;                          ///< there is a job, or the build has ended
    bool ended = false;
    std::chrono::system_clock::time_point started = std::chrono::system_clock::now();
};

class builds {
public:
    /// Throws errc::exists.
    std::shared_ptr<build_state> add(std::string ref);
    /// Waits for it to be started; throws errc::not_found.
    async::task<std::shared_ptr<build_state>> get(std::string ref, nanoseconds limit);
    void end(const std::shared_ptr<build_state>& b);
    /// Forgets what ended ten seconds ago.
    void sweep();
    [[nodiscard]] std::size_t running() const;
    /// Those that run and those that ended a moment ago.
    [[nodiscard]] const std::map<std::string, std::shared_ptr<build_state>>& known() const { return known_; }
    /// Since the daemon started.
    [[nodiscard]] std::uint64_t begun() const { return begun_; }

private:
    std::uint64_t begun_ = 0;
    std::map<std::string, std::shared_ptr<build_state>> known_;
    std::map<std::string, std::shared_ptr<async::event>> awaited_;
    std::deque<std::pair<std::chrono::steady_clock::time_point, std::string>> ended_;
};

// ---------------------------------------------------------------- history

/// Records of builds, kept below "<root>/history" with what they told. Records are serialized BuildHistoryRecords.
class history {
public:
    history(std::string root, async::blocking_pool& pool, config::history_table limits);
    void begin(const std::string& ref, std::string record);
    /// `logs`: StatusResponses, each after its size in four bytes, the lowest first. `blobs` are what else the record names.
    async::task<void> complete(std::string ref, std::string record, std::string logs, std::vector<std::string> blobs);
    /// A build that is not to be kept has ended.
    void forget_active(const std::string& ref);
    /// Control.ListenBuildHistory.
    async::task<rpc::status> listen(std::shared_ptr<rpc::call> c, std::string request);
    /// Deletes or pins; throws errc::not_found.
    async::task<void> update(std::string ref, bool remove, bool pinned);
    /// The file with what a build told.
    [[nodiscard]] std::optional<std::string> logs_of(const std::string& ref) const;
    async::task<std::optional<std::string>> read_blob(digest id);
    /// Digests and sizes.
    async::task<std::vector<std::pair<std::string, std::uint64_t>>> blobs();
    async::task<void> open();

private:
    struct listener_state {
        std::deque<std::pair<std::string, std::string>> waiting;
        std::shared_ptr<async::event> more = std::make_shared<async::event>();
    };
    void tell(int type, const std::string& record);
    async::task<void> sweep();
    std::filesystem::path at_;
    async::blocking_pool& pool_;
    config::history_table limits_;
    bool opened_ = false;
    std::map<std::string, std::string> active_, done_;
    std::multiset<std::string> writing_;  ///< blobs of records that are being written
    std::set<std::shared_ptr<listener_state>> listeners_;
};
/// The spans of a build's steps, a JSON object a line, as OpenTelemetry's span stubs: what `buildx history trace` shows.
std::string trace_of(const std::string& ref, const std::vector<progress::event>& events);
/// Takes serialized records; throws errc::invalid for a filter that is none.
std::function<bool(const std::string&)> parse_history_filters(const std::vector<std::string>& filters);

/// fsutil packets over a call to a client; a write that fails throws what the client ended the call with.
std::shared_ptr<filesync::packet_stream> packets_over(std::shared_ptr<rpc::stream> s);

/// What every service works with.
struct world {
    options given;
    async::executor ex;
    async::blocking_pool& pool;
    cobuild::daemon::sessions sessions;
    cobuild::daemon::builds builds;
    context_store contexts;
    cobuild::daemon::history history;
    std::string worker_id;
    std::uint64_t disk = 0;  ///< bytes of the state directory's file system
    world(options o, std::string worker);
};

/// A client's cache entries. Those of type local are in stores of its session: the daemon's own directories are none of its business.
template<class Entries>
std::vector<build::cache_entry> cache_entries(const Entries& entries) {
    std::vector<build::cache_entry> out;
    for (const auto& e : entries) out.push_back({e.type(), {e.attrs().begin(), e.attrs().end()}});
    return out;
}

/// The status of a failed build: its sentence, the step and the lines of the source it comes from, and what a policy verifier said.
/// With `told`, that frontend can look into what the step left: the details name it by refs' ids.
rpc::status build_status(const error& e, const std::optional<build::job::failure>& where, bridge_state* told = nullptr,
                         const std::vector<std::string>& denied = {});

/// What a frontend refused a build with, as an error that keeps its details; and the status of any failure of a build, those among them.
struct told_error : error {
    explicit told_error(rpc::status s) : error(rpc::to_error(s)), full(std::move(s)) {}
    rpc::status full;
};
rpc::status failure_status(std::exception_ptr failed, const std::optional<build::job::failure>& where, bridge_state* told = nullptr,
                           const std::vector<std::string>& denied = {});

/// What runs frontends that are images.
build::frontend_runner run_frontend_images(std::shared_ptr<world> w);

/// A serialized Policy; throws errc::invalid.
policy::policy read_policy(const std::string& bytes);
/// Asks the verifier of a client's session.
build::source_verifier make_verifier(std::shared_ptr<world> w, const std::shared_ptr<build_state>& b, std::string session);
/// A serialized ResolveSourceMetaRequest's answer; `verify`: the client's verifier is asked about the source.
async::task<std::string> resolve_source_meta(std::shared_ptr<build_state> b, std::string request, bool verify);

// ---------------------------------------------------------------- listening

struct listener {
    unique_fd fd;
    std::string address;
    bool tls = false;
    std::string unlink;  ///< a socket's file, removed in the end
    listener() = default;
    listener(listener&& other) noexcept
        : fd(std::move(other.fd)), address(std::move(other.address)), tls(other.tls), unlink(std::exchange(other.unlink, {})) {}
    listener& operator=(listener&&) = delete;
    ~listener();
};
std::vector<listener> open_listeners(const options& o);
/// --debugaddr: HOST:PORT, tcp:// or unix://; who reaches it reads what the daemon does, and no more.
listener open_debug_listener(std::string address, const options& o);
std::optional<rpc::tls> read_tls(const config::tls_table& files);

// ---------------------------------------------------------------- services

/// A call of a frontend on a build that is under way.
struct bridge_call {
    std::shared_ptr<world> w;
    std::shared_ptr<build_state> b;
    std::shared_ptr<bridge_state> f;
};
using bridge_handler = std::function<async::task<rpc::status>(bridge_call, std::shared_ptr<rpc::call>)>;
/// LLBBridge's methods, those of containers among them; null for a name it does not have.
bridge_handler bridge_method_of(std::string_view name);
bridge_handler container_handler(std::string_view name);
/// One request, one answer, both serialized; a failure tells of the step it comes from.
bridge_handler on_bridge(std::function<async::task<std::string>(bridge_call, std::string)> answer);
/// Throws errc::not_found.
std::shared_ptr<build::ref> find_ref(const bridge_call& c, const std::string& id);
/// Its id; empty for null.
std::string keep_ref(bridge_state& f, std::shared_ptr<build::ref> r);
/// A serialized Stat.
std::string wire_stat(const build::file_entry& e);
/// Releases what the frontend left.
async::task<void> close_bridge(std::shared_ptr<bridge_state> f);

/// Methods of Control, of LLBBridge and of containerd's Content; null for a name they do not have.
using method = std::function<async::task<rpc::status>(std::shared_ptr<world>, std::shared_ptr<rpc::call>)>;
method control_method(std::string_view name);
method bridge_method(std::string_view name);
method content_method(std::string_view name);
/// By the whole path: what every gRPC server answers (health, reflection), and traces, which are taken and dropped.
method common_method(std::string_view path);

// ---------------------------------------------------------------- the debug listener

using calls_under_way = std::function<std::vector<rpc::server::open_call>()>;
/// Answers GETs of HTTP/1.1 until cancelled: /metrics and /debug/..., docs/daemon.md lists them.
async::task<void> serve_debug(std::shared_ptr<world> w, calls_under_way calls, unique_fd listening);
/// The answer to a GET of `path`, its type before it; empty where there is nothing.
struct debug_answer {
    int status = 200;
    std::string type = "text/plain; charset=utf-8";
    std::string body;
};
debug_answer debug_page(world& w, const std::vector<rpc::server::open_call>& calls, std::string_view path);
/// Serialized WorkerRecord and BuildkitVersion.
std::string worker_record(const world& w);
std::string version_record();
/// What Ping lists: ids of what is there.
std::vector<std::string> frontend_capabilities();
std::vector<std::string> llb_capabilities();

/// Control.Solve.
async::task<rpc::status> solve(std::shared_ptr<world> w, std::shared_ptr<rpc::call> c);
/// Hands the build's result to the exporters of the request, whose output goes to the client; returns the response's map.
async::task<std::map<std::string, std::string>> export_result(std::shared_ptr<world> w, std::shared_ptr<build_state> b,
                                                              std::shared_ptr<tunnel> client, build::job_result result,
                                                              std::vector<build::output> outputs);

}  // namespace cobuild::daemon

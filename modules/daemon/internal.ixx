/// Internal to cobuild.daemon: its parts and what they say to each other. Everything on the engine's io thread.
module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
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

/// One Solve call.
struct build_state {
    std::string ref;
    std::shared_ptr<event_log> events = std::make_shared<event_log>();
    std::shared_ptr<build::job> job;
    std::map<std::string, std::shared_ptr<build::ref>> refs;  ///< those the client was told of, by id
    std::uint64_t next_ref = 0;
    std::map<std::string, std::string> inputs;      ///< graphs the client gave the build by name, serialized
    std::map<std::string, std::string> provenance;  ///< of its results by platform, for the record
    /// What Return brought: a result, or a status.
    std::optional<build::job_result> returned;
    std::optional<rpc::status> refused;
    async::event driven;    ///< set with either
    async::event prepared;  ///< there is a job, or the build has ended
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

private:
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

/// A client's cache entries; those in its own directories are refused: the daemon's are none of its business.
template<class Entries>
std::vector<build::cache_entry> cache_entries(const Entries& entries) {
    std::vector<build::cache_entry> out;
    for (const auto& e : entries) {
        if (e.type() == "local") throw error{errc::unsupported, "a cache of type local is not supported by the daemon yet; registry and inline are"};
        out.push_back({e.type(), {e.attrs().begin(), e.attrs().end()}});
    }
    return out;
}

/// The status of a failed build: its sentence, the step and the lines of the source it comes from.
rpc::status build_status(const error& e, const std::optional<build::job::failure>& where);

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
std::optional<rpc::tls> read_tls(const config::tls_table& files);

// ---------------------------------------------------------------- services

/// Methods of Control, of LLBBridge and of containerd's Content; null for a name they do not have.
using method = std::function<async::task<rpc::status>(std::shared_ptr<world>, std::shared_ptr<rpc::call>)>;
method control_method(std::string_view name);
method bridge_method(std::string_view name);
method content_method(std::string_view name);
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

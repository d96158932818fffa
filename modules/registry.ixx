/// cobuild.registry: a client of distribution-spec registries: resolve, pull, push, log in, with counted connections.
///
/// Words. A *registry* is the domain of a reference ("docker.io"). Its *hosts* are the mirrors in order and then the
/// *origin*; a push goes to the origin only. A *transfer* moves a blob; *metadata* are manifests, indexes, configs, tags.
///
/// Counting. Per registry one strand owns every socket to its hosts, idle ones included: never more than
/// limits.transfers + limits.metadata, and never more than limits.transfers moving blobs, first come first served, however
/// many images or builds of the process. Token servers and redirect targets on other origins count apart, as many again.
/// While a slot is held nothing is waited for but the network: a push asks for its bytes before it takes one.
///
/// Hosts are tried in order, each once; the next one on any failure, with one warning a failure (a 404 is none). A host that
/// could not be reached or answered 5xx is then left out for `host_rest`, except as the last. Only the last host is waited
/// for (429 with Retry-After, 408, 5xx). When all fail, one error lists each host with its answer.
///
/// Thread safety: any thread, any executor; callers resume on their own. Sinks, sources and progress callbacks run on the
/// registry's strand (with an engine's runtime: its io thread). Errors: cobuild::error; unauthorized, not_found,
/// unavailable, timed_out, corrupt as base says.
/// Not responsible for: storing, unpacking, choosing what to pull or push.
module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

export module cobuild.registry;

import cobuild.base;
import cobuild.async;
import cobuild.http;
import cobuild.oci;
import cobuild.config;
import cobuild.process;

export namespace cobuild::registry {

// ---------------------------------------------------------------- hosts

/// One endpoint that serves a registry.
struct host_settings {
    std::string host;              ///< "registry-1.docker.io", "127.0.0.1:5000"
    bool plain_http = false;       ///< http instead of https
    bool insecure = false;         ///< https without verification
    bool try_https_first = false;  ///< with plain_http: https first, http when the host does not speak it; remembered
    std::vector<std::string> ca;
    std::vector<http::key_pair> key_pairs;
    std::vector<std::string> tls_dirs;
    std::string path_prefix = "/v2";
    bool mirror = false;     ///< asked with ns=<domain>; gets no pushes
    std::string section;     ///< the configuration entry that speaks for it, as errors name it: `[registry."docker.io"]`
    bool configured = true;  ///< that entry exists
};

/// The hosts of a registry in the order they are tried, origin last. Pure and thread-safe.
using host_resolver = std::function<std::vector<host_settings>(std::string_view domain)>;

/// The origin alone: https, or http on loopback; docker.io is registry-1.docker.io.
std::vector<host_settings> default_hosts(std::string_view domain);

/// The hosts as buildkitd.toml's [registry] sections say (reference: mirrors of the domain's section, each with a section of
/// its own; then the origin with the domain's).
/// Directories certs/HOST[:PORT] in /etc/buildkit and in $XDG_CONFIG_HOME/buildkit (~/.config/buildkit) count as tlsconfigdir.
host_resolver configured_hosts(const config::configuration& settings);

// ---------------------------------------------------------------- logins

struct credential {
    std::string username;
    std::string secret;          ///< password; with an empty username an identity (refresh) token
    std::string registry_token;  ///< a ready bearer token; then nothing else counts
    std::string origin;          ///< where it was found ("/root/.docker/config.json"), for errors; may be empty
};

/// The login for a host ("127.0.0.1:5000"; Docker Hub is "registry-1.docker.io"), or empty. May be asked again any time.
using credential_provider = std::function<async::task<std::optional<credential>>(std::string host)>;

/// Runs `docker-credential-<name> <verb>` ("get", "store", "erase") with `input` on its standard input and returns its output;
/// throws with the helper's own words when it fails.
using helper_runner = std::function<async::task<std::string>(std::string program, std::string verb, std::string input)>;

/// Starts them as programs found on PATH, a minute each at most. `programs` must outlive it.
helper_runner run_helpers_with(process::spawner& programs);

/// $DOCKER_AUTH_CONFIG (the text of a config.json) first, then docker's config.json in `dir` (empty: $DOCKER_CONFIG, else
/// ~/.docker), read anew when it changed. Helpers are asked every time. credHelpers and credsStore need `run_helper`; without
/// it they throw errc::unsupported naming the helper.
credential_provider docker_credentials(async::blocking_pool& pool, std::string dir = {}, helper_runner run_helper = {});

/// Keeps the login for `host` where docker would: in the helper that the config.json names for it, else in the file (0600,
/// its other members untouched). Returns the file or the helper's program.
async::task<std::string> store_login(async::blocking_pool& pool, std::string host, credential login, std::string dir = {},
                                     helper_runner run_helper = {});
/// Removes it; false when there was none.
async::task<bool> forget_login(async::blocking_pool& pool, std::string host, std::string dir = {}, helper_runner run_helper = {});

/// One challenge of a WWW-Authenticate header (RFC 9110 11.6.1).
struct challenge {
    std::string scheme;                                           ///< lower case
    std::vector<std::pair<std::string, std::string>> parameters;  ///< keys in lower case
    [[nodiscard]] std::string get(std::string_view key) const;    ///< empty when absent
};
/// Never throws: what cannot be read is left out.
std::vector<challenge> parse_challenges(std::string_view header);

/// Who asks. Tokens are shared among requests of the same identity only.
struct login {
    credential_provider credentials;
    std::string identity;
};

// ---------------------------------------------------------------- client

struct limits {
    std::size_t transfers = 4;
    std::size_t metadata = 1;
};

struct retry_policy {
    unsigned attempts = 4;                             ///< without progress, the first one included
    nanoseconds first_wait = std::chrono::seconds{1};  ///< doubles each time, with jitter
    nanoseconds longest_wait = std::chrono::seconds{8};
    nanoseconds longest_retry_after = std::chrono::seconds{60};  ///< a server asking for more fails at once
    nanoseconds slow_window = std::chrono::seconds{60};          ///< a body that brings less than `slowest` bytes in it is given up
    std::uint64_t slowest = std::uint64_t{16} << 10;
};

/// A large blob whose receiver mostly waits for the network is fetched in parts over transfers that nobody else wants, where the
/// server allows ranges; the receiver gets them in order. At most limits.transfers + 1 parts are in memory.
struct split_policy {
    std::uint64_t part = std::uint64_t{8} << 20;  ///< 0: never
    unsigned waiting_percent = 70;                ///< of the time, over the first part's bytes
};

struct options {
    async::executor executor;
    async::blocking_pool* pool = nullptr;  ///< for reading certificates; none: in place
    host_resolver hosts = default_hosts;
    login who;
    registry::limits limits;
    retry_policy retry;
    split_policy split;
    http::timeouts timeouts;
    http::proxy_settings proxy = http::proxy_settings::from_environment();
    std::string user_agent;                             ///< empty: "cobuild/<version>"
    nanoseconds idle_close = std::chrono::seconds{30};  ///< an unused socket is closed after this
    nanoseconds host_rest = std::chrono::seconds{30};
};

struct call_options {
    std::shared_ptr<const login> who;                   ///< none: options.who
    std::function<void(std::uint64_t bytes)> progress;  ///< bytes that came or went since the last call; may repeat after a retry
    std::function<void(const std::string&)> warn;       ///< besides the log
};

struct resolved {
    oci::descriptor target;  ///< the manifest or index; its size is 0 and media type empty when the reference had a digest
    std::string host;        ///< who answered; empty when nobody was asked
};

struct manifest_content {
    std::string media_type;
    std::string bytes;       ///< exactly what the digest is of
    oci::descriptor target;  ///< complete now
    std::string host;
};

/// An image as far as a build needs it to plan: no layers yet.
struct image_content {
    std::optional<manifest_content> index;  ///< when the reference names one
    manifest_content manifest;              ///< of the chosen platform
    oci::manifest parsed;
    std::string config_bytes;
    oci::image config;
};

/// Where a blob goes, in order, from the first byte; awaited, so a slow receiver slows the transfer.
using blob_sink = std::function<async::task<void>(async::chunk)>;

struct fetch_options {
    call_options call;
    /// false: the receiver checks the digest itself (hashing on another thread); size is checked here all the same.
    bool verify = true;
    std::size_t chunk_size = std::size_t{256} << 10;
    std::uint64_t offset = 0;  ///< the receiver has this many bytes already; needs verify = false
};

/// Bytes known already (a content store): asked before the network for manifests and configs by digest.
using local_lookup = std::function<async::task<std::optional<std::string>>(oci::descriptor)>;

struct push_options {
    call_options call;
    /// Repositories of the same registry that may have the blob ("library/alpine"); those this client has seen with it are
    /// tried too, the one of the most similar name first.
    std::vector<std::string> mount_from;
};

enum class push_outcome { existed, mounted, uploaded };

/// What one host says of a reference. Sentences for people; empty where it did not come so far.
struct host_report {
    std::string host;
    std::string section;
    bool configured = false;  ///< the section exists
    bool mirror = false;
    std::string url;                        ///< "https://registry-1.docker.io/v2"
    std::string address;                    ///< what was connected to, "10.1.2.3:443"
    std::string trust;                      ///< what its certificate was held against, or that it was not
    std::vector<std::string> certificates;  ///< as shown, the host's own first
    std::string login;                      ///< what was used to log in
    std::string api;                        ///< the answer to /v2/, "200 OK"
    std::string manifest;                   ///< the answer about the reference
    std::string digest;                     ///< of the manifest, as the host says
    std::string failure;                    ///< the sentence of what stopped it
    nanoseconds took{};
};

struct copy_options {
    call_options call;
    std::optional<oci::platform> platform;  ///< of an index only this one; none: all of it
    /// Called after each blob and manifest.
    std::function<void(const oci::descriptor&, push_outcome)> done;
};

/// Of one registry's hosts.
struct socket_use {
    std::size_t open = 0;     ///< idle ones included
    std::size_t peak = 0;     ///< the most there ever were
    std::size_t waiting = 0;  ///< calls that wait for a slot
};

class client {
public:
    explicit client(options o);
    ~client();
    client(const client&) = delete;
    client& operator=(const client&) = delete;

    /// A tag by one HEAD (GET where HEAD is refused or tells too little); a digest asks nobody. No tag means latest.
    async::task<resolved> resolve(oci::reference ref, call_options call = {});
    /// A manifest or index, verified against target.digest, at most 4 MiB.
    async::task<manifest_content> fetch_manifest(oci::reference ref, oci::descriptor target, call_options call = {});
    /// A small blob as a whole (image config, provenance): metadata, verified, at most 16 MiB.
    async::task<std::string> fetch_small(oci::reference ref, oci::descriptor target, call_options call = {});
    /// resolve, index, platform, manifest, config. Throws errc::not_found listing the platforms there are.
    async::task<image_content> fetch_image(oci::reference ref, oci::platform wanted, local_lookup local = {}, call_options call = {});

    /// Moves a blob into `sink`. A broken body is taken up where it broke (Range), from the same host and then the next.
    /// Returns the host that served the end. errc::corrupt names blob, host, declared and received size or digest.
    async::task<std::string> fetch_blob(oci::reference ref, oci::descriptor blob, blob_sink sink, fetch_options o = {});
    /// The bytes `host` gave for `blob` were wrong: it is not asked for this blob again.
    void distrust(const oci::reference& ref, const std::string& host, const digest& blob);

    /// Is it there? Asks the origin only.
    async::task<bool> exists(oci::reference ref, oci::descriptor what, call_options call = {});
    /// HEAD, then mount, then upload by POST and one PUT. `open` is called only when an upload is needed, with no slot
    /// held, so it may itself fetch from this registry.
    async::task<push_outcome> push_blob(oci::reference ref, oci::descriptor blob, std::function<async::task<http::body_source>()> open,
                                        push_options o = {});
    /// PUT under the reference's tag, or under the digest when it has none. Returns the digest of `bytes`.
    async::task<digest> push_manifest(oci::reference ref, std::string media_type, std::string bytes, call_options call = {});

    /// Copies an image or index, blobs first, the root last. Blobs the destination has, or can mount, are not read; others go
    /// through a file without a name in the system's temporary directory. Needs options.pool.
    async::task<oci::descriptor> copy(oci::reference from, oci::reference to, copy_options o = {});
    /// The repository's tags, sorted, at most a hundred thousand.
    async::task<std::vector<std::string>> tags(oci::reference ref, call_options call = {});
    /// Asks every host for `ref` by itself, mirrors at rest included. Never throws for what a host does.
    async::task<std::vector<host_report>> check(oci::reference ref, call_options call = {});
    /// One authenticated GET of /v2/ at the origin; throws errc::unauthorized when the login is refused.
    async::task<void> ping(std::string domain, call_options call = {});

    /// Sockets to the hosts of a registry right now, idle ones included.
    [[nodiscard]] std::size_t open_sockets(std::string_view domain) const;
    /// The most there ever were.
    [[nodiscard]] std::size_t peak_sockets(std::string_view domain) const;
    /// A line for each registry: its sockets now and at most ever, calls that wait for one. Roughly, as open_sockets().
    [[nodiscard]] std::vector<std::pair<std::string, socket_use>> sockets() const;

    /// From now on calls ask the hosts that `hosts` names, and read certificates anew; calls under way end as they began. Sockets
    /// are counted on as before. Throws what `hosts` throws.
    async::task<void> reload(host_resolver hosts);
    /// Closes idle sockets; one in use closes with its call.
    async::task<void> close();

private:
    struct state;
    std::shared_ptr<state> state_;
};

}  // namespace cobuild::registry

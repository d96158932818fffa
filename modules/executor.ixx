/// cobuild.executor: runs one build step on a root file system that somebody else has prepared.
///
/// The contract says what a step sees and what is left afterwards, not how: today an OCI runtime (runc, crun) does the
/// work, and a sandbox of our own can stand beside it by passing the suite in tests/executor.
///
/// What a step sees. A root, mounts on it, PID, IPC, UTS and mount namespaces of its own, the network it was given, the 14
/// capabilities BuildKit grants as far as this process has them, the default seccomp profile of the container world,
/// masked and read-only parts of /proc and /sys, the standard devices, HOME from the root's /etc/passwd unless set.
///
/// What is left. Nothing but what the step wrote: no process, mount, secret, cgroup; mount points that had to be created are
/// gone again and their parents' times as before. The same after cancellation and, cgroups aside, after kill -9 of this
/// process: those stand in the ledger.
///
/// Cancelling run(): SIGTERM to the step's processes, SIGKILL when `grace` has passed. A first process that does not catch
/// SIGTERM would ignore it and let a shell script go on with its next command: it is stopped while the others end.
///
/// Errors: a step that ran and failed is a value (exit). Thrown are errc::not_found (`exec "foo": executable file not found
/// in $PATH`, an unknown user), errc::permission, errc::invalid (a step that makes no sense), errc::unsupported by name,
/// errc::canceled. Use from the runtime's executor; any number of steps at once.
/// Not responsible for: what the root holds, network namespaces (cni), limits on how many steps run (solver).
module;
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

export module cobuild.executor;

import cobuild.base;
import cobuild.async;
import cobuild.process;

export namespace cobuild::executor {

// ---------------------------------------------------------------- a step

/// One mount below the root. `target` is absolute or relative to the step's cwd; of two with one target the last counts.
struct mount {
    enum class kind {
        bind,    ///< what `selector` names inside `source`
        tmpfs,   ///< fresh; `size` in bytes, 0: no limit
        secret,  ///< a file with `data`, in memory only, read-only
        ssh,     ///< a socket: `source` (and `selector`) name it, as for bind
    };
    kind what = kind::bind;
    std::string target{};
    /// bind, ssh: a detached mount or any open directory or file (O_PATH will do); stays the caller's, open until run() returns.
    int source = -1;
    /// Links are followed inside `source` and never lead out of it.
    std::string selector{};
    bool readonly = false;
    std::uint64_t size = 0;
    std::string data{};
    unsigned uid = 0;
    unsigned gid = 0;
    unsigned mode = 0400;
};

/// insecure: every capability this process has, no seccomp, nothing masked or read-only, all devices. That a build may ask
/// for it was decided before (entitlements).
enum class security { sandbox, insecure };

/// Soft and hard limit by docker's name ("nofile", "core").
struct ulimit {
    std::string name;
    std::int64_t soft = 0;
    std::int64_t hard = 0;
};
struct host_entry {
    std::string host;
    std::string ip;
};
/// Set for HTTP_PROXY, http_proxy and so on where not empty.
struct proxies {
    std::string http{}, https{}, ftp{}, no{}, all{};
};
/// 0 or empty: no limit of its own. Bytes, microseconds, list syntax of cpusets.
struct resources {
    std::int64_t memory = 0, memory_swap = 0;
    std::int64_t cpu_shares = 0, cpu_period = 0, cpu_quota = 0;
    std::string cpuset_cpus{}, cpuset_mems{};
};

struct step {
    std::string id{};  ///< [A-Za-z0-9_.-]+, unique among the running steps of this process
    std::vector<std::string> args{};
    std::vector<std::string> env{};  ///< "KEY=value"; PATH is added when missing, of two with one key the last counts
    std::string cwd = "/";           ///< created (0755, the step's user) when missing
    std::string user{};              ///< "", uid, name, uid:gid, name:group ...; names are those of the root's own files
    std::string hostname{};          ///< empty: "buildkitsandbox"
    std::vector<host_entry> extra_hosts{};
    int network_namespace = -1;  ///< a namespace descriptor; -1: the host's network
    executor::security security = executor::security::sandbox;
    int root = -1;  ///< a detached mount; stays the caller's, open until run() returns
    bool root_readonly = false;
    std::vector<mount> mounts{};
    std::vector<ulimit> ulimits{};
    std::uint64_t shm_size = std::uint64_t{64} << 20;
    executor::resources resources{};
    std::string cgroup_parent{};
    std::optional<std::string> resolv_conf{};  ///< content, mounted read-only; empty optional: the root's own stays
    std::optional<std::string> hosts{};        ///< content; empty optional: hosts_text(hostname, extra_hosts)
    std::vector<int> valid_exit_codes{};       ///< empty: {0}
    executor::proxies proxies{};
    bool remove_stubs_recursively = false;  ///< also directories that had to be made above a mount point
    bool terminal = false;                  ///< a terminal of its own; see streams

    async::cancel_token force{};  ///< cancelled: SIGKILL at once, without grace (a second Ctrl-C)
};

/// Bytes as they arrive, in pieces of at most 32 KiB. Awaited before more is read: a slow sink slows the step down. A sink
/// that throws ends the step, and run() throws what it threw.
using sink = std::function<async::task<void>(std::span<const std::byte>)>;
struct streams {
    sink out{};  ///< empty: dropped
    sink err{};  ///< of a process with a terminal all its output goes to `out`
    /// Its standard input, to the end; -1: nothing. Taken over. With a terminal it is what is typed there.
    unique_fd in{};
    /// Instead of `out`: where its standard output goes without passing through us. Taken over. Not with a terminal.
    unique_fd direct_out{};
};

/// A running process as who started it reaches it: handed to run() or exec() empty, filled by them before `started` is set.
/// What is asked before or after that does nothing. Io thread.
struct control {
    async::event started;  ///< set when it runs, also when it never will
    std::function<async::task<void>(int)> signal{};
    std::function<void(unsigned rows, unsigned columns)> resize{};
};

/// A further process of a running step: it sees what the step sees and ends with the step's own process at the latest. Users are
/// those of the step's root; the working directory must exist.
struct further_process {
    std::vector<std::string> args{};
    std::vector<std::string> env{};
    std::string cwd = "/";
    std::string user{};
    bool terminal = false;
};

struct exit {
    int code = 0;           ///< 128 + signal when a signal ended it
    bool accepted = false;  ///< one of step.valid_exit_codes
    bool oom = false;       ///< the kernel killed one of its processes for memory (known on cgroup v2 hosts only)
};

// ---------------------------------------------------------------- the contract

class runner {
public:
    virtual ~runner() = default;
    virtual async::task<exit> run(step s, streams io, std::shared_ptr<control> reach) = 0;
    async::task<exit> run(step s, streams io) { return run(std::move(s), std::move(io), nullptr); }
    /// Starts it once the step named `id` runs; throws errc::not_found when there is no such step. Cancelling kills it at once.
    virtual async::task<exit> exec(std::string id, further_process what, streams io, std::shared_ptr<control> reach) = 0;
    /// Removes what all steps share (parent cgroups) and its ledger entries. No step may be running.
    virtual async::task<void> close() = 0;
    /// "runc (/usr/sbin/runc)", for logs and worker labels.
    [[nodiscard]] virtual std::string name() const = 0;
};

/// Where deeds are noted that outlive a killed process; each text is durable before record() returns.
class ledger {
public:
    virtual ~ledger() = default;
    virtual async::task<void> record(std::string text) = 0;
    virtual async::task<void> forget(std::string text) = 0;
};
/// Undoes what an entry recorded by a dead owner says. Harmless when nothing is left.
async::task<void> clean_cgroups(async::blocking_pool& pool, std::string text);

// ---------------------------------------------------------------- OCI runtimes

struct options {
    std::string binary{};                ///< path or name of the runtime; empty: the first of buildkit-runc, runc, crun in PATH
    std::string work_dir{};              ///< an existing directory; steps mount their bundles over it, each in its own mount namespace
    std::string owner{};                 ///< this process's id in the state directory, part of its cgroups' names
    executor::ledger* ledger = nullptr;  ///< one entry per parent cgroup, not per step
    nanoseconds grace = std::chrono::milliseconds(500);
};

struct runtime_program {
    std::string path;
    bool crun = false;
};
/// Finds and checks the runtime. errc::not_found says what to install; errc::unsupported when it is crun on a host with
/// hybrid cgroups, which crun refuses.
runtime_program find_runtime(std::string_view binary);

/// `rt` and `programs` outlive the runner.
std::unique_ptr<runner> open_oci_runner(async::runtime& rt, process::spawner& programs, options o);

// ---------------------------------------------------------------- /etc/hosts, /etc/resolv.conf

std::string hosts_text(std::string_view hostname, std::span<const host_entry> extra);

struct dns {
    std::vector<std::string> nameservers{}, search{}, options{};
};
/// The text for a step: `dns` overrides line by line; without the host's network, loopback servers are dropped and public ones
/// stand in when none is left, as BuildKit does. `host` is the text of the host's file.
std::string resolv_conf_text(std::string_view host, const dns& overrides, bool host_network);
/// /etc/resolv.conf; when its only server is 127.0.0.53 and `host_network` is false, systemd-resolved's real list.
std::string host_resolv_conf(bool host_network);

}  // namespace cobuild::executor

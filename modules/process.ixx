/// cobuild.process: starting programs, waiting for them, stopping them.
///
/// Every child of cobuild is started by a `spawner`: one thread of its own that lives as long as the object. A parent-death
/// signal follows the parent's *thread*, so only a child started there dies with the process and not with some pool thread.
/// The child shares our memory until it executes its program (CLONE_VM | CLONE_VFORK): starting costs the same however big
/// we are, and whatever fails on the way is reported by name before spawn() returns. Between clone and exec only system
/// calls run: no allocation, no lock, no libc state.
///
/// Waiting goes through a pidfd. No signal handler is set, no child is collected that was not started here. A child gets no
/// descriptor but the ones named in its command, default signal handlers and an empty signal mask.
///
/// Thread safety: a spawner may be used from any thread; a child from one executor at a time. Paths are absolute.
/// Not responsible for: what the namespaces hold (executor, cni), shells, terminals.
module;
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

export module cobuild.process;

import cobuild.base;
import cobuild.async;

export namespace cobuild::process {

// ---------------------------------------------------------------- what to start

/// Where one of a child's descriptors 0, 1, 2 leads.
class stdio {
public:
    enum class kind { null_device, inherited, given, pipe };
    static stdio null_device() { return {}; }
    static stdio inherited() { return stdio{kind::inherited, -1}; }
    /// A descriptor of ours, open until spawn() has returned; it stays ours.
    static stdio given(int fd) { return stdio{kind::given, fd}; }
    /// A new pipe; our end is taken from the child with take_stdin(), take_stdout(), take_stderr().
    static stdio pipe() { return stdio{kind::pipe, -1}; }
    stdio() = default;
    [[nodiscard]] kind what() const noexcept { return kind_; }
    [[nodiscard]] int fd() const noexcept { return fd_; }

private:
    stdio(kind k, int fd) : kind_(k), fd_(fd) {}
    kind kind_ = kind::null_device;
    int fd_ = -1;
};

/// A descriptor of ours that the child finds under the number `target` (3 or more).
struct passed_fd {
    int source = -1;
    int target = -1;
};

/// move_mount: a detached mount (fsmount, open_tree) appears at `target`. The descriptor stays open here and still shows
/// the same files, but it can be attached once only; clone it with clone_mount() where that is too little.
struct attach_mount {
    int mount = -1;
    std::string target;
};
/// A bind mount: what `selector` names inside the directory `from` appears at `target`. Links in `selector` are followed
/// inside `from` and never lead out of it (openat2, RESOLVE_IN_ROOT). An empty selector is `from` itself.
struct bind_mount {
    std::string from;
    std::string selector;
    std::string target;
    bool recursive = true;
};
struct fresh_tmpfs {
    std::string target;
    std::uint64_t size = 0;  ///< bytes, 0: the kernel's default
    unsigned mode = 0755;
};
/// The proc of the child's own PID namespace.
struct fresh_proc {
    std::string target = "/proc";
};
using mount_action = std::variant<attach_mount, bind_mount, fresh_tmpfs, fresh_proc>;

/// What happens in the child between clone and exec, in the order written here.
struct setup {
    bool die_with_parent = false;      ///< SIGKILL when the spawner's thread or our process ends, however it ends
    bool new_pid_namespace = false;    ///< the program is its first process: its end kills all others in it
    bool new_mount_namespace = false;  ///< private: nothing mounted there is seen outside
    std::vector<mount_action> mounts;  ///< needs new_mount_namespace
    /// Namespace descriptors to join. A PID namespace below ours: the program is one of its processes from the start. With a mount
    /// namespace no new one and no mounts can be asked for; the program is looked up before.
    int network_namespace = -1;
    int pid_namespace = -1;
    int mount_namespace = -1;
    bool new_session = false;        ///< setsid
    bool new_process_group = false;  ///< then kill() and the destructor reach the whole group
    std::optional<unsigned> umask;
};

struct command {
    std::vector<std::string> args;                  ///< args[0] is looked up in our PATH when it has no slash
    std::string program{};                          ///< the file to execute when it is not args[0]
    std::optional<std::vector<std::string>> env{};  ///< "KEY=value" each; empty optional: ours
    std::string cwd{};                              ///< empty: ours
    stdio in{};
    stdio out{};
    stdio err{};
    std::vector<passed_fd> fds{};
    process::setup setup{};
};

/// How a program ended: exit code, or the signal that ended it (then code is 128 + signal, as shells say).
struct status {
    int code = 0;
    int signal = 0;
    [[nodiscard]] bool ok() const noexcept { return code == 0; }
    /// "exit code 3", "signal 9 (Killed)".
    [[nodiscard]] std::string str() const;
};

// ---------------------------------------------------------------- a running program

/// Owns a running program. Destroying it before wait() has returned kills it (its group, where it has one) and leaves
/// collecting it to the spawner: no zombie stays.
class child {
public:
    child(child&&) noexcept;
    child& operator=(child&&) noexcept;
    ~child();
    [[nodiscard]] int pid() const noexcept;
    [[nodiscard]] int pidfd() const noexcept;
    /// Our ends of its pipes; empty where there is none or it was taken. Non-blocking, close-on-exec.
    unique_fd take_stdin() noexcept;
    unique_fd take_stdout() noexcept;
    unique_fd take_stderr() noexcept;
    /// Sends a signal to the program; false when it has ended already.
    bool signal(int number) noexcept;
    /// Sends a signal to its process group (setup.new_process_group or new_session), else to the program.
    bool signal_group(int number) noexcept;
    /// Waits for its end; later calls return the same. Cancelling the wait leaves the program alone.
    async::task<status> wait();

private:
    friend class spawner;
    struct state;
    explicit child(std::unique_ptr<state> s) noexcept;
    std::unique_ptr<state> state_;
};

struct capture_options {
    std::string input{};                            ///< its standard input: a file in memory, so a deaf reader costs nothing
    std::size_t max_output = std::size_t{1} << 20;  ///< per stream, bytes; what is beyond is read and dropped
    nanoseconds time_limit{0};                      ///< 0: none; then SIGKILL to the group and errc::timed_out
};

struct output {
    process::status status{};
    std::string out{};
    std::string err{};
    bool truncated = false;  ///< one of the streams was longer than max_output
};

class spawner {
public:
    spawner();
    /// Ends the thread; children with die_with_parent die with it. Every child is destroyed before its spawner.
    ~spawner();
    spawner(const spawner&) = delete;
    spawner& operator=(const spawner&) = delete;

    /// Returns when the program runs. Throws `cannot start "x": <call>: <reason>`; the kind follows the reason, so
    /// errc::not_found is a missing program. A cancelled caller still waits; it then finds the child in its hands.
    async::task<child> spawn(command c);
    /// The same for a thread that may block (never the io thread).
    child spawn_blocking(command c);

    /// Runs a program to its end and collects what it prints. `c.in`, `c.out`, `c.err` are ignored; it gets a process
    /// group. Cancelled: the group is killed, the program collected, then the cancellation goes on. A grandchild that keeps
    /// the pipes open after the program's end is waited for at most one second and killed with the group.
    async::task<output> capture(command c, capture_options options = {});

private:
    friend class child;
    struct state;
    std::shared_ptr<state> state_;
};

// ---------------------------------------------------------------- helpers

/// The executable file `name` means: itself with a slash, else the first hit in `path` (default: our PATH).
std::optional<std::string> find_program(std::string_view name, std::optional<std::string_view> path = {});

/// Reads to the end; `sink` is awaited before more is read, so a slow reader slows the program down.
async::task<void> read_all(unique_fd fd, std::function<async::task<void>(std::span<const std::byte>)> sink);
/// Writes all and closes. A reader that went away is no error, and raises no SIGPIPE.
async::task<void> write_all(unique_fd fd, std::string data);

/// A detached copy of the mount (or of the directory or file) behind `fd`, mounts below it included. Throws by errno;
/// kernels before 6.15 refuse it (EINVAL) for what is detached itself.
unique_fd clone_mount(int fd);

}  // namespace cobuild::process

// What the bodies of cobuild.executor share. Includes nothing; stands after a body's imports so that it belongs to the module.
// Member functions are defined in the bodies: in a module those in a class are not inline by themselves.
#pragma once

namespace cobuild::executor {

// ---------------------------------------------------------------- inside a root (root.cpp)

/// openat2 below `root`: links stay inside it. Throws by errno, naming the path, unless it is only missing: then -1.
unique_fd open_inside(int root, const std::string& path, int flags);
/// Makes a directory and what is missing above it, new ones 0755 and owned by uid:gid.
void make_directories(int root, std::string_view path, unsigned uid, unsigned gid);
/// "/a//b/./c/../d" to "/a/b/d"; relative ones below `base`.
std::string clean_path(std::string_view path, std::string_view base = "/");

/// Mount points that have to be created: made here before a step, so that it is known whether the step changed the
/// directories around them, and removed after it.
class mount_stubs {
public:
    explicit mount_stubs(int root) noexcept;
    mount_stubs(mount_stubs&&) noexcept = default;
    mount_stubs& operator=(mount_stubs&&) noexcept = default;
    ~mount_stubs();
    /// `recursive`: directories made above the mount point are removed as well.
    void make(const std::string& target, bool directory, bool recursive);
    /// Removes those that are still empty. Their parents get their times back, or keep those the step gave them.
    void remove() noexcept;

private:
    struct stub {
        unique_fd parent;
        std::string name;
        bool removable = false;
        struct ::timespec before[2];
        struct ::timespec after;  ///< the parent's modification time once the stub was there
    };
    int root_;
    std::vector<stub> stubs_;
};

// ---------------------------------------------------------------- users (user.cpp)

struct identity {
    unsigned uid = 0;
    unsigned gid = 0;
    std::vector<unsigned> groups;
    std::string home = "/";
};
identity find_user(int root, const std::string& name);

// ---------------------------------------------------------------- cgroups (cgroup.cpp)

/// A file of proc or of a cgroup; empty when it is missing or its process or cgroup goes away while it is read.
std::string read_kernel_file(const std::string& path);
/// Mount points of every hierarchy, v1 and v2.
std::vector<std::string> cgroup_hierarchies();
enum class cgroup_mode { none, v1, hybrid, unified };
cgroup_mode host_cgroups();
/// Removes the cgroup and everything below it in every hierarchy; retries for a while when busy. False: something stayed.
bool remove_cgroup(const std::vector<std::string>& hierarchies, const std::string& path);
void make_cgroup(const std::vector<std::string>& hierarchies, const std::string& path);
/// Processes of a cgroup as this process's PID namespace numbers them.
std::vector<int> cgroup_processes(const std::vector<std::string>& hierarchies, const std::string& path);
/// The ledger's text for a cgroup.
std::string cgroup_entry(std::string_view path);
/// OOM kills at and below a cgroup on a v2 hierarchy; 0 elsewhere.
std::uint64_t oom_kills(const std::string& path);

// ---------------------------------------------------------------- bundle (bundle.cpp, config.cpp, seccomp.cpp)

struct oci_mount {
    std::string target;
    std::string type;
    std::string source;
    std::vector<std::string> options;
};
struct oci_input {
    const executor::step& step;
    const identity& user;
    std::string cgroup;
    std::vector<oci_mount> mounts;  ///< after the standard ones
};
/// config.json as the runtime-spec has it.
std::string oci_config(const oci_input& in);
/// Its "process" alone, for a further process.
std::string oci_process(const oci_input& in);
std::string seccomp_profile_json();

/// A step made ready: a tmpfs attached nowhere that holds the bundle, and the mounts its helper attaches.
struct bundle {
    unique_fd tree;               ///< the detached tmpfs
    std::vector<unique_fd> held;  ///< clones that the mounts below name
    std::vector<process::mount_action> mounts;
    std::optional<mount_stubs> stubs;
    std::string cgroup;

    [[nodiscard]] std::string read(const char* name) const;  ///< empty when absent
};
/// Blocking. `dir` is where the helper sees the bundle.
bundle make_bundle(const step& s, const std::string& dir, const std::string& cgroup);

/// A new file in a bundle; throws when it is there.
unique_fd make_file(int dir, const std::string& name, std::string_view text, unsigned mode);
/// A file of a bundle; empty when absent.
std::string read_file(int dir, const char* name);

// ---------------------------------------------------------------- talking to a runtime (talk.cpp)

/// The standard streams of a program that stands for a process of a step, as its caller wants them.
class talk {
public:
    talk(streams io, bool terminal);
    ~talk();
    talk(const talk&) = delete;
    talk& operator=(const talk&) = delete;
    /// Before it is started, and after.
    void plug(process::command& c);
    void begin(async::executor ex, process::child& program);
    /// Waits for the end of its output; throws what a sink threw.
    async::task<void> end();
    /// Stops at once what is still under way.
    async::task<void> drop();
    void resize(unsigned rows, unsigned columns) noexcept;

private:
    struct state;
    std::unique_ptr<state> state_;
};

/// Waits until the file is there and not empty.
async::task<void> until_written(int dir, std::string name);

// ---------------------------------------------------------------- ending a step (stop.cpp)

/// Sends a signal to the step's process that the runtime's PID namespace numbers `inner`.
async::task<void> signal_process(async::blocking_pool& pool, std::vector<std::string> hierarchies, std::string cgroup, int inner, int number);

/// Ends the step's processes as the contract says; returns when the runtime has ended or was killed.
async::task<void> stop_step(async::blocking_pool& pool, process::child& runtime, std::vector<std::string> hierarchies, std::string cgroup,
                            nanoseconds grace, async::cancel_token force);

}  // namespace cobuild::executor

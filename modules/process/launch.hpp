// What the spawner prepares and the child carries out between clone and exec. Plain pointers into the parent's memory,
// which the child shares until it executes its program.
#pragma once
#include <cstddef>

namespace cobuild::process::detail {

struct launch_action {
    enum class kind { attach, bind, tmpfs, proc };
    kind what = kind::attach;
    int fd = -1;
    const char* from = nullptr;
    const char* selector = nullptr;  // nullptr: `from` itself
    const char* target = nullptr;
    const char* data = nullptr;
    bool recursive = true;
};

struct launch_fd {
    int source = -1;
    int target = -1;
    int moved = -1;  // the child's own working copy
};

struct launch_plan {
    const char* program = nullptr;
    char* const* argv = nullptr;
    char* const* envp = nullptr;
    const char* cwd = nullptr;
    launch_fd* fds = nullptr;  // 0, 1, 2 among them
    std::size_t fd_count = 0;
    const launch_action* actions = nullptr;
    std::size_t action_count = 0;
    int parent = -1;  // a pidfd of the spawner's thread
    int network_namespace = -1;
    int pid_namespace = -1;
    int mount_namespace = -1;
    bool die_with_parent = false;
    bool new_pid_namespace = false;
    bool new_mount_namespace = false;
    bool new_session = false;
    bool new_process_group = false;
    bool set_umask = false;
    unsigned umask = 0;

    // What went wrong, written by the child.
    int error = 0;
    const char* call = nullptr;
    const char* object = nullptr;
    launch_plan* report = nullptr;  ///< where the child writes the three above when it has a copy of our memory
};

/// The new process's id, with its pidfd; or -1 with plan.error and plan.call set. Blocks until it executes or fails.
int launch(launch_plan& plan, int& pidfd);

}  // namespace cobuild::process::detail

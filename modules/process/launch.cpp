#include "launch.hpp"

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <new>

#include <fcntl.h>
#include <linux/openat2.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

// The child runs on memory it shares with a suspended parent: plain system calls only, and no sanitizer's bookkeeping.
#define IN_CHILD __attribute__((disable_sanitizer_instrumentation, noinline))

#ifndef CLOSE_RANGE_CLOEXEC
#define CLOSE_RANGE_CLOEXEC (1U << 2)
#endif

namespace cobuild::process::detail {

namespace {

struct failure {
    int error = 0;
    const char* call = nullptr;
    const char* object = nullptr;
};

IN_CHILD long call(long number, long a = 0, long b = 0, long c = 0, long d = 0, long e = 0) { return ::syscall(number, a, b, c, d, e); }
IN_CHILD long arg(const void* p) { return reinterpret_cast<long>(p); }
IN_CHILD failure failed(const char* name, const char* object = nullptr) { return {errno, name, object}; }

IN_CHILD void default_signals() {
    struct {
        std::uint64_t handler, flags, restorer, mask;
    } none{};  // the kernel's own layout; all zero is SIG_DFL
    for (int n = 1; n < 65; ++n) call(SYS_rt_sigaction, n, arg(&none), 0, 8);
    const std::uint64_t empty = 0;
    call(SYS_rt_sigprocmask, SIG_SETMASK, arg(&empty), 0, 8);
}

IN_CHILD bool parent_is_gone(int parent) {
    pollfd p{parent, POLLIN, 0};
    timespec now{};
    return call(SYS_ppoll, arg(&p), 1, arg(&now), 0, 8) > 0;
}

IN_CHILD failure attach(int mount, const char* target) {
    // 4 is MOVE_MOUNT_F_EMPTY_PATH
    if (call(SYS_move_mount, mount, arg(""), AT_FDCWD, arg(target), 4) < 0) return failed("move_mount", target);
    return {};
}

IN_CHILD failure bind(const launch_action& a) {
    long at = call(SYS_openat, AT_FDCWD, arg(a.from), O_PATH | O_CLOEXEC);
    if (at < 0) return failed("open", a.from);
    if (a.selector != nullptr) {
        open_how how{};
        how.flags = O_PATH | O_CLOEXEC;
        how.resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS;
        const long inside = call(SYS_openat2, at, arg(a.selector), arg(&how), sizeof how);
        if (inside < 0) return failed("open", a.selector);
        at = inside;
    }
    // 1 is OPEN_TREE_CLONE
    const long tree = call(SYS_open_tree, at, arg(""), 1 | O_CLOEXEC | AT_EMPTY_PATH | (a.recursive ? AT_RECURSIVE : 0));
    if (tree < 0) return failed("open_tree", a.selector != nullptr ? a.selector : a.from);
    return attach(static_cast<int>(tree), a.target);
}

IN_CHILD failure mount_fresh(const char* type, const launch_action& a, unsigned long flags) {
    if (call(SYS_mount, arg(type), arg(a.target), arg(type), static_cast<long>(flags), arg(a.data)) < 0) return failed("mount", a.target);
    return {};
}

IN_CHILD failure carry_out(const launch_action& a) {
    switch (a.what) {
        case launch_action::kind::attach: return attach(a.fd, a.target);
        case launch_action::kind::bind: return bind(a);
        case launch_action::kind::tmpfs: return mount_fresh("tmpfs", a, MS_NOSUID | MS_NODEV);
        case launch_action::kind::proc: return mount_fresh("proc", a, MS_NOSUID | MS_NODEV | MS_NOEXEC);
    }
    return {};
}

IN_CHILD failure arrange_fds(launch_plan& plan) {
    int free_from = 3;
    for (std::size_t i = 0; i < plan.fd_count; ++i)
        if (plan.fds[i].target >= free_from) free_from = plan.fds[i].target + 1;
    for (std::size_t i = 0; i < plan.fd_count; ++i) {
        plan.fds[i].moved = static_cast<int>(call(SYS_fcntl, plan.fds[i].source, F_DUPFD_CLOEXEC, free_from));
        if (plan.fds[i].moved < 0) return failed("dup");
    }
    if (call(SYS_close_range, 3, ~0U, CLOSE_RANGE_CLOEXEC) < 0 && errno != EINVAL && errno != ENOSYS) return failed("close_range");
    for (std::size_t i = 0; i < plan.fd_count; ++i)
        if (call(SYS_dup3, plan.fds[i].moved, plan.fds[i].target, 0) < 0) return failed("dup3");
    return {};
}

IN_CHILD failure prepare(launch_plan& plan) {
    default_signals();
    if (plan.new_session && call(SYS_setsid) < 0) return failed("setsid");
    if (plan.new_process_group && !plan.new_session && call(SYS_setpgid, 0, 0) < 0) return failed("setpgid");
    if (plan.die_with_parent) {
        if (call(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL) < 0) return failed("prctl");
        if (parent_is_gone(plan.parent)) return {ESRCH, "prctl", nullptr};
    }
    if (plan.network_namespace >= 0 && call(SYS_setns, plan.network_namespace, CLONE_NEWNET) < 0) return failed("setns");
    if (plan.mount_namespace >= 0 && call(SYS_setns, plan.mount_namespace, CLONE_NEWNS) < 0) return failed("setns");
    if (plan.new_mount_namespace) {
        // Slave: unmounting something on the host is not held up by us, and nothing of ours is seen there.
        if (call(SYS_mount, 0, arg("/"), 0, MS_REC | MS_SLAVE) < 0) return failed("mount", "/");
        for (std::size_t i = 0; i < plan.action_count; ++i)
            if (const failure f = carry_out(plan.actions[i]); f.error != 0) return f;
    }
    if (plan.set_umask) call(SYS_umask, plan.umask);
    if (plan.cwd != nullptr && call(SYS_chdir, arg(plan.cwd)) < 0) return failed("chdir", plan.cwd);
    if (const failure f = arrange_fds(plan); f.error != 0) return f;
    // Again: a parent that died while the signal was being asked for is seen now at the latest.
    if (plan.die_with_parent && parent_is_gone(plan.parent)) return {ESRCH, "prctl", nullptr};
    return {};
}

IN_CHILD int child_main(void* data) {
    auto& plan = *static_cast<launch_plan*>(data);
    failure f = prepare(plan);
    if (f.error == 0) {
        call(SYS_execve, arg(plan.program), arg(plan.argv), arg(plan.envp));
        f = failed("execve", plan.program);
    }
    launch_plan& told = plan.report != nullptr ? *plan.report : plan;
    told.error = f.error;
    told.call = f.call;
    told.object = f.object;
    call(SYS_exit_group, 127);
    __builtin_unreachable();
}

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define COBUILD_FORK_INSTEAD 1
#endif
#endif

#ifdef COBUILD_FORK_INSTEAD
/// The thread sanitizer's runtime does not survive a child in the same memory: there it gets a copy, by the bare system
/// call (its own wrapper of clone does more than a child may), and reports through a shared page.
int start_child(launch_plan& plan, int flags, int& fd) {
    void* page = ::mmap(nullptr, sizeof(launch_plan), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) return -1;
    plan.report = ::new (page) launch_plan{};
    const long pid = ::syscall(SYS_clone, flags & ~CLONE_VM, 0L, &fd, 0L, 0L);
    if (pid == 0) child_main(&plan);
    const int clone_error = errno;
    plan.error = plan.report->error;
    plan.call = plan.report->call;
    plan.object = plan.report->object;
    plan.report = nullptr;
    ::munmap(page, sizeof(launch_plan));
    errno = clone_error;
    return static_cast<int>(pid);
}
#else
int start_child(launch_plan& plan, int flags, int& fd) {
    constexpr std::size_t stack_size = 64 * 1024;
    void* stack = ::mmap(nullptr, stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED) return -1;
    const int pid = ::clone(child_main, static_cast<char*>(stack) + stack_size, flags, &plan, &fd);
    const int clone_error = errno;
    ::munmap(stack, stack_size);
    errno = clone_error;
    return pid;
}
#endif

}  // namespace

namespace {

/// Children of this thread are born in another PID namespace as long as this lives; the thread itself stays where it is.
class born_elsewhere {
public:
    explicit born_elsewhere(int pid_namespace) {
        if (pid_namespace < 0) return;
        own_ = ::open("/proc/thread-self/ns/pid", O_RDONLY | O_CLOEXEC);
        joined_ = own_ >= 0 && ::setns(pid_namespace, CLONE_NEWPID) == 0;
        failed_ = !joined_;
    }
    ~born_elsewhere() {
        // Going home cannot fail: a thread may always choose the namespace it is in.
        if (joined_ && ::setns(own_, CLONE_NEWPID) < 0) std::abort();
        if (own_ >= 0) ::close(own_);
    }
    born_elsewhere(const born_elsewhere&) = delete;
    born_elsewhere& operator=(const born_elsewhere&) = delete;
    [[nodiscard]] bool failed() const { return failed_; }

private:
    int own_ = -1;
    bool joined_ = false;
    bool failed_ = false;
};

}  // namespace

int launch(launch_plan& plan, int& pidfd) {
    const born_elsewhere place(plan.pid_namespace);
    if (place.failed()) {
        plan.error = errno;
        plan.call = "setns";
        return -1;
    }
    // A handler of ours must not run in the child, which shares our memory.
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before);
    int flags = CLONE_VM | CLONE_VFORK | CLONE_PIDFD | SIGCHLD;
    if (plan.new_pid_namespace) flags |= CLONE_NEWPID;
    if (plan.new_mount_namespace) flags |= CLONE_NEWNS;
    int fd = -1;
    const int pid = start_child(plan, flags, fd);
    const int clone_error = errno;
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (pid < 0) {
        plan.error = clone_error;
        plan.call = "clone";
        return -1;
    }
    if (plan.error != 0) {
        siginfo_t info{};
        while (::waitid(static_cast<idtype_t>(P_PIDFD), static_cast<id_t>(fd), &info, WEXITED) < 0 && errno == EINTR) {
        }
        ::close(fd);
        return -1;
    }
    pidfd = fd;
    return pid;
}

}  // namespace cobuild::process::detail

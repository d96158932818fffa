module;
#include <array>
#include <cstdint>
#include <ctime>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.executor;

import cobuild.json;

#include "parts.hpp"

namespace cobuild::executor {

// The container world's default profile (the one of docker and BuildKit) as far as it concerns a process without
// CAP_SYS_ADMIN, CAP_SYS_PTRACE and the like, which no step has: what is not listed fails with EPERM. Left out on purpose:
// io_uring (its requests pass by seccomp), keyrings, new namespaces and mounts, modules, bpf, perf, clocks.
namespace {

constexpr std::array<std::string_view, 18> allowed{
    // files by path
    "access chdir chmod chown chown32 chroot creat execve execveat faccessat faccessat2 fchdir fchmodat fchmodat2 fchownat futimesat getcwd "
    "lchown lchown32 link linkat lstat lstat64 mkdir mkdirat mknod mknodat name_to_handle_at newfstatat fstatat64 open openat openat2 readlink "
    "readlinkat rename renameat renameat2 rmdir stat stat64 statfs statfs64 statx symlink symlinkat truncate truncate64 umask unlink unlinkat "
    "utime utimensat utimensat_time64 utimes",
    // open files
    "_llseek cachestat close close_range copy_file_range dup dup2 dup3 fadvise64 fadvise64_64 fallocate fchmod fchown fchown32 fcntl fcntl64 "
    "fdatasync flock fstat fstat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 getdents getdents64 ioctl lseek pread64 preadv preadv2 pwrite64 "
    "pwritev pwritev2 read readahead readv sendfile sendfile64 splice sync sync_file_range syncfs tee vmsplice write writev",
    // extended attributes
    "fgetxattr flistxattr fremovexattr fsetxattr getxattr getxattrat lgetxattr listxattr listxattrat llistxattr lremovexattr lsetxattr "
    "removexattr removexattrat setxattr setxattrat",
    // watching files, asynchronous io
    "fanotify_mark inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents "
    "io_pgetevents_time64 io_setup io_submit ioprio_get ioprio_set",
    // waiting
    "_newselect epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 poll "
    "ppoll ppoll_time64 pselect6 pselect6_time64 select signalfd signalfd4",
    // pipes and sockets (socket itself has a rule below)
    "accept accept4 bind connect getpeername getsockname getsockopt listen pipe pipe2 recv recvfrom recvmmsg recvmmsg_time64 recvmsg send "
    "sendmmsg sendmsg sendto setsockopt shutdown socketcall socketpair",
    // memory
    "brk madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap mmap2 mprotect mremap mseal msync "
    "munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect remap_file_pages",
    // System V and POSIX queues, semaphores, shared memory
    "ipc mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink msgctl msgget "
    "msgrcv msgsnd semctl semget semop semtimedop semtimedop_time64 shmat shmctl shmdt shmget",
    // processes and threads (clone has a rule below)
    "exit exit_group fork get_robust_list get_thread_area getcpu getpgid getpgrp getpid getppid getpriority getrlimit getrusage getsid gettid "
    "kill pause pidfd_open pidfd_send_signal prctl prlimit64 process_mrelease process_vm_readv process_vm_writev ptrace restart_syscall rseq "
    "set_robust_list set_thread_area set_tid_address setpgid setpriority setrlimit setsid tgkill tkill ugetrlimit vfork wait4 waitid waitpid",
    // locks between threads
    "futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake",
    // identity
    "capget capset getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getresgid getresgid32 getresuid getresuid32 getuid "
    "getuid32 setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setregid setregid32 setresgid setresgid32 setresuid "
    "setresuid32 setreuid setreuid32 setuid setuid32",
    // signals
    "rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 "
    "rt_tgsigqueueinfo sigaltstack sigprocmask sigreturn",
    // scheduling
    "sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval "
    "sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield",
    // clocks (reading) and timers
    "adjtimex alarm clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep "
    "clock_nanosleep_time64 getitimer gettimeofday nanosleep setitimer time timer_create timer_delete timer_getoverrun timer_gettime "
    "timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times",
    // sandboxes of the step's own
    "landlock_add_rule landlock_create_ruleset landlock_restrict_self seccomp",
    // the rest
    "getrandom sysinfo uname",
#if defined(__x86_64__)
    "arch_prctl modify_ldt",
#elif defined(__aarch64__)
    "arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2",
#elif defined(__riscv)
    "riscv_flush_icache riscv_hwprobe",
#else
    "",
#endif
    "",
};

constexpr std::array<std::string_view, 3> architectures{
#if defined(__x86_64__)
    "SCMP_ARCH_X86_64", "SCMP_ARCH_X86", ""  // no X32: kernels are built without it, and it makes the filter dearer by 4 ms a step
#elif defined(__aarch64__)
    "SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM", ""
#elif defined(__riscv)
    "SCMP_ARCH_RISCV64", "", ""
#else
    "", "", ""
#endif
};

struct argument_rule {
    std::string_view name;
    std::string_view op;
    std::uint64_t value;
    std::uint64_t second;
};
constexpr std::uint64_t any_namespace = 0x7e020000;  // every CLONE_NEW* flag: none of them may be set
constexpr std::array<argument_rule, 7> by_first_argument{{
    {"socket", "SCMP_CMP_NE", 40, 0},  // AF_VSOCK would reach the hypervisor
    {"clone", "SCMP_CMP_MASKED_EQ", any_namespace, 0},
    {"personality", "SCMP_CMP_EQ", 0, 0},
    {"personality", "SCMP_CMP_EQ", 8, 0},
    {"personality", "SCMP_CMP_EQ", 0x20000, 0},
    {"personality", "SCMP_CMP_EQ", 0x20008, 0},
    {"personality", "SCMP_CMP_EQ", 0xffffffff, 0},
}};

json::object rule(json::array names, std::string_view action) { return {{"names", std::move(names)}, {"action", action}}; }

std::string write_profile() {
    json::array names;
    for (const auto group : allowed)
        for (const auto name : split(group, ' '))
            if (!name.empty()) names.emplace_back(name);
    json::array calls{rule(std::move(names), "SCMP_ACT_ALLOW")};
    for (const auto& r : by_first_argument) {
        auto one = rule({r.name}, "SCMP_ACT_ALLOW");
        one.set("args", json::array{json::object{{"index", 0}, {"value", r.value}, {"valueTwo", r.second}, {"op", r.op}}});
        calls.emplace_back(std::move(one));
    }
    // Its flags lie in memory where no filter sees them; ENOSYS makes every libc fall back to clone.
    auto clone3 = rule({"clone3"}, "SCMP_ACT_ERRNO");
    clone3.set("errnoRet", 38);
    calls.emplace_back(std::move(clone3));
    json::array archs;
    for (const auto a : architectures)
        if (!a.empty()) archs.emplace_back(a);
    return json::serialize(json::object{
        {"defaultAction", "SCMP_ACT_ERRNO"}, {"defaultErrnoRet", 1}, {"architectures", std::move(archs)}, {"syscalls", std::move(calls)}});
}

}  // namespace

std::string seccomp_profile_json() {
    static const std::string text = write_profile();
    return text;
}

}  // namespace cobuild::executor

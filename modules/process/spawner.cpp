module;
#include <array>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <boost/asio/awaitable.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/use_awaitable.hpp>

#include "launch.hpp"

module cobuild.process;

#include "state.hpp"

namespace cobuild::process {

namespace asio = boost::asio;
using detail::launch_action;
using detail::launch_fd;
using detail::launch_plan;

// ---------------------------------------------------------------- the thread

spawner::state::state() : bell_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (!bell_) throw_errno("eventfd");
    std::promise<int> started;
    thread_ = std::thread([this, &started] {
        constexpr unsigned thread_flag = O_EXCL;  // PIDFD_THREAD, Linux 6.9: ends with this thread, not with the process
        int fd = static_cast<int>(::syscall(SYS_pidfd_open, ::gettid(), thread_flag));
        if (fd < 0) fd = static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0U));
        const int reason = errno;
        self_.reset(fd);
        started.set_value(fd < 0 ? reason : 0);
        if (fd >= 0) serve();
    });
    if (const int reason = started.get_future().get(); reason != 0) {
        thread_.join();
        throw os_error(reason, "pidfd_open");
    }
}

void spawner::state::end() {
    {
        const std::lock_guard lock(guard_);
        closing_ = true;
    }
    ring();
    thread_.join();
}

void spawner::state::ring() const noexcept {
    const std::uint64_t one = 1;
    while (::write(bell_.get(), &one, sizeof one) < 0 && errno == EINTR) {
    }
}

bool spawner::state::post(std::function<void()> job) {
    {
        const std::lock_guard lock(guard_);
        if (closing_) return false;
        jobs_.push_back(std::move(job));
    }
    ring();
    return true;
}

void spawner::state::adopt(unique_fd pidfd) {
    {
        const std::lock_guard lock(guard_);
        if (!ended_) {
            orphans_.push_back(std::move(pidfd));
            ring();
            return;
        }
    }
    // Destroyed after its spawner, against the rule: it was killed, so this is short.
    siginfo_t info{};
    while (::waitid(static_cast<idtype_t>(P_PIDFD), static_cast<id_t>(pidfd.get()), &info, WEXITED) < 0 && errno == EINTR) {
    }
}

void spawner::state::serve() {
    std::vector<unique_fd> orphans;
    for (;;) {
        std::deque<std::function<void()>> jobs;
        bool closing = false;
        {
            const std::lock_guard lock(guard_);
            jobs.swap(jobs_);
            for (auto& o : orphans_) orphans.push_back(std::move(o));
            orphans_.clear();
            closing = closing_;
        }
        for (auto& job : jobs) {
            job();
            job = nullptr;
        }
        std::erase_if(orphans, [](const unique_fd& fd) {
            siginfo_t info{};
            const int r = ::waitid(static_cast<idtype_t>(P_PIDFD), static_cast<id_t>(fd.get()), &info, WEXITED | WNOHANG);
            return r < 0 ? errno != EINTR : info.si_pid != 0;
        });
        if (closing && jobs.empty() && orphans.empty()) {
            const std::lock_guard lock(guard_);
            if (jobs_.empty() && orphans_.empty()) {
                ended_ = true;
                return;
            }
            continue;
        }
        std::vector<pollfd> waits{{bell_.get(), POLLIN, 0}};
        for (const auto& o : orphans) waits.push_back({o.get(), POLLIN, 0});
        if (closing) waits.front().fd = -1;
        ::poll(waits.data(), waits.size(), closing && orphans.empty() ? 0 : -1);
        std::uint64_t drained = 0;
        [[maybe_unused]] const auto ignored = ::read(bell_.get(), &drained, sizeof drained);
    }
}

// ---------------------------------------------------------------- preparing a child

std::optional<std::string> find_program(std::string_view name, std::optional<std::string_view> path) {
    const auto usable = [](const std::string& file) {
        struct stat info{};
        return ::stat(file.c_str(), &info) == 0 && S_ISREG(info.st_mode) && ::access(file.c_str(), X_OK) == 0;
    };
    if (name.empty()) return std::nullopt;
    if (name.find('/') != std::string_view::npos) {
        std::string file(name);
        return usable(file) ? std::optional(file) : std::nullopt;
    }
    if (!path) {
        const char* ours = std::getenv("PATH");
        path = ours != nullptr ? ours : "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    }
    for (const auto dir : split(*path, ':'))
        if (auto file = cat(dir.empty() ? "." : dir, '/', name); usable(file)) return file;
    return std::nullopt;
}

namespace {

struct pipe_ends {
    unique_fd read, write;
};

pipe_ends make_pipe() {
    std::array<int, 2> ends{};
    if (::pipe2(ends.data(), O_CLOEXEC) < 0) throw_errno("pipe2");
    return {unique_fd(ends[0]), unique_fd(ends[1])};
}

std::vector<char*> pointers(const std::vector<std::string>& texts) {
    std::vector<char*> out;
    for (const auto& t : texts) out.push_back(const_cast<char*>(t.c_str()));
    out.push_back(nullptr);
    return out;
}

struct action_builder {
    std::deque<std::string>& texts;
    launch_action operator()(const attach_mount& m) const { return {.what = launch_action::kind::attach, .fd = m.mount, .target = m.target.c_str()}; }
    launch_action operator()(const bind_mount& m) const {
        return {.what = launch_action::kind::bind,
                .from = m.from.c_str(),
                .selector = m.selector.empty() ? nullptr : m.selector.c_str(),
                .target = m.target.c_str(),
                .recursive = m.recursive};
    }
    launch_action operator()(const fresh_tmpfs& m) const {
        std::array<char, 8> mode{};
        std::snprintf(mode.data(), mode.size(), "%o", m.mode & 07777U);
        texts.push_back(cat("mode=", mode.data(), m.size != 0 ? cat(",size=", m.size) : std::string()));
        return {.what = launch_action::kind::tmpfs, .target = m.target.c_str(), .data = texts.back().c_str()};
    }
    launch_action operator()(const fresh_proc& m) const { return {.what = launch_action::kind::proc, .target = m.target.c_str()}; }
};

error cannot_start(const command& c, const launch_plan& plan) {
    std::string what = plan.call == nullptr ? "clone" : plan.call;
    if (plan.object != nullptr && std::string_view(plan.object) != c.args.front()) what += cat(' ', quoted(plan.object));
    auto shown = quoted(c.args.front());
    return os_error(plan.error, what).with(cat("cannot start ", shown));
}

/// The child's three descriptors: which of ours it gets, and what we keep or close afterwards.
struct stdio_plan {
    std::vector<launch_fd> fds;
    std::vector<unique_fd> theirs;
    std::array<unique_fd, 3> ours;

    void add(int number, const stdio& s) {
        int source = number;
        switch (s.what()) {
            case stdio::kind::inherited: break;
            case stdio::kind::given: source = s.fd(); break;
            case stdio::kind::null_device: {
                unique_fd null(::open("/dev/null", (number == 0 ? O_RDONLY : O_WRONLY) | O_CLOEXEC));
                if (!null) throw_errno("open /dev/null");
                source = null.get();
                theirs.push_back(std::move(null));
                break;
            }
            case stdio::kind::pipe: {
                auto ends = make_pipe();
                auto& mine = number == 0 ? ends.write : ends.read;
                auto& its = number == 0 ? ends.read : ends.write;
                if (::fcntl(mine.get(), F_SETFL, O_NONBLOCK) < 0) throw_errno("fcntl");
                source = its.get();
                theirs.push_back(std::move(its));
                ours[static_cast<std::size_t>(number)] = std::move(mine);
                break;
            }
        }
        fds.push_back({.source = source, .target = number});
    }
};

void check(const command& c) {
    const auto has_nul = [](const std::string& s) { return s.find('\0') != std::string::npos; };
    if (c.args.empty()) throw error{errc::invalid, "cannot start a program without a name"};
    for (const auto& a : c.args)
        if (has_nul(a)) throw error{errc::invalid, cat("cannot start ", quoted(c.args.front()), ": an argument holds a NUL character")};
    for (const auto& e : c.env.value_or(std::vector<std::string>{}))
        if (has_nul(e)) throw error{errc::invalid, cat("cannot start ", quoted(c.args.front()), ": an environment variable holds a NUL character")};
    if (!c.setup.mounts.empty() && !c.setup.new_mount_namespace) throw error{errc::internal, "mounts for a child need a mount namespace of its own"};
    if (c.setup.mount_namespace >= 0 && c.setup.new_mount_namespace)
        throw error{errc::internal, "a child cannot join a mount namespace and have one of its own"};
    for (const auto& f : c.fds)
        if (f.target < 3 || f.target > 1000) throw error{errc::internal, cat("a passed descriptor cannot have the number ", f.target)};
}

}  // namespace

child spawner::spawn_blocking(command c) {
    auto done = std::make_shared<std::promise<child>>();
    auto result = done->get_future();
    const auto job = [done, s = state_, c = std::make_shared<command>(std::move(c))] {
        try {
            done->set_value(s->start(s, *c));
        } catch (...) {
            done->set_exception(std::current_exception());
        }
    };
    if (!state_->post(job)) throw error{errc::canceled, "the engine is closing"};
    return result.get();
}

async::task<child> spawner::spawn(command c) {
    auto ex = co_await async::current_executor;
    auto keep = state_;
    auto out = std::make_shared<std::optional<child>>();
    auto what = std::make_shared<command>(std::move(c));
    co_await asio::async_initiate<const asio::use_awaitable_t<>, void(std::exception_ptr)>(
        [&](auto handler) {
            auto work = asio::make_work_guard(ex);
            auto shared = std::make_shared<decltype(handler)>(std::move(handler));
            auto job = [out, what, keep, ex, shared, work]() mutable {
                std::exception_ptr failed;
                try {
                    out->emplace(keep->start(keep, *what));
                } catch (...) {
                    failed = std::current_exception();
                }
                asio::post(ex, [shared = std::move(shared), failed]() mutable {
                    auto h = std::move(*shared);
                    h(failed);
                });
            };
            if (!keep->post(job))
                asio::post(ex, [shared]() mutable {
                    auto h = std::move(*shared);
                    h(std::make_exception_ptr(error{errc::canceled, "the engine is closing"}));
                });
        },
        async::use_task);
    co_return std::move(**out);
}

spawner::spawner() : state_(std::make_shared<state>()) {}
spawner::~spawner() { state_->end(); }

child spawner::state::start(const std::shared_ptr<state>& self, const command& c) {
    check(c);
    auto program = find_program(c.program.empty() ? c.args.front() : c.program);
    if (!program) {
        const auto& name = c.program.empty() ? c.args.front() : c.program;
        if (name.find('/') == std::string::npos) throw error{errc::not_found, cat("cannot start ", quoted(name), ": no such program in PATH")};
        program = name;  // execve says what is wrong with it
    }
    stdio_plan streams;
    streams.add(0, c.in);
    streams.add(1, c.out);
    streams.add(2, c.err);
    for (const auto& f : c.fds) streams.fds.push_back({.source = f.source, .target = f.target});
    std::deque<std::string> texts;
    std::vector<launch_action> actions;
    for (const auto& m : c.setup.mounts) actions.push_back(std::visit(action_builder{texts}, m));
    const auto argv = pointers(c.args);
    const auto envp = c.env ? pointers(*c.env) : std::vector<char*>{};

    launch_plan plan{.program = program->c_str(), .argv = argv.data(), .envp = c.env ? envp.data() : environ};
    plan.cwd = c.cwd.empty() ? nullptr : c.cwd.c_str();
    plan.fds = streams.fds.data();
    plan.fd_count = streams.fds.size();
    plan.actions = actions.data();
    plan.action_count = actions.size();
    plan.parent = self_.get();
    plan.network_namespace = c.setup.network_namespace;
    plan.pid_namespace = c.setup.pid_namespace;
    plan.mount_namespace = c.setup.mount_namespace;
    plan.die_with_parent = c.setup.die_with_parent;
    plan.new_pid_namespace = c.setup.new_pid_namespace;
    plan.new_mount_namespace = c.setup.new_mount_namespace;
    plan.new_session = c.setup.new_session;
    plan.new_process_group = c.setup.new_process_group;
    plan.set_umask = c.setup.umask.has_value();
    plan.umask = c.setup.umask.value_or(0);

    int pidfd = -1;
    const int pid = detail::launch(plan, pidfd);
    if (pid < 0) throw cannot_start(c, plan);
    auto s = std::make_unique<child::state>();
    s->owner = self;
    s->pid = pid;
    s->pidfd.reset(pidfd);
    s->group = c.setup.new_process_group || c.setup.new_session;
    s->in = std::move(streams.ours[0]);
    s->out = std::move(streams.ours[1]);
    s->err = std::move(streams.ours[2]);
    return child(std::move(s));
}

}  // namespace cobuild::process

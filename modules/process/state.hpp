// Shared by the bodies of cobuild.process; included right after the module's name, so that it belongs to the module.
// Those bodies see base and async through the interface's own imports.
#pragma once

namespace cobuild::process {

/// The spawner's thread: runs jobs, collects killed children nobody waits for.
struct spawner::state {
    state();
    /// Ends the thread and waits for it. Jobs may own this, so the last owner cannot be the one to do it.
    void end();
    /// Queues a job for the thread; false when the thread is ending.
    bool post(std::function<void()> job);
    /// Takes over a child that was killed and not collected.
    void adopt(unique_fd pidfd);
    /// Starts a program; on the thread only.
    child start(const std::shared_ptr<state>& self, const command& c);

private:
    void serve();
    void ring() const noexcept;
    std::mutex guard_;
    std::deque<std::function<void()>> jobs_;
    std::vector<unique_fd> orphans_;
    bool closing_ = false;
    bool ended_ = false;
    unique_fd bell_;
    unique_fd self_;
    std::thread thread_;
};

struct child::state {
    std::shared_ptr<spawner::state> owner;
    int pid = -1;
    unique_fd pidfd;
    bool group = false;
    std::optional<status> ended;
    unique_fd in, out, err;

    /// Waits until the program has ended, without collecting it: its process group's number stays taken.
    async::task<void> until_ended();
    void collect();
};

}  // namespace cobuild::process

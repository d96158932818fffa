module;
#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <unistd.h>

#include <boost/asio/awaitable.hpp>

module cobuild.executor;

import cobuild.json;

#include "parts.hpp"

namespace cobuild::executor {

namespace {

using namespace std::chrono_literals;

bool plain_name(std::string_view text) {
    return !text.empty() && text.size() <= 128 && text != "." && text != ".." && std::all_of(text.begin(), text.end(), [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '.' || c == '-';
    });
}

void check(step& s) {
    if (!plain_name(s.id)) throw error{errc::invalid, cat("not a step's id: ", cobuild::quoted(s.id))};
    if (s.args.empty() || s.args.front().empty()) throw error{errc::invalid, "the step has no command"};
    if (s.root < 0) throw error{errc::internal, "the step has no root file system"};
    if (s.cwd.empty()) s.cwd = "/";
    if (!s.cwd.starts_with('/')) throw error{errc::invalid, cat("the step's working directory ", cobuild::quoted(s.cwd), " is not absolute")};
    if (s.hostname.empty()) s.hostname = "buildkitsandbox";
    for (const auto& text : s.env)
        if (text.find('\0') != std::string::npos) throw error{errc::invalid, "an environment variable of the step holds a NUL character"};
    for (const auto& text : s.args)
        if (text.find('\0') != std::string::npos) throw error{errc::invalid, "an argument of the step holds a NUL character"};
}

/// What the runtime says, without its own names for the ways it was taken.
error runtime_error(std::string text) {
    for (const std::string_view prefix : {"runc run failed: ", "runc create failed: ", "exec failed: ", "container_linux.go:",
                                          "unable to start container process: ", "error during container init: "})
        if (text.starts_with(prefix)) text.erase(0, prefix.size());
    auto kind = errc::io;
    if (text.starts_with("exec") && (text.find("not found") != std::string::npos || text.find("no such file") != std::string::npos))
        kind = errc::not_found;
    else if (text.find("permission denied") != std::string::npos)
        kind = errc::permission;
    else if (text.find("no space left") != std::string::npos)
        kind = errc::no_space;
    return {kind, std::move(text)};
}

/// The last error of a log of JSON lines; empty when there is none.
std::string last_error(const std::string& log) {
    std::string out;
    for (const auto line : split(log, '\n')) {
        if (trim(line).empty()) continue;
        try {
            const auto entry = json::parse(line);
            const auto* level = entry.find("level");
            const auto* text = entry.find("msg");
            if (level != nullptr && text != nullptr && (level->as_string() == "error" || level->as_string() == "fatal")) out = text->as_string();
        } catch (const error&) {
            continue;  // a line cut off by a kill
        }
    }
    return out;
}

/// A step whose processes can be reached from outside.
struct running {
    std::shared_ptr<const step> what;
    std::string cgroup;
    unique_fd tree, pid_namespace, mount_namespace;
    async::event started;  ///< or ended
    bool ended = true;
    unsigned further = 0;
};

/// A namespace of a child that has not been collected.
unique_fd namespace_of(int pid, const char* name) {
    unique_fd out(::open(cat("/proc/", pid, "/ns/", name).c_str(), O_RDONLY | O_CLOEXEC));
    if (!out) throw_errno(cat("opening the step's namespace ", name));
    return out;
}

int number_in(const std::string& text) {
    int out = -1;
    std::from_chars(text.data(), text.data() + text.size(), out);
    return out;
}

class oci_runner final : public runner {
public:
    oci_runner(async::runtime& rt, process::spawner& programs, options o)
        : rt_(rt),
          programs_(programs),
          options_(std::move(o)),
          runtime_(find_runtime(options_.binary)),
          hierarchies_(cgroup_hierarchies()),
          unified_(host_cgroups() == cgroup_mode::unified) {
        if (!plain_name(options_.owner)) throw error{errc::internal, cat("not an owner's id: ", cobuild::quoted(options_.owner))};
        std::error_code ec;
        options_.work_dir = std::filesystem::canonical(options_.work_dir, ec).string();
        if (ec) throw error{errc::not_found, cat("the directory for running steps does not exist: ", ec.message())};
    }

    [[nodiscard]] std::string name() const override { return cat(runtime_.crun ? "crun" : "runc", " (", runtime_.path, ')'); }

    async::task<exit> run(step s, streams io, std::shared_ptr<control> reach) override {
        check(s);
        const auto parent = parent_cgroup(s);
        co_await note(parent);
        const auto cgroup = cat(parent, '/', s.id);
        const auto own = std::make_shared<step>(std::move(s));
        std::optional<bundle> ready;
        std::optional<exit> result;
        std::exception_ptr failed;
        try {
            ready = co_await rt_.pool().run([&] {
                // Of the unified hierarchy the step's own outlives the runtime's, so that its counters can be read; elsewhere ours
                // stands before the runtime makes the step's, so that no other build can take the directory above away meanwhile.
                make_cgroup(hierarchies_, unified_ ? cgroup : parent);
                return make_bundle(*own, options_.work_dir, unified_ ? cat(cgroup, "/step") : cgroup);
            });
            result = co_await run_bundle(own, *ready, std::move(io), reach);
        } catch (...) {
            failed = std::current_exception();
        }
        co_await async::no_cancel;
        if (reach) reach->started.set();
        const bool clean = co_await rt_.pool().run([&] {
            if (result && unified_) result->oom = oom_kills(cgroup) > 0;
            ready.reset();
            return remove_cgroup(hierarchies_, cgroup);
        });
        if (!clean) log(log_level::warning, "a cgroup could not be removed", {{"cgroup", cgroup}});
        if (failed) std::rethrow_exception(failed);
        co_return *result;
    }

    async::task<exit> exec(std::string id, further_process what, streams io, std::shared_ptr<control> reach) override;

    async::task<void> close() override {
        for (const auto& parent : noted_) {
            co_await rt_.pool().run([&] {
                remove_cgroup(hierarchies_, parent);
                for (const auto& h : hierarchies_) ::rmdir(std::filesystem::path(h + parent).parent_path().c_str());  // stays while others use it
            });
            if (options_.ledger != nullptr) co_await options_.ledger->forget(cgroup_entry(parent));
        }
        noted_.clear();
    }

private:
    [[nodiscard]] std::string parent_cgroup(const step& s) const {
        const auto& given = s.cgroup_parent;
        if (given.empty()) return cat("/cobuild/", options_.owner);
        if (given.find(".slice") != std::string::npos && given.ends_with(':'))
            throw error{errc::unsupported,
                        cat("cgroup parents of systemd (", cobuild::quoted(given), ") are not supported; give a path such as /builds")};
        for (const auto part : split(given, '/'))
            if (!part.empty() && !plain_name(part)) throw error{errc::invalid, cat("not a cgroup parent: ", cobuild::quoted(given))};
        return cat(clean_path(given), "/cobuild/", options_.owner);
    }

    /// One durable entry per parent, before the first cgroup below it exists.
    async::task<void> note(std::string parent) {
        if (noted_.contains(parent)) co_return;
        co_await recording_.run(parent, [this, parent]() -> async::task<int> {
            if (options_.ledger != nullptr) co_await options_.ledger->record(cgroup_entry(parent));
            noted_.insert(parent);
            co_return 0;
        });
    }

    [[nodiscard]] process::command command_for(const step& s, const bundle& b) const {
        const auto& dir = options_.work_dir;
        process::command c{.args = {runtime_.path, "--root", cat(dir, "/state"), "--log", cat(dir, "/log.json"), "--log-format", "json", "run",
                                    "--bundle", dir, "--pid-file", cat(dir, "/pid"), s.id},
                           .env = std::vector<std::string>{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/"},
                           .cwd = "/"};
        c.setup.die_with_parent = true;
        c.setup.new_pid_namespace = true;
        c.setup.new_mount_namespace = true;
        c.setup.new_session = true;
        c.setup.umask = 0022;
        c.setup.network_namespace = s.network_namespace;
        c.setup.mounts = b.mounts;
        c.setup.mounts.emplace_back(process::fresh_proc{});
        return c;
    }

    async::task<exit> run_bundle(std::shared_ptr<const step> own, const bundle& b, streams io, std::shared_ptr<control> reach) {
        const auto& s = *own;
        talk with(std::move(io), s.terminal);
        auto c = command_for(s, b);
        with.plug(c);
        auto program = co_await programs_.spawn(std::move(c));
        const auto ex = co_await async::current_executor;
        with.begin(ex, program);
        std::shared_ptr<running> open;
        async::task_group watching(ex, true);
        std::exception_ptr failed;
        process::status status;
        try {
            if (reach) {
                open = open_for_others(own, b, program);
                reach->resize = resizer(with, program);
                watching.spawn(tell_start(rt_.pool(), hierarchies_, open->tree.duplicate(), "pid", b.cgroup, open, reach));
            }
            status = co_await async::linked(s.force, program.wait());
            co_await with.end();
        } catch (...) {
            failed = std::current_exception();
        }
        co_await async::no_cancel;
        if (open) shut(*open, s.id);
        if (reach) reach->resize = nullptr;
        co_await end_group(watching);
        if (failed) co_await stop_step(rt_.pool(), program, hierarchies_, b.cgroup, options_.grace, s.force);
        co_await rest_of(with);
        if (failed) std::rethrow_exception(failed);
        co_return judge(s, b, status);
    }

    std::shared_ptr<running> open_for_others(std::shared_ptr<const step> own, const bundle& b, const process::child& program) {
        auto out = std::make_shared<running>();
        out->what = std::move(own);
        out->cgroup = b.cgroup;
        out->tree = b.tree.duplicate();
        out->pid_namespace = namespace_of(program.pid(), "pid");
        out->mount_namespace = namespace_of(program.pid(), "mnt");
        out->ended = false;
        running_[out->what->id] = out;
        return out;
    }
    void shut(running& r, const std::string& id) {
        r.ended = true;
        r.started.set();
        running_.erase(id);
    }

    static std::function<void(unsigned, unsigned)> resizer(talk& with, process::child& program) {
        return [&with, &program](unsigned rows, unsigned columns) {
            with.resize(rows, columns);
            program.signal(SIGWINCH);  // the runtime passes the size on to the terminal inside
        };
    }

    /// By value: what is asked of `reach` may outlast the process.
    static async::task<void> tell_start(async::blocking_pool& pool, std::vector<std::string> hierarchies, unique_fd tree, std::string pid_file,
                                        std::string cgroup, std::shared_ptr<running> step, std::shared_ptr<control> reach) {
        co_await until_written(tree.get(), pid_file);
        const int inner = number_in(read_file(tree.get(), pid_file.c_str()));
        reach->signal = [&pool, hierarchies, cgroup, inner](int number) { return signal_process(pool, hierarchies, cgroup, inner, number); };
        reach->started.set();
        if (step) step->started.set();
    }

    static async::task<void> end_group(async::task_group& group) {
        group.cancel();
        try {
            co_await group.join();
        } catch (const std::exception&) {
            // Only told of the start.
        }
    }

    /// What a step printed last is still on its way when it has ended.
    static async::task<void> rest_of(talk& with) {
        std::exception_ptr late;
        try {
            co_await async::with_deadline(1s, "the step's output", with.end());
        } catch (...) {
            late = std::current_exception();
        }
        co_await with.drop();
    }

    /// Tells the end of the step from the failure of the runtime to start it.
    [[nodiscard]] exit judge(const step& s, const bundle& b, process::status status) const {
        const auto text = last_error(b.read("log.json"));
        const bool started = !b.read("pid").empty();
        if (!started || (runtime_.crun && !text.empty() && !status.ok())) {
            if (!text.empty()) throw runtime_error(text);
            throw error{errc::io, cat(name(), " ended with ", status.str(), " before the step began")};
        }
        if (status.signal != 0) throw error{errc::io, cat(name(), " was ended by ", status.str())};
        const auto& valid = s.valid_exit_codes;
        const bool accepted = valid.empty() ? status.code == 0 : std::find(valid.begin(), valid.end(), status.code) != valid.end();
        return {.code = status.code, .accepted = accepted};
    }

    async::runtime& rt_;
    process::spawner& programs_;
    options options_;
    runtime_program runtime_;
    std::vector<std::string> hierarchies_;
    bool unified_;
    std::set<std::string> noted_;
    async::single_flight<std::string, int> recording_;
    std::map<std::string, std::shared_ptr<running>> running_;  ///< those that were given a control
};

async::task<exit> oci_runner::exec(std::string id, further_process what, streams io, std::shared_ptr<control> reach) {
    const auto at = running_.find(id);
    if (at == running_.end()) throw error{errc::not_found, cat("there is no running container ", id)};
    const auto r = at->second;
    co_await r->started.wait();
    if (r->ended) throw error{errc::not_found, cat("the container ", id, " has ended")};
    const auto name = cat("exec-", r->further++);
    const auto pid_file = cat(name, ".pid"), log_file = cat(name, ".log");
    auto s = std::make_shared<step>(*r->what);
    s->args = std::move(what.args);
    s->env = std::move(what.env);
    s->cwd = std::move(what.cwd);
    s->user = std::move(what.user);
    s->terminal = what.terminal;
    s->root = r->what->root;
    check(*s);
    co_await rt_.pool().run([&] {
        const auto user = find_user(s->root, s->user);
        make_file(r->tree.get(), cat(name, ".json"), oci_process({.step = *s, .user = user, .cgroup = r->cgroup, .mounts = {}}), 0600);
    });
    const auto& dir = options_.work_dir;
    process::command c{.args = {runtime_.path, "--root", cat(dir, "/state"), "--log", cat(dir, '/', log_file), "--log-format", "json", "exec",
                                "--process", cat(dir, '/', name, ".json"), "--pid-file", cat(dir, '/', pid_file), id},
                       .env = std::vector<std::string>{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/"},
                       .cwd = "/"};
    c.setup.die_with_parent = true;
    c.setup.new_session = true;
    c.setup.pid_namespace = r->pid_namespace.get();
    c.setup.mount_namespace = r->mount_namespace.get();
    talk with(std::move(io), s->terminal);
    with.plug(c);
    auto program = co_await programs_.spawn(std::move(c));
    const auto ex = co_await async::current_executor;
    with.begin(ex, program);
    if (reach) reach->resize = resizer(with, program);
    async::task_group watching(ex, true);
    if (reach) watching.spawn(tell_start(rt_.pool(), hierarchies_, r->tree.duplicate(), pid_file, r->cgroup, nullptr, reach));
    std::exception_ptr failed;
    process::status status;
    try {
        status = co_await program.wait();
        co_await with.end();
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::no_cancel;
    if (reach) reach->resize = nullptr;
    co_await end_group(watching);
    const auto inner = number_in(read_file(r->tree.get(), pid_file.c_str()));
    if (failed) {
        if (inner > 0) co_await signal_process(rt_.pool(), hierarchies_, r->cgroup, inner, SIGKILL);
        program.signal(SIGKILL);
        (void)co_await program.wait();
    }
    co_await rest_of(with);
    if (reach) reach->started.set();
    if (failed) std::rethrow_exception(failed);
    const auto text = last_error(read_file(r->tree.get(), log_file.c_str()));
    // One that the container's end took with it never told its number.
    if (inner <= 0 && status.signal == 0) throw runtime_error(text.empty() ? cat(this->name(), " ended with ", status.str()) : text);
    co_return exit{.code = status.code, .accepted = status.code == 0};
}

}  // namespace

std::unique_ptr<runner> open_oci_runner(async::runtime& rt, process::spawner& programs, options o) {
    return std::make_unique<oci_runner>(rt, programs, std::move(o));
}

}  // namespace cobuild::executor

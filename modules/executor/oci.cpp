module;
#include <algorithm>
#include <cerrno>
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
    for (const std::string_view prefix :
         {"runc run failed: ", "runc create failed: ", "container_linux.go:", "unable to start container process: ", "error during container init: "})
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

/// Hands a pipe's bytes on; what the sink throws is kept, and the program that fills the pipe is killed.
async::task<void> pump(unique_fd from, sink to, process::child& program, std::exception_ptr& failed) {
    try {
        co_await process::read_all(std::move(from), [&](std::span<const std::byte> piece) -> async::task<void> {
            if (to) co_await to(piece);
        });
    } catch (...) {
        if (!failed) failed = std::current_exception();
        program.signal(SIGKILL);
    }
}

async::task<void> join_all(async::task_group& group) { co_await group.join(); }

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

    async::task<exit> run(step s, streams io) override {
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
            result = co_await run_bundle(*own, *ready, std::move(io));
        } catch (...) {
            failed = std::current_exception();
        }
        co_await async::no_cancel;
        const bool clean = co_await rt_.pool().run([&] {
            if (result && unified_) result->oom = oom_kills(cgroup) > 0;
            ready.reset();
            return remove_cgroup(hierarchies_, cgroup);
        });
        if (!clean) log(log_level::warning, "a cgroup could not be removed", {{"cgroup", cgroup}});
        if (failed) std::rethrow_exception(failed);
        co_return *result;
    }

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
                           .cwd = "/",
                           .out = process::stdio::pipe(),
                           .err = process::stdio::pipe()};
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

    async::task<exit> run_bundle(const step& s, const bundle& b, streams io) {
        auto program = co_await programs_.spawn(command_for(s, b));
        std::exception_ptr sink_failed;
        async::task_group pumps(co_await async::current_executor, true);
        pumps.spawn(pump(program.take_stdout(), std::move(io.out), program, sink_failed));
        pumps.spawn(pump(program.take_stderr(), std::move(io.err), program, sink_failed));
        std::exception_ptr failed;
        process::status status;
        try {
            status = co_await async::linked(s.force, program.wait());
            co_await pumps.join();
        } catch (...) {
            failed = std::current_exception();
        }
        co_await async::no_cancel;
        if (failed) {
            co_await stop_step(rt_.pool(), program, hierarchies_, b.cgroup, options_.grace, s.force);
            std::exception_ptr late;
            try {
                co_await async::with_deadline(1s, "the step's output", join_all(pumps));
            } catch (...) {
                late = std::current_exception();
            }
            std::rethrow_exception(failed);
        }
        if (sink_failed) std::rethrow_exception(sink_failed);
        co_return judge(s, b, status);
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
};

}  // namespace

std::unique_ptr<runner> open_oci_runner(async::runtime& rt, process::spawner& programs, options o) {
    return std::make_unique<oci_runner>(rt, programs, std::move(o));
}

}  // namespace cobuild::executor

module;
#include <fcntl.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import cobuild.executor;
import cobuild.cni;
import cobuild.fs;
import cobuild.llb;
import cobuild.session;
import :container;

namespace cobuild::build {

namespace {

constexpr std::uint64_t max_file = std::uint64_t{16} << 20;

// ---------------------------------------------------------------- files

file_entry entry(const fs::root& root, const std::string& path, std::string name) {
    file_entry out{.name = std::move(name), .info = root.stat(path).value()};
    if (out.info.is_link()) out.link = root.read_link(path);
    return out;
}

std::string part_of_file(const fs::root& root, const std::string& path, std::uint64_t offset, std::uint64_t length) {
    const auto info = root.stat(path, fs::links::follow);
    if (!info) throw error{errc::not_found, cat(path, ": there is no such file in the result")};
    if (!info->is_file()) throw error{errc::invalid, cat(path, " is no regular file")};
    auto all = root.read_file(root.resolve(path), max_file);
    if (offset >= all.size()) return {};
    return all.substr(offset, length == 0 ? std::string::npos : length);
}

std::vector<file_entry> list_of(const fs::root& root, const std::string& path, const std::string& include) {
    const auto at = root.resolve(path);
    const auto dir = root.stat(at);
    if (!dir) throw error{errc::not_found, cat(path, ": there is no such directory in the result")};
    if (!dir->is_dir()) throw error{errc::invalid, cat(path, " is no directory")};
    const auto wanted = include.empty() ? fs::ignore_patterns{} : fs::ignore_patterns(std::vector<std::string>{include});
    std::vector<file_entry> out;
    for (const auto& name : root.list(at)) {
        if (!include.empty() && !wanted.matches(name)) continue;
        out.push_back(entry(root, at.empty() ? name : cat(at, "/", name), name));
    }
    return out;
}

file_entry entry_of(const fs::root& root, const std::string& path, fs::links how) {
    const auto at = root.resolve(path, how);
    if (!root.stat(at)) throw error{errc::not_found, cat(path, ": there is no such file in the result")};
    return entry(root, at, at.substr(at.rfind('/') + 1));
}

class settled_ref final : public chain_ref {
public:
    settled_ref(parts& p, std::shared_ptr<ops::chain_value> value) : chain_ref(p), value_(std::move(value)) {}
    [[nodiscard]] const llb::definition& definition() const noexcept override { return none_; }
    async::task<std::shared_ptr<ops::chain_value>> value() override { co_return value_; }

private:
    llb::definition none_;
    std::shared_ptr<ops::chain_value> value_;
};

}  // namespace

async::task<std::shared_ptr<snapshot::view>> chain_ref::view() {
    const auto chain = co_await value();
    if (!view_) view_ = std::make_shared<snapshot::view>(co_await parts_.snapshots->view(chain->chain));
    co_return view_;
}

async::task<std::string> chain_ref::read_file(std::string path, std::uint64_t offset, std::uint64_t length) {
    const auto tree = co_await view();
    co_return co_await parts_.runtime.pool().run([&] { return part_of_file(fs::root(tree->mount().duplicate()), path, offset, length); });
}

async::task<std::vector<file_entry>> chain_ref::read_directory(std::string path, std::string include) {
    const auto tree = co_await view();
    co_return co_await parts_.runtime.pool().run([&] { return list_of(fs::root(tree->mount().duplicate()), path, include); });
}

async::task<file_entry> chain_ref::stat(std::string path) {
    const auto tree = co_await view();
    co_return co_await parts_.runtime.pool().run([&] { return entry_of(fs::root(tree->mount().duplicate()), path, fs::links::keep); });
}

std::shared_ptr<ref> make_settled_ref(parts& p, std::shared_ptr<ops::chain_value> value) {
    return value ? std::make_shared<settled_ref>(p, std::move(value)) : nullptr;
}

// ---------------------------------------------------------------- containers

namespace {

executor::sink as_sink(std::function<async::task<void>(std::string)> to) {
    if (!to) return {};
    return [to](std::span<const std::byte> piece) -> async::task<void> { return to(std::string(text_of(piece))); };
}

std::string_view default_path(const std::string& os) {
    return os == "windows" ? R"(c:\Windows\System32;c:\Windows;C:\Windows\System32\WindowsPowerShell\v1.0)"
                           : "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
}

void set_default(std::vector<std::string>& env, std::string_view key, std::string_view value) {
    for (const auto& e : env)
        if (e.starts_with(cat(key, "="))) return;
    env.push_back(cat(key, "=", value));
}

/// A process, and how it ended once it has.
class process_impl final : public container_process {
public:
    const std::shared_ptr<executor::control> reach = std::make_shared<executor::control>();
    async::event begun;  ///< as started() has it
    async::event over;
    std::optional<int> code;
    std::exception_ptr failed;
    std::optional<std::pair<unsigned, unsigned>> size;  ///< of its terminal, asked for before there was one

    async::task<void> started() override { co_await begun.wait(); }
    async::task<int> wait() override {
        co_await over.wait();
        if (failed) std::rethrow_exception(failed);
        co_return code.value_or(255);
    }
    async::task<void> signal(int number) override {
        co_await reach->started.wait();
        if (const auto send = reach->signal; send && !over.is_set()) co_await send(number);
    }
    void resize(unsigned rows, unsigned columns) override {
        if (reach->resize)
            reach->resize(rows, columns);
        else
            size = {rows, columns};
    }
};

class container_impl final : public container, public std::enable_shared_from_this<container_impl> {
public:
    container_impl(parts& p, ops::build_scope scope, std::vector<std::string> allowed, container_request request, ops::container_base base)
        : parts_(p),
          scope_(std::move(scope)),
          allowed_(std::move(allowed)),
          request_(std::move(request)),
          base_(std::move(base)),
          running_(p.runtime.get_executor(), true) {
        name_ = base_.step.id;
    }

    async::task<std::shared_ptr<container_process>> start(process_request what) override {
        if (released_) throw error{errc::not_found, cat("the container ", request_.id, " was released")};
        set_default(what.env, "PATH", default_path(request_.os));
        if (what.terminal) set_default(what.env, "TERM", "xterm");
        for (const auto& s : what.secret_envs) {
            if (s.id.empty()) throw error{errc::invalid, cat("the secret for the environment variable ", quoted(s.name), " has no id")};
            const auto text = co_await scope_.session->secret(s.id);
            if (!text && !s.optional) throw error{errc::not_found, cat("secret ", s.id, ": not found")};
            what.env.push_back(cat(s.name, "=", text.value_or("")));
        }
        if (released_) throw error{errc::not_found, cat("the container ", request_.id, " was released")};
        auto out = std::make_shared<process_impl>();
        const bool first = first_ == nullptr;
        if (first) first_ = out;
        const bool terminal = what.terminal;
        running_.spawn(keep(shared_from_this(), out, std::move(what), first));
        running_.spawn(begin(out, terminal));
        // A client that pipes one process into another would wait for ever: the first one's output keeps it from hearing that the
        // second one runs. So a further process counts as started at once.
        if (!first) out->begun.set();
        co_return out;
    }

    async::task<void> release() override {
        const auto self = shared_from_this();
        co_await async::no_cancel;
        if (std::exchange(released_, true)) co_return;
        over_.cancel(error{errc::canceled, "context canceled"});
        co_await running_.join();
        trees_.clear();
        base_ = {};
        if (failed_) std::rethrow_exception(failed_);
    }

    async::task<std::string> read_file(std::size_t mount, std::string path, std::uint64_t offset, std::uint64_t length) override {
        const auto root = tree(mount);
        co_return co_await parts_.runtime.pool().run([&] { return part_of_file(*root, path, offset, length); });
    }
    async::task<std::vector<file_entry>> read_directory(std::size_t mount, std::string path, std::string include) override {
        const auto root = tree(mount);
        co_return co_await parts_.runtime.pool().run([&] { return list_of(*root, path, include); });
    }
    async::task<file_entry> stat(std::size_t mount, std::string path) override {
        const auto root = tree(mount);
        co_return co_await parts_.runtime.pool().run([&] { return entry_of(*root, path, fs::links::follow); });
    }

private:
    std::shared_ptr<fs::root> tree(std::size_t mount) {
        if (mount >= base_.mounts.size())
            throw error{errc::invalid, cat("mount index ", mount, " is out of bounds (", base_.mounts.size(), " available)")};
        if (base_.mounts[mount] < 0) throw error{errc::unsupported, cat("the files of mount ", mount, " cannot be read from outside its container")};
        auto& out = trees_[mount];
        if (!out) out = std::make_shared<fs::root>(unique_fd{::fcntl(base_.mounts[mount], F_DUPFD_CLOEXEC, 3)});
        return out;
    }

    static async::task<void> begin(std::shared_ptr<process_impl> p, bool terminal) {
        // A terminal has its size before the program in it looks: it is there while the runtime still starts, which takes much longer than this.
        while (terminal && !p->reach->resize && !p->reach->started.is_set()) co_await async::sleep_for(std::chrono::milliseconds{2});
        if (p->size && p->reach->resize) p->reach->resize(p->size->first, p->size->second);
        co_await p->reach->started.wait();
        p->begun.set();
    }

    static async::task<void> keep(std::shared_ptr<container_impl> self, std::shared_ptr<process_impl> p, process_request what, bool first) {
        std::exception_ptr failed;
        executor::exit end;
        try {
            auto work = first ? self->run_first(p, std::move(what)) : self->run_further(p, std::move(what));
            end = co_await async::linked(self->over_.token(), std::move(work));
        } catch (...) {
            failed = std::current_exception();
        }
        // However it ended then, and whatever it was about to do: it was the release.
        if (const auto why = self->over_.token().cause()) failed = std::make_exception_ptr(*why);
        p->reach->started.set();
        p->failed = failed;
        p->code = end.code;
        // What release() tells: a process that was ended by it, or did not end well, is its failure too.
        if (!self->failed_ && (failed || end.code != 0))
            self->failed_ = failed ? failed : std::make_exception_ptr(error(errc::step_failed, cat("exit code: ", end.code)).exited(end.code));
        p->over.set();
    }

    void check_security(int asked) const {
        if (asked != 0 && asked != 1) throw error{errc::invalid, cat("invalid security mode ", asked)};
        if (asked == 1 && std::find(allowed_.begin(), allowed_.end(), "security.insecure") == allowed_.end())
            throw error{errc::permission, "security.insecure is not allowed"};
    }

    async::task<executor::exit> run_first(std::shared_ptr<process_impl> p, process_request what) {
        check_security(what.security);
        if (request_.network == llb::net_mode::host && std::find(allowed_.begin(), allowed_.end(), "network.host") == allowed_.end())
            throw error{errc::permission, "network.host is not allowed"};
        auto step = base_.step;
        step.args = std::move(what.args);
        step.env = std::move(what.env);
        step.cwd = what.cwd.empty() ? "/" : std::move(what.cwd);
        step.user = std::move(what.user);
        step.terminal = what.terminal;
        step.hostname = request_.hostname;
        step.security = what.security == 1 ? executor::security::insecure : executor::security::sandbox;
        for (const auto& h : request_.extra_hosts) step.extra_hosts.push_back({h.host, h.ip});
        step.remove_stubs_recursively = what.remove_stubs_recursively;
        // Ended at once when it is released: nobody reads what it would say while it goes.
        async::cancel_source force;
        const auto forced = over_.token().on_cancel([force]() mutable { force.cancel(error{errc::canceled, "context canceled"}); });
        step.force = force.token();
        executor::streams io{.out = as_sink(std::move(what.out)),
                             .err = as_sink(std::move(what.err)),
                             .in = std::move(what.in),
                             .direct_out = std::move(what.direct_out)};
        co_return co_await in_network(std::move(step), std::move(io), p->reach);
    }

    async::task<executor::exit> in_network(executor::step step, executor::streams io, std::shared_ptr<executor::control> reach) {
        auto& env = *parts_.environment;
        const auto kind = request_.network == llb::net_mode::host   ? ops::network_kind::host
                          : request_.network == llb::net_mode::none ? ops::network_kind::none
                                                                    : ops::network_kind::standard;
        auto* provider = co_await env.network(kind);
        const auto defaults = env.steps();
        step.resolv_conf = provider->kind() == cni::kind::host ? defaults.host_resolv_conf : defaults.resolv_conf;
        auto attached = co_await provider->attach(step.id, {.hostname = step.hostname});
        step.network_namespace = attached.network_namespace();
        std::exception_ptr failed;
        executor::exit out;
        try {
            out = co_await env.runner().run(std::move(step), std::move(io), std::move(reach));
        } catch (...) {
            failed = std::current_exception();
        }
        co_await async::no_cancel;
        co_await provider->detach(std::move(attached));
        if (failed) std::rethrow_exception(failed);
        co_return out;
    }

    async::task<executor::exit> run_further(std::shared_ptr<process_impl> p, process_request what) {
        check_security(what.security);
        executor::further_process f{.args = std::move(what.args),
                                    .env = std::move(what.env),
                                    .cwd = what.cwd.empty() ? "/" : std::move(what.cwd),
                                    .user = std::move(what.user),
                                    .terminal = what.terminal};
        executor::streams io{.out = as_sink(std::move(what.out)),
                             .err = as_sink(std::move(what.err)),
                             .in = std::move(what.in),
                             .direct_out = std::move(what.direct_out)};
        co_await first_->reach->started.wait();
        co_return co_await parts_.environment->runner().exec(name_, std::move(f), std::move(io), p->reach);
    }

    parts& parts_;
    ops::build_scope scope_;
    std::vector<std::string> allowed_;
    container_request request_;
    ops::container_base base_;
    std::string name_;
    std::map<std::size_t, std::shared_ptr<fs::root>> trees_;
    async::cancel_source over_;
    async::task_group running_;
    std::exception_ptr failed_;
    std::shared_ptr<process_impl> first_;
    bool released_ = false;
};

}  // namespace

std::shared_ptr<container> make_container(parts& p, ops::build_scope scope, std::vector<std::string> allowed, container_request request,
                                          ops::container_base base) {
    return std::make_shared<container_impl>(p, std::move(scope), std::move(allowed), std::move(request), std::move(base));
}

}  // namespace cobuild::build

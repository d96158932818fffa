module;
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.cni;

import cobuild.json;

#include "parts.hpp"

namespace cobuild::cni {
namespace {

constexpr const char* default_config = "/etc/buildkit/cni.json";
constexpr const char* distribution_dir = "/usr/lib/cni";

bool valid_id(std::string_view id) {
    if (id.empty() || id.size() > 128) return false;
    for (std::size_t i = 0; i < id.size(); ++i) {
        const char c = id[i];
        const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
        if (!letter && (i == 0 || (c != '_' && c != '.' && c != '-'))) return false;
    }
    return true;
}

/// The file's text; nothing when it does not exist.
std::optional<std::string> read_text(const std::string& file) {
    const unique_fd fd(::open(file.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (!fd && errno == ENOENT) return std::nullopt;
    const auto bad = [&](int reason) {
        return error{errc::invalid, cat("cannot read the CNI configuration ", file, ": ", std::generic_category().message(reason))};
    };
    if (!fd) throw bad(errno);
    std::string out;
    std::array<char, 16384> block;
    while (out.size() <= std::size_t{1} << 20) {
        const auto n = ::read(fd.get(), block.data(), block.size());
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw bad(errno);
        if (n == 0) return out;
        out.append(block.data(), static_cast<std::size_t>(n));
    }
    throw error{errc::invalid, cat("the CNI configuration ", file, " is longer than 1 MiB")};
}

unique_fd open_lock(const std::string& file) {
    unique_fd fd(::open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!fd) throw_errno(cat("opening ", file));
    return fd;
}

bool try_lock(int fd, const std::string& file) {
    if (::flock(fd, LOCK_EX | LOCK_NB) == 0) return true;
    if (errno != EWOULDBLOCK && errno != EINTR) throw_errno(cat("locking ", file));
    return false;
}

class host_provider final : public provider {
public:
    async::task<attachment> attach(std::string, attach_args) override { co_return attachment{}; }
    async::task<void> detach(attachment) override { co_return; }
    async::task<void> close() override { co_return; }
    [[nodiscard]] cni::kind kind() const noexcept override { return kind::host; }
};

class none_provider final : public provider {
public:
    explicit none_provider(async::runtime& rt) : rt_(rt) {}
    async::task<attachment> attach(std::string, attach_args) override {
        auto s = std::make_unique<attachment::state>();
        s->ns = co_await rt_.pool().run([] { return new_network_namespace(); });
        co_return attachment{std::move(s)};
    }
    async::task<void> detach(attachment a) override { return apart(detach_now(std::move(a))); }
    async::task<void> close() override { co_return; }
    [[nodiscard]] cni::kind kind() const noexcept override { return kind::none; }

private:
    async::task<void> detach_now(attachment a) {
        // The last close takes the namespace down, which can take the kernel a while.
        co_await async::no_cancel;
        co_await rt_.pool().run([gone = std::move(a)]() mutable { gone = {}; });
    }
    async::runtime& rt_;
};

json::object ledger_entry(const caller& plugins, const plugin_list& list, const std::string& version, const call_target& target, nanoseconds limit) {
    json::object out{
        {"kind", "cni"}, {"id", target.id}, {"dirs", plugins.dirs()}, {"limit", limit.count()}, {"list", json::parse(list_text(list, version))}};
    if (!target.hostname.empty()) out.set("hostname", target.hostname);
    if (!target.capabilities.empty()) out.set("capabilities", target.capabilities);
    return out;
}

class cni_provider final : public provider {
public:
    cni_provider(async::runtime& rt, caller plugins, plugin_list list, std::string version, options o)
        : rt_(rt), plugins_(std::move(plugins)), list_(std::move(list)), version_(std::move(version)), options_(std::move(o)), first_(1) {}

    async::task<attachment> attach(std::string id, attach_args args) override { return apart(attach_now(std::move(id), std::move(args))); }
    async::task<void> detach(attachment a) override { return apart(detach_now(std::move(a))); }
    async::task<void> close() override { co_return; }
    [[nodiscard]] cni::kind kind() const noexcept override { return kind::cni; }

private:
    async::task<attachment> attach_now(std::string id, attach_args args) {
        auto s = std::make_unique<attachment::state>();
        s->target = target_of(std::move(id), args);
        s->poolable = args.hostname.empty() && args.capabilities.empty();
        s->ns = co_await rt_.pool().run([] { return new_network_namespace(); });
        s->target.netns = path_of(s->ns);
        auto entry = ledger_entry(plugins_, list_, version_, s->target, options_.plugin_time_limit);
        s->entry = json::serialize(entry);
        if (options_.ledger != nullptr) co_await options_.ledger->record(s->entry);
        std::exception_ptr failed;
        try {
            auto got = co_await add(s->target);
            s->result = std::move(got.result);
            s->keep_entry = !got.undone;
            failed = got.failed;
        } catch (...) {
            failed = std::current_exception();  // waiting for its turn: nothing was added
        }
        co_await async::no_cancel;  // what was added is either handed over or undone
        if (!failed) failed = co_await note_result(*s, std::move(entry));
        if (failed) {
            if (!s->keep_entry) co_await forget(s->entry);
            co_await close_namespace(std::move(s->ns));
            std::rethrow_exception(failed);
        }
        s->addresses = addresses_of(s->result);
        co_return attachment{std::move(s)};
    }

    async::task<void> detach_now(attachment a) {
        co_await async::no_cancel;
        auto* s = a.get();
        if (s == nullptr) co_return;
        const auto failed = co_await plugins_.del(list_, version_, s->target, s->result);
        co_await close_namespace(std::move(s->ns));
        // What could not be taken back stays in the ledger: the next start tries again.
        if (!failed) co_await forget(s->entry);
    }

    static call_target target_of(std::string id, const attach_args& args) {
        if (!valid_id(id)) throw error{errc::invalid, cat("not an identifier for a network attachment: ", quoted(id))};
        if (args.hostname.find_first_of(";=\n") != std::string::npos)
            throw error{errc::invalid, cat("the host name ", quoted(args.hostname), " cannot be handed to CNI plugins")};
        call_target out{.id = std::move(id), .hostname = args.hostname};
        if (!args.capabilities.empty()) out.capabilities = json::parse(args.capabilities).as_object();
        return out;
    }

    /// The first ADD of a process makes the bridge: one at a time, here and among processes that share the state directory.
    async::task<added> add(call_target target) {
        if (ready_) co_return co_await plugins_.add(list_, version_, std::move(target));
        const auto turn = co_await first_.acquire();
        unique_fd lock;
        if (!ready_ && !options_.lock_file.empty()) {
            lock = co_await rt_.pool().run([file = options_.lock_file] { return open_lock(file); });
            while (!try_lock(lock.get(), options_.lock_file)) co_await async::sleep_for(std::chrono::milliseconds(20));
        }
        auto out = co_await plugins_.add(list_, version_, std::move(target));
        ready_ = ready_ || !out.failed;
        co_return out;
    }

    /// The ledger's entry with what ADD gave: plugins find in it what they have to take back. Undoes ADD when that fails.
    async::task<std::exception_ptr> note_result(attachment::state& s, json::object entry) {
        if (options_.ledger == nullptr) co_return nullptr;
        entry.set("result", s.result);
        std::string full = json::serialize(entry);
        std::exception_ptr failed;
        try {
            co_await options_.ledger->record(full);
        } catch (...) {
            failed = std::current_exception();
        }
        if (!failed) {
            co_await forget(std::exchange(s.entry, std::move(full)));
            co_return nullptr;
        }
        s.keep_entry = (co_await plugins_.del(list_, version_, s.target, s.result)).has_value();
        co_return failed;
    }

    async::task<void> forget(std::string entry) {
        if (options_.ledger == nullptr) co_return;
        std::exception_ptr failed;
        try {
            co_await options_.ledger->forget(std::move(entry));
        } catch (...) {
            failed = std::current_exception();
        }
        if (failed) log(log_level::warning, cat("a network's ledger entry stays: ", describe(failed).what()));
    }

    async::task<void> close_namespace(unique_fd ns) {
        co_await rt_.pool().run([gone = std::move(ns)]() mutable { gone.reset(); });
    }

    async::runtime& rt_;
    caller plugins_;
    plugin_list list_;
    std::string version_;
    options options_;
    async::semaphore first_;
    bool ready_ = false;
};

async::task<std::unique_ptr<provider>> make_cni(async::runtime& rt, process::spawner& programs, options o, std::string file, std::string text) {
    auto list = parse_list(text, cat("CNI configuration ", file));
    caller plugins(programs, {o.binary_dir, distribution_dir}, o.plugin_time_limit);
    plugins.check(list);
    auto version = co_await plugins.negotiate(list);
    const auto size = o.pool_size;
    const auto idle = o.idle_limit;
    std::unique_ptr<provider> out = std::make_unique<cni_provider>(rt, std::move(plugins), std::move(list), std::move(version), std::move(o));
    if (size > 0) out = make_pool(rt, std::move(out), size, idle);
    co_return out;
}

}  // namespace

std::string path_of(const unique_fd& fd) { return cat("/proc/", ::getpid(), "/fd/", fd.get()); }

attachment::attachment() noexcept = default;
attachment::attachment(std::unique_ptr<state> s) noexcept : state_(std::move(s)) {}
attachment::attachment(attachment&&) noexcept = default;
attachment& attachment::operator=(attachment&&) noexcept = default;
attachment::~attachment() = default;

int attachment::network_namespace() const noexcept { return state_ ? state_->ns.get() : -1; }

const cni::addresses& attachment::addresses() const noexcept {
    static const cni::addresses none;
    return state_ ? state_->addresses : none;
}

std::unique_ptr<provider> make_host_provider() { return std::make_unique<host_provider>(); }
std::unique_ptr<provider> make_none_provider(async::runtime& rt) { return std::make_unique<none_provider>(rt); }

async::task<std::unique_ptr<provider>> make_provider(async::runtime& rt, process::spawner& programs, options o) {
    if (o.mode == mode::host) co_return make_host_provider();
    if (o.mode == mode::none) co_return make_none_provider(rt);
    const std::string file = o.config_path.value_or(default_config);
    auto text = co_await rt.pool().run([file] { return read_text(file); });
    if (text) co_return co_await make_cni(rt, programs, std::move(o), file, std::move(*text));
    if (o.config_path)
        throw error{errc::invalid, cat("the CNI configuration ", file, " does not exist; create it or take cniConfigPath out of the configuration")};
    if (o.mode == mode::cni)
        throw error{errc::invalid, cat("the network mode is cni, but there is no CNI configuration ", file, "; create it or set cniConfigPath")};
    log(log_level::warning, cat("steps use the host's network: there is no CNI configuration ", file));
    co_return make_host_provider();
}

namespace {

/// A stand-in for the namespace that died with its process: some plugins (bridge with ipMasq) find the addresses whose rules
/// they take back at the interface only. Empty where it cannot be made.
unique_fd ghost_of(const json::value& result) {
    try {
        const auto had = addresses_of(result);
        return new_network_namespace([&] { add_ghost_interface(interface_name, had); });
    } catch (const error& e) {
        log(log_level::debug, cat("no stand-in for a dead step's network: ", e.what()));
        return {};
    }
}

}  // namespace

async::task<void> replay(async::runtime& rt, process::spawner& programs, std::string text) {
    const auto entry = json::parse(text);
    const auto& o = entry.as_object();
    auto list = parse_list(json::serialize(json::object_at(o, "list")), "a network in the ledger");
    const auto version = list.versions.front();
    call_target target{.id = json::string_at(o, "id"), .hostname = json::optional_string(o, "hostname").value_or("")};
    if (const auto* capabilities = json::optional_object(o, "capabilities")) target.capabilities = *capabilities;
    const auto* found = o.find("result");
    const json::value result = found == nullptr ? json::value{} : *found;
    const caller plugins(programs, json::strings_at(o, "dirs"), nanoseconds{json::int_at(o, "limit")});
    if (!result.is_null()) {
        const auto ghost = co_await rt.pool().run([result] { return ghost_of(result); });
        if (ghost) {
            target.netns = path_of(ghost);
            if (!co_await plugins.del(list, version, target, result)) co_return;
            target.netns.clear();
        }
    }
    if (const auto failed = co_await plugins.del(std::move(list), version, std::move(target), result)) throw error{*failed};
}

}  // namespace cobuild::cni

module;
#include <fcntl.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.ops;

import cobuild.executor;
import cobuild.cni;
import cobuild.session;
import cobuild.source;
import cobuild.progress;
import :bodies;

namespace cobuild::ops {

namespace {

/// What counts of a step in its cache key (BuildKit's rules): not the inputs, addresses of extra hosts, selectors (they
/// count with their input), which cache directory a cache mount gets and who shares it, proxies.
digest exec_key(llb::op what) {
    for (auto& in : what.inputs) in.vertex = digest{};
    auto& exec = std::get<llb::exec_op>(what.what);
    for (auto& h : exec.meta.extra_hosts) h.ip.clear();
    exec.meta.proxy.reset();
    for (auto& m : exec.mounts) {
        m.selector.clear();
        if (m.cache) m.cache = llb::cache_opt{};
    }
    what.constraints.reset();
    return key_of("exec.v0", what);
}

bool keyed_by_content(const llb::mount& m) {
    if (m.content == llb::content_cache::off || m.input < 0) return false;
    if (m.content == llb::content_cache::on) return true;
    return m.dest != "/" && (m.output == llb::no_output || m.readonly || m.selector == "/");
}

/// Everything a running step holds: mounts stay open until it has ended.
struct prepared_mounts {
    std::map<std::size_t, snapshot::writable> writables;  ///< by index of the mount
    std::vector<snapshot::view> views;
    std::vector<unique_fd> fds;
};

class exec_op final : public solver::op {
public:
    exec_op(const llb::op& what, environment& env, const build_scope& scope, bool ignore_cache)
        : env_(env),
          session_(scope.session),
          failures_(scope.failures),
          vertex_(scope.vertex),
          exec_(std::get<llb::exec_op>(what.what)),
          inputs_(what.inputs.size()),
          key_(exec_key(what)),
          renewed_(ignore_cache ? scope.renewed : nullptr) {
        if (!exec_.devices.empty()) throw error{errc::unsupported, "RUN --device is not supported yet"};
        if (exec_.network == llb::net_mode::host && !env.host_network_allowed)
            throw error{errc::permission, "network.host is not allowed: add it to insecure-entitlements in the configuration"};
        for (const auto& m : exec_.mounts)
            if (m.type == llb::mount_type::ssh && m.ssh && (m.ssh->uid != 0 || m.ssh->gid != 0 || (m.ssh->mode != 0600 && m.ssh->mode != 0)))
                throw error{errc::unsupported, "RUN --mount=type=ssh with uid=, gid= or mode= is not supported yet"};
    }

    async::task<solver::cache_info> describe(solver::context) override {
        solver::cache_info out{.op_digest = key_};
        out.inputs.resize(inputs_);
        for (const auto& m : exec_.mounts) {
            if (m.input < 0) continue;
            auto& in = out.inputs[static_cast<std::size_t>(m.input)];
            in.selector += cat(m.dest, "=", m.selector, "\n");
            in.content_of = in.content_of || keyed_by_content(m);
        }
        // An input that is also mounted otherwise counts as a whole.
        for (const auto& m : exec_.mounts)
            if (m.input >= 0 && !keyed_by_content(m)) out.inputs[static_cast<std::size_t>(m.input)].content_of = false;
        co_return out;
    }

    async::task<std::optional<digest>> content_key(std::size_t input, solver::result value, solver::context ctx) override {
        std::vector<cache::selector> wanted;
        for (const auto& m : exec_.mounts)
            if (m.input == static_cast<std::int64_t>(input)) wanted.push_back({.path = m.selector.empty() ? "/" : m.selector, .follow_links = true});
        // A client's directory is copied into a layer first, so what is hashed is what the step will see.
        if (std::dynamic_pointer_cast<local_value>(value)) value = copied_[input] = co_await as_chain(env_, value, selector_of(input));
        const auto chain = std::dynamic_pointer_cast<chain_value>(value);
        if (!chain) co_return std::nullopt;
        const auto view = co_await env_.snapshots.view(chain->chain);
        std::exception_ptr failed;
        std::optional<digest> out;
        try {
            out = co_await env_.pool.run(
                [&] { return cache::hash_tree(view.fd(), wanted, {.memo = nullptr, .threads = 2, .cancelled = ctx.cancelled}); });
        } catch (...) {
            failed = std::current_exception();
        }
        if (failed && failures_) (*failures_)[vertex_] = {.inputs = {chain}, .mounts = {}, .action = {}, .unread = input};
        if (failed) std::rethrow_exception(failed);
        co_return out;
    }

    [[nodiscard]] std::optional<std::size_t> changed_input(std::size_t output) const noexcept override {
        for (const auto& m : exec_.mounts)
            if (m.type == llb::mount_type::bind && m.output == static_cast<std::int64_t>(output) && m.input >= 0) return m.input;
        return std::nullopt;
    }
    async::task<std::shared_ptr<void>> prepare(solver::context ctx) override;
    async::task<container_base> open_container(std::vector<std::shared_ptr<chain_value>> inputs);
    async::task<solver::run_result> run(std::vector<solver::result> inputs, solver::context ctx) override;

private:
    /// By mount; those of one directory share it.
    using cache_dirs = std::map<std::size_t, std::shared_ptr<snapshot::cache_dir>>;
    [[nodiscard]] std::string selector_of(std::size_t input) const {
        std::string out;
        std::size_t mounts = 0;
        for (const auto& m : exec_.mounts)
            if (m.input == static_cast<std::int64_t>(input)) out = m.selector, ++mounts;
        return mounts == 1 ? out : "";
    }
    async::task<void> add_mount(std::size_t index, std::vector<std::shared_ptr<chain_value>>& inputs, executor::step& step, prepared_mounts& held,
                                cache_dirs& caches);
    async::task<void> add_secret(const llb::mount& m, executor::step& step);
    async::task<void> add_agent(const llb::mount& m, executor::step& step, prepared_mounts& held);
    async::task<executor::step> make_step();
    async::task<executor::exit> run_in_network(executor::step step, executor::streams io);
    [[nodiscard]] std::string command_line() const;
    async::task<std::shared_ptr<chain_value>> commit(std::size_t index, prepared_mounts& held,
                                                     const std::vector<std::shared_ptr<chain_value>>& inputs);
    async::task<void> keep_failure(prepared_mounts& held, std::vector<std::shared_ptr<chain_value>> inputs);

    environment& env_;
    std::shared_ptr<session::session> session_;
    std::shared_ptr<failed_steps> failures_;
    digest vertex_;
    llb::exec_op exec_;
    std::size_t inputs_;
    digest key_;
    std::shared_ptr<std::set<std::string>> renewed_;
    std::shared_ptr<cache_dirs> caches_;
    std::map<std::size_t, std::shared_ptr<chain_value>> copied_;  ///< of live directories, by input
};

/// Cache directories are locked before the slot is taken, in the order of their ids, so that two steps never wait for each other.
async::task<std::shared_ptr<void>> exec_op::prepare(solver::context ctx) {
    std::vector<std::size_t> order;
    for (std::size_t i = 0; i < exec_.mounts.size(); ++i)
        if (exec_.mounts[i].type == llb::mount_type::cache) order.push_back(i);
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return exec_.mounts[a].cache->id < exec_.mounts[b].cache->id; });
    auto held = std::make_shared<cache_dirs>();
    std::map<std::pair<std::string, std::vector<snapshot::layer_id>>, std::shared_ptr<snapshot::cache_dir>> acquired;
    for (const auto i : order) {
        const auto& m = exec_.mounts[i];
        snapshot::cache_request r;
        r.id = m.cache->id;
        r.sharing = m.cache->sharing == llb::cache_sharing::locked     ? snapshot::sharing::locked
                    : m.cache->sharing == llb::cache_sharing::private_ ? snapshot::sharing::exclusive
                                                                       : snapshot::sharing::shared;
        if (m.input >= 0) {
            const auto slot = static_cast<std::size_t>(m.input);
            r.seed = (co_await as_chain(env_, ctx.inputs.at(slot), selector_of(slot)))->chain;
        }
        if (renewed_) r.fresh = renewed_->insert(cat(r.id, "\n", source::chain_text(r.seed))).second;
        r.description = cat("cached mount ", m.dest, " from exec ", exec_.meta.args.back());
        // A step that mounts a directory twice must not wait for itself.
        auto& known = acquired[{r.id, r.seed.layers}];
        if (!known) known = std::make_shared<snapshot::cache_dir>(co_await env_.snapshots.acquire_cache(std::move(r)));
        held->emplace(i, known);
    }
    caches_ = held;
    co_return held;
}

async::task<void> exec_op::add_secret(const llb::mount& m, executor::step& step) {
    const auto& want = m.secret.value();
    auto text = session_ ? co_await session_->secret(want.id) : std::nullopt;
    if (!text) {
        if (want.optional) co_return;
        throw error{errc::not_found, cat("secret ", want.id, ": not found; give it with --secret id=", want.id, ",src=FILE")};
    }
    executor::mount out{.what = executor::mount::kind::secret, .target = m.dest};
    out.data = std::move(*text);
    out.uid = want.uid;
    out.gid = want.gid;
    out.mode = want.mode;
    step.mounts.push_back(std::move(out));
}

/// The client's own agent answers in the step: no key leaves it.
async::task<void> exec_op::add_agent(const llb::mount& m, executor::step& step, prepared_mounts& held) {
    const std::string id = m.ssh && !m.ssh->id.empty() ? m.ssh->id : "default";
    const auto path = session_ ? co_await session_->ssh_agent(id) : std::nullopt;
    if (!path) {
        if (m.ssh && m.ssh->optional) co_return;
        throw error{errc::not_found, cat("no SSH key ", quoted(id), " forwarded from the client; give it with --ssh ", id)};
    }
    unique_fd socket{::open(path->c_str(), O_PATH | O_CLOEXEC)};
    if (!socket) throw_errno(cat("the ssh agent's socket ", *path));
    held.fds.push_back(std::move(socket));
    step.mounts.push_back({.what = executor::mount::kind::ssh, .target = m.dest, .source = held.fds.back().get()});
}

async::task<void> exec_op::add_mount(std::size_t index, std::vector<std::shared_ptr<chain_value>>& inputs, executor::step& step,
                                     prepared_mounts& held, cache_dirs& caches) {
    const auto& m = exec_.mounts[index];
    switch (m.type) {
        case llb::mount_type::secret: co_return co_await add_secret(m, step);
        case llb::mount_type::ssh: co_return co_await add_agent(m, step, held);
        case llb::mount_type::tmpfs:
            step.mounts.push_back({.what = executor::mount::kind::tmpfs,
                                   .target = m.dest,
                                   .size = m.tmpfs ? static_cast<std::uint64_t>(m.tmpfs->size) : 0,
                                   .mode = 01777});
            co_return;
        case llb::mount_type::cache:
            held.fds.push_back(caches.at(index)->mount());
            step.mounts.push_back({.target = m.dest, .source = held.fds.back().get(), .selector = m.selector, .readonly = m.readonly});
            co_return;
        case llb::mount_type::bind: break;
    }
    const snapshot::chain lower = m.input >= 0 ? inputs[static_cast<std::size_t>(m.input)]->chain : snapshot::chain{};
    int fd = -1;
    // A root is written to in any case: mount points are made on it.
    if (m.readonly && m.output == llb::no_output && m.dest != "/") {
        held.views.push_back(co_await env_.snapshots.view(lower));
        fd = held.views.back().fd();
    } else {
        auto writable = co_await env_.snapshots.begin(lower);
        held.fds.push_back(co_await writable.mount());
        fd = held.fds.back().get();
        held.writables.emplace(index, std::move(writable));
    }
    if (m.dest == "/") {
        step.root = fd;
        step.root_readonly = m.readonly;
    } else {
        step.mounts.push_back({.target = m.dest, .source = fd, .selector = m.selector, .readonly = m.readonly});
    }
}

async::task<executor::step> exec_op::make_step() {
    executor::step step;
    step.id = env_.directory.fresh_name();
    step.args = exec_.meta.args;
    step.env = exec_.meta.env;
    step.cwd = exec_.meta.cwd.empty() ? "/" : exec_.meta.cwd;
    step.user = exec_.meta.user;
    step.hostname = exec_.meta.hostname;
    for (const auto& h : exec_.meta.extra_hosts) step.extra_hosts.push_back({h.host, h.ip});
    for (const auto& u : exec_.meta.ulimits) step.ulimits.push_back({u.name, u.soft, u.hard});
    step.cgroup_parent = exec_.meta.cgroup_parent;
    if (exec_.security == llb::security_mode::insecure) step.security = executor::security::insecure;
    for (const auto code : exec_.meta.valid_exit_codes) step.valid_exit_codes.push_back(code);
    step.remove_stubs_recursively = exec_.meta.remove_mount_stubs_recursive;
    if (exec_.meta.proxy)
        step.proxies = {exec_.meta.proxy->http, exec_.meta.proxy->https, exec_.meta.proxy->ftp, exec_.meta.proxy->no, exec_.meta.proxy->all};
    for (const auto& s : exec_.secret_envs) {
        auto text = session_ ? co_await session_->secret(s.id) : std::nullopt;
        if (text)
            step.env.push_back(cat(s.name, "=", *text));
        else if (!s.optional)
            throw error{errc::not_found, cat("secret ", s.id, ": not found; give it with --secret id=", s.id, ",src=FILE")};
    }
    co_return step;
}

async::task<executor::exit> exec_op::run_in_network(executor::step step, executor::streams io) {
    const auto kind = exec_.network == llb::net_mode::host   ? network_kind::host
                      : exec_.network == llb::net_mode::none ? network_kind::none
                                                             : network_kind::standard;
    auto* provider = co_await env_.network(kind);
    if (!step.resolv_conf) {
        const auto defaults = env_.steps();
        step.resolv_conf = provider->kind() == cni::kind::host ? defaults.host_resolv_conf : defaults.resolv_conf;
    }
    auto attached = co_await provider->attach(step.id, {.hostname = step.hostname});
    step.network_namespace = attached.network_namespace();
    std::exception_ptr failed;
    executor::exit out;
    try {
        out = co_await env_.runner().run(std::move(step), std::move(io));
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::no_cancel;
    co_await provider->detach(std::move(attached));
    if (failed) std::rethrow_exception(failed);
    co_return out;
}

std::string exec_op::command_line() const {
    std::string out;
    for (const auto& a : exec_.meta.args) out += cat(out.empty() ? "" : " ", a);
    return out;
}

/// The mount as the step left it.
async::task<std::shared_ptr<chain_value>> exec_op::commit(std::size_t index, prepared_mounts& held,
                                                          const std::vector<std::shared_ptr<chain_value>>& inputs) {
    const auto& m = exec_.mounts[index];
    const auto below = m.input >= 0 ? inputs[static_cast<std::size_t>(m.input)] : nullptr;
    auto w = held.writables.extract(index);
    if (w.empty()) co_return below;
    const auto layer =
        co_await env_.snapshots.commit(std::move(w.mapped()), {.description = cat("mount ", m.dest, " from exec ", exec_.meta.args.back())});
    co_return with_layer(below ? *below : chain_value{}, layer);
}

async::task<void> exec_op::keep_failure(prepared_mounts& held, std::vector<std::shared_ptr<chain_value>> inputs) {
    failed_step out;
    for (std::size_t i = 0; i < exec_.mounts.size(); ++i) {
        const auto& m = exec_.mounts[i];
        out.inputs.push_back(m.input >= 0 ? inputs[static_cast<std::size_t>(m.input)] : nullptr);
        out.mounts.push_back(co_await commit(i, held, inputs));
    }
    (*failures_)[vertex_] = std::move(out);
}

async::task<solver::run_result> exec_op::run(std::vector<solver::result> values, solver::context ctx) {
    std::vector<std::shared_ptr<chain_value>> inputs;
    for (std::size_t i = 0; i < values.size(); ++i) {
        const auto copied = copied_.find(i);
        inputs.push_back(copied != copied_.end() ? copied->second : co_await as_chain(env_, values[i], selector_of(i)));
    }
    auto caches = std::exchange(caches_, nullptr);
    prepared_mounts held;
    auto step = co_await make_step();
    for (std::size_t i = 0; i < exec_.mounts.size(); ++i) co_await add_mount(i, inputs, step, held, *caches);
    output_limit out_limit, err_limit;
    const auto show = [&ctx](progress::stream where, output_limit& limit) {
        return [&ctx, where, &limit](std::span<const std::byte> data) -> async::task<void> {
            if (auto shown = limit.pass(text_of(data)); !shown.empty()) ctx.progress.output(where, std::move(shown));
            co_return;
        };
    };
    // A chain of its own: what it shields from cancellation while it cleans up ends with it.
    executor::exit ended;
    std::exception_ptr not_run;
    try {
        ended = co_await async::linked(async::cancel_token{}, run_in_network(std::move(step), {.out = show(progress::stream::out, out_limit),
                                                                                               .err = show(progress::stream::err, err_limit)}));
    } catch (...) {
        not_run = std::current_exception();
    }
    held.fds.clear();
    held.views.clear();
    const auto why =
        not_run ? cobuild::describe(not_run) : error{errc::step_failed, cat("exit code: ", ended.code, ended.oom ? " (out of memory)" : "")};
    if (why.kind() == errc::canceled) std::rethrow_exception(not_run);
    if (not_run || !ended.accepted) {
        if (auto rest = out_limit.rest(); !rest.empty()) ctx.progress.output(progress::stream::out, std::move(rest));
        if (auto rest = err_limit.rest(); !rest.empty()) ctx.progress.output(progress::stream::err, std::move(rest));
        if (failures_) co_await keep_failure(held, inputs);
        const error told{why.kind(), cat("process ", quoted(command_line()), " did not complete successfully: ", why.what())};
        throw not_run ? told : error(told).exited(ended.code);
    }
    solver::run_result out;
    for (std::size_t i = 0; i < exec_.mounts.size(); ++i) {
        const auto& m = exec_.mounts[i];
        // BuildKit's clients leave the output of a secret mount at 0, which is the root's.
        if (m.output == llb::no_output || m.type != llb::mount_type::bind) continue;
        const auto at = static_cast<std::size_t>(m.output);
        if (out.outputs.size() <= at) out.outputs.resize(at + 1);
        auto made = co_await commit(i, held, inputs);
        out.outputs[at] = made ? made : std::make_shared<chain_value>();
    }
    co_return out;
}

/// What a container holds until it is released, its writable layers dropped.
struct held_container {
    prepared_mounts mounts;
    std::shared_ptr<void> caches;
    std::vector<std::shared_ptr<chain_value>> inputs;
};

async::task<container_base> exec_op::open_container(std::vector<std::shared_ptr<chain_value>> inputs) {
    const auto held = std::make_shared<held_container>();
    held->inputs = inputs;
    held->caches = co_await prepare({.progress = {}, .cancelled = {}, .inputs = {inputs.begin(), inputs.end()}});
    const auto caches = std::exchange(caches_, nullptr);
    container_base out;
    out.step = co_await make_step();
    for (std::size_t i = 0; i < exec_.mounts.size(); ++i) {
        const auto before = out.step.mounts.size();
        co_await add_mount(i, inputs, out.step, held->mounts, *caches);
        const auto& m = exec_.mounts[i];
        const bool readable = m.type == llb::mount_type::bind || m.type == llb::mount_type::cache;
        int fd = -1;
        if (readable) fd = out.step.mounts.size() > before ? out.step.mounts.back().source : out.step.root;
        out.mounts.push_back(fd);
    }
    if (out.step.root < 0) throw error{errc::invalid, "the container has no root: none of its mounts is at /"};
    out.held = held;
    co_return out;
}

}  // namespace

async::task<container_base> prepare_container(llb::op what, std::vector<std::shared_ptr<chain_value>> inputs, environment& env, build_scope scope) {
    for (const auto& m : std::get<llb::exec_op>(what.what).mounts) {
        if (m.input >= static_cast<std::int64_t>(inputs.size())) throw error{errc::invalid, cat("the mount at ", quoted(m.dest), " has no input")};
        if (m.dest == "/" && m.type != llb::mount_type::bind) throw error{errc::invalid, "a container's root must be a bind mount"};
    }
    what.inputs.resize(inputs.size());
    const auto op = std::make_shared<exec_op>(what, env, scope, false);
    co_return co_await op->open_container(std::move(inputs));
}

std::shared_ptr<solver::op> make_exec_op(const llb::op& what, environment& env, const build_scope& scope, bool ignore_cache) {
    return std::make_shared<exec_op>(what, env, scope, ignore_cache);
}

}  // namespace cobuild::ops

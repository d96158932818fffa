module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.ops;

import :bodies;

namespace cobuild::ops {

namespace {

std::string base_name(std::string_view path) {
    while (path.size() > 1 && path.ends_with('/')) path.remove_suffix(1);
    return std::string(path.substr(path.rfind('/') + 1));
}

/// What counts of a file op: not its inputs, nor the directories of its sources (what they select counts instead).
digest file_key(llb::op what) {
    const auto inputs = static_cast<std::int64_t>(what.inputs.size());
    for (auto& in : what.inputs) in.vertex = digest{};
    for (auto& action : std::get<llb::file_op>(what.what).actions)
        if (auto* copy = std::get_if<llb::copy_action>(&action.what);
            copy != nullptr && action.secondary_input >= 0 && action.secondary_input < inputs)
            copy->src = base_name(copy->src);
    what.constraints.reset();
    return key_of("file.v1", what);
}

/// What disk usage shows of an action's result.
struct description_visitor {
    std::string operator()(const std::monostate&) const { return {}; }
    std::string operator()(const llb::copy_action& a) const { return cat("copy ", a.src, " ", a.dest); }
    std::string operator()(const llb::mkfile_action& a) const { return cat("mkfile ", a.path); }
    std::string operator()(const llb::mkdir_action& a) const { return cat("mkdir ", a.path); }
    std::string operator()(const llb::rm_action& a) const { return cat("rm ", a.path); }
    std::string operator()(const llb::symlink_action& a) const { return cat("symlink ", a.newpath, " -> ", a.oldpath); }
};
std::string description_of(const llb::file_action& action) { return std::visit(description_visitor{}, action.what); }

std::optional<fs::file_time> time_of(std::int64_t timestamp) {
    if (timestamp < 0) return std::nullopt;
    return fs::file_time{timestamp / 1000000000, static_cast<std::uint32_t>(timestamp % 1000000000)};
}

/// Special bits are never taken, as in BuildKit; clients do not send them.
std::uint32_t plain_mode(std::int32_t mode) { return static_cast<std::uint32_t>(mode) & 0777; }

/// Without parents an existing directory is left as it is (BuildKit's rule), and the one above must exist.
void make_directory(const fs::root& root, const llb::mkdir_action& what, fs::owner who) {
    if (!what.make_parents) {
        const auto there = root.stat(what.path, fs::links::follow);
        if (there && !there->is_dir()) throw error{errc::exists, cat("mkdir ", what.path, ": it exists and is not a directory")};
        if (there) return;
        const auto above = root.parent(what.path);  // throws where there is none
    }
    root.make_dirs(what.path, plain_mode(what.mode), who, time_of(what.timestamp));
}

/// Writes through a link, as opening the file would. A file that exists keeps its mode and, where none is given, its owner;
/// a directory is never replaced.
void make_file(const fs::root& root, const llb::mkfile_action& what, std::optional<fs::owner> who) {
    const std::string path = root.resolve(what.path, fs::links::follow);
    const auto there = root.stat(path);
    if (there && !there->is_file()) throw error{errc::exists, cat("mkfile ", what.path, ": it exists and is not a regular file")};
    {
        const auto out = there ? root.open(path, O_WRONLY | O_TRUNC) : root.create_file(path, plain_mode(what.mode), who.value_or(fs::owner{}));
        fs::write_all(out.get(), bytes_of(what.data));
    }
    if (there && who) root.chown(path, *who);
    if (const auto t = time_of(what.timestamp)) root.set_mtime(path, *t);
}

void remove(const fs::root& root, const llb::rm_action& what) {
    if (what.allow_wildcard && fs::has_wildcard(what.path)) {
        std::string pattern = fs::clean_path(cat("/", what.path));
        for (const auto& path : expand_wildcard(root, std::string_view(pattern).substr(1), false)) root.remove_all(path);
        return;
    }
    if (!root.remove_all(what.path) && !what.allow_not_found) throw error{errc::not_found, cat("rm ", what.path, ": no such file or directory")};
}

/// A tree between actions: a chain as it came, or a layer being written on one; `below` is empty once an action took it over.
struct tree {
    std::shared_ptr<chain_value> below;
    std::optional<snapshot::writable> top;
    std::optional<fs::root> mounted;
};

class file_op final : public solver::op {
public:
    file_op(const llb::op& what, environment& env, const build_scope& scope)
        : env_(env),
          file_(std::get<llb::file_op>(what.what)),
          inputs_(what.inputs.size()),
          hash_local_(scope.hash_local),
          key_(file_key(what)),
          failures_(scope.failures),
          vertex_(scope.vertex) {
        count_uses();
    }

    async::task<solver::cache_info> describe(solver::context) override {
        solver::cache_info out{.op_digest = key_};
        out.inputs.resize(inputs_);
        for (std::size_t i = 0; i < inputs_; ++i) {
            out.inputs[i].content_of = only_copied_from(i);
            for (const auto& a : file_.actions)
                if (const auto* copy = std::get_if<llb::copy_action>(&a.what); copy != nullptr && a.secondary_input == static_cast<std::int64_t>(i))
                    out.inputs[i].selector += cat(copy->src, "\n");
        }
        co_return out;
    }

    async::task<std::optional<digest>> content_key(std::size_t input, solver::result value, solver::context ctx) override {
        if (const auto local = std::dynamic_pointer_cast<local_value>(value)) {
            const auto memo = co_await env_.cache.memo();
            co_return co_await env_.pool.run([&] { return digest_of_copies(input, *local, memo.get()); });
        }
        // Of an empty root the copy itself says that there is nothing (BuildKit's sentence for it is another one).
        const auto chain = std::dynamic_pointer_cast<chain_value>(value);
        if (!chain || chain->chain.layers.empty()) co_return std::nullopt;
        std::vector<cache::selector> wanted;
        for (const auto& a : file_.actions) {
            const auto* copy = std::get_if<llb::copy_action>(&a.what);
            if (copy == nullptr || a.secondary_input != static_cast<std::int64_t>(input)) continue;
            // A backslash may be a letter or an escape, which only the copy finds out: then all counts.
            if (copy->src.find('\\') != std::string::npos) {
                wanted.emplace_back();  // "/"
                continue;
            }
            wanted.push_back({.path = copy->src,
                              .wildcard = copy->allow_wildcard && fs::has_wildcard(copy->src),
                              .follow_links = copy->follow_symlink,
                              .include = copy->include_patterns,
                              .exclude = copy->exclude_patterns});
        }
        const auto view = co_await env_.snapshots.view(chain->chain);
        std::exception_ptr failed;
        std::optional<digest> out;
        try {
            out = co_await env_.pool.run([&] { return cache::hash_tree(view.fd(), wanted, {.threads = 2, .cancelled = ctx.cancelled}); });
        } catch (...) {
            failed = std::current_exception();
        }
        if (failed && failures_) (*failures_)[vertex_] = {.inputs = {chain}, .mounts = {}, .action = {}, .unread = input};
        if (failed) std::rethrow_exception(failed);
        co_return out;
    }

    async::task<solver::run_result> run(std::vector<solver::result> inputs, solver::context ctx) override;

private:
    /// Content can stand for an input that actions only copy from.
    [[nodiscard]] bool only_copied_from(std::size_t input) const {
        const auto wanted = static_cast<std::int64_t>(input);
        bool copied = false;
        for (const auto& a : file_.actions) {
            if (a.input == wanted) return false;
            const bool is_copy = std::holds_alternative<llb::copy_action>(a.what);
            if (a.secondary_input == wanted && !is_copy) return false;
            copied = copied || a.secondary_input == wanted;
            if (const auto* copy = std::get_if<llb::copy_action>(&a.what); copy != nullptr && copy->owner)
                for (const auto& who : {copy->owner->user, copy->owner->group})
                    if (who)
                        if (const auto* named = std::get_if<llb::named_user>(&*who); named != nullptr && named->input == wanted) return false;
        }
        return copied;
    }

    /// Owners by name need a tree to look in; a copy keyed before its base is known takes numbers only.
    static std::optional<fs::owner> owner_of(const std::optional<llb::chown_opt>& chown, const std::vector<tree*>& trees) {
        if (!chown) return std::nullopt;
        fs::owner out;
        std::uint32_t primary = 0;
        const auto number = [&](const std::optional<llb::user_opt>& who, bool group) -> std::optional<std::uint32_t> {
            if (!who) return std::nullopt;
            if (const auto* id = std::get_if<std::uint32_t>(&*who)) return *id;
            const auto* named = std::get_if<llb::named_user>(&*who);
            if (named == nullptr) return std::nullopt;
            if (named->input < 0 || static_cast<std::size_t>(named->input) >= trees.size() || !trees[static_cast<std::size_t>(named->input)]->mounted)
                throw error{errc::invalid, cat("--chown: the name ", quoted(named->name), " cannot be looked up on an empty root; use numbers")};
            const auto& root = *trees[static_cast<std::size_t>(named->input)]->mounted;
            return group ? find_group(root, named->name) : find_user(root, named->name, &primary);
        };
        out.uid = number(chown->user, false).value_or(0);
        // Without a group: a named user's own group, and for a number the same number (docker's rule).
        if (chown->user && std::holds_alternative<std::uint32_t>(*chown->user)) primary = out.uid;
        out.gid = number(chown->group, true).value_or(primary);
        return out;
    }

    std::optional<digest> digest_of_copies(std::size_t input, const local_value& local, cache::stat_memo* memo) const;
    void count_uses();
    async::task<void> open_tree(tree& t, bool writable);
    async::task<void> go_on_from(std::int64_t input, std::vector<tree>& trees, tree& target);
    async::task<void> settle(std::size_t action, tree& t);
    async::task<void> open_owners(const llb::file_action& action, std::vector<tree>& trees);
    async::task<void> perform(std::size_t i, std::vector<tree>& trees, const std::vector<const local_value*>& live,
                              const std::vector<tree*>& by_input, std::vector<hasher>& landed, cache::stat_memo* memo);
    async::task<void> keep_failure(std::size_t action, std::vector<tree>& trees);
    async::task<std::vector<solver::result>> commit_outputs(std::vector<tree>& trees);
    std::optional<digest> act(const llb::file_action& action, tree& target, tree* other, const local_value* live, const std::vector<tree*>& trees,
                              cache::stat_memo* memo) const;

    environment& env_;
    llb::file_op file_;
    std::size_t inputs_;
    bool hash_local_;
    digest key_;
    std::shared_ptr<failed_steps> failures_;
    digest vertex_;
    std::vector<std::size_t> uses_;  ///< by action: how many outputs and other actions need its result; 0: it never runs
};

/// Actions name only earlier ones, so one pass from the back finds what the outputs need.
void file_op::count_uses() {
    uses_.assign(file_.actions.size(), 0);
    for (std::size_t i = uses_.size(); i-- > 0;) {
        const auto& a = file_.actions[i];
        if (a.output != llb::no_output) ++uses_[i];
        if (uses_[i] == 0) continue;
        for (const auto index : {a.input, a.secondary_input})
            if (index >= static_cast<std::int64_t>(inputs_)) ++uses_.at(static_cast<std::size_t>(index) - inputs_);
    }
}

/// The digest that all copies from one live input have together, from remembered stats; empty when one is not remembered.
std::optional<digest> file_op::digest_of_copies(std::size_t input, const local_value& local, cache::stat_memo* memo) const {
    hasher all;
    for (std::size_t i = 0; i < file_.actions.size(); ++i) {
        const auto& a = file_.actions[i];
        if (uses_[i] == 0) continue;
        const auto* copy = std::get_if<llb::copy_action>(&a.what);
        if (copy == nullptr || a.secondary_input != static_cast<std::int64_t>(input)) continue;
        copy_job job{.from = &local.root, .live = &local, .what = *copy};
        // A named owner is only known with the tree it is looked up in; the copy itself tells the key then.
        for (const auto& who : {copy->owner ? copy->owner->user : std::nullopt, copy->owner ? copy->owner->group : std::nullopt})
            if (who && std::holds_alternative<llb::named_user>(*who)) return std::nullopt;
        job.owner = owner_of(copy->owner, {});
        job.read = hash_local_;
        const auto one = run_copy(job, memo);
        if (!one) return std::nullopt;
        all.update(one->str());
    }
    return all.finish();
}

async::task<void> file_op::open_tree(tree& t, bool writable) {
    if (t.mounted && (!writable || t.top)) co_return;
    if (!writable) {
        auto view = co_await env_.snapshots.view(t.below->chain);
        t.mounted.emplace(view.mount().duplicate());
        co_return;
    }
    t.top.emplace(co_await env_.snapshots.begin(t.below->chain));
    t.mounted.emplace(t.below->chain.layers.empty() ? unique_fd{::openat(t.top->upper(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)}
                                                    : co_await t.top->mount());
}

std::optional<digest> file_op::act(const llb::file_action& action, tree& target, tree* other, const local_value* live,
                                   const std::vector<tree*>& trees, cache::stat_memo* memo) const {
    const auto& root = *target.mounted;
    if (const auto* copy = std::get_if<llb::copy_action>(&action.what)) {
        copy_job job{.from = live != nullptr ? &live->root : &*other->mounted, .live = live, .to = &root, .what = *copy};
        job.owner = owner_of(copy->owner, trees);
        const auto from = action.secondary_input;
        const bool hashed = from >= 0 && from < static_cast<std::int64_t>(inputs_) && only_copied_from(static_cast<std::size_t>(from)) &&
                            !other->below->chain.layers.empty();
        if (live != nullptr || hashed) return run_copy(job, memo);
        try {
            return run_copy(job, memo);
        } catch (const error& e) {
            if (e.kind() != errc::not_found || std::string_view(e.what()).find("\": not found") == std::string_view::npos) throw;
            throw error{errc::not_found, cat("copying ", copy->src, ": no such file or directory")};
        }
    }
    const auto who = [&](const auto& what) { return owner_of(what.owner, trees).value_or(fs::owner{}); };
    if (const auto* dir = std::get_if<llb::mkdir_action>(&action.what))
        make_directory(root, *dir, who(*dir));
    else if (const auto* file = std::get_if<llb::mkfile_action>(&action.what))
        make_file(root, *file, owner_of(file->owner, trees));
    else if (const auto* rm = std::get_if<llb::rm_action>(&action.what))
        remove(root, *rm);
    else if (const auto* link = std::get_if<llb::symlink_action>(&action.what)) {
        root.make_link(link->newpath, link->oldpath, who(*link));
        if (const auto t = time_of(link->timestamp)) root.set_mtime(link->newpath, *t);
    } else
        throw error{errc::invalid, "a file op has an action of unknown kind"};
    return std::nullopt;
}

/// Makes `target` what `input` is. A result that nothing else needs is taken over; any other becomes a layer to stand on.
async::task<void> file_op::go_on_from(std::int64_t input, std::vector<tree>& trees, tree& target) {
    if (input < 0) {
        target.below = std::make_shared<chain_value>();
        co_return;
    }
    const auto index = static_cast<std::size_t>(input);
    auto& from = trees[index];
    if (index < inputs_ || uses_[index - inputs_] > 1) {
        if (index >= inputs_) co_await settle(index - inputs_, from);
        target.below = from.below;
        co_return;
    }
    target.below = std::exchange(from.below, nullptr);
    target.top = std::exchange(from.top, std::nullopt);
    target.mounted = std::exchange(from.mounted, std::nullopt);
}

/// Commits what an action wrote, once.
async::task<void> file_op::settle(std::size_t action, tree& t) {
    if (!t.top) co_return;
    t.mounted.reset();
    auto top = *std::exchange(t.top, std::nullopt);
    t.below = with_layer(*t.below, co_await env_.snapshots.commit(std::move(top), {.description = description_of(file_.actions[action])}));
}

/// Owners by name are looked up in the trees they name.
async::task<void> file_op::open_owners(const llb::file_action& action, std::vector<tree>& trees) {
    std::optional<llb::chown_opt> owner;
    if (const auto* copy = std::get_if<llb::copy_action>(&action.what)) owner = copy->owner;
    if (const auto* dir = std::get_if<llb::mkdir_action>(&action.what)) owner = dir->owner;
    if (const auto* file = std::get_if<llb::mkfile_action>(&action.what)) owner = file->owner;
    if (const auto* link = std::get_if<llb::symlink_action>(&action.what)) owner = link->owner;
    if (!owner) co_return;
    for (const auto& who : {owner->user, owner->group}) {
        const auto* named = who ? std::get_if<llb::named_user>(&*who) : nullptr;
        if (named != nullptr && named->input >= 0 && static_cast<std::size_t>(named->input) < inputs_)
            co_await open_tree(trees[static_cast<std::size_t>(named->input)], false);
    }
}

async::task<void> file_op::perform(std::size_t i, std::vector<tree>& trees, const std::vector<const local_value*>& live,
                                   const std::vector<tree*>& by_input, std::vector<hasher>& landed, cache::stat_memo* memo) {
    const auto& action = file_.actions[i];
    tree& target = trees[inputs_ + i];
    co_await go_on_from(action.input, trees, target);
    co_await open_tree(target, true);
    tree nothing{.below = std::make_shared<chain_value>()};
    tree* other = action.secondary_input >= 0 ? &trees[static_cast<std::size_t>(action.secondary_input)] : &nothing;
    const auto* from_live = action.secondary_input >= 0 ? live[static_cast<std::size_t>(action.secondary_input)] : nullptr;
    if (std::holds_alternative<llb::copy_action>(action.what) && from_live == nullptr) {
        if (const auto from = action.secondary_input - static_cast<std::int64_t>(inputs_); from >= 0 && uses_[static_cast<std::size_t>(from)] > 1)
            co_await settle(static_cast<std::size_t>(from), *other);
        co_await open_tree(*other, false);
    }
    co_await open_owners(action, trees);
    const auto digest = co_await env_.pool.run([&] { return act(action, target, other, from_live, by_input, memo); });
    if (from_live != nullptr && digest) landed[static_cast<std::size_t>(action.secondary_input)].update(digest->str());
}

/// Each action's result as far as there is one; of the one that failed with what it did until then.
async::task<void> file_op::keep_failure(std::size_t action, std::vector<tree>& trees) {
    failed_step out{.inputs = {}, .mounts = {}, .action = action, .unread = {}};
    for (std::size_t i = 0; i < trees.size(); ++i) {
        if (i >= inputs_) co_await settle(i - inputs_, trees[i]);
        (i < inputs_ ? out.inputs : out.mounts).push_back(trees[i].below);
    }
    (*failures_)[vertex_] = std::move(out);
}

async::task<solver::run_result> file_op::run(std::vector<solver::result> values, solver::context) {
    // Index i below inputs_ is an input, what follows are the results of the actions in order.
    std::vector<tree> trees(inputs_ + file_.actions.size());
    std::vector<const local_value*> live(trees.size(), nullptr);
    std::vector<tree*> by_input;
    for (std::size_t i = 0; i < inputs_; ++i) {
        live[i] = dynamic_cast<const local_value*>(values[i].get());
        trees[i].below = std::dynamic_pointer_cast<chain_value>(values[i]);
        // What is changed, not only copied from, is a layer first.
        if (live[i] != nullptr && !only_copied_from(i)) {
            trees[i].below = co_await as_chain_value(env_, values[i]);
            live[i] = nullptr;
        }
        if (!trees[i].below) trees[i].below = std::make_shared<chain_value>();
        by_input.push_back(&trees[i]);
    }
    const auto memo = co_await env_.cache.memo();
    std::vector<hasher> landed(inputs_);
    for (std::size_t i = 0; i < file_.actions.size(); ++i) {
        if (uses_[i] == 0) continue;
        std::exception_ptr failed;
        try {
            co_await perform(i, trees, live, by_input, landed, memo.get());
        } catch (...) {
            failed = std::current_exception();
        }
        if (failed && failures_ && cobuild::describe(failed).kind() != errc::canceled) co_await keep_failure(i, trees);
        if (failed) std::rethrow_exception(failed);
    }
    solver::run_result out;
    out.content.resize(inputs_);
    for (std::size_t i = 0; i < inputs_; ++i)
        if (live[i] != nullptr && only_copied_from(i)) out.content[i] = landed[i].finish();
    out.outputs = co_await commit_outputs(trees);
    co_return out;
}

async::task<std::vector<solver::result>> file_op::commit_outputs(std::vector<tree>& trees) {
    std::vector<solver::result> out;
    for (std::size_t i = 0; i < file_.actions.size(); ++i) {
        if (file_.actions[i].output == llb::no_output) continue;
        auto& t = trees[inputs_ + i];
        const auto at = static_cast<std::size_t>(file_.actions[i].output);
        if (out.size() <= at) out.resize(at + 1);
        co_await settle(i, t);
        out[at] = t.below;
    }
    co_return out;
}

}  // namespace

std::shared_ptr<solver::op> make_file_op(const llb::op& what, environment& env, const build_scope& scope) {
    return std::make_shared<file_op>(what, env, scope);
}

}  // namespace cobuild::ops

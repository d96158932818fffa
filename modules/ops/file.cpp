module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
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
        if (auto* copy = std::get_if<llb::copy_action>(&action.what); copy != nullptr && action.secondary_input >= 0 && action.secondary_input < inputs)
            copy->src = base_name(copy->src);
    what.constraints.reset();
    return key_of("file.v0", what);
}

std::optional<fs::file_time> time_of(std::int64_t timestamp) {
    if (timestamp < 0) return std::nullopt;
    return fs::file_time{timestamp / 1000000000, static_cast<std::uint32_t>(timestamp % 1000000000)};
}

/// A tree between actions: a chain as it came, or a layer being written on one.
struct tree {
    std::shared_ptr<chain_value> below;
    std::optional<snapshot::writable> top;
    std::optional<fs::root> mounted;
};

class file_op final : public solver::op {
public:
    file_op(const llb::op& what, environment& env) : env_(env), file_(std::get<llb::file_op>(what.what)), inputs_(what.inputs.size()), key_(file_key(what)) {}

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
            co_return co_await env_.pool.run([&] { return digest_of_copies(input, *local, nullptr, memo.get()); });
        }
        const auto chain = std::dynamic_pointer_cast<chain_value>(value);
        if (!chain) co_return std::nullopt;
        std::vector<cache::selector> wanted;
        for (const auto& a : file_.actions) {
            const auto* copy = std::get_if<llb::copy_action>(&a.what);
            if (copy == nullptr || a.secondary_input != static_cast<std::int64_t>(input)) continue;
            wanted.push_back({.path = copy->src, .wildcard = copy->allow_wildcard && fs::has_wildcard(copy->src), .follow_links = copy->follow_symlink,
                              .include = copy->include_patterns, .exclude = copy->exclude_patterns});
        }
        const auto view = co_await env_.snapshots.view(chain->chain);
        co_return co_await env_.pool.run([&] { return cache::hash_tree(view.fd(), wanted, {.threads = 2, .cancelled = ctx.cancelled}); });
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

    std::optional<digest> digest_of_copies(std::size_t input, const local_value& local, const std::vector<tree*>* trees, cache::stat_memo* memo) const;
    async::task<void> open_tree(tree& t, bool writable);
    std::optional<digest> act(const llb::file_action& action, tree& target, tree* other, const local_value* live, const std::vector<tree*>& trees,
                              cache::stat_memo* memo) const;

    environment& env_;
    llb::file_op file_;
    std::size_t inputs_;
    digest key_;
};

/// The digest that all copies from one live input have together, from remembered stats; empty when one is not remembered.
std::optional<digest> file_op::digest_of_copies(std::size_t input, const local_value& local, const std::vector<tree*>*, cache::stat_memo* memo) const {
    hasher all;
    for (const auto& a : file_.actions) {
        const auto* copy = std::get_if<llb::copy_action>(&a.what);
        if (copy == nullptr || a.secondary_input != static_cast<std::int64_t>(input)) continue;
        copy_job job{.from = &local.root, .live = &local, .what = *copy};
        // A named owner is only known with the tree it is looked up in; the copy itself tells the key then.
        for (const auto& who : {copy->owner ? copy->owner->user : std::nullopt, copy->owner ? copy->owner->group : std::nullopt})
            if (who && std::holds_alternative<llb::named_user>(*who)) return std::nullopt;
        job.owner = owner_of(copy->owner, {});
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
    t.mounted.emplace(t.below->chain.layers.empty() ? unique_fd{::openat(t.top->upper(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)} : co_await t.top->mount());
}

std::optional<digest> file_op::act(const llb::file_action& action, tree& target, tree* other, const local_value* live, const std::vector<tree*>& trees,
                                   cache::stat_memo* memo) const {
    const auto& root = *target.mounted;
    if (const auto* copy = std::get_if<llb::copy_action>(&action.what)) {
        copy_job job{.from = live != nullptr ? &live->root : &*other->mounted, .live = live, .to = &root, .what = *copy};
        job.owner = owner_of(copy->owner, trees);
        return run_copy(job, memo);
    }
    if (const auto* dir = std::get_if<llb::mkdir_action>(&action.what)) {
        const auto who = owner_of(dir->owner, trees).value_or(fs::owner{});
        const auto mode = static_cast<std::uint32_t>(dir->mode) & 07777;
        if (!dir->make_parents) {
            if (const auto there = root.stat(dir->path, fs::links::follow)) throw error{errc::exists, cat("mkdir ", dir->path, ": it exists already")};
        }
        root.make_dirs(dir->path, mode, who, time_of(dir->timestamp));
    } else if (const auto* file = std::get_if<llb::mkfile_action>(&action.what)) {
        root.remove_all(file->path);
        {
            const auto out = root.create_file(file->path, static_cast<std::uint32_t>(file->mode) & 07777, owner_of(file->owner, trees).value_or(fs::owner{}));
            fs::write_all(out.get(), bytes_of(file->data));
        }
        if (const auto t = time_of(file->timestamp)) root.set_mtime(file->path, *t);
    } else if (const auto* rm = std::get_if<llb::rm_action>(&action.what)) {
        if (rm->allow_wildcard && fs::has_wildcard(rm->path)) throw error{errc::unsupported, "removing by a wildcard in a file op is not supported yet"};
        if (!root.remove_all(rm->path) && !rm->allow_not_found) throw error{errc::not_found, cat("rm ", rm->path, ": no such file or directory")};
    } else if (const auto* link = std::get_if<llb::symlink_action>(&action.what)) {
        root.make_link(link->newpath, link->oldpath, owner_of(link->owner, trees).value_or(fs::owner{}));
    } else {
        throw error{errc::invalid, "a file op has an action of unknown kind"};
    }
    return std::nullopt;
}

async::task<solver::run_result> file_op::run(std::vector<solver::result> values, solver::context) {
    // Index i below inputs_ is an input, what follows are the results of the actions in order.
    std::vector<tree> trees(inputs_ + file_.actions.size());
    std::vector<const local_value*> live(trees.size(), nullptr);
    for (std::size_t i = 0; i < inputs_; ++i) {
        live[i] = dynamic_cast<const local_value*>(values[i].get());
        trees[i].below = live[i] != nullptr ? std::make_shared<chain_value>() : std::dynamic_pointer_cast<chain_value>(values[i]);
        if (!trees[i].below) trees[i].below = std::make_shared<chain_value>();
    }
    std::vector<tree*> by_input;
    for (std::size_t i = 0; i < inputs_; ++i) by_input.push_back(&trees[i]);
    const auto memo = co_await env_.cache.memo();
    std::vector<hasher> landed(inputs_);
    solver::run_result out;
    out.content.resize(inputs_);
    for (std::size_t i = 0; i < file_.actions.size(); ++i) {
        const auto& action = file_.actions[i];
        tree& target = trees[inputs_ + i];
        if (action.input < 0) {
            target.below = std::make_shared<chain_value>();
        } else {
            auto& from = trees[static_cast<std::size_t>(action.input)];
            if (live[static_cast<std::size_t>(action.input)] != nullptr) throw error{errc::invalid, "a file op cannot change a client's directory"};
            if (from.top && static_cast<std::size_t>(action.input) < inputs_) throw error{errc::internal, "an input of a file op is being written"};
            if (static_cast<std::size_t>(action.input) >= inputs_) {
                if (!from.below || file_.actions[static_cast<std::size_t>(action.input) - inputs_].output != llb::no_output)
                    throw error{errc::unsupported, "a file op whose intermediate result is used twice is not supported yet"};
                target.below = std::move(from.below);
                target.top = std::exchange(from.top, std::nullopt);
                target.mounted = std::exchange(from.mounted, std::nullopt);
            } else {
                target.below = from.below;
            }
        }
        co_await open_tree(target, true);
        tree* other = action.secondary_input >= 0 ? &trees[static_cast<std::size_t>(action.secondary_input)] : nullptr;
        const auto* from_live = action.secondary_input >= 0 ? live[static_cast<std::size_t>(action.secondary_input)] : nullptr;
        tree empty{.below = std::make_shared<chain_value>()};
        if (other == nullptr && std::holds_alternative<llb::copy_action>(action.what)) other = &empty;
        if (other != nullptr && from_live == nullptr) co_await open_tree(*other, false);
        // Owners by name are looked up in the trees they name.
        const auto* copy = std::get_if<llb::copy_action>(&action.what);
        const auto* dir = std::get_if<llb::mkdir_action>(&action.what);
        const auto* file = std::get_if<llb::mkfile_action>(&action.what);
        const auto& owner = copy != nullptr ? copy->owner : dir != nullptr ? dir->owner : file != nullptr ? file->owner : std::nullopt;
        if (owner)
            for (const auto& who : {owner->user, owner->group})
                if (const auto* named = who ? std::get_if<llb::named_user>(&*who) : nullptr; named != nullptr && named->input >= 0 && static_cast<std::size_t>(named->input) < inputs_)
                    co_await open_tree(trees[static_cast<std::size_t>(named->input)], false);
        const auto digest = co_await env_.pool.run([&] { return act(action, target, other, from_live, by_input, memo.get()); });
        if (from_live != nullptr && digest) landed[static_cast<std::size_t>(action.secondary_input)].update(digest->str());
    }
    for (std::size_t i = 0; i < inputs_; ++i)
        if (live[i] != nullptr && only_copied_from(i)) out.content[i] = landed[i].finish();
    for (std::size_t i = 0; i < file_.actions.size(); ++i) {
        if (file_.actions[i].output == llb::no_output) continue;
        auto& t = trees[inputs_ + i];
        const auto at = static_cast<std::size_t>(file_.actions[i].output);
        if (out.outputs.size() <= at) out.outputs.resize(at + 1);
        t.mounted.reset();
        if (!t.top) {
            out.outputs[at] = t.below;
            continue;
        }
        const auto layer = co_await env_.snapshots.commit(std::move(*t.top), {});
        out.outputs[at] = with_layer(*t.below, layer);
    }
    co_return out;
}

}  // namespace

std::shared_ptr<solver::op> make_file_op(const llb::op& what, environment& env) { return std::make_shared<file_op>(what, env); }

}  // namespace cobuild::ops

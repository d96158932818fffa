module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.snapshot;

import cobuild.base;
import cobuild.state;
import :internal;

namespace cobuild::snapshot {
namespace {

/// The kernel refuses a directory given twice. Where one layer stands twice in a chain (steps that changed nothing, in an image
/// or an imported cache, are one and the same empty layer), what it says below it says again above.
std::vector<std::string> names_top_first(const chain& c) {
    std::vector<std::string> out;
    std::set<layer_id> seen;
    for (auto i = c.layers.rbegin(); i != c.layers.rend(); ++i)
        if (seen.insert(*i).second) out.push_back(cat(i->value, "/fs"));
    return out;
}

/// Fills in the lower layers of a mount, copied together where there are too many.
state::pin set_lower(const std::shared_ptr<store::common>& c, const chain& lower, overlay_parts& parts) {
    parts.layers = c->layers.get();
    parts.lower = names_top_first(lower);
    const auto limit = std::min<std::size_t>(c->opt.max_chain, most_lowers(c->method, parts));
    auto [used, keep] = flattened(c, lower, limit);
    parts.lower = names_top_first(used);
    return keep;
}

class overlay_writable final : public writable::body {
public:
    using body::body;

    unique_fd mount() override {
        if (lower.layers.empty()) return bind_mount(work.fs.get(), false);
        overlay_parts parts{.active = work.owner->active.get(),
                            .active_name = work.name,
                            .work = cat("work", mounts_++),
                            .volatile_upper = work.owner->opt.volatile_upper};
        // a new one each time: overlayfs refuses one that a volatile mount has used
        if (::mkdirat(work.dir.get(), parts.work.c_str(), 0700) != 0) throw_errno(cat("cannot make a layer below ", work.owner->where()));
        keep += set_lower(work.owner, lower, parts);
        return overlay_mount(parts, work.owner->method);
    }

    void finish() override {
        for (unsigned i = 0; i < mounts_; ++i) work.owner->dir->discard(work.dir.get(), cat("work", i));
    }

private:
    unsigned mounts_ = 0;
};

/// Gives a new layer's root the mode, owner and time of the chain's.
void inherit_root(const store::common& c, const chain& lower, int fs) {
    struct stat st{}, mine{};
    const auto top = cat(lower.layers.back().value, "/fs");
    if (::fstatat(c.layers.get(), top.c_str(), &st, 0) != 0) throw_errno(cat("cannot look at the layer ", lower.layers.back().value));
    const std::array<::timespec, 2> times{st.st_atim, st.st_mtim};
    if (::fstat(fs, &mine) != 0) throw_errno(cat("cannot make a layer below ", c.where()));
    const bool owner = mine.st_uid != st.st_uid || mine.st_gid != st.st_gid;
    const bool mode = owner || mine.st_mode != st.st_mode;
    if ((owner && ::fchown(fs, st.st_uid, st.st_gid) != 0) || (mode && ::fchmod(fs, st.st_mode & 07777) != 0) || ::futimens(fs, times.data()) != 0) {
        throw_errno(cat("cannot make a layer below ", c.where()));
    }
}

class overlay_store final : public store {
public:
    explicit overlay_store(std::shared_ptr<common> c) : store(std::move(c)) {}
    [[nodiscard]] std::string_view name() const noexcept override { return "overlayfs"; }

    std::unique_ptr<writable::body> begin_on(chain lower) override {
        auto keep = common_->must_hold(lower);
        auto out = std::make_unique<overlay_writable>(common_, std::move(lower), std::move(keep));
        if (!out->lower.layers.empty()) inherit_root(*common_, out->lower, out->work.fs.get());
        return out;
    }

    snapshot::view view_of(chain c) override {
        auto keep = std::make_shared<state::pin>(common_->must_hold(c));
        if (c.layers.empty()) return access::make(bind_mount(common_->empty.get(), true), keep);
        if (c.layers.size() == 1 && !common_->may_have_whiteouts(c.layers[0]))
            return access::make(bind_mount(common_->fs_of(c.layers[0]).get(), true), keep);
        overlay_parts parts;
        *keep += set_lower(common_, c, parts);
        if (parts.lower.size() == 1) parts.empty = common_->empty.get();  // overlayfs wants two to hide whiteouts
        return access::make(overlay_mount(parts, common_->method), keep);
    }
};

std::optional<error> try_method(const std::shared_ptr<store::common>& c, mount_method method) {
    try {
        unfinished lower(c), upper(c);
        if (::mkdirat(upper.dir.get(), "work", 0700) != 0) throw_errno("cannot try out overlayfs");
        overlay_parts parts{.layers = c->active.get(),
                            .lower = {cat("../active/", lower.name, "/fs")},
                            .active = c->active.get(),
                            .active_name = upper.name,
                            .work = "work",
                            .volatile_upper = c->opt.volatile_upper};
        const auto mount = overlay_mount(parts, method);
        if (::mkdirat(mount.get(), "a", 0755) != 0) throw_errno("cannot write through an overlay");
        if (::faccessat(upper.fs.get(), "a", F_OK, 0) != 0) throw_errno("an overlay does not write to its upper directory");
        return std::nullopt;
    } catch (const error& e) {
        return e;
    }
}

}  // namespace

std::shared_ptr<store> open_overlay(std::shared_ptr<state::directory> dir, options o) {
    auto c = std::make_shared<store::common>(std::move(dir), o);
    std::vector<mount_method> methods{o.method};
    if (o.method == mount_method::automatic) methods = {mount_method::by_descriptor, mount_method::by_proc_name, mount_method::by_short_name};
    std::optional<error> why;
    for (const auto method : methods) {
        auto failed = try_method(c, method);
        if (!failed) {
            c->method = method;
            return std::make_shared<overlay_store>(std::move(c));
        }
        if (failed->kind() == errc::no_space) throw *failed;
        if (!why) why = std::move(failed);
    }
    throw error{errc::unsupported, cat("overlayfs cannot be used below ", c->where(), ": ", why->what())};
}

}  // namespace cobuild::snapshot

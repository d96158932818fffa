module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

module cobuild.llb;

namespace cobuild::llb {
namespace {

[[noreturn]] void refuse(const std::string& why) { throw error{errc::invalid, cat("invalid build step: ", why)}; }

/// An index below `count`, or -1 where nothing is allowed to stand for it.
void check_index(std::int64_t index, std::size_t count, std::string_view what, bool may_be_scratch = true) {
    if (index == scratch && may_be_scratch) return;
    if (index < 0 || static_cast<std::uint64_t>(index) >= count) refuse(cat(what, " names input ", index, " of ", count));
}

template<class E>
void check_enum(E value, E last, std::string_view what) {
    const auto v = static_cast<int>(value);
    if (v < 0 || v > static_cast<int>(last)) refuse(cat(what, " has the unknown value ", v));
}

void check(const std::monostate&, const op& o) {
    if (o.inputs.size() != 1) refuse("it says no work to do");
}

void check(const exec_op& e, const op& o) {
    if (e.meta.args.empty()) refuse("the command to run has no arguments");
    if (e.mounts.empty()) refuse("the command to run has no mounts");
    check_enum(e.network, net_mode::none, "the network mode");
    if (e.security != security_mode::sandbox && e.security != security_mode::insecure)
        refuse(cat("invalid security mode ", static_cast<int>(e.security)));
    bool root = false;
    for (const mount& m : e.mounts) {
        root = root || m.dest == "/";
        check_enum(m.type, mount_type::tmpfs, "a mount's type");
        check_enum(m.content, content_cache::off, "a mount's content cache");
        if (m.cache) check_enum(m.cache->sharing, cache_sharing::locked, "a cache mount's sharing");
        check_index(m.input, o.inputs.size(), cat("the mount at ", m.dest));
        if (m.dest.empty()) refuse("a mount has no target");
        if (m.output < no_output || m.output >= static_cast<std::int64_t>(e.mounts.size()))
            refuse(cat("the mount at ", m.dest, " has the output ", m.output));
    }
    if (!root) refuse("the command to run has no root file system");
}

void check(const source_op& s, const op& o) {
    if (s.identifier.empty()) refuse("a source has no identifier");
    if (!o.inputs.empty()) refuse(cat("the source ", s.identifier, " has inputs"));
}

void check_owner(const std::optional<chown_opt>& owner, const op& o) {
    if (!owner) return;
    for (const auto* side : {&owner->user, &owner->group}) {
        if (!*side) continue;
        if (const auto* named = std::get_if<named_user>(&**side)) check_index(named->input, o.inputs.size(), "an owner's name");
    }
}

const std::optional<chown_opt>* owner_of(const file_action& a) {
    if (const auto* x = std::get_if<copy_action>(&a.what)) return &x->owner;
    if (const auto* x = std::get_if<mkfile_action>(&a.what)) return &x->owner;
    if (const auto* x = std::get_if<mkdir_action>(&a.what)) return &x->owner;
    if (const auto* x = std::get_if<symlink_action>(&a.what)) return &x->owner;
    return nullptr;
}

void check(const file_op& f, const op& o) {
    if (f.actions.empty()) refuse("a file step has no actions");
    std::size_t known = o.inputs.size();
    bool has_output = false;
    for (const file_action& a : f.actions) {
        if (std::holds_alternative<std::monostate>(a.what)) refuse("a file action says no work to do");
        check_index(a.input, known, "a file action");
        if (std::holds_alternative<copy_action>(a.what)) check_index(a.secondary_input, known, "a copy's source");
        if (const auto* owner = owner_of(a)) check_owner(*owner, o);
        if (a.output < no_output || a.output >= static_cast<std::int64_t>(f.actions.size())) refuse(cat("a file action has the output ", a.output));
        has_output = has_output || a.output != no_output;
        ++known;
    }
    if (!has_output) refuse("a file step has no output");
}

void check(const build_op& b, const op& o) {
    check_index(b.builder, o.inputs.size(), "a nested build");
    for (const auto& [name, index] : b.inputs) check_index(index, o.inputs.size(), cat("input ", name, " of a nested build"), false);
}

void check(const merge_op& m, const op& o) {
    for (const auto index : m.inputs) check_index(index, o.inputs.size(), "a merge");
}

void check(const diff_op& d, const op& o) {
    check_index(d.lower, o.inputs.size(), "the lower side of a diff");
    check_index(d.upper, o.inputs.size(), "the upper side of a diff");
}

void check(const passthrough_op& p, const op& o) {
    if (p.id.empty()) refuse("a pass-through has no id");
    if (p.outputs.empty()) refuse("a pass-through has no outputs");
    for (const auto index : p.outputs) check_index(index, o.inputs.size(), "a pass-through", false);
}

}  // namespace

void validate(const op& o) {
    for (const input& in : o.inputs) {
        if (in.vertex.empty()) refuse("an input has no digest");
        if (in.index < 0) refuse(cat("an input has the index ", in.index));
    }
    std::visit([&](const auto& what) { check(what, o); }, o.what);
}

std::int64_t output_count(const op& o) {
    if (std::holds_alternative<std::monostate>(o.what)) return 0;
    std::int64_t last = no_output;
    if (const auto* e = std::get_if<exec_op>(&o.what)) {
        for (const mount& m : e->mounts) {
            if (m.type == mount_type::bind) last = std::max(last, m.output);
        }
    } else if (const auto* f = std::get_if<file_op>(&o.what)) {
        for (const file_action& a : f->actions) last = std::max(last, a.output);
    } else if (const auto* p = std::get_if<passthrough_op>(&o.what)) {
        last = static_cast<std::int64_t>(p->outputs.size()) - 1;
    } else {
        last = 0;
    }
    return last + 1;
}

}  // namespace cobuild::llb

module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

module cobuild.frontend;

import :state;

namespace cobuild::frontend {
namespace {

std::string base_name(std::string_view path) {
    while (path.size() > 1 && path.ends_with('/')) path.remove_suffix(1);
    const auto slash = path.rfind('/');
    return std::string(slash == std::string_view::npos || path.size() == 1 ? path : path.substr(slash + 1));
}

/// Relative to the working directory; an absolute one stays as written.
std::string mount_target(const stage_state& s, std::string_view target) {
    return target.starts_with('/') ? std::string(target) : join_path(s.dir, target);
}

llb::cache_sharing sharing_of(const df::mount& m) {
    switch (m.sharing.value_or(df::cache_sharing::shared)) {
        case df::cache_sharing::private_: return llb::cache_sharing::private_;
        case df::cache_sharing::locked: return llb::cache_sharing::locked;
        default: return llb::cache_sharing::shared;
    }
}

}  // namespace

/// Mounts stand sorted by target, "/" first; secrets and ssh sockets behind them, in the order written.
void converter::add_mounts(stage_state& s, command& c, std::vector<llb::mount>& mounts, std::vector<root_ref>& roots, llb::exec_op& e,
                           env_list& env) {
    const auto& in = c.what;
    const auto& run = std::get<df::run_instruction>(in.body);
    std::vector<llb::mount> special;
    std::vector<llb::mount> sockets;
    for (std::size_t i = 0; i < run.mounts.size(); ++i) {
        df::mount m;
        try {
            m = df::parse_mount(run.mounts[i].csv, [&](std::string_view word) { return expand(s, in, word); });
        } catch (const error& bad) {
            fail(bad.kind(), cat("RUN --mount=", run.mounts[i].csv, ": ", bad.what()), in.lines);
        }
        if (m.type == df::mount_type::secret) {
            add_secret(s, m, in.lines, special, e);
        } else if (m.type == df::mount_type::ssh) {
            if (!m.source.empty()) fail(errc::invalid, "RUN --mount=type=ssh does not support source", in.lines);
            llb::mount out{.input = llb::scratch,
                           .dest = m.target.empty() ? cat("/run/buildkit/ssh_agent.", sockets.size()) : mount_target(s, m.target),
                           .output = 0,
                           .type = llb::mount_type::ssh};
            out.ssh = llb::secret_opt{.id = m.id.empty() ? "default" : m.id,
                                      .uid = m.uid.value_or(0),
                                      .gid = m.gid.value_or(0),
                                      .mode = m.mode.value_or(0600),
                                      .optional = !m.required};
            s.agents.try_emplace(out.ssh->id, demand_note{m.required, in.lines});
            sockets.push_back(std::move(out));
        } else {
            add_directory_mount(s, m, c.sources.at(i), in.lines, mounts.emplace_back(), roots.emplace_back());
        }
    }
    if (!sockets.empty() && !env.get("SSH_AUTH_SOCK")) env.set("SSH_AUTH_SOCK", sockets.front().dest);
    if (req_.shm_size > 0) {
        mounts.push_back({.dest = "/dev/shm", .output = llb::no_output, .type = llb::mount_type::tmpfs, .tmpfs = llb::tmpfs_opt{req_.shm_size}});
        roots.emplace_back();
    }

    std::vector<std::size_t> order(mounts.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(), [&](auto a, auto b) { return std::tie(mounts[a].dest, a) < std::tie(mounts[b].dest, b); });
    std::vector<llb::mount> sorted;
    std::vector<root_ref> sorted_roots;
    for (const auto i : order) {
        sorted.push_back(std::move(mounts[i]));
        sorted_roots.push_back(roots[i]);
    }
    mounts = std::move(sorted);
    roots = std::move(sorted_roots);
    for (auto* list : {&special, &sockets})
        e.mounts.insert(e.mounts.end(), std::make_move_iterator(list->begin()), std::make_move_iterator(list->end()));
}

void converter::add_secret(stage_state& s, const df::mount& m, df::line_range lines, std::vector<llb::mount>& special, llb::exec_op& e) const {
    std::string id = m.source.empty() ? m.id : m.source;
    if (id.empty()) {
        if (m.target.empty()) fail(errc::invalid, "RUN --mount=type=secret needs an id, a source or a target", lines);
        id = base_name(m.target);
    }
    s.secrets.try_emplace(id, demand_note{m.required, lines});
    if (m.env) e.secret_envs.push_back({.id = id, .name = m.env->empty() ? base_name(id) : *m.env, .optional = !m.required});
    if (m.env && m.target.empty()) return;
    llb::mount out{.input = llb::scratch,
                   .dest = m.target.empty() ? cat("/run/secrets/", base_name(id)) : mount_target(s, m.target),
                   .output = 0,
                   .type = llb::mount_type::secret};
    out.secret =
        llb::secret_opt{.id = id, .uid = m.uid.value_or(0), .gid = m.gid.value_or(0), .mode = m.mode.value_or(0400), .optional = !m.required};
    special.push_back(std::move(out));
}

/// bind, cache and tmpfs.
void converter::add_directory_mount(stage_state& s, const df::mount& m, stage_state* source, df::line_range lines, llb::mount& out, root_ref& root) {
    const bool cache = m.type == df::mount_type::cache;
    const bool tmpfs = m.type == df::mount_type::tmpfs;
    const bool from_context = m.from.empty() && !cache && !tmpfs;
    if (source != nullptr && !tmpfs) {
        if (!source->dispatched)
            fail(errc::invalid, cat("cannot mount from stage ", quoted(m.from), " to ", quoted(m.target), ": the stage must stand above this one"),
                 lines);
        root = source->root;
        want(*source, join_path("/", m.source));
    } else if (from_context) {
        root = draft::context();
        context_paths_.insert(join_path("/", m.source));
    }
    out.readonly = m.readonly;
    out.output = llb::no_output;  // what a step writes into a bind mount is thrown away
    out.dest = mount_target(s, m.target);
    if (out.dest == "/") fail(errc::invalid, cat("invalid mount target ", quoted(out.dest)), lines);
    if (const auto inside = join_path("/", m.source); inside != "/") {
        out.selector = inside;
    } else if (m.uid || m.gid || m.mode) {
        input_list inputs;
        llb::file_action a{.input = inputs.of(root), .secondary_input = llb::scratch, .output = 0, .what = {}};
        a.what = llb::mkdir_action{.path = "/cache",
                                   .mode = static_cast<std::int32_t>(m.mode.value_or(0755)),
                                   .make_parents = false,
                                   .owner = llb::chown_opt{.user = llb::user_opt{m.uid.value_or(0)}, .group = llb::user_opt{m.gid.value_or(0)}},
                                   .timestamp = -1};
        llb::op_metadata meta;
        meta.description[std::string(llb::custom_name)] = "[internal] setting cache mount permissions";
        root = draft_.add({.inputs = {}, .what = llb::file_op{{std::move(a)}}, .platform = {}}, inputs.refs, std::move(meta));
        out.selector = "/cache";
    }
    if (tmpfs) {
        out.type = llb::mount_type::tmpfs;
        out.tmpfs = llb::tmpfs_opt{static_cast<std::int64_t>(m.size_limit)};
    } else if (cache) {
        out.type = llb::mount_type::cache;
        const auto space = build_arg("BUILDKIT_CACHE_MOUNT_NS").value_or("");
        out.cache = llb::cache_opt{.id = cat(space, "/", m.id.empty() ? fs::clean_path(m.target) : m.id), .sharing = sharing_of(m)};
    }
}

}  // namespace cobuild::frontend

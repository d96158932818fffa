module;
#include <algorithm>
#include <cctype>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

module cobuild.frontend;

import :state;

namespace cobuild::frontend {
namespace {

void capitalize_keyword(std::string& text) {
    const auto end = std::min(text.find(' '), text.size());
    std::transform(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(end), text.begin(),
                   [](unsigned char ch) { return static_cast<char>(std::toupper(ch)); });
}

/// Names of variables that come from secrets are shown as ****.
df::lookup masked(const env_list& env, const llb::exec_op& e) {
    std::vector<std::string> secret;
    for (const auto& s : e.secret_envs) secret.push_back(s.name);
    return [inner = env.lookup(), secret = std::move(secret)](std::string_view name) -> std::optional<std::string> {
        if (std::find(secret.begin(), secret.end(), name) != secret.end()) return "****";
        return inner(name);
    };
}

std::vector<df::key_value> declared_args(const stage_state& s) {
    std::vector<df::key_value> out;
    std::map<std::string_view, std::size_t> known;
    for (const auto& arg : s.args) {
        auto value = s.env.get(arg.key).value_or(arg.value.value_or(""));
        const auto [at, fresh] = known.try_emplace(arg.key, out.size());
        if (fresh) {
            out.push_back({.key = arg.key, .value = std::move(value)});
        } else {
            out[at->second].value = std::move(value);
        }
    }
    return out;
}

}  // namespace

llb::exec_meta converter::run_meta(const stage_state& s) const {
    llb::exec_meta meta;
    meta.cwd = s.dir.empty() ? "/" : s.dir;
    meta.user = s.user;
    meta.proxy = proxy_;
    meta.extra_hosts = req_.extra_hosts;
    meta.hostname = req_.hostname;
    meta.ulimits = req_.ulimits;
    meta.cgroup_parent = req_.cgroup_parent;
    meta.remove_mount_stubs_recursive = true;
    return meta;
}

void converter::run_command(stage_state& s, command& c) {
    const auto& in = c.what;
    const auto& run = std::get<df::run_instruction>(in.body);
    if (!run.devices.empty()) fail(errc::unsupported, cat("RUN --device=", run.devices.front().name, " is not supported yet"), in.lines);
    const bool runs =
        req_.any_platform || oci::match_rank(req_.build_platform, *s.platform) ||
        std::any_of(req_.emulated.begin(), req_.emulated.end(), [&](const auto& p) { return oci::match_rank(p, *s.platform).has_value(); });
    if (!runs) {
        fail(errc::unsupported,
             cat("RUN for platform ", oci::format(*s.platform), " on a ", oci::format(req_.build_platform),
                 " machine needs emulation, and the kernel has no emulator for it: register one that is kept open (flag F of binfmt_misc), as the "
                 "packages qemu-user-static and binfmt-support do, or run the image tonistiigi/binfmt once"),
             in.lines);
    }

    llb::exec_op e;
    e.meta = run_meta(s);
    std::vector<llb::mount> mounts{{.dest = "/", .output = 0}};
    std::vector<root_ref> roots{s.root};
    std::string name = in.source;
    std::vector<std::string> args = run.command.args;
    const df::heredoc* script = run.script();
    if (script != nullptr) {
        const auto text = script->text();
        name += cat(" (", df::summarize(*script), ")");
        if (text.starts_with("#!")) {
            // Run as a file of its own, by whatever its first line names.
            llb::file_action a{.input = llb::scratch, .secondary_input = llb::scratch, .output = 0, .what = {}};
            a.what = llb::mkfile_action{.path = cat("/", script->name), .mode = 0755, .data = text, .owner = {}, .timestamp = -1};
            auto meta = metadata(s, "[internal] preparing inline document");
            meta.ignore_cache = false;
            roots.push_back(draft_.add({.inputs = {}, .what = llb::file_op{{std::move(a)}}, .platform = {}}, {}, std::move(meta)));
            mounts.push_back({.selector = "/", .dest = "/dev/pipes/", .output = llb::no_output, .readonly = true});
            args = {cat("/dev/pipes/", script->name)};
        } else {
            args = {text};
        }
    } else if (!run.heredocs.empty()) {
        args = {run.shell_text()};
    }
    if (run.command.shell_form) args = with_shell(s, std::move(args));
    e.meta.args = args;

    env_list env = s.env;
    add_mounts(s, c, mounts, roots, e, env);
    e.meta.env = env.list();
    e.network = run.network == df::network_mode::none   ? llb::net_mode::none
                : run.network == df::network_mode::host ? llb::net_mode::host
                                                        : req_.network;
    if (run.security == df::security_mode::insecure) e.security = llb::security_mode::insecure;

    auto text = df::expand_for_display(name, masked(s.env, e), file_.escape);
    capitalize_keyword(text);
    auto meta = metadata(s, step_name(s, std::move(text), &*s.platform));
    meta.description["com.docker.dockerfile.v1.command"] = in.source;
    meta.linux_resources = req_.resources;

    input_list inputs;
    for (std::size_t i = 0; i < roots.size(); ++i) mounts[i].input = inputs.of(roots[i]);
    e.mounts.insert(e.mounts.begin(), std::make_move_iterator(mounts.begin()), std::make_move_iterator(mounts.end()));
    const auto& p = *s.platform;
    const llb::op o{.inputs = {}, .what = std::move(e), .platform = llb::platform{p.architecture, p.os, p.variant, p.os_version, p.os_features}};
    s.root = draft_.add(o, inputs.refs, std::move(meta), ranges_of(in.lines));
    add_history(s, df::run_history(args, declared_args(s)), true);
}

}  // namespace cobuild::frontend

module;
#include <algorithm>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

module cobuild.frontend;

import :state;

namespace cobuild::frontend {

std::vector<std::string> converter::with_shell(const stage_state& s, std::vector<std::string> args) const {
    std::vector<std::string> out = s.image.config.shell;
    const bool windows = s.platform && s.platform->os == "windows";
    if (out.empty()) out = windows ? std::vector<std::string>{"cmd", "/S", "/C"} : std::vector<std::string>{"/bin/sh", "-c"};
    std::string text;
    for (const auto& a : args) text += cat(text.empty() ? "" : " ", a);
    out.push_back(std::move(text));
    return out;
}

void converter::set_env(stage_state& s, const df::instruction& in) {
    auto& env = s.image.config.env;
    for (const auto& [key, value, legacy] : std::get<df::env_instruction>(in.body).pairs) {
        s.env.set(key, value);
        // The image keeps the order of first settings.
        for (; s.config_env_known < env.size(); ++s.config_env_known) {
            const auto& known = env[s.config_env_known];
            s.config_env.try_emplace(known.substr(0, known.find('=')), s.config_env_known);
        }
        const auto at = s.config_env.find(key);
        if (at != s.config_env.end()) {
            env[at->second] = cat(key, "=", value);
        } else {
            env.push_back(cat(key, "=", value));
        }
    }
    add_history(s, df::history(in.body), false);
}

/// The build argument, else the default, else the global ARG's value: an ARG without any of them is declared only.
void converter::set_arg(stage_state& s, df::instruction in) {
    for (auto& arg : std::get<df::arg_instruction>(in.body).args) {
        bool own_value = true;
        if (auto given = build_arg(arg.key)) {
            arg.value = std::move(given);
        } else if (arg.value) {
            arg.value = expand(s, in, *arg.value);
        } else {
            arg.value = global_args_.get(arg.key);
            own_value = !arg.value;
        }
        s.used_args.insert(arg.key);
        // What comes from above the first FROM is told where it stands there.
        if (own_value)
            s.arg_notes.insert_or_assign(arg.key,
                                         arg_note{.value = arg.value.value_or(""), .description = arg.description, .lines = in.lines, .needs = {}});
        const bool for_scanners = arg.key == "BUILDKIT_SBOM_SCAN_CONTEXT" || arg.key == "BUILDKIT_SBOM_SCAN_STAGE";
        if (arg.value && !for_scanners) s.env.set(arg.key, *arg.value);
        s.args.push_back(arg);
    }
    add_history(s, df::history(in.body), false);
}

void converter::set_label(stage_state& s, const df::instruction& in) {
    for (const auto& [key, value, legacy] : std::get<df::label_instruction>(in.body).pairs) s.image.config.labels.insert_or_assign(key, value);
    add_history(s, df::history(in.body), false);
}

void converter::change_dir(stage_state& s, std::string_view path) const {
    auto& dir = s.image.config.working_dir;
    dir = path.empty() ? join_path("/", dir) : path.starts_with('/') ? std::string(path) : join_path(dir, path);
    s.dir = dir;
}

void converter::set_workdir(stage_state& s, const df::instruction& in) {
    change_dir(s, std::get<df::workdir_instruction>(in.body).path);
    if (s.dir == "/") {
        add_history(s, cat("WORKDIR ", s.dir), false);
        return;
    }
    input_list inputs;
    llb::file_action a{.input = inputs.of(s.root), .secondary_input = llb::scratch, .output = 0, .what = {}};
    llb::mkdir_action mkdir{.path = fs::clean_path(s.dir), .mode = 0755, .make_parents = true, .owner = {}, .timestamp = -1};
    if (!s.image.config.user.empty()) mkdir.owner = parse_owner(s.image.config.user, a.input);
    if (epoch_) mkdir.timestamp = *epoch_ * 1'000'000'000;
    a.what = std::move(mkdir);
    auto meta = metadata(s, step_name(s, display(s, in), &*s.platform));
    meta.ignore_cache = false;
    const llb::op o{.inputs = {}, .what = llb::file_op{{std::move(a)}}, .platform = {}};
    s.root = draft_.add(o, inputs.refs, std::move(meta), ranges_of(in.lines));
    add_history(s, cat("WORKDIR ", s.dir), true);
}

void converter::set_expose(stage_state& s, const df::instruction& in) {
    std::vector<std::string> all;
    for (const auto& word : std::get<df::expose_instruction>(in.body).ports) {
        const auto e = df::expand_words(word, s.env.lookup(), file_.escape);
        report_unset(s, in, e.unmatched);
        const bool from_variable = word.find('$') != std::string::npos;  // the others were checked with the file
        for (const auto& text : e.words) {
            auto found = df::parse_port(text);
            if (from_variable && found.odd_protocol_case) warn(df::check_rule::expose_proto_casing, in.lines, in.comments, text);
            if (from_variable && found.host_part) warn(df::check_rule::expose_invalid_format, in.lines, in.comments, text);
            for (auto& port : found.ports) {
                s.image.config.exposed_ports.insert(port);
                if (std::find(all.begin(), all.end(), port) == all.end()) all.push_back(std::move(port));
            }
        }
    }
    std::sort(all.begin(), all.end());
    add_history(s, df::history(df::expose_instruction{std::move(all)}), false);
}

void converter::set_volume(stage_state& s, const df::instruction& in) {
    for (const auto& path : std::get<df::volume_instruction>(in.body).paths) {
        if (path.empty()) fail(errc::invalid, "VOLUME cannot be an empty string", in.lines);
        s.image.config.volumes.insert(path);
    }
    add_history(s, df::history(in.body), false);
}

/// CMD and ENTRYPOINT. An ENTRYPOINT drops the CMD that came with the base.
void converter::set_command(stage_state& s, df::instruction in) {
    auto& config = s.image.config;
    auto* cmd = std::get_if<df::cmd_instruction>(&in.body);
    auto& line = cmd != nullptr ? cmd->command : std::get<df::entrypoint_instruction>(in.body).command;
    if (line.shell_form) line.args = with_shell(s, std::move(line.args));
    line.shell_form = false;
    if (cmd != nullptr) {
        config.cmd = line.args;
        config.args_escaped = true;
        s.cmd_set = true;
    } else {
        config.entrypoint = line.args;
        if (!s.cmd_set) config.cmd.clear();
    }
    add_history(s, df::history(in.body), false);
}

void converter::set_healthcheck(stage_state& s, const df::instruction& in) {
    const auto& h = std::get<df::healthcheck_instruction>(in.body);
    s.image.config.healthcheck = oci::healthcheck{.test = h.test,
                                                  .interval = h.interval,
                                                  .timeout = h.timeout,
                                                  .start_period = h.start_period,
                                                  .start_interval = h.start_interval,
                                                  .retries = h.retries};
    add_history(s, df::history(in.body), false);
}

}  // namespace cobuild::frontend

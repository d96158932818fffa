module;
#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstddef>
#include <cstdint>
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

constexpr std::string_view history_comment = "buildkit.dockerfile.v0";

template<class... F>
struct overloaded : F... {
    using F::operator()...;
};

/// Where a cross-building step's target differs from the platform it runs on: "->arm64".
std::string cross_target(const oci::platform& base, const env_list& env) {
    oci::platform target;
    if (const auto whole = env.get("TARGETPLATFORM"); whole && !whole->empty()) {
        try {
            target = oci::parse_platform(*whole);
        } catch (const error&) {
            return {};
        }
    } else {
        const auto os = env.get("TARGETOS");
        const auto arch = env.get("TARGETARCH");
        const auto variant = env.get("TARGETVARIANT");
        if (!os && !arch && !variant) return {};
        target = {.os = os.value_or(base.os), .architecture = arch.value_or(base.architecture), .variant = variant.value_or("")};
    }
    target = oci::normalize(std::move(target));
    if (target.os != base.os) return cat("->", oci::format(target));
    if (target.architecture == base.architecture) return {};
    return cat("->", target.architecture, target.variant.empty() ? "" : "/", target.variant);
}

}  // namespace

/// What a stage takes from the stage or image it is FROM.
void converter::inherit(stage_state& s) {
    if (s.base != nullptr) {
        s.root = s.base->root;
        want(*s.base, "/");
        s.platform = s.base->platform;
        // A chain of a thousand stages must not hold a thousand copies of its history.
        const bool last = s.base->heirs == 1;
        auto history = last ? std::exchange(s.base->image.history, {}) : decltype(s.image.history){};
        s.image = s.base->image;
        if (last) s.image.history = std::move(history);
        if (s.base->heirs > 0) --s.base->heirs;
        s.image.config.on_build.clear();
        s.base_config = s.base->base_config;
        s.env = s.base->env;
        s.dir = s.base->dir;
        s.user = s.base->user;
        s.args = s.base->args;
    }
    if (!s.platform) s.platform = target_platform_;
    auto& config = s.image.config;
    const auto has_path = std::any_of(config.env.begin(), config.env.end(), [](const auto& e) { return e.starts_with("PATH="); });
    if (!has_path && s.platform->os != "windows") config.env.emplace_back("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    for (const auto& entry : config.env) {
        const auto eq = entry.find('=');
        s.env.set(entry.substr(0, eq), eq != std::string::npos ? std::string_view(entry).substr(eq + 1) : std::string_view());
    }
    if (!config.working_dir.empty()) change_dir(s, config.working_dir);
    if (!config.user.empty()) s.user = config.user;
}

void converter::dispatch_stage(stage_state& s) {
    inherit(s);
    s.dispatched = true;
    for (auto& c : s.commands) {
        s.in_trigger = c.on_build;
        try {
            dispatch(s, c);
        } catch (const error& e) {
            note(e, c.what.lines);
        }
    }
}

std::string converter::expand(const stage_state& s, const df::instruction& in, std::string_view word) {
    auto e = df::expand_word(word, s.env.lookup(), file_.escape);
    report_unset(s, in, e.unmatched);
    return std::move(e.text);
}

void converter::dispatch(stage_state& s, command& c) {
    df::expand_fields(c.what.body, [&](std::string_view word) { return expand(s, c.what, word); });
    auto& config = s.image.config;
    const df::instruction& in = c.what;
    std::visit(overloaded{
                   [](const df::from_instruction&) {},
                   [&](const df::run_instruction&) { run_command(s, c); },
                   [&](const df::copy_instruction&) { transfer(s, c); },
                   [&](const df::add_instruction&) { transfer(s, c); },
                   [&](const df::env_instruction&) { set_env(s, in); },
                   [&](const df::label_instruction&) { set_label(s, in); },
                   [&](const df::arg_instruction&) { set_arg(s, in); },
                   [&](const df::workdir_instruction&) { set_workdir(s, in); },
                   [&](const df::user_instruction& i) {
                       s.user = config.user = i.user;
                       add_history(s, df::history(in.body), false);
                   },
                   [&](const df::expose_instruction&) { set_expose(s, in); },
                   [&](const df::volume_instruction&) { set_volume(s, in); },
                   [&](const df::cmd_instruction&) { set_command(s, in); },
                   [&](const df::entrypoint_instruction&) { set_command(s, in); },
                   [&](const df::shell_instruction& i) {
                       config.shell = i.shell;
                       add_history(s, df::history(in.body), false);
                   },
                   [&](const df::stopsignal_instruction& i) {
                       if (!df::is_signal(i.signal))
                           fail(errc::invalid, cat("STOPSIGNAL ", quoted(i.signal), " is neither a signal's name nor its number"), in.lines);
                       config.stop_signal = i.signal;
                       add_history(s, df::history(in.body), false);
                   },
                   [&](const df::maintainer_instruction& i) {
                       s.image.author = i.name;
                       add_history(s, df::history(in.body), false);
                   },
                   [&](const df::healthcheck_instruction&) { set_healthcheck(s, in); },
                   [&](const df::onbuild_instruction& i) { config.on_build.push_back(i.source); },
               },
               in.body);
}

void converter::add_history(stage_state& s, std::string created_by, bool layer) {
    oci::history_entry h;
    if (epoch_) h.created = format_time(std::chrono::sys_time<nanoseconds>(std::chrono::seconds(*epoch_)));
    h.created_by = std::move(created_by);
    h.comment = history_comment;
    h.empty_layer = !layer;
    s.image.history.push_back(std::move(h));
}

/// "[build 2/5] RUN make", numbers as wide as the last one's.
std::string converter::step_name(stage_state& s, std::string text, const oci::platform* platform) const {
    if (s.command_total == 0) return text;
    std::string out = "[";
    if (req_.multi_platform && platform != nullptr) out += cat(oci::format(*platform), cross_target(*platform, s.env), " ");
    if (!s.name.empty()) out += cat(s.name, " ");
    const auto number = cat(++s.command_index);
    const auto total = cat(s.command_total);
    if (number.size() < total.size()) out.append(total.size() - number.size(), ' ');
    return cat(out, number, "/", total, "] ", s.in_trigger ? "ONBUILD " : "", text);
}

/// The instruction as progress shows it: keyword in capitals, variables replaced.
std::string converter::display(const stage_state& s, const df::instruction& in) const {
    std::string text = in.source;
    try {
        text = df::expand_word(text, s.env.lookup(), file_.escape).text;
    } catch (const error&) {
        // What cannot be expanded is shown as written.
    }
    const auto end = std::min(text.find(' '), text.size());
    std::transform(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(end), text.begin(),
                   [](unsigned char ch) { return static_cast<char>(std::toupper(ch)); });
    return text;
}

llb::op_metadata converter::metadata(const stage_state& s, std::string name) const {
    llb::op_metadata meta;
    meta.ignore_cache = s.ignore_cache;
    meta.description[std::string(llb::custom_name)] = std::move(name);
    return meta;
}

}  // namespace cobuild::frontend

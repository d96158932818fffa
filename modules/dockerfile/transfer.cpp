module;
#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.dockerfile;

import cobuild.base;
import :detail;

namespace cobuild::dockerfile {

using namespace detail;

namespace {

[[noreturn]] void fail(std::string message) { throw error{errc::invalid, std::move(message)}; }

/// Sources, here-documents and destination out of the arguments.
void read_paths(transfer& out, const node& n, std::string_view name) {
    if (n.args.size() < 2)
        fail(cat(name, " requires at least two arguments, but ", n.args.size() == 1 ? "only one was" : "none were",
                 " provided. Destination could not be determined"));
    const auto is_heredoc = [&](const std::string& word) { return n.json ? std::nullopt : parse_heredoc_word(word); };
    if (is_heredoc(n.args.back())) fail(cat(name, " cannot accept a heredoc as a destination"));
    out.destination = n.args.back();
    std::size_t next = 0;
    for (std::size_t i = 0; i + 1 < n.args.size(); ++i) {
        auto word = is_heredoc(n.args[i]);
        if (!word) {
            out.sources.push_back(n.args[i]);
            continue;
        }
        if (next == n.heredocs.size()) fail(cat(name, ": the text of the here-document <<", word->name, " is missing"));
        out.heredocs.push_back(n.heredocs[next++]);
    }
}

void read_common(transfer& out, const flag_values& flags) {
    out.chown = flags.text("chown");
    out.chmod = flags.text("chmod");
    out.link = flags.boolean("link").value_or(false);
    out.exclude = flags.list("exclude");
}

std::string lines_after(const std::string& command, const std::vector<heredoc>& heredocs) {
    std::string out = command;
    for (const auto& h : heredocs) out += cat('\n', h.content, h.name);
    return out;
}

}  // namespace

namespace detail {

instruction_body parse_copy(const node& n) {
    static constexpr std::array<flag_spec, 6> known{{{"from", flag_kind::text},
                                                     {"chown", flag_kind::text},
                                                     {"chmod", flag_kind::text},
                                                     {"link", flag_kind::boolean},
                                                     {"parents", flag_kind::boolean},
                                                     {"exclude", flag_kind::list}}};
    const flag_values flags(n, known);
    copy_instruction out;
    read_paths(out, n, "COPY");
    read_common(out, flags);
    out.from = flags.text("from");
    out.parents = flags.boolean("parents").value_or(false);
    if (const std::size_t dollar = out.from.find('$'); dollar != std::string::npos && dollar + 1 < out.from.size())
        fail(cat("'", out.from,
                 "': variable expansion is not supported for --from, define a new stage with FROM using ARG from global scope as a workaround"));
    return out;
}

instruction_body parse_add(const node& n) {
    static constexpr std::array<flag_spec, 7> known{{{"chown", flag_kind::text},
                                                     {"chmod", flag_kind::text},
                                                     {"link", flag_kind::boolean},
                                                     {"keep-git-dir", flag_kind::boolean},
                                                     {"checksum", flag_kind::text},
                                                     {"unpack", flag_kind::boolean},
                                                     {"exclude", flag_kind::list}}};
    const flag_values flags(n, known);
    add_instruction out;
    read_paths(out, n, "ADD");
    read_common(out, flags);
    out.checksum = flags.text("checksum");
    out.keep_git_dir = flags.boolean("keep-git-dir");
    out.unpack = flags.boolean("unpack");
    return out;
}

instruction_body parse_run(const node& n, char escape) {
    static constexpr std::array<flag_spec, 4> known{
        {{"mount", flag_kind::list}, {"network", flag_kind::text}, {"security", flag_kind::text}, {"device", flag_kind::list}}};
    static constexpr std::array<std::string_view, 3> networks{"default", "none", "host"};
    static constexpr std::array<std::string_view, 2> securities{"sandbox", "insecure"};
    const flag_values flags(n, known);
    run_instruction out;
    for (const auto& csv : flags.list("mount")) out.mounts.push_back(check_mount(csv, escape));
    for (const auto& csv : flags.list("device")) out.devices.push_back(parse_device(csv));
    if (const std::string value = flags.text("network"); !flags.list("network").empty()) {
        const auto it = std::find(networks.begin(), networks.end(), value);
        if (it == networks.end()) fail(suggest(cat("invalid network mode ", quoted(value)), value, networks));
        out.network = static_cast<network_mode>(it - networks.begin());
    }
    if (const std::string value = flags.text("security"); !flags.list("security").empty()) {
        const auto it = std::find(securities.begin(), securities.end(), value);
        if (it == securities.end()) fail(suggest(cat("security ", quoted(value), " is not valid"), value, securities));
        out.security = static_cast<security_mode>(it - securities.begin());
    }
    if (n.args.empty()) fail("RUN requires at least one argument");
    out.command = {n.args, !n.json};
    out.heredocs = n.heredocs;
    return out;
}

}  // namespace detail

const heredoc* run_instruction::script() const {
    if (heredocs.empty() || command.args.size() != 1 || !command.shell_form) return nullptr;
    return parse_heredoc_word(command.args.front()) ? &heredocs.front() : nullptr;
}

std::string run_instruction::shell_text() const {
    if (const heredoc* body = script()) return body->text();
    return command.args.empty() ? std::string() : lines_after(command.args.front(), heredocs);
}

}  // namespace cobuild::dockerfile

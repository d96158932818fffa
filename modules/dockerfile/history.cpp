module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

module cobuild.dockerfile;

import cobuild.base;
import :detail;

namespace cobuild::dockerfile {

using namespace detail;

namespace {

constexpr std::string_view mark = " # buildkit";

std::string pairs_text(std::string out, const std::vector<key_value>& pairs) {
    for (const auto& p : pairs) out += cat(' ', p.key, '=', p.value);
    return out;
}

/// Go's %q of a number: the character of that code between single quotes. BuildKit prints the retries so, by accident.
std::string go_quote_rune(std::int64_t code) {
    if (code == '\'') return "'\\''";
    if (code == '"') return R"('"')";
    if (code < 0 || code > 126) return cat("'\\U", code, "'");
    std::string text = go_quote(std::string(1, static_cast<char>(code)));
    text.front() = text.back() = '\'';
    return text;
}

struct history_text {
    std::string operator()(const env_instruction& i) const { return pairs_text("ENV", i.pairs); }
    std::string operator()(const label_instruction& i) const { return pairs_text("LABEL", i.pairs); }
    std::string operator()(const arg_instruction& i) const {
        std::string out = "ARG";
        for (const auto& a : i.args) out += cat(' ', a.key, a.value ? cat('=', *a.value) : std::string());
        return out;
    }
    std::string operator()(const workdir_instruction& i) const { return cat("WORKDIR ", i.path); }
    std::string operator()(const user_instruction& i) const { return cat("USER ", i.user); }
    std::string operator()(const maintainer_instruction& i) const { return cat("MAINTAINER ", i.name); }
    std::string operator()(const stopsignal_instruction& i) const { return cat("STOPSIGNAL ", i.signal); }
    std::string operator()(const expose_instruction& i) const { return cat("EXPOSE ", go_list(i.ports)); }
    std::string operator()(const volume_instruction& i) const { return cat("VOLUME ", go_list(i.paths)); }
    std::string operator()(const shell_instruction& i) const { return cat("SHELL ", go_list(i.shell)); }
    std::string operator()(const cmd_instruction& i) const { return cat("CMD ", go_quote_list(i.command.args)); }
    std::string operator()(const entrypoint_instruction& i) const { return cat("ENTRYPOINT ", go_quote_list(i.command.args)); }
    std::string operator()(const healthcheck_instruction& i) const {
        const auto time = [](nanoseconds d) { return go_quote(format_duration(d)); };
        return cat("HEALTHCHECK &{", go_quote_list(i.test), ' ', time(i.interval), ' ', time(i.timeout), ' ', time(i.start_period), ' ',
                   time(i.start_interval), ' ', go_quote_rune(i.retries), '}');
    }
    std::string operator()(const copy_instruction& i) const { return paths(i.parents ? "COPY --parents" : "COPY", i); }
    std::string operator()(const add_instruction& i) const { return paths("ADD", i); }
    std::string operator()(const run_instruction& i) const { return run_history(i.command.args, {}); }
    std::string operator()(const from_instruction&) const { return {}; }
    std::string operator()(const onbuild_instruction&) const { return {}; }

    static std::string paths(std::string out, const transfer& t) {
        if (!t.chown.empty()) out += cat(" --chown=", t.chown);
        if (!t.chmod.empty()) out += cat(" --chmod=", t.chmod);
        for (const auto& source : t.sources) out += cat(' ', source);
        for (const auto& h : t.heredocs) out += cat(" <<", h.name);
        return cat(out, ' ', t.destination, mark);
    }
};

}  // namespace

std::string history(const instruction_body& body) { return std::visit(history_text{}, body); }

std::string run_history(const std::vector<std::string>& command, const std::vector<key_value>& args) {
    std::vector<std::string> words;
    std::unordered_map<std::string_view, std::size_t> places;  // a later declaration replaces the value, not the place
    for (const auto& a : args) {
        const auto [place, fresh] = places.emplace(a.key, words.size());
        std::string word = cat(a.key, '=', a.value);
        if (fresh)
            words.push_back(std::move(word));
        else
            words[place->second] = std::move(word);
    }
    std::string out = "RUN ";
    if (!words.empty()) out += cat('|', words.size(), ' ', join(words, " "), ' ');
    return cat(out, join(command, " "), mark);
}

std::string summarize(const heredoc& h) {
    const std::string_view text = trim(h.content);
    const std::size_t end = text.find('\n');
    return cat(trim(text.substr(0, end)), end == std::string_view::npos ? "" : "...");
}

}  // namespace cobuild::dockerfile

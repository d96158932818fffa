module;
#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
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

constexpr std::array<std::string_view, 10> secret_words{"apikey",   "auth",  "credential", "credentials", "key",
                                                        "password", "pword", "passwd",     "secret",      "token"};
constexpr std::array<std::string_view, 3> harmless_words{"public", "file", "version"};

bool looks_secret(std::string_view name) {
    bool secret = false;
    const std::string lower = to_lower(name);
    for (const auto word : split(lower, '_')) {
        if (std::find(harmless_words.begin(), harmless_words.end(), word) != harmless_words.end()) return false;
        secret = secret || std::find(secret_words.begin(), secret_words.end(), word) != secret_words.end();
    }
    return secret;
}

bool is_lower(const std::string& s) { return s == to_lower(s); }
bool is_upper(const std::string& s) { return s == to_upper(s); }

class checker {
public:
    checker(const file& f, const parsed& p, const check_options& options) : file_(f), parsed_(p), options_(options), states_(p.stages.size()) {}

    std::vector<warning> run(const lookup& automatic) {
        for (const auto& n : file_.nodes)
            if (n.empty_continuation != 0) report(options_, check_rule::no_empty_continuation, {n.empty_continuation, n.empty_continuation});
        for (const auto& i : parsed_.global_args) arg_description(i, merged(options_, i.comments));
        count_casing();
        for (const auto& s : parsed_.stages) stage_checks(s);
        stage_ = -1;
        check_from_arguments(parsed_, file_.escape, automatic, [this](const stage& s, warning w) {
            stage_ = static_cast<int>(s.index);
            add(merged(options_, s.from.comments), std::move(w));
        });
        std::sort(found_.begin(), found_.end(), [](const warning& a, const warning& b) {
            return std::tie(a.lines.first, a.rule, a.message) < std::tie(b.lines.first, b.rule, b.message);
        });
        return std::move(found_);
    }

private:
    /// What a stage hands down to those that begin with it.
    struct state {
        bool shell = false;
        bool workdir = false;
    };
    struct last_seen {
        std::optional<line_range> cmd, entrypoint, healthcheck;
    };

    void add(const check_options& options, warning w) {
        const auto& rules = all_rules();
        const auto it = std::find_if(rules.begin(), rules.end(), [&](const rule_info& r) { return r.name == w.rule; });
        if (!enabled(static_cast<check_rule>(it - rules.begin()), options)) return;
        w.stage = stage_;
        found_.push_back(std::move(w));
    }
    void report(const check_options& options, check_rule rule, line_range lines, std::string_view a = {}, std::string_view b = {}) {
        if (!enabled(rule, options)) return;
        found_.push_back(make_warning(rule, lines, a, b));
        found_.back().stage = stage_;
    }

    void count_casing() {
        std::size_t lower = 0, upper = 0;
        const auto count = [&](const instruction& i) {
            if (is_lower(i.keyword))
                ++lower;
            else if (is_upper(i.keyword))
                ++upper;
        };
        for (const auto& s : parsed_.stages) {
            count(s.from);
            for (const auto& i : s.instructions) count(i);
        }
        majority_lower_ = lower > upper;
    }

    void casing(const instruction& i) {
        if (majority_lower_ ? is_lower(i.keyword) : is_upper(i.keyword)) return;
        report(options_, check_rule::consistent_instruction_casing, i.lines, i.keyword, majority_lower_ ? "lowercase" : "uppercase");
    }

    void stage_checks(const stage& s) {
        stage_ = static_cast<int>(s.index);
        from_checks(s);
        if (const auto parent = names_.find(to_lower(s.base)); parent != names_.end()) states_[s.index] = states_[parent->second];
        last_seen seen;
        for (const auto& i : s.instructions) {
            casing(i);
            instruction_checks(i, merged(options_, i.comments), states_[s.index], seen);
        }
        if (!s.name.empty()) names_[s.name] = s.index;
    }

    void from_checks(const stage& s) {
        const auto& from = std::get<from_instruction>(s.from.body);
        const check_options options = merged(options_, s.from.comments);
        const line_range lines = s.from.lines;
        casing(s.from);
        if (from.name.empty()) return;
        if (from.name != from.name_written) report(options, check_rule::stage_name_casing, lines, from.name_written);
        const bool lower = is_lower(s.from.keyword), upper = is_upper(s.from.keyword);
        if ((lower && !is_lower(from.as)) || (upper && !is_upper(from.as)))
            report(options, check_rule::from_as_casing, lines, s.from.keyword, from.as);
        if (from.name == "context" || from.name == "scratch") report(options_, check_rule::reserved_stage_name, lines, from.name);
        if (names_.contains(from.name)) report(options_, check_rule::duplicate_stage_name, lines, from.name);
        description("FROM", {from.name}, s.from, options);
    }

    void description(std::string_view keyword, const std::vector<std::string>& names, const instruction& i, const check_options& options) {
        if (i.comments.empty()) return;
        const std::string& last = i.comments.back();
        if (std::find(names.begin(), names.end(), last.substr(0, last.find(' '))) != names.end()) return;
        report(options, check_rule::invalid_definition_description, i.lines, keyword, names.size() > 1 ? "<arg_key>" : names.front());
    }

    void arg_description(const instruction& i, const check_options& options) {
        std::vector<std::string> names;
        for (const auto& a : std::get<arg_instruction>(i.body).args) names.push_back(a.key);
        description("ARG", names, i, options);
    }

    void once(const instruction& i, const check_options& options, std::optional<line_range>& before) {
        if (before) report(options, check_rule::multiple_instructions_disallowed, *before, i.keyword);
        before = i.lines;
    }

    void shell_form(const instruction& i, const command_line& c, const check_options& options, const state& st) {
        if (c.shell_form && !st.shell) report(options, check_rule::json_args_recommended, i.lines, i.keyword);
    }

    void key_values(const instruction& i, const std::vector<key_value>& pairs, const check_options& options, bool env) {
        for (const auto& p : pairs) {
            if (p.legacy) report(options, check_rule::legacy_key_value_format, i.lines, i.keyword);
            if (env && looks_secret(p.key)) report(options, check_rule::secrets_used_in_arg_or_env, i.lines, "ENV", p.key);
        }
    }

    void ports(const instruction& i, const expose_instruction& e, const check_options& options) {
        for (const auto& text : e.ports) {
            if (text.find('$') != std::string::npos) continue;
            try {
                for (const auto& word : expand_words(text, {}, file_.escape).words) {
                    const exposed_ports p = check_port(word);
                    if (p.odd_protocol_case) report(options, check_rule::expose_proto_casing, i.lines, word);
                    if (p.host_part) report(options, check_rule::expose_invalid_format, i.lines, word);
                }
            } catch (const error&) {
                continue;  // an error of the build itself
            }
        }
    }

    void workdir(const instruction& i, const workdir_instruction& w, const check_options& options, state& st) {
        const bool known = w.path.find('$') == std::string::npos;
        const std::string_view path = trim(w.path);
        const bool absolute = path.starts_with('/') || path.starts_with("\"/") || path.starts_with("'/");
        if (known && !st.workdir && !absolute) report(options, check_rule::workdir_relative_path, i.lines, w.path);
        st.workdir = true;
    }

    void instruction_checks(const instruction& i, const check_options& options, state& st, last_seen& seen) {
        if (const auto* cmd = std::get_if<cmd_instruction>(&i.body)) {
            once(i, options, seen.cmd);
            shell_form(i, cmd->command, options, st);
        } else if (const auto* entry = std::get_if<entrypoint_instruction>(&i.body)) {
            once(i, options, seen.entrypoint);
            shell_form(i, entry->command, options, st);
        } else if (std::holds_alternative<healthcheck_instruction>(i.body)) {
            once(i, options, seen.healthcheck);
        } else if (std::holds_alternative<shell_instruction>(i.body)) {
            st.shell = true;
        } else if (const auto* env = std::get_if<env_instruction>(&i.body)) {
            key_values(i, env->pairs, options, true);
        } else if (const auto* label = std::get_if<label_instruction>(&i.body)) {
            key_values(i, label->pairs, options, false);
        } else if (const auto* arg = std::get_if<arg_instruction>(&i.body)) {
            for (const auto& a : arg->args)
                if (looks_secret(a.key)) report(options, check_rule::secrets_used_in_arg_or_env, i.lines, "ARG", a.key);
            arg_description(i, options);
        } else if (std::holds_alternative<maintainer_instruction>(i.body)) {
            report(options, check_rule::maintainer_deprecated, i.lines);
        } else if (const auto* expose = std::get_if<expose_instruction>(&i.body)) {
            ports(i, *expose, options);
        } else if (const auto* dir = std::get_if<workdir_instruction>(&i.body)) {
            workdir(i, *dir, options, st);
        }
    }

    const file& file_;
    const parsed& parsed_;
    const check_options& options_;
    std::vector<state> states_;
    std::unordered_map<std::string, std::size_t> names_;
    bool majority_lower_ = false;
    int stage_ = -1;
    std::vector<warning> found_;
};

}  // namespace

std::vector<warning> check_file(const file& f, const parsed& p, const check_options& options, const lookup& automatic) {
    return checker(f, p, options).run(automatic);
}

}  // namespace cobuild::dockerfile

module;
#include <algorithm>
#include <array>
#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

module cobuild.dockerfile;

import cobuild.base;
import :detail;

namespace cobuild::dockerfile {

using namespace detail;

namespace {

[[noreturn]] void fail(std::string message) { throw error{errc::invalid, std::move(message)}; }

void no_flags(const node& n) { flag_values(n, std::span<const flag_spec>()); }

void at_least_one(const node& n) {
    no_flags(n);
    if (n.args.empty()) fail(cat(to_upper(n.keyword), " requires at least one argument"));
}

const std::string& exactly_one(const node& n) {
    no_flags(n);
    if (n.args.size() != 1) fail(cat(to_upper(n.keyword), " requires exactly one argument"));
    return n.args.front();
}

command_line command(const node& n) {
    no_flags(n);
    return {n.args, !n.json};
}

std::vector<key_value> pairs(const node& n) {
    at_least_one(n);
    std::vector<key_value> out;
    for (std::size_t i = 0; i + 2 < n.args.size(); i += 3) {
        if (n.args[i].empty()) fail(cat(to_upper(n.keyword), " names can not be blank"));
        out.push_back({n.args[i], n.args[i + 1], n.args[i + 2].empty()});
    }
    return out;
}

instruction_body parse_arg(const node& n) {
    at_least_one(n);
    arg_instruction out;
    for (const auto& word : n.args) {
        arg_declaration a;
        const std::size_t equals = word.find('=');
        a.key = word.substr(0, equals);
        if (a.key.empty()) fail("ARG names can not be blank");
        if (equals != std::string::npos) a.value = word.substr(equals + 1);
        for (const auto& comment : n.comments)
            if (comment.size() > a.key.size() && comment.starts_with(a.key) && comment[a.key.size()] == ' ') {
                a.description = comment.substr(a.key.size() + 1);
                break;
            }
        out.args.push_back(std::move(a));
    }
    return out;
}

instruction_body parse_expose(const node& n) {
    at_least_one(n);
    expose_instruction out{n.args};
    std::sort(out.ports.begin(), out.ports.end());
    for (const auto& word : out.ports)
        if (word.find_first_of("$'\"\\`") == std::string::npos) check_port(word);
    return out;
}

instruction_body parse_volume(const node& n) {
    at_least_one(n);
    volume_instruction out;
    for (const auto& path : n.args) {
        out.paths.emplace_back(trim(path));
        if (out.paths.back().empty()) fail("VOLUME specified can not be an empty string");
    }
    return out;
}

instruction_body parse_shell(const node& n) {
    at_least_one(n);
    if (!n.json) fail(cat("SHELL requires the arguments to be in JSON form: ", n.original));
    return shell_instruction{n.args};
}

/// As an image config keeps it: the text behind ONBUILD, then the here-documents.
std::string trigger_source(const node& n) {
    std::string_view text = trim(n.original);
    std::string out(trim_left(text.substr(n.keyword.size())));
    for (const auto& h : n.heredocs) out += cat('\n', h.content, h.name);
    return out;
}

instruction_body parse_onbuild(const node& n, char escape) {
    no_flags(n);
    if (n.trigger.empty()) fail("ONBUILD requires at least one argument");
    const std::string keyword = to_upper(n.trigger.front().keyword);
    if (keyword == "MAINTAINER" || keyword == "FROM") fail(cat(keyword, " isn't allowed as an ONBUILD trigger"));
    return onbuild_instruction{trigger_source(n), std::make_shared<const instruction>(parse_instruction(n.trigger.front(), escape))};
}

using body_parser = instruction_body (*)(const node&, char escape);
struct keyword_parser {
    std::string_view keyword;
    body_parser parse;
};

constexpr std::array<keyword_parser, 18> parsers{{
    {"ADD", [](const node& n, char) { return parse_add(n); }},
    {"ARG", [](const node& n, char) { return parse_arg(n); }},
    {"CMD", [](const node& n, char) -> instruction_body { return cmd_instruction{command(n)}; }},
    {"COPY", [](const node& n, char) { return parse_copy(n); }},
    {"ENTRYPOINT", [](const node& n, char) -> instruction_body { return entrypoint_instruction{command(n)}; }},
    {"ENV", [](const node& n, char) -> instruction_body { return env_instruction{pairs(n)}; }},
    {"EXPOSE", [](const node& n, char) { return parse_expose(n); }},
    {"FROM", [](const node& n, char) { return parse_from(n); }},
    {"HEALTHCHECK", [](const node& n, char) { return parse_healthcheck(n); }},
    {"LABEL", [](const node& n, char) -> instruction_body { return label_instruction{pairs(n)}; }},
    {"MAINTAINER", [](const node& n, char) -> instruction_body { return maintainer_instruction{exactly_one(n)}; }},
    {"ONBUILD", parse_onbuild},
    {"RUN", parse_run},
    {"SHELL", [](const node& n, char) { return parse_shell(n); }},
    {"STOPSIGNAL",
     [](const node& n, char escape) {
         no_flags(n);
         return parse_stopsignal(n, escape);
     }},
    {"USER", [](const node& n, char) -> instruction_body { return user_instruction{exactly_one(n)}; }},
    {"VOLUME", [](const node& n, char) { return parse_volume(n); }},
    {"WORKDIR", [](const node& n, char) -> instruction_body { return workdir_instruction{exactly_one(n)}; }},
}};

struct field_expander {
    const expander& expand;

    void one(std::string& field) const { field = expand(field); }
    void all(std::vector<std::string>& fields) const {
        for (auto& f : fields) one(f);
    }
    void all(std::vector<key_value>& fields) const {
        for (auto& f : fields) one(f.key), one(f.value);
    }
    void paths(transfer& t) const {
        one(t.chown);
        one(t.chmod);
        all(t.sources);
        one(t.destination);
    }

    void operator()(env_instruction& i) const { all(i.pairs); }
    void operator()(label_instruction& i) const { all(i.pairs); }
    void operator()(copy_instruction& i) const { paths(i); }
    void operator()(add_instruction& i) const { one(i.checksum), paths(i); }
    void operator()(workdir_instruction& i) const { one(i.path); }
    void operator()(user_instruction& i) const { one(i.user); }
    void operator()(volume_instruction& i) const { all(i.paths); }
    void operator()(stopsignal_instruction& i) const { one(i.signal); }
    template<class T>
    void operator()(T&) const {}
};

}  // namespace

namespace detail {

instruction_body parse_from(const node& n) {
    static constexpr std::array<flag_spec, 1> known{{{"platform", flag_kind::text}}};
    const flag_values flags(n, known);
    const bool named = n.args.size() == 3 && to_lower(n.args[1]) == "as";
    if (!named && n.args.size() != 1) fail("FROM requires either one or three arguments");
    from_instruction out{n.args.front(), flags.text("platform"), {}, {}, {}};
    if (named) {
        out.as = n.args[1];
        out.name_written = n.args[2];
        out.name = to_lower(out.name_written);
        const auto allowed = [](char c) { return (c >= 'a' && c <= 'z') || is_digit(c) || c == '-' || c == '_' || c == '.'; };
        if (out.name.empty() || out.name[0] < 'a' || out.name[0] > 'z' || !std::all_of(out.name.begin(), out.name.end(), allowed))
            fail(cat("invalid name for build stage: ", quoted(out.name_written), ", name can't start with a number or contain symbols"));
    }
    return out;
}

}  // namespace detail

const std::vector<std::string_view>& instruction_names() {
    static const std::vector<std::string_view> names = [] {
        std::vector<std::string_view> out;
        for (const auto& p : parsers) out.push_back(p.keyword);
        return out;
    }();
    return names;
}

instruction parse_instruction(const node& n, char escape) {
    const std::string keyword = to_upper(n.keyword);
    const auto* const known = std::find_if(parsers.begin(), parsers.end(), [&](const keyword_parser& p) { return p.keyword == keyword; });
    if (known == parsers.end()) fail(suggest(cat("unknown instruction: ", n.keyword), n.keyword, instruction_names()));
    if (n.problem) fail(*n.problem);
    return {known->parse(n, escape), n.keyword, std::string(trim(n.original)), n.lines, n.comments};
}

void expand_fields(instruction_body& body, const expander& expand) { std::visit(field_expander{expand}, body); }

}  // namespace cobuild::dockerfile

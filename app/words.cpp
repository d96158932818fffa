// What is said about words of a command line that nothing took, and help by topic.
#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

#include "cli.hpp"

import cobuild.base;
import cobuild.dockerfile;

namespace cobuild::app {

namespace {

/// Options of a command by their long names.
std::vector<std::string> flag_names(const CLI::App& command) {
    std::vector<std::string> out;
    for (const auto* o : command.get_options())
        if (!o->get_group().empty())
            for (const auto& name : o->get_lnames()) out.push_back("--" + name);
    return out;
}

std::vector<std::string> command_names(const CLI::App& app) {
    std::vector<std::string> out;
    for (const auto* sub : app.get_subcommands([](const CLI::App*) { return true; })) out.push_back(sub->get_name());
    return out;
}

std::string with_hint(std::string sentence, std::string_view word, const std::vector<std::string>& known) {
    const std::vector<std::string_view> views(known.begin(), known.end());
    const auto near = dockerfile::likely_word(word, views);
    return near.empty() ? sentence : cat(sentence, ", did you mean ", near, "?");
}

}  // namespace

std::string unexpected_words(const CLI::App& app) {
    const CLI::App* at = &app;
    while (!at->get_subcommands().empty()) at = at->get_subcommands().front();
    auto words = at->remaining();
    if (words.empty()) words = app.remaining(true);
    if (words.empty()) return {};
    const auto flag = std::find_if(words.begin(), words.end(), [](const auto& w) { return w.size() > 1 && w.starts_with('-'); });
    if (flag != words.end()) {
        const auto name = flag->substr(0, flag->find('='));
        const auto of = at == &app ? std::string() : cat(" of '", app.get_name(), " ", at->get_name(), "'");
        return with_hint(cat("unknown flag ", name, of), name, flag_names(*at));
    }
    if (at == &app && !command_names(app).empty())
        return with_hint(cat("unknown command ", quoted(words.front())), words.front(), command_names(app));
    const auto subs = command_names(*at);
    if (!subs.empty())
        return with_hint(cat("unknown command ", quoted(words.front()), " of '", app.get_name(), " ", at->get_name(), "'"), words.front(), subs);
    return cat("one argument too many for '", app.get_name(), at == &app ? "" : " ", at == &app ? std::string() : at->get_name(),
               "': ", quoted(words.front()));
}

std::string help_text(CLI::App& app, const std::string& topic) {
    if (topic.empty()) return app.help();
    for (auto* sub : app.get_subcommands([](CLI::App*) { return true; }))
        if (sub->get_name() == topic) return sub->help("cobuild");
    if (topic == "checks") {
        std::string out = "Checks of 'cobuild build --check'; 'cobuild help NAME' explains one:\n\n";
        for (const auto& rule : dockerfile::all_rules())
            out += cat("  ", rule.name, std::string(34 - std::min<std::size_t>(33, rule.name.size()), ' '),
                       rule.experimental ? "(only when asked for) " : "", rule.description.substr(0, rule.description.find(". ")), "\n");
        return out;
    }
    if (const auto* rule = dockerfile::find_rule(topic)) {
        return cat(rule->name, ": ", rule->description, "\n\n", rule->help, "\n\nTo leave it out: '# check=skip=", rule->name,
                   "' as a line at the top of the Dockerfile, or directly above an instruction\n",
                   rule->experimental ? "It runs only with '# check=experimental=" : "", rule->experimental ? rule->name : "",
                   rule->experimental ? "'\n" : "");
    }
    auto known = command_names(app);
    for (const auto& rule : dockerfile::all_rules()) known.emplace_back(rule.name);
    throw error{errc::invalid, with_hint(cat("there is no command and no check ", quoted(topic)), topic, known)};
}

}  // namespace cobuild::app

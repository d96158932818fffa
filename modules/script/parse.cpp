module;
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.script;

namespace cobuild::script {

namespace {

std::vector<std::string> words_of(std::string_view text, const source_location& where) {
    std::vector<std::string> out;
    bool inside = false, any = false;
    std::string word;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (c == '"') {
            inside = !inside;
            any = true;
        } else if (inside && c == '\\' && i + 1 < text.size() && (text[i + 1] == '"' || text[i + 1] == '\\' || text[i + 1] == 'n')) {
            word += text[++i] == 'n' ? '\n' : text[i];
        } else if (!inside && (c == ' ' || c == '\t')) {
            if (any) out.push_back(std::exchange(word, {}));
            any = false;
        } else if (!inside && c == '#' && !any) {
            break;
        } else {
            word += c;
            any = true;
        }
    }
    if (inside) throw error{errc::invalid, "a double quote is not closed"}.at(where);
    if (any) out.push_back(std::move(word));
    return out;
}

}  // namespace

bool is_marker(std::string_view line) { return line.starts_with("-- ") && line.ends_with(" --") && line.size() > 6; }

scenario parse(std::string_view text, std::string name) {
    scenario out;
    out.name = std::move(name);
    unsigned number = 0;
    std::string* file = nullptr;
    while (!text.empty()) {
        const auto end = text.find('\n');
        const auto raw = text.substr(0, end);
        text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
        ++number;
        if (is_marker(raw)) {
            const auto title = trim(raw.substr(3, raw.size() - 6));
            if (title.empty()) throw error{errc::invalid, "a file name is missing between the dashes"}.at({out.name, number});
            if (title.starts_with('/') || title.find("..") != std::string_view::npos)
                throw error{errc::invalid, cat("the file name ", quoted(title), " leads out of the scenario's directory")}.at({out.name, number});
            out.files.emplace_back(std::string(title), "");
            file = &out.files.back().second;
            continue;
        }
        if (file != nullptr) {
            *file += raw;
            *file += '\n';
            continue;
        }
        line l{.number = number};
        l.words = words_of(raw, {out.name, number});
        if (l.words.empty()) continue;
        if (l.words.front() == "!") {
            l.negated = true;
            l.words.erase(l.words.begin());
            if (l.words.empty()) throw error{errc::invalid, "a command is missing after '!'"}.at({out.name, number});
        }
        out.script.push_back(std::move(l));
    }
    if (out.script.empty()) throw error{errc::invalid, "the scenario has no commands"}.at({out.name, 1});
    return out;
}

}  // namespace cobuild::script

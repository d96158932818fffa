module;
#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.registry;

namespace cobuild::registry {

namespace {

bool token_char(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           std::string_view("!#$%&'*+-.^_`|~").find(c) != std::string_view::npos;
}

// A cursor over the header; every step moves forward, so any text ends.
struct cursor {
    std::string_view text;
    std::size_t at = 0;

    [[nodiscard]] bool done() const { return at >= text.size(); }
    [[nodiscard]] char peek() const { return done() ? '\0' : text[at]; }
    void skip(std::string_view set) {
        while (!done() && set.find(text[at]) != std::string_view::npos) ++at;
    }
    std::string_view token() {
        const auto start = at;
        while (!done() && token_char(text[at])) ++at;
        return text.substr(start, at - start);
    }
    std::string quoted_string() {
        std::string out;
        ++at;
        while (!done() && text[at] != '"') {
            if (text[at] == '\\' && at + 1 < text.size()) ++at;
            out += text[at++];
        }
        if (!done()) ++at;
        return out;
    }
};

}  // namespace

std::string challenge::get(std::string_view key) const {
    const auto found = std::find_if(parameters.begin(), parameters.end(), [&](const auto& p) { return p.first == key; });
    return found != parameters.end() ? found->second : std::string();
}

std::vector<challenge> parse_challenges(std::string_view header) {
    std::vector<challenge> out;
    cursor c{header.substr(0, 16384)};
    while (true) {
        c.skip(" \t,");
        if (c.done()) return out;
        const auto name = c.token();
        if (name.empty()) {
            ++c.at;
            continue;
        }
        const auto after = c.at;
        c.skip(" \t");
        if (c.peek() != '=' || out.empty()) {
            // A word that no '=' follows begins a challenge; a lone token68 behind it ("Basic abc==") has no use here.
            c.at = after;
            out.push_back({to_lower(name), {}});
            continue;
        }
        ++c.at;
        c.skip(" \t");
        auto value = c.peek() == '"' ? c.quoted_string() : std::string(c.token());
        auto key = to_lower(name);
        if (out.back().get(key).empty()) out.back().parameters.emplace_back(std::move(key), std::move(value));
    }
}

}  // namespace cobuild::registry

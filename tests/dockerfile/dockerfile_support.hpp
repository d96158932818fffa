// What the tests of cobuild.dockerfile share. Include after every other header, before any import.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace dftest {

using variables = std::map<std::string, std::string, std::less<>>;

inline std::function<std::optional<std::string>(std::string_view)> look_in(variables v) {
    return [v = std::move(v)](std::string_view name) -> std::optional<std::string> {
        const auto it = v.find(name);
        return it == v.end() ? std::nullopt : std::optional(it->second);
    };
}

/// What an exception says; "" when none was thrown.
template<class F>
std::string thrown(F f) {
    try {
        f();
    } catch (const std::exception& e) {
        return e.what();
    }
    return {};
}

inline bool contains(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

}  // namespace dftest

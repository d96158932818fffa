// A .dockerignore, a NUL byte, a path. Invariants: what a directory cannot re-include below it stays ignored below it, and
// a walk that skips by may_match_below loses nothing.
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

import cobuild.base;
import cobuild.fs;

using namespace cobuild;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size > 2000) return 0;
    const std::string_view text{reinterpret_cast<const char*>(data), size};
    const auto nul = text.find('\0');
    if (nul == std::string_view::npos) return 0;
    const std::string path = fs::clean_path(cat("/", text.substr(nul + 1))).substr(1);
    if (path.empty() || path.find('\0') != std::string::npos) return 0;
    try {
        const fs::ignore_patterns p{fs::parse_ignore_file(text.substr(0, nul))};
        const bool hit = p.matches(path);
        for (auto slash = path.find('/'); slash != std::string::npos; slash = path.find('/', slash + 1)) {
            const std::string_view dir = std::string_view(path).substr(0, slash);
            if (p.matches(dir) && !hit && !p.may_reinclude_below(dir)) __builtin_trap();
            if (!p.matches(dir) && hit && !p.may_match_below(dir)) __builtin_trap();
        }
    } catch (const error& e) {
        if (e.kind() != errc::invalid) __builtin_trap();
    }
    return 0;
}

module;
#include <algorithm>
#include <array>
#include <cstddef>
#include <functional>
#include <map>
#include <optional>
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

using values = std::map<std::string, std::optional<std::string>, std::less<>>;

std::string automatic_value(std::string_view name, const parsed& p) {
    if (name.ends_with("PLATFORM")) return "linux/amd64";
    if (name.ends_with("ARCH")) return "amd64";
    if (name == "TARGETOS" || name == "BUILDOS") return "linux";
    if (name == "TARGETSTAGE") return p.stages.empty() || p.stages.back().name.empty() ? "default" : p.stages.back().name;
    return {};
}

lookup lookup_in(const values& known) {
    return [&known](std::string_view name) -> std::optional<std::string> {
        const auto it = known.find(name);
        return it == known.end() ? std::nullopt : it->second;
    };
}

/// The global scope when no build argument is given. Names without a value are declared, but not set.
values global_scope(const parsed& p, char escape, const lookup& automatic) {
    values out;
    for (const auto name : automatic_args()) {
        std::optional<std::string> value = automatic ? automatic(name) : std::nullopt;
        out.emplace(name, value ? std::move(value) : automatic_value(name, p));
    }
    for (const auto& i : p.global_args)
        for (const auto& a : std::get<arg_instruction>(i.body).args) {
            if (!a.value) {
                out.try_emplace(a.key, std::nullopt);
                continue;
            }
            auto value = expand_word(*a.value, lookup_in(out), escape).text;
            out.insert_or_assign(a.key, std::move(value));
        }
    return out;
}

bool is_path_component(std::string_view text) {
    const auto alnum = [](char c) { return (c >= 'a' && c <= 'z') || is_digit(c); };
    for (std::size_t at = 0;;) {
        const std::size_t start = at;
        while (at < text.size() && alnum(text[at])) ++at;
        if (at == start) return false;
        if (at == text.size()) return true;
        if (text[at] == '-') {
            while (at < text.size() && text[at] == '-') ++at;
        } else if (text.substr(at, 2) == "__") {
            at += 2;
        } else if (text[at] == '.' || text[at] == '_') {
            ++at;
        } else {
            return false;
        }
    }
}

bool is_domain(std::string_view text) {
    if (text.starts_with('[')) return text.find(']') != std::string_view::npos;
    const std::size_t colon = text.find(':');
    if (colon != std::string_view::npos) {
        const std::string_view port = text.substr(colon + 1);
        if (port.empty() || !std::all_of(port.begin(), port.end(), is_digit)) return false;
    }
    for (const auto part : split(text.substr(0, colon), '.')) {
        const auto good = [](char c) { return is_letter(static_cast<unsigned char>(c)) || is_digit(c) || c == '-'; };
        if (part.empty() || part.front() == '-' || part.back() == '-' || !std::all_of(part.begin(), part.end(), good)) return false;
    }
    return true;
}

bool is_tag(std::string_view text) {
    const auto word = [](char c) {
        return (static_cast<unsigned char>(c) < 0x80 && is_letter(static_cast<unsigned char>(c))) || is_digit(c) || c == '_';
    };
    return !text.empty() && text.size() <= 128 && word(text.front()) &&
           std::all_of(text.begin(), text.end(), [&](char c) { return word(c) || c == '.' || c == '-'; });
}

bool is_digest(std::string_view text) {
    const std::size_t colon = text.find(':');
    if (colon == std::string_view::npos || colon == 0) return false;
    const std::string_view hex = text.substr(colon + 1);
    return hex.size() >= 32 && hex.find_first_not_of("0123456789abcdefABCDEF") == std::string_view::npos;
}

/// `[domain/]path[:tag][@digest]`, as image references are read.
bool is_reference(std::string_view text) {
    if (const std::size_t at = text.find('@'); at != std::string_view::npos) {
        if (!is_digest(text.substr(at + 1))) return false;
        text = text.substr(0, at);
    }
    if (const std::size_t slash = text.find('/'); slash != std::string_view::npos) {
        const std::string_view first = text.substr(0, slash);
        if (first.find_first_of(".:") != std::string_view::npos || first == "localhost" || first != to_lower(first)) {
            if (!is_domain(first)) return false;
            text = text.substr(slash + 1);
        }
    } else if (text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string_view::npos) {
        return false;  // it would be an image's id
    }
    if (const std::size_t colon = text.find(':'); colon != std::string_view::npos) {
        if (!is_tag(text.substr(colon + 1))) return false;
        text = text.substr(0, colon);
    }
    const auto parts = split(text, '/');
    return std::all_of(parts.begin(), parts.end(), is_path_component);
}

struct os_arch {
    std::string os, arch;
};

std::optional<os_arch> read_platform(std::string_view text, const std::string& own_arch) {
    static constexpr std::array<std::string_view, 16> systems{"aix", "android", "darwin", "dragonfly", "freebsd", "hurd",  "illumos", "ios",
                                                              "js",  "linux",   "nacl",   "netbsd",    "openbsd", "plan9", "solaris", "windows"};
    static constexpr std::array<std::string_view, 16> machines{"386",    "amd64", "arm",     "arm64", "loong64", "mips", "mips64", "mips64le",
                                                               "mipsle", "ppc64", "ppc64le", "riscv", "riscv64", "s390", "s390x",  "wasm"};
    const auto canonical = [](std::string_view arch) -> std::string {
        const std::string a = to_lower(arch);
        if (a == "x86_64" || a == "x86-64") return "amd64";
        if (a == "aarch64") return "arm64";
        if (a == "armhf" || a == "armel") return "arm";
        if (a == "i386") return "386";
        return a;
    };
    const auto parts = split(text, '/');
    if (text.empty() || parts.size() > 3) return std::nullopt;
    for (const auto part : parts)
        if (part.empty()) return std::nullopt;
    std::string os = to_lower(parts[0].substr(0, parts[0].find('(')));
    if (os == "macos") os = "darwin";
    if (parts.size() > 1) return os_arch{os, canonical(parts[1])};
    if (std::find(systems.begin(), systems.end(), os) != systems.end()) return os_arch{os, own_arch};
    const std::string arch = canonical(parts[0]);
    if (std::find(machines.begin(), machines.end(), arch) != machines.end()) return os_arch{"linux", arch};
    return std::nullopt;
}

class from_checker {
public:
    from_checker(const values& scope, char escape, const std::function<void(const stage&, warning)>& report)
        : scope_(scope), escape_(escape), report_(report) {
        for (const auto& [name, value] : scope) names_.push_back(name);
    }

    void check(const stage& s) {
        const auto base = expand(s.base);
        if (!base) return;
        undeclared(s, *base);
        const bool variable = !base->matched.empty() || !base->unmatched.empty();
        if (variable && !is_reference(base->text)) report_(s, make_warning(check_rule::invalid_default_arg_in_from, s.from.lines, s.base));
        if (s.platform.empty()) return;
        const auto platform = expand(s.platform);
        if (!platform) return;
        undeclared(s, *platform);
        const std::string target = scope_.at("TARGETPLATFORM").value_or("");
        if (platform->unmatched.empty() && platform->matched == std::vector<std::string>{"TARGETPLATFORM"} && platform->text == target)
            report_(s, make_warning(check_rule::redundant_target_platform, s.from.lines, s.platform));
        if (platform->matched.empty() && platform->unmatched.empty()) constant(s, platform->text);
    }

private:
    std::optional<expansion> expand(const std::string& text) const {
        try {
            return expand_word(text, lookup_in(scope_), escape_);
        } catch (const error&) {
            return std::nullopt;  // the build's own error
        }
    }

    void undeclared(const stage& s, const expansion& e) {
        for (const auto& name : e.unmatched) {
            if (scope_.contains(name)) continue;
            const auto hint = hints_left_ > 0 ? likely(name, names_) : std::string_view();
            if (hints_left_ > 0) --hints_left_;
            report_(s, make_warning(check_rule::undefined_arg_in_from, s.from.lines, name, hint));
        }
    }

    void constant(const stage& s, const std::string& text) const {
        const auto platform = read_platform(text, scope_.at("BUILDARCH").value_or("amd64"));
        if (!platform || s.name.find(platform->os) != std::string::npos || s.name.find(platform->arch) != std::string::npos) return;
        report_(s, make_warning(check_rule::from_platform_flag_const_disallowed, s.from.lines, text));
    }

    const values& scope_;
    char escape_;
    const std::function<void(const stage&, warning)>& report_;
    std::vector<std::string_view> names_;
    std::size_t hints_left_ = 20;  ///< comparing with every name takes long
};

}  // namespace

const std::vector<std::string_view>& automatic_args() {
    static const std::vector<std::string_view> names{"TARGETPLATFORM", "TARGETOS",      "TARGETOSVERSION", "TARGETARCH",
                                                     "TARGETVARIANT",  "BUILDPLATFORM", "BUILDOS",         "BUILDOSVERSION",
                                                     "BUILDARCH",      "BUILDVARIANT",  "TARGETSTAGE"};
    return names;
}

namespace detail {

void check_from_arguments(const parsed& p, char escape, const lookup& automatic, const std::function<void(const stage&, warning)>& report) {
    values scope;
    try {
        scope = global_scope(p, escape, automatic);
    } catch (const error&) {
        return;  // an ARG that cannot be expanded is the build's error
    }
    from_checker checker(scope, escape, report);
    for (const auto& s : p.stages) checker.check(s);
}

}  // namespace detail

}  // namespace cobuild::dockerfile

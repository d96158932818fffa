module;
#include <algorithm>
#include <cctype>
#include <compare>
#include <optional>
#include <string>
#include <string_view>

module cobuild.oci;

namespace cobuild::oci {

namespace {

constexpr std::string_view default_domain = "docker.io";
constexpr std::string_view legacy_domain = "index.docker.io";
constexpr std::string_view official = "library/";
constexpr std::size_t max_path = 255;

bool lower_or_digit(char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'); }
bool digit(char c) { return c >= '0' && c <= '9'; }
bool letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool hex(char c) { return digit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'); }
bool word(char c) { return letter(c) || digit(c) || c == '_'; }
bool has_upper(std::string_view s) {
    return std::any_of(s.begin(), s.end(), [](char c) { return c >= 'A' && c <= 'Z'; });
}

// domain-component ["." domain-component]* or [ipv6], then [":" port]
bool valid_domain(std::string_view d) {
    std::string_view host = d;
    if (const auto colon = d.rfind(':'); colon != std::string_view::npos && d.find(']', colon) == std::string_view::npos) {
        const auto port = d.substr(colon + 1);
        if (port.empty() || !std::all_of(port.begin(), port.end(), digit)) return false;
        host = d.substr(0, colon);
    }
    if (host.starts_with('[')) {
        if (!host.ends_with(']') || host.size() < 3) return false;
        const auto inner = host.substr(1, host.size() - 2);
        return std::all_of(inner.begin(), inner.end(), [](char c) { return hex(c) || c == ':'; });
    }
    for (const auto component : split(host, '.')) {
        if (component.empty() || component.front() == '-' || component.back() == '-') return false;
        if (!std::all_of(component.begin(), component.end(), [](char c) { return letter(c) || digit(c) || c == '-'; })) return false;
    }
    return true;
}

// [a-z0-9]+ (([._] | "__" | [-]+) [a-z0-9]+)*
bool valid_component(std::string_view c) {
    std::size_t i = 0;
    for (;;) {
        const auto start = i;
        while (i < c.size() && lower_or_digit(c[i])) ++i;
        if (i == start) return false;
        if (i == c.size()) return true;
        if (c[i] == '-') {
            while (i < c.size() && c[i] == '-') ++i;
        } else if (c[i] == '.') {
            ++i;
        } else if (c[i] == '_') {
            i += c.substr(i, 2) == "__" ? 2 : 1;
        } else {
            return false;
        }
    }
}

bool valid_path(std::string_view path) {
    const auto parts = split(path, '/');
    return !parts.empty() && std::all_of(parts.begin(), parts.end(), valid_component);
}

// algorithm[-_+.algorithm]* ":" at least 32 hex digits
bool looks_like_digest(std::string_view d) {
    const auto colon = d.find(':');
    if (colon == std::string_view::npos || colon == 0) return false;
    bool at_start = true;
    for (const char c : d.substr(0, colon)) {
        if (at_start ? !letter(c) : !(letter(c) || digit(c) || c == '-' || c == '_' || c == '+' || c == '.')) return false;
        at_start = !letter(c) && !digit(c);
    }
    const auto value = d.substr(colon + 1);
    return !at_start && value.size() >= 32 && std::all_of(value.begin(), value.end(), hex);
}

struct split_name {
    std::string domain;
    std::string rest;
};

/// Whether the first of several components is a registry and not a part of the path.
bool names_host(std::string_view first) { return first == "localhost" || first.find_first_of(".:") != std::string_view::npos || has_upper(first); }

split_name split_domain(std::string_view name) {
    split_name out;
    const auto slash = name.find('/');
    if (slash == std::string_view::npos) return {std::string(default_domain), cat(official, name)};
    const auto first = name.substr(0, slash);
    if (names_host(first)) {
        out = {std::string(first == legacy_domain ? default_domain : first), std::string(name.substr(slash + 1))};
    } else {
        out = {std::string(default_domain), std::string(name)};
    }
    if (out.domain == default_domain && out.rest.find('/') == std::string::npos) out.rest.insert(0, official);
    return out;
}

}  // namespace

bool valid_tag(std::string_view tag) noexcept {
    return !tag.empty() && tag.size() <= 128 && word(tag.front()) &&
           std::all_of(tag.begin(), tag.end(), [](char c) { return word(c) || c == '.' || c == '-'; });
}

reference reference::parse(std::string_view text) {
    const auto bad = [&](std::string_view why) { return error{errc::invalid, cat("invalid reference ", quoted(text), ": ", why)}; };
    if (text.empty()) throw bad("the name is empty");
    if (text.size() == 64 && std::all_of(text.begin(), text.end(), [](char c) { return digit(c) || (c >= 'a' && c <= 'f'); }))
        throw bad("a name of 64 hexadecimal digits would be taken for an image id");
    auto [domain, rest] = split_domain(text);
    std::string_view path = rest;
    reference out;
    if (const auto at = path.find('@'); at != std::string_view::npos) {
        const auto spelled = path.substr(at + 1);
        path = path.substr(0, at);
        if (!looks_like_digest(spelled)) throw bad("what follows @ is not a digest");
        out.digest_ = digest::try_parse(spelled);
        if (!out.digest_) throw bad("the digest must be sha256: and 64 lower-case hexadecimal digits");
    }
    if (const auto colon = path.find(':'); colon != std::string_view::npos) {
        out.tag_ = path.substr(colon + 1);
        path = path.substr(0, colon);
        if (!valid_tag(out.tag_)) throw bad("a tag has 1 to 128 letters, digits, underscores, dots and dashes and begins with none of the last two");
    }
    if (has_upper(path)) throw bad("the repository name must be lower case");
    if (!valid_domain(domain)) throw bad(cat("the host name ", quoted(domain), " is not one"));
    if (!valid_path(path))
        throw bad("a repository name has lower-case letters and digits, single dots, one or two underscores or dashes between them, and slashes");
    if (path.size() > max_path) throw bad("the repository name is longer than 255 characters");
    out.domain_ = std::move(domain);
    out.path_ = path;
    return out;
}

std::string reference::name() const { return cat(domain_, '/', path_); }

std::string reference::str() const {
    std::string out = name();
    if (!tag_.empty()) out.append(":").append(tag_);
    if (digest_) out.append("@").append(digest_->str());
    return out;
}

std::string reference::familiar_name() const {
    if (domain_ != default_domain) return name();
    const bool shorten = path_.starts_with(official) && path_.find('/', official.size()) == std::string::npos;
    if (shorten) return path_.substr(official.size());
    return names_host(path_.substr(0, path_.find('/'))) ? name() : path_;  // docker.io/quay.io/x is not quay.io/x
}

std::string reference::familiar() const {
    std::string out = familiar_name();
    if (!tag_.empty()) out.append(":").append(tag_);
    if (digest_) out.append("@").append(digest_->str());
    return out;
}

reference reference::with_default_tag() const {
    auto out = *this;
    if (out.tag_.empty() && !out.digest_) out.tag_ = "latest";
    return out;
}

reference reference::with_tag(std::string_view tag) const {
    if (!valid_tag(tag)) throw error{errc::invalid, cat("invalid tag ", quoted(tag))};
    auto out = *this;
    out.tag_ = tag;
    return out;
}

reference reference::with_digest(const cobuild::digest& d) const {
    auto out = *this;
    out.digest_ = d;
    return out;
}

reference reference::name_only() const {
    auto out = *this;
    out.tag_.clear();
    out.digest_.reset();
    return out;
}

}  // namespace cobuild::oci

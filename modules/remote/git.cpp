module;
#include <algorithm>
#include <array>
#include <cctype>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

module cobuild.remote;

namespace cobuild::remote {

namespace {

std::string percent_decoded(std::string_view text) {
    const auto digit = [](char c) { return c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10; };
    std::string out;
    for (std::size_t i = 0; i < text.size(); ++i) {
        if (text[i] == '%' && i + 2 < text.size() && std::isxdigit(static_cast<unsigned char>(text[i + 1])) != 0 &&
            std::isxdigit(static_cast<unsigned char>(text[i + 2])) != 0) {
            out += static_cast<char>(digit(text[i + 1]) * 16 + digit(text[i + 2]));
            i += 2;
        } else {
            out += text[i];
        }
    }
    return out;
}

bool has_control(std::string_view text) {
    return std::any_of(text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; });
}

/// What the text is without regard to fragment and query; empty: no git form.
std::optional<git_ref> parse_remote(std::string_view text) {
    git_ref out;
    out.remote = text;
    static constexpr std::array<std::string_view, 4> schemes{"https://", "http://", "ssh://", "git://"};
    for (const auto scheme : schemes) {
        if (!text.starts_with(scheme)) continue;
        out.scheme = scheme.substr(0, scheme.size() - 3);
        const auto rest = text.substr(scheme.size());
        const auto slash = rest.find('/');
        auto authority = rest.substr(0, slash);
        if (const auto at = authority.rfind('@'); at != std::string_view::npos) authority.remove_prefix(at + 1);
        out.host = authority;
        out.path = slash == std::string_view::npos ? "" : rest.substr(slash + 1);
        return out;
    }
    // user@host:path, as ssh writes it.
    const auto at = text.find('@');
    const auto colon = text.find(':');
    if (at == 0 || at == std::string_view::npos || colon == std::string_view::npos || colon < at) return std::nullopt;
    if (text.substr(0, colon).find('/') != std::string_view::npos) return std::nullopt;
    out.scheme = "ssh";
    out.host = text.substr(at + 1, colon - at - 1);
    out.path = text.substr(colon + 1);
    while (out.path.starts_with('/')) out.path.erase(0, 1);
    return out;
}

std::string clean_subdir(std::string_view text, std::string_view whole) {
    std::string out;
    for (const auto part : split(text, '/')) {
        if (part.empty() || part == ".") continue;
        if (part == "..")
            throw error{errc::invalid, cat("the git reference ", quoted(redacted(whole)), ": the subdirectory leads out of the repository")};
        out += cat(out.empty() ? "" : "/", part);
    }
    return out;
}

bool flag(std::string_view key, std::string_view value) {
    if (value.empty() || value == "1" || value == "true") return true;
    if (value == "0" || value == "false") return false;
    throw error{errc::invalid, cat("the git query ", key, "=", value, ": true or false is expected")};
}

void apply_query(git_ref& out, std::string_view query, std::string_view whole) {
    std::string ref_key;
    const auto set_ref = [&](std::string_view key, std::string value) {
        if (!ref_key.empty())
            throw error{errc::invalid, cat("the git reference ", quoted(redacted(whole)), " has both ", ref_key, "= and ", key, "=")};
        ref_key = key;
        // A fragment may say the same once more.
        if (!out.ref.empty() && out.ref != value)
            throw error{errc::invalid,
                        cat("the git reference ", quoted(redacted(whole)), ": ref conflicts: ", quoted(out.ref), " vs ", quoted(value))};
        out.ref = std::move(value);
    };
    const auto set_subdir = [&](std::string value) {
        if (!out.subdir.empty() && out.subdir != value)
            throw error{errc::invalid,
                        cat("the git reference ", quoted(redacted(whole)), ": subdir conflicts: ", quoted(out.subdir), " vs ", quoted(value))};
        out.subdir = std::move(value);
    };
    for (const auto item : split(query, '&')) {
        if (item.empty()) continue;
        const auto eq = item.find('=');
        const auto key = item.substr(0, eq);
        const auto value = percent_decoded(eq == std::string_view::npos ? "" : item.substr(eq + 1));
        if (key == "ref")
            set_ref(key, value);
        else if (key == "tag")
            set_ref(key, value.starts_with("refs/") ? value : cat("refs/tags/", value));
        else if (key == "branch")
            set_ref(key, value.starts_with("refs/") ? value : cat("refs/heads/", value));
        else if (key == "commit" || key == "checksum")
            out.checksum = value;
        else if (key == "subdir")
            set_subdir(clean_subdir(value, whole));
        else if (key == "keep-git-dir")
            out.keep_git_dir = flag(key, value);
        else if (key == "submodules")
            out.submodules = flag(key, value);
        else if (key == "fetch-by-commit")
            out.fetch_by_commit = flag(key, value);
        else if (key == "mtime" && (value == "commit" || value == "checkout"))
            out.commit_time = value == "commit";
        else if (key == "mtime")
            throw error{errc::invalid, cat("the git query mtime=", value, ": commit or checkout is expected")};
        else
            throw error{errc::invalid, cat("the git reference ", quoted(redacted(whole)), " has an unknown query key ", quoted(key),
                                           " (ref, tag, branch, commit, subdir, keep-git-dir, submodules, mtime and fetch-by-commit are known)")};
    }
    if (out.ref.empty() && !out.checksum.empty() && is_commit(out.checksum)) out.ref = out.checksum;
}

}  // namespace

bool is_commit(std::string_view text) {
    return (text.size() == 40 || text.size() == 64) &&
           std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c) != 0 || (c >= 'a' && c <= 'f'); });
}

void check_ref(std::string_view ref) {
    const bool bad = ref.starts_with('-') || ref.starts_with('+') || ref.starts_with('/') || ref.ends_with('/') ||
                     ref.find("..") != std::string_view::npos || ref.find_first_of(" \t:^~?*[\\") != std::string_view::npos || has_control(ref);
    if (bad) throw error{errc::invalid, cat("invalid git ref ", quoted(ref))};
}

std::string redacted(std::string_view url) {
    const auto slashes = url.find("//");
    if (slashes == std::string_view::npos) return std::string(url);
    const auto begin = slashes + 2;
    const auto authority = url.substr(begin, url.find('/', begin) - begin);
    const auto at = authority.rfind('@');
    if (at == std::string_view::npos) return std::string(url);
    const auto colon = authority.substr(0, at).find(':');
    // "ssh://git@host" tells a user and no secret.
    if (colon == std::string_view::npos && !url.starts_with("http")) return std::string(url);
    return cat(url.substr(0, begin), colon == std::string_view::npos ? "" : cat(authority.substr(0, colon), ":"), "xxxxx", url.substr(begin + at));
}

std::optional<git_ref> parse_git(std::string_view text) {
    const auto cut = text.find_first_of("?#");
    const bool http = text.starts_with("http://") || text.starts_with("https://");
    if (http && !text.substr(0, cut).ends_with(".git")) return std::nullopt;
    auto out = parse_remote(text.substr(0, cut));
    if (!out) return std::nullopt;
    if (has_control(text) || out->remote.find(' ') != std::string::npos)
        throw error{errc::invalid, cat("the git reference ", quoted(redacted(text)), " has a blank or a control character")};
    if (out->host.empty() || out->host.starts_with('-') || out->remote.starts_with('-'))
        throw error{errc::invalid, cat("the git reference ", quoted(redacted(text)), " names no host")};
    if (cut == std::string_view::npos) return out;
    const auto hash = text.find('#', cut);
    if (hash != std::string_view::npos) {
        const auto fragment = text.substr(hash + 1);
        const auto colon = fragment.find(':');
        out->ref = fragment.substr(0, colon);
        if (colon != std::string_view::npos) out->subdir = clean_subdir(fragment.substr(colon + 1), text);
    }
    if (text[cut] == '?') apply_query(*out, text.substr(cut + 1, hash == std::string_view::npos ? hash : hash - cut - 1), text);
    check_ref(out->ref);
    return out;
}

std::optional<git_ref> parse_git_context(std::string_view text) {
    if (text.starts_with("github.com/")) {
        const auto cut = std::min(text.find_first_of("?#"), text.size());
        return parse_git(cat("https://", text.substr(0, cut), text.substr(0, cut).ends_with(".git") ? "" : ".git", text.substr(cut)));
    }
    return parse_git(text);
}

bool is_http(std::string_view text) {
    if (!text.starts_with("http://") && !text.starts_with("https://")) return false;
    return !text.substr(0, text.find_first_of("?#")).ends_with(".git");
}

std::string file_name(std::string_view url) {
    auto path = url.substr(0, url.find_first_of("?#"));
    if (const auto at = path.find("://"); at != std::string_view::npos) path.remove_prefix(at + 3);
    const auto slash = path.find('/');
    if (slash == std::string_view::npos) return "__unnamed__";
    auto decoded = percent_decoded(path.substr(slash));
    while (decoded.ends_with('/')) decoded.pop_back();
    auto name = decoded.substr(decoded.rfind('/') + 1);
    return name.empty() || name == "." || name == ".." || name.find('\0') != std::string::npos || name.size() > 255 ? "__unnamed__" : name;
}

std::string identifier(const git_ref& r) {
    std::string out = cat(r.host, "/", r.path);
    if (!r.ref.empty() || !r.subdir.empty()) out += cat("#", r.ref);
    if (!r.subdir.empty()) out += cat(":", r.subdir);
    return out;
}

}  // namespace cobuild::remote

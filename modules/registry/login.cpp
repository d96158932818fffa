module;
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.registry;

import cobuild.json;
import :internal;

namespace cobuild::registry {

namespace {

// What the file says, decoded once.
struct file_content {
    std::map<std::string, credential> auths;
    std::map<std::string, std::string> helpers;
    std::string store;
};

struct store {
    async::blocking_pool& pool;
    std::string file;
    helper_runner run_helper;
    std::shared_ptr<const file_content> content;
    timespec seen{};
    std::shared_ptr<const file_content> environment;  // of DOCKER_AUTH_CONFIG
};

credential read_entry(const json::object& o, const std::string& key) {
    credential out{.username = json::optional_string(o, "username").value_or(""),
                   .secret = json::optional_string(o, "password").value_or(""),
                   .registry_token = json::optional_string(o, "registrytoken").value_or("")};
    if (const auto auth = json::optional_string(o, "auth").value_or(""); !auth.empty()) {
        auto plain = base64_decode(auth);
        const auto colon = plain ? plain->find(':') : std::string::npos;
        if (colon == std::string::npos) throw error{errc::invalid, cat("the \"auth\" of ", quoted(key), " is not base64 of user:password")};
        out.username = plain->substr(0, colon);
        out.secret = plain->substr(colon + 1);
        // Docker pads with NUL bytes.
        out.secret.erase(std::find(out.secret.begin(), out.secret.end(), '\0'), out.secret.end());
    }
    if (auto identity = json::optional_string(o, "identitytoken").value_or(""); !identity.empty()) {
        out.username.clear();
        out.secret = std::move(identity);
    }
    return out;
}

file_content parse_content(const std::string& text, const std::string& file) {
    file_content out;
    try {
        const auto v = json::parse(text, {.max_bytes = std::size_t{4} << 20});
        const auto& o = v.as_object();
        if (const auto* auths = json::optional_object(o, "auths"))
            for (const auto& m : auths->members()) out.auths[m.key] = read_entry(m.val.as_object(), m.key);
        out.helpers = json::string_map_at(o, "credHelpers");
        out.store = json::optional_string(o, "credsStore").value_or("");
        for (auto& [key, value] : out.auths) value.origin = file;
    } catch (error& e) {
        throw error{errc::invalid, e.what()}.with(file);
    }
    return out;
}

file_content read_content(const std::string& file) {
    std::ifstream in(file, std::ios::binary);
    if (!in) throw os_error(errno, cat("reading ", file));
    return parse_content(std::string{std::istreambuf_iterator<char>(in), {}}, file);
}

// Blocks. An absent file holds no logins.
std::shared_ptr<const file_content> refresh(const store& s, timespec& seen) {
    struct stat info{};
    if (::stat(s.file.c_str(), &info) != 0) {
        if (errno != ENOENT && errno != ENOTDIR) throw_errno(cat("reading ", s.file));
        return std::make_shared<const file_content>();
    }
    if (s.content && info.st_mtim.tv_sec == seen.tv_sec && info.st_mtim.tv_nsec == seen.tv_nsec) return s.content;
    auto out = std::make_shared<const file_content>(read_content(s.file));
    seen = info.st_mtim;
    return out;
}

std::optional<credential> find_login(const file_content& c, const std::string& host) {
    if (is_hub(host)) {
        for (const auto& [key, value] : c.auths)
            if (key == hub_key || is_hub(host_of_key(key))) return value;
        return std::nullopt;
    }
    if (const auto exact = c.auths.find(host); exact != c.auths.end()) return exact->second;
    for (const auto& [key, value] : c.auths)
        if (host_of_key(key) == host) return value;
    return std::nullopt;
}

async::task<std::optional<credential>> ask_helper(std::shared_ptr<store> s, std::string helper, std::string key) {
    const auto program = cat("docker-credential-", helper);
    if (!s->run_helper) throw error{errc::unsupported, cat("the credential helper ", program, " named in ", s->file, " is not supported here")};
    std::string text;
    try {
        text = co_await s->run_helper(program, "get", key);
    } catch (const error& e) {
        // Helpers answer so, with a failing exit code, for a host they do not know.
        if (std::string_view(e.what()).find("credentials not found") != std::string_view::npos) co_return std::nullopt;
        throw;
    }
    credential out{.origin = program};
    try {
        const auto v = json::parse(text, {.max_bytes = std::size_t{1} << 20});
        out.username = json::optional_string(v.as_object(), "Username").value_or("");
        out.secret = json::optional_string(v.as_object(), "Secret").value_or("");
    } catch (error& e) {
        throw std::move(e).with(cat("the answer of ", program));
    }
    if (out.username == "<token>") out.username.clear();
    if (out.secret.empty()) co_return std::nullopt;
    co_return out;
}

async::task<std::optional<credential>> look_up(std::shared_ptr<store> s, std::string host) {
    timespec seen = s->seen;
    s->content = co_await s->pool.run([s, &seen] { return refresh(*s, seen); });
    s->seen = seen;
    const auto c = s->content;
    const auto usable = [](const std::optional<credential>& l) { return l && !(l->secret.empty() && l->registry_token.empty()); };
    if (s->environment)
        if (auto found = find_login(*s->environment, host); usable(found)) co_return found;
    const auto key = docker_key(host);
    if (const auto helper = c->helpers.find(is_hub(host) && c->helpers.contains("docker.io") ? "docker.io" : key); helper != c->helpers.end())
        co_return co_await ask_helper(s, helper->second, key);
    if (auto found = find_login(*c, host); usable(found)) co_return found;
    if (!c->store.empty()) co_return co_await ask_helper(s, c->store, key);
    co_return std::nullopt;
}

}  // namespace

bool is_hub(std::string_view host) { return host == "docker.io" || host == "registry-1.docker.io" || host == "index.docker.io"; }

std::string docker_key(const std::string& host) { return is_hub(host) ? std::string(hub_key) : host; }

std::string host_of_key(std::string_view key) {
    for (const std::string_view scheme : {"https://", "http://"})
        if (key.starts_with(scheme)) key.remove_prefix(scheme.size());
    return std::string(key.substr(0, key.find('/')));
}

std::string docker_config_file(std::string dir) {
    if (dir.empty()) {
        const auto* set = std::getenv("DOCKER_CONFIG");
        const auto* home = std::getenv("HOME");
        dir = set != nullptr && *set != '\0' ? set : home != nullptr ? cat(home, "/.docker") : "/nonexistent";
    }
    return cat(dir, "/config.json");
}

credential_provider docker_credentials(async::blocking_pool& pool, std::string dir, helper_runner run_helper) {
    auto s = std::make_shared<store>(store{pool, docker_config_file(std::move(dir)), std::move(run_helper), {}, {}, {}});
    if (const auto* text = std::getenv("DOCKER_AUTH_CONFIG"); text != nullptr && *text != '\0')
        s->environment = std::make_shared<const file_content>(parse_content(text, "DOCKER_AUTH_CONFIG"));
    return [s](std::string host) { return look_up(s, std::move(host)); };
}

}  // namespace cobuild::registry

module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <set>
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

json::object read_document(const std::string& file) {
    std::ifstream in(file, std::ios::binary);
    if (!in) {
        if (errno == ENOENT || errno == ENOTDIR) return {};
        throw os_error(errno, cat("reading ", file));
    }
    const std::string text{std::istreambuf_iterator<char>(in), {}};
    try {
        auto v = json::parse(text, {.max_bytes = std::size_t{4} << 20});
        return std::move(v.as_object());
    } catch (error& e) {
        throw error{errc::invalid, e.what()}.with(file);
    }
}

// Written beside and renamed, so that a reader sees the old logins or the new. A link stays one.
void write_document(const std::string& named, const json::object& o) {
    namespace fs = std::filesystem;
    fs::create_directories(fs::path(named).parent_path());
    std::error_code ec;
    const auto real = fs::weakly_canonical(named, ec);
    const auto file = ec ? named : real.string();
    const auto beside = cat(file, '.', random_id());
    const unique_fd fd(::open(beside.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    if (!fd) throw_errno(cat("writing ", beside));
    scope_exit remove([&] { ::unlink(beside.c_str()); });
    const auto text = cat(json::serialize(o, {.indent = true, .escape_html = false}), '\n');
    for (std::string_view rest = text; !rest.empty();) {
        const auto n = ::write(fd.get(), rest.data(), rest.size());
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw_errno(cat("writing ", beside));
        rest.remove_prefix(static_cast<std::size_t>(n));
    }
    if (::fsync(fd.get()) != 0 || ::rename(beside.c_str(), file.c_str()) != 0) throw_errno(cat("writing ", file));
    remove.dismiss();
}

std::string helper_of(const json::object& o, const std::string& key) {
    const auto helpers = json::string_map_at(o, "credHelpers");
    for (const auto& name : {key, std::string(key == hub_key ? "docker.io" : key)})
        if (const auto found = helpers.find(name); found != helpers.end()) return cat("docker-credential-", found->second);
    const auto store = json::optional_string(o, "credsStore").value_or("");
    return store.empty() ? store : cat("docker-credential-", store);
}

json::object& auths_of(json::object& o) {
    auto& auths = o["auths"];
    if (!auths.is_object()) auths = json::object{};
    return auths.as_object();
}

void keep_in_file(const std::string& file, const std::string& key, json::object entry) {
    auto o = read_document(file);
    auths_of(o).set(key, std::move(entry));
    write_document(file, o);
}

json::object entry_of(const credential& login) {
    if (login.username.empty()) return {{"identitytoken", login.secret}};
    return {{"auth", base64_encode(cat(login.username, ':', login.secret))}};
}

}  // namespace

async::task<std::string> store_login(async::blocking_pool& pool, std::string host, credential login, std::string dir, helper_runner run_helper) {
    const auto file = docker_config_file(std::move(dir));
    const auto key = docker_key(host);
    const auto helper = helper_of(co_await pool.run([&] { return read_document(file); }), key);
    if (helper.empty()) {
        co_await pool.run([&] { keep_in_file(file, key, entry_of(login)); });
        co_return file;
    }
    if (!run_helper) throw error{errc::unsupported, cat("the credential helper ", helper, " named in ", file, " is not supported here")};
    const json::object input{{"ServerURL", key}, {"Username", login.username.empty() ? "<token>" : login.username}, {"Secret", login.secret}};
    co_await run_helper(helper, "store", json::serialize(input));
    // As docker does, so that its own tools see that there is a login.
    co_await pool.run([&] { keep_in_file(file, key, {}); });
    co_return helper;
}

async::task<bool> forget_login(async::blocking_pool& pool, std::string host, std::string dir, helper_runner run_helper) {
    const auto file = docker_config_file(std::move(dir));
    const auto key = docker_key(host);
    auto o = co_await pool.run([&] { return read_document(file); });
    bool found = false;
    if (const auto helper = helper_of(o, key); !helper.empty()) {
        if (!run_helper) throw error{errc::unsupported, cat("the credential helper ", helper, " named in ", file, " is not supported here")};
        try {
            co_await run_helper(helper, "erase", key);
            found = true;
        } catch (const error& e) {
            if (std::string_view(e.what()).find("credentials not found") == std::string_view::npos) throw;
        }
    }
    auto& auths = auths_of(o);
    std::vector<std::string> gone;
    for (const auto& m : auths.members())
        if (m.key == key || host_of_key(m.key) == host || (is_hub(host) && is_hub(host_of_key(m.key)))) gone.push_back(m.key);
    for (const auto& name : gone) auths.erase(name);
    if (!gone.empty()) co_await pool.run([&] { write_document(file, o); });
    co_return found || !gone.empty();
}

}  // namespace cobuild::registry

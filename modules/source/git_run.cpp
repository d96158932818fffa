module;
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.source;

import cobuild.remote;
import :git_run;

namespace cobuild::source {

namespace {

/// What git learns of our environment: where programs, proxies and authorities are.
constexpr std::string_view passed_on[] = {"PATH",      "TMPDIR",   "http_proxy", "https_proxy",  "HTTP_PROXY",    "HTTPS_PROXY",   "ALL_PROXY",
                                          "all_proxy", "no_proxy", "NO_PROXY",   "SSL_CERT_DIR", "SSL_CERT_FILE", "GIT_SSL_CAINFO"};

std::string scope_of(const std::string& remote) {
    const auto end = remote.find('/', remote.find("://") + 3);
    std::string origin = remote.substr(0, end);
    if (const auto at = origin.rfind('@'); at != std::string::npos) origin.erase(origin.find("//") + 2, at - origin.find("//") - 1);
    return origin + "/";
}

/// Lines that say why, without git's own advice.
std::string reason(std::string_view err) {
    std::string out;
    for (auto line : split(err, '\n')) {
        line = trim(line);
        for (const std::string_view prefix : {"fatal: ", "error: ", "remote: "})
            if (line.starts_with(prefix)) {
                line.remove_prefix(prefix.size());
                if (out.size() < 500 && out.find(line) == std::string::npos) out += cat(out.empty() ? "" : "; ", line);
                break;
            }
    }
    if (out.empty()) out = trim(err.substr(0, 500));
    while (out.ends_with('.')) out.pop_back();
    std::replace(out.begin(), out.end(), '\n', ' ');
    return out;
}

}  // namespace

git_runner::git_runner(process::spawner& programs, std::string remote, std::string repository, std::string home)
    : programs_(&programs), remote_(std::move(remote)), repository_(std::move(repository)), home_(std::move(home)) {
    for (const auto name : passed_on)
        if (const char* value = std::getenv(std::string(name).c_str())) env_.push_back(cat(name, "=", value));
    config_ = {{"core.hooksPath", "/dev/null"},
               {"core.fsmonitor", "false"},
               {"gc.auto", "0"},
               {"maintenance.auto", "false"},
               {"credential.helper", ""},
               {"safe.directory", "*"},
               {"protocol.version", "2"},
               {"advice.detachedHead", "false"},
               {"init.defaultBranch", "master"},
               {"core.pager", "cat"},
               {"fetch.fsckObjects", "false"},
               // A server that stops sending ends the fetch.
               {"http.lowSpeedLimit", "1"},
               {"http.lowSpeedTime", "120"}};
}

async::task<void> git_runner::log_in(git_request r, git_access access) {
    const auto parsed = remote::parse_git(r.remote);
    const std::string scheme = parsed ? parsed->scheme : r.remote.starts_with("https://") ? "https" : "http";
    const std::string host = parsed ? parsed->host : "";
    if (scheme == "ssh") {
        const auto socket = access.ssh_agent ? co_await access.ssh_agent(r.ssh_id) : std::nullopt;
        if (socket) env_.push_back(cat("SSH_AUTH_SOCK=", *socket));
        std::string ssh = "ssh -F /dev/null -o BatchMode=yes";
        if (r.known_hosts.empty()) {
            ssh += " -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR";
        } else {
            throw error{errc::unsupported,
                        cat("git over ssh with given host keys (git.knownsshhosts) is not supported yet: ", remote::redacted(r.remote))};
        }
        env_.push_back(cat("GIT_SSH_COMMAND=", ssh));
        co_return;
    }
    if (!access.secrets || (scheme != "http" && scheme != "https")) co_return;
    std::optional<std::string> header, token;
    if (!r.header_secret.empty()) {
        header = co_await access.secrets(cat(r.header_secret, ".", host));
        if (!header) header = co_await access.secrets(r.header_secret);
    }
    if (!header && !r.token_secret.empty()) {
        token = co_await access.secrets(cat(r.token_secret, ".", host));
        if (!token) token = co_await access.secrets(r.token_secret);
        if (token) header = cat("basic ", base64_encode(cat("x-access-token:", trim(*token))));
    }
    if (header) config_.emplace_back(cat("http.", scope_of(r.remote), ".extraheader"), cat("Authorization: ", trim(*header)));
}

async::task<git_result> git_runner::run(std::vector<std::string> args) const {
    process::command c;
    c.args = {"git"};
    c.args.insert(c.args.end(), args.begin(), args.end());
    c.env = env_;
    // The login stands in the environment, not in the arguments that everybody sees.
    c.env->push_back(cat("GIT_CONFIG_COUNT=", config_.size()));
    for (std::size_t i = 0; i < config_.size(); ++i) {
        c.env->push_back(cat("GIT_CONFIG_KEY_", i, "=", config_[i].first));
        c.env->push_back(cat("GIT_CONFIG_VALUE_", i, "=", config_[i].second));
    }
    for (const auto& fixed : {cat("HOME=", home_), cat("XDG_CONFIG_HOME=", home_), std::string("LC_ALL=C"), std::string("GIT_CONFIG_NOSYSTEM=1"),
                              std::string("GIT_CONFIG_GLOBAL=/dev/null"), std::string("GIT_ATTR_NOSYSTEM=1"), std::string("GIT_TERMINAL_PROMPT=0"),
                              std::string("GIT_ASKPASS=/bin/false"), std::string("SSH_ASKPASS=/bin/false"), std::string("GIT_LFS_SKIP_SMUDGE=1"),
                              cat("GIT_ALLOW_PROTOCOL=", protocols_), cat("GIT_CEILING_DIRECTORIES=", home_)})
        c.env->push_back(fixed);
    c.cwd = home_;
    if (!repository_.empty() && repository_ != home_) c.env->push_back(cat("GIT_DIR=", repository_));
    if (!work_tree_.empty()) {
        c.cwd = work_tree_;
        c.env->push_back(cat("GIT_WORK_TREE=", work_tree_));
    }
    if (!index_.empty()) c.env->push_back(cat("GIT_INDEX_FILE=", index_));
    c.setup.die_with_parent = true;
    c.setup.umask = 022;
    std::optional<error> failed;
    process::output done;
    try {
        done = co_await programs_->capture(std::move(c), {.max_output = std::size_t{4} << 20});
    } catch (const error& e) {
        if (e.kind() != errc::not_found) throw;
        failed =
            error{errc::unsupported, cat("the git repository ", remote::redacted(remote_), " needs the program git, which is not installed here")};
    }
    if (failed) throw std::move(*failed);
    co_return git_result{done.status.ok(), std::move(done.out), std::move(done.err)};
}

async::task<git_result> git_runner::must(std::vector<std::string> args) const {
    auto result = co_await run(std::move(args));
    if (!result.ok) throw failure(result);
    co_return result;
}

error git_runner::failure(const git_result& r) const {
    const auto says = [&r](std::string_view part) { return r.err.find(part) != std::string::npos; };
    errc kind = errc::unavailable;
    std::string hint;
    if (says("could not read Username") || says("Authentication failed") || says("403") || says("Permission denied") ||
        says("terminal prompts disabled")) {
        kind = errc::unauthorized;
        hint = remote_.starts_with("http") ? "; a private repository needs --secret id=GIT_AUTH_TOKEN" : "; over ssh a key is needed: --ssh default";
    } else if (says("not found") || says("does not appear to be a git repository")) {
        kind = errc::not_found;
    } else if (says("transport '") || says("not allowed")) {
        kind = errc::permission;
    }
    auto why = reason(r.err);
    if (const auto secret = remote::redacted(remote_); secret != remote_)
        for (auto at = why.find(remote_); at != std::string::npos; at = why.find(remote_)) why.replace(at, remote_.size(), secret);
    return {kind, cat("git repository ", remote::redacted(remote_), ": ", why.empty() ? "git failed without a word" : why, hint)};
}

git_runner git_runner::with_work_tree(std::string path, std::string index) const {
    auto out = *this;
    out.work_tree_ = std::move(path);
    out.index_ = std::move(index);
    return out;
}

git_runner git_runner::in(std::string git_dir, std::string work_tree) const {
    auto out = *this;
    out.repository_ = std::move(git_dir);
    out.work_tree_ = std::move(work_tree);
    out.index_.clear();
    return out;
}

git_runner git_runner::local_files() const {
    auto out = *this;
    out.protocols_ = "file";
    return out;
}

}  // namespace cobuild::source

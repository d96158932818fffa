module;
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.script;

import :image;

namespace cobuild::script {

namespace {

namespace stdfs = std::filesystem;

error wrong(std::string message) { return {errc::invalid, std::move(message)}; }

void spill(const stdfs::path& file, std::string_view text, bool append = false) {
    stdfs::create_directories(file.parent_path());
    std::ofstream out(file, std::ios::binary | (append ? std::ios::app : std::ios::trunc));
    out << text;
    if (!out) throw wrong(cat("the file ", file.string(), " cannot be written"));
}

int free_port() {
    const unique_fd fd{::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    sockaddr_in a{};
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof a;
    if (::bind(fd.get(), reinterpret_cast<sockaddr*>(&a), sizeof a) != 0 || ::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&a), &size) != 0)
        throw_errno("finding a free port");
    return ntohs(a.sin_port);
}

bool listens(int port) {
    const unique_fd fd{::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    sockaddr_in a{};
    a.sin_family = AF_INET;
    a.sin_port = htons(static_cast<std::uint16_t>(port));
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return ::connect(fd.get(), reinterpret_cast<sockaddr*>(&a), sizeof a) == 0;
}

}  // namespace

/// Starts a server and waits until it takes connections.
async::task<void> session::serve(std::vector<std::string> args, int port) {
    const auto name = args.front();
    process::command c{.args = std::move(args)};
    c.cwd = work_.string();
    c.setup.die_with_parent = true;
    children_.push_back(co_await programs_.spawn(std::move(c)));
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!listens(port)) {
        if (std::chrono::steady_clock::now() > limit) throw wrong(cat(name, " did not start within 20 s"));
        co_await async::sleep_for(std::chrono::milliseconds(10));
    }
}

async::task<void> session::start_registry(std::string name) {
    if (!variables_.contains("REGISTRY")) {
        const int port = free_port();
        spill(path_of(".registry/config.yml"),
              cat("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: ",
                  path_of(".registry/data").string(), "}}\nhttp: {addr: \"127.0.0.1:", port, "\"}\n"));
        co_await serve({"docker-registry", "serve", path_of(".registry/config.yml").string()}, port);
        variables_["REGISTRY"] = cat("127.0.0.1:", port);
    }
    spill(path_of("buildkitd.toml"), cat("[registry.\"", name, "\"]\nmirrors = [\"", variables_["REGISTRY"], "\"]\n"), true);
}

/// busybox' httpd; repositories are shown by git's own CGI program.
async::task<void> session::start_http(std::string directory) {
    if (variables_.contains("HTTP")) throw wrong("http: there is one server already");
    const int port = free_port();
    const auto script = path_of(directory) / "cgi-bin/git";
    spill(script, cat("#!/bin/sh\nGIT_PROJECT_ROOT='", path_of(".git-repositories").string(), "' GIT_HTTP_EXPORT_ALL=1 exec git http-backend\n"));
    ::chmod(script.c_str(), 0755);
    co_await serve({"busybox", "httpd", "-f", "-p", cat("127.0.0.1:", port), "-h", path_of(directory).string()}, port);
    variables_["HTTP"] = cat("http://127.0.0.1:", port);
    variables_["GIT"] = cat("http://127.0.0.1:", port, "/cgi-bin/git");
}

/// git NAME DIRECTORY [TAG]: the directory's files as the next commit of the repository's branch "main".
async::task<void> session::commit_files(std::vector<std::string> words) {
    if (words.size() != 3 && words.size() != 4) throw wrong("git NAME DIRECTORY [TAG] is expected");
    const auto bare = path_of(".git-repositories") / (words[1] + ".git");
    const std::vector<std::string> git{"git",
                                       "-c",
                                       "user.name=scenario",
                                       "-c",
                                       "user.email=scenario@localhost",
                                       "-c",
                                       "init.defaultBranch=main",
                                       "-c",
                                       "safe.directory=*",
                                       cat("--git-dir=", bare.string()),
                                       cat("--work-tree=", path_of(words[2]).string())};
    std::vector<std::vector<std::string>> commands;
    if (!stdfs::exists(bare)) {
        stdfs::create_directories(bare);
        commands.push_back({"init", "-q"});
    }
    commands.push_back({"add", "--all", "."});
    commands.push_back({"commit", "-q", "--allow-empty", "-m", "scenario"});
    if (words.size() == 4) commands.push_back({"tag", "-a", "-m", words[3], words[3]});
    commands.push_back({"rev-parse", "HEAD"});
    for (const auto& command : commands) {
        auto args = git;
        args.insert(args.end(), command.begin(), command.end());
        const auto done = co_await capture(std::move(args));
        if (done.code != 0) throw wrong(cat("git ", command.front(), ": ", done.err));
        if (command.front() == "rev-parse") variables_["COMMIT"] = std::string(trim(done.out));
    }
}

}  // namespace cobuild::script

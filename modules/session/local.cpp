module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include <boost/asio/awaitable.hpp>

module cobuild.session;

import cobuild.fs;

namespace cobuild::session {

namespace {

constexpr std::size_t max_secret = 500 * 1024;

std::string read_secret(const std::string& id, const std::filesystem::path& file) {
    const unique_fd fd{::open(file.c_str(), O_RDONLY | O_CLOEXEC)};
    if (!fd) throw_errno(cat("the secret ", quoted(id), " cannot be read from ", file.string()));
    std::string out;
    std::string buffer(65536, '\0');
    for (;;) {
        const ssize_t n = ::read(fd.get(), buffer.data(), buffer.size());
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw_errno(cat("the secret ", quoted(id), " cannot be read from ", file.string()));
        if (n == 0) return out;
        out.append(buffer, 0, static_cast<std::size_t>(n));
        if (out.size() > max_secret) throw error{errc::invalid, cat("the secret ", quoted(id), " is larger than 500 KiB (", file.string(), ")")};
    }
}

bool can_be_read_again(const std::filesystem::path& file) {
    struct stat info{};
    return ::stat(file.c_str(), &info) == 0 && S_ISREG(info.st_mode);
}

class local_session final : public session {
public:
    local_session(async::blocking_pool& pool, local_options options) : pool_(pool), options_(std::move(options)) {}

    async::task<std::optional<std::filesystem::path>> directory(directory_request what) override {
        const auto at = options_.directories.find(what.name);
        co_return at == options_.directories.end() ? std::nullopt : std::optional(at->second);
    }

    async::task<std::optional<std::string>> read_file(std::string name, std::string path) override {
        const auto at = options_.directories.find(name);
        if (at == options_.directories.end()) co_return std::nullopt;
        co_return co_await pool_.run([directory = at->second.string(), path]() -> std::optional<std::string> {
            const fs::root root(directory);
            const auto info = root.stat(path, fs::links::follow);
            if (!info || !info->is_file()) return std::nullopt;
            return root.read_file(path, std::size_t{16} << 20);
        });
    }

    async::task<std::optional<std::string>> secret(std::string id) override {
        const auto at = options_.secrets.find(id);
        if (at == options_.secrets.end()) co_return std::nullopt;
        if (!at->second.environment.empty()) {
            const char* value = std::getenv(at->second.environment.c_str());
            if (value == nullptr)
                throw error{errc::not_found, cat("the secret ", quoted(id), ": the environment variable ", at->second.environment, " is not set")};
            std::string text(value);
            if (text.size() > max_secret)
                throw error{errc::invalid, cat("the secret ", quoted(id), " is larger than 500 KiB (", at->second.environment, ")")};
            co_return text;
        }
        const auto file = at->second.file;
        if (can_be_read_again(file)) co_return co_await pool_.run([id, file] { return read_secret(id, file); });
        co_return co_await once_.run(id, [this, id, file]() { return read_once(id, file); });
    }

    async::task<std::optional<std::string>> ssh_agent(std::string id) override {
        const auto at = options_.ssh_agents.find(id);
        co_return at == options_.ssh_agents.end() ? std::nullopt : std::optional(at->second);
    }

private:
    async::task<std::string> read_once(std::string id, std::filesystem::path file) {
        if (const auto kept = kept_.find(id); kept != kept_.end()) co_return kept->second;
        auto text = co_await pool_.run([id, file] { return read_secret(id, file); });
        kept_[id] = text;
        co_return text;
    }

    async::blocking_pool& pool_;
    local_options options_;
    std::map<std::string, std::string> kept_;
    async::single_flight<std::string, std::string> once_;
};

}  // namespace

async::task<std::optional<std::string>> session::ssh_agent(std::string) { co_return std::nullopt; }
std::shared_ptr<blob_store> session::blobs(std::string) { return nullptr; }
async::task<bool> session::upload(std::string, piece_sink) { co_return false; }
async::task<std::shared_ptr<session>> session::other(std::string) { co_return nullptr; }

std::shared_ptr<session> make_local(async::blocking_pool& pool, local_options options) {
    return std::make_shared<local_session>(pool, std::move(options));
}

}  // namespace cobuild::session

module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "session.pb.h"

module cobuild.client;

import cobuild.base;
import cobuild.async;
import cobuild.filesync;
import cobuild.fs;
import cobuild.rpc;
import :internal;

namespace cobuild::client {

namespace {

std::string unescape(std::string_view text) {
    std::string out;
    for (std::size_t i = 0; i < text.size(); ++i) {
        unsigned value = 0;
        if (text[i] == '%' && i + 2 < text.size() &&
            std::from_chars(text.data() + i + 1, text.data() + i + 3, value, 16).ptr == text.data() + i + 3) {
            out += static_cast<char>(value);
            i += 2;
        } else {
            out += text[i] == '+' ? ' ' : text[i];
        }
    }
    return out;
}

class packets final : public filesync::packet_stream {
public:
    explicit packets(call_ptr c) : call_(std::move(c)) {}
    async::task<std::optional<std::string>> read() override { return call_->read(); }
    async::task<void> write(std::string message) override { return call_->write(std::move(message)); }

private:
    call_ptr call_;
};

/// The file of an output, made when the first bytes come, so a build that fails leaves an older one alone.
unique_fd open_target(const target& t) {
    if (t.fd >= 0) {
        unique_fd fd{::fcntl(t.fd, F_DUPFD_CLOEXEC, 3)};
        if (!fd) throw_errno("opening the output");
        return fd;
    }
    unique_fd fd{::open(t.file.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)};
    if (!fd) throw_errno(cat("writing ", t.file.string()));
    return fd;
}

}  // namespace

std::vector<std::string> header_values(const rpc::metadata& m, const std::string& key) {
    auto out = rpc::values(m, key);
    if (rpc::value(m, key + "-encoded") == "1")
        for (auto& v : out) v = unescape(v);
    return out;
}

namespace {

/// Owners are the builder's own matter: what is copied into an image belongs to root unless the build says else.
bool owned_by_root(filesync::file_stat& st) {
    st.uid = st.gid = 0;
    return true;
}

bool owned_by_us(filesync::file_stat& st) {
    st.uid = ::getuid();
    st.gid = ::getgid();
    return true;
}

/// The directory, made where it is missing: private, as BuildKit's client makes it.
std::shared_ptr<const fs::root> open_directory(const std::filesystem::path& dir) {
    if (dir.has_parent_path()) std::filesystem::create_directories(dir.parent_path());
    if (::mkdir(dir.c_str(), 0700) != 0 && errno != EEXIST) throw_errno(cat("making the directory ", dir.string()));
    return std::make_shared<const fs::root>(dir.string());
}

async::task<void> take_tree(async::blocking_pool& pool, target t, call_ptr c) {
    auto root = co_await pool.run([t] { return open_directory(t.directory); });
    filesync::receive_options how;
    how.how = t.mirror ? filesync::into::mirror : filesync::into::copy;
    // A file of a user's may look like the result's and not be it.
    how.compare = filesync::differ::none;
    how.map = owned_by_us;
    co_await filesync::receive(std::make_shared<packets>(c), pool, std::move(root), std::move(how));
}

}  // namespace

async::task<rpc::status> serve_directory(lent what, async::blocking_pool& pool, call_ptr c) {
    const auto& m = c->request();
    const auto name = header_values(m, "dir-name");
    const auto found = what->directories.find(name.empty() ? "" : name.front());
    if (found == what->directories.end())
        throw error{errc::not_found,
                    cat("no access allowed to dir ", quoted(name.empty() ? "" : name.front()), ": this build lends none of that name")};
    std::vector<filesync::tree> trees(1);
    trees[0].root = co_await pool.run([dir = found->second.string()] { return std::make_shared<const fs::root>(dir); });
    trees[0].include = header_values(m, "include-patterns");
    trees[0].exclude = header_values(m, "exclude-patterns");
    trees[0].follow = header_values(m, "followpaths");
    filesync::send_options how;
    how.map = owned_by_root;
    co_await filesync::send(std::make_shared<packets>(c), pool, std::move(trees), std::move(how));
    co_return rpc::status{};
}

async::task<rpc::status> serve_target(lent what, async::blocking_pool& pool, call_ptr c) {
    int id = 0;
    const auto text = rpc::value(c->request(), "buildkit-attachable-exporter-id");
    std::from_chars(text.data(), text.data() + text.size(), id);
    const auto found = what->targets.find(id);
    if (found == what->targets.end()) throw error{errc::not_found, cat("exporter ", id, " not found")};
    const auto t = found->second;
    if (!t.directory.empty()) {
        if (t.mirror && rpc::value(c->request(), "buildkit-exporter-multi-platform") != "1")
            throw error{errc::unsupported, "the local exporter's mode=delete needs a daemon that sends all platforms at once; this one does not"};
        co_await take_tree(pool, t, c);
        co_return rpc::status{};
    }
    const auto fd = std::make_shared<unique_fd>(co_await pool.run([t] { return open_target(t); }));
    while (auto m = co_await c->read()) {
        auto data = decode<moby::session::BytesMessage>(*m);
        co_await pool.run([fd, &data] { fs::write_all(fd->get(), bytes_of(data.data())); });
    }
    // Closed here: the daemon counts the export as done when we answer.
    co_await pool.run([fd] {
        if (::close(fd->release()) != 0) throw_errno("writing the output");
    });
    co_return rpc::status{};
}

}  // namespace cobuild::client

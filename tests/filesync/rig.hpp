// What the tests of cobuild.filesync share. Includes nothing; stands after a file's imports.
#pragma once

namespace cobuild::test {

/// One end of a connection in memory, bounded as a real one is.
class memory_stream : public filesync::packet_stream {
public:
    memory_stream(async::byte_pipe in, async::byte_pipe out) : in_(std::move(in)), out_(std::move(out)) {}
    async::task<std::optional<std::string>> read() override {
        auto m = co_await in_.read();
        if (!m) co_return std::nullopt;
        co_return std::string(text_of(*m));
    }
    async::task<void> write(std::string message) override {
        const auto bytes = bytes_of(message);
        co_await out_.write(async::chunk(bytes.begin(), bytes.end()));
    }
    void close() { out_.close(); }

private:
    async::byte_pipe in_;
    async::byte_pipe out_;
};

inline std::pair<std::shared_ptr<memory_stream>, std::shared_ptr<memory_stream>> connection() {
    const async::byte_pipe there(64 << 10);
    const async::byte_pipe back(64);
    return {std::make_shared<memory_stream>(back, there), std::make_shared<memory_stream>(there, back)};
}

inline std::shared_ptr<const fs::root> root_of(const std::filesystem::path& p) {
    std::filesystem::create_directories(p);
    return std::make_shared<const fs::root>(p.string());
}

struct outcome {
    filesync::progress sent;
    filesync::received got;
};

inline async::task<void> send_into(std::shared_ptr<memory_stream> s, async::blocking_pool& pool, std::vector<filesync::tree> trees,
                                   filesync::send_options o, filesync::progress* out) {
    *out = co_await filesync::send(s, pool, std::move(trees), std::move(o));
    s->close();
}
inline async::task<void> receive_into(std::shared_ptr<memory_stream> s, async::blocking_pool& pool, std::shared_ptr<const fs::root> to,
                                      filesync::receive_options o, filesync::received* out) {
    *out = co_await filesync::receive(std::move(s), pool, std::move(to), std::move(o));
}
/// Both ends at once, to their end.
inline async::task<outcome> transfer(async::blocking_pool& pool, std::vector<filesync::tree> trees, std::shared_ptr<const fs::root> to,
                                     filesync::receive_options r = {}, filesync::send_options s = {}) {
    const auto [one, other] = connection();
    outcome out;
    std::vector<async::task<void>> both;
    both.push_back(send_into(one, pool, std::move(trees), std::move(s), &out.sent));
    both.push_back(receive_into(other, pool, std::move(to), std::move(r), &out.got));
    co_await async::when_all(std::move(both));
    co_return out;
}

/// Everything that is to be seen of a tree: a line an entry, in the protocol's order.
inline std::vector<std::string> described(const fs::root& root) {
    std::vector<std::string> out;
    std::map<std::uint64_t, std::string> inodes;
    fs::walk(root.fd(), [&](const fs::walk_entry& e) {
        std::string line = cat(std::string(e.path), " mode=", e.info.mode, " owner=", e.info.uid, ":", e.info.gid, " mtime=", e.info.mtime.seconds,
                               ".", e.info.mtime.nanoseconds, " dev=", e.info.rdev_major, ":", e.info.rdev_minor);
        if (e.info.is_link()) line += cat(" -> ", fs::read_link_at(e.dir_fd, e.name));
        if (!e.info.is_dir()) line += cat(" size=", e.info.size, " same=", inodes.try_emplace(e.info.inode, e.path).first->second);
        if (e.info.is_file()) line += cat(" ", digest::of(root.read_file(e.path, 64 << 20)).str());
        for (const auto& key : fs::list_xattrs(e.dir_fd, e.name)) line += cat(" ", key, "=", *fs::get_xattr(e.dir_fd, e.name, key));
        out.push_back(std::move(line));
        return fs::walk_step::go_on;
    });
    return out;
}

inline std::vector<std::string> names(const fs::root& root) {
    std::vector<std::string> out;
    fs::walk(root.fd(), [&](const fs::walk_entry& e) {
        out.emplace_back(e.path);
        return fs::walk_step::go_on;
    });
    return out;
}

}  // namespace cobuild::test

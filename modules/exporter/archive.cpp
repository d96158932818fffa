module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>
#include <gsl/util>

module cobuild.exporter;

import cobuild.json;
import cobuild.fs;

namespace cobuild::exporter {

// layout.cpp
oci::index layout_index(const exported& what, const std::vector<std::string>& names);
std::vector<oci::descriptor> all_blobs(const exported& what);
// trees.cpp
void remove_others(const std::vector<tree>& trees, const std::vector<int>& roots, const std::string& directory);

namespace {

/// Where a name leads through links; what is there must not be replaced when it is no plain file.
std::string real_path(const std::string& path) {
    std::error_code ignored;
    const auto real = std::filesystem::canonical(path, ignored);
    return ignored ? path : real.string();
}

/// Writes to a descriptor of the caller's, or to a file without a name that gets its own when commit() is called: a process
/// killed meanwhile leaves nothing. A pipe or device is written to as it is.
class output_file {
public:
    explicit output_file(const destination& to) : fd_(to.fd), path_(to.path) {
        if (fd_ >= 0) return;
        struct stat there{};
        if (::stat(path_.c_str(), &there) == 0 && !S_ISREG(there.st_mode)) {
            if (S_ISDIR(there.st_mode)) throw error{errc::invalid, cat("cannot write the archive to ", path_, ": it is a directory, name a file")};
            own_.reset(::open(path_.c_str(), O_WRONLY | O_CLOEXEC));
            if (!own_) throw_errno(cat("opening ", path_));
            fd_ = own_.get();
            in_place_ = true;
            return;
        }
        path_ = real_path(path_);
        const auto slash = path_.rfind('/');
        directory_ = slash == std::string::npos ? "." : slash == 0 ? "/" : path_.substr(0, slash);
        own_.reset(::open(directory_.c_str(), O_WRONLY | O_TMPFILE | O_CLOEXEC, 0644));
        if (!own_ && (errno == EOPNOTSUPP || errno == EISDIR)) {  // a file system without such files
            temporary_ = cat(path_, ".", random_id());
            own_.reset(::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
            if (!own_) temporary_.clear();
        }
        if (!own_) throw_errno(cat("creating ", path_));
        fd_ = own_.get();
    }
    ~output_file() {
        if (!temporary_.empty()) ::unlink(temporary_.c_str());
    }
    output_file(const output_file&) = delete;
    output_file& operator=(const output_file&) = delete;
    [[nodiscard]] int fd() const { return fd_; }
    void commit() {
        if (!own_ || in_place_) return;
        const std::string self = cat("/proc/self/fd/", own_.get());
        if (temporary_.empty()) {
            if (::linkat(AT_FDCWD, self.c_str(), AT_FDCWD, path_.c_str(), AT_SYMLINK_FOLLOW) == 0) return;
            if (errno != EEXIST) throw_errno(cat("writing ", path_));
            // A link cannot replace what is there; a rename can.
            std::string name = cat(path_, ".", random_id());
            if (::linkat(AT_FDCWD, self.c_str(), AT_FDCWD, name.c_str(), AT_SYMLINK_FOLLOW) != 0) throw_errno(cat("writing ", path_));
            temporary_ = std::move(name);
        }
        if (::rename(temporary_.c_str(), path_.c_str()) != 0) throw_errno(cat("writing ", path_));
        temporary_.clear();
    }

private:
    int fd_;
    std::string path_, directory_, temporary_;
    bool in_place_ = false;
    unique_fd own_;
};

archive::byte_sink buffered(int fd, std::shared_ptr<std::vector<std::byte>> buffer) {
    return [fd, buffer](std::span<const std::byte> data) {
        constexpr std::size_t limit = std::size_t{1} << 20;
        if (buffer->size() + data.size() > limit) {
            fs::write_all(fd, *buffer);
            buffer->clear();
        }
        if (data.size() >= limit)
            fs::write_all(fd, data);
        else
            buffer->insert(buffer->end(), data.begin(), data.end());
    };
}

void add_text(archive::tar_writer& tar, const std::string& path, std::string_view text, std::uint32_t mode) {
    tar.add({.type = archive::entry_type::file, .path = path, .mode = mode, .size = text.size()}, bytes_of(text));
}

void add_directory(archive::tar_writer& tar, const std::string& path) {
    tar.add({.type = archive::entry_type::directory, .path = path, .mode = 0755});
}

void add_blob(archive::tar_writer& tar, const content::store& content, const digest& d, std::uint64_t size) {
    tar.add({.type = archive::entry_type::file, .path = cat("blobs/sha256/", d.hex()), .mode = 0444, .size = size});
    const auto file = content.open(d);
    std::vector<std::byte> buffer(std::size_t{1} << 20);
    std::uint64_t left = size;
    while (left > 0) {
        const ssize_t n = ::read(file.get(), buffer.data(), std::min<std::uint64_t>(buffer.size(), left));
        if (n <= 0) throw error{errc::corrupt, cat("the blob ", d.str(), " in the content store is shorter than its record says")};
        tar.write({buffer.data(), gsl::narrow_cast<std::size_t>(n)});
        left -= gsl::narrow_cast<std::uint64_t>(n);
    }
}

std::string docker_manifest_json(const exported& what, const std::vector<std::string>& names) {
    const auto& first = what.images.at(0);
    json::object o;
    o.set("Config", json::value(cat("blobs/sha256/", first.config.digest.hex())));
    json::array tags, layers;
    for (const auto& name : names) tags.emplace_back(oci::reference::parse(name).familiar());
    for (const auto& l : first.layers) layers.emplace_back(cat("blobs/sha256/", l.digest.hex()));
    o.set("RepoTags", names.empty() ? json::value() : json::value(std::move(tags)));
    o.set("Layers", json::value(std::move(layers)));
    return json::serialize(json::value(json::array{json::value(std::move(o))}));
}

void write_archive_file(const content::store& content, archive_kind kind, const exported& what, const std::vector<std::string>& names,
                        const destination& to) {
    output_file out(to);
    auto buffer = std::make_shared<std::vector<std::byte>>();
    archive::tar_writer tar(buffered(out.fd(), buffer));
    std::map<digest, std::uint64_t> blobs;  // by digest, so in the order of their names
    for (const auto& d : all_blobs(what)) blobs[d.digest] = d.size;
    add_directory(tar, "blobs/");
    add_directory(tar, "blobs/sha256/");
    for (const auto& [d, size] : blobs) add_blob(tar, content, d, size);
    add_text(tar, "index.json", oci::encode(layout_index(what, names)), 0644);
    if (kind == archive_kind::docker) add_text(tar, "manifest.json", docker_manifest_json(what, names), 0644);
    add_text(tar, "oci-layout", R"({"imageLayoutVersion":"1.0.0"})", 0444);
    tar.finish();
    fs::write_all(out.fd(), *buffer);
    out.commit();
}

/// Writes every file below `root` in path order, `prefix` before each path; the second name of an inode is a hard link to the first.
void write_tree(int root, const std::string& prefix, archive::tar_writer& tar, const std::optional<std::int64_t>& epoch) {
    std::map<std::pair<std::uint64_t, std::uint64_t>, std::string> seen;
    std::vector<std::byte> buffer(std::size_t{1} << 20);
    fs::walk(root, [&](const fs::walk_entry& e) {
        const std::string name(e.name);
        if (e.info.is_socket()) return fs::walk_step::go_on;
        archive::tar_entry t;
        t.path = cat(prefix, e.path, e.info.is_dir() ? "/" : "");
        t.mode = e.info.permissions();
        t.uid = e.info.uid;
        t.gid = e.info.gid;
        t.mtime = e.info.mtime;
        if (epoch) t.mtime = {*epoch, 0};
        for (const auto& key : fs::list_xattrs(e.dir_fd, name))
            if (!key.starts_with("trusted.overlay.") && key != "security.selinux")
                if (auto value = fs::get_xattr(e.dir_fd, name, key)) t.xattrs.emplace_back(key, std::move(*value));
        if (!e.info.is_dir() && e.info.nlink > 1) {
            const auto [at, fresh] = seen.try_emplace({e.info.device, e.info.inode}, cat(prefix, e.path));
            if (!fresh) {
                t.type = archive::entry_type::hard_link;
                t.link = at->second;
                tar.add(t);
                return fs::walk_step::go_on;
            }
        }
        switch (e.info.mode & S_IFMT) {
            case S_IFDIR: t.type = archive::entry_type::directory; break;
            case S_IFLNK:
                t.type = archive::entry_type::symlink;
                t.link = fs::read_link_at(e.dir_fd, name);
                break;
            case S_IFIFO: t.type = archive::entry_type::fifo; break;
            case S_IFCHR:
            case S_IFBLK:
                t.type = (e.info.mode & S_IFMT) == S_IFCHR ? archive::entry_type::char_device : archive::entry_type::block_device;
                t.dev_major = e.info.rdev_major;
                t.dev_minor = e.info.rdev_minor;
                break;
            default: t.size = e.info.size;
        }
        tar.add(t);
        if (e.info.is_file()) {
            const unique_fd file{::openat(e.dir_fd, name.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC)};
            if (!file) throw_errno(cat("reading ", e.path));
            for (std::uint64_t left = t.size; left > 0;) {
                const ssize_t n = ::read(file.get(), buffer.data(), std::min<std::uint64_t>(buffer.size(), left));
                if (n <= 0) throw error{errc::io, cat("reading ", e.path, ": the file became shorter")};
                tar.write({buffer.data(), gsl::narrow_cast<std::size_t>(n)});
                left -= gsl::narrow_cast<std::uint64_t>(n);
            }
        }
        return fs::walk_step::go_on;
    });
}

}  // namespace

namespace {

/// Runs `work` on the pool; a failure names the file that was being written.
template<class F>
async::task<void> write_named(async::blocking_pool& pool, std::string path, F work) {
    co_await pool.run([&] {
        try {
            work();
        } catch (const error& e) {
            if (path.empty() || std::string_view(e.what()).find(path) != std::string_view::npos) throw;
            throw error(e).with(path);
        }
    });
}

}  // namespace

async::task<void> write_archive(stores s, archive_kind kind, exported what, std::vector<std::string> names, destination to,
                                progress::writer progress) {
    auto sending = progress.begin("sending tarball");
    co_await write_named(s.pool, to.path, [&] { write_archive_file(s.content, kind, what, names, to); });
    sending.done();
}

namespace {

/// Views of the trees' roots, open while they are read.
async::task<std::vector<snapshot::view>> open_trees(stores s, std::vector<tree> trees) {
    std::vector<snapshot::view> out;
    for (const auto& t : trees) out.push_back(co_await s.snapshots.view(t.root));
    co_return out;
}

void write_trees(const std::vector<tree>& trees, const std::vector<snapshot::view>& views, archive::tar_writer& tar) {
    for (std::size_t i = 0; i < trees.size(); ++i) {
        const auto& t = trees[i];
        const fs::file_time time{t.epoch.value_or(0), 0};
        std::string prefix;
        if (!t.name.empty()) {
            prefix = t.name + "/";
            tar.add({.type = archive::entry_type::directory, .path = prefix, .mode = 0755, .mtime = time});
        }
        write_tree(views[i].fd(), prefix, tar, t.epoch);
        for (const auto& f : t.extra)
            tar.add({.type = archive::entry_type::file, .path = prefix + f.name, .mode = 0600, .size = f.bytes.size(), .mtime = time},
                    bytes_of(f.bytes));
    }
}

void copy_one(const tree& t, int root, int target) {
    fs::copy_options options;
    options.who = fs::owner{::geteuid(), ::getegid()};
    options.xattr = [](std::string_view key) { return key.starts_with("user.") && !key.starts_with("user.overlay."); };
    if (t.epoch) options.mtime = fs::file_time{*t.epoch, 0};
    if (!t.name.empty() && ::mkdirat(target, t.name.c_str(), 0755) != 0 && errno != EEXIST) throw_errno(cat("creating ", t.name));
    fs::copy_tree(root, ".", target, t.name.empty() ? "." : t.name, options);
    for (const auto& f : t.extra) {
        const auto path = t.name.empty() ? f.name : cat(t.name, "/", f.name);
        // Beside the place, then renamed: a link that stands there is replaced, not followed.
        const auto temporary = cat(path, ".", random_id());
        const unique_fd file{::openat(target, temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600)};
        if (!file) throw_errno(cat("creating ", path));
        fs::write_all(file.get(), bytes_of(f.bytes));
        if (t.epoch) {
            const struct timespec times[2] = {{*t.epoch, 0}, {*t.epoch, 0}};
            ::futimens(file.get(), times);
        }
        if (::renameat(target, temporary.c_str(), target, path.c_str()) != 0) {
            const int why = errno;
            ::unlinkat(target, temporary.c_str(), 0);
            errno = why;
            throw_errno(cat("writing ", path));
        }
    }
}

}  // namespace

async::task<void> write_tar(stores s, std::vector<tree> trees, destination to, progress::writer progress) {
    auto sending = progress.begin("sending tarball");
    const auto views = co_await open_trees(s, trees);
    co_await write_named(s.pool, to.path, [&] {
        output_file out(to);
        auto buffer = std::make_shared<std::vector<std::byte>>();
        archive::tar_writer tar(buffered(out.fd(), buffer));
        write_trees(trees, views, tar);
        tar.finish();
        fs::write_all(out.fd(), *buffer);
        out.commit();
    });
    sending.done();
}

async::task<void> write_directory(stores s, std::vector<tree> trees, std::string directory, bool mirror, progress::writer progress) {
    auto copying = progress.begin("copying files");
    const auto views = co_await open_trees(s, trees);
    co_await write_named(s.pool, directory, [&] {
        std::error_code failed;
        std::filesystem::create_directories(directory, failed);
        if (failed) throw error{errc::io, cat("creating ", directory, ": ", failed.message())};
        const unique_fd target{::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
        if (!target) throw_errno(cat("opening ", directory));
        std::vector<int> roots;
        for (const auto& v : views) roots.push_back(v.fd());
        if (mirror) remove_others(trees, roots, directory);
        for (std::size_t i = 0; i < trees.size(); ++i) copy_one(trees[i], roots[i], target.get());
    });
    copying.done();
}

}  // namespace cobuild::exporter

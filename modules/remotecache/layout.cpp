module;
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.remotecache;

import cobuild.archive;
import cobuild.fs;

namespace cobuild::remotecache {

namespace {

namespace stdfs = std::filesystem;

constexpr std::size_t max_document = std::size_t{16} << 20;
constexpr std::string_view tag_annotation = "org.opencontainers.image.ref.name";
constexpr std::string_view layout_text = R"({"imageLayoutVersion":"1.0.0"})";

std::string blob_path(const digest& d) { return cat("blobs/sha256/", d.hex()); }

bool is_tagged(const oci::descriptor& d, const std::string& tag) {
    const auto at = d.annotations.find(std::string(tag_annotation));
    return at != d.annotations.end() && at->second == tag;
}

oci::index read_index(const fs::root& layout) {
    if (!layout.stat("index.json", fs::links::follow)) return {};
    return oci::parse_index(layout.read_file("index.json", max_document));
}

/// What a manifest, an index of blobs or a config of the layout needs to stay.
void mark(const fs::root& layout, const oci::descriptor& d, std::set<std::string>& needed) {
    std::vector<oci::descriptor> todo{d};
    while (!todo.empty()) {
        const auto at = std::move(todo.back());
        todo.pop_back();
        if (!needed.insert(at.digest.hex()).second) continue;
        const auto below = oci::is_index(at.media_type) || oci::is_manifest(at.media_type);
        if (!below || !layout.stat(blob_path(at.digest), fs::links::follow)) continue;
        const auto text = layout.read_file(blob_path(at.digest), max_document);
        if (oci::is_index(at.media_type)) {
            for (auto& m : oci::parse_index(text).manifests) todo.push_back(std::move(m));
        } else {
            auto m = oci::parse_manifest(text);
            todo.push_back(std::move(m.config));
            for (auto& l : m.layers) todo.push_back(std::move(l));
        }
    }
}

/// A blob's file appears whole, under its name.
class blob_directory {
public:
    explicit blob_directory(const fs::root& layout) : dir_(layout.open("blobs/sha256", O_RDONLY | O_DIRECTORY)) {}

    [[nodiscard]] bool has(const oci::descriptor& d) const {
        const auto info = fs::stat_at(dir_.get(), d.digest.hex());
        return info && info->is_file() && info->size == d.size;
    }
    void copy(const content::store& content, const oci::descriptor& d) const {
        const auto from = content.open(d.digest);
        put(d.digest, [&from](int to) { fs::copy_file(from.get(), to); });
    }
    void write(const digest& d, std::string_view text) const {
        put(d, [text](int to) { fs::write_all(to, bytes_of(text)); });
    }
    void keep_only(const std::set<std::string>& needed) const {
        for (const auto& name : fs::list_dir(dir_.get()))
            if (!needed.contains(name)) fs::remove_tree(dir_.get(), name);
    }

private:
    template<class F>
    void put(const digest& d, F fill) const {
        const auto name = cat(".", d.hex().substr(0, 12), "-", random_id());
        const unique_fd to{::openat(dir_.get(), name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644)};
        if (!to) throw_errno(cat("writing the blob ", d.str()));
        scope_exit gone([&] { ::unlinkat(dir_.get(), name.c_str(), 0); });
        fill(to.get());
        if (::fsync(to.get()) != 0 || ::renameat(dir_.get(), name.c_str(), dir_.get(), d.hex().c_str()) != 0)
            throw_errno(cat("writing the blob ", d.str()));
        gone.dismiss();
    }
    unique_fd dir_;
};

/// An error that says which directory it is about.
template<class F>
auto about(const std::string& directory, F work) {
    try {
        return work();
    } catch (const error& e) {
        throw error(e).with(cat("the cache directory ", directory));
    }
}

}  // namespace

oci::descriptor find_document(const std::string& directory, const std::string& tag, const std::optional<digest>& wanted) {
    if (!stdfs::is_directory(directory)) throw error{errc::not_found, cat("the cache directory ", directory, " does not exist")};
    return about(directory, [&] {
        const fs::root layout(directory);
        const auto all = read_index(layout);
        for (const auto& d : all.manifests)
            if (wanted ? d.digest == *wanted : is_tagged(d, tag)) return d;
        if (wanted) {
            const auto info = layout.stat(blob_path(*wanted), fs::links::follow);
            if (!info) throw error{errc::not_found, cat("there is no ", wanted->str())};
            const auto text = read_document(directory, {.media_type = {}, .digest = *wanted, .size = info->size});
            return oci::descriptor{.media_type = oci::sniff_media_type(text), .digest = *wanted, .size = info->size};
        }
        throw error{errc::not_found, cat("there is no cache named ", tag)};
    });
}

std::string read_document(const std::string& directory, const oci::descriptor& d) {
    return about(directory, [&] {
        const fs::root layout(directory);
        if (!layout.stat(blob_path(d.digest), fs::links::follow)) throw error{errc::not_found, cat("the blob ", d.digest.str(), " is missing")};
        auto text = layout.read_file(blob_path(d.digest), max_document);
        if (digest::of(text) != d.digest) throw error{errc::corrupt, cat("the blob ", d.digest.str(), " is not what its name says")};
        return text;
    });
}

state::pin take_blob(content::store& content, const std::string& directory, const oci::descriptor& d) {
    if (auto held = content.hold(d.digest)) return std::move(held->keep);
    return about(directory, [&] {
        const fs::root layout(directory);
        const auto file = layout.try_open(blob_path(d.digest), O_RDONLY);
        if (!file) throw error{errc::not_found, cat("the blob ", d.digest.str(), " is missing")};
        auto out = content.ingest(d.size);
        auto in = archive::read_from(file->get());
        std::vector<std::byte> buffer(std::size_t{1} << 20);
        for (std::size_t n = in(buffer); n > 0; n = in(buffer)) out.write(std::span<const std::byte>(buffer).first(n));
        return std::move(out.commit(d.digest, d.size).keep);
    });
}

written write_layout(const content::store& content, const std::string& directory, const std::string& tag, const oci::descriptor& manifest,
                     std::string_view manifest_bytes, const std::vector<oci::descriptor>& blobs, bool reset) {
    std::error_code failed;
    stdfs::create_directories(cat(directory, "/blobs/sha256"), failed);
    if (failed) throw os_error(failed.value(), cat("making the cache directory ", directory));
    return about(directory, [&] {
        const fs::root layout(directory);
        const blob_directory store(layout);
        written out;
        for (const auto& b : blobs) {
            if (store.has(b)) continue;
            store.copy(content, b);
            ++out.blobs;
            out.bytes += b.size;
        }
        if (!store.has(manifest)) store.write(manifest.digest, manifest_bytes);
        if (!layout.stat("oci-layout")) fs::atomic_write(layout.fd(), "oci-layout", layout_text, 0644, false);
        // Of two builds that write here at once both tags stay. Where there are no locks, the later one's does.
        const auto lock = layout.open(".", O_RDONLY | O_DIRECTORY);
        (void)::flock(lock.get(), LOCK_EX);
        auto all = read_index(layout);
        if (all.media_type.empty()) all.media_type = std::string(oci::media::oci_index);
        std::erase_if(all.manifests, [&](const auto& d) { return is_tagged(d, tag); });
        auto named = manifest;
        named.annotations[std::string(tag_annotation)] = tag;
        all.manifests.push_back(std::move(named));
        fs::atomic_write(layout.fd(), "index.json", oci::encode(all), 0644, true);
        if (reset) {
            std::set<std::string> needed;
            for (const auto& d : all.manifests) mark(layout, d, needed);
            store.keep_only(needed);
        }
        return out;
    });
}

}  // namespace cobuild::remotecache

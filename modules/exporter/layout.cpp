module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.exporter;

import cobuild.fs;
import cobuild.json;

namespace cobuild::exporter {

namespace {

constexpr std::string_view image_name = "io.containerd.image.name", ref_name = "org.opencontainers.image.ref.name";

std::string annotation_of(const oci::descriptor& d, std::string_view key) {
    const auto at = d.annotations.find(std::string(key));
    return at == d.annotations.end() ? std::string() : at->second;
}

}  // namespace

/// What a layout's index.json says of it: one entry a name. archive.cpp uses it as well.
oci::index layout_index(const exported& what, const std::vector<std::string>& names) {
    oci::index index;
    index.media_type = std::string(oci::media::oci_index);
    auto entry = what.top;
    for (const auto& [key, value] : what.layout_annotations) entry.annotations.emplace(key, value);
    if (names.empty()) index.manifests.push_back(entry);
    for (const auto& name : names) {
        entry.annotations[std::string(image_name)] = name;
        entry.annotations.erase(std::string(ref_name));
        if (const auto ref = oci::reference::parse(name); !ref.tag().empty()) entry.annotations[std::string(ref_name)] = ref.tag();
        index.manifests.push_back(entry);
    }
    return index;
}

/// Manifests included.
std::vector<oci::descriptor> all_blobs(const exported& what) {
    std::vector<oci::descriptor> out{what.top};
    for (const auto* list : {&what.images, &what.attestations})
        for (const auto& i : *list)
            if (i.manifest.digest != what.top.digest) out.push_back(i.manifest);
    for (auto& [d, blob] : what.blobs()) out.push_back(blob);
    return out;
}

namespace {

/// Written under another name, then renamed; `fill` gets the descriptor.
template<class F>
void place(int dir, const std::string& path, unsigned mode, F fill) {
    const auto temporary = cat(path, ".", random_id());
    const unique_fd file{::openat(dir, temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode)};
    if (!file) throw_errno(cat("creating ", path));
    const scope_exit undo([&] { ::unlinkat(dir, temporary.c_str(), 0); });
    fill(file.get());
    if (::renameat(dir, temporary.c_str(), dir, path.c_str()) != 0) throw_errno(cat("writing ", path));
}

void copy_blob(const content::store& content, const oci::descriptor& blob, int dir) {
    const auto path = cat("blobs/sha256/", blob.digest.hex());
    struct stat there{};
    if (::fstatat(dir, path.c_str(), &there, 0) == 0 && static_cast<std::uint64_t>(there.st_size) == blob.size) return;
    const auto from = content.open(blob.digest);
    place(dir, path, 0444, [&](int to) {
        std::vector<std::byte> buffer(std::size_t{1} << 20);
        for (ssize_t n; (n = ::read(from.get(), buffer.data(), buffer.size())) != 0;) {
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) throw_errno(cat("reading ", blob.digest.str()));
            fs::write_all(to, std::span<const std::byte>(buffer).first(static_cast<std::size_t>(n)));
        }
    });
}

/// The entries of a layout that is there, but those that `added` replaces.
void keep_others(const fs::root& layout, oci::index& added) {
    if (!layout.stat("index.json")) return;
    auto old = oci::parse_index(layout.read_file("index.json", std::size_t{16} << 20));
    std::vector<oci::descriptor> kept;
    for (auto& d : old.manifests) {
        const bool replaced = std::any_of(added.manifests.begin(), added.manifests.end(), [&](const oci::descriptor& n) {
            return annotation_of(n, image_name) == annotation_of(d, image_name) && (annotation_of(n, ref_name) == annotation_of(d, ref_name)) &&
                   (!annotation_of(n, image_name).empty() || n.digest == d.digest);
        });
        if (!replaced) kept.push_back(std::move(d));
    }
    kept.insert(kept.end(), added.manifests.begin(), added.manifests.end());
    added.manifests = std::move(kept);
}

void write_layout_files(const content::store& content, const exported& what, const std::vector<std::string>& names, const std::string& directory) {
    std::error_code failed;
    std::filesystem::create_directories(std::filesystem::path(directory) / "blobs/sha256", failed);
    if (failed) throw error{errc::io, cat("creating ", directory, ": ", failed.message())};
    const fs::root layout(directory);
    const unique_fd dir{::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
    if (!dir) throw_errno(cat("opening ", directory));
    for (const auto& blob : all_blobs(what)) copy_blob(content, blob, dir.get());
    auto index = layout_index(what, names);
    keep_others(layout, index);
    const auto text = oci::encode(index);
    place(dir.get(), "oci-layout", 0444, [](int to) { fs::write_all(to, bytes_of(R"({"imageLayoutVersion":"1.0.0"})")); });
    place(dir.get(), "index.json", 0644, [&](int to) { fs::write_all(to, bytes_of(text)); });
}

}  // namespace

async::task<void> write_layout(stores s, exported what, std::vector<std::string> names, std::string directory, progress::writer progress) {
    auto copying = progress.begin("copying to the layout");
    co_await s.pool.run([&] { write_layout_files(s.content, what, names, directory); });
    copying.done();
}

}  // namespace cobuild::exporter

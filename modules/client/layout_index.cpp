// index.json of an OCI layout that a build wrote into: the client's own to change.
module;
#include <fcntl.h>
#include <sys/file.h>

#include <filesystem>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.client;

import cobuild.base;
import cobuild.fs;
import cobuild.json;

namespace cobuild::client {

namespace {

constexpr std::string_view tag_annotation = "org.opencontainers.image.ref.name", name_annotation = "io.containerd.image.name";
constexpr std::size_t max_document = std::size_t{16} << 20;

std::string annotation(const json::value& descriptor, std::string_view key) {
    const auto* all = descriptor.find("annotations");
    const auto* found = all == nullptr ? nullptr : all->find(key);
    return found != nullptr && found->is_string() ? found->as_string() : std::string();
}

/// "localhost:5000/x:tag" -> "tag"
std::string tag_of(const std::string& name) {
    const auto colon = name.rfind(':');
    return colon == std::string::npos || name.find('/', colon) != std::string::npos ? std::string("latest") : name.substr(colon + 1);
}

json::value named(const json::value& descriptor, const layout_name& n) {
    auto out = descriptor;
    auto& annotations = out.as_object()["annotations"];
    if (annotations.is_null()) annotations = json::value(json::object());
    annotations.as_object().set(tag_annotation, n.image ? tag_of(n.name) : n.name);
    if (n.image) annotations.as_object().set(name_annotation, n.name);
    return out;
}

/// Digests that a document below the index names, itself among them.
void mark(const fs::root& layout, const std::string& id, std::set<std::string>& needed) {
    std::vector<std::string> todo{id};
    while (!todo.empty()) {
        const auto at = std::move(todo.back());
        todo.pop_back();
        const auto parsed = digest::try_parse(at);
        if (!parsed || !needed.insert(parsed->hex()).second) continue;
        const auto path = cat("blobs/sha256/", parsed->hex());
        const auto info = layout.stat(path, fs::links::follow);
        if (!info || info->size > (std::uint64_t{4} << 20)) continue;
        json::value document;
        try {
            document = json::parse(layout.read_file(path, max_document));
        } catch (const error&) {
            continue;  // a layer
        }
        for (const auto* key : {"manifests", "layers"})
            if (const auto* list = document.find(key); list != nullptr && list->is_array())
                for (const auto& d : list->as_array())
                    if (const auto* one = d.find("digest"); one != nullptr && one->is_string()) todo.push_back(one->as_string());
        if (const auto* config = document.find("config"); config != nullptr)
            if (const auto* one = config->find("digest"); one != nullptr && one->is_string()) todo.push_back(one->as_string());
    }
}

}  // namespace

void note_in_layout(const std::filesystem::path& directory, const std::string& descriptor, const std::vector<layout_name>& names, bool reset) {
    std::filesystem::create_directories(directory / "blobs" / "sha256");
    const fs::root layout(directory.string());
    const auto lock = layout.open(".", O_RDONLY | O_DIRECTORY);
    (void)::flock(lock.get(), LOCK_EX);
    const auto added = json::parse(descriptor);
    json::array kept;
    if (layout.stat("index.json", fs::links::follow)) {
        const auto old = json::parse(layout.read_file("index.json", max_document));
        if (const auto* list = old.find("manifests"); list != nullptr && list->is_array())
            for (const auto& d : list->as_array()) {
                bool replaced = false;
                for (const auto& n : names)
                    replaced = replaced || (n.image ? annotation(d, name_annotation) == n.name
                                                    : annotation(d, tag_annotation) == n.name && annotation(d, name_annotation).empty());
                if (!replaced) kept.push_back(d);
            }
    }
    for (const auto& n : names) kept.push_back(named(added, n));
    std::set<std::string> needed;
    if (reset)
        for (const auto& d : kept)
            if (const auto* id = d.find("digest"); id != nullptr && id->is_string()) mark(layout, id->as_string(), needed);
    json::object index;
    index.set("schemaVersion", json::value(2));
    index.set("mediaType", "application/vnd.oci.image.index.v1+json");
    index.set("manifests", json::value(std::move(kept)));
    if (!layout.stat("oci-layout")) fs::atomic_write(layout.fd(), "oci-layout", R"({"imageLayoutVersion":"1.0.0"})", 0644, false);
    fs::atomic_write(layout.fd(), "index.json", json::serialize(json::value(std::move(index))), 0644, true);
    if (!reset) return;
    const auto blobs = layout.open("blobs/sha256", O_RDONLY | O_DIRECTORY);
    for (const auto& name : fs::list_dir(blobs.get()))
        if (!needed.contains(name)) fs::remove_tree(blobs.get(), name);
}

}  // namespace cobuild::client

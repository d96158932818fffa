// SPDX lists of an image's contents: which layer brought a file is known here alone.
module;
#include <algorithm>
#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.exporter;

import cobuild.fs;
import cobuild.json;

namespace cobuild::exporter {

namespace {

snapshot::chain single(snapshot::layer_id layer) {
    snapshot::chain out;
    out.layers.push_back(layer);
    return out;
}

/// For every file the blob of the layer that made what is to be seen of it.
async::task<std::map<std::string, digest>> layers_of_files(stores s, snapshot::chain root, std::vector<oci::descriptor> layers) {
    std::map<std::string, digest> out;
    for (std::size_t i = std::min(root.layers.size(), layers.size()); i-- > 0;) {
        const auto view = co_await s.snapshots.view(single(root.layers[i]));
        co_await s.pool.run([&] {
            fs::walk(view.fd(), [&](const fs::walk_entry& e) {
                out.emplace(cat("/", e.path), layers[i].digest);
                return fs::walk_step::go_on;
            });
        });
    }
    co_return out;
}

void comment_files(json::value* files, const std::map<std::string, digest>& layers) {
    if (files == nullptr || !files->is_array()) return;
    for (auto& f : files->as_array()) {
        const auto* name = f.find("fileName");
        if (!f.is_object() || name == nullptr || !name->is_string() || f.as_object().contains("comment")) continue;
        if (const auto at = layers.find(fs::clean_path(cat("/", name->as_string()))); at != layers.end())
            f.as_object().set("comment", cat("layerID: ", at->second.str()));
    }
}

}  // namespace

/// index.cpp calls it for each image.
async::task<std::vector<attestation>> with_layers(stores s, std::vector<attestation> all, snapshot::chain root, std::vector<oci::descriptor> layers) {
    std::map<std::string, digest> known;
    for (auto& a : all) {
        if (!a.contents) continue;
        json::value document;
        try {
            document = json::parse(a.predicate);
        } catch (const error&) {
            continue;  // a scanner's own business
        }
        if (!document.is_object()) continue;
        if (known.empty()) known = co_await layers_of_files(s, root, layers);
        auto& members = document.as_object();
        comment_files(members.find("files"), known);
        auto& info = members["creationInfo"];
        if (!info.is_object()) info = json::value(json::object());
        auto& creators = info.as_object()["creators"];
        if (!creators.is_array()) creators = json::value(json::array());
        creators.as_array().emplace_back(cat("Tool: cobuild-", version()));
        a.predicate = json::serialize(document);
    }
    co_return all;
}

}  // namespace cobuild::exporter

module;
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include <boost/asio/awaitable.hpp>

module cobuild.script;

import cobuild.archive;
import cobuild.content;
import cobuild.json;
import cobuild.oci;
import cobuild.state;
import :image;

namespace cobuild::script {

namespace {

std::string clean(std::string_view path) {
    while (path.starts_with("./")) path.remove_prefix(2);
    while (path.starts_with('/')) path.remove_prefix(1);
    while (path.ends_with('/')) path.remove_suffix(1);
    return path == "." ? "" : std::string(path);
}

void remove_below(std::map<std::string, image_file>& files, const std::string& path, bool itself) {
    if (itself) files.erase(path);
    const std::string prefix = path.empty() ? "" : path + "/";
    for (auto at = files.lower_bound(prefix); at != files.end() && at->first.starts_with(prefix);) at = files.erase(at);
}

void apply(std::map<std::string, image_file>& files, archive::byte_source blob) {
    archive::tar_reader tar(archive::decompress_auto(std::move(blob)));
    archive::tar_entry e;
    while (tar.next(e)) {
        const std::string path = clean(e.path);
        const auto slash = path.rfind('/');
        const std::string dir = slash == std::string::npos ? "" : path.substr(0, slash);
        const std::string name = slash == std::string::npos ? path : path.substr(slash + 1);
        if (name == ".wh..wh..opq") {
            remove_below(files, dir, false);
            continue;
        }
        if (name.starts_with(".wh.")) {
            remove_below(files, dir.empty() ? name.substr(4) : cat(dir, "/", name.substr(4)), true);
            continue;
        }
        image_file f{.mode = e.mode, .uid = e.uid, .gid = e.gid, .link = e.link};
        switch (e.type) {
            case archive::entry_type::directory: f.type = "dir"; break;
            case archive::entry_type::symlink: f.type = "link"; break;
            case archive::entry_type::file: f.type = "file"; break;
            case archive::entry_type::hard_link: {
                const auto target = files.find(clean(e.link));
                if (target == files.end())
                    throw error{errc::corrupt, cat("the layer has a hard link ", quoted(e.path), " to ", quoted(e.link), ", which is nowhere")};
                f = target->second;
                break;
            }
            default: f.type = "other";
        }
        if (e.type == archive::entry_type::file)
            for (auto part = tar.data(); !part.empty(); part = tar.data())
                if (f.content.size() < (std::size_t{1} << 20)) f.content.append(text_of(part));
        if (f.type != "dir") remove_below(files, path, true);
        files[path] = std::move(f);
    }
}

}  // namespace

image_view read_image(const std::filesystem::path& root, const std::string& name, async::blocking_pool& pool) {
    const auto directory = state::directory::open(root.string(), pool);
    content::store content(directory);
    // "NAME@linux/arm64": the one of an index for that platform.
    const auto at = name.find('@');
    const bool chosen = at != std::string::npos && name.find('/', at) != std::string::npos;
    const auto wanted = chosen ? oci::normalize(oci::parse_platform(name.substr(at + 1))) : oci::host_platform();
    const auto full = oci::reference::parse(chosen ? name.substr(0, at) : name).with_default_tag().str();
    const auto image = content.get_image(full);
    if (!image) throw error{errc::not_found, cat("there is no image ", name)};
    auto text = content.read_all(image->target);
    if (oci::is_index(oci::sniff_media_type(text))) {
        const auto found = oci::select(oci::parse_index(text), wanted);
        if (found.empty()) throw error{errc::not_found, cat("the image ", name, " is not for ", oci::format(wanted))};
        text = content.read_all(found.front().digest);
    } else if (chosen) {
        throw error{errc::invalid, cat("the image ", name, " is no index")};
    }
    const auto manifest = oci::parse_manifest(text);
    image_view out;
    out.config = json::serialize(json::parse(content.read_all(manifest.config.digest)), {.escape_html = false});
    for (const auto& layer : manifest.layers) {
        const auto file = content.open(layer.digest);
        apply(out.files, archive::read_from(file.get()));
    }
    return out;
}

}  // namespace cobuild::script

module;
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import :parts;

namespace cobuild::build {

std::vector<std::string> normalized_names(const std::vector<std::string>& names) {
    std::vector<std::string> out;
    for (const auto& n : names) {
        const auto ref = oci::reference::parse(n);
        if (ref.digest()) throw error{errc::invalid, cat("the name ", quoted(n), " has a digest; an image to be built is named by a tag")};
        out.push_back(ref.with_default_tag().str());
    }
    return out;
}

namespace {

/// Everything the exporters of one build share; the image is written when the first of them needs it.
class exports {
public:
    exports(parts& p, built what, std::vector<std::string> names, std::shared_ptr<progress::sink> sink)
        : parts_(p), what_(std::move(what)), names_(std::move(names)), sink_(std::move(sink)) {}

    async::task<void> run(output o, build_result& result) {
        auto names = names_;
        if (const auto at = o.attributes.find("name"); at != o.attributes.end()) {
            std::vector<std::string> own;
            for (const auto n : split(at->second, ',')) own.emplace_back(trim(n));
            names = normalized_names(own);
            o.attributes.erase(at);
        }
        if (o.type == "image" || o.type == "registry") return image(std::move(o), std::move(names), result);
        if (o.type == "oci" || o.type == "docker") return archive(std::move(o), std::move(names), result);
        if (o.type == "local" || o.type == "tar") return files(std::move(o));
        if (o.type == "cacheonly") return nothing();
        throw error{errc::invalid, cat("unknown output type ", quoted(o.type))};
    }

private:
    static async::task<void> nothing() { co_return; }

    [[nodiscard]] const exporter::input& in() const {
        if (what_.map) throw error{errc::unsupported, "a result for several platforms cannot be exported yet"};
        return what_.list.at(0).in;
    }

    static void no_more(const output& o) {
        static constexpr std::string_view accepted[] = {
            "unpack", "store", "name-canonical", "dangling-name-prefix", "prefer-nondist-layers", "attestation-inline", "rewrite-timestamp"};
        for (const auto& [key, value] : o.attributes)
            if (std::find(std::begin(accepted), std::end(accepted), key) == std::end(accepted))
                throw error{errc::unsupported, cat("--output type=", o.type, ": the attribute ", quoted(key), " is not supported yet")};
    }

    async::task<exporter::image> write(exporter::image_options options, progress::writer w, build_result& result,
                                       const std::vector<std::string>& names) {
        auto image = co_await exporter::write_image(parts_.stores(), in(), std::move(options), w);
        result.image_digest = image.manifest.digest.str();
        result.config_digest = image.config.digest.str();
        result.size = image.size;
        describe_image(image, names, result.exporter_response);
        co_return image;
    }

    async::task<void> image(output o, std::vector<std::string> names, build_result& result) {
        bool push = o.type == "registry";
        if (const auto at = o.attributes.find("push"); at != o.attributes.end()) {
            push = at->second != "false" && at->second != "0";
            o.attributes.erase(at);
        }
        const auto take_flag = [&o](const char* key) {
            const auto at = o.attributes.find(key);
            if (at == o.attributes.end()) return false;
            const bool on = at->second != "false" && at->second != "0";
            o.attributes.erase(at);
            return on;
        };
        const push_manner manner{.by_digest = take_flag("push-by-digest"), .insecure = take_flag("registry.insecure")};
        push = push || manner.by_digest;
        if (push && names.empty()) throw error{errc::invalid, cat("--output type=", o.type, " with push needs a name: add --tag or name=")};
        auto options = exporter::take_image_options(o.attributes);
        no_more(o);
        co_await shown<int>(sink_, "export", "exporting to image", [&](progress::writer w) -> async::task<int> {
            auto made = co_await write(options, w, result, names);
            co_await keep_image(parts_, made, in().root, names);
            for (const auto& n : names) w.begin(cat("naming to ", n)).done();
            if (push) co_await push_image(parts_, made, names, manner, w);
            co_return 0;
        });
        for (const auto& n : names) result.names.push_back(oci::reference::parse(n).familiar());
    }

    async::task<void> archive(output o, std::vector<std::string> names, build_result& result) {
        const bool docker = o.type == "docker";
        exporter::destination to{.fd = o.fd};
        if (const auto at = o.attributes.find("dest"); at != o.attributes.end()) {
            to.path = at->second;
            o.attributes.erase(at);
        }
        if (o.attributes.contains("tar")) throw error{errc::unsupported, cat("--output type=", o.type, ": the attribute tar= is not supported yet")};
        auto options = exporter::take_image_options(o.attributes);
        no_more(o);
        co_await shown<int>(sink_, cat("export", to.path, to.fd), docker ? "exporting to docker image format" : "exporting to oci image format",
                            [&](progress::writer w) -> async::task<int> {
                                auto made = co_await write(options, w, result, names);
                                if (to.fd < 0 && to.path.empty())
                                    co_await load_into_docker(parts_, made, names, w);
                                else
                                    co_await exporter::write_archive(
                                        parts_.stores(), docker ? exporter::archive_kind::docker : exporter::archive_kind::oci, made, names, to, w);
                                co_return 0;
                            });
        for (const auto& n : names) result.names.push_back(oci::reference::parse(n).familiar());
    }

    async::task<void> files(output o) {
        const bool local = o.type == "local";
        const auto dest = o.attributes.find("dest");
        const std::string path = dest == o.attributes.end() ? "" : dest->second;
        if (local && path.empty() && !o.receive) throw error{errc::invalid, "--output type=local: dest= is missing, the directory to write to"};
        if (dest != o.attributes.end()) o.attributes.erase(dest);
        no_more(o);
        co_await shown<int>(sink_, cat("export", path), local ? "exporting to client directory" : "exporting to client tarball",
                            [&](progress::writer w) -> async::task<int> {
                                if (o.receive)
                                    co_await give(o);
                                else if (local)
                                    co_await exporter::write_directory(parts_.stores(), in(), path, w);
                                else
                                    co_await exporter::write_tar(parts_.stores(), in(), {.fd = o.fd, .path = path}, w);
                                co_return 0;
                            });
    }

    async::task<void> give(const output& o) {
        const auto root = co_await parts_.snapshots->view(in().root);
        co_await o.receive({{.name = "", .fd = root.fd(), .epoch = in().epoch}});
    }

    parts& parts_;
    built what_;
    std::vector<std::string> names_;
    std::shared_ptr<progress::sink> sink_;
};

}  // namespace

async::task<void> export_all(parts& p, built what, std::vector<output> outputs, std::vector<std::string> names, std::shared_ptr<progress::sink> sink,
                             build_result& result) {
    exports all(p, std::move(what), std::move(names), std::move(sink));
    for (auto& o : outputs) co_await all.run(std::move(o), result);
}

}  // namespace cobuild::build

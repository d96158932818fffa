module;
#include <fcntl.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import cobuild.fs;
import cobuild.json;
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

/// "linux/arm/v7" as the name of a directory or in one.
std::string path_of(std::string platform) {
    std::replace(platform.begin(), platform.end(), '/', '_');
    return platform;
}

/// The files that are written for a local or tar output, and what keeps them meanwhile.
struct file_options {
    bool split = false;
    bool mirror = false;
    std::string prefix;  ///< of the names of attestations
};

/// Everything the exporters of one build share.
class exports {
public:
    exports(parts& p, built what, std::vector<std::string> names, std::shared_ptr<progress::sink> sink)
        : parts_(p), what_(std::move(what)), names_(std::move(names)), sink_(std::move(sink)) {}

    async::task<void> run(output o, build_result& result) {
        auto names = names_;
        if (const auto own = exporter::take_text(o.attributes, "name"); own && !own->empty()) {
            names.clear();
            for (const auto n : split(*own, ',')) names.emplace_back(trim(n));
            names = normalized_names(names);
        }
        if (o.type == "image" || o.type == "registry") return image(std::move(o), std::move(names), result);
        if (o.type == "oci" || o.type == "docker") return archive(std::move(o), std::move(names), result);
        if (o.type == "local" || o.type == "tar") return files(std::move(o));
        if (o.type == "cacheonly") return nothing();
        throw error{errc::invalid, cat("unknown output type ", quoted(o.type))};
    }

private:
    static async::task<void> nothing() { co_return; }

    static void no_more(const output& o) {
        if (o.lenient) return;
        for (const auto& [key, value] : o.attributes)
            throw error{errc::unsupported, cat("--output type=", o.type, ": the attribute ", quoted(key), " is not supported yet")};
    }

    [[nodiscard]] std::string platforms() const {
        std::string out;
        for (const auto& one : what_.list) out += cat(out.empty() ? "" : ", ", one.platform);
        return out;
    }

    /// The image configs that an output brings itself ("containerimage.config[/PLATFORM]") in the place of the frontend's.
    static std::map<std::string, std::string> take_configs(output& o) {
        static constexpr std::string_view name = "containerimage.config";
        std::map<std::string, std::string> out;
        if (!o.lenient) return out;
        for (const auto& [key, value] : o.attributes)
            if (key == name || key.starts_with(cat(name, "/"))) out[key == name ? "" : key.substr(name.size() + 1)] = value;
        for (const auto& [platform, config] : out) check_image_config(config);
        return out;
    }

    async::task<exporter::exported> write(exporter::image_options options, progress::writer w, std::vector<std::string> names,
                                          std::map<std::string, std::string> configs, bool map, build_result& result) {
        std::vector<exporter::input> in;
        for (const auto& one : what_.list) {
            in.push_back(one.in);
            for (const auto& key : {std::string(), one.platform})
                if (const auto own = configs.find(key); own != configs.end()) in.back().config = own->second;
        }
        auto out = co_await exporter::write_images(parts_.stores(), std::move(in), map, std::move(names), std::move(options), w);
        result.image_digest = out.top.digest.str();
        result.config_digest = out.is_index() ? result.image_digest : out.images.front().config.digest.str();
        result.size = out.size;
        co_return out;
    }

    struct image_manner {
        bool push = false;
        bool store = true;
        bool canonical = false;
        std::string dangling_prefix;
        bool dangling_only_unnamed = false;
        push_manner pushing;
    };

    static image_manner take_manner(output& o) {
        image_manner out;
        out.push = exporter::take_flag(o.attributes, "push").value_or(o.type == "registry");
        out.store = exporter::take_flag(o.attributes, "store").value_or(true);
        out.canonical = exporter::take_flag(o.attributes, "name-canonical").value_or(false);
        out.dangling_prefix = exporter::take_text(o.attributes, "dangling-name-prefix").value_or("");
        // BuildKit's spelling on the wire, and the one that is meant.
        out.dangling_only_unnamed = exporter::take_flag(o.attributes, "danging-name-empty-only").value_or(false);
        out.dangling_only_unnamed = exporter::take_flag(o.attributes, "dangling-name-empty-only").value_or(out.dangling_only_unnamed);
        out.pushing.by_digest = exporter::take_flag(o.attributes, "push-by-digest").value_or(false);
        out.pushing.insecure = exporter::take_flag(o.attributes, "registry.insecure").value_or(false);
        out.push = out.push || out.pushing.by_digest;
        return out;
    }

    /// Names it is kept under: those given, with its digest besides, and one made of a prefix and the digest.
    static std::vector<std::string> stored_names(const image_manner& how, const std::vector<std::string>& names, const digest& top) {
        std::vector<std::string> out = names;
        if (how.canonical)
            for (const auto& n : names) out.push_back(oci::reference::parse(n).with_digest(top).str());
        if (!how.dangling_prefix.empty() && (names.empty() || !how.dangling_only_unnamed))
            out.push_back(oci::reference::parse(how.dangling_prefix).with_digest(top).str());
        return out;
    }

    async::task<void> image(output o, std::vector<std::string> names, build_result& result) {
        const auto how = take_manner(o);
        if (how.push && names.empty()) throw error{errc::invalid, cat("--output type=", o.type, " with push needs a name: add --tag or name=")};
        auto options = exporter::take_image_options(o.attributes);
        const auto configs = take_configs(o);
        // What is built here is unpacked already, so there is nothing else to do for it.
        const bool unpack = exporter::take_flag(o.attributes, "unpack").value_or(false);
        if (unpack && options.rewrite_timestamps)
            throw error{errc::invalid, cat("--output type=", o.type, ": rewrite-timestamp and unpack do not go together")};
        no_more(o);
        co_await shown<int>(sink_, "export", "exporting to image", [&](progress::writer w) -> async::task<int> {
            auto made = co_await write(options, w, names, configs, what_.map, result);
            const auto stored = stored_names(how, names, made.top.digest);
            describe_image(made, stored, result.exporter_response);
            result.images.push_back(json::serialize(oci::to_json(made.top)));
            if (how.store && what_.keep) co_await keep_image(parts_, made, what_, stored);
            for (const auto& n : stored) w.begin(cat("naming to ", n)).done();
            auto pushing = how.pushing;
            pushing.who = what_.who;
            if (how.push) co_await push_image(parts_, made, names, pushing, w);
            co_return 0;
        });
        for (const auto& n : names) result.names.push_back(oci::reference::parse(n).familiar());
    }

    async::task<void> archive(output o, std::vector<std::string> names, build_result& result) {
        const bool docker = o.type == "docker";
        if (docker && what_.list.size() > 1)
            throw error{errc::unsupported, cat("--output type=docker holds an image of one platform, and this result has ", platforms(),
                                               ": use type=oci, or build one of them")};
        exporter::destination to{.fd = o.fd, .path = exporter::take_text(o.attributes, "dest").value_or("")};
        const bool tar = exporter::take_flag(o.attributes, "tar").value_or(true);
        if (!tar && to.path.empty() && !o.blobs)
            throw error{errc::invalid, cat("--output type=", o.type, ",tar=false: dest= is missing, the directory to write to")};
        o.attributes.try_emplace("attestation-inline", "false");
        auto options = exporter::take_image_options(o.attributes);
        const auto configs = take_configs(o);
        if (!docker && !options.oci_types && !o.lenient)
            throw error{errc::invalid, "--output type=oci has OCI's media types: leave out oci-mediatypes=false"};
        no_more(o);
        const auto title = docker ? "exporting to docker image format" : "exporting to oci image format";
        co_await shown<int>(sink_, cat("export", to.path, to.fd), title, [&](progress::writer w) -> async::task<int> {
            auto made = co_await write(options, w, names, configs, what_.map && !docker, result);
            describe_image(made, names, result.exporter_response);
            const auto kind = docker ? exporter::archive_kind::docker : exporter::archive_kind::oci;
            if (!tar && o.blobs)
                co_await send_image(parts_, made, o.blobs, w);
            else if (!tar)
                co_await exporter::write_layout(parts_.stores(), made, names, to.path, w);
            else if (to.fd < 0 && to.path.empty())
                co_await load_into_docker(parts_, made, names, w);
            else
                co_await exporter::write_archive(parts_.stores(), kind, made, names, to, w);
            co_return 0;
        });
        for (const auto& n : names) result.names.push_back(oci::reference::parse(n).familiar());
    }

    async::task<std::vector<exporter::tree>> trees(file_options how) {
        std::vector<exporter::tree> out;
        for (const auto& one : what_.list) {
            auto t = exporter::as_tree(one.in);
            t.platform = one.platform;
            if (how.split) t.name = path_of(one.platform);
            const auto suffix = what_.map && !how.split ? path_of(one.platform) : "";
            t.extra = co_await exporter::attestation_files(parts_.stores(), one.in, how.prefix, suffix);
            out.push_back(std::move(t));
        }
        if (!how.split && out.size() > 1) co_await exporter::check_distinct(parts_.stores(), out);
        co_return out;
    }

    async::task<void> files(output o) {
        const bool local = o.type == "local";
        const auto path = exporter::take_text(o.attributes, "dest").value_or("");
        if (local && path.empty() && !o.receive) throw error{errc::invalid, "--output type=local: dest= is missing, the directory to write to"};
        file_options how{.split = exporter::take_flag(o.attributes, "platform-split").value_or(what_.map)};
        how.prefix = exporter::take_text(o.attributes, "attestation-prefix").value_or("");
        if (const auto mode = exporter::take_text(o.attributes, "mode"); mode && local) {
            if (*mode != "copy" && *mode != "delete")
                throw error{errc::invalid, cat("--output type=local,mode=", *mode, ": copy or delete is expected")};
            how.mirror = *mode == "delete";
        } else if (mode) {
            throw error{errc::invalid, "--output type=tar: mode= is for type=local"};
        }
        no_more(o);
        co_await shown<int>(sink_, cat("export", path), local ? "exporting to client directory" : "exporting to client tarball",
                            [&](progress::writer w) -> async::task<int> {
                                const auto all = co_await trees(how);
                                if (o.receive)
                                    co_await give(o, all);
                                else if (local)
                                    co_await exporter::write_directory(parts_.stores(), all, path, how.mirror, w);
                                else
                                    co_await exporter::write_tar(parts_.stores(), all, {.fd = o.fd, .path = path}, w);
                                co_return 0;
                            });
    }

    /// Hands the trees over as directories; attestations are in directories of their own.
    async::task<void> give(const output& o, std::vector<exporter::tree> all) {
        std::vector<snapshot::view> views;
        std::vector<snapshot::writable> own;
        std::vector<result_tree> out;
        for (const auto& t : all) {
            views.push_back(co_await parts_.snapshots->view(t.root));
            out.push_back({.name = t.name, .fd = views.back().fd(), .epoch = t.epoch});
            if (t.extra.empty()) continue;
            own.push_back(co_await parts_.snapshots->begin({}));
            const int dir = own.back().upper();
            co_await parts_.runtime.pool().run([&] {
                for (const auto& f : t.extra) {
                    const unique_fd file{::openat(dir, f.name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600)};
                    if (!file) throw_errno(cat("creating ", f.name));
                    fs::write_all(file.get(), bytes_of(f.bytes));
                }
            });
            out.push_back({.name = t.name, .fd = dir, .epoch = t.epoch});
        }
        co_await o.receive(std::move(out));
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

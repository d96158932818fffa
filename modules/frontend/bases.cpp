module;
#include <algorithm>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.frontend;

import :state;

namespace cobuild::frontend {
namespace {

constexpr std::string_view default_path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

std::string_view mode_name(gateway::resolve_mode mode) {
    switch (mode) {
        case gateway::resolve_mode::pull: return "pull";
        case gateway::resolve_mode::local: return "local";
        default: return {};
    }
}

/// A base without layers is scratch. (Old images have no diff ids, but a history that tells.)
bool has_no_layers(const oci::image& image) {
    return image.diff_ids.empty() && std::all_of(image.history.begin(), image.history.end(), [](const auto& h) { return h.empty_layer; });
}

/// An image of a layout is called by the name of its context, where that can be an image's name; the store is an attribute.
std::string layout_name(const std::string& context, const oci::reference& store) {
    try {
        return oci::reference::parse(context).name();
    } catch (const error&) {
        return store.path();
    }
}

}  // namespace

oci::image converter::empty_image() const {
    oci::image image;
    image.platform = target_platform_;
    image.config.working_dir = "/";
    if (target_platform_.os != "windows") image.config.env = {std::string(default_path)};
    return image;
}

async::task<void> converter::resolve_bases(const std::set<const stage_state*>& needed) {
    struct wanted {
        stage_state* stage;
        base_key key;
        oci::platform platform;
    };
    std::vector<wanted> all;
    std::set<base_key> asked;
    std::vector<async::task<void>> asks;
    for (const auto& s : states_) {
        if (s->base != nullptr || s->resolved || !needed.contains(s.get())) continue;
        s->resolved = true;
        if (s->context.empty() && s->base_name != "scratch")
            if (const auto* named = named_context(s->base_name)) s->context = *named;
        static constexpr std::string_view image_scheme = "docker-image://", layout_scheme = "oci-layout://";
        if (s->context == "docker-image://scratch") {
            s->image = empty_image();
            s->platform = target_platform_;
            if (s->stage == nullptr) s->dispatched = true;
            continue;
        }
        const bool image = s->context.starts_with(image_scheme), layout = s->context.starts_with(layout_scheme);
        if (!s->context.empty() && !image && !layout) {
            co_await apply_context(*s);
            continue;
        }
        if ((s->context.empty() && s->base_name == "scratch") || s->context == "docker-image://scratch") {
            s->image = empty_image();
            s->platform = target_platform_;
            continue;
        }
        std::string reference;
        try {
            reference =
                layout ? s->context : oci::reference::parse(image ? s->context.substr(image_scheme.size()) : s->base_name).with_default_tag().str();
        } catch (const error& e) {
            if (e.where()) throw;
            fail(e.kind(), cat("failed to parse stage name ", quoted(s->base_name), ": ", e.what()), s->lines);
        }
        const auto platform = s->platform.value_or(target_platform_);
        all.push_back({s.get(), {reference, oci::format(platform)}, platform});
        if (!configs_.contains(all.back().key) && asked.insert(all.back().key).second) asks.push_back(ask(all.back().key, s.get(), platform));
    }
    co_await async::when_all(std::move(asks));
    for (const auto& w : all) apply_base(*w.stage, configs_.at(w.key), w.platform);
}

async::task<void> converter::ask(base_key key, const stage_state* for_whom, oci::platform platform) {
    const auto prefix = req_.multi_platform ? cat("[", oci::format(platform), " internal]") : std::string("[internal]");
    std::optional<gateway::image_config> found;
    std::exception_ptr failed;
    try {
        found = co_await engine_.resolve_image_config(
            {.reference = key.reference, .platform = platform, .mode = req_.resolve, .log_name = cat(prefix, " load metadata for ", key.reference)});
    } catch (const error&) {
        failed = std::current_exception();
    }
    if (failed) {
        const error e = describe(failed);
        std::vector<std::string_view> names;
        for (const auto& [name, s] : by_name_) names.emplace_back(name);
        const bool absent = e.kind() == errc::not_found || e.kind() == errc::unauthorized || e.kind() == errc::unavailable;
        const auto hint = absent ? did_you_mean(for_whom->base_name, names) : std::string();
        // COPY --from and mounts: the name was meant for a stage as likely as for an image.
        if (absent && for_whom->stage == nullptr)
            fail(e.kind(), cat("there is no stage ", quoted(for_whom->base_name), " in the file", hint, ", and as an image: ", e.what()),
                 for_whom->lines);
        if (hint.empty()) throw error(e).with(for_whom->base_name).at(place(for_whom->lines));
        fail(e.kind(), cat(for_whom->base_name, ": ", e.what(), hint), for_whom->lines);
    }
    configs_.emplace(std::move(key), std::move(*found));
}

void converter::apply_base(stage_state& s, const gateway::image_config& found, const oci::platform& platform) {
    const std::string asked = s.base_name;
    oci::image image;
    auto reference = oci::reference::parse(found.reference).with_default_tag();
    const auto named = reference.str();
    try {
        image = oci::parse_image(found.config);
    } catch (const error& e) {
        throw error(e).with(cat("configuration of the base image ", asked)).at(place(s.lines));
    }
    if (found.manifest) reference = reference.with_digest(*found.manifest);
    s.base_name = reference.str();
    s.base_config = found.config;
    bases_.push_back({named, s.base_name, found.manifest});
    // What is the old image's own, or nothing that an image built upon it inherits.
    image.created.clear();
    image.unknown = {};
    image.config.unknown = {};
    s.image = std::move(image);
    // With no platform asked for, an image of another one that can run here is taken as what it is.
    s.platform = !s.platform && !req_.target_platform && oci::match_rank(req_.build_platform, s.image.platform) && s.image.platform.os == platform.os
                     ? oci::platform{.os = s.image.platform.os, .architecture = s.image.platform.architecture, .variant = s.image.platform.variant}
                     : platform;
    if (s.platform->architecture == platform.architecture) s.platform = platform;
    if (has_no_layers(s.image)) {
        s.root.reset();
    } else {
        const bool layout = s.context.starts_with("oci-layout://");
        llb::source_op source{
            layout ? cat("oci-layout://", layout_name(asked, reference), "@", reference.digest()->str()) : cat("docker-image://", s.base_name), {}};
        if (layout)
            source.attrs["oci.store"] = reference.path();
        else if (const auto mode = mode_name(req_.resolve); !mode.empty())
            source.attrs["image.resolvemode"] = mode;
        auto meta = metadata(s, step_name(s, cat("FROM ", s.base_name), &*s.platform));
        meta.ignore_cache = false;
        if (s.stage != nullptr) meta.description["com.docker.dockerfile.v1.command"] = s.stage->from.source;
        const llb::op o{.inputs = {},
                        .what = std::move(source),
                        .platform = llb::platform{s.platform->architecture, s.platform->os, s.platform->variant, s.platform->os_version,
                                                  s.platform->os_features}};
        s.root = draft_.add(o, {}, std::move(meta), ranges_of(s.lines));
        if (s.platform->os != s.image.platform.os || s.platform->architecture != s.image.platform.architecture) {
            const auto comments = s.stage != nullptr ? s.stage->from.comments : std::vector<std::string>{};
            warn(df::check_rule::invalid_base_image_platform, s.lines, comments, asked, oci::format(oci::normalize(*s.platform)),
                 oci::format(oci::normalize(s.image.platform)));
        }
    }
    if (s.stage == nullptr) s.dispatched = true;
}

}  // namespace cobuild::frontend

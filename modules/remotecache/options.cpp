module;
#include <array>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include <boost/asio/awaitable.hpp>

module cobuild.remotecache;

namespace cobuild::remotecache {

namespace {

constexpr std::array<std::string_view, 3> built{"registry", "local", "inline"};
constexpr std::array<std::string_view, 3> not_built{"gha", "s3", "azblob"};

/// Attributes of one flag, taken out one by one.
class taker {
public:
    taker(std::string_view flag, const std::string& type, attributes a) : what_(cat(flag, " type=", type)), left_(std::move(a)) {}

    std::string text(const std::string& key, std::string fallback = "") {
        const auto at = left_.find(key);
        if (at == left_.end()) return fallback;
        auto out = std::move(at->second);
        left_.erase(at);
        return out;
    }
    std::string required(const std::string& key, std::string_view meaning) {
        auto out = text(key);
        if (out.empty()) throw error{errc::invalid, cat(what_, ": ", key, "= is missing, ", meaning)};
        return out;
    }
    /// As Go's ParseBool; empty is `fallback`.
    bool flag(const std::string& key, bool fallback) {
        const auto value = to_lower(text(key));
        if (value.empty()) return fallback;
        if (value == "true" || value == "1" || value == "t") return true;
        if (value == "false" || value == "0" || value == "f") return false;
        throw error{errc::invalid, cat(what_, ": ", key, "=", value, " is neither true nor false")};
    }
    attributes only(std::initializer_list<const char*> keys) {
        attributes out;
        for (const auto* key : keys)
            if (auto node = left_.extract(key)) out.insert(std::move(node));
        return out;
    }
    void done() const {
        if (!left_.empty()) throw error{errc::invalid, cat(what_, ": unknown attribute ", quoted(left_.begin()->first))};
    }
    void forget(const std::string& key) { left_.erase(key); }

private:
    std::string what_;
    attributes left_;
};

kind kind_of(std::string_view flag, const std::string& type) {
    if (type == "registry") return kind::registry;
    if (type == "local") return kind::local;
    if (type == "inline") return kind::inline_;
    for (const auto known : not_built)
        if (type == known) throw error{errc::unsupported, cat(flag, " type=", type, " is not supported yet (registry, local and inline are)")};
    const auto near = nearest(type, built);
    throw error{errc::invalid, cat(flag, ": unknown type ", quoted(type),
                                   near.empty() ? " (registry, local and inline are known)" : cat(", did you mean ", near, "?"))};
}

/// A name with a registry and a tag.
std::string reference(const std::string& text) { return oci::reference::parse(text).with_default_tag().str(); }

}  // namespace

export_options parse_export(const std::string& type, attributes a) {
    export_options out;
    out.kind = kind_of("--cache-to", type);
    taker take("--cache-to", type, std::move(a));
    // As in BuildKit, any other mode means min.
    out.max = take.text("mode") == "max" && out.kind != kind::inline_;
    out.ignore_error = take.flag("ignore-error", false);
    if (out.kind != kind::inline_) {
        out.oci_types = take.flag("oci-mediatypes", true);
        out.image_manifest = take.flag("image-manifest", out.oci_types);
        if (out.image_manifest && !out.oci_types)
            throw error{errc::invalid, cat("--cache-to type=", type, ": image-manifest=true needs oci-mediatypes=true")};
        out.rest = take.only({"compression", "compression-level", "force-compression"});
    }
    if (out.kind == kind::registry) {
        out.ref = reference(take.required("ref", "the name to push the cache to"));
        out.insecure = take.flag("registry.insecure", false);
    } else if (out.kind == kind::local) {
        out.directory = take.required("dest", "the directory to write to");
        out.tag = take.text("tag", out.tag);
        out.reset = take.flag("reset", false);
    }
    take.done();
    return out;
}

std::string import_options::name() const { return kind == remotecache::kind::local ? cat("local:", directory) : ref; }

import_options parse_import(const std::string& type, attributes a) {
    import_options out;
    out.kind = kind_of("--cache-from", type);
    if (out.kind == kind::inline_)
        throw error{errc::invalid, "--cache-from type=inline: an inline cache is imported by the image's name, as type=registry,ref=IMAGE"};
    taker take("--cache-from", type, std::move(a));
    if (out.kind == kind::registry) {
        out.ref = reference(take.required("ref", "the name of the cache or image"));
        out.insecure = take.flag("registry.insecure", false);
    } else {
        out.directory = take.required("src", "the directory that has the cache");
        out.tag = take.text("tag", out.tag);
        if (const auto d = take.text("digest"); !d.empty()) out.digest = digest::parse(d);
    }
    take.done();
    return out;
}

}  // namespace cobuild::remotecache

module;
#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.oci;

import :internal;

namespace cobuild::oci {

namespace detail {

json::object unknown_members(const json::object& o, std::initializer_list<std::string_view> known) {
    json::object out;
    for (const auto& m : o.members())
        if (std::find(known.begin(), known.end(), m.key) == known.end()) out.members().push_back(m);
    return out;
}

void append_unknown(json::object& out, const json::object& unknown) {
    for (const auto& m : unknown.members())
        if (!out.contains(m.key)) out.members().push_back(m);
}

void put(json::object& out, std::string_view key, const std::string& v) {
    if (!v.empty()) out.set(key, v);
}
void put(json::object& out, std::string_view key, const std::vector<std::string>& v) {
    if (!v.empty()) out.set(key, v);
}
void put(json::object& out, std::string_view key, const std::map<std::string, std::string>& v) {
    if (!v.empty()) out.set(key, v);
}

platform read_platform(const json::object& o) {
    return {.os = json::optional_string(o, "os").value_or(""),
            .architecture = json::optional_string(o, "architecture").value_or(""),
            .variant = json::optional_string(o, "variant").value_or(""),
            .os_version = json::optional_string(o, "os.version").value_or(""),
            .os_features = json::strings_at(o, "os.features")};
}

void write_platform(json::object& out, const platform& p) {
    out.set("architecture", p.architecture);
    out.set("os", p.os);
    put(out, "os.version", p.os_version);
    put(out, "os.features", p.os_features);
    put(out, "variant", p.variant);
}

digest read_digest(const json::object& o, std::string_view key) {
    const auto text = json::string_at(o, key);
    if (auto d = digest::try_parse(text)) return *d;
    throw error{errc::corrupt, cat(quoted(key), ": ", quoted(text), " is not a sha256 digest")};
}

}  // namespace detail

using namespace detail;

namespace {

template<class F>
auto in_document(std::string_view what, F f) -> decltype(f()) {
    try {
        return f();
    } catch (error& e) {
        throw std::move(e).with(what);
    }
}

std::vector<descriptor> read_descriptors(const json::object& o, std::string_view key) {
    std::vector<descriptor> out;
    if (const auto* list = json::optional_array(o, key))
        for (const auto& v : *list) out.push_back(in_document(cat(key, '[', out.size(), ']'), [&] { return parse_descriptor(v); }));
    return out;
}

json::object read_document(std::string_view bytes, bool index) {
    auto v = json::parse(bytes, {.max_bytes = std::size_t{16} << 20});
    if (!v.is_object()) throw error{errc::corrupt, "expected an object"};
    auto o = std::move(v.as_object());
    const auto type = json::optional_string(o, "mediaType").value_or("");
    const bool right_type = type.empty() || (index ? is_index(type) : is_manifest(type));
    if (!right_type) throw error{errc::corrupt, cat("media type ", quoted(type), " is not that of ", index ? "an index" : "a manifest")};
    const auto version = json::int_at(o, "schemaVersion");
    if (version == 1)
        throw error{errc::unsupported, "manifest schema 1 was given up by registries and is not supported: push the image anew with a current tool"};
    if (version != 2) throw error{errc::corrupt, cat("schemaVersion ", version, " is not known")};
    // image-spec: a document with the members of both kinds is ambiguous and must be refused.
    if (o.contains(index ? "layers" : "manifests") || (index && o.contains("config")))
        throw error{errc::corrupt, cat("it has the members of both a manifest and an index")};
    return o;
}

void put_descriptors(json::object& out, std::string_view key, const std::vector<descriptor>& list) {
    json::array a;
    for (const auto& d : list) a.push_back(to_json(d));
    out.set(key, std::move(a));
}

}  // namespace

descriptor parse_descriptor(const json::value& v) {
    const auto& o = v.as_object();
    descriptor d{.media_type = json::string_at(o, "mediaType"),
                 .digest = read_digest(o, "digest"),
                 .size = json::uint_at(o, "size"),
                 .urls = json::strings_at(o, "urls"),
                 .annotations = json::string_map_at(o, "annotations"),
                 .artifact_type = json::optional_string(o, "artifactType").value_or("")};
    if (const auto* p = json::optional_object(o, "platform")) d.platform = read_platform(*p);
    d.unknown = unknown_members(o, {"mediaType", "digest", "size", "urls", "annotations", "platform", "artifactType"});
    return d;
}

json::value to_json(const platform& p) {
    json::object o;
    write_platform(o, p);
    return json::value(std::move(o));
}

platform platform_of(const json::value& v) { return read_platform(v.as_object()); }

json::value to_json(const descriptor& d) {
    json::object o;
    o.set("mediaType", d.media_type);
    o.set("digest", d.digest.str());
    o.set("size", d.size);
    put(o, "urls", d.urls);
    put(o, "annotations", d.annotations);
    if (d.platform) {
        json::object p;
        write_platform(p, *d.platform);
        o.set("platform", std::move(p));
    }
    put(o, "artifactType", d.artifact_type);
    append_unknown(o, d.unknown);
    return o;
}

manifest parse_manifest(std::string_view bytes) {
    return in_document("manifest", [&] {
        const auto o = read_document(bytes, false);
        manifest m{.media_type = json::optional_string(o, "mediaType").value_or(""),
                   .artifact_type = json::optional_string(o, "artifactType").value_or("")};
        m.config = in_document("config", [&] { return parse_descriptor(json::at(o, "config")); });
        m.layers = read_descriptors(o, "layers");
        if (json::optional_object(o, "subject") != nullptr) m.subject = parse_descriptor(json::at(o, "subject"));
        m.annotations = json::string_map_at(o, "annotations");
        m.unknown = unknown_members(o, {"schemaVersion", "mediaType", "artifactType", "config", "layers", "subject", "annotations"});
        return m;
    });
}

index parse_index(std::string_view bytes) {
    return in_document("index", [&] {
        const auto o = read_document(bytes, true);
        index i{.media_type = json::optional_string(o, "mediaType").value_or(""),
                .artifact_type = json::optional_string(o, "artifactType").value_or(""),
                .manifests = read_descriptors(o, "manifests")};
        if (json::optional_object(o, "subject") != nullptr) i.subject = parse_descriptor(json::at(o, "subject"));
        i.annotations = json::string_map_at(o, "annotations");
        i.unknown = unknown_members(o, {"schemaVersion", "mediaType", "artifactType", "manifests", "subject", "annotations"});
        return i;
    });
}

std::string sniff_media_type(std::string_view bytes) {
    try {
        const auto v = json::parse(bytes, {.max_bytes = std::size_t{16} << 20});
        if (!v.is_object()) return {};
        const auto& o = v.as_object();
        const auto type = json::optional_string(o, "mediaType").value_or("");
        if (is_manifest(type) || is_index(type)) return type;
        if (!type.empty()) return {};
        if (json::optional_array(o, "manifests") != nullptr) return std::string(media::oci_index);
        // An image config has a "config" as well, but no layers.
        if (json::optional_object(o, "config") != nullptr && json::optional_array(o, "layers") != nullptr) return std::string(media::oci_manifest);
    } catch (const error&) {
    }
    return {};
}

std::string encode(const manifest& m) {
    json::object o;
    o.set("schemaVersion", 2);
    put(o, "mediaType", m.media_type);
    put(o, "artifactType", m.artifact_type);
    o.set("config", to_json(m.config));
    put_descriptors(o, "layers", m.layers);
    if (m.subject) o.set("subject", to_json(*m.subject));
    put(o, "annotations", m.annotations);
    append_unknown(o, m.unknown);
    return json::serialize(o, {.indent = true});
}

std::string encode(const index& i) {
    json::object o;
    o.set("schemaVersion", 2);
    put(o, "mediaType", i.media_type);
    put(o, "artifactType", i.artifact_type);
    put_descriptors(o, "manifests", i.manifests);
    if (i.subject) o.set("subject", to_json(*i.subject));
    put(o, "annotations", i.annotations);
    append_unknown(o, i.unknown);
    return json::serialize(o, {.indent = true});
}

std::vector<descriptor> select(const index& i, const platform& wanted) {
    std::vector<std::pair<unsigned, const descriptor*>> ranked;
    constexpr unsigned last_resort = 1000;
    for (const auto& d : i.manifests) {
        if (!is_manifest(d.media_type) && !is_index(d.media_type)) continue;
        if (!d.platform) {
            if (!d.annotations.contains("vnd.docker.reference.type")) ranked.emplace_back(last_resort, &d);
        } else if (const auto rank = match_rank(wanted, *d.platform)) {
            ranked.emplace_back(*rank, &d);
        }
    }
    std::sort(ranked.begin(), ranked.end());  // ties by address: document order
    std::vector<descriptor> out;
    for (const auto& [rank, d] : ranked) out.push_back(*d);
    return out;
}

std::vector<digest> chain_ids(std::span<const digest> diff_ids) {
    std::vector<digest> out;
    for (const auto& d : diff_ids) out.push_back(out.empty() ? d : digest::of(cat(out.back().str(), ' ', d.str())));
    return out;
}

}  // namespace cobuild::oci

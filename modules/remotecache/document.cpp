module;
#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.remotecache;

namespace cobuild::remotecache {

namespace {

constexpr std::string_view key_selector = "cobuild.key";
constexpr std::string_view output_selector = "cobuild.output.";
constexpr std::string_view variant_member = "cobuild.variant";
/// What Go writes for a time that is none.
constexpr std::string_view no_time = "0001-01-01T00:00:00Z";

// ---------------------------------------------------------------- writing

/// The layers of all chains as the tree that the format has: a blob with the node below it.
struct tree {
    using node = std::pair<std::size_t, std::ptrdiff_t>;  ///< layer, node below
    std::vector<node> nodes;
    std::map<node, std::size_t> known;

    std::size_t add(const std::vector<std::size_t>& chain) {
        std::ptrdiff_t below = -1;
        for (const auto l : chain) {
            const auto [at, fresh] = known.try_emplace({l, below}, nodes.size());
            if (fresh) nodes.emplace_back(l, below);
            below = static_cast<std::ptrdiff_t>(at->second);
        }
        return static_cast<std::size_t>(below);
    }
};

struct sorted_document {
    std::vector<std::size_t> order;  ///< of records, by key
    std::vector<tree::node> nodes;
    std::map<std::pair<std::size_t, std::size_t>, std::size_t> top;  ///< node by record and output
};

/// Chains in the order of their records' keys: nodes come in the same order whatever the order of `d`.
sorted_document sort(const document& d) {
    sorted_document out;
    for (std::size_t i = 0; i < d.records.size(); ++i) out.order.push_back(i);
    std::sort(out.order.begin(), out.order.end(), [&](auto a, auto b) { return d.records[a].canonical < d.records[b].canonical; });
    tree all;
    for (const auto i : out.order) {
        if (d.records[i].chain) out.top[{i, 0}] = all.add(*d.records[i].chain);
        for (const auto& [number, chain] : d.records[i].others) out.top[{i, number}] = all.add(chain);
    }
    out.nodes = std::move(all.nodes);
    return out;
}

json::value layer_json(const layer& l, std::ptrdiff_t below) {
    json::object annotations;
    annotations.set("mediaType", l.blob.media_type);
    annotations.set("diffID", l.diff_id.str());
    annotations.set("size", l.blob.size);
    annotations.set("createdAt", l.created.empty() ? std::string(no_time) : l.created);
    if (!l.variant.empty()) annotations.set(variant_member, l.variant);
    json::object out;
    out.set("blob", l.blob.digest.str());
    // Go leaves out a zero, and reads its absence as one.
    if (below != 0) out.set("parent", static_cast<std::int64_t>(below));
    out.set("annotations", std::move(annotations));
    return out;
}

json::object link_json(const digest& key, std::string_view selector, std::size_t to) {
    json::object input;
    input.set("selector", selector);
    input.set("link", to);
    json::object out;
    out.set("digest", key.str());
    out.set("inputs", json::array{json::value(json::array{json::value(std::move(input))})});
    return out;
}

json::array result_json(std::size_t top, std::string_view created) {
    json::object result;
    result.set("layer", top);
    result.set("createdAt", created.empty() ? no_time : created);
    return json::array{json::value(std::move(result))};
}

json::array records_json(const document& d, const sorted_document& s, bool with_times) {
    json::array out;
    std::map<digest, std::size_t> links;
    const auto created = [&](const std::vector<std::size_t>& chain) {
        return !with_times || d.layers.empty() ? std::string() : d.layers.at(chain.back()).created;
    };
    for (const auto i : s.order) links.try_emplace(d.records[i].canonical, out.size());
    for (const auto i : s.order) {
        json::object r;
        if (d.records[i].chain) r.set("layers", result_json(s.top.at({i, 0}), created(*d.records[i].chain)));
        r.set("digest", d.records[i].canonical.str());
        out.emplace_back(std::move(r));
    }
    std::map<digest, std::size_t> aliases;
    for (std::size_t at = 0; at < s.order.size(); ++at)
        for (const auto& key : d.records[s.order[at]].keys)
            if (!links.contains(key)) aliases.try_emplace(key, at);
    for (const auto& [key, to] : aliases) out.emplace_back(link_json(key, key_selector, to));
    for (std::size_t at = 0; at < s.order.size(); ++at) {
        const auto& r = d.records[s.order[at]];
        for (const auto& [number, chain] : r.others) {
            const auto selector = cat(output_selector, number);
            auto one = link_json(digest::of(cat(selector, "\n", r.canonical.str())), selector, at);
            one.set("layers", result_json(s.top.at({s.order[at], number}), created(chain)));
            out.emplace_back(std::move(one));
        }
    }
    return out;
}

}  // namespace

std::string encode(const document& d) {
    const auto s = sort(d);
    json::array layers;
    for (const auto& [l, below] : s.nodes) layers.push_back(layer_json(d.layers.at(l), below));
    json::object out;
    if (!layers.empty()) out.set("layers", std::move(layers));
    if (!d.records.empty()) out.set("records", records_json(d, s, true));
    return json::serialize(json::value(std::move(out)));
}

std::string encode_inline(const document& d) {
    auto s = sort(d);
    // The image's layers are one chain: its prefixes are named by their length.
    for (auto& [which, node] : s.top) {
        const auto& r = d.records[which.first];
        node = (which.second == 0 ? *r.chain : r.others.at(which.second)).size() - 1;
    }
    return base64_encode(json::serialize(json::value(records_json(d, s, false))));
}

// ---------------------------------------------------------------- reading

namespace {

error broken(std::string_view why) { return error{errc::corrupt, cat("the cache's configuration is damaged: ", why)}; }

/// The format's layers, each with where its blob stands in document::layers; empty for what the manifest does not list.
struct read_layers {
    std::vector<std::optional<std::size_t>> blob;
    std::vector<std::int64_t> below;

    /// Bottom first; empty when a layer is missing.
    [[nodiscard]] std::optional<std::vector<std::size_t>> chain(std::int64_t top) const {
        std::vector<std::size_t> out;
        for (auto at = top; at >= 0; at = below[static_cast<std::size_t>(at)]) {
            if (static_cast<std::size_t>(at) >= blob.size()) throw broken("a layer is named that is not listed");
            if (out.size() == blob.size()) throw broken("its layers stand on each other in a circle");
            if (!blob[static_cast<std::size_t>(at)]) return std::nullopt;
            out.push_back(*blob[static_cast<std::size_t>(at)]);
        }
        std::reverse(out.begin(), out.end());
        if (out.empty()) return std::nullopt;
        return out;
    }
};

read_layers parse_layers(const json::array& list, const std::vector<oci::descriptor>& blobs, document& out) {
    std::map<digest, oci::descriptor> offered;
    for (const auto& b : blobs) offered.try_emplace(b.digest, b);
    std::map<digest, std::size_t> known;
    read_layers read;
    for (const auto& item : list) {
        const auto& o = item.as_object();
        const auto blob = digest::parse(json::string_at(o, "blob"));
        read.below.push_back(json::optional_int(o, "parent").value_or(0));
        const auto* about = json::optional_object(o, "annotations");
        const auto at = offered.find(blob);
        const auto diff_id = about != nullptr ? json::optional_string(*about, "diffID") : std::nullopt;
        if (at == offered.end() || !diff_id) {
            read.blob.emplace_back();
            continue;
        }
        const auto [index, fresh] = known.try_emplace(blob, out.layers.size());
        if (fresh) {
            layer l{.blob = at->second, .diff_id = digest::parse(*diff_id)};
            const auto created = json::optional_string(*about, "createdAt").value_or("");
            if (created != no_time && parse_time(created)) l.created = created;
            l.variant = json::optional_string(*about, variant_member).value_or("");
            out.layers.push_back(std::move(l));
        }
        read.blob.emplace_back(index->second);
    }
    return read;
}

std::optional<std::vector<std::size_t>> parse_result(const json::object& r, const read_layers& layers) {
    if (const auto* list = json::optional_array(r, "layers"))
        for (const auto& one : *list)
            if (auto chain = layers.chain(json::int_at(one.as_object(), "layer"))) return chain;
    if (const auto* list = json::optional_array(r, "chains"))
        for (const auto& one : *list) {
            std::vector<std::size_t> chain;
            for (const auto& at : json::array_at(one.as_object(), "layers")) {
                const auto index = at.as_uint();
                if (index >= layers.blob.size()) throw broken("a layer is named that is not listed");
                if (!layers.blob[index]) break;
                chain.push_back(*layers.blob[index]);
            }
            if (!chain.empty() && chain.size() == json::array_at(one.as_object(), "layers").size()) return chain;
        }
    return std::nullopt;
}

/// What record `r` is another key (output 0) or a further output of; empty when it is no such record.
struct link {
    std::uint64_t to = 0;
    std::size_t output = 0;
};
std::optional<link> parse_link(const json::object& r) {
    const auto* inputs = json::optional_array(r, "inputs");
    if (inputs == nullptr || inputs->size() != 1 || inputs->front().as_array().size() != 1) return std::nullopt;
    const auto& input = inputs->front().as_array().front().as_object();
    const auto selector = json::optional_string(input, "selector").value_or("");
    if (selector == key_selector) return link{json::uint_at(input, "link"), 0};
    if (!selector.starts_with(output_selector)) return std::nullopt;
    const std::string_view text = std::string_view(selector).substr(output_selector.size());
    std::size_t number = 0;
    const auto [end, bad] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (bad != std::errc{} || end != text.data() + text.size() || number == 0 || number > max_output) throw broken("an output has no number");
    return link{json::uint_at(input, "link"), number};
}

/// Records with inputs of BuildKit's kind are keys that nothing here has.
void parse_records(const json::array& list, const read_layers& layers, document& out) {
    std::map<std::uint64_t, std::size_t> canonical;
    for (std::size_t i = 0; i < list.size(); ++i) {
        const auto& r = list[i].as_object();
        if (const auto* inputs = json::optional_array(r, "inputs"); inputs != nullptr && !inputs->empty()) continue;
        const auto key = digest::try_parse(json::string_at(r, "digest"));
        if (!key) continue;  // "random:..."
        canonical[i] = out.records.size();
        out.records.push_back({.canonical = *key, .keys = {}, .chain = parse_result(r, layers)});
    }
    for (const auto& item : list) {
        const auto to = parse_link(item.as_object());
        if (!to) continue;
        const auto at = canonical.find(to->to);
        if (at == canonical.end()) throw broken("a key belongs to a record that is not there");
        auto& r = out.records[at->second];
        if (to->output == 0)
            r.keys.push_back(digest::parse(json::string_at(item.as_object(), "digest")));
        else if (auto chain = parse_result(item.as_object(), layers))
            r.others[to->output] = std::move(*chain);
    }
}

/// What a foreign hand wrote wrongly is a damaged document, whatever was wrong.
template<class F>
auto reading(F read) {
    try {
        return read();
    } catch (const error& e) {
        if (e.kind() == errc::corrupt) throw;
        throw broken(e.what());
    }
}

}  // namespace

document decode(std::string_view text, const std::vector<oci::descriptor>& blobs) {
    return reading([&] {
        const auto parsed = json::parse(text);
        document out;
        read_layers layers;
        if (const auto* list = json::optional_array(parsed.as_object(), "layers")) layers = parse_layers(*list, blobs, out);
        if (const auto* list = json::optional_array(parsed.as_object(), "records")) parse_records(*list, layers, out);
        return out;
    });
}

std::optional<document> decode_inline(std::string_view image_config, const oci::manifest& manifest) {
    return reading([&]() -> std::optional<document> {
        const auto config = oci::parse_image(image_config);
        const auto* member = config.unknown.find(inline_member);
        if (member == nullptr || !member->is_string()) return std::nullopt;
        const auto text = base64_decode(member->as_string());
        if (!text) throw broken("it is not base64");
        if (config.diff_ids.size() != manifest.layers.size()) throw broken("the image's layers are not those of its config");
        document out;
        read_layers layers;
        for (std::size_t i = 0; i < manifest.layers.size(); ++i) {
            out.layers.push_back({.blob = manifest.layers[i], .diff_id = config.diff_ids[i]});
            layers.blob.emplace_back(i);
            layers.below.push_back(static_cast<std::int64_t>(i) - 1);
        }
        std::size_t next = 0;
        for (const auto& h : config.history)
            if (!h.empty_layer && next < out.layers.size()) out.layers[next++].created = h.created;
        parse_records(json::parse(*text).as_array(), layers, out);
        return out;
    });
}

// ---------------------------------------------------------------- around it

envelope make_manifest(const oci::descriptor& config, const std::vector<layer>& layers, bool image_manifest, bool oci_types) {
    std::vector<oci::descriptor> blobs;
    for (const auto& l : layers) {
        oci::descriptor d;
        d.media_type = std::string(oci::layer_media_type(oci::layer_compression(l.blob.media_type), !oci_types));
        d.digest = l.blob.digest;
        d.size = l.blob.size;
        blobs.push_back(std::move(d));
    }
    if (image_manifest) {
        oci::manifest m;
        m.media_type = std::string(oci::media::oci_manifest);
        m.config = config;
        m.layers = std::move(blobs);
        return {m.media_type, oci::encode(m)};
    }
    oci::index i;
    i.media_type = std::string(oci_types ? oci::media::oci_index : oci::media::docker_list);
    i.manifests = std::move(blobs);
    i.manifests.push_back(config);
    return {i.media_type, oci::encode(i)};
}

std::optional<listed> find_config(std::string_view media_type, std::string_view bytes) {
    if (oci::is_manifest(media_type)) {
        auto m = oci::parse_manifest(bytes);
        if (m.config.media_type != config_type) return std::nullopt;
        return listed{m.config, std::move(m.layers)};
    }
    if (!oci::is_index(media_type)) return std::nullopt;
    const auto all = oci::parse_index(bytes);
    std::optional<listed> out;
    for (const auto& d : all.manifests)
        if (d.media_type == config_type) out = listed{d, {}};
    if (out)
        for (const auto& d : all.manifests)
            if (oci::is_layer(d.media_type)) out->blobs.push_back(d);
    return out;
}

}  // namespace cobuild::remotecache

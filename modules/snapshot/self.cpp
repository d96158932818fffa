module;
#include <charconv>
#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.snapshot;

import cobuild.base;
import :internal;

// One line a field, "key value", then "end"; backslash, tab, newline and NUL are written \\ \t \n \0.
namespace cobuild::snapshot {
namespace {

constexpr std::string_view last_line = "end";

std::string escape(std::string_view text) {
    std::string out;
    for (const char c : text) {
        switch (c) {
            case '\\': out += "\\\\"; break;
            case '\t': out += "\\t"; break;
            case '\n': out += "\\n"; break;
            case '\0': out += "\\0"; break;
            default: out += c;
        }
    }
    return out;
}

std::string unescape(std::string_view text) {
    std::string out;
    for (std::size_t i = 0; i < text.size(); ++i) {
        if (text[i] != '\\' || i + 1 == text.size()) {
            out += text[i];
            continue;
        }
        const char c = text[++i];
        out += c == 't' ? '\t' : c == 'n' ? '\n' : c == '0' ? '\0' : c;
    }
    return out;
}

template<class I>
std::optional<I> number(std::string_view text) {
    I out{};
    const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), out);
    if (ec != std::errc() || end != text.data() + text.size()) return std::nullopt;
    return out;
}

std::optional<layer_blob> decode_blob(std::string_view text) {
    const auto parts = split(text, '\t');
    if (parts.size() != 6) return std::nullopt;
    const auto blob = digest::try_parse(parts[1]), diff = digest::try_parse(parts[4]);
    const auto size = number<std::uint64_t>(parts[2]);
    if (!blob || !diff || !size) return std::nullopt;
    return layer_blob{.variant = unescape(parts[0]),
                      .blob = *blob,
                      .size = *size,
                      .media_type = unescape(parts[3]),
                      .diff_id = *diff,
                      .annotations = decode_map(unescape(parts[5]))};
}

}  // namespace

time_point now() { return std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now()); }

std::string encode_map(const std::map<std::string, std::string>& m) {
    std::string out;
    for (const auto& [key, value] : m) out += cat(escape(key), "\t", escape(value), "\n");
    return out;
}

std::map<std::string, std::string> decode_map(std::string_view text) {
    std::map<std::string, std::string> out;
    for (const auto line : split(text, '\n')) {
        if (const auto tab = line.find('\t'); tab != std::string_view::npos)
            out.emplace(unescape(line.substr(0, tab)), unescape(line.substr(tab + 1)));
    }
    return out;
}

std::string encode_self(const record& r) {
    std::string out = cat("kind ", escape(r.kind), "\ndescription ", escape(r.description), "\ncreated ", r.created.time_since_epoch().count(),
                          "\nboot ", escape(r.boot), "\n");
    if (r.size) out += cat("size ", *r.size, "\n");
    if (r.parent) out += cat("parent ", r.parent->value, "\n");
    if (r.diff_id) out += cat("diff-id ", r.diff_id->str(), "\n");
    if (r.chain_id) out += cat("chain-id ", r.chain_id->str(), "\n");
    if (!r.whiteouts) out += "whiteouts none\n";
    if (!r.cache_key.empty()) out += cat("cache-key ", escape(r.cache_key), "\n");
    if (!r.flat_key.empty()) out += cat("flat-key ", escape(r.flat_key), "\n");
    for (const auto& b : r.blobs) {
        out += cat("blob ", escape(b.variant), "\t", b.blob.str(), "\t", b.size, "\t", escape(b.media_type), "\t", b.diff_id.str(), "\t",
                   escape(encode_map(b.annotations)), "\n");
    }
    return out + std::string(last_line) + "\n";
}

std::optional<record> decode_self(std::string_view text) {
    record r;
    bool whole = false;
    for (const auto line : split(text, '\n')) {
        if (line == last_line) whole = true;
        const auto space = line.find(' ');
        if (space == std::string_view::npos) continue;
        const auto key = line.substr(0, space), value = line.substr(space + 1);
        if (key == "kind")
            r.kind = unescape(value);
        else if (key == "description")
            r.description = unescape(value);
        else if (key == "created")
            r.created = time_point(nanoseconds(number<std::int64_t>(value).value_or(0)));
        else if (key == "boot")
            r.boot = unescape(value);
        else if (key == "size")
            r.size = number<std::uint64_t>(value);
        else if (key == "parent")
            r.parent = layer_id{number<std::uint64_t>(value).value_or(0)};
        else if (key == "diff-id")
            r.diff_id = digest::try_parse(value);
        else if (key == "chain-id")
            r.chain_id = digest::try_parse(value);
        else if (key == "whiteouts")
            r.whiteouts = false;
        else if (key == "cache-key")
            r.cache_key = unescape(value);
        else if (key == "flat-key")
            r.flat_key = unescape(value);
        else if (key == "blob") {
            if (auto b = decode_blob(value)) r.blobs.push_back(std::move(*b));
        }
    }
    if (!whole) return std::nullopt;
    return r;
}

}  // namespace cobuild::snapshot

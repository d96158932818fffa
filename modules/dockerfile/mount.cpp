module;
#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

module cobuild.dockerfile;

import cobuild.base;
import :detail;

namespace cobuild::dockerfile {

using namespace detail;

namespace {

constexpr std::array<std::string_view, 5> type_names{"bind", "cache", "tmpfs", "secret", "ssh"};
constexpr std::array<std::string_view, 3> sharing_names{"shared", "private", "locked"};
constexpr std::array<std::string_view, 19> mount_keys{"type",     "from", "source",    "src", "target", "dst",     "destination",
                                                      "readonly", "ro",   "readwrite", "rw",  "id",     "sharing", "required",
                                                      "size",     "mode", "uid",       "gid", "env"};

[[noreturn]] void fail(std::string message) { throw error{errc::invalid, std::move(message)}; }

struct field {
    std::string key;  ///< lower case
    std::optional<std::string> value;
    std::string text;
};

field split_field(const std::string& text) {
    const std::size_t equals = text.find('=');
    field out{to_lower(std::string_view(text).substr(0, equals)), std::nullopt, text};
    if (equals != std::string::npos) out.value = text.substr(equals + 1);
    return out;
}

bool variable(std::string_view value) {
    const std::size_t dollar = value.find('$');
    return dollar != std::string_view::npos && dollar + 1 < value.size();
}

std::optional<std::uint32_t> number(std::string_view text, int base) {
    std::uint32_t value = 0;
    const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), value, base);
    if (failed != std::errc{} || end != text.data() + text.size() || text.empty()) return std::nullopt;
    return value;
}

template<class E, std::size_t N>
E named(std::string_view what, std::string_view value, const std::array<std::string_view, N>& names) {
    const auto it = std::find(names.begin(), names.end(), to_lower(value));
    if (it == names.end()) fail(suggest(cat("unsupported ", what, ' ', quoted(value)), value, names));
    return static_cast<E>(it - names.begin());
}

bool switch_value(const field& f, const std::string& value) {
    if (!f.value) return true;
    const auto parsed = parse_bool(value);
    if (!parsed) fail(cat("invalid value for ", f.key, ": ", value));
    return *parsed;
}

void only_for(const field& f, const mount& m, bool allowed) {
    if (!allowed) fail(cat("unexpected key '", f.key, "' for mount type '", to_string(m.type), "'"));
}

std::uint32_t id_value(const field& f, const std::string& value, int base) {
    const auto parsed = number(value, base);
    if (!parsed) fail(cat("invalid value ", value, " for ", f.key));
    return *parsed;
}

void apply(mount& m, const field& f, std::string value, std::optional<bool>& readonly) {
    const std::string_view key = f.key;
    const bool held = m.type == mount_type::secret || m.type == mount_type::ssh;
    if (key == "type")
        m.type = named<mount_type>("mount type", value, type_names);
    else if (key == "from")
        m.from = std::move(value);
    else if (key == "source" || key == "src")
        m.source = std::move(value);
    else if (key == "target" || key == "dst" || key == "destination")
        m.target = std::move(value);
    else if (key == "readonly" || key == "ro")
        readonly = switch_value(f, value);
    else if (key == "readwrite" || key == "rw")
        readonly = !switch_value(f, value);
    else if (key == "required")
        only_for(f, m, held), m.required = switch_value(f, value);
    else if (key == "id")
        m.id = std::move(value);
    else if (key == "sharing")
        m.sharing = named<cache_sharing>("sharing value", value, sharing_names);
    else if (key == "mode")
        m.mode = id_value(f, value, 8);
    else if (key == "uid")
        m.uid = id_value(f, value, 10);
    else if (key == "gid")
        m.gid = id_value(f, value, 10);
    else if (key == "env")
        m.env = std::move(value);
    else {  // size
        only_for(f, m, m.type == mount_type::tmpfs);
        try {
            m.size_limit = parse_bytes(value);
        } catch (const error&) {
            fail(cat("invalid value for size: ", value));
        }
    }
}

void check_key(const field& f) {
    if (std::find(mount_keys.begin(), mount_keys.end(), f.key) == mount_keys.end())
        fail(f.value ? suggest(cat("unexpected key '", f.key, "' in '", f.text, "'"), f.key, mount_keys)
                     : cat("invalid field '", f.text, "' must be a key=value pair"));
    if (f.value) return;
    static constexpr std::array<std::string_view, 5> bare{"readonly", "ro", "readwrite", "rw", "required"};
    if (std::find(bare.begin(), bare.end(), f.key) == bare.end()) fail(cat("invalid field '", f.text, "' must be a key=value pair"));
}

void check_from(const field& f) {
    if (f.key == "from" && f.value && variable(*f.value)) fail("'from' doesn't support variable expansion, define alias stage instead");
}

void validate(const mount& m) {
    const bool owned = m.type == mount_type::secret || m.type == mount_type::ssh || m.type == mount_type::cache;
    const auto refuse = [&](bool given, std::string_view key) {
        if (given && !owned) fail(cat(key, " not allowed for ", quoted(to_string(m.type)), " type mounts"));
    };
    refuse(m.mode.has_value(), "mode");
    refuse(m.uid.has_value(), "uid");
    refuse(m.gid.has_value(), "gid");
    if (m.type == mount_type::secret) {
        if (!m.from.empty()) fail("secret mount should not have a from");
        if (m.sharing) fail("secret mount should not define sharing");
        if (m.source.empty() && m.target.empty() && m.id.empty()) fail("invalid secret mount. one of source, target required");
        if (!m.source.empty() && !m.id.empty()) fail("both source and id can't be set");
    }
    if (m.type == mount_type::ssh && !m.source.empty()) fail("ssh mount should not define source");
    if (m.sharing && m.type != mount_type::cache) fail(cat("invalid cache sharing set for ", to_string(m.type), " mount"));
    if (m.env && m.type != mount_type::secret) fail(cat("unexpected key 'env' for mount type '", to_string(m.type), "'"));
    if (m.target == "/") fail("invalid mount target \"/\"");
}

}  // namespace

std::string_view to_string(mount_type type) noexcept { return type_names[static_cast<std::size_t>(type)]; }
std::string_view to_string(cache_sharing sharing) noexcept { return sharing_names[static_cast<std::size_t>(sharing)]; }

mount parse_mount(std::string_view csv, const expander& expand) {
    mount m;
    std::optional<bool> readonly;
    for (const auto& text : csv_fields(csv)) {
        const field f = split_field(text);
        check_key(f);
        check_from(f);
        apply(m, f, f.value ? (f.key == "from" ? *f.value : expand(*f.value)) : std::string(), readonly);
    }
    m.readonly = readonly.value_or(m.type != mount_type::cache && m.type != mount_type::tmpfs);
    validate(m);
    return m;
}

namespace detail {

mount_text check_mount(std::string_view csv, char escape) {
    mount_text out{std::string(csv), {}};
    bool later = false;
    for (const auto& text : csv_fields(csv)) {
        const field f = split_field(text);
        check_key(f);
        check_from(f);
        if (f.key == "from")
            out.from = f.value.value_or("");
        else
            later = later || (f.value && f.value->find('$') != std::string::npos);
    }
    // Without variables the values are known already.
    if (!later) parse_mount(csv, [escape](std::string_view word) { return expand_word(word, {}, escape).text; });
    return out;
}

device parse_device(std::string_view csv) {
    static constexpr std::array<std::string_view, 2> keys{"name", "required"};
    device out;
    for (const auto& text : csv_fields(csv)) {
        const field f = split_field(text);
        if (f.key == "required") {
            out.required = switch_value(f, f.value.value_or(""));
        } else if (f.key == "name" && f.value) {
            if (!out.name.empty()) fail(cat("device name already set to ", out.name));
            out.name = *f.value;
        } else if (out.name.empty()) {
            out.name = text;
        } else {
            fail(f.value ? suggest(cat("unexpected key '", f.key, "' in '", text, "'"), f.key, keys)
                         : cat("invalid field '", text, "' must be a key=value pair"));
        }
    }
    return out;
}

}  // namespace detail

}  // namespace cobuild::dockerfile

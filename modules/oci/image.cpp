module;
#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.oci;

import :internal;

namespace cobuild::oci {

using namespace detail;

namespace {

std::set<std::string> keys_at(const json::object& o, std::string_view key) {
    std::set<std::string> out;
    if (const auto* members = json::optional_object(o, key))
        for (const auto& m : members->members()) out.insert(m.key);
    return out;
}

void put(json::object& out, std::string_view key, const std::set<std::string>& names) {
    if (names.empty()) return;
    json::object members;
    for (const auto& n : names) members.members().push_back({n, json::object{}});
    out.set(key, std::move(members));
}

void put(json::object& out, std::string_view key, nanoseconds d) {
    if (d.count() != 0) out.set(key, static_cast<std::int64_t>(d.count()));
}

// Docker once wrote a single string where a list is meant.
std::vector<std::string> command_at(const json::object& o, std::string_view key) {
    const auto* v = o.find(key);
    if (v != nullptr && v->is_string()) return {v->as_string()};
    return json::strings_at(o, key);
}

healthcheck read_healthcheck(const json::object& o) {
    const auto time = [&](std::string_view key) { return nanoseconds(json::optional_int(o, key).value_or(0)); };
    return {.test = json::strings_at(o, "Test"),
            .interval = time("Interval"),
            .timeout = time("Timeout"),
            .start_period = time("StartPeriod"),
            .start_interval = time("StartInterval"),
            .retries = json::optional_int(o, "Retries").value_or(0)};
}

json::value write_healthcheck(const healthcheck& h) {
    json::object o;
    detail::put(o, "Test", h.test);
    put(o, "Interval", h.interval);
    put(o, "Timeout", h.timeout);
    put(o, "StartPeriod", h.start_period);
    put(o, "StartInterval", h.start_interval);
    if (h.retries != 0) o.set("Retries", h.retries);
    return o;
}

history_entry read_history(const json::object& o) {
    return {.created = json::optional_string(o, "created").value_or(""),
            .created_by = json::optional_string(o, "created_by").value_or(""),
            .author = json::optional_string(o, "author").value_or(""),
            .comment = json::optional_string(o, "comment").value_or(""),
            .empty_layer = json::optional_bool(o, "empty_layer").value_or(false)};
}

json::value write_history(const history_entry& h) {
    json::object o;
    detail::put(o, "created", h.created);
    detail::put(o, "created_by", h.created_by);
    detail::put(o, "author", h.author);
    detail::put(o, "comment", h.comment);
    if (h.empty_layer) o.set("empty_layer", true);
    return o;
}

}  // namespace

run_config parse_run_config(const json::value& v) {
    const auto& o = v.as_object();
    run_config c{.user = json::optional_string(o, "User").value_or(""),
                 .exposed_ports = keys_at(o, "ExposedPorts"),
                 .env = json::strings_at(o, "Env"),
                 .entrypoint = command_at(o, "Entrypoint"),
                 .cmd = command_at(o, "Cmd"),
                 .volumes = keys_at(o, "Volumes"),
                 .working_dir = json::optional_string(o, "WorkingDir").value_or(""),
                 .labels = json::string_map_at(o, "Labels"),
                 .stop_signal = json::optional_string(o, "StopSignal").value_or(""),
                 .args_escaped = json::optional_bool(o, "ArgsEscaped").value_or(false),
                 .on_build = json::strings_at(o, "OnBuild"),
                 .shell = json::strings_at(o, "Shell"),
                 .stop_timeout = json::optional_int(o, "StopTimeout")};
    if (const auto* h = json::optional_object(o, "Healthcheck")) c.healthcheck = read_healthcheck(*h);
    c.unknown = unknown_members(o, {"User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Volumes", "WorkingDir", "Labels", "StopSignal",
                                    "ArgsEscaped", "OnBuild", "Shell", "StopTimeout", "Healthcheck"});
    return c;
}

json::value to_json(const run_config& c) {
    json::object o;
    detail::put(o, "User", c.user);
    put(o, "ExposedPorts", c.exposed_ports);
    detail::put(o, "Env", c.env);
    detail::put(o, "Entrypoint", c.entrypoint);
    detail::put(o, "Cmd", c.cmd);
    put(o, "Volumes", c.volumes);
    detail::put(o, "WorkingDir", c.working_dir);
    detail::put(o, "Labels", c.labels);
    detail::put(o, "StopSignal", c.stop_signal);
    if (c.args_escaped) o.set("ArgsEscaped", true);
    if (c.healthcheck) o.set("Healthcheck", write_healthcheck(*c.healthcheck));
    detail::put(o, "OnBuild", c.on_build);
    detail::put(o, "Shell", c.shell);
    if (c.stop_timeout) o.set("StopTimeout", *c.stop_timeout);
    append_unknown(o, c.unknown);
    return o;
}

image parse_image(std::string_view bytes) {
    try {
        const auto v = json::parse(bytes, {.max_bytes = std::size_t{16} << 20});
        const auto& o = v.as_object();
        image i{.created = json::optional_string(o, "created").value_or(""),
                .author = json::optional_string(o, "author").value_or(""),
                .platform = read_platform(o)};
        if (json::optional_object(o, "config") != nullptr) i.config = parse_run_config(json::at(o, "config"));
        if (const auto* rootfs = json::optional_object(o, "rootfs"); rootfs != nullptr) {
            for (const auto& text : json::strings_at(*rootfs, "diff_ids")) {
                const auto d = digest::try_parse(text);
                if (!d) throw error{errc::corrupt, cat("rootfs.diff_ids: ", quoted(text), " is not a sha256 digest")};
                i.diff_ids.push_back(*d);
            }
        }
        if (const auto* list = json::optional_array(o, "history"))
            for (const auto& entry : *list) i.history.push_back(read_history(entry.as_object()));
        i.unknown =
            unknown_members(o, {"created", "author", "architecture", "os", "os.version", "os.features", "variant", "config", "rootfs", "history"});
        return i;
    } catch (error& e) {
        throw std::move(e).with("image config");
    }
}

json::value to_json(const image& i) {
    json::object o;
    detail::put(o, "created", i.created);
    detail::put(o, "author", i.author);
    write_platform(o, i.platform);
    o.set("config", to_json(i.config));
    json::array diff_ids;
    for (const auto& d : i.diff_ids) diff_ids.push_back(d.str());
    o.set("rootfs", json::object{{"type", "layers"}, {"diff_ids", std::move(diff_ids)}});
    json::array history;
    for (const auto& h : i.history) history.push_back(write_history(h));
    if (!history.empty()) o.set("history", std::move(history));
    append_unknown(o, i.unknown);
    return o;
}

std::string encode(const image& i) {
    auto v = to_json(i);
    auto& members = v.as_object().members();
    std::sort(members.begin(), members.end(), [](const json::member& a, const json::member& b) { return a.key < b.key; });
    return json::serialize(v);
}

}  // namespace cobuild::oci

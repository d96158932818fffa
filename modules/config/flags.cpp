module;
#include <charconv>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

module cobuild.config;

import cobuild.base;
import :schema;

namespace cobuild::config {
namespace {

template<class... F>
struct overloaded : F... {
    using F::operator()...;
};

template<class F>
std::string complaint_of(F f) {
    try {
        f();
        return {};
    } catch (const error& e) {
        return e.what();
    }
}

std::optional<std::int64_t> whole(std::string_view text) {
    std::int64_t value = 0;
    const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (text.empty() || ec != std::errc{} || end != text.data() + text.size()) return std::nullopt;
    return value;
}

std::string limit_text(const field& f) { return cat("must be ", *f.least, " or more"); }

std::string assign_truth(std::string_view text, const std::function<void(bool)>& store) {
    if (text != "true" && text != "false") return "expected true or false";
    store(text == "true");
    return {};
}

struct found_field {
    std::string path;
    const field* what = nullptr;
};

found_field find_path(const fields& all, const std::string& prefix, std::string_view wanted, bool by_flag) {
    for (const auto& f : all) {
        const std::string path = join_key(prefix, f.key);
        if (by_flag ? f.flag == wanted : path == wanted) return {path, &f};
        if (const auto* sub = std::get_if<sub_table>(&f.where))
            if (const auto below = find_path(*sub->members, path, wanted, by_flag); below.what != nullptr) return below;
    }
    return {};
}

class flag_setter {
public:
    explicit flag_setter(reading& r) : r_(r), all_(schema(r.config)) {}

    void operator()(const std::string& flag, const std::optional<bool>& v) const {
        if (v) apply(flag, [&](const field& f) { return assign_text(f, *v ? "true" : "false"); });
    }
    void operator()(const std::string& flag, const std::optional<std::string>& v) const {
        if (v) apply(flag, [&](const field& f) { return assign_text(f, *v); });
    }
    void operator()(const std::string& flag, const std::optional<std::int64_t>& v) const {
        if (v) apply(flag, [&](const field& f) { return assign_integer(f, *v); });
    }
    void operator()(const std::string& flag, const std::optional<std::vector<std::string>>& v) const {
        if (v) apply(flag, [&](const field& f) { return assign_list(f, *v); });
    }
    void wrong(const std::string& flag, const std::string& complaint) const {
        r_.report(severity::error, errc::invalid, cat(flag, ": ", complaint), std::nullopt);
    }
    void came_from(const std::string& path, const std::string& flag) const {
        r_.flags[path] = flag;
        r_.lines.erase(path);
    }

private:
    template<class F>
    void apply(const std::string& flag, F assign) const {
        const auto found = find_path(all_, "", flag, true);
        if (found.what == nullptr) throw error{errc::internal, cat("no key belongs to the flag ", flag)};
        came_from(found.path, flag);
        if (const auto complaint = assign(*found.what); !complaint.empty()) wrong(flag, complaint);
    }

    reading& r_;
    fields all_;
};

/// "Reserved[,Free[,Max]]", each in units of 10^6 bytes.
void apply_keep_storage(const flag_setter& set, const std::string& flag, const std::string& text, const std::string& worker, gc_settings& gc) {
    const auto parts = split(text, ',');
    disk_space* const targets[] = {&gc.reserved_space, &gc.min_free_space, &gc.max_used_space};
    constexpr const char* keys[] = {".reservedSpace", ".minFreeSpace", ".maxUsedSpace"};
    bool good = parts.size() <= 3;
    for (std::size_t i = 0; good && i < parts.size(); ++i) {
        const auto value = whole(trim(parts[i]));
        good = value && *value >= 0 && *value <= 9'000'000'000'000;
        if (!good) break;
        *targets[i] = {.bytes = static_cast<std::uint64_t>(*value) * 1'000'000};
        set.came_from(worker + keys[i], flag);
    }
    if (!good) set.wrong(flag, cat(quoted(text), " is not Reserved[,Free[,Max]] in megabytes, for example 10000 or 10000,5000,50000"));
}

void apply_worker(const flag_setter& set, const worker_overrides& o, worker_table& w, const std::string& path, const std::string& flag,
                  const std::string& short_flag) {
    if (o.enabled == "auto")
        w.enabled.reset();
    else
        set(flag, o.enabled);
    set(flag + "-labels", o.labels);
    set(flag + "-platform", o.platforms);
    set(flag + "-snapshotter", o.snapshotter);
    set(flag + "-rootless", o.rootless);
    set(flag + "-gc", o.gc);
    if (o.gc_keep_storage) apply_keep_storage(set, flag + "-gc-keepstorage", *o.gc_keep_storage, path, w.gc);
    set(flag + "-net", o.network);
    set(short_flag + "-cni-config-path", o.cni_config_path);
    set(short_flag + "-cni-binary-dir", o.cni_binary_dir);
    set(short_flag + "-cni-pool-size", o.cni_pool_size);
    set(flag + "-apparmor-profile", o.apparmor_profile);
    set(flag + "-selinux", o.selinux);
    set(short_flag + "-max-parallelism", o.max_parallelism);
}

/// A number is the key `gid`; a name has no key, so it is kept apart.
void apply_group(reading& r, const flag_setter& set, const std::optional<std::string>& group) {
    if (!group) return;
    if (whole(*group)) return set("--group", group);
    r.config.grpc.group = *group;
}

}  // namespace

std::string type_of(const slot& s) {
    return std::visit(overloaded{
                          [](bool*) { return "true or false"; },
                          [](std::optional<bool>*) { return "true or false"; },
                          [](const folded_bool&) { return "true or false"; },
                          [](std::int64_t*) { return "an integer"; },
                          [](std::optional<std::int64_t>*) { return "an integer"; },
                          [](std::vector<std::string>*) { return "a list of strings"; },
                          [](std::map<std::string, std::string>*) { return "a table of strings"; },
                          [](disk_space*) { return "an amount of disk space (bytes, \"40MB\" or \"10%\")"; },
                          [](const folded_space&) { return "an amount of disk space (bytes, \"40MB\" or \"10%\")"; },
                          [](nanoseconds*) { return "a duration (seconds or \"1h30m\")"; },
                          [](const free_table&) { return "a table"; },
                          [](const sub_table&) { return "a table"; },
                          [](const family& f) { return f.keyed ? "a table of tables" : "a list of tables"; },
                          [](const auto&) { return "a string"; },
                      },
                      s);
}

std::string assign_text(const field& f, std::string_view text) {
    if (f.rule && !text.empty())
        if (auto complaint = f.rule(text); !complaint.empty()) return complaint;
    return std::visit(
        overloaded{
            [&](bool* p) { return assign_truth(text, [p](bool b) { *p = b; }); },
            [&](std::optional<bool>* p) { return assign_truth(text, [p](bool b) { *p = b; }); },
            [&](const folded_bool& store) { return assign_truth(text, store); },
            // As in BuildKit an empty text is the default, which the member holds already.
            [&](std::string* p) {
                if (!text.empty()) *p = text;
                return std::string();
            },
            [&](std::optional<std::string>* p) {
                if (!text.empty()) *p = std::string(text);
                return std::string();
            },
            [&](const word& w) { return text.empty() ? std::string() : w.set(text); },
            [&](disk_space* p) { return text.empty() ? std::string() : complaint_of([&] { *p = parse_disk_space(text); }); },
            [&](const folded_space& store) { return text.empty() ? std::string() : complaint_of([&] { store(parse_disk_space(text)); }); },
            [&](nanoseconds* p) {
                if (text.empty()) return std::string();
                std::string complaint = complaint_of([&] { *p = parse_time_span(text); });
                if (complaint.empty() && f.least && p->count() < *f.least) complaint = "must not be negative";
                return complaint;
            },
            [&](std::int64_t*) {
                const auto value = whole(text);
                return value ? assign_integer(f, *value) : std::string("expected an integer");
            },
            [&](std::optional<std::int64_t>*) {
                const auto value = whole(text);
                return value ? assign_integer(f, *value) : std::string("expected an integer");
            },
            [&](const auto&) { return cat("expected ", type_of(f.where)); },
        },
        f.where);
}

std::string assign_integer(const field& f, std::int64_t value) {
    const auto bytes = [&](const auto& store) -> std::string {
        if (value < 0) return "must not be negative";
        store(disk_space{.bytes = static_cast<std::uint64_t>(value)});
        return {};
    };
    if (const auto* p = std::get_if<disk_space*>(&f.where)) return bytes([&](disk_space s) { **p = s; });
    if (const auto* p = std::get_if<folded_space>(&f.where)) return bytes(*p);
    if (std::holds_alternative<nanoseconds*>(f.where)) return assign_text(f, cat(value));
    if (f.least && value < *f.least) return limit_text(f);
    if (const auto* p = std::get_if<std::int64_t*>(&f.where))
        **p = value;
    else if (const auto* q = std::get_if<std::optional<std::int64_t>*>(&f.where))
        **q = value;
    else
        return cat("expected ", type_of(f.where));
    return {};
}

std::string assign_list(const field& f, std::vector<std::string> values) {
    for (const auto& v : values)
        if (f.rule)
            if (const auto complaint = f.rule(v); !complaint.empty()) return cat(quoted(v), " ", complaint);
    if (const auto* p = std::get_if<std::vector<std::string>*>(&f.where)) {
        **p = std::move(values);
        return {};
    }
    const auto* map = std::get_if<std::map<std::string, std::string>*>(&f.where);
    if (map == nullptr) return cat("expected ", type_of(f.where));
    std::map<std::string, std::string> out;
    for (const auto& v : values) {
        const auto at = v.find('=');
        if (at == std::string::npos || at == 0) return cat(quoted(v), " is not key=value");
        out[v.substr(0, at)] = v.substr(at + 1);
    }
    **map = std::move(out);
    return {};
}

void apply_flags(reading& r, const overrides& o) {
    const flag_setter set(r);
    auto& c = r.config;
    set("--root", o.root);
    if (o.trace.value_or(false))
        c.log.level = log_level::trace;
    else if (o.debug.value_or(false))
        c.log.level = log_level::debug;
    set("--log-level", o.log_level);
    set("--log-format", o.log_format);
    set("--proxy-network", o.proxy_network);
    set("--allow-insecure-entitlement", o.allow_insecure_entitlement);
    set("--addr", o.addr);
    set("--debugaddr", o.debugaddr);
    apply_group(r, set, o.group);
    set("--tlscert", o.tlscert);
    set("--tlskey", o.tlskey);
    set("--tlscacert", o.tlscacert);
    set("--otel-socket-path", o.otel_socket_path);
    set("--cdi-disabled", o.cdi_disabled);
    set("--cdi-spec-dir", o.cdi_spec_dir);
    set("--oci-worker-rootless", o.rootless);
    if (o.rootless) set.came_from("worker.oci.rootless", "--rootless");
    apply_worker(set, o.oci, c.oci, "worker.oci", "--oci-worker", "--oci");
    set("--oci-worker-no-process-sandbox", o.oci.no_process_sandbox);
    set("--oci-worker-binary", o.oci.binary);
    set("--oci-worker-proxy-snapshotter-path", o.oci.proxy_snapshotter_path);
    apply_worker(set, o.containerd, c.containerd, "worker.containerd", "--containerd-worker", "--containerd");
    set("--containerd-worker-addr", o.containerd.address);
    set("--containerd-worker-namespace", o.containerd.containerd_namespace);
    set("--containerd-worker-runtime", o.containerd.runtime);
}

}  // namespace cobuild::config

module;
#include <dirent.h>
#include <malloc.h>
#include <sys/resource.h>
#include <unistd.h>

#include <charconv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.daemon;

import cobuild.json;
import :internal;

namespace cobuild::daemon {

namespace {

using open_calls = std::vector<rpc::server::open_call>;

std::string text_of_file(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    std::ostringstream out;
    out << in.rdbuf();
    return std::move(out).str();
}

std::vector<std::string> names_in(const char* directory) {
    std::vector<std::string> out;
    const std::unique_ptr<DIR, int (*)(DIR*)> d(::opendir(directory), ::closedir);
    if (d == nullptr) return out;
    while (const auto* e = ::readdir(d.get()))
        if (e->d_name[0] != '.') out.emplace_back(e->d_name);
    return out;
}

/// What the kernel says of this process.
struct process_facts {
    std::uint64_t resident = 0, virtual_size = 0, descriptors = 0, most_descriptors = 0, threads = 0;
    double cpu = 0, started = 0;  ///< seconds; since 1970
};

process_facts look() {
    process_facts out;
    const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    std::istringstream memory(text_of_file("/proc/self/statm"));
    memory >> out.virtual_size >> out.resident;
    out.virtual_size *= page;
    out.resident *= page;
    out.descriptors = names_in("/proc/self/fd").size();
    out.threads = names_in("/proc/self/task").size();
    rlimit most{};
    if (::getrlimit(RLIMIT_NOFILE, &most) == 0) out.most_descriptors = most.rlim_cur;
    rusage used{};
    ::getrusage(RUSAGE_SELF, &used);
    out.cpu =
        static_cast<double>(used.ru_utime.tv_sec + used.ru_stime.tv_sec) + static_cast<double>(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    // The 22nd field of stat, counted in ticks since boot; names may hold spaces and parentheses.
    const auto stat = text_of_file("/proc/self/stat");
    std::istringstream rest(stat.substr(stat.rfind(')') + 1));
    std::string skipped;
    for (int i = 3; i < 22; ++i) rest >> skipped;
    double ticks = 0;
    rest >> ticks;
    std::istringstream up(text_of_file("/proc/uptime"));
    double uptime = 0;
    up >> uptime;
    const auto now = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
    out.started = now - uptime + ticks / static_cast<double>(::sysconf(_SC_CLK_TCK));
    return out;
}

std::string number(double v) {
    char text[64];
    const auto [end, ec] = std::to_chars(text, text + sizeof text, v, std::chars_format::fixed, 3);
    return ec == std::errc{} ? std::string(text, end) : "0";
}

// ---------------------------------------------------------------- /metrics

/// Prometheus' text format 0.0.4.
class metrics {
public:
    void head(std::string_view name, std::string_view type, std::string_view help) {
        out_ += cat("# HELP ", name, " ", help, "\n# TYPE ", name, " ", type, "\n");
        name_ = name;
    }
    void value(std::string_view v, const std::vector<std::pair<std::string, std::string>>& labels = {}) {
        out_ += name_;
        for (std::size_t i = 0; i < labels.size(); ++i) out_ += cat(i == 0 ? "{" : ",", labels[i].first, "=\"", escaped(labels[i].second), "\"");
        out_ += cat(labels.empty() ? " " : "} ", v, "\n");
    }
    void one(std::string_view name, std::string_view type, std::string_view help, std::string_view v) {
        head(name, type, help);
        value(v);
    }
    [[nodiscard]] std::string text() && { return std::move(out_); }

private:
    static std::string escaped(std::string_view label) {
        std::string out;
        for (const char c : label) {
            if (c == '\n') {
                out += "\\n";
                continue;
            }
            if (c == '"' || c == '\\') out += '\\';
            out += c;
        }
        return out;
    }
    std::string out_, name_;
};

std::string metrics_page(world& w, const open_calls& calls) {
    metrics m;
    const auto p = look();
    m.head("cobuild_build_info", "gauge", "The version of this daemon.");
    m.value("1", {{"version", std::string(version())}});
    m.one("cobuild_builds_running", "gauge", "Builds under way.", cat(w.builds.running()));
    m.one("cobuild_builds_total", "counter", "Builds begun since the daemon started.", cat(w.builds.begun()));
    m.one("cobuild_sessions_open", "gauge", "Clients whose session stands.", cat(w.sessions.size()));
    std::map<std::string, std::size_t> by_method;
    for (const auto& c : calls) ++by_method[c.method];
    m.head("cobuild_rpc_calls_open", "gauge", "gRPC calls under way.");
    for (const auto& [method, n] : by_method) m.value(cat(n), {{"method", method}});
    const auto now = w.given.engine->current();
    m.head("cobuild_registry_sockets", "gauge", "Connections to the hosts of a registry, idle ones included.");
    for (const auto& r : now.registries) m.value(cat(r.open), {{"registry", r.domain}});
    m.head("cobuild_registry_sockets_peak", "gauge", "The most connections to the hosts of a registry there ever were.");
    for (const auto& r : now.registries) m.value(cat(r.peak), {{"registry", r.domain}});
    m.head("cobuild_registry_calls_waiting", "gauge", "Registry calls that wait for a connection.");
    for (const auto& r : now.registries) m.value(cat(r.waiting), {{"registry", r.domain}});
    m.one("process_cpu_seconds_total", "counter", "User and system time of this process.", number(p.cpu));
    m.one("process_open_fds", "gauge", "Open file descriptors.", cat(p.descriptors));
    m.one("process_max_fds", "gauge", "The most there may be.", cat(p.most_descriptors));
    m.one("process_resident_memory_bytes", "gauge", "Memory in use.", cat(p.resident));
    m.one("process_virtual_memory_bytes", "gauge", "Address space.", cat(p.virtual_size));
    m.one("process_start_time_seconds", "gauge", "Start, since the Unix epoch.", number(p.started));
    m.one("process_threads", "gauge", "Threads.", cat(p.threads));
    return std::move(m).text();
}

// ---------------------------------------------------------------- texts

std::string waits_page(world& w, const open_calls& calls) {
    std::string out = cat("coroutines: what each waits for\n\ncalls under way: ", calls.size(), "\n");
    for (const auto& c : calls) out += cat("  ", c.method, ", for ", format_duration(std::chrono::round<std::chrono::milliseconds>(c.age)), "\n");
    const auto now = w.given.engine->current();
    out += "\nsteps that are not finished:\n";
    out += now.waits;
    out += "\nregistries:\n";
    for (const auto& r : now.registries)
        out += cat("  ", r.domain, ": ", r.open, " connections (at most ", r.peak, "), ", r.waiting, " calls wait for one\n");
    out += "\nthreads: name, state, and what the kernel has it wait for\n";
    for (const auto& id : names_in("/proc/self/task")) {
        const auto at = "/proc/self/task/" + id;
        const auto stat = text_of_file(at + "/stat");
        const auto end = stat.rfind(')');
        out += cat("  ", id, " ", trim(text_of_file(at + "/comm")), " ", end + 2 < stat.size() ? stat.substr(end + 2, 1) : "?", " ",
                   trim(text_of_file(at + "/wchan")), "\n");
    }
    return out;
}

std::string_view state_of(const progress::vertex& v) {
    if (!v.error.empty()) return v.canceled ? "cancelled" : "failed";
    if (v.completed) return v.cached ? "cached" : "done";
    return v.started ? "running" : "waiting";
}

/// The graph of every build that is known: a line each vertex, its inputs below it.
std::string graph_page(const world& w) {
    std::string out;
    for (const auto& [ref, b] : w.builds.known()) {
        out += cat("build ", ref, b->ended ? " (ended)\n" : "\n");
        std::map<digest, progress::vertex> latest;
        std::vector<digest> order;
        for (const auto& e : b->events->all())
            if (const auto* v = std::get_if<progress::vertex>(&e)) {
                if (!latest.contains(v->id)) order.push_back(v->id);
                latest[v->id] = *v;
            }
        for (const auto& id : order) {
            const auto& v = latest.at(id);
            out += cat("  ", id.str().substr(7, 12), " ", state_of(v), " ", quoted(v.name), "\n");
            for (const auto& input : v.inputs) out += cat("    <- ", input.str().substr(7, 12), "\n");
        }
    }
    return out.empty() ? "no builds\n" : out;
}

std::string vars_page(world& w) {
    const auto p = look();
    json::array arguments;
    std::string word;
    for (const char c : text_of_file("/proc/self/cmdline")) {
        if (c != '\0') {
            word += c;
            continue;
        }
        arguments.push_back(std::exchange(word, {}));
    }
    json::object out;
    out["cmdline"] = std::move(arguments);
    out["builds_running"] = static_cast<std::int64_t>(w.builds.running());
    out["sessions_open"] = static_cast<std::int64_t>(w.sessions.size());
    out["resident_bytes"] = static_cast<std::int64_t>(p.resident);
    out["open_fds"] = static_cast<std::int64_t>(p.descriptors);
    return json::serialize(std::move(out)) + "\n";
}

constexpr std::string_view index_page =
    "/metrics                 figures, for Prometheus\n"
    "/debug/graph             the graph of every build and how far it is\n"
    "/debug/pprof/goroutine   what every step, call and thread waits for\n"
    "/debug/pprof/cmdline     the command line\n"
    "/debug/requests          gRPC calls under way\n"
    "/debug/events            builds under way\n"
    "/debug/vars              a few figures as JSON\n"
    "/debug/gc                gives freed memory back to the kernel\n";

}  // namespace

debug_answer debug_page(world& w, const open_calls& calls, std::string_view path) {
    path = path.substr(0, path.find('?'));
    if (path == "/metrics") return {.type = "text/plain; version=0.0.4; charset=utf-8", .body = metrics_page(w, calls)};
    if (path == "/debug/pprof/goroutine") return {.body = waits_page(w, calls)};
    if (path == "/debug/graph") return {.body = graph_page(w)};
    if (path == "/debug/vars") return {.type = "application/json; charset=utf-8", .body = vars_page(w)};
    if (path == "/debug/pprof/cmdline") return {.body = text_of_file("/proc/self/cmdline")};
    if (path == "/debug" || path == "/debug/" || path == "/debug/pprof/" || path == "/") return {.body = std::string(index_page)};
    if (path == "/debug/requests") {
        std::string out;
        for (const auto& c : calls) out += cat(c.method, " ", format_duration(c.age), "\n");
        return {.body = std::move(out)};
    }
    if (path == "/debug/events") {
        std::string out;
        for (const auto& [ref, b] : w.builds.known())
            if (!b->ended) out += cat(ref, " since ", format_time(std::chrono::time_point_cast<nanoseconds>(b->started)), "\n");
        return {.body = std::move(out)};
    }
    if (path == "/debug/gc") {
        ::malloc_trim(0);
        return {};
    }
    if (path.starts_with("/debug/pprof/") || path.starts_with("/debug/cache/"))
        return {.status = 501, .body = cat(path, " is not supported yet; /debug/ lists what is\n")};
    return {.status = 404, .body = "there is no such page; /debug/ lists them\n"};
}

}  // namespace cobuild::daemon

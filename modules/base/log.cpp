module;
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <span>
#include <string>
#include <string_view>

module cobuild.base;

namespace cobuild {

namespace {
struct log_state {
    std::mutex guard;
    log_options options;
};
log_state& state() {
    static log_state instance;
    return instance;
}
std::atomic<log_level> threshold{log_level::warning};

std::string_view name_of(log_level level) {
    switch (level) {
        case log_level::trace: return "trace";
        case log_level::debug: return "debug";
        case log_level::info: return "info";
        case log_level::warning: return "warning";
        default: return "error";
    }
}

bool plain(std::string_view text) {
    if (text.empty()) return false;
    for (const char c : text) {
        const bool ok = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                        std::string_view("-._/@^+").find(c) != std::string_view::npos;
        if (!ok) return false;
    }
    return true;
}

std::string text_line(std::string_view time, log_level level, std::string_view message, std::span<const log_field> fields) {
    std::string line = cat("time=", quoted(time), " level=", name_of(level), " msg=", plain(message) ? std::string(message) : quoted(message));
    for (const auto& f : fields) line += cat(" ", f.key, "=", plain(f.value) ? f.value : quoted(f.value));
    return line;
}

std::string json_string(std::string_view text) {
    static constexpr char hex[] = "0123456789abcdef";
    std::string out = "\"";
    for (const char c : text) {
        const auto u = static_cast<unsigned char>(c);
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if (c == '\n') {
            out += "\\n";
        } else if (u < 0x20) {
            out += "\\u00";
            out += hex[u >> 4];
            out += hex[u & 15];
        } else {
            out += c;
        }
    }
    return out + "\"";
}

std::string json_line(std::string_view time, log_level level, std::string_view message, std::span<const log_field> fields) {
    std::string line = "{";
    for (const auto& f : fields) line += cat(json_string(f.key), ":", json_string(f.value), ",");
    return line + cat("\"level\":", json_string(name_of(level)), ",\"msg\":", json_string(message), ",\"time\":", json_string(time), "}");
}
}  // namespace

void configure_log(log_options options) {
    const std::lock_guard lock(state().guard);
    threshold = options.level;
    state().options = std::move(options);
}

bool log_enabled(log_level level) noexcept { return level >= threshold.load(std::memory_order_relaxed); }

void log(log_level level, std::string_view message, std::initializer_list<log_field> fields) {
    log(level, message, std::span<const log_field>(fields.begin(), fields.size()));
}

void log(log_level level, std::string_view message, std::span<const log_field> fields) {
    if (!log_enabled(level)) return;
    const std::lock_guard lock(state().guard);
    const auto& options = state().options;
    if (options.sink) {
        options.sink(level, message, fields);
        return;
    }
    const auto now = std::chrono::floor<std::chrono::seconds>(std::chrono::system_clock::now());
    const std::string time = format_time(now);
    std::string line = options.format == log_format::json ? json_line(time, level, message, fields) : text_line(time, level, message, fields);
    line += '\n';
    // A log that cannot be written has nowhere to complain.
    [[maybe_unused]] const auto written = ::write(options.fd, line.data(), line.size());
}

}  // namespace cobuild

module;
#include <array>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

module cobuild.base;

namespace cobuild {

std::string format_bytes(std::uint64_t bytes) {
    if (bytes < 1000) return cat(bytes, "B");
    static constexpr std::array<const char*, 6> units{"kB", "MB", "GB", "TB", "PB", "EB"};
    double value = static_cast<double>(bytes) / 1000;
    std::size_t unit = 0;
    while (value >= 1000 && unit + 1 < units.size()) {
        value /= 1000;
        ++unit;
    }
    std::array<char, 48> out;
    const int n = std::snprintf(out.data(), out.size(), "%.2f%s", value, units[unit]);
    return {out.data(), static_cast<std::size_t>(n)};
}

std::uint64_t parse_bytes(std::string_view text) {
    const auto bad = [&] { return error{errc::invalid, cat("not a size: ", quoted(text), " (for example 512, 64k, 40MB or 1.5GiB)")}; };
    const std::string_view all = trim(text);
    const auto unit_at = all.find_first_not_of("0123456789.");
    const std::string_view number = all.substr(0, unit_at);
    std::string unit = unit_at == std::string_view::npos ? "" : to_lower(trim(all.substr(unit_at)));
    double value = 0;
    const auto [end, ec] = std::from_chars(number.data(), number.data() + number.size(), value);
    if (number.empty() || ec != std::errc{} || end != number.data() + number.size()) throw bad();
    if (unit.ends_with("ib"))
        unit.resize(unit.size() - 2);
    else if (unit.size() > 1 && unit.back() == 'b')
        unit.pop_back();
    int power = 0;
    if (!unit.empty() && unit != "b") {
        static constexpr std::string_view letters = "kmgtp";
        const auto at = letters.find(unit);
        if (unit.size() != 1 || at == std::string_view::npos) throw bad();
        power = static_cast<int>(at) + 1;
    }
    const double result = std::ldexp(value, 10 * power);
    if (!(result < 9.2e18)) throw bad();
    return static_cast<std::uint64_t>(result);
}

namespace {
struct unit {
    std::string_view name;
    double nanoseconds;
};
constexpr std::array<unit, 8> duration_units{{{"ns", 1}, {"us", 1e3}, {"µs", 1e3}, {"μs", 1e3}, {"ms", 1e6}, {"s", 1e9}, {"m", 60e9}, {"h", 3600e9}}};
}  // namespace

nanoseconds parse_duration(std::string_view text) {
    const auto bad = [&] { return error{errc::invalid, cat("not a duration: ", quoted(text), " (for example 30s, 1m30s or 250ms)")}; };
    std::string_view rest = text;
    const bool negative = rest.starts_with('-');
    if (negative || rest.starts_with('+')) rest.remove_prefix(1);
    if (rest == "0") return nanoseconds{0};
    if (rest.empty()) throw bad();
    double total = 0;
    while (!rest.empty()) {
        const auto unit_at = rest.find_first_not_of("0123456789.");
        if (unit_at == 0 || unit_at == std::string_view::npos) throw bad();
        double value = 0;
        const auto [end, ec] = std::from_chars(rest.data(), rest.data() + unit_at, value);
        if (ec != std::errc{} || end != rest.data() + unit_at) throw bad();
        rest.remove_prefix(unit_at);
        const auto next = rest.find_first_of("0123456789.");
        const std::string_view name = rest.substr(0, next);
        bool known = false;
        for (const auto& u : duration_units)
            if (u.name == name) {
                total += value * u.nanoseconds;
                known = true;
            }
        if (!known) throw bad();
        rest.remove_prefix(name.size());
    }
    if (!(total < 9.2e18)) throw bad();
    return nanoseconds{static_cast<std::int64_t>(std::llround(negative ? -total : total))};
}

std::string format_duration(nanoseconds d) {
    const std::int64_t count = d.count();
    if (count == 0) return "0s";
    const std::uint64_t magnitude = count < 0 ? 0 - static_cast<std::uint64_t>(count) : static_cast<std::uint64_t>(count);
    const std::string sign = count < 0 ? "-" : "";
    const auto decimal = [](std::uint64_t value, std::uint64_t scale, int places) {
        std::string out = cat(value / scale);
        if (std::uint64_t fraction = value % scale; fraction != 0) {
            std::string digits = cat(fraction);
            digits.insert(0, static_cast<std::size_t>(places) - digits.size(), '0');
            digits.erase(digits.find_last_not_of('0') + 1);
            out += "." + digits;
        }
        return out;
    };
    if (magnitude < 1000) return cat(sign, magnitude, "ns");
    if (magnitude < 1000000) return cat(sign, decimal(magnitude, 1000, 3), "µs");
    if (magnitude < 1000000000) return cat(sign, decimal(magnitude, 1000000, 6), "ms");
    const std::uint64_t hours = magnitude / 3600000000000;
    const std::uint64_t minutes = magnitude / 60000000000 % 60;
    std::string out = sign;
    if (hours > 0) out += cat(hours, "h");
    if (hours > 0 || minutes > 0) out += cat(minutes, "m");
    return out + decimal(magnitude % 60000000000, 1000000000, 9) + "s";
}

std::string format_time(std::chrono::sys_time<nanoseconds> t) {
    const auto seconds = std::chrono::floor<std::chrono::seconds>(t);
    const auto days = std::chrono::floor<std::chrono::days>(t);
    const std::chrono::year_month_day date{days};
    const std::int64_t of_day = (seconds - days).count();
    std::array<char, 64> out;
    int n = std::snprintf(out.data(), out.size(), "%04d-%02u-%02uT%02d:%02d:%02d", static_cast<int>(date.year()), static_cast<unsigned>(date.month()),
                          static_cast<unsigned>(date.day()), static_cast<int>(of_day / 3600), static_cast<int>(of_day / 60 % 60),
                          static_cast<int>(of_day % 60));
    std::string text(out.data(), static_cast<std::size_t>(n));
    if (const auto fraction = (t - seconds).count(); fraction != 0) {
        n = std::snprintf(out.data(), out.size(), ".%09lld", static_cast<long long>(fraction));
        text.append(out.data(), static_cast<std::size_t>(n));
        text.erase(text.find_last_not_of('0') + 1);
    }
    return text + "Z";
}

std::optional<std::chrono::sys_time<nanoseconds>> parse_time(std::string_view text) {
    const auto number = [&](std::size_t at, std::size_t size) -> std::optional<int> {
        int value = 0;
        if (text.size() < at + size) return std::nullopt;
        const auto [end, ec] = std::from_chars(text.data() + at, text.data() + at + size, value);
        if (ec != std::errc{} || end != text.data() + at + size) return std::nullopt;
        return value;
    };
    const auto year = number(0, 4), month = number(5, 2), day = number(8, 2), hour = number(11, 2), minute = number(14, 2), second = number(17, 2);
    if (!year || !month || !day || !hour || !minute || !second || text[4] != '-' || text[7] != '-' || (text[10] != 'T' && text[10] != 't') ||
        text[13] != ':' || text[16] != ':')
        return std::nullopt;
    const std::chrono::year_month_day date{std::chrono::year{*year}, std::chrono::month{static_cast<unsigned>(*month)},
                                           std::chrono::day{static_cast<unsigned>(*day)}};
    if (!date.ok() || *hour > 23 || *minute > 59 || *second > 60) return std::nullopt;
    std::chrono::sys_time<nanoseconds> t = std::chrono::sys_days{date};
    t += std::chrono::hours{*hour} + std::chrono::minutes{*minute} + std::chrono::seconds{*second};
    std::size_t at = 19;
    if (at < text.size() && text[at] == '.') {
        std::int64_t scale = 100000000;
        for (++at; at < text.size() && text[at] >= '0' && text[at] <= '9'; ++at, scale /= 10) t += nanoseconds{(text[at] - '0') * scale};
    }
    if (at >= text.size()) return std::nullopt;
    if (text.substr(at) == "Z" || text.substr(at) == "z") return t;
    const auto zone_hour = number(at + 1, 2), zone_minute = number(at + 4, 2);
    if ((text[at] != '+' && text[at] != '-') || !zone_hour || !zone_minute || text.size() != at + 6) return std::nullopt;
    const auto offset = std::chrono::hours{*zone_hour} + std::chrono::minutes{*zone_minute};
    return text[at] == '+' ? t - offset : t + offset;
}

}  // namespace cobuild

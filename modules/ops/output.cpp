module;
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

module cobuild.ops;

import cobuild.base;
import :bodies;

namespace cobuild::ops {

namespace {

constexpr std::size_t kept_tail = std::size_t{256} << 10;

std::optional<std::uint64_t> limit_in(const char* variable) {
    const char* text = std::getenv(variable);
    if (text == nullptr) return std::nullopt;
    const std::string_view all(text);
    std::int64_t value = -1;
    const auto [end, bad] = std::from_chars(all.data(), all.data() + all.size(), value);
    if (bad != std::errc{} || end != all.data() + all.size() || value < 0) return std::nullopt;
    return static_cast<std::uint64_t>(value);
}

/// "2MiB", "1000B": binary units where they come out even.
std::string size_text(std::uint64_t n) {
    for (const auto& [unit, shift] : {std::pair{"GiB", 30}, std::pair{"MiB", 20}, std::pair{"KiB", 10}})
        if (n != 0 && n % (std::uint64_t{1} << shift) == 0) return cat(n >> shift, unit);
    return cat(n, "B");
}

}  // namespace

output_limit::output_limit() : size_(limit_in("BUILDKIT_STEP_LOG_MAX_SIZE")), speed_(limit_in("BUILDKIT_STEP_LOG_MAX_SPEED")) {}

std::string output_limit::pass(std::string_view data) {
    if (!size_ && !speed_) return std::string(data);
    std::uint64_t left = size_ ? *size_ - std::min(*size_, shown_) : data.size();
    bool by_speed = false;
    if (speed_) {
        const auto now = std::chrono::steady_clock::now();
        if (!begun_) begun_ = now;
        const double seconds = 1 + std::chrono::duration<double>(now - *begun_).count();
        const auto allowed = static_cast<std::uint64_t>(static_cast<double>(*speed_) * seconds);
        const auto by_now = allowed - std::min(allowed, shown_);
        by_speed = by_now < left;
        left = std::min(left, by_now);
    }
    std::string out(data.substr(0, static_cast<std::size_t>(std::min<std::uint64_t>(left, data.size()))));
    shown_ += out.size();
    const auto held_back = data.substr(out.size());
    if (held_back.empty()) return out;
    if (tail_.empty())
        out += cat("\n[output clipped, log ", by_speed ? "speed " : "limit ", by_speed ? cat(size_text(*speed_), "/s") : size_text(*size_),
                   " reached]\n");
    tail_ += held_back;
    if (tail_.size() > 2 * kept_tail) tail_.erase(0, tail_.size() - kept_tail);
    return out;
}

std::string output_limit::rest() {
    auto out = std::exchange(tail_, {});
    if (out.size() > kept_tail) out.erase(0, out.size() - kept_tail);
    return out;
}

}  // namespace cobuild::ops

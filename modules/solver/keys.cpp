module;
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

module cobuild.solver.internal;

import cobuild.base;

namespace cobuild::solver {

namespace {

void add_number(std::string& to, std::uint64_t n) {
    for (int shift = 56; shift >= 0; shift -= 8) to.push_back(static_cast<char>(n >> shift & 0xff));
}

key derive(std::string_view kind, const digest& op, bool ephemeral, std::span<const key_part> inputs) {
    std::string text;
    text.reserve(kind.size() + digest::size + inputs.size() * (digest::size + 24));
    text += kind;
    text += text_of(op.raw());
    bool passing = ephemeral;
    for (const auto& part : inputs) {
        text.push_back(part.content ? 'c' : 'k');
        text += text_of(part.from.value.raw());
        if (part.content) continue;
        passing |= part.from.ephemeral;
        add_number(text, part.output);
        add_number(text, part.selector.size());
        text += part.selector;
    }
    thread_local hasher h;
    return {h.update(text).finish(), passing};
}

}  // namespace

key fast_key(const digest& op, bool ephemeral, std::span<const key_part> inputs) { return derive("cobuild.fast.1\n", op, ephemeral, inputs); }
key content_key(const digest& op, bool ephemeral, std::span<const key_part> inputs) { return derive("cobuild.content.1\n", op, ephemeral, inputs); }
key fresh_key(const key& fast) { return {digest::of(cat("cobuild.fresh.1\n", fast.value.hex(), random_id())), fast.ephemeral}; }

std::string encode_texts(const std::vector<std::string>& texts) {
    std::string out;
    for (const auto& t : texts) out += cat(t.size(), ':', t);
    return out;
}

std::optional<std::vector<std::string>> decode_texts(std::string_view text) {
    std::vector<std::string> out;
    while (!text.empty()) {
        std::size_t size = 0;
        const auto colon = text.find(':');
        const auto head = text.substr(0, colon);
        const auto read = std::from_chars(head.data(), head.data() + head.size(), size);
        if (colon == std::string_view::npos || read.ec != std::errc{} || read.ptr != head.data() + head.size() || size > text.size() - colon - 1)
            return std::nullopt;
        out.emplace_back(text.substr(colon + 1, size));
        text.remove_prefix(colon + 1 + size);
    }
    return out;
}

namespace {

constexpr std::array<std::string_view, 16> state_names{"unused",
                                                       "describing",
                                                       "waiting for keys",
                                                       "looking up",
                                                       "waiting for content",
                                                       "hashing",
                                                       "keyed",
                                                       "loading",
                                                       "waiting for inputs",
                                                       "preparing",
                                                       "queued",
                                                       "running",
                                                       "saving",
                                                       "done",
                                                       "failed",
                                                       "canceled"};

}  // namespace

std::string_view to_string(vertex_state s) noexcept { return state_names[static_cast<std::size_t>(s)]; }

bool is_final(vertex_state s) noexcept { return s == vertex_state::done || s == vertex_state::failed || s == vertex_state::canceled; }

bool may_follow(vertex_state from, vertex_state to) noexcept {
    using enum vertex_state;
    if (is_final(from)) return false;
    if (to == canceled || to == failed) return true;
    const auto in_flight = [](vertex_state s) { return s == preparing || s == queued || s == running || s == saving; };
    switch (from) {
        case unused: return to == describing;
        case describing: return to == waiting_keys;
        case waiting_keys: return to == looking_up;
        case looking_up: return to == waiting_content || to == keyed || to == waiting_inputs;
        case waiting_content: return to == hashing;
        case hashing: return to == looking_up;
        case keyed: return to == loading || to == waiting_inputs;
        case loading: return to == done || to == waiting_inputs;
        case waiting_inputs: return to == loading || in_flight(to);
        case preparing:
        case queued:
        case running:
        case saving: return in_flight(to) || to == done || to == keyed || to == waiting_inputs;
        default: return false;
    }
}

}  // namespace cobuild::solver

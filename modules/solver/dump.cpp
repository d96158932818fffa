module;
#include <chrono>
#include <cstddef>
#include <string>
#include <utility>

#include <boost/asio/awaitable.hpp>

module cobuild.solver.internal;

namespace cobuild::solver {

void build::dump(std::string& out) const {
    const auto now = std::chrono::steady_clock::now();
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
        const auto& n = nodes_[i];
        if (is_final(n.state) || n.state == vertex_state::unused || (n.state == vertex_state::keyed && !n.wanted)) continue;
        const auto waited = std::chrono::duration_cast<nanoseconds>(std::chrono::round<std::chrono::milliseconds>(now - n.since));
        out += cat("build ", id_, ": ", quoted(n.v->name), ": ", waits_for(i), ", for ", format_duration(waited), '\n');
    }
}

std::string build::waits_for(std::size_t i) const {
    const auto& n = nodes_[i];
    const auto first_input = [&](bool key, bool only_content) -> std::string {
        for (std::size_t slot = 0; slot < n.inputs.size(); ++slot) {
            const auto& below = nodes_[n.inputs[slot].vertex];
            if (key ? below.has_key : below.has_result) continue;
            if (only_content && !input(n, slot).content_of) continue;
            return cat(n.missing, n.missing == 1 ? " input" : " inputs", ", of them ", quoted(below.v->name), " (", to_string(below.state), ")");
        }
        return "its turn";
    };
    switch (n.state) {
        case vertex_state::waiting_keys: return cat("waits for the keys of ", first_input(true, false));
        case vertex_state::waiting_content: return cat("waits for the results of ", first_input(false, true), " to see what it reads");
        case vertex_state::waiting_inputs: return cat("waits for the results of ", first_input(false, false));
        case vertex_state::looking_up: return "looks into the cache storage";
        case vertex_state::preparing: return "waits for locks of its own";
        case vertex_state::queued: return cat("waits for a slot: ", engine_->slots.in_use(), " in use, ", engine_->slots.waiting(), " waiting");
        case vertex_state::running:
        case vertex_state::saving:
            return cat("is ", to_string(n.state), n.flight ? cat(", shared by ", n.flight->subscribers.size()) : std::string());
        default: return cat("is ", to_string(n.state));
    }
}

}  // namespace cobuild::solver

#include "progress_common.hpp"

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <variant>

#include "terminal.hpp"

namespace cobuild::app {

std::vector<std::string> shown_vertex::add_output(const std::string& data) {
    std::vector<std::string> lines;
    for (const char c : data) {
        if (c != '\n') {
            if (partial.size() < 16384) partial += c;
            continue;
        }
        if (!partial.empty() && partial.back() == '\r') partial.pop_back();
        if (const auto cr = partial.rfind('\r'); cr != std::string::npos) partial.erase(0, cr + 1);
        last_lines.push_back(partial);
        if (last_lines.size() > kept_lines) last_lines.pop_front();
        lines.push_back(std::move(partial));
        partial.clear();
    }
    return lines;
}

progress::status& shown_vertex::status(const progress::status& s) {
    const auto [at, fresh] = status_index.try_emplace(s.id, statuses.size());
    if (fresh)
        statuses.push_back(s);
    else
        statuses[at->second] = s;
    return statuses[at->second];
}

shown_vertex& build_view::at(const digest& id) {
    auto& slot = index_[id];
    if (slot == nullptr) {
        order_.push_back(std::make_unique<shown_vertex>());
        slot = order_.back().get();
        slot->state.id = id;
    }
    return *slot;
}

shown_vertex& build_view::apply(const progress::event& e) {
    if (const auto* v = std::get_if<progress::vertex>(&e)) {
        auto& shown = at(v->id);
        shown.state = *v;
        return shown;
    }
    if (const auto* s = std::get_if<progress::status>(&e)) {
        auto& shown = at(s->vertex);
        shown.status(*s);
        return shown;
    }
    if (const auto* l = std::get_if<progress::log>(&e)) return at(l->vertex);
    return at(std::get<progress::warning>(e).vertex);
}

std::string seconds_text(nanoseconds d) {
    char out[32];
    std::snprintf(out, sizeof out, "%.1fs", std::chrono::duration<double>(d).count());
    return out;
}

std::string amount_text(const progress::status& s) {
    if (s.total > 0) return cat(format_bytes(static_cast<std::uint64_t>(s.current)), " / ", format_bytes(static_cast<std::uint64_t>(s.total)));
    return s.current > 0 ? format_bytes(static_cast<std::uint64_t>(s.current)) : "";
}

std::string printable(std::string_view text) {
    std::string out;
    for (const char c : text)
        if (c == '\t' || (static_cast<unsigned char>(c) >= 0x20 && c != 0x7f)) out += c;
    return out;
}

std::string failure_text(const build_view& view) {
    std::string out;
    for (const auto& v : view.all()) {
        if (v->state.error.empty() || v->state.canceled) continue;
        out += cat("------\n > ", printable(v->state.name), ":\n");
        for (const auto& line : v->last_lines) out += cat(printable(line), "\n");
        if (!v->partial.empty()) out += cat(printable(v->partial), "\n");
        out += "------\n";
    }
    return out;
}

namespace {
/// Shows nothing but, at the end, what failed.
class quiet_display final : public progress_display {
public:
    void on_event(const progress::event& e) override {
        auto& v = view_.apply(e);
        if (const auto* l = std::get_if<progress::log>(&e)) v.add_output(l->data);
    }
    void finish() override { std::cerr << failure_text(view_); }

private:
    build_view view_;
};
}  // namespace

std::shared_ptr<progress_display> make_quiet() { return std::make_shared<quiet_display>(); }

std::shared_ptr<progress_display> make_display(const std::string& asked, const std::string& title) {
    std::string mode = asked;
    if (mode.empty() || mode == "auto") {
        const char* environment = std::getenv("BUILDKIT_PROGRESS");
        mode = environment != nullptr && *environment != '\0' ? environment : "auto";
    }
    if (mode == "auto") mode = ::isatty(2) != 0 ? "tty" : "plain";
    if (mode == "plain") return make_plain(title);
    if (mode == "tty") return make_tty(title);
    if (mode == "rawjson") return make_rawjson(std::cerr);
    if (mode == "quiet" || mode == "none") return make_quiet();
    throw error{errc::invalid, cat("--progress: unknown form ", quoted(mode), " (auto, plain, tty, quiet and rawjson are known)")};
}

}  // namespace cobuild::app

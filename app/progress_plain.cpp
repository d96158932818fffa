// Progress as stable text: blocks of "#N ..." lines, one vertex at a time, as BuildKit's plain form.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <iostream>
#include <map>
#include <utility>
#include <variant>

#include "progress_common.hpp"
#include "terminal.hpp"

namespace cobuild::app {

namespace {

using clock = std::chrono::steady_clock;

class plain_display final : public progress_display {
public:
    explicit plain_display(std::string title) : title_(std::move(title)) {}

    void on_event(const progress::event& e) override {
        auto& v = view_.apply(e);
        auto& p = pending_[&v];
        if (std::holds_alternative<progress::vertex>(e))
            note_vertex(v, p);
        else if (const auto* s = std::get_if<progress::status>(&e))
            note_status(*s, p);
        else if (const auto* l = std::get_if<progress::log>(&e))
            note_output(v, p, *l);
        else
            p.lines.push_back(cat("WARN: ", printable(std::get<progress::warning>(e).message)));
        print(&v);
    }

    void finish() override {
        for (const auto& v : view_.all()) {
            auto& p = pending_[v.get()];
            if (!v->partial.empty() && v->state.error.empty()) p.lines.push_back(std::exchange(v->partial, {}));
            if (!p.lines.empty()) show(*v, p);
        }
        leave();
        std::cerr << failure_text(view_) << std::flush;
    }

private:
    struct pending {
        std::vector<std::string> lines;
        std::map<std::string, std::pair<clock::time_point, std::int64_t>> shown_status;
        bool over = false;
        bool named = false;
    };

    static std::string status_line(const progress::status& s) {
        const auto amount = amount_text(s);
        std::string line = printable(s.id);
        if (!amount.empty()) line += " " + amount;
        if (s.started) {
            const auto end = s.completed.value_or(s.timestamp);
            line += " " + seconds_text(end - *s.started);
        }
        return s.completed ? line + " done" : line;
    }

    void note_vertex(shown_vertex& v, pending& p) {
        if (v.state.started && !p.named) {
            p.named = true;
            p.lines.push_back(printable(v.state.name));
        }
        if (!v.state.completed) {
            p.over = false;
            return;
        }
        if (p.over) return;
        p.over = true;
        if (!v.partial.empty()) p.lines.push_back(cat(output_time(v), " ", printable(std::exchange(v.partial, {}))));
        if (v.state.canceled)
            p.lines.emplace_back("CANCELED");
        else if (!v.state.error.empty())
            p.lines.push_back(cat("ERROR: ", printable(v.state.error)));
        else if (v.state.cached)
            p.lines.emplace_back("CACHED");
        else
            p.lines.push_back(cat("DONE ", seconds_text(*v.state.completed - v.state.started.value_or(*v.state.completed))));
    }

    static void note_status(const progress::status& s, pending& p) {
        const auto now = clock::now();
        const auto [at, fresh] = p.shown_status.try_emplace(s.id, now, s.current);
        // A line for every twentieth part or five seconds, whichever comes first.
        const bool moved = s.total > 0 && s.current - at->second.second >= s.total / 20;
        if (!fresh && !s.completed && !moved && now - at->second.first < std::chrono::seconds{5}) return;
        at->second = {now, s.current};
        p.lines.push_back(status_line(s));
    }

    static std::string output_time(const shown_vertex& v, std::optional<progress::time_point> when = {}) {
        const auto now = when.value_or(v.state.completed.value_or(progress::time_point{}));
        const double seconds = v.state.started && now > *v.state.started ? std::chrono::duration<double>(now - *v.state.started).count() : 0.0;
        char out[32];
        std::snprintf(out, sizeof out, seconds < 10 ? "%.3f" : seconds < 100 ? "%.2f" : "%.1f", seconds);
        return out;
    }

    static void note_output(shown_vertex& v, pending& p, const progress::log& l) {
        for (const auto& line : v.add_output(l.data)) p.lines.push_back(cat(output_time(v, l.timestamp), " ", printable(line)));
    }

    /// One vertex has the screen; another takes it when that one ended, was silent for 5 s or had it for 10 s.
    void print(shown_vertex* active) {
        const auto now = clock::now();
        if (current_ == nullptr || current_ == active || pending_[current_].over || now - last_line_ > std::chrono::seconds{5} ||
            now - since_ > std::chrono::seconds{10}) {
            if (current_ != nullptr && pending_[current_].over) current_ = nullptr;
            for (const auto& v : view_.all())
                if (auto& p = pending_[v.get()]; p.over && !p.lines.empty()) show(*v, p);
            if (current_ == nullptr || current_ == active || now - since_ > std::chrono::seconds{5}) {
                if (auto& p = pending_[active]; !p.lines.empty()) show(*active, p);
            }
        }
        // Whose turn it is now may have no more to say for long.
        for (const auto& v : view_.all()) {
            if (current_ != nullptr) break;
            if (auto& p = pending_[v.get()]; !p.lines.empty()) show(*v, p);
        }
    }

    void leave() {
        if (current_ != nullptr && !pending_[current_].over) std::cerr << "#" << current_->number << " ...\n";
        current_ = nullptr;
    }

    void show(shown_vertex& v, pending& p) {
        std::string text;
        if (!started_) {
            started_ = true;
            if (!title_.empty()) text += cat("#0 building ", printable(title_), "\n");
        }
        if (shown_ != &v) {
            std::cerr << text;
            text.clear();
            leave();
            if (shown_ != nullptr || !title_.empty()) text += "\n";
            if (v.number != 0) text += cat("#", v.number, " ", printable(v.state.name), "\n");
            since_ = clock::now();
        }
        if (v.number == 0) v.number = ++numbers_;
        for (const auto& line : p.lines) text += cat("#", v.number, " ", line, "\n");
        p.lines.clear();
        current_ = p.over ? nullptr : &v;
        shown_ = &v;
        last_line_ = clock::now();
        std::cerr << text << std::flush;
    }

    std::string title_;
    build_view view_;
    std::map<const shown_vertex*, pending> pending_;
    shown_vertex* current_ = nullptr;      ///< has the screen and is not over
    const shown_vertex* shown_ = nullptr;  ///< whose lines were printed last
    clock::time_point since_{}, last_line_{};
    std::size_t numbers_ = 0;
    bool started_ = false;
};

}  // namespace

std::shared_ptr<progress_display> make_plain(std::string title) { return std::make_shared<plain_display>(std::move(title)); }

}  // namespace cobuild::app

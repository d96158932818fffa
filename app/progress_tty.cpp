// Progress on a terminal: one list that is redrawn in place.
#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <mutex>
#include <string>
#include <thread>
#include <variant>

#include "progress_common.hpp"
#include "terminal.hpp"

namespace cobuild::app {

namespace {

struct colors {
    const char *run = "\033[34m", *cancel = "\033[33m", *error = "\033[31m", *off = "\033[0m";
};

class tty_display final : public progress_display {
public:
    explicit tty_display(std::string title) : title_(std::move(title)) {
        catch_log();
        thread_ = std::thread([this] { serve(); });
        if (const char* no = std::getenv("NO_COLOR"); no != nullptr && *no != '\0') colors_ = {"", "", "", ""};
    }
    ~tty_display() override { stop(); }

    void on_event(const progress::event& e) override {
        const std::lock_guard lock(guard_);
        auto& v = view_.apply(e);
        if (const auto* l = std::get_if<progress::log>(&e)) v.add_output(l->data);
        if (const auto* w = std::get_if<progress::warning>(&e)) warnings_.push_back(w->message);
    }

    void finish() override {
        stop();
        draw(true);
        std::string text;
        for (const auto& w : warnings_) text += cat(" ! ", printable(w), "\n");
        std::cerr << text << failure_text(view_) << std::flush;
    }

private:
    void stop() {
        {
            const std::lock_guard lock(guard_);
            over_ = true;
        }
        wake_.notify_all();
        if (thread_.joinable()) thread_.join();
        if (log_in_) log_to(2);
    }

    /// Log lines would land in the middle of the list: they come through a pipe and are written above it. A line that finds
    /// the pipe full is lost rather than waited for.
    void catch_log() {
        std::array<int, 2> ends{};
        if (::pipe2(ends.data(), O_CLOEXEC | O_NONBLOCK) != 0) return;
        log_out_.reset(ends[0]);
        log_in_.reset(ends[1]);
        ::fcntl(log_in_.get(), F_SETPIPE_SZ, 1 << 20);
        log_to(log_in_.get());
    }

    std::string caught_log() {
        if (!log_out_) return {};
        std::array<char, 65536> buffer;
        for (ssize_t n = 0; (n = ::read(log_out_.get(), buffer.data(), buffer.size())) > 0;) log_.append(buffer.data(), static_cast<std::size_t>(n));
        const auto whole = log_.rfind('\n') + 1;
        std::string out = log_.substr(0, whole);
        log_.erase(0, whole);
        return out;
    }

    void serve() {
        std::unique_lock lock(guard_);
        while (!over_) {
            wake_.wait_for(lock, std::chrono::milliseconds{100}, [this] { return over_; });
            if (!over_) draw(false);
        }
    }

    static std::string fit(const std::string& left, const std::string& right, std::size_t width) {
        if (width < 20) return left;
        const std::size_t room = width - right.size() - 1;
        std::string text = left.size() > room ? left.substr(0, room - 3) + "..." : left + std::string(room - left.size(), ' ');
        return text + " " + right;
    }

    std::vector<std::string> lines_of(const shown_vertex& v, progress::time_point now, std::size_t width) const {
        std::vector<std::string> out;
        const auto& s = v.state;
        if (!s.started) return out;
        const std::string time = seconds_text(s.completed.value_or(now) - *s.started);
        std::string mark;
        const char* color = s.completed ? "" : colors_.run;
        if (s.canceled)
            mark = "CANCELED ", color = colors_.cancel;
        else if (!s.error.empty())
            mark = "ERROR ", color = colors_.error;
        else if (s.cached)
            mark = "CACHED ";
        else if (s.completed)
            color = colors_.run;
        out.push_back(color + fit(cat(" => ", mark, printable(s.name)), time, width) + (*color != '\0' ? colors_.off : ""));
        if (s.completed) return out;
        for (const auto& status : v.statuses) {
            if (status.completed) continue;
            const std::string spent = status.started ? seconds_text(now - *status.started) : "";
            out.push_back(fit(cat(" => => ", printable(status.id), " ", amount_text(status)), spent, width));
        }
        const std::size_t shown = std::min<std::size_t>(6, v.last_lines.size());
        for (std::size_t i = v.last_lines.size() - shown; i < v.last_lines.size(); ++i)
            out.push_back(fit(cat(" => => # ", printable(v.last_lines[i])), "", width));
        return out;
    }

    void draw(bool last) {
        winsize size{};
        if (::ioctl(2, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) size = {24, 80, 0, 0};
        const auto now = std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now());
        std::size_t done = 0, known = 0;
        std::vector<std::string> finished, running;
        for (const auto& v : view_.all()) {
            ++known;
            if (v->state.completed) ++done;
            auto lines = lines_of(*v, now, size.ws_col);
            auto& target = v->state.completed ? finished : running;
            target.insert(target.end(), lines.begin(), lines.end());
        }
        // What is still running stays in sight; finished lines leave by the top when the screen is too low.
        const std::size_t room = size.ws_row > 3 ? size.ws_row - 2U : 1U;
        if (!last && finished.size() + running.size() > room) {
            const std::size_t keep = running.size() >= room ? 0 : room - running.size();
            finished.erase(finished.begin(), finished.end() - static_cast<std::ptrdiff_t>(std::min(keep, finished.size())));
            if (running.size() > room) running.resize(room);
        }
        std::string text;
        if (drawn_ > 0) text += cat("\033[", drawn_, "A");
        text += cat("\r\033[J", caught_log());
        text += cat("[+] Building ", seconds_text(now - begun_), " (", done, "/", known, ")", last ? " FINISHED" : "", "  ", printable(title_), "\n");
        for (const auto& l : finished) text += l + "\n";
        for (const auto& l : running) text += l + "\n";
        drawn_ = 1 + finished.size() + running.size();
        std::cerr << text << std::flush;
    }

    std::string title_;
    colors colors_;
    std::mutex guard_;
    std::condition_variable wake_;
    build_view view_;
    std::vector<std::string> warnings_;
    progress::time_point begun_ = std::chrono::time_point_cast<nanoseconds>(std::chrono::system_clock::now());
    std::size_t drawn_ = 0;
    bool over_ = false;
    unique_fd log_out_, log_in_;
    std::string log_;
    std::thread thread_;
};

}  // namespace

std::shared_ptr<progress_display> make_tty(std::string title) { return std::make_shared<tty_display>(std::move(title)); }

}  // namespace cobuild::app

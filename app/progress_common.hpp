// What the forms of progress share: the state of the build as far as events told it.
#pragma once

#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

import cobuild.base;
import cobuild.progress;

namespace cobuild::app {

/// One vertex with its status lines and the last lines of its output.
struct shown_vertex {
    progress::vertex state;
    std::map<std::string, std::size_t> status_index;
    std::vector<progress::status> statuses;
    std::string partial;                 ///< output not yet ended by a newline
    std::deque<std::string> last_lines;  ///< at most kept_lines
    std::size_t number = 0;              ///< plain: N of "#N", 0 before its first line

    static constexpr std::size_t kept_lines = 10;
    /// Splits output into whole lines; carriage returns overwrite, as on a terminal.
    std::vector<std::string> add_output(const std::string& data);
    progress::status& status(const progress::status& s);
};

class build_view {
public:
    /// The vertex an event is about, made when new, in order of appearance.
    shown_vertex& at(const digest& id);
    shown_vertex& apply(const progress::event& e);
    [[nodiscard]] const std::vector<std::unique_ptr<shown_vertex>>& all() const { return order_; }

private:
    std::map<digest, shown_vertex*> index_;
    std::vector<std::unique_ptr<shown_vertex>> order_;
};

/// "0.3s" as BuildKit writes times: one decimal.
std::string seconds_text(nanoseconds d);
/// "1.21MB / 3.40MB", or the current value alone.
std::string amount_text(const progress::status& s);
/// The summary of failed steps that ends every form but rawjson.
std::string failure_text(const build_view& view);
/// Control characters made harmless; tabs stay.
std::string printable(std::string_view text);

struct progress_display;
std::shared_ptr<progress_display> make_plain(std::string title);
std::shared_ptr<progress_display> make_tty(std::string title);
std::shared_ptr<progress_display> make_rawjson(std::ostream& out);
std::shared_ptr<progress_display> make_quiet();

}  // namespace cobuild::app

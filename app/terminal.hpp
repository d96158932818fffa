// Errors, signals and progress: what cobuild and buildctl show alike.
#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

import cobuild.base;
import cobuild.async;
import cobuild.progress;

namespace cobuild::app {

/// Exit codes, by the kind of error; docs/errors.md lists them.
int exit_code_for(const error& e);
/// "error: <sentence>" on stderr, with the place in the user's file where there is one.
void print_error(const error& e);

/// Level and form of log lines; they go to standard error.
void set_log(log_options options);
/// Where they go from now on, in the same level and form.
void log_to(int fd);

/// Turns Ctrl-C, TERM and HUP into a cancellation; a second signal kills running steps at once and ends the program.
/// One per process, made before any other thread.
class interrupt {
public:
    interrupt();
    ~interrupt();
    interrupt(const interrupt&) = delete;
    interrupt& operator=(const interrupt&) = delete;
    [[nodiscard]] async::cancel_token token() const;
    /// SIGHUP calls `f` from now on, on a thread of its own, and ends nothing. `f` does not throw.
    void on_hangup(std::function<void()> f);
    /// The signal that came, 0 when none.
    [[nodiscard]] int signal() const;

private:
    struct state;
    std::unique_ptr<state> state_;
};

/// How progress is shown; "auto" is tty on a terminal, else plain. Throws errc::invalid for another name.
struct progress_display : progress::sink {
    /// Prints what is still to be printed, failed steps' last lines included.
    virtual void finish() = 0;
};
std::shared_ptr<progress_display> make_display(const std::string& mode, const std::string& title);

/// The file appears whole, by rename. Throws errc::io.
void write_whole(const std::string& file, const std::string& text);

}  // namespace cobuild::app

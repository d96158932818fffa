// A build that goes on in another program. Stands after cli.hpp.
#pragma once

namespace cobuild::app {

/// A build that needs a frontend which only cobuildd can run.
struct hand_over {
    bool wanted = false;
    std::optional<std::string> dockerfile;  ///< read from standard input
};

/// What was read from standard input as the context is gone, unless that is a file.
bool can_hand_over(const build::build_request& asked);
/// This process becomes cobuildd, which runs the same command line.
[[noreturn]] void become_builder(const hand_over& next);
/// Refuses such frontends, and notes that one was wanted.
build::frontend_runner asks_for_more(std::shared_ptr<hand_over> next);

}  // namespace cobuild::app

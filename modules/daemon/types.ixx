/// Partition of cobuild.daemon: how a daemon is set up. See daemon.ixx.
module;
#include <memory>
#include <string>

#include <boost/asio/awaitable.hpp>

export module cobuild.daemon:types;

import cobuild.build;
import cobuild.config;

export namespace cobuild::daemon {

struct options {
    std::shared_ptr<build::engine> engine;
    config::configuration settings;
    std::string root;                 ///< the engine's state directory; clients' directories are kept below it
    bool allow_insecure_tcp = false;  ///< plain tcp on other than loopback is refused otherwise
    bool as_buildkitd = false;        ///< then it is only warned about, as BuildKit does
};

}  // namespace cobuild::daemon

#include "support/support.hpp"

#include <string>

import cobuild.base;
import cobuild.async;
import cobuild.process;
import cobuild.executor;

using namespace cobuild;

BOOST_AUTO_TEST_CASE(resolv_conf_for_a_sandbox_has_reachable_servers) {
    using executor::resolv_conf_text;
    const std::string host = "# local\nsearch a.test b.test\nnameserver 127.0.0.53\nnameserver 10.0.0.2\noptions ndots:2\n";
    BOOST_TEST(resolv_conf_text(host, {}, false) == "search a.test b.test\nnameserver 10.0.0.2\noptions ndots:2\n");
    BOOST_TEST(resolv_conf_text(host, {}, true) == "search a.test b.test\nnameserver 127.0.0.53\nnameserver 10.0.0.2\noptions ndots:2\n");
    BOOST_TEST(resolv_conf_text("nameserver ::1\n", {}, false).starts_with("nameserver 8.8.8.8\n"));
    BOOST_TEST(resolv_conf_text(host, {.nameservers = {"1.2.3.4"}, .search = {"c.test"}}, false) ==
               "search c.test\nnameserver 1.2.3.4\noptions ndots:2\n");
}

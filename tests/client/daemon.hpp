// What the suites of cobuild.client share: a session of ours, and the channel by which a daemon would call it.
// Stands after the imports.
#pragma once

namespace cobuild::test {

inline std::pair<unique_fd, unique_fd> socket_pair() {
    int fds[2];
    BOOST_REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
    return {unique_fd{fds[0]}, unique_fd{fds[1]}};
}

struct lent_session {
    client::session session;
    rpc::server server;
    std::shared_ptr<rpc::channel> daemon;
    lent_session(async::runtime& rt, client::session_options options)
        : session(rt.get_executor(), rt.pool(), std::move(options)), server(rt.get_executor(), rt.pool(), session.handler()) {
        auto [a, b] = socket_pair();
        server.adopt(std::move(a));
        daemon = rpc::channel::over(rt.get_executor(), std::move(b));
    }
};

}  // namespace cobuild::test

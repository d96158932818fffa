// A server of bearer tokens that a real docker-registry believes: JSON web tokens (RFC 7519) signed by ES256. Include before any
// import.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "certs.hpp"
#include "fake_registry.hpp"

namespace cobuild::test {

class token_server {
public:
    struct options {
        authority::pair signer;      ///< its certificate goes into each token
        std::string user, password;  ///< without them only pulling is allowed
        int seconds = 60;            ///< a token's life
    };
    explicit token_server(options o);

    /// For docker_registry::options.
    [[nodiscard]] std::string realm() const { return "http://" + server_.host() + "/token"; }
    /// The scopes of each request, joined by spaces.
    [[nodiscard]] std::vector<std::string> asked() const;

private:
    [[nodiscard]] fake_response answer(const fake_request& q) const;
    options options_;
    fake_registry server_;
};

}  // namespace cobuild::test

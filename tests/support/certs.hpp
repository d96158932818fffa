// Throw-away certificates and docker-registry processes for tests. Include before any import.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace cobuild::test {

/// An authority in `dir`, made with the openssl program: dir/<name>.pem and .key.
class authority {
public:
    authority(std::filesystem::path dir, std::string name);
    [[nodiscard]] std::string cert() const { return (dir_ / (name_ + ".pem")).string(); }
    struct pair {
        std::string cert, key;
    };
    /// A certificate for these names ("DNS:localhost", "IP:127.0.0.1"); `days` may be negative: expired.
    pair issue(const std::string& name, const std::string& subject_alt_names, int days = 30) const;

private:
    std::filesystem::path dir_;
    std::string name_;
};

/// /usr/bin/docker-registry on a free loopback port, killed at the end. Empty logs, own storage.
class docker_registry {
public:
    struct options {
        std::string tls_cert, tls_key, client_ca;
        std::string user, password;  ///< with htpasswd
        std::string token_realm;     ///< bearer tokens from there, for the service "test" by the issuer "test",
        std::string token_ca;        ///< signed under this certificate
        int port = 0;                ///< 0: any
    };
    docker_registry(std::filesystem::path dir, options o);
    ~docker_registry();
    [[nodiscard]] std::string host() const;
    /// False (with a message) where the program is not installed.
    static bool available();

private:
    int port_ = 0;
    int pid_ = -1;
};

/// Runs a shell command; throws with its output when it fails.
void shell(const std::string& command);

}  // namespace cobuild::test

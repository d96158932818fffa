// A registry in this process, on a loopback port of its own, that can be told to misbehave. Include before any import.
//
// It serves blobs and manifests given to it, takes uploads, and counts sockets. `on_request` sees every request first and
// may answer it itself. One thread a connection, blocking: simple on purpose. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace cobuild::test {

struct fake_request {
    std::string method;
    std::string target;                          ///< as it came
    std::string path;                            ///< without the query
    std::map<std::string, std::string> query;    ///< percent-decoded
    std::map<std::string, std::string> headers;  ///< names in lower case
    std::string body;
    unsigned connection = 0;  ///< counts sockets from 1
};

struct fake_response {
    int status = 200;
    std::vector<std::pair<std::string, std::string>> headers;
    std::string body;
    std::optional<std::size_t> cut_after;          ///< close the socket after so many bytes of the body
    std::optional<std::uint64_t> declared_length;  ///< Content-Length that is not the body's
    bool chunked = false;
    bool close = false;      ///< Connection: close, and close
    bool no_answer = false;  ///< close without a byte
    std::string raw;         ///< sent as it is instead of all that
};

struct fake_image {
    std::string config_digest, manifest_digest, manifest;
    std::vector<std::string> layer_digests;
};

class fake_registry {
public:
    struct options {
        std::string tls_cert, tls_key;  ///< PEM files; both or none
        std::string client_ca;          ///< with TLS: clients must show a certificate of this authority
        bool ranges = true;
        int port = 0;  ///< 0: any
    };
    fake_registry();
    explicit fake_registry(options o);
    ~fake_registry();

    [[nodiscard]] int port() const;
    [[nodiscard]] std::string host() const;  ///< "127.0.0.1:<port>"

    std::string add_blob(std::string bytes);  ///< returns its digest
    /// Under the tag (empty: by digest only). Returns its digest.
    std::string add_manifest(const std::string& repository, const std::string& tag, const std::string& media_type, std::string bytes);
    /// An OCI image of these layers for linux/amd64.
    fake_image add_image(const std::string& repository, const std::string& tag, const std::vector<std::string>& layers);
    [[nodiscard]] bool has_blob(const std::string& digest) const;

    /// Asked for every request before the registry itself, the body read or (before_body) not yet.
    using handler = std::function<std::optional<fake_response>(const fake_request&)>;
    void on_request(handler h);
    void before_body(handler h);

    [[nodiscard]] std::vector<fake_request> requests() const;
    [[nodiscard]] std::size_t count(std::string_view method, std::string_view path_part = "") const;
    void forget_requests();
    [[nodiscard]] std::size_t open_sockets() const;
    [[nodiscard]] std::size_t peak_sockets() const;
    /// The most blob bodies that were on their way at once.
    [[nodiscard]] std::size_t peak_blob_transfers() const;
    /// While held, blob bodies stop after their first byte.
    void hold_blobs(bool held);
    void wait_for_blob_transfers(std::size_t n);
    /// The next `times` uploads end after so many bytes of a body: these are kept, and the socket is closed.
    void cut_uploads(std::size_t after, unsigned times);
    /// Forgets the uploads that were begun.
    void forget_uploads();

private:
    struct state;
    std::unique_ptr<state> state_;
};

}  // namespace cobuild::test

/// What a TLS context holds. Not installed.
module;
#include <memory>
#include <string>
#include <vector>

struct ssl_ctx_st;
struct evp_pkey_st;
struct x509_st;

module cobuild.http:tls;

import cobuild.http;

namespace cobuild::http {

struct tls_context::state {
    ssl_ctx_st* ctx = nullptr;
    bool insecure = false;
    /// A client certificate with what it was issued through.
    struct identity {
        std::string file;
        evp_pkey_st* key = nullptr;
        std::vector<x509_st*> chain;  // its own first
    };
    std::vector<identity> identities;
    state() = default;
    state(const state&) = delete;
    state& operator=(const state&) = delete;
    ~state();
};

struct tls_access {
    /// The context's own, or the one with nothing but the system's trust.
    static std::shared_ptr<const tls_context::state> get(const tls_context& context);
};

}  // namespace cobuild::http

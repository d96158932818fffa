/// What a TLS context holds. Not installed.
module;
#include <memory>

struct ssl_ctx_st;

module cobuild.http:tls;

import cobuild.http;

namespace cobuild::http {

struct tls_context::state {
    ssl_ctx_st* ctx = nullptr;
    bool insecure = false;
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

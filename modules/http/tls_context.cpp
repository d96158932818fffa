module;
#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <boost/asio/awaitable.hpp>

module cobuild.http;

import :tls;

namespace cobuild::http {

namespace {

std::string openssl_reason() {
    const auto code = ERR_peek_last_error();
    ERR_clear_error();
    const char* text = code != 0 ? ERR_reason_error_string(code) : nullptr;
    return text != nullptr ? text : "no reason given";
}

[[noreturn]] void refuse_file(std::string_view what, const std::string& file) {
    const int saved = errno;
    if (::access(file.c_str(), R_OK) != 0) throw error{errc::invalid, cat("cannot read the ", what, ' ', quoted(file), ": ", std::strerror(errno))};
    errno = saved;
    throw error{errc::invalid, cat("cannot use the ", what, ' ', quoted(file), ": ", openssl_reason())};
}

void add_authority(ssl_ctx_st* ctx, const std::string& file) {
    ERR_clear_error();
    if (SSL_CTX_load_verify_file(ctx, file.c_str()) != 1) refuse_file("CA file", file);
}

void add_key_pair(tls_context::state& s, const key_pair& pair) {
    ERR_clear_error();
    using file = std::unique_ptr<BIO, decltype(&BIO_free_all)>;
    const file certs(BIO_new_file(pair.cert.c_str(), "r"), BIO_free_all);
    if (!certs) refuse_file("client certificate", pair.cert);
    s.identities.push_back({.file = pair.cert});
    auto& out = s.identities.back();
    while (auto* cert = PEM_read_bio_X509(certs.get(), nullptr, nullptr, nullptr)) out.chain.push_back(cert);
    if (out.chain.empty()) refuse_file("client certificate", pair.cert);
    ERR_clear_error();
    const file key(BIO_new_file(pair.key.c_str(), "r"), BIO_free_all);
    if (!key) refuse_file("client key", pair.key);
    // An empty passphrase instead of OpenSSL's question on the terminal.
    out.key = PEM_read_bio_PrivateKey(key.get(), nullptr, [](char*, int, int, void*) { return 0; }, nullptr);
    if (out.key == nullptr) refuse_file("client key", pair.key);
    if (X509_check_private_key(out.chain.front(), out.key) != 1)
        throw error{errc::invalid, cat("the client certificate ", quoted(pair.cert), " and the key ", quoted(pair.key), " do not belong together")};
}

bool issued_by(const tls_context::state::identity& who, const STACK_OF(X509_NAME) * authorities) {
    for (auto* cert : who.chain)
        for (int i = 0; i < sk_X509_NAME_num(authorities); ++i)
            if (X509_NAME_cmp(X509_get_issuer_name(cert), sk_X509_NAME_value(authorities, i)) == 0) return true;
    return false;
}

// The server has said whom it trusts: of several pairs the first that one of these issued.
int choose_identity(SSL* ssl, void* context) {
    const auto& all = static_cast<const tls_context::state*>(context)->identities;
    if (all.empty()) return 1;
    const auto* authorities = SSL_get0_peer_CA_list(ssl);
    auto chosen = std::find_if(all.begin(), all.end(), [&](const auto& who) { return issued_by(who, authorities); });
    if (chosen == all.end()) chosen = all.begin();
    SSL_certs_clear(ssl);
    if (SSL_use_certificate(ssl, chosen->chain.front()) != 1 || SSL_use_PrivateKey(ssl, chosen->key) != 1) return 0;
    for (std::size_t i = 1; i < chosen->chain.size(); ++i)
        if (SSL_add1_chain_cert(ssl, chosen->chain[i]) != 1) return 0;
    return 1;
}

// Parsing the system's bundle costs tens of milliseconds, so it happens once a process.
X509_STORE* system_store() {
    static X509_STORE* const store = [] {
        auto* s = X509_STORE_new();
        X509_STORE_set_default_paths(s);
        ERR_clear_error();
        return s;
    }();
    return store;
}

void add_system_trust(ssl_ctx_st* ctx, bool alone) {
    auto* system = system_store();
    if (alone) return SSL_CTX_set1_cert_store(ctx, system);
    auto* own = SSL_CTX_get_cert_store(ctx);
    if (auto* dirs = X509_STORE_add_lookup(own, X509_LOOKUP_hash_dir())) X509_LOOKUP_add_dir(dirs, nullptr, X509_FILETYPE_DEFAULT);
    X509_STORE_lock(system);
    const auto* known = X509_STORE_get0_objects(system);
    for (int i = 0; i < sk_X509_OBJECT_num(known); ++i)
        if (auto* cert = X509_OBJECT_get0_X509(sk_X509_OBJECT_value(known, i))) X509_STORE_add_cert(own, cert);
    X509_STORE_unlock(system);
    ERR_clear_error();
}

// Sorted, so that of several pairs the same one wins every time; missing and forbidden directories are empty.
std::vector<std::string> list(const std::string& dir) {
    std::vector<std::string> names;
    if (auto* d = ::opendir(dir.c_str())) {
        const scope_exit close([d] { ::closedir(d); });
        while (const auto* entry = ::readdir(d)) names.emplace_back(entry->d_name);
    }
    std::sort(names.begin(), names.end());
    return names;
}

void add_dir(tls_context::state& s, const std::string& dir) {
    for (const auto& name : list(dir)) {
        if (name.ends_with(".crt")) add_authority(s.ctx, cat(dir, '/', name));
        if (name.ends_with(".cert")) add_key_pair(s, {cat(dir, '/', name), cat(dir, '/', name.substr(0, name.size() - 4), "key")});
    }
}

}  // namespace

tls_context::state::~state() {
    for (const auto& who : identities) {
        for (auto* cert : who.chain) X509_free(cert);
        EVP_PKEY_free(who.key);
    }
    SSL_CTX_free(ctx);
}

std::string file_state(const tls_options& options) {
    std::string out;
    const auto add = [&out](const std::string& file) {
        struct stat s{};
        if (::stat(file.c_str(), &s) != 0) return;
        out += cat(file, '\0', s.st_ino, ' ', s.st_size, ' ', s.st_mtim.tv_sec, '.', s.st_mtim.tv_nsec, ' ', s.st_ctim.tv_sec, '.', s.st_ctim.tv_nsec,
                   '\n');
    };
    for (const auto& file : options.ca) add(file);
    for (const auto& pair : options.key_pairs) {
        add(pair.cert);
        add(pair.key);
    }
    for (const auto& dir : options.dirs)
        for (const auto& name : list(dir))
            if (name.ends_with(".crt") || name.ends_with(".cert") || name.ends_with(".key")) add(cat(dir, '/', name));
    return out;
}

tls_context tls_context::load(const tls_options& options) {
    auto s = std::make_shared<state>();
    s->ctx = SSL_CTX_new(TLS_client_method());
    if (s->ctx == nullptr) throw error{errc::internal, cat("TLS cannot be set up: ", openssl_reason())};
    SSL_CTX_set_min_proto_version(s->ctx, TLS1_2_VERSION);
    SSL_CTX_set_mode(s->ctx, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS);
    // Large reads: a 16 KiB record would otherwise cost two system calls.
    SSL_CTX_set_read_ahead(s->ctx, 1);
    SSL_CTX_set_default_read_buffer_len(s->ctx, std::size_t{256} << 10);
    if (options.use_system_trust && !options.insecure) add_system_trust(s->ctx, options.ca.empty() && options.dirs.empty());
    for (const auto& file : options.ca) add_authority(s->ctx, file);
    for (const auto& dir : options.dirs) add_dir(*s, dir);
    for (const auto& pair : options.key_pairs) add_key_pair(*s, pair);
    SSL_CTX_set_cert_cb(s->ctx, choose_identity, s.get());
    s->insecure = options.insecure;
    ERR_clear_error();
    tls_context out;
    out.state_ = std::move(s);
    return out;
}

std::shared_ptr<const tls_context::state> tls_access::get(const tls_context& context) {
    if (context.state_) return context.state_;
    static const tls_context system = tls_context::load({});
    return system.state_;
}

}  // namespace cobuild::http

#include "token_server.hpp"

#include <openssl/ec.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <chrono>
#include <cstdio>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

import cobuild.base;

namespace cobuild::test {

namespace {

template<auto Free>
struct freed_by {
    template<class T>
    void operator()(T* p) const {
        Free(p);
    }
};
using file = std::unique_ptr<FILE, freed_by<std::fclose>>;
using key = std::unique_ptr<EVP_PKEY, freed_by<EVP_PKEY_free>>;
using certificate = std::unique_ptr<X509, freed_by<X509_free>>;
using digest_context = std::unique_ptr<EVP_MD_CTX, freed_by<EVP_MD_CTX_free>>;
using signature = std::unique_ptr<ECDSA_SIG, freed_by<ECDSA_SIG_free>>;

file open(const std::string& path) {
    file out(std::fopen(path.c_str(), "re"));
    if (!out) throw std::runtime_error("cannot open " + path);
    return out;
}

std::string base64(std::string_view data, bool url) {
    std::string out((data.size() + 2) / 3 * 4 + 1, '\0');
    out.resize(static_cast<std::size_t>(EVP_EncodeBlock(reinterpret_cast<unsigned char*>(out.data()),
                                                        reinterpret_cast<const unsigned char*>(data.data()), static_cast<int>(data.size()))));
    if (!url) return out;
    while (out.ends_with('=')) out.pop_back();
    for (auto& c : out) c = c == '+' ? '-' : c == '/' ? '_' : c;
    return out;
}

std::string der_of(const std::string& cert_file) {
    const certificate cert(PEM_read_X509(open(cert_file).get(), nullptr, nullptr, nullptr));
    unsigned char* der = nullptr;
    const int size = i2d_X509(cert.get(), &der);
    std::string out(reinterpret_cast<char*>(der), static_cast<std::size_t>(size));
    OPENSSL_free(der);
    return out;
}

// ES256: the two numbers side by side, RFC 7518 3.4.
std::string sign(const std::string& key_file, std::string_view text) {
    const key k(PEM_read_PrivateKey(open(key_file).get(), nullptr, nullptr, nullptr));
    const digest_context context(EVP_MD_CTX_new());
    unsigned char der[256];
    std::size_t size = sizeof der;
    if (EVP_DigestSignInit(context.get(), nullptr, EVP_sha256(), nullptr, k.get()) != 1 ||
        EVP_DigestSign(context.get(), der, &size, reinterpret_cast<const unsigned char*>(text.data()), text.size()) != 1)
        throw std::runtime_error("cannot sign");
    const unsigned char* at = der;
    const signature s(d2i_ECDSA_SIG(nullptr, &at, static_cast<long>(size)));
    std::string out(64, '\0');
    auto* to = reinterpret_cast<unsigned char*>(out.data());
    BN_bn2binpad(ECDSA_SIG_get0_r(s.get()), to, 32);
    BN_bn2binpad(ECDSA_SIG_get0_s(s.get()), to + 32, 32);
    return out;
}

std::vector<std::string> scopes_of(const fake_request& q) {
    std::vector<std::string> out;
    const std::string_view target = q.target;
    const auto mark = target.find('?');
    if (mark == std::string_view::npos) return out;
    for (auto pair : split(target.substr(mark + 1), '&')) {
        if (!pair.starts_with("scope=")) continue;
        std::string text;
        for (std::size_t i = 6; i < pair.size(); ++i) {
            if (pair[i] == '%') {
                text.push_back(static_cast<char>(std::stoi(std::string(pair.substr(i + 1, 2)), nullptr, 16)));
                i += 2;
            } else {
                text.push_back(pair[i] == '+' ? ' ' : pair[i]);
            }
        }
        for (const auto scope : split(text, ' ')) out.emplace_back(scope);
    }
    return out;
}

}  // namespace

token_server::token_server(options o) : options_(std::move(o)) {
    server_.on_request([this](const fake_request& q) { return std::optional(answer(q)); });
}

std::vector<std::string> token_server::asked() const {
    std::vector<std::string> out;
    for (const auto& q : server_.requests()) {
        std::string joined;
        for (const auto& scope : scopes_of(q)) joined += joined.empty() ? scope : ' ' + scope;
        out.push_back(std::move(joined));
    }
    return out;
}

fake_response token_server::answer(const fake_request& q) const {
    const auto login = q.headers.find("authorization");
    const bool known = login != q.headers.end() && login->second == "Basic " + base64(options_.user + ':' + options_.password, false);
    if (login != q.headers.end() && !known) return {.status = 401, .body = "{}"};
    std::string access;
    for (const auto& scope : scopes_of(q)) {
        const auto parts = split(scope, ':');
        if (parts.size() != 3) continue;
        std::string actions;
        for (const auto action : split(parts[2], ','))
            if (known || action == "pull") actions += cat(actions.empty() ? "" : ",", '"', action, '"');
        access += cat(access.empty() ? "" : ",", R"({"type":")", parts[0], R"(","name":")", parts[1], R"(","actions":[)", actions, "]}");
    }
    const auto now = std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
    const auto head = cat(R"({"typ":"JWT","alg":"ES256","x5c":[")", base64(der_of(options_.signer.cert), false), R"("]})");
    const auto claims = cat(R"({"iss":"test","sub":")", known ? options_.user : "", R"(","aud":"test","exp":)", now + options_.seconds, R"(,"nbf":)",
                            now - 5, R"(,"iat":)", now, R"(,"jti":"1","access":[)", access, "]}");
    const auto text = base64(head, true) + '.' + base64(claims, true);
    return {.body = cat(R"({"token":")", text, '.', base64(sign(options_.signer.key, text), true), R"(","expires_in":)", options_.seconds, '}')};
}

}  // namespace cobuild::test

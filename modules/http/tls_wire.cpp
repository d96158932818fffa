module;
#include <sys/socket.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <boost/asio/awaitable.hpp>

module cobuild.http;

import :internal;
import :tls;

namespace cobuild::http {

namespace {

// OpenSSL's own socket BIO writes without MSG_NOSIGNAL, and a library must not leave SIGPIPE to its host.
int bio_fd(BIO* b) { return static_cast<int>(reinterpret_cast<std::intptr_t>(BIO_get_data(b))); }

int bio_read(BIO* b, char* out, int size) {
    BIO_clear_retry_flags(b);
    const auto n = ::recv(bio_fd(b), out, static_cast<std::size_t>(size), MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) BIO_set_retry_read(b);
    if (n == 0) BIO_set_flags(b, BIO_FLAGS_IN_EOF);
    return static_cast<int>(n);
}

int bio_write(BIO* b, const char* data, int size) {
    BIO_clear_retry_flags(b);
    const auto n = ::send(bio_fd(b), data, static_cast<std::size_t>(size), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) BIO_set_retry_write(b);
    return static_cast<int>(n);
}

long bio_ctrl(BIO* b, int command, long, void*) {
    if (command == BIO_CTRL_FLUSH) return 1;
    if (command == BIO_CTRL_EOF) return BIO_test_flags(b, BIO_FLAGS_IN_EOF) != 0 ? 1 : 0;
    return 0;
}

int bio_create(BIO* b) {
    BIO_set_init(b, 1);
    return 1;
}

BIO_METHOD* socket_method() {
    static BIO_METHOD* const method = [] {
        auto* m = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "cobuild socket");
        BIO_meth_set_read(m, bio_read);
        BIO_meth_set_write(m, bio_write);
        BIO_meth_set_ctrl(m, bio_ctrl);
        BIO_meth_set_create(m, bio_create);
        return m;
    }();
    return method;
}

std::string name_line(const X509_NAME* name) {
    std::unique_ptr<BIO, decltype(&BIO_free_all)> out(BIO_new(BIO_s_mem()), BIO_free_all);
    X509_NAME_print_ex(out.get(), name, 0, XN_FLAG_ONELINE & ~ASN1_STRFLGS_ESC_MSB);
    char* data = nullptr;
    const auto size = BIO_get_mem_data(out.get(), &data);
    return {data, static_cast<std::size_t>(size)};
}

std::string time_line(const ASN1_TIME* t) {
    std::tm tm{};
    if (ASN1_TIME_to_tm(t, &tm) != 1) return "an unreadable time";
    return cat(tm.tm_year + 1900, '-', tm.tm_mon < 9 ? "0" : "", tm.tm_mon + 1, '-', tm.tm_mday < 10 ? "0" : "", tm.tm_mday);
}

// The names a certificate stands for, at most a handful.
std::string names_of(X509* cert) {
    std::string out;
    auto* names = static_cast<GENERAL_NAMES*>(X509_get_ext_d2i(cert, NID_subject_alt_name, nullptr, nullptr));
    for (int i = 0; i < sk_GENERAL_NAME_num(names) && i < 8; ++i) {
        const auto* n = sk_GENERAL_NAME_value(names, i);
        std::string text;
        if (n->type == GEN_DNS) {
            text.assign(reinterpret_cast<const char*>(ASN1_STRING_get0_data(n->d.dNSName)),
                        static_cast<std::size_t>(ASN1_STRING_length(n->d.dNSName)));
        } else if (n->type == GEN_IPADD && ASN1_STRING_length(n->d.iPAddress) == 4) {
            const auto* b = ASN1_STRING_get0_data(n->d.iPAddress);
            text = cat(unsigned{b[0]}, '.', unsigned{b[1]}, '.', unsigned{b[2]}, '.', unsigned{b[3]});
        }
        if (!text.empty()) out.append(out.empty() ? "" : ", ").append(text);
    }
    GENERAL_NAMES_free(names);
    return out.empty() ? name_line(X509_get_subject_name(cert)) : out;
}

std::vector<std::string> lines_of(const STACK_OF(X509) * chain) {
    std::vector<std::string> out;
    for (int i = 0; i < sk_X509_num(chain) && i < 10; ++i) {
        const auto* cert = sk_X509_value(chain, i);
        out.push_back(cat(name_line(X509_get_subject_name(cert)), ", issued by ", name_line(X509_get_issuer_name(cert)), ", valid until ",
                          time_line(X509_get0_notAfter(cert))));
    }
    return out;
}

class tls_wire final : public wire {
public:
    tls_wire(int fd, const tls_context& context, const endpoint& server, std::string_view hint)
        : context_(tls_access::get(context)), server_(server), hint_(hint), ssl_(SSL_new(context_->ctx), SSL_free) {
        auto* bio = BIO_new(socket_method());
        if (!ssl_ || bio == nullptr) throw error{errc::internal, "TLS cannot be set up: out of memory"};
        BIO_set_data(bio, reinterpret_cast<void*>(static_cast<std::intptr_t>(fd)));
        SSL_set_bio(ssl_.get(), bio, bio);
        SSL_set_connect_state(ssl_.get());
        SSL_set_app_data(ssl_.get(), this);
        static constexpr unsigned char http11[] = "\x08http/1.1";
        SSL_set_alpn_protos(ssl_.get(), http11, sizeof http11 - 1);
        auto* check = SSL_get0_param(ssl_.get());
        if (X509_VERIFY_PARAM_set1_ip_asc(check, server.host.c_str()) != 1) {
            SSL_set_tlsext_host_name(ssl_.get(), server.host.c_str());
            X509_VERIFY_PARAM_set_hostflags(check, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
            SSL_set1_host(ssl_.get(), server.host.c_str());
        }
        ERR_clear_error();
        SSL_set_verify(ssl_.get(), context_->insecure ? SSL_VERIFY_NONE : SSL_VERIFY_PEER, context_->insecure ? nullptr : &tls_wire::verify);
    }

    io_step handshake() override {
        ERR_clear_error();
        const int r = SSL_do_handshake(ssl_.get());
        if (r == 1) return {};
        auto step = outcome(r, "the TLS handshake with ");
        if (!complaint_.empty()) {
            step = {};
            step.failure = error{errc::unauthorized, complaint_};
        }
        return step;
    }

    io_step read(std::span<std::byte> into) override {
        std::size_t filled = 0;
        while (filled < into.size()) {
            std::size_t n = 0;
            ERR_clear_error();
            const int r = SSL_read_ex(ssl_.get(), into.data() + filled, into.size() - filled, &n);
            if (r == 1) {
                filled += n;
                continue;
            }
            if (filled > 0) break;  // the cause comes again with the next read
            return outcome(r, "reading from ");
        }
        return {.bytes = filled};
    }

    io_step write(std::span<const std::byte> from) override {
        std::size_t n = 0;
        ERR_clear_error();
        const int r = SSL_write_ex(ssl_.get(), from.data(), from.size(), &n);
        if (r == 1) return {.bytes = n};
        const int reason = errno;
        if (SSL_get_error(ssl_.get(), r) == SSL_ERROR_SYSCALL && (reason == ECONNRESET || reason == EPIPE)) {
            // A server that refuses a certificate says so and hangs up while we send: the alert came before the reset.
            char byte = 0;
            ERR_clear_error();
            const int again = SSL_read_ex(ssl_.get(), &byte, 1, &n);
            if (SSL_get_error(ssl_.get(), again) == SSL_ERROR_SSL) return outcome(again, "writing to ");
            ERR_clear_error();
            return {.errnum = reason};
        }
        errno = reason;
        return outcome(r, "writing to ");
    }

    bool encrypted() const override { return true; }
    bool not_tls() const override { return not_tls_; }
    std::vector<std::string> certificates() const override { return !shown_.empty() ? shown_ : lines_of(SSL_get_peer_cert_chain(ssl_.get())); }

private:
    io_step outcome(int r, std::string_view what) {
        const int saved = errno;
        switch (SSL_get_error(ssl_.get(), r)) {
            case SSL_ERROR_WANT_READ: return {.need = readiness::readable};
            case SSL_ERROR_WANT_WRITE: return {.need = readiness::writable};
            case SSL_ERROR_ZERO_RETURN: return {.eof = true};
            case SSL_ERROR_SYSCALL:
                if (saved != 0) return {.errnum = saved};
                return {.eof = true, .abrupt = true};
            default: break;
        }
        const auto code = ERR_peek_last_error();
        const auto reason = ERR_GET_REASON(code);
        if (reason == SSL_R_UNEXPECTED_EOF_WHILE_READING) return {.eof = true, .abrupt = true};
        io_step out;
        if (reason == SSL_R_HTTP_REQUEST || reason == SSL_R_WRONG_VERSION_NUMBER) {
            not_tls_ = true;
            out.failure = error{errc::corrupt, cat(server_.host_port(), " does not speak TLS",
                                                   hint_.empty() ? "" : cat("; if it serves plain http, set http = true in ", hint_))};
            return out;
        }
        const char* text = ERR_reason_error_string(code);
        out.failure = error{about_client_certificate(reason) ? errc::unauthorized : errc::unavailable,
                            about_client_certificate(reason) ? client_certificate_complaint(text)
                                                             : cat(what, server_.host_port(), " failed: ", text != nullptr ? text : "TLS error")};
        ERR_clear_error();
        return out;
    }

    static bool about_client_certificate(int reason) {
        switch (reason) {
            case SSL_R_TLSV13_ALERT_CERTIFICATE_REQUIRED:
            case SSL_R_SSLV3_ALERT_BAD_CERTIFICATE:
            case SSL_R_SSLV3_ALERT_UNSUPPORTED_CERTIFICATE:
            case SSL_R_SSLV3_ALERT_CERTIFICATE_REVOKED:
            case SSL_R_SSLV3_ALERT_CERTIFICATE_EXPIRED:
            case SSL_R_SSLV3_ALERT_CERTIFICATE_UNKNOWN:
            case SSL_R_SSLV3_ALERT_HANDSHAKE_FAILURE:
            case SSL_R_TLSV1_ALERT_UNKNOWN_CA:
            case SSL_R_TLSV1_ALERT_ACCESS_DENIED: return true;
            default: return false;
        }
    }

    std::string client_certificate_complaint(const char* reason) const {
        const auto why = cat(" (", reason != nullptr ? reason : "TLS alert", ')');
        if (context_->identities.empty())
            return cat(server_.host_port(), " wants a client certificate and none is configured", why,
                       hint_.empty() ? "" : cat("; add a keypair to ", hint_));
        std::string files;
        for (const auto& who : context_->identities) files.append(files.empty() ? "" : ", ").append(quoted(who.file));
        return cat(server_.host_port(), " refused the client certificate ", files, why, hint_.empty() ? "" : cat("; see the keypair of ", hint_));
    }

    static int verify(int ok, X509_STORE_CTX* store) {
        if (ok == 1) return 1;
        const auto* ssl = static_cast<SSL*>(X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx()));
        auto* self = static_cast<tls_wire*>(SSL_get_app_data(ssl));
        if (self->shown_.empty()) self->shown_ = lines_of(X509_STORE_CTX_get0_untrusted(store));
        if (self->complaint_.empty()) self->complaint_ = self->complain(X509_STORE_CTX_get_error(store), X509_STORE_CTX_get_current_cert(store));
        return 0;
    }

    std::string complain(int code, X509* cert) {
        const auto certificate = cat("the certificate of ", server_.host_port());
        switch (code) {
            case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
            case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
            case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
            case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
            case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
                return cat(certificate, " is signed by an unknown authority (issuer ",
                           cert != nullptr ? name_line(X509_get_issuer_name(cert)) : "unknown", ')',
                           hint_.empty() ? "" : cat("; add its CA file to \"ca\" in ", hint_));
            case X509_V_ERR_CERT_HAS_EXPIRED:
                return cat(certificate, " expired on ", cert != nullptr ? time_line(X509_get0_notAfter(cert)) : "an unknown day");
            case X509_V_ERR_CERT_NOT_YET_VALID:
                return cat(certificate, " is not valid before ", cert != nullptr ? time_line(X509_get0_notBefore(cert)) : "an unknown day",
                           "; is this machine's clock right?");
            case X509_V_ERR_HOSTNAME_MISMATCH:
            case X509_V_ERR_IP_ADDRESS_MISMATCH:
                return cat(certificate, " is for ", cert != nullptr ? names_of(cert) : "another host", ", not for ", server_.host);
            default: return cat(certificate, " is not trusted: ", X509_verify_cert_error_string(code));
        }
    }

    std::shared_ptr<const tls_context::state> context_;
    endpoint server_;
    std::string hint_;
    std::unique_ptr<SSL, decltype(&SSL_free)> ssl_;
    std::string complaint_;
    std::vector<std::string> shown_;  // to a verification that failed
    bool not_tls_ = false;
};

}  // namespace

std::unique_ptr<wire> make_tls_wire(int fd, const tls_context& context, const endpoint& server, std::string_view trust_hint) {
    return std::make_unique<tls_wire>(fd, context, server, trust_hint);
}

}  // namespace cobuild::http

#include "fake_registry.hpp"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <list>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>

import cobuild.base;

namespace cobuild::test {

namespace {

constexpr std::string_view manifest_type = "application/vnd.oci.image.manifest.v1+json";

std::string decode(std::string_view text) {
    std::string out;
    for (std::size_t i = 0; i < text.size(); ++i) {
        if (text[i] == '%' && i + 2 < text.size()) {
            out += static_cast<char>(std::stoi(std::string(text.substr(i + 1, 2)), nullptr, 16));
            i += 2;
        } else {
            out += text[i] == '+' ? ' ' : text[i];
        }
    }
    return out;
}

// One accepted socket, plain or TLS.
class peer {
public:
    peer(int fd, SSL_CTX* tls) : fd_(fd) {
        if (tls != nullptr) {
            ssl_ = SSL_new(tls);
            SSL_set_fd(ssl_, fd);
        }
    }
    ~peer() { SSL_free(ssl_); }
    peer(const peer&) = delete;
    peer& operator=(const peer&) = delete;
    bool accept() { return ssl_ == nullptr || SSL_accept(ssl_) == 1; }
    long read(char* into, std::size_t size) { return ssl_ != nullptr ? SSL_read(ssl_, into, static_cast<int>(size)) : ::recv(fd_, into, size, 0); }
    bool write(std::string_view data) {
        while (!data.empty()) {
            const auto n = ssl_ != nullptr ? SSL_write(ssl_, data.data(), static_cast<int>(std::min<std::size_t>(data.size(), 1 << 20)))
                                           : ::send(fd_, data.data(), data.size(), MSG_NOSIGNAL);
            if (n <= 0) return false;
            data.remove_prefix(static_cast<std::size_t>(n));
        }
        return true;
    }
    [[nodiscard]] int fd() const { return fd_; }

private:
    int fd_;
    SSL* ssl_ = nullptr;
};

}  // namespace

struct fake_registry::state {
    options opts;
    int listener = -1;
    int port = 0;
    SSL_CTX* tls = nullptr;
    mutable std::mutex guard;
    std::condition_variable changed;
    std::map<std::string, std::string> blobs;
    struct manifest {
        std::string type, bytes;
    };
    std::map<std::string, manifest> manifests;  // "repository:tag" and "repository@digest"
    handler before, early;
    std::vector<fake_request> seen;
    std::set<int> sockets;
    std::size_t peak = 0, moving = 0, peak_moving = 0;
    unsigned connections = 0, uploads = 0;
    bool held = false;
    std::map<std::string, std::string> begun;  // uploads by path
    std::size_t cut_after = 0;
    unsigned cuts = 0;
    std::atomic<bool> stopping{false};
    std::list<std::thread> threads;
    std::thread acceptor;

    void listen();
    void accept_all();
    void serve(int fd, unsigned id);
    bool exchange(peer& p, std::string& in, unsigned id);
    bool cut_upload(const fake_request& q, const std::string& body);
    bool send(peer& p, const fake_request& q, const fake_response& a, bool blob);
    fake_response answer(const fake_request& q, bool& blob);
    fake_response answer_blob(const fake_request& q, const std::string& digest, bool& blob);
    fake_response answer_manifest(const fake_request& q, const std::string& repository, const std::string& what);
    fake_response answer_upload(const fake_request& q, const std::string& repository);
};

namespace {
fake_response not_found(std::string_view code) {
    return {.status = 404,
            .headers = {{"Content-Type", "application/json"}},
            .body = cat(R"({"errors":[{"code":")", code, R"(","message":"not here"}]})")};
}
}  // namespace

void fake_registry::state::listen() {
    if (!opts.tls_cert.empty()) {
        tls = SSL_CTX_new(TLS_server_method());
        if (SSL_CTX_use_certificate_chain_file(tls, opts.tls_cert.c_str()) != 1 ||
            SSL_CTX_use_PrivateKey_file(tls, opts.tls_key.c_str(), SSL_FILETYPE_PEM) != 1)
            throw std::runtime_error("fake registry: no certificate");
        if (!opts.client_ca.empty()) {
            SSL_CTX_load_verify_file(tls, opts.client_ca.c_str());
            SSL_CTX_set_verify(tls, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
        }
    }
    listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int on = 1;
    ::setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(opts.port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    if (::bind(listener, reinterpret_cast<sockaddr*>(&address), size) != 0 || ::listen(listener, 128) != 0 ||
        ::getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size) != 0)
        throw std::runtime_error("fake registry: no port");
    port = ntohs(address.sin_port);
}

void fake_registry::state::accept_all() {
    while (!stopping) {
        const int fd = ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
        if (fd < 0) continue;
        const std::lock_guard lock(guard);
        if (stopping) {
            ::close(fd);
            return;
        }
        sockets.insert(fd);
        peak = std::max(peak, sockets.size());
        threads.emplace_back([this, fd, id = ++connections] { serve(fd, id); });
    }
}

void fake_registry::state::serve(int fd, unsigned id) {
    sigset_t pipe_only;
    sigemptyset(&pipe_only);
    sigaddset(&pipe_only, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe_only, nullptr);  // OpenSSL's socket BIO writes without MSG_NOSIGNAL
    const int on = 1;
    ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    {
        peer p(fd, tls);
        std::string in;
        if (p.accept())
            while (!stopping && exchange(p, in, id)) {
            }
    }
    const std::lock_guard lock(guard);
    sockets.erase(fd);
    ::close(fd);
    changed.notify_all();
}

bool fake_registry::state::exchange(peer& p, std::string& in, unsigned id) {
    char piece[65536];
    std::size_t end = 0;
    while ((end = in.find("\r\n\r\n")) == std::string::npos) {
        const auto n = p.read(piece, sizeof piece);
        if (n <= 0) return false;
        in.append(piece, static_cast<std::size_t>(n));
    }
    fake_request q{.connection = id};
    const auto head = in.substr(0, end);
    in.erase(0, end + 4);
    const auto lines = split(head, '\n');
    const auto words = split(trim(lines[0]), ' ');
    q.method = words[0];
    const auto target = words.size() > 1 ? words[1] : std::string_view("/");
    q.target = target;
    q.path = decode(target.substr(0, target.find('?')));
    if (const auto mark = target.find('?'); mark != std::string_view::npos)
        for (const auto pair : split(target.substr(mark + 1), '&'))
            q.query[decode(pair.substr(0, pair.find('=')))] = decode(pair.substr(std::min(pair.find('='), pair.size() - 1) + 1));
    for (std::size_t i = 1; i < lines.size(); ++i)
        if (const auto colon = lines[i].find(':'); colon != std::string_view::npos)
            q.headers[to_lower(lines[i].substr(0, colon))] = trim(lines[i].substr(colon + 1));
    handler first, second;
    {
        const std::lock_guard lock(guard);
        first = early;
        second = before;
    }
    if (first) {
        if (const auto a = first(q)) {
            {
                const std::lock_guard lock(guard);
                seen.push_back(q);
            }
            send(p, q, *a, false);
            // Leave the socket open a moment: a client that waits to be read would hang here.
            if (!a->close) {
                pollfd wait{p.fd(), 0, 0};
                ::poll(&wait, 1, 3000);
            }
            return false;
        }
    }
    const auto length = q.headers.contains("content-length") ? std::stoull(q.headers["content-length"]) : 0;
    while (in.size() < length) {
        const auto n = p.read(piece, sizeof piece);
        if (n <= 0) return false;
        in.append(piece, static_cast<std::size_t>(n));
        if (cut_upload(q, in)) return false;
    }
    q.body = in.substr(0, length);
    in.erase(0, length);
    {
        const std::lock_guard lock(guard);
        seen.push_back(q);
    }
    std::optional<fake_response> a;
    if (second) a = second(q);
    bool blob = false;
    if (!a) a = answer(q, blob);
    if (q.method == "GET" && q.path.find("/blobs/") != std::string::npos && a->status < 300) blob = true;
    return send(p, q, *a, blob);
}

bool fake_registry::state::cut_upload(const fake_request& q, const std::string& body) {
    const std::lock_guard lock(guard);
    const auto found = begun.find(q.path);
    if (cuts == 0 || found == begun.end() || body.size() < cut_after) return false;
    --cuts;
    found->second += body.substr(0, cut_after);
    seen.push_back(q);
    return true;
}

bool fake_registry::state::send(peer& p, const fake_request& q, const fake_response& a, bool blob) {
    if (a.no_answer) return false;
    if (!a.raw.empty()) {
        p.write(a.raw);
        return false;
    }
    std::string head = cat("HTTP/1.1 ", a.status, " Scripted\r\n");
    for (const auto& [name, value] : a.headers) head.append(cat(name, ": ", value, "\r\n"));
    const bool own_length = std::any_of(a.headers.begin(), a.headers.end(), [](const auto& h) { return h.first == "Content-Length"; });
    if (a.chunked) {
        head.append("Transfer-Encoding: chunked\r\n");
    } else if (!own_length) {
        head.append(cat("Content-Length: ", a.declared_length.value_or(a.body.size()), "\r\n"));
    }
    if (a.close) head.append("Connection: close\r\n");
    if (!p.write(head + "\r\n")) return false;
    if (q.method == "HEAD") return !a.close;
    std::string_view body = a.body;
    if (a.cut_after) body = body.substr(0, std::min(*a.cut_after, body.size()));
    bool fine = true;
    if (blob) {
        std::unique_lock lock(guard);
        peak_moving = std::max(peak_moving, ++moving);
        changed.notify_all();
        lock.unlock();
        if (!body.empty() && !a.chunked) {
            fine = p.write(body.substr(0, 1));
            body.remove_prefix(1);
        }
        lock.lock();
        changed.wait(lock, [&] { return !held || stopping; });
    }
    // Before its last byte: whoever has got that may begin the next transfer at once.
    const auto over = [&] {
        if (!blob) return;
        const std::lock_guard lock(guard);
        --moving;
        changed.notify_all();
    };
    if (a.chunked) {
        for (std::size_t at = 0; fine && at < body.size(); at += 1000) {
            const auto part = body.substr(at, 1000);
            char size[32];
            std::snprintf(size, sizeof size, "%zx\r\n", part.size());
            fine = p.write(cat(size, part, "\r\n"));
        }
        over();
        if (!a.cut_after) fine = fine && p.write("0\r\n\r\n");
    } else {
        fine = fine && p.write(body.substr(0, body.empty() ? 0 : body.size() - 1));
        over();
        if (!body.empty()) fine = fine && p.write(body.substr(body.size() - 1));
    }
    return fine && !a.close && !a.cut_after;
}

fake_response fake_registry::state::answer(const fake_request& q, bool& blob) {
    if (q.path == "/v2/" || q.path == "/v2") return {.body = "{}"};
    if (!q.path.starts_with("/v2/")) return not_found("UNKNOWN");
    const auto rest = q.path.substr(4);
    const std::lock_guard lock(guard);
    if (const auto at = rest.find("/blobs/uploads/"); at != std::string::npos) return answer_upload(q, rest.substr(0, at));
    if (const auto at = rest.find("/blobs/"); at != std::string::npos) return answer_blob(q, rest.substr(at + 7), blob);
    if (const auto at = rest.find("/manifests/"); at != std::string::npos) return answer_manifest(q, rest.substr(0, at), rest.substr(at + 11));
    return not_found("UNKNOWN");
}

fake_response fake_registry::state::answer_blob(const fake_request& q, const std::string& digest, bool& blob) {
    const auto found = blobs.find(digest);
    if (found == blobs.end()) return not_found("BLOB_UNKNOWN");
    blob = q.method == "GET";
    fake_response out{.headers = {{"Docker-Content-Digest", digest}, {"Content-Type", "application/octet-stream"}}};
    const auto range = q.headers.find("range");
    if (opts.ranges && range != q.headers.end()) {
        const auto first = std::stoull(range->second.substr(6));
        const auto dash = range->second.find('-');
        auto last = found->second.size() - 1;
        if (dash + 1 < range->second.size()) last = std::min<std::size_t>(last, std::stoull(range->second.substr(dash + 1)));
        out.status = 206;
        out.headers.emplace_back("Content-Range", cat("bytes ", first, '-', last, '/', found->second.size()));
        out.body = found->second.substr(first, last - first + 1);
    } else {
        out.body = found->second;
        if (opts.ranges) out.headers.emplace_back("Accept-Ranges", "bytes");
    }
    return out;
}

fake_response fake_registry::state::answer_manifest(const fake_request& q, const std::string& repository, const std::string& what) {
    const bool by_digest = what.find(':') != std::string::npos;
    if (q.method == "PUT") {
        const auto d = digest::of(q.body).str();
        const manifest m{q.headers.contains("content-type") ? q.headers.at("content-type") : "", q.body};
        manifests[cat(repository, '@', d)] = m;
        if (!by_digest) manifests[cat(repository, ':', what)] = m;
        return {.status = 201, .headers = {{"Docker-Content-Digest", d}}};
    }
    const auto found = manifests.find(cat(repository, by_digest ? '@' : ':', what));
    if (found == manifests.end()) return not_found("MANIFEST_UNKNOWN");
    return {.headers = {{"Content-Type", found->second.type}, {"Docker-Content-Digest", digest::of(found->second.bytes).str()}},
            .body = found->second.bytes};
}

fake_response fake_registry::state::answer_upload(const fake_request& q, const std::string& repository) {
    if (q.method == "POST") {
        if (const auto m = q.query.find("mount"); m != q.query.end() && blobs.contains(m->second))
            return {.status = 201, .headers = {{"Docker-Content-Digest", m->second}}};
        const auto path = cat("/v2/", repository, "/blobs/uploads/", ++uploads);
        begun[path];
        return {.status = 202, .headers = {{"Location", path + "?state=x"}}};
    }
    const auto found = begun.find(q.path);
    if (found == begun.end() || !q.query.contains("state")) return not_found("BLOB_UPLOAD_UNKNOWN");
    auto& bytes = found->second;
    const auto range = cat("0-", bytes.empty() ? 0 : bytes.size() - 1);
    if (q.method == "GET") return {.status = 204, .headers = {{"Location", q.path + "?state=y"}, {"Range", range}}};
    if (q.method == "PATCH") {
        if (q.headers.at("content-range") != cat(bytes.size(), '-', bytes.size() + q.body.size() - 1)) return {.status = 416};
        bytes += q.body;
        return {.status = 202, .headers = {{"Location", q.path + "?state=z"}}};
    }
    bytes += q.body;
    const auto d = digest::of(bytes).str();
    if (q.method != "PUT" || !q.query.contains("digest") || q.query.at("digest") != d) return {.status = 400, .body = "{}"};
    blobs[d] = std::move(bytes);
    begun.erase(found);
    return {.status = 201, .headers = {{"Docker-Content-Digest", d}}};
}

fake_registry::fake_registry() : fake_registry(options{}) {}

fake_registry::fake_registry(options o) : state_(std::make_unique<state>()) {
    state_->opts = std::move(o);
    state_->listen();
    state_->acceptor = std::thread([s = state_.get()] { s->accept_all(); });
}

fake_registry::~fake_registry() {
    auto& s = *state_;
    {
        const std::lock_guard lock(s.guard);
        s.stopping = true;
        for (const int fd : s.sockets) ::shutdown(fd, SHUT_RDWR);
        s.changed.notify_all();
    }
    ::shutdown(s.listener, SHUT_RDWR);
    s.acceptor.join();
    for (auto& t : s.threads) t.join();
    ::close(s.listener);
    SSL_CTX_free(s.tls);
}

void fake_registry::cut_uploads(std::size_t after, unsigned times) {
    const std::lock_guard lock(state_->guard);
    state_->cut_after = after;
    state_->cuts = times;
}

void fake_registry::forget_uploads() {
    const std::lock_guard lock(state_->guard);
    state_->begun.clear();
}

int fake_registry::port() const { return state_->port; }
std::string fake_registry::host() const { return cat("127.0.0.1:", state_->port); }

std::string fake_registry::add_blob(std::string bytes) {
    auto d = digest::of(bytes).str();
    const std::lock_guard lock(state_->guard);
    state_->blobs[d] = std::move(bytes);
    return d;
}

std::string fake_registry::add_manifest(const std::string& repository, const std::string& tag, const std::string& media_type, std::string bytes) {
    auto d = digest::of(bytes).str();
    const std::lock_guard lock(state_->guard);
    if (!tag.empty()) state_->manifests[cat(repository, ':', tag)] = {media_type, bytes};
    state_->manifests[cat(repository, '@', d)] = {media_type, std::move(bytes)};
    return d;
}

fake_image fake_registry::add_image(const std::string& repository, const std::string& tag, const std::vector<std::string>& layers) {
    fake_image out;
    const std::string config = R"({"architecture":"amd64","os":"linux","config":{"Env":["A=b"]},"rootfs":{"type":"layers","diff_ids":[]}})";
    out.config_digest = add_blob(config);
    std::string list;
    for (const auto& bytes : layers) {
        out.layer_digests.push_back(add_blob(bytes));
        list.append(list.empty() ? "" : ",")
            .append(cat(R"({"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":")", out.layer_digests.back(), R"(","size":)", bytes.size(),
                        "}"));
    }
    out.manifest =
        cat(R"({"schemaVersion":2,"mediaType":")", manifest_type, R"(","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":")",
            out.config_digest, R"(","size":)", config.size(), R"(},"layers":[)", list, "]}");
    out.manifest_digest = add_manifest(repository, tag, std::string(manifest_type), out.manifest);
    return out;
}

bool fake_registry::has_blob(const std::string& digest) const {
    const std::lock_guard lock(state_->guard);
    return state_->blobs.contains(digest);
}

void fake_registry::on_request(handler h) {
    const std::lock_guard lock(state_->guard);
    state_->before = std::move(h);
}

void fake_registry::before_body(handler h) {
    const std::lock_guard lock(state_->guard);
    state_->early = std::move(h);
}

std::vector<fake_request> fake_registry::requests() const {
    const std::lock_guard lock(state_->guard);
    return state_->seen;
}

std::size_t fake_registry::count(std::string_view method, std::string_view path_part) const {
    const std::lock_guard lock(state_->guard);
    return static_cast<std::size_t>(std::count_if(state_->seen.begin(), state_->seen.end(), [&](const fake_request& q) {
        return q.method == method && q.path.find(path_part) != std::string::npos;
    }));
}

void fake_registry::forget_requests() {
    const std::lock_guard lock(state_->guard);
    state_->seen.clear();
}

std::size_t fake_registry::open_sockets() const {
    const std::lock_guard lock(state_->guard);
    return state_->sockets.size();
}

std::size_t fake_registry::peak_sockets() const {
    const std::lock_guard lock(state_->guard);
    return state_->peak;
}

std::size_t fake_registry::peak_blob_transfers() const {
    const std::lock_guard lock(state_->guard);
    return state_->peak_moving;
}

void fake_registry::hold_blobs(bool held) {
    const std::lock_guard lock(state_->guard);
    state_->held = held;
    state_->changed.notify_all();
}

void fake_registry::wait_for_blob_transfers(std::size_t n) {
    std::unique_lock lock(state_->guard);
    state_->changed.wait(lock, [&] { return state_->moving >= n; });
}

}  // namespace cobuild::test

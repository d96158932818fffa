module;
#include <array>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include <boost/asio/awaitable.hpp>

module cobuild.client;

import cobuild.base;
import cobuild.async;
import cobuild.rpc;
import :internal;

namespace cobuild::client {

namespace {

namespace stdfs = std::filesystem;

std::string read_pem(const stdfs::path& file, std::string_view what) {
    if (file.empty()) return {};
    std::ifstream in(file, std::ios::binary);
    std::string text{std::istreambuf_iterator<char>(in), {}};
    if (!in || text.empty()) throw error{errc::not_found, cat("cannot read ", what, " ", file.string())};
    return text;
}

std::string host_of(std::string_view address) {
    std::string_view host = address.substr(address.find("://") + 3);
    if (host.starts_with('[')) return std::string(host.substr(1, host.find(']') - 1));
    return std::string(host.substr(0, host.find(':')));
}

}  // namespace

void use_tls_directory(endpoint& e, const stdfs::path& dir) {
    const auto one_of = [&](const char* either, const char* other) {
        for (const auto* name : {either, other})
            if (std::error_code ec; stdfs::exists(dir / name, ec)) return dir / name;
        throw error{errc::not_found, cat("the directory ", dir.string(), " has neither ", either, " nor ", other)};
    };
    e.ca = one_of("ca.pem", "ca.crt");
    e.certificate = one_of("cert.pem", "tls.crt");
    e.key = one_of("key.pem", "tls.key");
}

std::shared_ptr<rpc::channel> dial(async::executor ex, const endpoint& e) {
    for (const std::string_view scheme : {"docker-container://", "podman-container://", "nerdctl-container://", "kube-pod://", "ssh://", "npipe://"})
        if (e.address.starts_with(scheme)) throw error{errc::unsupported, cat("addresses of the form ", scheme, "... are not supported yet")};
    if (e.ca.empty() && e.certificate.empty() && e.key.empty()) return rpc::channel::connect(std::move(ex), e.address);
    if (e.certificate.empty() != e.key.empty()) throw error{errc::invalid, "a client certificate and its key go together: one of them is missing"};
    rpc::tls security;
    security.ca = read_pem(e.ca, "the CA certificate");
    security.certificate = read_pem(e.certificate, "the client certificate");
    security.key = read_pem(e.key, "the client's key");
    security.server_name = !e.server_name.empty() || !e.address.starts_with("tcp://") ? e.server_name : host_of(e.address);
    return rpc::channel::connect(std::move(ex), e.address, std::move(security));
}

async::task<outcome> invoke(channel_ptr to, std::string method, std::string message, rpc::metadata request) {
    auto s = to->open(std::move(method), std::move(request));
    if (co_await s->write(std::move(message))) co_await s->writes_done();
    auto answer = co_await s->read();
    outcome out;
    out.status = co_await s->finish();
    if (out.status.ok() && !answer) out.status = {rpc::code::internal, "the daemon answered nothing", {}};
    if (answer) out.answer = std::move(*answer);
    co_return out;
}

async::task<void> listen(channel_ptr to, std::string method, std::string message, std::function<void(std::string_view)> each) {
    auto s = to->open(std::move(method));
    if (co_await s->write(std::move(message))) co_await s->writes_done();
    while (auto m = co_await s->read()) each(*m);
    const auto end = co_await s->finish();
    if (!end.ok()) throw rpc::to_error(end);
}

}  // namespace cobuild::client

#include "certs.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <thread>

namespace cobuild::test {

namespace {

constexpr const char* program = "/usr/bin/docker-registry";

int free_port() {
    const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    ::bind(fd, reinterpret_cast<sockaddr*>(&address), size);
    ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
    ::close(fd);
    return ntohs(address.sin_port);
}

bool answers(int port) {
    const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const bool up = ::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
    ::close(fd);
    return up;
}

}  // namespace

void shell(const std::string& command) {
    std::string output;
    FILE* pipe = ::popen((command + " 2>&1").c_str(), "r");
    if (pipe == nullptr) throw std::runtime_error("popen");
    char piece[4096];
    while (const auto n = std::fread(piece, 1, sizeof piece, pipe)) output.append(piece, n);
    if (::pclose(pipe) != 0) throw std::runtime_error(command + ": " + output);
}

authority::authority(std::filesystem::path dir, std::string name) : dir_(std::move(dir)), name_(std::move(name)) {
    const auto base = (dir_ / name_).string();
    shell("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj '/CN=" + name_ + "' -keyout " + base +
          ".key -out " + base + ".pem");
}

authority::pair authority::issue(const std::string& name, const std::string& names, int days) const {
    const auto base = (dir_ / name).string();
    const auto ca = (dir_ / name_).string();
    std::ofstream(base + ".ext") << "subjectAltName=" << names << "\nextendedKeyUsage=serverAuth,clientAuth\n";
    shell("openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj '/CN=" + name + "' -keyout " + base + ".key -out " + base +
          ".csr");
    if (days > 0) {
        shell("openssl x509 -req -in " + base + ".csr -CA " + ca + ".pem -CAkey " + ca + ".key -CAcreateserial -days " + std::to_string(days) +
              " -extfile " + base + ".ext -out " + base + ".cert");
        return {base + ".cert", base + ".key"};
    }
    // One that has expired. `x509 -days` takes no number below 1 any more (OpenSSL 3.4), `-not_after` is not there before.
    std::ofstream(base + ".db").flush();
    std::ofstream(base + ".conf") << "[ca]\ndefault_ca=here\n[here]\ndatabase=" << base << ".db\nnew_certs_dir=" << dir_.string()
                                  << "\ndefault_md=sha256\nrand_serial=yes\npolicy=any\n[any]\ncommonName=supplied\n";
    shell("openssl ca -batch -notext -config " + base + ".conf -in " + base + ".csr -cert " + ca + ".pem -keyfile " + ca +
          ".key -startdate 20200101000000Z -enddate 20210101000000Z -extfile " + base + ".ext -out " + base + ".cert");
    return {base + ".cert", base + ".key"};
}

bool docker_registry::available() {
    if (::access(program, X_OK) == 0) return true;
    std::cerr << "skipped: no " << program << " here\n";
    return false;
}

docker_registry::docker_registry(std::filesystem::path dir, options o) {
    std::filesystem::create_directories(dir / "storage");
    port_ = o.port != 0 ? o.port : free_port();
    {
        std::ofstream config(dir / "config.yml");
        config << "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage:\n  filesystem: {rootdirectory: "
               << (dir / "storage").string() << "}\nhttp:\n  addr: 127.0.0.1:" << port_ << "\n";
        if (!o.tls_cert.empty()) {
            config << "  tls:\n    certificate: " << o.tls_cert << "\n    key: " << o.tls_key << "\n";
            if (!o.client_ca.empty()) config << "    clientcas: [" << o.client_ca << "]\n";
        }
        if (!o.user.empty()) {
            shell("htpasswd -Bbc " + (dir / "htpasswd").string() + " " + o.user + " " + o.password);
            config << "auth:\n  htpasswd: {realm: test, path: " << (dir / "htpasswd").string() << "}\n";
        }
        if (!o.token_realm.empty())
            config << "auth:\n  token: {realm: " << o.token_realm << ", service: test, issuer: test, rootcertbundle: " << o.token_ca << "}\n";
    }
    const auto file = (dir / "config.yml").string();
    pid_ = ::fork();
    if (pid_ == 0) {
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        const int null = ::open("/dev/null", O_RDWR);
        for (const int fd : {0, 1, 2}) ::dup2(null, fd);
        ::execl(program, program, "serve", file.c_str(), nullptr);
        ::_exit(127);
    }
    for (int i = 0; i < 3000 && !answers(port_); ++i) {
        if (::waitpid(pid_, nullptr, WNOHANG) == pid_) throw std::runtime_error("docker-registry did not start");
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
}

docker_registry::~docker_registry() {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
}

std::string docker_registry::host() const { return "127.0.0.1:" + std::to_string(port_); }

}  // namespace cobuild::test

// Prints loopback throughput of blob pulls and pushes against scripted registries. Usage: bench_registry [megabytes]
#include <arpa/inet.h>
#include <time.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "support/certs.hpp"
#include "support/fake_registry.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.http;
import cobuild.oci;
import cobuild.registry;

using namespace cobuild;
using clock_type = std::chrono::steady_clock;

namespace {

async::task<void> swallow(async::chunk) { co_return; }

async::task<void> pull(registry::client& c, oci::descriptor d, bool verify) {
    co_await c.fetch_blob(oci::reference::parse("bench.test/a"), d, swallow, {.verify = verify});
}

async::task<void> pull_many(registry::client& c, oci::descriptor d, int n) {
    async::task_group group(co_await async::current_executor);
    for (int i = 0; i < n; ++i) group.spawn(pull(c, d, false));
    co_await group.join();
}

// What the io thread spent on it: the figure that other load on the machine does not change.
double thread_seconds() {
    timespec t{};
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) / 1e9;
}

async::task<double> timed(async::task<void> work) {
    const auto before = thread_seconds();
    co_await std::move(work);
    co_return thread_seconds() - before;
}

double rate(std::size_t bytes, clock_type::time_point since) {
    return static_cast<double>(bytes) / 1e9 / std::chrono::duration<double>(clock_type::now() - since).count();
}

}  // namespace

int main(int argc, char** argv) {
    const std::size_t size = (argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 512) * 1'000'000;
    const auto dir = std::filesystem::temp_directory_path() / random_id();
    std::filesystem::create_directories(dir);
    const scope_exit clean([&] { std::filesystem::remove_all(dir); });
    const test::authority ca(dir, "ca");
    const auto pair = ca.issue("server", "IP:127.0.0.1");
    std::string bytes(size, 'x');
    const oci::descriptor d{.media_type = "application/octet-stream", .digest = digest::of(bytes), .size = size};
    for (const bool tls : {false, true}) {
        test::fake_registry r(tls ? test::fake_registry::options{.tls_cert = pair.cert, .tls_key = pair.key} : test::fake_registry::options{});
        r.add_blob(bytes);
        async::runtime rt;
        registry::host_settings host{.host = r.host(), .plain_http = !tls, .ca = {ca.cert()}};
        registry::client c({.executor = rt.get_executor(), .pool = &rt.pool(), .hosts = [host](std::string_view) { return std::vector{host}; }});
        for (const bool verify : {false, true}) {
            rt.block_on(pull(c, d, verify));
            const auto start = clock_type::now();
            const auto cpu = rt.block_on(timed(pull(c, d, verify)));
            std::printf("%s pull%s: %.2f GB/s, %.2f GB per second of the io thread's CPU\n", tls ? "tls" : "plain", verify ? " verified" : "",
                        rate(size, start), static_cast<double>(size) / 1e9 / cpu);
        }
        const auto start = clock_type::now();
        rt.block_on(pull_many(c, d, 4));
        std::printf("%s 4 pulls at once: %.2f GB/s\n", tls ? "tls" : "plain", rate(4 * size, start));
        rt.block_on(c.close());
    }
}

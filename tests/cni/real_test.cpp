// With the distribution's plugins, in a network namespace of the test's own: the host gets no bridge, address or rule.
#include "support/support.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "stubs.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.process;
import cobuild.cni;

using namespace cobuild;
using namespace std::chrono_literals;
using strings = std::vector<std::string>;

namespace {

struct memory_ledger final : cni::ledger {
    strings entries;
    async::task<void> record(std::string text) override {
        entries.push_back(std::move(text));
        co_return;
    }
    async::task<void> forget(std::string text) override {
        std::erase(entries, text);
        co_return;
    }
};

bool have_plugins() {
    for (const auto* p : {"bridge", "host-local", "firewall", "portmap"})
        if (::access((std::string("/usr/lib/cni/") + p).c_str(), X_OK) != 0) {
            BOOST_TEST_MESSAGE("skipped: the package containernetworking-plugins is not installed");
            return false;
        }
    return test::needs_root();
}

/// Everything the test does happens here: a runtime and a spawner whose threads live in a new network namespace.
void in_own_network(const std::function<async::task<void>(async::runtime&, process::spawner&)>& body) {
    std::exception_ptr failed;
    std::thread([&] {
        try {
            if (::unshare(CLONE_NEWNET) != 0) throw_errno("unshare");
            async::runtime rt;
            process::spawner programs;
            rt.block_on(body(rt, programs));
        } catch (...) {
            failed = std::current_exception();
        }
    }).join();
    if (failed) std::rethrow_exception(failed);
}

struct net {
    net(async::runtime& r, process::spawner& s) : rt(r), programs(s) {}
    async::runtime& rt;
    process::spawner& programs;
    test::stub_plugins stubs;  // its directory is first on the plugins' path
    memory_ledger ledger;

    std::string config(const std::string& more_plugins = "") {
        const auto file = stubs.dir() + "/net.conflist";
        test::write_file(file,
                         R"({"cniVersion":"1.0.0","name":"cobuild-test","plugins":[{"type":"bridge","bridge":"cbt0","isGateway":true,"ipMasq":true,)"
                         R"("ipam":{"type":"host-local","dataDir":")" +
                             stubs.dir() +
                             R"(/ipam","ranges":[[{"subnet":"10.77.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}},)"
                             R"({"type":"firewall","backend":"iptables"})" +
                             more_plugins + "]}");
        return file;
    }
    async::task<std::unique_ptr<cni::provider>> make(std::string file) {
        return cni::make_provider(rt, programs,
                                  {.mode = cni::mode::cni,
                                   .config_path = std::move(file),
                                   .binary_dir = stubs.bin(),
                                   .lock_file = stubs.dir() + "/lock",
                                   .ledger = &ledger});
    }
    async::task<std::string> run(strings args, int ns = -1) {
        process::command c{.args = std::move(args)};
        c.setup.network_namespace = ns;
        const auto out = co_await programs.capture(std::move(c));
        co_return out.out + out.err;
    }
    /// Addresses taken, by file name.
    strings taken() const {
        strings out;
        std::error_code ec;
        for (const auto& e : std::filesystem::directory_iterator(stubs.dir() + "/ipam/cobuild-test", ec))
            if (const auto name = e.path().filename().string(); name.starts_with("10.")) out.push_back(name);
        return out;
    }
    async::task<std::string> links() { return run({"ip", "-o", "link"}); }
    async::task<std::string> rules() {
        const auto filter = co_await run({"iptables", "-S"});
        co_return filter + co_await run({"iptables", "-t", "nat", "-S"});
    }
};

long count(std::string_view text, std::string_view part) {
    long n = 0;
    for (std::size_t at = text.find(part); at != std::string_view::npos; at = text.find(part, at + 1)) ++n;
    return n;
}

/// Connects from inside the namespace to `address`:`port`.
bool reaches(int ns, const char* address, std::uint16_t port) {
    bool ok = false;
    std::thread([&] {
        if (::setns(ns, CLONE_NEWNET) != 0) return;
        const unique_fd s(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
        sockaddr_in to{};
        to.sin_family = AF_INET;
        to.sin_port = htons(port);
        ::inet_pton(AF_INET, address, &to.sin_addr);
        ok = ::connect(s.get(), reinterpret_cast<const sockaddr*>(&to), sizeof to) == 0;
    }).join();
    return ok;
}

}  // namespace

BOOST_AUTO_TEST_SUITE(cni_real)

BOOST_AUTO_TEST_CASE(a_step_gets_an_address_and_reaches_the_gateway) {
    if (!have_plugins()) return;
    in_own_network([](async::runtime& rt, process::spawner& programs) -> async::task<void> {
        net n(rt, programs);
        const auto p = co_await n.make(n.config());
        auto a = co_await p->attach("step1");
        BOOST_REQUIRE(a.addresses().ips.size() == 1U);
        BOOST_TEST(a.addresses().ips[0].address == "10.77.0.2/24");
        BOOST_TEST(a.addresses().ips[0].gateway == "10.77.0.1");
        const auto inside = co_await n.run({"ip", "-o", "addr"}, a.network_namespace());
        BOOST_TEST(count(inside, "10.77.0.2/24") == 1);
        BOOST_TEST(count(inside, "127.0.0.1/8") == 1);
        const unique_fd listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
        sockaddr_in at{};
        at.sin_family = AF_INET;
        socklen_t size = sizeof at;
        const int made = co_await rt.pool().run(
            [&] { return ::bind(listener.get(), reinterpret_cast<const sockaddr*>(&at), size) + ::listen(listener.get(), 4); });
        BOOST_REQUIRE(made == 0);
        ::getsockname(listener.get(), reinterpret_cast<sockaddr*>(&at), &size);
        BOOST_TEST(reaches(a.network_namespace(), "10.77.0.1", ntohs(at.sin_port)));

        const auto before = co_await n.links();
        BOOST_TEST(count(before, "veth") > 0);
        co_await p->detach(std::move(a));
        BOOST_TEST(count(co_await n.links(), "veth") == 0);
        BOOST_TEST(n.taken().empty());
        BOOST_TEST(n.ledger.entries.empty());
        BOOST_TEST(count(co_await n.rules(), "10.77.0.2") == 0);
    });
}

// O-NW-01
BOOST_AUTO_TEST_CASE(a_failing_second_plugin_leaks_nothing) {
    if (!have_plugins()) return;
    in_own_network([](async::runtime& rt, process::spawner& programs) -> async::task<void> {
        net n(rt, programs);
        n.stubs.add("fails", "[ $CNI_COMMAND = ADD ] && exit 1");
        const auto p = co_await n.make(n.config(R"(,{"type":"fails"})"));
        for (int i = 0; i < 20; ++i) {
            bool failed = false;
            try {
                (void)co_await p->attach(cat("step", i));
            } catch (const error&) {
                failed = true;
            }
            BOOST_TEST(failed);
        }
        BOOST_TEST(n.taken().empty());
        BOOST_TEST(n.ledger.entries.empty());
        BOOST_TEST(count(co_await n.links(), "veth") == 0);
        BOOST_TEST(count(co_await n.rules(), "10.77.0.") == 0);
    });
}

// O-NW-02, O-NW-03: many short parallel steps, then what is left of a process that was killed.
BOOST_AUTO_TEST_CASE(parallel_steps_and_the_replay_of_the_dead) {
    if (!have_plugins()) return;
    in_own_network([](async::runtime& rt, process::spawner& programs) -> async::task<void> {
        net n(rt, programs);
        const auto p = co_await n.make(n.config());
        const auto step = [&](int i) -> async::task<void> {
            auto a = co_await p->attach(cat("par", i));
            BOOST_TEST(reaches(a.network_namespace(), "127.0.0.1", 1) == false);
            co_await p->detach(std::move(a));
        };
        std::vector<async::task<void>> all;
        for (int i = 0; i < 12; ++i) all.push_back(step(i));
        co_await async::when_all(std::move(all));
        BOOST_TEST(n.taken().empty());
        BOOST_TEST(n.ledger.entries.empty());
        const auto rules_before = co_await n.rules();

        {
            const auto dropped = co_await p->attach("killed");
        }  // the namespace dies with its descriptor, as with a process
        BOOST_TEST(n.taken().size() == 1U);
        BOOST_REQUIRE(n.ledger.entries.size() == 1U);
        co_await cni::replay(rt, programs, n.ledger.entries[0]);
        BOOST_TEST(n.taken().empty());
        const auto rules_after = co_await n.rules();
        BOOST_TEST(rules_after == rules_before);
        co_await cni::replay(rt, programs, n.ledger.entries[0]);
    });
}

BOOST_AUTO_TEST_SUITE_END()

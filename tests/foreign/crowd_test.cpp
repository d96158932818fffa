// Many clients at once, some of them killed: nothing stays, nobody waits for ever, memory is flat. COBUILD_CROWD is the number of
// clients (12; `./dev soak` takes 50).
#include "support/program.hpp"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

import cobuild.base;

using namespace cobuild;
using namespace cobuild::test;
using namespace std::chrono_literals;
namespace stdfs = std::filesystem;

BOOST_TEST_GLOBAL_FIXTURE(isolation);

namespace {

std::string beside(const std::string& name) { return (stdfs::path(program()).parent_path() / name).string(); }

/// What a process has in use.
struct footprint {
    std::uint64_t memory = 0;  ///< bytes of its own, without files that are mapped
    std::size_t descriptors = 0;
};

footprint look_at(int pid) {
    footprint out;
    const auto at = stdfs::path("/proc") / std::to_string(pid);
    std::ifstream status(at / "status");
    for (std::string line; std::getline(status, line);)
        if (line.starts_with("RssAnon:")) out.memory = std::stoull(line.substr(8)) * 1024;
    for (const auto& e : stdfs::directory_iterator(at / "fd")) {
        (void)e;
        ++out.descriptors;
    }
    return out;
}

class crowd {
public:
    explicit crowd(std::size_t size) : size_(size) {
        place.make_base("busybox");
        daemon.emplace(strings{beside("cobuildd"), "--root", place.root, "--config", place.config, "--addr", address_, "--oci-worker-net=none"},
                       place.options({}, 900s));
        BOOST_REQUIRE(daemon->wait_stderr("running server on " + address_));
        for (std::size_t i = 0; i < size_; ++i) {
            const auto n = std::to_string(i);
            write_file(place / ("ctx" + n + "/own"), std::string(10'000, static_cast<char>('a' + i % 26)));
        }
    }

    /// One build each: the same step for all, one of its own, and a directory back. A third is killed at random.
    void round(unsigned number) {
        std::minstd_rand random(number * 7919 + 1);
        std::vector<std::unique_ptr<running>> clients;
        std::vector<std::chrono::milliseconds> ends(size_);  // 0: it may finish
        for (std::size_t i = 0; i < size_; ++i) {
            const auto n = std::to_string(i), context = place.path("ctx" + n);
            // A step that is killed goes on for long, so that it would be seen.
            const bool doomed = random() % 3 == 0;
            if (doomed) ends[i] = std::chrono::milliseconds(50 + random() % 1500);
            write_file(context + "/Dockerfile", cat("FROM busybox\nRUN echo ", number, " > /shared\nCOPY own /own\nRUN echo ", n, " > /made",
                                                    doomed ? "; sleep 500" : "", "\n"));
            clients.push_back(std::make_unique<running>(
                strings{beside("buildctl"), "--addr", address_, "build", "--frontend", "dockerfile.v0", "--local", "context=" + context, "--local",
                        "dockerfile=" + context, "--progress", "plain", "--output", "type=local,dest=" + place.path("out" + n)},
                place.options({}, 300s)));
        }
        const auto begun = std::chrono::steady_clock::now();
        std::vector<std::size_t> order(size_);
        for (std::size_t i = 0; i < size_; ++i) order[i] = i;
        std::sort(order.begin(), order.end(), [&](auto a, auto b) { return ends[a] < ends[b]; });
        for (const auto i : order) {
            if (ends[i].count() == 0) continue;
            std::this_thread::sleep_until(begun + ends[i]);
            clients[i]->signal(SIGKILL);
        }
        for (std::size_t i = 0; i < size_; ++i) {
            const auto o = clients[i]->wait();
            if (ends[i].count() != 0) continue;
            BOOST_TEST(o.code == 0, o.str());
            BOOST_TEST(read_file(place / ("out" + std::to_string(i) + "/made")) == std::to_string(i) + "\n");
        }
        settle();
    }

    [[nodiscard]] footprint now() const { return look_at(daemon->pid()); }
    [[nodiscard]] std::size_t size() const { return size_; }
    /// Everything is given back: what nobody uses can be removed, and then there is nothing.
    void settle() {
        std::string left;
        for (int i = 0; i < 200; ++i) {
            const auto pruned = run({beside("buildctl"), "--addr", address_, "prune", "--all"}, place.options());
            BOOST_REQUIRE_MESSAGE(pruned.code == 0, pruned.str() << (daemon->ended(0ms) ? daemon->wait().str() : std::string()));
            left = run({beside("buildctl"), "--addr", address_, "du"}, place.options()).out;
            if (left.find("Total:\t\t0B") != std::string::npos) return;
        }
        BOOST_ERROR("still in use: " << left);
    }
    workshop place;
    std::optional<running> daemon;

private:
    std::size_t size_;
    std::string address_ = "unix://" + place.path("d.sock");
};

}  // namespace

BOOST_AUTO_TEST_CASE(killed_clients_leave_nothing) {
    if (!needs_root() || !docker_registry::available()) return;
    const char* given = std::getenv("COBUILD_CROWD");
    const char* rounds_given = std::getenv("COBUILD_CROWD_ROUNDS");
    const auto size = given != nullptr ? std::stoul(given) : 12UL;
    const auto rounds = rounds_given != nullptr ? static_cast<unsigned>(std::stoul(rounds_given)) : 6U;
    crowd all(size);
    // Threads, allocators and the history fill in the first rounds.
    all.round(0);
    all.round(1);
    const auto first = all.now();
    auto half = first;
    for (unsigned i = 2; i <= rounds; ++i) {
        all.round(i);
        if (i == rounds / 2) half = all.now();
        BOOST_TEST_MESSAGE("round " << i << ": " << all.now().memory / 1024 << " KiB");
    }
    const auto last = all.now();
    BOOST_TEST_MESSAGE(size << " clients, " << rounds << " rounds: " << first.memory / 1024 << " KiB and " << first.descriptors
                            << " descriptors after the second, " << last.memory / 1024 << " KiB and " << last.descriptors << " at the end");
    // It warms up with what its clients need at once, about six rounds, and then it is flat.
    BOOST_TEST(last.memory < first.memory + ((size + 8) << 20));
    if (rounds >= 12) BOOST_TEST(last.memory < half.memory + (std::uint64_t{5} << 20));
    BOOST_TEST(last.descriptors <= first.descriptors + 4);
    all.place.note_owners();
    all.daemon->signal(SIGTERM);
    const auto o = all.daemon->wait();
    BOOST_TEST(o.code == 0, o.str());
    for (const auto& left : all.place.leftovers()) BOOST_ERROR(left);
}

// A bad link for bench/registry.py: prints its port, then passes bytes on until its standard input ends.
// Usage: bench_relay PORT DELAY_MS WINDOW STALL_MS STALL_EVERY CUT_AFTER
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "support/relay.hpp"

int main(int argc, char** argv) {
    if (argc != 7) return 2;
    const auto number = [&](int i) { return std::strtoul(argv[i], nullptr, 10); };
    cobuild::test::relay link(static_cast<int>(number(1)), {.cut_after = number(6),
                                                            .delay = std::chrono::milliseconds(number(2)),
                                                            .window = number(3),
                                                            .stall = std::chrono::milliseconds(number(4)),
                                                            .stall_every = number(5)});
    std::printf("%d\n", link.port());
    std::fflush(stdout);
    while (std::getchar() != EOF) {
    }
}

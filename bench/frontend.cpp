// bench_frontend: CPU time and peak memory of converting a Dockerfile of 10,000 lines in 1,000 stages (aim: 100 ms, 50 MiB),
// and of inputs of 64 KiB made to be slow (aim: 100 ms each). Ends with 1 when an aim is missed by a factor of `slack`.
#include <sys/resource.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

import cobuild.base;
import cobuild.async;
import cobuild.oci;
import cobuild.gateway;
import cobuild.frontend;

using namespace cobuild;

namespace {

struct any_image final : gateway::frontend_gateway {
    async::task<gateway::image_config> resolve_image_config(gateway::resolve_request r) override {
        co_return gateway::image_config{r.reference, digest::of(r.reference),
                                        R"({"architecture":"amd64","os":"linux","config":{},"rootfs":{"type":"layers","diff_ids":[)"
                                        R"("sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]}})"};
    }
    async::task<std::optional<std::string>> read_context_file(std::string, std::string) override { co_return std::nullopt; }
};

double cpu_milliseconds() {
    rusage u;
    ::getrusage(RUSAGE_SELF, &u);
    const auto of = [](const timeval& t) { return static_cast<double>(t.tv_sec) * 1e3 + static_cast<double>(t.tv_usec) / 1e3; };
    return of(u.ru_utime) + of(u.ru_stime);
}

double peak_mib() {
    rusage u;
    ::getrusage(RUSAGE_SELF, &u);
    return static_cast<double>(u.ru_maxrss) / 1024;
}

constexpr std::size_t big = 64UL * 1024;

std::string repeat(std::string_view piece, std::size_t total = big) {
    std::string out;
    while (out.size() + piece.size() <= total) out += piece;
    return out;
}

/// `piece` with # replaced by a number that counts up.
std::string numbered(std::string_view piece, std::size_t total = big) {
    std::string out;
    for (unsigned n = 0; out.size() + piece.size() + 8 <= total; ++n)
        for (const char c : piece) c == '#' ? out += cat(n) : out += c;
    return out;
}

std::string large_file() {
    std::string text;
    for (int i = 0; i < 1000; ++i) {
        text += cat("FROM ", i == 0 ? std::string("alpine") : cat("s", i - 1), " AS s", i, "\nARG A=b\nENV C=$A D=\"e f\"\nWORKDIR /x/$C\n");
        text +=
            "COPY --from=alpine --chown=1:2 a b /c/\nRUN --mount=type=cache,target=/root/.cache \\\n    make && \\\n    make install\n"
            "EXPOSE 80/tcp\nLABEL l=m\n";
    }
    return text;
}

double limit = 100;
bool missed = false;

void measure(async::runtime& rt, std::string_view name, std::string text, std::string ignore = {}) {
    frontend::request r;
    r.dockerfile = std::move(text);
    if (!ignore.empty()) r.ignore_file = std::move(ignore);
    r.build_platform = {.os = "linux", .architecture = "amd64"};
    any_image engine;
    const double start = cpu_milliseconds();
    std::string outcome = "ok";
    try {
        const auto out = rt.block_on(frontend::convert(std::move(r), engine));
        outcome = cat(out.graph.ops.size(), " ops, ", out.warnings.size(), " warnings");
    } catch (const error& e) {
        outcome = std::string(e.what()).substr(0, 60);
    }
    const double took = cpu_milliseconds() - start;
    missed = missed || took > limit;
    std::printf("%-34s %8.1f ms  peak %6.1f MiB  %s%s\n", std::string(name).c_str(), took, peak_mib(), outcome.c_str(),
                took > limit ? "  <-- slow" : "");
    std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
    limit *= argc > 1 ? std::atof(argv[1]) : 1.0;
    async::runtime rt({.max_blocking_threads = 1});
    measure(rt, "nothing", "FROM a\n");
    measure(rt, "10,000 lines, 1,000 stages", large_file());
    const std::string from = "FROM a\n";
    measure(rt, "many ENV", from + numbered("ENV a#=b\n"));
    measure(rt, "many ENV in one line", from + "ENV " + numbered("a#=b ") + "\n");
    measure(rt, "many ARG", from + numbered("ARG a#=b\n"));
    measure(rt, "many global ARG", numbered("ARG a#=b\n") + from);
    measure(rt, "undefined variables", from + "ENV " + numbered("a#=b ", big / 2) + "\nENV " + numbered("b#=$c# ", big / 2) + "\n");
    measure(rt, "undefined in FROM", numbered("ARG a#\n", big / 2) + numbered("FROM x$b#\n", big / 2));
    measure(rt, "many stages", numbered("FROM a AS s#\n"));
    measure(rt, "stages upon stages", from + numbered("FROM 0 AS s#\n"));
    measure(rt, "copies from later stages",
            numbered("FROM scratch AS a#\nCOPY --from=b# x /\n", big / 2) + numbered("FROM scratch AS b#\n", big / 2));
    measure(rt, "copies from all", "FROM scratch AS s\n" + from + repeat("COPY --from=s a b\n"));
    measure(rt, "copies from unknown images", from + numbered("COPY --from=i# a b\n"));
    measure(rt, "many sources", from + "COPY " + numbered("f# ") + " /d/\n");
    measure(rt, "many excludes", from + "COPY " + numbered("--exclude=a# ") + "a /d/\n");
    measure(rt, "many RUN", from + repeat("RUN x\n"));
    measure(rt, "many mounts", from + "RUN " + numbered("--mount=target=/m# ") + "x\n");
    measure(rt, "many here-documents", from + numbered("COPY <<E# /f\nE#\n"));
    measure(rt, "ports", from + "EXPOSE " + repeat("0-65535 ") + "\n");
    measure(rt, "labels", from + "LABEL " + numbered("a#=b ") + "\n");
    measure(rt, "volumes", from + "VOLUME " + numbered("/a# ") + "\n");
    measure(rt, "ONBUILD", "FROM a AS p\n" + numbered("ONBUILD ENV a#=b\n") + "FROM p\n");
    measure(rt, "errors everywhere", from + numbered("COPY ../x# /\n"));
    measure(rt, "long chains of defaults", from + "ENV A=" + repeat("${A:-", 1000) + repeat("}", 200) + "\n");
    measure(rt, "ignore rules", from + repeat("COPY a/b/c/d /\n", big / 8), numbered("**/a#/**/*b\n"));
    measure(rt, "ignore rules with many stars", from + cat("COPY ", repeat("a/", 2000), " /\n"), repeat("**/*a*/") + "b\n");
    measure(rt, "ignore rules with stars in a name", from + cat("COPY ", std::string(2000, 'a'), " /\n"), repeat("*a") + "b\n");
    // Every step holds every variable, in the graph and in the history: the result itself is quadratic, as BuildKit's is.
    measure(rt, "ARG and RUN in turn (8 KiB)", from + numbered("ARG a#=b\nRUN x\n", big / 8));
    return missed ? 1 : 0;
}

// A frontend as an image would hold it: speaks LLBBridge on its standard input and output. Its result is one file that tells what it
// was given; with the option "fail" an error, with "exit" nothing at all.
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include "gateway.pb.h"

import cobuild.base;
import cobuild.async;
import cobuild.llb;
import cobuild.rpc;

using namespace cobuild;
namespace bridge = moby::buildkit::v1::frontend;

namespace {

void pass_on(int from, int to) {
    std::array<char, 16384> buffer{};
    for (;;) {
        const auto n = ::read(from, buffer.data(), buffer.size());
        if (n <= 0) break;
        for (ssize_t done = 0; done < n;) {
            const auto w = ::write(to, buffer.data() + done, static_cast<std::size_t>(n - done));
            if (w <= 0) return;
            done += w;
        }
    }
    ::shutdown(to, SHUT_WR);
}

std::map<std::string, std::string> options() {
    std::map<std::string, std::string> out;
    for (char** e = environ; *e != nullptr; ++e) {
        const std::string_view one = *e;
        if (!one.starts_with("BUILDKIT_FRONTEND_OPT_")) continue;
        const auto value = one.substr(one.find('=') + 1);
        out[std::string(value.substr(0, value.find('=')))] = value.substr(value.find('=') + 1);
    }
    return out;
}

struct gateway {
    std::shared_ptr<rpc::channel> channel;
    template<class R, class Q>
    async::task<R> ask(std::string method, Q q) {
        R out;
        if (!out.ParseFromString(co_await channel->unary(cat("/moby.buildkit.v1.frontend.LLBBridge/", method), q.SerializeAsString())))
            throw error{errc::corrupt, cat("the answer of ", method, " cannot be read")};
        co_return out;
    }
};

std::string one_file(const std::string& text) {
    llb::graph g;
    llb::file_op f;
    f.actions.push_back({.input = llb::scratch,
                         .secondary_input = llb::scratch,
                         .output = 0,
                         .what = llb::mkfile_action{.path = "/told", .mode = 0644, .data = text}});
    return llb::marshal(g.finish(g.add({.inputs = {}, .what = std::move(f), .platform = {}})));
}

/// The Dockerfile, from the client.
async::task<std::string> read_source(gateway g, std::string name) {
    llb::graph graph;
    bridge::SolveRequest q;
    q.set_definition(llb::marshal(graph.finish(graph.add({.inputs = {}, .what = llb::source_op{"local://dockerfile", {}}, .platform = {}}))));
    q.set_allow_result_return(true);
    q.set_allow_result_array_ref(true);
    bridge::ReadFileRequest read;
    read.set_ref((co_await g.ask<bridge::SolveResponse>("Solve", q)).result().ref().id());
    read.set_file_path(name);
    co_return (co_await g.ask<bridge::ReadFileResponse>("ReadFile", read)).data();
}

async::task<int> run(std::shared_ptr<rpc::channel> channel) {
    gateway g{std::move(channel)};
    auto opts = options();
    const bool by_directive = opts.contains("cmdline");
    const auto pong = co_await g.ask<bridge::PongResponse>("Ping", bridge::PingRequest());
    bridge::ReturnRequest result;
    if (opts["build-arg:fail"] == "1") {
        result.mutable_error()->set_code(2);
        result.mutable_error()->set_message("the tiny frontend gave up");
        (void)co_await g.ask<bridge::ReturnResponse>("Return", result);
        co_return 0;
    }
    if (opts["build-arg:exit"] == "1") {
        std::cerr << "no idea\n";
        co_return 9;
    }
    const char* product = std::getenv("BUILDKIT_EXPORTEDPRODUCT");
    std::string text = cat("cmdline=", opts["cmdline"], "\nsource=", opts["source"], "\ntarget=", opts["target"],
                           "\nproduct=", product == nullptr ? "" : product, "\nworkers=", pong.workers_size(), "\n");
    if (by_directive) text += co_await read_source(g, opts["filename"].empty() ? "Dockerfile" : opts["filename"]);
    const auto inputs = co_await g.ask<bridge::InputsResponse>("Inputs", bridge::InputsRequest());
    for (const auto& [name, definition] : inputs.definitions()) text += cat("input ", name, " ", definition.size(), "\n");
    bridge::SolveRequest q;
    q.set_definition(one_file(text));
    q.set_allow_result_return(true);
    q.set_allow_result_array_ref(true);
    *result.mutable_result()->mutable_ref() = (co_await g.ask<bridge::SolveResponse>("Solve", q)).result().ref();
    (*result.mutable_result()->mutable_metadata())["containerimage.config"] =
        R"({"architecture":"amd64","os":"linux","config":{"Labels":{"made.by":"tiny"}},"rootfs":{"type":"layers","diff_ids":[]}})";
    (void)co_await g.ask<bridge::ReturnResponse>("Return", result);
    co_return 0;
}

}  // namespace

int main() {
    try {
        std::array<int, 2> ends{};
        if (::socketpair(AF_UNIX, SOCK_STREAM, 0, ends.data()) != 0) throw_errno("socketpair");
        std::thread(pass_on, STDIN_FILENO, ends[0]).detach();
        std::thread(pass_on, ends[0], STDOUT_FILENO).detach();
        async::runtime rt;
        const int code = rt.block_on(run(rpc::channel::over(rt.get_executor(), unique_fd{ends[1]})));
        std::cerr.flush();
        ::_exit(code);
    } catch (const std::exception& e) {
        std::cerr << "tiny: " << e.what() << "\n";
        ::_exit(1);
    }
}

// Containers that a client asks for during its build: LLBBridge's NewContainer, ExecProcess and the like, over real runc.
#include "support/support.hpp"

#include <chrono>
#include <deque>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "control.pb.h"
#include "gateway.pb.h"
#include "status.pb.h"

import cobuild.base;
import cobuild.async;
import cobuild.build;
import cobuild.config;
import cobuild.daemon;
import cobuild.json;
import cobuild.llb;
import cobuild.rpc;

#include "daemon/served.hpp"
#include "support/failure.hpp"

using namespace cobuild;
using namespace std::chrono_literals;
using namespace cobuild::test;
namespace bridge = moby::buildkit::v1::frontend;

namespace {

/// A root with busybox under the names given, besides sh.
llb::input busybox_root(llb::graph& g) {
    llb::file_op f;
    std::int64_t last = llb::scratch;
    const auto add = [&](auto what) {
        f.actions.push_back({.input = last, .secondary_input = llb::scratch, .output = llb::no_output, .what = std::move(what)});
        last = static_cast<std::int64_t>(f.actions.size()) - 1;
    };
    add(llb::mkdir_action{.path = "/bin", .mode = 0755});
    add(llb::mkfile_action{.path = "/bin/busybox", .mode = 0755, .data = read_file("/bin/busybox")});
    for (const auto* name : {"sh", "cat", "sleep", "echo", "touch", "test"})
        add(llb::symlink_action{.oldpath = "busybox", .newpath = cat("/bin/", name)});
    f.actions.back().output = 0;
    return g.add({.inputs = {}, .what = std::move(f), .platform = {}});
}

/// One build that its client drives.
struct driven {
    served& s;
    rpc::metadata m;

    template<class R, class Q>
    async::task<R> ask(std::string method, Q q) {
        return call<R>(s, cat(gateway, method), std::move(q), m);
    }
    async::task<std::string> solve(std::string definition) {
        bridge::SolveRequest q;
        q.set_definition(std::move(definition));
        q.set_allow_result_return(true);
        q.set_allow_result_array_ref(true);
        q.set_evaluate(true);
        co_return (co_await ask<bridge::SolveResponse>("Solve", q)).result().ref().id();
    }
    async::task<std::string> root() {
        llb::graph g;
        co_return co_await solve(llb::marshal(g.finish(busybox_root(g))));
    }
    /// A container with that root; `more` adds to the request.
    async::task<void> make(std::string id, std::string ref, std::function<void(bridge::NewContainerRequest&)> more = {}) {
        bridge::NewContainerRequest q;
        q.set_containerid(id);
        auto* m0 = q.add_mounts();
        m0->set_dest("/");
        m0->set_resultid(ref);
        if (more) more(q);
        (void)co_await ask<bridge::NewContainerResponse>("NewContainer", q);
    }
    async::task<void> release(std::string id) {
        bridge::ReleaseContainerRequest q;
        q.set_containerid(id);
        (void)co_await ask<bridge::ReleaseContainerResponse>("ReleaseContainer", q);
    }
};

void in_build(std::function<async::task<void>(driven)> work, const std::function<void(daemon::options&)>& change = {}) {
    with_daemon(
        [work](served& s) -> async::task<void> {
            const auto run = [](served& on, std::function<async::task<void>(driven)> what) -> async::task<void> {
                rpc::status end;
                co_await drive(
                    on, "c",
                    [&on, what](rpc::metadata m) -> async::task<void> {
                        const auto all = [](served& from, rpc::metadata meta, std::function<async::task<void>(driven)> f) -> async::task<void> {
                            driven d{from, meta};
                            std::exception_ptr failed;
                            try {
                                co_await f(d);
                            } catch (...) {
                                failed = std::current_exception();
                            }
                            (void)co_await d.ask<bridge::ReturnResponse>("Return", bridge::ReturnRequest());
                            if (failed) std::rethrow_exception(failed);
                        };
                        return all(on, std::move(m), what);
                    },
                    &end);
                BOOST_TEST(end.ok(), end.message);
            };
            return run(s, work);
        },
        change);
}

/// One ExecProcess stream, and what its processes said.
class processes {
public:
    explicit processes(driven d) : stream_(d.s.channel->open(cat(gateway, "ExecProcess"), d.m)) {}

    async::task<void> start(std::string id, std::string container, std::vector<std::string> args, std::vector<std::uint32_t> fds = {1, 2},
                            std::function<void(bridge::InitMessage&)> more = {}) {
        bridge::ExecMessage m;
        m.set_processid(id);
        auto& init = *m.mutable_init();
        init.set_containerid(container);
        for (auto& a : args) *init.mutable_meta()->add_args() = a;
        for (const auto fd : fds) init.add_fds(fd);
        if (more) more(init);
        co_await send(m);
        co_await until([id](processes& p) { return p.of[id].started; });
    }
    async::task<void> say(std::string id, std::string text, bool end = false) {
        bridge::ExecMessage m;
        m.set_processid(id);
        m.mutable_file()->set_data(text);
        m.mutable_file()->set_eof(end);
        co_await send(m);
    }
    async::task<void> signal(std::string id, std::string name) {
        bridge::ExecMessage m;
        m.set_processid(id);
        m.mutable_signal()->set_name(name);
        co_await send(m);
    }
    async::task<void> resize(std::string id, unsigned rows, unsigned columns) {
        bridge::ExecMessage m;
        m.set_processid(id);
        m.mutable_resize()->set_rows(rows);
        m.mutable_resize()->set_cols(columns);
        co_await send(m);
    }
    async::task<void> heard(std::string id, std::string word) {
        co_await until([id, word](processes& p) { return p.of[id].said.find(word) != std::string::npos; });
    }
    /// Its exit, after Done.
    async::task<bridge::ExitMessage> end(std::string id) {
        co_await until([id](processes& p) { return p.of[id].done; });
        co_return of[id].exit.value();
    }
    async::task<rpc::status> finish() {
        co_await stream_->writes_done();
        while (co_await stream_->read()) {
        }
        co_return co_await stream_->finish();
    }
    void drop() { stream_->cancel(); }
    [[nodiscard]] std::string said(const std::string& id) { return of[id].said; }

private:
    struct one {
        bool started = false, done = false;
        std::string said;
        std::optional<bridge::ExitMessage> exit;
    };

    async::task<void> send(bridge::ExecMessage m) {
        if (!co_await stream_->write(m.SerializeAsString())) throw rpc::to_error(co_await stream_->finish());
    }
    async::task<void> until(std::function<bool(processes&)> enough) {
        while (!enough(*this)) {
            const auto bytes = co_await async::with_deadline(20s, "a message of the stream", stream_->read());
            if (!bytes) throw rpc::to_error(co_await stream_->finish());
            bridge::ExecMessage m;
            BOOST_TEST(m.ParseFromString(*bytes));
            auto& p = of[m.processid()];
            if (m.has_started()) p.started = true;
            BOOST_TEST(p.started);  // nothing comes before it
            BOOST_TEST(!p.done);    // nor after Done
            if (m.has_file()) p.said += m.file().data();
            if (m.has_exit()) p.exit = m.exit();
            if (m.has_done()) p.done = true;
        }
    }

    std::shared_ptr<rpc::stream> stream_;
    std::map<std::string, one> of;
};

std::map<std::string, std::string> details_of(const google::rpc::Status& s) {
    std::map<std::string, std::string> out;
    for (const auto& d : s.details()) out[d.type_url()] = d.value();
    return out;
}

/// What a failed Solve told of its step.
async::task<json::object> failed_solve(driven d, std::string definition) {
    bridge::SolveRequest q;
    q.set_definition(std::move(definition));
    q.set_allow_result_return(true);
    q.set_evaluate(true);
    auto stream = d.s.channel->open(cat(gateway, "Solve"), d.m);
    BOOST_TEST(co_await stream->write(q.SerializeAsString()));
    co_await stream->writes_done();
    BOOST_TEST(!(co_await stream->read()).has_value());
    const auto end = co_await stream->finish();
    BOOST_TEST(!end.ok());
    google::rpc::Status all;
    BOOST_TEST(all.ParseFromString(end.details));
    auto found = details_of(all);
    BOOST_REQUIRE(found.contains("github.com/moby/buildkit/errdefs.Solve+json"));
    co_return json::parse(found["github.com/moby/buildkit/errdefs.Solve+json"]).as_object();
}

}  // namespace

BOOST_AUTO_TEST_CASE(processes_share_a_container) {
    in_build([](driven d) -> async::task<void> {
        co_await d.make("c1", co_await d.root(), [](bridge::NewContainerRequest& q) {
            q.set_hostname("boat");
            auto* h = q.add_extrahosts();
            h->set_host("some.host");
            h->set_ip("169.254.11.22");
            auto* t = q.add_mounts();
            t->set_dest("/scratch");
        });
        processes p(d);
        co_await p.start("1", "c1", {"cat"}, {0});
        co_await p.start("2", "c1", {"sh", "-c", "cat; hostname; cat /etc/hosts; echo $PATH; echo x > /scratch/y; echo oops >&2; exit 3"}, {0, 1, 2});
        co_await p.say("2", "typed\n");
        co_await p.say("2", "more\n", true);
        const auto end = co_await p.end("2");
        BOOST_TEST(end.code() == 3U);
        BOOST_TEST(end.error().message() == "exit code: 3");
        BOOST_TEST(details_of(end.error()).at("github.com/moby/buildkit/gatewayapi.ExitMessage+json") == R"({"Code":3})");
        const auto said = p.said("2");
        for (const auto* part :
             {"typed\nmore\n", "boat\n", "169.254.11.22\tsome.host\n", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n", "oops\n"})
            BOOST_TEST(said.find(part) != std::string::npos, part << " is missing in " << said);
        // From outside, while it runs.
        bridge::ReadFileRequest read;
        read.set_ref("c1");
        read.set_mount_index(1);
        read.set_file_path("/y");
        BOOST_TEST((co_await d.ask<bridge::ReadFileResponse>("ReadFileContainer", read)).data() == "x\n");
        bridge::ReadDirRequest list;
        list.set_ref("c1");
        list.set_dir_path("/bin");
        list.set_include_pattern("ca*");
        const auto entries = co_await d.ask<bridge::ReadDirResponse>("ReadDirContainer", list);
        BOOST_REQUIRE(entries.entries_size() == 1);
        BOOST_TEST(entries.entries(0).linkname() == "busybox");
        BOOST_TEST(entries.entries(0).size() == 7);  // a link's size is its text's
        bridge::StatFileRequest stat;
        stat.set_ref("c1");
        stat.set_path("/bin/cat");
        BOOST_TEST((co_await d.ask<bridge::StatFileResponse>("StatFileContainer", stat)).stat().mode() == 0755U);  // of what it links to
        stat.set_mount_index(2);
        BOOST_TEST(says(co_await failure(d.ask<bridge::StatFileResponse>("StatFileContainer", stat)), "out of bounds"));
        co_await p.say("1", "", true);
        BOOST_TEST((co_await p.end("1")).code() == 0U);
        BOOST_TEST((co_await p.finish()).ok());
        // Its only process that failed is what its release tells.
        BOOST_TEST(says(co_await failure(d.release("c1")), "exit code: 3"));
        BOOST_TEST(says(co_await failure(d.release("c1")), "previously released"));
    });
}

BOOST_AUTO_TEST_CASE(what_one_container_writes_another_does_not_see) {
    in_build([](driven d) -> async::task<void> {
        const auto ref = co_await d.root();
        co_await d.make("a", ref);
        co_await d.make("b", ref);
        BOOST_TEST(((co_await failure(d.make("b", ref))).kind() == errc::exists));
        processes p(d);
        co_await p.start("1", "a", {"touch", "/made"});
        BOOST_TEST((co_await p.end("1")).code() == 0U);
        co_await p.start("2", "b", {"test", "-e", "/made"});
        BOOST_TEST((co_await p.end("2")).code() == 1U);
        BOOST_TEST(says(co_await failure(d.make("c", "no-such-ref")), "no such ref: no-such-ref"));
        BOOST_TEST(
            says(co_await failure(d.make("c", "", [](bridge::NewContainerRequest& q) { q.mutable_mounts(0)->set_dest("/only"); })), "no root"));
        BOOST_TEST(says(co_await failure(p.start("3", "none", {"true"})), "previously released or not created"));
    });
}

BOOST_AUTO_TEST_CASE(releasing_a_container_ends_its_processes) {
    in_build([](driven d) -> async::task<void> {
        co_await d.make("c", co_await d.root());
        processes p(d);
        co_await p.start("1", "c", {"sleep", "1000"});
        co_await p.start("2", "c", {"sleep", "1000"});
        const auto told = co_await failure(d.release("c"));
        BOOST_TEST((told.kind() == errc::canceled));
        for (const auto* id : {"1", "2"}) {
            const auto end = co_await p.end(id);
            BOOST_TEST(end.code() == 255U);
            BOOST_TEST(end.error().code() == 1);  // Canceled
            BOOST_TEST(end.error().message().find("context canceled") != std::string::npos);
        }
    });
}

BOOST_AUTO_TEST_CASE(the_end_of_a_build_ends_its_containers) {
    in_build([](driven d) -> async::task<void> {
        co_await d.make("c", co_await d.root());
        const auto p = std::make_shared<processes>(d);
        co_await p->start("1", "c", {"sleep", "1000"});
    });  // closing the engine waits for everything
}

BOOST_AUTO_TEST_CASE(processes_end_with_the_stream_that_started_them) {
    in_build([](driven d) -> async::task<void> {
        co_await d.make("c", co_await d.root());
        processes keeps(d);
        co_await keeps.start("1", "c", {"sh", "-c", "while ! test -e /stop; do sleep 0.05; done"});
        processes goes(d);
        co_await goes.start("2", "c", {"sh", "-c", "trap '' TERM; echo $$ > /pid; echo ready; sleep 1000"});
        co_await goes.heard("2", "ready");
        goes.drop();
        co_await keeps.start("3", "c", {"sh", "-c", "while test -d /proc/$(cat /pid); do sleep 0.02; done; touch /stop"});
        BOOST_TEST((co_await keeps.end("3")).code() == 0U);
        BOOST_TEST((co_await keeps.end("1")).code() == 0U);
    });
}

BOOST_AUTO_TEST_CASE(signals_and_terminals) {
    in_build([](driven d) -> async::task<void> {
        co_await d.make("c", co_await d.root());
        processes p(d);
        co_await p.start("1", "c", {"sh", "-c", "trap 'exit 99' HUP; echo ready; while true; do sleep 0.02; done"});
        co_await p.heard("1", "ready");
        co_await p.start("2", "c", {"sh"}, {0, 1, 2}, [](bridge::InitMessage& m) { m.set_tty(true); });
        co_await p.resize("2", 40, 80);
        co_await p.heard("2", "# ");  // what is typed before a shell asks may be dropped
        co_await p.say("2", "busybox stty size; echo $TERM\n");
        co_await p.heard("2", "40 80");
        co_await p.heard("2", "xterm\r\n");
        co_await p.say("2", "exit 7\n");
        BOOST_TEST((co_await p.end("2")).code() == 7U);
        co_await p.start("3", "c", {"sleep", "1000"});
        co_await p.signal("3", "KILL");
        BOOST_TEST((co_await p.end("3")).code() == 137U);
        co_await p.signal("1", "HUP");
        BOOST_TEST((co_await p.end("1")).code() == 99U);
        BOOST_TEST(says(co_await failure([](processes& on) -> async::task<void> {
                            co_await on.signal("1", "NOSUCH");
                            co_await on.end("none");
                        }(p)),
                        "Unknown signal NOSUCH"));
    });
}

BOOST_AUTO_TEST_CASE(what_a_container_may_is_what_its_build_may) {
    in_build([](driven d) -> async::task<void> {
        co_await d.make("c", co_await d.root());
        processes p(d);
        const auto with = [](int mode) { return [mode](bridge::InitMessage& m) { m.set_security(static_cast<pb::SecurityMode>(mode)); }; };
        co_await p.start("1", "c", {"true"}, {}, with(1));
        auto end = co_await p.end("1");
        BOOST_TEST(end.code() == 255U);
        BOOST_TEST(end.error().message().find("security.insecure is not allowed") != std::string::npos);
        co_await d.make("d", co_await d.root());
        co_await p.start("2", "d", {"true"}, {}, with(2));
        end = co_await p.end("2");
        BOOST_TEST(end.error().message().find("invalid security mode") != std::string::npos);
        co_await d.make("n", co_await d.root(), [](bridge::NewContainerRequest& q) { q.set_network(pb::HOST); });
        co_await p.start("3", "n", {"true"});
        end = co_await p.end("3");
        BOOST_TEST(end.error().message().find("network.host is not allowed") != std::string::npos);
    });
}

BOOST_AUTO_TEST_CASE(a_failed_command_can_be_looked_into) {
    in_build([](driven d) -> async::task<void> {
        llb::graph g;
        const auto root = busybox_root(g);
        llb::exec_op e;
        e.meta.args = {"/bin/sh", "-c", "echo left > /data; echo other > /rw/data; exit 5"};
        e.meta.cwd = "/";
        e.mounts.push_back({.input = 0, .selector = {}, .dest = "/", .output = 0});
        e.mounts.push_back({.input = llb::scratch, .selector = {}, .dest = "/rw", .output = 1});
        const auto step = g.add({.inputs = {root}, .what = std::move(e), .platform = {}});
        const auto told = co_await failed_solve(d, llb::marshal(g.finish(step)));
        const auto mounts = json::strings_at(told, "mountIDs");
        BOOST_REQUIRE(mounts.size() == 2U);
        BOOST_TEST(json::strings_at(told, "inputIDs").size() == 2U);
        BOOST_TEST(json::at(told, "op").find("exec") != nullptr);
        co_await d.make("after", mounts[0], [&](bridge::NewContainerRequest& q) {
            auto* m = q.add_mounts();
            m->set_dest("/rw");
            m->set_resultid(mounts[1]);
        });
        processes p(d);
        co_await p.start("1", "after", {"cat", "/data", "/rw/data"});
        BOOST_TEST((co_await p.end("1")).code() == 0U);
        BOOST_TEST(p.said("1") == "left\nother\n");
    });
}

BOOST_AUTO_TEST_CASE(a_failed_file_action_can_be_looked_into) {
    in_build([](driven d) -> async::task<void> {
        llb::graph g;
        llb::file_op f;
        f.actions.push_back({.input = llb::scratch,
                             .secondary_input = llb::scratch,
                             .output = llb::no_output,
                             .what = llb::mkdir_action{.path = "/found", .mode = 0700}});
        f.actions.push_back({.input = 0,
                             .secondary_input = llb::scratch,
                             .output = llb::no_output,
                             .what = llb::mkfile_action{.path = "/found/foo", .mode = 0600, .data = "this"}});
        f.actions.push_back({.input = 1,
                             .secondary_input = llb::scratch,
                             .output = 0,
                             .what = llb::mkfile_action{.path = "/notfound/foo", .mode = 0600, .data = "that"}});
        const auto told = co_await failed_solve(d, llb::marshal(g.finish(g.add({.inputs = {}, .what = std::move(f), .platform = {}}))));
        const auto mounts = json::strings_at(told, "mountIDs");
        BOOST_REQUIRE(mounts.size() == 3U);  // one an action
        BOOST_TEST(json::string_at(json::object_at(told, "file"), "index") == "2");
        bridge::ReadFileRequest read;
        read.set_ref(mounts[2]);
        read.set_file_path("/found/foo");
        BOOST_TEST((co_await d.ask<bridge::ReadFileResponse>("ReadFile", read)).data() == "this");
    });
}

BOOST_AUTO_TEST_CASE(an_input_that_lacks_what_is_mounted_can_be_looked_into) {
    in_build([](driven d) -> async::task<void> {
        llb::graph g;
        const auto root = busybox_root(g);
        llb::file_op f;
        f.actions.push_back({.input = llb::scratch,
                             .secondary_input = llb::scratch,
                             .output = 0,
                             .what = llb::mkfile_action{.path = "/data", .mode = 0600, .data = "here"}});
        const auto side = g.add({.inputs = {}, .what = std::move(f), .platform = {}});
        llb::exec_op e;
        e.meta.args = {"true"};
        e.mounts.push_back({.input = 0, .selector = {}, .dest = "/", .output = 0});
        e.mounts.push_back({.input = 1, .selector = "/notfound", .dest = "/src", .output = llb::no_output, .readonly = true});
        const auto told = co_await failed_solve(d, llb::marshal(g.finish(g.add({.inputs = {root, side}, .what = std::move(e), .platform = {}}))));
        BOOST_TEST(told.contains("cache"));
        const auto inputs = json::strings_at(told, "inputIDs");
        BOOST_REQUIRE(inputs.size() == 1U);
        bridge::ReadFileRequest read;
        read.set_ref(inputs[0]);
        read.set_file_path("/data");
        BOOST_TEST((co_await d.ask<bridge::ReadFileResponse>("ReadFile", read)).data() == "here");
    });
}

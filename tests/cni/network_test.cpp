#include "support/support.hpp"

#include <dirent.h>
#include <signal.h>
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "stubs.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.json;
import cobuild.process;
import cobuild.cni;

using namespace cobuild;
using namespace std::chrono_literals;
using strings = std::vector<std::string>;

namespace {

bool contains(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

struct memory_ledger final : cni::ledger {
    strings entries;
    bool broken = false;
    async::task<void> record(std::string text) override {
        if (broken) throw error{errc::no_space, "the ledger is full"};
        entries.push_back(std::move(text));
        co_return;
    }
    async::task<void> forget(std::string text) override {
        std::erase(entries, text);
        co_return;
    }
};

template<class T>
async::task<std::optional<error>> failure(async::task<T> t) {
    std::exception_ptr failed;
    try {
        (void)co_await std::move(t);
    } catch (...) {
        failed = std::current_exception();
    }
    if (!failed) co_return std::nullopt;
    co_return describe(failed);
}

std::size_t open_files() {
    std::size_t n = 0;
    DIR* dir = ::opendir("/proc/self/fd");
    while (::readdir(dir) != nullptr) ++n;
    ::closedir(dir);
    return n;
}

struct bed {
    explicit bed(async::runtime& r) : rt(r) {}
    async::runtime& rt;
    test::stub_plugins stubs;
    process::spawner programs;
    memory_ledger ledger;
    cni::options options(std::string config) {
        return {.mode = cni::mode::cni, .config_path = std::move(config), .binary_dir = stubs.bin(), .ledger = &ledger, .plugin_time_limit = 20s};
    }
    async::task<std::unique_ptr<cni::provider>> make(std::string config) { return cni::make_provider(rt, programs, options(std::move(config))); }
    async::task<std::optional<error>> attach_failure(std::string config) {
        auto p = co_await make(std::move(config));
        co_return co_await failure(p->attach("c1"));
    }
};

}  // namespace

BOOST_AUTO_TEST_SUITE(cni_configuration)

BOOST_AUTO_TEST_CASE(lists_and_single_plugins) {
    const auto list =
        cni::parse_network(R"({"cniVersion":"0.4.0","cniVersions":["0.3.1","1.1.0","9.0.0"],"name":"n","plugins":[{"type":"a"},{"type":"b"}]})", "f");
    BOOST_TEST(list.name == "n");
    BOOST_TEST((list.versions == strings{"1.1.0", "0.4.0", "0.3.1"}));
    BOOST_TEST((list.plugins == strings{"a", "b"}));
    const auto one = cni::parse_network(R"({"name":"n","type":"bridge","ipam":{"type":"host-local"}})", "f");
    BOOST_TEST((one.plugins == strings{"bridge"}));
    BOOST_TEST((one.versions == strings{"0.1.0"}));
}

BOOST_AUTO_TEST_CASE(mistakes_name_the_file) {
    const std::pair<const char*, const char*> bad[] = {
        {"", "JSON"},
        {"[]", "object"},
        {"{}", "no \"name\""},
        {R"({"name":"a b","type":"x"})", "may only have"},
        {R"({"name":"n"})", "neither a list"},
        {R"({"name":"n","plugins":[]})", "is empty"},
        {R"({"name":"n","plugins":[{"type":"x"},{}]})", "plugin 2 has no \"type\""},
        {R"({"name":"n","plugins":["x"]})", "plugin 1 is no object"},
        {R"({"name":"n","type":"../x"})", "no plain file name"},
        {R"({"name":"n","type":"x","ipam":{"type":"/bin/sh"}})", "no plain file name"},
        {R"({"name":"n","type":"x","cniVersion":"2.0.0"})", "\"2.0.0\" is not known"},
        {R"({"name":"n","type":"x","capabilities":{"a":1}})", "neither true nor false"},
        {R"({"name":1,"type":"x"})", "\"name\""},
    };
    for (const auto& [text, part] : bad) {
        try {
            (void)cni::parse_network(text, "/etc/x.conflist");
            BOOST_ERROR("no failure for " << text);
        } catch (const error& e) {
            BOOST_TEST((e.kind() == errc::invalid));
            BOOST_TEST(contains(e.what(), "/etc/x.conflist"));
            BOOST_TEST(contains(e.what(), part), e.what());
        }
    }
}

CO_TEST_CASE(automatic_mode_takes_what_exists) {
    process::spawner programs;
    test::scratch_dir dir;
    const auto missing = (dir / "none.json").string();
    const auto named = co_await failure(cni::make_provider(rt, programs, {.config_path = missing}));
    BOOST_REQUIRE(named.has_value());
    BOOST_TEST((named->kind() == errc::invalid && contains(named->what(), missing)));
    if (::access("/etc/buildkit/cni.json", F_OK) != 0) {
        const auto p = co_await cni::make_provider(rt, programs, {});
        BOOST_TEST((p->kind() == cni::kind::host));
        const auto forced = co_await failure(cni::make_provider(rt, programs, {.mode = cni::mode::cni}));
        BOOST_TEST((forced && forced->kind() == errc::invalid && contains(forced->what(), "/etc/buildkit/cni.json")));
    }
    const auto host = co_await cni::make_provider(rt, programs, {.mode = cni::mode::host, .config_path = missing});
    auto a = co_await host->attach("c1");
    BOOST_TEST(a.network_namespace() == -1);
    co_await host->detach(std::move(a));
    co_await host->close();
}

CO_TEST_CASE(none_is_an_empty_namespace_with_loopback) {
    if (!test::needs_root()) co_return;
    process::spawner programs;
    (void)co_await programs.capture({.args = {"true"}});  // what the runtime opens once is open now
    const auto before = open_files();
    {
        const auto p = co_await cni::make_provider(rt, programs, {.mode = cni::mode::none});
        auto a = co_await p->attach("c1");
        auto b = co_await p->attach("c2");
        process::command c{.args = {"ip", "-o", "-4", "addr"}};
        c.setup.network_namespace = a.network_namespace();
        const auto out = co_await programs.capture(c);
        BOOST_TEST(contains(out.out, "127.0.0.1/8"));
        BOOST_TEST(std::count(out.out.begin(), out.out.end(), '\n') == 1);
        struct stat one{}, two{}, own{};
        ::fstat(a.network_namespace(), &one);
        ::fstat(b.network_namespace(), &two);
        ::stat("/proc/thread-self/ns/net", &own);
        BOOST_TEST((one.st_ino != two.st_ino && one.st_ino != own.st_ino));
        co_await p->detach(std::move(a));
        co_await p->detach(std::move(b));
    }
    BOOST_TEST(open_files() == before);
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(cni_protocol)

CO_TEST_CASE(plugins_are_called_as_the_specification_says) {
    if (!test::needs_root()) co_return;
    bed b(rt);
    b.stubs.add("one");
    b.stubs.add("two");
    const auto p = co_await b.make(b.stubs.config({"one", "two"}));
    auto a = co_await p->attach("c1", {.hostname = "box", .capabilities = R"({"portMappings":[{"hostPort":1}],"mac":"x","other":1})"});
    BOOST_TEST(a.network_namespace() >= 0);
    BOOST_TEST(a.addresses().ips.at(0).address == "10.1.0.2/16");
    BOOST_TEST(a.addresses().ips.at(0).gateway == "10.1.0.1");
    BOOST_TEST(a.addresses().routes.at(0).to == "0.0.0.0/0");
    BOOST_TEST((a.addresses().nameservers == strings{"10.1.0.1"} && a.addresses().search == strings{"a.b"}));
    BOOST_TEST((b.stubs.calls() == strings{"ADD one c1 eth0 netns", "ADD two c1 eth0 netns"}));

    const auto first = json::parse(b.stubs.seen("one", "ADD"));
    BOOST_TEST((first == json::value(json::parse(
                             R"({"type":"one","own":"one","cniVersion":"1.0.0","name":"test","runtimeConfig":{"portMappings":[{"hostPort":1}]}})"))));
    const auto second = json::parse(b.stubs.seen("two", "ADD"));
    BOOST_REQUIRE(second.find("prevResult") != nullptr);
    BOOST_TEST(second.find("prevResult")->find("by")->as_string() == "one");
    const auto env = test::read_file(b.stubs.dir() + "/two.env");
    BOOST_TEST(contains(env, "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAME=box\n"));
    BOOST_TEST(contains(env, "CNI_PATH=" + b.stubs.bin() + ":/usr/lib/cni\n"));
    BOOST_TEST(contains(env, "CNI_NETNS=/proc/" + std::to_string(::getpid()) + "/fd/" + std::to_string(a.network_namespace()) + "\n"));

    BOOST_REQUIRE(b.ledger.entries.size() == 1U);
    BOOST_TEST(json::parse(b.ledger.entries[0]).find("result")->find("by")->as_string() == "two");
    co_await p->detach(std::move(a));
    BOOST_TEST(b.ledger.entries.empty());
    BOOST_TEST((b.stubs.calls() == strings{"ADD one c1 eth0 netns", "ADD two c1 eth0 netns", "DEL two c1 eth0 netns", "DEL one c1 eth0 netns"}));
    // Every DEL gets the last result.
    BOOST_TEST(json::parse(b.stubs.seen("one", "DEL")).find("prevResult")->find("by")->as_string() == "two");
}

// O-NW-01
CO_TEST_CASE(a_failed_add_is_undone_through_the_whole_list) {
    if (!test::needs_root()) co_return;
    bed b(rt);
    b.stubs.add("one");
    b.stubs.add("two", R"([ $CNI_COMMAND = ADD ] && { echo '{"code":11,"msg":"no luck","details":"today"}'; echo trace >&2; exit 3; })");
    b.stubs.add("three", "[ $CNI_COMMAND = ADD ] && exit 9");
    (void)co_await b.programs.capture({.args = {"true"}});  // what the runtime opens once is open now
    const auto before = open_files();
    const auto e = co_await b.attach_failure(b.stubs.config({"one", "two", "three"}));
    BOOST_REQUIRE(e.has_value());
    BOOST_TEST((e->kind() == errc::unavailable));
    BOOST_TEST(e->what() == "CNI plugin " + b.stubs.bin() + "/two ADD for c1 failed: no luck; today (CNI error 11, exit code 3); it said: trace");
    BOOST_TEST((b.stubs.calls() == strings{"ADD one c1 eth0 netns", "ADD two c1 eth0 netns", "DEL three c1 eth0 netns", "DEL two c1 eth0 netns",
                                           "DEL one c1 eth0 netns"}));
    BOOST_TEST(b.ledger.entries.empty());
    BOOST_TEST(open_files() == before);
}

CO_TEST_CASE(plugins_that_misbehave_give_one_sentence) {
    if (!test::needs_root()) co_return;
    struct bad {
        const char* snippet;
        errc kind;
        const char* part;
    };
    const bad all[] = {
        {"[ $CNI_COMMAND = ADD ] && { echo hello; exit 0; }", errc::io, "ended well but its answer is no CNI result"},
        {"[ $CNI_COMMAND = ADD ] && exit 0", errc::io, "ended well but its answer is no CNI result"},
        {"[ $CNI_COMMAND = ADD ] && { echo '{\"ips\":3}'; exit 0; }", errc::io, "no CNI result"},
        {"[ $CNI_COMMAND = ADD ] && kill -9 $$", errc::io, "ended with signal 9"},
        {"[ $CNI_COMMAND = ADD ] && { printf 'line\\none\\033[31m' >&2; exit 7; }", errc::io, "ended with exit code 7; it said: line one [31m"},
        {"[ $CNI_COMMAND = ADD ] && { head -c 3000000 /dev/zero; exit 0; }", errc::io, "printed more than 1 MiB"},
        {"[ $CNI_COMMAND = ADD ] && { echo '{\"code\":7,\"msg\":\"bad field\"}'; exit 1; }", errc::invalid, "failed: bad field (CNI error 7"},
    };
    for (const auto& c : all) {
        bed b(rt);
        b.stubs.add("one", c.snippet);
        const auto e = co_await b.attach_failure(b.stubs.config({"one"}));
        BOOST_REQUIRE(e.has_value());
        BOOST_TEST((e->kind() == c.kind), c.snippet);
        BOOST_TEST(contains(e->what(), c.part), e->what());
        BOOST_TEST(contains(e->what(), b.stubs.bin() + "/one ADD for c1"));
        BOOST_TEST(std::string_view(e->what()).size() < 3000U);
        BOOST_TEST(b.stubs.calls().back() == "DEL one c1 eth0 netns");
    }
}

CO_TEST_CASE(a_plugin_that_hangs_is_killed) {
    if (!test::needs_root()) co_return;
    bed b(rt);
    b.stubs.add("one", "[ $CNI_COMMAND = ADD ] && sleep 1000");
    auto o = b.options(b.stubs.config({"one"}));
    o.plugin_time_limit = 300ms;
    const auto p = co_await cni::make_provider(rt, b.programs, o);
    const auto e = co_await failure(p->attach("c1"));
    BOOST_REQUIRE(e.has_value());
    BOOST_TEST((e->kind() == errc::timed_out));
    BOOST_TEST(e->what() == "CNI plugin " + b.stubs.bin() + "/one ADD for c1 took longer than 300ms and was killed");
    BOOST_TEST(b.stubs.calls().back() == "DEL one c1 eth0 netns");
}

CO_TEST_CASE(cancelling_during_add_undoes_it) {
    if (!test::needs_root()) co_return;
    bed b(rt);
    b.stubs.add("one");
    b.stubs.add("two", "[ $CNI_COMMAND = ADD ] && sleep 1000");
    const auto p = co_await b.make(b.stubs.config({"one", "two"}));
    async::cancel_source stop;
    async::task_group group(co_await async::current_executor, true);
    std::optional<error> got;
    const auto attach = [&]() -> async::task<void> { got = co_await failure(async::linked(stop.token(), p->attach("c1"))); };
    group.spawn(attach());
    while (b.stubs.calls().size() < 2) co_await async::sleep_for(2ms);
    stop.cancel(error{errc::canceled, "enough"});
    co_await group.join();
    BOOST_REQUIRE(got.has_value());
    BOOST_TEST(got->what() == std::string("enough"));
    BOOST_TEST((b.stubs.calls() == strings{"ADD one c1 eth0 netns", "ADD two c1 eth0 netns", "DEL two c1 eth0 netns", "DEL one c1 eth0 netns"}));
    BOOST_TEST(b.ledger.entries.empty());
}

CO_TEST_CASE(missing_plugins_are_told_at_the_start) {
    bed b(rt);
    b.stubs.add("one");
    const auto e = co_await failure(b.make(b.stubs.config({"one", "no-such-plugin"})));
    BOOST_REQUIRE(e.has_value());
    BOOST_TEST((e->kind() == errc::not_found));
    BOOST_TEST(contains(e->what(), "\"no-such-plugin\" is not in " + b.stubs.bin() + " or /usr/lib/cni"));
}

CO_TEST_CASE(the_best_common_version_is_spoken) {
    if (!test::needs_root()) co_return;
    bed b(rt);
    b.stubs.add("one", R"([ $CNI_COMMAND = VERSION ] && { echo '{"cniVersion":"1.0.0","supportedVersions":["0.3.1","0.4.0","1.0.0"]}'; exit 0; })");
    b.stubs.add("two", R"([ $CNI_COMMAND = VERSION ] && { echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.1.0"]}'; exit 0; })");
    const auto versions = std::string(R"("cniVersion":"1.0.0","cniVersions":["0.3.1","0.4.0","1.1.0"])");
    const auto p = co_await b.make(b.stubs.config({"one", "two"}, versions));
    auto a = co_await p->attach("c1");
    BOOST_TEST(json::parse(b.stubs.seen("one", "ADD")).find("cniVersion")->as_string() == "0.4.0");
    co_await p->detach(std::move(a));
    const auto e = co_await failure(b.make(b.stubs.config({"one", "two"}, R"("cniVersions":["0.3.1","1.1.0"])")));
    BOOST_TEST((e && e->kind() == errc::invalid && contains(e->what(), "speaks none of the versions")));
}

CO_TEST_CASE(identifiers_and_host_names_are_checked) {
    if (!test::needs_root()) co_return;
    bed b(rt);
    b.stubs.add("one");
    const auto p = co_await b.make(b.stubs.config({"one"}));
    for (const auto* id : {"", ".x", "a b", "a;b", "a/b"}) BOOST_TEST(((co_await failure(p->attach(id)))->kind() == errc::invalid), id);
    BOOST_TEST(((co_await failure(p->attach("c1", {.hostname = "a;X=1"})))->kind() == errc::invalid));
    BOOST_TEST(b.stubs.calls().empty());
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(cni_ledger)

CO_TEST_CASE(what_is_left_by_a_dead_process_is_replayed) {
    if (!test::needs_root()) co_return;
    bed b(rt);
    b.stubs.add("one");
    b.stubs.add("two");
    const auto p = co_await b.make(b.stubs.config({"one", "two"}));
    {
        const auto dropped = co_await p->attach("c1", {.hostname = "box"});
    }
    BOOST_REQUIRE(b.ledger.entries.size() == 1U);
    co_await cni::replay(rt, b.programs, b.ledger.entries[0]);
    const auto calls = b.stubs.calls();
    // Through a stand-in for the dead namespace: some plugins look for the addresses at the interface.
    BOOST_TEST((strings(calls.begin() + 2, calls.end()) == strings{"DEL two c1 eth0 netns", "DEL one c1 eth0 netns"}));
    BOOST_TEST(json::parse(b.stubs.seen("one", "DEL")).find("prevResult")->find("by")->as_string() == "two");
    BOOST_TEST(contains(test::read_file(b.stubs.dir() + "/one.env"), "K8S_POD_NAME=box"));
    // A second time is harmless; a plugin that fails is told.
    co_await cni::replay(rt, b.programs, b.ledger.entries[0]);
    b.stubs.add("one", "exit 4");
    const auto e = co_await failure(cni::replay(rt, b.programs, b.ledger.entries[0]));
    BOOST_TEST((e && contains(e->what(), "/one DEL for c1 ended with exit code 4")));
    BOOST_TEST(b.stubs.calls().back() == "DEL one c1 eth0 ");  // tried once more without the stand-in
    BOOST_TEST(((co_await failure(cni::replay(rt, b.programs, "{}"))).has_value()));
}

CO_TEST_CASE(a_process_that_died_during_add_has_no_result) {
    if (!test::needs_root()) co_return;
    bed b(rt);
    b.stubs.add("one");
    std::string early;
    struct spy final : cni::ledger {
        std::string* first;
        async::task<void> record(std::string text) override {
            if (first->empty()) *first = std::move(text);
            co_return;
        }
        async::task<void> forget(std::string) override { co_return; }
    } spy;
    spy.first = &early;
    auto o = b.options(b.stubs.config({"one"}));
    o.ledger = &spy;
    const auto p = co_await cni::make_provider(rt, b.programs, o);
    co_await p->detach(co_await p->attach("c1"));
    co_await cni::replay(rt, b.programs, early);
    BOOST_TEST(b.stubs.calls().back() == "DEL one c1 eth0 ");
    BOOST_TEST(json::parse(b.stubs.seen("one", "DEL")).find("prevResult") == nullptr);
}

CO_TEST_CASE(a_failed_del_is_no_failure_but_stays_in_the_ledger) {
    if (!test::needs_root()) co_return;
    bed b(rt);
    b.stubs.add("one");
    b.stubs.add("two", "[ $CNI_COMMAND = DEL ] && exit 1");
    const auto p = co_await b.make(b.stubs.config({"one", "two"}));
    auto a = co_await p->attach("c1");
    co_await p->detach(std::move(a));
    BOOST_TEST(b.stubs.calls().back() == "DEL one c1 eth0 netns");
    BOOST_TEST(b.ledger.entries.size() == 1U);
}

CO_TEST_CASE(what_a_failed_add_could_not_take_back_stays_in_the_ledger) {
    if (!test::needs_root()) co_return;
    bed b(rt);
    b.stubs.add("one", "[ $CNI_COMMAND = DEL ] && exit 2");
    b.stubs.add("two", "[ $CNI_COMMAND = ADD ] && exit 1");
    BOOST_TEST((co_await b.attach_failure(b.stubs.config({"one", "two"}))).has_value());
    BOOST_TEST(b.ledger.entries.size() == 1U);
}

CO_TEST_CASE(no_deed_without_a_ledger_entry) {
    if (!test::needs_root()) co_return;
    bed b(rt);
    b.stubs.add("one");
    const auto p = co_await b.make(b.stubs.config({"one"}));
    b.ledger.broken = true;
    BOOST_TEST(((co_await failure(p->attach("c1")))->kind() == errc::no_space));
    BOOST_TEST(b.stubs.calls().empty());
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(cni_many)

CO_TEST_CASE(the_first_add_goes_alone) {
    if (!test::needs_root()) co_return;
    bed b(rt);
    // Two at once would both find the directory missing; the second fails.
    b.stubs.add("one", "if [ $CNI_COMMAND = ADD ] && [ ! -e " + b.stubs.dir() + "/bridge ]; then sleep 0.2; mkdir " + b.stubs.dir() +
                           "/bridge || exit 1; fi");
    auto o = b.options(b.stubs.config({"one"}));
    o.lock_file = b.stubs.dir() + "/lock";
    const auto p = co_await cni::make_provider(rt, b.programs, o);
    const auto q = co_await cni::make_provider(rt, b.programs, o);  // as another process would
    std::vector<async::task<void>> all;
    const auto one = [&](cni::provider* from, std::string id) -> async::task<void> {
        auto a = co_await from->attach(std::move(id));
        co_await from->detach(std::move(a));
    };
    for (int i = 0; i < 4; ++i) {
        all.push_back(one(p.get(), "p" + std::to_string(i)));
        all.push_back(one(q.get(), "q" + std::to_string(i)));
    }
    co_await async::when_all(std::move(all));
    BOOST_TEST(b.stubs.calls().size() == 16U);
    BOOST_TEST(b.ledger.entries.empty());
}

CO_TEST_CASE(ready_namespaces_are_used_again_last_first) {
    if (!test::needs_root()) co_return;
    bed b(rt);
    b.stubs.add("one");
    auto o = b.options(b.stubs.config({"one"}));
    o.pool_size = 1;
    o.idle_limit = 1ms;
    const auto p = co_await cni::make_provider(rt, b.programs, o);
    while (b.stubs.calls().empty() || b.ledger.entries.empty() || !contains(b.ledger.entries[0], "\"result\"")) co_await async::sleep_for(2ms);
    for (int i = 0; i < 100; ++i) co_await async::sleep_for(0ns);  // the last steps of filling wait for nothing
    auto a = co_await p->attach("a");                              // the one kept ready
    BOOST_TEST(b.stubs.calls().size() == 1U);
    auto c = co_await p->attach("c");  // none left: a new one
    BOOST_TEST(b.stubs.calls().size() == 2U);
    auto named = co_await p->attach("n", {.hostname = "box"});
    BOOST_TEST(b.stubs.calls().size() == 3U);
    co_await p->detach(std::move(named));  // never kept
    BOOST_TEST(b.stubs.calls().back() == "DEL one n eth0 netns");
    const int last = c.network_namespace();
    co_await p->detach(std::move(a));
    co_await p->detach(std::move(c));
    auto again = co_await p->attach("again");
    BOOST_TEST(again.network_namespace() == last);
    co_await p->detach(std::move(again));
    while (b.ledger.entries.size() > 1) co_await async::sleep_for(2ms);  // the surplus goes
    co_await p->close();
    BOOST_TEST(b.ledger.entries.empty());
    const auto calls = b.stubs.calls();
    BOOST_TEST(std::count_if(calls.begin(), calls.end(), [](const auto& c2) { return c2.starts_with("ADD"); }) == 3);
    BOOST_TEST(std::count_if(calls.begin(), calls.end(), [](const auto& c2) { return c2.starts_with("DEL"); }) == 3);
}

BOOST_AUTO_TEST_SUITE_END()

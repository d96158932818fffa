#include <termios.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <functional>
#include <iostream>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

#include "cli.hpp"

import cobuild.http;
import cobuild.oci;
import cobuild.process;
import cobuild.registry;

namespace cobuild::app {

namespace {

struct registry_flags {
    engine_flags engine;
    std::vector<std::string> names;
    std::string platform, username, password;
    bool password_stdin = false, raw = false;
};

async::task<int> run_and_close(registry::client& client, std::function<async::task<int>(registry::client&)> work) {
    std::exception_ptr failed;
    int code = 0;
    try {
        code = co_await work(client);
    } catch (...) {
        failed = std::current_exception();
    }
    co_await async::no_cancel;
    co_await client.close();
    if (failed) std::rethrow_exception(failed);
    co_return code;
}

registry::options options_for(async::runtime& rt, process::spawner& programs, const config::configuration& settings) {
    registry::options o;
    o.executor = rt.get_executor();
    o.pool = &rt.pool();
    o.hosts = registry::configured_hosts(settings);
    o.limits.transfers = static_cast<std::size_t>(settings.system.max_registry_concurrency);
    o.who.credentials = registry::docker_credentials(rt.pool(), {}, registry::run_helpers_with(programs));
    return o;
}

int with_client(const registry_flags& flags, interrupt& stop, std::function<async::task<int>(registry::client&)> work) {
    const auto settings = flags.engine.load();
    process::spawner programs;
    async::runtime rt;
    registry::client client(options_for(rt, programs, settings));
    return rt.block_on(async::linked(stop.token(), run_and_close(client, std::move(work))));
}

// ---------------------------------------------------------------- check

void print_row(std::string_view key, std::string_view value) {
    if (!value.empty()) std::cout << "  " << key << std::string(14 - key.size(), ' ') << value << "\n";
}

async::task<int> check(registry::client& client, oci::reference ref) {
    bool found = false;
    bool first = true;
    for (const auto& r : co_await client.check(ref)) {
        std::cout << (std::exchange(first, false) ? "" : "\n") << r.host << (r.mirror ? " (mirror)" : " (origin)") << "\n";
        print_row("url", r.url);
        print_row("configuration", r.configured ? r.section : cat("no ", r.section, " entry"));
        print_row("address", r.address);
        print_row("trust", r.trust);
        for (const auto& c : r.certificates) print_row("certificate", c);
        print_row("login", r.login.empty() ? std::string_view("none") : std::string_view(r.login));
        print_row("/v2/", r.api);
        print_row("manifest", r.digest.empty() ? r.manifest : cat(r.manifest, ", ", r.digest));
        print_row("failed", r.failure);
        print_row("took", format_duration(std::chrono::ceil<std::chrono::milliseconds>(r.took)));
        if (r.manifest.starts_with("200")) found = true;
    }
    co_return found ? 0 : 1;
}

// ---------------------------------------------------------------- inspect, ls, copy

async::task<int> inspect(registry::client& client, oci::reference ref, std::string platform, bool raw) {
    auto target = (co_await client.resolve(ref)).target;
    auto m = co_await client.fetch_manifest(ref, target);
    if (!platform.empty() && oci::is_index(m.media_type)) {
        const auto wanted = oci::parse_platform(platform);
        const auto choice = oci::select(oci::parse_index(m.bytes), wanted);
        if (choice.empty()) throw error{errc::not_found, cat(ref.familiar(), " has no image for ", oci::format(wanted))};
        m = co_await client.fetch_manifest(ref, choice.front());
    }
    if (!raw)
        std::cout << "Name:      " << ref.with_default_tag().familiar() << "\nMediaType: " << m.media_type << "\nDigest:    " << m.target.digest.str()
                  << "\nSize:      " << m.target.size << "\nHost:      " << m.host << "\n\n";
    std::cout << m.bytes << (raw || m.bytes.ends_with('\n') ? "" : "\n");
    co_return 0;
}

async::task<int> list_tags(registry::client& client, oci::reference ref) {
    for (const auto& tag : co_await client.tags(ref)) std::cout << tag << "\n";
    co_return 0;
}

async::task<int> copy(registry::client& client, oci::reference from, oci::reference to, std::string platform) {
    registry::copy_options o;
    if (!platform.empty()) o.platform = oci::parse_platform(platform);
    o.call.warn = [](const std::string& text) { std::cerr << "warning: " << text << "\n"; };
    o.done = [](const oci::descriptor& d, registry::push_outcome outcome) {
        static constexpr const char* words[] = {"exists  ", "mounted ", "copied  "};
        std::cerr << words[static_cast<int>(outcome)] << d.digest.str() << "  " << format_bytes(d.size) << "\n";
    };
    const auto root = co_await client.copy(from, to, std::move(o));
    std::cout << root.digest.str() << "\n";
    co_return 0;
}

// ---------------------------------------------------------------- login

std::string read_secret(const registry_flags& flags) {
    if (!flags.password.empty()) return flags.password;
    std::string line;
    if (flags.password_stdin) {
        line.assign(std::istreambuf_iterator<char>(std::cin), {});
        while (line.ends_with('\n') || line.ends_with('\r')) line.pop_back();
    } else if (::isatty(0) == 1) {
        std::cerr << "Password: " << std::flush;
        termios shown{};
        ::tcgetattr(0, &shown);
        const scope_exit restore([&shown] { ::tcsetattr(0, TCSANOW, &shown); });
        auto hidden = shown;
        hidden.c_lflag &= ~static_cast<tcflag_t>(ECHO);
        ::tcsetattr(0, TCSANOW, &hidden);
        std::getline(std::cin, line);
        std::cerr << "\n";
    } else {
        throw error{errc::invalid, "no terminal to ask for the password on: use --password-stdin"};
    }
    if (line.empty()) throw error{errc::invalid, "the password is empty"};
    return line;
}

std::string server_of(const std::vector<std::string>& names) {
    std::string_view text = names.empty() ? std::string_view("docker.io") : std::string_view(names.front());
    for (const std::string_view scheme : {"https://", "http://"})
        if (text.starts_with(scheme)) text.remove_prefix(scheme.size());
    const std::string out(text.substr(0, text.find('/')));
    if (out == "index.docker.io" || out == "registry-1.docker.io") return "docker.io";
    http::parse_endpoint(out, true);
    return out;
}

async::task<int> keep_login(async::runtime& rt, process::spawner& programs, registry::client& client, std::string server,
                            registry::credential login) {
    co_await client.ping(server);
    const auto where = co_await registry::store_login(rt.pool(), server, std::move(login), {}, registry::run_helpers_with(programs));
    std::cout << "Login succeeded; kept in " << where << "\n";
    co_return 0;
}

int log_in(const registry_flags& flags, interrupt& stop) {
    const auto settings = flags.engine.load();
    const auto server = server_of(flags.names);
    registry::credential login{.username = flags.username};
    if (login.username.empty()) {
        if (::isatty(0) != 1 || flags.password_stdin) throw error{errc::invalid, "--username is missing"};
        std::cerr << "Username: " << std::flush;
        std::getline(std::cin, login.username);
        if (login.username.empty()) throw error{errc::invalid, "the user name is empty"};
    }
    login.secret = read_secret(flags);
    process::spawner programs;
    async::runtime rt;
    auto options = options_for(rt, programs, settings);
    options.retry.attempts = 1;
    const auto typed = [](registry::credential c) -> async::task<std::optional<registry::credential>> { co_return c; };
    options.who.credentials = [typed, login](std::string) { return typed(login); };
    registry::client client(std::move(options));
    const auto work = [&](registry::client& c) { return keep_login(rt, programs, c, server, login); };
    return rt.block_on(async::linked(stop.token(), run_and_close(client, work)));
}

async::task<int> drop_login(async::runtime& rt, process::spawner& programs, std::string server) {
    if (!co_await registry::forget_login(rt.pool(), server, {}, registry::run_helpers_with(programs))) {
        std::cerr << "error: there is no login for " << server << "\n";
        co_return 1;
    }
    std::cout << "Removed the login for " << server << "\n";
    co_return 0;
}

int log_out(const registry_flags& flags, interrupt& stop) {
    const auto server = server_of(flags.names);
    process::spawner programs;
    async::runtime rt;
    return rt.block_on(async::linked(stop.token(), drop_login(rt, programs, server)));
}

using work_with = std::function<async::task<int>(registry::client&, const registry_flags&)>;

command with_names(CLI::App& parent, interrupt& stop, const std::string& name, const std::string& help, const std::vector<std::string>& names,
                   work_with work) {
    auto flags = std::make_shared<registry_flags>();
    auto* c = parent.add_subcommand(name, help);
    flags->names.resize(names.size());
    for (std::size_t i = 0; i < names.size(); ++i) c->add_option(names[i], flags->names[i], "")->required()->type_name("");
    if (name == "inspect" || name == "copy")
        c->add_option("--platform", flags->platform, "Of an index the image for this platform")->type_name("OS/ARCH");
    if (name == "inspect") c->add_flag("--raw", flags->raw, "Only the bytes of the manifest");
    flags->engine.add_to(*c);
    return {c, [flags, &stop, work] { return with_client(*flags, stop, [flags, work](registry::client& client) { return work(client, *flags); }); }};
}

}  // namespace

std::vector<command> add_registry_commands(CLI::App& app, interrupt& stop) {
    std::vector<command> out;
    auto* parent = app.add_subcommand("registry", "Look into registries and copy between them");
    parent->require_subcommand(1);
    const auto ref = [](const registry_flags& f, std::size_t i = 0) { return oci::reference::parse(f.names.at(i)); };
    out.push_back(with_names(*parent, stop, "check", "Ask every host of a reference and tell what each answers", {"REF"},
                             [ref](registry::client& c, const registry_flags& f) { return check(c, ref(f)); }));
    out.push_back(with_names(*parent, stop, "inspect", "Show a manifest or index", {"REF"},
                             [ref](registry::client& c, const registry_flags& f) { return inspect(c, ref(f), f.platform, f.raw); }));
    out.push_back(with_names(*parent, stop, "ls", "List the tags of a repository", {"REPOSITORY"},
                             [ref](registry::client& c, const registry_flags& f) { return list_tags(c, ref(f)); }));
    out.push_back(with_names(*parent, stop, "copy", "Copy an image or index from one name to another", {"SRC", "DST"},
                             [ref](registry::client& c, const registry_flags& f) { return copy(c, ref(f), ref(f, 1), f.platform); }));

    auto in = std::make_shared<registry_flags>();
    auto* login = app.add_subcommand("login", "Check a login for a registry and keep it where docker does");
    login->add_option("SERVER", in->names, "The registry; docker.io when left out")->expected(0, 1)->type_name("");
    login->add_option("-u,--username", in->username, "User name")->type_name("TEXT");
    login->add_option("-p,--password", in->password, "Password (seen by others in the list of processes: better --password-stdin)")
        ->type_name("TEXT");
    login->add_flag("--password-stdin", in->password_stdin, "Read the password from standard input");
    in->engine.add_to(*login);
    out.push_back({login, [in, &stop] { return log_in(*in, stop); }});
    auto gone = std::make_shared<registry_flags>();
    auto* logout = app.add_subcommand("logout", "Remove the login for a registry");
    logout->add_option("SERVER", gone->names, "The registry; docker.io when left out")->expected(0, 1)->type_name("");
    out.push_back({logout, [gone, &stop] { return log_out(*gone, stop); }});
    return out;
}

}  // namespace cobuild::app

// buildctl build.
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

#include "buildctl.hpp"
#include "flags.hpp"
#include "progress_common.hpp"

import cobuild.llb;
import cobuild.process;
import cobuild.registry;
import cobuild.rpc;

namespace cobuild::buildctl {

namespace {

namespace stdfs = std::filesystem;

struct build_flags {
    std::vector<std::string> outputs, locals, layouts, options, cache_exports, cache_imports, secrets, allow, ssh, auth_tls;
    std::string frontend, progress = "auto", trace, metadata_file, policy_file, ref_file, cache_metrics;
    bool no_cache = false, proxy_network = false;
};

std::string read_file(const std::string& file, std::string_view what) {
    std::ifstream in(file, std::ios::binary);
    std::string out{std::istreambuf_iterator<char>(in), {}};
    if (!in) throw error{errc::not_found, cat("cannot read ", what, " ", file)};
    return out;
}

/// The graph on standard input; with --no-cache every step is marked to run anew.
std::string read_definition(bool no_cache) {
    struct stat info{};
    // A terminal, or /dev/null where there is none.
    if (::fstat(0, &info) == 0 && S_ISCHR(info.st_mode)) throw error{errc::invalid, "please specify --frontend or pipe LLB definition to stdin"};
    std::string bytes{std::istreambuf_iterator<char>(std::cin), {}};
    auto d = llb::unmarshal_definition(bytes);
    if (d.ops.empty()) throw error{errc::invalid, "empty definition sent to build. Specify --frontend instead?"};
    if (!no_cache) return bytes;
    for (const auto& op : d.ops) d.metadata[digest::of(op)].ignore_cache = true;
    return llb::marshal(d);
}

/// The manifest that an OCI layout's index names under `tag`; empty: none.
std::string tagged(const stdfs::path& layout, const std::string& tag) {
    const auto index = json::parse(read_file((layout / "index.json").string(), "the index"));
    const auto* manifests = index.find("manifests");
    if (manifests == nullptr || !manifests->is_array()) return {};
    for (const auto& m : manifests->as_array()) {
        const auto* annotations = m.find("annotations");
        const auto* name = annotations != nullptr ? annotations->find("org.opencontainers.image.ref.name") : nullptr;
        if (name != nullptr && name->is_string() && name->as_string() == tag) return json::string_at(m.as_object(), "digest");
    }
    return {};
}

/// A cache in a local directory is lent as an OCI layout. One that is not there, or has no such tag, is left out with a
/// warning, as on a first build.
void add_cache_import(client::build_request& r, client::cache_entry entry) {
    if (entry.type == "local") {
        const stdfs::path dir = entry.attrs["src"];
        const auto tag = entry.attrs.contains("tag") ? entry.attrs["tag"] : std::string("latest");
        std::string problem;
        try {
            if (entry.attrs["digest"].empty()) entry.attrs["digest"] = tagged(dir, tag);
            if (entry.attrs["digest"].empty()) problem = cat("no digest found for tag ", tag);
        } catch (const error& e) {
            problem = e.what();
        }
        if (!problem.empty()) {
            std::cerr << "warning: local cache import at " << dir.string() << " skipped: " << problem << "\n";
            return;
        }
        r.lends.oci_layouts[cat("local:", entry.attrs["src"])] = stdfs::absolute(dir);
    }
    r.cache_imports.push_back(std::move(entry));
}

client::build_request make_request(const build_flags& f) {
    if (!f.auth_tls.empty()) throw error{errc::unsupported, "--registry-auth-tlscontext is not supported yet"};
    if (!f.cache_metrics.empty()) throw error{errc::unsupported, "--debug-json-cache-metrics is not supported yet"};
    client::build_request r;
    r.ref = random_id();
    r.frontend = f.frontend;
    for (const auto& s : f.ssh) r.lends.ssh_agents.insert(parse_ssh(s));
    for (const auto& s : f.secrets) {
        auto [id, source] = parse_secret(s);
        r.lends.secrets.insert_or_assign(std::move(id), std::move(source));
    }
    for (const auto& list : f.allow)
        for (const auto name : split(list, ',')) {
            check_entitlement(std::string(name));
            r.entitlements.emplace_back(name);
        }
    for (const auto& o : f.outputs) {
        auto parsed = parse_output(o, ::isatty(1) != 0);
        if (!parsed.layout.empty() && !r.lends.stores.emplace("export", stdfs::absolute(parsed.layout)).second)
            throw error{errc::invalid, "only one --output may be a layout directory (tar=false)"};
        if (parsed.target) r.lends.targets.emplace(static_cast<int>(r.exporters.size()), std::move(*parsed.target));
        r.exporters.push_back(std::move(parsed.exporter));
    }
    for (const auto& c : f.cache_exports) {
        auto entry = parse_cache_export(c);
        if (entry.type == "local") r.lends.stores[cat("local:", entry.attrs["dest"])] = stdfs::absolute(entry.attrs["dest"]);
        r.cache_exports.push_back(std::move(entry));
    }
    for (const auto& c : f.cache_imports)
        for (auto& e : parse_cache_imports(c)) add_cache_import(r, std::move(e));
    if (!f.policy_file.empty()) r.source_policy = read_file(f.policy_file, "the source policy");
    r.frontend_attrs = parse_options(f.options);
    r.lends.directories = parse_directories(f.locals, "--local");
    for (auto& [id, dir] : parse_directories(f.layouts, "--oci-layout")) r.lends.oci_layouts[cat("oci:", id)] = std::move(dir);
    if (r.frontend.empty())
        r.definition = read_definition(f.no_cache);
    else if (f.no_cache)
        r.frontend_attrs["no-cache"] = "";
    if (r.frontend_attrs.contains("requestid")) r.frontend_attrs.try_emplace("frontend.caps", "moby.buildkit.frontend.subrequests");
    r.proxy_network = f.proxy_network;
    return r;
}

async::task<std::optional<client::login>> ask_docker(registry::credential_provider docker, std::string host) {
    const auto found = co_await docker(std::move(host));
    if (!found) co_return std::nullopt;
    co_return client::login{found->username, found->secret};
}

/// The layouts that the build wrote blobs into get their index.json: caches by their tags, an image by its names.
void note_layouts(const client::build_request& asked, const client::attributes& response) {
    const auto cache = response.find("cache.manifest");
    for (const auto& e : asked.cache_exports) {
        if (e.type != "local" || cache == response.end()) continue;
        const auto attr = [&e](const char* key, const char* otherwise) {
            const auto at = e.attrs.find(key);
            return at == e.attrs.end() || at->second.empty() ? std::string(otherwise) : at->second;
        };
        client::note_in_layout(stdfs::absolute(attr("dest", "")), cache->second, {{.name = attr("tag", "latest")}}, attr("reset", "") == "true");
    }
    const auto image = response.find("containerimage.descriptor");
    const auto place = asked.lends.stores.find("export");
    if (place == asked.lends.stores.end() || image == response.end()) return;
    std::vector<client::layout_name> names;
    if (const auto given = response.find("image.name"); given != response.end())
        for (const auto n : split(given->second, ',')) names.push_back({.name = std::string(n), .image = true});
    if (names.empty()) names.push_back({.name = "latest"});
    client::note_in_layout(place->second, base64_decode(image->second).value_or("{}"), names, false);
}

/// What the exporters told, values that are base64 of a JSON object decoded, as BuildKit's client writes it.
std::string metadata_json(const client::attributes& response) {
    json::object o;
    for (const auto& [key, value] : response) {
        json::value shown(value);
        if (const auto text = base64_decode(value); text && text->starts_with('{')) {
            try {
                auto inner = json::parse(*text);
                if (inner.is_object() && !inner.as_object().empty()) shown = std::move(inner);
            } catch (const error&) {
                // Then it is a text like any other.
            }
        }
        o.set(key, std::move(shown));
    }
    return json::serialize(json::value(std::move(o)), {.indent = true, .escape_html = true, .sorted = false});
}

void print_answer(const std::map<std::string, std::string>& metadata) {
    if (const auto text = metadata.find("result.txt"); text != metadata.end()) {
        std::cout << text->second;
        return;
    }
    for (const auto& [key, value] : metadata)
        if (key.starts_with("result.")) std::cout << key << "\n" << value << "\n";
}

void show_details(const rpc::status& s) {
    for (const auto& e : client::details_of(s).sources) std::cerr << client::render(e);
}

/// The display, and the file of --trace where one is asked for.
struct shown final : progress::sink {
    std::shared_ptr<app::progress_display> display, trace;
    std::ofstream file;
    void on_event(const progress::event& e) override {
        display->on_event(e);
        if (trace) trace->on_event(e);
    }
    void finish() {
        display->finish();
        if (trace) trace->finish();
    }
};

async::task<int> build(context c, std::shared_ptr<build_flags> f) {
    auto request = make_request(*f);
    process::spawner programs;
    const auto docker = registry::docker_credentials(c.pool, {}, registry::run_helpers_with(programs));
    request.lends.logins = [docker](std::string host) { return ask_docker(docker, std::move(host)); };
    const auto ref = request.ref;
    const bool question = request.frontend_attrs.contains("requestid");
    const auto sink = std::make_shared<shown>();
    sink->display = app::make_display(f->progress, "");
    if (!f->trace.empty()) {
        sink->file.open(f->trace, std::ios::app);
        if (!sink->file) throw error{errc::io, cat("cannot write ", f->trace)};
        sink->trace = app::make_rawjson(sink->file);
    }
    const auto asked = request;
    std::exception_ptr failed;
    std::optional<rpc::status> why;
    client::build_result result;
    try {
        result = co_await client::build(c.daemon, c.pool, std::move(request), sink, [&why](const rpc::status& s) { why = s; });
    } catch (...) {
        failed = std::current_exception();
    }
    sink->finish();
    if (!f->ref_file.empty()) app::write_whole(f->ref_file, ref);
    if (why) show_details(*why);
    if (failed) std::rethrow_exception(failed);
    co_await c.pool.run([&] { note_layouts(asked, result.exporter_response); });
    if (!f->metadata_file.empty()) app::write_whole(f->metadata_file, metadata_json(result.exporter_response));
    if (question) print_answer(result.metadata);
    co_return 0;
}

void add_flags(CLI::App& c, build_flags& f) {
    const auto list = [&c](const std::string& name, std::vector<std::string>& target, const std::string& help, const std::string& type) {
        c.add_option(name, target, help)->type_name(type)->take_all()->allow_extra_args(false);
    };
    list("-o,--output", f.outputs, "Where the result goes: type=image|oci|docker|local|tar[,dest=...]", "OUTPUT");
    c.add_option("--progress", f.progress, "auto, plain, tty, quiet, rawjson")->type_name("MODE");
    c.add_option("--trace", f.trace, "Append the build's events to this file, as JSON lines")->type_name("FILE");
    list("--local", f.locals, "Lend the daemon a directory", "NAME=DIR");
    list("--oci-layout", f.layouts, "Lend the daemon an OCI layout", "ID=DIR");
    c.add_option("--frontend", f.frontend, "What turns the source into a build: dockerfile.v0, gateway.v0; without it LLB on stdin")
        ->type_name("NAME");
    list("--opt", f.options, "An option of the frontend: filename=..., target=..., build-arg:NAME=VALUE", "KEY=VALUE");
    c.add_flag("--no-cache", f.no_cache, "Run every step anew");
    list("--export-cache", f.cache_exports, "Export the build cache: type=inline|registry|local[,ref=...|dest=...,mode=min|max]", "CACHE");
    list("--import-cache", f.cache_imports, "Use a build cache: type=registry|local[,ref=...|src=...]", "CACHE");
    list("--secret", f.secrets, "A secret for the build", "id=ID[,src=FILE|,env=VAR]");
    list("--allow", f.allow, "Let steps have network.host, security.insecure or devices", "ENTITLEMENT");
    list("--ssh", f.ssh, "An ssh agent for the build", "default|ID[=SOCKET]");
    c.add_option("--metadata-file", f.metadata_file, "Write what was built as JSON")->type_name("FILE");
    c.add_option("--source-policy-file", f.policy_file, "Rules about the build's sources, as JSON")->type_name("FILE");
    c.add_flag("--proxy-network", f.proxy_network, "Give steps the daemon's proxy network");
    c.add_option("--ref-file", f.ref_file, "Write the build's reference")->type_name("FILE");
    list("--registry-auth-tlscontext", f.auth_tls, "TLS for token servers (not supported yet)", "host=HOST,...");
    c.add_option("--debug-json-cache-metrics", f.cache_metrics, "Where cache metrics go (not supported yet)")->type_name("FILE");
}

}  // namespace

command add_build(CLI::App& app, const globals& g, app::interrupt& stop) {
    auto flags = std::make_shared<build_flags>();
    auto* c = app.add_subcommand("build", "Build")->alias("b");
    add_flags(*c, *flags);
    return {c, [&g, &stop, flags] { return with_daemon(g, stop, [flags](context x) { return build(x, flags); }); }};
}

}  // namespace cobuild::buildctl

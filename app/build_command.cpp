#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <boost/asio/awaitable.hpp>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

#include "cli.hpp"
#include "hand_over.hpp"

import cobuild.base;
import cobuild.async;
import cobuild.build;
import cobuild.config;
import cobuild.json;

namespace cobuild::app {

namespace {

namespace stdfs = std::filesystem;

/// The flags as typed; turned into a request when the command runs.
struct build_flags {
    engine_flags engine;
    std::string path;
    std::string file;
    std::vector<std::string> tags, build_args, labels, outputs, platforms, add_hosts, secrets, ulimits, no_cache_filter, build_contexts, ssh;
    std::vector<std::string> not_yet;  ///< flags of buildx that are parsed only to be refused by name
    std::string target, network, progress = "auto", metadata_file, iidfile, shm_size, cgroup_parent, pull;
    std::vector<std::string> allow, annotations, attests, cache_from, cache_to;
    std::optional<std::string> provenance, sbom;
    std::string call, print_llb;
    bool push = false, load = false, no_cache = false, quiet = false, check = false;
};

/// Splits one CSV value ("type=oci,dest=x") into key=value pairs; quotes protect commas as in RFC 4180.
std::vector<std::pair<std::string, std::string>> parse_csv(const std::string& text, std::string_view flag) {
    std::vector<std::string> fields(1);
    bool quoted_field = false;
    for (std::size_t i = 0; i < text.size(); ++i) {
        if (text[i] == '"') {
            if (quoted_field && i + 1 < text.size() && text[i + 1] == '"')
                fields.back() += text[i++];
            else
                quoted_field = !quoted_field;
        } else if (text[i] == ',' && !quoted_field) {
            fields.emplace_back();
        } else {
            fields.back() += text[i];
        }
    }
    if (quoted_field) throw error{errc::invalid, cat(flag, " ", text, ": a double quote is not closed")};
    std::vector<std::pair<std::string, std::string>> out;
    for (const auto& f : fields) {
        const auto eq = f.find('=');
        out.emplace_back(to_lower(trim(f.substr(0, eq))), eq == std::string::npos ? "" : f.substr(eq + 1));
        if (eq == std::string::npos && fields.size() == 1) out.back() = {"", f};
    }
    return out;
}

build::output parse_output(const std::string& text) {
    build::output out;
    for (auto& [key, value] : parse_csv(text, "--output")) {
        if (key.empty()) {
            out.type = value == "-" ? "tar" : "local";
            out.attributes["dest"] = value;
        } else if (key == "type") {
            out.type = value;
        } else {
            out.attributes[key] = value;
        }
    }
    static constexpr std::string_view types[] = {"image", "oci", "docker", "local", "tar", "registry", "cacheonly"};
    if (out.type.empty()) throw error{errc::invalid, cat("--output ", text, ": type= is missing (image, oci, docker, local, tar or registry)")};
    if (std::find(std::begin(types), std::end(types), out.type) == std::end(types)) {
        const auto near = nearest(out.type, types);
        throw error{errc::invalid,
                    cat("--output: unknown type ", quoted(out.type),
                        near.empty() ? " (image, oci, docker, local, tar and registry are known)" : cat(", did you mean ", near, "?"))};
    }
    if (out.type == "local" && out.attributes["dest"].empty())
        throw error{errc::invalid, "--output type=local: dest= is missing, the directory to write to"};
    if (out.type == "tar" || out.type == "oci" || out.type == "docker") {
        auto& dest = out.attributes["dest"];
        if (dest.empty() || dest == "-") {
            if (out.type != "docker" || dest == "-") {
                if (::isatty(1) != 0)
                    throw error{errc::invalid, cat("--output type=", out.type, ": refusing to write to the terminal; give dest=FILE or redirect")};
                out.fd = 1;
                out.attributes.erase("dest");
            }
        }
    }
    return out;
}

/// "type=registry,ref=x,mode=max", or a reference (several, with commas between) alone: that is a registry's.
std::vector<build::cache_entry> parse_caches(const std::vector<std::string>& items, std::string_view flag) {
    std::vector<build::cache_entry> out;
    for (const auto& text : items) {
        if (text.find('=') == std::string::npos) {
            for (const auto name : split(text, ',')) out.push_back({"registry", {{"ref", std::string(trim(name))}}});
            continue;
        }
        build::cache_entry one;
        for (auto& [key, value] : parse_csv(text, flag)) (key == "type" ? one.type : one.attributes[key]) = value;
        if (one.type.empty()) throw error{errc::invalid, cat(flag, " ", text, ": type= is missing (registry, local or inline)")};
        out.push_back(std::move(one));
    }
    return out;
}

build::secret_source parse_secret(const std::string& text) {
    build::secret_source out;
    std::string type;
    for (auto& [key, value] : parse_csv(text, "--secret")) {
        if (key == "id")
            out.id = value;
        else if (key == "src" || key == "source")
            out.file = value;
        else if (key == "env")
            out.environment = value;
        else if (key == "type")
            type = value;
        else
            throw error{errc::invalid, cat("--secret ", text, ": unknown key ", quoted(key), " (id, src, env and type are known)")};
    }
    if (out.id.empty()) throw error{errc::invalid, cat("--secret ", text, ": id= is missing")};
    if (!type.empty() && type != "file" && type != "env") throw error{errc::invalid, cat("--secret ", text, ": type is file or env")};
    if (type == "env" && out.environment.empty()) out.environment = out.file.empty() ? out.id : out.file.string();
    if (type == "env") out.file.clear();
    if (out.environment.empty() && out.file.empty()) {
        if (std::getenv(out.id.c_str()) != nullptr)
            out.environment = out.id;
        else
            out.file = out.id;
    }
    if (!out.environment.empty() && std::getenv(out.environment.c_str()) == nullptr)
        throw error{errc::not_found, cat("--secret id=", out.id, ": the environment variable ", out.environment, " is not set")};
    if (!out.file.empty()) {
        std::error_code ec;
        if (!stdfs::exists(out.file, ec)) throw error{errc::not_found, cat("--secret id=", out.id, ": no such file: ", out.file.string())};
        out.file = stdfs::absolute(out.file);
    }
    return out;
}

/// "KEY=value"; a bare KEY takes the value of our environment and is left out when that has none, as buildx does.
std::map<std::string, std::string> parse_pairs(const std::vector<std::string>& items, std::string_view flag, bool from_environment) {
    std::map<std::string, std::string> out;
    for (const auto& item : items) {
        const auto eq = item.find('=');
        const std::string key = item.substr(0, eq);
        if (key.empty()) throw error{errc::invalid, cat(flag, " ", quoted(item), ": a name is missing before '='")};
        if (eq != std::string::npos)
            out[key] = item.substr(eq + 1);
        else if (!from_environment)
            out[key] = "";
        else if (const char* value = std::getenv(key.c_str()))
            out[key] = value;
    }
    return out;
}

std::string read_stdin() { return std::string{std::istreambuf_iterator<char>(std::cin), {}}; }

void set_context(build_flags& flags, build::build_request& r) {
    r.name = flags.path;
    if (flags.path == "-") {
        if (flags.file == "-") throw error{errc::invalid, "the context and the Dockerfile cannot both come from standard input"};
        r.context_stream = 0;
        if (!flags.file.empty()) r.dockerfile = flags.file;
        return;
    }
    std::error_code ec;
    if (!stdfs::exists(flags.path, ec)) {
        const bool remote = flags.path.find("://") != std::string::npos || flags.path.starts_with("github.com/") ||
                            (flags.path.find('@') != std::string::npos && flags.path.find(':') != std::string::npos);
        if (!remote) throw error{errc::not_found, cat("the context directory ", quoted(flags.path), " does not exist")};
        r.remote_context = flags.path;
        if (flags.file == "-")
            r.dockerfile_text = read_stdin();
        else if (!flags.file.empty())
            r.dockerfile = flags.file;
        return;
    }
    if (!stdfs::is_directory(flags.path, ec)) throw error{errc::invalid, cat("the context ", quoted(flags.path), " is not a directory")};
    r.context = stdfs::absolute(flags.path);
    if (flags.file == "-")
        r.dockerfile_text = read_stdin();
    else if (!flags.file.empty())
        r.dockerfile = stdfs::absolute(flags.file);
}

std::string parse_entitlement(std::string name) {
    static constexpr std::string_view known[] = {"network.host", "security.insecure"};
    if (name == "device" || name.starts_with("device=")) throw error{errc::unsupported, cat("--allow ", name, ": devices are not supported yet")};
    if (std::find(std::begin(known), std::end(known), name) != std::end(known)) return name;
    const auto near = nearest(name, known);
    throw error{errc::invalid, cat("--allow ", quoted(name), ": network.host and security.insecure can be allowed",
                                   near.empty() ? "" : cat("; did you mean ", near, "?"))};
}

/// "[TYPE[,TYPE...]:]KEY=VALUE" for every output that is an image; without one the image is kept with them.
void add_annotations(build::build_request& r, const std::vector<std::string>& items) {
    if (items.empty()) return;
    if (r.outputs.empty()) r.outputs.push_back({.type = r.push ? "registry" : "image", .attributes = {}});
    bool taken = false;
    for (const auto& item : items) {
        const auto eq = item.find('=');
        if (eq == std::string::npos || eq == 0) throw error{errc::invalid, cat("--annotation ", quoted(item), ": KEY=VALUE is expected")};
        std::string key = item.substr(0, eq);
        std::vector<std::string> names{"annotation."};
        if (const auto colon = key.find(':'); colon != std::string::npos) {
            const auto types = key.substr(0, colon);
            names.clear();
            for (const auto type : split(types, ',')) names.push_back(cat("annotation-", trim(type), "."));
            key = key.substr(colon + 1);
        }
        for (auto& o : r.outputs) {
            if (o.type == "local" || o.type == "tar" || o.type == "cacheonly") continue;
            for (const auto& name : names) o.attributes[name + key] = item.substr(eq + 1);
            taken = true;
        }
    }
    if (!taken) throw error{errc::invalid, "--annotation needs an output that is an image (image, oci, docker or registry)"};
}

/// "type=provenance,mode=max"; the type goes out of the parameters, which are passed on as they are.
void add_attest(const std::string& text, build::build_request& r) {
    std::string type, rest;
    for (const auto& [key, value] : parse_csv(text, "--attest")) {
        if (key == "type") {
            type = value;
            continue;
        }
        auto pair = cat(key, key.empty() ? "" : "=", value);
        if (pair.find_first_of(",\"") != std::string::npos) pair = cat('"', pair, '"');
        rest += cat(rest.empty() ? "" : ",", pair);
    }
    if (type.empty()) throw error{errc::invalid, cat("--attest ", text, ": type= is missing (provenance or sbom)")};
    r.attests[type] = rest;
}

/// "default", "default=SOCKET", "id=SOCKET".
void add_ssh(const std::string& text, build::build_request& r) {
    const auto eq = text.find('=');
    const std::string id = text.substr(0, eq);
    std::string path = eq == std::string::npos ? "" : text.substr(eq + 1);
    if (id.empty()) throw error{errc::invalid, cat("--ssh ", text, ": an id is missing, as in --ssh default")};
    if (path.empty()) {
        const char* agent = std::getenv("SSH_AUTH_SOCK");
        if (agent == nullptr || *agent == '\0')
            throw error{errc::not_found,
                        cat("--ssh ", text, ": no ssh agent is running (SSH_AUTH_SOCK is not set); start one with ssh-agent and ssh-add")};
        path = agent;
    }
    std::error_code ec;
    if (!stdfs::exists(path, ec)) throw error{errc::not_found, cat("--ssh ", text, ": there is no ", path)};
    if (!stdfs::is_socket(path, ec))
        throw error{errc::unsupported,
                    cat("--ssh ", text, ": keys from files are not supported yet; load the key into an agent with ssh-add and give --ssh ", id)};
    r.ssh_agents[id] = stdfs::absolute(path);
}

build::build_request make_request(build_flags& flags) {
    if (!flags.not_yet.empty()) throw error{errc::unsupported, cat(flags.not_yet.front(), " is not supported yet")};
    build::build_request r;
    set_context(flags, r);
    r.target = flags.target;
    r.tags = flags.tags;
    r.build_args = parse_pairs(flags.build_args, "--build-arg", true);
    r.labels = parse_pairs(flags.labels, "--label", false);
    r.platforms = flags.platforms;
    if (const char* fallback = std::getenv("DOCKER_DEFAULT_PLATFORM"); r.platforms.empty() && fallback != nullptr && *fallback != '\0')
        r.platforms.emplace_back(fallback);
    for (const auto& a : flags.attests) add_attest(a, r);
    if (flags.provenance) r.attests["provenance"] = *flags.provenance;
    if (flags.sbom) r.attests["sbom"] = *flags.sbom;
    r.no_cache = flags.no_cache;
    r.no_cache_stages = flags.no_cache_filter;
    if (flags.pull == "true" || flags.pull == "always")
        r.pull = build::pull_mode::always;
    else if (flags.pull == "never")
        r.pull = build::pull_mode::never;
    else if (!flags.pull.empty() && flags.pull != "false" && flags.pull != "missing")
        throw error{errc::invalid, cat("--pull=", flags.pull, ": missing, always or never are known")};
    r.network = flags.network;
    r.add_hosts = flags.add_hosts;
    r.ulimits = flags.ulimits;
    r.cgroup_parent = flags.cgroup_parent;
    if (!flags.shm_size.empty()) r.shm_size = parse_bytes(flags.shm_size);
    for (const auto& c : flags.build_contexts) {
        const auto eq = c.find('=');
        if (eq == 0 || eq == std::string::npos) throw error{errc::invalid, cat("--build-context ", quoted(c), ": NAME=VALUE is expected")};
        r.build_contexts[c.substr(0, eq)] = c.substr(eq + 1);
    }
    for (const auto& s : flags.ssh) add_ssh(s, r);
    for (const auto& s : flags.secrets) r.secrets.push_back(parse_secret(s));
    for (const auto& o : flags.outputs) r.outputs.push_back(parse_output(o));
    if (flags.load) r.outputs.push_back({.type = "docker", .attributes = {}});
    r.push = flags.push;
    r.cache_from = parse_caches(flags.cache_from, "--cache-from");
    r.cache_to = parse_caches(flags.cache_to, "--cache-to");
    for (const auto& list : flags.allow)
        for (const auto name : split(list, ',')) r.allow.push_back(parse_entitlement(std::string(trim(name))));
    add_annotations(r, flags.annotations);
    if (flags.push && r.tags.empty()) throw error{errc::invalid, "--push needs a name to push to: add --tag"};
    // buildx's own way to give one.
    if (const char* file = std::getenv("EXPERIMENTAL_BUILDKIT_SOURCE_POLICY"); file != nullptr && *file != '\0') r.source_policy = read_policy(file);
    if (const char* epoch = std::getenv("SOURCE_DATE_EPOCH"); epoch != nullptr && *epoch != '\0' && !r.build_args.contains("SOURCE_DATE_EPOCH"))
        r.build_args["SOURCE_DATE_EPOCH"] = epoch;
    return r;
}

std::string metadata_json(const build::build_result& result) {
    json::object o;
    for (const auto& [key, value] : result.exporter_response) {
        // The descriptor travels as base64 JSON and is shown decoded, as buildx does.
        if (const auto decoded = key == "containerimage.descriptor" ? base64_decode(value) : std::nullopt)
            o.set(key, json::parse(*decoded));
        else
            o.set(key, json::value(value));
    }
    return json::serialize(json::value(std::move(o)), {.indent = true, .escape_html = false, .sorted = true}) + "\n";
}

void print_result(const build_flags& flags, const build::build_result& result, std::chrono::steady_clock::duration took) {
    if (flags.quiet) {
        if (!result.config_digest.empty()) std::cout << result.config_digest << "\n";
        return;
    }
    if (result.image_digest.empty()) return;
    const auto seconds = std::chrono::duration<double>(took).count();
    char time[32];
    std::snprintf(time, sizeof time, "%.2fs", seconds);
    std::string names;
    for (const auto& n : result.names) names += cat(names.empty() ? "" : ", ", n);
    std::cerr << (names.empty() ? "image" : names) << "  " << result.image_digest << "  " << format_bytes(result.size) << "  " << time << "  ("
              << result.steps << " steps, " << result.cached_steps << " cached)\n";
}

async::task<int> build_with(std::shared_ptr<build::engine> engine, build_flags& flags, std::shared_ptr<hand_over> next, async::cancel_token stop) {
    const auto started = std::chrono::steady_clock::now();
    auto request = make_request(flags);
    next->dockerfile = request.dockerfile_text;
    const auto asked = request;
    const auto call = parse_call(flags.check ? "check" : flags.call, flags.print_llb);
    if (call) co_return co_await run_call(engine, std::move(request), *call, make_display("quiet", ""), stop);
    const auto display = make_display(flags.quiet ? "quiet" : flags.progress, request.name);
    std::exception_ptr failed;
    build::build_result result;
    try {
        result = co_await engine->build(std::move(request), display, stop);
    } catch (...) {
        failed = std::current_exception();
    }
    display->finish();
    if (failed && next->wanted && can_hand_over(asked)) co_return 0;
    if (failed) {
        throw show_problem(asked, describe(failed));
    }
    if (!flags.iidfile.empty()) write_whole(flags.iidfile, result.config_digest);
    if (!flags.metadata_file.empty()) write_whole(flags.metadata_file, metadata_json(result));
    print_result(flags, result, std::chrono::steady_clock::now() - started);
    co_return 0;
}

void add_flags(CLI::App& c, build_flags& f) {
    c.add_option("PATH", f.path,
                 "Directory with the files to build from, a git repository, the URL of an archive or a Dockerfile, or - for either on standard input")
        ->required()
        ->type_name("");
    c.add_option("-f,--file", f.file, "Dockerfile (default: PATH/Dockerfile)")->type_name("FILE");
    const auto list = [&](const std::string& name, std::vector<std::string>& target, const std::string& help, const std::string& type) {
        c.add_option(name, target, help)->type_name(type)->take_all()->allow_extra_args(false);
    };
    list("-t,--tag", f.tags, "Name of the image (name:tag); may be repeated", "NAME");
    c.add_option("--target", f.target, "Build this stage")->type_name("STAGE");
    list("--build-arg", f.build_args, "Set a build argument", "KEY=VALUE");
    list("--label", f.labels, "Set a label of the image", "KEY=VALUE");
    c.add_option("--platform", f.platforms, "Platforms of the image (this machine's); several make an index")
        ->delimiter(',')
        ->type_name("OS/ARCH")
        ->allow_extra_args(false);
    list("-o,--output", f.outputs, "Where the result goes: type=image|oci|docker|local|tar|registry[,dest=...]", "OUTPUT");
    c.add_flag("--push", f.push, "Push the image under its tags");
    c.add_flag("--load", f.load, "Load the image into the Docker engine");
    c.add_flag("--no-cache", f.no_cache, "Run every step anew");
    c.add_option("--no-cache-filter", f.no_cache_filter, "Run these stages anew")->delimiter(',')->type_name("STAGE")->allow_extra_args(false);
    c.add_flag("--pull{always}", f.pull, "Ask the registry for newer base images; --pull=missing (default), always or never");
    c.add_option("--network", f.network, "Network of RUN steps: default, none, host")->type_name("MODE");
    list("--add-host", f.add_hosts, "Line for /etc/hosts of RUN steps", "NAME:ADDRESS");
    list("--secret", f.secrets, "Secret for RUN --mount=type=secret", "id=ID[,src=FILE|,env=VAR]");
    list("--build-context", f.build_contexts, "Another context, for FROM, COPY --from and mounts",
         "NAME=DIR|URL|docker-image://REF|oci-layout://DIR");
    list("--ssh", f.ssh, "ssh agent for RUN --mount=type=ssh and git over ssh", "default|ID[=SOCKET]");
    c.add_option("--shm-size", f.shm_size, "Size of /dev/shm (64m)")->type_name("SIZE");
    list("--ulimit", f.ulimits, "Limit for RUN steps", "NAME=SOFT[:HARD]");
    c.add_option("--cgroup-parent", f.cgroup_parent, "Parent cgroup of RUN steps")->type_name("CGROUP");
    list("--allow", f.allow, "Let steps have network.host or security.insecure", "ENTITLEMENT");
    list("--annotation", f.annotations, "Set an annotation of the image", "KEY=VALUE");
    c.add_flag("--check", f.check, "Look for mistakes in the Dockerfile without building (as --call=check)");
    c.add_option("--call", f.call, "Answer instead of building: build, check, outline, targets[,format=json][,ignorestatus=true]")
        ->type_name("METHOD");
    c.add_flag("--print-llb{json}", f.print_llb, "Print the build graph instead of building; --print-llb=dot for Graphviz");
    c.add_option("--progress", f.progress, "auto, plain, tty, quiet, rawjson")->type_name("MODE");
    c.add_option("--metadata-file", f.metadata_file, "Write what was built as JSON")->type_name("FILE");
    c.add_option("--iidfile", f.iidfile, "Write the image id")->type_name("FILE");
    c.add_flag("-q,--quiet", f.quiet, "Print the image id only");
    list("--attest", f.attests, "Attest to the result: type=provenance[,mode=min|max][,version=v1|v0.2]", "ATTESTATION");
    c.add_option("--provenance", f.provenance, "As --attest type=provenance: true, false, mode=max ...")->type_name("PARAMETERS");
    c.add_option("--sbom", f.sbom, "As --attest type=sbom; only false yet")->type_name("PARAMETERS");
    list("--cache-from", f.cache_from, "Cache to take steps from: REF or type=registry,ref=REF or type=local,src=DIR", "CACHE");
    list("--cache-to", f.cache_to, "Where to put the cache: type=inline, type=registry,ref=REF[,mode=max] or type=local,dest=DIR", "CACHE");
    // What CI jobs pass to switch off what is not there anyway, or to name the builder there is.
    for (const auto& [flag, value] : {std::pair{"--builder", "default"}})
        c.add_option_function<std::string>(
             flag,
             [&f, name = flag, accepted = value](const std::string& v) {
                 if (v != accepted) f.not_yet.push_back(cat(name, "=", v));
             },
             "")
            ->group("");
    f.engine.add_to(c);
}

}  // namespace

command add_build(CLI::App& app, interrupt& stop, engine_setup setup) {
    auto flags = std::make_shared<build_flags>();
    auto* c = app.add_subcommand("build", "Build an image from a Dockerfile");
    add_flags(*c, *flags);
    return {c, [flags, &stop, setup] {
                const auto next = std::make_shared<hand_over>();
                const engine_setup here = [next](std::shared_ptr<build::engine> engine, const config::configuration&) {
                    engine->run_frontends_with(asks_for_more(next));
                };
                const auto code = with_engine(
                    flags->engine, stop,
                    [flags, next, token = stop.token()](std::shared_ptr<build::engine> engine) { return build_with(engine, *flags, next, token); },
                    setup ? setup : here);
                if (next->wanted) become_builder(*next);
                return code;
            }};
}

}  // namespace cobuild::app

module;
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.build;

import cobuild.archive;
import cobuild.frontend;
import cobuild.fs;
import cobuild.llb;
import cobuild.policy;
import cobuild.remote;
import :parts;

namespace cobuild::build {

namespace {

namespace stdfs = std::filesystem;

std::optional<std::string> read_small(const stdfs::path& file) {
    const unique_fd fd{::open(file.c_str(), O_RDONLY | O_CLOEXEC)};
    if (!fd) {
        if (errno == ENOENT || errno == ENOTDIR) return std::nullopt;
        throw_errno(cat("reading ", file.string()));
    }
    return fs::read_all(fd.get(), std::size_t{16} << 20);
}

struct definition_files {
    std::string text, name;
    std::optional<std::string> ignore;
};

/// The Dockerfile and the ignore file that counts: the one named after the Dockerfile first, then the context's.
definition_files read_definition(const build_request& r) {
    definition_files out;
    out.name = "Dockerfile";
    std::optional<stdfs::path> file;
    if (r.dockerfile_text) {
        out.text = *r.dockerfile_text;
    } else {
        file = r.dockerfile.empty() ? r.context / "Dockerfile" : r.dockerfile;
        auto text = read_small(*file);
        if (!text && r.dockerfile.empty()) {
            file = r.context / "dockerfile";
            text = read_small(*file);
        }
        if (!text)
            throw error{errc::not_found, r.dockerfile.empty()
                                             ? cat("there is no Dockerfile in ", r.context.string(), "; write one or name one with --file")
                                             : cat("the Dockerfile ", r.dockerfile.string(), " does not exist")};
        out.text = std::move(*text);
        out.name = file->filename().string();
        out.ignore = read_small(stdfs::path(file->string() + ".dockerignore"));
    }
    if (!out.ignore && !r.context.empty()) {
        // Read as from inside the context: a link there is followed, but never out of it.
        const fs::root root(r.context.string());
        const auto info = root.stat(".dockerignore", fs::links::follow);
        if (info && info->is_file()) out.ignore = root.read_file(".dockerignore", std::size_t{16} << 20);
    }
    return out;
}

constexpr std::string_view upload_name = "upload", archive_name = "context";
constexpr std::uint64_t max_upload = std::uint64_t{64} << 30;
constexpr std::size_t max_dockerfile = std::size_t{16} << 20;

/// What came through a stream, in a directory of its own: an archive to be unpacked, or a Dockerfile's text.
struct upload {
    std::optional<snapshot::writable> place;
    std::string directory;
    std::optional<std::string> dockerfile;
};

void receive(int from, int to) {
    std::vector<std::byte> buffer(std::size_t{1} << 20);
    std::uint64_t total = 0;
    for (;;) {
        const auto n = ::read(from, buffer.data(), buffer.size());
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw_errno("reading the context from standard input");
        if (n == 0) return;
        total += static_cast<std::uint64_t>(n);
        if (total > max_upload) throw error{errc::invalid, cat("the context on standard input is larger than ", format_bytes(max_upload))};
        fs::write_all(to, std::span<const std::byte>(buffer).first(static_cast<std::size_t>(n)));
    }
}

std::string path_of(int dir) {
    std::string out(4096, '\0');
    const auto n = ::readlink(cat("/proc/self/fd/", dir).c_str(), out.data(), out.size());
    if (n < 0) throw_errno("finding the place for the context");
    out.resize(static_cast<std::size_t>(n));
    return out;
}

async::task<std::shared_ptr<upload>> read_upload(parts& p, int stream) {
    auto out = std::make_shared<upload>();
    out->place.emplace(co_await p.snapshots->begin({}));
    co_await p.runtime.pool().run([&] {
        const unique_fd dir{::openat(out->place->upper(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
        out->directory = path_of(dir.get());
        const unique_fd file{::openat(dir.get(), std::string(archive_name).c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600)};
        if (!file) throw_errno("keeping the context from standard input");
        receive(stream, file.get());
        ::lseek(file.get(), 0, SEEK_SET);
        if (!archive::is_add_archive(file.get())) out->dockerfile = fs::read_all(file.get(), max_dockerfile);
    });
    co_return out;
}

/// "oci-layout://DIRECTORY[:TAG][@DIGEST]": the directory, and the rest as it stands.
std::pair<stdfs::path, std::string> split_layout(std::string text) {
    std::string rest;
    if (const auto at = text.rfind('@'); at != std::string::npos) {
        rest = text.substr(at);
        text.resize(at);
    }
    const auto colon = text.rfind(':');
    if (colon != std::string::npos && colon > 0 && text.find('/', colon) == std::string::npos) {
        rest.insert(0, text.substr(colon));
        text.resize(colon);
    }
    return {stdfs::absolute(text), rest};
}

void name_contexts(const build_request& r, frontend::request& request, session::local_options& session, ops::build_scope& scope) {
    static constexpr std::string_view layout = "oci-layout://";
    for (const auto& [given, value] : r.build_contexts) {
        const auto name = to_lower(given);
        if (value.starts_with(layout)) {
            auto [directory, rest] = split_layout(value.substr(layout.size()));
            const auto store = cat("layout-", scope.layouts.size());
            request.named_contexts[name] = cat(layout, store, rest);
            scope.layouts[store] = std::move(directory);
        } else if (value.starts_with("docker-image://") || remote::is_http(value)) {
            request.named_contexts[name] = value;
        } else if (std::error_code ec; stdfs::is_directory(value, ec)) {
            session.directories[cat("named-", name)] = stdfs::absolute(value);
            request.named_contexts[name] = cat("local:named-", name);
        } else if (remote::parse_git_context(value)) {
            request.named_contexts[name] = value;
        } else {
            throw error{errc::not_found, cat("the build context ", given, "=", value,
                                             ": there is no such directory, and it is no git repository, URL, docker-image:// or oci-layout://")};
        }
    }
}

}  // namespace

/// The tree of a remote context, to read the Dockerfile in.
async::task<std::shared_ptr<snapshot::view>> solve_tree(parts& p, llb::definition what, const ops::build_scope& scope,
                                                        std::shared_ptr<progress::sink> sink) {
    auto graph = ops::make_graph(llb::load(what), *p.environment, scope);
    auto solved = co_await p.solver->solve(graph.vertices, {graph.result.value()}, std::move(sink), {});
    const auto value = co_await ops::as_chain_value(*p.environment, solved.at(0));
    co_return std::make_shared<snapshot::view>(co_await p.snapshots->view(value->chain));
}

async::task<std::shared_ptr<snapshot::view>> solve_context(parts& p, const build_inputs& in, std::string shown_name,
                                                           std::shared_ptr<progress::sink> sink) {
    llb::graph g;
    std::optional<llb::input> last;
    for (auto o : frontend::context_ops(in.request)) {
        if (last) o.inputs = {*last};
        llb::op_metadata meta;
        meta.description[std::string(llb::custom_name)] = cat("[internal] load remote build context ", shown_name);
        last = g.add(o, std::move(meta));
    }
    auto definition = g.finish(*last);
    if (in.check) definition = co_await check_sources(std::move(definition), in.check);
    co_return co_await solve_tree(p, std::move(definition), in.scope, std::move(sink));
}

/// The Dockerfile of a remote context. A URL that gave a single file means that this is the Dockerfile.
void read_remote_definition(const build_request& r, const fs::root& tree, frontend::request& out) {
    const auto read = [&](const std::string& path) -> std::optional<std::string> {
        const auto info = tree.stat(path, fs::links::follow);
        if (!info || !info->is_file()) return std::nullopt;
        return tree.read_file(path, max_dockerfile);
    };
    std::string path = r.dockerfile.empty() ? "Dockerfile" : r.dockerfile.string();
    auto text = read(path);
    if (!text && r.dockerfile.empty()) text = read(path = "dockerfile");
    if (!text && !out.context_archive.empty() && tree.list("") == std::vector<std::string>{out.context_archive})
        text = read(path = out.context_archive);
    if (!text)
        throw error{errc::not_found, r.dockerfile.empty() ? std::string("there is no Dockerfile in the build context; name one with --file")
                                                          : cat("the Dockerfile ", r.dockerfile.string(), " does not exist in the build context")};
    out.dockerfile = std::move(*text);
    out.dockerfile_name = stdfs::path(path).filename().string();
}

namespace {

void set_files(frontend::request& request, definition_files files) {
    request.dockerfile = std::move(files.text);
    request.dockerfile_name = std::move(files.name);
    request.ignore_file = std::move(files.ignore);
}

}  // namespace

namespace {

/// Frontends that are images read the Dockerfile themselves, from a directory "dockerfile" of the client.
async::task<void> show_dockerfile(parts& p, const build_request& r, session::local_options& session, build_inputs& in) {
    if (!r.dockerfile_text) {
        session.directories["dockerfile"] = r.dockerfile.empty() ? r.context : r.dockerfile.has_parent_path() ? r.dockerfile.parent_path() : ".";
        if (session.directories["dockerfile"].empty()) session.directories.erase("dockerfile");
        co_return;
    }
    if (!frontend::wanted_frontend({.dockerfile = *r.dockerfile_text, .build_args = r.build_args})) co_return;
    const auto kept = std::make_shared<std::pair<upload, std::shared_ptr<void>>>();
    kept->second = in.keep;
    kept->first.place.emplace(co_await p.snapshots->begin({}));
    co_await p.runtime.pool().run([&] {
        const unique_fd dir{::openat(kept->first.place->upper(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
        kept->first.directory = path_of(dir.get());
        const unique_fd file{::openat(dir.get(), "Dockerfile", O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644)};
        if (!file) throw_errno("keeping the Dockerfile from standard input");
        fs::write_all(file.get(), bytes_of(*r.dockerfile_text));
    });
    session.directories["dockerfile"] = kept->first.directory;
    in.keep = kept;
}

}  // namespace

async::task<build_inputs> open_inputs(parts& p, build_request r, std::shared_ptr<progress::sink> sink) {
    build_inputs in;
    if (!r.source_policy.empty()) {
        in.check = [rules = std::vector{policy::parse(r.source_policy)}](llb::source_op what, std::optional<llb::platform> platform) {
            return check_source(rules, {}, std::move(what), std::move(platform));
        };
    }
    session::local_options session;
    if (r.context_stream >= 0) {
        auto received = co_await read_upload(p, r.context_stream);
        if (received->dockerfile) {
            r.dockerfile_text = std::move(received->dockerfile);
        } else {
            session.directories[std::string(upload_name)] = received->directory;
            in.request.remote_context = llb::source_op{cat("local://", upload_name), {}};
            in.request.context_archive = archive_name;
            in.keep = received;
        }
    } else if (!r.remote_context.empty()) {
        const auto keep = r.build_args.find("BUILDKIT_CONTEXT_KEEP_GIT_DIR");
        const bool keep_git_dir = keep != r.build_args.end() && (keep->second == "1" || keep->second == "true");
        if (!frontend::set_remote_context(in.request, r.remote_context, keep_git_dir))
            throw error{errc::invalid, cat("the context ", quoted(r.remote_context), " is neither a git repository nor a URL")};
        const auto epoch = r.build_args.find("SOURCE_DATE_EPOCH");
        const bool timed = r.source_date_epoch || (epoch != r.build_args.end() && !epoch->second.empty());
        if (timed && in.request.context_archive.empty()) in.request.remote_context->attrs["git.mtime"] = "commit";
    }
    if (!r.context.empty()) {
        session.directories["context"] = r.context;
    } else {
        (void)p.directory->subdir("empty");
        session.directories["context"] = p.directory->root() + "/empty";
    }
    co_await show_dockerfile(p, r, session, in);
    for (const auto& s : r.secrets) session.secrets[s.id] = {s.file, s.environment};
    for (const auto& [id, socket] : r.ssh_agents) session.ssh_agents[id] = socket.string();
    name_contexts(r, in.request, session, in.scope);
    in.scope.session = session::make_local(p.runtime.pool(), std::move(session));
    in.scope.id = p.directory->fresh_name();
    in.scope.always_pull = r.pull == pull_mode::always;
    in.scope.sources = std::make_shared<ops::known_sources>();

    std::shared_ptr<snapshot::view> tree;
    if (in.request.remote_context && !r.dockerfile_text)
        tree = co_await solve_context(p, in, r.context_stream >= 0 ? "-" : remote::redacted(r.remote_context), sink);
    const std::string file = r.dockerfile.empty() ? "Dockerfile" : r.dockerfile.filename().string();
    co_await shown<int>(sink, "load", cat("[internal] load build definition from ", file), [&](progress::writer) -> async::task<int> {
        co_await p.runtime.pool().run([&] {
            if (tree)
                read_remote_definition(r, fs::root(tree->mount().duplicate()), in.request);
            else
                set_files(in.request, read_definition(r));
        });
        co_return 0;
    });
    co_return in;
}

}  // namespace cobuild::build

module;
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.frontend;

import cobuild.json;
import :state;

namespace cobuild::frontend {

llb::source_op git_source(const remote::git_ref& r, bool keep_git_dir, std::string_view checksum) {
    llb::source_op out{cat("git://", remote::identifier(r)), {}};
    out.attrs["git.fullurl"] = r.remote;
    out.attrs["git.authtokensecret"] = "GIT_AUTH_TOKEN";
    out.attrs["git.authheadersecret"] = "GIT_AUTH_HEADER";
    if (r.scheme == "ssh") out.attrs["git.mountsshsock"] = "default";
    if (keep_git_dir) out.attrs["git.keepgitdir"] = "true";
    if (!checksum.empty()) out.attrs["git.checksum"] = checksum;
    if (r.submodules == false) out.attrs["git.skipsubmodules"] = "true";
    if (r.commit_time) out.attrs["git.mtime"] = "commit";
    if (r.fetch_by_commit) out.attrs["git.fetchbycommit"] = "true";
    return out;
}

llb::source_op http_source(std::string_view url, std::string_view filename, std::string_view checksum) {
    llb::source_op out{std::string(url), {}};
    if (const auto hash = out.identifier.find('#'); hash != std::string::npos) out.identifier.resize(hash);
    out.attrs["http.filename"] = filename;
    if (!checksum.empty()) out.attrs["http.checksum"] = checksum;
    return out;
}

llb::op unpacking(const std::string& name) {
    llb::copy_action copy{.src = cat("/", name), .dest = "/"};
    copy.attempt_unpack = true;
    copy.create_dest_path = true;
    llb::file_op f;
    f.actions.push_back({.input = llb::scratch, .secondary_input = 0, .output = 0, .what = std::move(copy)});
    return {.inputs = {}, .what = std::move(f), .platform = {}};
}

llb::op below(const std::string& directory) {
    llb::copy_action copy{.src = join_path("/", directory), .dest = "/", .dir_copy_contents = true};
    llb::file_op f;
    f.actions.push_back({.input = llb::scratch, .secondary_input = 0, .output = 0, .what = std::move(copy)});
    return {.inputs = {}, .what = std::move(f), .platform = {}};
}

std::vector<llb::op> context_ops(const request& r) {
    std::vector<llb::op> out{{.inputs = {}, .what = r.remote_context.value(), .platform = {}}};
    if (!r.context_archive.empty()) out.push_back(unpacking(r.context_archive));
    return out;
}

bool set_remote_context(request& r, std::string_view text, bool keep_git_dir) {
    if (const auto git = remote::parse_git_context(text)) {
        r.remote_context = git_source(*git, git->keep_git_dir.value_or(keep_git_dir), git->checksum);
        r.context_archive.clear();
        return true;
    }
    if (!remote::is_http(text)) return false;
    r.context_archive = "context";
    r.remote_context = http_source(text, r.context_archive, {});
    return true;
}

/// What FROM, COPY --from, a mount or a stage calls `name`, where a named context of that name was given.
const std::string* converter::named_context(const std::string& name) const {
    if (req_.named_contexts.empty() || name == "scratch" || name == "context") return nullptr;
    std::string plain = to_lower(name);
    try {
        plain = oci::reference::parse(name).familiar();
    } catch (const error&) {
        // Names of contexts need not be names of images.
    }
    if (plain.ends_with(":latest")) plain.resize(plain.size() - 7);
    for (const auto& key : {cat(plain, "::", oci::format(oci::normalize(target_platform_))), plain, to_lower(name)})
        if (const auto found = req_.named_contexts.find(key); found != req_.named_contexts.end()) return &found->second;
    return nullptr;
}

root_ref converter::unpacked_file(const ref& file, const std::string& name, llb::op_metadata meta) {
    return draft_.add(unpacking(name), {file}, std::move(meta));
}

/// A context that is no image: the stage is its tree, with the configuration of an empty image.
async::task<void> converter::apply_context(stage_state& s) {
    static constexpr std::string_view local = "local:", input = "input:";
    const std::string name = s.base_name;
    const auto named = [&](std::string text) {
        llb::op_metadata meta;
        meta.description[std::string(llb::custom_name)] = cat("[context ", name, "] ", text);
        return meta;
    };
    s.image = empty_image();
    s.platform = target_platform_;
    std::optional<remote::git_ref> git;
    try {
        if (!s.context.starts_with(local) && !s.context.starts_with(input)) git = remote::parse_git_context(s.context);
    } catch (const error& e) {
        fail(e.kind(), cat("the named context ", name, ": ", e.what()), s.lines);
    }
    if (s.context.starts_with(local)) {
        const auto directory = s.context.substr(local.size());
        std::vector<std::string> ignored;
        if (const auto ignore = co_await engine_.read_context_file(directory, ".dockerignore")) ignored = fs::parse_ignore_file(*ignore);
        apply_local(s, directory, ignored);
    } else if (s.context.starts_with(input)) {
        apply_input(s, s.context.substr(input.size()));
    } else if (git) {
        const bool keep = build_arg("BUILDKIT_CONTEXT_KEEP_GIT_DIR").value_or("") == "1";
        s.root = draft_.add({.inputs = {}, .what = git_source(*git, git->keep_git_dir.value_or(keep), git->checksum), .platform = {}}, {},
                            named(cat("load git source ", remote::redacted(s.context))));
    } else if (remote::is_http(s.context)) {
        const auto file = remote::file_name(s.context);
        const auto source = draft_.add({.inputs = {}, .what = http_source(s.context, file, {}), .platform = {}}, {}, named(cat("load ", s.context)));
        s.root = unpacked_file(source, file, named("extract"));
    } else {
        fail(errc::invalid,
             cat("the named context ", name, "=", s.context, ": a directory, a git repository, a URL, docker-image:// or oci-layout:// is expected"),
             s.lines);
    }
    if (s.stage == nullptr) s.dispatched = true;
}

void converter::apply_local(stage_state& s, const std::string& directory, const std::vector<std::string>& ignored) {
    const auto named = [&](std::string_view text) {
        llb::op_metadata meta;
        meta.description[std::string(llb::custom_name)] = cat("[context ", s.base_name, "] ", text);
        return meta;
    };
    llb::source_op source{cat("local://", directory), {}};
    source.attrs["local.sharedkeyhint"] = cat("context:", directory);
    if (const auto session = req_.local_sessions.find(directory); session != req_.local_sessions.end())
        source.attrs["local.session"] = session->second;
    if (!ignored.empty()) source.attrs["local.excludepatterns"] = json::serialize(json::value(ignored));
    s.local = draft_.add({.inputs = {}, .what = std::move(source), .platform = {}}, {}, named("load from client"));
    s.root = s.local;
    if (s.stage == nullptr) return;
    // Who is FROM it has all of it; where it stands for a stage, those who copy from that say what they want.
    if (s.stage->name != s.base_name) want(s, "/");
    // Steps go on from layers, never from the directory itself.
    llb::copy_action copy{.src = "/", .dest = "/", .dir_copy_contents = true, .create_dest_path = true};
    llb::file_op f;
    f.actions.push_back({.input = llb::scratch, .secondary_input = 0, .output = 0, .what = std::move(copy)});
    s.root = draft_.add({.inputs = {}, .what = std::move(f), .platform = {}}, {*s.root}, named("copy"));
}

/// A graph that the client or another build made, with the image config it told of, if any.
void converter::apply_input(stage_state& s, const std::string& input) {
    const auto graph = req_.inputs.find(input);
    if (graph == req_.inputs.end()) {
        std::vector<std::string_view> names;
        for (const auto& [name, unused] : req_.inputs) names.emplace_back(name);
        fail(errc::invalid, cat("invalid input ", input, " for ", s.base_name, ": there is no input of that name", did_you_mean(input, names)),
             s.lines);
    }
    try {
        s.root = draft_.add(graph->second);
        const auto known = req_.input_metadata.find(input);
        if (known == req_.input_metadata.end()) return;
        const auto parsed = json::parse(known->second);
        const auto* config = parsed.find("containerimage.config");
        if (config == nullptr) return;
        const auto text = base64_decode(config->as_string());
        if (!text) throw error{errc::invalid, "containerimage.config is not base64"};
        s.image = oci::parse_image(*text);
        s.base_config = *text;
        s.image.created.clear();
        s.image.unknown = {};
        s.image.config.unknown = {};
    } catch (const error& e) {
        fail(e.kind(), cat("the input ", input, " of the named context ", s.base_name, ": ", e.what()), s.lines);
    }
}

void converter::want(const stage_state& s, const std::string& path) {
    if (s.local) local_paths_[s.local->node].insert(path);
}

/// ADD of what has to be fetched: a vertex of its own, and the copy of what it brings.
converter::part converter::remote_part(const stage_state& s, const command& c, const std::string& source, const std::string& name) {
    const auto lines = c.what.lines;
    const auto& add = std::get<df::add_instruction>(c.what.body);
    const auto where = ranges_of(lines);
    std::optional<remote::git_ref> git;
    try {
        git = remote::parse_git(source);
        if (!git && !add.checksum.empty()) (void)digest::parse(add.checksum);
    } catch (const error& e) {
        fail(e.kind(), cat("ADD ", remote::redacted(source), ": ", e.what()), lines);
    }
    part out;
    out.what.create_dest_path = true;
    if (!git) {
        const auto file = remote::file_name(source);
        out.from = draft_.add({.inputs = {}, .what = http_source(source, file, add.checksum), .platform = {}}, {}, metadata(s, name), where);
        out.what.src = cat("/", file);
        out.what.attempt_unpack = add.unpack.value_or(false);
        return out;
    }
    if (add.keep_git_dir && git->keep_git_dir && *add.keep_git_dir != *git->keep_git_dir)
        fail(errc::invalid, cat("ADD --keep-git-dir says otherwise than keep-git-dir in ", remote::redacted(source)), lines);
    if (!add.checksum.empty() && !git->checksum.empty() && add.checksum != git->checksum)
        fail(errc::invalid, cat("ADD --checksum=", add.checksum, " and the checksum in ", remote::redacted(source), " differ"), lines);
    const auto sum = add.checksum.empty() ? git->checksum : add.checksum;
    if (!sum.empty() && !std::all_of(sum.begin(), sum.end(), [](char ch) { return (ch >= '0' && ch <= '9') || (ch >= 'a' && ch <= 'f'); }))
        fail(errc::invalid, cat("ADD --checksum=", sum, ": of a git repository the hex digits of a commit are expected"), lines);
    const bool keep = add.keep_git_dir.value_or(git->keep_git_dir.value_or(false));
    out.from = draft_.add({.inputs = {}, .what = git_source(*git, keep, sum), .platform = {}}, {}, metadata(s, name), where);
    out.what.src = "/";
    out.what.dir_copy_contents = true;
    return out;
}

}  // namespace cobuild::frontend

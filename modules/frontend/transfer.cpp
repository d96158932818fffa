module;
#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <variant>
#include <vector>

module cobuild.frontend;

import :state;

namespace cobuild::frontend {
namespace {

/// --chmod: an octal number to 07777, or chmod(1)'s symbolic form. What looks like a number must be one.
void set_mode(llb::copy_action& a, std::string_view chmod) {
    if (chmod.empty()) return;
    std::uint32_t mode = 0;
    const auto [end, failed] = std::from_chars(chmod.data(), chmod.data() + chmod.size(), mode, 8);
    if (failed == std::errc{} && end == chmod.data() + chmod.size() && mode <= 07777) {
        a.mode = static_cast<std::int32_t>(mode);
    } else if (is_symbolic_mode(chmod)) {
        a.mode_str = chmod;
    } else {
        throw error{errc::invalid, cat("invalid chmod parameter: '", chmod,
                                       "'. it should be octal string and between 0 and 07777, or symbolic such as u=rwX,go=rX")};
    }
}

/// What looks like git is git, though it be malformed: that is said when it is read.
bool is_git(const std::string& source) {
    try {
        return remote::parse_git(source).has_value();
    } catch (const error&) {
        return true;
    }
}

bool leaves_context(std::string_view source) {
    const auto clean = fs::clean_path(source);
    return clean == ".." || clean.starts_with("../");
}

/// What of the context a source needs: itself from the root, without the pivot of --parents.
std::string wanted_path(std::string_view source, bool parents) {
    std::string path(source);
    if (parents) {
        if (const auto pivot = path.find("/./"); pivot != std::string::npos) path.replace(pivot, 3, "/");
    }
    return join_path("/", path);
}

}  // namespace

/// What a COPY or ADD names that cannot be served; said before anything is built.
void converter::check_sources(const stage_state& s, const command& c, const df::transfer& t, bool is_add) const {
    const auto lines = c.what.lines;
    const auto* copy = std::get_if<df::copy_instruction>(&c.what.body);
    const bool from_context = is_add || copy->from.empty();
    if (const auto* add = std::get_if<df::add_instruction>(&c.what.body); add != nullptr && !add->checksum.empty()) {
        if (t.sources.size() != 1) fail(errc::invalid, "checksum can't be specified for multiple sources", lines);
        if (!remote::is_http(t.sources.front()) && !is_git(t.sources.front())) fail(errc::invalid, "checksum requires HTTP(S) or Git sources", lines);
    }
    for (const auto& source : t.sources) {
        const bool git = is_git(source);
        if (git || remote::is_http(source)) {
            if (!is_add)
                fail(errc::invalid,
                     cat("source ", quoted(source), git ? " can't be a git ref for COPY; ADD takes it" : " can't be a URL for COPY; ADD takes it"),
                     lines);
            continue;
        }
        if (from_context && leaves_context(source)) {
            fail(errc::invalid,
                 cat(is_add ? "ADD" : "COPY", " source ", quoted(source),
                     " is outside of the build context: only what lies in the context can be copied, so start the build with a directory that holds "
                     "it"),
                 lines);
        }
    }
    if (!from_context && c.sources.front() != nullptr && !c.sources.front()->dispatched) {
        fail(errc::invalid, cat("cannot copy from stage ", quoted(copy->from), ", it needs to be defined before current stage ", quoted(s.name)),
             lines);
    }
}

/// With exceptions ("!") in the ignore file nothing can be said without looking at the files.
void converter::warn_ignored(const df::instruction& in, std::string_view source, bool is_add) {
    if (!ignore_ || ignore_has_exceptions_) return;
    const auto path = fs::clean_path(source);
    bool ignored = false;
    if (path == "." || path == "/") {
        ignored =
            std::any_of(ignore_rules_.begin(), ignore_rules_.end(), [](const auto& rule) { return rule == "*" || rule == "**" || rule == "**/*"; });
    } else {
        ignored = ignore_->matches(path.starts_with('/') ? std::string_view(path).substr(1) : std::string_view(path));
    }
    if (ignored) warn(df::check_rule::copy_ignored_file, in.lines, in.comments, is_add ? "Add" : "Copy", path);
}

root_ref converter::inline_document(const stage_state& s, const df::instruction& in, const df::heredoc& doc) {
    std::string text = doc.text();
    if (doc.expand) {
        auto e = df::expand_heredoc(text, s.env.lookup());
        report_unset(s, in, e.unmatched);
        text = std::move(e.text);
    }
    llb::file_action a{.input = llb::scratch, .secondary_input = llb::scratch, .output = 0, .what = {}};
    a.what = llb::mkfile_action{.path = join_path("/", doc.name), .mode = 0644, .data = std::move(text), .owner = {}, .timestamp = -1};
    llb::op_metadata meta;
    meta.description[std::string(llb::custom_name)] = "[internal] preparing inline document";
    return draft_.add({.inputs = {}, .what = llb::file_op{{std::move(a)}}, .platform = {}}, {}, std::move(meta));
}

/// The copy of a path of the context, a stage or an image. With --parents the path is a pattern below its pivot "/./".
llb::copy_action converter::local_copy(std::string src, bool parents) const {
    llb::copy_action a;
    if (parents) {
        std::string pattern = src;
        std::string from = "/";
        if (const auto pivot = src.find("/./"); pivot != std::string::npos) {
            from = src.substr(0, pivot);
            pattern = src.substr(pivot + 3);
        }
        pattern = join_path("/", pattern);
        a.include_patterns = {pattern.substr(1)};
        if (!has_wildcards(from) && !has_wildcards(pattern)) a.required_paths = {join_path(from, pattern)};
        src = from;
    }
    a.src = join_path("/", src);
    a.follow_symlink = true;
    a.dir_copy_contents = true;
    a.create_dest_path = true;
    a.allow_wildcard = true;
    a.allow_empty_wildcard = true;
    return a;
}

void converter::transfer(stage_state& s, command& c) {
    const df::instruction& in = c.what;
    const auto* copy = std::get_if<df::copy_instruction>(&in.body);
    const auto* add = std::get_if<df::add_instruction>(&in.body);
    const df::transfer& t = copy != nullptr ? static_cast<const df::transfer&>(*copy) : *add;
    check_sources(s, c, t, add != nullptr);

    const bool from_context = copy == nullptr || copy->from.empty();
    root_ref source;
    if (from_context) {
        source = draft::context();
    } else if (c.sources.front() != nullptr) {
        source = c.sources.front()->root;
    }
    const bool parents = copy != nullptr && copy->parents;
    const auto dest = path_in(s.dir, t.destination);

    const auto text = display(s, in);
    const auto name = step_name(s, text, &*s.platform);
    std::vector<part> parts;
    for (const auto& path : t.sources) {
        if (add != nullptr && (is_git(path) || remote::is_http(path))) {
            parts.push_back(remote_part(s, c, path, name));
            continue;
        }
        if (from_context) {
            warn_ignored(in, path, add != nullptr);
            context_paths_.insert(wanted_path(path, parents));
        } else if (c.sources.front() != nullptr) {
            want(*c.sources.front(), wanted_path(path, parents));
        }
        parts.push_back({local_copy(path, parents), source});
        parts.back().what.attempt_unpack = add != nullptr && add->unpack.value_or(true);
    }
    for (const auto& doc : t.heredocs) {
        llb::copy_action a{.src = join_path("/", doc.name), .create_dest_path = true};
        parts.push_back({std::move(a), inline_document(s, in, doc)});
    }

    // --link copies into an empty layer, which is then put on top. (With --chmod BuildKit copies plainly, and so do we.)
    const bool link = t.link && t.chmod.empty();
    const root_ref onto = link ? root_ref{} : s.root;
    input_list inputs;
    const auto base = inputs.of(onto);
    llb::file_op f;
    for (auto& p : parts) {
        p.what.dest = dest;
        if (!t.chown.empty()) p.what.owner = parse_owner(t.chown, base);
        set_mode(p.what, t.chmod);
        p.what.exclude_patterns = t.exclude;
        f.actions.push_back({.input = base, .secondary_input = inputs.of(p.from), .output = llb::no_output, .what = std::move(p.what)});
    }
    // Each action goes on from the one before; such indexes count from the number of inputs, known only now.
    for (std::size_t i = 1; i < f.actions.size(); ++i) f.actions[i].input = static_cast<std::int64_t>(inputs.refs.size() + i) - 1;
    f.actions.back().output = 0;

    const auto where = ranges_of(in.lines);
    auto meta = metadata(s, name);
    if (link) meta.progress_group = llb::progress_group{.id = digest::of(name).hex().substr(0, 25), .name = name, .weak = true};
    const auto group = meta.progress_group;
    const ref copied = draft_.add({.inputs = {}, .what = std::move(f), .platform = {}}, inputs.refs, std::move(meta), where);
    if (!link || !s.root) {
        s.root = copied;
    } else {
        --s.command_index;  // both are one step
        auto link_meta = metadata(s, step_name(s, cat("LINK ", text), &*s.platform));
        link_meta.progress_group = group;
        link_meta.progress_group->weak = false;
        s.root = draft_.add({.inputs = {}, .what = llb::merge_op{{0, 1}}, .platform = {}}, {*s.root, copied}, std::move(link_meta), where);
    }
    add_history(s, df::history(in.body), true);
}

}  // namespace cobuild::frontend

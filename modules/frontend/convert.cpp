module;
#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.frontend;

import cobuild.json;
import :state;

namespace cobuild::frontend {
namespace {

/// Errors of a file that are kept: more do not help.
constexpr std::size_t most_problems = 100;

/// Findings about instructions of a stage that is not built are not shown; those about FROM lines always are.
bool only_for_built_stages(std::string_view rule) {
    static constexpr std::array<std::string_view, 7> rules{"JSONArgsRecommended",  "WorkdirRelativePath",   "MultipleInstructionsDisallowed",
                                                           "LegacyKeyValueFormat", "SecretsUsedInArgOrEnv", "ExposeProtoCasing",
                                                           "ExposeInvalidFormat"};
    return std::find(rules.begin(), rules.end(), rule) != rules.end();
}

}  // namespace

/// The build context as one vertex: the paths that are needed (all when one of them is the root), and what is ignored.
context_parts converter::context_source() const {
    context_parts out;
    if (const auto input = req_.inputs.find("context"); input != req_.inputs.end() && !req_.remote_context) {
        if (input->second.ops.empty()) throw error{errc::invalid, "invalid nil input definition to definition op: the input \"context\" is empty"};
        out.graph = input->second;
    } else if (req_.remote_context) {
        out.ops = context_ops(req_);
    }
    if (out.graph || !out.ops.empty()) {
        if (!req_.context_subdir.empty()) out.ops.push_back(below(req_.context_subdir));
        return out;
    }
    llb::source_op source{cat("local://", req_.context_name), {}};
    if (const auto session = req_.local_sessions.find(req_.context_name); session != req_.local_sessions.end())
        source.attrs["local.session"] = session->second;
    source.attrs["local.sharedkeyhint"] = req_.shared_key_hint.empty() ? req_.context_name : req_.shared_key_hint;
    if (!ignore_rules_.empty()) source.attrs["local.excludepatterns"] = json::serialize(json::value(ignore_rules_));
    if (!context_paths_.empty() && !context_paths_.contains("/")) {
        std::vector<std::string> paths;
        for (const auto& p : context_paths_) paths.push_back(p.substr(1));
        std::sort(paths.begin(), paths.end());
        source.attrs["local.followpaths"] = json::serialize(json::value(paths));
    }
    out.ops.push_back({.inputs = {}, .what = std::move(source), .platform = {}});
    return out;
}

/// Named contexts that are directories of the client bring the paths that are needed, all when one of them is the root.
void converter::tell_wanted_paths() {
    for (const auto& [node, wanted] : local_paths_) {
        if (wanted.contains("/")) continue;
        std::vector<std::string> paths;
        for (const auto& p : wanted) paths.push_back(p.substr(1));
        draft_.set_attribute({node, 0}, "local.followpaths", json::serialize(json::value(paths)));
    }
}

result converter::finish(stage_state& target) {
    auto& image = target.image;
    for (const auto& [key, value] : req_.labels) image.config.labels.insert_or_assign(key, value);
    if (req_.target_platform) {
        const auto& p = *req_.target_platform;
        const bool same = p.os == image.platform.os && p.architecture == image.platform.architecture;
        image.platform.os = p.os;
        image.platform.architecture = p.architecture;
        if (!p.variant.empty() || !same) image.platform.variant = p.variant;
        if (!p.os_version.empty() || !same) image.platform.os_version = p.os_version;
        if (!p.os_features.empty()) image.platform.os_features = p.os_features;
    }
    image.platform = oci::normalize(image.platform);

    result r;
    r.warnings = told_warnings();
    if (auto violation = check_violation(findings(false))) throw std::move(*violation);

    warn_unused_build_args(r);
    want(target, "/");
    tell_wanted_paths();
    r.graph = draft_.finish(target.root, context_source(), source_of(req_));
    r.image_config = oci::encode(image);
    r.base_config = target.base_config;
    r.platform = image.platform;
    for (const auto& st : parsed_.stages) r.stages.push_back(st.name);
    std::sort(bases_.begin(), bases_.end(), [](const auto& a, const auto& b) { return a.resolved < b.resolved; });
    bases_.erase(std::unique(bases_.begin(), bases_.end(), [](const auto& a, const auto& b) { return a.resolved == b.resolved; }), bases_.end());
    r.bases = std::move(bases_);
    r.epoch = epoch_;
    r.ignore_cache = target.ignore_cache;
    return r;
}

/// A build argument that no ARG takes is most likely misspelt. (Not a finding of the checks: it is not the file's.)
void converter::warn_unused_build_args(result& r) const {
    std::vector<std::string_view> known = df::automatic_args();
    const auto add = [&](const df::instruction& in) {
        if (const auto* arg = std::get_if<df::arg_instruction>(&in.body))
            for (const auto& a : arg->args) known.emplace_back(a.key);
    };
    for (const auto& in : parsed_.global_args) add(in);
    for (const auto& st : parsed_.stages) std::for_each(st.instructions.begin(), st.instructions.end(), add);
    for (const auto& [name, value] : req_.build_args) {
        if (name.starts_with("BUILDKIT_") || name == "SOURCE_DATE_EPOCH" || to_lower(name).ends_with("_proxy")) continue;
        if (std::find(known.begin(), known.end(), name) != known.end()) continue;
        r.warnings.push_back(
            {.rule = {},
             .message = cat("the build argument ", name, " is not used: no ARG of the file has that name", did_you_mean(name, known)),
             .detail = {},
             .url = {},
             .where = {req_.dockerfile_name, 0},
             .last_line = 0});
    }
}

std::optional<error> converter::check_violation(const std::vector<df::warning>& found) const {
    if (!checks_.error || found.empty()) return std::nullopt;
    std::set<std::string> rules;
    for (const auto& w : found) rules.insert(w.rule);
    std::string names;
    for (const auto& rule : rules) names += cat(names.empty() ? "" : ", ", rule);
    return error{errc::invalid, cat("lint violation found for rules: ", names)}.at(place(found.front().lines));
}

std::vector<warning> converter::told_warnings() const {
    std::vector<warning> out;
    for (const auto& w : findings(false))
        out.push_back({.rule = w.rule, .message = w.message, .detail = w.detail, .url = w.url, .where = place(w.lines), .last_line = w.lines.last});
    return out;
}

std::vector<df::warning> converter::findings(bool all) const {
    all = all || target_ == nullptr;
    const auto built = all ? std::set<const stage_state*>{} : reachable_from({target_});
    std::vector<df::warning> out;
    for (const auto& w : warnings_) {
        if (w.stage >= 0 && only_for_built_stages(w.rule) && static_cast<std::size_t>(w.stage) < states_.size()) {
            const auto* stage = states_[static_cast<std::size_t>(w.stage)].get();
            if (!all && !built.contains(stage)) continue;
            // The base may have set a SHELL, which makes the shell form right.
            if (w.rule == "JSONArgsRecommended" && !stage->image.config.shell.empty()) continue;
        }
        out.push_back(w);
    }
    std::sort(out.begin(), out.end(),
              [](const auto& a, const auto& b) { return std::tie(a.lines.first, a.rule, a.message) < std::tie(b.lines.first, b.rule, b.message); });
    return out;
}

void converter::note(const error& e, df::line_range lines) {
    if (e.kind() != errc::invalid && e.kind() != errc::unsupported && e.kind() != errc::not_found) throw e;
    if (e.where()) {
        if (e.where()->file != req_.dockerfile_name) throw e;
        if (e.where()->line != lines.first) lines = {e.where()->line, e.where()->line};
    }
    const df::diagnostic d{e.what(), lines};
    if (std::find(problems_.begin(), problems_.end(), d) != problems_.end()) return;
    if (!first_problem_) first_problem_ = error(e).at(place(lines));
    problems_.push_back(d);
    if (problems_.size() >= most_problems) throw_noted();
}

void converter::throw_noted() const {
    if (!first_problem_) return;
    if (problems_.size() < 2) throw error(*first_problem_);
    auto sorted = problems_;
    std::sort(sorted.begin(), sorted.end(),
              [](const auto& a, const auto& b) { return std::tie(a.lines.first, a.message) < std::tie(b.lines.first, b.message); });
    const error all = df::to_error(file_, sorted);
    throw error{first_problem_->kind(), all.what()}.at(place(sorted.front().lines));
}

/// What else is wrong with the file, without asking anybody for its base images.
void converter::tell_all_problems() {
    for (const auto& s : states_) {
        if (s->stage == nullptr) s->dispatched = true;
        if (s->base_name == "scratch" || s->stage == nullptr) s->platform = target_platform_;
    }
    for (std::size_t i = 0; i < parsed_.stages.size(); ++i) dispatch_stage(*states_[i]);
}

async::task<stage_state*> converter::evaluate(bool all_stages) {
    check_syntax();
    read_file();
    make_global_args();
    co_await read_epoch();
    make_stages();
    target_ = find_target();
    connect_stages();
    std::vector<const stage_state*> wanted{target_};
    if (all_stages)
        for (std::size_t i = 0; i < parsed_.stages.size(); ++i) wanted.push_back(states_[i].get());
    if (first_problem_) {
        tell_all_problems();
        throw_noted();
    }
    // Triggers of a base image may name further stages and images.
    for (bool again = true; again;) {
        const auto needed = reachable_from(wanted);
        co_await resolve_bases(needed);
        again = false;
        for (std::size_t i = 0; i < parsed_.stages.size(); ++i) {
            if (needed.contains(states_[i].get())) again = add_triggers(*states_[i]) || again;
        }
    }
    const auto needed = reachable_from(wanted);
    target_->heirs = 1;
    for (std::size_t i = 0; i < parsed_.stages.size(); ++i)
        if (states_[i]->base != nullptr && needed.contains(states_[i].get())) ++states_[i]->base->heirs;
    for (std::size_t i = 0; i < parsed_.stages.size(); ++i) {
        if (needed.contains(states_[i].get())) dispatch_stage(*states_[i]);
    }
    throw_noted();
    co_return target_;
}

async::task<result> converter::run() {
    auto* const target = co_await evaluate(false);
    co_return finish(*target);
}

async::task<void> converter::evaluate_all() { (void)co_await evaluate(req_.target.empty()); }

llb::source_info source_of(const request& r) {
    llb::source_info out{.filename = r.dockerfile_name, .data = r.dockerfile, .definition = r.dockerfile_graph, .language = "Dockerfile"};
    if (out.definition) return out;
    llb::graph g;
    if (r.remote_context) {
        std::optional<llb::input> last;
        for (auto& o : context_ops(r)) {
            if (last) o.inputs = {*last};
            last = g.add(o);
        }
        out.definition = std::make_shared<const llb::definition>(g.finish(last));
        return out;
    }
    llb::source_op source{cat("local://", r.dockerfile_context), {}};
    source.attrs["local.differ"] = "none";
    source.attrs["local.followpaths"] =
        json::serialize(json::value(std::vector<std::string>{r.dockerfile_name, cat(r.dockerfile_name, ".dockerignore")}));
    source.attrs["local.sharedkeyhint"] = r.dockerfile_context;
    out.definition = std::make_shared<const llb::definition>(g.finish(g.add({.inputs = {}, .what = std::move(source), .platform = {}})));
    return out;
}

async::task<result> convert(request r, gateway::frontend_gateway& engine, std::vector<warning>* found) {
    converter c(std::move(r), engine);
    std::exception_ptr failed;
    result out;
    try {
        out = co_await c.run();
    } catch (...) {
        failed = std::current_exception();
    }
    if (found != nullptr) *found = failed ? c.told_warnings() : out.warnings;
    if (failed) std::rethrow_exception(failed);
    co_return out;
}

}  // namespace cobuild::frontend

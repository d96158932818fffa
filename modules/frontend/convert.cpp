module;
#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.frontend;

import cobuild.json;
import :state;

namespace cobuild::frontend {
namespace {

/// Findings about instructions of a stage that is not built are not shown; those about FROM lines always are.
bool only_for_built_stages(std::string_view rule) {
    static constexpr std::array<std::string_view, 7> rules{"JSONArgsRecommended",  "WorkdirRelativePath",   "MultipleInstructionsDisallowed",
                                                           "LegacyKeyValueFormat", "SecretsUsedInArgOrEnv", "ExposeProtoCasing",
                                                           "ExposeInvalidFormat"};
    return std::find(rules.begin(), rules.end(), rule) != rules.end();
}

}  // namespace

/// The build context as one vertex: the paths that are needed (all when one of them is the root), and what is ignored.
std::vector<llb::op> converter::context_source() const {
    if (req_.remote_context) return context_ops(req_);
    llb::source_op source{cat("local://", req_.context_name), {}};
    source.attrs["local.sharedkeyhint"] = req_.shared_key_hint.empty() ? req_.context_name : req_.shared_key_hint;
    if (!ignore_rules_.empty()) source.attrs["local.excludepatterns"] = json::serialize(json::value(ignore_rules_));
    if (!context_paths_.empty() && !context_paths_.contains("/")) {
        std::vector<std::string> paths;
        for (const auto& p : context_paths_) paths.push_back(p.substr(1));
        std::sort(paths.begin(), paths.end());
        source.attrs["local.followpaths"] = json::serialize(json::value(paths));
    }
    return {{.inputs = {}, .what = std::move(source), .platform = {}}};
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

    const auto built = reachable_from(&target);
    result r;
    std::multimap<unsigned, df::warning> by_line;
    for (auto& w : warnings_) by_line.emplace(w.lines.first, std::move(w));
    for (const auto& [line, w] : by_line) {
        if (w.stage >= 0 && only_for_built_stages(w.rule)) {
            const auto* stage = states_[static_cast<std::size_t>(w.stage)].get();
            if (!built.contains(stage)) continue;
            // The base may have set a SHELL, which makes the shell form right.
            if (w.rule == "JSONArgsRecommended" && !stage->image.config.shell.empty()) continue;
        }
        r.warnings.push_back({.rule = w.rule, .message = w.message, .url = w.url, .where = place(w.lines), .last_line = w.lines.last});
    }
    if (checks_.error && !r.warnings.empty()) {
        std::set<std::string> rules;
        for (const auto& w : r.warnings) rules.insert(w.rule);
        std::string names;
        for (const auto& rule : rules) names += cat(names.empty() ? "" : ", ", rule);
        throw error{errc::invalid, cat("lint violation found for rules: ", names)}.at(r.warnings.front().where);
    }

    r.graph = draft_.finish(target.root, context_source(),
                            {.filename = req_.dockerfile_name, .data = req_.dockerfile, .definition = nullptr, .language = "Dockerfile"});
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

async::task<result> converter::run() {
    check_syntax();
    read_file();
    make_global_args();
    read_epoch();
    make_stages();
    stage_state* target = find_target();
    connect_stages();
    // Triggers of a base image may name further stages and images.
    for (bool again = true; again;) {
        const auto needed = reachable_from(target);
        co_await resolve_bases(needed);
        again = false;
        for (std::size_t i = 0; i < parsed_.stages.size(); ++i) {
            if (needed.contains(states_[i].get())) again = add_triggers(*states_[i]) || again;
        }
    }
    const auto needed = reachable_from(target);
    for (std::size_t i = 0; i < parsed_.stages.size(); ++i) {
        if (needed.contains(states_[i].get())) dispatch_stage(*states_[i]);
    }
    co_return finish(*target);
}

async::task<result> convert(request r, gateway::frontend_gateway& engine) {
    converter c(std::move(r), engine);
    co_return co_await c.run();
}

std::vector<target> list_targets(const std::string& dockerfile, const std::string& dockerfile_name) {
    const auto file = df::parse(dockerfile, dockerfile_name);
    const auto typed = df::parse_instructions(file);
    if (!typed.errors.empty()) throw df::to_error(file, typed.errors);
    std::vector<target> out;
    for (const auto& st : typed.value.stages) {
        out.push_back({.name = st.name,
                       .base = st.base,
                       .platform = st.platform,
                       .description = st.description,
                       .is_default = false,
                       .line = st.from.lines.first});
    }
    if (!out.empty()) out.back().is_default = true;
    return out;
}

}  // namespace cobuild::frontend

module;
#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

module cobuild.frontend;

import :state;

namespace cobuild::frontend {
namespace {

/// docker/dockerfile in any tag, also the labs channel's and upstream's builds: their language is this frontend's.
bool is_this_frontend(std::string_view image) {
    if (image == "dockerfile.v0") return true;
    for (const std::string_view prefix : {"docker.io/", "docker-image://docker.io/", "docker-image://"}) {
        if (image.starts_with(prefix)) {
            image.remove_prefix(prefix.size());
            break;
        }
    }
    const auto name = image.substr(0, image.find_first_of(":@"));
    return name == "docker/dockerfile" || name == "docker/dockerfile-upstream";
}

/// The proxy variables in either case; the step sees them, its name and the image do not.
std::optional<llb::proxy_env> proxy_of(const std::map<std::string, std::string>& build_args) {
    llb::proxy_env p;
    const std::array<std::pair<std::string_view, std::string*>, 5> known{
        {{"http_proxy", &p.http}, {"https_proxy", &p.https}, {"ftp_proxy", &p.ftp}, {"no_proxy", &p.no}, {"all_proxy", &p.all}}};
    bool any = false;
    for (const auto& [key, value] : build_args) {
        const auto name = to_lower(key);
        for (const auto& [wanted, where] : known) {
            if (name != wanted) continue;
            *where = value;
            any = true;
        }
    }
    return any ? std::optional(std::move(p)) : std::nullopt;
}

}  // namespace

converter::converter(request r, gateway::frontend_gateway& engine)
    : req_(std::move(r)), engine_(engine), target_platform_(req_.target_platform.value_or(req_.build_platform)), proxy_(proxy_of(req_.build_args)) {
    // BuildKit's clients write these with and without the slashes.
    for (auto& [name, what] : req_.named_contexts)
        for (const std::string_view scheme : {"docker-image:", "oci-layout:"})
            if (what.starts_with(scheme) && what.compare(scheme.size(), 2, "//") != 0) what.insert(scheme.size(), "//");
    if (const auto name = build_arg("BUILDKIT_SANDBOX_HOSTNAME"); name && !name->empty()) req_.hostname = *name;
}

void converter::fail(errc kind, std::string message, df::line_range lines) const { throw error{kind, std::move(message)}.at(place(lines)); }

std::optional<std::string> converter::build_arg(std::string_view name) const {
    const auto found = req_.build_args.find(std::string(name));
    return found != req_.build_args.end() ? std::optional(found->second) : std::nullopt;
}

std::optional<foreign_frontend> wanted_frontend(const request& r) {
    if (const auto asked = r.build_args.find("BUILDKIT_SYNTAX"); asked != r.build_args.end() && !asked->second.empty()) {
        const std::string cmdline(trim(asked->second));
        const auto image = cmdline.substr(0, cmdline.find(' '));
        if (is_this_frontend(image)) return std::nullopt;
        return foreign_frontend{image, cmdline, std::nullopt};
    }
    const auto wanted = df::detect_syntax(r.dockerfile);
    if (!wanted || is_this_frontend(wanted->image)) return std::nullopt;
    return foreign_frontend{wanted->image, wanted->value, source_location{r.dockerfile_name, wanted->line}};
}

void converter::check_syntax() const {
    const auto wanted = wanted_frontend(req_);
    if (!wanted) return;
    error e{errc::unsupported, cat(wanted->where ? "the syntax directive" : "build argument BUILDKIT_SYNTAX", " asks for the frontend image ",
                                   wanted->image, "; only docker/dockerfile is built in")};
    throw wanted->where ? std::move(e).at(*wanted->where) : std::move(e);
}

void converter::read_file() {
    if (req_.dockerfile.empty()) throw error{errc::invalid, "the Dockerfile cannot be empty"}.at({req_.dockerfile_name, 0});
    file_ = df::parse(req_.dockerfile, req_.dockerfile_name);
    auto typed = df::parse_instructions(file_);
    if (!typed.errors.empty()) warn_before(std::move(typed.value), typed.errors.front().lines.first);
    if (!typed.errors.empty()) throw df::to_error(file_, typed.errors);
    parsed_ = std::move(typed.value);
    if (parsed_.stages.empty()) throw error{errc::invalid, "the Dockerfile has no stages to build"}.at({req_.dockerfile_name, 0});
    checks_ = df::file_check_options(file_, build_arg("BUILDKIT_DOCKERFILE_CHECK").value_or(""));
    if (!req_.ignore_file) return;
    ignore_rules_ = fs::parse_ignore_file(*req_.ignore_file);
    try {
        ignore_.emplace(ignore_rules_);
    } catch (const error& e) {
        throw error(e).at({req_.ignore_file_name, 0});
    }
    ignore_has_exceptions_ = std::any_of(ignore_rules_.begin(), ignore_rules_.end(), [](const auto& rule) { return rule.starts_with('!'); });
}

/// What is to be said of a file that goes wrong in that line: the checks of what stands above it.
void converter::warn_before(df::parsed known, unsigned line) {
    try {
        checks_ = df::file_check_options(file_, build_arg("BUILDKIT_DOCKERFILE_CHECK").value_or(""));
    } catch (const error&) {
        return;  // the file's error comes first
    }
    warnings_ = df::check_file(file_, known, checks_, global_args_.lookup());
    std::erase_if(warnings_, [line](const auto& w) { return w.lines.first >= line; });
}

void converter::make_global_args() {
    const auto& build = req_.build_platform;
    const auto& target = target_platform_;
    std::string stage = req_.target.empty() ? parsed_.stages.back().name : req_.target;
    if (stage.empty()) stage = "default";
    const std::array<std::pair<std::string_view, std::string>, 11> automatic{{{"BUILDPLATFORM", oci::format(build)},
                                                                              {"BUILDOS", build.os},
                                                                              {"BUILDOSVERSION", build.os_version},
                                                                              {"BUILDARCH", build.architecture},
                                                                              {"BUILDVARIANT", build.variant},
                                                                              {"TARGETPLATFORM", oci::format(target)},
                                                                              {"TARGETOS", target.os},
                                                                              {"TARGETOSVERSION", target.os_version},
                                                                              {"TARGETARCH", target.architecture},
                                                                              {"TARGETVARIANT", target.variant},
                                                                              {"TARGETSTAGE", stage}}};
    for (const auto& [name, value] : automatic) global_args_.set(name, build_arg(name).value_or(value));
    warnings_ = df::check_file(file_, parsed_, checks_, global_args_.lookup());

    for (const auto& in : parsed_.global_args) {
        for (const auto& arg : std::get<df::arg_instruction>(in.body).args) {
            auto value = build_arg(arg.key);
            arg_note told{.value = {}, .description = arg.description, .lines = in.lines, .needs = {}};
            if (!value && arg.value) {
                try {
                    auto e = df::expand_word(*arg.value, global_args_.lookup(), file_.escape);
                    value = std::move(e.text);
                    told.needs = std::move(e.matched);
                } catch (const error& e) {
                    note(e, in.lines);
                }
            }
            told.value = value.value_or("");
            // An ARG that is set anew is made of what it was made of before.
            if (const auto old = global_notes_.find(arg.key); old != global_notes_.end())
                told.needs.insert(told.needs.end(), old->second.needs.begin(), old->second.needs.end());
            global_notes_.insert_or_assign(arg.key, std::move(told));
            if (value) global_args_.set(arg.key, *value);
        }
    }
}

void converter::warn(df::check_rule rule, df::line_range lines, const std::vector<std::string>& comments, std::string_view first,
                     std::string_view second, std::string_view third) {
    if (df::enabled(rule, df::merged(checks_, comments))) warnings_.push_back(df::make_warning(rule, lines, first, second, third));
}

// Names that an ARG without a value declared are known, only unset.
void converter::report_unset(const stage_state& s, const df::instruction& in, const std::vector<std::string>& unmatched) {
    for (const auto& name : unmatched) {
        if (name == "BUILDKIT_SBOM_SCAN_CONTEXT" || name == "BUILDKIT_SBOM_SCAN_STAGE") continue;
        if (std::any_of(s.args.begin(), s.args.end(), [&](const auto& arg) { return arg.key == name; })) continue;
        // Comparing with every name takes long; a file with that many does not need more hints.
        const auto known = hints_left_ > 0 ? s.env.keys() : std::vector<std::string_view>{};
        if (hints_left_ > 0) --hints_left_;
        warn(df::check_rule::undefined_var, in.lines, in.comments, name, df::likely_word(name, known));
    }
}

}  // namespace cobuild::frontend

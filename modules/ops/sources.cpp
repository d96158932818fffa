module;
#include <charconv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <variant>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.ops;

import cobuild.oci;
import cobuild.registry;
import cobuild.json;
import cobuild.source;
import cobuild.session;
import cobuild.progress;
import :bodies;

namespace cobuild::ops {

namespace {

constexpr std::string_view image_scheme = "docker-image://", local_scheme = "local://";

/// An image of a registry, or one built here. Its key is the manifest's digest, and the chain of its layers besides: the
/// same layers under another manifest give the same root.
class image_op final : public solver::op {
public:
    image_op(environment& env, oci::reference ref, oci::platform platform, source::freshness how, const build_scope& scope,
             const llb::source_op& source)
        : env_(env), ref_(std::move(ref)), platform_(std::move(platform)), how_(how), who_(scope.who), found_(scope.found) {
        if (const auto at = source.attrs.find("image.checksum"); at != source.attrs.end() && !at->second.empty())
            checksum_ = digest::parse(at->second);
        if (const auto at = source.attrs.find("image.layerlimit"); at != source.attrs.end()) limit_ = parse_limit(at->second);
    }

    async::task<solver::cache_info> describe(solver::context ctx) override {
        const auto& image = co_await resolved(ctx);
        solver::cache_info out;
        out.op_digest = digest::of(cat("image\n", image.manifest.digest.str(), "\n", oci::format(platform_), limit_ ? cat("\n", *limit_) : ""));
        if (const auto chains = oci::chain_ids(image.diff_ids); !chains.empty()) out.also.push_back(digest::of(cat("chain\n", chains.back().str())));
        out.pinned = true;
        co_return out;
    }

    async::task<solver::run_result> run(std::vector<solver::result>, solver::context ctx) override {
        auto pulled = co_await env_.images.pull(co_await resolved(ctx), ctx.progress);
        auto value = std::make_shared<chain_value>();
        value->chain = std::move(pulled.chain);
        value->keep = std::move(pulled.keep);
        co_return solver::run_result{.outputs = {std::move(value)}};
    }

    // Pulls have the registry's own limit; counting them here would let them starve steps.
    [[nodiscard]] bool counted() const noexcept override { return false; }
    [[nodiscard]] bool describe_is_work() const noexcept override { return !ref_.digest(); }

private:
    async::task<source::resolved_image> resolved(solver::context ctx) {
        if (!resolved_) resolved_ = co_await flight_.run(0, [this, ctx] { return env_.images.resolve(ref_, platform_, how_, ctx.progress, who_); });
        if (checksum_ && resolved_->target.digest != *checksum_)
            throw error{errc::corrupt, cat("image digest ", resolved_->target.digest.str(), " for ", ref_.str(), " does not match expected checksum ",
                                           checksum_->str())};
        if (found_) (*found_)[cat(image_scheme, ref_.str())] = {{"sha256", resolved_->target.digest.hex()}};
        if (!limit_ || *limit_ >= resolved_->diff_ids.size()) co_return *resolved_;
        auto out = *resolved_;
        out.diff_ids.resize(*limit_);
        out.parsed.layers.resize(*limit_);
        out.chain.reset();
        co_return out;
    }

    /// How many of the image's layers are wanted, from the bottom.
    static std::size_t parse_limit(std::string_view text) {
        std::size_t out = 0;
        const auto [end, bad] = std::from_chars(text.data(), text.data() + text.size(), out);
        if (bad != std::errc{} || end != text.data() + text.size() || out == 0) throw error{errc::invalid, cat("invalid layer limit ", text)};
        return out;
    }

    environment& env_;
    oci::reference ref_;
    oci::platform platform_;
    source::freshness how_;
    std::shared_ptr<const registry::login> who_;
    std::shared_ptr<found_sources> found_;
    async::single_flight<int, source::resolved_image> flight_;
    std::optional<source::resolved_image> resolved_;
    std::optional<digest> checksum_;
    std::optional<std::size_t> limit_;
};

std::vector<std::string> list_attribute(const llb::source_op& source, const std::string& key) {
    const auto at = source.attrs.find(key);
    if (at == source.attrs.end() || at->second.empty()) return {};
    return json::parse(at->second).as_strings();
}

/// How much of a directory came over the wire, told ten times a second at most.
class transfer_line {
public:
    transfer_line(const progress::writer& to, const std::string& name) : to_(to.out()) {
        now_.id = cat("transferring ", name, ":");
        now_.name = "transferring";  // clients look for this word
        now_.vertex = to.about().id;
    }
    void update(std::int64_t bytes) {
        now_.current = bytes;
        const auto now = std::chrono::system_clock::now();
        if (now_.started && now - now_.timestamp < std::chrono::milliseconds{100}) return;
        if (!now_.started) now_.started = now;
        tell(now);
    }
    void done() {
        if (!now_.started) return;
        const auto now = std::chrono::system_clock::now();
        now_.completed = now;
        tell(now);
    }

private:
    void tell(progress::time_point now) {
        now_.timestamp = now;
        if (to_) to_->on_event(now_);
    }
    std::shared_ptr<progress::sink> to_;
    progress::status now_;
};

/// A client's directory. Nothing is read here: what a COPY or mount wants of it is read when it is wanted.
class local_op final : public solver::op {
public:
    local_op(const build_scope& scope, std::string name, const llb::source_op& source)
        : session_(scope.session), key_(key_in(scope, name, source)), wanted_(wanted_of(std::move(name), source)) {
        if (const auto at = source.attrs.find("local.session"); at != source.attrs.end()) session_id_ = at->second;
    }

    async::task<solver::cache_info> describe(solver::context) override { co_return solver::cache_info{.op_digest = key_, .ephemeral = true}; }

    async::task<solver::run_result> run(std::vector<solver::result>, solver::context ctx) override {
        std::optional<std::filesystem::path> directory;
        auto from = session_;
        if (session_ && !session_id_.empty()) from = co_await session_->other(session_id_);
        if (!from) from = session_;
        // A line that is never told of stays unseen: a local client's directory does not come over a wire.
        const auto seen = std::make_shared<transfer_line>(ctx.progress, wanted_.name);
        auto wanted = wanted_;
        wanted.on_bytes = [seen](std::uint64_t bytes) { seen->update(static_cast<std::int64_t>(bytes)); };
        if (from) directory = co_await from->directory(std::move(wanted));
        seen->done();
        if (!directory) throw error{errc::not_found, cat("the client offers no directory named ", quoted(wanted_.name))};
        auto value = std::make_shared<local_value>(fs::root(directory->string()));
        value->name = wanted_.name;
        value->excluded = fs::ignore_patterns(wanted_.exclude);
        value->included = fs::ignore_patterns(wanted_.include);
        co_return solver::run_result{.outputs = {std::move(value)}};
    }

    [[nodiscard]] bool counted() const noexcept override { return false; }

private:
    /// The same directory under other rules is another source.
    static digest key_in(const build_scope& scope, std::string_view name, const llb::source_op& source) {
        std::string text = cat("local\n", scope.id, "\n", name);
        for (const auto& [key, value] : source.attrs) text += cat("\n", key, "=", value);
        return digest::of(text);
    }

    static session::directory_request wanted_of(std::string name, const llb::source_op& source) {
        session::directory_request out{.name = std::move(name)};
        out.exclude = list_attribute(source, "local.excludepatterns");
        out.include = list_attribute(source, "local.includepattern");
        out.follow = list_attribute(source, "local.followpaths");
        if (const auto at = source.attrs.find("local.sharedkeyhint"); at != source.attrs.end()) out.shared_key_hint = at->second;
        if (const auto at = source.attrs.find("local.differ"); at != source.attrs.end()) out.metadata_is_no_difference = at->second == "none";
        return out;
    }

    std::shared_ptr<session::session> session_;
    digest key_;
    session::directory_request wanted_;
    std::string session_id_;
};

}  // namespace

fs::copy_verdict both(fs::copy_verdict a, fs::copy_verdict b) {
    using enum fs::copy_verdict;
    if (a == skip || b == skip) return skip;
    if (a == way || b == way) return way;
    return a == descend || b == descend ? descend : take;
}

fs::copy_verdict excluded_by(const fs::ignore_patterns& patterns, std::string_view path, bool directory) {
    if (patterns.empty() || !patterns.matches(path)) return fs::copy_verdict::take;
    return directory && patterns.may_reinclude_below(path) ? fs::copy_verdict::descend : fs::copy_verdict::skip;
}

fs::copy_verdict included_by(const fs::ignore_patterns& patterns, std::string_view path, bool directory) {
    if (patterns.empty() || patterns.matches(path)) return fs::copy_verdict::take;
    return directory && patterns.may_match_below(path) ? fs::copy_verdict::descend : fs::copy_verdict::skip;
}

fs::copy_verdict local_value::verdict(std::string_view path, bool directory) const {
    if (path.empty()) return fs::copy_verdict::take;
    return both(excluded_by(excluded, path, directory), included_by(included, path, directory));
}

namespace {

source::freshness freshness_of(const llb::source_op& source, const build_scope& scope) {
    if (scope.always_pull) return source::freshness::always;
    const auto mode = source.attrs.find("image.resolvemode");
    return mode != source.attrs.end() && mode->second == "pull" ? source::freshness::always : source::freshness::missing;
}

std::shared_ptr<solver::op> make_new_source(const llb::op& what, environment& env, const build_scope& scope) {
    const auto& source = std::get<llb::source_op>(what.what);
    const std::string_view id = source.identifier;
    if (id.starts_with(image_scheme)) {
        oci::platform platform = oci::host_platform();
        if (what.platform)
            platform = oci::normalize(
                {what.platform->os, what.platform->architecture, what.platform->variant, what.platform->os_version, what.platform->os_features});
        return std::make_shared<image_op>(env, oci::reference::parse(id.substr(image_scheme.size())), platform, freshness_of(source, scope), scope,
                                          source);
    }
    if (id.starts_with(local_scheme)) return std::make_shared<local_op>(scope, std::string(id.substr(local_scheme.size())), source);
    if (auto op = make_remote_op(what, env, scope)) return op;
    const auto colon = id.find("://");
    throw error{errc::unsupported, cat("the source ", quoted(id), " is not supported yet (", id.substr(0, colon), ":// sources are not built)")};
}

}  // namespace

std::shared_ptr<solver::op> make_source_op(const llb::op& what, environment& env, const build_scope& scope) {
    if (!scope.sources) return make_new_source(what, env, scope);
    auto& known = (*scope.sources)[digest::of(llb::marshal(what))];
    if (!known) known = make_new_source(what, env, scope);
    return known;
}

}  // namespace cobuild::ops

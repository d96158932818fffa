module;
#include <algorithm>
#include <charconv>
#include <cstdint>
#include <filesystem>
#include <functional>
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
import cobuild.source;
import cobuild.session;
import cobuild.state;
import cobuild.progress;
import cobuild.remote;
import :bodies;

namespace cobuild::ops {

namespace {

constexpr std::string_view git_scheme = "git://", layout_scheme = "oci-layout://";

std::string attribute(const llb::source_op& source, const std::string& key) {
    const auto at = source.attrs.find(key);
    return at == source.attrs.end() ? std::string() : at->second;
}

/// Go's strconv.ParseInt(text, 0, 64) for what is a mode or an id here: "0644", "420", "0x1a4".
std::uint32_t number_attribute(const llb::source_op& source, const std::string& key, std::uint32_t fallback) {
    const auto text = attribute(source, key);
    if (text.empty()) return fallback;
    std::string_view digits = text;
    const int base = digits.starts_with("0x") ? 16 : digits.starts_with('0') && digits.size() > 1 ? 8 : 10;
    if (base == 16) digits.remove_prefix(2);
    std::uint32_t out = 0;
    const auto [end, failed] = std::from_chars(digits.data(), digits.data() + digits.size(), out, base);
    if (failed != std::errc{} || end != digits.data() + digits.size())
        throw error{errc::invalid, cat("the source attribute ", key, "=", text, " is no number")};
    return out;
}

source::secret_reader secrets_of(const std::shared_ptr<session::session>& s) {
    return [s](std::string id) -> async::task<std::optional<std::string>> {
        if (!s) return [](std::string) -> async::task<std::optional<std::string>> { co_return std::nullopt; }(std::move(id));
        return s->secret(std::move(id));
    };
}

std::shared_ptr<chain_value> chain_of(snapshot::chain chain, state::pin keep) {
    auto out = std::make_shared<chain_value>();
    out->chain = std::move(chain);
    out->keep = std::move(keep);
    return out;
}

/// An op that can tell what its source is now.
class tells_facts {
public:
    virtual ~tells_facts() = default;
    virtual async::task<source_facts> facts(solver::context ctx, bool objects) = 0;
};

/// A file behind a URL: with a checksum its key is known without asking, else the key is what the server gave.
class http_op final : public solver::op, public tells_facts {
public:
    http_op(environment& env, const build_scope& scope, const llb::source_op& source) : env_(env), session_(scope.session), found_(scope.found) {
        if (env.http == nullptr) throw error{errc::unsupported, cat("the source ", source.identifier, " is not supported here")};
        request_.url = source.identifier;
        if (const auto sum = attribute(source, "http.checksum"); !sum.empty()) request_.checksum = digest::parse(sum);
        request_.filename = attribute(source, "http.filename");
        request_.perm = number_attribute(source, "http.perm", 0600);
        request_.uid = number_attribute(source, "http.uid", 0);
        request_.gid = number_attribute(source, "http.gid", 0);
        request_.auth_secret = attribute(source, "http.authheadersecret");
        for (const auto& [key, value] : source.attrs)
            if (key == "http.header.accept" || key == "http.header.user-agent") request_.headers[key.substr(12)] = value;
        for (const auto* key : {"http.sig.pubkey", "http.sig.signature"})
            if (source.attrs.contains(key)) throw error{errc::unsupported, cat("the source attribute ", key, " is not supported yet")};
    }

    async::task<solver::cache_info> describe(solver::context ctx) override {
        if (request_.checksum) co_return solver::cache_info{.op_digest = key(request_.filename, *request_.checksum, 0)};
        const auto file = co_await fetched(ctx);
        co_return solver::cache_info{.op_digest = key(file.filename, file.content, file.modified)};
    }

    async::task<solver::run_result> run(std::vector<solver::result>, solver::context ctx) override {
        const auto file = co_await fetched(ctx);
        co_return solver::run_result{.outputs = {chain_of(file.chain, file.keep)}};
    }

    async::task<source_facts> facts(solver::context ctx, bool) override {
        const auto file = co_await fetched(ctx);
        co_return source_facts{.checksum = file.content.str(), .ref = {}, .filename = file.filename, .modified = file.modified, .commit_object = {}};
    }

    [[nodiscard]] bool counted() const noexcept override { return false; }
    [[nodiscard]] bool describe_is_work() const noexcept override { return !request_.checksum; }

private:
    [[nodiscard]] digest key(const std::string& name, const digest& content, std::int64_t modified) const {
        return digest::of(cat("http\n", name, "\n", content.str(), "\n", modified, "\n", request_.perm, "\n", request_.uid, "\n", request_.gid));
    }
    async::task<source::http_file> fetched(solver::context ctx) {
        if (!file_) file_ = co_await flight_.run(0, [this, ctx] { return env_.http->fetch(request_, secrets_of(session_), ctx.progress); });
        if (found_) (*found_)[request_.url] = {{"sha256", file_->content.hex()}};
        co_return *file_;
    }

    environment& env_;
    std::shared_ptr<session::session> session_;
    std::shared_ptr<found_sources> found_;
    source::http_request request_;
    async::single_flight<int, source::http_file> flight_;
    std::optional<source::http_file> file_;
};

/// A git repository: its key is the commit, so what a branch names is asked once a build.
class git_op final : public solver::op, public tells_facts {
public:
    git_op(environment& env, const build_scope& scope, const llb::source_op& source)
        : env_(env), session_(scope.session), found_(scope.found), identifier_(source.identifier) {
        if (env.git == nullptr) throw error{errc::unsupported, cat("the source ", source.identifier, " is not supported here")};
        std::string_view id = std::string_view(source.identifier).substr(git_scheme.size());
        const auto hash = id.find('#');
        if (hash != std::string_view::npos) {
            const auto fragment = id.substr(hash + 1);
            const auto colon = fragment.find(':');
            request_.ref = fragment.substr(0, colon);
            if (colon != std::string_view::npos) request_.subdir = fs::clean_path(cat("/", fragment.substr(colon + 1))).substr(1);
        }
        request_.remote = attribute(source, "git.fullurl");
        if (request_.remote.empty()) request_.remote = cat("https://", id.substr(0, hash));
        if (request_.remote.starts_with('-')) throw error{errc::invalid, cat("invalid git remote ", quoted(request_.remote))};
        const auto flag = [&](const char* key) { return attribute(source, key) == "true"; };
        request_.keep_git_dir = flag("git.keepgitdir");
        request_.submodules = !flag("git.skipsubmodules");
        request_.checksum = attribute(source, "git.checksum");
        request_.commit_time = attribute(source, "git.mtime") == "commit";
        if (source.attrs.contains("git.authtokensecret")) request_.token_secret = attribute(source, "git.authtokensecret");
        if (source.attrs.contains("git.authheadersecret")) request_.header_secret = attribute(source, "git.authheadersecret");
        request_.known_hosts = attribute(source, "git.knownsshhosts");
        if (const auto ssh = attribute(source, "git.mountsshsock"); !ssh.empty()) request_.ssh_id = ssh;
        for (const auto* key : {"git.bundle", "git.checkoutbundle", "git.sig.pubkey"})
            if (source.attrs.contains(key)) throw error{errc::unsupported, cat("the source attribute ", key, " is not supported yet")};
        // The ref only helps to find the commit then.
        if (flag("git.fetchbycommit") && remote::is_commit(request_.checksum)) request_.ref = request_.checksum;
    }

    async::task<solver::cache_info> describe(solver::context ctx) override {
        const auto commit = co_await resolved(ctx);
        std::string text = cat("git\n", commit.id);
        if (request_.keep_git_dir) text += cat(".git#", request_.ref, "\n", remote::redacted(request_.remote));
        text += cat("\n:", request_.subdir, request_.submodules ? "" : "(skip-submodules)", request_.commit_time ? "(mtime=commit)" : "");
        co_return solver::cache_info{.op_digest = digest::of(text), .pinned = true};
    }

    async::task<solver::run_result> run(std::vector<solver::result>, solver::context ctx) override {
        const auto commit = co_await resolved(ctx);
        auto tree = co_await env_.git->checkout(request_, commit, access(), ctx.progress);
        co_return solver::run_result{.outputs = {chain_of(std::move(tree.chain), std::move(tree.keep))}};
    }

    async::task<source_facts> facts(solver::context ctx, bool objects) override {
        const auto commit = co_await resolved(ctx);
        source_facts out{.checksum = commit.id, .ref = commit.ref, .filename = {}, .modified = 0, .commit_object = {}};
        if (objects) out.commit_object = co_await env_.git->commit_object(request_, commit, access(), ctx.progress);
        co_return out;
    }

    [[nodiscard]] bool describe_is_work() const noexcept override { return !remote::is_commit(request_.ref); }

private:
    [[nodiscard]] source::git_access access() const {
        source::git_access out;
        out.secrets = secrets_of(session_);
        if (session_) out.ssh_agent = [s = session_](std::string id) { return s->ssh_agent(std::move(id)); };
        return out;
    }
    async::task<source::git_commit> resolved(solver::context ctx) {
        if (!commit_) commit_ = co_await flight_.run(0, [this, ctx] { return env_.git->resolve(request_, access(), ctx.progress); });
        if (found_) (*found_)[identifier_] = {{commit_->id.size() == 64 ? "sha256" : "sha1", commit_->id}};
        co_return *commit_;
    }

    environment& env_;
    std::shared_ptr<session::session> session_;
    std::shared_ptr<found_sources> found_;
    std::string identifier_;
    source::git_request request_;
    async::single_flight<int, source::git_commit> flight_;
    std::optional<source::git_commit> commit_;
};

/// An image of a layout directory of the client, always named by digest: what it is made of is taken over first.
class layout_op final : public solver::op {
public:
    layout_op(environment& env, const build_scope& scope, const llb::op& what, const llb::source_op& source) : env_(env) {
        const auto text = source.identifier.substr(layout_scheme.size());
        const auto at = text.find('@');
        if (at == std::string::npos) throw error{errc::invalid, cat("the source ", source.identifier, " must name a digest")};
        wanted_ = digest::parse(text.substr(at + 1));
        store_ = text.substr(0, std::min(at, text.find(':')));
        const auto found = scope.layouts.find(store_);
        if (found == scope.layouts.end() || env.content == nullptr)
            throw error{errc::not_found, cat("the client offers no OCI layout named ", store_)};
        directory_ = found->second;
        platform_ = oci::host_platform();
        if (what.platform)
            platform_ = oci::normalize(
                {what.platform->os, what.platform->architecture, what.platform->variant, what.platform->os_version, what.platform->os_features});
    }

    async::task<solver::cache_info> describe(solver::context) override {
        co_return solver::cache_info{.op_digest = digest::of(cat("image\n", wanted_.str(), "\n", oci::format(platform_))), .pinned = true};
    }

    async::task<solver::run_result> run(std::vector<solver::result>, solver::context ctx) override {
        const auto taken = co_await source::import_layout(env_.pool, *env_.content, directory_, "", wanted_, platform_);
        const auto name = oci::reference::parse(cat("oci-layout.invalid/", store_)).with_digest(wanted_);
        auto pulled = co_await env_.images.pull(co_await env_.images.resolve(name, platform_, source::freshness::never, ctx.progress), ctx.progress);
        co_return solver::run_result{.outputs = {chain_of(std::move(pulled.chain), std::move(pulled.keep))}};
    }

    [[nodiscard]] bool counted() const noexcept override { return false; }

private:
    environment& env_;
    std::string store_;
    digest wanted_;
    std::filesystem::path directory_;
    oci::platform platform_;
};

}  // namespace

std::shared_ptr<solver::op> make_remote_op(const llb::op& what, environment& env, const build_scope& scope) {
    const auto& source = std::get<llb::source_op>(what.what);
    const std::string_view id = source.identifier;
    if (id.starts_with("http://") || id.starts_with("https://")) return std::make_shared<http_op>(env, scope, source);
    if (id.starts_with(git_scheme)) return std::make_shared<git_op>(env, scope, source);
    if (id.starts_with(layout_scheme)) return std::make_shared<layout_op>(env, scope, what, source);
    return nullptr;
}

async::task<source_facts> look_at_source(llb::op what, environment& env, build_scope scope, solver::context ctx, bool objects) {
    const auto op = make_source_op(what, env, scope);
    const auto teller = std::dynamic_pointer_cast<tells_facts>(op);
    if (!teller) throw error{errc::unsupported, cat("what ", std::get<llb::source_op>(what.what).identifier, " is now cannot be asked")};
    co_return co_await teller->facts(std::move(ctx), objects);
}

}  // namespace cobuild::ops

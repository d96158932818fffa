module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.snapshot;

import cobuild.base;
import cobuild.async;
import cobuild.db;
import cobuild.state;
import :internal;

namespace cobuild::snapshot {

store::common::common(std::shared_ptr<state::directory> d, snapshot::options o)
    : dir(std::move(d)), opt(o), layers(dir->subdir("layers")), active(dir->subdir("active")), empty(dir->subdir("empty")), pins(dir->fd(), "pins") {
    ::fchmod(empty.get(), 0755);
    open_records();
}

store::common::~common() {
    try {
        flush_uses();
    } catch (const error& e) {
        log(log_level::warning, e.what());
    }
}

unique_fd store::common::fs_of(layer_id id) const {
    unique_fd out(::openat(layers.get(), cat(id.value, "/fs").c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!out && errno == ENOENT) throw error{errc::not_found, cat("the layer ", id.value, " below ", where(), " was removed")};
    if (!out) throw_errno(cat("cannot open the layer ", id.value, " below ", where()));
    return out;
}

// ---------------------------------------------------------------- directories on their way

unfinished::unfinished(std::shared_ptr<store::common> c, unsigned mode) : owner(std::move(c)), name(owner->dir->fresh_name()) {
    const auto what = cat("cannot make a layer below ", owner->where());
    const int at = owner->active.get();
    constexpr int flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC;
    if (::mkdirat(at, name.c_str(), 0700) != 0) throw_errno(what);
    scope_exit undo([&] { state::remove_tree(at, name); });
    dir.reset(::openat(at, name.c_str(), flags));
    if (!dir || ::mkdirat(dir.get(), "fs", mode) != 0) throw_errno(what);
    fs.reset(::openat(dir.get(), "fs", flags));
    struct stat st{};
    if (!fs || ::fstat(fs.get(), &st) != 0) throw_errno(what);
    if ((st.st_mode & 07777) != mode && ::fchmod(fs.get(), mode) != 0) throw_errno(what);  // the umask's doing
    undo.dismiss();
}

unfinished::~unfinished() {
    if (!pending_) return;
    try {
        owner->dir->discard(owner->active.get(), name);
    } catch (const error& e) {
        log(log_level::warning, e.what());
    }
}

std::pair<layer, bool> unfinished::publish(record r) {
    auto out = owner->publish(name, std::move(r));
    pending_ = out.second;
    return out;
}

// ---------------------------------------------------------------- handles

writable::writable(std::unique_ptr<body> b) noexcept : body_(std::move(b)) {}
writable::writable(writable&&) noexcept = default;
writable& writable::operator=(writable&&) noexcept = default;
writable::~writable() = default;
const chain& writable::lower() const noexcept { return body_->lower; }
int writable::upper() const noexcept { return body_->upper(); }
async::task<unique_fd> writable::mount() {
    auto& b = *body_;
    co_return co_await b.work.owner->dir->pool().run([&b] { return b.mount(); });
}

unpacking::unpacking(std::unique_ptr<body> b) noexcept : body_(std::move(b)) {}
unpacking::unpacking(unpacking&&) noexcept = default;
unpacking& unpacking::operator=(unpacking&&) noexcept = default;
unpacking::~unpacking() = default;
int unpacking::fd() const noexcept { return body_->work.fs.get(); }

// ---------------------------------------------------------------- the store

store::store(std::shared_ptr<common> c) noexcept : common_(std::move(c)) {}
store::~store() = default;

async::task<writable> store::begin(chain lower) {
    co_return co_await common_->dir->pool().run([this, &lower] { return access::make(begin_on(std::move(lower))); });
}

async::task<layer> store::commit(writable w, commit_info info) {
    co_return co_await common_->dir->pool().run([&w, &info] {
        auto& b = access::of(w);
        b.finish();
        record r{.kind = std::move(info.kind),
                 .description = std::move(info.description),
                 .size = info.size,
                 .whiteouts = info.whiteouts || !b.lower.layers.empty()};
        if (!b.lower.layers.empty()) r.parent = b.lower.layers.back();
        return b.work.publish(std::move(r)).first;
    });
}

async::task<view> store::view(chain c) {
    co_return co_await common_->dir->pool().run([this, &c] { return view_of(std::move(c)); });
}

async::task<unpacking> store::begin_unpack() {
    auto c = common_;
    co_return co_await c->dir->pool().run([c] { return access::make(std::make_unique<unpacking::body>(c)); });
}

async::task<layer> store::commit(unpacking u, pulled_info info) {
    auto c = common_;
    co_return co_await c->dir->pool().run([c, &u, &info] {
        record r{.kind = info.kind,
                 .description = info.description,
                 .size = info.size,
                 .diff_id = info.diff_id,
                 .chain_id = info.chain_id,
                 .whiteouts = info.whiteouts};
        if (info.blob) r.blobs.push_back(*info.blob);
        auto& work = access::of(u).work;
        auto [out, adopted] = work.publish(std::move(r));
        if (adopted && info.blob) c->set_blob(out.id, *info.blob);
        return std::move(out);
    });
}

async::task<std::optional<layer>> store::find_by_diff_id(digest d) {
    auto c = common_;
    co_return co_await c->dir->pool().run([c, d] { return c->find("lone_diff", d); });
}

async::task<std::optional<layer>> store::find_by_chain_id(digest d) {
    auto c = common_;
    co_return co_await c->dir->pool().run([c, d] { return c->find("chain_id", d); });
}

async::task<std::optional<state::pin>> store::hold(chain ch) {
    auto c = common_;
    co_return co_await c->dir->pool().run([c, &ch] { return c->hold(ch.layers, true); });
}

unique_fd store::layer_dir(layer_id id) const { return common_->fs_of(id); }

std::vector<unique_fd> store::layer_dirs(const chain& c) const {
    std::vector<unique_fd> out;
    for (auto i = c.layers.rbegin(); i != c.layers.rend(); ++i) out.push_back(common_->fs_of(*i));
    return out;
}

async::task<void> store::set_blob(layer_id id, layer_blob blob) {
    auto c = common_;
    co_await c->dir->pool().run([c, id, &blob] { c->set_blob(id, blob); });
}

async::task<std::vector<layer_blob>> store::blobs(layer_id id) {
    auto c = common_;
    co_return co_await c->dir->pool().run([c, id] { return c->blobs_of(id); });
}

async::task<std::vector<digest>> store::all_blobs() {
    auto c = common_;
    co_return co_await c->dir->pool().run([c] {
        return c->dir->database().read([](db::connection& d) {
            std::vector<digest> out;
            for (auto rows = d.query("SELECT DISTINCT blob FROM layer_blobs"); rows.next();) out.push_back(rows.digest(0));
            return out;
        });
    });
}

async::task<std::vector<usage>> store::du() {
    auto c = common_;
    co_return co_await c->dir->pool().run([c] { return c->du(); });
}

async::task<bool> store::remove(layer_id id) {
    auto c = common_;
    co_return co_await c->dir->pool().run([c, id] { return c->remove(id); });
}

async::task<void> store::sync() {
    auto c = common_;
    co_await c->dir->pool().run([c] { c->sync(); });
}

void store::flush() { common_->flush_uses(); }

std::shared_ptr<store> open_best(std::shared_ptr<state::directory> dir, options o) {
    try {
        return open_overlay(dir, o);
    } catch (const error& e) {
        if (e.kind() != errc::unsupported) throw;
        log(log_level::warning, "overlayfs does not work here: layers are copied, which is slow", {{"reason", e.what()}});
    }
    return open_native(std::move(dir), o);
}

}  // namespace cobuild::snapshot

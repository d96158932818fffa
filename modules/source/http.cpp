module;
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.source;

import cobuild.archive;
import cobuild.fs;
import cobuild.http;
import cobuild.json;
import cobuild.remote;

namespace cobuild::source {

namespace {

constexpr unsigned max_redirects = 10;
constexpr std::size_t max_remembered = 8;

/// One answer that was kept: its validators, and the layer that holds the file.
struct remembered {
    std::string etag, last_modified;
    http_file file;
};

/// What asking for a URL came to.
struct exchange {
    std::unique_ptr<http::connection> link;
    http::response head;
    http::url at;
};

/// The three forms of RFC 9110 5.6.7, the middle one with UTC for GMT as well, as Go's servers write it. (Its years of two digits
/// from 69 on are the last century's to strptime: no file has a time in the future of that.)
std::int64_t parse_http_date(std::string_view text) {
    const std::string copy(text);
    for (const char* form : {"%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S UTC", "%a %b %e %H:%M:%S %Y"}) {
        std::tm when{};
        const char* end = ::strptime(copy.c_str(), form, &when);
        if (end != nullptr && *end == '\0') return std::max<std::int64_t>(0, ::timegm(&when));
    }
    return 0;
}

/// A name that is one component and harmless, or nothing.
std::string safe_name(std::string_view name) {
    name = name.substr(name.find_last_of("/\\") + 1);
    std::string out(trim(name));
    const bool bad = out.empty() || out == "." || out == ".." || out.size() > 255 ||
                     std::any_of(out.begin(), out.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; });
    return bad ? std::string() : out;
}

/// The file name of a Content-Disposition, without its extended form.
std::string disposition_name(std::string_view value) {
    for (auto part : split(value, ';')) {
        part = trim(part);
        const auto eq = part.find('=');
        if (eq == std::string_view::npos || to_lower(trim(part.substr(0, eq))) != "filename") continue;
        auto name = trim(part.substr(eq + 1));
        if (name.size() >= 2 && name.starts_with('"') && name.ends_with('"')) name = name.substr(1, name.size() - 2);
        return safe_name(name);
    }
    return {};
}

std::string name_for(const http_request& r, const http::response* head) {
    if (auto name = safe_name(r.filename); !name.empty()) return name;
    if (head != nullptr)
        if (const auto value = head->headers.get("Content-Disposition"))
            if (auto name = disposition_name(*value); !name.empty()) return name;
    const auto name = remote::file_name(r.url);
    return name == "__unnamed__" ? "download" : name;
}

std::string weak(std::string_view etag) { return std::string(etag.starts_with("W/") ? etag.substr(2) : etag); }

unique_fd open_unnamed(int directory) {
    unique_fd out{::openat(directory, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600)};
    if (!out) throw_errno("making a file for what is downloaded");
    return out;
}

/// A body that was packed for the transfer alone; returns its size.
std::uint64_t unpack_gzip(int from, int to, hasher& hash, std::uint64_t limit) {
    if (::lseek(from, 0, SEEK_SET) != 0) throw_errno("reading what was downloaded");
    const auto in = archive::decompress(archive::read_from(from), archive::compression::gzip, {.max_bytes = limit});
    std::vector<std::byte> buffer(std::size_t{256} << 10);
    std::uint64_t size = 0;
    while (const auto n = in(buffer)) {
        const auto piece = std::span<const std::byte>(buffer).first(n);
        hash.update(piece);
        fs::write_all(to, piece);
        size += n;
    }
    return size;
}

bool transient(const error& e) { return e.kind() == errc::unavailable || e.kind() == errc::timed_out; }

error refused(const std::string& url, const exchange& x) {
    const auto status = x.head.status;
    const errc kind = status == 404 || status == 410   ? errc::not_found
                      : status == 401 || status == 403 ? errc::unauthorized
                      : status == 429 || status >= 500 ? errc::unavailable
                                                       : errc::invalid;
    std::string hint;
    if (kind == errc::unauthorized)
        hint = cat("; give a login with --secret id=HTTP_AUTH_TOKEN_", x.at.server.authority(), " or HTTP_AUTH_HEADER_...");
    const std::string through = x.at.str() == url ? "" : cat(" (at ", x.at.str(), ")");
    return {kind, cat("fetching ", url, through, ": invalid response status ", x.head.status_text(), hint)};
}

}  // namespace

struct http_files::state {
    cobuild::state::directory& directory;
    snapshot::store& snapshots;
    http_options options;
    async::semaphore slots;

    static std::string store_key(const http_request& r);
    async::task<std::vector<remembered>> recall(const http_request& r);
    async::task<void> remember(const http_request& r, remembered fresh);
    async::task<std::string> authorization(const http_request& r, const http::url& at, secret_reader secrets);
    static async::task<exchange> ask(http_request r, std::string method, std::string authorization, http::headers conditions);
    async::task<std::optional<http_file>> unchanged(http_request r, std::string authorization, std::vector<remembered> known);
    async::task<remembered> download(http_request r, std::string authorization, progress::writer progress);
    async::task<http_file> take_upload(http_request r, std::string path, progress::writer progress);
    async::task<http_file> fetch(http_request r, secret_reader secrets, progress::writer progress);
};

http_files::http_files(cobuild::state::directory& directory, snapshot::store& snapshots, http_options options)
    : state_(std::make_shared<state>(state{directory, snapshots, options, async::semaphore(options.parallel)})) {}
http_files::~http_files() = default;

// ---------------------------------------------------------------- what is remembered

std::string http_files::state::store_key(const http_request& r) {
    std::string text = cat(r.url, "\n", r.filename, "\n", r.perm, "\n", r.uid, "\n", r.gid, "\n", r.auth_secret);
    for (const auto& [name, value] : r.headers) text += cat("\n", name, ": ", value);
    return cat(digest::of(text).hex(), ".json");
}

/// Those whose layers still live, pinned; newest first. A damaged file is as good as none.
async::task<std::vector<remembered>> http_files::state::recall(const http_request& r) {
    auto all = co_await directory.pool().run([&]() -> std::vector<remembered> {
        std::vector<remembered> out;
        const auto dir = directory.subdir("http");
        const fs::root root{unique_fd{dir.get() < 0 ? -1 : ::dup(dir.get())}};
        if (!root.stat(store_key(r))) return out;
        try {
            const auto text = root.read_file(store_key(r), std::size_t{1} << 20);
            for (const auto line : split(text, '\n')) {
                const auto f = split(line, '\t');
                if (f.size() != 7) continue;
                remembered one{.etag = std::string(f[0]), .last_modified = std::string(f[1]), .file = {}};
                one.file.content = digest::parse(f[2]);
                one.file.filename = f[3];
                one.file.size = std::stoull(std::string(f[4]));
                one.file.modified = std::stoll(std::string(f[5]));
                one.file.chain.layers = {snapshot::layer_id{std::stoull(std::string(f[6]))}};
                out.push_back(std::move(one));
            }
        } catch (const std::exception&) {
            out.clear();
        }
        return out;
    });
    std::vector<remembered> alive;
    for (auto& one : all) {
        auto keep = co_await snapshots.hold(one.file.chain);
        if (!keep) continue;
        one.file.keep = std::move(*keep);
        alive.push_back(std::move(one));
    }
    co_return alive;
}

async::task<void> http_files::state::remember(const http_request& r, remembered fresh) {
    auto all = co_await recall(r);
    std::erase_if(all, [&](const remembered& old) { return old.etag == fresh.etag && old.last_modified == fresh.last_modified; });
    all.insert(all.begin(), std::move(fresh));
    if (all.size() > max_remembered) all.resize(max_remembered);
    std::string text;
    for (const auto& one : all)
        text += cat(one.etag, "\t", one.last_modified, "\t", one.file.content.str(), "\t", one.file.filename, "\t", one.file.size, "\t",
                    one.file.modified, "\t", one.file.chain.layers.front().value, "\n");
    co_await directory.pool().run([&] { fs::atomic_write(directory.subdir("http").get(), store_key(r), text, 0600, false); });
}

// ---------------------------------------------------------------- asking

async::task<std::string> http_files::state::authorization(const http_request& r, const http::url& at, secret_reader secrets) {
    if (!secrets) co_return "";
    if (!r.auth_secret.empty()) {
        auto value = co_await secrets(r.auth_secret);
        if (!value) throw error{errc::not_found, cat("fetching ", r.url, ": the secret ", r.auth_secret, " was not given")};
        co_return std::string(trim(*value));
    }
    for (const auto& host : {at.server.authority(), at.server.host}) {
        if (const auto value = co_await secrets(cat("HTTP_AUTH_HEADER_", host))) co_return std::string(trim(*value));
        if (const auto value = co_await secrets(cat("HTTP_AUTH_TOKEN_", host))) co_return cat("Bearer ", trim(*value));
    }
    co_return "";
}

/// Sends one request and follows redirects; the body is still to be read.
async::task<exchange> http_files::state::ask(http_request r, std::string method, std::string authorization, http::headers conditions) {
    static constexpr std::array<unsigned, 5> moved{301, 302, 303, 307, 308};
    auto at = http::url::parse(r.url);
    const auto home = at.server;
    for (unsigned hop = 0; hop <= max_redirects; ++hop) {
        exchange x{.link = nullptr, .head = {}, .at = at};
        x.link = std::make_unique<http::connection>(co_await async::current_executor, at.server,
                                                    http::connection_options{.tls = {}, .proxy = http::proxy_settings::from_environment()});
        http::request q{.method = method, .target = at.target, .headers = conditions, .body = {}};
        const auto own = [&](const std::string& name, const char* fallback) {
            const auto found = r.headers.find(to_lower(name));
            q.headers.set(name, found == r.headers.end() ? fallback : found->second.c_str());
        };
        own("User-Agent", "cobuild");
        own("Accept", "*/*");
        q.headers.set("Accept-Encoding", "gzip");  // as BuildKit: some servers have a tag of its own for each coding
        if (!authorization.empty() && at.server == home) q.headers.set("Authorization", authorization);
        x.head = co_await x.link->send(std::move(q));
        const auto location = x.head.headers.get("Location");
        if (std::find(moved.begin(), moved.end(), x.head.status) == moved.end() || !location) co_return x;
        at = at.resolve(*location);
    }
    throw error{errc::unavailable, cat("fetching ", r.url, ": more than ", max_redirects, " redirects")};
}

/// Asks by HEAD whether one of the remembered answers is still right. A server that cannot say is no error: it is fetched.
async::task<std::optional<http_file>> http_files::state::unchanged(http_request r, std::string authorization, std::vector<remembered> known) {
    http::headers conditions;
    std::string tags;
    for (const auto& one : known)
        if (!one.etag.empty()) tags += cat(tags.empty() ? "" : ", ", one.etag);
    if (!tags.empty())
        conditions.set("If-None-Match", tags);
    else if (!known.empty() && !known.front().last_modified.empty())
        conditions.set("If-Modified-Since", known.front().last_modified);
    else
        co_return std::nullopt;
    std::optional<exchange> x;
    try {
        x = co_await ask(r, "HEAD", std::move(authorization), std::move(conditions));
    } catch (const error& e) {
        if (!transient(e)) throw;
    }
    if (!x || (x->head.status != 304 && x->head.status != 200)) co_return std::nullopt;
    const auto etag = x->head.headers.get("ETag");
    const auto modified = x->head.headers.get("Last-Modified");
    for (auto& one : known) {
        const bool same_tag = !one.etag.empty() && etag && weak(*etag) == weak(one.etag);
        const bool same_time = one.etag.empty() && !one.last_modified.empty() && modified && *modified == one.last_modified;
        if (same_tag || same_time) co_return std::move(one.file);
    }
    // "Not modified" without saying which: right when there is one only.
    if (x->head.status == 304 && known.size() == 1) co_return std::move(known.front().file);
    co_return std::nullopt;
}

// ---------------------------------------------------------------- fetching

async::task<remembered> http_files::state::download(http_request r, std::string authorization, progress::writer progress) {
    auto x = co_await ask(r, "GET", std::move(authorization), {});
    if (!x.head.ok()) throw refused(r.url, x);
    const auto too_large = [&] {
        return error{errc::invalid, cat("fetching ", r.url, ": larger than the limit of ", format_bytes(options.max_bytes))};
    };
    if (x.head.content_length.value_or(0) > options.max_bytes) throw too_large();
    remembered out;
    out.etag = x.head.headers.get("ETag").value_or("");
    out.last_modified = x.head.headers.get("Last-Modified").value_or("");
    for (auto* text : {&out.etag, &out.last_modified})
        if (text->size() > 1024 || text->find('\t') != std::string::npos) text->clear();
    out.file.filename = name_for(r, &x.head);
    out.file.modified = parse_http_date(out.last_modified);
    auto line = progress.begin(cat("downloading ", out.file.filename), static_cast<std::int64_t>(x.head.content_length.value_or(0)));

    auto layer = co_await snapshots.begin({});
    auto& pool = directory.pool();
    const fs::root root{unique_fd{::openat(layer.upper(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)}};
    auto file = co_await pool.run([&] { return root.create_file(out.file.filename, r.perm & 07777, {r.uid, r.gid}); });
    const bool packed = to_lower(x.head.headers.get("Content-Encoding").value_or("")) == "gzip";
    const unique_fd raw = packed ? open_unnamed(root.fd()) : unique_fd();
    hasher hash;
    std::vector<std::byte> buffer(std::size_t{256} << 10);
    for (;;) {
        std::size_t filled = 0;
        while (filled < buffer.size()) {
            const auto n = co_await x.link->read_some(std::span(buffer).subspan(filled));
            if (n == 0) break;
            filled += n;
        }
        if (filled == 0) break;
        out.file.size += filled;
        if (out.file.size > options.max_bytes) throw too_large();
        co_await pool.run([&] {
            const auto piece = std::span<const std::byte>(buffer).first(filled);
            if (!packed) hash.update(piece);
            fs::write_all(packed ? raw.get() : file.get(), piece);
        });
        line.update(static_cast<std::int64_t>(out.file.size));
    }
    if (packed) out.file.size = co_await pool.run([&] { return unpack_gzip(raw.get(), file.get(), hash, options.max_bytes); });
    out.file.content = hash.finish();
    if (r.checksum && *r.checksum != out.file.content)
        throw error{errc::corrupt, cat("digest mismatch for ", r.url, ": ", out.file.content.str(), " (expected: ", r.checksum->str(), ")")};
    co_await pool.run([&] {
        file = unique_fd();
        root.set_mtime(out.file.filename, {out.file.modified, 0});
    });
    auto made = co_await snapshots.commit(std::move(layer), {.description = cat("http url ", r.url), .size = out.file.size});
    line.done();
    out.file.chain.layers = {made.id};
    out.file.keep = std::move(made.keep);
    co_return out;
}

namespace {
/// A file on its way into a layer of its own.
struct arriving {
    unique_fd file;
    hasher hash;
    std::uint64_t size = 0;
};

async::task<void> add_piece(async::blocking_pool& pool, std::shared_ptr<arriving> to, std::string url, std::uint64_t limit, std::string bytes) {
    to->size += bytes.size();
    if (to->size > limit) throw error{errc::invalid, cat(url, ": what the client sends is larger than the limit of ", format_bytes(limit))};
    co_await pool.run([&] {
        to->hash.update(bytes_of(bytes));
        fs::write_all(to->file.get(), bytes_of(bytes));
    });
}
}  // namespace

/// What a client sends has no name that means anything later, so it is not remembered.
async::task<http_file> http_files::state::take_upload(http_request r, std::string path, progress::writer progress) {
    if (!r.upload) throw error{errc::invalid, cat(r.url, " is something that the client sends, and there is no client's session")};
    auto& pool = directory.pool();
    http_file out;
    out.filename = name_for(r, nullptr);
    auto line = progress.begin(cat("receiving ", out.filename));
    auto layer = co_await snapshots.begin({});
    const fs::root root{unique_fd{::openat(layer.upper(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)}};
    const auto to = std::make_shared<arriving>();
    to->file = co_await pool.run([&] { return root.create_file(out.filename, r.perm & 07777, {r.uid, r.gid}); });
    const auto piece = [&pool, to, url = r.url, limit = options.max_bytes](std::string bytes) {
        return add_piece(pool, to, url, limit, std::move(bytes));
    };
    if (!co_await r.upload(path, piece))
        throw error{errc::invalid, cat(r.url, " is something that the client sends, but its session does not serve uploads (moby.upload.v1)")};
    out.size = to->size;
    out.content = to->hash.finish();
    if (r.checksum && *r.checksum != out.content)
        throw error{errc::corrupt, cat("digest mismatch for ", r.url, ": ", out.content.str(), " (expected: ", r.checksum->str(), ")")};
    co_await pool.run([&] {
        to->file.reset();
        root.set_mtime(out.filename, {0, 0});
    });
    auto made = co_await snapshots.commit(std::move(layer), {.description = cat("upload ", path), .size = out.size});
    line.done();
    out.chain.layers = {made.id};
    out.keep = std::move(made.keep);
    co_return out;
}

async::task<http_file> http_files::state::fetch(http_request r, secret_reader secrets, progress::writer progress) {
    const auto at = http::url::parse(r.url);
    if (at.server.host == "buildkit-session") co_return co_await take_upload(std::move(r), at.target, std::move(progress));
    auto known = co_await recall(r);
    // Bytes that are the right ones need no server.
    if (r.checksum)
        for (auto& one : known)
            if (one.file.content == *r.checksum) co_return std::move(one.file);
    const auto slot = co_await slots.acquire();
    const auto login = co_await authorization(r, at, std::move(secrets));
    if (!known.empty() && !r.checksum)
        if (auto same = co_await unchanged(r, login, std::move(known))) co_return std::move(*same);
    auto wait = options.first_wait;
    for (unsigned attempt = 1;; ++attempt) {
        std::optional<error> failed;
        try {
            auto fresh = co_await download(r, login, progress);
            auto file = fresh.file;
            co_await remember(r, std::move(fresh));
            co_return file;
        } catch (const error& e) {
            failed = e;
        }
        if (!transient(*failed) || attempt >= options.attempts) {
            const std::string_view sentence = failed->what();
            if (sentence.find(r.url) == std::string_view::npos) throw std::move(*failed).with(cat("fetching ", r.url));
            throw std::move(*failed);
        }
        co_await async::sleep_for(wait);
        wait *= 2;
    }
}

async::task<http_file> http_files::fetch(http_request request, secret_reader secrets, progress::writer progress) {
    auto s = state_;
    co_return co_await s->fetch(std::move(request), std::move(secrets), std::move(progress));
}

}  // namespace cobuild::source

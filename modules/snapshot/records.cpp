module;
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

module cobuild.snapshot;

import cobuild.base;
import cobuild.db;
import cobuild.state;
import :internal;

// Numbers. A layer's number is given in the same write transaction in which its directory is renamed into place, so under the
// database's write lock no commit is half done. Numbers are never used twice: cache records outlive state.db's latest writes
// after power failure, and must not meet another layer of the same number. So an upper bound of them stands in layers/mark,
// on disk before a number is used, and the sequence goes on from there after an unclean boot and after a rebuild.
namespace cobuild::snapshot {
namespace {

constexpr std::uint64_t bound_step = 1024;

constexpr std::array<std::string_view, 1> schema{
    "CREATE TABLE layers(id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, description TEXT NOT NULL, created INTEGER NOT NULL,"
    " last_used INTEGER, uses INTEGER NOT NULL DEFAULT 0, size INTEGER, parent INTEGER, diff_id BLOB, chain_id BLOB, whiteouts INTEGER NOT NULL,"
    " boot TEXT NOT NULL, cache_key TEXT, flat_key TEXT, lone_diff BLOB);"
    "CREATE INDEX layers_diff ON layers(lone_diff) WHERE lone_diff IS NOT NULL;"
    "CREATE INDEX layers_chain ON layers(chain_id) WHERE chain_id IS NOT NULL;"
    "CREATE INDEX layers_cache ON layers(cache_key) WHERE cache_key IS NOT NULL;"
    "CREATE INDEX layers_flat ON layers(flat_key) WHERE flat_key IS NOT NULL;"
    "CREATE TABLE layer_blobs(layer INTEGER NOT NULL REFERENCES layers(id) ON DELETE CASCADE, variant TEXT NOT NULL, blob BLOB NOT NULL,"
    " size INTEGER NOT NULL, media_type TEXT NOT NULL, diff_id BLOB NOT NULL, annotations TEXT NOT NULL, PRIMARY KEY(layer, variant)) WITHOUT ROWID;"
    "CREATE TABLE layer_state(one INTEGER PRIMARY KEY, boot TEXT NOT NULL, synced INTEGER NOT NULL)"};

std::optional<std::uint64_t> number(std::string_view text) {
    std::uint64_t out = 0;
    const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), out);
    if (ec != std::errc() || end != text.data() + text.size() || text.empty()) return std::nullopt;
    return out;
}

std::vector<std::uint64_t> numbers_in(int dirfd) {
    std::vector<std::uint64_t> out;
    const int fd = ::openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR* stream = fd >= 0 ? ::fdopendir(fd) : nullptr;
    if (stream == nullptr) throw_errno("cannot list the layers");
    const scope_exit close([&] { ::closedir(stream); });
    while (const auto* e = ::readdir(stream)) {
        if (const auto n = number(e->d_name)) out.push_back(*n);
    }
    std::sort(out.begin(), out.end());
    return out;
}

std::string read_file(int dirfd, const std::string& name) {
    const unique_fd in(::openat(dirfd, name.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
    std::string out;
    if (!in) return out;
    std::array<char, 4096> piece{};
    for (::ssize_t n = 0; (n = ::read(in.get(), piece.data(), piece.size())) > 0;) out.append(piece.data(), static_cast<std::size_t>(n));
    return out;
}

void write_file(int dirfd, const std::string& name, std::string_view text, bool durable) {
    const unique_fd out(::openat(dirfd, name.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!out || ::write(out.get(), text.data(), text.size()) != static_cast<::ssize_t>(text.size()) || (durable && ::fsync(out.get()) != 0)) {
        throw_errno(cat("cannot write ", name, " of a layer"));
    }
}

void replace_file(int dirfd, const std::string& name, std::string_view text, bool durable) {
    const auto fresh = cat(name, ".new");
    write_file(dirfd, fresh, text, durable);
    if (::renameat(dirfd, fresh.c_str(), dirfd, name.c_str()) != 0 || (durable && ::fsync(dirfd) != 0))
        throw_errno(cat("cannot write ", name, " of the layers"));
}

void write_blob(db::connection& c, layer_id id, const layer_blob& b) {
    c.run("INSERT OR REPLACE INTO layer_blobs VALUES(?,?,?,?,?,?,?)", id.value, b.variant, b.blob, b.size, b.media_type, b.diff_id,
          encode_map(b.annotations));
}

void set_sequence(db::connection& c, std::uint64_t last) {
    if (c.run("UPDATE sqlite_sequence SET seq=max(seq,?) WHERE name='layers'", last) == 0)
        c.run("INSERT INTO sqlite_sequence VALUES('layers',?)", last);
}

std::vector<layer_blob> read_blobs(db::connection& c, layer_id id) {
    std::vector<layer_blob> out;
    for (auto rows = c.query("SELECT variant,blob,size,media_type,diff_id,annotations FROM layer_blobs WHERE layer=? ORDER BY variant", id.value);
         rows.next();) {
        out.push_back({.variant = std::string(rows.text(0)),
                       .blob = rows.digest(1),
                       .size = static_cast<std::uint64_t>(rows.integer(2)),
                       .media_type = std::string(rows.text(3)),
                       .diff_id = rows.digest(4),
                       .annotations = decode_map(rows.text(5))});
    }
    return out;
}

}  // namespace

void store::common::open_records() {
    auto& d = dir->database();
    d.migrate("snapshot", schema);
    struct seen {
        bool known = false;
        std::string boot;
        std::int64_t synced = 0;
    };
    const auto look = [](db::connection& c) {
        auto rows = c.query("SELECT boot,synced FROM layer_state");
        return rows.next() ? seen{true, std::string(rows.text(0)), rows.integer(1)} : seen{};
    };
    if (const auto s = d.read(look); s.known && s.boot == dir->boot_id()) return;
    d.write(
        [&](db::connection& c) {
            const auto s = look(c);
            if (s.known && s.boot == dir->boot_id()) return;  // another process was quicker
            if (s.known)
                after_boot(c, s.synced);
            else
                rebuild(c);
            const auto [bound, synced] = read_mark();
            set_sequence(c, bound);
            c.run("INSERT OR REPLACE INTO layer_state VALUES(1,?,?)", dir->boot_id(), std::max(static_cast<std::int64_t>(synced), s.synced));
        },
        db::durability::full);
}

void store::common::after_boot(db::connection& c, std::int64_t synced) {
    const auto dropped = c.run("DELETE FROM layers WHERE id>? AND boot<>?", synced, dir->boot_id());
    if (dropped != 0) log(log_level::warning, "layers that were not on disk when the machine stopped are dropped", {{"count", cat(dropped)}});
    std::set<std::uint64_t> known;
    for (auto rows = c.query("SELECT id FROM layers"); rows.next();) known.insert(static_cast<std::uint64_t>(rows.integer(0)));
    for (const auto n : numbers_in(layers.get())) {
        if (!known.contains(n)) dir->discard(layers.get(), cat(n));
    }
}

void store::common::rebuild(db::connection& c) {
    const auto synced = read_mark().second;
    std::size_t found = 0, dropped = 0;
    for (const auto n : numbers_in(layers.get())) {
        auto r = decode_self(read_file(layers.get(), cat(n, "/self")));
        if (!r || (n > synced && r->boot != dir->boot_id())) {
            dir->discard(layers.get(), cat(n));
            ++dropped;
            continue;
        }
        r->id = layer_id{n};
        insert(c, *r);
        ++found;
    }
    if (found + dropped != 0)
        log(log_level::warning, "the records of layers were rebuilt from the layers themselves", {{"kept", cat(found)}, {"dropped", cat(dropped)}});
}

std::pair<std::uint64_t, std::uint64_t> store::common::read_mark() const {
    const auto text = read_file(layers.get(), "mark");
    const auto parts = split(trim(text), ' ');
    const auto existing = numbers_in(layers.get());
    std::uint64_t bound = existing.empty() ? 0 : existing.back(), synced = 0;
    if (parts.size() == 2) {
        bound = std::max(bound, number(parts[0]).value_or(0));
        synced = number(parts[1]).value_or(0);
    }
    return {bound, synced};
}

void store::common::write_mark(std::uint64_t bound, std::uint64_t synced, bool durable) {
    replace_file(layers.get(), "mark", cat(bound, " ", synced, "\n"), durable);
}

void store::common::raise_bound(std::uint64_t id) {
    if (id < bound_) return;
    const auto [bound, synced] = read_mark();  // another process may have raised it
    bound_ = bound;
    if (id < bound_) return;
    bound_ = id + bound_step;
    write_mark(bound_, synced, true);
}

layer_id store::common::insert(db::connection& c, const record& r) {
    const auto parent = r.parent ? std::optional(r.parent->value) : std::nullopt;
    const auto text = [](const std::string& s) { return s.empty() ? std::nullopt : std::optional(s); };
    const auto id = r.id.value != 0 ? std::optional(r.id.value) : std::nullopt;
    const auto lone = r.chain_id ? std::nullopt : r.diff_id;
    c.run(
        "INSERT INTO layers(id,kind,description,created,size,parent,diff_id,chain_id,whiteouts,boot,cache_key,flat_key,lone_diff) "
        "VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?)",
        id, r.kind, r.description, r.created.time_since_epoch().count(), r.size, parent, r.diff_id, r.chain_id, r.whiteouts, r.boot,
        text(r.cache_key), text(r.flat_key), lone);
    const layer_id got{static_cast<std::uint64_t>(c.last_id())};
    for (const auto& b : r.blobs) write_blob(c, got, b);
    return got;
}

std::optional<layer> store::common::find(std::string_view column, const db::argument& key) {
    const auto sql = cat("SELECT id FROM layers WHERE ", column, "=? ORDER BY id DESC");
    std::vector<layer_id> ids;
    dir->database().read([&](db::connection& c) {
        for (auto rows = c.query(sql, key); rows.next();) ids.push_back({static_cast<std::uint64_t>(rows.integer(0))});
    });
    for (const auto id : ids) {
        if (auto p = hold({id}, true)) return layer{.id = id, .keep = std::move(*p)};
    }
    return std::nullopt;
}

std::pair<layer, bool> store::common::publish(const std::string& name, record r) {
    r.boot = dir->boot_id();
    if (r.created == time_point{}) r.created = now();
    write_file(active.get(), cat(name, "/self"), encode_self(r), false);
    state::crash_point("layer-described");
    const auto same = [&](db::connection& c) -> std::optional<layer> {
        const auto ask = [&](std::string_view column, const db::argument& key) -> std::optional<layer> {
            for (auto rows = c.query(cat("SELECT id FROM layers WHERE ", column, "=?"), key); rows.next();) {
                const layer_id id{static_cast<std::uint64_t>(rows.integer(0))};
                if (auto p = hold({id}, true)) return layer{.id = id, .keep = std::move(*p)};
            }
            return std::nullopt;
        };
        if (r.chain_id) return ask("chain_id", *r.chain_id);
        if (r.diff_id) return ask("lone_diff", *r.diff_id);
        if (!r.flat_key.empty()) return ask("flat_key", r.flat_key);
        return std::nullopt;
    };
    return dir->database().write([&](db::connection& c) -> std::pair<layer, bool> {
        if (auto there = same(c)) return {std::move(*there), true};
        const auto id = insert(c, r);
        raise_bound(id.value);
        const auto place = cat(id.value);
        int done = ::renameat(active.get(), name.c_str(), layers.get(), place.c_str());
        if (done != 0 && (errno == ENOTEMPTY || errno == EEXIST)) {
            dir->discard(layers.get(), place);  // of one that died between the rename and its record
            done = ::renameat(active.get(), name.c_str(), layers.get(), place.c_str());
        }
        if (done != 0) throw_errno(cat("cannot put a layer in its place below ", where()));
        state::crash_point("layer-placed");
        auto keep = pins.hold(id.value);
        if (!keep) throw error{errc::internal, cat("the new layer ", id.value, " is being removed")};
        return {layer{.id = id, .keep = std::move(*keep)}, false};
    });
}

bool store::common::remove(layer_id id) {
    const auto right = pins.try_remove(id.value);
    if (!right) return false;
    return dir->database().write([&](db::connection& c) {
        if (c.run("DELETE FROM layers WHERE id=?", id.value) == 0) return false;
        dir->discard(layers.get(), cat(id.value));
        state::crash_point("layer-removed");
        return true;
    });
}

record store::common::read_record(db::connection& c, layer_id id) {
    auto rows =
        c.query("SELECT kind,description,created,size,parent,diff_id,chain_id,whiteouts,boot,cache_key,flat_key FROM layers WHERE id=?", id.value);
    if (!rows.next()) throw error{errc::not_found, cat("there is no layer ", id.value, " below ", where())};
    record r{.id = id,
             .kind = std::string(rows.text(0)),
             .description = std::string(rows.text(1)),
             .created = time_point(nanoseconds(rows.integer(2))),
             .diff_id = rows.maybe_digest(5),
             .chain_id = rows.maybe_digest(6),
             .whiteouts = rows.integer(7) != 0,
             .boot = std::string(rows.text(8)),
             .cache_key = std::string(rows.text(9)),
             .flat_key = std::string(rows.text(10)),
             .blobs = read_blobs(c, id)};
    if (const auto size = rows.maybe_integer(3)) r.size = static_cast<std::uint64_t>(*size);
    if (const auto parent = rows.maybe_integer(4)) r.parent = layer_id{static_cast<std::uint64_t>(*parent)};
    return r;
}

void store::common::set_blob(layer_id id, const layer_blob& b) {
    dir->database().write([&](db::connection& c) {
        (void)read_record(c, id);  // says so when it is gone
        write_blob(c, id, b);
        const unique_fd place(::openat(layers.get(), cat(id.value).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
        if (!place) throw_errno(cat("cannot open the layer ", id.value));
        replace_file(place.get(), "self", encode_self(read_record(c, id)), false);
    });
}

std::vector<layer_blob> store::common::blobs_of(layer_id id) {
    return dir->database().read([&](db::connection& c) { return read_blobs(c, id); });
}

bool store::common::may_have_whiteouts(layer_id id) {
    {
        const std::lock_guard hold(busy);
        if (const auto found = whiteouts.find(id); found != whiteouts.end()) return found->second;
    }
    const bool may = dir->database().read([&](db::connection& c) {
        auto rows = c.query("SELECT whiteouts FROM layers WHERE id=?", id.value);
        return !rows.next() || rows.integer(0) != 0;
    });
    const std::lock_guard hold(busy);
    if (whiteouts.size() > 10'000) whiteouts.clear();
    return whiteouts[id] = may;
}

void store::common::sync() {
    flush_uses();
    // numbers are given in the transaction that places the layer: those up to the greatest one seen now are all in place
    const auto last = dir->database().read([](db::connection& c) {
        auto rows = c.query("SELECT max(id) FROM layers");
        return rows.next() ? rows.integer(0) : 0;
    });
    const auto synced = dir->database().read([](db::connection& c) {
        auto rows = c.query("SELECT synced FROM layer_state");
        return rows.next() ? rows.integer(0) : 0;
    });
    if (last <= synced) return;
    if (::syncfs(layers.get()) != 0) throw_errno(cat("cannot bring the layers below ", where(), " onto the disk"));
    dir->database().write(
        [&](db::connection& c) {
            c.run("UPDATE layer_state SET synced=max(synced,?)", last);
            const auto [bound, before] = read_mark();
            write_mark(bound, std::max(before, static_cast<std::uint64_t>(last)), false);
        },
        db::durability::full);
}

}  // namespace cobuild::snapshot

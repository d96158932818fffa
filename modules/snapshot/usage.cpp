module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

module cobuild.snapshot;

import cobuild.base;
import cobuild.db;
import cobuild.state;
import :internal;

namespace cobuild::snapshot {

std::optional<state::pin> store::common::hold(const std::vector<layer_id>& ids, bool use) {
    state::pin out;
    for (const auto id : ids) {
        const auto p = pins.hold(id.value);
        // a removal moves the directory away while it holds the number, so what is here now stays
        if (!p || ::faccessat(layers.get(), cat(id.value).c_str(), F_OK, 0) != 0) return std::nullopt;
        out += *p;
    }
    if (!use) return out;
    const auto at = now();
    const std::lock_guard lock(busy);
    for (const auto id : ids) {
        auto& u = uses[id];
        ++u.count;
        u.last = at;
    }
    return out;
}

state::pin store::common::must_hold(const chain& c) {
    auto p = hold(c.layers, false);
    if (!p)
        throw error{errc::not_found,
                    cat("a layer of ", c.layers.size(), " below ", where(), " was removed: build without the cache record that names it")};
    return std::move(*p);
}

void store::common::flush_uses() {
    std::map<layer_id, pending_use> mine;
    {
        const std::lock_guard lock(busy);
        mine.swap(uses);
    }
    if (mine.empty()) return;
    dir->database().write([&](db::connection& c) {
        for (const auto& [id, u] : mine) {
            c.run("UPDATE layers SET uses=uses+?2, last_used=max(ifnull(last_used,0),?3) WHERE id=?1", id.value, u.count,
                  u.last.time_since_epoch().count());
        }
    });
}

std::vector<usage> store::common::du() {
    flush_uses();
    std::vector<usage> out;
    std::vector<bool> measured;
    dir->database().read([&](db::connection& c) {
        auto rows = c.query(
            "SELECT l.id,l.kind,l.description,l.created,l.last_used,l.uses,l.size,p.id,l.diff_id,l.cache_key IS NOT NULL"
            " FROM layers l LEFT JOIN layers p ON p.id=l.parent ORDER BY l.id");
        while (rows.next()) {
            usage u{.id = layer_id{static_cast<std::uint64_t>(rows.integer(0))},
                    .kind = std::string(rows.text(1)),
                    .description = std::string(rows.text(2)),
                    .created = time_point(nanoseconds(rows.integer(3))),
                    .use_count = static_cast<std::uint64_t>(rows.integer(5)),
                    .size = static_cast<std::uint64_t>(rows.integer(6)),
                    .changeable = rows.integer(9) != 0,
                    .diff_id = rows.maybe_digest(8)};
            if (const auto last = rows.maybe_integer(4)) u.last_used = time_point(nanoseconds(*last));
            if (const auto parent = rows.maybe_integer(7)) u.parents.push_back({static_cast<std::uint64_t>(*parent)});
            measured.push_back(!rows.null(6) && !u.changeable);
            out.push_back(std::move(u));
        }
    });
    std::vector<usage> kept;
    std::map<layer_id, std::uint64_t> sizes;
    std::vector<layer_id> ghosts;
    for (std::size_t i = 0; i < out.size(); ++i) {
        auto& u = out[i];
        const unique_fd fs(::openat(layers.get(), cat(u.id.value, "/fs").c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
        if (!fs) {
            ghosts.push_back(u.id);
            continue;
        }
        if (!measured[i]) {
            u.size = measure(fs.get());
            if (!u.changeable) sizes[u.id] = u.size;
        }
        u.in_use = pins.pinned(u.id.value);
        kept.push_back(std::move(u));
    }
    if (!sizes.empty() || !ghosts.empty()) {
        dir->database().write([&](db::connection& c) {
            for (const auto& [id, size] : sizes) c.run("UPDATE layers SET size=? WHERE id=?", size, id.value);
            for (const auto id : ghosts) {  // one whose remover died; looked at again, since nobody commits meanwhile
                if (::faccessat(layers.get(), cat(id.value).c_str(), F_OK, 0) != 0) c.run("DELETE FROM layers WHERE id=?", id.value);
            }
        });
    }
    return kept;
}

}  // namespace cobuild::snapshot

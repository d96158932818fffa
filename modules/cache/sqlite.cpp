module;
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <boost/asio/awaitable.hpp>

module cobuild.cache;

namespace cobuild::cache {

namespace {

constexpr std::array<std::string_view, 1> schema{R"(
CREATE TABLE cache_records (canonical BLOB PRIMARY KEY, result TEXT NOT NULL, created INTEGER NOT NULL, used INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX cache_records_used ON cache_records (used);
CREATE TABLE cache_links (key BLOB PRIMARY KEY, canonical BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX cache_links_canonical ON cache_links (canonical);
CREATE TABLE cache_files (fs INTEGER, device INTEGER, inode INTEGER, size INTEGER NOT NULL, mtime INTEGER NOT NULL, ctime INTEGER NOT NULL,
  data BLOB NOT NULL, xattrs BLOB NOT NULL, used_day INTEGER NOT NULL, PRIMARY KEY (fs, device, inode)) WITHOUT ROWID;
)"};

std::int64_t number(time_point t) { return t.time_since_epoch().count(); }

record row(const db::cursor& c) {
    return {.canonical = c.digest(0),
            .result = std::string(c.text(1)),
            .created = time_point(nanoseconds(c.integer(2))),
            .last_used = time_point(nanoseconds(c.integer(3)))};
}

void drop(db::connection& c, const digest& canonical) {
    c.run("DELETE FROM cache_links WHERE canonical = ?", canonical);
    c.run("DELETE FROM cache_records WHERE canonical = ?", canonical);
}

void put_links(db::connection& c, const std::vector<link>& links) {
    std::set<digest> left;
    for (const auto& l : links) {
        {
            auto old = c.query("SELECT canonical FROM cache_links WHERE key = ?", l.key);
            if (old.next() && old.digest(0) != l.canonical) left.insert(old.digest(0));
        }
        c.run(
            "INSERT INTO cache_links (key, canonical) SELECT ?1, ?2 WHERE EXISTS (SELECT 1 FROM cache_records WHERE canonical = ?2) "
            "ON CONFLICT (key) DO UPDATE SET canonical = excluded.canonical",
            l.key, l.canonical);
    }
    for (const auto& canonical : left)
        if (!c.query("SELECT 1 FROM cache_links WHERE canonical = ? LIMIT 1", canonical).next()) drop(c, canonical);
}

class sqlite_storage final : public storage {
public:
    explicit sqlite_storage(std::shared_ptr<db::database> file) : file_(std::move(file)) { file_->migrate("cache", schema); }

    contents load(std::size_t max_records) override {
        const auto limit = max_records < std::size_t{1} << 40 ? static_cast<std::int64_t>(max_records) : std::numeric_limits<std::int64_t>::max() - 1;
        return file_->read([limit](db::connection& c) {
            contents out;
            auto records = c.query("SELECT canonical, result, created, used FROM cache_records ORDER BY used DESC LIMIT ?", limit + 1);
            while (records.next()) {
                if (std::cmp_equal(out.records.size(), limit)) {
                    out.complete = false;
                    break;
                }
                out.records.push_back(row(records));
            }
            auto links = out.complete ? c.query("SELECT key, canonical FROM cache_links")
                                      : c.query(
                                            "SELECT key, canonical FROM cache_links WHERE canonical IN "
                                            "(SELECT canonical FROM cache_records ORDER BY used DESC LIMIT ?)",
                                            limit);
            while (links.next()) out.links.push_back({links.digest(0), links.digest(1)});
            return out;
        });
    }

    std::optional<record> find(const digest& key) override {
        return file_->read([&key](db::connection& c) -> std::optional<record> {
            auto found = c.query(
                "SELECT r.canonical, r.result, r.created, r.used FROM cache_links l JOIN cache_records r USING (canonical) WHERE l.key = ?", key);
            if (!found.next()) return std::nullopt;
            return row(found);
        });
    }

    std::vector<memo_entry> load_memos(std::int64_t oldest_day) override {
        const bool old =
            file_->read([=](db::connection& c) { return c.query("SELECT 1 FROM cache_files WHERE used_day < ? LIMIT 1", oldest_day).next(); });
        if (old) file_->write([=](db::connection& c) { c.run("DELETE FROM cache_files WHERE used_day < ?", oldest_day); });
        return file_->read([](db::connection& c) {
            std::vector<memo_entry> out;
            auto rows = c.query("SELECT fs, device, inode, size, mtime, ctime, data, xattrs, used_day FROM cache_files");
            const auto u = [&rows](int column) { return static_cast<std::uint64_t>(rows.integer(column)); };
            while (rows.next())
                out.push_back({{u(0), u(1), u(2), u(3), rows.integer(4), rows.integer(5)}, {rows.digest(6), rows.digest(7)}, rows.integer(8)});
            return out;
        });
    }

    void apply(const changes& what) override {
        file_->write([&what](db::connection& c) {
            for (const auto& canonical : what.removed) drop(c, canonical);
            for (const auto& r : what.put)
                c.run(
                    "INSERT INTO cache_records (canonical, result, created, used) VALUES (?, ?, ?, ?) "
                    "ON CONFLICT (canonical) DO UPDATE SET result = excluded.result, used = excluded.used",
                    r.canonical, r.result, number(r.created), number(r.last_used));
            put_links(c, what.links);
            for (const auto& [canonical, when] : what.touched)
                c.run("UPDATE cache_records SET used = max(used, ?2) WHERE canonical = ?1", canonical, number(when));
            for (const auto& m : what.memos)
                c.run(
                    "INSERT OR REPLACE INTO cache_files (fs, device, inode, size, mtime, ctime, data, xattrs, used_day) VALUES (?, ?, ?, ?, ?, ?, ?, "
                    "?, ?)",
                    m.key.fs, m.key.device, m.key.inode, m.key.size, m.key.mtime, m.key.ctime, m.value.data, m.value.xattrs, m.used_day);
        });
    }

    [[nodiscard]] bool shared() const noexcept override { return true; }

private:
    std::shared_ptr<db::database> file_;
};

}  // namespace

std::shared_ptr<storage> make_storage(std::shared_ptr<db::database> file) { return std::make_shared<sqlite_storage>(std::move(file)); }

}  // namespace cobuild::cache

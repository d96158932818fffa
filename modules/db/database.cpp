module;
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>

#include <sqlite3.h>

module cobuild.db;

import cobuild.base;
import cobuild.db.internal;

namespace cobuild::db {

struct database::state {
    handle file;
    connection link{&file};
    options settings;
    std::mutex busy;
    ::pid_t process = ::getpid();

    ~state() { close(); }
    void close() noexcept {
        for (auto& [sql, p] : file.statements) sqlite3_finalize(p->handle);
        file.statements.clear();
        if (file.db != nullptr) sqlite3_close_v2(std::exchange(file.db, nullptr));
    }
};

namespace {

void make_file(const std::string& file) {
    // mknod makes it without a descriptor, whose closing would drop the locks of another connection of this process
    if (::mknod(file.c_str(), S_IFREG | 0600, 0) != 0 && errno != EEXIST) throw_errno(cat("cannot make the database ", file));
}

std::string directory_of(const std::string& file) {
    const auto slash = file.rfind('/');
    return slash == std::string::npos ? "." : slash == 0 ? "/" : file.substr(0, slash);
}

constexpr int page_bytes = 4096;

}  // namespace

database::database(std::string file, options o) : state_(std::make_unique<state>()) {
    auto& s = *state_;
    s.file.file = std::move(file);
    s.settings = o;
    const auto& path = s.file.file;
    if (const auto net = network_file_system(directory_of(path)); !net.empty()) {
        throw error{errc::unsupported, cat("the database ", path, " stands on a network file system (", net,
                                           "), where its locks do not work: choose a state directory on a local disk")};
    }
    const bool fresh = !exists(path);
    if (fresh && !o.read_only) make_file(path);
    const int flags = (o.read_only ? SQLITE_OPEN_READONLY : SQLITE_OPEN_READWRITE) | SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_EXRESCODE;
    if (sqlite3_open_v2(path.c_str(), &s.file.db, flags, nullptr) != SQLITE_OK) fail(s.file.db, path, "opening");
    sqlite3_busy_timeout(s.file.db, static_cast<int>(o.busy_timeout.count()));
    const bool trusted = fresh || o.check == integrity::never || (o.check == integrity::if_changed && mark_matches(path));
    s.link.script("PRAGMA temp_store=MEMORY; PRAGMA foreign_keys=ON");
    if (!o.read_only) {
        s.link.script(cat("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA wal_autocheckpoint=", o.max_wal_bytes / page_bytes,
                          "; PRAGMA journal_size_limit=", o.max_wal_bytes));
    }
    if (!trusted) check();
}

database::~database() {
    if (!state_) return;
    const std::string path = state_->file.file;
    const bool writes = !state_->settings.read_only && state_->process == ::getpid();
    state_->close();
    if (writes && !exists(path + "-wal")) write_mark(path);
}

database::scope::scope(database& owner, bool write, durability d) : owner_(owner) {
    auto& s = *owner_.state_;
    if (s.process != ::getpid())
        throw error{errc::internal, cat("the database ", s.file.file, " was opened before a fork and must not be used after it")};
    s.busy.lock();
    try {
        if (write && d == durability::full) s.link.run("PRAGMA synchronous=FULL");
        s.link.run(write ? "BEGIN IMMEDIATE" : "BEGIN");
        open_ = true;
    } catch (...) {
        sqlite3_exec(s.file.db, "PRAGMA synchronous=NORMAL", nullptr, nullptr, nullptr);
        s.busy.unlock();
        throw;
    }
    full_ = write && d == durability::full;
}

database::scope::~scope() {
    auto& s = *owner_.state_;
    if (open_) sqlite3_exec(s.file.db, "ROLLBACK", nullptr, nullptr, nullptr);
    if (full_) sqlite3_exec(s.file.db, "PRAGMA synchronous=NORMAL", nullptr, nullptr, nullptr);
    s.busy.unlock();
}

connection& database::scope::connection() noexcept { return owner_.state_->link; }

void database::scope::done() {
    owner_.state_->link.run("COMMIT");
    open_ = false;
}

void database::migrate(std::string_view module, std::span<const std::string_view> steps) {
    const auto version = [&](db::connection& c) -> std::size_t {
        auto rows = c.query("SELECT version FROM schema_versions WHERE module=?", module);
        return rows.next() ? static_cast<std::size_t>(rows.integer(0)) : 0;
    };
    const bool known = read([&](db::connection& c) {
        auto rows = c.query("SELECT 1 FROM sqlite_schema WHERE name='schema_versions'");
        return rows.next();
    });
    if (known && read(version) == steps.size()) return;
    write([&](db::connection& c) {
        c.script("CREATE TABLE IF NOT EXISTS schema_versions(module TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID");
        const auto have = version(c);
        if (have > steps.size()) {
            throw error{errc::unsupported, cat("the database ", file(), " was written by a newer cobuild (", module, " version ", have,
                                               ", this one knows ", steps.size(), "): use that one, or another state directory")};
        }
        for (auto i = have; i < steps.size(); ++i) c.script(steps[i]);
        c.run("INSERT INTO schema_versions VALUES(?1,?2) ON CONFLICT(module) DO UPDATE SET version=?2", module, steps.size());
    });
}

void database::checkpoint() {
    auto& s = *state_;
    const std::lock_guard lock(s.busy);
    if (sqlite3_wal_checkpoint_v2(s.file.db, nullptr, SQLITE_CHECKPOINT_TRUNCATE, nullptr, nullptr) != SQLITE_OK)
        fail(s.file.db, s.file.file, "writing back the log");
}

void database::check() {
    auto& s = *state_;
    const std::lock_guard lock(s.busy);
    auto rows = s.link.query("PRAGMA quick_check(1)");
    if (rows.next() && rows.text(0) == "ok") return;
    const auto lines = split(rows.text(0), '\n');
    throw error{errc::corrupt, cat("the database ", s.file.file, " is damaged: ", lines.empty() ? "it cannot be read" : lines.back())};
}

const std::string& database::file() const noexcept { return state_->file.file; }

}  // namespace cobuild::db

module;
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
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
namespace {

prepared* prepare(handle& h, std::string_view sql) {
    auto& slot = h.statements[std::string(sql)];
    if (slot && !slot->busy) return slot.get();
    auto fresh = std::make_unique<prepared>();
    const unsigned flags = slot ? 0 : SQLITE_PREPARE_PERSISTENT;
    if (sqlite3_prepare_v3(h.db, sql.data(), static_cast<int>(sql.size()), flags, &fresh->handle, nullptr) != SQLITE_OK) {
        if (!slot) h.statements.erase(std::string(sql));
        fail(h.db, h.file, sql);
    }
    if (slot) {
        fresh->kept = false;  // the kept one is being walked
        return fresh.release();
    }
    slot = std::move(fresh);
    return slot.get();
}

void release(prepared* p) noexcept {
    sqlite3_reset(p->handle);
    sqlite3_clear_bindings(p->handle);
    p->busy = false;
    if (p->kept) return;
    sqlite3_finalize(p->handle);
    delete p;
}

void bind(sqlite3_stmt* s, std::initializer_list<argument> arguments, sqlite3_destructor_type life) {
    int i = 0;
    for (const auto& a : arguments) {
        ++i;
        const char* data = a.data.data() != nullptr ? reinterpret_cast<const char*>(a.data.data()) : "";
        switch (a.kind) {
            case argument::type::null: sqlite3_bind_null(s, i); break;
            case argument::type::integer: sqlite3_bind_int64(s, i, a.number); break;
            case argument::type::text: sqlite3_bind_text64(s, i, data, a.data.size(), life, SQLITE_UTF8); break;
            case argument::type::bytes: sqlite3_bind_blob64(s, i, data, a.data.size(), life); break;
        }
    }
}

handle& open_file(void* h) { return *static_cast<handle*>(h); }
sqlite3_stmt* raw(void* p) { return static_cast<prepared*>(p)->handle; }

}  // namespace

cursor::~cursor() {
    if (statement_ != nullptr) release(static_cast<prepared*>(statement_));
}

bool cursor::next() {
    const int code = sqlite3_step(raw(statement_));
    if (code == SQLITE_ROW) return true;
    if (code == SQLITE_DONE) return false;
    sqlite3* db = sqlite3_db_handle(raw(statement_));
    fail(db, sqlite3_db_filename(db, "main"), "reading");
}

bool cursor::null(int column) const { return sqlite3_column_type(raw(statement_), column) == SQLITE_NULL; }
std::int64_t cursor::integer(int column) const { return sqlite3_column_int64(raw(statement_), column); }

std::string_view cursor::text(int column) const {
    const auto* data = reinterpret_cast<const char*>(sqlite3_column_text(raw(statement_), column));
    return data != nullptr ? std::string_view(data, static_cast<std::size_t>(sqlite3_column_bytes(raw(statement_), column))) : std::string_view();
}

std::span<const std::byte> cursor::bytes(int column) const {
    const auto* data = static_cast<const std::byte*>(sqlite3_column_blob(raw(statement_), column));
    if (data == nullptr) return {};
    return {data, static_cast<std::size_t>(sqlite3_column_bytes(raw(statement_), column))};
}

cobuild::digest cursor::digest(int column) const {
    const auto data = bytes(column);
    if (data.size() != cobuild::digest::size) {
        sqlite3* db = sqlite3_db_handle(raw(statement_));
        throw error{errc::corrupt, cat("the database ", sqlite3_db_filename(db, "main"), " has ", data.size(), " bytes where a digest belongs")};
    }
    return cobuild::digest(data.first<cobuild::digest::size>());
}

std::optional<cobuild::digest> cursor::maybe_digest(int column) const {
    if (null(column)) return std::nullopt;
    return digest(column);
}

std::optional<std::int64_t> cursor::maybe_integer(int column) const {
    if (null(column)) return std::nullopt;
    return integer(column);
}

cursor connection::query_list(std::string_view sql, std::initializer_list<argument> arguments) {
    auto* p = prepare(open_file(handle_), sql);
    p->busy = true;
    cursor rows(p);
    bind(p->handle, arguments, SQLITE_TRANSIENT);
    return rows;
}

std::int64_t connection::run_list(std::string_view sql, std::initializer_list<argument> arguments) {
    auto* p = prepare(open_file(handle_), sql);
    p->busy = true;
    const cursor guard(p);
    bind(p->handle, arguments, SQLITE_STATIC);
    int code = SQLITE_ROW;
    while (code == SQLITE_ROW) code = sqlite3_step(p->handle);
    if (code != SQLITE_DONE) fail(open_file(handle_).db, open_file(handle_).file, "writing");
    return sqlite3_changes64(open_file(handle_).db);
}

void connection::script(std::string_view sql) {
    const std::string text(sql);
    if (sqlite3_exec(open_file(handle_).db, text.c_str(), nullptr, nullptr, nullptr) != SQLITE_OK)
        fail(open_file(handle_).db, open_file(handle_).file, text);
}

std::int64_t connection::last_id() const { return sqlite3_last_insert_rowid(open_file(handle_).db); }

}  // namespace cobuild::db

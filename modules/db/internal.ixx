/// What the bodies of cobuild.db share. Not installed.
module;
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>

#include <sqlite3.h>

export module cobuild.db.internal;

export namespace cobuild::db {

/// A prepared statement; `busy` while a cursor walks it.
struct prepared {
    sqlite3_stmt* handle = nullptr;
    bool busy = false;
    bool kept = true;
};

/// One open file and its statements by text.
struct handle {
    sqlite3* db = nullptr;
    std::string file;
    std::unordered_map<std::string, std::unique_ptr<prepared>> statements;
};

/// Throws the error of the last call on `handle`.
[[noreturn]] void fail(sqlite3* handle, std::string_view file, std::string_view what);

/// "<size> <mtime> <inode>" of a file, or empty.
std::string file_mark(const std::string& file);
bool exists(const std::string& file);
void write_mark(const std::string& file);
bool mark_matches(const std::string& file);

}  // namespace cobuild::db

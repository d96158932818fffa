module;
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <string>
#include <string_view>

#include <sqlite3.h>

module cobuild.db.internal;

import cobuild.base;

namespace cobuild::db {

void fail(sqlite3* handle, std::string_view file, std::string_view what) {
    const int code = handle != nullptr ? sqlite3_extended_errcode(handle) : SQLITE_NOMEM;
    const int reason = handle != nullptr ? sqlite3_system_errno(handle) : 0;
    const std::string text = handle != nullptr ? sqlite3_errmsg(handle) : "out of memory";
    const auto throw_kind = [&](errc kind, std::string_view sentence) { throw error{kind, cat("the database ", file, " ", sentence)}; };
    switch (code & 0xff) {
        case SQLITE_CORRUPT:
        case SQLITE_NOTADB: throw_kind(errc::corrupt, cat("is damaged: ", text));
        case SQLITE_FULL: throw_kind(errc::no_space, "cannot grow: no space is left on its disk");
        case SQLITE_BUSY:
        case SQLITE_LOCKED: throw_kind(errc::timed_out, "is kept locked by another process");
        case SQLITE_PERM:
        case SQLITE_AUTH:
        case SQLITE_READONLY: throw_kind(errc::permission, cat("may not be written: ", text));
        case SQLITE_CONSTRAINT: throw_kind(errc::exists, cat("refused a record: ", text));
        case SQLITE_IOERR:
        case SQLITE_CANTOPEN:
            if (reason == ENOSPC || reason == EDQUOT) throw_kind(errc::no_space, "cannot grow: no space is left on its disk");
            if (reason == EACCES || reason == EPERM) throw_kind(errc::permission, cat("cannot be opened: ", text));
            throw_kind(errc::io, reason != 0 ? cat("failed: ", text, ": ", os_error(reason, "system").what()) : cat("failed: ", text));
        default: break;
    }
    throw error{errc::internal, cat("the database ", file, " refused ", quoted(what.substr(0, 200)), ": ", text)};
}

bool exists(const std::string& file) {
    struct stat st{};
    return ::stat(file.c_str(), &st) == 0;
}

std::string file_mark(const std::string& file) {
    struct stat st{};
    if (::stat(file.c_str(), &st) != 0) return {};
    return cat(st.st_size, " ", st.st_mtim.tv_sec, ".", st.st_mtim.tv_nsec, " ", st.st_ino, "\n");
}

void write_mark(const std::string& file) {
    const unique_fd out(::open((file + ".ok").c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600));
    const auto mark = file_mark(file);
    if (out && ::write(out.get(), mark.data(), mark.size()) != static_cast<::ssize_t>(mark.size())) ::unlink((file + ".ok").c_str());
}

bool mark_matches(const std::string& file) {
    struct stat st{};
    if (::stat((file + "-wal").c_str(), &st) == 0 && st.st_size > 0) return false;
    const unique_fd in(::open((file + ".ok").c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
    if (!in) return false;
    std::array<char, 128> text{};
    const auto n = ::read(in.get(), text.data(), text.size());
    return n > 0 && std::string_view(text.data(), static_cast<std::size_t>(n)) == file_mark(file);
}

}  // namespace cobuild::db
